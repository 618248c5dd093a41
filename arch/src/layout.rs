//! The address map of the machine: where RAM, devices and boot structures lie.
//!
//! Guest physical addresses and sizes are in bytes, ports are x86 I/O ports, and interrupts are
//! global system interrupts (GSI), which are the pins of the one IOAPIC.
//!
//! | from | to | what |
//! |---|---|---|
//! | 0 | `EBDA_START` | RAM; boot structures lie here until the guest's kernel has read them |
//! | `EBDA_START` | `ACPI_TABLES_START` | nothing for the guest to use (a PC has its BIOS area and VGA here) |
//! | `ACPI_TABLES_START` | `KERNEL_MIN_START` | ACPI tables |
//! | `KERNEL_MIN_START` | `MMIO_HOLE_START` | RAM, with the kernel and the initrd |
//! | `MMIO_HOLE_START` | `HIGH_RAM_START` | devices |
//! | `HIGH_RAM_START` | | RAM that did not fit below |

use vm_memory::GuestAddress;

/// The global descriptor table of the boot vCPU.
pub(crate) const GDT_START: u64 = 0x500;
/// PVH: `hvm_start_info`, and in the same page the list of modules and the memory map.
pub(crate) const PVH_START_INFO_START: u64 = 0x6000;
/// 64-bit Linux: the "zero page" (`boot_params`).
pub(crate) const ZERO_PAGE_START: u64 = 0x7000;
/// The top of the boot vCPU's stack, which grows down from here.
pub(crate) const BOOT_STACK_TOP: u64 = 0x8ff0;
/// The page tables that the boot vCPU starts with.
pub(crate) const PAGE_TABLES_START: u64 = 0x9000;
/// The kernel's command line.
pub(crate) const CMDLINE_START: u64 = 0x2_0000;
/// The most bytes that a command line may have, with its final NUL.
pub(crate) const CMDLINE_MAX_SIZE: u64 = 0x1_0000;
/// Where the first RAM ends: a PC's extended BIOS data area would be here.
pub(crate) const EBDA_START: u64 = 0x9_fc00;
/// Where the ACPI tables begin, with the RSDP first. A guest finds it here by looking, too (ACPI
/// 6.5 section 5.2.5.1).
pub const ACPI_TABLES_START: u64 = 0xe_0000;
/// The bytes that the ACPI tables may take: up to the reset vector.
pub const ACPI_TABLES_SIZE: u64 = RESET_VECTOR_START - ACPI_TABLES_START;
/// Where a PC's firmware has its reset vector for those who jump there in real mode: the last 16
/// bytes below 1 MiB.
pub(crate) const RESET_VECTOR_START: u64 = 0xf_fff0;
/// The lowest address that a kernel may be loaded at.
pub const KERNEL_MIN_START: u64 = 0x10_0000;

/// Where the hole for devices below 4 GiB begins: RAM fills the space below it first, and goes on
/// at [`HIGH_RAM_START`].
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// Where RAM goes on above the hole for devices.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// Where the BARs of PCI devices are. There is no window above RAM: no device of ours needs more
/// room than this one has.
pub const PCI_MEMORY_START: u64 = MMIO_HOLE_START;
/// The bytes that the BARs of PCI devices may take together.
pub const PCI_MEMORY_SIZE: u64 = VIRTIO_MMIO_START - PCI_MEMORY_START;
/// Where the configuration space of PCI bus 0 is in memory (ECAM).
pub const PCI_CONFIG_START: u64 = 0xf000_0000;
/// The bytes of a bus's configuration space.
pub const PCI_CONFIG_SIZE: u64 = 0x10_0000;
/// The first of the ports that lead to configuration space (configuration mechanism #1).
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// The ports that lead to configuration space.
pub const PCI_CONFIG_PORT_COUNT: u16 = 8;
/// The interrupts of the four lines that INTx pins of PCI devices are wired to, level-triggered and
/// active low. They are above 15, which software takes for the edge-triggered ones of a PC.
pub const PCI_INTX_GSIS: [u32; 4] = [20, 21, 22, 23];

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
pub(crate) const LAPIC_START: u64 = 0xfee0_0000;

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
/// The type of the soft-off state S5, that the guest writes to the sleep control register's
/// `SLP_TYPx` field.
pub const ACPI_S5_SLEEP_TYPE: u8 = 5;
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

/// How `size` bytes of RAM are laid out: below the hole for devices, then above it.
///
/// A size of 0 gives no region, and what passes the end of the address space is left out; both are
/// for the caller to refuse.
///
/// ```
/// use kiln_arch::layout;
/// use vm_memory::GuestAddress;
///
/// let regions = layout::ram_regions(5 << 30);
/// assert_eq!(regions, [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]);
/// ```
pub fn ram_regions(size: u64) -> Vec<(GuestAddress, usize)> {
    let low = size.min(MMIO_HOLE_START);
    let high = (size - low).min(u64::MAX - HIGH_RAM_START);
    [
        (GuestAddress(0), low as usize),
        (GuestAddress(HIGH_RAM_START), high as usize),
    ]
    .into_iter()
    .filter(|&(_, size)| size > 0)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_fills_the_space_below_the_hole_first() {
        for (size, regions) in [
            (0, vec![]),
            (64 << 20, vec![(0, 64 << 20)]),
            (3 << 30, vec![(0, 3 << 30)]),
            ((3 << 30) + 4096, vec![(0, 3 << 30), (4 << 30, 4096)]),
            (5 << 30, vec![(0, 3 << 30), (4 << 30, 2 << 30)]),
        ] {
            let expected: Vec<_> = regions
                .into_iter()
                .map(|(at, size)| (GuestAddress(at), size))
                .collect();
            assert_eq!(ram_regions(size), expected);
        }
        assert_eq!(ram_regions(u64::MAX).len(), 2);
    }

    #[test]
    fn nothing_in_the_map_overlaps() {
        let mut places = [
            (GDT_START, crate::gdt::SIZE),
            (PVH_START_INFO_START, 0x1000),
            (ZERO_PAGE_START, 0x1000),
            (BOOT_STACK_TOP - 0xff0, 0xff0),
            (PAGE_TABLES_START, crate::paging::SIZE as u64),
            (CMDLINE_START, CMDLINE_MAX_SIZE),
            (EBDA_START, 0x400),
            (ACPI_TABLES_START, ACPI_TABLES_SIZE),
            (KERNEL_MIN_START, MMIO_HOLE_START - KERNEL_MIN_START),
            (PCI_MEMORY_START, PCI_MEMORY_SIZE),
            (VIRTIO_MMIO_START, VIRTIO_MMIO_SIZE),
            (PCI_CONFIG_START, PCI_CONFIG_SIZE),
            (IOAPIC_START, IOAPIC_SIZE),
            (LAPIC_START, 0x1000),
            (KVM_IDENTITY_MAP_START, 0x1000),
            (KVM_TSS_START, 0x3000),
            (HIGH_RAM_START, 1 << 40),
        ];
        places.sort_unstable();
        for pair in places.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }
}
