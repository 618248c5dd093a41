//! One pair of queues, and who works on it: the kernel, or nobody.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kiln_memory::GuestMemory;
use kiln_virtio_device::{ActiveQueue, InterruptEvent, VirtioInterrupt};
use rustix::io::Errno;
use virtio_queue::{QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::VhostError;
use super::kernel::{Kernel, RingEvents};
use crate::virtio::net::NetBackend;
use crate::virtio::net::features;
use crate::virtio::net::shared::View;

/// A pair's rings, as the kernel numbers them.
const RINGS: [usize; 2] = [0, TRANSMIT];
const TRANSMIT: usize = 1;
/// The most packets that can wait in a tap, and some more.
const WAITING: usize = 4096;

/// A queue of the device with the eventfds by which the kernel works on it.
pub(super) struct Ring {
    pub(super) active: ActiveQueue,
    /// The kernel writes it to interrupt the driver.
    pub(super) call: EventFd,
    /// The transport does not listen to it: we do, and tell the transport.
    pub(super) is_relayed: bool,
    /// The kernel writes it when the rings are malformed.
    pub(super) error: EventFd,
    /// The kernel was told of it since the device is active.
    is_told: bool,
}

impl Ring {
    /// The queue comes back where there are no eventfds for it.
    pub(super) fn new(
        active: ActiveQueue,
        interrupt: &dyn VirtioInterrupt,
    ) -> Result<Self, (ActiveQueue, io::Error)> {
        let notifier = interrupt.notifier(InterruptEvent::Queue(active.index));
        let is_relayed = notifier.is_none();
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        let call = notifier.map_or_else(event, Ok);
        match call.and_then(|call| Ok((call, event()?))) {
            Ok((call, error)) => Ok(Self {
                active,
                call,
                is_relayed,
                error,
                is_told: false,
            }),
            Err(error) => Err((active, error)),
        }
    }

    /// Tells the driver of what the kernel has told us.
    pub(super) fn relay(&self, interrupt: &dyn VirtioInterrupt) {
        if self.is_relayed && self.call.read().is_ok() {
            interrupt.trigger(InterruptEvent::Queue(self.active.index));
        }
    }
}

pub(super) struct Pair {
    pub(super) backend: Box<dyn NetBackend>,
    kernel: Kernel,
    /// Those that the driver enabled, at their number.
    rings: [Option<Ring>; 2],
    /// The driver uses the pair, as the backend was told.
    is_enabled: Option<bool>,
    /// What the backend was told of the driver's offloads.
    offloads: Option<u64>,
    /// The kernel works on it.
    is_running: bool,
    /// The link has been down since it did.
    was_down: bool,
}

impl Pair {
    pub(super) fn new(backend: Box<dyn NetBackend>) -> Result<Self, VhostError> {
        if backend.vhost_fd().is_none() {
            return Err(VhostError::NotATap);
        }
        Ok(Self {
            backend,
            kernel: Kernel::open()?,
            rings: [None, None],
            is_enabled: None,
            offloads: None,
            is_running: false,
            was_down: false,
        })
    }

    /// Takes a queue that the driver enabled, of this pair.
    pub(super) fn put(&mut self, ring: Ring) {
        let at = usize::from(ring.active.index % 2);
        if let Some(place) = self.rings.get_mut(at) {
            *place = Some(ring);
        }
    }

    pub(super) fn rings(&self) -> impl Iterator<Item = &Ring> {
        self.rings.iter().flatten()
    }

    /// The driver is about to use the device.
    pub(super) fn prepare(
        &mut self,
        memory: &Arc<GuestMemory>,
        features: u64,
    ) -> Result<(), VhostError> {
        (self.is_enabled, self.offloads) = (None, None);
        self.was_down = false;
        if self.rings().next().is_none() {
            return Ok(());
        }
        self.kernel.prepare(memory, features)?;
        for (number, ring) in RINGS.into_iter().zip(&mut self.rings) {
            let Some(ring) = ring else { continue };
            let events = RingEvents {
                kick: &ring.active.kick,
                call: &ring.call,
                error: &ring.error,
            };
            self.kernel.set_ring(number, &ring.active.queue, &events)?;
            ring.is_told = true;
        }
        Ok(())
    }

    /// Follows what the driver and the host have set.
    pub(super) fn follow(
        &mut self,
        view: &View,
        memory: &GuestMemory,
        interrupt: &dyn VirtioInterrupt,
    ) -> Result<(), VhostError> {
        let network = |what| move |source| VhostError::Request { what, source };
        let enable = view.enabled && self.rings().next().is_some();
        if self.is_enabled != Some(enable) {
            if !enable {
                self.halt()?;
            }
            let told = self.backend.set_enabled(enable);
            told.map_err(network("have the tap use a queue or not"))?;
            self.is_enabled = Some(enable);
        }
        if !enable {
            return Ok(());
        }
        if self.offloads != Some(view.offloads) {
            let offloads = features::guest_offloads(view.offloads);
            let told = self.backend.set_offloads(offloads);
            told.map_err(network("set the tap's offloads"))?;
            self.offloads = Some(view.offloads);
        }
        if view.link_up {
            self.run(memory, interrupt)
        } else {
            self.was_down = true;
            self.halt()
        }
    }

    /// Has the kernel work on the queues.
    fn run(
        &mut self,
        memory: &GuestMemory,
        interrupt: &dyn VirtioInterrupt,
    ) -> Result<(), VhostError> {
        if self.is_running {
            return Ok(());
        }
        if std::mem::take(&mut self.was_down) {
            self.drop_packets(memory, interrupt)?;
        }
        // Set first: where one fails, the other is to be halted.
        self.is_running = true;
        let tap = self.backend.vhost_fd().ok_or(VhostError::NotATap)?;
        for (number, _) in present(&self.rings) {
            self.kernel.connect(number, tap)?;
        }
        Ok(())
    }

    /// Has the kernel leave the queues alone.
    pub(super) fn halt(&mut self) -> Result<(), VhostError> {
        if std::mem::take(&mut self.is_running) {
            for (number, _) in present(&self.rings) {
                self.kernel.disconnect(number)?;
            }
        }
        Ok(())
    }

    /// Drops what came from both sides while the link was down: nothing of it comes later.
    fn drop_packets(
        &mut self,
        memory: &GuestMemory,
        interrupt: &dyn VirtioInterrupt,
    ) -> Result<(), VhostError> {
        if let Some(tap) = self.backend.vhost_fd() {
            drop_received(tap);
        }
        let Some(ring) = &mut self.rings[TRANSMIT] else {
            return Ok(());
        };
        let queue = &mut ring.active.queue;
        queue.set_next_avail(self.kernel.position(TRANSMIT)?);
        if drop_sent(ring, memory).map_err(malformed)? {
            interrupt.trigger(InterruptEvent::Queue(ring.active.index));
        }
        let position = ring.active.queue.next_avail();
        self.kernel.set_position(TRANSMIT, position)
    }

    /// Takes the queues back from the kernel, as far as it has followed them.
    pub(super) fn stop(
        &mut self,
        memory: &GuestMemory,
        interrupt: &dyn VirtioInterrupt,
    ) -> Vec<ActiveQueue> {
        // It fails where there is no such ring, or nothing behind it: never.
        if let Err(error) = self.halt() {
            tracing::error!("{error}");
        }
        let mut queues = Vec::new();
        for (number, place) in RINGS.into_iter().zip(&mut self.rings) {
            let Some(mut ring) = place.take() else {
                continue;
            };
            if ring.is_told
                && let Ok(position) = self.kernel.position(number)
            {
                ring.active.queue.set_next_avail(position);
                follow_used(&mut ring, memory);
                ring.relay(interrupt);
            }
            queues.push(ring.active);
        }
        queues
    }
}

/// The rings that there are, with their numbers.
fn present(rings: &[Option<Ring>; 2]) -> impl Iterator<Item = (usize, &Ring)> {
    let numbered = RINGS.into_iter().zip(rings);
    numbered.filter_map(|(number, ring)| Some((number, ring.as_ref()?)))
}

/// What the kernel has used is in the guest's memory alone.
fn follow_used(ring: &mut Ring, memory: &GuestMemory) {
    let queue = &mut ring.active.queue;
    if let Ok(used) = queue.used_idx(memory, std::sync::atomic::Ordering::Acquire) {
        queue.set_next_used(used.0);
    }
}

/// Gives the driver back what it has made available to be sent; returns whether it wants to be told.
fn drop_sent(ring: &mut Ring, memory: &GuestMemory) -> Result<bool, virtio_queue::Error> {
    follow_used(ring, memory);
    let queue = &mut ring.active.queue;
    // No more than the queue's size, or it is an error.
    let heads: Vec<u16> = queue
        .iter(memory)?
        .map(|chain| chain.head_index())
        .collect();
    for head in &heads {
        queue.add_used(memory, *head, 0)?;
    }
    Ok(!heads.is_empty() && queue.needs_notification(memory)?)
}

fn malformed(error: virtio_queue::Error) -> VhostError {
    VhostError::Request {
        what: "follow the rings of a queue",
        source: io::Error::other(error),
    }
}

/// Drops the packets that wait in a tap, of which a read takes one whole.
fn drop_received(tap: BorrowedFd<'_>) {
    for _ in 0..WAITING {
        if let Err(Errno::AGAIN) = rustix::io::read(tap, &mut [0; 64]) {
            return;
        }
    }
}
