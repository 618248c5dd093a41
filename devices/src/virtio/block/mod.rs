//! Block devices (virtio 1.3, section 5.2).
//!
//! | module | what lives there |
//! |---|---|
//! | `backend` | [`BlockBackend`]: what a disk can do |
//! | `raw` | [`RawFile`]: a file or a block device of the host as a disk |
//! | `qcow2` | [`Qcow2File`]: an image in the qcow2 format (with the feature `qcow2`) |
//! | `backing` | [`BackingFiles`]: what other files an image may name |
//! | `device` | [`Block`]: features and queues |
//! | `config` | the configuration that the driver sees |
//! | `request` | what the driver asks for |
//! | `handler` | the work on a queue |
//! | `engine` | [`IoEngine`]: who reads and writes |
//! | `ring`, `task` | requests that the kernel works on (io_uring) |
//! | `shared` | [`BlockControl`], and what the queues have in common |
//! | `limits` | [`BlockRateLimits`]: how much a driver may ask for in a time |
//! | `counters` | [`BlockCounters`] |
//!
//! # Example
//!
//! A disk in memory, and a driver that reads from it:
//!
//! ```
//! use kiln_devices::virtio::block::{Block, BlockBackend, BlockOptions};
//! use kiln_memory::GuestSlice;
//! use kiln_virtio_device::testing::{Buffer, MockDriver};
//! use std::io;
//!
//! struct Ramp;
//!
//! impl BlockBackend for Ramp {
//!     fn size(&self) -> u64 {
//!         1 << 20
//!     }
//!     fn is_read_only(&self) -> bool {
//!         true
//!     }
//!     fn read_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
//!         let mut next = offset;
//!         for buffer in buffers {
//!             let bytes: Vec<u8> = (next..).take(buffer.len()).map(|at| at as u8).collect();
//!             buffer.copy_from(&bytes);
//!             next += buffer.len() as u64;
//!         }
//!         Ok(())
//!     }
//!     fn write_at(&mut self, _: u64, _: &[GuestSlice<'_>]) -> io::Result<()> {
//!         Err(io::ErrorKind::ReadOnlyFilesystem.into())
//!     }
//!     fn flush(&mut self) -> io::Result<()> {
//!         Ok(())
//!     }
//! }
//!
//! let block = Block::new(Ramp, BlockOptions::default())?;
//! let mut driver = MockDriver::new(Box::new(block));
//! driver.start(0, 16);
//! // A read (type 0) of sector 1.
//! driver.fill(0x1000, &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
//! let buffers = [
//!     Buffer::readable(0x1000, 16),
//!     Buffer::writable(0x2000, 512),
//!     Buffer::writable(0x3000, 1),
//! ];
//! assert_eq!(driver.request(0, &buffers), 513);
//! assert_eq!(driver.bytes(0x3000, 1), [0]); // no error
//! assert_eq!(driver.bytes(0x2000, 4), [0, 1, 2, 3]);
//! # Ok::<(), kiln_devices::virtio::block::BlockError>(())
//! ```

mod backend;
mod backing;
mod config;
mod counters;
mod device;
mod engine;
mod handler;
mod limits;
#[cfg(feature = "qcow2")]
mod qcow2;
mod raw;
mod request;
mod ring;
mod shared;
mod task;
#[cfg(test)]
mod tests;

pub use backend::{BlockBackend, BlockProperties, SECTOR_SIZE};
pub use backing::BackingFiles;
pub use counters::BlockCounters;
pub use device::{Block, BlockError, BlockOptions, BlockState, CacheMode};
pub use engine::IoEngine;
pub use limits::BlockRateLimits;
#[cfg(feature = "qcow2")]
pub use qcow2::{Qcow2Error, Qcow2File};
pub use raw::{RawFile, RawFileError};
pub use shared::BlockControl;
