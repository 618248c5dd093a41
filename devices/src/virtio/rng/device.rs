//! The device, and what it does with its one queue.

use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::time::{Duration, Instant};

use kiln_io_thread::{EventSet, IoEvent, Registrar};
use kiln_virtio_device::{
    ActivateError, Activation, ActiveQueue, QueueError, QueueHandler, Turn, VirtioDevice, Worker,
};
use rustix::rand::{GetRandomFlags, getrandom};
use tracing::Span;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use crate::rate_limit::{RateLimit, Timer, TokenBucket};

const QUEUE_SIZE: u16 = 64;
const REQUESTS: u16 = 0;

/// The most bytes that a request gets, whatever its buffer: a driver that wants more asks again
/// (virtio 1.3, section 5.4.6.2).
const MAX_BYTES: usize = 4096;
/// How long a source is left alone that had nothing.
const RETRY: Duration = Duration::from_secs(1);

/// How an entropy device is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RngOptions {
    /// How many bytes the guest can have; any number by default.
    pub rate_limit: Option<RateLimit>,
}

/// Why an entropy device could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RngError {
    /// There is no timer.
    #[error("create the timer of an entropy device")]
    Timer(#[source] io::Error),
}

/// A virtio entropy device.
pub struct Rng {
    worker: Worker<RngHandler>,
}

impl Rng {
    /// A device with the random numbers of the host's kernel.
    ///
    /// # Errors
    ///
    /// [`RngError`] where the system gives no timer.
    pub fn new(options: RngOptions) -> Result<Self, RngError> {
        Self::from_reader(Kernel, options)
    }

    /// A device with random numbers of your own. They are read on the I/O thread, so the reader
    /// must not block; where it has nothing, or fails, it is tried again a second later.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn from_reader(
        reader: impl Read + Send + 'static,
        options: RngOptions,
    ) -> Result<Self, RngError> {
        let now = Instant::now();
        let handler = RngHandler {
            source: Box::new(reader),
            bucket: options.rate_limit.map(|limit| TokenBucket::new(limit, now)),
            timer: Timer::new().map_err(RngError::Timer)?,
            warned: false,
            span: Span::none(),
        };
        Ok(Self {
            worker: Worker::new(handler),
        })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.worker.activate(activation)
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.worker.deactivate()
    }
}

impl fmt::Debug for Rng {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rng").finish_non_exhaustive()
    }
}

/// The random numbers of the host's kernel.
struct Kernel;

impl Read for Kernel {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(getrandom(buffer, GetRandomFlags::empty())?)
    }
}

/// What lives on the I/O thread.
struct RngHandler {
    source: Box<dyn Read + Send>,
    bucket: Option<TokenBucket>,
    timer: Timer,
    /// A source that fails is worth one line.
    warned: bool,
    span: Span,
}

impl RngHandler {
    /// How many of `wanted` bytes there may be now, or how long to wait for them.
    fn allow(&mut self, wanted: usize) -> Result<usize, Duration> {
        let wanted = wanted.min(MAX_BYTES);
        let Some(bucket) = &mut self.bucket else {
            return Ok(wanted);
        };
        // No more than ever fits.
        let burst = usize::try_from(bucket.limit().burst.get()).unwrap_or(usize::MAX);
        let wanted = wanted.min(burst);
        bucket.take(wanted as u64, Instant::now())?;
        Ok(wanted)
    }

    /// Reads some random numbers; none where the source has none now.
    fn read(&mut self, buffer: &mut [u8]) -> usize {
        loop {
            let error = match self.source.read(buffer) {
                // One that claims more than was asked for is not believed.
                Ok(count @ 1..) => return count.min(buffer.len()),
                Ok(0) => ErrorKind::UnexpectedEof.into(),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => error,
            };
            if error.kind() != ErrorKind::WouldBlock && !std::mem::replace(&mut self.warned, true) {
                let _in_span = self.span.enter();
                tracing::warn!("read random numbers for the guest: {error}");
            }
            return 0;
        }
    }
}

impl QueueHandler for RngHandler {
    fn start(&mut self, _features: u64, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        self.span = Span::current();
        self.timer.clear()?;
        registrar.add(&self.timer, Self::FIRST_TOKEN, EventSet::IN)
    }

    fn process(
        &mut self,
        turn: &mut Turn<'_>,
        _registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        let mut buffer = [0; MAX_BYTES];
        while let Some(mut chain) = turn.pop()? {
            if chain.writable.is_empty() {
                turn.complete(chain, 0)?;
                continue;
            }
            let written = match self.allow(chain.writable.len()) {
                Ok(allowed) => self.read(&mut buffer[..allowed]),
                Err(wait) => {
                    turn.put_back(chain);
                    self.timer.set(wait)?;
                    break;
                }
            };
            if written == 0 {
                turn.put_back(chain);
                self.timer.set(RETRY)?;
                break;
            }
            chain.writable.write(&buffer[..written])?;
            turn.complete(chain, written as u32)?;
        }
        Ok(())
    }

    fn ready(&mut self, _event: IoEvent) -> Option<u16> {
        let _ = self.timer.clear();
        Some(REQUESTS)
    }
}
