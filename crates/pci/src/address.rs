//! Where a function is on the bus.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The devices ("slots") that a bus has room for.
pub const SLOTS: u8 = 32;
/// The functions that a device can have.
pub const FUNCTIONS: u8 = 8;

/// The address of a function on bus 0: slot and function number.
///
/// ```
/// use kiln_pci::PciAddress;
///
/// let address = PciAddress::new(3, 1).unwrap();
/// assert_eq!(address.to_string(), "00:03.1");
/// assert_eq!(address.ecam_offset(), 0x19000);
/// assert_eq!(PciAddress::new(32, 0), None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PciAddress(u8);

impl PciAddress {
    /// Where the host bridge is.
    pub const HOST_BRIDGE: Self = Self(0);

    /// The function `function` (less than [`FUNCTIONS`]) of the device in slot `slot` (less than
    /// [`SLOTS`]); `None` where there can be none.
    pub const fn new(slot: u8, function: u8) -> Option<Self> {
        if slot < SLOTS && function < FUNCTIONS {
            Some(Self(slot << 3 | function))
        } else {
            None
        }
    }

    /// The number of the slot, 0 to 31.
    pub const fn slot(self) -> u8 {
        self.0 >> 3
    }

    /// The number of the function, 0 to 7.
    pub const fn function(self) -> u8 {
        self.0 & (FUNCTIONS - 1)
    }

    /// Where the function's configuration space begins in the ECAM window, in bytes (PCIe 5.0,
    /// section 7.2.2).
    pub const fn ecam_offset(self) -> u64 {
        (self.0 as u64) << 12
    }

    /// Slot and function in one number, as configuration addresses have them.
    pub(crate) const fn from_devfn(devfn: u8) -> Self {
        Self(devfn)
    }

    pub(crate) const fn devfn(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{}", self.slot(), self.function())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_keeps_its_parts() {
        for slot in 0..SLOTS {
            for function in 0..FUNCTIONS {
                let address = PciAddress::new(slot, function).unwrap();
                assert_eq!((address.slot(), address.function()), (slot, function));
                assert_eq!(PciAddress::from_devfn(address.devfn() as u8), address);
            }
        }
        assert_eq!(PciAddress::new(0, 8), None);
        assert_eq!(PciAddress::new(255, 255), None);
        assert_eq!(PciAddress::new(31, 7).unwrap().ecam_offset(), 0xf_f000);
    }
}
