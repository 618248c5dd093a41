//! The fixed ACPI description table (ACPI 6.5 section 5.2.9): a hardware-reduced machine.

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{AcpiConfig, OEM_ID, OEM_REVISION, OEM_TABLE_ID, to_bytes};
use crate::layout::{
    ACPI_RESET_PORT, ACPI_RESET_VALUE, ACPI_SLEEP_CONTROL_PORT, ACPI_SLEEP_STATUS_PORT,
};

/// Bits of `IAPC_BOOT_ARCH` (ACPI 6.5 section 5.2.9.3).
const LEGACY_DEVICES: u16 = 1;
const HAS_8042: u16 = 1 << 1;
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// The table's bytes, pointing to the DSDT at a guest physical address.
pub(super) fn build(config: &AcpiConfig, dsdt: u64) -> Vec<u8> {
    let mut boot_arch = NO_VGA;
    for (bit, on) in [
        (LEGACY_DEVICES, config.serial.is_some()),
        (HAS_8042, config.i8042_keyboard),
        (NO_CMOS_RTC, !config.rtc),
    ] {
        boot_arch |= if on { bit } else { 0 };
    }
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        // Caches are coherent.
        .flag(Flags::Wbinvd)
        // Neither button is a fixed one: the power button is a device in the DSDT.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        // Nor does the clock wake the machine by a fixed register.
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = boot_arch.into();
    fadt.reset_reg = byte_port(ACPI_RESET_PORT);
    fadt.reset_value = ACPI_RESET_VALUE;
    fadt.sleep_control_reg = byte_port(ACPI_SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = byte_port(ACPI_SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    to_bytes(&fadt.finalize())
}

fn byte_port(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        port.into(),
    )
}
