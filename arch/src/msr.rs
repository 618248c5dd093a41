//! The model specific registers that a vCPU starts with.

use kvm_bindings::kvm_msr_entry;

/// Indices (Intel SDM volume 4; AMD APM volume 2, appendix A).
const TSC: u32 = 0x10;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const MISC_ENABLE: u32 = 0x1a0;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SYSCALL_MASK: u32 = 0xc000_0084;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Fast `rep movs` and `rep stos` are enabled.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// Memory is write-back where no other register says otherwise, and the registers are in force.
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// What a vCPU starts with.
const BOOT: [(u32, u64); 11] = [
    (SYSENTER_CS, 0),
    (SYSENTER_ESP, 0),
    (SYSENTER_EIP, 0),
    (STAR, 0),
    (CSTAR, 0),
    (KERNEL_GS_BASE, 0),
    (SYSCALL_MASK, 0),
    (LSTAR, 0),
    (TSC, 0),
    (MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    (MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
];

/// The registers to set on every vCPU, of those that the host lists (`KVM_GET_MSR_INDEX_LIST`):
/// one that a host does not list may be refused there.
///
/// ```
/// // A host that lists only the time stamp counter and one register that is not ours to set.
/// let entries = kiln_arch::msr::boot_msrs(&[0x10, 0x10a]);
/// assert_eq!(entries.len(), 1);
/// assert_eq!(entries[0].index, 0x10);
/// ```
pub fn boot_msrs(host_list: &[u32]) -> Vec<kvm_msr_entry> {
    BOOT.iter()
        .filter(|(index, _)| host_list.contains(index))
        .map(|&(index, data)| entry(index, data))
        .collect()
}

/// The default memory type: write-back.
///
/// KVM has taken this register since long before it listed it, so it is not always in
/// [`boot_msrs`]. Set it in a call of its own, and go on where a host refuses it: Linux then does
/// without MTRRs, which changes nothing in a virtual machine.
pub fn default_memory_type() -> kvm_msr_entry {
    entry(MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK)
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_registers_that_the_host_lists_are_set() {
        assert!(boot_msrs(&[]).is_empty());
        assert!(boot_msrs(&[0x10a, 0x48, 0xc000_0080]).is_empty());
        let all: Vec<u32> = (0..0x1000).chain(0xc000_0000..0xc000_1000).collect();
        let entries = boot_msrs(&all);
        assert_eq!(entries.len(), BOOT.len());
        assert!(entries.iter().all(|entry| entry.index != 0x10a));
        let value = |index| {
            entries
                .iter()
                .find(|entry| entry.index == index)
                .unwrap()
                .data
        };
        assert_eq!(value(MISC_ENABLE), 1);
        assert_eq!(value(MTRR_DEF_TYPE), 0x806);
        assert_eq!(value(LSTAR), 0);
    }

    #[test]
    fn memory_is_write_back_by_default() {
        let entry = default_memory_type();
        assert_eq!((entry.index, entry.data), (0x2ff, 0x806));
    }
}
