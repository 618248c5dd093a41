//! `kiln run`: from arguments to a machine, and from its end to an exit code.

use std::fs::OpenOptions;
use std::io;
use std::process::ExitCode;
use std::thread;

use anyhow::{Context, Error};
use kiln_vmm::{
    BootProtocol, Console, ConsoleInput, ConsoleOutput, CrashCause, Disk, Execution, Host, Kernel,
    Net, VmBuilder, VmExit, VmHandle,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::{DiskArg, Protocol, Run, SerialArg};
use crate::terminal::{self, Escape, RawMode};

pub(crate) fn run(args: Run) -> Result<ExitCode, Error> {
    // Bad arguments are refused before the terminal or a signal is touched.
    let interactive = args.serial == SerialArg::Stdio && RawMode::is_possible();
    let (console, keyboard) = console(&args.serial, interactive)?;
    let vm = builder(args)?.serial(console).build()?;

    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("watch for signals")?;
    let raw_mode = match keyboard {
        Some(_) => {
            eprintln!("kiln: Ctrl-A x stops the machine, Ctrl-A p presses its power button\r");
            Some(RawMode::enter().context("put the terminal into raw mode")?)
        }
        None => None,
    };
    let handle = vm.start()?;
    on_signals(signals, handle.clone())?;
    if let Some(keyboard) = keyboard {
        on_keys(keyboard, handle.clone())?;
    }
    let exit = handle.wait()?;
    drop(raw_mode);
    Ok(report(&exit))
}

fn builder(args: Run) -> Result<VmBuilder, Error> {
    let mut kernel = Kernel::open(&args.kernel)?;
    kernel = match args.boot_protocol {
        Protocol::Auto => kernel,
        Protocol::Linux64 => kernel.with_protocol(BootProtocol::Linux64)?,
        Protocol::Pvh => kernel.with_protocol(BootProtocol::Pvh)?,
    };
    let mut builder = VmBuilder::new()
        .kernel(kernel)
        .cmdline(args.cmdline)
        .vcpus(args.cpus)
        .memory(args.memory);
    if let Some(initrd) = args.initrd {
        builder = builder.initrd(initrd);
    }
    for disk in args.disk {
        builder = builder.disk(open_disk(disk)?);
    }
    for net in args.net {
        let mut interface = Net::tap(&net.tap)?;
        if let Some(mac) = net.mac {
            interface = interface.mac(mac);
        }
        builder = builder.net(interface);
    }
    Ok(builder)
}

fn open_disk(arg: DiskArg) -> Result<Disk, Error> {
    let mut disk = if arg.readonly {
        Disk::open_read_only(&arg.path)?
    } else {
        Disk::open(&arg.path)?
    };
    if let Some(id) = arg.id {
        disk = disk.id(id);
    }
    Ok(disk)
}

/// Where the serial port leads; on a terminal, what is typed goes through us into the pipe whose
/// writing end is given back.
fn console(
    serial: &SerialArg,
    interactive: bool,
) -> Result<(Console, Option<io::PipeWriter>), Error> {
    Ok(match serial {
        SerialArg::Null => (Console::null(), None),
        SerialArg::File(path) => {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .open(path)
                .with_context(|| format!("create `{}` for the serial port", path.display()))?;
            let output = ConsoleOutput::fd(file.into());
            (Console::new(ConsoleInput::null(), output), None)
        }
        SerialArg::Stdio if interactive => {
            let (reader, writer) = io::pipe().context("create a pipe for the keyboard")?;
            let input = ConsoleInput::fd(reader.into());
            let output = ConsoleOutput::stdout().context("use the standard output")?;
            (Console::new(input, output), Some(writer))
        }
        SerialArg::Stdio => (
            Console::stdio().context("use the standard input and output")?,
            None,
        ),
    })
}

/// The first signal presses the power button, the second stops the machine.
fn on_signals(mut signals: Signals, handle: VmHandle) -> Result<(), Error> {
    thread::Builder::new()
        .name("kiln-signals".to_owned())
        .spawn(move || {
            let mut pressed = false;
            for signal in signals.forever() {
                if pressed {
                    handle.stop();
                    return;
                }
                pressed = true;
                let name = signal_hook::low_level::signal_name(signal).unwrap_or("a signal");
                eprintln!("kiln: {name}: pressing the power button; once more stops the machine\r");
                handle.power_button();
            }
        })
        .context("start a thread for signals")?;
    Ok(())
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
