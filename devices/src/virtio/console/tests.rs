use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kiln_virtio_device::testing::{
    Buffer, LONG, MockDriver, TransportKind, over_each_transport, wait_until,
};

use super::*;
use crate::console::{Console, ConsoleInput, ConsoleOutput};
use crate::virtio::hostile::{Random, storm};

mod console;
mod ports;

const MULTIPORT: u64 = 1 << 1;
const SIZE: u64 = 1 << 0;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;

/// Where what the driver sends lies, and what it receives.
const SENT: u64 = 0x20_0000;
const RECEIVED: u64 = 0x60_0000;

/// A driver of a console.
struct Guest {
    driver: MockDriver,
}

impl Guest {
    fn new(kind: TransportKind, features: u64, device: VirtioConsole) -> Self {
        let mut driver = MockDriver::over(kind, Box::new(device));
        driver.start(features, 16);
        Self { driver }
    }

    /// Makes a buffer with these bytes available, and does not wait.
    fn offer(&mut self, queue: usize, bytes: &[u8]) {
        self.driver.fill(SENT, bytes);
        let buffer = Buffer::readable(SENT, bytes.len() as u32);
        self.driver.queues[queue].add(&self.driver.memory, &[buffer]);
        self.driver.notify(queue as u32);
    }

    /// Sends these bytes.
    fn send(&mut self, queue: usize, bytes: &[u8]) {
        self.offer(queue, bytes);
        self.driver.queues[queue].wait_used(&self.driver.memory);
    }

    /// Gives the device a buffer for what comes.
    fn expect(&mut self, queue: usize, len: u32) {
        let buffer = Buffer::writable(RECEIVED + 0x1_0000 * queue as u64, len);
        self.driver.queues[queue].add(&self.driver.memory, &[buffer]);
        self.driver.notify(queue as u32);
    }

    /// What has come into the buffer.
    fn came(&mut self, queue: usize) -> Vec<u8> {
        let (_, len) = self.driver.queues[queue].wait_used(&self.driver.memory);
        let at = RECEIVED + 0x1_0000 * queue as u64;
        self.driver.bytes(at, len as usize)
    }

    fn receive(&mut self, queue: usize) -> Vec<u8> {
        self.expect(queue, 4096);
        self.came(queue)
    }

    /// Receives until there are so many bytes.
    fn receive_all(&mut self, queue: usize, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            bytes.extend(self.receive(queue));
        }
        bytes
    }

    fn is_used(&self, queue: usize, count: u16) -> bool {
        self.driver.queues[queue].used_index(&self.driver.memory) == count
    }

    /// Sends a control message.
    fn say(&mut self, port: u32, event: u16, value: u16) {
        self.send(CONTROL_TRANSMIT, &control(port, event, value));
    }

    /// Receives a control message: port, event, value, and what is behind them.
    fn hear(&mut self) -> (u32, u16, u16, Vec<u8>) {
        let bytes = self.receive(CONTROL_RECEIVE);
        let half = |at| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let port = u32::from(half(0)) | u32::from(half(2)) << 16;
        (port, half(4), half(6), bytes[8..].to_vec())
    }

    /// Takes all ports on, of which these are open at the host's end, the console among them.
    fn take_ports_on(&mut self, open: &[bool]) {
        self.say(0, 0, 1);
        for port in 0..open.len() as u32 {
            assert_eq!(self.hear(), (port, 1, 0, Vec::new()));
        }
        for (port, open) in (0..).zip(open) {
            self.say(port, 3, 1);
            let (from, event, value, name) = self.hear();
            assert_eq!((from, value), (port, 1));
            assert_eq!(event, if port == 0 { 4 } else { 7 });
            assert_eq!(name.is_empty(), port == 0);
            if *open {
                assert_eq!(self.hear(), (port, 6, 1, Vec::new()));
            }
        }
    }
}

fn control(port: u32, event: u16, value: u16) -> Vec<u8> {
    let mut bytes = port.to_le_bytes().to_vec();
    bytes.extend(event.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    bytes
}

fn nowhere() -> VirtioConsole {
    VirtioConsole::new(Console::null(), Vec::new(), ConsoleSize::default()).unwrap()
}

/// Bytes that say where they are.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 251 + at) as u8).collect()
}

fn output_to(fd: impl Into<OwnedFd>) -> Console {
    Console::new(ConsoleInput::null(), ConsoleOutput::fd(fd.into()))
}
