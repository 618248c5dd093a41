//! What can be chosen about the vCPU threads.

use std::fmt;
use std::sync::Arc;

use crate::{KickSignal, MachineEnd};

/// Reads guest memory: fills the slice from this guest physical address on (in bytes) and says
/// whether it could.
pub type ReadMemory = Arc<dyn Fn(u64, &mut [u8]) -> bool + Send + Sync>;

/// What is to be done when the guest has run for a moment. It is given what says whether the vCPU is
/// wanted meanwhile, to be paused or stopped: it then returns soon.
pub type AfterFirstExit = Arc<dyn Fn(&dyn Fn() -> bool) + Send + Sync>;

/// What can be chosen about the vCPU threads of a machine.
#[derive(Clone)]
pub struct VcpuOptions {
    /// The signal by which vCPUs are brought out of the guest.
    pub kick_signal: KickSignal,
    /// The threads are named by this and the vCPU's index. The system shows 15 bytes of it.
    pub thread_name: String,
    /// Whether the vCPUs wait for [`VcpuManager::resume`](crate::VcpuManager::resume) before they
    /// run their first instruction.
    pub start_paused: bool,
    /// By which the instruction at which the machine crashed is read, for the report; called on a
    /// vCPU's thread. Without it the report has the bytes only where KVM gives them.
    pub read_memory: Option<ReadMemory>,
    /// Called once, on the first vCPU's thread, when its first exit to the program was answered: for
    /// what would hold up the guest's first instruction, and is worth that the guest waits for it
    /// then.
    pub after_first_exit: Option<AfterFirstExit>,
}

impl Default for VcpuOptions {
    /// Running from the start, threads `vcpu0`, `vcpu1`, ..., the default signal, no memory, nothing to do.
    fn default() -> Self {
        Self {
            kick_signal: KickSignal::default(),
            thread_name: "vcpu".to_owned(),
            start_paused: false,
            read_memory: None,
            after_first_exit: None,
        }
    }
}

impl fmt::Debug for VcpuOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuOptions")
            .field("kick_signal", &self.kick_signal)
            .field("thread_name", &self.thread_name)
            .field("start_paused", &self.start_paused)
            .field("read_memory", &self.read_memory.is_some())
            .field("after_first_exit", &self.after_first_exit.is_some())
            .finish()
    }
}

/// Called with a machine's end.
pub type EndHook = Box<dyn FnOnce(&MachineEnd) + Send>;

/// What is to be called at a machine's end, each once. By default nothing is.
///
/// A panic in one of them is caught and logged.
pub struct EndHooks {
    /// Called as soon as the end is known, on the thread that brought it: a vCPU's, or that of the
    /// caller of [`VcpuManager::stop`](crate::VcpuManager::stop). Other vCPUs may still be on their
    /// way out then, so it must not wait for them.
    pub on_end: EndHook,
    /// Called when the last vCPU has left the guest, on the thread that was this vCPU's. It may
    /// take its time, which [`VcpuManager::stop`](crate::VcpuManager::stop) waits for, and may drop
    /// the manager.
    pub on_rest: EndHook,
}

impl Default for EndHooks {
    fn default() -> Self {
        Self {
            on_end: Box::new(|_| {}),
            on_rest: Box::new(|_| {}),
        }
    }
}

impl fmt::Debug for EndHooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EndHooks").finish_non_exhaustive()
    }
}
