//! KVM's counters and trace points, as the kernel's debugging files have them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::nested::Figures;

const DEBUG: &str = "/sys/kernel/debug";
const TRACING: &str = "/sys/kernel/tracing";

/// The trace points that are counted by kind: a name, and the fields that make a kind.
const POINTS: [(&str, &str); 5] = [
    ("kvm_userspace_exit", "reason"),
    ("kvm_exit", "exit_reason"),
    ("kvm_pio", "port.hex,rw"),
    ("kvm_mmio", "gpa.hex,type"),
    ("kvm_msr", "ecx.hex,write"),
];

fn mount(kind: &str, folder: &str, probe: &str) -> Result<()> {
    if !Path::new(folder).join(probe).exists() {
        let status = Command::new("mount")
            .args(["-t", kind, kind, folder])
            .status()
            .with_context(|| format!("mount {kind}"))?;
        ensure!(status.success(), "mount {kind}: {status}");
    }
    Ok(())
}

/// Returns what one of KVM's counters says, over all machines that there are.
pub(crate) fn kvm_counter(name: &str) -> Result<String> {
    mount("debugfs", DEBUG, "kvm")?;
    let path = Path::new(DEBUG).join("kvm").join(name);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// What was counted.
pub(crate) struct Histograms {
    /// Exits from KVM to the program.
    pub(crate) exits_to_program: f64,
    /// Kinds of events, and how often each was.
    pub(crate) kinds: Figures,
}

/// Counting that goes on.
pub(crate) struct Tracing(());

impl Tracing {
    pub(crate) fn start() -> Result<Self> {
        mount("tracefs", TRACING, "events")?;
        for (point, keys) in POINTS {
            set(point, &trigger(keys))?;
        }
        Ok(Self(()))
    }

    pub(crate) fn stop(self) -> Result<Histograms> {
        let mut exits_to_program = 0.0;
        let mut kinds = Figures::new();
        for (point, keys) in POINTS {
            let path = file(point, "hist");
            let text =
                fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            set(point, &format!("!{}", trigger(keys)))?;
            for (kind, count) in parse(&text) {
                if point == "kvm_userspace_exit" {
                    exits_to_program += count;
                }
                kinds.push((format!("{point} {kind}"), count));
            }
        }
        Ok(Histograms {
            exits_to_program,
            kinds,
        })
    }
}

fn file(point: &str, name: &str) -> PathBuf {
    Path::new(TRACING).join("events/kvm").join(point).join(name)
}

fn trigger(keys: &str) -> String {
    format!("hist:keys={keys}:size=4096")
}

fn set(point: &str, trigger: &str) -> Result<()> {
    let path = file(point, "trigger");
    fs::write(&path, trigger).with_context(|| format!("write {trigger} to {}", path.display()))
}

/// The lines of a histogram: `{ reason: 2 } hitcount: 310`.
fn parse(text: &str) -> Vec<(String, f64)> {
    text.lines()
        .filter_map(|line| {
            let (kind, count) = line.split_once("hitcount:")?;
            let kind: Vec<_> = kind.split_whitespace().collect();
            let count = count.trim().parse().ok()?;
            kind.first()
                .is_some_and(|word| *word == "{")
                .then(|| (kind.join(" "), count))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_read_without_its_totals() {
        let text = "# event histogram\n#\n\n{ port: 3f8, rw:          1 } hitcount:        310\n\
            { port: 64, rw: 0 } hitcount: 2\n\nTotals:\n    Hits: 312\n";
        let kinds = parse(text);
        assert_eq!(kinds[0], ("{ port: 3f8, rw: 1 }".to_owned(), 310.0));
        assert_eq!(kinds.len(), 2);
    }
}
