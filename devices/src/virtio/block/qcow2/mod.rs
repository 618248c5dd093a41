//! Disk images in the qcow2 format.
//!
//! The format itself is the work of the `imago` crate. What is here is what it takes to trust an
//! image that somebody else has made: see `docs/qcow2.md`.
//!
//! | module | what lives there |
//! |---|---|
//! | `header`, `refcounts` | what is checked before the driver sees an image |
//! | `chain` | backing files: which may be opened, and how |
//! | `image` | the files as the driver sees them: what may be written where, and in what order |
//! | `compressed` | what is checked of a compressed cluster |
//! | `disk` | [`Qcow2File`] as a backend |

mod chain;
mod compressed;
mod disk;
mod error;
mod header;
mod image;
mod refcounts;
#[cfg(test)]
mod tests;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use kiln_device_api::panic_message;
use tracing::subscriber::{NoSubscriber, with_default};

use super::BackingFiles;

pub use disk::Qcow2File;
pub use error::Qcow2Error;

/// Runs something of the driver's. A panic becomes an error: an image that makes one happen must
/// not take the machine with it. What the driver logs is dropped, because a guest could make it
/// log with each request.
fn guarded<T>(run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let run = || with_default(NoSubscriber::default(), run);
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(panic_error(&*panic)))
}

fn panic_error(panic: &(dyn std::any::Any + Send)) -> io::Error {
    io::Error::other(DriverPanic(panic_message(panic)))
}

/// The driver panicked.
#[derive(Debug, thiserror::Error)]
#[error("the qcow2 driver panicked: {0}")]
struct DriverPanic(String);
