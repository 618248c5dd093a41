//! The owner of the vCPU threads.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use kiln_device_api::VcpuBus;
use kvm_ioctls::VcpuFd;

use crate::run_page::RunPage;
use crate::shared::{Goal, Shared, State, Vcpu, lock, vcpu_id};
use crate::signal::VcpuSignalMask;
use crate::signal::set_own_name;
use crate::{EndHooks, Error, ExitCounts, KickSignal, MachineEnd, SpareThread, VcpuOptions, vcpu};

/// The stack of a vCPU thread, in bytes. Devices answer on it; they keep their buffers on the heap.
pub(crate) const STACK_SIZE: usize = 256 * 1024;

/// Runs the vCPUs of one machine, each on a thread of its own with a stack of 256 KiB.
///
/// Dropping it stops the machine and joins its threads, whatever state it is in.
///
/// Every method can be called from any thread, but some wait for all vCPUs, and so must not be
/// called by a device from a vCPU's own thread; each says what it does there.
pub struct VcpuManager {
    shared: Arc<Shared>,
    /// Held by whoever pauses, resumes or looks at parked vCPUs, one at a time.
    control: Mutex<()>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl VcpuManager {
    /// Starts a thread for each of these vCPUs.
    ///
    /// The vCPUs are set up by the caller: registers, CPUID, model-specific registers. All enter
    /// the guest at once; with a local APIC in the kernel, KVM itself holds all but the first back
    /// until the guest starts them.
    ///
    /// `bus` answers their accesses, on their threads. `hooks` are called at the machine's end. The
    /// threads are in the caller's `tracing` span.
    ///
    /// # Errors
    ///
    /// [`Error::NoVcpus`], [`Error::SignalTaken`], [`Error::Signal`], [`Error::MapRunPage`] and
    /// [`Error::Spawn`]. No vCPU has run and no thread is left then, and no hook is called.
    pub fn start(
        vcpus: Vec<VcpuFd>,
        bus: Arc<dyn VcpuBus>,
        options: VcpuOptions,
        hooks: EndHooks,
    ) -> Result<Self, Error> {
        Self::start_on(None, vcpus, bus, options, hooks)
    }

    /// Like [`start`](Self::start), with a thread that is there already for the first vCPU. It gets
    /// the name and the signal mask that a new one would have.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub fn start_on(
        first: Option<SpareThread>,
        vcpus: Vec<VcpuFd>,
        bus: Arc<dyn VcpuBus>,
        options: VcpuOptions,
        hooks: EndHooks,
    ) -> Result<Self, Error> {
        if vcpus.is_empty() {
            return Err(Error::NoVcpus);
        }
        options.kick_signal.install()?;
        let vcpus = vcpus
            .into_iter()
            .enumerate()
            .map(|(index, fd)| match RunPage::map(&fd) {
                Ok(page) => Ok(Vcpu::new(fd, page)),
                Err(source) => Err(Error::MapRunPage {
                    vcpu: vcpu_id(index),
                    source,
                }),
            })
            .collect::<Result<Box<[_]>, _>>()?;
        let VcpuOptions {
            kick_signal,
            thread_name,
            start_paused,
            read_memory,
            after_first_exit,
        } = options;
        let mut shared = Shared::new(vcpus, bus, read_memory, kick_signal, hooks);
        shared.after_first_exit = after_first_exit;
        let shared = Arc::new(shared);
        let threads = spawn(first, &shared, kick_signal, &thread_name)?;
        if start_paused {
            drop(shared.wait_until(None, |state| shared.all_parked(state)));
        } else {
            shared.set_goal(Goal::Run);
        }
        Ok(Self {
            shared,
            control: Mutex::new(()),
            threads: Mutex::new(threads),
        })
    }

    /// How many vCPUs there are.
    pub fn vcpu_count(&self) -> u32 {
        vcpu_id(self.shared.vcpus.len())
    }

    /// Pauses all vCPUs. When it returns, each is parked with its state whole: no port or MMIO
    /// access of it is half done. Pausing a paused machine does nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Ended`] if the machine has ended, or ends meanwhile; [`Error::OnVcpuThread`] on a
    /// vCPU's thread.
    pub fn pause(&self) -> Result<(), Error> {
        self.refuse_own_thread()?;
        let _control = lock(&self.control);
        if !self.shared.set_goal(Goal::Pause) {
            return Err(Error::Ended);
        }
        if !self.shared.all_parked(&lock(&self.shared.state)) {
            self.shared.kick_all();
        }
        let state = self.shared.wait_until(None, |state| {
            self.shared.all_parked(state) || state.goal == Goal::Stop
        });
        if state.goal == Goal::Stop {
            Err(Error::Ended)
        } else {
            Ok(())
        }
    }

    /// Lets paused vCPUs run on. Resuming a running machine does nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Ended`] if the machine has ended; [`Error::OnVcpuThread`] on a vCPU's thread.
    pub fn resume(&self) -> Result<(), Error> {
        self.refuse_own_thread()?;
        let _control = lock(&self.control);
        if self.shared.set_goal(Goal::Run) {
            Ok(())
        } else {
            Err(Error::Ended)
        }
    }

    /// Ends the machine, with [`MachineEnd::Stopped`] unless it has ended before, and joins the
    /// threads. The guest has no say in it, but a device that does not return from an access holds
    /// it up.
    ///
    /// On a vCPU's own thread it returns at once, and the thread ends after the access that it is
    /// in.
    pub fn stop(&self) {
        self.shared.finish(MachineEnd::Stopped);
        if self.shared.own_vcpu().is_some() {
            return;
        }
        drop(self.shared.wait_until(None, |state| state.live == 0));
        // Whoever comes second waits for the first, so both return to a machine at rest.
        let own = std::thread::current().id();
        for thread in lock(&self.threads).drain(..) {
            // It fails where the thread panicked, which `run_thread` has caught and reported. The
            // last thread may be the one that is here, by its hook.
            if thread.thread().id() != own {
                let _ = thread.join();
            }
        }
    }

    /// Ends the machine as [`stop`](Self::stop) does, and does not wait for the threads: for those
    /// who must not wait, such as a thread that a vCPU may be waiting for.
    pub fn request_stop(&self) {
        self.shared.finish(MachineEnd::Stopped);
    }

    /// Whether the vCPUs are paused, or about to be.
    pub fn is_paused(&self) -> bool {
        lock(&self.shared.state).goal == Goal::Pause
    }

    /// Whether this is called on one of the machine's own vCPU threads, as a device's code is.
    pub fn is_vcpu_thread(&self) -> bool {
        self.shared.own_vcpu().is_some()
    }

    /// Waits for the machine's end, until the last vCPU has left the guest. On a vCPU's own thread
    /// that would be for ever.
    pub fn wait(&self) -> MachineEnd {
        let state = self.shared.wait_until(None, at_rest);
        state.end.clone().unwrap_or(MachineEnd::Stopped)
    }

    /// The machine's end, once the last vCPU has left the guest.
    pub fn try_wait(&self) -> Option<MachineEnd> {
        self.wait_timeout(Duration::ZERO)
    }

    /// Waits for the machine's end as [`wait`](Self::wait) does, but no longer than this.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<MachineEnd> {
        let state = self.shared.wait_until(Some(timeout), at_rest);
        if at_rest(&state) {
            state.end.clone()
        } else {
            None
        }
    }

    /// Gives the descriptor of a vCPU that is paused, or whose machine has ended: to read its
    /// state, or to set it. It is not to be run. `f` must not call this manager, and can't be
    /// overtaken by a resume.
    ///
    /// # Errors
    ///
    /// [`Error::NotParked`] while the vCPUs run, [`Error::NoSuchVcpu`], [`Error::OnVcpuThread`].
    pub fn with_vcpu<R>(&self, vcpu: u32, f: impl FnOnce(&VcpuFd) -> R) -> Result<R, Error> {
        self.refuse_own_thread()?;
        let count = self.vcpu_count();
        let Some(of) = self.shared.vcpus.get(vcpu as usize) else {
            return Err(Error::NoSuchVcpu { vcpu, count });
        };
        let _control = lock(&self.control);
        let state = lock(&self.shared.state);
        let parked = state.goal == Goal::Pause && self.shared.all_parked(&state);
        if !parked && !at_rest(&state) {
            return Err(Error::NotParked { vcpu });
        }
        drop(state);
        // Nobody resumes while `control` is held, so this waits for no running vCPU.
        let fd = lock(&of.fd);
        Ok(f(&fd))
    }

    /// How often each vCPU came out of the guest, by kind. It can be read at any time.
    pub fn exit_counts(&self) -> Vec<ExitCounts> {
        self.shared
            .vcpus
            .iter()
            .map(|vcpu| vcpu.counters.read())
            .collect()
    }

    fn refuse_own_thread(&self) -> Result<(), Error> {
        match self.shared.own_vcpu() {
            Some(vcpu) => Err(Error::OnVcpuThread { vcpu }),
            None => Ok(()),
        }
    }
}

impl Drop for VcpuManager {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for VcpuManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.shared.state);
        f.debug_struct("VcpuManager")
            .field("vcpus", &self.shared.vcpus.len())
            .field("goal", &state.goal)
            .field("end", &state.end)
            .finish_non_exhaustive()
    }
}

/// Whether the machine has ended and the last vCPU has left the guest.
fn at_rest(state: &State) -> bool {
    state.end.is_some() && state.live == 0
}

/// Starts all threads, or none: where one fails, those before it, which are parked, end.
fn spawn(
    first: Option<SpareThread>,
    shared: &Arc<Shared>,
    kick: KickSignal,
    name: &str,
) -> Result<Vec<JoinHandle<()>>, Error> {
    let _mask = VcpuSignalMask::set(kick).map_err(|source| Error::Signal {
        signal: kick.number(),
        source,
    })?;
    // The standard library panics at a zero byte in a name.
    let name = name.replace('\0', "");
    let mut threads: Vec<JoinHandle<()>> = Vec::with_capacity(shared.vcpus.len());
    let spare = first.and_then(|spare| {
        let name = format!("{name}0");
        let body = vcpu::thread_body(Arc::clone(shared), 0);
        spare.finish_with(Box::new(move || {
            // It went well on this thread's starter a moment ago.
            let _ = VcpuSignalMask::keep(kick);
            set_own_name(&name);
            body();
        }))
    });
    threads.extend(spare);
    for index in threads.len()..shared.vcpus.len() {
        let thread = Builder::new()
            .name(format!("{name}{index}"))
            .stack_size(STACK_SIZE)
            .spawn(vcpu::thread_body(Arc::clone(shared), index));
        match thread {
            Ok(thread) => threads.push(thread),
            Err(source) => {
                shared.set_goal(Goal::Stop);
                for thread in threads {
                    let _ = thread.join();
                }
                return Err(Error::Spawn {
                    vcpu: vcpu_id(index),
                    source,
                });
            }
        }
    }
    Ok(threads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_can_be_shared_by_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<VcpuManager>();
    }
}
