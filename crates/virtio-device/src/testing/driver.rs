//! A driver over one of the transports.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use kiln_device_api::BusDevice;
use kiln_io_thread::{IoHandle, IoLoop, IoThread};
use kiln_memory::{GuestMemory, MemoryOptions, allocate};
use vm_memory::{Bytes, GuestAddress};

use super::queue::DriverQueue;
use super::recorder::{InterruptRecorder, wait_until};
use super::transport::{TestState, TestTransport, TransportKind};
use crate::{TransportError, VirtioDevice};

/// Offsets of the MMIO registers (virtio 1.3, section 4.2.2), by which a [`MockDriver`] names the
/// registers of every transport.
#[allow(missing_docs)]
pub mod register {
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const QUEUE_RESET: u64 = 0x0c0;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Bits of the device status field (virtio 1.3, section 2.1).
#[allow(missing_docs)]
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// What a [`MockDriver`]'s device works on.
#[derive(Debug)]
pub enum TestIo {
    /// A thread, as in a machine.
    Thread(IoThread),
    /// The test's own thread, whenever the test [lets it](MockDriver::settle).
    Local(Rc<IoLoop>),
}

impl TestIo {
    fn handle(&self) -> &IoHandle {
        match self {
            Self::Thread(thread) => thread.handle(),
            Self::Local(local) => local.handle(),
        }
    }

    /// Another thread, or the same loop.
    fn another(&self) -> Self {
        match self {
            Self::Thread(_) => Self::Thread(spawn_io()),
            Self::Local(local) => Self::Local(Rc::clone(local)),
        }
    }
}

/// A device behind a transport, what it works on, RAM with a hole in it, and the driver's side
/// of the queues.
#[derive(Debug)]
pub struct MockDriver {
    /// The transport.
    pub transport: TestTransport,
    /// RAM from 0 and from [`Self::HIGH`] on.
    pub memory: Arc<GuestMemory>,
    /// The interrupts that the transport raised.
    pub line: Arc<InterruptRecorder>,
    /// What the device works on.
    pub io: TestIo,
    /// The queues, once [`start`](Self::start) has set them up.
    pub queues: Vec<DriverQueue>,
}

impl MockDriver {
    /// Where the lower RAM ends and the hole begins.
    pub const HOLE: u64 = 16 << 20;
    /// Where RAM goes on behind the hole.
    pub const HIGH: u64 = 32 << 20;
    /// Where RAM ends.
    pub const END: u64 = 34 << 20;
    /// Where the queues lie; a test's own data belongs elsewhere.
    pub const QUEUES: u64 = 1 << 20;
    /// `VIRTIO_F_VERSION_1`, without which no device works.
    pub const VERSION_1: u64 = 1 << 32;
    /// `VIRTIO_F_EVENT_IDX`.
    pub const EVENT_IDX: u64 = 1 << 29;

    /// `VIRTIO_F_RING_RESET`.
    pub const RING_RESET: u64 = 1 << 40;
    /// More turns than any request of a test takes.
    const REQUEST_TURNS: usize = 1000;

    /// Puts a device behind an MMIO transport, as a machine just powered on has it.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::over(TransportKind::Mmio, device)
    }

    /// Puts a device behind a transport, as a machine just powered on has it.
    pub fn over(kind: TransportKind, device: Box<dyn VirtioDevice>) -> Self {
        let ranges = [
            (GuestAddress(0), Self::HOLE as usize),
            (GuestAddress(Self::HIGH), (Self::END - Self::HIGH) as usize),
        ];
        let memory = allocate(&ranges, &MemoryOptions::default()).unwrap();
        Self::over_memory(kind, device, Arc::new(memory))
    }

    /// The same with RAM of the test's own. It has to have [`Self::QUEUES`] and what is behind it,
    /// if [`start`](Self::start) is to be used.
    pub fn over_memory(
        kind: TransportKind,
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
    ) -> Self {
        Self::with(kind, device, memory, TestIo::Thread(spawn_io()))
    }

    /// Puts a device behind a transport, with RAM of the test's own and without a thread: the
    /// device works when the test lets it [settle](Self::settle), and each run is like the other.
    /// A thread can have one such driver at a time.
    pub fn local(
        kind: TransportKind,
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
    ) -> Self {
        let local = IoLoop::new(|panic| panic!("{panic}")).unwrap();
        Self::with(kind, device, memory, TestIo::Local(Rc::new(local)))
    }

    fn with(
        kind: TransportKind,
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        io: TestIo,
    ) -> Self {
        let line = Arc::new(InterruptRecorder::default());
        let handle = io.handle().clone();
        let transport =
            TestTransport::new(kind, device, Arc::clone(&memory), handle, &line).unwrap();
        Self {
            transport,
            memory,
            line,
            io,
            queues: Vec::new(),
        }
    }

    /// Replaces transport, interrupts and I/O thread by others, with a device in this state.
    ///
    /// # Errors
    ///
    /// [`TransportError`] where the state does not fit; nothing has changed then.
    pub fn restore(
        &mut self,
        device: Box<dyn VirtioDevice>,
        state: &TestState,
    ) -> Result<(), TransportError> {
        let io = self.io.another();
        let line = Arc::new(InterruptRecorder::default());
        let (memory, handle) = (Arc::clone(&self.memory), io.handle().clone());
        self.transport = TestTransport::restore(device, memory, handle, &line, state)?;
        self.io = io;
        self.line = line;
        Ok(())
    }

    /// The transport that the device is behind.
    pub fn kind(&self) -> TransportKind {
        self.transport.kind()
    }

    /// Reads a 32-bit register.
    pub fn read(&self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a 32-bit register.
    pub fn write(&self, offset: u64, value: u32) {
        assert!(
            self.transport
                .write(offset, &value.to_le_bytes())
                .is_continue()
        );
    }

    /// Writes the two halves of a 64-bit register.
    pub fn write_address(&self, low: u64, value: u64) {
        self.write(low, value as u32);
        self.write(low + 4, (value >> 32) as u32);
    }

    /// Reads the device-specific configuration.
    pub fn config(&self, offset: u64, data: &mut [u8]) {
        self.transport.read(register::CONFIG + offset, data);
    }

    /// The device status.
    pub fn status(&self) -> u32 {
        self.read(register::STATUS)
    }

    /// The features that the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.write(register::DEVICE_FEATURES_SEL, select);
            u64::from(self.read(register::DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// Resets the device, and negotiates these features and `VERSION_1`; says whether the device
    /// took them.
    pub fn negotiate(&self, features: u64) -> bool {
        self.write(register::STATUS, 0);
        assert_eq!(self.status(), 0);
        if let TestTransport::Pci(pci) = &self.transport {
            pci.route_config();
        }
        self.write(register::STATUS, status::ACKNOWLEDGE);
        self.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        let features = features | Self::VERSION_1;
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(register::DRIVER_FEATURES_SEL, select);
            self.write(register::DRIVER_FEATURES, half);
        }
        self.write(register::STATUS, self.status() | status::FEATURES_OK);
        self.status() & status::FEATURES_OK != 0
    }

    /// Tells the device where a queue is, and enables it.
    pub fn enable_queue(&self, index: u32, queue: &DriverQueue) {
        self.write(register::QUEUE_SEL, index);
        self.write(register::QUEUE_SIZE, u32::from(queue.size));
        self.write_address(register::QUEUE_DESC_LOW, queue.desc_table);
        self.write_address(register::QUEUE_DRIVER_LOW, queue.avail_ring);
        self.write_address(register::QUEUE_DEVICE_LOW, queue.used_ring);
        if let TestTransport::Pci(pci) = &self.transport {
            pci.route_queue(index);
        }
        self.write(register::QUEUE_READY, 1);
    }

    /// Resets the device and brings it to work with these features, all its queues enabled with
    /// `size` descriptors each (fewer where it offers fewer).
    pub fn start(&mut self, features: u64, size: u16) {
        assert!(
            self.negotiate(features),
            "the device refused features {features:#x}"
        );
        self.queues.clear();
        let mut at = Self::QUEUES;
        for index in 0.. {
            self.write(register::QUEUE_SEL, index);
            let max = self.read(register::QUEUE_SIZE_MAX);
            if max == 0 {
                break;
            }
            let queue = DriverQueue::new(&self.memory, at, size.min(max as u16));
            at += DriverQueue::bytes(queue.size).next_multiple_of(0x1000);
            self.enable_queue(index, &queue);
            self.queues.push(queue);
        }
        self.write(register::STATUS, self.status() | status::DRIVER_OK);
        let wanted = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        assert_eq!(self.status(), wanted);
    }

    /// Lets a device without a thread work until it has nothing to do, but for no longer than so
    /// many turns of its loop; says how many it took. One with a thread works all the time.
    pub fn settle(&self, turns: usize) -> usize {
        let TestIo::Local(local) = &self.io else {
            return 0;
        };
        for turn in 0..turns {
            if local.turn(Some(Duration::ZERO)).unwrap() == 0 {
                return turn;
            }
        }
        turns
    }

    /// Notifies a queue.
    pub fn notify(&self, queue: u32) {
        self.write(register::QUEUE_NOTIFY, queue);
    }

    /// Makes a chain available in a queue, notifies, waits for it to be used, and gives the used
    /// length.
    pub fn request(&mut self, queue: usize, buffers: &[super::Buffer]) -> u32 {
        let head = self.queues[queue].add(&self.memory, buffers);
        self.notify(queue as u32);
        let (used, len) = match self.io {
            TestIo::Thread(_) => self.queues[queue].wait_used(&self.memory),
            TestIo::Local(_) => {
                self.settle(Self::REQUEST_TURNS);
                let used = self.queues[queue].used(&self.memory);
                used.expect("the device has settled, and not served the request")
            }
        };
        assert_eq!(used, u32::from(head));
        len
    }

    /// Waits until the device says that it needs to be reset.
    pub fn wait_needs_reset(&self) {
        wait_until("DEVICE_NEEDS_RESET", || {
            self.status() & status::NEEDS_RESET != 0
        });
    }

    /// Writes guest memory.
    pub fn fill(&self, address: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(address))
            .unwrap();
    }

    /// Reads guest memory.
    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }
}

fn spawn_io() -> IoThread {
    IoThread::spawn("test-io", |panic| {
        // Seen by the test as a device that does not answer.
        eprintln!("{panic}");
    })
    .unwrap()
}
