//! passt as a network: the host's own network for the guest, without privileges or set-up.
//!
//! passt is a program of its own, which speaks to the guest in Ethernet frames, and to the world in
//! ordinary sockets of the user. It is started by us, talks to us over a [`StreamSocket`], and ends
//! with us, however we end: where the socket closes, so does passt.
//!
//! - `options`: what it can be asked to do
//! - `process`: starting it, and its end

mod options;
mod process;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use kiln_memory::GuestSlice;
use rustix::event::epoll::{self, EventData, EventFlags};

use super::{NetBackend, StreamError, StreamSocket};
use process::Process;

pub use options::{IpProtocol, ParsePortForwardError, PortForward, UserNetOptions};

/// The largest payload that passt takes and tells the guest of by default: what large frames save
/// is what it has instead of offloads.
const MTU: u16 = 65520;

/// Why there is no network by passt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PasstError {
    /// It is not installed.
    #[error(
        "start `passt`, which gives the guest its network: it is not in PATH (install it, as by \
         `apt-get install passt` or `dnf install passt`)"
    )]
    NotInstalled,
    /// It could not be started.
    #[error("start `{}`, which gives the guest its network", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It has ended at once, or does nothing.
    #[error("start `{}`, which gives the guest its network: {problem}", program.display())]
    Ended {
        /// The program.
        program: PathBuf,
        /// How it ended, and what it complained about.
        problem: String,
    },
    /// Two forwarded ports are one of the host.
    #[error("forward {forward} to the guest: {other} has the same port of the host")]
    PortTwice {
        /// The one of them.
        forward: PortForward,
        /// The other.
        other: PortForward,
    },
    /// A port of the host is not to be had.
    #[error("forward {forward} to the guest: listen at that port of the host")]
    Port {
        /// What was asked for.
        forward: PortForward,
        /// What the system said.
        source: io::Error,
    },
    /// The socket to it cannot be used.
    #[error(transparent)]
    Socket(#[from] StreamError),
}

/// A network by passt, which runs while this is there.
///
/// The guest gets its addresses and routes by DHCP, DHCPv6 and NDP; they are those of the host, and
/// the resolver is the host's. When passt ends, the link is down for good.
#[derive(Debug)]
pub struct Passt {
    // In this order: passt ends by itself when its socket closes.
    stream: StreamSocket,
    process: Process,
    /// Nothing came since it was last said that there is nothing.
    quiet: bool,
    failure: Option<String>,
}

impl Passt {
    /// Starts passt, and waits until it is ready.
    ///
    /// # Errors
    ///
    /// [`PasstError`] where it is not there, or does not do what is asked: then nothing is left of
    /// it.
    pub fn start(options: &UserNetOptions) -> Result<Self, PasstError> {
        Self::start_within(options, process::PATIENCE)
    }

    fn start_within(
        options: &UserNetOptions,
        patience: std::time::Duration,
    ) -> Result<Self, PasstError> {
        options.check()?;
        let program = match options.chosen_program() {
            Some(program) => program.clone(),
            None => process::find("passt", std::env::var_os("PATH").as_deref())
                .ok_or(PasstError::NotInstalled)?,
        };
        let (process, socket) = Process::start(&program, &options.arguments(), patience)?;
        let stream = StreamSocket::from_fd(socket)?.with_mtu(MTU);
        let (poll, pidfd) = (stream.receive_poll(), process.pidfd());
        epoll::add(poll, pidfd, EventData::new_u64(0), EventFlags::IN)
            .map_err(|error| StreamError::Wait(error.into()))?;
        Ok(Self {
            stream,
            process,
            quiet: false,
            failure: None,
        })
    }

    /// Follows passt's end, which begins with that of its socket.
    fn follow(&mut self) {
        if self.stream.failure().is_none() || self.failure.is_some() {
            return;
        }
        // It may have closed its socket and live on; once it has ended we are called again.
        self.process.kill();
        self.look_for_end();
    }

    fn look_for_end(&mut self) {
        if let Some(how) = self.process.ended() {
            self.stream.disconnect("passt has ended");
            let _ = epoll::delete(self.stream.receive_poll(), self.process.pidfd());
            self.failure = Some(format!("passt has ended: {how}"));
        }
    }
}

impl NetBackend for Passt {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.stream.readiness()
    }

    fn send(&mut self, packet: &[GuestSlice<'_>]) -> io::Result<()> {
        let result = self.stream.send(packet);
        self.follow();
        result
    }

    fn send_readiness(&self) -> Option<BorrowedFd<'_>> {
        self.stream.send_readiness()
    }

    fn flush(&mut self) {
        self.stream.flush();
        self.follow();
    }

    fn receive(&mut self, buffers: &[GuestSlice<'_>]) -> io::Result<usize> {
        let result = self.stream.receive(buffers);
        let is_quiet = result.is_err();
        if is_quiet && self.quiet && self.failure.is_none() {
            // Called for nothing: it has ended, and left its socket to somebody else.
            self.look_for_end();
        }
        self.quiet = is_quiet;
        self.follow();
        result
    }

    fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    fn mtu(&self) -> Option<u16> {
        self.stream.mtu()
    }
}
