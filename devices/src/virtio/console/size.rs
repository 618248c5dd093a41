//! The size of a console, which changes when somebody pulls at a window.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_virtio_device::{InterruptEvent, VirtioInterrupt};
use vmm_sys_util::eventfd::EventFd;

/// The size of a console in characters. It can be cloned and set on any thread, at any time: the
/// device that it was given to tells its driver, now or as soon as there is one.
///
/// A size of no columns and no rows is one that nobody knows.
#[derive(Clone, Default)]
pub struct ConsoleSize(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// Columns above, rows below.
    packed: AtomicU32,
    listener: Mutex<Option<Listener>>,
}

/// How a device learns of a change.
pub(super) enum Listener {
    /// The driver looks into the configuration.
    Driver(Arc<dyn VirtioInterrupt>),
    /// The handler sends a message.
    Handler(Arc<EventFd>),
}

impl Listener {
    fn tell(&self) {
        match self {
            Self::Driver(interrupt) => interrupt.trigger(InterruptEvent::Config),
            // Where it is full, it is readable, which is all that there is to it.
            Self::Handler(wake) => drop(wake.write(1)),
        }
    }
}

impl ConsoleSize {
    /// A size of so many columns and rows.
    pub fn new(columns: u16, rows: u16) -> Self {
        let size = Self::default();
        size.set(columns, rows);
        size
    }

    /// The columns and the rows.
    pub fn get(&self) -> (u16, u16) {
        let packed = self.0.packed.load(Ordering::Acquire);
        ((packed >> 16) as u16, packed as u16)
    }

    /// Changes the size.
    pub fn set(&self, columns: u16, rows: u16) {
        let packed = u32::from(columns) << 16 | u32::from(rows);
        let before = self.0.packed.swap(packed, Ordering::AcqRel);
        // Under the lock, so that no interrupt comes behind a reset of the device.
        if let (Some(listener), true) = (&*self.listener(), before != packed) {
            listener.tell();
        }
    }

    /// Has `listener` told of changes from now on, and of a size that is known already.
    pub(super) fn connect(&self, listener: Listener) {
        let mut slot = self.listener();
        if self.get() != (0, 0) {
            listener.tell();
        }
        *slot = Some(listener);
    }

    /// Tells nobody from now on.
    pub(super) fn disconnect(&self) {
        *self.listener() = None;
    }

    fn listener(&self) -> MutexGuard<'_, Option<Listener>> {
        self.0
            .listener
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for ConsoleSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (columns, rows) = self.get();
        write!(f, "ConsoleSize({columns}x{rows})")
    }
}
