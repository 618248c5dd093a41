//! What may be at the other end of a console.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Cursor, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, send};

/// The most that is written at once: what fits in a pipe that is ready (`PIPE_BUF`).
pub(crate) const CHUNK: usize = 4096;
/// The most that is written at once to a terminal whose descriptor would block.
const TERMINAL_CHUNK: usize = 64;

/// The two ends of a console's line.
///
/// ```no_run
/// use kiln_devices::console::{Console, ConsoleInput, ConsoleOutput};
///
/// # fn main() -> std::io::Result<()> {
/// let interactive = Console::stdio()?;
/// let log = Console::file("console.log")?;
/// let mine = Console::writer(Vec::new());
/// let scripted = Console::new(ConsoleInput::bytes("root\n"), ConsoleOutput::stdout()?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Console {
    /// Where the guest's input comes from.
    pub input: ConsoleInput,
    /// Where the guest's output goes.
    pub output: ConsoleOutput,
}

impl Console {
    /// A console with this input and this output.
    pub fn new(input: ConsoleInput, output: ConsoleOutput) -> Self {
        Self { input, output }
    }

    /// The process's standard input and output. A terminal's mode is left as it is.
    ///
    /// # Errors
    ///
    /// What the system says where one of them is closed.
    pub fn stdio() -> io::Result<Self> {
        Ok(Self::new(ConsoleInput::stdin()?, ConsoleOutput::stdout()?))
    }

    /// No input, and output that nobody sees.
    pub fn null() -> Self {
        Self::new(ConsoleInput::null(), ConsoleOutput::null())
    }

    /// Output to a file, which is created or emptied, and no input.
    ///
    /// # Errors
    ///
    /// What the system says where the file cannot be opened for writing.
    pub fn file(path: impl AsRef<Path>) -> io::Result<Self> {
        let output = ConsoleOutput::file(path)?;
        Ok(Self::new(ConsoleInput::null(), output))
    }

    /// Output to a writer, as of [`ConsoleOutput::writer`], and no input.
    pub fn writer(writer: impl Write + Send + 'static) -> Self {
        Self::new(ConsoleInput::null(), ConsoleOutput::writer(writer))
    }
}

/// Where a guest's input comes from.
pub struct ConsoleInput(pub(super) Option<Source>);

impl ConsoleInput {
    /// Whether there is an input.
    pub(crate) fn is_open(&self) -> bool {
        self.0.is_some()
    }

    /// No input.
    pub fn null() -> Self {
        Self(None)
    }

    /// The process's standard input.
    ///
    /// # Errors
    ///
    /// What the system says where it is closed.
    pub fn stdin() -> io::Result<Self> {
        Ok(Self::fd(io::stdin().as_fd().try_clone_to_owned()?))
    }

    /// A file descriptor of any kind: pipe, socket, terminal, file. Its flags, which others may
    /// share, are left as they are.
    pub fn fd(fd: OwnedFd) -> Self {
        let file = File::from(fd);
        let file = own_description(&file, OpenOptions::new().read(true)).unwrap_or(file);
        Self(Some(Source::File(file)))
    }

    /// A reader, called on the I/O thread: it must not block. Its end, or an error, is the end of
    /// the input.
    pub fn reader(reader: impl Read + Send + 'static) -> Self {
        Self(Some(Source::Reader(Box::new(reader))))
    }

    /// These bytes, and then no more.
    pub fn bytes(bytes: impl Into<Vec<u8>>) -> Self {
        Self::reader(Cursor::new(bytes.into()))
    }
}

impl fmt::Debug for ConsoleInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.0 {
            None => "null",
            Some(Source::File(_)) => "fd",
            Some(Source::Reader(_)) => "reader",
        };
        f.debug_tuple("ConsoleInput").field(&kind).finish()
    }
}

/// Where a guest's output goes.
///
/// An output that fails (a pipe that nobody reads any more, a full disk) is not tried again: what
/// the guest sends from then on is dropped, and the guest goes on.
pub struct ConsoleOutput(pub(super) Option<Sink>);

impl ConsoleOutput {
    /// Whether somebody sees it.
    pub(crate) fn is_open(&self) -> bool {
        self.0.is_some()
    }

    /// Whether a write may block where readiness was not waited for.
    #[cfg(test)]
    pub(crate) fn may_block(&self) -> bool {
        self.0.as_ref().is_some_and(|sink| sink.wait)
    }

    /// Output that nobody sees.
    pub fn null() -> Self {
        Self(None)
    }

    /// The process's standard output.
    ///
    /// # Errors
    ///
    /// What the system says where it is closed.
    pub fn stdout() -> io::Result<Self> {
        Ok(Self::fd(io::stdout().as_fd().try_clone_to_owned()?))
    }

    /// A file, which is created or emptied.
    ///
    /// # Errors
    ///
    /// What the system says where the file cannot be opened for writing.
    pub fn file(path: impl AsRef<Path>) -> io::Result<Self> {
        Ok(Self::fd(File::create(path)?.into()))
    }

    /// A file descriptor of any kind: pipe, socket, terminal, file. Its flags, which others may
    /// share, are left as they are.
    pub fn fd(fd: OwnedFd) -> Self {
        let file = File::from(fd);
        let own = own_description(&file, OpenOptions::new().write(true));
        let blocks = own.is_none();
        let terminal = file.is_terminal();
        let socket = file
            .metadata()
            .is_ok_and(|data| data.file_type().is_socket());
        Self(Some(Sink {
            target: Target::File(own.unwrap_or(file)),
            chunk: if blocks && terminal {
                TERMINAL_CHUNK
            } else {
                CHUNK
            },
            wait: blocks,
            socket,
        }))
    }

    /// A writer, called on the I/O thread: it should not block for long. It is flushed whenever it
    /// was given all there is.
    pub fn writer(writer: impl Write + Send + 'static) -> Self {
        Self(Some(Sink {
            target: Target::Writer(Box::new(writer)),
            chunk: CHUNK,
            wait: false,
            socket: false,
        }))
    }

    /// A function that is given the bytes in order, called on the I/O thread: it should not block
    /// for long.
    pub fn call(function: impl FnMut(&[u8]) + Send + 'static) -> Self {
        struct Call<F>(F);
        impl<F: FnMut(&[u8])> Write for Call<F> {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                (self.0)(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        Self::writer(Call(function))
    }

    /// Keeps the first `limit` bytes in memory, to be looked at any time.
    pub fn capture(limit: usize) -> (Self, Captured) {
        let captured = Captured(Arc::default());
        let kept = captured.clone();
        let output = Self::call(move |bytes| {
            let mut kept = kept.0.lock().unwrap_or_else(PoisonError::into_inner);
            let room = limit.saturating_sub(kept.len());
            kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
        });
        (output, captured)
    }
}

impl fmt::Debug for ConsoleOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.0.as_ref().map(|sink| &sink.target) {
            None => "null",
            Some(Target::File(_)) => "fd",
            Some(Target::Writer(_)) => "writer",
        };
        f.debug_tuple("ConsoleOutput").field(&kind).finish()
    }
}

/// The output that [`ConsoleOutput::capture`] keeps.
#[derive(Clone, Debug)]
pub struct Captured(Arc<Mutex<Vec<u8>>>);

impl Captured {
    /// What was kept so far.
    pub fn bytes(&self) -> Vec<u8> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// What was kept so far, as text; what is not UTF-8 is replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }
}

/// An input that is there.
pub(super) enum Source {
    File(File),
    Reader(Box<dyn Read + Send>),
}

impl Source {
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.read(buffer),
            Self::Reader(reader) => reader.read(buffer),
        }
    }
}

/// An output that is there.
pub(super) struct Sink {
    pub(super) target: Target,
    /// The most bytes to write at once.
    pub(super) chunk: usize,
    /// Whether a write may block where readiness was not waited for.
    pub(super) wait: bool,
    /// Whether it is a socket, where a write could raise `SIGPIPE`.
    pub(super) socket: bool,
}

pub(super) enum Target {
    File(File),
    Writer(Box<dyn Write + Send>),
}

impl Sink {
    /// Whether it takes bytes now; a writer always does.
    pub(super) fn is_ready(&self) -> bool {
        let Target::File(file) = &self.target else {
            return true;
        };
        let mut fds = [PollFd::new(file, PollFlags::OUT)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1))
    }

    /// Writes some of `bytes`; flushes if they were the `last` there are and all went.
    pub(super) fn write(&mut self, bytes: &[u8], last: bool) -> io::Result<usize> {
        match &mut self.target {
            Target::File(file) if self.socket => {
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                Ok(send(file, bytes, flags)?)
            }
            Target::File(file) => file.write(bytes),
            Target::Writer(writer) => {
                let len = writer.write(bytes)?;
                if last && len == bytes.len() {
                    writer.flush()?;
                }
                Ok(len)
            }
        }
    }
}

/// Opens what is behind `file` a second time, without blocking.
///
/// Whether a descriptor blocks is a property of the open file description, which a standard stream
/// shares with the shell and whoever else has it: setting it there breaks them. A pipe or a
/// terminal can be opened again, which gives a description of our own. `None` where that is not so,
/// or was refused: then readiness has to be waited for, and little written at a time.
fn own_description(file: &File, options: &mut OpenOptions) -> Option<File> {
    /// The numbers of the devices that can be opened again: the virtual consoles and serial ports
    /// of the host, and the slaves of pseudoterminals. The master is not one of them: to open that
    /// makes a new pseudoterminal.
    const TERMINALS: [std::ops::RangeInclusive<u32>; 2] = [4..=4, 136..=143];
    let metadata = file.metadata().ok()?;
    let kind = metadata.file_type();
    let major = libc::major(metadata.rdev());
    let terminal =
        kind.is_char_device() && TERMINALS.iter().any(|numbers| numbers.contains(&major));
    if !terminal && !kind.is_fifo() {
        return None;
    }
    let fd: RawFd = file.as_raw_fd();
    options
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{fd}"))
        .ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_write_to_a_socket_that_nobody_has_raises_no_signal() {
        // A blocked signal stays pending, even one that is ignored.
        vmm_sys_util::signal::block_signal(libc::SIGPIPE).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let mut sink = ConsoleOutput::fd(ours.into()).0.unwrap();
        let error = sink.write(b"x", true).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        assert!(status.contains("SigPnd:\t0000000000000000"), "{status}");
    }
}
