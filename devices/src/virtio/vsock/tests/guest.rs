//! A guest's side of a socket device: a driver of its own words, which shares nothing with the
//! device but the specification.

use std::collections::VecDeque;

use kiln_virtio_device::VirtioDevice;
use kiln_virtio_device::testing::{Buffer, MockDriver, wait_until};

/// Context id of the guest.
pub(crate) const CID: u64 = 3;

pub(crate) const REQUEST: u16 = 1;
pub(crate) const RESPONSE: u16 = 2;
pub(crate) const RST: u16 = 3;
pub(crate) const SHUTDOWN: u16 = 4;
pub(crate) const RW: u16 = 5;
pub(crate) const CREDIT_UPDATE: u16 = 6;
pub(crate) const CREDIT_REQUEST: u16 = 7;

pub(crate) const RX: usize = 0;
pub(crate) const TX: usize = 1;

const RX_DATA: u64 = 0x20_0000;
pub(crate) const RX_BYTES: u32 = 4096;
pub(crate) const TX_DATA: u64 = 0x40_0000;

/// A packet from or to the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) src_cid: u64,
    pub(crate) dst_cid: u64,
    pub(crate) src_port: u32,
    pub(crate) dst_port: u32,
    pub(crate) kind: u16,
    pub(crate) op: u16,
    pub(crate) flags: u32,
    pub(crate) buf_alloc: u32,
    pub(crate) fwd_cnt: u32,
    pub(crate) data: Vec<u8>,
}

impl Packet {
    /// A packet from the guest.
    pub(crate) fn new(op: u16, src_port: u32, dst_port: u32) -> Self {
        Self {
            src_cid: CID,
            dst_cid: 2,
            src_port,
            dst_port,
            kind: 1,
            op,
            flags: 0,
            buf_alloc: 1 << 18,
            fwd_cnt: 0,
            data: Vec::new(),
        }
    }

    /// The packet with this data.
    pub(crate) fn data(mut self, data: &[u8]) -> Self {
        self.data = data.to_vec();
        self
    }

    /// The packet with these flags.
    pub(crate) fn flags(mut self, flags: u32) -> Self {
        self.flags = flags;
        self
    }

    /// An answer to this packet.
    pub(crate) fn answer(&self, op: u16) -> Self {
        Self::new(op, self.dst_port, self.src_port)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend((self.data.len() as u32).to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes.extend(&self.data);
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let half = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        let len = word(24) as usize;
        assert_eq!(bytes.len(), 44 + len);
        Self {
            src_cid: u64::from(word(0)) | u64::from(word(4)) << 32,
            dst_cid: u64::from(word(8)) | u64::from(word(12)) << 32,
            src_port: word(16),
            dst_port: word(20),
            kind: half(28),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
            data: bytes[44..].to_vec(),
        }
    }
}

/// A guest with a socket device.
pub(crate) struct Guest {
    pub(crate) driver: MockDriver,
    /// Packets that came while another one was waited for.
    pub(crate) early: VecDeque<Packet>,
}

impl Guest {
    pub(crate) fn new(device: impl VirtioDevice + 'static) -> Self {
        let mut guest = Self {
            driver: MockDriver::new(Box::new(device)),
            early: VecDeque::new(),
        };
        guest.start();
        guest
    }

    /// Resets the device, and gives it buffers.
    pub(crate) fn start(&mut self) {
        self.start_without_buffers();
        for _ in 0..self.driver.queues[RX].size {
            self.give_buffer();
        }
        self.driver.notify(RX as u32);
    }

    pub(crate) fn start_without_buffers(&mut self) {
        self.early.clear();
        self.driver.start(0, 256);
    }

    /// Gives the device a buffer, the next in a ring of as many as there are descriptors.
    pub(crate) fn give_buffer(&mut self) {
        let queue = &mut self.driver.queues[RX];
        let at = u64::from(queue.avail_index() % queue.size);
        let address = RX_DATA + at * u64::from(RX_BYTES);
        queue.add(&self.driver.memory, &[Buffer::writable(address, RX_BYTES)]);
    }

    /// Sends a packet, and waits until the device has it.
    pub(crate) fn send(&mut self, packet: &Packet) {
        self.send_bytes(&packet.bytes());
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        self.driver.fill(TX_DATA, bytes);
        let buffer = [Buffer::readable(TX_DATA, bytes.len() as u32)];
        assert_eq!(self.driver.request(TX, &buffer), 0);
    }

    /// The next packet that is there.
    pub(crate) fn take(&mut self) -> Option<Packet> {
        let (head, len) = self.driver.queues[RX].used(&self.driver.memory)?;
        let address = RX_DATA + u64::from(head) * u64::from(RX_BYTES);
        let packet = Packet::parse(&self.driver.bytes(address, len as usize));
        assert_eq!(packet.dst_cid, CID);
        self.give_buffer();
        self.driver.notify(RX as u32);
        Some(packet)
    }

    /// Waits for the next packet.
    pub(crate) fn receive(&mut self) -> Packet {
        if let Some(packet) = self.early.pop_front() {
            return packet;
        }
        let mut packet = None;
        wait_until("a packet", || {
            packet = self.take();
            packet.is_some()
        });
        packet.unwrap()
    }

    /// Waits for the next packet, which has to be of this kind.
    pub(crate) fn expect(&mut self, op: u16) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.op, op, "{packet:?}");
        packet
    }

    /// Asserts that no packet comes.
    pub(crate) fn expect_silence(&mut self) {
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert_eq!(self.take(), None);
    }

    /// Asks for a connection, and waits for it.
    pub(crate) fn connect(&mut self, src_port: u32, dst_port: u32) {
        self.send(&Packet::new(REQUEST, src_port, dst_port));
        let response = self.expect(RESPONSE);
        assert_eq!((response.src_port, response.dst_port), (dst_port, src_port));
        assert_eq!((response.src_cid, response.kind), (2, 1));
    }

    /// Accepts the connection that the host asks for; gives its port of the host.
    pub(crate) fn accept(&mut self, port: u32) -> u32 {
        let request = self.expect(REQUEST);
        assert_eq!((request.dst_port, request.kind), (port, 1));
        self.send(&request.answer(RESPONSE));
        request.src_port
    }
}
