//! A loop without a thread of its own, for tests that want every event when they ask for it.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};

use event_manager::{EventManager, SubscriberOps};

use crate::handler::Subscriber;
use crate::thread::{Error, HandlerPanic, IoHandle};

thread_local! {
    /// The loop of this thread, while there is a [`LocalLoop`].
    static MANAGER: RefCell<Option<EventManager<Subscriber>>> = const { RefCell::new(None) };
}

/// An epoll loop on the thread that makes it, where handlers run in [`turn`](Self::turn) only: what
/// they do is the same in every run. A thread can have one at a time.
///
/// For tests: a handler that is waited for, and not turned, is waited for in vain.
///
/// ```
/// use kiln_io_thread::{EventSet, IoEvent, IoHandler, LocalLoop, Registrar};
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
/// let local = LocalLoop::new(|panic| eprintln!("{panic}"))?;
/// let wake = EventFd::new(0)?;
/// let attached = local.handle().attach(Counter(wake.try_clone()?, 0))?;
/// wake.write(3)?;
/// assert_eq!(attached.call(|counter| counter.1)?, 0);
/// assert_eq!(local.turn()?, 1);
/// assert_eq!(attached.call(|counter| counter.1)?, 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct LocalLoop {
    handle: IoHandle,
    /// It belongs to its thread.
    not_send: PhantomData<*const ()>,
}

impl LocalLoop {
    /// A loop for this thread. `on_panic` is called when a handler panics.
    ///
    /// # Errors
    ///
    /// [`Error::Spawn`] where the system gives no epoll or eventfd, or the thread has a loop
    /// already.
    pub fn new(on_panic: impl Fn(HandlerPanic) + Send + Sync + 'static) -> Result<Self, Error> {
        let name = "local".to_owned();
        let made = MANAGER.with_borrow_mut(|manager| {
            if manager.is_some() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            *manager = Some(EventManager::new().map_err(io::Error::other)?);
            Ok(())
        });
        made.map_err(|source| Error::Spawn {
            name: name.clone(),
            source,
        })?;
        Ok(Self {
            handle: IoHandle::local(name, on_panic),
            not_send: PhantomData,
        })
    }

    /// The end by which handlers are attached. It is of use on this thread only.
    pub fn handle(&self) -> &IoHandle {
        &self.handle
    }

    /// Runs the handlers for what is ready now, and does not wait. Says how many events there were.
    ///
    /// # Errors
    ///
    /// What epoll says; [`io::ErrorKind::WouldBlock`] where a handler calls it.
    pub fn turn(&self) -> io::Result<usize> {
        MANAGER.with(|manager| {
            let mut manager = manager
                .try_borrow_mut()
                .map_err(|_| io::ErrorKind::WouldBlock)?;
            match &mut *manager {
                Some(manager) => manager.run_with_timeout(0).map_err(io::Error::other),
                None => Ok(0),
            }
        })
    }
}

impl Drop for LocalLoop {
    fn drop(&mut self) {
        // The handlers are dropped when the loop is no longer borrowed.
        let manager = MANAGER.try_with(|manager| manager.try_borrow_mut().ok()?.take());
        drop(manager);
    }
}

impl fmt::Debug for LocalLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalLoop").finish_non_exhaustive()
    }
}

/// Does what an [`IoHandle`] does on another thread, where this thread has the loop itself.
pub(crate) fn call<R>(
    f: impl FnOnce(&mut dyn SubscriberOps<Subscriber = Subscriber>) -> Result<R, Error>,
) -> Result<R, Error> {
    MANAGER.with(|manager| {
        // Borrowed: a handler calls.
        let mut manager = manager.try_borrow_mut().map_err(|_| Error::OwnThread)?;
        let manager = manager.as_mut().ok_or(Error::OwnThread)?;
        catch_unwind(AssertUnwindSafe(|| f(manager))).unwrap_or(Err(Error::Ended))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EventSet, IoEvent, IoHandler, IoThread, Registrar};
    use vmm_sys_util::eventfd::EventFd;

    /// Calls its own loop when it is ready.
    struct Nested(EventFd, IoHandle, Option<Error>);

    impl IoHandler for Nested {
        fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
            registrar.add(&self.0, 0, EventSet::IN)
        }
        fn ready(&mut self, _: IoEvent, _: &mut Registrar<'_, '_>) {
            let _ = self.0.read();
            self.2 = self.1.call(|_| Ok(())).err();
        }
    }

    #[test]
    fn a_handler_runs_only_in_a_turn_and_cannot_call_its_own_loop() {
        let local = LocalLoop::new(|panic| panic!("{panic}")).unwrap();
        let wake = EventFd::new(0).unwrap();
        let handler = Nested(wake.try_clone().unwrap(), local.handle().clone(), None);
        let attached = local.handle().attach(handler).unwrap();
        assert_eq!(local.turn().unwrap(), 0);
        wake.write(1).unwrap();
        assert!(attached.call(|handler| handler.2.is_none()).unwrap());
        assert_eq!(local.turn().unwrap(), 1);
        let handler = attached.detach().unwrap();
        assert!(matches!(handler.2, Some(Error::OwnThread)));
        // It is ours again, and the loop does not know it.
        wake.write(1).unwrap();
        assert_eq!(local.turn().unwrap(), 0);
    }

    #[test]
    fn a_thread_has_one_loop_at_a_time_and_what_is_attached_goes_with_it() {
        let local = LocalLoop::new(|_| ()).unwrap();
        assert!(matches!(LocalLoop::new(|_| ()), Err(Error::Spawn { .. })));
        let wake = EventFd::new(0).unwrap();
        let handler = Nested(wake.try_clone().unwrap(), local.handle().clone(), None);
        let attached = local.handle().attach(handler).unwrap();
        drop(local);
        assert!(attached.detach().is_err());
        let local = LocalLoop::new(|_| ()).unwrap();
        assert_eq!(local.turn().unwrap(), 0);
        // And it is nobody else's.
        let handle = local.handle().clone();
        let thread = IoThread::spawn("test", |_| ()).unwrap();
        assert_ne!(&handle, thread.handle());
        let elsewhere = std::thread::spawn(move || handle.call(|_| Ok(())).is_err());
        assert!(elsewhere.join().unwrap());
    }
}
