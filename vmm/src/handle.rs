//! A virtual machine, before and after its start.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use kiln_device_api::ExitRequest;
use kiln_vcpu_manager::{EndHooks, ExitCounts, MachineEnd, VcpuManager};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::events::EventSource;
use crate::machine::{Machine, SERIAL_PATIENCE, STOPPED_SERIAL_PATIENCE};
use crate::{DeviceError, Events, HandleError, VfioDevice, VmEvent, VmExit};

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

    /// KVM's VFIO device of this machine, made the first time. It lives as long as the machine, and
    /// longer where the `Arc` is kept.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Create`] where KVM on this host has none.
    pub fn vfio(&mut self) -> Result<Arc<VfioDevice>, DeviceError> {
        self.machine.vfio()
    }

    /// The machine's events, from before its start.
    ///
    /// # Errors
    ///
    /// [`HandleError::Events`] where the process can't have another file descriptor.
    pub fn events(&self) -> Result<Events, HandleError> {
        subscribe(&self.machine.events)
    }

    /// Starts the guest on threads of its own and returns at once.
    ///
    /// # Errors
    ///
    /// [`HandleError::Vcpu`] where the vCPU threads cannot be started.
    pub fn start(self) -> Result<VmHandle, HandleError> {
        let Self { machine, vcpus } = self;
        let failure = machine.failure();
        let events = Arc::clone(&machine.events);
        let running = Arc::new(Running {
            machine: Mutex::new(machine),
            exit: OnceLock::new(),
            events,
        });
        let hooks = running.end_hooks();
        // Before the first of the guest's own events.
        running.events.send(&VmEvent::Started);
        let manager = Arc::new(vcpus.start(&running.machine(), hooks)?);
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
            inner: Arc::new(Inner { manager, running }),
        })
    }
}

fn subscribe(events: &EventSource) -> Result<Events, HandleError> {
    events
        .subscribe()
        .map_err(|source| HandleError::Events { source })
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

/// The machine around vCPUs that were started, and how it ended.
struct Running {
    machine: Mutex<Machine>,
    exit: OnceLock<VmExit>,
    events: Arc<EventSource>,
}

impl Running {
    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the vCPUs' end brings about, whether or not anybody waits for it.
    fn end_hooks(self: &Arc<Self>) -> EndHooks {
        let (at_end, at_rest) = (Arc::clone(&self.events), Arc::clone(self));
        EndHooks {
            on_end: Box::new(move |end| {
                tracing::info!("the machine ends: {end}");
                if let MachineEnd::Requested {
                    request: ExitRequest::GuestPanic,
                    ..
                } = end
                {
                    at_end.send(&VmEvent::GuestPanic);
                }
            }),
            on_rest: Box::new(move |end| drop(at_rest.finish(end))),
        }
    }

    /// After the vCPUs have come to rest: stops the devices, once, and says how it ended.
    fn finish(&self, end: &MachineEnd) -> VmExit {
        let machine = self.machine();
        self.exit
            .get_or_init(|| {
                machine.stop_devices(match end {
                    MachineEnd::Stopped => STOPPED_SERIAL_PATIENCE,
                    _ => SERIAL_PATIENCE,
                });
                let exit = VmExit::new(end.clone(), machine.failure().message());
                self.events.end(&exit);
                exit
            })
            .clone()
    }
}

struct Inner {
    // Declared before `running`: its drop joins the threads that work on it.
    manager: Arc<VcpuManager>,
    running: Arc<Running>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.manager.stop();
        // A device that drops the last handle on a vCPU's thread would wait for itself. The thread
        // ends after the access that it is in, and stops the devices then.
        if !self.manager.is_vcpu_thread() {
            self.running.finish(&self.manager.wait());
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
        Ok(self.inner.running.finish(&self.inner.manager.wait()))
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
        Ok(end.map(|end| self.inner.running.finish(&end)))
    }

    /// Pauses the guest: when this returns no vCPU runs and no device works on a queue.
    ///
    /// # Errors
    ///
    /// [`HandleError::Vcpu`] where the machine has ended, or ends by a panic of a device that is
    /// being paused.
    pub fn pause(&self) -> Result<(), HandleError> {
        // Held throughout, so that a resume at the same time comes before or after.
        let machine = self.inner.running.machine();
        let was_paused = self.inner.manager.is_paused();
        self.inner.manager.pause()?;
        machine.pause_devices();
        if machine.failure().message().is_some() {
            return Err(kiln_vcpu_manager::Error::Ended.into());
        }
        if !was_paused {
            self.inner.running.events.send(&VmEvent::Paused);
        }
        Ok(())
    }

    /// Lets a paused guest go on.
    ///
    /// # Errors
    ///
    /// [`HandleError::Vcpu`] where the machine has ended.
    pub fn resume(&self) -> Result<(), HandleError> {
        let machine = self.inner.running.machine();
        let was_paused = self.inner.manager.is_paused();
        if self.inner.running.exit.get().is_none() {
            machine.resume_devices();
        }
        if was_paused {
            // Before the first of what the guest does then.
            self.inner.running.events.send(&VmEvent::Resumed);
        }
        self.inner.manager.resume()?;
        Ok(())
    }

    /// Presses the power button: the guest is told, and may power off.
    pub fn power_button(&self) {
        self.inner.running.machine().press_power_button();
    }

    /// Stops the machine, whatever the guest does, and waits for its threads. The machine then
    /// ended with [`VmExit::Stopped`], unless it had ended before.
    pub fn stop(&self) {
        self.inner.manager.stop();
        if !self.inner.manager.is_vcpu_thread() {
            self.inner.running.finish(&self.inner.manager.wait());
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

    /// The machine's events from now on; where it has ended, that it has. Each call gives a stream
    /// of its own.
    ///
    /// # Errors
    ///
    /// [`HandleError::Events`] where the process can't have another file descriptor.
    pub fn events(&self) -> Result<Events, HandleError> {
        subscribe(&self.inner.running.events)
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
