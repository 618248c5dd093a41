//! The registers of the transports, before a device that copies what it reads.
//!
//! Steps are accesses and little else: an input byte for where, one for how wide, and a value.

use arbitrary::{Result, Unstructured};
use kiln_device_api::BusDevice;
use kiln_io_thread::Registrar;
use kiln_memory::{MemoryOptions, allocate};
use kiln_virtio_device::testing::{Buffer, MockDriver, TransportKind, register};
use kiln_virtio_device::{QueueError, QueueHandler, SimpleDevice, Turn, VirtioDevice};
use std::sync::Arc;
use vm_memory::GuestAddress;

use crate::guest::{DATA, bring_back, is_well, pci_access};

/// The type of a console: most of its queues come in pairs.
const TYPE: u32 = 3;
const STEPS: usize = 300;

/// Accesses the registers of the MMIO transport as the bytes say.
pub fn mmio(data: &[u8]) {
    run(TransportKind::Mmio, data, mmio_access);
}

/// Accesses all that a virtio function has on a PCI bus as the bytes say.
pub fn virtio_pci(data: &[u8]) {
    run(TransportKind::Pci, data, pci_access);
}

/// Copies what it reads to where it may write.
struct Echo;

impl QueueHandler for Echo {
    fn process(
        &mut self,
        turn: &mut Turn<'_>,
        _: &mut Registrar<'_, '_>,
    ) -> std::result::Result<(), QueueError> {
        while let Some(mut chain) = turn.pop()? {
            let len = chain.readable.len().min(chain.writable.len()).min(64);
            let mut data = vec![0; len];
            chain.readable.read(&mut data)?;
            chain.writable.write(&data)?;
            turn.complete(chain, len as u32)?;
        }
        Ok(())
    }
}

fn device() -> Box<dyn VirtioDevice> {
    let device = SimpleDevice::new(TYPE, [8, 4, 16], Echo);
    Box::new(device.features(0x7).config([1, 2, 3, 4, 5, 6, 7]))
}

fn run(
    kind: TransportKind,
    data: &[u8],
    access: impl Fn(&MockDriver, &mut Unstructured<'_>) -> Result<()>,
) {
    let memory = allocate(&[(GuestAddress(0), 0x12_0000)], &MemoryOptions::default()).unwrap();
    let mut driver = MockDriver::local(kind, device(), Arc::new(memory));
    let mut u = Unstructured::new(data);
    for _ in 0..STEPS {
        if u.is_empty() || step(&mut driver, &mut u, &access).is_err() {
            break;
        }
    }
    driver.transport.resume();
    bring_back(&driver);
    driver.start(0, 8);
    assert!(driver.settle(16) < 16, "the device spins");
    driver.fill(DATA, b"echo");
    let buffers = [Buffer::readable(DATA, 4), Buffer::writable(DATA + 8, 4)];
    assert_eq!(driver.request(1, &buffers), 4);
    assert_eq!(driver.bytes(DATA + 8, 4), b"echo");
    assert!(is_well(&driver));
}

fn step(
    driver: &mut MockDriver,
    u: &mut Unstructured<'_>,
    access: impl Fn(&MockDriver, &mut Unstructured<'_>) -> Result<()>,
) -> Result<()> {
    match u.arbitrary::<u8>()? {
        0xff => driver.transport.pause(),
        0xfe => driver.transport.resume(),
        0xfd => driver.transport.reset(),
        0xfc => {
            driver.transport.pause();
            let state = driver.transport.state().unwrap();
            driver.restore(device(), &state).unwrap();
            assert_eq!(driver.transport.state().unwrap(), state);
        }
        0xfb => {
            bring_back(driver);
            if driver.negotiate(driver.offered() & u64::from(u.arbitrary::<u8>()?)) {
                driver.start(0, 8);
            }
        }
        0xfa => {
            driver.settle(4);
        }
        0xf9 if driver.kind() == TransportKind::Pci => driver.transport.pci().bus.reset(),
        _ => access(driver, u)?,
    }
    Ok(())
}

/// An access to a register, to what is near it, or to the device's configuration.
fn mmio_access(driver: &MockDriver, u: &mut Unstructured<'_>) -> Result<()> {
    let place: u8 = u.arbitrary()?;
    let offset = match u.arbitrary::<u8>()? {
        0..200 => u64::from(place) & !3,
        200..220 => u64::from(place),
        220..250 => register::CONFIG + u64::from(place),
        _ => u64::from(u.arbitrary::<u16>()?),
    };
    let width = match u.arbitrary::<u8>()? {
        0..200 => 4,
        other => [1, 2, 3, 8, 16, 0][usize::from(other % 6)],
    };
    let value = match u.arbitrary::<u8>()? {
        0xff => u.arbitrary()?,
        0xfe => u32::MAX,
        // In RAM, for the addresses of queues.
        high @ 0xf0.. => u32::from(high - 0xef) << 16,
        low => u32::from(low),
    };
    let mut data = [0; 16];
    data[..4].copy_from_slice(&value.to_le_bytes());
    assert!(driver.transport.write(offset, &data[..width]).is_continue());
    driver.transport.read(offset, &mut [0xff; 16][..width]);
    Ok(())
}
