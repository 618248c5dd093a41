//! Why a tap could not be used.

use std::io;
use std::os::fd::RawFd;

use super::TUN_PATH;

/// Why a tap could not be opened. Each says what would help.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// No interface can have this name.
    #[error("open tap `{name}`: an interface's name has 1 to 15 bytes, and no `/` or space")]
    Name {
        /// What was given.
        name: String,
    },
    /// There is no such interface. One is not created where that was not asked for, because it
    /// would need an address or a bridge, too.
    #[error(
        "open tap `{name}`: there is no such interface (create it with `ip tuntap add {name} mode \
         tap user $USER && ip link set {name} up`)"
    )]
    NoInterface {
        /// The interface.
        name: String,
    },
    /// The interface is not a tap.
    #[error(
        "open tap `{name}`: the interface is not a tap (create one with `ip tuntap add NAME mode \
         tap user $USER`)"
    )]
    NotATap {
        /// The interface.
        name: String,
    },
    /// Someone else has the tap.
    #[error("open tap `{name}`: it is in use by another machine or program")]
    Busy {
        /// The interface.
        name: String,
    },
    /// The tap belongs to another user.
    #[error(
        "open tap `{name}`: not allowed (it belongs to another user: create it with `ip tuntap \
         add {name} mode tap user $USER`, or run with CAP_NET_ADMIN)"
    )]
    NotAllowed {
        /// The interface.
        name: String,
    },
    /// To create a tap takes privilege.
    #[error(
        "create tap `{name}`: not allowed (run with CAP_NET_ADMIN, or create it with `ip tuntap \
         add {name} mode tap user $USER && ip link set {name} up`)"
    )]
    CreationNotAllowed {
        /// The interface.
        name: String,
    },
    /// The tap has one queue.
    #[error(
        "open another queue of tap `{name}`: it was created with one (create it with `ip tuntap \
         add {name} mode tap multi_queue user $USER`)"
    )]
    OneQueue {
        /// The interface.
        name: String,
    },
    /// The device of a macvtap interface cannot be opened.
    #[error("open macvtap `{name}`: open {path} (it is to be readable and writable for the user)")]
    Macvtap {
        /// The interface.
        name: String,
        /// Its device.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The tun device cannot be opened.
    #[error(
        "open tap `{name}`: open {TUN_PATH} (`modprobe tun` makes it; it is to be readable and \
         writable for everyone)"
    )]
    Device {
        /// The interface.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// There is no such file descriptor.
    #[error("use file descriptor {fd} as a tap: there is none of that number")]
    NoDescriptor {
        /// Its number.
        fd: RawFd,
        /// What the system said.
        source: io::Error,
    },
    /// What was handed over is not a tap that can be used.
    #[error("use a file descriptor as a tap: {reason}")]
    Descriptor {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The taps that were handed over are all in use.
    #[error("use another queue of tap `{name}`: no more file descriptors of it were given")]
    NoMoreDescriptors {
        /// The interface.
        name: String,
    },
    /// The system refused something else.
    #[error("open tap `{name}`: {what}")]
    System {
        /// The interface.
        name: String,
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}
