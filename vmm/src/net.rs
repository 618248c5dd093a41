//! A network interface of the machine.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kiln_devices::virtio::net::{
    MacAddress, Net as NetDevice, NetBackend, NetOptions, NetRateLimits, Passt, StreamSocket, Tap,
    UserNetOptions,
};

use crate::events::EventSource;
use crate::io_threads::DeviceIo;
use crate::{BuildError, CpuList, IoThreads, Transport, VmEvent};

/// A network interface: what is behind it, and its address.
pub struct Net {
    backend: Box<dyn NetBackend>,
    options: NetOptions,
    pub(crate) transport: Option<Transport>,
    pub(crate) io: DeviceIo,
}

impl Net {
    /// An interface on a tap interface of the host that exists (`ip tuntap add NAME mode tap`), or
    /// on a macvtap interface, whose address it has then.
    ///
    /// # Errors
    ///
    /// [`BuildError::Tap`] where there is none of that name, it is in use, or may not be used.
    pub fn tap(name: &str) -> Result<Self, BuildError> {
        Ok(Self::new(Tap::open(name)?))
    }

    /// An interface on the host's own network, without privileges or set-up: by
    /// [passt](https://passt.top), a program that is started here and ends with the machine.
    ///
    /// The guest gets its addresses and its resolver, which are the host's, by DHCP. When passt
    /// ends before the machine does, the link is down and there is a [`VmEvent::DeviceError`].
    ///
    /// # Errors
    ///
    /// [`BuildError::UserNet`] where passt is not installed, or cannot do what the options say.
    pub fn user(options: &UserNetOptions) -> Result<Self, BuildError> {
        Ok(Self::new(Passt::start(options)?))
    }

    /// An interface on a network that another program offers at a Unix stream socket, in the framing
    /// of passt, gvproxy and QEMU (`-netdev stream`): four bytes of length, big endian, in front of
    /// each Ethernet frame.
    ///
    /// When that program goes, the link is down and there is a [`VmEvent::DeviceError`]. With
    /// `reconnect` the interface then connects again, and tries so each time when that has passed.
    ///
    /// # Errors
    ///
    /// [`BuildError::NetSocket`] where nobody listens there.
    pub fn socket(
        path: impl Into<PathBuf>,
        reconnect: Option<Duration>,
    ) -> Result<Self, BuildError> {
        let socket = StreamSocket::connect(path)?;
        Ok(Self::new(match reconnect {
            Some(after) => socket.reconnect(after)?,
            None => socket,
        }))
    }

    /// An interface on a stream socket that is connected to such a program already.
    ///
    /// # Errors
    ///
    /// [`BuildError::NetSocket`] where it is something else.
    pub fn socket_fd(socket: OwnedFd) -> Result<Self, BuildError> {
        Ok(Self::new(StreamSocket::from_fd(socket)?))
    }

    /// The same on a tap interface that is created where there is none of that name, which takes
    /// `CAP_NET_ADMIN`. It is up, has this MTU where one is given, no address and no bridge, and is
    /// removed with the machine.
    ///
    /// # Errors
    ///
    /// [`BuildError::Tap`] as for [`tap`](Self::tap), and where it may not be created.
    pub fn create_tap(name: &str, mtu: Option<u16>) -> Result<Self, BuildError> {
        Ok(Self::new(Tap::create(name, mtu)?))
    }

    /// An interface on a tap that somebody else has opened, with `IFF_TAP`, `IFF_NO_PI` and
    /// `IFF_VNET_HDR`: one file descriptor for each pair of queues.
    ///
    /// # Errors
    ///
    /// [`BuildError::Tap`] where they are not that.
    pub fn tap_fds(fds: impl IntoIterator<Item = OwnedFd>) -> Result<Self, BuildError> {
        Ok(Self::new(Tap::from_fds(fds)?))
    }

    /// An interface with a backend of your own.
    pub fn new(backend: impl NetBackend) -> Self {
        Self {
            backend: Box::new(backend),
            options: NetOptions::default(),
            transport: None,
            io: DeviceIo::default(),
        }
    }

    /// The interface's address in the guest; by default that which the backend has for it, or a
    /// random one.
    pub fn mac(mut self, address: MacAddress) -> Self {
        self.options.mac = Some(address);
        self
    }

    /// How many pairs of queues it has, from 1 to 64: a guest with as many vCPUs uses one on each.
    /// A tap is to be created for that (`ip tuntap add NAME mode tap multi_queue`). By default it
    /// is one, or as many as file descriptors were given.
    pub fn queues(mut self, pairs: u16) -> Self {
        self.options.queue_pairs = Some(pairs);
        self
    }

    /// The largest payload of a frame in bytes, at least 1280, that the guest takes for its
    /// interface; by default that of the tap. What is behind it has to carry that much.
    pub fn mtu(mut self, bytes: u16) -> Self {
        self.options.mtu = Some(bytes);
        self
    }

    /// How much it carries in a time: by default any amount. The limits of a running machine are
    /// changed by [`VmHandle::net`](crate::VmHandle::net).
    pub fn rate_limits(mut self, limits: NetRateLimits) -> Self {
        self.options.rate_limits = limits;
        self
    }

    /// Whether the host's kernel carries the packets between the tap and the guest by itself, with
    /// vhost-net: by default it does not. It takes `/dev/vhost-net`, and the right to it. The guest
    /// has no filters then, and there are neither rate limits nor counters; the kernel's thread is
    /// none of the [I/O threads](Self::io_threads).
    pub fn vhost(mut self, enabled: bool) -> Self {
        self.options.vhost = enabled;
        self
    }

    /// How the guest reaches it, where that differs from the rest of the machine
    /// ([`VmBuilder::transport`](crate::VmBuilder::transport)).
    pub fn transport(mut self, transport: Transport) -> Self {
        self.transport = Some(transport);
        self
    }

    /// Who works on its queues, where that differs from the rest of the machine
    /// ([`VmBuilder::io_threads`](crate::VmBuilder::io_threads)).
    pub fn io_threads(mut self, threads: IoThreads) -> Self {
        self.io.threads = Some(threads);
        self
    }

    /// The host's CPUs that its I/O threads run on, where they are not those of all I/O threads
    /// ([`VmBuilder::io_affinity`](crate::VmBuilder::io_affinity)). It needs threads of its own.
    pub fn io_affinity(mut self, cpus: CpuList) -> Self {
        self.io.affinity = Some(cpus);
        self
    }

    /// The device, which is called `name` in the events that it sends.
    pub(crate) fn into_device(
        self,
        name: &str,
        events: &Arc<EventSource>,
    ) -> Result<NetDevice, BuildError> {
        let mut device = NetDevice::new(self.backend, self.options)?;
        let (events, name) = (Arc::clone(events), name.to_owned());
        device.on_failure(move |reason| {
            events.send(&VmEvent::DeviceError {
                device: name.clone(),
                reason: reason.to_owned(),
            });
        });
        Ok(device)
    }
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
