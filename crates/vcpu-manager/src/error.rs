//! What can go wrong on the host's side.

use std::io;

/// Why something could not be done with the vCPUs of a machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// [`VcpuManager::start`](crate::VcpuManager::start) was given no vCPU.
    #[error("start a machine of no vCPU")]
    NoVcpus,
    /// The number is not that of a real-time signal.
    #[error("kick vCPUs by signal SIGRTMIN+{offset}: real-time signals end at SIGRTMIN+{last}")]
    NoSuchSignal {
        /// The offset that was asked for.
        offset: u8,
        /// The last offset there is.
        last: u8,
    },
    /// Another part of the process handles or ignores that signal already.
    #[error(
        "kick vCPUs by signal {signal} (SIGRTMIN+{offset}): the process handles that signal \
         already; choose another with `VcpuOptions::kick_signal`"
    )]
    SignalTaken {
        /// The signal's number.
        signal: i32,
        /// Its offset from `SIGRTMIN`.
        offset: u8,
    },
    /// The signal's handler could not be set up.
    #[error("handle signal {signal} to kick vCPUs")]
    Signal {
        /// The signal's number.
        signal: i32,
        /// What the system said.
        source: io::Error,
    },
    /// The page that a vCPU shares with KVM could not be mapped.
    #[error("map the run page of vCPU {vcpu}")]
    MapRunPage {
        /// The vCPU's index.
        vcpu: u32,
        /// What the system said.
        source: io::Error,
    },
    /// A vCPU's thread could not be started.
    #[error("start the thread of vCPU {vcpu}")]
    Spawn {
        /// The vCPU's index.
        vcpu: u32,
        /// What the system said.
        source: io::Error,
    },
    /// The machine has ended; [`VcpuManager::try_wait`](crate::VcpuManager::try_wait) says how.
    #[error("pause or resume vCPUs: the machine has ended")]
    Ended,
    /// The vCPUs are running.
    #[error("access vCPU {vcpu}: it is neither paused nor at its end")]
    NotParked {
        /// The vCPU's index.
        vcpu: u32,
    },
    /// There is no vCPU of this index.
    #[error("access vCPU {vcpu}: there are {count}")]
    NoSuchVcpu {
        /// The index asked for.
        vcpu: u32,
        /// How many there are.
        count: u32,
    },
    /// A device called back from a vCPU's thread for something that waits for that very thread.
    #[error("pause or access vCPUs from the thread of vCPU {vcpu}, which would wait for itself")]
    OnVcpuThread {
        /// The vCPU's index.
        vcpu: u32,
    },
}
