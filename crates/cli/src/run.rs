//! `kiln run`: from arguments to a machine, and from its end to an exit code.

use std::io;
use std::thread;

use anyhow::{Context, Error};
use kiln_vmm::config::{SerialConfig, VmConfig};
use kiln_vmm::{
    Console, ConsoleInput, ConsoleOutput, ConsoleSize, CrashCause, Execution, HeadStart, Host,
    IoLoop, KernelCache, VmBuilder, VmExit, VmHandle,
};

use crate::args::Run;
use crate::config;
use crate::metrics::{Follower, MetricsFile};
use crate::supervise::Signals;
use crate::terminal::{self, Escape, RawMode};

pub(crate) fn run(args: Run, head_start: Option<HeadStart>) -> Result<u8, Error> {
    // A bad description is refused before the terminal or a signal is touched.
    let metrics = MetricsFile::from_args(&args.metrics)?;
    let kernel_cache = kernel_cache(args.no_kernel_cache);
    let config = config::from_args(args)?;
    let io_affinity = config.io_affinity.clone();
    let (mut builder, interactive) = builder(config)?;
    if let Some(cache) = kernel_cache {
        builder = builder.kernel_cache(cache);
    }
    if let Some(head_start) = head_start {
        builder = builder.head_start(head_start);
    }
    // Before all that works on it.
    let io = io_loop()?;
    let vm = builder.io_loop(&io).build()?;
    let (keyboard, size) = match interactive {
        Some(Interactive { keyboard, size }) => (Some(keyboard), size),
        None => (None, None),
    };

    let interactive = keyboard.is_some();
    let resized = move || {
        if let Some(size) = &size {
            let (columns, rows) = terminal::size();
            size.set(columns, rows);
        }
    };
    resized();
    // A signal must not end the program while the terminal is not as it was. Otherwise the guest
    // need not wait for this.
    let watched = interactive.then(Signals::watch).transpose()?;
    let raw_mode = match keyboard {
        Some(_) => {
            eprintln!("kiln: Ctrl-A x stops the machine, Ctrl-A p presses its power button\r");
            Some(RawMode::enter().context("put the terminal into raw mode")?)
        }
        None => None,
    };
    let handle = vm.start()?;
    if let Some(cpus) = io_affinity {
        // Not before: threads of vCPUs would begin with the same.
        let refused = || format!("run the I/O thread on CPUs {cpus} alone");
        cpus.pin_this_thread().with_context(refused)?;
    }
    let signals = watched.map_or_else(Signals::watch, Ok)?;
    let supervisor = signals.supervisor(handle.clone(), resized);
    let supervisor = io
        .handle()
        .attach(supervisor)
        .context("watch for signals")?;
    let metrics = metrics
        .map(|file| file.follow(handle.clone()))
        .transpose()?;
    if let Some(keyboard) = keyboard {
        on_keys(keyboard, handle.clone())?;
    }
    // Serves the devices, and signals.
    let exit = handle.wait()?;
    drop(supervisor);
    let written = metrics.map_or(Ok(()), Follower::finish);
    drop(raw_mode);
    if let Err(error) = written {
        eprintln!("kiln: {error:#}");
    }
    Ok(report(&exit))
}

/// The loop of this thread, for the machine's devices and for signals.
fn io_loop() -> Result<IoLoop, Error> {
    IoLoop::new(|panic| eprintln!("kiln: {panic}\r")).context("wait for events")
}

/// The folder of the user for unpacked kernels; it is made when there is one to keep.
fn kernel_cache(is_refused: bool) -> Option<KernelCache> {
    if is_refused {
        return None;
    }
    let folder = KernelCache::user_folder();
    if folder.is_none() {
        tracing::debug!("no folder of ours for a kernel cache: XDG_CACHE_HOME and HOME name none");
    }
    folder.map(|folder| KernelCache::on_demand(folder, KernelCache::DEFAULT_LIMIT))
}

/// What a console on our terminal takes.
struct Interactive {
    keyboard: io::PipeWriter,
    /// The size to keep, for a console that has one.
    size: Option<ConsoleSize>,
}

/// The machine that is described; with one of its consoles on our terminal, where it is to have the
/// standard input and output and these are a terminal.
fn builder(mut config: VmConfig) -> Result<(VmBuilder, Option<Interactive>), Error> {
    let stdio = Some(SerialConfig::Stdio);
    let virtio = config.console.take_if(|console| console.to == stdio);
    let serial = config.serial == stdio;
    if !RawMode::is_possible() || serial == virtio.is_some() {
        // Both is for the library to refuse.
        config.console = virtio.or(config.console);
        return Ok((config.builder()?, None));
    }
    let (console, keyboard) = interactive_console()?;
    let Some(mut virtio) = virtio else {
        config.serial = None;
        let builder = config.builder()?.serial(console);
        let size = None;
        return Ok((builder, Some(Interactive { keyboard, size })));
    };
    virtio.to = None;
    let virtio = virtio.open()?.console(console);
    let size = Some(virtio.size());
    let builder = config.builder()?.console(virtio);
    Ok((builder, Some(Interactive { keyboard, size })))
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
fn report(exit: &VmExit) -> u8 {
    eprintln!("kiln: {exit}{}", hint(exit));
    match exit {
        VmExit::Shutdown => 0,
        VmExit::Reset => 3,
        VmExit::GuestPanic => 4,
        VmExit::Crash(crash) if crash.cause == CrashCause::TripleFault => 5,
        VmExit::Stopped => 7,
        _ => 6,
    }
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
