//! What an exit to the program costs: the time of a guest that makes many, less that of one that
//! makes none.
//!
//! Where the clock counts instructions (the nested machine with `--icount`) a nanosecond is an
//! instruction, of guest, host kernel and program together.

use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::guest::{self, Exit};
use crate::nested::{Figures, Inside, Job, Plan};
use crate::stats::{Row, rows};
use crate::subject::{Programs, Subject, live};

const MIB: u32 = 128;
const KINDS: [(Exit, &str); 3] = [
    (Exit::Port, "a port write to nothing"),
    (Exit::Mmio, "an MMIO write to nothing"),
    (Exit::Serial, "a byte on the serial port"),
];

/// Something to measure in the nested machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Case {
    subject: Subject,
    kind: Exit,
    count: u32,
    /// Which of the repetitions.
    run: u32,
}

/// Measures in time, on this machine.
pub(crate) fn in_time(
    programs: &Programs,
    runs: u32,
    count: u32,
    folder: &Path,
) -> Result<Vec<Row>> {
    let mut all = Vec::new();
    for (kind, name) in KINDS {
        let subjects = programs.subjects();
        let mut samples: Vec<_> = subjects
            .iter()
            .map(|one| (one.name(), Vec::new()))
            .collect();
        for _ in 0..runs {
            for (index, &subject) in subjects.iter().enumerate() {
                samples[index]
                    .1
                    .push(cost(programs, subject, kind, count, folder)?);
            }
        }
        all.extend(rows(&format!("{name}, ns"), &samples));
    }
    Ok(all)
}

/// Measures in instructions, in the nested machine.
pub(crate) fn in_instructions(plan: &Plan<'_>, runs: u32, count: u32) -> Result<Vec<Row>> {
    let subjects = plan.programs.subjects();
    let mut jobs = Vec::new();
    for run in 0..runs {
        for (kind, _) in KINDS {
            for &subject in &subjects {
                jobs.push(Job::Exits(Case {
                    subject,
                    kind,
                    count,
                    run,
                }));
            }
        }
    }
    let done = plan.collect(&jobs)?;
    let mut all = Vec::new();
    for (kind, name) in KINDS {
        let samples = subjects.iter().map(|&subject| {
            let samples = done.iter().filter(
                |(job, _)| matches!(job, Job::Exits(case) if (case.subject, case.kind) == (subject, kind)),
            );
            let samples = samples.flat_map(|(_, figures)| figures);
            (subject.name(), samples.map(|(_, value)| *value).collect())
        });
        all.extend(rows(
            &format!("{name}, instructions"),
            &samples.collect::<Vec<_>>(),
        ));
    }
    Ok(all)
}

/// Measures once, in the nested machine.
pub(crate) fn measure(case: Case, inside: &Inside) -> Result<Figures> {
    let Case {
        subject,
        kind,
        count,
        run: _,
    } = case;
    let cost = cost(&inside.programs, subject, kind, count, &inside.folder)?;
    Ok(vec![("exit".to_owned(), cost)])
}

/// What an exit costs, in nanoseconds.
fn cost(
    programs: &Programs,
    subject: Subject,
    kind: Exit,
    count: u32,
    folder: &Path,
) -> Result<f64> {
    let none = guest::write(folder, "none", &guest::exits(kind, 0), 0)?;
    let many = guest::write(folder, "many", &guest::exits(kind, count), 0)?;
    let without = live(&mut programs.command(subject, &none, MIB))?.reaped;
    let with = live(&mut programs.command(subject, &many, MIB))?.reaped;
    Ok((with.as_secs_f64() - without.as_secs_f64()) * 1e9 / f64::from(count))
}
