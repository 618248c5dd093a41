//! What a guest finds where a PC's firmware begins.
//!
//! A kernel that knows no other way to reset its machine jumps to the firmware's reset vector in
//! real mode. Linux does so before it thinks of the ACPI reset register, where ACPI is
//! hardware-reduced and there is no EFI.

use crate::layout::{ACPI_RESET_PORT, ACPI_RESET_VALUE};

/// Real-mode code for the reset vector: writes the ACPI reset register.
pub(super) fn code() -> [u8; 10] {
    let [port_low, port_high] = ACPI_RESET_PORT.to_le_bytes();
    [
        0xba,
        port_low,
        port_high, // mov dx, the port
        0xb0,
        ACPI_RESET_VALUE, // mov al, the value
        0xee,             // out dx, al
        0xfa,             // cli
        0xf4,             // hlt
        0xeb,
        0xfc, // jmp to cli
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_writes_the_reset_register_and_fits_below_1_mib() {
        let code = code();
        assert_eq!(code[..6], [0xba, 0x02, 0x06, 0xb0, 0x01, 0xee]);
        assert!(code.len() <= 16);
    }
}
