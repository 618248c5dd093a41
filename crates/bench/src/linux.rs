//! Linux guests: how Kiln and QEMU's microvm are told to run one, and waiting for what it prints.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::nested::{self, Task};
use crate::subject::{Programs, Subject};

/// How long a guest may print nothing, in the machine's own time: a second is a thousand million
/// instructions. A guest that stands still uses all of them.
const LIMIT: Duration = Duration::from_secs(8);
/// The guest's memory, in mebibytes.
const MIB: u32 = 256;
/// What the kernels are told, in the order that anchors of other monitors were measured with.
const CMDLINE: &str = "console=ttyS0 reboot=t panic=-1 quiet";

impl Programs {
    /// A command that runs a Linux guest of one vCPU whose serial port is standard output, and whose
    /// script is told to do these loads. Devices are for the caller to add.
    pub(crate) fn linux(
        &self,
        subject: Subject,
        kernel: &Path,
        initrd: &Path,
        loads: &[&str],
    ) -> Result<Command> {
        let mut command = self.command(subject, kernel, MIB);
        let mut cmdline = CMDLINE.to_owned();
        if !loads.is_empty() {
            cmdline += " loads=";
            cmdline += &loads.join(",");
        }
        match subject {
            Subject::Floor => bail!("the floor runs no Linux"),
            Subject::Kiln => command.args(["--cmdline", &cmdline]),
            Subject::Qemu => command.args(["-append", &cmdline]),
        };
        let option = match subject {
            Subject::Qemu => "-initrd",
            _ => "--initrd",
        };
        command.arg(option).arg(initrd);
        Ok(command)
    }
}

/// A guest that runs. Dropping it ends it.
pub(crate) struct Running {
    child: Child,
    since: Instant,
    lines: mpsc::Receiver<String>,
}

impl Running {
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let since = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("start {}", command.get_program().display()))?;
        let output = child.stdout.take().context("its output is no pipe")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || read(output, &sender));
        Ok(Self {
            child,
            since,
            lines,
        })
    }

    /// How long it has run.
    pub(crate) fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// Waits for the next line.
    fn line(&self) -> Result<String> {
        match self.lines.recv_timeout(LIMIT) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => bail!("the guest prints nothing"),
            Err(RecvTimeoutError::Disconnected) => bail!("the guest has ended"),
        }
    }

    /// Waits for a line with this in it.
    pub(crate) fn wait_for(&self, what: &str) -> Result<String> {
        loop {
            let line = self.line().with_context(|| format!("wait for {what}"))?;
            if line.contains(what) {
                return Ok(line);
            }
        }
    }
}

/// Has a guest do what of its script's loads was not measured yet. They are each what the script
/// calls it, what the figure is called, and what is made of what the guest says.
pub(crate) fn measure_loads(
    loads: &[(&str, &str)],
    task: &mut Task,
    command: impl FnOnce(&[&str]) -> Result<Command>,
    figure: impl Fn(&str) -> Result<f64>,
) -> Result<()> {
    let left: Vec<_> = loads.iter().filter(|(_, name)| !task.has(name)).collect();
    let names: Vec<_> = left.iter().map(|(load, _)| *load).collect();
    if names.is_empty() {
        return Ok(());
    }
    let running = Running::start(&mut command(&names)?)?;
    for (load, name) in left {
        let said = running.load(load)?;
        let value = figure(&said).with_context(|| format!("understand `{said}`"))?;
        task.note(name, value)?;
    }
    Ok(())
}

impl Running {
    /// Waits for the end of a load of the guest's script, and returns what is said of it. Each line
    /// of the guest's is a sign of life for those outside.
    pub(crate) fn load(&self, load: &str) -> Result<String> {
        let prefix = format!("LOAD {load} ");
        loop {
            let line = self.line().with_context(|| format!("wait for {load}"))?;
            nested::progress(&line)?;
            if let Some(said) = line.strip_prefix(&prefix) {
                return Ok(said.to_owned());
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when the process has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read(output: ChildStdout, sender: &mpsc::Sender<String>) {
    let mut reader = BufReader::new(output);
    let mut bytes = Vec::new();
    while matches!(reader.read_until(b'\n', &mut bytes), Ok(1..)) {
        let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        if sender.send(line).is_err() {
            break;
        }
        bytes.clear();
    }
}
