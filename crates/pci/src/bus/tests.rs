use super::*;
use crate::{
    Bar, Capability, FunctionDescription, Identity, IntxLine, LevelInterrupt, PciBusBuilder,
};

/// What a device hears of an access: kind, capability, offset and registers.
type Heard = (&'static str, u8, usize, Vec<u8>);

/// A function that keeps what was asked of it.
#[derive(Default)]
struct Device {
    accesses: Mutex<Vec<Heard>>,
    resets: Mutex<usize>,
}

impl PciFunction for Device {
    fn bar_read(&self, _bar: usize, _offset: u64, _data: &mut [u8]) {}

    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) -> ControlFlow<ExitRequest> {
        ControlFlow::Break(ExitRequest::Shutdown)
    }

    fn config_read(&self, access: &CapabilityAccess<'_>, data: &mut [u8]) {
        self.note("read", access);
        data[0] = 0x77;
    }

    fn config_write(
        &self,
        access: &CapabilityAccess<'_>,
        _data: &[u8],
    ) -> ControlFlow<ExitRequest> {
        self.note("write", access);
        ControlFlow::Break(ExitRequest::Reset)
    }

    fn reset(&self) {
        *self.resets.lock().unwrap() += 1;
    }
}

impl Device {
    fn note(&self, what: &'static str, access: &CapabilityAccess<'_>) {
        let registers = access.registers.to_vec();
        let access = (what, access.capability, access.offset, registers);
        self.accesses.lock().unwrap().push(access);
    }
}

struct NoLine;

impl LevelInterrupt for NoLine {
    fn set_level(&self, _asserted: bool) {}
}

fn described(name: &str) -> FunctionDescription {
    FunctionDescription::new(name, &Identity::default())
}

fn lines() -> [IntxLine; INTX_LINES] {
    [16, 17, 18, 19].map(|gsi| IntxLine {
        gsi,
        level: Arc::new(NoLine),
    })
}

fn slot(number: u8) -> PciAddress {
    PciAddress::new(number, 0).unwrap()
}

/// A bus of so many functions, each with a BAR and a pin.
fn bus_of(count: usize) -> Result<Arc<PciBus>, Error> {
    let mut builder = PciBusBuilder::new();
    builder.add_window(AddressSpace::Memory, 0xe000_0000..0xe100_0000)?;
    builder.set_intx_lines(lines());
    for number in 0..count {
        let mut description = described(&format!("device {number}"));
        description.add_bar(Bar::memory64(0x4000))?;
        description.add_intx();
        builder.add(description, Arc::new(Device::default()))?;
    }
    builder.build()
}

fn header_type(bus: &PciBus, address: PciAddress) -> u8 {
    let mut data = [0xff];
    bus.config_read(address, 0xe, &mut data);
    data[0]
}

#[test]
fn up_to_31_functions_have_a_slot_each() {
    let bus = bus_of(31).unwrap();
    for (index, function) in bus.functions().enumerate() {
        assert_eq!(function.address, slot(index as u8));
        assert_eq!(header_type(&bus, function.address), 0);
    }
}

#[test]
fn more_functions_share_slots_and_keep_their_order() {
    for count in [32, 40, 62, 63, 248] {
        let bus = bus_of(count).unwrap();
        let functions: Vec<_> = bus.functions().collect();
        assert_eq!(functions.len(), 1 + count);
        assert!(
            functions
                .windows(2)
                .all(|pair| pair[0].address < pair[1].address)
        );
        assert_eq!(functions[count].name, format!("device {}", count - 1));
        for function in &functions[1..] {
            let address = function.address;
            let alone = functions
                .iter()
                .all(|other| other.address == address || other.address.slot() != address.slot());
            let expected = if alone { 0 } else { 0x80 };
            assert_eq!(header_type(&bus, address), expected, "{address}");
            // A guest looks for other functions only where it finds the first one.
            assert_ne!(header_type(&bus, slot(address.slot())), 0xff);
            let (pin, gsi) = function.intx.unwrap();
            assert_eq!(pin, address.function() % 4);
            assert_eq!(gsi, 16 + u32::from((address.slot() + pin) % 4));
            assert_eq!(bus.intx_gsi(address.slot(), pin), Some(gsi));
            let mut registers = [0xff; 2];
            bus.config_read(address, 0x3c, &mut registers);
            assert_eq!(registers, [gsi as u8, pin + 1]);
        }
    }
}

#[test]
fn a_function_too_many_is_refused() {
    let error = bus_of(249).unwrap_err();
    assert_eq!(
        error.to_string(),
        "place `device 248`: a bus has room for 248 functions beside the host bridge"
    );
}

#[test]
fn bars_have_places_of_their_own_in_a_window_and_none_answers_at_first() {
    let bus = bus_of(40).unwrap();
    let mut addresses = Vec::new();
    for function in bus.functions().skip(1) {
        let mut data = [0; 8];
        bus.config_read(function.address, 0x10, &mut data);
        addresses.push(u64::from_le_bytes(data) & !0xf);
    }
    addresses.sort_unstable();
    assert!(addresses.iter().all(|at| at % 0x4000 == 0));
    assert!(addresses.windows(2).all(|pair| pair[1] - pair[0] >= 0x4000));
    assert!(addresses[0] >= 0xe000_0000 && addresses[39] < 0xe100_0000);
    for address in addresses {
        assert!(
            bus.bar_write(AddressSpace::Memory, address, &[0])
                .is_continue()
        );
    }
}

#[test]
fn a_bar_without_room_is_refused_by_name() {
    let refused = |space, range, bar| {
        let mut description = described("disk");
        description.add_bar(bar).unwrap();
        let mut builder = PciBusBuilder::new();
        builder.add_window(space, range).unwrap();
        builder
            .add(description, Arc::new(Device::default()))
            .unwrap();
        builder
            .build()
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    let memory = AddressSpace::Memory;
    let low = 0xe000_0000..0xe000_4000;
    let high = 1 << 40..1 << 41;
    let text = "place BAR 0 of `disk` (0x8000 bytes): no window for it has that much room";
    for (range, bar) in [
        (low.clone(), Bar::memory32(0x8000)),
        (low.clone(), Bar::memory64(0x8000)),
        (high.clone(), Bar::memory32(0x8000)),
    ] {
        assert_eq!(refused(memory, range, bar), Err(text.to_owned()), "{bar:?}");
    }
    assert_eq!(refused(memory, low, Bar::memory64(0x4000)), Ok(()));
    assert_eq!(refused(memory, high, Bar::memory64(1 << 39)), Ok(()));
    assert!(refused(memory, 0..0x4000, Bar::io(4)).is_err());
    assert_eq!(
        refused(AddressSpace::Io, 0xc000..0xc004, Bar::io(4)),
        Ok(())
    );
}

#[test]
fn windows_that_make_no_sense_are_refused() {
    let mut builder = PciBusBuilder::new();
    let memory = AddressSpace::Memory;
    builder
        .add_window(memory, 0xe000_0000..0xf000_0000)
        .unwrap();
    for (space, range, reason) in [
        (memory, 0x1000..0x1000, "it is empty"),
        (
            memory,
            0xf000_0000..0x1_0000_1000,
            "it lies on both sides of 4 GiB",
        ),
        (
            memory,
            0xefff_ffff..0xf800_0000,
            "it overlaps another window",
        ),
        (
            AddressSpace::Io,
            0xc000..0x1_0001,
            "it ends beyond port 0xffff",
        ),
    ] {
        let error = builder.add_window(space, range).unwrap_err();
        assert!(error.to_string().ends_with(reason), "{error}");
    }
    builder
        .add_window(memory, 0xf000_0000..0x1_0000_0000)
        .unwrap();
    builder.add_window(memory, 0x1_0000_0000..u64::MAX).unwrap();
    builder
        .add_window(AddressSpace::Io, 0xc000..0x1_0000)
        .unwrap();
    assert_eq!(builder.build().unwrap().windows().len(), 4);
}

#[test]
fn a_pin_needs_lines() {
    let mut description = described("disk");
    description.add_intx();
    let refused = PciBusBuilder::new().add(description, Arc::new(Device::default()));
    let name = "disk".to_owned();
    assert_eq!(refused, Err(Error::NoInterruptLines { name }));
}

fn hooked() -> (Arc<Device>, Arc<PciBus>) {
    let mut description = described("hooked");
    let plain = Capability::new(9, [4, 0]);
    let hooked = Capability::new(9, [6, 0, 0, 0])
        .writable([0, 0xff, 0, 0xf0])
        .hooked();
    description.add_capability(&plain).unwrap();
    description.add_capability(&hooked).unwrap();
    let device = Arc::new(Device::default());
    let mut builder = PciBusBuilder::new();
    builder.add(description, device.clone()).unwrap();
    (device, builder.build().unwrap())
}

#[test]
fn a_device_hears_of_accesses_to_its_hooked_capability_only() {
    let (device, bus) = hooked();
    let mut data = [0xff; 4];
    bus.config_read(slot(1), 0x40, &mut data);
    assert_eq!(data, [9, 0x44, 4, 0]);
    assert!(bus.config_write(slot(1), 0x40, &data).is_continue());
    bus.config_read(slot(1), 0x4c, &mut data);
    assert!(device.accesses.lock().unwrap().is_empty());

    // A write has reached the registers when the device hears of it, and its end is told on.
    let end = bus.config_write(slot(1), 0x47, &[0xab]);
    assert_eq!(end, ControlFlow::Break(ExitRequest::Reset));
    let end = bus.config_write(slot(1), 0x49, &[0xff]);
    assert_eq!(end, ControlFlow::Break(ExitRequest::Reset));
    bus.config_read(slot(1), 0x47, &mut data[..2]);
    let accesses = device.accesses.lock().unwrap();
    let written = vec![9, 0, 6, 0xab, 0, 0xf0];
    assert_eq!(
        *accesses,
        [
            ("write", 0x44, 3, vec![9, 0, 6, 0xab, 0, 0]),
            ("write", 0x44, 5, written.clone()),
            // An access across a border of double words comes in two parts.
            ("read", 0x44, 3, written.clone()),
            ("read", 0x44, 4, written),
        ]
    );
    assert_eq!(data[..2], [0x77, 0x77]);
}

#[test]
fn a_device_ends_the_machine_from_its_bar() {
    let bus = bus_of(1).unwrap();
    let _ = bus.config_write(slot(1), 4, &[2]);
    let mut data = [0; 4];
    bus.config_read(slot(1), 0x10, &mut data);
    let address = u64::from(u32::from_le_bytes(data) & !0xf);
    let end = bus.bar_write(AddressSpace::Memory, address, &[0]);
    assert_eq!(end, ControlFlow::Break(ExitRequest::Shutdown));
}

#[test]
fn a_reset_reaches_each_device_and_brings_the_registers_back() {
    let (device, bus) = hooked();
    let before = bus.state();
    let _ = bus.config_write(slot(1), 0x47, &[0xab]);
    let _ = bus.config_write(slot(1), 4, &[0xff, 0xff]);
    assert_ne!(bus.state(), before);
    bus.reset();
    assert_eq!(bus.state(), before);
    assert_eq!(*device.resets.lock().unwrap(), 1);
}

#[test]
fn a_state_of_another_bus_is_refused() {
    let bus = bus_of(2).unwrap();
    let error = bus.restore(&bus_of(3).unwrap().state()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "restore the bus: the state has 4 functions, and the bus 3"
    );
    let mut moved = bus.state();
    moved.functions.swap(1, 2);
    let error = bus.restore(&moved).unwrap_err();
    assert_eq!(
        error.to_string(),
        "restore function 00:01.0 (`device 0`): the state has it at 00:02.0"
    );
    let mut asserted = bus.state();
    asserted.functions[0].intx_asserted = true;
    assert!(bus.restore(&asserted).is_err());
    let mut vectors = bus.state();
    vectors.functions[1].msix = Some(crate::MsixState {
        vectors: vec![crate::VectorState {
            address: 0,
            data: 0,
            masked: true,
            pending: false,
        }],
    });
    assert!(bus.restore(&vectors).is_err());
    assert!(bus.restore(&bus.state()).is_ok());
}
