//! The device: what it offers, and its configuration.

use std::fmt;
use std::sync::Arc;

use kiln_virtio_device::{
    ActivateError, Activation, ActiveQueue, VirtioDevice, Worker, read_config_bytes,
};
use virtio_bindings::virtio_blk as raw;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::request::{BlockHandler, ID_BYTES, SEGMENT_BYTES};
use super::{BlockBackend, BlockCounters, SECTOR_SIZE};

const QUEUE_SIZE: u16 = 256;
/// The segments of a request that fills the queue: two descriptors are for header and status.
pub(super) const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Sectors of a page, as a power of two: below it a host's page cache has to read before it can
/// write.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

/// How a block device is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockOptions {
    /// The identification that the driver can ask for (Linux shows it as the disk's serial
    /// number): 1 to 20 printable ASCII characters. By default the backend gives one.
    pub id: Option<String>,
}

/// Why a block device could not be made.
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
    #[error("make a disk of {size} bytes: not a multiple of {SECTOR_SIZE} above 0")]
    Size {
        /// The size in bytes.
        size: u64,
    },
}

/// A virtio block device.
///
/// It keeps nothing between two requests, so it has no state of its own to be saved: what there is
/// is in the transport's state, in its options, and on the disk.
pub struct Block {
    worker: Worker<BlockHandler>,
    counters: Arc<BlockCounters>,
    features: u64,
    config: [u8; CONFIG_BYTES],
}

/// The configuration up to and with `opt_io_size`.
const CONFIG_BYTES: usize = 32;

impl Block {
    /// A device for this disk.
    ///
    /// # Errors
    ///
    /// [`BlockError`] where the options or the disk's size cannot be.
    pub fn new(backend: impl BlockBackend, options: BlockOptions) -> Result<Self, BlockError> {
        let size = backend.size();
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
            return Err(BlockError::Size { size });
        }
        let id = id_bytes(options.id, &backend)?;
        let mut features = 1 << raw::VIRTIO_BLK_F_SIZE_MAX
            | 1 << raw::VIRTIO_BLK_F_SEG_MAX
            | 1 << raw::VIRTIO_BLK_F_BLK_SIZE
            | 1 << raw::VIRTIO_BLK_F_FLUSH
            | 1 << raw::VIRTIO_BLK_F_TOPOLOGY;
        if backend.is_read_only() {
            features |= 1 << raw::VIRTIO_BLK_F_RO;
        }
        let handler = BlockHandler::new(Box::new(backend), id);
        let counters = Arc::clone(&handler.counters);
        let config = config(size / SECTOR_SIZE);
        Ok(Self {
            worker: Worker::new(handler),
            counters,
            features,
            config,
        })
    }

    /// What the device has done, to be looked at while it works.
    pub fn counters(&self) -> Arc<BlockCounters> {
        Arc::clone(&self.counters)
    }
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

/// The configuration (virtio 1.3, section 5.2.4), in little endian.
fn config(sectors: u64) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    config[0..8].copy_from_slice(&sectors.to_le_bytes());
    config[8..12].copy_from_slice(&SEGMENT_BYTES.to_le_bytes());
    config[12..16].copy_from_slice(&SEGMENTS.to_le_bytes());
    // 16..20 is the geometry, which is not offered.
    config[20..24].copy_from_slice(&(SECTOR_SIZE as u32).to_le_bytes());
    // The topology: physical block, alignment offset, and the least and the best request in
    // blocks.
    config[24] = PHYSICAL_BLOCK_EXPONENT;
    config[26..28].copy_from_slice(&(1_u16 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
    config
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.worker.activate(activation)
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.worker.deactivate()
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block")
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}
