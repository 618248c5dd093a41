//! A connection with its socket: bytes from one to the other, as far as each takes them.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd as _, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use kiln_io_thread::EventSet;
use kiln_memory::{GuestSlice, gather};
use kiln_virtio_device::GuestBuffers;

use super::connection::Connection;
use super::host::{Dial, send_bytes};
use super::packet::{DONE, NO_RECEIVE, NO_SEND};
use crate::virtio::iovec;

/// The host's end of a connection.
#[derive(Debug)]
pub(super) enum Socket {
    /// A program that listens and has not accepted yet; tried again from time to time.
    Dialing(Dial),
    /// A program to talk to.
    Connected(UnixStream),
    /// It has gone, and the guest has been told.
    Closed,
}

/// What a stream wants to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing, until something happens.
    Wait,
    /// A packet without data.
    Control,
    /// Data, if the socket has some.
    Data,
    /// To be taken away; the guest, where it knows of the connection, is told by a reset.
    Reset,
    /// To be taken away without a word.
    Vanish,
}

/// A connection with its socket.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) connection: Connection,
    pub(super) socket: Socket,
    /// When it is given up.
    pub(super) deadline: Option<Instant>,
    /// What the guest sent and the socket has not taken.
    buffer: VecDeque<u8>,
    // The socket is looked at again only when an event says that it has changed.
    readable: bool,
    writable: bool,
    hung_up: bool,
    failed: bool,
    /// The guest has ended the connection; what it sent before is still passed on.
    draining: bool,
}

impl Stream {
    pub(super) fn new(connection: Connection, socket: Socket, deadline: Option<Instant>) -> Self {
        Self {
            connection,
            socket,
            deadline,
            buffer: VecDeque::new(),
            readable: true,
            writable: true,
            hung_up: false,
            failed: false,
            draining: false,
        }
    }

    /// The file descriptor of the socket, where it can be waited for.
    pub(super) fn fd(&self) -> Option<Fd> {
        match &self.socket {
            Socket::Connected(socket) => Some(Fd(socket.as_raw_fd())),
            Socket::Dialing(_) | Socket::Closed => None,
        }
    }

    /// What to do next, when it has its turn.
    pub(super) fn step(&mut self) -> Step {
        if self.draining {
            let done = self.buffer.is_empty() || self.failed;
            return if done { Step::Vanish } else { Step::Wait };
        }
        if self.failed {
            return Step::Reset;
        }
        if self.connection.takes_data() && self.readable && self.connection.credit() == 0 {
            self.connection.ask_for_room();
        }
        if self.connection.has_control() {
            Step::Control
        } else if self.connection.takes_data() && self.readable && self.connection.credit() > 0 {
            Step::Data
        } else {
            Step::Wait
        }
    }

    /// The connection is of no use any more: [`step`](Self::step) says so.
    pub(super) fn fail(&mut self) {
        self.failed = true;
    }

    /// The socket has an event.
    pub(super) fn event(&mut self, set: EventSet) {
        let hang_up = EventSet::HANG_UP | EventSet::ERROR;
        if set.intersects(EventSet::IN | EventSet::READ_HANG_UP | hang_up) {
            self.readable = true;
        }
        if set.intersects(EventSet::OUT | hang_up) {
            self.writable = true;
            self.flush();
        }
        if set.contains(EventSet::HANG_UP) {
            self.hang_up();
        }
    }

    /// The peer has closed its end: nothing can be written to it, and what it wrote is all. The
    /// guest receives that first, and is told behind it, or when it sends something itself.
    fn hang_up(&mut self) {
        self.hung_up = true;
        if !self.connection.is_open() || self.draining {
            self.failed = true;
        } else if !self.connection.takes_data() {
            self.connection.host_is_done(DONE);
        }
    }

    /// Tells the program of the host that the guest has accepted.
    pub(super) fn opened(&mut self) {
        self.deadline = None;
        let line = format!("OK {}\n", self.connection.ports().host);
        let sent = match &self.socket {
            Socket::Connected(socket) => send_bytes(socket, line.as_bytes()),
            Socket::Dialing(_) | Socket::Closed => Err(io::ErrorKind::NotConnected.into()),
        };
        // Nothing was sent before, so there is room, or nobody.
        self.failed |= sent.ok() != Some(line.len());
    }

    /// Reads from the socket into `slices`. `None` says that there is nothing now.
    pub(super) fn read(&mut self, slices: &[GuestSlice<'_>]) -> Option<usize> {
        let Socket::Connected(socket) = &self.socket else {
            self.readable = false;
            return None;
        };
        match iovec::read_some(socket.as_fd(), slices) {
            Ok(0) => {
                self.readable = false;
                let done = if self.hung_up { DONE } else { NO_SEND };
                self.connection.host_is_done(done);
                None
            }
            Ok(count) => Some(count),
            Err(error) => {
                self.readable = false;
                self.failed |= error.kind() != io::ErrorKind::WouldBlock;
                None
            }
        }
    }

    /// Passes `data` of the guest on, which the connection has counted: to the socket what that
    /// takes now, and the rest into the buffer.
    pub(super) fn write(&mut self, mut data: GuestBuffers<'_>) {
        while self.buffer.is_empty() && self.writable && !data.is_empty() {
            let Socket::Connected(socket) = &self.socket else {
                break;
            };
            match iovec::send_some(socket.as_fd(), data.slices()) {
                Ok(count) => {
                    // No more than there was.
                    let _ = data.skip(count);
                    self.connection.forwarded(count as u32);
                }
                Err(error) => self.cannot_write(&error),
            }
        }
        self.buffer.extend(gather(data.slices()));
        if self.connection.host_done() & NO_RECEIVE != 0 {
            self.discard();
        }
    }

    /// Writes as much of the buffer as the socket takes.
    fn flush(&mut self) {
        while self.writable && !self.buffer.is_empty() {
            let Socket::Connected(socket) = &self.socket else {
                return;
            };
            let (front, _) = self.buffer.as_slices();
            match send_bytes(socket, front) {
                Ok(count) => {
                    self.buffer.drain(..count);
                    self.connection.forwarded(count as u32);
                }
                Err(error) => self.cannot_write(&error),
            }
        }
        if self.buffer.is_empty() {
            // Most streams never need it again.
            self.buffer = VecDeque::new();
            self.finish_writing();
        }
    }

    fn cannot_write(&mut self, error: &io::Error) {
        self.writable = false;
        if error.kind() != io::ErrorKind::WouldBlock {
            self.stop_writing();
        }
    }

    /// The socket takes nothing any more.
    fn stop_writing(&mut self) {
        self.failed |= self.draining;
        self.connection.host_is_done(NO_RECEIVE);
        self.discard();
    }

    fn discard(&mut self) {
        // The buffer never has more than the room of a connection.
        self.connection.forwarded(self.buffer.len() as u32);
        self.buffer = VecDeque::new();
    }

    /// The guest has said what it does not do any more.
    pub(super) fn guest_is_done(&mut self) {
        if self.connection.guest_done() & NO_RECEIVE != 0 {
            self.shut(Shutdown::Read);
            if self.hung_up {
                self.connection.host_is_done(DONE);
            }
        }
        self.finish_writing();
    }

    /// Passes the guest's end of data on, behind the data.
    fn finish_writing(&self) {
        if self.connection.guest_done() & NO_SEND != 0 && self.buffer.is_empty() {
            self.shut(Shutdown::Write);
        }
    }

    fn shut(&self, how: Shutdown) {
        if let Socket::Connected(socket) = &self.socket {
            // A peer that has gone needs no word.
            let _ = socket.shutdown(how);
        }
    }

    /// The guest is done with the connection. Says whether there is data of it left to pass on,
    /// for which the stream has to stay.
    pub(super) fn drain(&mut self) -> bool {
        self.draining = true;
        self.deadline = None;
        !self.buffer.is_empty() && !self.failed
    }
}

/// A file descriptor to wait for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fd(RawFd);

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}
