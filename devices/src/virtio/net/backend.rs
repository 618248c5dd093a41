//! What a network can do, whatever is behind it.

use std::io;
use std::os::fd::BorrowedFd;

use kiln_memory::GuestSlice;

/// Work on packets that one side can leave to the other (virtio 1.3, section 5.1.6.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Offloads {
    /// Packets may come without their checksum computed.
    pub checksum: bool,
    /// TCP over IPv4 may come in packets larger than the MTU, to be cut.
    pub tso4: bool,
    /// TCP over IPv6 may come in packets larger than the MTU, to be cut.
    pub tso6: bool,
    /// Such packets may have the congestion mark of TCP.
    pub ecn: bool,
}

/// A network: packets go out of guest RAM and come into it.
///
/// Each packet begins with the 12 bytes of `virtio_net_hdr` (virtio 1.3, section 5.1.6), in little
/// endian, and an Ethernet frame follows. Nothing here blocks.
pub trait NetBackend: Send + 'static {
    /// A file descriptor that is readable when there is a packet to be received. It stays the
    /// same.
    fn readiness(&self) -> BorrowedFd<'_>;

    /// The work that it takes over for packets that it sends, and leaves to the guest, if the
    /// guest can, for those that it receives. By default that is none.
    fn offloads(&self) -> Offloads {
        Offloads::default()
    }

    /// The driver is ready, and takes packets with these offloads: a subset of
    /// [`offloads`](Self::offloads). A backend that has any implements both.
    ///
    /// # Errors
    ///
    /// Any error, which makes the activation of the device fail.
    fn set_offloads(&mut self, guest: Offloads) -> io::Result<()> {
        let _ = guest;
        Ok(())
    }

    /// Sends a packet. The guest may change it meanwhile, and its header may be nonsense.
    ///
    /// # Errors
    ///
    /// Any error, `WouldBlock` too: the packet is dropped and counted.
    fn send(&mut self, packet: &[GuestSlice<'_>]) -> io::Result<()>;

    /// Receives a packet into `buffers`, in their order, and gives its length in bytes. There is
    /// room for a packet of 65 566 bytes. The last two bytes of the header (`num_buffers`) are
    /// the device's business.
    ///
    /// # Errors
    ///
    /// `WouldBlock` where there is none. Any other error is counted.
    fn receive(&mut self, buffers: &[GuestSlice<'_>]) -> io::Result<usize>;

    /// The largest payload of a frame in bytes, if it is known: the driver is told.
    fn mtu(&self) -> Option<u16> {
        None
    }
}

impl<T: NetBackend + ?Sized> NetBackend for Box<T> {
    fn readiness(&self) -> BorrowedFd<'_> {
        (**self).readiness()
    }

    fn offloads(&self) -> Offloads {
        (**self).offloads()
    }

    fn set_offloads(&mut self, guest: Offloads) -> io::Result<()> {
        (**self).set_offloads(guest)
    }

    fn send(&mut self, packet: &[GuestSlice<'_>]) -> io::Result<()> {
        (**self).send(packet)
    }

    fn receive(&mut self, buffers: &[GuestSlice<'_>]) -> io::Result<usize> {
        (**self).receive(buffers)
    }

    fn mtu(&self) -> Option<u16> {
        (**self).mtu()
    }
}
