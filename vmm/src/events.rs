//! What happens to a machine, as a stream of values.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::VmExit;

#[cfg(feature = "futures")]
mod futures;
#[cfg(test)]
mod tests;

/// How many events wait for a subscriber that does not take them; older ones give way then.
const CAPACITY: usize = 256;

/// Something that happened to a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmEvent {
    /// The guest was started.
    Started,
    /// The guest was paused: no vCPU runs and no device works on a queue.
    Paused,
    /// A paused guest goes on.
    Resumed,
    /// The guest's kernel said that it panicked. The machine's end follows.
    GuestPanic,
    /// A device failed, or gave up on its driver: virtio's `DEVICE_NEEDS_RESET`. The second is
    /// reported once a device, as a guest can bring it about as often as it likes.
    DeviceError {
        /// The device, by the name that messages give it.
        device: String,
        /// What went wrong.
        reason: String,
    },
    /// The machine has ended, its devices are at rest and its serial output is written:
    /// [`VmHandle::wait`](crate::VmHandle::wait) returns at once. It is the last event.
    Ended(VmExit),
    /// This many events were not taken in time, and gave way to those that follow.
    Missed(u64),
}

impl fmt::Display for VmEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Started => f.write_str("the guest was started"),
            Self::Paused => f.write_str("the guest was paused"),
            Self::Resumed => f.write_str("the guest was resumed"),
            Self::GuestPanic => f.write_str("the guest's kernel panicked"),
            Self::DeviceError { device, reason } => write!(f, "{device}: {reason}"),
            Self::Ended(exit) => exit.fmt(f),
            Self::Missed(count) => write!(f, "{count} events were missed"),
        }
    }
}

/// The events of a machine from [`VmHandle::events`](crate::VmHandle::events) or
/// [`Vm::events`](crate::Vm::events) on.
///
/// It can be used in three ways:
///
/// - from a thread: [`recv`](Self::recv) waits for the next event, and so does its [`Iterator`];
/// - from an epoll loop: its [file descriptor](AsFd) is readable while [`try_recv`](Self::try_recv)
///   has an event to give, or the stream is over;
/// - from async code, with the feature `futures`: it is a `Stream` for any executor.
///
/// The stream ends after [`VmEvent::Ended`], or where a machine that was not started is dropped.
/// Up to 256 events wait to be taken; then the oldest give way to new ones, and
/// [`VmEvent::Missed`] says how many did.
///
/// ```
/// use kiln_vmm::{Kernel, MemorySize, VmBuilder, VmEvent, VmExit};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # if !std::path::Path::new("/dev/kvm").exists() { return Ok(()); }
/// // S5 to the ACPI sleep control register: power off.
/// let code = [0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee];
/// let vm = VmBuilder::new()
///     .memory(MemorySize::mib(16))
///     .kernel(Kernel::from_code(&code)?)
///     .build()?;
/// let events = vm.events()?;
/// let handle = vm.start()?;
/// let all: Vec<VmEvent> = events.collect();
/// assert_eq!(all, [VmEvent::Started, VmEvent::Ended(VmExit::Shutdown)]);
/// assert_eq!(handle.try_wait()?, Some(VmExit::Shutdown));
/// # Ok(())
/// # }
/// ```
pub struct Events {
    subscriber: Arc<Subscriber>,
}

impl Events {
    /// Waits for the next event; `None` where the stream is over.
    pub fn recv(&self) -> Option<VmEvent> {
        let mut state = self.subscriber.lock();
        loop {
            match self.subscriber.take(&mut state) {
                None if !state.closed => state = self.subscriber.wait(state, None),
                event => return event,
            }
        }
    }

    /// Waits as [`recv`](Self::recv) does, but no longer than `timeout`. `None` is then either of
    /// the two; [`is_over`](Self::is_over) tells them apart.
    pub fn recv_timeout(&self, timeout: Duration) -> Option<VmEvent> {
        let start = Instant::now();
        let mut state = self.subscriber.lock();
        loop {
            let left = timeout.saturating_sub(start.elapsed());
            match self.subscriber.take(&mut state) {
                None if !state.closed && !left.is_zero() => {
                    state = self.subscriber.wait(state, Some(left));
                }
                event => return event,
            }
        }
    }

    /// The next event, if there is one already.
    pub fn try_recv(&self) -> Option<VmEvent> {
        let mut state = self.subscriber.lock();
        self.subscriber.take(&mut state)
    }

    /// Whether no event is left and none will come.
    pub fn is_over(&self) -> bool {
        let state = self.subscriber.lock();
        state.closed && state.is_empty()
    }
}

impl Iterator for Events {
    type Item = VmEvent;

    fn next(&mut self) -> Option<VmEvent> {
        self.recv()
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is that of `self.subscriber.ready`, which lives as long as `self`
        // is borrowed, and is closed by nobody else.
        unsafe { BorrowedFd::borrow_raw(self.subscriber.ready.as_raw_fd()) }
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.subscriber.ready.as_raw_fd()
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.subscriber.lock();
        f.debug_struct("Events")
            .field("waiting", &state.queue.len())
            .field("closed", &state.closed)
            .finish()
    }
}

/// One who listens.
struct Subscriber {
    state: Mutex<SubscriberState>,
    arrived: Condvar,
    /// Readable while there is something to take.
    ready: EventFd,
}

#[derive(Default)]
struct SubscriberState {
    queue: VecDeque<VmEvent>,
    missed: u64,
    /// No more events come.
    closed: bool,
    #[cfg(feature = "futures")]
    waker: Option<std::task::Waker>,
}

impl SubscriberState {
    fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.missed == 0
    }
}

impl Subscriber {
    fn lock(&self) -> MutexGuard<'_, SubscriberState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        state: MutexGuard<'a, SubscriberState>,
        timeout: Option<Duration>,
    ) -> MutexGuard<'a, SubscriberState> {
        match timeout {
            None => self
                .arrived
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner),
            Some(timeout) => {
                self.arrived
                    .wait_timeout(state, timeout)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
        }
    }

    fn take(&self, state: &mut SubscriberState) -> Option<VmEvent> {
        let event = match std::mem::take(&mut state.missed) {
            0 => state.queue.pop_front(),
            missed => Some(VmEvent::Missed(missed)),
        };
        // A stream that is over stays readable, as a pipe whose writer has gone.
        if state.is_empty() && !state.closed {
            let _ = self.ready.read();
        }
        event
    }

    /// Adds an event, if there is one, and says whether it is the last.
    fn put(&self, event: Option<VmEvent>, is_last: bool) {
        let mut state = self.lock();
        if let Some(event) = event {
            if state.queue.len() == CAPACITY {
                state.queue.pop_front();
                state.missed += 1;
            }
            state.queue.push_back(event);
        }
        state.closed |= is_last;
        // It fails only where the counter is full, and then it is readable.
        let _ = self.ready.write(1);
        self.arrived.notify_all();
        #[cfg(feature = "futures")]
        let waker = state.waker.take();
        drop(state);
        #[cfg(feature = "futures")]
        waker.into_iter().for_each(std::task::Waker::wake);
    }
}

/// Where a machine's events come from. When it is dropped its streams are over.
#[derive(Default)]
pub(crate) struct EventSource {
    listeners: Mutex<Listeners>,
}

#[derive(Default)]
struct Listeners {
    subscribers: Vec<Weak<Subscriber>>,
    end: Option<VmExit>,
}

impl EventSource {
    /// A stream of what happens from now on; where the machine has ended that is its end.
    pub(crate) fn subscribe(&self) -> io::Result<Events> {
        let subscriber = Arc::new(Subscriber {
            state: Mutex::default(),
            arrived: Condvar::new(),
            ready: EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        });
        let mut listeners = self.lock();
        if let Some(exit) = &listeners.end {
            subscriber.put(Some(VmEvent::Ended(exit.clone())), true);
        } else {
            listeners.subscribers.retain(|one| one.strong_count() > 0);
            listeners.subscribers.push(Arc::downgrade(&subscriber));
        }
        Ok(Events { subscriber })
    }

    /// Tells all who listen.
    pub(crate) fn send(&self, event: &VmEvent) {
        self.lock().send(event);
    }

    /// The last event.
    pub(crate) fn end(&self, exit: &VmExit) {
        let mut listeners = self.lock();
        listeners.close(Some(&VmEvent::Ended(exit.clone())));
        listeners.end = Some(exit.clone());
    }

    fn lock(&self) -> MutexGuard<'_, Listeners> {
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listeners {
    fn send(&self, event: &VmEvent) {
        for subscriber in self.subscribers.iter().filter_map(Weak::upgrade) {
            subscriber.put(Some(event.clone()), false);
        }
    }

    /// Ends all streams, with an event where there is a last one.
    fn close(&mut self, last: Option<&VmEvent>) {
        for subscriber in self.subscribers.drain(..).filter_map(|one| one.upgrade()) {
            subscriber.put(last.cloned(), true);
        }
    }
}

impl Drop for EventSource {
    fn drop(&mut self) {
        self.lock().close(None);
    }
}
