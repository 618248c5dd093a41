//! The device: what it offers, and the work on its queues.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;

use kiln_virtio_device::{
    ActivateError, Activation, ActiveQueue, VirtioDevice, Worker, read_config_bytes,
};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk as raw;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::config::{self, Config};
use super::engine::{Engine, IoEngine};
use super::handler::BlockHandler;
use super::request::ID_BYTES;
use super::shared::{Shared, Source};
use super::{BlockBackend, BlockControl, BlockCounters, BlockProperties, BlockRateLimits};

const QUEUE_SIZE: u16 = 256;
/// The segments of a request that fills the queue: two descriptors are for header and status.
pub(super) const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// The most queues.
const MAX_QUEUES: u16 = 256;

/// When what a guest has written lasts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// When the guest flushes it.
    #[default]
    Writeback,
    /// When the write is completed.
    Writethrough,
}

impl FromStr for CacheMode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "writeback" => Ok(Self::Writeback),
            "writethrough" => Ok(Self::Writethrough),
            _ => Err("there are `writeback` and `writethrough`"),
        }
    }
}

/// How a block device is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockOptions {
    /// The identification that the driver can ask for (Linux shows it as the disk's serial
    /// number): 1 to 20 printable ASCII characters. By default the backend gives one.
    pub id: Option<String>,
    /// How many queues it has, from 1 to 256: as many as the guest has vCPUs, so that each has its
    /// own. 1 by default.
    pub queues: Option<u16>,
    /// When what the guest has written lasts, which its driver can change.
    pub cache: CacheMode,
    /// The size of blocks in bytes that the driver sees: 512 or 4096, and not less than what the
    /// backend has, which is the default.
    pub logical_block_size: Option<u32>,
    /// How much the driver may ask for in a time: by default any amount.
    pub rate_limits: BlockRateLimits,
    /// How an image or a block device is read and written.
    pub engine: IoEngine,
}

/// Why a block device could not be made, or not be told what it was told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The identification is not one.
    #[error("identify a disk as `{id}`: an id is 1 to {ID_BYTES} printable ASCII characters")]
    Id {
        /// What was given.
        id: String,
    },
    /// The backend's size is not that of a disk.
    #[error("make a disk of {size} bytes: not a multiple of {block_size} above 0")]
    Size {
        /// The size in bytes.
        size: u64,
        /// What it is to be a multiple of, in bytes.
        block_size: u32,
    },
    /// The size of blocks is not one that the disk can have.
    #[error("make a disk with blocks of {asked} bytes: it can have {possible}")]
    BlockSize {
        /// What was asked for.
        asked: u32,
        /// What can be.
        possible: &'static str,
    },
    /// There cannot be so many queues.
    #[error("make a disk with {asked} queues: it can have 1 to {MAX_QUEUES}")]
    Queues {
        /// What was asked for.
        asked: u16,
    },
    /// A request would have to keep to two limits.
    #[error(
        "limit what a disk does in a time: reads and writes together, or each by themselves, but not both"
    )]
    RateLimits,
    /// The engine cannot be had.
    #[error("use io_uring for a disk")]
    Engine {
        /// Why not.
        source: io::Error,
    },
    /// The size of what is behind the disk cannot be had.
    #[error("look how large a disk is")]
    Refresh(#[source] io::Error),
}

/// The state of a [`Block`], besides that of its transport and what is on the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// When what the guest has written lasts, as its driver has chosen.
    pub cache: CacheMode,
}

/// A virtio block device.
pub struct Block {
    /// One for each queue.
    workers: Vec<Worker<BlockHandler>>,
    shared: Arc<Shared>,
    features: u64,
    queue_sizes: Vec<u16>,
}

impl Block {
    /// A device for this disk.
    ///
    /// # Errors
    ///
    /// [`BlockError`] where the options or the disk's size cannot be.
    pub fn new(
        backend: impl BlockBackend + 'static,
        options: BlockOptions,
    ) -> Result<Self, BlockError> {
        let queues = options.queues.unwrap_or(1);
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(BlockError::Queues { asked: queues });
        }
        options.rate_limits.check()?;
        let mut properties = backend.properties();
        properties.logical_block_size = block_size(options.logical_block_size, &properties)?;
        let (size, block_size) = (backend.size(), properties.logical_block_size);
        if size == 0 || !size.is_multiple_of(u64::from(block_size)) {
            return Err(BlockError::Size { size, block_size });
        }
        let id = id_bytes(options.id, &backend)?;
        let read_only = backend.is_read_only();
        properties.discard &= !read_only;
        properties.write_zeroes &= !read_only;
        let config = Config {
            properties,
            segments: SEGMENTS,
            queues,
        };
        let source = Source::new(Box::new(backend));
        let shared = Shared::new(
            source,
            read_only,
            id,
            config,
            size,
            options.cache,
            options.rate_limits,
        );
        let shared = Arc::new(shared);
        let engines = Engine::for_queues(options.engine, &shared.source, queues)?;
        let handlers = (0..)
            .zip(engines)
            .map(|(queue, engine)| BlockHandler::new(queue, Arc::clone(&shared), engine));
        Ok(Self {
            workers: handlers.map(Worker::new).collect(),
            features: features(&properties, read_only, queues),
            queue_sizes: vec![QUEUE_SIZE; usize::from(queues)],
            shared,
        })
    }

    /// The device as it was when `state` was taken.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn from_state(
        backend: impl BlockBackend + 'static,
        options: BlockOptions,
        state: &BlockState,
    ) -> Result<Self, BlockError> {
        let block = Self::new(backend, options)?;
        block
            .shared
            .set_writeback(state.cache == CacheMode::Writeback);
        Ok(block)
    }

    /// The state, for [`from_state`](Self::from_state).
    pub fn state(&self) -> BlockState {
        BlockState {
            cache: self.control().cache(),
        }
    }

    /// The host's side of the disk.
    pub fn control(&self) -> BlockControl {
        BlockControl::new(Arc::clone(&self.shared))
    }

    /// What the device has done, to be looked at while it works.
    pub fn counters(&self) -> Arc<BlockCounters> {
        Arc::clone(&self.shared.counters)
    }
}

/// The size of blocks that a driver sees.
fn block_size(asked: Option<u32>, of: &BlockProperties) -> Result<u32, BlockError> {
    let least = of.logical_block_size;
    match asked.unwrap_or(least) {
        size @ (512 | 4096) if size >= least => Ok(size),
        asked => Err(BlockError::BlockSize {
            asked,
            possible: if least > 512 { "4096" } else { "512 or 4096" },
        }),
    }
}

fn features(properties: &BlockProperties, read_only: bool, queues: u16) -> u64 {
    let optional = [
        (raw::VIRTIO_BLK_F_RO, read_only),
        (raw::VIRTIO_BLK_F_MQ, queues > 1),
        (raw::VIRTIO_BLK_F_DISCARD, properties.discard),
        (raw::VIRTIO_BLK_F_WRITE_ZEROES, properties.write_zeroes),
    ];
    let always = 1 << raw::VIRTIO_BLK_F_SIZE_MAX
        | 1 << raw::VIRTIO_BLK_F_SEG_MAX
        | 1 << raw::VIRTIO_BLK_F_BLK_SIZE
        | 1 << raw::VIRTIO_BLK_F_FLUSH
        | 1 << raw::VIRTIO_BLK_F_TOPOLOGY
        | 1 << raw::VIRTIO_BLK_F_CONFIG_WCE;
    let offered = optional.into_iter().filter(|(_, is_offered)| *is_offered);
    offered.fold(always, |bits, (bit, _)| bits | 1 << bit)
}

fn id_bytes(id: Option<String>, backend: &impl BlockBackend) -> Result<[u8; ID_BYTES], BlockError> {
    let bytes = match id {
        Some(id) => {
            let printable = id
                .bytes()
                .all(|byte| byte == b' ' || byte.is_ascii_graphic());
            if id.is_empty() || id.len() > ID_BYTES || !printable {
                return Err(BlockError::Id { id });
            }
            id.into_bytes()
        }
        None => backend.default_id().into_bytes(),
    };
    let mut padded = [0; ID_BYTES];
    for (to, from) in padded.iter_mut().zip(bytes) {
        *to = from;
    }
    Ok(padded)
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.shared.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = (offset..).zip(data);
        if let Some((_, mode)) = bytes.find(|(at, _)| *at == config::WRITEBACK as u64) {
            self.shared.driver_sets_writeback(*mode != 0);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = Arc::clone(&activation.interrupt);
        let parts = activation.split(self.workers.len(), usize::from);
        let mut result = Ok(());
        // Also where one failed: each keeps its queues until it is deactivated.
        for (worker, part) in self.workers.iter_mut().zip(parts) {
            if !part.queues.is_empty() {
                result = result.and(worker.activate(part));
            }
        }
        self.shared.connect(interrupt);
        result
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.shared.disconnect();
        let workers = self.workers.iter_mut();
        workers.flat_map(Worker::deactivate).collect()
    }

    fn reset(&mut self) {
        self.shared.reset();
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block")
            .field("queues", &self.queue_sizes.len())
            .field("counters", &self.shared.counters)
            .finish_non_exhaustive()
    }
}
