//! Memory balloons (virtio 1.3, section 5.5): a guest's RAM that the host has use for.
//!
//! There are two ways for it to get to the host:
//! - **The balloon itself.** The host sets a [target](BalloonControl::set_target), and the driver
//!   takes that much RAM out of use in its guest and tells which pages these are. A smaller target
//!   lets the guest have some of them again; with [`deflate_on_oom`](BalloonOptions) it may also
//!   take them itself, where it would have to kill a process otherwise.
//! - **Free page reporting**, which nobody has to ask for: the driver tells from time to time which
//!   pages are free, and goes on to use them whenever it wants to. Linux does so for free blocks
//!   of at least 2 MiB, every two seconds, a part of them each time. A kernel that poisons free
//!   pages does not.
//!
//! Pages that come in either way are given back to the host at once, by
//! [`discard`](kiln_memory::discard), whose documentation says what becomes of huge pages. The
//! guest may touch them all the same: they are zeros then, and memory of the host again.
//!
//! Limits:
//! - Memory that a device of the host has pinned (VFIO) must not be ballooned: the device would go
//!   on with pages that are not the guest's any more.
//! - Memory that is locked (`mlock`) or from a reserved pool of huge pages stays with the machine.
//! - A target is a wish: how much there really is in the balloon is [`BalloonControl::actual`], and
//!   only as true as the guest is honest. What is in the balloon is not kept from the guest.
//!
//! | module | what lives there |
//! |---|---|
//! | `device` | [`Balloon`]: features, configuration, state |
//! | `control` | [`BalloonControl`]: the host's side of a balloon, at run time |
//! | `handler` | what is done with the queues |
//! | `pages` | page numbers to ranges |
//! | `statistics` | [`BalloonStatistics`]: what the guest says of its memory |
//!
//! # Example
//!
//! A balloon, and a driver that puts two pages into it:
//!
//! ```
//! use kiln_devices::virtio::balloon::{Balloon, BalloonOptions};
//! use kiln_memory::MemorySize;
//! use kiln_virtio_device::testing::{Buffer, MockDriver};
//!
//! let balloon = Balloon::new(MemorySize::mib(18), BalloonOptions::default())?;
//! let control = balloon.control();
//! let mut driver = MockDriver::new(Box::new(balloon));
//! driver.start(0, 16);
//!
//! control.set_target(MemorySize::bytes(8192))?;
//! let mut num_pages = [0; 4];
//! driver.config(0, &mut num_pages);
//! assert_eq!(u32::from_le_bytes(num_pages), 2);
//!
//! // The pages at 0x5000 and 0x8000.
//! driver.fill(0x5000, b"no longer needed");
//! driver.fill(0x1000, &[5, 0, 0, 0, 8, 0, 0, 0]);
//! driver.request(0, &[Buffer::readable(0x1000, 8)]);
//! assert_eq!(driver.bytes(0x5000, 16), [0; 16]);
//! # Ok::<(), kiln_devices::virtio::balloon::BalloonError>(())
//! ```

mod control;
mod device;
mod handler;
mod pages;
mod statistics;
#[cfg(test)]
mod tests;

pub use control::{BalloonControl, BalloonCounters};
pub use device::{Balloon, BalloonError, BalloonOptions, BalloonState};
pub use statistics::BalloonStatistics;
