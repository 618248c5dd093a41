//! What KVM takes longest for when a machine is made, begun while something else is still done.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvError, SyncSender, sync_channel};

use kiln_vcpu_manager::SpareThread;
use kvm_ioctls::VmFd;

use crate::host::{KVM_PATH, SystemFd};
use crate::{BuildError, Host, HostError};

/// A virtual machine of KVM that is being made on a thread of its own, for a program that has
/// something else to do before it can describe the machine: arguments to understand, a
/// configuration to read.
///
/// KVM takes some hundred microseconds to say what a processor of its can do and to create a
/// virtual machine, whatever the machine will be.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use kiln_vmm::{HeadStart, Kernel, VmBuilder};
///
/// let head_start = HeadStart::begin()?;
/// let kernel = std::env::args_os().nth(1).ok_or("which kernel?")?;
/// let vm = VmBuilder::new()
///     .head_start(head_start)
///     .kernel(Kernel::open(kernel)?)
///     .build()?;
/// # Ok(())
/// # }
/// ```
///
/// The thread becomes that of the machine's first vCPU. Dropping this waits for the thread and
/// undoes what was done.
pub struct HeadStart {
    vm: Receiver<Result<NewVm, HostError>>,
    host: Receiver<Result<Host, HostError>>,
    thread: SpareThread,
}

/// The first thing that is there.
struct NewVm {
    fd: VmFd,
    max_vcpus: u32,
}

impl HeadStart {
    /// Opens `/dev/kvm` and begins. Whatever goes wrong there is reported by
    /// [`VmBuilder::build`](crate::VmBuilder::build).
    ///
    /// # Errors
    ///
    /// What the system says where there is no thread to be had.
    pub fn begin() -> io::Result<Self> {
        let (vm_sender, vm) = sync_channel(1);
        let (host_sender, host) = sync_channel(1);
        let thread = SpareThread::start()?;
        thread.run(move || make(&vm_sender, &host_sender));
        Ok(Self { vm, host, thread })
    }
}

/// The thread's work. Nobody may be waiting: where the machine is not built after all.
fn make(vm: &SyncSender<Result<NewVm, HostError>>, host: &SyncSender<Result<Host, HostError>>) {
    let made = SystemFd::open(Path::new(KVM_PATH)).and_then(|system| {
        let vm = NewVm {
            fd: system.create_vm()?,
            max_vcpus: system.max_vcpus(),
        };
        Ok((system, vm))
    });
    match made {
        Ok((system, new)) => {
            let _ = vm.send(Ok(new));
            let _ = host.send(system.into_host());
        }
        Err(error) => drop(vm.send(Err(error))),
    }
}

fn gone<T>(_: RecvError) -> Result<T, HostError> {
    Err(HostError::Request {
        request: "before the machine is described",
        source: io::Error::other("the thread has ended"),
    })
}

impl fmt::Debug for HeadStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeadStart").finish_non_exhaustive()
    }
}

/// Where a machine that is being built has its host and its VM fd from.
pub(crate) struct Source {
    vm: Option<NewVm>,
    max_vcpus: u32,
    host: Option<Arc<Host>>,
    coming: Option<Receiver<Result<Host, HostError>>>,
    thread: Option<SpareThread>,
}

impl Source {
    /// With a head start, a host that is known, or neither: then the host is opened here.
    pub(crate) fn new(
        host: Option<&Arc<Host>>,
        head_start: Option<HeadStart>,
    ) -> Result<Self, BuildError> {
        if let (None, Some(head_start)) = (host, head_start) {
            let vm = head_start.vm.recv().unwrap_or_else(gone)?;
            return Ok(Self {
                max_vcpus: vm.max_vcpus,
                vm: Some(vm),
                host: None,
                coming: Some(head_start.host),
                thread: Some(head_start.thread),
            });
        }
        let host = match host {
            Some(host) => Arc::clone(host),
            None => Arc::new(Host::open()?),
        };
        Ok(Self {
            vm: None,
            max_vcpus: host.max_vcpus(),
            host: Some(host),
            coming: None,
            thread: None,
        })
    }

    pub(crate) fn max_vcpus(&self) -> u32 {
        self.max_vcpus
    }

    /// The host, which is waited for where it is still being asked.
    pub(crate) fn host(&mut self) -> Result<&Arc<Host>, BuildError> {
        let host = match (self.host.take(), self.coming.take()) {
            (Some(host), _) => host,
            (None, Some(coming)) => Arc::new(coming.recv().unwrap_or_else(gone)?),
            (None, None) => Arc::new(Host::open()?),
        };
        Ok(self.host.insert(host))
    }

    /// The thread that was started first, for the machine's first vCPU.
    pub(crate) fn take_thread(&mut self) -> Option<SpareThread> {
        self.thread.take()
    }

    /// A VM fd of its own for the machine.
    pub(crate) fn create_vm(&mut self) -> Result<VmFd, BuildError> {
        match self.vm.take() {
            Some(vm) => Ok(vm.fd),
            None => Ok(self.host()?.create_vm()?),
        }
    }
}
