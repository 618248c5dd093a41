//! The device: what it offers, its configuration, and what lives on the I/O thread.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use kiln_io_thread::{EventSet, IoEvent, Registrar};
use kiln_virtio_device::{
    ActivateError, Activation, ActiveQueue, InterruptEvent, QueueError, QueueHandler, Turn,
    VirtioDevice, VirtioInterrupt, Worker, read_config_bytes,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net as raw;

use super::features::{GUEST_CSUM, GUEST_LARGE, MAC, MRG_RXBUF, MTU, STATUS};
use super::receive::{ReceiveMode, Receiver, Wait};
use super::transmit::transmit;
use super::{MacAddress, NetBackend, features};

/// The header in front of every packet (virtio 1.3, section 5.1.6).
pub(super) const HEADER_BYTES: usize = 12;
/// The largest packet: a frame with 64 KiB and a VLAN tag, and the header.
pub(super) const MAX_PACKET: usize = HEADER_BYTES + 14 + 4 + 65536;

const QUEUE_SIZE: u16 = 256;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// The least MTU that a device may tell of (virtio 1.3, section 5.1.4.1).
const MIN_MTU: u16 = 1280;
const LINK_UP: u16 = raw::VIRTIO_NET_S_LINK_UP as u16;

/// How a network device is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetOptions {
    /// The device's address; by default that which the network has for it, or a random one.
    pub mac: Option<MacAddress>,
}

/// Why a network device could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The address is a group's, or zero.
    #[error("give a network device the address {mac}: it is not that of one interface")]
    Mac {
        /// What was given.
        mac: MacAddress,
    },
    /// There are no random numbers.
    #[error("choose a random MAC address")]
    Random(#[source] io::Error),
    /// There is no memory.
    #[error("allocate a network device's memory")]
    Memory(#[source] kiln_memory::Error),
}

/// What a network device has done since it was made. Bytes are those of frames.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Packets given to the driver.
    pub rx_packets: AtomicU64,
    /// The bytes of these.
    pub rx_bytes: AtomicU64,
    /// Packets that were too large or too small for the driver.
    pub rx_dropped: AtomicU64,
    /// Errors of the network, and buffers of the driver of no use.
    pub rx_errors: AtomicU64,
    /// Packets that the network took.
    pub tx_packets: AtomicU64,
    /// The bytes of these.
    pub tx_bytes: AtomicU64,
    /// Packets that the network did not take.
    pub tx_dropped: AtomicU64,
}

/// A virtio network device with one pair of queues.
///
/// Its state is in the transport's state and in its options; a packet on its way when the device
/// is stopped may be lost, as on any wire.
pub struct Net {
    worker: Worker<NetHandler>,
    counters: Arc<NetCounters>,
    features: u64,
    mac: MacAddress,
    config: [u8; CONFIG_BYTES],
    /// The link's status, in the configuration.
    status: Arc<AtomicU16>,
}

/// The configuration up to and with `mtu` (virtio 1.3, section 5.1.4).
const CONFIG_BYTES: usize = 12;
/// Where the link's status is in it.
const STATUS_BYTES: std::ops::Range<usize> = 6..8;

impl Net {
    /// A device with this network.
    ///
    /// # Errors
    ///
    /// [`NetError`] where the options cannot be, or the system gives no memory or random numbers.
    pub fn new(backend: impl NetBackend, options: NetOptions) -> Result<Self, NetError> {
        let mac = match options.mac {
            Some(mac) if mac.is_unicast() => mac,
            Some(mac) => return Err(NetError::Mac { mac }),
            None => match backend.mac() {
                Some(mac) => mac,
                None => MacAddress::random().map_err(NetError::Random)?,
            },
        };
        let mtu = backend.mtu().filter(|mtu| *mtu >= MIN_MTU);
        let mut features = MAC | MRG_RXBUF | STATUS | features::of_offloads(backend.offloads());
        let mut config = [0; CONFIG_BYTES];
        config[0..6].copy_from_slice(&mac.bytes());
        // 8..10 is the number of queue pairs, which is not offered.
        if let Some(mtu) = mtu {
            features |= MTU;
            config[10..12].copy_from_slice(&mtu.to_le_bytes());
        }
        let counters = Arc::new(NetCounters::default());
        let status = Arc::new(AtomicU16::new(LINK_UP));
        let handler = NetHandler {
            backend: Box::new(backend),
            status: Arc::clone(&status),
            interrupt: None,
            on_failure: None,
            receiver: Receiver::new().map_err(NetError::Memory)?,
            counters: Arc::clone(&counters),
            watched: false,
        };
        Ok(Self {
            worker: Worker::new(handler),
            counters,
            features,
            mac,
            config,
            status,
        })
    }

    /// Calls `on_failure` with the reason each time when the network behind the device fails
    /// ([`NetBackend::failure`]), on an I/O thread. To be set before the device is active.
    pub fn on_failure(&mut self, on_failure: impl Fn(&str) + Send + 'static) {
        if let Some(handler) = self.worker.handler_mut() {
            handler.on_failure = Some(Box::new(on_failure));
        }
    }

    /// The device's address.
    pub fn mac(&self) -> MacAddress {
        self.mac
    }

    /// What the device has done, to be looked at while it works.
    pub fn counters(&self) -> Arc<NetCounters> {
        Arc::clone(&self.counters)
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    /// Features need those that they build on (virtio 1.3, section 5.1.3.1).
    fn validate_features(&self, acknowledged: u64) -> bool {
        features::are_complete(acknowledged)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = self.config;
        config[STATUS_BYTES].copy_from_slice(&self.status.load(Ordering::Acquire).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if let Some(handler) = self.worker.handler_mut() {
            handler.interrupt = Some(Arc::clone(&activation.interrupt));
        }
        self.worker.activate(activation)
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.worker.deactivate()
    }
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net")
            .field("mac", &self.mac)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

/// Called with the reason when the network fails.
type OnFailure = Box<dyn Fn(&str) + Send>;

/// What lives on the I/O thread: the network.
struct NetHandler {
    backend: Box<dyn NetBackend>,
    receiver: Receiver,
    counters: Arc<NetCounters>,
    /// Packets from the network are waited for.
    watched: bool,
    status: Arc<AtomicU16>,
    interrupt: Option<Arc<dyn VirtioInterrupt>>,
    on_failure: Option<OnFailure>,
}

impl NetHandler {
    /// The token of what says that there is room for packets to be sent.
    const ROOM: u32 = Self::FIRST_TOKEN + 1;

    /// Tells the driver when the network goes and comes.
    fn follow_link(&mut self) {
        let failure = self.backend.failure();
        let status = if failure.is_none() { LINK_UP } else { 0 };
        if self.status.swap(status, Ordering::AcqRel) == status {
            return;
        }
        match failure {
            Some(reason) => {
                tracing::warn!("the link is down: {reason}");
                if let Some(on_failure) = &self.on_failure {
                    on_failure(reason);
                }
            }
            None => tracing::info!("the link is up again"),
        }
        if let Some(interrupt) = &self.interrupt {
            interrupt.trigger(InterruptEvent::Config);
        }
    }

    /// Waits for packets only while the driver has buffers for them: a network that is ready and
    /// not read would keep the thread busy.
    fn wait(&mut self, wait: Wait, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        let watch = wait == Wait::Packets;
        if watch != self.watched {
            let fd = self.backend.readiness();
            if watch {
                registrar.add(&fd, Self::FIRST_TOKEN, EventSet::IN)?;
            } else {
                registrar.remove(&fd)?;
            }
            self.watched = watch;
        }
        Ok(())
    }
}

impl QueueHandler for NetHandler {
    fn start(&mut self, features: u64, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        self.watched = false;
        self.receiver.start(ReceiveMode {
            mergeable: features & MRG_RXBUF != 0,
            large: features & GUEST_LARGE != 0,
            flags: features & GUEST_CSUM != 0,
        });
        if let Some(fd) = self.backend.send_readiness() {
            registrar.add(&fd, Self::ROOM, EventSet::IN)?;
        }
        self.backend
            .set_offloads(features::guest_offloads(features))
    }

    fn process(
        &mut self,
        turn: &mut Turn<'_>,
        registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        match turn.index() {
            RECEIVE => {
                let wait = self
                    .receiver
                    .receive(&mut *self.backend, &self.counters, turn)?;
                self.wait(wait, registrar)?;
            }
            TRANSMIT => transmit(&mut *self.backend, &self.counters, turn)?,
            _ => {}
        }
        self.follow_link();
        Ok(())
    }

    fn ready(&mut self, event: IoEvent) -> Option<u16> {
        if event.token != Self::ROOM {
            return Some(RECEIVE);
        }
        // The driver need not have enabled the queue.
        self.backend.flush();
        Some(TRANSMIT)
    }
}
