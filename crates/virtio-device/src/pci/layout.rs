//! What the function is and where its structures are (virtio 1.3, sections 4.1.2 and 4.1.4).

use kiln_pci::{Bar, Capability, FunctionDescription, Identity, MsixPlacement};

/// The one BAR, below 4 GiB, where every guest can reach it.
pub(super) const BAR: usize = 0;
/// The common configuration. Each structure has pages of its own, so that a guest can map them
/// apart.
pub(super) const COMMON: u64 = 0x0000;
const COMMON_SIZE: u64 = 0x40;
/// The ISR status, a byte.
pub(super) const ISR: u64 = 0x1000;
/// The device-specific configuration.
pub(super) const DEVICE: u64 = 0x2000;
const DEVICE_SIZE: u64 = 0x1000;
pub(super) const DEVICE_END: u64 = DEVICE + DEVICE_SIZE;
const MSIX_PENDING: u32 = 0x3000;
/// The MSI-X table: up to 32 KiB.
const MSIX_TABLE: u32 = 0x8000;
/// The notification registers, as many as there are queues, up to the BAR's end.
pub(super) const NOTIFY: u64 = 0x1_0000;
/// The bytes from one queue's notification register to the next one's.
pub(super) const NOTIFY_MULTIPLIER: u64 = 4;

pub(super) const MSIX: MsixPlacement = MsixPlacement {
    table_bar: BAR,
    table_offset: MSIX_TABLE,
    pending_bar: BAR,
    pending_offset: MSIX_PENDING,
};

/// A vendor-specific capability, as all those of virtio are (PCI 3.0, appendix H).
const CAPABILITY_VENDOR: u8 = 0x09;
/// `cfg_type`: what a capability is about (virtio 1.3, section 4.1.4).
mod cfg_type {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const PCI: u8 = 5;
}
/// The bytes of `struct virtio_pci_cap` behind the id and the pointer to the next capability.
const CAPABILITY_BODY: usize = 14;

const VENDOR_VIRTIO: u16 = 0x1af4;
/// The PCI device ID of virtio device type 0.
const FIRST_DEVICE_ID: u16 = 0x1040;
/// The PCI device IDs of virtio end at 0x107f.
const LAST_DEVICE_TYPE: u32 = 0x3f;
/// The first revision of a device that is not transitional.
const REVISION: u8 = 1;
/// What QEMU's devices have: drivers for Windows look at it.
const SUBSYSTEM: u16 = 0x1100;

/// The identity of a device of this type, where there is one.
pub(super) fn identity(device_type: u32) -> Option<Identity> {
    if device_type > LAST_DEVICE_TYPE {
        return None;
    }
    Some(Identity {
        vendor_id: VENDOR_VIRTIO,
        device_id: FIRST_DEVICE_ID + device_type as u16,
        revision: REVISION,
        class: class(device_type),
        subsystem_vendor_id: VENDOR_VIRTIO,
        subsystem_id: SUBSYSTEM,
    })
}

/// The class code that fits a device of this type best (PCI 3.0, appendix D).
fn class(device_type: u32) -> u32 {
    match device_type {
        // Network: Ethernet controller.
        1 => 0x02_00_00,
        // Block and file system: other mass storage controller.
        2 | 26 => 0x01_80_00,
        // Console: other communications controller.
        3 => 0x07_80_00,
        // SCSI host: SCSI bus controller.
        8 => 0x01_00_00,
        // GPU: other display controller.
        16 => 0x03_80_00,
        // Input: other input controller.
        18 => 0x09_80_00,
        // Socket: other network controller.
        19 => 0x02_80_00,
        // Crypto: other encryption controller.
        20 => 0x10_80_00,
        // Sound: audio device.
        25 => 0x04_01_00,
        // A device that fits no class.
        _ => 0x00_ff_00,
    }
}

/// The bytes of the BAR of a device with so many queues.
pub(super) fn bar_size(queues: usize) -> u64 {
    (NOTIFY + notify_size(queues)).next_power_of_two()
}

fn notify_size(queues: usize) -> u64 {
    // There are 65535 queues at most. No structure is empty.
    NOTIFY_MULTIPLIER * queues.max(1) as u64
}

/// Adds the BAR, and the capabilities of virtio that lead to what is in it.
pub(super) fn describe(
    description: &mut FunctionDescription,
    queues: usize,
) -> Result<(), kiln_pci::Error> {
    description.add_bar(Bar::memory32(bar_size(queues)))?;
    let multiplier = (NOTIFY_MULTIPLIER as u32).to_le_bytes();
    let notify_size = notify_size(queues);
    for (kind, offset, size, extra) in [
        (cfg_type::COMMON, COMMON, COMMON_SIZE, &[][..]),
        (cfg_type::NOTIFY, NOTIFY, notify_size, &multiplier),
        (cfg_type::ISR, ISR, 1, &[]),
        (cfg_type::DEVICE, DEVICE, DEVICE_SIZE, &[]),
    ] {
        let body = capability(kind, offset, size, extra);
        description.add_capability(&Capability::new(CAPABILITY_VENDOR, body))?;
    }
    let window = Capability::new(CAPABILITY_VENDOR, capability(cfg_type::PCI, 0, 0, &[0; 4]));
    description.add_capability(&window.writable(window::WRITABLE).hooked())?;
    Ok(())
}

/// What follows the id and the pointer to the next capability in `struct virtio_pci_cap`, and in
/// those that it is the beginning of.
fn capability(kind: u8, offset: u64, size: u64, extra: &[u8]) -> Vec<u8> {
    let len = 2 + CAPABILITY_BODY + extra.len();
    // cap_len, cfg_type, bar, id, and two bytes of padding.
    let mut body = vec![len as u8, kind, BAR as u8, 0, 0, 0];
    // Offsets and sizes are small.
    body.extend((offset as u32).to_le_bytes());
    body.extend((size as u32).to_le_bytes());
    body.extend(extra);
    body
}

/// The PCI configuration access capability (virtio 1.3, section 4.1.4.9): a window through which a
/// guest gets at BARs that it has not mapped.
pub(super) mod window {
    use super::CAPABILITY_BODY;

    /// Offsets into the capability.
    const BAR: usize = 4;
    const OFFSET: usize = 8;
    const LENGTH: usize = 12;
    pub(crate) const DATA: usize = 16;
    /// `bar`, `offset`, `length` and `pci_cfg_data`, in the body.
    pub(super) const WRITABLE: [u8; CAPABILITY_BODY + 4] = {
        let mut mask = [0xff; CAPABILITY_BODY + 4];
        // cap_len, cfg_type, id and padding stay.
        mask[0] = 0;
        mask[1] = 0;
        mask[3] = 0;
        mask[4] = 0;
        mask[5] = 0;
        mask
    };

    /// Where the guest has put the window: BAR, offset into it, and 1, 2 or 4 bytes at a multiple
    /// of as many. `None` where it is none of that.
    pub(crate) fn place(registers: &[u8]) -> Option<(usize, u64, usize)> {
        let word = |at: usize| -> Option<u32> {
            let bytes = registers.get(at..at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        let (offset, length) = (word(OFFSET)?, word(LENGTH)?);
        let fits = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length);
        fits.then_some((
            usize::from(*registers.get(BAR)?),
            u64::from(offset),
            length as usize,
        ))
    }
}
