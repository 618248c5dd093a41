//! The one state machine of status, features and queue registers, under every transport.
//!
//! It knows nothing of where a register lies or how an interrupt gets to the guest: a transport
//! decodes its accesses into calls of [`VirtioCore`], and gives it a [`VirtioInterrupt`].

mod queue;
#[cfg(test)]
mod tests;

use std::io;
use std::mem;
use std::sync::Arc;

use kiln_io_thread::IoThreadSet;
use kiln_memory::GuestMemory;
use virtio_bindings::{virtio_config, virtio_ring};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::counters::Counted;
use crate::error::one_line;
use crate::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
use crate::status::{DEVICE_NEEDS_RESET, SharedStatus};
use crate::transport::NeedsResetHook;
use crate::{
    Activation, ActiveQueue, CoreState, DeviceCounters, TransportError, VirtioDevice,
    VirtioInterrupt,
};

use queue::QueueSlot;
pub(crate) use queue::{Half, QueueArea};

const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
const INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
/// Single queues can be reset (virtio 1.3, section 2.6.1).
const RING_RESET: u64 = 1 << virtio_config::VIRTIO_F_RING_RESET;
/// What every device offers, whatever its type.
const COMMON_FEATURES: u64 = VERSION_1 | EVENT_IDX | INDIRECT_DESC | RING_RESET;
/// The feature bits that belong to a device type (virtio 1.3, section 2.2).
const DEVICE_TYPE_FEATURES: u64 = ((1 << 24) - 1) | (u64::MAX << 50);
/// The status bits that a driver sets, in the order in which it does.
const DRIVER_BITS: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
const MAX_QUEUE_SIZE: u16 = 32768;

/// A device, the registers that its driver sees, and the queues while the device has none.
pub(crate) struct VirtioCore {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemory>,
    io: IoThreadSet,
    interrupt: Arc<dyn VirtioInterrupt>,
    shared: Arc<SharedStatus>,
    counters: Arc<DeviceCounters>,
    device_type: u32,
    offered: u64,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueSlot>,
    /// Queues that driver and device agreed on and that the device does not have: it is paused.
    held: Vec<ActiveQueue>,
    /// The device was activated, with how many queues.
    active: Option<usize>,
    paused: bool,
}

impl VirtioCore {
    /// The state of a device that was just reset.
    pub(crate) fn reset_state(device: &dyn VirtioDevice) -> CoreState {
        let queues = device.queue_max_sizes().iter().copied();
        CoreState {
            queues: queues.map(QueueSlot::reset_registers).collect(),
            ..Default::default()
        }
    }

    /// Puts a device behind registers in this state. Where the driver had set `DRIVER_OK` the
    /// device is paused, and [`resume`](Self::resume) makes it go on.
    pub(crate) fn from_state(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        io: IoThreadSet,
        interrupt: Arc<dyn VirtioInterrupt>,
        shared: Arc<SharedStatus>,
        state: &CoreState,
    ) -> Result<Self, TransportError> {
        let device_type = device.device_type();
        let offered = (device.features() & DEVICE_TYPE_FEATURES) | COMMON_FEATURES;
        let queues = queue_slots(device.as_ref(), state)?;
        let counters = Arc::new(DeviceCounters::new(queues.len()));
        let mut core = Self {
            device,
            memory,
            io,
            interrupt: Arc::new(Counted::new(interrupt, Arc::clone(&counters))),
            shared,
            counters,
            device_type,
            offered,
            device_features_select: state.device_features_select,
            driver_features_select: state.driver_features_select,
            driver_features: state.driver_features,
            queue_select: state.queue_select,
            queues,
            held: Vec::new(),
            active: None,
            paused: false,
        };
        let status = state.status;
        if status & FEATURES_OK != 0 && !core.accepts_features() {
            return Err(core.state_error("the features do not fit the device"));
        }
        if status & DRIVER_OK != 0 {
            if status & FEATURES_OK == 0 {
                return Err(core.state_error("DRIVER_OK without FEATURES_OK"));
            }
            core.paused = true;
            if status & DEVICE_NEEDS_RESET == 0 {
                core.held = core
                    .build_queues()
                    .map_err(|reason| core.state_error(&reason))?;
            }
        }
        Ok(core)
    }

    fn state_error(&self, reason: &str) -> TransportError {
        TransportError::State {
            device_type: self.device_type,
            reason: reason.to_owned(),
        }
    }

    pub(crate) fn on_needs_reset(&self, tell: NeedsResetHook) {
        self.shared.on_needs_reset(tell);
    }

    pub(crate) fn device_type(&self) -> u32 {
        self.device_type
    }

    /// What the device does.
    pub(crate) fn counters(&self) -> Arc<DeviceCounters> {
        Arc::clone(&self.counters)
    }

    /// The eventfds that tell the device of new buffers, in the order of the queues.
    pub(crate) fn kicks(&self) -> Vec<Arc<EventFd>> {
        self.queues
            .iter()
            .map(|queue| Arc::clone(&queue.kick))
            .collect()
    }

    /// Which 32 of the device's features are looked at.
    pub(crate) fn device_features_select(&self) -> u32 {
        self.device_features_select
    }

    pub(crate) fn select_device_features(&mut self, window: u32) {
        self.device_features_select = window;
    }

    /// Which 32 of the driver's features are written.
    pub(crate) fn driver_features_select(&self) -> u32 {
        self.driver_features_select
    }

    pub(crate) fn select_driver_features(&mut self, window: u32) {
        self.driver_features_select = window;
    }

    /// The selected 32 bits of the offered features. There are 64; the windows behind them are 0.
    pub(crate) fn device_features(&self) -> u32 {
        feature_window(self.device_features_select).map_or(0, |half| half.of(self.offered))
    }

    /// The selected 32 bits of the features that the driver accepted.
    pub(crate) fn driver_features(&self) -> u32 {
        feature_window(self.driver_features_select).map_or(0, |half| half.of(self.driver_features))
    }

    /// Writes the selected 32 bits of the features that the driver accepts. They are judged when
    /// the driver sets `FEATURES_OK`, and stay as they are from then on.
    pub(crate) fn set_driver_features(&mut self, value: u32) {
        if self.shared.has(FEATURES_OK) {
            return;
        }
        if let Some(half) = feature_window(self.driver_features_select) {
            self.driver_features = half.replace(self.driver_features, value);
        }
    }

    pub(crate) fn queue_select(&self) -> u32 {
        self.queue_select
    }

    pub(crate) fn select_queue(&mut self, queue: u32) {
        self.queue_select = queue;
    }

    /// The index of the selected queue, where there is one.
    pub(crate) fn selected_queue(&self) -> Option<usize> {
        let index = usize::try_from(self.queue_select).ok()?;
        (index < self.queues.len()).then_some(index)
    }

    fn selected(&self) -> Option<&QueueSlot> {
        self.queues.get(self.selected_queue()?)
    }

    /// The selected queue, where the driver may change its registers: before the device has
    /// started, and afterwards those of a queue that was reset.
    fn selected_mut(&mut self) -> Option<&mut QueueSlot> {
        if self.shared.has(DRIVER_OK) && !self.has_ring_reset() {
            return None;
        }
        let index = self.selected_queue()?;
        self.queues
            .get_mut(index)
            .filter(|queue| !queue.registers.ready)
    }

    /// Whether driver and device agreed on [`RING_RESET`].
    fn has_ring_reset(&self) -> bool {
        self.shared.has(FEATURES_OK) && self.driver_features & RING_RESET != 0
    }

    /// The largest size of the selected queue; 0 where there is no such queue.
    pub(crate) fn queue_max_size(&self) -> u16 {
        self.selected().map_or(0, |queue| queue.max_size)
    }

    /// The size of the selected queue; 0 where there is no such queue.
    pub(crate) fn queue_size(&self) -> u16 {
        self.selected().map_or(0, |queue| queue.registers.size)
    }

    /// Sets the size of the selected queue. One that is not a power of two, or too large, is
    /// ignored.
    pub(crate) fn set_queue_size(&mut self, size: u32) {
        if let Some(queue) = self.selected_mut() {
            queue.set_size(size);
        }
    }

    /// Where an area of the selected queue is; 0 where there is no such queue.
    pub(crate) fn queue_address(&self, area: QueueArea) -> u64 {
        self.selected().map_or(0, |queue| queue.address(area))
    }

    pub(crate) fn set_queue_address(&mut self, area: QueueArea, half: Half, value: u32) {
        if let Some(queue) = self.selected_mut() {
            let address = queue.address_mut(area);
            *address = half.replace(*address, value);
        }
    }

    pub(crate) fn queue_ready(&self) -> bool {
        self.selected().is_some_and(|queue| queue.registers.ready)
    }

    /// Enables the selected queue, or disables it again before the device has started.
    pub(crate) fn set_queue_ready(&mut self, ready: bool) {
        let Some(index) = self.selected_queue() else {
            return;
        };
        let started = self.shared.has(DRIVER_OK);
        let slot = &mut self.queues[index];
        if !started {
            slot.registers.ready = ready;
        } else if ready && !slot.registers.ready && self.has_ring_reset() {
            self.queues[index].registers.ready = true;
            self.add_queue(index);
        }
    }

    /// Reads the device's configuration; what lies beyond it is 0.
    pub(crate) fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }

    pub(crate) fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// The driver writes the device status (virtio 1.3, sections 2.1 and 3.1.1): 0 resets, several
    /// bits may come at once, and a bit that is set stays set.
    pub(crate) fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let current = self.shared.status();
        let mut new = value as u8 & DRIVER_BITS & !current;
        let driver_present = (current | new) & (ACKNOWLEDGE | DRIVER) == ACKNOWLEDGE | DRIVER;
        if new & FEATURES_OK != 0 && !(driver_present && self.accepts_features()) {
            new &= !FEATURES_OK;
        }
        let after = current | new;
        if after & FEATURES_OK == 0 || after & (FAILED | DEVICE_NEEDS_RESET) != 0 {
            new &= !DRIVER_OK;
        }
        self.shared.set(new);
        if new & DRIVER_OK != 0 {
            self.start();
        }
    }

    /// Whether the device works with the features that the driver accepted. A driver that does not
    /// accept `VERSION_1` is of the time before virtio 1.0.
    fn accepts_features(&self) -> bool {
        self.driver_features & VERSION_1 != 0
            && self.driver_features & !self.offered == 0
            && self.device.validate_features(self.driver_features)
    }

    fn start(&mut self) {
        match self.build_queues() {
            Ok(queues) => {
                self.held = queues;
                if !self.paused {
                    self.activate();
                }
            }
            Err(reason) => self.interrupt.needs_reset(&reason),
        }
    }

    /// Makes the queues that the driver enabled from their registers.
    fn build_queues(&self) -> Result<Vec<ActiveQueue>, String> {
        let indices = 0..self.queues.len();
        indices
            .filter(|&index| self.queues[index].registers.ready)
            .map(|index| self.build_queue(index))
            .collect()
    }

    fn build_queue(&self, index: usize) -> Result<ActiveQueue, String> {
        let slot = &self.queues[index];
        let event_idx = self.driver_features & EVENT_IDX != 0;
        let queue = slot
            .build(&self.memory, event_idx)
            .map_err(|reason| format!("queue {index}: {reason}"))?;
        Ok(ActiveQueue {
            // There are 65535 queues at most.
            index: index as u16,
            queue,
            kick: Arc::clone(&slot.kick),
            counters: Arc::clone(&self.counters.queues[index]),
        })
    }

    /// Resets the selected queue (virtio 1.3, section 2.6.1): when this returns, the device does
    /// not have it any more, and its registers are as after a reset of the device. The driver may
    /// then set it up and enable it again.
    ///
    /// Gives the queue's index, or `None` where there is no enabled queue to reset.
    pub(crate) fn reset_queue(&mut self) -> Option<usize> {
        let index = self.selected_queue()?;
        if !self.has_ring_reset() || !self.queues[index].registers.ready {
            return None;
        }
        self.rearrange(|core| {
            core.held.retain(|queue| usize::from(queue.index) != index);
            core.queues[index].reset();
        });
        Some(index)
    }

    /// The driver has enabled a queue behind the others, after it was reset.
    fn add_queue(&mut self, index: usize) {
        match self.build_queue(index) {
            Ok(queue) => self.rearrange(|core| {
                core.held.push(queue);
                core.held.sort_by_key(|queue| queue.index);
            }),
            Err(reason) => self.interrupt.needs_reset(&reason),
        }
    }

    /// Changes the held queues: takes them from the device before, if it has them, and gives it
    /// what there is then.
    fn rearrange(&mut self, change: impl FnOnce(&mut Self)) {
        let had_them = self.active.is_some();
        if had_them {
            self.held = self.deactivate();
        }
        change(self);
        if had_them && !self.shared.has(DEVICE_NEEDS_RESET) {
            self.activate();
        }
    }

    /// Gives the held queues to the device.
    fn activate(&mut self) {
        let queues = mem::take(&mut self.held);
        let kicks: Vec<_> = queues.iter().map(|queue| Arc::clone(&queue.kick)).collect();
        // Also where it fails: the device has the queues until it is deactivated.
        self.active = Some(queues.len());
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            features: self.driver_features,
            queues,
            interrupt: Arc::clone(&self.interrupt),
            io: self.io.clone(),
        };
        let span = self.shared.span();
        let activated = span.in_scope(|| self.device.activate(activation));
        match activated {
            // Buffers may have been made available while nobody listened.
            Ok(()) => kicks.iter().for_each(|kick| drop(kick.write(1))),
            Err(error) => self.interrupt.needs_reset(&one_line(&error)),
        }
    }

    /// Takes the queues back from the device, if it has them.
    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        let Some(given) = self.active.take() else {
            return Vec::new();
        };
        let span = self.shared.span();
        let mut queues = span.in_scope(|| self.device.deactivate());
        queues.sort_by_key(|queue| queue.index);
        if queues.len() != given && !self.shared.has(DEVICE_NEEDS_RESET) {
            self.interrupt
                .needs_reset(&"it lost its queues, so its worker has ended");
        }
        queues
    }

    /// Stops the device and puts everything back to the state after power-on, as a write of 0 to
    /// the device status does.
    pub(crate) fn reset(&mut self) {
        drop(self.deactivate());
        self.shared.span().in_scope(|| self.device.reset());
        self.held.clear();
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            queue.reset();
        }
        self.shared.clear();
    }

    /// Stops the device and keeps its queues, so that the state can be taken. Registers go on to
    /// answer; a driver that sets `DRIVER_OK` meanwhile is served after [`resume`](Self::resume).
    pub(crate) fn pause(&mut self) {
        if !self.paused {
            self.paused = true;
            self.held = self.deactivate();
        }
    }

    /// Lets a paused device go on.
    pub(crate) fn resume(&mut self) {
        if !mem::take(&mut self.paused) {
            return;
        }
        if self.shared.has(DRIVER_OK) && !self.shared.has(DEVICE_NEEDS_RESET) {
            self.activate();
        }
    }

    /// The state, of a device that does not work on its queues.
    pub(crate) fn state(&self) -> Result<CoreState, TransportError> {
        if self.active.is_some() {
            return Err(TransportError::NotPaused {
                device_type: self.device_type,
            });
        }
        let mut queues: Vec<_> = self.queues.iter().map(|queue| queue.registers).collect();
        for held in &self.held {
            if let Some(state) = queues.get_mut(usize::from(held.index)) {
                state.next_avail = held.queue.next_avail();
                state.next_used = held.queue.next_used();
            }
        }
        Ok(CoreState {
            status: self.shared.status(),
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            config_generation: self.shared.generation(),
            queues,
        })
    }
}

/// The half of the features that a selector names; there are two.
fn feature_window(select: u32) -> Option<Half> {
    match select {
        0 => Some(Half::Low),
        1 => Some(Half::High),
        _ => None,
    }
}

/// The device's queues with their registers in this state, which may come from a file.
fn queue_slots(
    device: &dyn VirtioDevice,
    state: &CoreState,
) -> Result<Vec<QueueSlot>, TransportError> {
    let device_type = device.device_type();
    let sizes = device.queue_max_sizes();
    if sizes.len() > usize::from(u16::MAX) {
        return Err(TransportError::QueueCount {
            device_type,
            count: sizes.len(),
        });
    }
    if sizes.len() != state.queues.len() {
        let reason = format!(
            "{} queues for a device of {}",
            state.queues.len(),
            sizes.len()
        );
        return Err(TransportError::State {
            device_type,
            reason,
        });
    }
    let mut slots = Vec::with_capacity(sizes.len());
    for ((index, &max_size), &registers) in (0_u16..).zip(sizes).zip(&state.queues) {
        if !max_size.is_power_of_two() || max_size > MAX_QUEUE_SIZE {
            let index = usize::from(index);
            return Err(TransportError::QueueSize {
                device_type,
                index,
                size: max_size,
            });
        }
        let size = registers.size;
        if !size.is_power_of_two() || size > max_size {
            let reason = format!("queue {index} has size {size} of at most {max_size}");
            return Err(TransportError::State {
                device_type,
                reason,
            });
        }
        let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source: io::Error| {
            TransportError::Kick {
                device_type,
                index,
                source,
            }
        })?;
        slots.push(QueueSlot {
            max_size,
            kick: Arc::new(kick),
            registers,
        });
    }
    Ok(slots)
}
