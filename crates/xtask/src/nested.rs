//! The nested machine: a Linux with a real `/dev/kvm` on any host, in QEMU's pure emulation.
//!
//! QEMU emulates AMD's virtualisation, so a Debian kernel in it loads `kvm-amd`. The machine sees
//! the host's files at their own paths, through virtio-fs; what it writes stays in its memory. So
//! any program of the host runs in it as it is. Its input, output and errors go through ports of a
//! virtio console, apart from the kernel's log.
//!
//! - `machine`: the command lines of QEMU and virtiofsd;
//! - `script`: what the machine is told to run;
//! - `ports`: the streams between the machine and us;
//! - `terminal`: our terminal, when a command is used interactively.

use std::ffi::OsString;
use std::fs;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::{assets, initrd, packages};

mod machine;
mod ports;
mod script;
mod terminal;

use machine::Machine;
use ports::{Event, Streams};

/// The exit status of [`run`] when the command took too long, as that of timeout(1).
pub const TIMED_OUT: u8 = 124;
/// The exit status of the developer commands when they failed themselves.
pub const FAILED: u8 = 125;

/// How often the machine is started when it shows no sign of life.
const ATTEMPTS: u32 = 3;
/// How long the machine may take until it runs the command. It takes five seconds on an idle host.
const START_LIMIT: Duration = Duration::from_secs(90);
/// How long a command may take that is not used interactively.
const DEFAULT_LIMIT: Duration = Duration::from_secs(600);

/// What the nested machine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Processors. One by default: with several, QEMU's emulation does not always see the code that
    /// the kernel and its guests rewrite while they run, and now and then one of them dies.
    pub cpus: u32,
    /// Memory in mebibytes.
    pub memory: u32,
    /// Count instructions instead of time, on one processor: for measurements that repeat.
    pub icount: bool,
    /// How long the command may take; 10 minutes by default, without end on a terminal.
    pub limit: Option<Duration>,
    /// Give the command our standard input.
    pub input: bool,
    /// A folder of the host that the command may write to. Everything else that it writes is
    /// discarded.
    pub output: Option<PathBuf>,
    /// Where to leave the log of the machine's kernel.
    pub log: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cpus: 1,
            memory: 3000,
            icount: false,
            limit: None,
            input: true,
            output: None,
            log: None,
        }
    }
}

/// Runs `command`, a program and its arguments, as root in the nested machine, and returns its
/// exit status: 128 and the signal's number if a signal ended it, [`TIMED_OUT`] if it took too
/// long.
///
/// Its output, errors and exit status are passed through exactly, and so is our input if it is asked
/// for. When input and output are terminals, it gets a terminal too.
///
/// # Errors
///
/// When the machine cannot be started, or ends before the command.
pub fn run(options: &Options, command: &[OsString]) -> Result<u8> {
    ensure!(!command.is_empty(), "there is no command to run");
    ensure!(options.cpus > 0, "the nested machine needs a processor");
    packages::ensure(packages::NESTED)?;
    ensure!(
        rustix::process::geteuid().is_root(),
        "the nested machine shares all of this machine's files, for which it must be started by root"
    );
    let assets = assets::nested()?;
    sweep(&std::env::temp_dir());
    let folder = tempfile::Builder::new()
        .prefix(&format!("{FOLDER}{}-", std::process::id()))
        .tempdir()
        .context("make a temporary folder")?;
    let is_terminal =
        options.input && std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let settings = script::Settings {
        terminal: is_terminal,
        // A terminal whose output goes elsewhere is left to the user.
        input: options.input && !std::io::stdin().is_terminal(),
        output: options.output.as_deref().map(absolute).transpose()?,
    };
    let initrd = folder.path().join("initrd");
    initrd::extend(
        &assets.initrd,
        &initrd,
        &[
            ("settings", 0o644, &script::settings(&settings)),
            (
                "command",
                0o755,
                &script::command(command, std::env::vars_os())?,
            ),
        ],
    )?;
    for attempt in 1..=ATTEMPTS {
        let folder = folder.path().join(attempt.to_string());
        fs::create_dir(&folder).context("make a temporary folder")?;
        let plan = machine::Plan {
            options,
            settings: &settings,
            kernel: &assets.vmlinux,
            initrd: &initrd,
            folder: &folder,
        };
        match run_once(&plan) {
            Ok(Some(status)) => return Ok(status),
            Ok(None) => eprintln!("xtask: the nested machine does not start (attempt {attempt})"),
            Err(error) => return Err(error),
        }
    }
    bail!("the nested machine did not start in {ATTEMPTS} attempts")
}

/// Starts the machine once. Returns `None` when it did not come to run the command.
fn run_once(plan: &machine::Plan<'_>) -> Result<Option<u8>> {
    let (events, inbox) = mpsc::channel();
    let _signals = ports::watch_signals(events.clone())?;
    let mut machine = Machine::start(plan)?;
    ports::watch_control(machine.port("control")?, events.clone());
    let status = follow(plan, &mut machine, &inbox, &events);
    machine.stop();
    if let Some(log) = &plan.options.log {
        fs::copy(plan.log(), log).with_context(|| format!("write {}", log.display()))?;
    }
    if !matches!(status, Ok(Some(_))) {
        show_log(&plan.log());
        show_log(&plan.messages());
    }
    status
}

/// Follows what the machine does until the command's end.
fn follow(
    plan: &machine::Plan<'_>,
    machine: &mut Machine,
    inbox: &mpsc::Receiver<Event>,
    events: &mpsc::Sender<Event>,
) -> Result<Option<u8>> {
    let limit = match plan.options.limit {
        None if plan.settings.terminal => None,
        limit => Some(limit.unwrap_or(DEFAULT_LIMIT)),
    };
    let mut deadline = Some(Instant::now() + START_LIMIT);
    let mut streams = None;
    let mut standstill = Standstill::default();
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let nap = left.map_or(LOOK, |left| left.min(LOOK));
        let event = inbox.recv_timeout(nap);
        match event {
            Err(RecvTimeoutError::Timeout) if left.is_none_or(|left| left > nap) => {
                if standstill.look(machine.processor_ticks()) {
                    bail!("the nested machine stands still: its emulation has lost an interrupt");
                }
            }
            Ok(Event::Ready) => {
                deadline = limit.map(|limit| Instant::now() + limit);
                streams = Some(Streams::connect(machine, plan.settings, events)?);
            }
            Ok(Event::Exit(status)) => {
                // All that the command wrote is in the streams; their ends come with QEMU's.
                machine.stop();
                if let Some(streams) = streams {
                    streams.finish();
                }
                return Ok(Some(status));
            }
            Ok(Event::Resized) => {
                if let Some(streams) = &mut streams {
                    streams.resize();
                }
            }
            Ok(Event::Signal(signal)) => return Ok(Some(128 + signal)),
            Ok(Event::OutputClosed) => return Ok(Some(128 + SIGPIPE)),
            Ok(Event::ControlClosed) if streams.is_none() => return Ok(None),
            Ok(Event::ControlClosed) => bail!("the nested machine ended before the command"),
            Err(RecvTimeoutError::Timeout) if streams.is_none() => return Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                let limit = limit.unwrap_or_default().as_secs();
                machine.stop();
                if let Some(streams) = streams {
                    streams.finish();
                }
                eprintln!("xtask: the command was stopped after {limit} s");
                return Ok(Some(TIMED_OUT));
            }
            Err(RecvTimeoutError::Disconnected) => bail!("nobody watches the nested machine"),
        }
    }
}

/// How often it is looked whether the machine does anything.
const LOOK: Duration = Duration::from_secs(5);
/// How many looks in a row may find that it has used no processor time: an idle machine uses some.
const STILL_LOOKS: u32 = 12;

/// Notices a machine that does nothing any more. QEMU's emulation of nested virtualisation loses a
/// timer's interrupt now and then, and then nothing ever wakes it.
#[derive(Default)]
struct Standstill {
    ticks: Option<u64>,
    looks: u32,
}

impl Standstill {
    /// Takes note of the processor time that was used so far; says whether the machine stands.
    fn look(&mut self, ticks: Option<u64>) -> bool {
        let is_still = ticks.is_some() && ticks == self.ticks;
        self.looks = if is_still { self.looks + 1 } else { 0 };
        self.ticks = ticks;
        self.looks >= STILL_LOOKS
    }
}

const SIGPIPE: u8 = 13;

/// How the names of the temporary folders begin; the process's id follows.
const FOLDER: &str = "kiln-nested-";

/// Removes the folders of processes that were killed before they could.
fn sweep(temporary: &Path) {
    let Ok(entries) = fs::read_dir(temporary) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| {
            name.strip_prefix(FOLDER)?
                .split_once('-')?
                .0
                .parse::<u32>()
                .ok()
        });
        if process.is_some_and(|id| !Path::new(&format!("/proc/{id}")).exists()) {
            // Another process may be doing the same.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn absolute(folder: &Path) -> Result<PathBuf> {
    let path = folder
        .canonicalize()
        .with_context(|| format!("open {}", folder.display()))?;
    ensure!(path.is_dir(), "{} is not a folder", path.display());
    Ok(path)
}

fn show_log(log: &Path) {
    const LINES: usize = 60;
    let Ok(bytes) = fs::read(log) else { return };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().collect();
    if lines.is_empty() {
        return;
    }
    let name = log.file_name().unwrap_or_default().to_string_lossy();
    eprintln!("xtask: the end of the nested machine's {name}:");
    for line in &lines[lines.len().saturating_sub(LINES)..] {
        eprintln!("    {line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_uses_no_time_for_a_minute_stands_still() {
        let mut standstill = Standstill::default();
        for ticks in 0..100 {
            assert!(!standstill.look(Some(ticks)));
        }
        let looks = (1..).find(|_| standstill.look(Some(99))).unwrap();
        assert_eq!(looks, STILL_LOOKS);
        assert!(!standstill.look(None));
        assert!(!standstill.look(None));
    }

    #[test]
    fn only_folders_of_dead_processes_are_swept() {
        let temporary = tempfile::tempdir().unwrap();
        let at = |name: String| temporary.path().join(name);
        let dead = at(format!("{FOLDER}{}-x", u32::MAX));
        let alive = at(format!("{FOLDER}{}-x", std::process::id()));
        let other = at("something-4294967295-x".into());
        for folder in [&dead, &alive, &other] {
            fs::create_dir(folder).unwrap();
        }
        sweep(temporary.path());
        assert!(!dead.exists());
        assert!(alive.exists() && other.exists());
    }

    #[test]
    fn a_machine_without_a_command_or_processor_is_refused() {
        assert!(run(&Options::default(), &[]).is_err());
        assert!(
            run(
                &Options {
                    cpus: 0,
                    ..Options::default()
                },
                &["true".into()]
            )
            .is_err()
        );
    }
}
