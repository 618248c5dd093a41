//! The multiple APIC description table (ACPI 6.5 section 5.2.12).
//!
//! There are no interrupt source overrides: the interrupts of ISA devices come to the pins of the
//! same number, edge-triggered and active high, which is what a guest takes for granted.

use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout::{IOAPIC_START, LAPIC_START};

/// Structure types.
const LOCAL_APIC: u8 = 0;
const IO_APIC: u8 = 1;
const LOCAL_APIC_NMI: u8 = 4;
const LOCAL_X2APIC: u8 = 9;
const LOCAL_X2APIC_NMI: u8 = 0xa;

const REVISION: u8 = 5;
const ENABLED: u32 = 1;
/// The last id that a local APIC structure can hold: 255 means all of them.
const LAST_APIC_ID: u32 = 254;
/// The local pin that NMIs come to (as [`crate::lapic`] wires it).
const NMI_PIN: u8 = 1;

/// The table's bytes.
pub(super) fn build(apic_ids: &[u32]) -> Vec<u8> {
    let mut body = Vec::with_capacity(64 + apic_ids.len() * 16);
    body.extend((LAPIC_START as u32).to_le_bytes());
    // Flags: there is no pair of 8259s.
    body.extend(0_u32.to_le_bytes());
    for (uid, &id) in (0_u32..).zip(apic_ids) {
        match u8::try_from(uid) {
            Ok(uid) if id <= LAST_APIC_ID => {
                body.extend([LOCAL_APIC, 8, uid, id as u8]);
                body.extend(ENABLED.to_le_bytes());
            }
            _ => {
                body.extend([LOCAL_X2APIC, 16, 0, 0]);
                for field in [id, ENABLED, uid] {
                    body.extend(field.to_le_bytes());
                }
            }
        }
    }
    body.extend([IO_APIC, 12, 0, 0]);
    body.extend((IOAPIC_START as u32).to_le_bytes());
    body.extend(0_u32.to_le_bytes());
    // For all processors, with the polarity and trigger of the bus.
    body.extend([LOCAL_APIC_NMI, 6, 0xff, 0, 0, NMI_PIN]);
    if apic_ids.iter().any(|&id| id > LAST_APIC_ID) {
        body.extend([
            LOCAL_X2APIC_NMI,
            12,
            0,
            0,
            0xff,
            0xff,
            0xff,
            0xff,
            NMI_PIN,
            0,
            0,
            0,
        ]);
    }
    let mut table = Sdt::new(*b"APIC", 36, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}
