//! Where a vCPU is, and the instruction there.

use kvm_ioctls::VcpuFd;

use crate::InstructionBytes;
use crate::options::ReadMemory;

const PAGE_SIZE: u64 = 4096;

/// The instruction pointer.
pub(crate) fn pointer(fd: &VcpuFd) -> Option<u64> {
    fd.get_regs().ok().map(|regs| regs.rip)
}

/// The bytes at this instruction pointer, as far as they can be had.
pub(crate) fn bytes(fd: &VcpuFd, rip: u64, read_memory: &ReadMemory) -> Option<InstructionBytes> {
    let code = fd.get_sregs().ok()?.cs;
    // In 64-bit mode the base of the code segment is taken as 0 (SDM volume 3, section 3.2.4).
    let base = if code.l != 0 { 0 } else { code.base };
    Some(read_linear(fd, read_memory, base.wrapping_add(rip)))
}

/// Reads page by page, for the next linear page can lie anywhere, and may not be mapped: what was
/// read up to there stands.
fn read_linear(fd: &VcpuFd, read_memory: &ReadMemory, linear: u64) -> InstructionBytes {
    let mut bytes = [0; InstructionBytes::MAX];
    let mut done = 0;
    while done < bytes.len() {
        let address = linear.wrapping_add(done as u64);
        let physical = match fd.translate_gva(address) {
            Ok(translation) if translation.valid != 0 => translation.physical_address,
            _ => break,
        };
        let in_page = (PAGE_SIZE - address % PAGE_SIZE) as usize;
        let end = bytes.len().min(done + in_page);
        if !read_memory(physical, &mut bytes[done..end]) {
            break;
        }
        done = end;
    }
    InstructionBytes::new(&bytes[..done])
}
