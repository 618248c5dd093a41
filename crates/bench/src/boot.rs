//! What it takes to boot Debian's kernel: instructions from the start of the program to init's first
//! line, and how often the guest leaves KVM meanwhile.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::linux::Running;
use crate::nested::{Figures, Inside, Job, Plan};
use crate::stats::{Row, rows_to};
use crate::subject::Subject;
use crate::trace;

/// What init prints first.
pub(crate) const HELLO: &str = "HELLO-FROM-INIT";

/// Which kernel file, and what is known of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Image {
    /// The ELF kernel.
    Vmlinux,
    /// The bzImage, never seen before.
    Packed,
    /// The bzImage, which Kiln has unpacked before.
    Cached,
}

/// A boot to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Case {
    subject: Subject,
    image: Image,
    /// Count the exits, which costs instructions: those are then not the boot's.
    exits: bool,
    /// Which of the repetitions.
    run: u32,
}

const IMAGES: [(Image, &str); 3] = [
    (Image::Vmlinux, "boot of the vmlinux, million instructions"),
    (
        Image::Packed,
        "boot of the bzImage, first time, million instructions",
    ),
    (
        Image::Cached,
        "boot of the bzImage, seen before, million instructions",
    ),
];

/// Boots each kernel `runs` times with each monitor.
pub(crate) fn run(plan: &Plan<'_>, runs: u32) -> Result<Vec<Row>> {
    let subjects = plan.programs.monitors();
    let mut jobs = Vec::new();
    for run in 0..runs {
        for (image, _) in IMAGES {
            for &subject in &subjects {
                // Only Kiln remembers.
                if image == Image::Cached && subject != Subject::Kiln {
                    continue;
                }
                jobs.push(Job::Boot(Case {
                    subject,
                    image,
                    exits: false,
                    run,
                }));
            }
        }
    }
    for &subject in &subjects {
        jobs.push(Job::Boot(Case {
            subject,
            image: Image::Vmlinux,
            exits: true,
            run: 0,
        }));
    }
    let done = plan.collect(&jobs)?;
    let figures = |wanted: &dyn Fn(&Case) -> bool, what: &str| -> Vec<f64> {
        done.iter()
            .filter(|(job, _)| matches!(job, Job::Boot(case) if wanted(case)))
            .flat_map(|(_, figures)| figures)
            .filter(|(name, _)| name == what)
            .map(|(_, value)| *value)
            .collect()
    };
    let mut all = Vec::new();
    for (image, name) in IMAGES {
        let samples = subjects.iter().map(|&subject| {
            // QEMU's guest unpacks it each time.
            let image = match (image, subject) {
                (Image::Cached, Subject::Qemu) => Image::Packed,
                _ => image,
            };
            let is_wanted =
                |case: &Case| (case.subject, case.image, case.exits) == (subject, image, false);
            (subject.name(), figures(&is_wanted, BOOT))
        });
        all.extend(rows_to(
            Subject::Qemu.name(),
            name,
            &samples.collect::<Vec<_>>(),
        ));
    }
    for what in COUNTERS
        .map(|(_, what)| what)
        .into_iter()
        .chain([TO_PROGRAM])
    {
        let samples = subjects.iter().map(|&subject| {
            let is_wanted = |case: &Case| case.subject == subject && case.exits;
            (subject.name(), figures(&is_wanted, what))
        });
        all.extend(rows_to(
            Subject::Qemu.name(),
            what,
            &samples.collect::<Vec<_>>(),
        ));
    }
    for (job, figures) in &done {
        if let Job::Boot(case) = job {
            for (name, count) in figures.iter().filter(|(name, _)| name.contains('{')) {
                eprintln!("bench: {}: {count} {name}", case.subject.name());
            }
        }
    }
    Ok(all)
}

/// The name of the figure that counts.
const BOOT: &str = "boot";
const TO_PROGRAM: &str = "exits to the program until init";
/// KVM's own counters of all machines: files, and what they count.
const COUNTERS: [(&str, &str); 4] = [
    ("exits", "exits of the guest until init"),
    ("io_exits", "of these: port accesses"),
    ("mmio_exits", "of these: memory accesses to the program"),
    ("irq_exits", "of these: host interrupts"),
];

/// Boots once.
pub(crate) fn measure(case: Case, inside: &Inside) -> Result<Figures> {
    let guest = inside.guest()?;
    let kernel = match case.image {
        Image::Vmlinux => &guest.vmlinux,
        Image::Packed | Image::Cached => &guest.bzimage,
    };
    let mut command = inside
        .programs
        .linux(case.subject, kernel, &guest.hello, &[])?;
    let cache = inside.folder.join("cache");
    command.env("XDG_CACHE_HOME", &cache);
    match case.image {
        Image::Vmlinux => {}
        Image::Packed => forget(&cache)?,
        Image::Cached if cache.exists() => {}
        Image::Cached => {
            boot(&mut command)?;
        }
    }
    if !case.exits {
        return Ok(vec![(BOOT.to_owned(), boot(&mut command)?.age / 1e6)]);
    }
    let tracing = trace::Tracing::start()?;
    let before = counters()?;
    let booted = boot(&mut command)?;
    let after = counters()?;
    let mut figures: Figures = COUNTERS
        .into_iter()
        .zip(before.iter().zip(&after))
        .map(|((_, what), (before, after))| (what.to_owned(), after - before))
        .collect();
    drop(booted);
    let histograms = tracing.stop()?;
    figures.push((TO_PROGRAM.to_owned(), histograms.exits_to_program));
    figures.extend(histograms.kinds);
    Ok(figures)
}

/// A guest that has said hello, and its age then, in nanoseconds: in instructions.
struct Booted {
    age: f64,
    _guest: Running,
}

fn boot(command: &mut Command) -> Result<Booted> {
    let guest = Running::start(command)?;
    guest.wait_for(HELLO)?;
    Ok(Booted {
        age: guest.age().as_nanos() as f64,
        _guest: guest,
    })
}

fn forget(cache: &Path) -> Result<()> {
    if cache.exists() {
        std::fs::remove_dir_all(cache).context("empty the cache")?;
    }
    Ok(())
}

fn counters() -> Result<Vec<f64>> {
    let counter = |(file, _)| -> Result<f64> {
        let text = trace::kvm_counter(file)?;
        let number = text.trim().parse::<f64>();
        number.with_context(|| format!("read the counter {file}"))
    };
    let counters = COUNTERS
        .map(counter)
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    ensure!(counters.len() == COUNTERS.len(), "a counter is missing");
    Ok(counters)
}
