//! The registers that a vCPU starts with.
//!
//! Only the boot vCPU is given these. The others keep what a processor has after INIT, and wait for
//! the start-up message of the guest.

use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_sregs};

use crate::gdt::{self, Mode, Segment};
use crate::layout::ZERO_PAGE_START;
use crate::layout::{BOOT_STACK_TOP, GDT_START, PAGE_TABLES_START, PVH_START_INFO_START};

/// Protected mode, an x87 (a bit that is always set), and paging (Intel SDM volume 3, section 2.5).
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
/// Physical address extension.
const CR4_PAE: u64 = 1 << 5;
/// Long mode enabled and active.
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The one bit of RFLAGS that is always set: interrupts are off.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// The general registers of the 64-bit Linux entry at `entry`: RSI points to the zero page.
pub(crate) fn linux64_regs(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsi: ZERO_PAGE_START,
        rsp: BOOT_STACK_TOP,
        rbp: BOOT_STACK_TOP,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    }
}

/// The general registers of the PVH entry at `entry`: EBX points to `hvm_start_info`.
pub(crate) fn pvh_regs(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rbx: PVH_START_INFO_START,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    }
}

/// Turns the special registers of a vCPU after reset into those of the 64-bit Linux entry: long
/// mode, with the first 4 GiB mapped to themselves.
pub(crate) fn set_linux64_sregs(sregs: &mut kvm_sregs) {
    set_segments(sregs, Mode::Long);
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PAGE_TABLES_START;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// Turns the special registers of a vCPU after reset into those of the PVH entry: flat 32-bit
/// protected mode, paging off.
pub(crate) fn set_pvh_sregs(sregs: &mut kvm_sregs) {
    set_segments(sregs, Mode::Protected);
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

fn set_segments(sregs: &mut kvm_sregs, mode: Mode) {
    let data = Segment::data().register();
    sregs.cs = Segment::code(mode).register();
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr = Segment::task().register();
    sregs.gdt = kvm_dtable {
        base: GDT_START,
        limit: gdt::SIZE as u16 - 1,
        padding: [0; 3],
    };
    // No interrupt table: an exception before the guest has its own is a triple fault, which ends
    // the machine and does not run into nowhere.
    sregs.idt = kvm_dtable::default();
}

/// The x87 and SSE state after reset, with all exceptions masked.
pub fn fpu() -> kvm_fpu {
    kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What KVM gives after reset, as far as it matters here.
    fn after_reset() -> kvm_sregs {
        kvm_sregs {
            cr0: 0x6000_0010,
            apic_base: 0xfee0_0900,
            cr8: 0,
            ..Default::default()
        }
    }

    #[test]
    fn the_linux_entry_is_in_64_bit_mode_with_paging_and_caches() {
        let mut sregs = after_reset();
        set_linux64_sregs(&mut sregs);
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
        assert_eq!(
            (sregs.ds.selector, sregs.ss.selector, sregs.es.selector),
            (0x18, 0x18, 0x18)
        );
        assert_eq!(sregs.cr0, 0x8000_0011);
        assert_eq!((sregs.cr4, sregs.efer, sregs.cr3), (0x20, 0x500, 0x9000));
        assert_eq!((sregs.gdt.base, sregs.gdt.limit), (0x500, 47));
        assert_eq!(sregs.apic_base, 0xfee0_0900);
        let regs = linux64_regs(0x100_0200);
        assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0200, 0x7000, 2));
    }

    #[test]
    fn the_pvh_entry_is_in_flat_32_bit_mode_without_paging() {
        let mut sregs = after_reset();
        set_pvh_sregs(&mut sregs);
        assert_eq!(
            (sregs.cs.l, sregs.cs.db, sregs.cs.base, sregs.cs.limit),
            (0, 1, 0, u32::MAX)
        );
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
        assert_eq!(
            (sregs.tr.limit, sregs.tr.base, sregs.tr.type_),
            (0x67, 0, 0xb)
        );
        let regs = pvh_regs(0x100_0000);
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x100_0000, 0x6000, 2));
    }

    #[test]
    fn the_fpu_masks_all_exceptions() {
        assert_eq!((fpu().fcw, fpu().mxcsr), (0x37f, 0x1f80));
    }
}
