//! Who is measured, and how each is started.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// The name of the floor in results.
pub(crate) const FLOOR: &str = "floor";

/// The programs to measure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Programs {
    pub(crate) kiln: PathBuf,
    pub(crate) floor: PathBuf,
    /// QEMU, where it is installed.
    pub(crate) qemu: Option<PathBuf>,
}

/// One of those that are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Subject {
    Floor,
    Kiln,
    Qemu,
}

impl Subject {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Floor => FLOOR,
            Self::Kiln => "kiln",
            Self::Qemu => "qemu microvm",
        }
    }
}

impl Programs {
    /// All that can be measured here, the floor first.
    pub(crate) fn subjects(&self) -> Vec<Subject> {
        let mut all = vec![Subject::Floor, Subject::Kiln];
        all.extend(self.qemu.as_ref().map(|_| Subject::Qemu));
        all
    }

    /// Those that run Linux, Kiln first.
    pub(crate) fn monitors(&self) -> Vec<Subject> {
        self.subjects()
            .into_iter()
            .filter(|one| *one != Subject::Floor)
            .collect()
    }

    /// A command that runs a guest of one vCPU whose serial port is standard output.
    pub(crate) fn command(&self, subject: Subject, kernel: &Path, mib: u32) -> Command {
        match subject {
            Subject::Floor => {
                let mut command = Command::new(&self.floor);
                command.arg(kernel).arg(mib.to_string());
                command
            }
            Subject::Kiln => {
                let mut command = Command::new(&self.kiln);
                command.arg("run").arg("--kernel").arg(kernel);
                command.arg("--memory").arg(format!("{mib}M"));
                command
            }
            Subject::Qemu => {
                let program = self
                    .qemu
                    .as_deref()
                    .unwrap_or(Path::new("qemu-system-x86_64"));
                let mut command = Command::new(program);
                // Without a clock a Linux guest asks for one 20,000 times before it gives up.
                command.args(["-machine", "microvm,accel=kvm,rtc=on"]);
                // This register cannot be set where KVM is nested.
                command.args(["-cpu", "host,-arch-capabilities"]);
                command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
                command.args(["-serial", "stdio", "-no-reboot", "-m"]);
                command.arg(format!("{mib}M")).arg("-kernel").arg(kernel);
                // Where the guest writes to power off.
                command.args(["-device", "isa-debug-exit,iobase=0x600,iosize=1"]);
                command
            }
        }
    }
}

/// Starts a command with its output on a pipe.
pub(crate) fn spawn(command: &mut Command) -> Result<Child> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("start {}", command.get_program().display()))
}

/// Waits until the guest has printed something.
pub(crate) fn first_byte(child: &mut Child) -> Result<()> {
    let output = child.stdout.as_mut().context("its output is no pipe")?;
    let mut byte = [0];
    let count = output.read(&mut byte).context("read the guest's output")?;
    ensure!(count == 1, "the guest printed nothing");
    Ok(())
}

/// How long a guest took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Life {
    /// From before its program's start until the guest's first byte was read.
    pub(crate) first: Duration,
    /// Until the program's end was known.
    pub(crate) reaped: Duration,
}

/// Runs a guest that prints, and powers off.
pub(crate) fn live(command: &mut Command) -> Result<Life> {
    let since = Instant::now();
    let mut child = spawn(command)?;
    let printed = first_byte(&mut child);
    let first = since.elapsed();
    // What it prints besides must not hold it up.
    if let Some(output) = &mut child.stdout {
        std::io::copy(output, &mut std::io::sink()).context("read the guest's output")?;
    }
    child.wait().context("wait for the program")?;
    let reaped = since.elapsed();
    printed.with_context(|| format!("run {:?}", command.get_program()))?;
    Ok(Life { first, reaped })
}
