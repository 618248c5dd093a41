//! A virtual machine, before and after its start.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use kiln_vcpu_manager::{ExitCounts, MachineEnd, VcpuManager};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::machine::{Machine, SERIAL_PATIENCE, STOPPED_SERIAL_PATIENCE};
use crate::{HandleError, VmExit};

/// A virtual machine that is built and has not started. Dropping it leaves nothing behind.
#[must_use = "a virtual machine does nothing until it is started"]
pub struct Vm {
    pub(crate) machine: Machine,
    pub(crate) vcpus: crate::vcpu::Vcpus,
}

impl Vm {
    /// The machine's VM fd, for what Kiln has no word for. Memory slots, interrupt routes and the
    /// fds' settings that Kiln made are to be left alone.
    pub fn vm_fd(&self) -> &VmFd {
        self.machine.vm.fd()
    }

    /// The vCPU fds, in the order of the vCPUs: to look at and to change the state that they start
    /// with.
    pub fn vcpu_fds(&self) -> &[VcpuFd] {
        self.vcpus.fds()
    }

    /// Starts the guest on threads of its own and returns at once.
    ///
    /// # Errors
    ///
    /// [`HandleError::Vcpu`] where the vCPU threads cannot be started.
    pub fn start(self) -> Result<VmHandle, HandleError> {
        let Self { machine, vcpus } = self;
        let failure = machine.failure();
        let manager = Arc::new(vcpus.start(&machine)?);
        let stopper = Arc::downgrade(&manager);
        // Called on the I/O thread: it must not wait for vCPUs, which may wait for it. Nor may it
        // be the last to hold the manager, whose drop would wait: a failure comes from a device,
        // and the machine that holds the devices ends after the manager.
        failure.on_failure(move || {
            if let Some(manager) = stopper.upgrade() {
                manager.request_stop();
            }
        });
        Ok(VmHandle {
            inner: Arc::new(Inner {
                manager,
                machine: Mutex::new(machine),
                exit: OnceLock::new(),
            }),
        })
    }
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").finish_non_exhaustive()
    }
}

/// Whether a virtual machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmState {
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
    /// The machine has ended.
    Ended,
}

struct Inner {
    manager: Arc<VcpuManager>,
    machine: Mutex<Machine>,
    exit: OnceLock<VmExit>,
}

impl Inner {
    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After the vCPUs have come to rest: stops the devices, once, and says how it ended.
    fn finish(&self, end: MachineEnd) -> VmExit {
        let mut machine = self.machine();
        self.exit
            .get_or_init(|| {
                machine.stop_devices(match end {
                    MachineEnd::Stopped => STOPPED_SERIAL_PATIENCE,
                    _ => SERIAL_PATIENCE,
                });
                VmExit::new(end, machine.failure().message())
            })
            .clone()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.manager.stop();
        // A device that drops the last handle on a vCPU's thread would wait for itself. The thread
        // ends after the access that it is in.
        if !self.manager.is_vcpu_thread() {
            let end = self.manager.wait();
            self.finish(end);
        }
    }
}

/// A running virtual machine. It can be cloned and sent; when the last clone is dropped, the
/// machine is stopped and all its threads are joined.
#[derive(Clone)]
pub struct VmHandle {
    inner: Arc<Inner>,
}

impl VmHandle {
    /// Waits until the machine has ended, its devices have come to rest and its serial output is
    /// written.
    ///
    /// # Errors
    ///
    /// [`HandleError::OnVcpuThread`] when called on one of the machine's own vCPU threads, as from
    /// a device.
    pub fn wait(&self) -> Result<VmExit, HandleError> {
        self.not_on_vcpu_thread()?;
        Ok(self.inner.finish(self.inner.manager.wait()))
    }

    /// How the machine ended, if it has.
    ///
    /// # Errors
    ///
    /// As for [`wait`](Self::wait).
    pub fn try_wait(&self) -> Result<Option<VmExit>, HandleError> {
        self.wait_timeout(Duration::ZERO)
    }

    /// Waits as [`wait`](Self::wait) does, but for the guest's end no longer than `timeout`.
    ///
    /// # Errors
    ///
    /// As for [`wait`](Self::wait).
    pub fn wait_timeout(&self, timeout: Duration) -> Result<Option<VmExit>, HandleError> {
        self.not_on_vcpu_thread()?;
        let end = self.inner.manager.wait_timeout(timeout);
        Ok(end.map(|end| self.inner.finish(end)))
    }

    /// Pauses the guest: when this returns no vCPU runs and no device works on a queue.
    ///
    /// # Errors
    ///
    /// [`HandleError::Vcpu`] where the machine has ended.
    pub fn pause(&self) -> Result<(), HandleError> {
        // Held throughout, so that a resume at the same time comes before or after.
        let machine = self.inner.machine();
        self.inner.manager.pause()?;
        machine.pause_devices();
        Ok(())
    }

    /// Lets a paused guest go on.
    ///
    /// # Errors
    ///
    /// [`HandleError::Vcpu`] where the machine has ended.
    pub fn resume(&self) -> Result<(), HandleError> {
        let machine = self.inner.machine();
        if self.inner.exit.get().is_none() {
            machine.resume_devices();
        }
        self.inner.manager.resume()?;
        Ok(())
    }

    /// Presses the power button: the guest is told, and may power off.
    pub fn power_button(&self) {
        self.inner.machine().press_power_button();
    }

    /// Stops the machine, whatever the guest does, and waits for its threads. The machine then
    /// ended with [`VmExit::Stopped`], unless it had ended before.
    pub fn stop(&self) {
        self.inner.manager.stop();
        if !self.inner.manager.is_vcpu_thread() {
            self.inner.finish(self.inner.manager.wait());
        }
    }

    /// Whether the guest runs.
    pub fn state(&self) -> VmState {
        if self.inner.manager.try_wait().is_some() {
            VmState::Ended
        } else if self.inner.manager.is_paused() {
            VmState::Paused
        } else {
            VmState::Running
        }
    }

    /// How often each vCPU came out of the guest so far, by kind.
    pub fn exit_counts(&self) -> Vec<ExitCounts> {
        self.inner.manager.exit_counts()
    }

    fn not_on_vcpu_thread(&self) -> Result<(), HandleError> {
        if self.inner.manager.is_vcpu_thread() {
            return Err(HandleError::OnVcpuThread);
        }
        Ok(())
    }
}

impl fmt::Debug for VmHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmHandle")
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}
