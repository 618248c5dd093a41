//! The machine's socket device.

use std::path::PathBuf;

use kiln_devices::virtio::vsock::Vsock as VsockDevice;

use crate::{BuildError, Transport};

/// A socket device: streams between programs of the guest (`AF_VSOCK`) and programs of the host,
/// by Unix sockets. A machine has one at most.
///
/// - A program of the host connects to the socket at the device's path and sends `CONNECT port` on
///   a line. Once a program of the guest that listens on that port has the connection, it receives
///   `OK port` on a line, and then the stream; where there is none, its socket is closed.
/// - A program of the guest connects to context id 2 and a port, for which a program of the host
///   listens at the device's path with `_` and the port behind it.
///
/// Connections survive a pause of the machine, and no reset by the guest's driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vsock {
    cid: u32,
    path: PathBuf,
    pub(crate) transport: Option<Transport>,
}

impl Vsock {
    /// A device for a guest with this context id, from 3 to 4294967294, by which it is known in the
    /// guest itself; no other machine of the host needs to care. The socket at `path` is made when
    /// the machine is built, where nothing may be yet, and goes with the machine.
    pub fn new(cid: u32, path: impl Into<PathBuf>) -> Self {
        Self {
            cid,
            path: path.into(),
            transport: None,
        }
    }

    /// How the guest reaches it, where that differs from the rest of the machine
    /// ([`VmBuilder::transport`](crate::VmBuilder::transport)).
    pub fn transport(mut self, transport: Transport) -> Self {
        self.transport = Some(transport);
        self
    }

    pub(crate) fn into_device(self) -> Result<VsockDevice, BuildError> {
        Ok(VsockDevice::new(self.cid, self.path)?)
    }
}
