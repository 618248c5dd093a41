//! The PCI bus: its table of memory-mapped configuration space (MCFG), and its root in the DSDT (PCI
//! Firmware Specification 3.3, chapter 4).

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, CreateDWordField, Device, EISAName, Else, Equal, If,
    Memory32Fixed, Method, Name, NotEqual, ONE, Or, Package, Path, Return, Uuid, ZERO,
};
use acpi_tables::mcfg::MCFG;

use super::dsdt::{Raw, hardware_id, ports, resources, unique_id};
use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, PciInterrupt, PciRoot, to_bytes};
use crate::layout::{
    PCI_CONFIG_PORT, PCI_CONFIG_PORT_COUNT, PCI_CONFIG_SIZE, PCI_CONFIG_START, PCI_MEMORY_SIZE,
    PCI_MEMORY_START,
};

/// The slots of a bus.
pub(super) const SLOTS: u8 = 32;
/// The INTx pins of a device.
pub(super) const PINS: u8 = 4;

/// The set of capabilities that a guest and the firmware negotiate for a PCI host bridge (PCI
/// Firmware Specification 3.3, section 4.5.1).
const OSC_HOST_BRIDGE: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// What `_OSC` answers to (ACPI 6.5 section 6.2.12): a set that it does not know, and a revision.
const OSC_UNKNOWN_SET: u8 = 1 << 2;
const OSC_UNKNOWN_REVISION: u8 = 1 << 3;

/// The MCFG's bytes: bus 0 of segment 0.
pub(super) fn mcfg() -> Vec<u8> {
    let mut table = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.add_ecam(PCI_CONFIG_START, 0, 0, 0);
    to_bytes(&table)
}

/// The root of the bus, and what keeps its configuration space from other use.
pub(super) fn devices(root: &PciRoot) -> Vec<u8> {
    let mut aml = host_bridge(root);
    aml.extend(config_space());
    aml
}

fn host_bridge(root: &PciRoot) -> Vec<u8> {
    let memory_end = PCI_MEMORY_START + PCI_MEMORY_SIZE - 1;
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_MEMORY_START as u32,
        memory_end as u32,
        None,
    );
    let crs = resources(vec![
        &AddressSpace::new_bus_number(0_u16, 0),
        &ports(PCI_CONFIG_PORT, PCI_CONFIG_PORT_COUNT),
        &memory,
    ]);
    to_bytes(&Device::new(
        Path::new("PCI0"),
        vec![
            // A PCI Express root, since it has memory-mapped configuration space, that also those
            // can use who know PCI only.
            &hardware_id(&EISAName::new("PNP0A08")),
            &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
            &unique_id(&ZERO),
            &Name::new(Path::new("_SEG"), &ZERO),
            &Name::new(Path::new("_BBN"), &ZERO),
            // Devices read and write memory as the processors see it.
            &Name::new(Path::new("_CCA"), &ONE),
            &crs,
            &Raw(routing(&root.interrupts)),
            &Raw(negotiation()),
        ],
    ))
}

/// `_PRT`: a package for each pin, with the slot and all its functions, the pin, no interrupt link,
/// and the interrupt (ACPI 6.5 section 6.2.14).
fn routing(interrupts: &[PciInterrupt]) -> Vec<u8> {
    const ALL_FUNCTIONS: u32 = 0xffff;
    let entries: Vec<_> = interrupts
        .iter()
        .map(|interrupt| {
            let address = u32::from(interrupt.slot) << 16 | ALL_FUNCTIONS;
            Raw(to_bytes(&Package::new(vec![
                &address,
                &interrupt.pin,
                &ZERO,
                &interrupt.gsi,
            ])))
        })
        .collect();
    let entries = entries.iter().map(|entry| entry as &dyn Aml).collect();
    to_bytes(&Name::new(Path::new("_PRT"), &Package::new(entries)))
}

/// `_OSC`: the guest may control all it asks for, as there is no firmware that would do so.
fn negotiation() -> Vec<u8> {
    let (set, revision, buffer) = (Arg(0), Arg(1), Arg(3));
    let status = Path::new("CDW1");
    let add = |bit: &u8| Raw(to_bytes(&Or::new(&status, &status, bit)));
    let is_wrong_revision = NotEqual::new(&revision, &ONE);
    to_bytes(&Method::new(
        Path::new("_OSC"),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &buffer, &ZERO),
            &If::new(
                &Equal::new(&set, &Uuid::new(OSC_HOST_BRIDGE)),
                vec![&If::new(
                    &is_wrong_revision,
                    vec![&add(&OSC_UNKNOWN_REVISION)],
                )],
            ),
            &Else::new(vec![&add(&OSC_UNKNOWN_SET)]),
            &Return::new(&buffer),
        ],
    ))
}

/// A guest takes the MCFG for true only where configuration space is the resource of a device that
/// is not the bus itself (PCI Firmware Specification 3.3, section 4.1.2).
fn config_space() -> Vec<u8> {
    let memory = Memory32Fixed::new(true, PCI_CONFIG_START as u32, PCI_CONFIG_SIZE as u32);
    to_bytes(&Device::new(
        Path::new("MBRD"),
        vec![
            &hardware_id(&EISAName::new("PNP0C02")),
            &unique_id(&ZERO),
            &resources(vec![&memory]),
        ],
    ))
}
