//! How a machine ends, as values.

use std::fmt;
use std::io;

use kiln_device_api::ExitRequest;

/// Why no vCPU of a machine runs any more. The first end wins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEnd {
    /// The guest asked for it.
    Requested {
        /// The vCPU that asked.
        vcpu: u32,
        /// What it asked for.
        request: ExitRequest,
    },
    /// The guest, KVM or a device came to a point from which the machine can't go on.
    Crash(Crash),
    /// [`VcpuManager::stop`](crate::VcpuManager::stop) was called, or the manager was dropped.
    Stopped,
}

impl fmt::Display for MachineEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Requested { vcpu, request } => {
                write!(f, "the guest asked for it on vCPU {vcpu}: {request:?}")
            }
            Self::Crash(crash) => crash.fmt(f),
            Self::Stopped => f.write_str("stopped by the host"),
        }
    }
}

/// The point from which a machine can't go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// The vCPU that got there.
    pub vcpu: u32,
    /// Its instruction pointer, as an offset into the code segment; `None` where KVM did not say.
    pub rip: Option<u64>,
    /// The bytes at the instruction pointer, where they could be had; the instruction may be
    /// shorter.
    pub instruction: InstructionBytes,
    /// What happened there.
    pub cause: CrashCause,
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {}: {}", self.vcpu, self.cause)?;
        if let Some(rip) = self.rip {
            write!(f, ", at rip {rip:#x}")?;
        }
        if !self.instruction.as_slice().is_empty() {
            write!(f, ", instruction bytes {}", self.instruction)?;
        }
        Ok(())
    }
}

/// Up to 15 bytes of an instruction, the longest that x86 has (SDM volume 2, section 2.3.11).
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct InstructionBytes {
    bytes: [u8; Self::MAX],
    length: u8,
}

impl InstructionBytes {
    /// The longest instruction, in bytes.
    pub const MAX: usize = 15;

    /// Keeps the first [`MAX`](Self::MAX) of these bytes.
    pub fn new(from: &[u8]) -> Self {
        let mut this = Self::default();
        for (to, from) in this.bytes.iter_mut().zip(from) {
            *to = *from;
            this.length += 1;
        }
        this
    }

    /// The bytes; none where they are not known.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

impl fmt::Display for InstructionBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.as_slice().iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for InstructionBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InstructionBytes({self})")
    }
}

/// What brought a machine down.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CrashCause {
    /// A fault while a double fault was delivered (SDM volume 3, section 6.15).
    TripleFault,
    /// KVM met an instruction that it has to emulate and can't (`KVM_INTERNAL_ERROR_EMULATION`).
    EmulationFailure,
    /// KVM gave up for another reason of its own (`KVM_EXIT_INTERNAL_ERROR`).
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// What KVM said about it, at most 16 words.
        data: Vec<u64>,
    },
    /// The processor refused to enter the guest (`KVM_EXIT_FAIL_ENTRY`).
    FailedEntry {
        /// The processor's reason.
        hardware_reason: u64,
        /// The host CPU on which it happened.
        cpu: u32,
    },
    /// KVM could not resolve an access to guest memory (`KVM_EXIT_MEMORY_FAULT`).
    MemoryFault {
        /// Guest physical address, in bytes.
        address: u64,
        /// Length, in bytes.
        size: u64,
        /// `KVM_MEMORY_EXIT_FLAG_*`.
        flags: u64,
    },
    /// Every vCPU executed HLT, and there is no local APIC in the kernel that could wake one.
    Halted,
    /// A system event that is neither a power-off, nor a reset, nor a crash of the guest.
    SystemEvent {
        /// `KVM_SYSTEM_EVENT_*`.
        kind: u32,
    },
    /// KVM_RUN returned for a reason (`KVM_EXIT_*`) that nothing in this machine has asked for.
    UnexpectedExit(u32),
    /// A device panicked while it answered an access of this vCPU.
    DevicePanic(String),
    /// KVM_RUN failed with this error number.
    RunFailed(i32),
}

impl fmt::Display for CrashCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TripleFault => f.write_str("triple fault"),
            Self::EmulationFailure => f.write_str("KVM can't emulate an instruction"),
            Self::InternalError { suberror, data } => {
                write!(
                    f,
                    "KVM internal error {suberror} ({})",
                    internal_error_name(*suberror)
                )?;
                data.iter().try_for_each(|word| write!(f, " {word:#x}"))
            }
            Self::FailedEntry {
                hardware_reason,
                cpu,
            } => write!(
                f,
                "the processor refused to enter the guest (reason {hardware_reason:#x}, host CPU {cpu})"
            ),
            Self::MemoryFault {
                address,
                size,
                flags,
            } => write!(
                f,
                "KVM can't resolve {size} bytes of guest memory at {address:#x} (flags {flags:#x})"
            ),
            Self::Halted => f.write_str("all vCPUs halted and nothing can wake them"),
            Self::SystemEvent { kind } => write!(f, "system event {kind}"),
            Self::UnexpectedExit(reason) => {
                write!(f, "unexpected KVM exit {reason} ({})", exit_name(*reason))
            }
            Self::DevicePanic(message) => write!(f, "a device panicked: {message}"),
            Self::RunFailed(errno) => {
                write!(
                    f,
                    "KVM_RUN failed: {}",
                    io::Error::from_raw_os_error(*errno)
                )
            }
        }
    }
}

fn internal_error_name(suberror: u32) -> &'static str {
    match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "emulation",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "simultaneous exceptions",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "event delivery",
        kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "unexpected exit reason",
        _ => "unknown",
    }
}

/// The exits that a KVM of x86 can give, by the name that its documentation has for them.
fn exit_name(reason: u32) -> &'static str {
    match reason {
        kvm_bindings::KVM_EXIT_UNKNOWN => "UNKNOWN",
        kvm_bindings::KVM_EXIT_EXCEPTION => "EXCEPTION",
        kvm_bindings::KVM_EXIT_IO => "IO, malformed",
        kvm_bindings::KVM_EXIT_HYPERCALL => "HYPERCALL",
        kvm_bindings::KVM_EXIT_DEBUG => "DEBUG",
        kvm_bindings::KVM_EXIT_NMI => "NMI",
        kvm_bindings::KVM_EXIT_HYPERV => "HYPERV",
        kvm_bindings::KVM_EXIT_DIRTY_RING_FULL => "DIRTY_RING_FULL",
        kvm_bindings::KVM_EXIT_AP_RESET_HOLD => "AP_RESET_HOLD",
        kvm_bindings::KVM_EXIT_X86_BUS_LOCK => "X86_BUS_LOCK",
        kvm_bindings::KVM_EXIT_XEN => "XEN",
        kvm_bindings::KVM_EXIT_NOTIFY => "NOTIFY",
        _ => "of a kind unknown here",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_crash_is_one_clear_line() {
        for (cause, expected) in [
            (CrashCause::TripleFault, "triple fault"),
            (
                CrashCause::InternalError {
                    suberror: 3,
                    data: vec![1, 0x20],
                },
                "KVM internal error 3 (event delivery) 0x1 0x20",
            ),
            (
                CrashCause::FailedEntry {
                    hardware_reason: 0x8000_0021,
                    cpu: 1,
                },
                "the processor refused to enter the guest (reason 0x80000021, host CPU 1)",
            ),
            (
                CrashCause::MemoryFault {
                    address: 0x5000,
                    size: 4096,
                    flags: 8,
                },
                "KVM can't resolve 4096 bytes of guest memory at 0x5000 (flags 0x8)",
            ),
            (
                CrashCause::UnexpectedExit(31),
                "unexpected KVM exit 31 (DIRTY_RING_FULL)",
            ),
            (
                CrashCause::UnexpectedExit(99),
                "unexpected KVM exit 99 (of a kind unknown here)",
            ),
            (
                CrashCause::RunFailed(libc::EFAULT),
                "KVM_RUN failed: Bad address (os error 14)",
            ),
        ] {
            let crash = Crash {
                vcpu: 3,
                rip: None,
                instruction: InstructionBytes::default(),
                cause,
            };
            assert_eq!(crash.to_string(), format!("vCPU 3: {expected}"));
        }
    }

    #[test]
    fn a_crash_says_where_and_at_which_instruction() {
        let end = MachineEnd::Crash(Crash {
            vcpu: 0,
            rip: Some(0xffff_ffff_8100_0000),
            instruction: InstructionBytes::new(&[0xc4, 0xe2, 0x60, 0xf2, 0x08]),
            cause: CrashCause::EmulationFailure,
        });
        assert_eq!(
            end.to_string(),
            "vCPU 0: KVM can't emulate an instruction, at rip 0xffffffff81000000, \
             instruction bytes c4 e2 60 f2 08"
        );
    }

    #[test]
    fn an_instruction_is_never_longer_than_15_bytes() {
        assert_eq!(InstructionBytes::new(&[1; 20]).as_slice(), [1; 15]);
        assert_eq!(InstructionBytes::new(&[]).as_slice(), []);
    }
}
