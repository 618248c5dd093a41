//! A tap interface of the host as a network.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use kiln_memory::GuestSlice;
use libc::{c_int, c_short, c_uint, c_ulong, ifreq};

use super::device::HEADER_BYTES;
use super::{NetBackend, Offloads};
use crate::virtio::iovec::{read_packet, write_packet};

#[cfg(test)]
mod tests;

const TUN_PATH: &str = "/dev/net/tun";
/// A tap, with no header of its own, and the header of virtio.
const FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

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
    /// There is no such interface. One is not created, because it would need an address or a
    /// bridge, too.
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

/// A tap interface, open.
///
/// While it is open its offloads are those of the guest. A tap that was created with several
/// queues is used with one.
#[derive(Debug)]
pub struct Tap {
    file: File,
    offloads: Offloads,
    mtu: Option<u16>,
}

impl Tap {
    /// Opens the tap interface of this name, which exists already.
    ///
    /// # Errors
    ///
    /// [`TapError`], which says for each case what would help.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let owned = || name.to_owned();
        let system = |what| {
            move |source| TapError::System {
                name: name.to_owned(),
                what,
                source,
            }
        };
        let c_name = check_name(name).ok_or_else(|| TapError::Name { name: owned() })?;
        // To attach to an interface that does not exist creates it: look first.
        let index =
            interface_index(&c_name).ok_or_else(|| TapError::NoInterface { name: owned() })?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(TUN_PATH)
            .map_err(|source| TapError::Device {
                name: owned(),
                source,
            })?;
        attach(&file, &c_name).map_err(|source| match source.raw_os_error() {
            Some(libc::EINVAL) => TapError::NotATap { name: owned() },
            Some(libc::EBUSY) => TapError::Busy { name: owned() },
            Some(libc::EPERM | libc::EACCES) => TapError::NotAllowed { name: owned() },
            _ => system("attach to the interface")(source),
        })?;
        if interface_index(&c_name) != Some(index) {
            // It was removed in between, and what we have is a new one that ends with `file`.
            return Err(TapError::NoInterface { name: owned() });
        }
        let size = HEADER_BYTES as c_int;
        // SAFETY: the request takes a pointer to an int, which `size` is.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &size) })
            .map_err(system("set the size of its packets' header"))?;
        let offloads = probe_offloads(&file).map_err(system("set its offloads"))?;
        let mtu = interface_mtu(&c_name).map_err(system("read its MTU"))?;
        Ok(Self {
            file,
            offloads,
            mtu,
        })
    }
}

/// The name as the kernel takes it, if an interface can have it.
fn check_name(name: &str) -> Option<CString> {
    let bad = |byte: u8| byte == b'/' || byte == b':' || byte == b'%' || byte.is_ascii_whitespace();
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.bytes().any(bad) {
        return None;
    }
    CString::new(name).ok()
}

fn interface_index(name: &CString) -> Option<c_uint> {
    // SAFETY: the string ends in NUL.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}

/// A request about this interface, everything else zero.
fn request(name: &CString) -> ifreq {
    // SAFETY: all bytes zero are a valid value of this plain C struct.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
        *to = from.cast_signed();
    }
    request
}

/// Makes `file` the other end of the interface.
fn attach(file: &File, name: &CString) -> io::Result<()> {
    let attach_with = |flags: c_int| {
        let mut request = request(name);
        request.ifr_ifru.ifru_flags = flags as c_short;
        // SAFETY: the request takes a pointer to an `ifreq`.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &request) })
    };
    match attach_with(FLAGS) {
        // A tap with several queues has to be asked for as one.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            attach_with(FLAGS | libc::IFF_MULTI_QUEUE)
        }
        result => result,
    }
}

/// Finds out what the kernel can offload, and leaves it at nothing.
fn probe_offloads(file: &File) -> io::Result<Offloads> {
    let all = Offloads {
        checksum: true,
        tso4: true,
        tso6: true,
        ecn: true,
        ufo: true,
        uso: true,
    };
    // Linux has learnt of USO in 6.2.
    let older = Offloads { uso: false, ..all };
    let candidates = [
        all,
        older,
        Offloads {
            ecn: false,
            ..older
        },
    ];
    let known = candidates
        .into_iter()
        .find(|offloads| set_offloads(file, *offloads).is_ok());
    set_offloads(file, Offloads::default())?;
    Ok(known.unwrap_or_default())
}

fn set_offloads(file: &File, offloads: Offloads) -> io::Result<()> {
    let mut flags = 0;
    for (wanted, flag) in [
        (offloads.checksum, libc::TUN_F_CSUM),
        (offloads.tso4, libc::TUN_F_TSO4),
        (offloads.tso6, libc::TUN_F_TSO6),
        (offloads.ecn, libc::TUN_F_TSO_ECN),
        (offloads.ufo, libc::TUN_F_UFO),
        (offloads.uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ] {
        if wanted {
            flags |= flag;
        }
    }
    // SAFETY: the request takes its argument by value.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD as _, flags as c_ulong) })
}

fn interface_mtu(name: &CString) -> io::Result<Option<u16>> {
    // Any socket takes requests about interfaces.
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let mut request = request(name);
    // SAFETY: the request takes a pointer to an `ifreq`, which it fills.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU as _, &mut request) })?;
    // SAFETY: the request has filled this field, and every value of it is an int.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    Ok(u16::try_from(mtu).ok())
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl NetBackend for Tap {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&mut self, guest: Offloads) -> io::Result<()> {
        set_offloads(&self.file, guest)
    }

    fn send(&mut self, packet: &[GuestSlice<'_>]) -> io::Result<()> {
        write_packet(self.file.as_fd(), packet)
    }

    fn receive(&mut self, buffers: &[GuestSlice<'_>]) -> io::Result<usize> {
        read_packet(self.file.as_fd(), buffers)
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }
}
