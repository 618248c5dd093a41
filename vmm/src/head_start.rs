//! What KVM takes longest for when a machine is made, begun while something else is still done.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use kiln_vcpu_manager::{SpareThread, recv_soon};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::host::{KVM_PATH, SystemFd};
use crate::kvm::{create_vcpu, set_up_irqchip};
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
    vm: Receiver<Result<NewVm, BuildError>>,
    host: Receiver<Result<Host, HostError>>,
    first: Receiver<Result<VcpuFd, BuildError>>,
    thread: SpareThread,
}

/// The first thing that is there: a virtual machine with its irqchip.
struct NewVm {
    fd: Arc<VmFd>,
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
        let (first_sender, first) = sync_channel(1);
        let thread = SpareThread::start()?;
        thread.run(move || {
            // Nobody may be waiting: where the machine is not built after all.
            let (system, fd) = match create_vm() {
                Ok((system, new)) => {
                    let fd = Arc::clone(&new.fd);
                    drop(vm_sender.send(Ok(new)));
                    (system, fd)
                }
                Err(error) => return drop(vm_sender.send(Err(error))),
            };
            // Whatever the machine will be, it has a vCPU 0.
            drop(first_sender.send(create_vcpu(&fd, 0)));
            drop(fd);
            drop(host_sender.send(system.into_host()));
        });
        Ok(Self {
            vm,
            host,
            first,
            thread,
        })
    }
}

fn create_vm() -> Result<(SystemFd, NewVm), BuildError> {
    let system = SystemFd::open(Path::new(KVM_PATH))?;
    let fd = system.create_vm()?;
    set_up_irqchip(&fd)?;
    let vm = NewVm {
        fd: Arc::new(fd),
        max_vcpus: system.max_vcpus(),
    };
    Ok((system, vm))
}

fn gone() -> HostError {
    HostError::Request {
        request: "before the machine is described",
        source: io::Error::other("the thread has ended"),
    }
}

impl fmt::Debug for HeadStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeadStart").finish_non_exhaustive()
    }
}

/// Where a machine that is being built has its host, its VM fd and its first vCPU from.
pub(crate) enum Source {
    /// A host that is known.
    Host(Arc<Host>),
    /// What is being made on another thread.
    Coming {
        max_vcpus: u32,
        host: Receiver<Result<Host, HostError>>,
        /// What came of it, where somebody waited.
        known: Option<Arc<Host>>,
        first: Receiver<Result<VcpuFd, BuildError>>,
        thread: SpareThread,
    },
}

impl Source {
    /// With a head start, a host that is known, or neither: then the host is opened here. The VM fd
    /// has its irqchip.
    pub(crate) fn new(
        host: Option<&Arc<Host>>,
        head_start: Option<HeadStart>,
    ) -> Result<(Self, Arc<VmFd>), BuildError> {
        if let (None, Some(head_start)) = (host, head_start) {
            let vm = recv_soon(&head_start.vm).map_err(|_| gone())??;
            let source = Self::Coming {
                max_vcpus: vm.max_vcpus,
                host: head_start.host,
                known: None,
                first: head_start.first,
                thread: head_start.thread,
            };
            return Ok((source, vm.fd));
        }
        let host = match host {
            Some(host) => Arc::clone(host),
            None => Arc::new(Host::open()?),
        };
        let fd = host.create_vm()?;
        set_up_irqchip(&fd)?;
        Ok((Self::Host(host), Arc::new(fd)))
    }

    pub(crate) fn max_vcpus(&self) -> u32 {
        match self {
            Self::Host(host) => host.max_vcpus(),
            Self::Coming { max_vcpus, .. } => *max_vcpus,
        }
    }

    /// The host, which is waited for where it is still being asked.
    pub(crate) fn host(&mut self) -> Result<&Arc<Host>, BuildError> {
        match self {
            Self::Host(host) => Ok(host),
            Self::Coming { host, known, .. } => {
                let host = match known.take() {
                    Some(known) => known,
                    None => Arc::new(host.recv().map_err(|_| gone())??),
                };
                Ok(known.insert(host))
            }
        }
    }

    /// Has `create` called with the host and with vCPU 0, where there is one: on the thread of the
    /// head start, where there was one, which is given back.
    pub(crate) fn create_vcpus(
        self,
        create: impl FnOnce(Result<(Arc<Host>, Option<VcpuFd>), BuildError>) + Send + 'static,
    ) -> Option<SpareThread> {
        match self {
            Self::Host(host) => {
                create(Ok((host, None)));
                None
            }
            Self::Coming {
                host,
                known,
                first,
                thread,
                ..
            } => {
                thread.run(move || {
                    let given = || {
                        let host = match known {
                            Some(known) => known,
                            None => Arc::new(host.recv().map_err(|_| gone())??),
                        };
                        Ok((host, Some(first.recv().map_err(|_| gone())??)))
                    };
                    create(given());
                });
                Some(thread)
            }
        }
    }
}
