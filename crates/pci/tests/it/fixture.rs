//! A bus with one function that has one of everything, and what a guest does to get at it.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_device_api::{BusDevice, ExitRequest};
use kiln_pci::{
    AddressSpace, Bar, BarObserver, Capability, ConfigPorts, Ecam, ExtendedCapability,
    FunctionDescription, Identity, IntxLine, IntxPin, LevelInterrupt, MsiMessage, Msix,
    MsixPlacement, MsixSink, PciAddress, PciBus, PciBusBuilder, PciFunction,
};

/// Where the function is.
pub(crate) const ADDRESS: PciAddress = match PciAddress::new(1, 0) {
    Some(address) => address,
    None => panic!("slot 1 exists"),
};
pub(crate) const MEMORY_32: std::ops::Range<u64> = 0xe000_0000..0xe100_0000;
pub(crate) const MEMORY_64: std::ops::Range<u64> = 0x10_0000_0000..0x10_1000_0000;
pub(crate) const IO: std::ops::Range<u64> = 0xc000..0xd000;
pub(crate) const VECTORS: u16 = 3;
/// The BARs, by the numbers of their registers.
pub(crate) const BAR_32: usize = 0;
pub(crate) const BAR_64: usize = 1;
pub(crate) const BAR_IO: usize = 3;
/// Where the structures of MSI-X are in the 64-bit BAR.
pub(crate) const TABLE_OFFSET: u64 = 0x1000;
pub(crate) const PENDING_OFFSET: u64 = 0x2000;

/// Answers a read with its BAR's number in the upper half of each byte, and the low bits of the
/// offset in the lower.
#[derive(Default)]
pub(crate) struct Echo {
    pub(crate) writes: Mutex<Vec<(usize, u64, Vec<u8>)>>,
}

pub(crate) fn echo(bar: usize, offset: u64) -> u8 {
    (bar as u8) << 4 | (offset as u8 & 0xf)
}

impl PciFunction for Echo {
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = echo(bar, at);
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        let mut writes = self.writes.lock().unwrap();
        // Long runs are not to grow without bound.
        writes.truncate(1000);
        writes.push((bar, offset, data.to_vec()));
        ControlFlow::Continue(())
    }

    fn reset(&self) {}
}

/// The moves that an observer was told of.
#[derive(Default)]
pub(crate) struct Moves(pub(crate) Mutex<Vec<(usize, Option<u64>)>>);

impl BarObserver for Moves {
    fn bar_moved(&self, bar: usize, address: Option<u64>) {
        let mut moves = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        moves.push((bar, address));
    }
}

#[derive(Default)]
pub(crate) struct Messages(pub(crate) Mutex<Vec<(u16, MsiMessage)>>);

impl MsixSink for Messages {
    fn connect(&self, _vector: u16, _message: MsiMessage) {}
    fn disconnect(&self, _vector: u16) {}
    fn signal(&self, vector: u16, message: MsiMessage) {
        self.0.lock().unwrap().push((vector, message));
    }
}

#[derive(Default)]
pub(crate) struct Level(pub(crate) Mutex<Vec<bool>>);

impl LevelInterrupt for Level {
    fn set_level(&self, asserted: bool) {
        self.0.lock().unwrap().push(asserted);
    }
}

pub(crate) struct Fixture {
    pub(crate) bus: Arc<PciBus>,
    pub(crate) ecam: Ecam,
    pub(crate) ports: ConfigPorts,
    pub(crate) echo: Arc<Echo>,
    pub(crate) moves: Arc<Moves>,
    pub(crate) msix: Arc<Msix>,
    pub(crate) messages: Arc<Messages>,
    pub(crate) pin: Arc<IntxPin>,
    pub(crate) level: Arc<Level>,
    memory_32: Arc<dyn BusDevice>,
    memory_64: Arc<dyn BusDevice>,
    io: Arc<dyn BusDevice>,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let identity = Identity {
            vendor_id: 0x1af4,
            device_id: 0x1042,
            revision: 0x01,
            class: 0x01_80_5a,
            subsystem_vendor_id: 0x1af4,
            subsystem_id: 0x1100,
        };
        let messages = Arc::new(Messages::default());
        let msix = Arc::new(Msix::new(VECTORS, messages.clone()).unwrap());
        let moves = Arc::new(Moves::default());
        let mut description = FunctionDescription::new("echo", &identity);
        assert_eq!(description.add_bar(Bar::memory32(0x1000)).unwrap(), BAR_32);
        let bar = Bar::memory64(0x4000).prefetchable();
        assert_eq!(description.add_bar(bar).unwrap(), BAR_64);
        assert_eq!(description.add_bar(Bar::io(0x20)).unwrap(), BAR_IO);
        let vendor =
            Capability::new(0x09, [8, 1, 2, 3, 4, 5]).writable([0, 0, 0xff, 0x0f, 0, 0x80]);
        assert_eq!(description.add_capability(&vendor).unwrap(), 0x40);
        let placement = MsixPlacement {
            table_bar: BAR_64,
            table_offset: TABLE_OFFSET as u32,
            pending_bar: BAR_64,
            pending_offset: PENDING_OFFSET as u32,
        };
        assert_eq!(description.add_msix(msix.clone(), placement).unwrap(), 0x48);
        let serial = ExtendedCapability::new(0x0003, 1, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(description.add_extended_capability(&serial).unwrap(), 0x100);
        let vendor = ExtendedCapability::new(0x000b, 2, [9, 9, 9, 9]);
        assert_eq!(description.add_extended_capability(&vendor).unwrap(), 0x10c);
        let pin = description.add_intx();
        description.set_bar_observer(moves.clone());

        let level = Arc::new(Level::default());
        let echo = Arc::new(Echo::default());
        let mut builder = PciBusBuilder::new();
        builder.add_window(AddressSpace::Memory, MEMORY_32).unwrap();
        builder.add_window(AddressSpace::Memory, MEMORY_64).unwrap();
        builder.add_window(AddressSpace::Io, IO).unwrap();
        builder.set_intx_lines([16, 17, 18, 19].map(|gsi| IntxLine {
            gsi,
            level: level.clone(),
        }));
        builder.add(description, echo.clone()).unwrap();
        let bus = builder.build().unwrap();
        let device = |start| {
            let windows = bus.windows();
            let window = windows.iter().find(|window| window.range.start == start);
            window.unwrap().device.clone()
        };
        Self {
            ecam: Ecam::new(bus.clone()),
            ports: ConfigPorts::new(bus.clone()),
            memory_32: device(MEMORY_32.start),
            memory_64: device(MEMORY_64.start),
            io: device(IO.start),
            echo,
            moves,
            msix,
            messages,
            pin,
            level,
            bus,
        }
    }

    /// Reads a double word of the function's registers.
    pub(crate) fn config(&self, offset: u16) -> u32 {
        let mut data = [0xff; 4];
        self.bus.config_read(ADDRESS, offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn set_config(&self, offset: u16, value: u32) {
        let data = value.to_le_bytes();
        assert!(self.bus.config_write(ADDRESS, offset, &data).is_continue());
    }

    pub(crate) fn set_command(&self, value: u16) {
        let data = value.to_le_bytes();
        assert!(self.bus.config_write(ADDRESS, 4, &data).is_continue());
    }

    fn window(&self, address: u64) -> Option<(&dyn BusDevice, u64)> {
        [
            (MEMORY_32, &self.memory_32),
            (MEMORY_64, &self.memory_64),
            (IO, &self.io),
        ]
        .into_iter()
        .find(|(range, _)| range.contains(&address))
        .map(|(range, device)| (&**device, address - range.start))
    }

    /// Reads as an instruction does: at a place in a window, or where nothing is.
    pub(crate) fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0xff; N];
        if let Some((window, offset)) = self.window(address) {
            window.read(offset, &mut data);
        }
        data
    }

    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((window, offset)) = self.window(address) {
            assert!(window.write(offset, data).is_continue());
        }
    }
}

/// A small generator of numbers that are the same in each run (xorshift64*).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }
}
