//! `kiln run`: from arguments to a machine, and from its end to an exit code.

use std::io;
use std::process::ExitCode;
use std::thread;

use anyhow::{Context, Error};
use kiln_vmm::config::SerialConfig;
use kiln_vmm::{
    Console, ConsoleInput, ConsoleOutput, CrashCause, Execution, Host, VmExit, VmHandle,
};

use crate::args::Run;
use crate::config;
use crate::metrics::{Follower, MetricsFile};
use crate::supervise::Signals;
use crate::terminal::{self, Escape, RawMode};

pub(crate) fn run(args: Run) -> Result<ExitCode, Error> {
    // A bad description is refused before the terminal or a signal is touched.
    let metrics = MetricsFile::from_args(&args.metrics)?;
    let mut config = config::from_args(args)?;
    let interactive = config.serial == Some(SerialConfig::Stdio) && RawMode::is_possible();
    let (builder, keyboard) = if interactive {
        config.serial = None;
        let (console, keyboard) = interactive_console()?;
        (config.builder()?.serial(console), Some(keyboard))
    } else {
        (config.builder()?, None)
    };
    let vm = builder.build()?;

    let signals = Signals::watch()?;
    let events = vm.events()?;
    let raw_mode = match keyboard {
        Some(_) => {
            eprintln!("kiln: Ctrl-A x stops the machine, Ctrl-A p presses its power button\r");
            Some(RawMode::enter().context("put the terminal into raw mode")?)
        }
        None => None,
    };
    let handle = vm.start()?;
    let metrics = metrics
        .map(|file| file.follow(handle.clone()))
        .transpose()?;
    if let Some(keyboard) = keyboard {
        on_keys(keyboard, handle.clone())?;
    }
    signals.supervise(&handle, &events)?;
    let exit = handle.wait()?;
    let written = metrics.map_or(Ok(()), Follower::finish);
    drop(raw_mode);
    if let Err(error) = written {
        eprintln!("kiln: {error:#}");
    }
    Ok(report(&exit))
}

/// The console of the guest on our terminal: what is typed goes through us into the pipe whose
/// writing end is given back.
fn interactive_console() -> Result<(Console, io::PipeWriter), Error> {
    let (reader, writer) = io::pipe().context("create a pipe for the keyboard")?;
    let input = ConsoleInput::fd(reader.into());
    let output = ConsoleOutput::stdout().context("use the standard output")?;
    Ok((Console::new(input, output), writer))
}

fn on_keys(keyboard: io::PipeWriter, handle: VmHandle) -> Result<(), Error> {
    thread::Builder::new()
        .name("kiln-keyboard".to_owned())
        .spawn(move || {
            terminal::forward(keyboard.into(), |escape| match escape {
                Escape::Stop => handle.stop(),
                Escape::PowerButton => handle.power_button(),
            });
        })
        .context("start a thread for the keyboard")?;
    Ok(())
}

/// Says how the machine ended, and gives the exit code that stands for it.
fn report(exit: &VmExit) -> ExitCode {
    eprintln!("kiln: {exit}{}", hint(exit));
    ExitCode::from(match exit {
        VmExit::Shutdown => 0,
        VmExit::Reset => 3,
        VmExit::GuestPanic => 4,
        VmExit::Crash(crash) if crash.cause == CrashCause::TripleFault => 5,
        VmExit::Stopped => 7,
        _ => 6,
    })
}

/// What to know about an instruction that KVM could not emulate.
fn hint(exit: &VmExit) -> &'static str {
    let VmExit::Crash(crash) = exit else {
        return "";
    };
    let emulation = crash.cause == CrashCause::EmulationFailure;
    let emulated = || Host::open().and_then(|host| host.execution());
    if emulation && matches!(emulated(), Ok(Execution::Emulated)) {
        " (the KVM of this host only emulates guest code: see `kiln check`)"
    } else {
        ""
    }
}
