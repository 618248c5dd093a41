//! A virtual machine, before and after its start.

use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use kiln_device_api::{ExitRequest, panic_message};
use kiln_devices::acpi::PowerButton;
use kiln_devices::virtio::balloon::BalloonControl;
use kiln_devices::virtio::block::BlockControl;
use kiln_devices::virtio::net::NetControl;
use kiln_io_thread::IoHandle;
use kiln_vcpu_manager::{EndHooks, ExitCounts, MachineEnd, VcpuManager};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use tracing::Span;

use crate::events::EventSource;
use crate::machine::{Machine, SERIAL_PATIENCE, STOP_PATIENCE, STOPPED_SERIAL_PATIENCE};
use crate::metrics::MetricsSource;
use crate::{DeviceError, Events, HandleError, Metrics, VfioDevice, VmEvent, VmExit};

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
        let span = machine.span.clone();
        let _in_span = span.enter();
        let failure = machine.failure();
        let running = Running::new(machine);
        let hooks = running.end_hooks();
        running.metrics.start();
        // Before the first of the guest's own events.
        running.events.send(&VmEvent::Started);
        let manager = Arc::new(vcpus.start(&running.machine(), hooks)?);
        let stopper = Arc::downgrade(&manager);
        // Called on an I/O thread: it must not wait for vCPUs, which may wait for it. Nor may it
        // be the last to hold the manager, whose drop would wait: a failure comes from a device,
        // and the machine that holds the devices ends after the manager.
        let events = Arc::clone(&running.events);
        failure.on_failure(move |reason| {
            events.send(&VmEvent::DeviceError {
                device: "a device".to_owned(),
                reason: reason.to_owned(),
            });
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
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
    span: Span,
    metrics: Arc<MetricsSource>,
    power_button: PowerButton,
    balloon: Option<BalloonControl>,
    disks: Vec<BlockControl>,
    nets: Vec<NetControl>,
    events: Arc<EventSource>,
    /// All I/O threads.
    io: Vec<IoHandle>,
    /// The vCPUs' manager, where its last owner could not wait for them.
    kept: Mutex<Option<Arc<VcpuManager>>>,
    /// The thread that stops, pauses or resumes the devices, with the machine's lock held.
    calls_devices: Mutex<Option<ThreadId>>,
    /// Set when everything is at rest.
    exit: Mutex<Option<VmExit>>,
    ended: Condvar,
}

impl Running {
    fn new(machine: Machine) -> Arc<Self> {
        Arc::new(Self {
            span: machine.span.clone(),
            metrics: Arc::clone(&machine.metrics),
            power_button: machine.power_button(),
            balloon: machine.balloon.clone(),
            disks: machine.disks.clone(),
            nets: machine.nets.clone(),
            events: Arc::clone(&machine.events),
            io: machine.io.handles().cloned().collect(),
            kept: Mutex::default(),
            calls_devices: Mutex::default(),
            machine: Mutex::new(machine),
            exit: Mutex::default(),
            ended: Condvar::new(),
        })
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        lock(&self.machine)
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
            on_rest: Box::new(move |end| at_rest.finish(end)),
        }
    }

    /// After the vCPUs have come to rest: stops the devices, and tells how it ended.
    fn finish(&self, end: &MachineEnd) {
        self.metrics.end();
        let machine = self.machine();
        let patience = match end {
            MachineEnd::Stopped => STOPPED_SERIAL_PATIENCE,
            _ => SERIAL_PATIENCE,
        };
        // What belongs to the embedder may panic here; the machine has ended all the same.
        let stop = || self.with_devices(|| machine.stop_devices(patience));
        if let Err(payload) = catch_unwind(AssertUnwindSafe(stop)) {
            let message = panic_message(&*payload);
            machine
                .failure()
                .report(format!("a device panicked: {message}"));
        }
        let exit = VmExit::new(end.clone(), machine.failure().message());
        drop(machine);
        *lock(&self.exit) = Some(exit.clone());
        self.ended.notify_all();
        // Whoever waits for it may have to turn the loop meanwhile.
        if let Some(io) = self.io.first() {
            io.wake();
        }
        self.events.end(&exit);
    }

    /// The machine's I/O loop, where it is for this thread to turn it while it waits.
    fn own_loop(&self) -> Option<&IoHandle> {
        self.io.first().filter(|io| io.is_to_be_turned())
    }

    /// Runs `f`, which calls devices, on this thread: one that the machine's end waits for then.
    fn with_devices<R>(&self, f: impl FnOnce() -> R) -> R {
        /// Takes the mark away, also where a device panics.
        struct Mark<'a>(&'a Mutex<Option<ThreadId>>);
        impl Drop for Mark<'_> {
            fn drop(&mut self) {
                *lock(self.0) = None;
            }
        }
        *lock(&self.calls_devices) = Some(thread::current().id());
        let _mark = Mark(&self.calls_devices);
        f()
    }

    /// Waits until everything is at rest, for at most `timeout` if there is one.
    fn wait(&self, timeout: Option<Duration>) -> Option<VmExit> {
        if let Some(io) = self.own_loop() {
            return self.turn_until_end(io, timeout);
        }
        let exit = lock(&self.exit);
        let going_on = |exit: &mut Option<VmExit>| exit.is_none();
        match timeout {
            None => self
                .ended
                .wait_while(exit, going_on)
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            Some(timeout) => self
                .ended
                .wait_timeout_while(exit, timeout, going_on)
                .unwrap_or_else(PoisonError::into_inner)
                .0
                .clone(),
        }
    }

    /// Waits as [`wait`](Self::wait) does, and serves the devices meanwhile.
    fn turn_until_end(&self, io: &IoHandle, timeout: Option<Duration>) -> Option<VmExit> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            if let Some(exit) = &*lock(&self.exit) {
                return Some(exit.clone());
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if let Err(error) = io.turn(left) {
                tracing::error!("the I/O loop ends: epoll: {error}");
                return None;
            }
            if left == Some(Duration::ZERO) {
                return lock(&self.exit).clone();
            }
        }
    }

    /// Runs `f`, which waits for vCPUs and devices; where this thread is to serve the devices
    /// meanwhile, on another thread.
    fn serving<R: Send>(&self, f: impl FnOnce() -> R + Send) -> Result<R, HandleError> {
        let Some(io) = self.own_loop() else {
            return Ok(f());
        };
        let failed = |source| HandleError::Thread { source };
        thread::scope(|scope| {
            let helper = thread::Builder::new()
                .name("kiln-control".to_owned())
                .spawn_scoped(scope, || {
                    let result = f();
                    io.wake();
                    result
                })
                .map_err(failed)?;
            while !helper.is_finished() {
                // The thread ends a moment after it has woken the loop.
                io.turn(Some(Duration::from_millis(1))).map_err(failed)?;
            }
            helper
                .join()
                .map_err(|_| failed(io::Error::other("it panicked")))
        })
    }
}

/// What these locks guard is whole at every step, whoever panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Inner {
    // Declared before `running`: its drop joins the threads that work on it.
    manager: Arc<VcpuManager>,
    running: Arc<Running>,
}

impl Inner {
    /// Whether this is one of the threads that the machine's end waits for.
    fn is_own_thread(&self) -> bool {
        self.running.io.iter().any(IoHandle::is_current)
            || self.manager.is_vcpu_thread()
            || *lock(&self.running.calls_devices) == Some(thread::current().id())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let _in_span = self.running.span.enter();
        if !self.is_own_thread() {
            if let Some(io) = self.running.own_loop() {
                self.manager.request_stop();
                self.running.turn_until_end(io, None);
            }
            self.manager.stop();
            return;
        }
        // A device drops the last handle. The threads end after what they are at, and the last
        // vCPU's brings the devices to rest. The manager's drop would wait for that, here.
        self.manager.request_stop();
        *lock(&self.running.kept) = Some(Arc::clone(&self.manager));
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
    /// written. On the thread of the machine's [`IoLoop`](crate::IoLoop), where it has one, that
    /// turns the loop, as all that waits for the machine does there.
    ///
    /// # Errors
    ///
    /// [`HandleError::OnOwnThread`] when called on one of the machine's own threads, as from a
    /// device: it would wait for itself.
    pub fn wait(&self) -> Result<VmExit, HandleError> {
        self.not_on_own_thread()?;
        // It is there whenever the wait is over.
        Ok(self.inner.running.wait(None).unwrap_or(VmExit::Stopped))
    }

    /// How the machine ended, if it has.
    ///
    /// # Errors
    ///
    /// As for [`wait`](Self::wait).
    pub fn try_wait(&self) -> Result<Option<VmExit>, HandleError> {
        self.wait_timeout(Duration::ZERO)
    }

    /// Waits as [`wait`](Self::wait) does, but no longer than `timeout`.
    ///
    /// # Errors
    ///
    /// As for [`wait`](Self::wait).
    pub fn wait_timeout(&self, timeout: Duration) -> Result<Option<VmExit>, HandleError> {
        self.not_on_own_thread()?;
        Ok(self.inner.running.wait(Some(timeout)))
    }

    /// Pauses the guest: when this returns no vCPU runs and no device works on a queue.
    ///
    /// # Errors
    ///
    /// [`HandleError::Vcpu`] where the machine has ended, or ends by a panic of a device that is
    /// being paused; [`HandleError::OnOwnThread`] as for [`wait`](Self::wait).
    pub fn pause(&self) -> Result<(), HandleError> {
        self.not_on_own_thread()?;
        self.inner.running.serving(|| self.pause_now())?
    }

    fn pause_now(&self) -> Result<(), HandleError> {
        let _in_span = self.inner.running.span.enter();
        // Held throughout, so that a resume at the same time comes before or after.
        let machine = self.inner.running.machine();
        let was_paused = self.inner.manager.is_paused();
        self.inner.manager.pause()?;
        self.inner.running.with_devices(|| machine.pause_devices());
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
    /// [`HandleError::Vcpu`] where the machine has ended; [`HandleError::OnOwnThread`] as for
    /// [`wait`](Self::wait).
    pub fn resume(&self) -> Result<(), HandleError> {
        self.not_on_own_thread()?;
        self.inner.running.serving(|| self.resume_now())?
    }

    fn resume_now(&self) -> Result<(), HandleError> {
        let _in_span = self.inner.running.span.enter();
        let machine = self.inner.running.machine();
        let was_paused = self.inner.manager.is_paused();
        if lock(&self.inner.running.exit).is_none() {
            self.inner.running.with_devices(|| machine.resume_devices());
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
        let _in_span = self.inner.running.span.enter();
        self.inner.running.power_button.press();
    }

    /// The host's side of the machine's memory balloon, where it was
    /// [given](crate::VmBuilder::balloon) one: how much is to be in it, how much there is, and what
    /// the guest says of its memory.
    pub fn balloon(&self) -> Option<BalloonControl> {
        self.inner.running.balloon.clone()
    }

    /// The host's side of a disk: the first one that the builder was [given](crate::VmBuilder::disk)
    /// is 0. By it the guest learns that its disk is larger now:
    ///
    /// ```no_run
    /// # fn enlarge(handle: &kiln_vmm::VmHandle) -> Result<(), Box<dyn std::error::Error>> {
    /// std::fs::File::options().write(true).open("root.ext4")?.set_len(8 << 30)?;
    /// handle.disk(0).ok_or("there is a disk")?.refresh_size()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn disk(&self, index: usize) -> Option<BlockControl> {
        self.inner.running.disks.get(index).cloned()
    }

    /// The host's side of the machine's network interface with this index, counted from 0 in the
    /// order in which the builder was given them: to plug its cable out and in, and to see what the
    /// guest has made of it.
    pub fn net(&self, index: usize) -> Option<NetControl> {
        self.inner.running.nets.get(index).cloned()
    }

    /// Stops the machine, whatever the guest does. The machine then ended with
    /// [`VmExit::Stopped`], unless it had ended before.
    ///
    /// It returns when everything is at rest and the threads have ended; or after 80 milliseconds,
    /// where a device or a backend has been called and does not return. Such a call is not to be
    /// broken off: [`wait`](Self::wait) waits for it, and so does the drop of the last handle. The
    /// guest does not run meanwhile.
    ///
    /// On one of the machine's own threads, as from a device, it returns at once.
    pub fn stop(&self) {
        let _in_span = self.inner.running.span.enter();
        self.inner.manager.request_stop();
        let at_rest = || self.inner.running.wait(Some(STOP_PATIENCE)).is_some();
        if !self.inner.is_own_thread() && at_rest() {
            // Joins the threads, of which the last is about to end.
            self.inner.manager.stop();
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

    /// What the machine has done so far: exits, requests, bytes, latencies, interrupts. It can be
    /// asked at any time, on any thread, also after the machine's end: it waits for nothing.
    pub fn metrics(&self) -> Metrics {
        let exits = self.inner.manager.exit_counts();
        self.inner.running.metrics.read(self.state(), exits)
    }

    /// How often each vCPU came out of the guest so far, by kind.
    pub fn exit_counts(&self) -> Vec<ExitCounts> {
        self.inner.manager.exit_counts()
    }

    fn not_on_own_thread(&self) -> Result<(), HandleError> {
        if self.inner.is_own_thread() {
            return Err(HandleError::OnOwnThread);
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
