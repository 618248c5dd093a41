//! The local APIC that a vCPU starts with.

use kvm_bindings::kvm_lapic_state;

/// Local vector table entries of the two local pins (Intel SDM volume 3, section 11.5.1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
/// Their delivery modes; the rest of the entry, with its mask, is zero.
const DELIVERY_EXTINT: u32 = 7 << 8;
const DELIVERY_NMI: u32 = 4 << 8;

/// Wires the local pins as a PC's firmware does: LINT0 takes interrupts of the old interrupt
/// controllers, LINT1 takes NMIs (the MADT says so too).
pub fn set_local_pins(lapic: &mut kvm_lapic_state) {
    for (register, value) in [(LVT_LINT0, DELIVERY_EXTINT), (LVT_LINT1, DELIVERY_NMI)] {
        for (byte, value) in lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
            *byte = value as std::ffi::c_char;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pins_are_wired_and_nothing_else_changes() {
        let mut lapic = kvm_lapic_state { regs: [0x11; 1024] };
        set_local_pins(&mut lapic);
        let mut expected = [0x11; 1024];
        expected[0x350..0x354].copy_from_slice(&[0, 7, 0, 0]);
        expected[0x360..0x364].copy_from_slice(&[0, 4, 0, 0]);
        assert_eq!(lapic.regs, expected);
    }
}
