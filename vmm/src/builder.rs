//! What a virtual machine is made of, and the checks that need no host.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_arch::Kernel;
use kiln_device_api::BusDevice;
use kiln_devices::console::Console;
use kiln_io_thread::{IoHandle, IoLoop};
use kiln_kernel_cache::KernelCache;
use kiln_memory::{MemoryOptions, MemorySize};
use kiln_vcpu_manager::KickSignal;
use kiln_virtio_device::VirtioDevice;

use crate::{
    Balloon, BuildError, CpuList, Decompressor, Disk, HeadStart, Host, IoThreads, Net, Rng,
    Transport, VirtioConsole, Vm, Vsock, assemble,
};

/// A device of the embedder's own on a bus.
pub(crate) struct BusDeviceAt<A> {
    pub(crate) name: String,
    pub(crate) base: A,
    pub(crate) size: A,
    pub(crate) device: Arc<dyn BusDevice>,
}

/// Describes a virtual machine; [`build`](Self::build) makes it.
///
/// What is not set: one vCPU, 512 MiB of anonymous memory, the command line `console=ttyS0`, a
/// serial port that leads nowhere, no disks, no network; virtio devices are on PCI.
#[must_use = "a builder does nothing until `build`"]
pub struct VmBuilder {
    pub(crate) name: Option<String>,
    pub(crate) host: Option<Arc<Host>>,
    pub(crate) head_start: Option<HeadStart>,
    pub(crate) vcpus: u32,
    pub(crate) memory: MemorySize,
    pub(crate) memory_options: MemoryOptions,
    pub(crate) kernel: Option<Kernel>,
    pub(crate) kernel_decompressor: Decompressor,
    pub(crate) kernel_cache: Option<KernelCache>,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) cmdline: String,
    pub(crate) disks: Vec<Disk>,
    pub(crate) nets: Vec<Net>,
    pub(crate) balloon: Option<Balloon>,
    pub(crate) rng: Option<Rng>,
    pub(crate) virtio_console: Option<VirtioConsole>,
    pub(crate) vsock: Option<Vsock>,
    pub(crate) console: Console,
    pub(crate) transport: Transport,
    pub(crate) io_threads: IoThreads,
    pub(crate) io_affinity: Option<CpuList>,
    pub(crate) io_loop: Option<IoHandle>,
    pub(crate) virtio_devices: Vec<(String, Box<dyn VirtioDevice>, Option<Transport>)>,
    pub(crate) pio_devices: Vec<BusDeviceAt<u16>>,
    pub(crate) mmio_devices: Vec<BusDeviceAt<u64>>,
    pub(crate) kick_signal: KickSignal,
}

impl Default for VmBuilder {
    fn default() -> Self {
        Self {
            name: None,
            host: None,
            head_start: None,
            vcpus: 1,
            memory: MemorySize::mib(512),
            memory_options: MemoryOptions::default(),
            kernel: None,
            kernel_decompressor: Decompressor::default(),
            kernel_cache: None,
            initrd: None,
            cmdline: "console=ttyS0".to_owned(),
            disks: Vec::new(),
            nets: Vec::new(),
            balloon: None,
            rng: None,
            virtio_console: None,
            vsock: None,
            console: Console::null(),
            transport: Transport::default(),
            io_threads: IoThreads::default(),
            io_affinity: None,
            io_loop: None,
            virtio_devices: Vec::new(),
            pio_devices: Vec::new(),
            mmio_devices: Vec::new(),
            kick_signal: KickSignal::default(),
        }
    }
}

impl VmBuilder {
    /// A machine with nothing but the defaults; it still needs a [`kernel`](Self::kernel).
    pub fn new() -> Self {
        Self::default()
    }

    /// What the machine is called in messages, in its metrics and in the names of its threads: 1 to
    /// 64 characters. By default it has no name, which is enough where there is one machine.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The host's KVM, for those who build more than one machine and probe once. Without it
    /// [`build`](Self::build) opens `/dev/kvm`.
    pub fn host(mut self, host: Arc<Host>) -> Self {
        self.host = Some(host);
        self
    }

    /// What was begun of the machine before it could be described. It is of no use, and dropped,
    /// where a [`host`](Self::host) is given.
    pub fn head_start(mut self, head_start: HeadStart) -> Self {
        self.head_start = Some(head_start);
        self
    }

    /// The number of vCPUs.
    pub fn vcpus(mut self, count: u32) -> Self {
        self.vcpus = count;
        self
    }

    /// The size of the guest's RAM.
    pub fn memory(mut self, size: MemorySize) -> Self {
        self.memory = size;
        self
    }

    /// What is behind the guest's RAM: anonymous memory or a memfd, huge pages, prefaulting.
    pub fn memory_options(mut self, options: MemoryOptions) -> Self {
        self.memory_options = options;
        self
    }

    /// The kernel to boot.
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = Some(kernel);
        self
    }

    /// Who unpacks the kernel in a bzImage: the host, unless said otherwise. Where it cannot, the
    /// guest does, and one line of the log says why.
    ///
    /// The host does it at each [`build`](Self::build), unless there is a
    /// [`kernel_cache`](Self::kernel_cache), or the kernel was [`unpacked`](Kernel::unpacked) before,
    /// for all machines that are given a clone of it.
    pub fn kernel_decompressor(mut self, decompressor: Decompressor) -> Self {
        self.kernel_decompressor = decompressor;
        self
    }

    /// Where the host keeps the kernels that it unpacked. Without it they are in memory: the library
    /// writes to no folder that it was not given.
    pub fn kernel_cache(mut self, cache: KernelCache) -> Self {
        self.kernel_cache = Some(cache);
        self
    }

    /// The initial RAM disk, read when the machine is built.
    pub fn initrd(mut self, path: impl Into<PathBuf>) -> Self {
        self.initrd = Some(path.into());
        self
    }

    /// The kernel's command line, delivered exactly as it is here.
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.cmdline = cmdline.into();
        self
    }

    /// Adds a disk; the first one is `/dev/vda` in a Linux guest.
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Adds a network interface.
    pub fn net(mut self, net: Net) -> Self {
        self.nets.push(net);
        self
    }

    /// Gives the machine a socket device, in place of one given before.
    pub fn vsock(mut self, vsock: Vsock) -> Self {
        self.vsock = Some(vsock);
        self
    }

    /// Gives the guest random numbers of the host's, by an entropy device. Linux mixes them into its
    /// own at start, and has them as `/dev/hwrng`.
    pub fn rng(mut self, rng: Rng) -> Self {
        self.rng = Some(rng);
        self
    }

    /// Gives the machine a memory balloon, by which the guest's RAM gets back to the host.
    pub fn balloon(mut self, balloon: Balloon) -> Self {
        self.balloon = Some(balloon);
        self
    }

    /// Gives the machine a virtio console (`hvc0`), and its named ports.
    pub fn console(mut self, console: VirtioConsole) -> Self {
        self.virtio_console = Some(console);
        self
    }

    /// Where the serial port (`ttyS0`) leads.
    pub fn serial(mut self, console: Console) -> Self {
        self.console = console;
        self
    }

    /// How the guest reaches the machine's virtio devices, but for those that say otherwise
    /// themselves. A machine whose transport is MMIO has no PCI bus, unless a device asks for it.
    ///
    /// A machine has room for 40 virtio devices. On MMIO each takes one of the IOAPIC's 24 pins, of
    /// which 18 are free for that, and 14 in a machine with a PCI bus.
    pub fn transport(mut self, transport: Transport) -> Self {
        self.transport = transport;
        self
    }

    /// Who works on the queues of the machine's virtio devices, but for those that say otherwise
    /// themselves: one thread for all of them, unless said otherwise.
    pub fn io_threads(mut self, threads: IoThreads) -> Self {
        self.io_threads = threads;
        self
    }

    /// The host's CPUs that the machine's I/O threads run on: all that the process has, unless said
    /// otherwise. [`build`](Self::build) refuses those that are not online.
    pub fn io_affinity(mut self, cpus: CpuList) -> Self {
        self.io_affinity = Some(cpus);
        self
    }

    /// Takes a loop of the program's own instead of the machine's I/O thread: for a program that
    /// has a thread which does nothing but wait for the machine. [`VmHandle::wait`] on that thread
    /// turns it. I/O threads of devices are as they are without it; on which CPUs the loop's thread
    /// runs is the program's affair.
    ///
    /// The machine's devices, its serial port and its end need the loop to be turned: what other
    /// threads ask of the machine waits for it, and so does a guest that resets a device.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use kiln_vmm::{IoLoop, Kernel, VmBuilder};
    ///
    /// let own = IoLoop::new(|panic| eprintln!("{panic}"))?;
    /// let vm = VmBuilder::new()
    ///     .kernel(Kernel::open("vmlinux")?)
    ///     .io_loop(&own)
    ///     .build()?;
    /// println!("{}", vm.start()?.wait()?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// [`VmHandle::wait`]: crate::VmHandle::wait
    pub fn io_loop(mut self, own: &IoLoop) -> Self {
        self.io_loop = Some(own.handle().clone());
        self
    }

    /// Adds a virtio device of your own, named in messages.
    pub fn virtio_device(
        mut self,
        name: impl Into<String>,
        device: impl VirtioDevice + 'static,
    ) -> Self {
        let device = Box::new(device);
        self.virtio_devices.push((name.into(), device, None));
        self
    }

    /// Adds a virtio device of your own on this transport, whatever that of the others is.
    pub fn virtio_device_on(
        mut self,
        transport: Transport,
        name: impl Into<String>,
        device: impl VirtioDevice + 'static,
    ) -> Self {
        let device = Box::new(device);
        self.virtio_devices
            .push((name.into(), device, Some(transport)));
        self
    }

    /// Adds a device of your own at `size` I/O ports from `base`, named in messages.
    pub fn pio_device(
        mut self,
        name: impl Into<String>,
        base: u16,
        size: u16,
        device: Arc<dyn BusDevice>,
    ) -> Self {
        self.pio_devices.push(BusDeviceAt {
            name: name.into(),
            base,
            size,
            device,
        });
        self
    }

    /// Adds a device of your own at `size` bytes of guest physical addresses from `base`, named in
    /// messages. Addresses from 0xc0000000 to 4 GiB are never RAM, and those from 0xe0000000 to
    /// 0xf0000000 are left to you.
    pub fn mmio_device(
        mut self,
        name: impl Into<String>,
        base: u64,
        size: u64,
        device: Arc<dyn BusDevice>,
    ) -> Self {
        self.mmio_devices.push(BusDeviceAt {
            name: name.into(),
            base,
            size,
            device,
        });
        self
    }

    /// The signal by which vCPU threads are brought out of the guest: the one signal whose handler
    /// the library sets.
    pub fn kick_signal(mut self, signal: KickSignal) -> Self {
        self.kick_signal = signal;
        self
    }

    /// Makes the machine: checks everything, opens what is to be opened, and loads the kernel.
    ///
    /// # Errors
    ///
    /// Everything that can be refused is refused here, and then nothing is left behind.
    pub fn build(self) -> Result<Vm, BuildError> {
        assemble::assemble(self)
    }
}

impl fmt::Debug for VmBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmBuilder")
            .field("name", &self.name)
            .field("vcpus", &self.vcpus)
            .field("memory", &self.memory)
            .field("cmdline", &self.cmdline)
            .field("disks", &self.disks.len())
            .field("nets", &self.nets.len())
            .field("vsock", &self.vsock)
            .finish_non_exhaustive()
    }
}
