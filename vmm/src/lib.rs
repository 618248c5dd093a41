//! A virtual machine monitor to embed.
//!
//! [`VmBuilder`] describes a machine, and its `build` refuses what cannot work. [`Vm::start`]
//! returns at once with a [`VmHandle`], which can be cloned and sent: it waits, pauses, resumes,
//! presses the power button and stops. How the machine ended is a value, [`VmExit`]. Dropping a
//! machine at any point of its life leaves no thread, no descriptor and no mapping behind, and any
//! number of machines fit in one process.
//!
//! The library ends no process, touches no terminal and installs no logger; what it logs goes to
//! the `tracing` facade, in a span `vm` for each machine, and a span `device` in it for each of its
//! virtio devices. The one signal whose handler it sets is the [`KickSignal`].
//!
//! | module | what lives there |
//! |---|---|
//! | `builder` | [`VmBuilder`]: what a machine is made of |
//! | [`config`] | [`VmConfig`]: a machine as a value, a TOML or a JSON file |
//! | `assemble` | from a builder to a machine: who is wired to whom |
//! | `machine` | the machine around the vCPUs |
//! | `vcpu` | vCPUs from their creation to the state they start in |
//! | `warm_up` | what of a kernel is taken from the host once the guest runs |
//! | `handle`, `exit` | [`Vm`], [`VmHandle`], [`VmExit`] |
//! | [`metrics`] | [`Metrics`]: what a machine has done, as plain values |
//! | `names` | a machine's name, and what is made of it: its `tracing` span, its threads' names |
//! | `events` | [`Events`], [`VmEvent`]: what happens to a machine, as a stream |
//! | `disk`, `net`, `vsock`, `rng`, `balloon` | [`Disk`], [`Net`], [`Vsock`], [`Rng`], [`Balloon`] |
//! | `virtio_console` | [`VirtioConsole`]: `/dev/hvc0`, and named ports |
//! | `decompressor` | [`Decompressor`]: who unpacks the kernel in a bzImage |
//! | `transport` | [`Transport`]: how the guest reaches its virtio devices |
//! | `pci` | the PCI bus: what is on it, where it is, and what follows its BARs |
//! | `host`, `capabilities` | [`Host`], the system fd: what this host's KVM can do |
//! | `kvm` | the VM fd |
//! | `interrupts` | the routes of interrupts through KVM: IOAPIC pins and MSI-X vectors |
//! | `vfio` | [`VfioDevice`], a device fd |
//! | `error` | [`BuildError`], [`HandleError`] |
//! | [`virtio`] | what a virtio device of your own is made of |
//!
//! # Example
//!
//! A guest of a few bytes, which prints and powers off. It needs `/dev/kvm`, and no files.
//!
//! ```
//! use kiln_vmm::{Console, ConsoleOutput, ConsoleInput, Host, Kernel, MemorySize, VmBuilder, VmExit};
//! use std::sync::Arc;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # if !std::path::Path::new("/dev/kvm").exists() { return Ok(()); }
//! // mov dx, 0x3f8; mov al, 'K'; out dx, al - then S5 to the ACPI sleep control register.
//! let code = [
//!     0x66, 0xba, 0xf8, 0x03, 0xb0, b'K', 0xee, 0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee,
//! ];
//! let (output, printed) = ConsoleOutput::capture(4096);
//! let vm = VmBuilder::new()
//!     .host(Arc::new(Host::open()?))
//!     .memory(MemorySize::mib(16))
//!     .kernel(Kernel::from_code(&code)?)
//!     .serial(Console::new(ConsoleInput::null(), output))
//!     .build()?;
//! let handle = vm.start()?;
//! assert_eq!(handle.wait()?, VmExit::Shutdown);
//! assert_eq!(printed.text(), "K");
//! # Ok(())
//! # }
//! ```
//!
//! With a stock kernel, a disk and a network:
//!
//! ```no_run
//! use kiln_vmm::{Console, Disk, Kernel, MemorySize, Net, VmBuilder};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let vm = VmBuilder::new()
//!     .vcpus(2)
//!     .memory(MemorySize::mib(512))
//!     .kernel(Kernel::open("vmlinuz")?)
//!     .initrd("initrd.img")
//!     .cmdline("console=ttyS0 root=/dev/vda rw")
//!     .disk(Disk::open("root.ext4")?.id("root"))
//!     .net(Net::tap("tap0")?)
//!     .serial(Console::stdio()?)
//!     .build()?;
//! println!("{}", vm.start()?.wait()?);
//! # Ok(())
//! # }
//! ```

#![deny(missing_docs)]

mod assemble;
mod balloon;
mod builder;
mod capabilities;
pub mod config;
mod decompressor;
mod disk;
mod disk_format;
mod error;
mod events;
mod exit;
mod handle;
mod head_start;
mod host;
mod interrupts;
mod io_threads;
mod kvm;
mod machine;
pub mod metrics;
mod names;
mod net;
mod pci;
mod rng;
mod transport;
mod vcpu;
mod vfio;
mod virtio_console;
mod vsock;
mod warm_up;

pub use balloon::Balloon;
pub use builder::VmBuilder;
pub use capabilities::Capabilities;
pub use config::VmConfig;
pub use decompressor::{Decompressor, UnknownDecompressor};
pub use disk::Disk;
pub use disk_format::{DiskFormat, UnknownDiskFormat};
pub use error::{BuildError, DeviceError, HandleError};
pub use events::{Events, VmEvent};
pub use exit::VmExit;
pub use handle::{Vm, VmHandle, VmState};
pub use head_start::HeadStart;
pub use host::{Execution, Host, HostError};
pub use io_threads::{IoThreads, UnknownIoThreads};
pub use kiln_arch::{BootProtocol, Kernel};
pub use kiln_device_api::{BusDevice, BusDeviceMut, ExitRequest};
pub use kiln_devices::console::{Captured, Console, ConsoleInput, ConsoleOutput};
pub use kiln_devices::rate_limit::{RateLimit, RateLimits};
pub use kiln_devices::virtio::balloon::{
    BalloonControl, BalloonCounters, BalloonError, BalloonStatistics,
};
pub use kiln_devices::virtio::block::{
    BackingFiles, BlockBackend, BlockControl, BlockCounters, BlockError, BlockProperties,
    BlockRateLimits, CacheMode, IoEngine, RawFile, RawFileError,
};
#[cfg(feature = "qcow2")]
pub use kiln_devices::virtio::block::{Qcow2Error, Qcow2File};
pub use kiln_devices::virtio::console::{ConsoleSize, Port as ConsolePort};
pub use kiln_devices::virtio::net::{
    IpProtocol, MacAddress, NetBackend, NetControl, NetCounters, NetRateLimits, Offloads,
    ParsePortForwardError, PasstError, PortForward, StreamError, UserNetOptions,
};
pub use kiln_io_thread::{CpuList, CpuListError, IoLoop};
pub use kiln_kernel_cache::{CacheError, KernelCache, UnpackError};
pub use kiln_memory::{Backing, GuestSlice, HugePages, MemoryOptions, MemorySize};
pub use kiln_memory::{gather, gather_into, scatter};
pub use kiln_vcpu_manager::{Crash, CrashCause, ExitCounts, InstructionBytes, KickSignal};
pub use metrics::Metrics;
pub use net::Net;
pub use rng::Rng;
pub use transport::{Transport, UnknownTransport};
pub use vfio::VfioDevice;
pub use virtio_console::VirtioConsole;
pub use vsock::Vsock;

/// What a virtio device of your own is made of, for [`VmBuilder::virtio_device`].
pub mod virtio {
    pub use kiln_io_thread::{EventSet, IoEvent, Registrar};
    pub use kiln_virtio_device::{
        ActivateError, Activation, ActiveQueue, Chain, GuestBuffers, InterruptEvent, QueueError,
        QueueHandler, SimpleDevice, Turn, VirtioDevice, VirtioInterrupt, Worker,
    };
}
