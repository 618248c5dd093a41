//! The devices, each with a host behind it, and what an ordinary driver asks of them.

use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use kiln_devices::console::{Console, ConsoleInput, ConsoleOutput};
use kiln_devices::virtio::balloon::{Balloon, BalloonControl, BalloonOptions};
use kiln_devices::virtio::block::{Block, BlockBackend, BlockOptions, BlockProperties};
use kiln_devices::virtio::console::{ConsoleSize, Port, VirtioConsole};
use kiln_devices::virtio::net::{MacAddress, Net, NetBackend, NetOptions, Offloads};
use kiln_devices::virtio::rng::{Rng, RngOptions};
use kiln_devices::virtio::vsock::Vsock;
use kiln_memory::{GuestSlice, MemorySize, gather, scatter};
use kiln_virtio_device::VirtioDevice;

/// A request that a driver may make, and that succeeds.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) name: &'static str,
    /// The device's own features that it takes.
    pub(crate) features: u64,
    pub(crate) queue: usize,
    pub(crate) readable: Vec<u8>,
    /// How many bytes the device may write.
    pub(crate) writable: u32,
}

/// A device to be attacked.
pub(crate) trait Victim {
    /// The device as a machine just powered on has it, with a new host.
    fn device(&mut self) -> Box<dyn VirtioDevice>;

    /// What an ordinary driver does.
    fn requests(&self) -> Vec<Request>;

    /// The host sends something, where the request is to receive it.
    fn prepare(&mut self, request: &Request);

    /// What came to the host since the last time.
    fn effect(&mut self) -> Vec<u8>;

    /// The queues in which every chain is looked at when the driver notifies, with these features.
    fn eager(&self) -> Vec<usize>;

    /// Ranges of RAM that a request changes beside its buffers.
    fn beside(&self) -> Vec<std::ops::Range<u64>> {
        Vec::new()
    }
}

/// All of them.
pub(crate) fn all() -> Vec<(&'static str, Box<dyn Victim>)> {
    vec![
        ("rng", Box::new(Entropy)),
        ("console", Box::new(Terminal::default())),
        ("vsock", Box::new(Sockets::default())),
        ("balloon", Box::new(Pages::default())),
        ("block", Box::new(Disk::default())),
        ("net", Box::new(Network::default())),
    ]
}

pub(crate) struct Entropy;

/// Numbers that are known.
struct Counter(u8);

impl Read for Counter {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0 = 0;
        for byte in &mut *buffer {
            self.0 = self.0.wrapping_add(1);
            *byte = self.0;
        }
        Ok(buffer.len())
    }
}

impl Victim for Entropy {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Rng::from_reader(Counter(0), RngOptions::default()).unwrap())
    }

    fn requests(&self) -> Vec<Request> {
        vec![Request {
            name: "numbers",
            features: 0,
            queue: 0,
            readable: Vec::new(),
            writable: 40,
        }]
    }

    fn prepare(&mut self, _: &Request) {}

    fn effect(&mut self) -> Vec<u8> {
        Vec::new()
    }

    fn eager(&self) -> Vec<usize> {
        vec![0]
    }
}

#[derive(Default)]
pub(crate) struct Terminal(Vec<UnixStream>);

impl Victim for Terminal {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let (port, socket) = UnixStream::pair().unwrap();
        port.set_nonblocking(true).unwrap();
        self.0 = vec![ours, port];
        let output = ConsoleOutput::fd(theirs.try_clone().unwrap().into());
        let line = Console::new(ConsoleInput::fd(theirs.into()), output);
        let ports = vec![Port::socket("port", socket)];
        Box::new(VirtioConsole::new(line, ports, ConsoleSize::new(80, 25)).unwrap())
    }

    fn requests(&self) -> Vec<Request> {
        let request = |name, features, queue, readable: &[u8], writable| Request {
            name,
            features,
            queue,
            readable: readable.to_vec(),
            writable,
        };
        vec![
            request("output", 0, 1, b"a line that goes to the console\n", 0),
            request("input", 0, 0, b"", 60),
            // DEVICE_READY, from which on the device tells of its ports.
            request("control", 2, 3, &[0, 0, 0, 0, 0, 0, 1, 0], 0),
        ]
    }

    fn prepare(&mut self, request: &Request) {
        if request.name == "input" {
            // Where nobody reads, there is enough of it.
            let _ = self.0[0].write_all(b"what somebody types");
        }
    }

    fn effect(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        for end in &mut self.0 {
            let _ = end.read_to_end(&mut all);
        }
        all
    }

    fn eager(&self) -> Vec<usize> {
        vec![0, 1]
    }
}

pub(crate) struct Sockets {
    folder: tempfile::TempDir,
    devices: usize,
    listener: Option<UnixListener>,
}

impl Default for Sockets {
    fn default() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            devices: 0,
            listener: None,
        }
    }
}

const CID: u64 = 3;
const PORT: u32 = 7;

/// The header of a packet of the guest (virtio 1.3, section 5.10.6).
fn packet(source: u32, port: u32, operation: u16) -> Vec<u8> {
    let mut bytes = CID.to_le_bytes().to_vec();
    bytes.extend(2_u64.to_le_bytes());
    for word in [source, port, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(1_u16.to_le_bytes());
    bytes.extend(operation.to_le_bytes());
    for word in [0_u32, 0x1_0000, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

impl Victim for Sockets {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        self.devices += 1;
        let path = self.folder.path().join(self.devices.to_string());
        let listener = UnixListener::bind(format!("{}_{PORT}", path.display())).unwrap();
        listener.set_nonblocking(true).unwrap();
        self.listener = Some(listener);
        Box::new(Vsock::new(CID as u32, path).unwrap())
    }

    fn requests(&self) -> Vec<Request> {
        let request = |name, queue, readable, writable| Request {
            name,
            features: 0,
            queue,
            readable,
            writable,
        };
        vec![
            request("connect", 1, packet(99, PORT, 1), 0),
            // Nobody listens there: a reset comes.
            request("refused", 1, packet(98, PORT + 1, 1), 0),
            request("stray", 1, packet(97, PORT, 7), 0),
        ]
    }

    fn prepare(&mut self, _: &Request) {}

    fn effect(&mut self) -> Vec<u8> {
        let mut clients = 0;
        while self.listener.as_ref().unwrap().accept().is_ok() {
            clients += 1;
        }
        vec![clients]
    }

    fn eager(&self) -> Vec<usize> {
        vec![1]
    }
}

#[derive(Default)]
pub(crate) struct Pages(Option<BalloonControl>);

/// The pages that go into the balloon.
const PAGES: [u32; 3] = [0x28, 0x2a, 0x2b];

impl Victim for Pages {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let options = BalloonOptions {
            free_page_reporting: true,
            ..BalloonOptions::default()
        };
        let balloon = Balloon::new(MemorySize::mib(1), options).unwrap();
        self.0 = Some(balloon.control());
        Box::new(balloon)
    }

    fn requests(&self) -> Vec<Request> {
        let numbers: Vec<u8> = PAGES.iter().flat_map(|page| page.to_le_bytes()).collect();
        let request = |name, queue, readable, writable| Request {
            name,
            features: 0,
            queue,
            readable,
            writable,
        };
        vec![
            request("inflate", 0, numbers.clone(), 0),
            request("deflate", 1, numbers, 0),
        ]
    }

    fn prepare(&mut self, _: &Request) {}

    fn effect(&mut self) -> Vec<u8> {
        Vec::new()
    }

    fn eager(&self) -> Vec<usize> {
        vec![0, 1]
    }

    fn beside(&self) -> Vec<std::ops::Range<u64>> {
        let range = |page: &u32| u64::from(*page) << 12..(u64::from(*page) + 1) << 12;
        PAGES.iter().map(range).collect()
    }
}

#[derive(Default)]
pub(crate) struct Disk(Arc<Mutex<Vec<u8>>>);

const SECTORS: usize = 64;

/// A disk in memory.
struct Platter(Arc<Mutex<Vec<u8>>>);

impl BlockBackend for Platter {
    fn size(&self) -> u64 {
        (SECTORS * 512) as u64
    }

    fn read_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        let bytes = self.0.lock().unwrap();
        let len: usize = buffers.iter().map(GuestSlice::len).sum();
        scatter(&bytes[offset as usize..][..len], buffers);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        let data = gather(buffers);
        self.0.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(&data);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn properties(&self) -> BlockProperties {
        BlockProperties {
            discard: true,
            write_zeroes: true,
            ..BlockProperties::default()
        }
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.0.lock().unwrap()[offset as usize..][..len as usize].fill(0);
        Ok(())
    }
}

/// Two ranges to be discarded (virtio 1.3, section 5.2.6).
fn segments() -> Vec<u8> {
    let segment = |sector: u64, sectors: u32| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &[0; 4]].concat()
    };
    [segment(3, 2), segment(6, 1)].concat()
}

impl Victim for Disk {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let bytes = (0..SECTORS * 512).map(|at| (at / 3) as u8).collect();
        self.0 = Arc::new(Mutex::new(bytes));
        let options = BlockOptions {
            queues: Some(2),
            ..BlockOptions::default()
        };
        Box::new(Block::new(Platter(self.0.clone()), options).unwrap())
    }

    fn requests(&self) -> Vec<Request> {
        let request = |name, kind: u8, data: &[u8], writable| Request {
            name,
            features: 0,
            queue: 0,
            readable: [&[kind, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0], data].concat(),
            writable,
        };
        vec![
            request("read", 0, &[], 513),
            request("write", 1, &[0x77; 512], 1),
            request("identify", 8, &[], 21),
            request("beyond", 0, &[], 0x8000 + 1),
            request("unknown", 99, &[], 1),
            request("flush", 4, &[], 1),
            Request {
                features: 1 << 13,
                ..request("discard", 11, &segments(), 1)
            },
            Request {
                features: 1 << 14,
                ..request("write zeroes", 13, &segments(), 1)
            },
        ]
    }

    fn prepare(&mut self, _: &Request) {}

    fn effect(&mut self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }

    fn eager(&self) -> Vec<usize> {
        vec![0, 1]
    }
}

#[derive(Default)]
pub(crate) struct Network(Option<UnixDatagram>);

struct Cable(UnixDatagram);

impl NetBackend for Cable {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn offloads(&self) -> Offloads {
        Offloads {
            checksum: true,
            tso4: true,
            tso6: true,
            ecn: true,
            ufo: true,
            uso: true,
        }
    }

    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn add_queue_pair(&mut self) -> io::Result<Box<dyn NetBackend>> {
        Ok(Box::new(Cable(self.0.try_clone()?)))
    }

    fn send(&mut self, packet: &[GuestSlice<'_>]) -> io::Result<()> {
        self.0.send(&gather(packet)).map(drop)
    }

    fn receive(&mut self, buffers: &[GuestSlice<'_>]) -> io::Result<usize> {
        let mut bytes = vec![0; 0x1_1000];
        let len = self.0.recv(&mut bytes)?;
        scatter(&bytes[..len], buffers);
        Ok(len)
    }
}

impl Victim for Network {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let (cable, peer) = UnixDatagram::pair().unwrap();
        cable.set_nonblocking(true).unwrap();
        peer.set_nonblocking(true).unwrap();
        self.0 = Some(peer);
        let options = NetOptions {
            mac: Some(MacAddress::new([2, 1, 2, 3, 4, 5])),
            queue_pairs: Some(2),
            ..NetOptions::default()
        };
        Box::new(Net::new(Cable(cable), options).unwrap())
    }

    fn requests(&self) -> Vec<Request> {
        const MERGEABLE: u64 = 1 << 15;
        const CONTROL: u64 = 1 << 17;
        const CONTROL_RX: u64 = 1 << 18;
        const PAIRS: u64 = 1 << 22;
        let request = |name, features, queue, readable: &[u8], writable| Request {
            name,
            features,
            queue,
            readable: readable.to_vec(),
            writable,
        };
        let mut frame = vec![0; 12];
        frame.extend(b"a frame that the guest sends to the network");
        vec![
            request("send", 0, 1, &frame, 0),
            request("receive", 0, 0, &[], 100),
            request("receive merged", MERGEABLE, 0, &[], 100),
            // The control queue is behind all pairs that the driver may use.
            request("promiscuous", CONTROL | CONTROL_RX, 2, &[0, 0, 1], 1),
            request("pairs", CONTROL | PAIRS, 4, &[4, 0, 2, 0], 1),
            request("unknown", CONTROL, 2, &[77, 0, 1], 1),
        ]
    }

    fn prepare(&mut self, request: &Request) {
        if request.queue == 0 {
            let mut frame = vec![0; 12];
            frame.extend(b"a frame of the network");
            // Where nobody reads, there are enough of them.
            let _ = self.0.as_ref().unwrap().send(&frame);
        }
    }

    fn effect(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        let mut bytes = [0; 2000];
        while let Ok(len) = self.0.as_ref().unwrap().recv(&mut bytes) {
            all.extend(&bytes[..len]);
        }
        all
    }

    fn eager(&self) -> Vec<usize> {
        vec![0, 1]
    }
}
