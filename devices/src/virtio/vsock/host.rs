//! The host's side: the socket that host programs connect to, the line with which they say where
//! to, and the sockets that they listen on for the guest.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv,
    send, socket_with,
};

use super::VsockError;
use crate::socket_file::SocketFile;

/// The longest path of a Unix socket.
const MAX_PATH_BYTES: usize = 107;
/// What the name of the socket of one port has more: `_` and the number.
const PORT_BYTES: usize = "_4294967295".len();
/// The longest line that a client may send: `CONNECT`, a number, and some spaces.
const LINE_BYTES: usize = 32;

/// The listening socket.
#[derive(Debug)]
pub(super) struct HostSocket(SocketFile);

impl HostSocket {
    /// Listens at `path`, where nothing may be yet.
    pub(super) fn listen(path: &Path) -> Result<Self, VsockError> {
        let bytes = path.as_os_str().as_bytes().len();
        if bytes == 0 || bytes + PORT_BYTES > MAX_PATH_BYTES {
            return Err(VsockError::PathLength {
                path: path.into(),
                max: MAX_PATH_BYTES - PORT_BYTES,
            });
        }
        let fail = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => VsockError::PathExists { path: path.into() },
            _ => VsockError::Listen {
                path: path.into(),
                source,
            },
        };
        SocketFile::listen(path).map(Self).map_err(fail)
    }

    /// The next client that has connected.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        self.0.accept()
    }

    /// A socket that is not connected yet, for the program that listens for a port of the host.
    pub(super) fn dial(&self, port: u32) -> io::Result<Dial> {
        let mut path: OsString = self.0.path().into();
        path.push(format!("_{port}"));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(Dial {
            socket: socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?,
            address: SocketAddrUnix::new(path)?,
        })
    }
}

impl AsRawFd for HostSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// An attempt to connect to a program of the host.
#[derive(Debug)]
pub(super) struct Dial {
    socket: OwnedFd,
    address: SocketAddrUnix,
}

impl Dial {
    /// Tries to connect. `WouldBlock` says that the program is there and has too many connections
    /// waiting to be accepted: it can be tried again.
    pub(super) fn connect(&self) -> io::Result<()> {
        Ok(connect(&self.socket, &self.address)?)
    }

    /// The socket, once it is connected.
    pub(super) fn into_socket(self) -> UnixStream {
        self.socket.into()
    }
}

/// What a client of the listening socket has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// The line is not whole yet.
    Waiting,
    /// The port of the guest that it wants.
    Connect(u32),
    /// It has gone, or does not speak the protocol.
    Bad,
}

/// A client that has connected and not yet said where to: it sends `CONNECT port` on a line.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) socket: UnixStream,
    pub(super) deadline: Instant,
    /// There may be something to read.
    pub(super) readable: bool,
    line: [u8; LINE_BYTES],
    filled: usize,
}

impl Client {
    pub(super) fn new(socket: UnixStream, deadline: Instant) -> Self {
        Self {
            socket,
            deadline,
            readable: true,
            line: [0; LINE_BYTES],
            filled: 0,
        }
    }

    /// Reads what there is of the line, and nothing of what follows it.
    pub(super) fn read_line(&mut self) -> Greeting {
        loop {
            let place = &mut self.line[self.filled..];
            // Looked at first: what is behind the line is for the guest.
            let seen = match recv(&self.socket, &mut *place, RecvFlags::PEEK) {
                Ok((0, _)) => return Greeting::Bad,
                Ok((count, _)) => count,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => {
                    self.readable = false;
                    return Greeting::Waiting;
                }
                Err(_) => return Greeting::Bad,
            };
            let end = place[..seen].iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(seen, |end| end + 1);
            match recv(&self.socket, &mut place[..taken], RecvFlags::empty()) {
                Ok((count, _)) if count == taken => self.filled += taken,
                _ => return Greeting::Bad,
            }
            if end.is_some() {
                return parse_connect(&self.line[..self.filled])
                    .map_or(Greeting::Bad, Greeting::Connect);
            }
            if self.filled == LINE_BYTES {
                return Greeting::Bad;
            }
        }
    }
}

fn parse_connect(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let mut words = text.split_ascii_whitespace();
    let is_connect = words.next()?.eq_ignore_ascii_case("CONNECT");
    let port = words.next()?;
    let is_number = port.bytes().all(|byte| byte.is_ascii_digit());
    if !is_connect || !is_number || words.next().is_some() {
        return None;
    }
    port.parse().ok()
}

/// Sends `bytes` as far as the socket takes them now, and never with a signal.
pub(super) fn send_bytes(socket: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use std::io::{Read as _, Write as _};

    fn client() -> (Client, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Client::new(ours, Instant::now()), theirs)
    }

    #[test]
    fn a_line_is_read_in_pieces_and_what_follows_is_left() {
        let (mut client, mut peer) = client();
        for piece in ["CON", "NECT 10", "24"] {
            peer.write_all(piece.as_bytes()).unwrap();
            assert_eq!(client.read_line(), Greeting::Waiting);
        }
        peer.write_all(b"\nhello").unwrap();
        assert_eq!(client.read_line(), Greeting::Connect(1024));
        let mut rest = [0; 5];
        client.socket.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }

    #[test]
    fn what_is_no_connect_line_is_refused() {
        for (line, port) in [
            ("CONNECT 0\n", Some(0)),
            ("connect 4294967295\r\n", Some(u32::MAX)),
            ("  CONNECT\t7 \n", Some(7)),
            ("CONNECT 4294967296\n", None),
            ("CONNECT -1\n", None),
            ("CONNECT +1\n", None),
            ("CONNECT\n", None),
            ("CONNECT 1 2\n", None),
            ("\n", None),
            ("CONNECT 1\0\n", None),
            ("GET / HTTP/1.1\r\n", None),
            ("CONNECT 00000000000000000000000000000001\n", None),
        ] {
            let (mut client, mut peer) = client();
            peer.write_all(line.as_bytes()).unwrap();
            let expected = port.map_or(Greeting::Bad, Greeting::Connect);
            assert_eq!(client.read_line(), expected, "{line:?}");
        }
        let (mut client, mut peer) = client();
        peer.write_all(&[b'x'; 100]).unwrap();
        assert_eq!(client.read_line(), Greeting::Bad, "no end of the line");
        let (mut client, mut peer) = self::client();
        peer.write_all(b"CONNECT 1").unwrap();
        drop(peer);
        assert_eq!(client.read_line(), Greeting::Bad, "gone");
    }

    #[test]
    fn a_socket_file_goes_with_its_socket_and_nobody_elses_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let socket = HostSocket::listen(&path).unwrap();
        assert!(matches!(
            HostSocket::listen(&path),
            Err(VsockError::PathExists { .. })
        ));
        drop(socket);
        assert!(!path.exists());
        let socket = HostSocket::listen(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "mine").unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn a_path_without_room_for_a_port_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let room = 96 - folder.path().as_os_str().len() - 1;
        let path = |len: usize| folder.path().join("x".repeat(len));
        let socket = HostSocket::listen(&path(room)).unwrap();
        assert_eq!(
            socket.dial(u32::MAX).unwrap().connect().unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        for path in [path(room + 1), PathBuf::new()] {
            let error = HostSocket::listen(&path).unwrap_err();
            assert!(matches!(error, VsockError::PathLength { max: 96, .. }));
        }
    }
}
