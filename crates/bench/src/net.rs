//! What TCP over a tap costs: bytes for each million instructions of guest, monitor and host kernel
//! together, with iperf3 at both ends.

use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::block::add_disk;
use crate::linux::measure_loads;
use crate::nested::{Inside, Job, Plan, Task};
use crate::stats::{Row, rows_to};
use crate::subject::Subject;

const TAP: &str = "kiln-bench";
/// The host's end; the guest's script (`resources/guest/bench/net`) knows it too.
const ADDRESS: &str = "192.168.160.1/24";

/// How many million instructions are a second.
const MILLIONS: f64 = 1000.0;

/// A guest with a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Case {
    subject: Subject,
    /// Which of the repetitions.
    run: u32,
}

/// The loads of the guest's script: what they are called there, and here.
const LOADS: [(&str, &str); 2] = [
    ("send", "TCP from the guest"),
    ("receive", "TCP to the guest"),
];

/// Measures each monitor's network `runs` times.
pub(crate) fn run(plan: &Plan<'_>, runs: u32) -> Result<Vec<Row>> {
    let subjects = plan.programs.monitors();
    let cases = (0..runs).flat_map(|run| {
        subjects
            .iter()
            .map(move |&subject| Job::Net(Case { subject, run }))
    });
    let done = plan.collect(&cases.collect::<Vec<_>>())?;
    let mut all = Vec::new();
    for (_, name) in LOADS {
        let samples = subjects.iter().map(|&subject| {
            let figures = done
                .iter()
                .filter(|(job, _)| matches!(job, Job::Net(case) if case.subject == subject))
                .flat_map(|(_, figures)| figures)
                .filter(|(load, _)| load == name);
            (subject.name(), figures.map(|(_, value)| *value).collect())
        });
        all.extend(rows_to(
            Subject::Qemu.name(),
            &format!("{name}, KiB for a million instructions"),
            &samples.collect::<Vec<_>>(),
        ));
    }
    Ok(all)
}

/// Measures what of the loads was not measured yet.
pub(crate) fn measure(case: Case, inside: &Inside, task: &mut Task) -> Result<()> {
    let guest = inside.guest()?;
    make_tap()?;
    let _server = Server::start()?;
    let command = |loads: &[&str]| {
        let programs = &inside.programs;
        let mut command = programs.linux(case.subject, &guest.vmlinux, &guest.net, loads)?;
        add_disk(
            &mut command,
            case.subject,
            &guest.tools,
            "tools",
            ",readonly",
        );
        add_tap(&mut command, case.subject);
        Ok(command)
    };
    let figure = |said: &str| Ok(rate(said)? * 1000.0 / 8.0 / 1024.0 / MILLIONS);
    measure_loads(&LOADS, task, command, figure)
}

fn add_tap(command: &mut Command, subject: Subject) {
    if subject == Subject::Qemu {
        let netdev = format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off");
        command.args([
            "-netdev",
            &netdev,
            "-device",
            "virtio-net-device,netdev=net",
        ]);
    } else {
        command.args(["--net", &format!("tap={TAP}")]);
    }
}

/// The rate in a line of iperf3's, in kilobits a second.
fn rate(line: &str) -> Result<f64> {
    let (before, _) = line.split_once(" Kbits/sec").context("it has no rate")?;
    let number = before.split_whitespace().last().unwrap_or_default();
    number.parse().context("its rate is no number")
}

/// Makes the tap, once a machine.
fn make_tap() -> Result<()> {
    if std::path::Path::new("/sys/class/net").join(TAP).exists() {
        return Ok(());
    }
    for line in [
        format!("tuntap add dev {TAP} mode tap"),
        format!("address add {ADDRESS} dev {TAP}"),
        format!("link set {TAP} up"),
    ] {
        let status = Command::new("ip")
            .args(line.split(' '))
            .status()
            .context("start ip")?;
        ensure!(status.success(), "ip {line}: {status}");
    }
    Ok(())
}

/// The other end of the guest's iperf3. Dropping it ends it.
struct Server(Child);

impl Server {
    fn start() -> Result<Self> {
        let child = Command::new("iperf3")
            .arg("--server")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("start iperf3")?;
        Ok(Self(child))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only when the process has ended and was waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_read_from_the_receivers_line() {
        let line = "LOAD send [  5]   0.00-1.00   sec   119 MBytes  998244 Kbits/sec  receiver";
        assert_eq!(rate(line).unwrap(), 998_244.0);
        assert!(rate("LOAD send ").is_err());
    }
}
