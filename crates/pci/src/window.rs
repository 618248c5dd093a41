//! The parts of the address spaces in which the bus answers.

use std::fmt;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use kiln_device_api::{BusDevice, ExitRequest};
use vm_allocator::{AddressAllocator, AllocPolicy};

use crate::{AddressSpace, Bar, Error, PciBus};

/// Where memory of 32 bits ends.
const END_OF_32_BITS: u64 = 1 << 32;
/// Where the ports of x86 end.
const END_OF_PORTS: u64 = 1 << 16;

/// A part of an address space that belongs to the bus.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) space: AddressSpace,
    pub(crate) first: u64,
    pub(crate) last: u64,
}

impl Window {
    pub(crate) fn new(space: AddressSpace, range: &Range<u64>) -> Result<Self, Error> {
        let reason = if range.is_empty() {
            "it is empty"
        } else if space == AddressSpace::Io && range.end > END_OF_PORTS {
            "it ends beyond port 0xffff"
        } else if range.start < END_OF_32_BITS && range.end > END_OF_32_BITS {
            "it lies on both sides of 4 GiB"
        } else {
            return Ok(Self {
                space,
                first: range.start,
                last: range.end - 1,
            });
        };
        Err(refusal(space, range, reason))
    }

    pub(crate) fn contains(&self, space: AddressSpace, first: u64, last: u64) -> bool {
        self.space == space && self.first <= first && last <= self.last
    }

    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.space == other.space && self.first <= other.last && other.first <= self.last
    }

    fn is_above_32_bits(&self) -> bool {
        self.first >= END_OF_32_BITS
    }
}

pub(crate) fn refusal(space: AddressSpace, range: &Range<u64>, reason: &'static str) -> Error {
    Error::Window {
        space,
        start: range.start,
        end: range.end,
        reason,
    }
}

/// Gives BARs their first addresses, as firmware does.
pub(crate) struct WindowAllocator(Vec<(Window, AddressAllocator)>);

impl WindowAllocator {
    pub(crate) fn new(windows: &[Window]) -> Result<Self, Error> {
        let allocators = windows.iter().map(|window| {
            let size = (window.last - window.first).saturating_add(1);
            let allocator = AddressAllocator::new(window.first, size).map_err(|_| {
                let range = window.first..window.last;
                refusal(window.space, &range, "no addresses can be allocated in it")
            })?;
            Ok((*window, allocator))
        });
        Ok(Self(allocators.collect::<Result<_, _>>()?))
    }

    /// An address for a BAR, at a multiple of its size. One of 64 bits goes above 4 GiB where
    /// there is room, to leave that below to those that can't.
    pub(crate) fn allocate(&mut self, bar: &Bar) -> Option<u64> {
        let heights: &[bool] = match (bar.space(), bar.is_64bit()) {
            (AddressSpace::Memory, true) => &[true, false],
            _ => &[false],
        };
        for above in heights {
            let fitting = self.0.iter_mut().filter(|(window, _)| {
                window.space == bar.space() && window.is_above_32_bits() == *above
            });
            for (_, allocator) in fitting {
                let policy = AllocPolicy::FirstMatch;
                if let Ok(range) = allocator.allocate(bar.size(), bar.size(), policy) {
                    return Some(range.start());
                }
            }
        }
        None
    }
}

/// A window of a built bus, to be placed on the machine's bus for its address space.
#[derive(Clone)]
pub struct PciWindow {
    /// The address space that the window is in.
    pub space: AddressSpace,
    /// The addresses of the window.
    pub range: Range<u64>,
    /// What answers there: the BARs that are in the window.
    pub device: Arc<dyn BusDevice>,
}

impl fmt::Debug for PciWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciWindow")
            .field("space", &self.space)
            .field("range", &format_args!("{:#x?}", self.range))
            .finish_non_exhaustive()
    }
}

impl PciWindow {
    pub(crate) fn new(bus: &Arc<PciBus>, window: &Window) -> Self {
        Self {
            space: window.space,
            // No window ends at the very end of the address space: see `Window::new`.
            range: window.first..window.last.saturating_add(1),
            device: Arc::new(WindowDevice {
                bus: bus.clone(),
                space: window.space,
                base: window.first,
            }),
        }
    }
}

struct WindowDevice {
    bus: Arc<PciBus>,
    space: AddressSpace,
    base: u64,
}

impl BusDevice for WindowDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(address) = self.base.checked_add(offset) {
            self.bus.bar_read(self.space, address, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        match self.base.checked_add(offset) {
            Some(address) => self.bus.bar_write(self.space, address, data),
            None => ControlFlow::Continue(()),
        }
    }
}
