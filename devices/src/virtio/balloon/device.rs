//! The device: what it offers, its configuration, and its state.

use std::fmt;
use std::io;
use std::sync::Arc;

use kiln_memory::MemorySize;
use kiln_virtio_device::{
    ActivateError, Activation, ActiveQueue, VirtioDevice, Worker, read_config_bytes,
};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::BalloonControl;
use super::control::{Shared, pages, size};
use super::handler::BalloonHandler;

/// Feature bits (virtio 1.3, section 5.5.3).
pub(super) const STATS_VQ: u64 = 1 << 1;
pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
pub(super) const PAGE_REPORTING: u64 = 1 << 5;

const QUEUE_SIZE: u16 = 128;
/// Inflate, deflate and statistics, and two for reports: see [`Role`](super::handler::Role).
const QUEUE_SIZES: [u16; 5] = [QUEUE_SIZE, QUEUE_SIZE, 16, QUEUE_SIZE, QUEUE_SIZE];
/// The queues of a device without reports.
const QUEUES_BEFORE_REPORTS: usize = 3;

/// The configuration (virtio 1.3, section 5.5.4): `num_pages`, which the driver reads, and
/// `actual`, which it writes. What is behind them belongs to features that are not offered.
const CONFIG_BYTES: usize = 8;
const ACTUAL: usize = 4;

/// How a balloon is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalloonOptions {
    /// How much of the guest's RAM is to be in the balloon at first; nothing by default.
    pub target: MemorySize,
    /// Whether the guest may take RAM out of the balloon where it would have to kill a process
    /// otherwise; yes by default. Without it, what is in the balloon is not counted as the guest's
    /// memory in the guest.
    pub deflate_on_oom: bool,
    /// Whether the guest is asked to report free pages, which are given back to the host until
    /// they are used again; yes by default.
    pub free_page_reporting: bool,
}

impl Default for BalloonOptions {
    fn default() -> Self {
        Self {
            target: MemorySize::bytes(0),
            deflate_on_oom: true,
            free_page_reporting: true,
        }
    }
}

/// Why a balloon could not be made, or not be told what it was told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BalloonError {
    /// The size is not one that the balloon can have.
    #[error(
        "let a balloon have {size} ({} bytes): it can have a multiple of 4 KiB, up to the {limit} \
         that the guest has",
        size.as_bytes()
    )]
    Target {
        /// The size that was given.
        size: MemorySize,
        /// The guest's RAM.
        limit: MemorySize,
    },
    /// There is no eventfd.
    #[error("create the eventfd of a balloon")]
    EventFd(#[source] io::Error),
}

/// The state of a [`Balloon`], besides that of its transport.
///
/// Statistics are not a part: they are in a buffer of the guest's, and read again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// How many pages of 4 KiB are to be in the balloon.
    pub target_pages: u32,
    /// How many there are, as the driver says.
    pub actual_pages: u32,
}

/// A virtio memory balloon.
pub struct Balloon {
    worker: Worker<BalloonHandler>,
    shared: Arc<Shared>,
    features: u64,
    queues: usize,
}

impl Balloon {
    /// A balloon for a guest with this much RAM.
    ///
    /// # Errors
    ///
    /// [`BalloonError`] where the target cannot be, or the system gives no eventfd.
    pub fn new(memory: MemorySize, options: BalloonOptions) -> Result<Self, BalloonError> {
        let state = BalloonState {
            target_pages: pages(options.target, memory)?,
            actual_pages: 0,
        };
        Self::from_state(memory, options, &state)
    }

    /// The balloon as it was when `state` was taken; the target is that of the state.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn from_state(
        memory: MemorySize,
        options: BalloonOptions,
        state: &BalloonState,
    ) -> Result<Self, BalloonError> {
        pages(size(state.target_pages), memory)?;
        let mut features = STATS_VQ;
        let mut queues = QUEUES_BEFORE_REPORTS;
        if options.deflate_on_oom {
            features |= DEFLATE_ON_OOM;
        }
        if options.free_page_reporting {
            features |= PAGE_REPORTING;
            queues = QUEUE_SIZES.len();
        }
        let shared = Shared::new(memory, state).map_err(BalloonError::EventFd)?;
        let shared = Arc::new(shared);
        Ok(Self {
            worker: Worker::new(BalloonHandler::new(Arc::clone(&shared))),
            shared,
            features,
            queues,
        })
    }

    /// The state, for [`from_state`](Self::from_state).
    pub fn state(&self) -> BalloonState {
        self.shared.state()
    }

    /// The host's side of the balloon.
    pub fn control(&self) -> BalloonControl {
        BalloonControl::new(Arc::clone(&self.shared))
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        let state = self.shared.state();
        let mut config = [0; CONFIG_BYTES];
        config[..ACTUAL].copy_from_slice(&state.target_pages.to_le_bytes());
        config[ACTUAL..].copy_from_slice(&state.actual_pages.to_le_bytes());
        config
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES[..self.queues]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let state = self.shared.state();
        let mut actual = state.actual_pages.to_le_bytes();
        for (at, byte) in (offset..).zip(data) {
            let at = usize::try_from(at)
                .ok()
                .and_then(|at| at.checked_sub(ACTUAL));
            if let Some(to) = at.and_then(|at| actual.get_mut(at)) {
                *to = *byte;
            }
        }
        self.shared.set_actual(u32::from_le_bytes(actual));
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = Arc::clone(&activation.interrupt);
        self.worker.activate(activation)?;
        self.shared.connect(interrupt);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.shared.disconnect();
        self.worker.deactivate()
    }

    /// A driver that begins anew knows of no page in the balloon.
    fn reset(&mut self) {
        self.shared.set_actual(0);
    }
}

impl fmt::Debug for Balloon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Balloon")
            .field("state", &self.state())
            .field("features", &format_args!("{:#x}", self.features))
            .finish_non_exhaustive()
    }
}
