//! The address map of the machine: where RAM, devices and boot structures lie.
//!
//! Guest physical addresses and sizes are in bytes, ports are x86 I/O ports, and interrupts are
//! global system interrupts (GSI), which are the pins of the one IOAPIC.

/// Where the hole for devices below 4 GiB begins: RAM fills the space below it first, and goes on
/// at [`HIGH_RAM_START`].
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// Where RAM goes on above the hole for devices.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// Where virtio-mmio devices are placed.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// The bytes that the virtio-mmio devices may take together.
pub const VIRTIO_MMIO_SIZE: u64 = 0x0100_0000;
/// The bytes that each virtio-mmio device takes.
pub const VIRTIO_MMIO_DEVICE_SIZE: u64 = 0x1000;

/// Where the IOAPIC is (the architecture's usual place).
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// The bytes of the IOAPIC's window.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// The pins of the IOAPIC.
pub const IOAPIC_PINS: u32 = 24;
/// Where each vCPU sees its local APIC.
pub const LAPIC_START: u64 = 0xfee0_0000;

/// Three pages that KVM needs on Intel processors for its task state segment.
pub const KVM_TSS_START: u64 = 0xfffb_d000;
/// The page that KVM needs on Intel processors for its identity map.
pub const KVM_IDENTITY_MAP_START: u64 = 0xfffb_c000;

/// The first serial port, COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The ports of a 16550.
pub const SERIAL_PORT_COUNT: u16 = 8;
/// The interrupt of COM1.
pub const SERIAL_GSI: u32 = 4;

/// The i8042's data port; its command port is four further.
pub const I8042_PORT: u16 = 0x60;
/// The ports from the i8042's data port to its command port.
pub const I8042_PORT_COUNT: u16 = 5;

/// The CMOS index port; the data port follows.
pub const RTC_PORT: u16 = 0x70;
/// The ports of the CMOS.
pub const RTC_PORT_COUNT: u16 = 2;

/// The pvpanic port, that a panicking guest kernel writes to.
pub const PVPANIC_PORT: u16 = 0x505;

/// ACPI sleep control register (hardware-reduced ACPI, ACPI 6.5 section 4.8.3.7). The ports that
/// follow are those of the one ACPI device.
pub const ACPI_SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const ACPI_SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register: [`ACPI_RESET_VALUE`] written here resets the machine.
pub const ACPI_RESET_PORT: u16 = 0x602;
/// What the guest writes to [`ACPI_RESET_PORT`].
pub const ACPI_RESET_VALUE: u8 = 1;
/// The generic event device's register: a read gives the pending events and clears them.
pub const GED_PORT: u16 = 0x603;
/// The bit of [`GED_PORT`] that says the power button was pressed.
pub const GED_POWER_BUTTON: u8 = 1;
/// The ports of the ACPI device, from [`ACPI_SLEEP_CONTROL_PORT`].
pub const ACPI_PORT_COUNT: u16 = 4;
/// The interrupt of the generic event device.
pub const GED_GSI: u32 = 9;
