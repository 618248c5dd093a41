//! The device status bits and what of the transport's state worker threads may touch.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

use tracing::Span;
use virtio_bindings::virtio_config as raw;

use crate::transport::NeedsResetHook;

/// The driver has found the device (virtio 1.3, section 2.1, as all that follow).
pub(crate) const ACKNOWLEDGE: u8 = raw::VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
/// The driver knows how to drive the device.
pub(crate) const DRIVER: u8 = raw::VIRTIO_CONFIG_S_DRIVER as u8;
/// The driver is set up.
pub(crate) const DRIVER_OK: u8 = raw::VIRTIO_CONFIG_S_DRIVER_OK as u8;
/// The features are agreed on.
pub(crate) const FEATURES_OK: u8 = raw::VIRTIO_CONFIG_S_FEATURES_OK as u8;
/// The device cannot go on until it is reset. Only the device sets it.
pub(crate) const DEVICE_NEEDS_RESET: u8 = raw::VIRTIO_CONFIG_S_NEEDS_RESET as u8;
/// The driver has given up on the device.
pub(crate) const FAILED: u8 = raw::VIRTIO_CONFIG_S_FAILED as u8;

/// The part of a transport's state that is reached without its lock: workers set
/// `DEVICE_NEEDS_RESET` and change the configuration from their own threads.
pub(crate) struct SharedStatus {
    device_type: u32,
    status: AtomicU8,
    generation: AtomicU32,
    told: AtomicBool,
    /// Told the same as the log.
    hook: OnceLock<NeedsResetHook>,
    /// The span in which the transport was made: messages about the device belong to it.
    span: Span,
}

impl SharedStatus {
    pub(crate) fn new(device_type: u32, status: u8, generation: u32) -> Self {
        Self {
            device_type,
            status: AtomicU8::new(status),
            generation: AtomicU32::new(generation),
            told: AtomicBool::new(false),
            hook: OnceLock::new(),
            span: Span::current(),
        }
    }

    pub(crate) fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    pub(crate) fn has(&self, bits: u8) -> bool {
        self.status() & bits == bits
    }

    /// Sets bits; what is set already stays.
    pub(crate) fn set(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::AcqRel);
    }

    pub(crate) fn clear(&self) {
        self.status.store(0, Ordering::Release);
    }

    /// Sets `DEVICE_NEEDS_RESET`, and says whether the driver is to be told by an interrupt, which
    /// it is only once it has set `DRIVER_OK` (virtio 1.3, section 2.1.2).
    pub(crate) fn set_needs_reset(&self, reason: &dyn fmt::Display) -> bool {
        let before = self.status.fetch_or(DEVICE_NEEDS_RESET, Ordering::AcqRel);
        if !self.told.swap(true, Ordering::Relaxed) {
            self.span.in_scope(|| {
                tracing::warn!(
                    device_type = self.device_type,
                    "a virtio device needs to be reset by its driver (told once): {reason}"
                );
            });
            if let Some(tell) = self.hook.get() {
                tell(&reason.to_string());
            }
        }
        before & DRIVER_OK != 0
    }

    pub(crate) fn on_needs_reset(&self, tell: NeedsResetHook) {
        // The first one counts.
        let _ = self.hook.set(tell);
    }

    pub(crate) fn span(&self) -> &Span {
        &self.span
    }

    /// The number that changes with the configuration (virtio 1.3, section 2.5.1).
    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn configuration_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }
}
