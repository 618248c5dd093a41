//! A PCI bus: configuration space through both mechanisms, BARs that move, MSI-X, interrupt lines.

use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex};

use arbitrary::{Result, Unstructured};
use kiln_device_api::{BusDevice, ExitRequest, MsiMessage};
use kiln_pci::{
    AddressSpace, Bar, BarObserver, Capability, ConfigPorts, Ecam, ExtendedCapability,
    FunctionDescription, Identity, IntxLine, IntxPin, LevelInterrupt, Msix, MsixPlacement,
    MsixSink, PciAddress, PciBus, PciBusBuilder, PciFunction,
};

const MEMORY: Range<u64> = 0xe000_0000..0xe100_0000;
const HIGH_MEMORY: Range<u64> = 0x10_0000_0000..0x10_1000_0000;
const IO: Range<u64> = 0xc000..0xd000;
const VECTORS: u16 = 3;
const STEPS: usize = 300;

/// Accesses a bus with two functions as the bytes say.
pub fn pci(data: &[u8]) {
    let mut machine = Machine::new();
    let mut u = Unstructured::new(data);
    for _ in 0..STEPS {
        if u.is_empty() || machine.step(&mut u).is_err() {
            break;
        }
    }
    machine.check();
}

struct Echo;

impl PciFunction for Echo {
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = (bar as u8) << 4 | (at as u8 & 0xf);
        }
    }

    fn bar_write(&self, _: usize, _: u64, _: &[u8]) -> ControlFlow<ExitRequest> {
        ControlFlow::Continue(())
    }

    fn reset(&self) {}
}

/// Where BARs are, as an observer sees it.
#[derive(Default)]
struct Places(Mutex<[Option<u64>; 6]>);

impl BarObserver for Places {
    fn bar_moved(&self, bar: usize, address: Option<u64>) {
        self.0.lock().unwrap()[bar] = address;
    }
}

/// Vectors are connected and disconnected in turns, and signalled while they are connected.
#[derive(Default)]
struct Sink(Mutex<[bool; VECTORS as usize]>);

impl MsixSink for Sink {
    fn connect(&self, vector: u16, _: MsiMessage) {
        self.0.lock().unwrap()[usize::from(vector)] = true;
    }
    fn disconnect(&self, vector: u16) {
        self.0.lock().unwrap()[usize::from(vector)] = false;
    }
    fn signal(&self, vector: u16, _: MsiMessage) {
        assert!(vector < VECTORS);
    }
}

impl LevelInterrupt for Sink {
    fn set_level(&self, _: bool) {}
}

struct Machine {
    bus: Arc<PciBus>,
    ecam: Ecam,
    ports: ConfigPorts,
    windows: Vec<(Range<u64>, Arc<dyn BusDevice>)>,
    msix: Arc<Msix>,
    pin: Arc<IntxPin>,
    places: Arc<Places>,
}

impl Machine {
    fn new() -> Self {
        let sink = Arc::new(Sink::default());
        let msix = Arc::new(Msix::new(VECTORS, sink.clone()).unwrap());
        let places = Arc::new(Places::default());
        let mut builder = PciBusBuilder::new();
        for (space, range) in [
            (AddressSpace::Memory, MEMORY),
            (AddressSpace::Memory, HIGH_MEMORY),
            (AddressSpace::Io, IO),
        ] {
            builder.add_window(space, range).unwrap();
        }
        builder.set_intx_lines([16, 17, 18, 19].map(|gsi| IntxLine {
            gsi,
            level: sink.clone(),
        }));
        let (first, pin) = first(&msix, &places);
        builder.add(first, Arc::new(Echo)).unwrap();
        let mut second = FunctionDescription::new("second", &identity(0x1044));
        second.add_bar(Bar::memory32(0x2000)).unwrap();
        builder.add(second, Arc::new(Echo)).unwrap();
        let bus = builder.build().unwrap();
        let windows = bus
            .windows()
            .into_iter()
            .map(|window| (window.range, window.device));
        Self {
            ecam: Ecam::new(bus.clone()),
            ports: ConfigPorts::new(bus.clone()),
            windows: windows.collect(),
            bus,
            msix,
            pin,
            places,
        }
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let what: u8 = u.arbitrary()?;
        let near: u8 = u.arbitrary()?;
        let width = [1, 2, 4, 8][usize::from(what >> 6)];
        let value: u64 = match u.arbitrary::<u8>()? {
            0xff => u.arbitrary()?,
            0xfe => u64::MAX,
            0xfd => MEMORY.start + u64::from(near) * 0x1000,
            0xfc => HIGH_MEMORY.start >> 32,
            byte => byte.into(),
        };
        let data = &value.to_le_bytes()[..width];
        match what & 0xf {
            // The registers of the two functions, most of them those that matter.
            0..=4 => {
                let slot = u64::from(what >> 5 & 1) + 1;
                access(&self.ecam, slot << 15 | u64::from(near), data);
            }
            5 => access(&self.ecam, u.arbitrary::<u32>()?.into(), data),
            6 => {
                let slot = u32::from(what >> 5 & 1) + 1;
                let register = 0x8000_0000 | slot << 11 | u32::from(near);
                access(&self.ports, 0, &register.to_le_bytes());
                access(&self.ports, 4 + u64::from(near & 3), data);
            }
            7 => access(&self.ports, u64::from(near % 10), data),
            8..=10 => self.access_bar(usize::from(what & 3), near, data),
            11 => {
                let index = usize::from(near) % self.windows.len();
                let (range, device) = &self.windows[index];
                let offset = u.arbitrary::<u64>()? % (range.end - range.start);
                access(&**device, offset, data);
            }
            12 => drop(self.msix.trigger(near.into())),
            13 => self.pin.set(near & 1 == 0),
            14 => {
                let address = PciAddress::new(near & 0x1f, near >> 5);
                if let Some(address) = address {
                    self.bus.set_status_errors(address, value as u16);
                }
            }
            _ if near == 0 => self.bus.reset(),
            _ => self.move_to_another(),
        }
        Ok(())
    }

    /// An access to a BAR where its observer saw it go: the function answers there.
    fn access_bar(&self, bar: usize, near: u8, data: &[u8]) {
        let Some(address) = self.places.0.lock().unwrap()[bar] else {
            return;
        };
        let window = self
            .windows
            .iter()
            .find(|(range, _)| range.contains(&address));
        let (range, device) = window.expect("a BAR that answers is in a window");
        let offset = address - range.start;
        // The structures of MSI-X, in their BAR.
        let within = u64::from(near) + if bar == 1 { 0x1000 } else { 0 };
        access(&**device, offset + within, data);
        let mut answer = [0];
        device.read(offset + 5, &mut answer);
        assert_eq!(answer, [(bar as u8) << 4 | 5]);
    }

    /// Stores the state, and goes on with another bus in it.
    fn move_to_another(&mut self) {
        let state = self.bus.state();
        let other = Self::new();
        other.bus.restore(&state).unwrap();
        other.pin.set(self.pin.is_asserted());
        for (ours, theirs) in state.functions.iter().zip(&other.bus.state().functions) {
            assert_eq!(ours.config, theirs.config);
        }
        *self = other;
    }

    /// A reset makes it as new.
    fn check(&self) {
        self.pin.set(false);
        self.bus.reset();
        assert_eq!(self.bus.state(), Self::new().bus.state());
    }
}

fn first(msix: &Arc<Msix>, places: &Arc<Places>) -> (FunctionDescription, Arc<IntxPin>) {
    let mut first = FunctionDescription::new("first", &identity(0x1042));
    first.add_bar(Bar::memory32(0x1000)).unwrap();
    first.add_bar(Bar::memory64(0x4000).prefetchable()).unwrap();
    first.add_bar(Bar::io(0x20)).unwrap();
    let vendor = Capability::new(0x09, [8, 1, 2, 3, 4, 5]).writable([0, 0, 0xff, 0x0f, 0, 0x80]);
    first.add_capability(&vendor).unwrap();
    let placement = MsixPlacement {
        table_bar: 1,
        table_offset: 0x1000,
        pending_bar: 1,
        pending_offset: 0x2000,
    };
    first.add_msix(msix.clone(), placement).unwrap();
    let serial = ExtendedCapability::new(3, 1, [1, 2, 3, 4, 5, 6, 7, 8]);
    first.add_extended_capability(&serial).unwrap();
    first.set_bar_observer(places.clone());
    let pin = first.add_intx();
    (first, pin)
}

fn identity(device_id: u16) -> Identity {
    Identity {
        vendor_id: 0x1af4,
        device_id,
        revision: 1,
        class: 0x01_80_00,
        subsystem_vendor_id: 0x1af4,
        subsystem_id: 0x1100,
    }
}

/// Writes, and reads what is there then. Only the reset port ends a machine, as a guest may.
fn access(device: &dyn BusDevice, offset: u64, data: &[u8]) {
    let _ = device.write(offset, data);
    device.read(offset, &mut [0xff; 8][..data.len()]);
}
