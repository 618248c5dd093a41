//! What the parts cost that are nothing but computation: buses, queues, tables, loading a kernel.
//!
//! ```text
//! cargo bench -p kiln-bench --bench pure
//! ```
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use kiln_arch::acpi::{self, AcpiConfig};
use kiln_arch::{Kernel, boot, layout};
use kiln_device_api::{BusDevice, ExitRequest, VcpuBus};
use kiln_device_manager::{Buses, DeviceManager};
use kiln_io_thread::Registrar;
use kiln_memory::{GuestMemory, MemoryOptions, allocate};
use kiln_virtio_device::testing::{Buffer, MockDriver};
use kiln_virtio_device::{QueueError, QueueHandler, SimpleDevice, Turn};

/// How many devices a bus has: as many as a large machine.
const DEVICES: u64 = 40;
const MMIO: u64 = 0xd000_0000;

/// A device that says what it is.
struct Id(u8);

impl BusDevice for Id {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.0);
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> ControlFlow<ExitRequest> {
        ControlFlow::Continue(())
    }
}

fn buses() -> Buses {
    let mut manager = DeviceManager::new(24, MMIO..MMIO + 0x100_0000).unwrap();
    for number in 0..DEVICES {
        let name = format!("device {number}");
        let device = Arc::new(Id(number as u8));
        let address = MMIO + number * 0x1000;
        manager.add_mmio(&name, address, 0x1000, device).unwrap();
    }
    manager.build()
}

/// An access to a bus: of the device that was asked last, of another each time, of none.
fn bus(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("bus");
    let mut data = [0; 4];
    for (name, step, base) in [
        ("the same device", 0, MMIO),
        ("another device each time", 7, MMIO),
        ("no device", 0, MMIO + DEVICES * 0x1000),
    ] {
        let buses = buses();
        let mut number = 0;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                number = (number + step) % DEVICES;
                buses.mmio_read(black_box(base + number * 0x1000), &mut data);
                data
            });
        });
    }
    group.finish();
}

/// Fills what it is given.
struct Fill;

impl QueueHandler for Fill {
    fn process(
        &mut self,
        turn: &mut Turn<'_>,
        _: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        while let Some(mut chain) = turn.pop()? {
            chain.writable.write(&[7; 64])?;
            turn.complete(chain, 64)?;
        }
        Ok(())
    }
}

/// Chains through a queue, with one notification: the way to the I/O thread and back is among it.
fn queue(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("queue");
    for batch in [1u16, 128] {
        let device = SimpleDevice::new(4, [256], Fill);
        let mut driver = MockDriver::new(Box::new(device));
        driver.start(0, 256);
        group.throughput(Throughput::Elements(u64::from(batch)));
        group.bench_function(format!("{batch} chains"), |bencher| {
            bencher.iter(|| {
                let memory = driver.memory.clone();
                for _ in 0..batch {
                    driver.queues[0].add(&memory, &[Buffer::writable(0x1000, 64)]);
                }
                driver.notify(0);
                for _ in 0..batch {
                    driver.queues[0].wait_used(&memory);
                }
            });
        });
    }
    group.finish();
}

fn memory() -> GuestMemory {
    allocate(&layout::ram_regions(128 << 20), &MemoryOptions::default()).unwrap()
}

/// Everything that a guest finds in memory when it starts.
fn start_state(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("start state");
    for vcpus in [1, 64] {
        let config = AcpiConfig {
            apic_ids: (0..vcpus).collect(),
            ..AcpiConfig::default()
        };
        group.bench_function(format!("ACPI tables, {vcpus} vCPUs"), |bencher| {
            bencher.iter(|| acpi::build(black_box(&config), layout::ACPI_TABLES_START).unwrap());
        });
    }
    let code = Kernel::from_code(&[0xf4, 0xeb, 0xfd]).unwrap();
    group.bench_function("page tables, boot parameters, registers", |bencher| {
        bencher.iter_batched_ref(
            memory,
            |memory| boot::prepare(memory, &code, None, "console=ttyS0", None).unwrap(),
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

/// A kernel of 32 MiB, mapped and read.
fn kernel(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("kernel of 32 MiB");
    group.sample_size(20);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&elf(32 << 20)).unwrap();
    for (name, kernel) in [
        ("mapped", Kernel::open(file.path()).unwrap()),
        ("read", Kernel::open(file.path()).unwrap().read()),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter_batched_ref(
                memory,
                |memory| boot::prepare(memory, &kernel, None, "", None).unwrap(),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

/// An ELF image with one segment of `size` bytes, entered at its start.
fn elf(size: usize) -> Vec<u8> {
    const PAGE: usize = 0x1000;
    let address = layout::KERNEL_MIN_START;
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend(2u16.to_le_bytes()); // ET_EXEC
    image.extend(62u16.to_le_bytes()); // EM_X86_64
    image.extend(1u32.to_le_bytes()); // EV_CURRENT
    image.extend(address.to_le_bytes());
    image.extend(64u64.to_le_bytes()); // program headers
    image.extend([0; 12]); // section headers, flags
    for half in [64u16, 56, 1, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    image.extend(1u32.to_le_bytes()); // PT_LOAD
    image.extend(5u32.to_le_bytes()); // readable and executable
    let (offset, size) = (PAGE as u64, size as u64);
    for field in [offset, address, address, size, size, offset] {
        image.extend(field.to_le_bytes());
    }
    image.resize(PAGE, 0);
    image.extend((0..size).map(|at| at.wrapping_mul(0x9e37_79b1).to_be_bytes()[7]));
    image
}

criterion_group!(benches, bus, queue, start_state, kernel);
criterion_main!(benches);
