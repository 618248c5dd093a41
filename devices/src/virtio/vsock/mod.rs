//! Socket devices (virtio 1.3, section 5.10): streams between programs of the guest, which use
//! `AF_VSOCK`, and programs of the host, which use Unix sockets.
//!
//! - **From the host**: the device listens on a Unix socket. A program connects to it and sends
//!   `CONNECT port` on a line; when a program of the guest that listens on that port has the
//!   connection, the device answers `OK port` on a line, with the port of the host, and the bytes
//!   that follow are the stream's. Where there is no connection, the socket is closed.
//! - **From the guest**: a program connects to context id 2 and a port; the device connects to the
//!   Unix socket at the path of its own with `_` and the number of the port behind it, where a
//!   program of the host listens.
//!
//! This is the convention of other virtual machine monitors, so their tools work here. The end of
//! data goes from one side to the other for each direction apart, and so does a reset.
//!
//! What a guest can take of the host is bounded: 1024 connections, 128 KiB for each of what it sent
//! and the program has not read, and one packet of each kind that waits to be sent. Its packets are
//! not read any more while it gives no buffers for the answers.
//!
//! | module | what lives there |
//! |---|---|
//! | `packet` | the headers of packets |
//! | `connection` | one connection as the protocol sees it, credit included |
//! | `table` | the connections, and whose turn it is |
//! | `host` | the listening socket, the `CONNECT` line, the programs that listen |
//! | `stream` | a connection with its socket |
//! | `handler` | what lives on the I/O thread |
//! | `to_guest`, `from_guest` | the two queues |
//! | `device` | [`Vsock`]: features and configuration |
//!
//! # Example
//!
//! ```
//! use kiln_devices::virtio::vsock::{Vsock, VsockError};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("guest.vsock");
//! let vsock = Vsock::new(3, &path)?;
//! let second = Vsock::new(4, &path);
//! assert!(matches!(second, Err(VsockError::PathExists { .. })));
//! drop(vsock);
//! assert!(!path.exists());
//! # Ok(())
//! # }
//! ```

mod connection;
mod device;
mod from_guest;
mod handler;
mod host;
mod packet;
mod stream;
mod table;
#[cfg(test)]
mod tests;
mod to_guest;

pub use device::{Vsock, VsockCounters, VsockError};
