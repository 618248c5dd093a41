//! What the vCPU threads and their manager share, and the hand-shake between them.
//!
//! The goal is set under the lock; a thread in the guest is then kicked: `immediate_exit` first,
//! the signal second. A thread that came back with EINTR takes `immediate_exit` back *before* it
//! looks at the goal under the lock. So either it sees the new goal, or the kick comes after, and
//! then `immediate_exit` is still set when it enters KVM_RUN: no kick is lost.
//!
//! Where `immediate_exit` is set already no second signal follows: the first one is on its way, or
//! the thread is out of the guest and stays out until it has taken `immediate_exit` back, after
//! which it looks at the goal. So signals never pile up, however often a machine is paused.
//!
//! A signal that found no room in the user's queue is owed. Whoever waits for the vCPUs sends it
//! again until it gets through, and so does each vCPU's thread when it has ended.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_device_api::VcpuBus;
use kvm_ioctls::VcpuFd;

use crate::counters::Counters;
use crate::end::{Crash, CrashCause, InstructionBytes, MachineEnd};
use crate::instruction;
use crate::options::{AfterFirstExit, EndHook, EndHooks, ReadMemory};
use crate::run_page::RunPage;
use crate::signal::{self, KickSignal, ThreadId};

/// How long a thread rests before it tries again what it could not do.
pub(crate) const NAP: Duration = Duration::from_millis(1);

/// Locks even where a thread panicked with the lock held: what these locks guard is kept whole at
/// every step, and a machine must be able to end after a panic.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the vCPU threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    Run,
    Pause,
    Stop,
}

pub(crate) struct State {
    pub(crate) goal: Goal,
    /// Threads that wait, with their vCPU's state whole.
    pub(crate) parked: usize,
    /// Threads whose vCPU executed HLT where nothing can wake it.
    halted: usize,
    /// Threads that have not left their loop.
    pub(crate) live: usize,
    pub(crate) end: Option<MachineEnd>,
    on_end: Option<EndHook>,
    on_rest: Option<EndHook>,
}

/// One vCPU.
pub(crate) struct Vcpu {
    pub(crate) counters: Counters,
    pub(crate) page: RunPage,
    /// Held by the vCPU's thread whenever it may enter the guest, free while it is parked and
    /// after it has ended.
    pub(crate) fd: Mutex<VcpuFd>,
    /// The lock is held while a signal is sent, and a thread takes itself out of here before it
    /// ends: so none is sent to a thread that ended.
    kick: Mutex<Kick>,
}

/// Whom to kick, and whether that is still to be done.
#[derive(Default)]
struct Kick {
    /// The vCPU's thread, from its first step to its last.
    thread: Option<ThreadId>,
    /// There was no room for the signal.
    owed: bool,
}

impl Vcpu {
    pub(crate) fn new(fd: VcpuFd, page: RunPage) -> Self {
        Self {
            counters: Counters::default(),
            page,
            fd: Mutex::new(fd),
            kick: Mutex::default(),
        }
    }
}

pub(crate) struct Shared {
    pub(crate) vcpus: Box<[Vcpu]>,
    pub(crate) bus: Arc<dyn VcpuBus>,
    pub(crate) read_memory: Option<ReadMemory>,
    pub(crate) after_first_exit: Option<AfterFirstExit>,
    kick_signal: KickSignal,
    pub(crate) state: Mutex<State>,
    /// Wakes the vCPU threads.
    goal_changed: Condvar,
    /// Wakes those who wait for the vCPU threads.
    progress: Condvar,
}

impl Shared {
    /// All threads are to park first.
    pub(crate) fn new(
        vcpus: Box<[Vcpu]>,
        bus: Arc<dyn VcpuBus>,
        read_memory: Option<ReadMemory>,
        kick_signal: KickSignal,
        hooks: EndHooks,
    ) -> Self {
        let live = vcpus.len();
        Self {
            vcpus,
            bus,
            read_memory,
            after_first_exit: None,
            kick_signal,
            state: Mutex::new(State {
                goal: Goal::Pause,
                parked: 0,
                halted: 0,
                live,
                end: None,
                on_end: Some(hooks.on_end),
                on_rest: Some(hooks.on_rest),
            }),
            goal_changed: Condvar::new(),
            progress: Condvar::new(),
        }
    }

    /// Sets the goal, unless the machine is to stop: that is never taken back. Says whether it did.
    pub(crate) fn set_goal(&self, goal: Goal) -> bool {
        let mut state = lock(&self.state);
        if state.goal == Goal::Stop {
            return false;
        }
        state.goal = goal;
        drop(state);
        self.goal_changed.notify_all();
        true
    }

    /// Whether every vCPU waits with its state whole. One that was resumed and has not woken up yet
    /// counts: it looks at the goal again before it enters the guest.
    pub(crate) fn all_parked(&self, state: &State) -> bool {
        state.parked == self.vcpus.len()
    }

    /// Brings every vCPU that is in the guest, or about to enter it, out of it.
    pub(crate) fn kick_all(&self) {
        for vcpu in self.vcpus.iter().filter(|vcpu| vcpu.page.request_exit()) {
            let mut kick = lock(&vcpu.kick);
            if !self.send(&mut kick) {
                tracing::warn!("a vCPU's kick is late: the user has too many signals queued");
            }
        }
    }

    /// Sends again what found no room before; says whether nothing is owed any more.
    pub(crate) fn send_owed(&self) -> bool {
        let mut all_sent = true;
        for vcpu in &self.vcpus {
            let mut kick = lock(&vcpu.kick);
            all_sent &= !kick.owed || self.send(&mut kick);
        }
        all_sent
    }

    /// A thread that has not begun, or has ended, needs no signal.
    fn send(&self, kick: &mut Kick) -> bool {
        let sent = kick
            .thread
            .is_none_or(|thread| signal::send(self.kick_signal, thread));
        kick.owed = !sent;
        sent
    }

    /// Ends the machine, unless it has ended already: the first end wins.
    pub(crate) fn finish(&self, end: MachineEnd) {
        let mut state = lock(&self.state);
        state.goal = Goal::Stop;
        let on_end = if state.end.is_none() {
            state.end = Some(end.clone());
            state.on_end.take()
        } else {
            None
        };
        drop(state);
        self.goal_changed.notify_all();
        self.progress.notify_all();
        self.kick_all();
        if let Some(on_end) = on_end {
            tracing::debug!("the machine ends: {end}");
            call(on_end, &end);
        }
    }

    /// Called last by each vCPU's thread, after it has left its loop.
    pub(crate) fn after_last(&self) {
        let mut state = lock(&self.state);
        let hook = match state.live {
            0 => state.on_rest.take().zip(state.end.clone()),
            _ => None,
        };
        drop(state);
        if let Some((on_rest, end)) = hook {
            call(on_rest, &end);
        }
    }

    /// Ends the machine by a crash of this vCPU; `fd` is its own.
    pub(crate) fn crash(
        &self,
        index: usize,
        fd: &VcpuFd,
        cause: CrashCause,
        known: InstructionBytes,
    ) {
        let rip = instruction::pointer(fd);
        // The hook is not ours: a panic in it must not hide the crash.
        let read = || instruction::bytes(fd, rip?, self.read_memory.as_ref()?);
        let found = catch_unwind(AssertUnwindSafe(read))
            .ok()
            .flatten()
            .unwrap_or_default();
        let instruction = if known.as_slice().is_empty() {
            found
        } else {
            known
        };
        let vcpu = vcpu_id(index);
        self.finish(MachineEnd::Crash(Crash {
            vcpu,
            rip,
            instruction,
            cause,
        }));
    }

    /// Called first by each vCPU's thread: it can be kicked from here on.
    pub(crate) fn enter(&self, index: usize) -> Entered<'_> {
        lock(&self.vcpus[index].kick).thread = Some(ThreadId::current());
        Entered {
            shared: self,
            index,
        }
    }

    /// Parks as long as the machine is paused, and longer if this vCPU can't run anyway. Returns
    /// whether it is to run; if not, its thread is to end.
    pub(crate) fn wait_to_run(&self, can_run: bool) -> bool {
        let mut parked = false;
        let mut state = lock(&self.state);
        loop {
            match state.goal {
                Goal::Pause if !parked => {
                    parked = true;
                    state.parked += 1;
                    self.progress.notify_all();
                }
                Goal::Run | Goal::Stop if parked => {
                    parked = false;
                    state.parked -= 1;
                }
                _ => {}
            }
            match state.goal {
                Goal::Stop => return false,
                Goal::Run if can_run => return true,
                Goal::Run | Goal::Pause => {}
            }
            state = self
                .goal_changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Counts a vCPU as halted for good; says whether all are.
    pub(crate) fn halt_one(&self) -> bool {
        let mut state = lock(&self.state);
        state.halted += 1;
        state.halted == self.vcpus.len()
    }

    /// Lets a vCPU that KVM does not let run rest for a moment, or until the goal changes.
    pub(crate) fn rest(&self) {
        let state = lock(&self.state);
        if state.goal == Goal::Run {
            drop(
                self.goal_changed
                    .wait_timeout(state, Duration::from_millis(1)),
            );
        }
    }

    /// Waits until `until` holds, for at most `timeout` if there is one, and returns the state.
    pub(crate) fn wait_until(
        &self,
        timeout: Option<Duration>,
        until: impl Fn(&State) -> bool,
    ) -> MutexGuard<'_, State> {
        let start = Instant::now();
        loop {
            let left = timeout.map(|timeout| timeout.saturating_sub(start.elapsed()));
            let nothing_owed = self.send_owed();
            let state = lock(&self.state);
            if until(&state) || left.is_some_and(|left| left.is_zero()) {
                return state;
            }
            let nap = if nothing_owed {
                left
            } else {
                Some(left.map_or(NAP, |left| left.min(NAP)))
            };
            match nap {
                None => drop(self.progress.wait(state)),
                Some(nap) => drop(self.progress.wait_timeout(state, nap)),
            }
        }
    }

    /// The vCPU whose thread this is, if it is one of this machine.
    pub(crate) fn own_vcpu(&self) -> Option<u32> {
        let own = ThreadId::current();
        let is_own = |vcpu: &Vcpu| lock(&vcpu.kick).thread == Some(own);
        self.vcpus.iter().position(is_own).map(vcpu_id)
    }
}

/// A vCPU's thread from its first step to its last.
pub(crate) struct Entered<'a> {
    shared: &'a Shared,
    index: usize,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        lock(&self.shared.vcpus[self.index].kick).thread = None;
        lock(&self.shared.state).live -= 1;
        self.shared.progress.notify_all();
    }
}

/// A hook is not ours: a panic in it must not keep a thread from its end.
fn call(hook: EndHook, end: &MachineEnd) {
    if catch_unwind(AssertUnwindSafe(|| hook(end))).is_err() {
        tracing::error!("a function to be called at the machine's end panicked");
    }
}

/// The public number of a vCPU.
pub(crate) fn vcpu_id(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}
