//! ACPI tables: how the guest learns of its processors, its devices, and how to power off.
//!
//! The machine is hardware-reduced (ACPI 6.5 section 3.11.1): there is no PM timer, no fixed power
//! button and no 8259. Power-off and reset are a register each in the FADT, and a generic event
//! device brings the power button.
//!
//! [`build`] is a pure function from a plain description to bytes; [`AcpiTables::write`] puts them
//! into guest memory.

mod dsdt;
mod fadt;
mod madt;
mod pci;

use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use kiln_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::Error;
use crate::layout::{self, ACPI_TABLES_SIZE};

/// Who made the tables.
pub(crate) const OEM_ID: [u8; 6] = *b"KILN  ";
/// Which machine they describe.
pub(crate) const OEM_TABLE_ID: [u8; 8] = *b"KILNVMM ";
/// Of which revision it is.
pub(crate) const OEM_REVISION: u32 = 1;

/// Every table begins on such a boundary: the RSDP must, and the others are found by it in a dump.
const ALIGN: usize = 16;

/// What the tables describe. Devices that are not in it are not found by the guest.
///
/// ```
/// use kiln_arch::acpi::{self, AcpiConfig, SerialPort, VirtioMmio};
/// use kiln_arch::layout;
///
/// let config = AcpiConfig {
///     apic_ids: vec![0, 1],
///     serial: Some(SerialPort::COM1),
///     virtio_mmio: vec![VirtioMmio { address: layout::VIRTIO_MMIO_START, size: 0x1000, gsi: 5 }],
///     ..Default::default()
/// };
/// let tables = acpi::build(&config, layout::ACPI_TABLES_START)?;
/// assert_eq!(&tables.bytes()[..8], b"RSD PTR ");
/// # Ok::<(), kiln_arch::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AcpiConfig {
    /// The APIC id of every vCPU, the boot vCPU first (see
    /// [`Topology::apic_ids`](crate::cpuid::Topology::apic_ids)).
    pub apic_ids: Vec<u32>,
    /// The serial port, where there is one.
    pub serial: Option<SerialPort>,
    /// There is a CMOS real time clock at [`layout::RTC_PORT`].
    pub rtc: bool,
    /// There is an i8042 at [`layout::I8042_PORT`] with a keyboard that a driver may use. Leave it
    /// off for one that only resets the machine: probing a keyboard that is not there takes time.
    pub i8042_keyboard: bool,
    /// There is a pvpanic device at [`layout::PVPANIC_PORT`].
    pub pvpanic: bool,
    /// There is a power button, brought by the generic event device at [`layout::GED_PORT`].
    pub power_button: bool,
    /// The virtio-mmio devices, in the order in which the guest shall find them.
    pub virtio_mmio: Vec<VirtioMmio>,
    /// The PCI bus, where there is one.
    pub pci: Option<PciRoot>,
}

/// A 16550 serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SerialPort {
    /// Its first port.
    pub port: u16,
    /// Its interrupt, edge-triggered.
    pub gsi: u32,
}

impl SerialPort {
    /// The first serial port of a PC.
    pub const COM1: Self = Self {
        port: layout::SERIAL_PORT,
        gsi: layout::SERIAL_GSI,
    };
}

/// A virtio device on the MMIO transport (virtio 1.3 section 4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmio {
    /// Guest physical address of its registers, below 4 GiB.
    pub address: u64,
    /// The bytes that they take.
    pub size: u64,
    /// Its interrupt, edge-triggered.
    pub gsi: u32,
}

/// The one PCI bus, whose places are those of [`layout`]: configuration space at
/// [`layout::PCI_CONFIG_START`] and at [`layout::PCI_CONFIG_PORT`], and BARs from
/// [`layout::PCI_MEMORY_START`] on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PciRoot {
    /// How INTx pins are wired: all pins of all slots that a device may be in.
    pub interrupts: Vec<PciInterrupt>,
}

/// The interrupt of an INTx pin, level-triggered and active low.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciInterrupt {
    /// The slot, up to 31, of whose devices it is.
    pub slot: u8,
    /// The pin, 0 for `INTA#` to 3 for `INTD#`.
    pub pin: u8,
    /// The interrupt that it is wired to.
    pub gsi: u32,
}

/// The tables, ready to be written to the address that they were built for.
#[derive(Clone, Debug)]
pub struct AcpiTables {
    base: u64,
    bytes: Vec<u8>,
}

impl AcpiTables {
    /// Guest physical address of the RSDP, which is also where all tables begin.
    pub fn rsdp(&self) -> GuestAddress {
        GuestAddress(self.base)
    }

    /// The tables as one piece.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Writes the tables to where they were built for.
    ///
    /// # Errors
    ///
    /// [`Error::Write`] where there is no RAM.
    pub fn write(&self, memory: &GuestMemory) -> Result<(), Error> {
        memory
            .write_slice(&self.bytes, GuestAddress(self.base))
            .map_err(|source| Error::Write {
                what: "the ACPI tables",
                address: self.base,
                source,
            })
    }
}

/// Builds the tables for guest physical address `base`, a multiple of 16; the RSDP comes first.
/// The usual base is [`layout::ACPI_TABLES_START`], which the memory map given to the guest keeps
/// from other use.
///
/// # Errors
///
/// [`Error::Acpi`] where a table would not hold what is described: no vCPU or too many, a device
/// above 4 GiB or of no size, an interrupt that the IOAPIC has no pin for, a PCI slot or pin that no
/// bus has, or more than [`ACPI_TABLES_SIZE`] in all.
pub fn build(config: &AcpiConfig, base: u64) -> Result<AcpiTables, Error> {
    check(config, base)?;
    let mut tables = Vec::with_capacity(0x1000);
    tables.resize(Rsdp::len(), 0);
    let dsdt = place(&mut tables, base, &dsdt::build(config));
    let fadt = place(&mut tables, base, &fadt::build(config, dsdt));
    let madt = place(&mut tables, base, &madt::build(&config.apic_ids));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if config.pci.is_some() {
        xsdt.add_entry(place(&mut tables, base, &pci::mcfg()));
    }
    let xsdt = place(&mut tables, base, &to_bytes(&xsdt));
    tables[..Rsdp::len()].copy_from_slice(&to_bytes(&Rsdp::new(OEM_ID, xsdt)));
    if tables.len() as u64 > ACPI_TABLES_SIZE {
        let bytes = tables.len();
        return Err(Error::Acpi {
            what: format!("take {bytes} bytes, of {ACPI_TABLES_SIZE}"),
        });
    }
    Ok(AcpiTables {
        base,
        bytes: tables,
    })
}

/// Appends a table and gives its guest physical address.
fn place(tables: &mut Vec<u8>, base: u64, table: &[u8]) -> u64 {
    tables.resize(tables.len().next_multiple_of(ALIGN), 0);
    let address = base + tables.len() as u64;
    tables.extend_from_slice(table);
    address
}

pub(crate) fn to_bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn check(config: &AcpiConfig, base: u64) -> Result<(), Error> {
    let fail = |what: String| Err(Error::Acpi { what });
    if !base.is_multiple_of(ALIGN as u64) || base > u64::from(u32::MAX) - ACPI_TABLES_SIZE {
        return fail(format!("cannot begin at {base:#x}"));
    }
    let cpus = config.apic_ids.len();
    if cpus == 0 || cpus > crate::cpuid::MAX_VCPUS as usize {
        return fail(format!("cannot describe {cpus} vCPUs"));
    }
    let serial = config.serial.iter().map(|serial| serial.gsi);
    let pci = config.pci.iter().flat_map(|pci| &pci.interrupts);
    if let Some(PciInterrupt { slot, pin, .. }) = pci
        .clone()
        .find(|interrupt| interrupt.slot >= pci::SLOTS || interrupt.pin >= pci::PINS)
    {
        return fail(format!("cannot describe pin {pin} of PCI slot {slot}"));
    }
    let pci = pci.map(|interrupt| interrupt.gsi);
    let virtio_mmio = config.virtio_mmio.iter().map(|device| device.gsi);
    for gsi in virtio_mmio.chain(serial).chain(pci) {
        if gsi >= layout::IOAPIC_PINS {
            return fail(format!(
                "cannot describe interrupt {gsi}: the IOAPIC has no such pin"
            ));
        }
    }
    if config.virtio_mmio.len() > dsdt::MAX_VIRTIO_MMIO {
        return fail(format!(
            "cannot name {} virtio-mmio devices",
            config.virtio_mmio.len()
        ));
    }
    for &VirtioMmio { address, size, .. } in &config.virtio_mmio {
        let end = address.checked_add(size);
        if size == 0 || end.is_none_or(|end| end > 1 << 32) {
            return fail(format!(
                "cannot describe a device of {size:#x} bytes at {address:#x}"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
