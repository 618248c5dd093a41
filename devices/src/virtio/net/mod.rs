//! Network devices (virtio 1.3, section 5.1).
//!
//! Every packet that a [`NetBackend`] sends or receives begins with the 12 bytes of
//! `virtio_net_hdr`, which say what offloads the packet needs: the device passes them on.
//!
//! | module | what lives there |
//! |---|---|
//! | `backend` | [`NetBackend`]: what a network can do; [`Offloads`] |
//! | `tap` | [`Tap`]: a tap or macvtap interface of the host |
//! | `passt` | [`Passt`]: the host's network for the guest, without privileges |
//! | `stream` | [`StreamSocket`]: a program at the other end of a Unix socket |
//! | `mac` | [`MacAddress`] |
//! | `features` | what a driver can agree on |
//! | `device` | [`Net`]: configuration, and the pairs of queues |
//! | `shared` | what all of these have in common: [`NetState`]; [`NetControl`] |
//! | `pair` | one pair of queues on its thread |
//! | `receive`, `transmit` | the two queues of a pair |
//! | `vhost` | both in the hands of the host's kernel |
//! | `commands` | the control queue |
//! | `limits` | [`NetRateLimits`]: how much may come and go in a time |
//! | `filter` | [`ReceiveFilter`]: which packets a driver wants |
//! | `counters` | [`NetCounters`] |
//!
//! # Example
//!
//! A network that sends everything back to where it came from, over a datagram socket:
//!
//! ```
//! use kiln_devices::virtio::net::{MacAddress, Net, NetBackend, NetOptions, Offloads};
//! use kiln_memory::{GuestSlice, gather, scatter};
//! use std::io;
//! use std::os::fd::{AsFd, BorrowedFd};
//! use std::os::unix::net::UnixDatagram;
//!
//! struct Loop(UnixDatagram, UnixDatagram);
//!
//! impl NetBackend for Loop {
//!     fn readiness(&self) -> BorrowedFd<'_> {
//!         self.1.as_fd()
//!     }
//!     fn send(&mut self, packet: &[GuestSlice<'_>]) -> io::Result<()> {
//!         self.0.send(&gather(packet)).map(drop)
//!     }
//!     fn receive(&mut self, buffers: &[GuestSlice<'_>]) -> io::Result<usize> {
//!         let mut bytes = vec![0; 65_600];
//!         let len = self.1.recv(&mut bytes)?;
//!         Ok(scatter(&bytes[..len], buffers))
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (to, from) = UnixDatagram::pair()?;
//! to.set_nonblocking(true)?;
//! from.set_nonblocking(true)?;
//! let options = NetOptions { mac: Some("06:00:00:00:00:01".parse()?), ..Default::default() };
//! let net = Net::new(Loop(to, from), options)?;
//! assert_eq!(net.mac().to_string(), "06:00:00:00:00:01");
//! # Ok(())
//! # }
//! ```

mod backend;
mod commands;
mod counters;
mod device;
mod features;
mod filter;
mod limits;
mod mac;
mod pair;
mod passt;
mod receive;
mod shared;
mod stream;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;
mod vhost;

pub use backend::{NetBackend, Offloads};
pub use counters::NetCounters;
pub use device::{Net, NetError, NetOptions};
pub use filter::ReceiveFilter;
pub use limits::NetRateLimits;
pub use mac::{MacAddress, ParseMacAddressError};
pub use passt::{
    IpProtocol, ParsePortForwardError, Passt, PasstError, PortForward, UserNetOptions,
};
pub use shared::{NetControl, NetState};
pub use stream::{StreamError, StreamSocket};
pub use tap::{Tap, TapError};
pub use vhost::VhostError;
