//! What this host's KVM can do: the one owner of the system fd.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::Capabilities;

/// Where KVM's system device is.
pub(crate) const KVM_PATH: &str = "/dev/kvm";

/// What Kiln cannot do without, by the name in the KVM API documentation.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

/// Why this host cannot run guests.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// There is no KVM device.
    #[error(
        "{} does not exist: load the kvm_intel or kvm_amd module, or enable virtualization in the \
         firmware (inside a virtual machine: nested virtualization)",
        path.display()
    )]
    Missing {
        /// The device that was looked for.
        path: PathBuf,
    },
    /// The KVM device may not be opened by this user.
    #[error(
        "no right to open {}: run as a member of the group `kvm` or as root",
        path.display()
    )]
    NotAllowed {
        /// The device.
        path: PathBuf,
    },
    /// The KVM device could not be opened, or is none.
    #[error("open {}", path.display())]
    Open {
        /// The device.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The KVM device speaks another version of the API.
    #[error("KVM has API version {found}, and Kiln needs {KVM_API_VERSION}")]
    ApiVersion {
        /// What `KVM_GET_API_VERSION` gave.
        found: i32,
    },
    /// KVM lacks something that Kiln cannot do without.
    #[error("KVM on this host lacks {name}: a newer kernel has it")]
    MissingCapability {
        /// The capability, as the KVM API documentation names it.
        name: &'static str,
    },
    /// A question to KVM failed.
    #[error("ask KVM: {request}")]
    Request {
        /// The ioctl.
        request: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// How this host executes the code of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Execution {
    /// By the processor: any guest runs, at full speed.
    Hardware,
    /// By KVM's instruction emulator: tiny guests run, a stock Linux kernel does not.
    Emulated,
}

impl fmt::Display for Execution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hardware => "hardware",
            Self::Emulated => "emulated",
        })
    }
}

/// This host's KVM, opened and probed once; share it between virtual machines with `Arc`.
pub struct Host {
    fd: SystemFd,
    supported_cpuid: CpuId,
    msrs: Vec<u32>,
    capabilities: OnceLock<Capabilities>,
}

/// KVM's system fd, of a KVM that has what Kiln needs.
pub(crate) struct SystemFd(Kvm);

impl SystemFd {
    /// Opens this KVM device.
    pub(crate) fn open(path: &Path) -> Result<Self, HostError> {
        let kvm = open_kvm(path)?;
        let found = kvm.get_api_version();
        if found < 0 {
            // Not a KVM device at all: the ioctl is unknown to it.
            return Err(HostError::Open {
                path: path.to_owned(),
                source: io::Error::from_raw_os_error(libc::ENOTTY),
            });
        }
        if u32::try_from(found) != Ok(KVM_API_VERSION) {
            return Err(HostError::ApiVersion { found });
        }
        if let Some((_, name)) = REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(HostError::MissingCapability { name });
        }
        Ok(Self(kvm))
    }

    /// Asks for all else that building a virtual machine needs.
    pub(crate) fn into_host(self) -> Result<Host, HostError> {
        let supported_cpuid = self
            .0
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(request("KVM_GET_SUPPORTED_CPUID"))?;
        let msrs = self
            .0
            .get_msr_index_list()
            .map_err(request("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(Host {
            supported_cpuid,
            msrs: msrs.as_slice().to_vec(),
            capabilities: OnceLock::new(),
            fd: self,
        })
    }

    pub(crate) fn max_vcpus(&self) -> u32 {
        u32::try_from(self.0.get_max_vcpus()).unwrap_or(u32::MAX)
    }

    pub(crate) fn create_vm(&self) -> Result<VmFd, HostError> {
        loop {
            match self.0.create_vm() {
                // A signal interrupted the allocation; it is ours to try again.
                Err(error) if error.errno() == libc::EINTR => (),
                result => return result.map_err(request("KVM_CREATE_VM")),
            }
        }
    }
}

impl Host {
    /// Opens `/dev/kvm` and asks it once for all that building a virtual machine needs.
    ///
    /// # Errors
    ///
    /// [`HostError`] says what this host lacks and what to do.
    pub fn open() -> Result<Self, HostError> {
        Self::open_at(Path::new(KVM_PATH))
    }

    /// Like [`open`](Self::open), for a KVM device that is elsewhere.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open).
    pub fn open_at(path: &Path) -> Result<Self, HostError> {
        SystemFd::open(path)?.into_host()
    }

    /// The largest number of vCPUs that KVM gives one virtual machine here.
    pub fn max_vcpus(&self) -> u32 {
        self.fd.max_vcpus()
    }

    /// What KVM here says it can do, by name; asked the first time that somebody wants to know.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # if !std::path::Path::new("/dev/kvm").exists() { return Ok(()); }
    /// let host = kiln_vmm::Host::open()?;
    /// assert!(host.capabilities().has("KVM_CAP_IRQFD"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn capabilities(&self) -> &Capabilities {
        self.capabilities.get_or_init(|| {
            Capabilities::probe(|number| self.fd.0.check_extension_raw(number.into()))
        })
    }

    /// The CPUID leaves that KVM can give a guest here.
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.supported_cpuid
    }

    /// The indices of the MSRs that KVM saves and restores here.
    pub fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    pub(crate) fn create_vm(&self) -> Result<VmFd, HostError> {
        self.fd.create_vm()
    }

    /// Finds out how guest code is executed, by running a guest of two instructions: one that every
    /// processor of today has and that KVM's emulator lacks.
    ///
    /// # Errors
    ///
    /// [`HostError::Request`] where the tiny guest could not be made.
    pub fn execution(&self) -> Result<Execution, HostError> {
        const CODE: u64 = 0x1000;
        const HALT: u64 = 0x1010;
        const INVALID_OPCODE: u64 = 6;
        const SIZE: usize = 0x2000;
        let failed = |request| {
            move |error: &dyn fmt::Display| HostError::Request {
                request,
                source: io::Error::other(error.to_string()),
            }
        };
        let memory = kiln_memory::allocate(
            &[(GuestAddress(0), SIZE)],
            &kiln_memory::MemoryOptions::default(),
        )
        .map_err(|e| failed("memory of the probe")(&e))?;
        // popcnt ax, ax; hlt - and a halt where an invalid opcode would lead.
        let code = [0xf3, 0x0f, 0xb8, 0xc0, 0xf4];
        memory
            .write_slice(&code, GuestAddress(CODE))
            .and_then(|()| memory.write_slice(&[0xf4], GuestAddress(HALT)))
            .and_then(|()| memory.write_obj(HALT as u32, GuestAddress(INVALID_OPCODE * 4)))
            .map_err(|e| failed("memory of the probe")(&e))?;
        let host_address = memory
            .get_host_address(GuestAddress(0))
            .map_err(|e| failed("memory of the probe")(&e))?;

        let vm = self.create_vm()?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: SIZE as u64,
            userspace_addr: host_address as u64,
        };
        // SAFETY: the mapping belongs to `memory`, which is dropped after `vm` at the end of this
        // function, and nothing else refers to these pages.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(request("KVM_SET_USER_MEMORY_REGION"))?;
        let mut vcpu = vm.create_vcpu(0).map_err(request("KVM_CREATE_VCPU"))?;
        let mut sregs = vcpu.get_sregs().map_err(request("KVM_GET_SREGS"))?;
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        vcpu.set_sregs(&sregs).map_err(request("KVM_SET_SREGS"))?;
        let mut regs = vcpu.get_regs().map_err(request("KVM_GET_REGS"))?;
        regs.rip = CODE;
        regs.rsp = CODE;
        regs.rflags = 2;
        vcpu.set_regs(&regs).map_err(request("KVM_SET_REGS"))?;
        loop {
            match vcpu.run() {
                Ok(VcpuExit::Hlt) => return Ok(Execution::Hardware),
                Ok(_) => return Ok(Execution::Emulated),
                Err(error) if error.errno() == libc::EINTR => (),
                Err(error) => return Err(request("KVM_RUN")(error)),
            }
        }
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host")
            .field("max_vcpus", &self.max_vcpus())
            .finish_non_exhaustive()
    }
}

fn request(request: &'static str) -> impl Fn(kvm_ioctls::Error) -> HostError {
    move |error| HostError::Request {
        request,
        source: error.into(),
    }
}

fn open_kvm(path: &Path) -> Result<Kvm, HostError> {
    let open_error = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => HostError::Missing {
            path: path.to_owned(),
        },
        io::ErrorKind::PermissionDenied => HostError::NotAllowed {
            path: path.to_owned(),
        },
        _ => HostError::Open {
            path: path.to_owned(),
            source,
        },
    };
    let c_path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| open_error(io::ErrorKind::InvalidInput.into()))?;
    Kvm::new_with_path(c_path).map_err(|error| open_error(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_named() {
        let error = Host::open_at(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("/nonexistent/kvm does not exist")
        );
    }

    #[test]
    fn a_device_that_is_not_kvm_is_refused() {
        let error = Host::open_at(Path::new("/dev/null")).unwrap_err();
        assert_eq!(error.to_string(), "open /dev/null");
    }
}
