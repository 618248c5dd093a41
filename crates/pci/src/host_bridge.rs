//! The host bridge: the function at 00:00.0, by which a guest knows that there is a bus.

use std::ops::ControlFlow;

use kiln_device_api::ExitRequest;

use crate::{FunctionDescription, Identity, PciFunction};

/// A generic PCI Express host bridge, by the id that was registered for one that has no registers
/// of its own, so that no kernel looks for the quirks of a real chipset.
const IDENTITY: Identity = Identity {
    vendor_id: 0x1b36,
    device_id: 0x0008,
    revision: 0,
    // A bridge, to the host.
    class: 0x06_00_00,
    subsystem_vendor_id: 0,
    subsystem_id: 0,
};

/// A function with nothing behind its header.
struct HostBridge;

impl PciFunction for HostBridge {
    fn bar_read(&self, _bar: usize, _offset: u64, _data: &mut [u8]) {}

    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) -> ControlFlow<ExitRequest> {
        ControlFlow::Continue(())
    }

    fn reset(&self) {}
}

pub(crate) fn description() -> FunctionDescription {
    FunctionDescription::new("host bridge", &IDENTITY)
}

pub(crate) fn function() -> impl PciFunction {
    HostBridge
}
