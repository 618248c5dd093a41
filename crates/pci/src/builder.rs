//! Putting a bus together: who is where, and what firmware would do.

use std::cmp::Reverse;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::address::{FUNCTIONS, SLOTS};
use crate::bus::{Function, NO_FUNCTION};
use crate::intx::SharedLine;
use crate::window::{Window, WindowAllocator, refusal};
use crate::{
    AddressSpace, Error, FunctionDescription, INTX_LINES, IntxLine, PciAddress, PciBus,
    PciFunction, host_bridge, intx_line,
};

/// The slots that are not the host bridge's.
const DEVICE_SLOTS: usize = SLOTS as usize - 1;
/// The functions that a bus has room for, beside the host bridge.
const MAX_FUNCTIONS: usize = DEVICE_SLOTS * FUNCTIONS as usize;
/// What the interrupt line register says where no line is connected (PCI 3.0, section 6.2.4).
const LINE_UNKNOWN: u8 = 0xff;

struct Member {
    description: FunctionDescription,
    device: Arc<dyn PciFunction>,
}

/// A PCI bus while it is put together.
///
/// Functions get their places when the bus is built, in the order in which they were added, which
/// is then also the order in which a guest finds them. Up to 31 of them each have a slot to
/// themselves; of more, two or more share a slot as the functions of one device, up to 248 in all.
#[derive(Default)]
pub struct PciBusBuilder {
    windows: Vec<Window>,
    lines: Option<[IntxLine; INTX_LINES]>,
    members: Vec<Member>,
}

impl PciBusBuilder {
    /// A bus with a host bridge, and nothing else.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets the bus have a part of an address space: its BARs get addresses there, and answer only
    /// there. A memory window lies below or above 4 GiB, where only 64-bit BARs can be; windows
    /// that are asked first were added first.
    ///
    /// # Errors
    ///
    /// [`Error::Window`] where it is empty, lies on both sides of 4 GiB, ends beyond the last port,
    /// or overlaps another one.
    pub fn add_window(&mut self, space: AddressSpace, range: Range<u64>) -> Result<(), Error> {
        let window = Window::new(space, &range)?;
        if self.windows.iter().any(|other| other.overlaps(&window)) {
            return Err(refusal(space, &range, "it overlaps another window"));
        }
        self.windows.push(window);
        Ok(())
    }

    /// The interrupt lines that INTx pins are wired to, as [`intx_line`] says. Without them no
    /// function can have a pin.
    pub fn set_intx_lines(&mut self, lines: [IntxLine; INTX_LINES]) {
        self.lines = Some(lines);
    }

    /// Puts a function on the bus.
    ///
    /// # Errors
    ///
    /// [`Error::TooManyFunctions`] where there are 248 already, [`Error::NoInterruptLines`] where
    /// it has an INTx pin, and lines were not [set](Self::set_intx_lines) before.
    pub fn add(
        &mut self,
        description: FunctionDescription,
        device: Arc<dyn PciFunction>,
    ) -> Result<(), Error> {
        if self.members.len() >= MAX_FUNCTIONS {
            return Err(Error::TooManyFunctions {
                name: description.name,
                limit: MAX_FUNCTIONS,
            });
        }
        if description.pin.is_some() && self.lines.is_none() {
            return Err(Error::NoInterruptLines {
                name: description.name,
            });
        }
        self.members.push(Member {
            description,
            device,
        });
        Ok(())
    }

    /// Gives each function its place and its BARs their addresses, and tells the
    /// [observers](crate::BarObserver) nothing yet: a function answers at its BARs when the guest
    /// has enabled that in its command register.
    ///
    /// # Errors
    ///
    /// [`Error::NoAddress`] where no window has room for a BAR.
    pub fn build(self) -> Result<Arc<PciBus>, Error> {
        let addresses = addresses(self.members.len());
        let shared = self.lines.as_ref().map(|lines| {
            lines
                .each_ref()
                .map(|line| Arc::new(SharedLine::new(line.level.clone())))
        });
        let gsis = self
            .lines
            .as_ref()
            .map(|lines| lines.each_ref().map(|line| line.gsi));

        let bridge = Member {
            description: host_bridge::description(),
            device: Arc::new(host_bridge::function()),
        };
        let mut members: Vec<_> = std::iter::once(bridge).chain(self.members).collect();
        place_bars(&self.windows, &mut members)?;

        let mut by_address = [NO_FUNCTION; 256];
        let mut functions = Vec::with_capacity(members.len());
        let mut spaces = Vec::with_capacity(members.len());
        for (index, (member, address)) in members.into_iter().zip(&addresses).enumerate() {
            let FunctionDescription {
                name,
                mut config,
                msix,
                pin,
                observer,
            } = member.description;
            // A guest that finds no function 0 in a slot looks for no others there.
            if addresses
                .iter()
                .any(|other| other.slot() == address.slot() && other != address)
            {
                config.set_multi_function();
            }
            if let Some(pin) = &pin {
                let number = intx_pin(*address);
                let line = intx_line(address.slot(), number);
                let gsi = gsis.and_then(|gsis| u8::try_from(gsis[line]).ok());
                config.set_interrupt(number + 1, gsi.unwrap_or(LINE_UNKNOWN));
                if let Some(shared) = &shared {
                    pin.connect(shared[line].clone());
                }
            }
            by_address[address.devfn()] = index as u8;
            functions.push(Function {
                address: *address,
                name,
                device: member.device,
                msix,
                pin,
                observer,
            });
            spaces.push(config);
        }
        Ok(Arc::new(PciBus::new(
            functions,
            spaces,
            by_address,
            self.windows,
            gsis,
        )))
    }
}

impl fmt::Debug for PciBusBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciBusBuilder")
            .field("windows", &self.windows)
            .field("functions", &self.members.len())
            .finish_non_exhaustive()
    }
}

/// The pin of a function, 0 for `INTA#`: those of one device have different ones.
pub(crate) fn intx_pin(address: PciAddress) -> u8 {
    address.function() % INTX_LINES as u8
}

/// The places of the host bridge and of so many functions, in order.
fn addresses(functions: usize) -> Vec<PciAddress> {
    let in_slot = functions.div_ceil(DEVICE_SLOTS).max(1);
    let address = |index: usize| {
        let (slot, function) = (1 + index / in_slot, index % in_slot);
        PciAddress::from_devfn((slot * FUNCTIONS as usize + function) as u8)
    };
    std::iter::once(PciAddress::HOST_BRIDGE)
        .chain((0..functions).map(address))
        .collect()
}

/// Gives every BAR an address: the largest first, so that alignment wastes nothing.
fn place_bars(windows: &[Window], members: &mut [Member]) -> Result<(), Error> {
    let mut allocator = WindowAllocator::new(windows)?;
    let mut bars = Vec::new();
    for (index, member) in members.iter().enumerate() {
        for (number, bar) in member.description.config.bars().iter().enumerate() {
            bars.extend(bar.map(|bar| (index, number, bar)));
        }
    }
    bars.sort_by_key(|(_, _, bar)| Reverse(bar.size()));
    for (index, number, bar) in bars {
        let description = &mut members[index].description;
        let Some(address) = allocator.allocate(&bar) else {
            return Err(Error::NoAddress {
                name: description.name.clone(),
                bar: number,
                size: bar.size(),
            });
        };
        description.config.set_bar_address(number, address);
    }
    Ok(())
}
