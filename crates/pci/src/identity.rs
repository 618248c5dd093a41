//! What a function says it is.

/// The registers by which a driver knows a function (PCI 3.0, section 6.2.1).
///
/// ```
/// use kiln_pci::Identity;
///
/// // A virtio block device: a mass storage controller of the kind "other".
/// let identity = Identity {
///     vendor_id: 0x1af4,
///     device_id: 0x1042,
///     revision: 1,
///     class: 0x01_80_00,
///     subsystem_vendor_id: 0x1af4,
///     subsystem_id: 0x1100,
/// };
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Who made it.
    pub vendor_id: u16,
    /// What it is, in the numbering of the vendor.
    pub device_id: u16,
    /// The revision of the device.
    pub revision: u8,
    /// The class code of 24 bits: base class, subclass and programming interface, from the highest
    /// byte on.
    pub class: u32,
    /// Who made the board.
    pub subsystem_vendor_id: u16,
    /// Which board it is, in the numbering of that vendor.
    pub subsystem_id: u16,
}
