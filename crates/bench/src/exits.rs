//! What an exit to the program costs: the time of a guest that makes many, less that of one that
//! makes none.
//!
//! Where the clock counts instructions (the nested machine with `--icount`) a nanosecond is an
//! instruction, of guest, host kernel and program together.

use std::path::Path;

use anyhow::Result;

use crate::guest::{self, Exit};
use crate::stats::{Row, rows};
use crate::subject::{Programs, live};

const MIB: u32 = 128;

pub(crate) fn run(programs: &Programs, runs: u32, count: u32, folder: &Path) -> Result<Vec<Row>> {
    let mut all = Vec::new();
    for (kind, name) in [
        (Exit::Port, "a port write to nothing, ns"),
        (Exit::Mmio, "an MMIO write to nothing, ns"),
        (Exit::Serial, "a byte on the serial port, ns"),
    ] {
        let none = guest::write(folder, "none", &guest::exits(kind, 0), 0)?;
        let many = guest::write(folder, "many", &guest::exits(kind, count), 0)?;
        let subjects = programs.subjects();
        let mut samples: Vec<_> = subjects
            .iter()
            .map(|one| (one.name(), Vec::new()))
            .collect();
        for _ in 0..runs {
            for (index, &subject) in subjects.iter().enumerate() {
                let without = live(&mut programs.command(subject, &none, MIB))?.reaped;
                let with = live(&mut programs.command(subject, &many, MIB))?.reaped;
                let more = with.as_secs_f64() - without.as_secs_f64();
                samples[index].1.push(more * 1e9 / f64::from(count));
            }
        }
        all.extend(rows(name, &samples));
    }
    Ok(all)
}
