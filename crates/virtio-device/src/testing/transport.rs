//! A transport that tests drive a device through, whichever it is.

use std::ops::ControlFlow;
use std::sync::Arc;

use kiln_device_api::{BusDevice, ExitRequest, InterruptLine};
use kiln_io_thread::IoThreadSet;
use kiln_memory::GuestMemory;
use kiln_pci::{MsixSink, PciBusState};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::driver::register;
use super::pci::TestPci;
use super::recorder::InterruptRecorder;
use crate::{
    CoreState, DeviceCounters, MmioState, MmioTransport, PciTransport, PciTransportState,
    TransportError, VirtioDevice, VirtioTransport,
};

/// Makes a test out of each of these functions for each transport: they take the
/// [`TransportKind`] to use. The tests are in a module for each transport, with the names of the
/// functions.
///
/// ```
/// use kiln_virtio_device::testing::{TransportKind, over_each_transport};
///
/// fn a_device_is_found(kind: TransportKind) {
///     // ...
/// }
///
/// over_each_transport!(a_device_is_found);
/// ```
#[macro_export]
#[doc(hidden)]
macro_rules! __over_each_transport {
    ($($test:ident),+ $(,)?) => {
        $crate::__over_each_transport!(@ mmio, Mmio, $($test),+);
        $crate::__over_each_transport!(@ pci, Pci, $($test),+);
    };
    (@ $module:ident, $kind:ident, $($test:ident),+) => {
        mod $module {
            $(
                #[test]
                fn $test() {
                    super::$test($crate::testing::TransportKind::$kind);
                }
            )+
        }
    };
}

#[doc(inline)]
pub use crate::__over_each_transport as over_each_transport;

/// One of the transports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransportKind {
    /// [`MmioTransport`].
    Mmio,
    /// [`PciTransport`] on a bus of its own, with MSI-X.
    Pci,
}

/// A device behind one of the transports.
///
/// As a [`BusDevice`] it has the registers of the MMIO transport: over PCI an access to one goes
/// to what corresponds to it, and nowhere where there is nothing, or the value does not fit.
#[derive(Debug)]
pub enum TestTransport {
    /// A transport that is accessed as it is.
    Mmio(MmioTransport),
    /// A transport on a PCI bus.
    Pci(TestPci),
}

/// The state of a transport, and of the bus that it is on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum TestState {
    Mmio(MmioState),
    Pci {
        transport: PciTransportState,
        bus: PciBusState,
    },
}

impl TestState {
    /// What does not depend on the transport.
    pub fn core(&self) -> &CoreState {
        match self {
            Self::Mmio(state) => &state.core,
            Self::Pci { transport, .. } => &transport.core,
        }
    }

    /// What does not depend on the transport.
    pub fn core_mut(&mut self) -> &mut CoreState {
        match self {
            Self::Mmio(state) => &mut state.core,
            Self::Pci { transport, .. } => &mut transport.core,
        }
    }
}

impl TestTransport {
    pub(super) fn new(
        kind: TransportKind,
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        io: impl Into<IoThreadSet>,
        line: &Arc<InterruptRecorder>,
    ) -> Result<Self, TransportError> {
        match kind {
            TransportKind::Mmio => {
                let line = Arc::clone(line) as Arc<dyn InterruptLine>;
                MmioTransport::new(device, memory, io, line).map(Self::Mmio)
            }
            TransportKind::Pci => {
                let sink = Arc::clone(line) as Arc<dyn MsixSink>;
                let vectors = PciTransport::vectors_for(&*device);
                let (transport, description) = PciTransport::new(device, memory, io, "test", sink)?;
                let pci = TestPci::new(transport, description, Arc::clone(line) as _);
                pci.enable_memory();
                pci.enable_msix(vectors);
                Ok(Self::Pci(pci))
            }
        }
    }

    pub(super) fn restore(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        io: impl Into<IoThreadSet>,
        line: &Arc<InterruptRecorder>,
        state: &TestState,
    ) -> Result<Self, TransportError> {
        match state {
            TestState::Mmio(state) => {
                let line = Arc::clone(line) as Arc<dyn InterruptLine>;
                MmioTransport::restore(device, memory, io, line, state).map(Self::Mmio)
            }
            TestState::Pci { transport, bus } => {
                let sink = Arc::clone(line) as Arc<dyn MsixSink>;
                let (transport, description) =
                    PciTransport::restore(device, memory, io, "test", sink, transport)?;
                let pci = TestPci::new(transport, description, Arc::clone(line) as _);
                pci.bus.restore(bus).unwrap();
                Ok(Self::Pci(pci))
            }
        }
    }

    /// Which of the transports it is.
    pub fn kind(&self) -> TransportKind {
        match self {
            Self::Mmio(_) => TransportKind::Mmio,
            Self::Pci(_) => TransportKind::Pci,
        }
    }

    /// What is special about PCI.
    ///
    /// # Panics
    ///
    /// Where it is another transport.
    pub fn pci(&self) -> &TestPci {
        match self {
            Self::Pci(pci) => pci,
            Self::Mmio(_) => panic!("this is no PCI transport"),
        }
    }

    fn any(&self) -> &dyn VirtioTransport {
        match self {
            Self::Mmio(transport) => transport,
            Self::Pci(pci) => &*pci.transport,
        }
    }

    /// See [`VirtioTransport::kicks`].
    pub fn kicks(&self) -> Vec<Arc<EventFd>> {
        self.any().kicks()
    }

    /// See [`VirtioTransport::counters`].
    pub fn counters(&self) -> Arc<DeviceCounters> {
        self.any().counters()
    }

    /// See [`VirtioTransport::pause`].
    pub fn pause(&self) {
        self.any().pause();
    }

    /// See [`VirtioTransport::resume`].
    pub fn resume(&self) {
        self.any().resume();
    }

    /// See [`VirtioTransport::reset`].
    pub fn reset(&self) {
        self.any().reset();
    }

    /// The state of the transport.
    ///
    /// # Errors
    ///
    /// [`TransportError::NotPaused`] while the device works on its queues.
    pub fn state(&self) -> Result<TestState, TransportError> {
        match self {
            Self::Mmio(transport) => transport.state().map(TestState::Mmio),
            Self::Pci(pci) => Ok(TestState::Pci {
                transport: pci.transport.state()?,
                bus: pci.bus.state(),
            }),
        }
    }
}

impl BusDevice for TestTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self {
            Self::Mmio(transport) => transport.read(offset, data),
            Self::Pci(pci) => match offset.checked_sub(register::CONFIG) {
                Some(offset) => pci.read_config(offset, data),
                None => pci.read_register(offset, data),
            },
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        match self {
            Self::Mmio(transport) => return transport.write(offset, data),
            Self::Pci(pci) => match offset.checked_sub(register::CONFIG) {
                Some(offset) => pci.write_config(offset, data),
                None => pci.write_register(offset, data),
            },
        }
        ControlFlow::Continue(())
    }
}
