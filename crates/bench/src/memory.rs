//! What a program takes beside its guest's memory, and what many idle ones take.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::guest;
use crate::stats::{Row, rows};
use crate::subject::{Programs, Subject, first_byte, spawn};

/// How long a machine runs before its memory is looked at: what its start needed is given back then.
const REST: Duration = Duration::from_secs(1);
/// A tap that is there as long as this is measured, for those who may make one.
const TAP: &str = "kiln-memory";

/// The program of a guest that has halted; killed when dropped.
struct Idle(Child);

impl Idle {
    fn start(
        programs: &Programs,
        subject: Subject,
        kernel: &Path,
        extra: &[String],
        mib: u32,
    ) -> Result<Self> {
        let mut command = programs.command(subject, kernel, mib);
        command.args(extra);
        let mut idle = Self(spawn(&mut command)?);
        first_byte(&mut idle.0).with_context(|| format!("run {command:?}"))?;
        Ok(idle)
    }

    fn proc(&self, file: &str) -> Result<String> {
        let path = PathBuf::from(format!("/proc/{}/{file}", self.0.id()));
        std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }

    /// Resident KiB beside the guest's memory, which are its mappings of `guest` bytes and more.
    fn overhead(&self, guest: u64) -> Result<f64> {
        let mut sum = 0;
        let mut is_guest = false;
        for line in self.proc("smaps")?.lines() {
            if let Some(kib) = line.strip_prefix("Rss:") {
                let kib: u64 = kib.trim().trim_end_matches(" kB").parse()?;
                sum += if is_guest { 0 } else { kib };
            } else if let Some(size) = mapping_size(line) {
                is_guest = size >= guest;
            }
        }
        Ok(sum as f64)
    }

    fn threads(&self) -> Result<f64> {
        let folder = format!("/proc/{}/task", self.0.id());
        Ok(std::fs::read_dir(folder)?.count() as f64)
    }

    /// Proportional resident KiB, the guest's memory included.
    fn proportional(&self) -> Result<f64> {
        let rollup = self.proc("smaps_rollup")?;
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
        let kib = line.context("no Pss in smaps_rollup")?;
        Ok(kib.trim().trim_end_matches(" kB").parse()?)
    }

    /// Processor time so far, in seconds.
    fn processor(&self) -> Result<f64> {
        let stat = self.proc("stat")?;
        // The second field is a name in parentheses.
        let fields = stat.rsplit(')').next().unwrap_or_default();
        let ticks = fields.split_whitespace().skip(11).take(2);
        let ticks: f64 = ticks.map(|ticks| ticks.parse().unwrap_or(0.0)).sum();
        Ok(ticks / 100.0)
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The tap of the network interface; removed when dropped.
struct Tap(());

impl Tap {
    fn new() -> Option<Self> {
        ip(&format!("tuntap add dev {TAP} mode tap")).then_some(Self(()))
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        ip(&format!("link delete {TAP}"));
    }
}

fn ip(line: &str) -> bool {
    let status = Command::new("ip").args(line.split(' ')).status();
    status.is_ok_and(|status| status.success())
}

/// The size of a mapping, from its line in `smaps`; `None` for lines of another kind.
fn mapping_size(line: &str) -> Option<u64> {
    let (range, _) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    number(end)?.checked_sub(number(start)?)
}

/// Memory beside the guest's.
pub(crate) fn run(programs: &Programs, runs: u32, folder: &Path) -> Result<Vec<Row>> {
    let kernel = guest::write(folder, "halted", &guest::halted(), 0)?;
    let disk = folder.join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).context("write a disk")?;
    let with_disk = vec!["--disk".to_owned(), disk.display().to_string()];
    let net = ["--net".to_owned(), format!("tap={TAP}")];
    let tap = Tap::new();
    let (extras, devices) = if tap.is_some() {
        (
            [&with_disk[..], &net].concat(),
            "a disk and a network interface",
        )
    } else {
        (with_disk, "a disk; we may make no tap")
    };
    let mut all = Vec::new();
    for mib in [128, 4096] {
        let mut samples = Vec::new();
        for subject in programs.subjects() {
            let extra = match subject {
                Subject::Kiln => &extras[..],
                Subject::Floor | Subject::Qemu => &[],
            };
            let mut figures = Vec::new();
            for _ in 0..runs.min(5) {
                let idle = Idle::start(programs, subject, &kernel, extra, mib)?;
                std::thread::sleep(REST);
                // A guest may lie in two parts, of which the smaller has a quarter at least.
                figures.push(idle.overhead(u64::from(mib) << 18)?);
            }
            samples.push((subject.name(), figures));
        }
        let what = format!("resident beside a guest of {mib} MiB, KiB (kiln: with {devices})");
        all.extend(rows(&what, &samples));
    }
    Ok(all)
}

/// Many idle machines.
pub(crate) fn density(programs: &Programs, machines: u32, folder: &Path) -> Result<Vec<Row>> {
    let kernel = guest::write(folder, "halted", &guest::halted(), 0)?;
    let mut all = Vec::new();
    for count in [machines.div_ceil(4), machines] {
        for subject in [Subject::Floor, Subject::Kiln] {
            let idle = (0..count)
                .map(|_| Idle::start(programs, subject, &kernel, &[], 128))
                .collect::<Result<Vec<_>>>()?;
            std::thread::sleep(REST);
            let sum = |what: fn(&Idle) -> Result<f64>| idle.iter().map(what).sum::<Result<f64>>();
            let before = sum(Idle::processor)?;
            std::thread::sleep(Duration::from_secs(2));
            let used = (sum(Idle::processor)? - before) / 2.0;
            let each = |total: f64| vec![total / f64::from(count)];
            let name = subject.name();
            for (what, figure) in [
                (
                    "proportional memory each, KiB",
                    each(sum(Idle::proportional)?),
                ),
                ("threads each", each(sum(Idle::threads)?)),
                ("processors used by all", vec![used]),
            ] {
                let what = format!("{count} idle machines: {what}");
                all.extend(rows(&what, &[(name, figure)]));
            }
        }
    }
    Ok(all)
}
