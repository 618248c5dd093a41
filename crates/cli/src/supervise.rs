//! Signals, and the end of the start, on the one thread that the program has for itself: it serves
//! the machine's devices while it waits for the machine's end.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Error};
use kiln_io_thread::{EventSet, IoEvent, IoHandler, Registrar};
use kiln_vmm::VmHandle;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;
use signal_hook::low_level::signal_name;

use crate::footprint;

/// What an event is of.
const SIGNAL: u32 = 0;
const SETTLED: u32 = 1;

/// The signals that stop a machine, and the one that says that the terminal has another size;
/// watched from the moment this is made.
pub(crate) struct Signals(SignalDelivery<UnixStream, SignalOnly>);

impl Signals {
    pub(crate) fn watch() -> Result<Self, Error> {
        let watch = || {
            let (reader, writer) = UnixStream::pair()?;
            let signals = [SIGTERM, SIGINT, SIGHUP, SIGWINCH];
            SignalDelivery::with_pipe(reader, writer, SignalOnly, signals)
        };
        Ok(Self(watch().context("watch for signals")?))
    }

    /// What the I/O loop does when a signal comes: the first one presses the machine's power button,
    /// the second stops it.
    pub(crate) fn supervisor(
        self,
        handle: VmHandle,
        resized: impl Fn() + Send + 'static,
    ) -> Supervisor {
        Supervisor {
            signals: self,
            handle,
            resized: Box::new(resized),
            pressed: false,
            settling: settling().ok(),
        }
    }
}

/// Handles signals on the I/O loop.
pub(crate) struct Supervisor {
    signals: Signals,
    handle: VmHandle,
    resized: Box<dyn Fn() + Send>,
    pressed: bool,
    /// Expires when the start is over; without it the program only stays as large as it is.
    settling: Option<OwnedFd>,
}

fn settling() -> io::Result<OwnedFd> {
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
    let once = Itimerspec {
        it_interval: Timespec::default(),
        it_value: Timespec::try_from(footprint::SETTLED).map_err(io::Error::other)?,
    };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &once)?;
    Ok(timer)
}

impl IoHandler for Supervisor {
    fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        if let Some(timer) = &self.settling {
            registrar.add(timer, SETTLED, EventSet::IN)?;
        }
        registrar.add(self.signals.0.get_read(), SIGNAL, EventSet::IN)
    }

    fn ready(&mut self, event: IoEvent, registrar: &mut Registrar<'_, '_>) {
        if event.token == SETTLED {
            if let Some(timer) = self.settling.take() {
                // It is closed in any case.
                let _ = registrar.remove(&timer);
                footprint::shrink();
            }
            return;
        }
        for signal in self.signals.0.pending() {
            if signal == SIGWINCH {
                (self.resized)();
                continue;
            }
            if self.pressed {
                self.handle.stop();
                continue;
            }
            self.pressed = true;
            let name = signal_name(signal).unwrap_or("a signal");
            eprintln!("kiln: {name}: pressing the power button; once more stops the machine\r");
            self.handle.power_button();
        }
    }
}
