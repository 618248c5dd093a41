//! A PCI bus with one virtio device on it, and how a driver gets at that.

use std::fmt;
use std::sync::Arc;

use kiln_device_api::BusDevice;
use kiln_pci::{
    AddressSpace, FunctionDescription, IntxLine, LevelInterrupt, PciAddress, PciBus, PciBusBuilder,
};

use super::driver::register;
use crate::PciTransport;

/// Where the device is.
const ADDRESS: PciAddress = match PciAddress::new(1, 0) {
    Some(address) => address,
    None => panic!("slot 1 exists"),
};
/// Where memory BARs can be.
const WINDOW: std::ops::Range<u64> = 0xe000_0000..0xe100_0000;
const COMMAND: u16 = 0x04;
const BAR0: u16 = 0x10;
const CAPABILITIES: u16 = 0x34;
const VENDOR_SPECIFIC: u8 = 0x09;
const MSIX: u8 = 0x11;

/// A device on a PCI bus, and where a driver finds its structures.
pub struct TestPci {
    /// The transport, which is the function in slot 1.
    pub transport: Arc<PciTransport>,
    /// The bus. Its window for memory begins at 0xe000_0000.
    pub bus: Arc<PciBus>,
    window: Arc<dyn BusDevice>,
    /// Offsets into BAR 0.
    common: u64,
    isr: u64,
    device: u64,
    notify: u64,
    notify_multiplier: u64,
    /// Offsets into the configuration space.
    msix: u16,
    pci: u16,
}

impl TestPci {
    /// Puts a transport on a bus whose interrupt lines are all `level`.
    ///
    /// # Panics
    ///
    /// Where a driver could not find the structures.
    pub fn new(
        transport: Arc<PciTransport>,
        description: FunctionDescription,
        level: Arc<dyn LevelInterrupt>,
    ) -> Self {
        let mut builder = PciBusBuilder::new();
        builder.add_window(AddressSpace::Memory, WINDOW).unwrap();
        builder.set_intx_lines([16, 17, 18, 19].map(|gsi| IntxLine {
            gsi,
            level: Arc::clone(&level),
        }));
        builder
            .add(description, Arc::clone(&transport) as _)
            .unwrap();
        let bus = builder.build().unwrap();
        let window = Arc::clone(&bus.windows()[0].device);
        let mut found = Self {
            transport,
            bus,
            window,
            common: u64::MAX,
            isr: u64::MAX,
            device: u64::MAX,
            notify: u64::MAX,
            notify_multiplier: 0,
            msix: 0,
            pci: 0,
        };
        found.find_structures();
        found
    }

    fn find_structures(&mut self) {
        let mut at = u16::from(self.config::<1>(CAPABILITIES)[0]);
        while at != 0 {
            let [id, next, len, kind, bar, ..] = self.config::<8>(at);
            let [offset, size, multiplier] =
                [8, 12, 16].map(|word| u64::from(u32::from_le_bytes(self.config(at + word))));
            match (id, kind, len) {
                (MSIX, ..) => self.msix = at,
                (VENDOR_SPECIFIC, 1, 16) if size == 64 => self.common = offset,
                (VENDOR_SPECIFIC, 2, 20) => {
                    (self.notify, self.notify_multiplier) = (offset, multiplier);
                }
                (VENDOR_SPECIFIC, 3, 16) if size == 1 => self.isr = offset,
                (VENDOR_SPECIFIC, 4, 16) if size >= 256 => self.device = offset,
                (VENDOR_SPECIFIC, 5, 20) => self.pci = at,
                _ => panic!("capability {id:#x} of kind {kind}, {len} bytes"),
            }
            assert!(id == MSIX || bar == 0);
            at = u16::from(next);
        }
        let all = [self.common, self.isr, self.device, self.notify];
        assert!(all.iter().all(|offset| *offset < 1 << 20), "{all:x?}");
        assert!(self.msix != 0 && self.pci != 0);
    }

    /// The offset of the common configuration into BAR 0.
    pub fn common(&self) -> u64 {
        self.common
    }

    /// The offset of the ISR status into BAR 0.
    pub fn isr(&self) -> u64 {
        self.isr
    }

    /// The offset of the device's configuration into BAR 0.
    pub fn device(&self) -> u64 {
        self.device
    }

    /// The offset of a queue's notification register into BAR 0, where its number for that is its
    /// index.
    pub fn notify(&self, queue: u16) -> u64 {
        self.notify + self.notify_multiplier * u64::from(queue)
    }

    /// The offset of the MSI-X capability.
    pub fn msix_capability(&self) -> u16 {
        self.msix
    }

    /// The offset of the configuration access capability.
    pub fn pci_capability(&self) -> u16 {
        self.pci
    }

    /// Reads configuration space.
    pub fn config<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut data = [0xff; N];
        self.bus.config_read(ADDRESS, offset, &mut data);
        data
    }

    /// Writes configuration space.
    pub fn set_config(&self, offset: u16, data: &[u8]) {
        assert!(self.bus.config_write(ADDRESS, offset, data).is_continue());
    }

    /// Lets the device answer in its BAR.
    pub fn enable_memory(&self) {
        self.set_config(COMMAND, &[0x06, 0]);
    }

    /// Moves BAR 0.
    pub fn move_bar(&self, address: u32) {
        self.set_config(BAR0, &address.to_le_bytes());
    }

    /// Unmasks all vectors, with their numbers as the messages' data, and enables MSI-X.
    pub fn enable_msix(&self, vectors: u16) {
        let table = u32::from_le_bytes(self.config(self.msix + 4));
        assert_eq!(table & 7, 0, "the table is in BAR 0");
        for vector in 0..vectors {
            let entry = u64::from(table) + 16 * u64::from(vector);
            let words = [0xfee0_0000, 0, u32::from(vector), 0];
            for (word, at) in words.iter().zip((entry..).step_by(4)) {
                self.write(at, &word.to_le_bytes());
            }
        }
        self.set_config(self.msix + 2, &0x8000_u16.to_le_bytes());
    }

    /// Disables MSI-X: interrupts come by the pin.
    pub fn disable_msix(&self) {
        self.set_config(self.msix + 2, &[0, 0]);
    }

    /// Where an offset into BAR 0 is in the window; `None` where the BAR is not in it.
    fn place(&self, offset: u64) -> Option<u64> {
        let bar = u64::from(u32::from_le_bytes(self.config(BAR0)) & !0xf);
        WINDOW
            .contains(&(bar + offset))
            .then(|| bar + offset - WINDOW.start)
    }

    /// Reads BAR 0, wherever it is; nothing answers where it is not in the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(place) = self.place(offset) {
            self.window.read(place, data);
        }
    }

    /// Writes BAR 0, wherever it is.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let Some(place) = self.place(offset) {
            assert!(self.window.write(place, data).is_continue());
        }
    }

    /// Reads an address of memory.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        self.window.read(address - WINDOW.start, data);
    }

    /// Writes an address of memory.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        let end = self.window.write(address - WINDOW.start, data);
        assert!(end.is_continue());
    }

    /// Gives the configuration vector 0, as a driver does after a reset.
    pub(super) fn route_config(&self) {
        self.write(self.common + 0x10, &[0, 0]);
    }

    /// Gives the selected queue the vector behind that of the queue before it.
    pub(super) fn route_queue(&self, queue: u32) {
        let vector = (queue as u16).wrapping_add(1);
        self.write(self.common + 0x1a, &vector.to_le_bytes());
    }

    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.read(self.device + offset, data);
    }

    pub(super) fn write_config(&self, offset: u64, data: &[u8]) {
        self.write(self.device + offset, data);
    }

    /// Where what corresponds to a register of the MMIO transport is in BAR 0, and its width.
    fn field(&self, register: u64) -> Option<(u64, usize)> {
        let (offset, width) = match register {
            register::DEVICE_FEATURES_SEL => (0x00, 4),
            register::DEVICE_FEATURES => (0x04, 4),
            register::DRIVER_FEATURES_SEL => (0x08, 4),
            register::DRIVER_FEATURES => (0x0c, 4),
            register::STATUS => (0x14, 1),
            register::CONFIG_GENERATION => (0x15, 1),
            register::QUEUE_SEL => (0x16, 2),
            // After a reset the size is the largest.
            register::QUEUE_SIZE_MAX | register::QUEUE_SIZE => (0x18, 2),
            register::QUEUE_READY => (0x1c, 2),
            // The halves of the addresses.
            0x80 | 0x84 => (0x20 + register - 0x80, 4),
            0x90 | 0x94 => (0x28 + register - 0x90, 4),
            0xa0 | 0xa4 => (0x30 + register - 0xa0, 4),
            register::QUEUE_RESET => (0x3a, 2),
            register::INTERRUPT_STATUS => return Some((self.isr, 1)),
            _ => return None,
        };
        Some((self.common + offset, width))
    }

    pub(super) fn read_register(&self, register: u64, data: &mut [u8]) {
        if let Some((offset, width)) = self.field(register)
            && data.len() == 4
        {
            data.fill(0);
            self.read(offset, &mut data[..width]);
        }
    }

    pub(super) fn write_register(&self, register: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        if register == register::QUEUE_NOTIFY {
            if let Ok(queue) = u16::try_from(u32::from_le_bytes(bytes))
                && self.notify(queue) < 1 << 20
            {
                self.write(self.notify(queue), &queue.to_le_bytes());
            }
        } else if let Some((offset, width)) = self.field(register)
            && bytes[width..].iter().all(|byte| *byte == 0)
        {
            self.write(offset, &bytes[..width]);
        }
    }
}

impl fmt::Debug for TestPci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestPci")
            .field("transport", &self.transport)
            .field("bus", &self.bus)
            .finish_non_exhaustive()
    }
}
