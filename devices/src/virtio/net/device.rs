//! The device: what it offers, its configuration, and the pairs of queues that it consists of.

use std::fmt;
use std::io;
use std::sync::Arc;

use kiln_io_thread::IoThreadSet;
use kiln_virtio_device::{
    ActivateError, Activation, ActiveQueue, VirtioDevice, Worker, read_config_bytes,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

use super::commands::Commands;
use super::features::{self, CONTROL, CTRL_GUEST_OFFLOADS, GUEST_CSUM, MAC, MQ};
use super::features::{FILTERS, GUEST_OFFLOADS, MRG_RXBUF, MTU, STATUS};
use super::pair::PairHandler;
use super::shared::{NetControl, NetState, Shared};
use super::vhost::{VhostError, VhostHandler};
use super::{MacAddress, NetBackend, NetCounters, NetRateLimits};

/// The header in front of every packet (virtio 1.3, section 5.1.6).
pub(super) const HEADER_BYTES: usize = 12;
/// The largest packet: a frame with 64 KiB and a VLAN tag, and the header.
pub(super) const MAX_PACKET: usize = HEADER_BYTES + 14 + 4 + 65536;

const QUEUE_SIZE: u16 = 256;
/// The most pairs of queues: each takes two interrupt vectors, of which a machine has not so many.
pub(super) const MAX_PAIRS: u16 = 64;
/// The least MTU that a device should tell of (virtio 1.3, section 5.1.4.1).
const MIN_MTU: u16 = 1280;

/// The configuration up to and with `mtu` (virtio 1.3, section 5.1.4): the address, the status, the
/// number of pairs of queues, the MTU.
const CONFIG_BYTES: usize = 12;

/// How a network device is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetOptions {
    /// The device's address; by default that which the network has for it, or a random one.
    pub mac: Option<MacAddress>,
    /// The number of pairs of queues, from 1 to 64, each of which can be worked on by a thread of
    /// its own; by default as many as the network has, which for most is one. The driver uses one
    /// until it asks for more.
    pub queue_pairs: Option<u16>,
    /// The largest payload of a frame in bytes, at least 1280; by default that of the network.
    pub mtu: Option<u16>,
    /// How much it carries in a time: by default any amount.
    pub rate_limits: NetRateLimits,
    /// Whether the host's kernel carries the packets (vhost-net). It takes a tap, and
    /// `/dev/vhost-net`; there are no filters, rate limits and counters then.
    pub vhost: bool,
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
    /// There are too few or too many pairs of queues.
    #[error("give a network device {pairs} pairs of queues: it can have 1 to {MAX_PAIRS}")]
    QueuePairs {
        /// What was given.
        pairs: u16,
    },
    /// The network has fewer pairs of queues.
    #[error("give a network device {pairs} pairs of queues: have another one of its network")]
    AddQueuePair {
        /// What was given.
        pairs: u16,
        /// What the network said.
        source: io::Error,
    },
    /// The MTU is too small.
    #[error("give a network device an MTU of {mtu} bytes: it is to have at least {MIN_MTU}")]
    Mtu {
        /// What was given.
        mtu: u16,
    },
    /// The state is not one that a device with these options can be in.
    #[error("restore a network device: {reason}")]
    State {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The kernel cannot carry its packets.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// There are no random numbers.
    #[error("choose a random MAC address")]
    Random(#[source] io::Error),
    /// There is no memory.
    #[error("allocate a network device's memory")]
    Memory(#[source] kiln_memory::Error),
}

/// A virtio network device.
///
/// Each pair of queues, one to receive and one to transmit, is worked on by one of the device's
/// threads in turn; the thread of the first has the control queue, too. Or the kernel works on them
/// all, and a thread of the device's has the control queue.
pub struct Net {
    work: Work,
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
    features: u64,
    /// The address that a driver finds after a reset.
    mac: MacAddress,
    mtu: Option<u16>,
}

/// Who carries the packets.
enum Work {
    /// We do, for each pair of queues.
    Ours(Vec<Worker<PairHandler>>),
    /// The kernel does.
    Vhost {
        worker: Box<Worker<VhostHandler>>,
        pairs: u16,
    },
}

impl Net {
    /// A device with this network.
    ///
    /// # Errors
    ///
    /// [`NetError`] where the options cannot be, the network has fewer queues, or the system gives
    /// no memory or random numbers.
    pub fn new(backend: impl NetBackend, options: NetOptions) -> Result<Self, NetError> {
        let mac = match options.mac.or_else(|| backend.mac()) {
            Some(mac) if mac.is_unicast() => mac,
            Some(mac) => return Err(NetError::Mac { mac }),
            None => MacAddress::random().map_err(NetError::Random)?,
        };
        Self::with_state(Box::new(backend), mac, &options, NetState::new(mac))
    }

    /// The device as it was when `state` was taken. The options are to be those that it was made
    /// with, and the same address: without one that is the state's.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and where the state is not one of such a device.
    pub fn from_state(
        backend: impl NetBackend,
        options: NetOptions,
        state: &NetState,
    ) -> Result<Self, NetError> {
        let mac = options.mac.unwrap_or(state.mac);
        for mac in [mac, state.mac] {
            if !mac.is_unicast() {
                return Err(NetError::Mac { mac });
            }
        }
        Self::with_state(Box::new(backend), mac, &options, state.clone())
    }

    fn with_state(
        mut backend: Box<dyn NetBackend>,
        mac: MacAddress,
        options: &NetOptions,
        state: NetState,
    ) -> Result<Self, NetError> {
        let pairs = options.queue_pairs.unwrap_or(backend.queue_pairs());
        if !(1..=MAX_PAIRS).contains(&pairs) {
            return Err(NetError::QueuePairs { pairs });
        }
        let mtu = match options.mtu {
            Some(mtu) if mtu < MIN_MTU => return Err(NetError::Mtu { mtu }),
            Some(mtu) => Some(mtu),
            None => backend.mtu().filter(|mtu| *mtu >= MIN_MTU),
        };
        let mut features = offered(&*backend, pairs, mtu);
        if options.vhost {
            if options.rate_limits != NetRateLimits::default() {
                return Err(VhostError::RateLimits.into());
            }
            features &= !FILTERS;
        }
        check_state(&state, pairs, features)?;
        let mut backends = Vec::new();
        for _ in 1..pairs {
            let another = backend.add_queue_pair();
            backends.push(another.map_err(|source| NetError::AddQueuePair { pairs, source })?);
        }
        let shared = Arc::new(Shared::new(state, options.rate_limits));
        let backends = std::iter::once(backend).chain(backends);
        let work = if options.vhost {
            let handler = VhostHandler::new(backends, Arc::clone(&shared))?;
            Work::Vhost {
                worker: Box::new(Worker::new(handler)),
                pairs,
            }
        } else {
            let workers = backends.zip(0..).map(|(backend, pair)| {
                PairHandler::new(pair, backend, Arc::clone(&shared)).map(Worker::new)
            });
            Work::Ours(
                workers
                    .collect::<Result<_, _>>()
                    .map_err(NetError::Memory)?,
            )
        };
        Ok(Self {
            work,
            shared,
            queue_sizes: vec![QUEUE_SIZE; 2 * usize::from(pairs) + 1],
            features,
            mac,
            mtu,
        })
    }

    /// The state, for [`from_state`](Self::from_state).
    pub fn state(&self) -> NetState {
        self.shared.state()
    }

    /// Calls `on_failure` with the reason each time when the network behind the device fails
    /// ([`NetBackend::failure`]), on an I/O thread. To be set before the device is active.
    pub fn on_failure(&mut self, on_failure: impl Fn(&str) + Send + 'static) {
        // A tap never fails so.
        if let Work::Ours(pairs) = &mut self.work
            && let Some(handler) = pairs.first_mut().and_then(Worker::handler_mut)
        {
            handler.on_failure = Some(Box::new(on_failure));
        }
    }

    /// The device's address, which the driver can change while it works.
    pub fn mac(&self) -> MacAddress {
        self.mac
    }

    /// How many pairs of queues it has.
    pub fn queue_pairs(&self) -> u16 {
        match &self.work {
            // At most `MAX_PAIRS`.
            Work::Ours(pairs) => pairs.len() as u16,
            Work::Vhost { pairs, .. } => *pairs,
        }
    }

    /// The host's side of the device.
    pub fn control(&self) -> NetControl {
        NetControl {
            shared: Arc::clone(&self.shared),
        }
    }

    /// What the device has done, to be looked at while it works.
    pub fn counters(&self) -> Arc<NetCounters> {
        Arc::clone(&self.shared.counters)
    }

    /// The control queue's index: it is behind the pairs, of which a driver that did not agree on
    /// several knows one (virtio 1.3, section 5.1.2).
    fn control_queue(&self, features: u64) -> u16 {
        let pairs = if features & MQ == 0 {
            1
        } else {
            self.queue_pairs()
        };
        2 * pairs
    }
}

/// The features that a device with this network offers.
fn offered(backend: &dyn NetBackend, pairs: u16, mtu: Option<u16>) -> u64 {
    let mut features = MAC | MRG_RXBUF | STATUS | CONTROL;
    features |= features::of_offloads(backend.offloads());
    if features & GUEST_CSUM == 0 {
        features &= !CTRL_GUEST_OFFLOADS;
    }
    if pairs > 1 {
        features |= MQ;
    }
    if mtu.is_some() {
        features |= MTU;
    }
    features
}

/// A state may come from a file.
fn check_state(state: &NetState, pairs: u16, features: u64) -> Result<(), NetError> {
    let wrong = |reason| Err(NetError::State { reason });
    if !(1..=pairs).contains(&state.queue_pairs) {
        return wrong("it has not as many pairs of queues as its driver uses");
    }
    if !state.filter.is_valid() {
        return wrong("no driver can have set such filters");
    }
    match state.offloads {
        Some(offloads) if offloads & !(features & GUEST_OFFLOADS) != 0 => {
            wrong("it has not the offloads that its driver uses")
        }
        _ => Ok(()),
    }
}

/// Gives each pair its queues, and its thread.
fn activate_pairs(
    pairs: &mut [Worker<PairHandler>],
    commands: Commands,
    activation: Activation,
) -> Result<(), ActivateError> {
    let control = commands.queue;
    let pair_of = |queue: u16| match queue {
        queue if queue == control => 0,
        queue => usize::from(queue / 2),
    };
    if let Some(first) = pairs.first_mut().and_then(Worker::handler_mut) {
        first.commands = Some(commands);
    }
    let threads = activation.io.len();
    let parts = activation.split(pairs.len(), pair_of);
    let mut result = Ok(());
    for (pair, (worker, mut part)) in pairs.iter_mut().zip(parts).enumerate() {
        if part.queues.is_empty() {
            if let Some(handler) = worker.handler_mut() {
                handler.rest();
            }
            continue;
        }
        // Both queues of a pair are on one thread.
        part.io = IoThreadSet::from(part.io.get(pair % threads).clone());
        // All are tried, so that each has its queues and gives them back.
        result = result.and(worker.activate(part));
    }
    result
}

/// Gives the kernel its queues, and a thread the control queue.
fn activate_vhost(
    worker: &mut Worker<VhostHandler>,
    commands: Commands,
    mut activation: Activation,
) -> Result<(), ActivateError> {
    let taken = match worker.handler_mut() {
        Some(handler) => handler.take(commands, &mut activation),
        None => Ok(()),
    };
    // Also where that failed, so that the queue comes back with the others.
    let activated = worker.activate(activation);
    taken.map_err(|error| ActivateError::with_source("make eventfds for the kernel", error))?;
    activated
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// Features need those that they build on (virtio 1.3, section 5.1.3.1).
    fn validate_features(&self, acknowledged: u64) -> bool {
        features::are_complete(acknowledged)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (mac, status) = self.shared.mac_and_status();
        let mut config = [0; CONFIG_BYTES];
        config[0..6].copy_from_slice(&mac.bytes());
        config[6..8].copy_from_slice(&status.to_le_bytes());
        if self.features & MQ != 0 {
            config[8..10].copy_from_slice(&self.queue_pairs().to_le_bytes());
        }
        config[10..12].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let control = self.control_queue(activation.features);
        let mut commands = Commands {
            queue: control,
            pairs: self.queue_pairs(),
            wakes: Vec::new(),
        };
        self.shared.connect(Arc::clone(&activation.interrupt));
        match &mut self.work {
            Work::Ours(pairs) => {
                let kicks = activation.queues.iter();
                commands.wakes = kicks
                    .filter(|queue| queue.index != control && queue.index % 2 == 0)
                    .map(|queue| Arc::clone(&queue.kick))
                    .collect();
                activate_pairs(pairs, commands, activation)
            }
            Work::Vhost { worker, .. } => activate_vhost(worker, commands, activation),
        }
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.shared.disconnect();
        match &mut self.work {
            Work::Ours(pairs) => pairs.iter_mut().flat_map(Worker::deactivate).collect(),
            Work::Vhost { worker, .. } => {
                let mut queues = worker.deactivate();
                if let Some(handler) = worker.handler_mut() {
                    queues.extend(handler.stop());
                }
                queues
            }
        }
    }

    fn reset(&mut self) {
        self.shared.reset(self.mac);
    }
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net")
            .field("mac", &self.mac)
            .field("queue_pairs", &self.queue_pairs())
            .field("counters", &self.shared.counters)
            .finish_non_exhaustive()
    }
}
