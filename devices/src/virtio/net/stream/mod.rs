//! A Unix stream socket as a network, in the framing that passt, gvproxy and QEMU share: in front
//! of each Ethernet frame its length in four bytes, big endian.
//!
//! The other end is another program, which need not be friendly: what is kept for it is bounded,
//! and it can be slow, stop in the middle of a frame, or go at any time.
//!
//! - `input`: from the stream to frames; one read gets many
//! - `output`: from frames to the stream; one write sends many

mod input;
mod output;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_memory::{GuestSlice, scatter};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with,
    sockopt,
};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::NetBackend;
use super::device::{HEADER_BYTES, MAX_PACKET};
use crate::virtio::iovec::behind;
use input::{Input, Next};
use output::Output;

/// The bytes of the length in front of a frame.
const PREFIX: usize = 4;
/// The largest frame.
const MAX_FRAME: usize = MAX_PACKET - HEADER_BYTES;

/// Why a stream socket cannot be a network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// Nobody listens at the path, or it is not for us.
    #[error("connect to the network at the socket `{}`", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What was handed over is something else.
    #[error("use a file descriptor as a network: it is not a connected stream socket")]
    NotAStream,
    /// The system gives no file descriptors to wait with.
    #[error("prepare to wait for a network's socket")]
    Wait(#[source] io::Error),
}

/// A network at the other end of a stream socket.
///
/// It takes no offloads. A packet that finds no room waits in the driver's queue. When the other end
/// closes the socket, or says what is no frame, the link is down, until it is connected again where
/// that was [asked for](Self::reconnect).
pub struct StreamSocket {
    socket: Option<OwnedFd>,
    path: Option<PathBuf>,
    again: Option<Again>,
    mtu: Option<u16>,
    input: Input,
    output: Output,
    /// Readable while the socket has something for us, or it is time to connect again.
    receive_poll: OwnedFd,
    /// Readable while the socket has room and something waits for that, or `gone` is.
    send_poll: OwnedFd,
    /// Readable once the socket has gone: what waited for room in it is to be dropped.
    gone: OwnedFd,
    /// The socket has no room, and is in `send_poll`.
    full: bool,
    /// `gone` is readable.
    gone_is_set: bool,
    failure: Option<String>,
}

/// When to connect again.
struct Again {
    after: Duration,
    /// Expired once it is time.
    timer: OwnedFd,
}

impl StreamSocket {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    ///
    /// [`StreamError`] where nobody listens there.
    pub fn connect(path: impl Into<PathBuf>) -> Result<Self, StreamError> {
        let path = path.into();
        let socket = connect_now(&path).map_err(|source| StreamError::Connect {
            path: path.clone(),
            source,
        })?;
        let mut stream = Self::from_fd(socket)?;
        stream.path = Some(path);
        Ok(stream)
    }

    /// Takes a stream socket that is connected.
    ///
    /// # Errors
    ///
    /// [`StreamError`] where it is something else.
    pub fn from_fd(socket: OwnedFd) -> Result<Self, StreamError> {
        let is_stream = sockopt::socket_type(&socket) == Ok(SocketType::STREAM);
        if !is_stream || rustix::net::getpeername(&socket).is_err() {
            return Err(StreamError::NotAStream);
        }
        let wait = |error: rustix::io::Errno| StreamError::Wait(error.into());
        let receive_poll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(wait)?;
        let send_poll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(wait)?;
        let gone = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(wait)?;
        watch(&receive_poll, &socket, EventFlags::IN).map_err(wait)?;
        watch(&send_poll, &gone, EventFlags::IN).map_err(wait)?;
        Ok(Self {
            socket: Some(socket),
            path: None,
            again: None,
            mtu: None,
            input: Input::new(),
            output: Output::default(),
            receive_poll,
            send_poll,
            gone,
            full: false,
            gone_is_set: false,
            failure: None,
        })
    }

    /// Connects again to the path when the other end has gone, and tries so each time when `after`
    /// has passed. A socket that was handed over has no path.
    ///
    /// # Errors
    ///
    /// [`StreamError`] where the system gives no timer.
    pub fn reconnect(mut self, after: Duration) -> Result<Self, StreamError> {
        let wait = |error: rustix::io::Errno| StreamError::Wait(error.into());
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(wait)?;
        watch(&self.receive_poll, &timer, EventFlags::IN).map_err(wait)?;
        let after = after.max(SHORTEST_WAIT);
        self.again = Some(Again { after, timer });
        Ok(self)
    }

    /// Tells the driver the largest payload of a frame, in bytes.
    pub(super) fn with_mtu(mut self, mtu: u16) -> Self {
        self.mtu = Some(mtu);
        self
    }

    /// What is waited for before packets are received, for others to be waited for with it.
    pub(super) fn receive_poll(&self) -> BorrowedFd<'_> {
        self.receive_poll.as_fd()
    }

    /// Reads until there is a frame, and gives its bytes with the header.
    fn receive_frame(&mut self, buffers: &[GuestSlice<'_>]) -> io::Result<usize> {
        loop {
            let Some(socket) = &self.socket else {
                return Err(io::ErrorKind::WouldBlock.into());
            };
            let why = match self.input.next() {
                Next::Frame(frame) => {
                    scatter(&[0; HEADER_BYTES], buffers);
                    scatter(frame, behind(buffers, HEADER_BYTES));
                    return Ok(HEADER_BYTES + frame.len());
                }
                Next::TooLong(len) => {
                    format!("it announced a frame of {len} bytes, and {MAX_FRAME} are the most")
                }
                Next::Incomplete => match recv(socket, self.input.room(), RecvFlags::DONTWAIT) {
                    Ok((_, 0)) => "its other end was closed".to_owned(),
                    Ok((_, count)) => {
                        self.input.filled(count);
                        continue;
                    }
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::WouldBlock.into()),
                    Err(error) => error.to_string(),
                },
            };
            self.disconnect(&why);
        }
    }

    /// Takes note that the other end has gone, or is of no use any more.
    pub(super) fn disconnect(&mut self, why: &str) {
        let Some(socket) = self.socket.take() else {
            return;
        };
        let _ = epoll::delete(&self.receive_poll, &socket);
        if std::mem::take(&mut self.full) {
            let _ = epoll::delete(&self.send_poll, &socket);
        }
        drop(socket);
        self.input.clear();
        self.output.clear();
        self.gone_is_set = rustix::io::write(&self.gone, &1_u64.to_ne_bytes()).is_ok();
        self.failure = Some(match &self.path {
            Some(path) => format!("the socket `{}`: {why}", path.display()),
            None => format!("the socket: {why}"),
        });
        self.wait_to_connect();
    }

    /// Sets the timer; clears it where there is nothing to wait for.
    fn wait_to_connect(&self) {
        let Some(again) = &self.again else { return };
        let after = if self.socket.is_some() || self.path.is_none() {
            Duration::ZERO
        } else {
            again.after
        };
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: after.subsec_nanos().into(),
            },
        };
        // This also takes back that it has expired. It fails for no valid time.
        let _ = timerfd_settime(&again.timer, TimerfdTimerFlags::empty(), &once);
    }

    /// Connects again where it is time to.
    fn connect_again(&mut self) {
        let (None, Some(path), Some(again)) = (&self.socket, &self.path, &self.again) else {
            return;
        };
        if rustix::io::read(&again.timer, &mut [0; 8]).is_err() {
            return;
        }
        let connected = connect_now(path).ok();
        let watched =
            connected.filter(|socket| watch(&self.receive_poll, socket, EventFlags::IN).is_ok());
        if let Some(socket) = watched {
            self.socket = Some(socket);
            self.failure = None;
        }
        self.wait_to_connect();
    }

    /// Looks at the result of an attempt to send: waits for room where there was none.
    fn sent(&mut self, result: io::Result<()>) -> io::Result<()> {
        let full = match &result {
            Ok(()) => !self.output.is_empty() && self.full,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => true,
            Err(error) => {
                self.disconnect(&error.to_string());
                return result;
            }
        };
        if let Some(socket) = self.socket.as_ref().filter(|_| full != self.full) {
            let changed = if full {
                watch(&self.send_poll, socket, EventFlags::OUT)
            } else {
                epoll::delete(&self.send_poll, socket)
            };
            if let Err(error) = changed {
                self.disconnect(&error.to_string());
                return Err(error.into());
            }
            self.full = full;
        }
        result
    }
}

/// The shortest time between two attempts to connect.
const SHORTEST_WAIT: Duration = Duration::from_millis(10);

/// Connects without waiting for a program that does not accept.
fn connect_now(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Whether something can be sent now.
fn has_room(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::OUT)];
    !matches!(poll(&mut fds, Some(&Timespec::default())), Ok(0))
}

fn watch(epoll: &OwnedFd, fd: impl AsFd, flags: EventFlags) -> rustix::io::Result<()> {
    epoll::add(epoll, fd, EventData::new_u64(0), flags)
}

impl NetBackend for StreamSocket {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.receive_poll.as_fd()
    }

    fn send(&mut self, packet: &[GuestSlice<'_>]) -> io::Result<()> {
        let Some(socket) = &self.socket else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        if self.full {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let result = self.output.send(socket.as_fd(), packet);
        self.sent(result)
    }

    fn send_readiness(&self) -> Option<BorrowedFd<'_>> {
        Some(self.send_poll.as_fd())
    }

    fn flush(&mut self) {
        if std::mem::take(&mut self.gone_is_set) {
            let _ = rustix::io::read(&self.gone, &mut [0; 8]);
        }
        let Some(socket) = &self.socket else {
            return;
        };
        let result = if self.full && self.output.is_empty() && !has_room(socket) {
            Err(io::ErrorKind::WouldBlock.into())
        } else {
            self.output.flush(socket.as_fd())
        };
        // What is left is told by `send_readiness`.
        let _ = self.sent(result);
    }

    fn receive(&mut self, buffers: &[GuestSlice<'_>]) -> io::Result<usize> {
        self.connect_again();
        self.receive_frame(buffers)
    }

    fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }
}

impl fmt::Debug for StreamSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamSocket")
            .field("path", &self.path)
            .field("socket", &self.socket)
            .field("failure", &self.failure)
            .finish_non_exhaustive()
    }
}
