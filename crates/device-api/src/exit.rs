//! How a guest asks for the end of its machine.

/// The end of the machine that a guest asked for through a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ExitRequest {
    /// The guest powered the machine off (ACPI state S5).
    Shutdown,
    /// The guest asked for a reset of the machine.
    Reset,
    /// The guest's kernel said that it panicked (pvpanic).
    GuestPanic,
}
