//! What a PC has beside its virtio devices: serial port, i8042, RTC, IOAPIC, power management.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arbitrary::{Result, Unstructured};
use kiln_device_api::{BusDevice, InterruptLine, MsiMessage};
use kiln_devices::acpi::PowerManagement;
use kiln_devices::console::{Console, ConsoleInput, ConsoleOutput};
use kiln_devices::legacy::serial::Serial;
use kiln_devices::legacy::{I8042, IoApic, MsiRoute, MsiRouter, Rtc};
use kiln_io_thread::IoLoop;

const STEPS: usize = 300;
const USED: [u32; 6] = [1, 4, 5, 16, 20, 21];

/// Accesses these devices as the bytes say.
pub fn legacy(data: &[u8]) {
    let mut machine = Machine::new();
    let mut u = Unstructured::new(data);
    for _ in 0..STEPS {
        if u.is_empty() || machine.step(&mut u).is_err() {
            break;
        }
    }
    // The serial port's handler waits for nothing that is ready for ever.
    for turn in 0.. {
        assert!(turn < 100, "the serial port spins");
        if machine.io.turn(Some(Duration::ZERO)).unwrap() == 0 {
            break;
        }
    }
}

struct Nowhere;

impl InterruptLine for Nowhere {
    fn trigger(&self) {}
}

impl MsiRouter for Nowhere {
    fn set_routes(&self, routes: &[MsiRoute]) {
        assert!(routes.iter().all(|route| USED.contains(&route.gsi)));
    }
    fn send(&self, message: MsiMessage) -> bool {
        message.data & 1 == 0
    }
}

struct Machine {
    serial: Serial,
    i8042: Box<dyn BusDevice>,
    rtc: Box<dyn BusDevice>,
    ioapic: IoApic,
    power: Box<dyn BusDevice>,
    io: IoLoop,
}

impl Machine {
    fn new() -> Self {
        let io = IoLoop::new(|panic| panic!("{panic}")).unwrap();
        let (output, _) = ConsoleOutput::capture(4096);
        let input = ConsoleInput::bytes("what somebody types, and some more of it");
        let serial = Serial::new(Console::new(input, output), Arc::new(Nowhere)).unwrap();
        serial.connect(io.handle()).unwrap();
        let clock = || SystemTime::UNIX_EPOCH + Duration::from_secs(1_234_567_890);
        let rtc = Rtc::from_state(&Rtc::new().state(), clock);
        Self {
            serial,
            i8042: Box::new(std::sync::Mutex::new(I8042::new())),
            rtc: Box::new(std::sync::Mutex::new(rtc)),
            ioapic: IoApic::new(&USED, Arc::new(Nowhere)),
            power: Box::new(PowerManagement::new(Arc::new(Nowhere))),
            io,
        }
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let what: u8 = u.arbitrary()?;
        let offset = u64::from(u.arbitrary::<u8>()?);
        let width = [1, 2, 4, 8][usize::from(what >> 6)];
        let value: u32 = match u.arbitrary::<u8>()? {
            0xff => u.arbitrary()?,
            0xfe => u32::MAX,
            byte => byte.into(),
        };
        let mut data = [0; 8];
        data[..4].copy_from_slice(&value.to_le_bytes());
        let device: &dyn BusDevice = match what & 7 {
            0 => &self.serial,
            1 => &*self.i8042,
            2 => &*self.rtc,
            3 => &self.ioapic,
            4 => &*self.power,
            5 => {
                self.ioapic.set_level(offset as u32, value & 1 == 0);
                self.ioapic.end_of_interrupt(value as u8);
                return Ok(());
            }
            6 => {
                let turned = self.io.turn(Some(Duration::ZERO));
                turned.unwrap();
                return Ok(());
            }
            _ => {
                // What can be stored can be restored, and is the same then.
                let state = self.ioapic.state();
                self.ioapic = IoApic::from_state(&state, &USED, Arc::new(Nowhere));
                assert_eq!(self.ioapic.state(), state);
                return Ok(());
            }
        };
        // A guest may end its machine here.
        let _ = device.write(offset, &data[..width]);
        device.read(offset, &mut [0xff; 8][..width]);
        Ok(())
    }
}
