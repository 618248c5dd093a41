//! How a virtual machine ends, as a value.

use std::fmt;

use kiln_device_api::ExitRequest;
use kiln_vcpu_manager::{Crash, MachineEnd};

/// How a virtual machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmExit {
    /// The guest powered off.
    Shutdown,
    /// The guest asked for a reset, as it does for a reboot.
    Reset,
    /// The guest's kernel panicked, and said so through pvpanic.
    GuestPanic,
    /// A vCPU came to a point from which it can't go on.
    Crash(Crash),
    /// A device panicked on the I/O thread; with what it said.
    DeviceFailure(String),
    /// The machine was stopped through its handle.
    Stopped,
}

impl VmExit {
    /// What the vCPUs ended with; `device_failure` is why we stopped them, where it was not the
    /// embedder who did.
    pub(crate) fn new(end: MachineEnd, device_failure: Option<&String>) -> Self {
        match end {
            MachineEnd::Requested { request, .. } => match request {
                ExitRequest::Shutdown => Self::Shutdown,
                ExitRequest::Reset => Self::Reset,
                ExitRequest::GuestPanic => Self::GuestPanic,
                other => Self::DeviceFailure(format!("a device asked for {other:?}")),
            },
            MachineEnd::Crash(crash) => Self::Crash(crash),
            MachineEnd::Stopped => match device_failure {
                Some(message) => Self::DeviceFailure(message.clone()),
                None => Self::Stopped,
            },
        }
    }
}

impl fmt::Display for VmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::GuestPanic => f.write_str("the guest's kernel panicked"),
            Self::Crash(crash) => write!(f, "the guest crashed: {crash}"),
            Self::DeviceFailure(message) => write!(f, "a device failed: {message}"),
            Self::Stopped => f.write_str("the machine was stopped"),
        }
    }
}
