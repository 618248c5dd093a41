//! The device: what it offers, its configuration, and what it is made from.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use kiln_virtio_device::{
    ActivateError, Activation, ActiveQueue, VirtioDevice, Worker, read_config_bytes,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::handler::{Handler, Patience};
use super::host::HostSocket;

/// Packets to the driver, packets from it, and events.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
/// Connections are streams (`VIRTIO_VSOCK_F_STREAM`; virtio 1.3, section 5.10.3).
const STREAM: u64 = 1 << 0;
/// The smallest context id that is not reserved (virtio 1.3, section 5.10.4).
const MIN_CID: u32 = 3;
const MAX_CID: u32 = u32::MAX - 1;

/// Why a socket device could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VsockError {
    /// The context id is reserved.
    #[error("give a guest the vsock context id {cid}: it must be from {MIN_CID} to {MAX_CID}")]
    Cid {
        /// What was given.
        cid: u32,
    },
    /// The path is empty, or leaves no room for the numbers of ports.
    #[error(
        "listen for vsock at `{}`: the path must have 1 to {max} bytes, so that a port can follow it",
        path.display()
    )]
    PathLength {
        /// What was given.
        path: PathBuf,
        /// The most bytes that it may have.
        max: usize,
    },
    /// There is something at the path.
    #[error(
        "listen for vsock at `{}`: the path exists; remove it if no other machine listens there",
        path.display()
    )]
    PathExists {
        /// What was given.
        path: PathBuf,
    },
    /// There can be no socket at the path.
    #[error("listen for vsock at `{}`", path.display())]
    Listen {
        /// What was given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There are no file descriptors.
    #[error("make the timer and the eventfds of a vsock device")]
    Resources(#[source] io::Error),
}

/// What a socket device has done since it was made.
#[derive(Debug, Default)]
pub struct VsockCounters {
    /// Connections there are now, in whatever state.
    pub open: AtomicU64,
    /// Connections that the host asked for and the guest accepted.
    pub from_host: AtomicU64,
    /// Connections that the guest asked for and a program of the host took.
    pub from_guest: AtomicU64,
    /// Clients and requests of the guest that got no connection: nobody listened, there were too
    /// many, or it took too long.
    pub refused: AtomicU64,
    /// Resets sent to the driver, the answers to its own ends of connections among them.
    pub resets: AtomicU64,
    /// Packets given to the driver.
    pub rx_packets: AtomicU64,
    /// The bytes of data in these.
    pub rx_bytes: AtomicU64,
    /// Buffers of the driver that were too short for a packet.
    pub rx_errors: AtomicU64,
    /// Packets that the driver sent.
    pub tx_packets: AtomicU64,
    /// The bytes of data in these that were passed on.
    pub tx_bytes: AtomicU64,
    /// What the driver sent that was no packet of this guest.
    pub tx_dropped: AtomicU64,
}

/// A virtio socket device over Unix sockets of the host.
///
/// A pause of the machine leaves connections as they are. A reset by the driver closes them all.
/// They do not survive a snapshot: the device has no state but that of its transport, and a guest
/// that is restored finds its connections reset when it uses them.
pub struct Vsock {
    worker: Worker<Handler>,
    counters: Arc<VsockCounters>,
    config: [u8; 8],
}

impl Vsock {
    /// A device for the guest with this context id, from 3 on, with its listening socket at `path`,
    /// where nothing may be yet. The file goes when the device does.
    ///
    /// # Errors
    ///
    /// [`VsockError`] where the context id is reserved, or there can be no socket at the path.
    pub fn new(cid: u32, path: impl AsRef<Path>) -> Result<Self, VsockError> {
        Self::with_patience(cid, path.as_ref(), Patience::default())
    }

    pub(super) fn with_patience(
        cid: u32,
        path: &Path,
        patience: Patience,
    ) -> Result<Self, VsockError> {
        if !(MIN_CID..=MAX_CID).contains(&cid) {
            return Err(VsockError::Cid { cid });
        }
        let host = HostSocket::listen(path)?;
        let counters = Arc::new(VsockCounters::default());
        let handler = Handler::new(u64::from(cid), host, Arc::clone(&counters), patience);
        Ok(Self {
            worker: Worker::new(handler.map_err(VsockError::Resources)?),
            counters,
            config: u64::from(cid).to_le_bytes(),
        })
    }

    /// What the device has done, to be looked at while it works.
    pub fn counters(&self) -> Arc<VsockCounters> {
        Arc::clone(&self.counters)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        STREAM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.worker.activate(activation)
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        let queues = self.worker.deactivate();
        if let Some(handler) = self.worker.handler_mut() {
            handler.stop();
        }
        queues
    }

    fn reset(&mut self) {
        if let Some(handler) = self.worker.handler_mut() {
            handler.clear();
        }
    }
}

impl fmt::Debug for Vsock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vsock")
            .field("cid", &u64::from_le_bytes(self.config))
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}
