//! Devices that ACPI describes: power management, generic events, pvpanic.
