//! The differentiated system description table: the devices, as AML (ACPI 6.5 chapter 20).

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Arg, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace,
    Package, Path, ResourceTemplate, Return, Scope, Store, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{
    AcpiConfig, OEM_ID, OEM_REVISION, OEM_TABLE_ID, SerialPort, VirtioMmio, pci, to_bytes,
};
use crate::layout::{
    ACPI_S5_SLEEP_TYPE, GED_GSI, GED_PORT, GED_POWER_BUTTON, I8042_PORT, I8042_PORT_COUNT,
    PVPANIC_PORT, RTC_PORT, RTC_PORT_COUNT, SERIAL_PORT_COUNT,
};

/// The names of virtio-mmio devices count in three hexadecimal digits.
pub(super) const MAX_VIRTIO_MMIO: usize = 0x1000;

/// Two: integers are of 64 bits.
const REVISION: u8 = 2;
/// The device is present, enabled, shown and working (ACPI 6.5 section 6.3.7).
const STATUS_PRESENT: u8 = 0xf;
/// The power button was pressed (ACPI 6.5 section 5.6.6).
const NOTIFY_PRESSED: u8 = 0x80;

/// The table's bytes.
pub(super) fn build(config: &AcpiConfig) -> Vec<u8> {
    let mut aml = to_bytes(&Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&ACPI_S5_SLEEP_TYPE, &ACPI_S5_SLEEP_TYPE, &ZERO, &ZERO]),
    ));
    aml.extend(Scope::raw(Path::new("_SB_"), devices(config)));
    let mut table = Sdt::new(*b"DSDT", 36, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&aml);
    table.as_slice().to_vec()
}

/// All devices, in the order in which a guest finds them.
fn devices(config: &AcpiConfig) -> Vec<u8> {
    let mut aml = Vec::new();
    if let Some(port) = config.serial {
        aml.extend(serial(port));
    }
    if config.rtc {
        aml.extend(rtc());
    }
    if config.i8042_keyboard {
        aml.extend(keyboard());
    }
    if config.pvpanic {
        aml.extend(pvpanic());
    }
    if config.power_button {
        aml.extend(power_button());
        aml.extend(event_device());
    }
    for (number, device) in config.virtio_mmio.iter().enumerate() {
        aml.extend(virtio_mmio(number, *device));
    }
    if let Some(root) = &config.pci {
        aml.extend(pci::devices(root));
    }
    aml
}

/// An edge-triggered interrupt, active high, that nobody else uses.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

pub(super) fn ports(first: u16, count: u16) -> IO {
    IO::new(first, first, 1, count as u8)
}

pub(super) fn resources(children: Vec<&dyn Aml>) -> Name {
    Name::new(Path::new("_CRS"), &ResourceTemplate::new(children))
}

pub(super) fn hardware_id(id: &dyn Aml) -> Name {
    Name::new(Path::new("_HID"), id)
}

pub(super) fn unique_id(id: &dyn Aml) -> Name {
    Name::new(Path::new("_UID"), id)
}

fn serial(serial: SerialPort) -> Vec<u8> {
    to_bytes(&Device::new(
        Path::new("COM1"),
        vec![
            &hardware_id(&EISAName::new("PNP0501")),
            &unique_id(&ZERO),
            &resources(vec![
                &ports(serial.port, SERIAL_PORT_COUNT),
                &interrupt(serial.gsi),
            ]),
        ],
    ))
}

fn rtc() -> Vec<u8> {
    to_bytes(&Device::new(
        Path::new("RTC_"),
        vec![
            &hardware_id(&EISAName::new("PNP0B00")),
            &resources(vec![&ports(RTC_PORT, RTC_PORT_COUNT)]),
        ],
    ))
}

/// The two ports of an i8042, and the keyboard's interrupt of a PC.
fn keyboard() -> Vec<u8> {
    const KEYBOARD_GSI: u32 = 1;
    let command = I8042_PORT + I8042_PORT_COUNT - 1;
    to_bytes(&Device::new(
        Path::new("PS2K"),
        vec![
            &hardware_id(&EISAName::new("PNP0303")),
            &resources(vec![
                &ports(I8042_PORT, 1),
                &ports(command, 1),
                &interrupt(KEYBOARD_GSI),
            ]),
        ],
    ))
}

/// A byte register at a port, as a field that methods can read and write.
fn byte_register(region: &str, name: &str, port: &u16) -> Vec<u8> {
    let mut aml = to_bytes(&OpRegion::new(
        Path::new(region),
        OpRegionSpace::SystemIO,
        port,
        &1_u8,
    ));
    let mut field = [0; 4];
    field.copy_from_slice(name.as_bytes());
    aml.extend(to_bytes(&Field::new(
        Path::new(region),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(field, 8)],
    )));
    aml
}

/// AML that is bytes already.
pub(super) struct Raw(pub(super) Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// The port that a panicking guest writes to. `RDPT` reads which events the host takes, `WRPT`
/// reports one; drivers that know the device use its port.
fn pvpanic() -> Vec<u8> {
    to_bytes(&Device::new(
        Path::new("PEVT"),
        vec![
            &hardware_id(&"QEMU0001"),
            &Name::new(Path::new("_STA"), &STATUS_PRESENT),
            &resources(vec![&ports(PVPANIC_PORT, 1)]),
            &Raw(byte_register("PEOR", "PEPT", &PVPANIC_PORT)),
            &Method::new(
                Path::new("RDPT"),
                0,
                true,
                vec![
                    &Store::new(&Local(0), &Path::new("PEPT")),
                    &Return::new(&Local(0)),
                ],
            ),
            &Method::new(
                Path::new("WRPT"),
                1,
                true,
                vec![&Store::new(&Path::new("PEPT"), &Arg(0))],
            ),
        ],
    ))
}

fn power_button() -> Vec<u8> {
    to_bytes(&Device::new(
        Path::new("PWRB"),
        vec![&hardware_id(&EISAName::new("PNP0C0C")), &unique_id(&ZERO)],
    ))
}

/// The generic event device (ACPI 6.5 section 5.6.9). Its method reads the register once: a read
/// clears the pending events, so each is handled once.
fn event_device() -> Vec<u8> {
    let events = Local(0);
    to_bytes(&Device::new(
        Path::new("GED_"),
        vec![
            &hardware_id(&"ACPI0013"),
            &unique_id(&ZERO),
            &resources(vec![&interrupt(GED_GSI)]),
            &Raw(byte_register("EVOR", "EVST", &GED_PORT)),
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![
                    &Store::new(&events, &Path::new("EVST")),
                    &If::new(
                        &And::new(&ZERO, &events, &GED_POWER_BUTTON),
                        vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &NOTIFY_PRESSED)],
                    ),
                ],
            ),
        ],
    ))
}

fn virtio_mmio(number: usize, device: VirtioMmio) -> Vec<u8> {
    let registers = Memory32Fixed::new(true, device.address as u32, device.size as u32);
    to_bytes(&Device::new(
        Path::new(&format!("V{number:03X}")),
        vec![
            &hardware_id(&"LNRO0005"),
            &unique_id(&number),
            // It reads and writes memory as the processors see it.
            &Name::new(Path::new("_CCA"), &1_u8),
            &resources(vec![&registers, &interrupt(device.gsi)]),
        ],
    ))
}
