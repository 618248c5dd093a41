//! A port: what it is called and leads to, and the host's end of one at work.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use kiln_io_thread::{EventSet, Registrar};
use rustix::net::{RecvFlags, recv};

use super::VirtioConsoleError;
use crate::console::{Console, ConsoleInput, ConsoleOutput, InputPump, OutputPump};
use crate::socket_file::SocketFile;

/// The longest name of a port, in bytes.
const MAX_NAME_BYTES: usize = 64;

/// What a file descriptor of a port tells: the token of it is this and the port's first token.
pub(super) const INPUT: u32 = 0;
pub(super) const OUTPUT: u32 = 1;
pub(super) const HANGUP: u32 = 2;
pub(super) const CLIENT: u32 = 3;
pub(super) const TOKENS: u32 = 4;

/// A port with a name, by which the guest finds it: `/dev/virtio-ports/NAME` in Linux.
pub struct Port {
    pub(super) name: String,
    end: End,
}

/// What a port leads to.
enum End {
    Console(Console),
    Socket(UnixStream),
    Listener(PathBuf),
}

impl Port {
    /// A port that leads to what consoles lead to: files, pipes, terminals, readers and writers. To
    /// the guest its end is open as long as one of the two is.
    pub fn new(name: impl Into<String>, console: Console) -> Self {
        Self {
            name: name.into(),
            end: End::Console(console),
        }
    }

    /// A port that leads to a connected Unix socket, until it is disconnected.
    pub fn socket(name: impl Into<String>, socket: UnixStream) -> Self {
        Self {
            name: name.into(),
            end: End::Socket(socket),
        }
    }

    /// A port that leads to a Unix socket at `path`, which is made with the device and goes with
    /// it. Programs connect there, and have the port one after the other.
    pub fn listen(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            end: End::Listener(path.into()),
        }
    }

    /// Checks the name.
    pub(super) fn check(&self) -> Result<(), VirtioConsoleError> {
        let is_good = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
        let name = self.name.as_bytes();
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.iter().copied().all(is_good) {
            return Err(VirtioConsoleError::Name {
                name: self.name.clone(),
                max: MAX_NAME_BYTES,
            });
        }
        Ok(())
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end: &dyn fmt::Debug = match &self.end {
            End::Console(console) => console,
            End::Socket(socket) => socket,
            End::Listener(path) => path,
        };
        f.debug_struct("Port")
            .field("name", &self.name)
            .field("end", end)
            .finish()
    }
}

/// The host's end of a port at work.
pub(super) struct HostEnd {
    /// `None` for the console.
    pub(super) name: Option<String>,
    pub(super) input: InputPump,
    pub(super) output: OutputPump,
    /// What is known to be ready.
    pub(super) input_ready: bool,
    pub(super) output_ready: bool,
    /// What the guest has sent to a client that has gone is still to be dropped.
    pub(super) drop_pending: bool,
    first_token: u32,
    connection: Option<Connection>,
    listener: Option<Listener>,
}

/// A Unix socket that somebody is at the other end of.
struct Connection {
    /// The socket once more, to learn that its other end has gone.
    socket: UnixStream,
    watched: bool,
    hung_up: bool,
}

struct Listener {
    socket: SocketFile,
    watched: bool,
    /// A client may be there.
    ready: bool,
}

/// What came of looking after a port's connection.
#[derive(Debug)]
pub(super) enum Change {
    None,
    /// Somebody has connected.
    Connected,
    /// There may be a client that could not be taken.
    Failed(io::Error),
}

impl HostEnd {
    pub(super) fn console(console: Console, first_token: u32) -> Self {
        Self {
            name: None,
            input: InputPump::new(console.input, first_token + INPUT),
            output: OutputPump::new(console.output, first_token + OUTPUT),
            input_ready: false,
            output_ready: false,
            drop_pending: false,
            first_token,
            connection: None,
            listener: None,
        }
    }

    pub(super) fn port(port: Port, first_token: u32) -> Result<Self, VirtioConsoleError> {
        let mut end = Self::console(Console::null(), first_token);
        match port.end {
            End::Console(console) => end = Self::console(console, first_token),
            End::Socket(socket) => {
                end.connect(socket)
                    .map_err(|source| VirtioConsoleError::Socket {
                        name: port.name.clone(),
                        source,
                    })?
            }
            End::Listener(path) => end.listener = Some(Listener::new(&path)?),
        }
        end.name = Some(port.name);
        Ok(end)
    }

    /// What messages call it.
    pub(super) fn what(&self, part: &str) -> String {
        match &self.name {
            None => format!("the {part} of the console"),
            Some(name) => format!("the {part} of port `{name}`"),
        }
    }

    fn connect(&mut self, socket: UnixStream) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        let (input, output) = (socket.try_clone()?, socket.try_clone()?);
        let input = ConsoleInput::fd(input.into());
        let output = ConsoleOutput::fd(output.into());
        self.input = InputPump::new(input, self.first_token + INPUT);
        self.output = OutputPump::new(output, self.first_token + OUTPUT);
        (self.input_ready, self.output_ready) = (false, false);
        self.connection = Some(Connection {
            socket,
            watched: false,
            hung_up: false,
        });
        Ok(())
    }

    /// Whether the guest is to see the host's end as open.
    pub(super) fn is_open(&self) -> bool {
        let is_console = self.name.is_none();
        is_console || self.connection.is_some() || self.input.is_open() || self.output.is_open()
    }

    /// Forgets what was waited for on another thread.
    pub(super) fn start(&mut self) {
        self.input.start();
        self.output.start();
        (self.input_ready, self.output_ready) = (false, false);
        if let Some(connection) = &mut self.connection {
            connection.watched = false;
        }
        if let Some(listener) = &mut self.listener {
            (listener.watched, listener.ready) = (false, true);
        }
    }

    /// The other end of the connection has gone.
    pub(super) fn hung_up(&mut self) {
        if let Some(connection) = &mut self.connection {
            connection.hung_up = true;
        }
    }

    /// There is a client.
    pub(super) fn client_came(&mut self) {
        if let Some(listener) = &mut self.listener {
            listener.ready = true;
        }
    }

    /// Looks after the connection: ends one whose other end has gone and has nothing left to read,
    /// and takes a client if the driver knows that there is none.
    pub(super) fn look_after(
        &mut self,
        driver_knows: bool,
        registrar: &mut Registrar<'_, '_>,
    ) -> io::Result<Change> {
        self.look_after_connection(registrar)?;
        let Some(listener) = &mut self.listener else {
            return Ok(Change::None);
        };
        if self.connection.is_some() || !driver_knows || self.drop_pending {
            listener.rest(registrar);
            return Ok(Change::None);
        }
        if listener.ready {
            listener.ready = false;
            let error = match listener.socket.accept() {
                Ok(socket) => match self.connect(socket) {
                    Ok(()) => {
                        self.look_after_connection(registrar)?;
                        return Ok(Change::Connected);
                    }
                    Err(error) => error,
                },
                Err(error) => error,
            };
            let Some(listener) = &mut self.listener else {
                return Ok(Change::None);
            };
            if !matches!(
                error.kind(),
                io::ErrorKind::WouldBlock
                    | io::ErrorKind::Interrupted
                    | io::ErrorKind::ConnectionAborted
            ) {
                // It stays ready, and would keep the thread busy.
                listener.rest(registrar);
                listener.ready = true;
                return Ok(Change::Failed(error));
            }
        }
        if let Some(listener) = &mut self.listener
            && !listener.watched
        {
            let token = self.first_token + CLIENT;
            registrar.add(&listener.socket, token, EventSet::IN)?;
            listener.watched = true;
        }
        Ok(Change::None)
    }

    pub(super) fn look_after_connection(
        &mut self,
        registrar: &mut Registrar<'_, '_>,
    ) -> io::Result<()> {
        let Some(connection) = &mut self.connection else {
            return Ok(());
        };
        if !connection.hung_up {
            if !connection.watched {
                // A hangup is told whatever is asked for.
                let token = self.first_token + HANGUP;
                registrar.add(&connection.socket, token, EventSet::empty())?;
                connection.watched = true;
            }
            return Ok(());
        }
        if std::mem::take(&mut connection.watched) {
            let _ = registrar.remove(&connection.socket);
        }
        self.output.close(registrar);
        let mut byte = [0; 1];
        let left = recv(&connection.socket, &mut byte[..], RecvFlags::PEEK);
        if !matches!(left, Ok((1.., _))) || !self.input.is_open() {
            self.input.close(registrar);
            self.connection = None;
        }
        Ok(())
    }
}

impl Listener {
    fn new(path: &Path) -> Result<Self, VirtioConsoleError> {
        let fail = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => VirtioConsoleError::PathExists { path: path.into() },
            _ => VirtioConsoleError::Listen {
                path: path.into(),
                source,
            },
        };
        Ok(Self {
            socket: SocketFile::listen(path).map_err(fail)?,
            watched: false,
            ready: true,
        })
    }

    fn rest(&mut self, registrar: &mut Registrar<'_, '_>) {
        if std::mem::take(&mut self.watched) {
            let _ = registrar.remove(&self.socket);
            // What came meanwhile is looked for.
            self.ready = true;
        }
    }
}
