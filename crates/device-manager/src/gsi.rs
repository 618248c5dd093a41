//! Who has which global system interrupt.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use vm_allocator::IdAllocator;

use crate::Error;

/// The pins that one I/O APIC can have at most: the number of the last one, in its version register,
/// goes up to 239 (82093AA datasheet, section 3.2.2).
const MAX_PINS: u32 = 240;

/// The global system interrupts of a machine, from 0 on.
#[derive(Debug)]
pub(crate) struct GsiAllocator {
    /// Hands out the interrupts that nobody asked for by number.
    ids: IdAllocator,
    holders: BTreeMap<u32, String>,
    pins: u32,
}

impl GsiAllocator {
    pub(crate) fn new(pins: u32) -> Result<Self, Error> {
        if !(1..=MAX_PINS).contains(&pins) {
            return Err(Error::GsiCount { pins });
        }
        let ids = IdAllocator::new(0, pins - 1).map_err(|_| Error::GsiCount { pins })?;
        Ok(Self {
            ids,
            holders: BTreeMap::new(),
            pins,
        })
    }

    /// Takes this very interrupt.
    pub(crate) fn reserve(&mut self, name: &str, gsi: u32) -> Result<(), Error> {
        if gsi >= self.pins {
            return Err(Error::GsiRange {
                name: name.to_owned(),
                gsi,
                last: self.pins - 1,
            });
        }
        if let Some(other) = self.holders.get(&gsi) {
            return Err(Error::GsiTaken {
                name: name.to_owned(),
                gsi,
                other: other.clone(),
            });
        }
        self.holders.insert(gsi, name.to_owned());
        Ok(())
    }

    /// Takes the lowest interrupt that is free.
    pub(crate) fn allocate(&mut self, name: &str) -> Result<u32, Error> {
        // The allocator knows no exact requests: what it gives may have been reserved.
        while let Ok(gsi) = self.ids.allocate_id() {
            if let Entry::Vacant(free) = self.holders.entry(gsi) {
                free.insert(name.to_owned());
                return Ok(gsi);
            }
        }
        Err(Error::GsiExhausted {
            name: name.to_owned(),
            total: self.pins,
        })
    }
}
