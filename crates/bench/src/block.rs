//! What an operation of a disk costs: instructions of guest, monitor and host kernel together, with
//! fio in the guest, on a raw image in the host's memory.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::linux::measure_loads;
use crate::nested::{Inside, Job, Plan, Task};
use crate::stats::{Row, rows_to};
use crate::subject::Subject;

/// The size of the image, in mebibytes.
const SIZE: usize = 48;

/// Who reads and writes the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Engine {
    /// Kiln's thread itself; what `auto` makes of an image in memory.
    KilnSync,
    KilnIoUring,
    /// QEMU, as it does by itself.
    Qemu,
}

impl Engine {
    fn subject(self) -> Subject {
        match self {
            Self::KilnSync | Self::KilnIoUring => Subject::Kiln,
            Self::Qemu => Subject::Qemu,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::KilnSync => "kiln, sync",
            Self::KilnIoUring => "kiln, io_uring",
            Self::Qemu => Subject::Qemu.name(),
        }
    }

    /// What is said of the disk besides.
    fn options(self) -> &'static str {
        match self {
            Self::KilnSync => ",engine=sync",
            Self::KilnIoUring => ",engine=io_uring",
            Self::Qemu => "",
        }
    }
}

/// A guest with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Case {
    engine: Engine,
    /// Which of the repetitions.
    run: u32,
}

/// The loads of the guest's script (`resources/guest/bench/block`): what they are called there, and
/// here.
const LOADS: [(&str, &str); 5] = [
    ("randread/4k/1", "4 KiB random read, depth 1"),
    ("randwrite/4k/1", "4 KiB random write, depth 1"),
    ("randread/4k/32", "4 KiB random read, depth 32"),
    ("randwrite/4k/32", "4 KiB random write, depth 32"),
    ("read/128k/1", "128 KiB sequential read, depth 1"),
];

/// Measures each monitor's disk `runs` times.
pub(crate) fn run(plan: &Plan<'_>, runs: u32) -> Result<Vec<Row>> {
    let monitors = plan.programs.monitors();
    let mut engines = vec![Engine::KilnSync, Engine::KilnIoUring, Engine::Qemu];
    engines.retain(|engine| monitors.contains(&engine.subject()));
    let cases = (0..runs).flat_map(|run| {
        let engines = engines.iter();
        engines.map(move |&engine| Job::Block(Case { engine, run }))
    });
    let done = plan.collect(&cases.collect::<Vec<_>>())?;
    let mut all = Vec::new();
    for (_, name) in LOADS {
        let samples = engines.iter().map(|&engine| {
            let figures = done
                .iter()
                .filter(|(job, _)| matches!(job, Job::Block(case) if case.engine == engine))
                .flat_map(|(_, figures)| figures)
                .filter(|(load, _)| load == name);
            (engine.name(), figures.map(|(_, value)| *value).collect())
        });
        all.extend(rows_to(
            Subject::Qemu.name(),
            &format!("{name}, thousand instructions"),
            &samples.collect::<Vec<_>>(),
        ));
    }
    Ok(all)
}

/// Measures what of the loads was not measured yet.
pub(crate) fn measure(case: Case, inside: &Inside, task: &mut Task) -> Result<()> {
    let guest = inside.guest()?;
    let disk = image(&inside.folder)?;
    let subject = case.engine.subject();
    let command = |loads: &[&str]| {
        let programs = &inside.programs;
        let mut command = programs.linux(subject, &guest.vmlinux, &guest.block, loads)?;
        add_disk(&mut command, subject, &guest.tools, "tools", ",readonly");
        add_disk(&mut command, subject, &disk, "bench", case.engine.options());
        Ok(command)
    };
    let figure = |said: &str| Ok(1e6 / rate(said)?);
    measure_loads(&LOADS, task, command, figure)
}

/// The operations a second in what fio says: `READS;WRITES`.
fn rate(figures: &str) -> Result<f64> {
    let (reads, writes) = figures.trim().split_once(';').context("it has no rates")?;
    let total = reads.parse::<f64>()? + writes.parse::<f64>()?;
    ensure!(total > 0.0, "it did nothing");
    Ok(total)
}

/// Makes an image that has all of its blocks.
fn image(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("disk");
    let mut file = File::create(&path).context("make a disk image")?;
    let block: Vec<u8> = (0..1 << 20u32).map(|at| (at >> 8) as u8 | 1).collect();
    for _ in 0..SIZE {
        file.write_all(&block).context("fill a disk image")?;
    }
    Ok(path)
}

/// Adds a disk with an id to a guest, with these options of Kiln's.
pub(crate) fn add_disk(
    command: &mut Command,
    subject: Subject,
    path: &Path,
    id: &str,
    options: &str,
) {
    let path = path.display();
    if subject == Subject::Qemu {
        let readonly = if options.contains(",readonly") {
            "on"
        } else {
            "off"
        };
        command.arg("-drive").arg(format!(
            "if=none,id={id},file={path},format=raw,readonly={readonly}"
        ));
        command
            .arg("-device")
            .arg(format!("virtio-blk-device,drive={id},serial={id}"));
    } else {
        command
            .arg("--disk")
            .arg(format!("{path},id={id}{options}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_the_sum_of_reads_and_writes() {
        assert_eq!(rate("1500;0").unwrap(), 1500.0);
        assert_eq!(rate("1500;20").unwrap(), 1520.0);
        for wrong in ["0;0", "", "fio: failed", "x;1"] {
            assert!(rate(wrong).is_err(), "{wrong}");
        }
    }
}
