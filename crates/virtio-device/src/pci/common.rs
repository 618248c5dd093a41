//! The common configuration structure (virtio 1.3, section 4.1.4.3).

use super::PciTransport;
use super::interrupt::NO_VECTOR;
use crate::core::{Half, QueueArea};
use crate::{InterruptEvent, VirtioTransport};

/// The fields. Those of 64 bits are accessed as a whole or in two halves, and all others in their
/// own width only (virtio 1.3, section 4.1.3.1).
mod field {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub(super) const NUM_QUEUES: u64 = 0x12;
    pub(super) const DEVICE_STATUS: u64 = 0x14;
    pub(super) const CONFIG_GENERATION: u64 = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
    pub(super) const QUEUE_NOTIF_CONFIG_DATA: u64 = 0x38;
    pub(super) const QUEUE_RESET: u64 = 0x3a;
    pub(super) const ADMIN_QUEUE_INDEX: u64 = 0x3c;
    pub(super) const ADMIN_QUEUE_NUM: u64 = 0x3e;
}

/// The last bytes of the three addresses.
const ADDRESSES_END: u64 = field::QUEUE_DEVICE + 7;

impl PciTransport {
    /// What an access of `len` bytes reads; `None` where no field is read like that.
    pub(super) fn read_common(&self, offset: u64, len: usize) -> Option<u64> {
        let core = self.core.lock();
        let value = match (offset, len) {
            (field::DEVICE_FEATURE_SELECT, 4) => core.device_features_select().into(),
            (field::DEVICE_FEATURE, 4) => core.device_features().into(),
            (field::DRIVER_FEATURE_SELECT, 4) => core.driver_features_select().into(),
            (field::DRIVER_FEATURE, 4) => core.driver_features().into(),
            (field::CONFIG_MSIX_VECTOR, 2) => self.interrupt.vector(InterruptEvent::Config).into(),
            (field::NUM_QUEUES, 2) => self.core.kicks().len() as u64,
            (field::DEVICE_STATUS, 1) => self.interrupt.status().status().into(),
            // The lower bits of a counter change with it.
            (field::CONFIG_GENERATION, 1) => self.interrupt.status().generation().into(),
            (field::QUEUE_SELECT, 2) => core.queue_select().into(),
            (field::QUEUE_SIZE, 2) => core.queue_size().into(),
            (field::QUEUE_MSIX_VECTOR, 2) => {
                let event = queue_event(core.selected_queue());
                event
                    .map_or(NO_VECTOR, |event| self.interrupt.vector(event))
                    .into()
            }
            (field::QUEUE_ENABLE, 2) => core.queue_ready().into(),
            // The registers are in the order of the queues.
            (field::QUEUE_NOTIFY_OFF, 2) => core.selected_queue().unwrap_or(0) as u64,
            (field::QUEUE_DESC..=ADDRESSES_END, 4 | 8) => {
                let (area, half) = address(offset, len)?;
                let address = core.queue_address(area);
                half.map_or(address, |half| half.of(address).into())
            }
            // `VIRTIO_F_NOTIF_CONFIG_DATA` and `VIRTIO_F_ADMIN_VQ` are not offered; and a queue is
            // reset by the time that its driver can ask whether it is.
            (
                field::QUEUE_NOTIF_CONFIG_DATA
                | field::QUEUE_RESET
                | field::ADMIN_QUEUE_INDEX
                | field::ADMIN_QUEUE_NUM,
                2,
            ) => 0,
            _ => return None,
        };
        Some(value)
    }

    /// Takes a write of `len` bytes. One that no field takes is dropped.
    pub(super) fn write_common(&self, offset: u64, len: usize, value: u64) {
        // Of no more bits than the access has.
        let (word, double) = (value as u16, value as u32);
        if (offset, len) == (field::DEVICE_STATUS, 1) && value == 0 {
            self.reset();
            return;
        }
        let mut core = self.core.lock();
        match (offset, len) {
            (field::DEVICE_FEATURE_SELECT, 4) => core.select_device_features(double),
            (field::DRIVER_FEATURE_SELECT, 4) => core.select_driver_features(double),
            (field::DRIVER_FEATURE, 4) => core.set_driver_features(double),
            (field::CONFIG_MSIX_VECTOR, 2) => {
                self.interrupt.set_vector(InterruptEvent::Config, word);
            }
            (field::DEVICE_STATUS, 1) => core.write_status(double),
            (field::QUEUE_SELECT, 2) => core.select_queue(double),
            (field::QUEUE_SIZE, 2) => core.set_queue_size(double),
            (field::QUEUE_MSIX_VECTOR, 2) => {
                if let Some(event) = queue_event(core.selected_queue()) {
                    self.interrupt.set_vector(event, word);
                }
            }
            (field::QUEUE_ENABLE, 2) => core.set_queue_ready(value == 1),
            (field::QUEUE_DESC..=ADDRESSES_END, 4 | 8) => match address(offset, len) {
                Some((area, Some(half))) => core.set_queue_address(area, half, double),
                Some((area, None)) => {
                    core.set_queue_address(area, Half::Low, double);
                    core.set_queue_address(area, Half::High, (value >> 32) as u32);
                }
                None => {}
            },
            (field::QUEUE_RESET, 2) if value == 1 => {
                if let Some(event) = queue_event(core.reset_queue()) {
                    self.interrupt.set_vector(event, NO_VECTOR);
                }
            }
            _ => {}
        }
    }
}

/// The event of a queue with this index, which is below 65535.
fn queue_event(queue: Option<usize>) -> Option<InterruptEvent> {
    queue.map(|queue| InterruptEvent::Queue(queue as u16))
}

/// Which address an aligned access is to, and which half of it, if it is to one.
fn address(offset: u64, len: usize) -> Option<(QueueArea, Option<Half>)> {
    let within = offset.checked_sub(field::QUEUE_DESC)?;
    let area = match within / 8 {
        0 => QueueArea::Descriptors,
        1 => QueueArea::Driver,
        2 => QueueArea::Device,
        _ => return None,
    };
    match (within % 8, len) {
        (0, 8) => Some((area, None)),
        (0, 4) => Some((area, Some(Half::Low))),
        (4, 4) => Some((area, Some(Half::High))),
        _ => None,
    }
}
