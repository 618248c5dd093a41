//! Why a virtual machine could not be built, or a handle not do what was asked.

use std::io;

use kiln_io_thread::CpuList;
use kiln_memory::MemorySize;

use crate::HostError;

/// Why a virtual machine could not be built. What is left behind is nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The host cannot run guests.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The name is not one that a machine can have.
    #[error("name a machine {name:?}: a name has 1 to 64 characters, and no control characters")]
    Name {
        /// What was given.
        name: String,
    },
    /// No kernel was given.
    #[error("no kernel: give the builder one with `kernel`")]
    NoKernel,
    /// The number of vCPUs is zero, or more than this host or Kiln can give.
    #[error("{asked} vCPUs: there can be 1 to {limit} here")]
    VcpuCount {
        /// The number asked for.
        asked: u32,
        /// The largest number possible.
        limit: u32,
    },
    /// The size of the RAM is not one a machine can have.
    #[error(
        "{asked} ({} bytes) of memory: it must be a multiple of 4 KiB, from {min} to {max} here",
        asked.as_bytes()
    )]
    MemorySize {
        /// The size asked for.
        asked: MemorySize,
        /// The smallest size.
        min: MemorySize,
        /// The largest size that the guest's physical addresses reach.
        max: MemorySize,
    },
    /// Guest RAM could not be allocated.
    #[error(transparent)]
    Memory(#[from] kiln_memory::Error),
    /// KVM does not take the guest's RAM.
    #[error("give the guest {size} of memory: more than KVM can map on this host; choose less")]
    MemorySlot {
        /// The size of the part of the RAM that KVM refused.
        size: MemorySize,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel, the initrd or the command line cannot be booted.
    #[error(transparent)]
    Boot(#[from] kiln_arch::Error),
    /// A disk image cannot be opened.
    #[error(transparent)]
    DiskImage(#[from] kiln_devices::virtio::block::RawFileError),
    /// Only files and block devices have a way past the page cache.
    #[error(
        "use a disk without the host's page cache (O_DIRECT): that is for raw images and block \
         devices, not for a backend of another kind"
    )]
    DirectBackend,
    /// A disk image in the qcow2 format cannot be opened.
    #[cfg(feature = "qcow2")]
    #[error(transparent)]
    Qcow2(#[from] kiln_devices::virtio::block::Qcow2Error),
    /// A disk image is in the qcow2 format, which this build does not have.
    #[cfg(not(feature = "qcow2"))]
    #[error("open qcow2 image `{}`: kiln-vmm was built without its feature `qcow2`", path.display())]
    NoQcow2 {
        /// The image.
        path: std::path::PathBuf,
    },
    /// A disk cannot be as it was described.
    #[error(transparent)]
    Disk(#[from] kiln_devices::virtio::block::BlockError),
    /// A tap interface cannot be used.
    #[error(transparent)]
    Tap(#[from] kiln_devices::virtio::net::TapError),
    /// The socket of a network cannot be used.
    #[error(transparent)]
    NetSocket(#[from] kiln_devices::virtio::net::StreamError),
    /// There is no network by passt.
    #[error(transparent)]
    UserNet(#[from] kiln_devices::virtio::net::PasstError),
    /// What a description says of a network interface does not go together.
    #[error("make a network interface of its description: {reason}")]
    NetDescription {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A network interface cannot be as it was described.
    #[error(transparent)]
    Net(#[from] kiln_devices::virtio::net::NetError),
    /// A socket device cannot be as it was described.
    #[error(transparent)]
    Vsock(#[from] kiln_devices::virtio::vsock::VsockError),
    /// An entropy device cannot be made.
    #[error(transparent)]
    Rng(#[from] kiln_devices::virtio::rng::RngError),
    /// The balloon cannot be as it was described.
    #[error(transparent)]
    Balloon(#[from] kiln_devices::virtio::balloon::BalloonError),
    /// The machine's memory is not for a balloon.
    #[error("give the machine a balloon, with memory as it is: {reason}")]
    BalloonMemory {
        /// What they have against each other.
        reason: &'static str,
    },
    /// A virtio console cannot be as it was described.
    #[error(transparent)]
    VirtioConsole(#[from] kiln_devices::virtio::console::VirtioConsoleError),
    /// Both consoles lead to the standard input and output.
    #[error(
        "use the standard input and output for the serial port and for the console: only one can have them"
    )]
    StdioTwice,
    /// A device has no place.
    #[error(transparent)]
    Device(#[from] kiln_device_manager::Error),
    /// A virtio device cannot be put behind its transport.
    #[error(transparent)]
    Transport(#[from] kiln_virtio_device::TransportError),
    /// There are more virtio devices than a machine has room for.
    #[error(
        "no room for `{name}`: a machine has at most {limit} virtio devices, whatever their transport"
    )]
    DeviceCount {
        /// The first device that is too many.
        name: String,
        /// How many there can be.
        limit: usize,
    },
    /// There are more virtio devices on the MMIO transport than the IOAPIC has pins.
    #[error(
        "no interrupt for `{name}` on the mmio transport: it takes one of the IOAPIC's {pins} pins for each \
         device, and {limit} of them are free for that; more devices fit on the pci transport"
    )]
    MmioDeviceCount {
        /// The first device that is too many.
        name: String,
        /// The pins of the IOAPIC.
        pins: u32,
        /// How many devices there can be on that transport in this machine.
        limit: usize,
    },
    /// A device has no place on the PCI bus.
    #[error(transparent)]
    Pci(#[from] kiln_pci::Error),
    /// A device has more interrupt vectors than KVM has routes left.
    #[error("give `{name}` {count} interrupt vectors: KVM on this host has routes for {left} more")]
    InterruptRoutes {
        /// The device.
        name: String,
        /// The vectors that it has.
        count: u16,
        /// The routes that are left.
        left: usize,
    },
    /// The I/O thread could not be started.
    #[error(transparent)]
    IoThread(#[from] kiln_io_thread::Error),
    /// There is no telling which CPUs the host has online.
    #[error("read which CPUs this host has online")]
    OnlineCpus {
        /// What the system said.
        source: io::Error,
    },
    /// I/O threads are to run on CPUs that the host does not have online.
    #[error(
        "run I/O threads on CPUs {cpus}: {missing} not online on this host, which has {online}"
    )]
    IoAffinity {
        /// The CPUs asked for.
        cpus: CpuList,
        /// Those of them that are not online.
        missing: CpuList,
        /// Those that are.
        online: CpuList,
    },
    /// A device is to run on CPUs of its own, and has no thread of its own.
    #[error(
        "keep the I/O of `{device}` on some CPUs: its I/O thread is shared with other devices; give it its own, \
         or choose CPUs for all I/O threads"
    )]
    SharedIoAffinity {
        /// The device.
        device: String,
    },
    /// The serial port could not be set up.
    #[error(transparent)]
    Serial(#[from] kiln_devices::legacy::serial::SerialError),
    /// What the serial port or the console is to lead to cannot be opened.
    #[error("open {object} for {user}")]
    Console {
        /// What was opened.
        object: String,
        /// What for.
        user: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// KVM refused a request.
    #[error("{request}")]
    Kvm {
        /// The ioctl, or the system call.
        request: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// KVM refused the value of a model-specific register, although it lists it.
    #[error("KVM refuses model-specific register {index:#x}")]
    Msr {
        /// The register's number.
        index: u32,
    },
}

/// Why a device in KVM could not be had, or not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// KVM did not create the device.
    #[error("create a {kind} device in KVM (KVM_CREATE_DEVICE)")]
    Create {
        /// The kind of device.
        kind: &'static str,
        /// What the system said: `ENODEV` where KVM on this host has no such device.
        source: io::Error,
    },
    /// The device refused an attribute.
    #[error("{name} (KVM_SET_DEVICE_ATTR)")]
    Attribute {
        /// The attribute.
        name: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a handle could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandleError {
    /// The vCPUs could not.
    #[error(transparent)]
    Vcpu(#[from] kiln_vcpu_manager::Error),
    /// A stream of events could not be had.
    #[error("listen to the machine's events")]
    Events {
        /// What the system said.
        source: io::Error,
    },
    /// It would wait for the machine's I/O loop on the thread that turns it, and had no other.
    #[error("wait for the machine on a thread beside its I/O loop")]
    Thread {
        /// What the system said.
        source: io::Error,
    },
    /// It would wait for the thread that it was called on.
    #[error("a device waits for its machine on one of the machine's own threads")]
    OnOwnThread,
}
