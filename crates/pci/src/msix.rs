//! MSI-X (PCI 3.0, section 6.8.2): interrupts that are messages, one for each vector, which the
//! guest addresses and masks one by one.
//!
//! The protocol between table, sink and eventfds, and why it loses nothing, is at [`MsixSink`].

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::Error;
use crate::registers::MSIX_CONTROL_ENABLE;

mod placement;
mod sink;
mod table;
#[cfg(test)]
mod tests;

pub use placement::MsixPlacement;
use placement::Structure;
pub use sink::MsixSink;
use table::Table;
pub use table::{MsixState, VectorState};

/// The most vectors that a function can have.
pub const MAX_VECTORS: u16 = 2048;

/// The MSI-X vectors of a function, shared by its bus and its device.
pub struct Msix {
    sink: Arc<dyn MsixSink>,
    vectors: u16,
    /// A copy of what is in the table, to be read without the lock.
    enabled: AtomicBool,
    table: Mutex<Table>,
}

impl Msix {
    /// Makes `vectors` vectors, all masked, whose messages go to `sink`.
    ///
    /// # Errors
    ///
    /// [`Error::MsixVectors`] where there are none, or more than 2048.
    pub fn new(vectors: u16, sink: Arc<dyn MsixSink>) -> Result<Self, Error> {
        if !(1..=MAX_VECTORS).contains(&vectors) {
            return Err(Error::MsixVectors { vectors });
        }
        Ok(Self {
            sink,
            vectors,
            enabled: AtomicBool::new(false),
            table: Mutex::new(Table::new(vectors)),
        })
    }

    /// The number of vectors.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Whether the guest has enabled MSI-X. While it has not, a function uses its INTx pin.
    ///
    /// This takes no lock, for devices that write a [notifier](Self::notifier). Such a device asks
    /// before it writes and once more behind: where the guest has disabled MSI-X in between, the
    /// INTx pin is to tell of the event.
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// Sends the message of a vector, or sets its pending bit if it may not be sent now.
    ///
    /// Returns `false` where MSI-X is not enabled or the vector does not exist: nothing has
    /// happened then, and a function with an INTx pin uses that.
    pub fn trigger(&self, vector: u16) -> bool {
        self.lock().trigger(&*self.sink, vector)
    }

    /// An eventfd that has the effect of [`trigger`](Self::trigger) when it is written, where the
    /// sink has one for this vector, and where MSI-X [is enabled](Self::is_enabled). What is
    /// written while it is not comes as an interrupt once it is.
    pub fn notifier(&self, vector: u16) -> Option<EventFd> {
        (vector < self.vectors)
            .then(|| self.sink.notifier(vector))
            .flatten()
    }

    /// Answers a read in a BAR, where it begins in the table or the pending bits, and says whether
    /// it does. The bus calls it before it asks the device; a device calls it where a guest gets at
    /// its BARs by a way of its own, such as a capability for that.
    pub fn bar_read(
        &self,
        placement: &MsixPlacement,
        bar: usize,
        offset: u64,
        data: &mut [u8],
    ) -> bool {
        match placement.find(self.vectors, bar, offset) {
            Some((Structure::Table, offset)) => self.read_table(offset, data),
            Some((Structure::Pending, offset)) => self.read_pending(offset, data),
            None => return false,
        }
        true
    }

    /// Takes a write in a BAR: the twin of [`bar_read`](Self::bar_read).
    pub fn bar_write(
        &self,
        placement: &MsixPlacement,
        bar: usize,
        offset: u64,
        data: &[u8],
    ) -> bool {
        match placement.find(self.vectors, bar, offset) {
            Some((Structure::Table, offset)) => self.write_table(offset, data),
            // The pending bits are read-only.
            Some((Structure::Pending, _)) => {}
            None => return false,
        }
        true
    }

    fn read_table(&self, offset: u64, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write_table(&self, offset: u64, data: &[u8]) {
        self.lock().write(&*self.sink, offset, data);
    }

    fn read_pending(&self, offset: u64, data: &mut [u8]) {
        self.lock().read_pending(&*self.sink, offset, data);
    }

    /// The guest has written the capability's control register.
    pub(crate) fn set_control(&self, control: u16) {
        let mut table = self.lock();
        if control & MSIX_CONTROL_ENABLE == 0 {
            // Whoever writes a notifier once it is closed, and looks here behind that, sees it.
            self.enabled.store(false, Ordering::SeqCst);
        }
        table.set_control(&*self.sink, control);
        self.enabled.store(table.enabled(), Ordering::SeqCst);
    }

    pub(crate) fn state(&self) -> MsixState {
        self.lock().state(&*self.sink)
    }

    /// Takes over a state with as many vectors, and the control register that goes with it.
    pub(crate) fn restore(&self, state: &MsixState, control: u16) {
        let mut table = self.lock();
        table.restore(&*self.sink, state);
        table.set_control(&*self.sink, control);
        self.enabled.store(table.enabled(), Ordering::SeqCst);
    }

    /// The state after power-on. Events that were pending are forgotten.
    pub(crate) fn reset_state(&self) -> MsixState {
        MsixState::reset(self.vectors)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Msix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Msix")
            .field("vectors", &self.vectors)
            .field("enabled", &self.is_enabled())
            .finish_non_exhaustive()
    }
}
