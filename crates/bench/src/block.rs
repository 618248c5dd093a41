//! What an operation of a disk costs: instructions of guest, monitor and host kernel together, with
//! fio in the guest, on a raw image in the host's memory.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::linux::Running;
use crate::nested::{Figures, Inside, Job, Plan};
use crate::stats::{Row, rows_to};
use crate::subject::Subject;

/// The size of the image, in mebibytes.
const SIZE: usize = 48;

/// A guest with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Case {
    subject: Subject,
    /// Which of the repetitions.
    run: u32,
}

/// The loads of the guest's script (`resources/guest/bench/block`): what they are called there, and
/// here.
const LOADS: [(&str, &str); 5] = [
    ("randread 4k 1", "4 KiB random read, depth 1"),
    ("randwrite 4k 1", "4 KiB random write, depth 1"),
    ("randread 4k 32", "4 KiB random read, depth 32"),
    ("randwrite 4k 32", "4 KiB random write, depth 32"),
    ("read 128k 1", "128 KiB sequential read, depth 1"),
];

/// Measures each monitor's disk `runs` times.
pub(crate) fn run(plan: &Plan<'_>, runs: u32) -> Result<Vec<Row>> {
    let subjects = plan.programs.monitors();
    let cases = (0..runs).flat_map(|run| {
        subjects
            .iter()
            .map(move |&subject| Job::Block(Case { subject, run }))
    });
    let done = plan.collect(&cases.collect::<Vec<_>>())?;
    let mut all = Vec::new();
    for (_, name) in LOADS {
        let samples = subjects.iter().map(|&subject| {
            let figures = done
                .iter()
                .filter(|(job, _)| matches!(job, Job::Block(case) if case.subject == subject))
                .flat_map(|(_, figures)| figures)
                .filter(|(load, _)| load == name);
            (subject.name(), figures.map(|(_, value)| *value).collect())
        });
        all.extend(rows_to(
            Subject::Qemu.name(),
            &format!("{name}, thousand instructions"),
            &samples.collect::<Vec<_>>(),
        ));
    }
    Ok(all)
}

/// Measures all loads once.
pub(crate) fn measure(case: Case, inside: &Inside) -> Result<Figures> {
    let guest = inside.guest()?;
    let disk = image(&inside.folder)?;
    let mut command = inside
        .programs
        .linux(case.subject, &guest.vmlinux, &guest.block)?;
    add_disk(&mut command, case.subject, &guest.tools, "tools", true);
    add_disk(&mut command, case.subject, &disk, "bench", false);
    let running = Running::start(&mut command)?;
    let mut figures = Figures::new();
    for (load, name) in LOADS {
        let said = running.load(load)?;
        let rate = rate(&said).with_context(|| format!("read what fio says: {said}"))?;
        figures.push((name.to_owned(), 1e6 / rate));
    }
    Ok(figures)
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

/// Adds a disk with an id to a guest.
pub(crate) fn add_disk(
    command: &mut Command,
    subject: Subject,
    path: &Path,
    id: &str,
    is_readonly: bool,
) {
    let path = path.display();
    if subject == Subject::Qemu {
        let readonly = if is_readonly { "on" } else { "off" };
        command.arg("-drive").arg(format!(
            "if=none,id={id},file={path},format=raw,readonly={readonly}"
        ));
        command
            .arg("-device")
            .arg(format!("virtio-blk-device,drive={id},serial={id}"));
    } else {
        let readonly = if is_readonly { ",readonly" } else { "" };
        command
            .arg("--disk")
            .arg(format!("{path},id={id}{readonly}"));
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
