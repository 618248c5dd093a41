//! A driver that does what the bytes say to the queues and registers of a device.
//!
//! The first byte says over which transport and with how large queues, the next which features; then
//! come steps, each a byte and what it takes. Addresses and lengths are mostly such as matter: edges
//! of RAM, the rings themselves, a place for data.

use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use kiln_device_api::BusDevice;
use kiln_memory::{GuestMemory, MemoryOptions, allocate, discard};
use kiln_virtio_device::VirtioDevice;
use kiln_virtio_device::testing::{
    Buffer, MockDriver, RawDescriptor, TransportKind, register, status,
};
use vm_memory::{Bytes, GuestAddress};

/// Where a driver's own data lies, and where indirect tables do.
pub(crate) const DATA: u64 = 0x1_0000;
const TABLES: u64 = 0x8_0000;
const ENTRIES: u64 = 16;
/// RAM is small, so that there is not much to be read and written: it ends a little behind the
/// queues, and goes on behind the hole that every driver of ours has.
const LOW_END: u64 = MockDriver::QUEUES + 0x2_0000;
const HIGH_END: u64 = MockDriver::HIGH + 0x1_0000;

/// At, across and beyond every edge of RAM.
const EDGES: [u64; 16] = [
    0,
    1,
    0xfff,
    LOW_END - 0x1000,
    LOW_END - 16,
    LOW_END - 1,
    LOW_END,
    MockDriver::HIGH - 1,
    MockDriver::HIGH,
    HIGH_END - 16,
    HIGH_END - 1,
    HIGH_END,
    1 << 32,
    i64::MAX as u64,
    u64::MAX - 15,
    u64::MAX,
];
const LENGTHS: [u32; 14] = [
    0,
    1,
    2,
    4,
    8,
    12,
    16,
    17,
    44,
    512,
    4096,
    0x1_0000,
    0x7fff_ffff,
    u32::MAX,
];

/// The most steps; inputs are short, and so many are more than most of them have.
const STEPS: usize = 200;
/// The turns that a device gets after a step, and to do what an ordinary request needs.
const FEW_TURNS: usize = 4;
const MANY_TURNS: usize = 64;

/// A device and what is at the host's end of it.
pub(crate) trait Subject {
    /// A device as a machine just powered on has it, with the same host behind it.
    fn device(&mut self) -> Box<dyn VirtioDevice>;

    /// The host does something.
    fn host(&mut self, u: &mut Unstructured<'_>) -> Result<()>;

    /// The device was reset and serves an ordinary driver.
    fn check(&mut self, driver: &mut MockDriver);
}

thread_local! {
    static MEMORY: Arc<GuestMemory> = Arc::new(
        allocate(
            &[
                (GuestAddress(0), LOW_END as usize),
                (GuestAddress(MockDriver::HIGH), (HIGH_END - MockDriver::HIGH) as usize),
            ],
            &MemoryOptions::default(),
        )
        .unwrap(),
    );
}

/// The RAM that all inputs share, as zeroed as new.
fn memory() -> Arc<GuestMemory> {
    let memory = MEMORY.with(Arc::clone);
    for (start, end) in [(0, LOW_END), (MockDriver::HIGH, HIGH_END)] {
        discard(&memory, GuestAddress(start), end - start).unwrap();
    }
    memory
}

/// Does to the device what the bytes say, and looks whether it works afterwards.
pub(crate) fn attack(data: &[u8], mut subject: impl Subject) {
    let mut u = Unstructured::new(data);
    let Ok((kind, size)) = setup(&mut u) else {
        return;
    };
    let mut driver = MockDriver::local(kind, subject.device(), memory());
    start(&mut driver, &mut u, size);
    for _ in 0..STEPS {
        if u.is_empty() || step(&mut driver, &mut subject, &mut u).is_err() {
            break;
        }
    }
    driver.settle(FEW_TURNS);
    recover(&mut driver);
    // It is quiet where nobody asks for anything.
    assert!(driver.settle(MANY_TURNS) < MANY_TURNS, "the device spins");
    subject.check(&mut driver);
}

fn setup(u: &mut Unstructured<'_>) -> Result<(TransportKind, u16)> {
    let byte: u8 = u.arbitrary()?;
    let kind = if byte & 0x80 == 0 {
        TransportKind::Mmio
    } else {
        TransportKind::Pci
    };
    Ok((kind, 1 << (byte & 7).min(5)))
}

/// Starts the device with some of the features that it offers.
fn start(driver: &mut MockDriver, u: &mut Unstructured<'_>, size: u16) {
    let offered = driver.offered();
    let mask: u64 = match u.arbitrary().unwrap_or(0_u8) {
        0 => u64::MAX,
        1 => 0,
        _ => u.arbitrary().unwrap_or(0),
    };
    bring_back(driver);
    let features = offered & mask;
    if driver.negotiate(features) {
        driver.start(features, size);
    }
}

/// What a kernel does before it uses a device that it finds in any state.
pub(crate) fn bring_back(driver: &MockDriver) {
    if driver.kind() == TransportKind::Pci {
        let pci = driver.transport.pci();
        pci.set_config(0x0c, &[0; 4]);
        pci.move_bar(0xe000_0000);
        pci.enable_memory();
        pci.enable_msix(3);
    }
}

/// Resets the device and starts it as an ordinary driver does.
pub(crate) fn recover(driver: &mut MockDriver) {
    driver.transport.resume();
    bring_back(driver);
    let memory = Arc::clone(&driver.memory);
    for (start, end) in [(0, LOW_END), (MockDriver::HIGH, HIGH_END)] {
        discard(&memory, GuestAddress(start), end - start).unwrap();
    }
    driver.start(0, 16);
}

fn step(
    driver: &mut MockDriver,
    subject: &mut impl Subject,
    u: &mut Unstructured<'_>,
) -> Result<()> {
    match u.arbitrary::<u8>()? % 20 {
        0 => descriptor(driver, u)?,
        1 => table_entry(driver, u)?,
        2 => {
            if let Some(queue) = queue(driver, u)? {
                let head = u16::from(u.arbitrary::<u8>()?);
                driver.queues[queue].make_available(&driver.memory, head);
                driver.notify(queue as u32);
            }
        }
        3..=6 => chain(driver, u)?,
        7 => {
            if let Some(queue) = queue(driver, u)? {
                let index = driver.queues[queue].avail_index();
                let index = index.wrapping_add(u.arbitrary()?);
                driver.queues[queue].set_avail_index(&driver.memory, index);
                driver.notify(queue as u32);
            }
        }
        8 => driver.notify(number(u)?),
        9 => {
            driver.settle(FEW_TURNS);
        }
        10 => {
            let offset = register::CONFIG + u64::from(u.arbitrary::<u16>()? % 0x200);
            access(&driver.transport, offset, u)?;
        }
        11 => {
            let offset = u64::from(u.arbitrary::<u8>()?);
            access(&driver.transport, offset, u)?;
        }
        12 => {
            driver.transport.pause();
            driver.transport.state().unwrap();
            if u.arbitrary()? {
                driver.transport.resume();
            }
        }
        13 => move_to_another(driver, subject),
        14 => {
            let size = 1 << (u.arbitrary::<u8>()? % 6);
            start(driver, u, size);
        }
        15 => ring_reset(driver, u)?,
        16 => memory_write(driver, u)?,
        17 => rings(driver, u)?,
        18 if driver.kind() == TransportKind::Pci => pci_access(driver, u)?,
        _ => subject.host(u)?,
    }
    Ok(())
}

/// One of the queues that were set up.
fn queue(driver: &MockDriver, u: &mut Unstructured<'_>) -> Result<Option<usize>> {
    let byte = usize::from(u.arbitrary::<u8>()?);
    Ok(byte.checked_rem(driver.queues.len()))
}

/// A number that is mostly small.
fn number(u: &mut Unstructured<'_>) -> Result<u32> {
    match u.arbitrary::<u8>()? {
        0xff => u.arbitrary(),
        byte => Ok(byte.into()),
    }
}

fn address(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.arbitrary::<u8>()? {
        byte @ 0..16 => EDGES[usize::from(byte)],
        byte @ 16..32 => MockDriver::QUEUES + u64::from(byte - 16) * 0x200,
        32 => u.arbitrary()?,
        33 => u64::from(u.arbitrary::<u32>()?) % LOW_END,
        byte @ 34..64 => TABLES + u64::from(byte - 34) * 0x100,
        byte => DATA + u64::from(byte - 64) * 0x100,
    })
}

fn length(u: &mut Unstructured<'_>) -> Result<u32> {
    Ok(match u.arbitrary::<u8>()? {
        byte if usize::from(byte) < LENGTHS.len() => LENGTHS[usize::from(byte)],
        0xff => u.arbitrary()?,
        byte => u32::from(byte),
    })
}

fn raw_descriptor(u: &mut Unstructured<'_>) -> Result<RawDescriptor> {
    Ok(RawDescriptor {
        address: address(u)?,
        len: length(u)?,
        flags: u16::from(u.arbitrary::<u8>()?),
        next: u16::from(u.arbitrary::<u8>()?),
    })
}

/// Writes a descriptor of a queue.
fn descriptor(driver: &mut MockDriver, u: &mut Unstructured<'_>) -> Result<()> {
    if let Some(queue) = queue(driver, u)? {
        let index = u16::from(u.arbitrary::<u8>()?) % driver.queues[queue].size;
        let descriptor = raw_descriptor(u)?;
        driver.queues[queue].write_descriptor(&driver.memory, index, descriptor);
    }
    Ok(())
}

/// Writes a descriptor of a table that indirect descriptors may point to.
fn table_entry(driver: &mut MockDriver, u: &mut Unstructured<'_>) -> Result<()> {
    let table = u64::from(u.arbitrary::<u8>()? % 30);
    let entry = u64::from(u.arbitrary::<u8>()?) % ENTRIES;
    let descriptor = raw_descriptor(u)?;
    let mut bytes = descriptor.address.to_le_bytes().to_vec();
    bytes.extend(descriptor.len.to_le_bytes());
    bytes.extend(descriptor.flags.to_le_bytes());
    bytes.extend(descriptor.next.to_le_bytes());
    driver.fill(TABLES + table * 0x100 + entry * 16, &bytes);
    Ok(())
}

/// A chain that is well-formed but for its buffers, if so: readable ones with what the bytes say,
/// cut where the bytes say, and writable ones behind them.
fn chain(driver: &mut MockDriver, u: &mut Unstructured<'_>) -> Result<()> {
    let Some(queue) = queue(driver, u)? else {
        return Ok(());
    };
    let shape: u8 = u.arbitrary()?;
    let len = usize::from(u.arbitrary::<u8>()?).min(u.len());
    let content = u.bytes(len)?;
    let at = DATA + 0x4000 * u64::from(shape & 3);
    driver.fill(at, content);
    let mut buffers = Vec::new();
    let (mut done, cuts) = (0, usize::from(shape >> 2 & 3));
    for cut in 0..=cuts {
        let left = len - done;
        let part = if cut == cuts {
            left
        } else {
            usize::from(u.arbitrary::<u8>()?).min(left)
        };
        if part > 0 {
            buffers.push(Buffer::readable(at + done as u64, part as u32));
        }
        done += part;
    }
    for _ in 0..shape >> 4 & 3 {
        buffers.push(Buffer::writable(address(u)?, length(u)?));
    }
    if buffers.is_empty() {
        return Ok(());
    }
    let target = &mut driver.queues[queue];
    // A queue of one descriptor has chains, too: of whatever is in its table.
    buffers.truncate(usize::from(target.size));
    let head = if shape & 0x40 == 0 {
        target.chain(&driver.memory, &buffers)
    } else {
        target.indirect(&driver.memory, TABLES, &buffers)
    };
    target.make_available(&driver.memory, head);
    if shape & 0x80 == 0 {
        driver.notify(queue as u32);
        driver.settle(FEW_TURNS);
    }
    Ok(())
}

/// An access of any width, which reads and, if so, writes.
fn access(device: &dyn BusDevice, offset: u64, u: &mut Unstructured<'_>) -> Result<()> {
    let width = [1, 2, 4, 8, 4, 4, 3, 16][usize::from(u.arbitrary::<u8>()? % 8)];
    if u.arbitrary()? {
        let value = u64::from(number(u)?).to_le_bytes();
        let mut data = [0; 16];
        data[..8].copy_from_slice(&value);
        assert!(device.write(offset, &data[..width]).is_continue());
    }
    device.read(offset, &mut [0xff; 16][..width]);
    Ok(())
}

/// Stores the state, and goes on with another device and transport in it.
fn move_to_another(driver: &mut MockDriver, subject: &mut impl Subject) {
    driver.transport.pause();
    let state = driver.transport.state().unwrap();
    // A guest cannot bring a device into a state that another one does not take: but for one that
    // needs a reset, which is not looked into.
    let device = subject.device();
    driver.restore(device, &state).unwrap();
    assert_eq!(driver.transport.state().unwrap(), state);
    driver.transport.resume();
}

/// Resets a queue, and may enable it again, anywhere.
fn ring_reset(driver: &mut MockDriver, u: &mut Unstructured<'_>) -> Result<()> {
    let Some(queue) = queue(driver, u)? else {
        return Ok(());
    };
    driver.write(register::QUEUE_SEL, queue as u32);
    driver.write(register::QUEUE_RESET, 1);
    if u.arbitrary()? {
        let base = address(u)?;
        driver.write(register::QUEUE_SIZE, number(u)?);
        driver.write_address(register::QUEUE_DESC_LOW, base);
        driver.write_address(register::QUEUE_DRIVER_LOW, address(u)?);
        driver.write_address(register::QUEUE_DEVICE_LOW, address(u)?);
        driver.write(register::QUEUE_READY, 1);
    } else if u.arbitrary()? {
        let again = kiln_virtio_device::testing::DriverQueue::new(
            &driver.memory,
            driver.queues[queue].desc_table,
            driver.queues[queue].size,
        );
        driver.enable_queue(queue as u32, &again);
        driver.queues[queue] = again;
    }
    Ok(())
}

/// Writes RAM, the rings included.
fn memory_write(driver: &MockDriver, u: &mut Unstructured<'_>) -> Result<()> {
    let at = address(u)?;
    let len = usize::from(u.arbitrary::<u8>()? % 32).min(u.len());
    // Where there is RAM.
    let _ = driver.memory.write_slice(u.bytes(len)?, GuestAddress(at));
    Ok(())
}

/// Writes what the driver asks for in the rings.
fn rings(driver: &MockDriver, u: &mut Unstructured<'_>) -> Result<()> {
    if let Some(queue) = queue(driver, u)? {
        let queue = &driver.queues[queue];
        queue.set_flags(&driver.memory, u.arbitrary()?);
        queue.set_used_event(&driver.memory, u.arbitrary()?);
    }
    Ok(())
}

/// An access to BAR 0, or to configuration space.
pub(crate) fn pci_access(driver: &MockDriver, u: &mut Unstructured<'_>) -> Result<()> {
    let pci = driver.transport.pci();
    let width = [1, 2, 4, 8][usize::from(u.arbitrary::<u8>()? % 4)];
    let value = match u.arbitrary::<u8>()? {
        0xff => u.arbitrary()?,
        0xfe => u64::MAX,
        byte => u64::from(byte),
    };
    let data = &value.to_le_bytes()[..width];
    let near = u64::from(u.arbitrary::<u8>()?);
    let offset = match u.arbitrary::<u8>()? % 10 {
        0 => pci.common() + near % 0x40,
        1 => pci.notify(0) + near,
        2 => pci.isr() + near % 4,
        3 => pci.device() + near,
        4 => 0x8000 + near,
        5 => u64::from(u.arbitrary::<u32>()? % 0x4_0000),
        place => {
            let offset = match place {
                6 => pci.pci_capability() + (near % 20) as u16,
                7 => pci.msix_capability() + (near % 12) as u16,
                8 => (near % 0x40) as u16,
                _ => u.arbitrary::<u16>()? % 0x1000,
            };
            pci.set_config(offset, data);
            pci.config::<8>(offset);
            return Ok(());
        }
    };
    pci.write(offset, data);
    pci.read(offset, &mut [0xff; 8][..width]);
    Ok(())
}

/// Whether the device is at work, and does not ask for a reset.
pub(crate) fn is_well(driver: &MockDriver) -> bool {
    driver.status() & (status::NEEDS_RESET | status::DRIVER_OK) == status::DRIVER_OK
}
