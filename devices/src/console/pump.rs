//! Reads and writes of a console's ends on an I/O thread, none of which waits: what is not ready is
//! added to what the thread waits for.

use std::fs::File;
use std::io::{self, ErrorKind};

use kiln_io_thread::{EventSet, Registrar};

use super::ends::{Sink, Source, Target};
use super::{ConsoleInput, ConsoleOutput};

/// What became of a write.
#[derive(Debug)]
pub(crate) enum Written {
    /// So many bytes went.
    Bytes(usize),
    /// None went. The output's readiness is waited for.
    Later,
    /// None went, and none will any more.
    Ended(io::Error),
    /// There is no output, or none any more.
    Closed,
}

/// What became of a read.
#[derive(Debug)]
pub(crate) enum Read {
    /// So many bytes came.
    Bytes(usize),
    /// None came. The input's readiness is waited for.
    Later,
    /// None came, and none will any more; with the reason where that is not a plain end.
    Ended(Option<io::Error>),
    /// There is no input, or none any more.
    Closed,
}

/// How the wait for a file descriptor went.
enum Wait {
    Waiting,
    /// It is always ready, as a regular file is.
    Needless,
}

/// Waits for `set` on `file`, unless that is so already.
fn wait_for(
    file: &File,
    waits: &mut bool,
    set: EventSet,
    token: u32,
    registrar: &mut Registrar<'_, '_>,
) -> io::Result<Wait> {
    if *waits {
        return Ok(Wait::Waiting);
    }
    match registrar.add(file, token, set) {
        Ok(()) => {
            *waits = true;
            Ok(Wait::Waiting)
        }
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(Wait::Needless),
        Err(error) => Err(error),
    }
}

/// The output's half.
pub(crate) struct OutputPump {
    sink: Option<Sink>,
    token: u32,
    waits: bool,
}

impl OutputPump {
    /// An output whose readiness is told with `token`.
    pub(crate) fn new(output: ConsoleOutput, token: u32) -> Self {
        Self {
            sink: output.0,
            token,
            waits: false,
        }
    }

    /// Whether there is somebody who takes bytes.
    pub(crate) fn is_open(&self) -> bool {
        self.sink.is_some()
    }

    /// The most bytes to give it at once; 0 where there is no output.
    pub(crate) fn chunk(&self) -> usize {
        self.sink.as_ref().map_or(0, |sink| sink.chunk)
    }

    /// Forgets what was waited for on another thread.
    pub(crate) fn start(&mut self) {
        self.waits = false;
    }

    /// Writes some of `bytes`, which are not none, and at most [`chunk`](Self::chunk). `last` says
    /// that there are no more at the moment, `ready` that the output is known to take some.
    pub(crate) fn write(
        &mut self,
        bytes: &[u8],
        last: bool,
        ready: bool,
        registrar: &mut Registrar<'_, '_>,
    ) -> Written {
        loop {
            let Some(sink) = &mut self.sink else {
                return Written::Closed;
            };
            if ready || !sink.wait {
                match sink.write(bytes, last) {
                    // A writer that takes nothing will not do so later either.
                    Ok(0) => return self.end(ErrorKind::WriteZero.into(), registrar),
                    Ok(len) => return Written::Bytes(len),
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return self.end(error, registrar),
                }
            }
            let Target::File(file) = &sink.target else {
                // There is nothing to wait for on a writer.
                return self.end(ErrorKind::WouldBlock.into(), registrar);
            };
            match wait_for(file, &mut self.waits, EventSet::OUT, self.token, registrar) {
                Ok(Wait::Waiting) => return Written::Later,
                Ok(Wait::Needless) if sink.wait => sink.wait = false,
                Ok(Wait::Needless) => {
                    return self.end(ErrorKind::WouldBlock.into(), registrar);
                }
                Err(error) => return self.end(error, registrar),
            }
        }
    }

    /// Writes some of `bytes` where no thread waits for readiness: what is not ready now is not
    /// written. Gives the number of bytes that went.
    pub(crate) fn write_at_once(&mut self, bytes: &[u8]) -> usize {
        match &mut self.sink {
            Some(sink) if !sink.wait || sink.is_ready() => sink.write(bytes, true).unwrap_or(0),
            _ => 0,
        }
    }

    fn end(&mut self, error: io::Error, registrar: &mut Registrar<'_, '_>) -> Written {
        self.close(registrar);
        Written::Ended(error)
    }

    /// Closes it.
    pub(crate) fn close(&mut self, registrar: &mut Registrar<'_, '_>) {
        self.rest(registrar);
        self.sink = None;
    }

    /// There is nothing to write: its readiness does not matter.
    pub(crate) fn rest(&mut self, registrar: &mut Registrar<'_, '_>) {
        if std::mem::take(&mut self.waits)
            && let Some(Target::File(file)) = self.sink.as_ref().map(|sink| &sink.target)
        {
            let _ = registrar.remove(file);
        }
    }
}

/// The input's half.
pub(crate) struct InputPump {
    source: Option<Source>,
    token: u32,
    waits: bool,
    /// A regular file has no readiness, and is read whenever there is room.
    poll: bool,
}

impl InputPump {
    /// An input whose readiness is told with `token`.
    pub(crate) fn new(input: ConsoleInput, token: u32) -> Self {
        Self {
            poll: matches!(input.0, Some(Source::File(_))),
            source: input.0,
            token,
            waits: false,
        }
    }

    /// Whether there may be more.
    pub(crate) fn is_open(&self) -> bool {
        self.source.is_some()
    }

    /// Whether readiness is told again where there is more than was read.
    pub(crate) fn tells(&self) -> bool {
        self.poll
    }

    /// Forgets what was waited for on another thread.
    pub(crate) fn start(&mut self) {
        self.waits = false;
    }

    /// Reads into `buffer`, which is not empty. `ready` says that the input is known to have
    /// something, or to have ended.
    pub(crate) fn read(
        &mut self,
        buffer: &mut [u8],
        mut ready: bool,
        registrar: &mut Registrar<'_, '_>,
    ) -> Read {
        loop {
            if self.poll
                && !ready
                && let Some(Source::File(file)) = &self.source
            {
                match wait_for(file, &mut self.waits, EventSet::IN, self.token, registrar) {
                    Ok(Wait::Waiting) => return Read::Later,
                    // A regular file, or one like /dev/null: it can be read at any time.
                    Ok(Wait::Needless) => self.poll = false,
                    Err(error) => return self.end(Some(error), registrar),
                }
            }
            let Some(source) = &mut self.source else {
                return Read::Closed;
            };
            match source.read(buffer) {
                Ok(0) => return self.end(None, registrar),
                // A reader that claims more than was asked for is not believed.
                Ok(len) => return Read::Bytes(len.min(buffer.len())),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // It was not ready after all: that is waited for, if it is not yet.
                Err(error) if error.kind() == ErrorKind::WouldBlock && self.poll => ready = false,
                Err(error) => return self.end(Some(error), registrar),
            }
        }
    }

    fn end(&mut self, error: Option<io::Error>, registrar: &mut Registrar<'_, '_>) -> Read {
        self.close(registrar);
        Read::Ended(error)
    }

    /// Closes it.
    pub(crate) fn close(&mut self, registrar: &mut Registrar<'_, '_>) {
        self.rest(registrar);
        self.source = None;
        self.poll = false;
    }

    /// There is no room for input: its readiness does not matter.
    pub(crate) fn rest(&mut self, registrar: &mut Registrar<'_, '_>) {
        if std::mem::take(&mut self.waits)
            && let Some(Source::File(file)) = &self.source
        {
            let _ = registrar.remove(file);
        }
    }
}

/// Says that an end of a console has ended, which it does only once. A reader that goes away is
/// nothing special; a disk that is full may be.
pub(crate) fn log_end(what: &str, error: &io::Error) {
    if error.kind() == ErrorKind::BrokenPipe {
        tracing::debug!("{what} ends: {error}");
    } else {
        tracing::warn!("{what} ends: {error}");
    }
}
