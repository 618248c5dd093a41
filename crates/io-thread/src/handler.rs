//! What a handler implements and what it is given.

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use crate::{HandlerPanic, pace};

/// Something that waits for file descriptors and runs when they are ready.
pub trait IoHandler: Send + 'static {
    /// Names the file descriptors to wait for; called once on the thread, before any
    /// [`ready`](Self::ready).
    ///
    /// # Errors
    ///
    /// An error undoes the attachment and reaches the caller of
    /// [`IoHandle::attach`](crate::IoHandle::attach).
    fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()>;

    /// One of the file descriptors is ready. Readiness is level-triggered, unless the descriptor was
    /// added with `EventSet::EDGE_TRIGGERED`: a handler that leaves a descriptor ready is called
    /// again at once.
    fn ready(&mut self, event: IoEvent, registrar: &mut Registrar<'_, '_>);
}

/// The readiness of one file descriptor.
#[derive(Clone, Copy, Debug)]
pub struct IoEvent {
    /// The token that the descriptor was added with.
    pub token: u32,
    /// What it is ready for.
    pub set: EventSet,
}

/// Adds, changes and removes the file descriptors that a handler waits for.
///
/// A descriptor must be removed before it is closed, unless the handler is being detached: that
/// removes all of them.
pub struct Registrar<'a, 'b> {
    ops: &'a mut EventOps<'b>,
    fds: &'a mut Vec<RawFd>,
}

impl Registrar<'_, '_> {
    /// Waits for `set` on `fd`, reported with `token`.
    ///
    /// # Errors
    ///
    /// What epoll says: `EPERM` for a descriptor that has no readiness (a regular file),
    /// `EEXIST` for one that is already waited for.
    pub fn add(&mut self, fd: &impl AsRawFd, token: u32, set: EventSet) -> io::Result<()> {
        self.ops
            .add(Events::with_data(fd, token, set))
            .map_err(to_io)?;
        self.fds.push(fd.as_raw_fd());
        Ok(())
    }

    /// Changes what is waited for on `fd`.
    ///
    /// # Errors
    ///
    /// `ENOENT` where the descriptor was not added.
    pub fn modify(&mut self, fd: &impl AsRawFd, token: u32, set: EventSet) -> io::Result<()> {
        self.ops
            .modify(Events::with_data(fd, token, set))
            .map_err(to_io)
    }

    /// Stops waiting for `fd`.
    ///
    /// # Errors
    ///
    /// `ENOENT` where the descriptor was not added.
    pub fn remove(&mut self, fd: &impl AsRawFd) -> io::Result<()> {
        self.fds.retain(|known| *known != fd.as_raw_fd());
        self.ops.remove(Events::empty(fd)).map_err(to_io)
    }

    /// Says how much was done, in requests of some KiB or fewer: a thread that does very many a second
    /// is not in a hurry, and lets others finish when it is woken.
    pub fn note_work(&mut self, count: u64) {
        pace::note_work(count);
    }

    /// Stops waiting for every file descriptor of this handler.
    pub fn remove_all(&mut self) {
        for fd in self.fds.drain(..) {
            let _ = self.ops.remove(Events::empty_raw(fd));
        }
    }
}

fn to_io(error: event_manager::Error) -> io::Error {
    match error {
        event_manager::Error::Epoll(errno) => io::Error::from_raw_os_error(errno.errno()),
        event_manager::Error::FdAlreadyRegistered => {
            io::Error::new(io::ErrorKind::AlreadyExists, error)
        }
        other => io::Error::other(other),
    }
}

/// An [`IoHandler`] whose type the loop does not know.
pub(crate) trait AnyHandler: Send {
    fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()>;
    fn ready(&mut self, event: IoEvent, registrar: &mut Registrar<'_, '_>);
    fn as_any(&mut self) -> &mut dyn Any;
    fn into_any(self: Box<Self>) -> Box<dyn Any + Send>;
}

impl<H: IoHandler> AnyHandler for H {
    fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        IoHandler::start(self, registrar)
    }
    fn ready(&mut self, event: IoEvent, registrar: &mut Registrar<'_, '_>) {
        IoHandler::ready(self, event, registrar);
    }
    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

pub(crate) type PanicHook = Arc<dyn Fn(HandlerPanic) + Send + Sync>;

/// What the event manager holds: a handler, and the care that a panic of it stays with it.
pub(crate) struct Subscriber {
    pub(crate) handler: Box<dyn AnyHandler>,
    pub(crate) start_error: Option<io::Error>,
    panicked: bool,
    fds: Vec<RawFd>,
    on_panic: PanicHook,
}

impl Subscriber {
    pub(crate) fn new(handler: Box<dyn AnyHandler>, on_panic: PanicHook) -> Self {
        Self {
            handler,
            start_error: None,
            panicked: false,
            fds: Vec::new(),
            on_panic,
        }
    }

    /// Runs `f` on the handler; after a panic the handler is left alone for good.
    fn guarded<R>(
        &mut self,
        ops: &mut EventOps<'_>,
        f: impl FnOnce(&mut dyn AnyHandler, &mut Registrar<'_, '_>) -> R,
    ) -> Option<R> {
        if self.panicked {
            return None;
        }
        let mut registrar = Registrar {
            ops,
            fds: &mut self.fds,
        };
        let handler = &mut *self.handler;
        // The handler is never entered again after a panic, so no broken state of it is seen.
        let result = catch_unwind(AssertUnwindSafe(|| f(handler, &mut registrar)));
        match result {
            Ok(value) => Some(value),
            Err(payload) => {
                registrar.remove_all();
                self.panicked = true;
                (self.on_panic)(HandlerPanic::from_payload(payload.as_ref()));
                None
            }
        }
    }
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let started = self.guarded(ops, |handler, registrar| handler.start(registrar));
        self.start_error = match started {
            Some(result) => result.err(),
            None => Some(io::Error::other("the handler panicked in `start`")),
        };
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let event = IoEvent {
            token: events.data(),
            set: events.event_set(),
        };
        self.guarded(ops, |handler, registrar| handler.ready(event, registrar));
    }
}
