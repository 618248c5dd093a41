//! The thread, and the two ends by which others reach it.

use std::any::Any;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{Builder, JoinHandle, ThreadId};
use std::time::Duration;

use event_manager::{EventManager, RemoteEndpoint, SubscriberId, SubscriberOps};
use kiln_device_api::panic_message;

use crate::CpuList;
use crate::handler::{IoHandler, PanicHook, Subscriber};
use crate::io_loop;
use crate::pace::Pace;

/// The stack of an I/O thread, in bytes: handlers keep their buffers on the heap.
const STACK_SIZE: usize = 256 * 1024;

/// Why something could not be done on an I/O thread.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The thread could not be started.
    #[error("start I/O thread `{name}`")]
    Spawn {
        /// The name that the thread was to have.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// The handler's own `start` failed.
    #[error("start an event handler")]
    Start(#[source] io::Error),
    /// The thread has ended, or the handler is gone.
    #[error("the I/O thread has ended")]
    Ended,
    /// A blocking call was made from the I/O thread to itself, which would wait for ever.
    #[error("a handler called its own I/O thread")]
    OwnThread,
}

impl From<event_manager::Error> for Error {
    fn from(_: event_manager::Error) -> Self {
        // What is left once a thread runs: the channel is closed or the subscriber is gone.
        Self::Ended
    }
}

/// The panic of a handler, as it was reported to the function given to [`IoThread::spawn`].
#[derive(Clone, Debug)]
pub struct HandlerPanic {
    message: String,
}

impl HandlerPanic {
    pub(crate) fn from_payload(payload: &(dyn Any + Send)) -> Self {
        Self {
            message: panic_message(payload),
        }
    }

    /// What the panic said.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for HandlerPanic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an event handler panicked: {}", self.message)
    }
}

/// One thread with one epoll loop. Dropping it ends the loop and joins the thread; handlers still
/// attached are dropped there.
///
/// While its handlers [do very much](crate::Registrar::note_work) its scheduling policy is
/// `SCHED_BATCH`, unless it was started with another than the default one.
pub struct IoThread {
    handle: IoHandle,
    stop: Arc<AtomicBool>,
    join: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts a thread, and does not wait for it: where it can't have epoll or an eventfd, the
    /// first call says so. It has this name, of which the system shows 15 bytes. `on_panic` is
    /// called on it when a handler panics. The thread is in the caller's `tracing` span.
    ///
    /// # Errors
    ///
    /// [`Error::Spawn`] where the thread cannot be had.
    pub fn spawn(
        name: &str,
        on_panic: impl Fn(HandlerPanic) + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        Self::spawn_on(name, None, on_panic)
    }

    /// Starts a thread as [`spawn`](Self::spawn) does, which runs on these CPUs alone if there are
    /// any; where it may not, the first call says so.
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn).
    pub fn spawn_on(
        name: &str,
        cpus: Option<CpuList>,
        on_panic: impl Fn(HandlerPanic) + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let span = tracing::Span::current();
        // The event manager is not `Send`: it is made on its thread and sends its endpoint back.
        let (sender, receiver) = sync_channel(1);
        let join = Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                let _in_span = span.entered();
                let mut manager = match set_up(cpus.as_ref()) {
                    Ok(manager) => manager,
                    Err(error) => {
                        let _ = sender.send(Err(error));
                        return;
                    }
                };
                let _ = sender.send(Ok(manager.remote_endpoint()));
                let mut pace = Pace::of_this_thread();
                while !stopped.load(Ordering::Acquire) {
                    if let Err(error) = manager.run() {
                        tracing::error!("I/O thread ends: epoll: {error}");
                        break;
                    }
                    pace.look();
                }
            })
            .map_err(|source| Error::Spawn {
                name: name.to_owned(),
                source,
            })?;
        Ok(Self {
            handle: IoHandle {
                endpoint: Arc::new(Endpoint {
                    name: name.to_owned(),
                    known: OnceLock::new(),
                    receiver: Some(Mutex::new(receiver)),
                }),
                thread: join.thread().id(),
                on_panic: Arc::new(on_panic),
            },
            stop,
            join: Some(join),
        })
    }

    /// The end by which handlers are attached; it can be cloned and sent.
    pub fn handle(&self) -> &IoHandle {
        &self.handle
    }
}

/// What a thread does before it serves anybody.
fn set_up(cpus: Option<&CpuList>) -> io::Result<EventManager<Subscriber>> {
    if let Some(cpus) = cpus {
        cpus.pin_this_thread().map_err(|error| {
            io::Error::new(error.kind(), format!("run on CPUs {cpus} alone: {error}"))
        })?;
    }
    EventManager::new().map_err(io::Error::other)
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Ok(endpoint) = self.handle.endpoint.get() {
            let _ = endpoint.kick();
        }
        // A handler that drops its own thread cannot wait for it: the loop ends after its turn.
        if let Some(join) = self.join.take()
            && join.thread().id() != std::thread::current().id()
        {
            let _ = join.join();
        }
    }
}

impl fmt::Debug for IoThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoThread").finish_non_exhaustive()
    }
}

/// The end of an [`IoThread`] or an [`IoLoop`](crate::IoLoop) by which handlers are attached to it.
#[derive(Clone)]
pub struct IoHandle {
    endpoint: Arc<Endpoint>,
    thread: ThreadId,
    on_panic: PanicHook,
}

/// The thread's own end of its event manager.
struct Endpoint {
    /// The thread's name, for an error.
    name: String,
    known: OnceLock<Result<RemoteEndpoint<Subscriber>, io::Error>>,
    /// Where the thread sends it; nothing where it is an [`IoLoop`](crate::IoLoop).
    receiver: Option<Mutex<Receiver<io::Result<RemoteEndpoint<Subscriber>>>>>,
}

impl Endpoint {
    /// Waits for it, the first time.
    fn get(&self) -> Result<&RemoteEndpoint<Subscriber>, Error> {
        let known = self.known.get_or_init(|| {
            let ended = || Err(io::Error::other("the thread has ended"));
            let Some(receiver) = &self.receiver else {
                return ended();
            };
            let receiver = receiver.lock().unwrap_or_else(PoisonError::into_inner);
            receiver.recv().unwrap_or_else(|_| ended())
        });
        known.as_ref().map_err(|error| Error::Spawn {
            name: self.name.clone(),
            source: io::Error::new(error.kind(), error.to_string()),
        })
    }
}

impl IoHandle {
    /// An end of a loop that this thread turns itself.
    pub(crate) fn own_loop(
        name: String,
        endpoint: RemoteEndpoint<Subscriber>,
        on_panic: impl Fn(HandlerPanic) + Send + Sync + 'static,
    ) -> Self {
        Self {
            endpoint: Arc::new(Endpoint {
                name,
                known: OnceLock::from(Ok(endpoint)),
                receiver: None,
            }),
            thread: std::thread::current().id(),
            on_panic: Arc::new(on_panic),
        }
    }

    /// The same end, whose handlers' panics are told to `on_panic`.
    #[must_use]
    pub fn telling(&self, on_panic: impl Fn(HandlerPanic) + Send + Sync + 'static) -> Self {
        Self {
            on_panic: Arc::new(on_panic),
            ..self.clone()
        }
    }

    /// Moves `handler` onto the thread and waits until it has started there.
    ///
    /// # Errors
    ///
    /// [`Error::Start`] where the handler refused; [`Error::Ended`] where the thread has ended;
    /// [`Error::OwnThread`] when a handler on that thread calls it.
    pub fn attach<H: IoHandler>(&self, handler: H) -> Result<Attached<H>, Error> {
        let subscriber = Subscriber::new(Box::new(handler), Arc::clone(&self.on_panic));
        let id = self.call(move |ops| {
            let id = ops.add_subscriber(subscriber);
            match ops.subscriber_mut(id)?.start_error.take() {
                None => Ok(id),
                Some(error) => {
                    ops.remove_subscriber(id)?;
                    Err(Error::Start(error))
                }
            }
        })?;
        Ok(Attached {
            handle: self.clone(),
            id: Some(id),
            handler: PhantomData,
        })
    }

    /// Waits until the thread can be called.
    ///
    /// # Errors
    ///
    /// [`Error::Spawn`] where it can't have what it needs, and has ended.
    pub fn wait_started(&self) -> Result<(), Error> {
        self.endpoint.get().map(|_| ())
    }

    /// Whether this is called by a handler on this end's thread: such a call must not wait for
    /// what the thread does.
    pub fn is_current(&self) -> bool {
        self.is_of_this_thread() && (!self.is_own_loop() || io_loop::is_turning())
    }

    /// Whether this thread is the one that turns the loop, and no handler of it: then nothing
    /// happens there that this thread waits for, but in a [turn](Self::turn).
    pub fn is_to_be_turned(&self) -> bool {
        self.is_own_loop() && self.is_of_this_thread() && !io_loop::is_turning()
    }

    /// Turns the loop of this thread, as [`IoLoop::turn`](crate::IoLoop::turn) does.
    ///
    /// # Errors
    ///
    /// As there; [`io::ErrorKind::Unsupported`] where the loop is not this thread's.
    pub fn turn(&self, timeout: Option<Duration>) -> io::Result<usize> {
        if !(self.is_own_loop() && self.is_of_this_thread()) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        io_loop::turn(timeout)
    }

    /// Ends the thread's wait for events, if it waits.
    pub fn wake(&self) {
        if let Ok(endpoint) = self.endpoint.get() {
            // It fails where there is a wake-up already.
            let _ = endpoint.kick();
        }
    }

    fn is_own_loop(&self) -> bool {
        self.endpoint.receiver.is_none()
    }

    fn is_of_this_thread(&self) -> bool {
        std::thread::current().id() == self.thread
    }

    pub(crate) fn call<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut dyn SubscriberOps<Subscriber = Subscriber>) -> Result<R, Error>
        + Send
        + 'static,
    ) -> Result<R, Error> {
        if self.is_of_this_thread() {
            if self.is_own_loop() {
                return io_loop::call(f);
            }
            return Err(Error::OwnThread);
        }
        // A panic of `f` is its caller's error; the thread serves others too.
        self.endpoint.get()?.call_blocking(move |ops| {
            catch_unwind(AssertUnwindSafe(|| f(ops))).unwrap_or(Err(Error::Ended))
        })
    }
}

/// Whether both are ends of the same thread.
impl PartialEq for IoHandle {
    fn eq(&self, other: &Self) -> bool {
        self.thread == other.thread
    }
}

impl Eq for IoHandle {}

impl fmt::Debug for IoHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoHandle").finish_non_exhaustive()
    }
}

/// A handler that runs on an I/O thread. Dropping this detaches the handler and drops it.
pub struct Attached<H> {
    handle: IoHandle,
    id: Option<SubscriberId>,
    handler: PhantomData<fn(H) -> H>,
}

impl<H: IoHandler> Attached<H> {
    /// Runs `f` on the handler, on its thread between two events, and waits for the answer.
    ///
    /// # Errors
    ///
    /// [`Error::Ended`] where the thread has ended or `f` panicked; [`Error::OwnThread`] when
    /// called on that thread.
    pub fn call<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut H) -> R + Send + 'static,
    ) -> Result<R, Error> {
        let id = self.id.ok_or(Error::Ended)?;
        self.handle.call(move |ops| {
            let handler = ops.subscriber_mut(id)?.handler.as_any();
            let handler = handler.downcast_mut::<H>().ok_or(Error::Ended)?;
            Ok(f(handler))
        })
    }

    /// Takes the handler off the thread, after the event it may be busy with, and gives it back.
    /// Its file descriptors are no longer waited for.
    ///
    /// # Errors
    ///
    /// [`Error::Ended`] where the thread has ended (the handler was dropped with it);
    /// [`Error::OwnThread`] when called on that thread.
    pub fn detach(mut self) -> Result<H, Error> {
        let handler = take(&self.handle, self.id.take())?.into_any();
        handler
            .downcast::<H>()
            .map(|h| *h)
            .map_err(|_| Error::Ended)
    }
}

fn take(
    handle: &IoHandle,
    id: Option<SubscriberId>,
) -> Result<Box<dyn crate::handler::AnyHandler>, Error> {
    let id = id.ok_or(Error::Ended)?;
    handle.call(move |ops| Ok(ops.remove_subscriber(id)?.handler))
}

impl<H> Drop for Attached<H> {
    fn drop(&mut self) {
        if self.id.is_some() {
            let _ = take(&self.handle, self.id.take());
        }
    }
}

impl<H> fmt::Debug for Attached<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EventSet, IoEvent, Registrar};
    use std::sync::mpsc::{Sender, channel};
    use vmm_sys_util::eventfd::EventFd;

    const LONG: Duration = Duration::from_secs(20);

    struct Echo {
        wake: EventFd,
        seen: Sender<u64>,
        panic_at: u64,
    }

    impl IoHandler for Echo {
        fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
            registrar.add(&self.wake, 7, EventSet::IN)
        }
        fn ready(&mut self, event: IoEvent, _registrar: &mut Registrar<'_, '_>) {
            assert_eq!(event.token, 7);
            let value = self.wake.read().unwrap();
            assert!(value != self.panic_at, "value {value}");
            self.seen.send(value).unwrap();
        }
    }

    fn echo(panic_at: u64) -> (Echo, EventFd, Receiver<u64>) {
        let wake = EventFd::new(0).unwrap();
        let (seen, receive) = channel();
        let handler = Echo {
            wake: wake.try_clone().unwrap(),
            seen,
            panic_at,
        };
        (handler, wake, receive)
    }

    #[test]
    fn a_detached_handler_is_given_back_and_not_called_again() {
        let thread = IoThread::spawn("test", |_| ()).unwrap();
        let (handler, wake, receive) = echo(0);
        let attached = thread.handle().attach(handler).unwrap();
        wake.write(2).unwrap();
        assert_eq!(receive.recv_timeout(LONG).unwrap(), 2);
        assert_eq!(attached.call(|h| h.panic_at).unwrap(), 0);
        let handler = attached.detach().unwrap();
        wake.write(5).unwrap();
        assert!(receive.recv_timeout(Duration::from_millis(50)).is_err());
        // It can be attached again and then sees what came in between.
        let _attached = thread.handle().attach(handler).unwrap();
        assert_eq!(receive.recv_timeout(LONG).unwrap(), 5);
    }

    #[test]
    fn a_panicking_handler_is_reported_and_the_others_go_on() {
        let (report, reports) = channel();
        let thread = IoThread::spawn("test", move |panic| {
            report.send(panic.message().to_owned()).unwrap();
        })
        .unwrap();
        let (bad, bad_wake, _bad_receive) = echo(1);
        let (good, good_wake, receive) = echo(0);
        let _bad = thread.handle().attach(bad).unwrap();
        let _good = thread.handle().attach(good).unwrap();
        bad_wake.write(1).unwrap();
        assert_eq!(reports.recv_timeout(LONG).unwrap(), "value 1");
        bad_wake.write(1).unwrap();
        good_wake.write(3).unwrap();
        assert_eq!(receive.recv_timeout(LONG).unwrap(), 3);
        assert!(reports.try_recv().is_err());
    }

    #[test]
    fn a_handler_that_cannot_start_is_refused() {
        struct File(std::fs::File);
        impl IoHandler for File {
            fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
                registrar.add(&self.0, 0, EventSet::IN)
            }
            fn ready(&mut self, _: IoEvent, _: &mut Registrar<'_, '_>) {}
        }
        let thread = IoThread::spawn("test", |_| ()).unwrap();
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        // A regular file has no readiness: epoll refuses it, and we see its own words.
        match thread.handle().attach(File(file)) {
            Err(Error::Start(error)) => assert_eq!(error.raw_os_error(), Some(1)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_ended_thread_answers_with_an_error() {
        let thread = IoThread::spawn("test", |_| ()).unwrap();
        let handle = thread.handle().clone();
        let (handler, _wake, _receive) = echo(0);
        let attached = handle.attach(handler).unwrap();
        drop(thread);
        assert!(matches!(attached.call(|_| ()), Err(Error::Ended)));
        assert!(matches!(attached.detach(), Err(Error::Ended)));
        let (handler, _wake, _receive) = echo(0);
        assert!(matches!(handle.attach(handler), Err(Error::Ended)));
    }

    #[test]
    fn a_thread_runs_on_its_cpus_alone_or_says_why_not() {
        let online = CpuList::online().unwrap();
        let known = rustix::thread::sched_getaffinity(None).unwrap();
        let usable = online.iter().find(|cpu| known.is_set(*cpu as usize));
        let one: CpuList = usable.unwrap().to_string().parse().unwrap();
        let thread = IoThread::spawn_on("test", Some(one.clone()), |_| ()).unwrap();
        thread.handle().wait_started().unwrap();
        let (handler, _wake, _receive) = echo(0);
        let attached = thread.handle().attach(handler).unwrap();
        let cpus = attached.call(|_| rustix::thread::sched_getaffinity(None));
        let cpus = cpus.unwrap().unwrap();
        assert_eq!(cpus.count(), 1);
        assert!(cpus.is_set(one.iter().next().unwrap() as usize));

        // A CPU that is surely not there.
        let none: CpuList = "1023".parse().unwrap();
        if none.without(&online).is_some() {
            let thread = IoThread::spawn_on("test", Some(none), |_| ()).unwrap();
            let error = thread.handle().wait_started().unwrap_err();
            let Error::Spawn { name, source } = error else {
                panic!("{error}");
            };
            assert_eq!(name, "test");
            let text = source.to_string();
            assert!(text.contains("run on CPUs 1023 alone"), "{text}");
        }
    }

    #[test]
    fn a_call_to_the_own_thread_is_refused() {
        struct Nested {
            wake: EventFd,
            handle: IoHandle,
            seen: Sender<bool>,
        }
        impl IoHandler for Nested {
            fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
                registrar.add(&self.wake, 0, EventSet::IN)
            }
            fn ready(&mut self, _: IoEvent, _: &mut Registrar<'_, '_>) {
                let _ = self.wake.read();
                let (handler, _wake, _receive) = echo(0);
                let refused = matches!(self.handle.attach(handler), Err(Error::OwnThread));
                self.seen.send(refused).unwrap();
            }
        }
        let thread = IoThread::spawn("test", |_| ()).unwrap();
        let wake = EventFd::new(0).unwrap();
        wake.write(1).unwrap();
        let (seen, receive) = channel();
        let handle = thread.handle().clone();
        let _attached = thread
            .handle()
            .attach(Nested { wake, handle, seen })
            .unwrap();
        assert!(receive.recv_timeout(LONG).unwrap());
    }
}
