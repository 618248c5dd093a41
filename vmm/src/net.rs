//! A network interface of the machine.

use std::fmt;

use kiln_devices::virtio::net::{MacAddress, Net as NetDevice, NetBackend, NetOptions, Tap};

use crate::io_threads::DeviceIo;
use crate::{BuildError, CpuList, IoThreads, Transport};

/// A network interface: what is behind it, and its address.
pub struct Net {
    backend: Box<dyn NetBackend>,
    options: NetOptions,
    pub(crate) transport: Option<Transport>,
    pub(crate) io: DeviceIo,
}

impl Net {
    /// An interface on a tap interface of the host that exists (`ip tuntap add NAME mode tap`).
    ///
    /// # Errors
    ///
    /// [`BuildError::Tap`] where there is none of that name, it is in use, or may not be used.
    pub fn tap(name: &str) -> Result<Self, BuildError> {
        Ok(Self::new(Tap::open(name)?))
    }

    /// An interface with a backend of your own.
    pub fn new(backend: impl NetBackend) -> Self {
        Self {
            backend: Box::new(backend),
            options: NetOptions::default(),
            transport: None,
            io: DeviceIo::default(),
        }
    }

    /// The interface's address in the guest; a random one by default.
    pub fn mac(mut self, address: MacAddress) -> Self {
        self.options.mac = Some(address);
        self
    }

    /// How the guest reaches it, where that differs from the rest of the machine
    /// ([`VmBuilder::transport`](crate::VmBuilder::transport)).
    pub fn transport(mut self, transport: Transport) -> Self {
        self.transport = Some(transport);
        self
    }

    /// Who works on its queues, where that differs from the rest of the machine
    /// ([`VmBuilder::io_threads`](crate::VmBuilder::io_threads)).
    pub fn io_threads(mut self, threads: IoThreads) -> Self {
        self.io.threads = Some(threads);
        self
    }

    /// The host's CPUs that its I/O threads run on, where they are not those of all I/O threads
    /// ([`VmBuilder::io_affinity`](crate::VmBuilder::io_affinity)). It needs threads of its own.
    pub fn io_affinity(mut self, cpus: CpuList) -> Self {
        self.io.affinity = Some(cpus);
        self
    }

    pub(crate) fn into_device(self) -> Result<NetDevice, BuildError> {
        Ok(NetDevice::new(self.backend, self.options)?)
    }
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
