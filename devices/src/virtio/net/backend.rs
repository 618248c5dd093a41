//! What a network can do, whatever is behind it.

use std::io;
use std::os::fd::BorrowedFd;

use kiln_memory::GuestSlice;

use super::MacAddress;

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
    /// UDP may come in packets larger than the MTU, to be cut into fragments of one datagram (UFO).
    pub ufo: bool,
    /// UDP over IPv4 and IPv6 may come in packets larger than the MTU, to be cut into datagrams
    /// (USO).
    pub uso: bool,
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

    /// The driver is ready, or has changed its mind, and takes packets with these offloads: a
    /// subset of [`offloads`](Self::offloads). A backend that has any implements both. Each pair of
    /// queues is told.
    ///
    /// # Errors
    ///
    /// Any error, which makes the activation of the device fail, or the driver's command.
    fn set_offloads(&mut self, guest: Offloads) -> io::Result<()> {
        let _ = guest;
        Ok(())
    }

    /// Sends a packet. The guest may change it meanwhile, and its header may be nonsense.
    ///
    /// # Errors
    ///
    /// `WouldBlock` where there is no room for it now: it is given again when
    /// [`send_readiness`](Self::send_readiness) says so. Without such a descriptor, and after any
    /// other error, the packet is dropped and counted.
    fn send(&mut self, packet: &[GuestSlice<'_>]) -> io::Result<()>;

    /// A file descriptor that is readable when there is room again for a packet that did not fit,
    /// or for what [`flush`](Self::flush) could not send. It stays the same. By default there is
    /// none, and packets that do not fit are dropped, as on any wire.
    fn send_readiness(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Sends what a backend has kept of packets in order to send them together: there are no more
    /// for now, or [`send_readiness`](Self::send_readiness) is readable.
    fn flush(&mut self) {}

    /// Why there is no network at present, in a few words and on one line. The driver then sees
    /// that its link is down. Asked after packets were sent and received; by default there always
    /// is one.
    fn failure(&self) -> Option<&str> {
        None
    }

    /// Receives a packet into `buffers`, in their order, and gives its length in bytes. There is
    /// room for a packet of 65 566 bytes. The last two bytes of the header (`num_buffers`) are
    /// the device's business.
    ///
    /// # Errors
    ///
    /// `WouldBlock` where there is none. Any other error is counted.
    fn receive(&mut self, buffers: &[GuestSlice<'_>]) -> io::Result<usize>;

    /// The file descriptor at which the host's kernel can send and receive this network's packets
    /// by itself (vhost-net), if it can: that of a tap. They begin with the same 12 bytes there.
    fn vhost_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The largest payload of a frame in bytes, if it is known: the driver is told.
    fn mtu(&self) -> Option<u16> {
        None
    }

    /// The address that the driver's interface is to have where nobody says another, if this
    /// network has one for it. By default it is random.
    fn mac(&self) -> Option<MacAddress> {
        None
    }

    /// How many pairs of queues the device has where nobody says a number. By default it is one.
    fn queue_pairs(&self) -> u16 {
        1
    }

    /// Another pair of queues of the same network, worked on by a thread of its own. It is asked
    /// for before the device is used, once for each pair but the first, which is this one. What a
    /// pair sends belongs to flows of which the network best gives the other direction to the same
    /// pair.
    ///
    /// # Errors
    ///
    /// Any error, which makes the creation of the device fail; `Unsupported` by default.
    fn add_queue_pair(&mut self) -> io::Result<Box<dyn NetBackend>> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this network has one pair of queues only",
        ))
    }

    /// Whether the driver uses this pair of queues: while it does not, nothing is sent or received,
    /// and the network is to give its packets to other pairs. It is told at each start of the
    /// device, before [`set_offloads`](Self::set_offloads), and when the driver chooses another
    /// number of pairs. One that is the only one is always used.
    ///
    /// # Errors
    ///
    /// Any error, which is counted: the pair is not used then.
    fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        let _ = enabled;
        Ok(())
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

    fn send_readiness(&self) -> Option<BorrowedFd<'_>> {
        (**self).send_readiness()
    }

    fn flush(&mut self) {
        (**self).flush();
    }

    fn failure(&self) -> Option<&str> {
        (**self).failure()
    }

    fn receive(&mut self, buffers: &[GuestSlice<'_>]) -> io::Result<usize> {
        (**self).receive(buffers)
    }

    fn vhost_fd(&self) -> Option<BorrowedFd<'_>> {
        (**self).vhost_fd()
    }

    fn mtu(&self) -> Option<u16> {
        (**self).mtu()
    }

    fn mac(&self) -> Option<MacAddress> {
        (**self).mac()
    }

    fn queue_pairs(&self) -> u16 {
        (**self).queue_pairs()
    }

    fn add_queue_pair(&mut self) -> io::Result<Box<dyn NetBackend>> {
        (**self).add_queue_pair()
    }

    fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        (**self).set_enabled(enabled)
    }
}
