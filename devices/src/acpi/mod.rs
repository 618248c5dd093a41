//! Devices that ACPI describes: power management, generic events, pvpanic.
//!
//! What the guest's ACPI tables say of them (ports, the value for S5, the interrupt) is for those
//! who write the tables; nothing of that is here.

mod power;
mod pvpanic;

pub use power::{
    GED_POWER_BUTTON, PowerButton, PowerManagement, PowerState, RESET_VALUE, S5_SLEEP_TYPE,
};
pub use pvpanic::PvPanic;
