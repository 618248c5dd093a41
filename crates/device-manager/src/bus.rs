//! One address space with the devices in it, while it is built and after.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kiln_device_api::BusDevice;
use vm_device::bus::{Error as BusError, MmioAddress, MmioBus, MmioRange, PioAddress, PioRange};

use crate::{AddressSpace, Error};

struct Registration {
    name: String,
    device: Arc<dyn BusDevice>,
}

/// An address space that devices can still be added to.
///
/// vm-device keeps the trait over its address types to itself, so both address spaces are built
/// over its 64-bit one; a port range is checked as such before.
pub(crate) struct BusBuilder {
    space: AddressSpace,
    bus: MmioBus<Registration>,
    bases: Vec<u64>,
}

impl BusBuilder {
    pub(crate) fn new(space: AddressSpace) -> Self {
        Self {
            space,
            bus: MmioBus::new(),
            bases: Vec::new(),
        }
    }

    pub(crate) fn add(
        &mut self,
        name: &str,
        base: u64,
        size: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Error> {
        let range = self.range(base, size).ok_or_else(|| Error::Range {
            name: name.to_owned(),
            space: self.space,
            base,
            size,
        })?;
        let registration = Registration {
            name: name.to_owned(),
            device,
        };
        match self.bus.register(range, registration) {
            Ok(()) => {
                self.bases.push(base);
                Ok(())
            }
            Err(error) => Err(self.refusal(name, range, &error)),
        }
    }

    fn range(&self, base: u64, size: u64) -> Option<MmioRange> {
        if self.space == AddressSpace::Pio {
            let port = PioAddress(u16::try_from(base).ok()?);
            PioRange::new(port, u16::try_from(size).ok()?).ok()?;
        }
        MmioRange::new(MmioAddress(base), size).ok()
    }

    fn refusal(&self, name: &str, range: MmioRange, error: &BusError) -> Error {
        let other = self
            .bases
            .iter()
            .filter_map(|base| self.bus.device(MmioAddress(*base)))
            .find(|(other, _)| other.overlaps(&range));
        match (error, other) {
            (BusError::DeviceOverlap, Some((other_range, other))) => Error::Overlap {
                name: name.to_owned(),
                space: self.space,
                range: bounds(&range),
                other: other.name.clone(),
                other_range: bounds(other_range),
            },
            _ => Error::Range {
                name: name.to_owned(),
                space: self.space,
                base: range.base().0,
                size: range.size(),
            },
        }
    }

    pub(crate) fn freeze(mut self) -> Bus {
        self.bases.sort_unstable();
        let slots: Box<[Slot]> = self
            .bases
            .iter()
            .filter_map(|base| self.bus.deregister(MmioAddress(*base)))
            .map(|(range, registration)| Slot {
                first: range.base().0,
                last: range.last().0,
                device: registration.device,
                name: registration.name.into(),
            })
            .collect();
        Bus {
            slots,
            last_hit: LastHit(AtomicUsize::new(0)),
        }
    }
}

fn bounds(range: &MmioRange) -> RangeInclusive<u64> {
    range.base().0..=range.last().0
}

/// A device in its place.
pub(crate) struct Slot {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) device: Arc<dyn BusDevice>,
    pub(crate) name: Box<str>,
}

/// The slot that was hit last: only a hint of where to look first, so any value is correct, and no
/// ordering is needed. In a cache line of its own, so that vCPUs that use different devices don't
/// take the slots from each other's caches.
#[repr(align(64))]
struct LastHit(AtomicUsize);

/// An address space that does not change any more.
pub(crate) struct Bus {
    /// Sorted, without overlap.
    slots: Box<[Slot]>,
    last_hit: LastHit,
}

impl Bus {
    /// The device that has all of the `len` addresses from `address` on, and the offset of the
    /// first in it.
    pub(crate) fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let slot = self.slot_at(address)?;
        // Without the last byte the access has no address, so an empty one never arrives.
        let last = address.checked_add((len as u64).checked_sub(1)?)?;
        (last <= slot.last).then(|| (&*slot.device, address - slot.first))
    }

    fn slot_at(&self, address: u64) -> Option<&Slot> {
        let hint = self.last_hit.0.load(Ordering::Relaxed);
        if let Some(slot) = self.slots.get(hint)
            && (slot.first..=slot.last).contains(&address)
        {
            return Some(slot);
        }
        let index = self
            .slots
            .partition_point(|slot| slot.first <= address)
            .checked_sub(1)?;
        let slot = self.slots.get(index)?;
        if address > slot.last {
            return None;
        }
        self.last_hit.0.store(index, Ordering::Relaxed);
        Some(slot)
    }

    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }
}
