//! Waiting for the machine's end, and for signals, on the one thread that the program has for
//! itself.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Error};
use kiln_vmm::{Events, VmHandle};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;
use signal_hook::low_level::signal_name;

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

    /// Waits until the machine has ended. The first signal presses its power button, the second
    /// stops it.
    pub(crate) fn supervise(
        mut self,
        handle: &VmHandle,
        events: &Events,
        resized: impl Fn(),
    ) -> Result<(), Error> {
        let mut pressed = false;
        while !events.is_over() {
            let mut ready = [
                PollFd::new(events, PollFlags::IN),
                PollFd::from_borrowed_fd(self.0.get_read().as_fd(), PollFlags::IN),
            ];
            match poll(&mut ready, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("wait for the machine's end"),
            }
            for signal in self.0.pending() {
                if signal == SIGWINCH {
                    resized();
                    continue;
                }
                if pressed {
                    handle.stop();
                    continue;
                }
                pressed = true;
                let name = signal_name(signal).unwrap_or("a signal");
                eprintln!("kiln: {name}: pressing the power button; once more stops the machine\r");
                handle.power_button();
            }
            while events.try_recv().is_some() {}
        }
        Ok(())
    }
}
