//! What KVM takes longest for when a machine is made, begun while something else is still done.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvError, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use kvm_ioctls::VmFd;

use crate::host::{KVM_PATH, SystemFd};
use crate::{BuildError, Host, HostError};

/// The thread asks KVM a few things, and needs no more.
const STACK_SIZE: usize = 64 * 1024;

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
/// Dropping it waits for the thread and undoes what was done.
pub struct HeadStart {
    vm: Receiver<Result<NewVm, HostError>>,
    host: Receiver<Result<Host, HostError>>,
    thread: Thread,
}

/// The first thing that is there.
struct NewVm {
    fd: VmFd,
    max_vcpus: u32,
}

/// The thread, which is waited for.
struct Thread(Option<JoinHandle<()>>);

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
        let thread = Builder::new()
            .name("kiln-start".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || make(&vm_sender, &host_sender))?;
        Ok(Self {
            vm,
            host,
            thread: Thread(Some(thread)),
        })
    }

    /// Waits for the virtual machine, and leaves the rest to be waited for.
    fn vm(self) -> Result<(NewVm, ComingHost), BuildError> {
        let vm = self.vm.recv().unwrap_or_else(gone)?;
        let host = ComingHost {
            receiver: self.host,
            thread: self.thread,
        };
        Ok((vm, host))
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            // A panic of it is told of by its channels.
            let _ = thread.join();
        }
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

/// A host that is still being asked.
struct ComingHost {
    receiver: Receiver<Result<Host, HostError>>,
    thread: Thread,
}

/// Where a machine that is being built has its host and its VM fd from.
pub(crate) struct Source {
    vm: Option<NewVm>,
    max_vcpus: u32,
    host: Option<Arc<Host>>,
    coming: Option<ComingHost>,
}

impl Source {
    /// With a head start, a host that is known, or neither: then the host is opened here.
    pub(crate) fn new(
        host: Option<&Arc<Host>>,
        head_start: Option<HeadStart>,
    ) -> Result<Self, BuildError> {
        if let (None, Some(head_start)) = (host, head_start) {
            let (vm, coming) = head_start.vm()?;
            return Ok(Self {
                max_vcpus: vm.max_vcpus,
                vm: Some(vm),
                host: None,
                coming: Some(coming),
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
        })
    }

    pub(crate) fn max_vcpus(&self) -> u32 {
        self.max_vcpus
    }

    /// The host, which is waited for where it is still being asked.
    pub(crate) fn host(&mut self) -> Result<&Host, BuildError> {
        let host = match (self.host.take(), self.coming.take()) {
            (Some(host), _) => host,
            (None, Some(coming)) => {
                let host = coming.receiver.recv().unwrap_or_else(gone)?;
                drop(coming.thread);
                Arc::new(host)
            }
            (None, None) => Arc::new(Host::open()?),
        };
        Ok(self.host.insert(host))
    }

    /// A VM fd of its own for the machine.
    pub(crate) fn create_vm(&mut self) -> Result<VmFd, BuildError> {
        match self.vm.take() {
            Some(vm) => Ok(vm.fd),
            None => Ok(self.host()?.create_vm()?),
        }
    }
}
