//! vhost-net: the host's kernel carries the packets between a tap and the guest's rings itself.
//!
//! The device is the same for the driver, but for the filters: packets do not come by here. What is
//! left for us is the control queue, and what the host does with the device.
//!
//! - `kernel`: the system calls
//! - `pair`: one pair of queues, in our hands or in the kernel's
//! - `handler`: what lives on an I/O thread

mod handler;
mod kernel;
mod pair;

use std::io;

pub(super) use handler::VhostHandler;

/// Why the kernel's vhost-net does not carry a network's packets.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VhostError {
    /// It works with taps.
    #[error("use vhost-net: it is for a tap or macvtap, and this network is something else")]
    NotATap,
    /// It knows no limits.
    #[error("use vhost-net: it has no rate limits, and some are given")]
    RateLimits,
    /// This kernel has none.
    #[error("open /dev/vhost-net: there is none (`modprobe vhost_net` makes it)")]
    Absent,
    /// It belongs to another user.
    #[error(
        "open /dev/vhost-net: not allowed (it is to be readable and writable for the user, as by \
         `setfacl -m u:$USER:rw /dev/vhost-net`)"
    )]
    NotAllowed,
    /// It cannot be opened for another reason.
    #[error("open /dev/vhost-net")]
    Open(#[source] io::Error),
    /// The kernel is too old.
    #[error("use vhost-net: this kernel's has not the virtio features {missing:#x}")]
    Features {
        /// The features that are needed, and that it has not.
        missing: u64,
    },
    /// The kernel refused something else.
    #[error("use vhost-net: {what}")]
    Request {
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;
    use std::os::unix::net::UnixStream;

    use crate::rate_limit::{RateLimit, RateLimits};
    use crate::virtio::net::{Net, NetOptions, NetRateLimits, StreamSocket};

    fn refusal(options: NetOptions) -> String {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let socket = StreamSocket::from_fd(ours.into()).unwrap();
        let options = NetOptions {
            vhost: true,
            ..options
        };
        Net::new(socket, options).unwrap_err().to_string()
    }

    #[test]
    fn what_the_kernel_does_not_do_is_refused() {
        assert_eq!(
            refusal(NetOptions::default()),
            "use vhost-net: it is for a tap or macvtap, and this network is something else"
        );
        let limited = NetOptions {
            rate_limits: NetRateLimits {
                tx: RateLimits {
                    ops: Some(RateLimit::per_second(NonZeroU64::MIN)),
                    ..RateLimits::default()
                },
                ..NetRateLimits::default()
            },
            ..NetOptions::default()
        };
        assert_eq!(
            refusal(limited),
            "use vhost-net: it has no rate limits, and some are given"
        );
    }
}
