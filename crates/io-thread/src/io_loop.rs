//! A loop on a thread that the program has already.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use event_manager::{EventManager, RemoteEndpoint, SubscriberOps};

use crate::handler::Subscriber;
use crate::pace::Pace;
use crate::thread::{Error, HandlerPanic, IoHandle};

thread_local! {
    /// The loop of this thread, while there is an [`IoLoop`].
    static OWN: RefCell<Option<Own>> = const { RefCell::new(None) };
}

struct Own {
    manager: EventManager<Subscriber>,
    pace: Pace,
}

/// The name of such a loop in messages.
const NAME: &str = "the program's own";

/// An epoll loop on the thread that makes it, where handlers run in [`turn`](Self::turn) only: it
/// saves a thread where one would do nothing but wait for another. A thread can have one at a time.
///
/// As an [`IoThread`](crate::IoThread), the thread has the policy `SCHED_BATCH` while there is much to
/// do. What other threads ask of its handlers is answered in a turn as well: they wait as long as this
/// thread does not turn. What this thread asks is answered at once.
///
/// ```
/// use std::time::Duration;
///
/// use kiln_io_thread::{EventSet, IoEvent, IoHandler, IoLoop, Registrar};
/// use vmm_sys_util::eventfd::EventFd;
///
/// struct Counter(EventFd, u64);
///
/// impl IoHandler for Counter {
///     fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> std::io::Result<()> {
///         registrar.add(&self.0, 0, EventSet::IN)
///     }
///     fn ready(&mut self, _event: IoEvent, _registrar: &mut Registrar<'_, '_>) {
///         self.1 += self.0.read().unwrap_or(0);
///     }
/// }
///
/// let own = IoLoop::new(|panic| eprintln!("{panic}"))?;
/// let wake = EventFd::new(0)?;
/// let attached = own.handle().attach(Counter(wake.try_clone()?, 0))?;
/// wake.write(3)?;
/// assert_eq!(attached.call(|counter| counter.1)?, 0);
/// assert_eq!(own.turn(Some(Duration::ZERO))?, 1);
/// assert_eq!(attached.call(|counter| counter.1)?, 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct IoLoop {
    handle: IoHandle,
    /// It belongs to its thread.
    not_send: PhantomData<*const ()>,
}

impl IoLoop {
    /// A loop for this thread. `on_panic` is called when a handler panics.
    ///
    /// # Errors
    ///
    /// [`Error::Spawn`] where the system gives no epoll or eventfd, or the thread has a loop
    /// already.
    pub fn new(on_panic: impl Fn(HandlerPanic) + Send + Sync + 'static) -> Result<Self, Error> {
        let endpoint = make().map_err(|source| Error::Spawn {
            name: NAME.to_owned(),
            source,
        })?;
        Ok(Self {
            handle: IoHandle::own_loop(NAME.to_owned(), endpoint, on_panic),
            not_send: PhantomData,
        })
    }

    /// The end by which handlers are attached; it can be cloned and sent.
    pub fn handle(&self) -> &IoHandle {
        &self.handle
    }

    /// Waits until something is ready, for at most `timeout` if there is one (rounded up to a
    /// millisecond), and runs the handlers for it. Says how many events there were: none where the
    /// time is over or a signal came.
    ///
    /// # Errors
    ///
    /// What epoll says; [`io::ErrorKind::WouldBlock`] where a handler calls it.
    pub fn turn(&self, timeout: Option<Duration>) -> io::Result<usize> {
        turn(timeout)
    }
}

impl Drop for IoLoop {
    fn drop(&mut self) {
        // The handlers are dropped when the loop is no longer borrowed.
        let own = OWN.try_with(|own| own.try_borrow_mut().ok()?.take());
        drop(own);
    }
}

impl fmt::Debug for IoLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoLoop").finish_non_exhaustive()
    }
}

fn make() -> io::Result<RemoteEndpoint<Subscriber>> {
    OWN.with_borrow_mut(|own| {
        if own.is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let made = Own {
            manager: EventManager::new().map_err(io::Error::other)?,
            pace: Pace::of_this_thread(),
        };
        Ok(own.insert(made).manager.remote_endpoint())
    })
}

/// One turn of this thread's loop.
pub(crate) fn turn(timeout: Option<Duration>) -> io::Result<usize> {
    let milliseconds = timeout.map_or(-1, |timeout| {
        i32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
    });
    OWN.with(|own| {
        let mut own = own
            .try_borrow_mut()
            .map_err(|_| io::ErrorKind::WouldBlock)?;
        let own = own.as_mut().ok_or(io::ErrorKind::NotFound)?;
        let turned = own.manager.run_with_timeout(milliseconds);
        own.pace.look();
        turned.map_err(io::Error::other)
    })
}

/// Whether a handler is at work on this thread's loop.
pub(crate) fn is_turning() -> bool {
    OWN.try_with(|own| own.try_borrow().is_err())
        .unwrap_or(false)
}

/// Does what an [`IoHandle`] does on another thread, where this thread has the loop itself.
pub(crate) fn call<R>(
    f: impl FnOnce(&mut dyn SubscriberOps<Subscriber = Subscriber>) -> Result<R, Error>,
) -> Result<R, Error> {
    // What is dropped at the thread's own end finds no loop any more.
    OWN.try_with(|own| {
        // Borrowed: a handler calls.
        let mut own = own.try_borrow_mut().map_err(|_| Error::OwnThread)?;
        let manager = &mut own.as_mut().ok_or(Error::Ended)?.manager;
        catch_unwind(AssertUnwindSafe(|| f(manager))).unwrap_or(Err(Error::Ended))
    })
    .unwrap_or(Err(Error::Ended))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::{EventSet, IoEvent, IoHandler, IoThread, Registrar};
    use vmm_sys_util::eventfd::EventFd;

    const NO_WAIT: Option<Duration> = Some(Duration::ZERO);

    /// Calls its own loop when it is ready, and finds out whether it is on its thread.
    struct Nested(EventFd, IoHandle, Option<Error>, bool);

    impl Nested {
        fn new(wake: &EventFd, own: &IoLoop) -> Self {
            Self(wake.try_clone().unwrap(), own.handle().clone(), None, false)
        }
    }

    impl IoHandler for Nested {
        fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
            registrar.add(&self.0, 0, EventSet::IN)
        }
        fn ready(&mut self, _: IoEvent, _: &mut Registrar<'_, '_>) {
            let _ = self.0.read();
            self.2 = self.1.call(|_| Ok(())).err();
            self.3 = self.1.is_current() && !self.1.is_to_be_turned();
        }
    }

    #[test]
    fn a_handler_runs_only_in_a_turn_and_cannot_call_its_own_loop() {
        let own = IoLoop::new(|panic| panic!("{panic}")).unwrap();
        let wake = EventFd::new(0).unwrap();
        let attached = own.handle().attach(Nested::new(&wake, &own)).unwrap();
        assert_eq!(own.turn(NO_WAIT).unwrap(), 0);
        wake.write(1).unwrap();
        assert!(attached.call(|handler| handler.2.is_none()).unwrap());
        assert!(!own.handle().is_current() && own.handle().is_to_be_turned());
        assert_eq!(own.turn(NO_WAIT).unwrap(), 1);
        let handler = attached.detach().unwrap();
        assert!(matches!(handler.2, Some(Error::OwnThread)) && handler.3);
        // It is ours again, and the loop does not know it.
        wake.write(1).unwrap();
        assert_eq!(own.turn(NO_WAIT).unwrap(), 0);
    }

    #[test]
    fn a_thread_has_one_loop_at_a_time_and_what_is_attached_goes_with_it() {
        let own = IoLoop::new(|_| ()).unwrap();
        assert!(matches!(IoLoop::new(|_| ()), Err(Error::Spawn { .. })));
        let wake = EventFd::new(0).unwrap();
        let attached = own.handle().attach(Nested::new(&wake, &own)).unwrap();
        let ended = own.handle().clone();
        drop(own);
        assert!(matches!(attached.detach(), Err(Error::Ended)));
        // Nor does another thread wait for it.
        let elsewhere = thread::spawn(move || ended.call(|_| Ok(())));
        assert!(matches!(elsewhere.join().unwrap(), Err(Error::Ended)));
        let own = IoLoop::new(|_| ()).unwrap();
        assert_eq!(own.turn(NO_WAIT).unwrap(), 0);
        // And it is nobody else's.
        let thread = IoThread::spawn("test", |_| ()).unwrap();
        assert_ne!(own.handle(), thread.handle());
        assert!(!thread.handle().is_to_be_turned());
        assert!(thread.handle().turn(NO_WAIT).is_err());
    }

    #[test]
    fn other_threads_are_answered_in_a_turn() {
        let own = IoLoop::new(|panic| panic!("{panic}")).unwrap();
        let wake = EventFd::new(0).unwrap();
        let handler = Nested::new(&wake, &own);
        let handle = own.handle().clone();
        let other = thread::spawn(move || {
            assert!(!handle.is_current() && !handle.is_to_be_turned());
            let attached = handle.attach(handler).unwrap();
            wake.write(1).unwrap();
            while attached.call(|handler| handler.2.is_none()).unwrap() {}
            attached.detach().unwrap().3
        });
        while !other.is_finished() {
            own.turn(Some(Duration::from_millis(10))).unwrap();
        }
        assert!(other.join().unwrap());
    }

    #[test]
    fn a_turn_ends_when_it_is_woken() {
        let own = IoLoop::new(|panic| panic!("{panic}")).unwrap();
        let handle = own.handle().clone();
        let waker = thread::spawn(move || handle.wake());
        assert_eq!(own.turn(None).unwrap(), 1);
        waker.join().unwrap();
        assert_eq!(own.turn(NO_WAIT).unwrap(), 0);
    }

    #[test]
    fn a_panic_of_a_handler_is_told_to_whom_the_handle_names() {
        struct Panics(EventFd);
        impl IoHandler for Panics {
            fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
                registrar.add(&self.0, 0, EventSet::IN)
            }
            fn ready(&mut self, _: IoEvent, _: &mut Registrar<'_, '_>) {
                panic!("on purpose");
            }
        }
        let own = IoLoop::new(|panic| unreachable!("{panic}")).unwrap();
        let (sender, told) = std::sync::mpsc::channel();
        let handle = own.handle().telling(move |panic| {
            sender.send(panic.message().to_owned()).unwrap();
        });
        assert_eq!(&handle, own.handle());
        let wake = EventFd::new(0).unwrap();
        wake.write(1).unwrap();
        let _attached = handle.attach(Panics(wake)).unwrap();
        own.turn(None).unwrap();
        assert_eq!(told.try_recv().unwrap(), "on purpose");
        // The loop goes on.
        assert_eq!(own.turn(NO_WAIT).unwrap(), 0);
    }
}
