//! Capabilities that a device adds to its configuration space.

/// An entry of the capabilities list (PCI 3.0, section 6.7).
///
/// The body is what follows the id and the pointer to the next capability. What of it the guest
/// can write is a mask, of one bit for each bit of the body; without one it is read-only.
///
/// ```
/// use kiln_pci::Capability;
///
/// // A vendor-specific capability: its length, and a byte that is the guest's to use.
/// let capability = Capability::new(0x09, [4, 0]).writable([0, 0xff]);
/// ```
#[derive(Clone, Debug)]
pub struct Capability {
    pub(crate) id: u8,
    pub(crate) body: Vec<u8>,
    pub(crate) writable: Option<Vec<u8>>,
    pub(crate) hooked: bool,
}

impl Capability {
    /// A read-only capability.
    pub fn new(id: u8, body: impl Into<Vec<u8>>) -> Self {
        Self {
            id,
            body: body.into(),
            writable: None,
            hooked: false,
        }
    }

    /// Lets the guest write the bits that are set in `mask`, which is as long as the body.
    #[must_use]
    pub fn writable(mut self, mask: impl Into<Vec<u8>>) -> Self {
        self.writable = Some(mask.into());
        self
    }

    /// Has the device told of every access to this capability: see
    /// [`PciFunction::config_read`](crate::PciFunction::config_read).
    #[must_use]
    pub fn hooked(mut self) -> Self {
        self.hooked = true;
        self
    }
}

/// An entry of the list of extended capabilities (PCIe 5.0, section 7.6.3), which only ECAM
/// reaches. It is read-only.
#[derive(Clone, Debug)]
pub struct ExtendedCapability {
    pub(crate) id: u16,
    pub(crate) version: u8,
    pub(crate) body: Vec<u8>,
}

impl ExtendedCapability {
    /// A capability whose body follows the four bytes of the header. The version has four bits.
    pub fn new(id: u16, version: u8, body: impl Into<Vec<u8>>) -> Self {
        Self {
            id,
            version,
            body: body.into(),
        }
    }
}
