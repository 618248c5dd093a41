//! From a builder to a machine: who is wired to whom.

use std::mem;
use std::sync::{Arc, Mutex};

use kiln_arch::acpi::{self, AcpiConfig, VirtioMmio};
use kiln_arch::boot::{self, EntryPoint};
use kiln_arch::cpuid::{self, Topology};
use kiln_arch::{Initrd, Kernel, layout};
use kiln_device_manager::DeviceManager;
use kiln_devices::acpi::{PowerButton, PowerManagement, PvPanic};
use kiln_devices::console::Console;
use kiln_devices::legacy::serial::Serial;
use kiln_devices::legacy::{I8042, IoApic, Rtc};
use kiln_devices::virtio::balloon::BalloonControl;
use kiln_devices::virtio::block::BlockControl;
use kiln_devices::virtio::net::NetControl;
use kiln_io_thread::IoThreadSet;
use kiln_memory::{GuestMemory, MemorySize};
use kiln_virtio_device::{MmioTransport, PciTransport, VirtioDevice, VirtioTransport};

use crate::events::EventSource;
use crate::head_start::Source;
use crate::interrupts::InterruptRoutes;
use crate::io_threads::{DeviceIo, IoPool, QueueGroups};
use crate::kvm::KvmVm;
use crate::machine::{DeviceFailure, Machine};
use crate::metrics::{CountedDevices, MetricsSource, Work};
use crate::vcpu::ComingVcpus;
use crate::{BuildError, Transport, Vm, VmBuilder, VmEvent, names, pci, warm_up};

/// The smallest RAM: what lies below 1 MiB, and a guest of a megabyte.
const MIN_MEMORY: MemorySize = MemorySize::mib(2);
/// RAM that every processor can address that KVM runs on: they have 36 bits of physical address.
const ALWAYS_ADDRESSABLE: MemorySize = MemorySize::mib(32 << 10);
const PAGE_SIZE: u64 = 4096;
/// The most vCPUs. Those with APIC ids above 254 need interrupts with extended destinations, which
/// the IOAPIC and KVM can give and which is not tested yet.
const VCPU_LIMIT: u32 = 254;

/// The most virtio devices: as many as are tested to work together, and so that a vCPU has a vector
/// for each of their MSI-X vectors, of which it has some 200.
const VIRTIO_DEVICE_LIMIT: usize = 40;

/// Interrupts that PC software takes for something else than a virtio device.
const LEGACY_GSIS: [(u32, &str); 4] = [
    (0, "PC timer"),
    (1, "PC keyboard"),
    (2, "PC interrupt controller cascade"),
    (8, "RTC"),
];

pub(crate) fn assemble(mut builder: VmBuilder) -> Result<Vm, BuildError> {
    let name = builder.name.clone();
    name.as_deref().map_or(Ok(()), names::check)?;
    let span = names::machine_span(name.as_deref());
    let _in_span = span.enter();
    // What needs no host is refused first.
    let kernel = builder.kernel.clone().ok_or(BuildError::NoKernel)?;
    let cache = builder.kernel_cache.as_ref();
    let mut kernel = builder.kernel_decompressor.apply(kernel, cache);
    if builder.memory_options.prefault {
        // What is mapped from a file would fault later.
        kernel = kernel.read();
    }
    if let Some(balloon) = &builder.balloon {
        balloon.check(&builder.memory_options)?;
    }
    let initrd = builder.initrd.as_ref().map(Initrd::open).transpose()?;
    let failure = Arc::new(DeviceFailure::default());
    let mut io = IoPool::start(
        name.clone(),
        builder.io_threads,
        builder.io_affinity.clone(),
        builder.io_loop.as_ref(),
        Arc::clone(&failure),
    )?;
    let (mut source, vm_fd) = Source::new(builder.host.as_ref(), builder.head_start.take())?;
    let topology = topology(source.max_vcpus(), builder.vcpus)?;
    check_memory(&mut source, builder.memory)?;

    let regions = layout::ram_regions(builder.memory.as_bytes());
    let memory = Arc::new(kiln_memory::allocate(&regions, &builder.memory_options)?);
    let vm = Arc::new(KvmVm::new(vm_fd, Arc::clone(&memory))?);
    let (cmdline, kick_signal) = (builder.cmdline.clone(), builder.kick_signal);
    let vcpus = ComingVcpus::begin(source, &vm, &topology);
    let mut wiring = Wiring::new(&vm, &mut io, &topology)?;
    let (serial, power_button) = wiring.add_devices(builder)?;
    let entry = load(&memory, &kernel, initrd.as_ref(), &cmdline, &wiring.acpi)?;
    let thread_name = names::thread(name.as_deref(), "vcpu", 3);
    let mut vcpus = vcpus.enter_at(entry, kick_signal, thread_name)?;
    vcpus.after_first_exit = warm_up::after_first_exit(&memory, &kernel);
    let metrics = Arc::new(MetricsSource::new(name, serial.counters(), wiring.counted));
    let (devices, transports, events) = (wiring.devices, wiring.transports, wiring.events);
    let (balloon, disks, nets) = (wiring.balloon, wiring.disks, wiring.nets);
    // The threads were started first and are waited for last: they take their time.
    serial.connect(io.shared())?;
    io.wait_started()?;
    Ok(Vm {
        machine: Machine {
            span: span.clone(),
            metrics,
            buses: Arc::new(devices.build()),
            transports,
            power_button,
            balloon,
            disks,
            nets,
            serial,
            io,
            failure,
            events,
            vfio: None,
            vm,
        },
        vcpus,
    })
}

fn topology(max: u32, asked: u32) -> Result<Topology, BuildError> {
    let limit = max.min(VCPU_LIMIT);
    if asked == 0 || asked > limit {
        return Err(BuildError::VcpuCount { asked, limit });
    }
    Ok(Topology::new(asked)?)
}

fn check_memory(source: &mut Source, asked: MemorySize) -> Result<(), BuildError> {
    // The host need not be waited for where its answer does not matter.
    let plain = MIN_MEMORY..=ALWAYS_ADDRESSABLE;
    if plain.contains(&asked) && asked.as_bytes().is_multiple_of(PAGE_SIZE) {
        return Ok(());
    }
    let cpuid = source.host()?.supported_cpuid();
    let bits = u32::from(cpuid::physical_address_bits(cpuid)).min(52);
    let hole = layout::HIGH_RAM_START - layout::MMIO_HOLE_START;
    let max = MemorySize::bytes((1u64 << bits).saturating_sub(hole));
    let whole_pages = asked.as_bytes().is_multiple_of(PAGE_SIZE);
    if !whole_pages || asked < MIN_MEMORY || asked > max {
        return Err(BuildError::MemorySize {
            asked,
            min: MIN_MEMORY,
            max,
        });
    }
    Ok(())
}

/// Leaves guest memory ready for the first instruction.
fn load(
    memory: &GuestMemory,
    kernel: &Kernel,
    initrd: Option<&Initrd>,
    cmdline: &str,
    acpi: &AcpiConfig,
) -> Result<EntryPoint, BuildError> {
    let tables = acpi::build(acpi, layout::ACPI_TABLES_START)?;
    tables.write(memory)?;
    Ok(boot::prepare(
        memory,
        kernel,
        initrd,
        cmdline,
        Some(tables.rsdp()),
    )?)
}

/// A machine that is being wired: places devices on the buses and describes them to the guest.
struct Wiring<'a> {
    devices: DeviceManager,
    transports: Vec<Arc<dyn VirtioTransport>>,
    /// What will be on the PCI bus.
    functions: pci::Functions,
    acpi: AcpiConfig,
    counted: CountedDevices,
    balloon: Option<BalloonControl>,
    disks: Vec<BlockControl>,
    nets: Vec<NetControl>,
    vm: &'a Arc<KvmVm>,
    routes: Arc<InterruptRoutes>,
    io: &'a mut IoPool,
    events: Arc<EventSource>,
}

impl<'a> Wiring<'a> {
    fn new(
        vm: &'a Arc<KvmVm>,
        io: &'a mut IoPool,
        topology: &Topology,
    ) -> Result<Self, BuildError> {
        Ok(Self {
            devices: DeviceManager::new(
                layout::IOAPIC_PINS,
                layout::VIRTIO_MMIO_START..layout::VIRTIO_MMIO_START + layout::VIRTIO_MMIO_SIZE,
            )?,
            transports: Vec::new(),
            functions: Vec::new(),
            acpi: AcpiConfig {
                apic_ids: topology.apic_ids(),
                serial: Some(acpi::SerialPort::COM1),
                rtc: true,
                pvpanic: true,
                power_button: true,
                ..AcpiConfig::default()
            },
            counted: CountedDevices::default(),
            balloon: None,
            disks: Vec::new(),
            nets: Vec::new(),
            vm,
            routes: InterruptRoutes::new(Arc::clone(vm)),
            io,
            events: Arc::default(),
        })
    }

    /// The devices of the platform, and those that the builder was given.
    fn add_devices(
        &mut self,
        mut builder: VmBuilder,
    ) -> Result<(Arc<Serial>, PowerButton), BuildError> {
        let members = members(&mut builder, &self.events)?;
        for (gsi, name) in LEGACY_GSIS {
            self.devices.reserve_gsi(name, gsi)?;
        }
        let serial = self.add_serial(builder.console)?;
        let power_button = self.add_platform()?;
        for at in builder.pio_devices {
            self.devices
                .add_pio(&at.name, at.base, at.size, at.device)?;
        }
        for at in builder.mmio_devices {
            self.devices
                .add_mmio(&at.name, at.base, at.size, at.device)?;
        }
        let default = builder.transport;
        let is_on_pci = |member: &Member| member.transport == Some(Transport::Pci);
        let has_pci = default == Transport::Pci || members.iter().any(is_on_pci);
        if has_pci {
            for gsi in layout::PCI_INTX_GSIS {
                self.devices.reserve_gsi("PCI interrupt line", gsi)?;
            }
        }
        for member in members {
            self.add_virtio(member, default)?;
        }
        let ioapic = self.add_ioapic(has_pci)?;
        if has_pci {
            let bus = pci::build_bus(mem::take(&mut self.functions), &ioapic)?;
            pci::place_bus(&bus, &mut self.devices)?;
            self.acpi.pci = Some(pci::describe_bus(&bus));
        }
        Ok((serial, power_button))
    }

    fn add_serial(&mut self, console: Console) -> Result<Arc<Serial>, BuildError> {
        self.devices
            .reserve_gsi("serial port", layout::SERIAL_GSI)?;
        let line = self.vm.interrupt_line(layout::SERIAL_GSI)?;
        let port = Arc::new(Serial::new(console, line)?);
        self.devices.add_pio(
            "serial port",
            layout::SERIAL_PORT,
            layout::SERIAL_PORT_COUNT,
            Arc::clone(&port) as _,
        )?;
        Ok(port)
    }

    /// The devices that every machine has.
    fn add_platform(&mut self) -> Result<PowerButton, BuildError> {
        self.devices.add_pio(
            "i8042",
            layout::I8042_PORT,
            layout::I8042_PORT_COUNT,
            Arc::new(Mutex::new(I8042::new())),
        )?;
        self.devices.add_pio(
            "RTC",
            layout::RTC_PORT,
            layout::RTC_PORT_COUNT,
            Arc::new(Mutex::new(Rtc::new())),
        )?;
        self.devices
            .add_pio("pvpanic", layout::PVPANIC_PORT, 1, Arc::new(PvPanic))?;
        self.devices
            .reserve_gsi("generic event device", layout::GED_GSI)?;
        let line = self.vm.interrupt_line(layout::GED_GSI)?;
        let power = PowerManagement::new(line);
        let button = power.button();
        self.devices.add_pio(
            "ACPI power management",
            layout::ACPI_SLEEP_CONTROL_PORT,
            layout::ACPI_PORT_COUNT,
            Arc::new(power),
        )?;
        Ok(button)
    }

    fn add_virtio(&mut self, member: Member, default: Transport) -> Result<(), BuildError> {
        let name = &member.name;
        // The transport keeps it.
        let _in_span = names::device_span(name).entered();
        let groups = member.queue_groups();
        let io = self
            .io
            .threads_for(name, &member.role, &member.io, groups)?;
        let transport = match member.transport.unwrap_or(default) {
            Transport::Pci => self.add_virtio_pci(name, member.device, io)?,
            Transport::Mmio => self.add_virtio_mmio(name, member.device, io)?,
        };
        match &member.work {
            Work::Balloon(control) => self.balloon = Some(control.clone()),
            Work::Block(control) => self.disks.push(control.clone()),
            _ => {}
        }
        self.nets.extend(member.net);
        self.counted.add(name, transport.counters(), member.work);
        let (events, device) = (Arc::clone(&self.events), name.to_owned());
        transport.on_needs_reset(Box::new(move |reason| {
            events.send(&VmEvent::DeviceError {
                device: device.clone(),
                reason: reason.to_owned(),
            });
        }));
        self.transports.push(transport);
        Ok(())
    }

    fn add_virtio_pci(
        &mut self,
        name: &str,
        device: Box<dyn VirtioDevice>,
        io: IoThreadSet,
    ) -> Result<Arc<dyn VirtioTransport>, BuildError> {
        let count = PciTransport::vectors_for(&*device);
        let vectors = self.routes.vectors(name, count)?;
        let memory = Arc::clone(self.vm.memory());
        let (transport, mut description) = PciTransport::new(device, memory, io, name, vectors)?;
        description.set_bar_observer(Arc::new(pci::Notifications::new(
            Arc::clone(self.vm),
            transport.kicks(),
        )));
        self.functions
            .push((description, Arc::clone(&transport) as _));
        Ok(transport)
    }

    fn add_virtio_mmio(
        &mut self,
        name: &str,
        device: Box<dyn VirtioDevice>,
        io: IoThreadSet,
    ) -> Result<Arc<dyn VirtioTransport>, BuildError> {
        let gsi = self.devices.allocate_gsi(name).map_err(|error| {
            if let kiln_device_manager::Error::GsiExhausted { name, total } = error {
                return BuildError::MmioDeviceCount {
                    name,
                    pins: total,
                    limit: self.acpi.virtio_mmio.len(),
                };
            }
            error.into()
        })?;
        let size = layout::VIRTIO_MMIO_DEVICE_SIZE;
        let address = self.devices.allocate_mmio(name, size, size)?;
        let line = self.vm.interrupt_line(gsi)?;
        let transport = Arc::new(MmioTransport::new(
            device,
            Arc::clone(self.vm.memory()),
            io,
            line,
        )?);
        let notify = address + MmioTransport::NOTIFY_OFFSET;
        for (queue, kick) in (0..).zip(transport.kicks()) {
            self.vm.notify_on_write(&kick, notify, queue)?;
        }
        self.devices
            .add_mmio(name, address, size, Arc::clone(&transport) as _)?;
        self.acpi
            .virtio_mmio
            .push(VirtioMmio { address, size, gsi });
        Ok(transport)
    }

    /// Comes when all others are there: it needs to know which pins are in use.
    fn add_ioapic(&mut self, has_pci: bool) -> Result<Arc<IoApic>, BuildError> {
        let mut pins = vec![layout::SERIAL_GSI, layout::GED_GSI];
        pins.extend(self.acpi.virtio_mmio.iter().map(|device| device.gsi));
        if has_pci {
            pins.extend(layout::PCI_INTX_GSIS);
        }
        let ioapic = Arc::new(IoApic::new(&pins, Arc::clone(&self.routes) as _));
        let sink = Arc::clone(&ioapic);
        self.devices
            .on_end_of_interrupt(move |vector| sink.end_of_interrupt(vector));
        self.devices.add_mmio(
            "IOAPIC",
            layout::IOAPIC_START,
            layout::IOAPIC_SIZE,
            Arc::clone(&ioapic) as _,
        )?;
        Ok(ioapic)
    }
}

/// A virtio device that is to be wired.
struct Member {
    name: String,
    device: Box<dyn VirtioDevice>,
    /// Where it is not the machine's.
    transport: Option<Transport>,
    /// What the names of its threads have for it.
    role: String,
    io: DeviceIo,
    work: Work,
    /// The host's side of a network interface.
    net: Option<NetControl>,
}

impl Member {
    /// A device that says nothing of its threads.
    fn new(
        name: impl Into<String>,
        device: impl VirtioDevice + 'static,
        transport: Option<Transport>,
        work: Work,
    ) -> Self {
        let name = name.into();
        Self {
            role: name.replace(' ', ""),
            name,
            device: Box::new(device),
            transport,
            io: DeviceIo::default(),
            work,
            net: None,
        }
    }

    /// The parts of it that can each have a thread.
    fn queue_groups(&self) -> QueueGroups {
        let all = self.device.queue_max_sizes().len();
        // A network interface may have a control queue behind its pairs.
        let queues = match self.work {
            Work::Block(_) => 1,
            Work::Net(_) => 2,
            _ => return QueueGroups::ONE,
        };
        QueueGroups {
            count: all / queues,
            queues,
        }
    }
}

/// All virtio devices, in the order in which the guest finds them.
fn members(builder: &mut VmBuilder, events: &Arc<EventSource>) -> Result<Vec<Member>, BuildError> {
    let mut members = Vec::new();
    for (index, disk) in mem::take(&mut builder.disks).into_iter().enumerate() {
        let (transport, io) = (disk.transport, disk.io.clone());
        let device = disk.into_device(builder.vcpus)?;
        let work = Work::Block(device.control());
        let member = Member::new(format!("disk {index}"), device, transport, work);
        members.push(Member { io, ..member });
    }
    for (index, net) in mem::take(&mut builder.nets).into_iter().enumerate() {
        let (transport, io) = (net.transport, net.io.clone());
        let name = format!("net {index}");
        let device = net.into_device(&name, events)?;
        let control = Some(device.control());
        let work = Work::Net(device.counters());
        let member = Member::new(name, device, transport, work);
        members.push(Member {
            io,
            net: control,
            ..member
        });
    }
    if let Some(vsock) = builder.vsock.take() {
        let transport = vsock.transport;
        let device = vsock.into_device()?;
        let work = Work::Vsock(device.counters());
        members.push(Member::new("vsock", device, transport, work));
    }
    if let Some(console) = builder.virtio_console.take() {
        let transport = console.transport;
        let device = console.into_device()?;
        members.push(Member::new("console", device, transport, Work::Other));
    }
    if let Some(rng) = builder.rng.take() {
        let transport = rng.transport;
        members.push(Member::new(
            "rng",
            rng.into_device()?,
            transport,
            Work::Other,
        ));
    }
    if let Some(balloon) = builder.balloon.take() {
        let transport = balloon.transport;
        let device = balloon.into_device(builder.memory)?;
        let work = Work::Balloon(device.control());
        members.push(Member::new("balloon", device, transport, work));
    }
    let own = mem::take(&mut builder.virtio_devices);
    for (index, (name, device, transport)) in own.into_iter().enumerate() {
        members.push(Member {
            name,
            device,
            transport,
            // Its name can be anything.
            role: format!("dev{index}"),
            io: DeviceIo::default(),
            work: Work::Other,
            net: None,
        });
    }
    match members.get(VIRTIO_DEVICE_LIMIT) {
        None => Ok(members),
        Some(member) => Err(BuildError::DeviceCount {
            name: member.name.clone(),
            limit: VIRTIO_DEVICE_LIMIT,
        }),
    }
}
