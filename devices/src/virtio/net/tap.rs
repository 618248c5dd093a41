//! A tap or macvtap interface of the host as a network.

mod error;
mod interface;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;

use kiln_memory::GuestSlice;

use self::interface::FLAGS;
use super::{MacAddress, NetBackend, Offloads};
use crate::virtio::iovec::{read_packet, write_packet};

pub use error::TapError;

const TUN_PATH: &str = "/dev/net/tun";
/// The device number of [`TUN_PATH`], wherever it is.
const TUN_DEVICE: u64 = libc::makedev(10, 200);

/// A tap or macvtap interface, open.
///
/// While it is open its offloads are those of the guest. It is used with one queue, unless more are
/// [asked for](NetBackend::add_queue_pair): an interface of several queues then gives each flow's
/// packets to the queue that the guest sends the flow's with, among those that the guest uses.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: CString,
    more: More,
    offloads: Offloads,
    mtu: Option<u16>,
    mac: Option<MacAddress>,
    /// It is one queue of several.
    shares: bool,
}

/// Where more queues come from.
#[derive(Debug)]
enum More {
    /// This device is opened again.
    Device(String),
    /// They were handed over.
    Given(VecDeque<File>),
}

impl Tap {
    /// Opens the tap or macvtap interface of this name, which exists already.
    ///
    /// The guest's interface is to have a macvtap's address: it has this one where no other is
    /// chosen.
    ///
    /// # Errors
    ///
    /// [`TapError`], which says for each case what would help.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let c_name = checked(name)?;
        let no_interface = || TapError::NoInterface {
            name: name.to_owned(),
        };
        // To attach to an interface that does not exist creates it: look first.
        let index = interface::index(&c_name).ok_or_else(no_interface)?;
        match Self::attach(&c_name) {
            // An interface of another kind.
            Err(TapError::NotATap { .. }) => Self::open_macvtap(c_name, index),
            Ok(_) if interface::index(&c_name) != Some(index) => {
                // It was removed in between, and what we have is a new one that ends with its file.
                Err(no_interface())
            }
            result => Self::of_tun(result?, c_name),
        }
    }

    /// Opens the tap interface of this name, or creates it, with several queues, and brings it up.
    /// One that is created has this MTU, where one is given, and is removed when the last of its
    /// queues is closed. It has no address, and is not part of a bridge.
    ///
    /// # Errors
    ///
    /// [`TapError`] as for [`open`](Self::open), or [`TapError::CreationNotAllowed`].
    pub fn create(name: &str, mtu: Option<u16>) -> Result<Self, TapError> {
        let c_name = checked(name)?;
        if interface::index(&c_name).is_some() {
            return Self::open(name);
        }
        let file = open_tun(&c_name)?;
        interface::attach(&file, &c_name, FLAGS | libc::IFF_MULTI_QUEUE).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => TapError::CreationNotAllowed {
                    name: name.to_owned(),
                },
                _ => system(&c_name, "create the interface")(source),
            }
        })?;
        if let Some(mtu) = mtu {
            interface::set_mtu(&c_name, mtu).map_err(system(&c_name, "set its MTU"))?;
        }
        interface::set_up(&c_name).map_err(system(&c_name, "bring it up"))?;
        Self::of_tun(file, c_name)
    }

    /// The tap that these file descriptors are open on: one for each queue of the same interface.
    /// They were opened with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`, by a program that may do
    /// that. They do not block any more from now on, whoever else has them.
    ///
    /// # Errors
    ///
    /// [`TapError::Descriptor`] where there are none, or they are something else.
    pub fn from_fds(fds: impl IntoIterator<Item = OwnedFd>) -> Result<Self, TapError> {
        let wrong = |reason| TapError::Descriptor { reason };
        let mut files = VecDeque::new();
        let mut known: Option<CString> = None;
        for file in fds.into_iter().map(File::from) {
            let Ok((name, flags)) = interface::attached(&file) else {
                return Err(wrong(
                    "it is not open on a tap (open /dev/net/tun, and attach it to an interface)",
                ));
            };
            if flags & FLAGS != FLAGS {
                return Err(wrong(
                    "it is to be opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR",
                ));
            }
            if known.as_ref().is_some_and(|known| *known != name) {
                return Err(wrong(
                    "those of one network are to be of the same interface",
                ));
            }
            interface::set_nonblocking(&file).map_err(system(&name, "have it not block"))?;
            known = Some(name);
            files.push_back(file);
        }
        let (Some(file), Some(name)) = (files.pop_front(), known) else {
            return Err(wrong("none was given"));
        };
        let is_tun = file
            .metadata()
            .is_ok_and(|metadata| metadata.rdev() == TUN_DEVICE);
        Self::of_file(file, name, More::Given(files), !is_tun)
    }

    /// The same for descriptors that the process has been handed by the program that started it:
    /// the tap has duplicates, and they stay open.
    ///
    /// # Errors
    ///
    /// [`TapError::NoDescriptor`], and as [`from_fds`](Self::from_fds).
    pub fn from_fd_numbers(fds: &[RawFd]) -> Result<Self, TapError> {
        let fds: Result<Vec<_>, _> = fds
            .iter()
            .map(|&fd| {
                interface::duplicate(fd).map_err(|source| TapError::NoDescriptor { fd, source })
            })
            .collect();
        Self::from_fds(fds?)
    }

    /// Attaches to a tap of the tun device.
    fn attach(c_name: &CString) -> Result<File, TapError> {
        let file = open_tun(c_name)?;
        let attached = match interface::attach(&file, c_name, FLAGS) {
            // A tap with several queues has to be asked for as one.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                interface::attach(&file, c_name, FLAGS | libc::IFF_MULTI_QUEUE)
            }
            result => result,
        };
        attached.map_err(|source| {
            let name = text(c_name);
            match source.raw_os_error() {
                Some(libc::EINVAL) => TapError::NotATap { name },
                Some(libc::EBUSY) => TapError::Busy { name },
                Some(libc::EPERM | libc::EACCES) => TapError::NotAllowed { name },
                _ => system(c_name, "attach to the interface")(source),
            }
        })?;
        Ok(file)
    }

    fn of_tun(file: File, name: CString) -> Result<Self, TapError> {
        Self::of_file(file, name, More::Device(TUN_PATH.to_owned()), false)
    }

    /// Opens an interface that is no tap of the tun device: a macvtap has a device of its own.
    fn open_macvtap(name: CString, index: u32) -> Result<Self, TapError> {
        let not_a_tap = || TapError::NotATap { name: text(&name) };
        let path = format!("/dev/tap{index}");
        let file = match interface::open_device(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(not_a_tap()),
            result => result.map_err(|source| TapError::Macvtap {
                name: text(&name),
                path: path.clone(),
                source,
            })?,
        };
        // Of another interface where the device is one of another network namespace.
        match interface::attached(&file) {
            Ok((found, _)) if found == name => {}
            _ => return Err(not_a_tap()),
        }
        interface::attach(&file, &name, FLAGS).map_err(system(&name, "set its flags"))?;
        Self::of_file(file, name, More::Device(path), true)
    }

    fn of_file(file: File, name: CString, more: More, has_address: bool) -> Result<Self, TapError> {
        interface::set_header(&file)
            .map_err(system(&name, "set the size of its packets' header"))?;
        let offloads =
            interface::probe_offloads(&file).map_err(system(&name, "set its offloads"))?;
        let mtu = interface::mtu(&name).map_err(system(&name, "read its MTU"))?;
        let mac = match has_address {
            true => Some(interface::mac(&name).map_err(system(&name, "read its address"))?),
            false => None,
        };
        Ok(Self {
            file,
            name,
            more,
            offloads,
            mtu,
            mac,
            shares: false,
        })
    }

    /// Opens another queue of the interface.
    fn another(&mut self) -> Result<File, TapError> {
        let name = &self.name;
        let path = match &mut self.more {
            More::Given(files) => {
                return files
                    .pop_front()
                    .ok_or_else(|| TapError::NoMoreDescriptors { name: text(name) });
            }
            More::Device(path) => path,
        };
        let file = interface::open_device(path).map_err(|source| TapError::Device {
            name: text(name),
            source,
        })?;
        let flags = FLAGS | libc::IFF_MULTI_QUEUE;
        interface::attach(&file, name, flags).map_err(|source| match source.raw_os_error() {
            Some(libc::EINVAL | libc::EBUSY) => TapError::OneQueue { name: text(name) },
            _ => system(name, "attach another queue")(source),
        })?;
        Ok(file)
    }
}

fn text(name: &CString) -> String {
    name.to_string_lossy().into_owned()
}

fn checked(name: &str) -> Result<CString, TapError> {
    interface::check_name(name).ok_or_else(|| TapError::Name {
        name: name.to_owned(),
    })
}

fn open_tun(name: &CString) -> Result<File, TapError> {
    interface::open_device(TUN_PATH).map_err(|source| TapError::Device {
        name: text(name),
        source,
    })
}

fn system(name: &CString, what: &'static str) -> impl FnOnce(io::Error) -> TapError {
    let name = text(name);
    move |source| TapError::System { name, what, source }
}

impl NetBackend for Tap {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&mut self, guest: Offloads) -> io::Result<()> {
        interface::set_offloads(&self.file, guest)
    }

    fn send(&mut self, packet: &[GuestSlice<'_>]) -> io::Result<()> {
        write_packet(self.file.as_fd(), packet)
    }

    fn receive(&mut self, buffers: &[GuestSlice<'_>]) -> io::Result<usize> {
        read_packet(self.file.as_fd(), buffers)
    }

    fn vhost_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    fn mac(&self) -> Option<MacAddress> {
        self.mac
    }

    fn queue_pairs(&self) -> u16 {
        match &self.more {
            More::Device(_) => 1,
            More::Given(files) => u16::try_from(files.len() + 1).unwrap_or(u16::MAX),
        }
    }

    fn add_queue_pair(&mut self) -> io::Result<Box<dyn NetBackend>> {
        let file = self.another().map_err(io::Error::other)?;
        interface::set_header(&file)?;
        self.shares = true;
        Ok(Box::new(Self {
            file,
            name: self.name.clone(),
            more: More::Given(VecDeque::new()),
            shares: true,
            ..*self
        }))
    }

    fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        if !self.shares {
            return Ok(());
        }
        match interface::set_enabled(&self.file, enabled) {
            // It is so already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        }
    }
}
