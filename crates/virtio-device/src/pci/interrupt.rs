//! The way of the workers to the driver: MSI-X vectors, or the ISR status and the INTx pin.

use std::fmt;
use std::mem;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kiln_pci::{IntxPin, Msix};
use vmm_sys_util::eventfd::EventFd;

use crate::status::SharedStatus;
use crate::{InterruptEvent, VirtioInterrupt};

/// `VIRTIO_MSI_NO_VECTOR`: an event is not to be told.
pub(super) const NO_VECTOR: u16 = 0xffff;
/// ISR status: a queue has used buffers.
pub(super) const ISR_QUEUE: u8 = 1 << 0;
/// ISR status: the configuration or `DEVICE_NEEDS_RESET` has changed.
pub(super) const ISR_CONFIG: u8 = 1 << 1;

/// The vectors, the ISR status and the pin of a device, without the transport's lock.
pub(super) struct PciInterrupt {
    msix: Arc<Msix>,
    pin: Arc<IntxPin>,
    /// The pin is asserted while this is not 0. While MSI-X is enabled the bus keeps it from its
    /// line. The lock is held for no longer than a change of the two.
    isr: Mutex<u8>,
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
    /// The eventfds of the vectors, once they were looked for.
    notifiers: Box<[OnceLock<Option<EventFd>>]>,
    shared: Arc<SharedStatus>,
}

impl PciInterrupt {
    pub(super) fn new(
        msix: Arc<Msix>,
        pin: Arc<IntxPin>,
        shared: Arc<SharedStatus>,
        queues: usize,
    ) -> Self {
        let unmapped = || AtomicU16::new(NO_VECTOR);
        Self {
            isr: Mutex::new(0),
            config_vector: unmapped(),
            queue_vectors: (0..queues).map(|_| unmapped()).collect(),
            notifiers: (0..msix.vectors()).map(|_| OnceLock::new()).collect(),
            msix,
            pin,
            shared,
        }
    }

    pub(super) fn msix(&self) -> &Msix {
        &self.msix
    }

    pub(super) fn status(&self) -> &SharedStatus {
        &self.shared
    }

    /// Whether a queue or the configuration can be given this vector.
    pub(super) fn accepts(&self, vector: u16) -> bool {
        vector == NO_VECTOR || vector < self.msix.vectors()
    }

    /// The vector of an event.
    pub(super) fn vector(&self, event: InterruptEvent) -> u16 {
        self.slot(event)
            .map_or(NO_VECTOR, |slot| slot.load(Ordering::Acquire))
    }

    /// Gives an event a vector; none where there is no such vector, which the driver reads back.
    pub(super) fn set_vector(&self, event: InterruptEvent, vector: u16) {
        if let Some(slot) = self.slot(event) {
            let vector = if self.accepts(vector) {
                vector
            } else {
                NO_VECTOR
            };
            slot.store(vector, Ordering::Release);
        }
    }

    fn slot(&self, event: InterruptEvent) -> Option<&AtomicU16> {
        match event {
            InterruptEvent::Config => Some(&self.config_vector),
            InterruptEvent::Queue(queue) => self.queue_vectors.get(usize::from(queue)),
        }
    }

    pub(super) fn queue_vectors(&self) -> Vec<u16> {
        let vectors = self.queue_vectors.iter();
        vectors
            .map(|vector| vector.load(Ordering::Acquire))
            .collect()
    }

    /// The ISR status, without clearing it.
    pub(super) fn isr(&self) -> u8 {
        *self.lock()
    }

    /// The driver reads the ISR status, which clears it.
    pub(super) fn take_isr(&self) -> u8 {
        let mut isr = self.lock();
        self.pin.set(false);
        mem::take(&mut *isr)
    }

    /// Takes over the ISR status. The bus does so with the pin, once it knows where that leads to.
    pub(super) fn restore_isr(&self, isr: u8) {
        *self.lock() = isr;
    }

    fn raise(&self, causes: u8) {
        let mut isr = self.lock();
        *isr |= causes;
        self.pin.set(*isr != 0);
    }

    /// The device is reset. The MSI-X table is the function's, and stays as it is.
    pub(super) fn reset(&self) {
        self.take_isr();
        for vector in self.queue_vectors.iter().chain([&self.config_vector]) {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }

    fn lock(&self) -> MutexGuard<'_, u8> {
        self.isr.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells of an event by its message, or says that MSI-X is not enabled.
    fn send_message(&self, event: InterruptEvent) -> bool {
        if !self.msix.is_enabled() {
            return false;
        }
        let vector = self.vector(event);
        let Some(notifier) = self.notifiers.get(usize::from(vector)) else {
            return true;
        };
        match notifier.get_or_init(|| self.msix.notifier(vector)) {
            Some(notifier) => {
                // It fails only where the counter is full, and then an interrupt is on its way.
                let _ = notifier.write(1);
                // Where it was disabled meanwhile the driver does not wait for messages any more.
                self.msix.is_enabled()
            }
            None => self.msix.trigger(vector),
        }
    }

    fn config_changed(&self) {
        self.raise(ISR_CONFIG);
        self.send_message(InterruptEvent::Config);
    }
}

impl VirtioInterrupt for PciInterrupt {
    fn trigger(&self, event: InterruptEvent) {
        match event {
            InterruptEvent::Config => {
                self.shared.configuration_changed();
                self.config_changed();
            }
            InterruptEvent::Queue(_) => {
                if !self.send_message(event) {
                    self.raise(ISR_QUEUE);
                }
            }
        }
    }

    fn notifier(&self, event: InterruptEvent) -> Option<EventFd> {
        match event {
            InterruptEvent::Queue(_) if self.msix.is_enabled() => {
                self.msix.notifier(self.vector(event))
            }
            _ => None,
        }
    }

    fn needs_reset(&self, reason: &dyn fmt::Display) {
        if self.shared.set_needs_reset(reason) {
            self.config_changed();
        }
    }
}
