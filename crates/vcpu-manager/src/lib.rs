//! vCPU threads.
mod counters;
mod end;
mod error;
mod instruction;
mod manager;
mod options;
mod run_page;
mod shared;
mod signal;
mod vcpu;

pub use counters::ExitCounts;
pub use end::{Crash, CrashCause, InstructionBytes, MachineEnd};
pub use error::Error;
pub use manager::VcpuManager;
pub use options::{ReadMemory, VcpuOptions};
pub use signal::KickSignal;
