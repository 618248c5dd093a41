//! The work on queues, done on an I/O thread by what a device gives as a [`QueueHandler`].

mod in_flight;
#[cfg(test)]
mod tests;
mod turn;

use std::io;
use std::sync::Arc;

use kiln_io_thread::{Attached, EventSet, IoEvent, IoHandler, Registrar};
use kiln_memory::GuestMemory;
use tracing::Span;

use crate::error::one_line;
use crate::{
    ActivateError, Activation, ActiveQueue, ChainError, InterruptEvent, ShortBuffer,
    VirtioInterrupt,
};

pub use in_flight::InFlight;
use in_flight::SpareChains;
pub use turn::{Chain, Turn};
use turn::{TurnEnd, turn_on};

/// Why a queue cannot be worked on any more; the device then needs a reset by its driver.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The rings of the queue are malformed.
    #[error("follow the rings of the queue")]
    Ring(#[from] virtio_queue::Error),
    /// The ring says that there are chains, and none can be had.
    #[error("follow the rings of the queue: there is no entry where the index says so")]
    Stuck,
    /// A descriptor chain is malformed.
    #[error("follow a descriptor chain")]
    Chain(#[from] ChainError),
    /// A buffer that a handler needs is too short.
    #[error("use a buffer of a request")]
    Short(#[from] ShortBuffer),
    /// What to wait for could not be changed.
    #[error("change the file descriptors to wait for")]
    Wait(#[from] io::Error),
}

/// What a device does with the buffers of its queues.
///
/// Everything is called on one thread. Notifications are turned off while a queue is processed,
/// and the driver is interrupted afterwards if it wants to be; neither is a handler's business.
pub trait QueueHandler: Send + 'static {
    /// Works on the queue [`turn.index()`](Turn::index): takes chains with [`Turn::pop`] and
    /// completes each with [`Turn::complete`], usually until there are no more.
    ///
    /// It is called when the driver has notified the device, or [`ready`](Self::ready) asked for
    /// it. A handler that returns before [`Turn::pop`] gave `None`, or puts chains back, waits for
    /// something of its own, and is called again when that is ready, unless it [gives
    /// way](Turn::give_way).
    ///
    /// # Errors
    ///
    /// An error ends the work on all queues: the driver is told to reset the device. It is for
    /// what makes going on impossible; a request that merely fails is completed and says so.
    fn process(
        &mut self,
        turn: &mut Turn<'_>,
        registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError>;

    /// The work begins, with these features agreed on: a handler with file descriptors of its own
    /// adds them here, with tokens from [`Self::FIRST_TOKEN`] on.
    ///
    /// # Errors
    ///
    /// An error makes the activation of the device fail.
    fn start(&mut self, features: u64, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        let _ = (features, registrar);
        Ok(())
    }

    /// A file descriptor of the handler's own is ready. Names the queue that is to be processed
    /// because of it.
    fn ready(&mut self, event: IoEvent) -> Option<u16> {
        let _ = event;
        None
    }

    /// The work on this queue ends after this call, which completes what is still in flight, or puts
    /// it back. A handler that completes every chain where it takes it has nothing to do.
    fn drain(&mut self, turn: &mut Turn<'_>) {
        let _ = turn;
    }

    /// The work on the queues has ended, after an error or a panic of the handler: what is in flight
    /// does not return to the driver, but when this returns nothing touches its buffers any more. A
    /// handler that keeps no [`InFlight`] has nothing to do.
    fn abandon(&mut self) {}

    /// The first token for a handler's own file descriptors: those below are the queues'.
    const FIRST_TOKEN: u32 = 1 << 16;
}

/// A handler, idle or at work on an I/O thread: the two halves that a [`VirtioDevice`] delegates.
///
/// [`VirtioDevice`]: crate::VirtioDevice
#[derive(Debug)]
pub struct Worker<H> {
    place: Place<H>,
}

#[derive(Debug)]
enum Place<H> {
    Idle(H),
    Running(Attached<Runner<H>>),
    /// The attempt to start failed; the queues wait for the next deactivation.
    Refused(H, Vec<ActiveQueue>),
    /// The I/O thread has ended, and the handler with it.
    Gone,
}

impl<H: QueueHandler> Worker<H> {
    /// An idle worker.
    pub fn new(handler: H) -> Self {
        Self {
            place: Place::Idle(handler),
        }
    }

    /// The handler, while it is idle.
    pub fn handler_mut(&mut self) -> Option<&mut H> {
        match &mut self.place {
            Place::Idle(handler) | Place::Refused(handler, _) => Some(handler),
            Place::Running(_) | Place::Gone => None,
        }
    }

    /// Moves the handler to the I/O thread of its first queue and starts it there; to be called by
    /// [`VirtioDevice::activate`](crate::VirtioDevice::activate).
    ///
    /// # Errors
    ///
    /// An error where the handler refused to start, or the I/O thread has ended.
    pub fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let handler = match std::mem::replace(&mut self.place, Place::Gone) {
            Place::Idle(handler) => handler,
            other => {
                self.place = other;
                return Err(ActivateError::new("start a worker that is not idle"));
            }
        };
        let first = activation.queues.first().map_or(0, |queue| queue.index);
        let io = activation.io.get(activation.io.thread_of(first)).clone();
        let running = io
            .attach(Runner::new(handler, activation))
            .map_err(|error| ActivateError::with_source("attach to the I/O thread", error))?;
        let refused = running
            .call(|runner| runner.start_error.take())
            .map_err(|error| ActivateError::with_source("start on the I/O thread", error))?;
        let Some(error) = refused else {
            self.place = Place::Running(running);
            return Ok(());
        };
        if let Ok(runner) = running.detach() {
            let (handler, queues) = runner.take_apart();
            self.place = Place::Refused(handler, queues);
        }
        Err(ActivateError::with_source(
            "start the work on the queues",
            error,
        ))
    }

    /// Takes the handler back from the I/O thread, and gives the queues; to be called by
    /// [`VirtioDevice::deactivate`](crate::VirtioDevice::deactivate).
    pub fn deactivate(&mut self) -> Vec<ActiveQueue> {
        let (handler, queues) = match std::mem::replace(&mut self.place, Place::Gone) {
            Place::Idle(handler) => (handler, Vec::new()),
            Place::Refused(handler, queues) => (handler, queues),
            Place::Running(running) => match running.detach() {
                Ok(mut runner) => {
                    runner.drain();
                    runner.take_apart()
                }
                Err(_) => return Vec::new(),
            },
            Place::Gone => return Vec::new(),
        };
        self.place = Place::Idle(handler);
        queues
    }
}

/// What lives on the I/O thread.
#[derive(Debug)]
struct Runner<H> {
    handler: H,
    memory: Arc<GuestMemory>,
    queues: Vec<ActiveQueue>,
    interrupt: Interrupt,
    features: u64,
    /// The device's span, in which it is activated.
    span: Span,
    start_error: Option<io::Error>,
    failed: bool,
    spare: SpareChains,
}

struct Interrupt(Arc<dyn VirtioInterrupt>);

impl std::fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Interrupt")
    }
}

impl<H: QueueHandler> Runner<H> {
    fn new(handler: H, activation: Activation) -> Self {
        Self {
            handler,
            memory: activation.memory,
            queues: activation.queues,
            interrupt: Interrupt(activation.interrupt),
            features: activation.features,
            span: Span::current(),
            start_error: None,
            failed: false,
            spare: SpareChains::default(),
        }
    }

    fn take_apart(self) -> (H, Vec<ActiveQueue>) {
        (self.handler, self.queues)
    }

    fn register(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        // Each write to the eventfd is told once, so nobody has to read it.
        let kicked = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for queue in &self.queues {
            registrar.add(&*queue.kick, u32::from(queue.index), kicked)?;
        }
        self.handler.start(self.features, registrar)
    }

    /// Lets the handler work on the queue with this index, if the driver enabled it.
    fn run(&mut self, index: u16, registrar: &mut Registrar<'_, '_>) {
        let Some(queue) = self.queues.iter_mut().find(|queue| queue.index == index) else {
            return;
        };
        // Set while the handler runs: one that panics is not called again.
        self.failed = true;
        let before = queue.counters.work();
        let handler = &mut self.handler;
        let (memory, spare) = (&self.memory, &mut self.spare);
        let ended = turn_on(queue, memory, spare, &*self.interrupt.0, |turn| {
            handler.process(turn, registrar)
        });
        registrar.note_work(queue.counters.work().wrapping_sub(before));
        self.failed = ended.is_err();
        match ended {
            // The rest waits until the other queues had their turn.
            Ok(TurnEnd::Yielded) => drop(queue.kick.write(1)),
            Ok(TurnEnd::Drained | TurnEnd::Left) => {}
            Err(error) => {
                registrar.remove_all();
                self.interrupt
                    .0
                    .needs_reset(&format_args!("queue {index}: {}", one_line(&error)));
            }
        }
    }

    /// Lets the handler complete what is in flight; not on the I/O thread any more.
    fn drain(&mut self) {
        if self.failed {
            self.handler.abandon();
            return;
        }
        for queue in &mut self.queues {
            let mut turn = Turn::new(queue, &self.memory, SpareChains::default());
            self.handler.drain(&mut turn);
            turn.take_back();
            if turn.take_added().unwrap_or(false) {
                self.interrupt.0.trigger(InterruptEvent::Queue(queue.index));
            }
        }
    }
}

impl<H: QueueHandler> IoHandler for Runner<H> {
    fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        // An error returned here would drop the handler and the queues.
        let span = self.span.clone();
        self.start_error = span.in_scope(|| self.register(registrar)).err();
        Ok(())
    }

    fn ready(&mut self, event: IoEvent, registrar: &mut Registrar<'_, '_>) {
        if self.failed {
            return;
        }
        match u16::try_from(event.token) {
            Ok(index) => self.run(index, registrar),
            Err(_) => {
                if let Some(index) = self.handler.ready(event) {
                    self.run(index, registrar);
                }
            }
        }
    }
}
