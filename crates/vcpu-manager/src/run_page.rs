//! The page that a vCPU shares with KVM (`struct kvm_run`), in a mapping of our own.
//!
//! `kvm-ioctls` decodes an exit too, but leaves out what is needed here: the width of the elements
//! of a string instruction, the bytes of an instruction that could not be emulated, and a way to
//! set `immediate_exit` from another thread. With a mapping of its own this module shares no Rust
//! reference with it. Everything in the page can change under our feet as far as Rust knows, so
//! it is only ever read and written whole and volatile through raw pointers.

use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO,
    KVM_EXIT_IO_OUT, KVM_EXIT_IOAPIC_EOI, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO, KVM_EXIT_SET_TPR, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_TPR_ACCESS,
    KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_run,
};
use kvm_ioctls::VcpuFd;

use crate::end::{CrashCause, InstructionBytes};

/// `struct kvm_run` itself, and behind it the page through which port data is passed: x86 always
/// has these two (KVM API, `KVM_GET_VCPU_MMAP_SIZE` and `kvm_run.io.data_offset`).
const LENGTH: usize = 2 * 4096;

const _: () = assert!(size_of::<kvm_run>() <= 4096);

/// What made KVM_RUN return, as far as the exit path has to know at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Pio(Pio),
    MmioRead {
        address: u64,
        length: usize,
    },
    MmioWrite {
        address: u64,
        data: [u8; 8],
        length: usize,
    },
    EndOfInterrupt(u8),
    /// HLT, where KVM holds no local APIC to wait for.
    Halt,
    /// An access to a model-specific register that KVM leaves to us.
    Msr,
    /// KVM wants nothing of us.
    Nothing,
    Shutdown,
    SystemEvent(u32),
    InternalError,
    FailedEntry,
    MemoryFault,
    Other(u32),
}

/// A port access: `count` elements of `size` bytes each; `count` is above 1 for `rep ins` and
/// `rep outs` only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pio {
    pub(crate) port: u16,
    pub(crate) out: bool,
    pub(crate) size: usize,
    pub(crate) count: usize,
    offset: usize,
}

/// Reads one field of the page.
macro_rules! field {
    ($page:expr, $($field:tt)+) => {
        // SAFETY: the mapping is `LENGTH` bytes, which hold a `kvm_run` (asserted above), and lives
        // as long as the `RunPage`. No reference is made, only the address of a field; the union's
        // fields are plain integers, for which every bit pattern is a value.
        unsafe { (&raw const (*$page.base.as_ptr())$($field)+).read_volatile() }
    };
}

#[derive(Debug)]
pub(crate) struct RunPage {
    base: NonNull<kvm_run>,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only unmapped by `Drop`.
unsafe impl Send for RunPage {}
// SAFETY: through `&self` the page is only reached by volatile accesses of plain integers through
// raw pointers, and by one atomic; no reference into it ever exists. Mixed-up values are possible
// where two threads write at once, undefined behaviour is not.
unsafe impl Sync for RunPage {}

impl RunPage {
    pub(crate) fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new shared mapping at an address that the kernel chooses touches no memory that
        // is in use; the result is checked.
        let base = unsafe {
            libc::mmap(
                null_mut(),
                LENGTH,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(base) {
            Some(base) if base.as_ptr() != libc::MAP_FAILED => Ok(Self { base: base.cast() }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte is in the mapping and aligned as any byte is; it lives as long as
        // `self`, and on our side only this atomic accesses it.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.base.as_ptr()).immediate_exit) }
    }

    /// Lets the next KVM_RUN, after it has completed what is unfinished, return EINTR. Says whether
    /// that was not asked for already.
    pub(crate) fn request_exit(&self) -> bool {
        self.immediate_exit().swap(1, Ordering::SeqCst) == 0
    }

    /// Whether an exit was requested, and not taken back.
    pub(crate) fn exit_is_requested(&self) -> bool {
        self.immediate_exit().load(Ordering::Relaxed) != 0
    }

    /// Takes the request back. Who calls it looks at what was asked for *after* it.
    pub(crate) fn clear_exit_request(&self) {
        self.immediate_exit().swap(0, Ordering::SeqCst);
    }

    /// Says what made KVM_RUN return; to be called after it returned without an error.
    pub(crate) fn exit(&self) -> Exit {
        match field!(self, .exit_reason) {
            KVM_EXIT_IO => self.pio(),
            KVM_EXIT_MMIO => self.mmio(),
            KVM_EXIT_IOAPIC_EOI => Exit::EndOfInterrupt(field!(self, .__bindgen_anon_1.eoi.vector)),
            KVM_EXIT_HLT => Exit::Halt,
            KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => Exit::Msr,
            KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_SET_TPR | KVM_EXIT_TPR_ACCESS => {
                Exit::Nothing
            }
            KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            KVM_EXIT_SYSTEM_EVENT => {
                Exit::SystemEvent(field!(self, .__bindgen_anon_1.system_event.type_))
            }
            KVM_EXIT_INTERNAL_ERROR => Exit::InternalError,
            KVM_EXIT_FAIL_ENTRY => Exit::FailedEntry,
            KVM_EXIT_MEMORY_FAULT => Exit::MemoryFault,
            reason => Exit::Other(reason),
        }
    }

    fn pio(&self) -> Exit {
        let io = field!(self, .__bindgen_anon_1.io);
        let pio = Pio {
            port: io.port,
            out: u32::from(io.direction) == KVM_EXIT_IO_OUT,
            size: usize::from(io.size),
            count: io.count as usize,
            offset: usize::try_from(io.data_offset).unwrap_or(usize::MAX),
        };
        // The kernel keeps these bounds; the copies below rest on them, so they are checked.
        let end = (pio.size.checked_mul(pio.count)).and_then(|len| len.checked_add(pio.offset));
        match (pio.size, end) {
            (1 | 2 | 4, Some(end)) if end <= LENGTH && pio.count > 0 => Exit::Pio(pio),
            _ => Exit::Other(KVM_EXIT_IO),
        }
    }

    fn mmio(&self) -> Exit {
        let mmio = field!(self, .__bindgen_anon_1.mmio);
        let address = mmio.phys_addr;
        let length = (mmio.len as usize).min(mmio.data.len());
        if mmio.is_write != 0 {
            Exit::MmioWrite {
                address,
                data: mmio.data,
                length,
            }
        } else {
            Exit::MmioRead { address, length }
        }
    }

    /// Where an element starts; from there on `pio.size` bytes are in the mapping: only
    /// [`pio`](Self::pio) makes a `Pio`, and it checked where the last element ends.
    fn pio_element(&self, pio: &Pio, index: usize) -> *mut u8 {
        let offset = pio.offset + index.min(pio.count - 1) * pio.size;
        self.base.as_ptr().cast::<u8>().wrapping_add(offset)
    }

    /// The bytes of an element that the guest writes, of which the first `pio.size` count.
    pub(crate) fn pio_out(&self, pio: &Pio, index: usize) -> [u8; 4] {
        let from = self.pio_element(pio, index);
        let mut data = [0; 4];
        for (offset, byte) in data.iter_mut().enumerate().take(pio.size) {
            // SAFETY: the first `pio.size` bytes from there are in the mapping.
            *byte = unsafe { from.add(offset).read_volatile() };
        }
        data
    }

    /// Answers an element that the guest reads with the first `pio.size` bytes of `data`.
    pub(crate) fn pio_in(&self, pio: &Pio, index: usize, data: [u8; 4]) {
        let to = self.pio_element(pio, index);
        for (offset, byte) in data.into_iter().enumerate().take(pio.size) {
            // SAFETY: the first `pio.size` bytes from there are in the mapping.
            unsafe { to.add(offset).write_volatile(byte) };
        }
    }

    /// Answers a read of MMIO.
    pub(crate) fn mmio_in(&self, data: [u8; 8]) {
        // SAFETY: as in `field!`, for a write.
        unsafe {
            (&raw mut (*self.base.as_ptr()).__bindgen_anon_1.mmio.data).write_volatile(data);
        }
    }

    /// Lets the access to a model-specific register fail: the guest gets #GP, as for a register
    /// that does not exist.
    pub(crate) fn refuse_msr(&self) {
        // SAFETY: as in `field!`, for a write.
        unsafe { (&raw mut (*self.base.as_ptr()).__bindgen_anon_1.msr.error).write_volatile(1) };
    }

    /// The cause that [`Exit::InternalError`] stands for, and the instruction if KVM gave it.
    pub(crate) fn internal_error(&self) -> (CrashCause, InstructionBytes) {
        let internal = field!(self, .__bindgen_anon_1.internal);
        if internal.suberror != KVM_INTERNAL_ERROR_EMULATION {
            let count = (internal.ndata as usize).min(internal.data.len());
            let data = internal.data[..count].to_vec();
            let suberror = internal.suberror;
            return (
                CrashCause::InternalError { suberror, data },
                InstructionBytes::default(),
            );
        }
        let failure = field!(self, .__bindgen_anon_1.emulation_failure);
        let given = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
        // The flags, then 16 bytes of size and instruction: three words of data.
        let instruction = if failure.ndata >= 3 && failure.flags & given != 0 {
            let bytes = field!(
                self,
                .__bindgen_anon_1.emulation_failure.__bindgen_anon_1.__bindgen_anon_1
            );
            let size = usize::from(bytes.insn_size).min(bytes.insn_bytes.len());
            InstructionBytes::new(&bytes.insn_bytes[..size])
        } else {
            InstructionBytes::default()
        };
        (CrashCause::EmulationFailure, instruction)
    }

    pub(crate) fn failed_entry(&self) -> CrashCause {
        let failed = field!(self, .__bindgen_anon_1.fail_entry);
        CrashCause::FailedEntry {
            hardware_reason: failed.hardware_entry_failure_reason,
            cpu: failed.cpu,
        }
    }

    pub(crate) fn memory_fault(&self) -> CrashCause {
        let fault = field!(self, .__bindgen_anon_1.memory_fault);
        CrashCause::MemoryFault {
            address: fault.gpa,
            size: fault.size,
            flags: fault.flags,
        }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: `map` made this mapping with this length, and nothing borrowed from `self` is
        // left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), LENGTH) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page that no vCPU shares.
    fn page(fill: impl FnOnce(&mut kvm_run)) -> RunPage {
        // SAFETY: a new anonymous mapping touches nothing that exists.
        let base = unsafe {
            libc::mmap(
                null_mut(),
                LENGTH,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        let base: NonNull<kvm_run> = NonNull::new(base).unwrap().cast();
        let mut run = kvm_run::default();
        fill(&mut run);
        // SAFETY: the mapping is large enough, and not shared yet.
        unsafe { base.as_ptr().write(run) };
        RunPage { base }
    }

    fn io(size: u8, count: u32, data_offset: u64) -> RunPage {
        page(|run| {
            run.exit_reason = KVM_EXIT_IO;
            let io = kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_4 {
                direction: 0,
                size,
                port: 0x60,
                count,
                data_offset,
            };
            run.__bindgen_anon_1.io = io;
        })
    }

    #[test]
    fn port_data_outside_the_mapping_is_never_touched() {
        assert!(matches!(io(4, 1024, 4096).exit(), Exit::Pio(_)));
        for page in [
            io(4, 1025, 4096),
            io(1, 1, 8192),
            io(1, 1, u64::MAX),
            io(4, u32::MAX, 4096),
            io(0, 1, 4096),
            io(3, 1, 4096),
            io(8, 1, 4096),
            io(1, 0, 4096),
        ] {
            assert_eq!(page.exit(), Exit::Other(KVM_EXIT_IO));
        }
    }

    #[test]
    fn the_last_element_of_the_page_is_read_and_written_whole() {
        let page = io(2, 2048, 4096);
        let Exit::Pio(pio) = page.exit() else {
            panic!("{:?}", page.exit())
        };
        page.pio_in(&pio, 2046, [1, 2, 3, 4]);
        page.pio_in(&pio, 2047, [5, 6, 7, 8]);
        assert_eq!(page.pio_out(&pio, 2046), [1, 2, 0, 0]);
        assert_eq!(page.pio_out(&pio, 2047), [5, 6, 0, 0]);
    }

    #[test]
    fn an_mmio_length_beyond_the_field_is_cut() {
        let page = page(|run| {
            run.exit_reason = KVM_EXIT_MMIO;
            run.__bindgen_anon_1.mmio.phys_addr = 0x1000;
            run.__bindgen_anon_1.mmio.len = 9;
        });
        assert_eq!(
            page.exit(),
            Exit::MmioRead {
                address: 0x1000,
                length: 8
            }
        );
    }

    fn emulation_failure(ndata: u32, flags: u64, size: u8) -> RunPage {
        page(|run| {
            run.exit_reason = KVM_EXIT_INTERNAL_ERROR;
            let failure = kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_14 {
                suberror: KVM_INTERNAL_ERROR_EMULATION,
                ndata,
                flags,
                ..Default::default()
            };
            run.__bindgen_anon_1.emulation_failure = failure;
            let instruction =
                kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_14__bindgen_ty_1__bindgen_ty_1 {
                    insn_size: size,
                    insn_bytes: *b"0123456789abcde",
                };
            run.__bindgen_anon_1
                .emulation_failure
                .__bindgen_anon_1
                .__bindgen_anon_1 = instruction;
        })
    }

    #[test]
    fn the_instruction_is_taken_from_kvm_only_where_it_gives_one() {
        for (ndata, flags, size, expected) in [
            (3, 1, 4, &b"0123"[..]),
            (3, 1, 255, b"0123456789abcde"),
            (3, 0, 4, b""),
            (1, 1, 4, b""),
            (0, 0, 0, b""),
        ] {
            let page = emulation_failure(ndata, flags, size);
            assert_eq!(page.exit(), Exit::InternalError);
            let (cause, instruction) = page.internal_error();
            assert_eq!(cause, CrashCause::EmulationFailure);
            assert_eq!(instruction.as_slice(), expected);
        }
    }

    #[test]
    fn an_internal_error_keeps_its_data() {
        let page = page(|run| {
            run.exit_reason = KVM_EXIT_INTERNAL_ERROR;
            let internal = kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_13 {
                suberror: 3,
                ndata: 2,
                data: [7; 16],
            };
            run.__bindgen_anon_1.internal = internal;
        });
        let expected = CrashCause::InternalError {
            suberror: 3,
            data: vec![7, 7],
        };
        assert_eq!(page.internal_error().0, expected);
    }

    #[test]
    fn other_ends_keep_what_kvm_said() {
        let failed = page(|run| {
            run.exit_reason = KVM_EXIT_FAIL_ENTRY;
            run.__bindgen_anon_1
                .fail_entry
                .hardware_entry_failure_reason = 0x8000_0021;
            run.__bindgen_anon_1.fail_entry.cpu = 3;
        });
        assert_eq!(failed.exit(), Exit::FailedEntry);
        let expected = CrashCause::FailedEntry {
            hardware_reason: 0x8000_0021,
            cpu: 3,
        };
        assert_eq!(failed.failed_entry(), expected);

        let fault = page(|run| {
            run.exit_reason = KVM_EXIT_MEMORY_FAULT;
            run.__bindgen_anon_1.memory_fault.gpa = 0x5000;
            run.__bindgen_anon_1.memory_fault.size = 0x1000;
            run.__bindgen_anon_1.memory_fault.flags = 8;
        });
        assert_eq!(fault.exit(), Exit::MemoryFault);
        let expected = CrashCause::MemoryFault {
            address: 0x5000,
            size: 0x1000,
            flags: 8,
        };
        assert_eq!(fault.memory_fault(), expected);

        let event = page(|run| {
            run.exit_reason = KVM_EXIT_SYSTEM_EVENT;
            run.__bindgen_anon_1.system_event.type_ = 6;
        });
        assert_eq!(event.exit(), Exit::SystemEvent(6));
        assert_eq!(page(|run| run.exit_reason = 99).exit(), Exit::Other(99));
    }
}
