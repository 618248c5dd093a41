//! Requests to the system about taps and interfaces.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{c_int, c_short, c_uint, c_ulong, ifreq};

use crate::virtio::net::device::HEADER_BYTES;
use crate::virtio::net::{MacAddress, Offloads};

/// A tap, with no header of its own, and the header of virtio.
pub(super) const FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// The name as the kernel takes it, if an interface can have it.
pub(super) fn check_name(name: &str) -> Option<CString> {
    let bad = |byte: u8| byte == b'/' || byte == b':' || byte == b'%' || byte.is_ascii_whitespace();
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.bytes().any(bad) {
        return None;
    }
    CString::new(name).ok()
}

pub(super) fn index(name: &CString) -> Option<c_uint> {
    // SAFETY: the string ends in NUL.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}

/// A request about this interface, everything else zero.
pub(super) fn request(name: &CString) -> ifreq {
    let mut request = empty_request();
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
        *to = from.cast_signed();
    }
    request
}

fn empty_request() -> ifreq {
    // SAFETY: all bytes zero are a valid value of this plain C struct.
    unsafe { std::mem::zeroed() }
}

/// Opens a device whose descriptors are taps.
pub(super) fn open_device(path: &str) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}

/// Makes `file` the other end of the interface, with these flags.
pub(super) fn attach(file: &File, name: &CString, flags: c_int) -> io::Result<()> {
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: the request takes a pointer to an `ifreq`.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &request) })
}

/// The interface that `file` is the other end of, and its flags.
pub(super) fn attached(file: &File) -> io::Result<(CString, c_int)> {
    let mut request = empty_request();
    // SAFETY: the request takes a pointer to an `ifreq`, which it fills.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF as _, &mut request) })?;
    let name = request.ifr_name.iter().map(|byte| byte.cast_unsigned());
    let name: Vec<u8> = name.take_while(|byte| *byte != 0).collect();
    // SAFETY: the request has filled this field, and every value of it is a number.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let name = CString::new(name).map_err(io::Error::other)?;
    Ok((name, c_int::from(flags.cast_unsigned())))
}

/// Whether packets go through this queue of an interface with several.
pub(super) fn set_enabled(file: &File, enabled: bool) -> io::Result<()> {
    let mut request = empty_request();
    let flags = if enabled {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    request.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: the request takes a pointer to an `ifreq`.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETQUEUE as _, &request) })
}

/// Has packets begin with the header that virtio has.
pub(super) fn set_header(file: &File) -> io::Result<()> {
    let size = HEADER_BYTES as c_int;
    // SAFETY: the request takes a pointer to an int, which `size` is.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &size) })
}

/// Finds out what the kernel can offload, and leaves it at nothing.
pub(super) fn probe_offloads(file: &File) -> io::Result<Offloads> {
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

pub(super) fn set_offloads(file: &File, offloads: Offloads) -> io::Result<()> {
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

/// A socket for requests about interfaces, for which any will do.
fn socket() -> io::Result<std::net::UdpSocket> {
    std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))
}

pub(super) fn mtu(name: &CString) -> io::Result<Option<u16>> {
    let mut request = request(name);
    // SAFETY: the request takes a pointer to an `ifreq`, which it fills.
    check(unsafe { libc::ioctl(socket()?.as_raw_fd(), libc::SIOCGIFMTU as _, &mut request) })?;
    // SAFETY: the request has filled this field, and every value of it is an int.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    Ok(u16::try_from(mtu).ok())
}

pub(super) fn set_mtu(name: &CString, mtu: u16) -> io::Result<()> {
    let mut request = request(name);
    request.ifr_ifru.ifru_mtu = c_int::from(mtu);
    // SAFETY: the request takes a pointer to an `ifreq`.
    check(unsafe { libc::ioctl(socket()?.as_raw_fd(), libc::SIOCSIFMTU as _, &request) })
}

pub(super) fn set_up(name: &CString) -> io::Result<()> {
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as c_short;
    // SAFETY: the request takes a pointer to an `ifreq`.
    check(unsafe { libc::ioctl(socket()?.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) })
}

pub(super) fn mac(name: &CString) -> io::Result<MacAddress> {
    let mut request = request(name);
    // SAFETY: the request takes a pointer to an `ifreq`, which it fills.
    check(unsafe {
        libc::ioctl(
            socket()?.as_raw_fd(),
            libc::SIOCGIFHWADDR as _,
            &mut request,
        )
    })?;
    // SAFETY: the request has filled this field, and every value of it is a plain C struct.
    let address = unsafe { request.ifr_ifru.ifru_hwaddr };
    let mut bytes = [0; 6];
    for (to, from) in bytes.iter_mut().zip(address.sa_data) {
        *to = from.cast_unsigned();
    }
    Ok(MacAddress::new(bytes))
}

/// A duplicate of a file descriptor of the process, which is not inherited by other programs.
pub(super) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the system call takes any number.
    let new = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    check(new)?;
    // SAFETY: the descriptor is new, and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// Has reads and writes return at once.
pub(super) fn set_nonblocking(file: &File) -> io::Result<()> {
    // SAFETY: the system call takes no memory.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

pub(super) fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
