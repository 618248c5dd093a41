//! What the device, its pairs of queues on their threads, and those who control it have in common.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_virtio_device::{InterruptEvent, VirtioInterrupt};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net as raw;
use vmm_sys_util::eventfd::EventFd;

use super::features::CTRL_VLAN;
use super::filter::ReceiveFilter;
use super::limits::Limiters;
use super::{MacAddress, NetCounters, NetRateLimits};

const LINK_UP: u16 = raw::VIRTIO_NET_S_LINK_UP as u16;
const ANNOUNCE: u16 = raw::VIRTIO_NET_S_ANNOUNCE as u16;

/// The state of a [`Net`](super::Net), besides that of its transport. A packet on its way when the
/// device is stopped may be lost, as on any wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The interface's address, as the driver has last set it.
    pub mac: MacAddress,
    /// Whether the host has the link up.
    pub link_up: bool,
    /// Whether the driver is asked to announce itself, and has not said that it did.
    pub announce: bool,
    /// Which packets the driver wants.
    pub filter: ReceiveFilter,
    /// How many pairs of queues the driver uses.
    pub queue_pairs: u16,
    /// The features of packets that the driver takes, where it has chosen others than those it
    /// agreed on.
    pub offloads: Option<u64>,
}

impl NetState {
    /// That of a device that was just made, or reset.
    pub(super) fn new(mac: MacAddress) -> Self {
        Self {
            mac,
            link_up: true,
            announce: false,
            filter: ReceiveFilter::default(),
            queue_pairs: 1,
            offloads: None,
        }
    }
}

/// What a pair of queues works by.
#[derive(Clone, Debug)]
pub(super) struct View {
    /// The driver uses the pair.
    pub(super) enabled: bool,
    /// Packets come and go.
    pub(super) link_up: bool,
    /// The features of packets that the driver takes.
    pub(super) offloads: u64,
    own: MacAddress,
    filters_vlans: bool,
    filter: ReceiveFilter,
}

impl View {
    /// Nothing is known yet.
    pub(super) fn unknown() -> Self {
        Self {
            enabled: false,
            link_up: false,
            offloads: 0,
            own: MacAddress::new([0; 6]),
            filters_vlans: false,
            filter: ReceiveFilter::default(),
        }
    }

    /// Every packet is wanted.
    pub(super) fn wants_all(&self) -> bool {
        self.filter.promiscuous && self.link_up
    }

    /// Whether a packet is wanted that begins so.
    pub(super) fn wants(&self, frame: &[u8; super::filter::HEAD_BYTES]) -> bool {
        self.link_up && self.filter.wants(self.own, self.filters_vlans, frame)
    }
}

pub(super) struct Shared {
    inner: Mutex<Inner>,
    /// Changes with everything that the pairs' [`View`]s are of.
    generation: AtomicU32,
    pub(super) counters: Arc<NetCounters>,
    pub(super) rate_limits: Limiters,
}

struct Inner {
    state: NetState,
    /// There is a network behind the device.
    network_up: bool,
    /// The way to the driver, while there is one that listens.
    driver: Option<Arc<dyn VirtioInterrupt>>,
    /// The driver is to be told of the status as soon as it listens.
    untold: bool,
    /// To be written when the host changes something, where no packets come by that would see it.
    wake: Option<EventFd>,
}

impl Inner {
    fn status(&self) -> u16 {
        let mut status = 0;
        if self.state.link_up && self.network_up {
            status |= LINK_UP;
        }
        if self.state.announce {
            status |= ANNOUNCE;
        }
        status
    }

    fn tell(&mut self) {
        match &self.driver {
            Some(driver) => driver.trigger(InterruptEvent::Config),
            None => self.untold = true,
        }
    }
}

impl Shared {
    pub(super) fn new(state: NetState, rate_limits: NetRateLimits) -> Self {
        Self {
            rate_limits: Limiters::new(rate_limits),
            inner: Mutex::new(Inner {
                state,
                network_up: true,
                driver: None,
                untold: false,
                wake: None,
            }),
            generation: AtomicU32::new(0),
            counters: Arc::default(),
        }
    }

    /// What this guards is whole at every step, whoever panicked.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state(&self) -> NetState {
        self.lock().state.clone()
    }

    /// The address and the status in the configuration.
    pub(super) fn mac_and_status(&self) -> (MacAddress, u16) {
        let inner = self.lock();
        (inner.state.mac, inner.status())
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// What this pair works by, for a driver with these features.
    pub(super) fn view(&self, pair: u16, features: u64) -> View {
        let inner = self.lock();
        View {
            enabled: pair < inner.state.queue_pairs,
            link_up: inner.state.link_up,
            offloads: inner.state.offloads.unwrap_or(features),
            own: inner.state.mac,
            filters_vlans: features & CTRL_VLAN != 0,
            filter: inner.state.filter.clone(),
        }
    }

    /// Changes the state; the pairs see it with their next packet.
    pub(super) fn change<R>(&self, change: impl FnOnce(&mut NetState) -> R) -> R {
        let mut inner = self.lock();
        let result = change(&mut inner.state);
        self.generation.fetch_add(1, Ordering::Release);
        result
    }

    /// Changes what the status is of, and tells the driver where it is another one then.
    fn change_status(&self, change: impl FnOnce(&mut Inner)) {
        let mut inner = self.lock();
        let before = inner.status();
        change(&mut inner);
        self.generation.fetch_add(1, Ordering::Release);
        // With the lock held, so that no interrupt comes behind a reset of the device.
        if inner.status() != before {
            inner.tell();
        }
        if let Some(wake) = &inner.wake {
            // It fails only where the counter is full, and then it is woken anyway.
            let _ = wake.write(1);
        }
    }

    /// Has this written when the host changes something: the kernel carries the packets.
    pub(super) fn wake_by(&self, event: EventFd) {
        self.lock().wake = Some(event);
    }

    /// Whether the kernel carries the packets.
    fn is_vhost(&self) -> bool {
        self.lock().wake.is_some()
    }

    /// Whether there is a network behind the device.
    pub(super) fn set_network(&self, up: bool) {
        self.change_status(|inner| inner.network_up = up);
    }

    /// The driver has announced itself.
    pub(super) fn announced(&self) {
        self.lock().state.announce = false;
    }

    /// A driver listens from now on. It is told of what changed while none did.
    pub(super) fn connect(&self, driver: Arc<dyn VirtioInterrupt>) {
        let mut inner = self.lock();
        if std::mem::take(&mut inner.untold) {
            driver.trigger(InterruptEvent::Config);
        }
        inner.driver = Some(driver);
    }

    /// No driver listens from now on.
    pub(super) fn disconnect(&self) {
        self.lock().driver = None;
    }

    /// A driver begins anew: it finds nothing of what another has set. What the host has set stays.
    pub(super) fn reset(&self, mac: MacAddress) {
        let mut inner = self.lock();
        inner.state = NetState {
            link_up: inner.state.link_up,
            ..NetState::new(mac)
        };
        inner.untold = false;
        self.generation.fetch_add(1, Ordering::Release);
    }
}

/// The host's side of a network device. It can be cloned and used on any thread, at any time; where
/// there is no driver, it finds what was set when it comes.
#[derive(Clone)]
pub struct NetControl {
    pub(super) shared: Arc<Shared>,
}

impl NetControl {
    /// Plugs the cable in or out. While it is out, packets in both directions are dropped.
    pub fn set_link(&self, up: bool) {
        self.shared.change_status(|inner| inner.state.link_up = up);
    }

    /// Whether the driver sees its link up: the cable is in, and there is a network.
    pub fn is_link_up(&self) -> bool {
        self.shared.lock().status() & LINK_UP != 0
    }

    /// Asks the driver to announce the interface to the network, as is to be done where it has come
    /// to another place. A driver that can't do that does nothing.
    pub fn announce(&self) {
        self.shared
            .change_status(|inner| inner.state.announce = true);
    }

    /// The interface's address, which the driver can change.
    pub fn mac(&self) -> MacAddress {
        self.shared.mac_and_status().0
    }

    /// How many pairs of queues the driver uses.
    pub fn queue_pairs(&self) -> u16 {
        self.shared.lock().state.queue_pairs
    }

    /// How much the interface carries in a time.
    pub fn rate_limits(&self) -> NetRateLimits {
        self.shared.rate_limits.get()
    }

    /// Changes how much the interface carries in a time, from now on. What it carried before counts
    /// on where there was a limit already. An interface with vhost-net has no limits, and takes
    /// none: that is logged.
    pub fn set_rate_limits(&self, limits: NetRateLimits) {
        if self.shared.is_vhost() {
            tracing::warn!(
                "set the rate limits of a network interface: it has none with vhost-net"
            );
            return;
        }
        self.shared.rate_limits.set(limits);
    }

    /// What the device has done, to be looked at while it works: nothing, where the kernel does it
    /// (vhost-net).
    pub fn counters(&self) -> Arc<NetCounters> {
        Arc::clone(&self.shared.counters)
    }
}

impl fmt::Debug for NetControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetControl")
            .field("state", &self.shared.state())
            .finish_non_exhaustive()
    }
}
