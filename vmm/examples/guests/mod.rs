//! Guests for the examples, put together from a few instructions instead of a kernel.
//!
//! Each method of [`Guest`] adds machine code that does one thing. The guest runs in 64-bit mode
//! with memory mapped to itself, so addresses are physical ones; RAM from [`DATA`] on is free.

#![allow(dead_code)] // Each example uses a part.

use kiln_vmm::{Kernel, MemorySize, Transport, VmBuilder};

/// RAM that a guest can use for what it likes, zeroed at the start.
pub(crate) const DATA: u32 = 0x50_0000;

/// Where a disk's status byte is after a request: 0 says that it was done, 1 that it failed.
pub(crate) const STATUS: u32 = 0x4f_0000;

/// The header of a disk's request.
const HEADER: u32 = 0x4f_1000;
/// The packet that is being sent.
const PACKET: u32 = 0x4f_2000;
/// The queues' rings: a page for each queue, 16 pages for each device.
const RINGS: u32 = 0x40_0000;
/// The first virtio-mmio device; the others follow, 4 KiB each.
const VIRTIO: u32 = 0xd000_0000;
const QUEUE_SIZE: u16 = 16;
/// Descriptors for each request, so that four requests can be under way in a queue.
const REQUEST_DESCRIPTORS: u16 = 4;

/// Sends what is in `cl` through the serial port, when that has room.
const PUT_CL: [u8; 16] = [
    0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd (line status)
    0xec, 0xa8, 0x20, 0x74, 0xfb, // 2: in al, dx; test al, 0x20; jz 2b
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0x88, 0xc8, 0xee, // mov al, cl; out dx, al
];

/// A buffer of a virtio request: address and length in bytes.
#[derive(Clone, Copy)]
pub(crate) enum Buffer {
    /// The device reads it.
    Readable(u32, u32),
    /// The device writes it.
    Writable(u32, u32),
}

/// A guest's code so far.
#[derive(Default)]
pub(crate) struct Guest {
    code: Vec<u8>,
    /// How many requests each queue, by the address of its rings, was given.
    offered: std::collections::HashMap<u32, u16>,
}

impl Guest {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// A machine with this guest in it.
    pub(crate) fn machine(self) -> Result<VmBuilder, Box<dyn std::error::Error>> {
        Ok(VmBuilder::new()
            .memory(MemorySize::mib(16))
            .kernel(Kernel::from_code(&self.code)?)
            // What the guests' few lines of driver know.
            .transport(Transport::Mmio))
    }

    /// Writes bytes to an I/O port.
    pub(crate) fn out(mut self, port: u16, bytes: &[u8]) -> Self {
        self.mov_dx(port);
        for byte in bytes {
            self.emit(&[0xb0, *byte, 0xee]); // mov al, byte; out dx, al
        }
        self
    }

    /// Prints text on the serial port.
    pub(crate) fn print(mut self, text: &str) -> Self {
        for byte in text.bytes() {
            self.emit(&[0xb1, byte]); // mov cl, byte
            self.emit(&PUT_CL);
        }
        self
    }

    /// Prints the text at `address` up to a zero byte on the serial port.
    pub(crate) fn print_at(mut self, address: u32) -> Self {
        self.emit(&[0xbe]); // mov esi, address
        self.emit(&address.to_le_bytes());
        self.emit(&[0x8a, 0x0e, 0x84, 0xc9, 0x74, 0x15]); // 2: mov cl, [rsi]; test cl, cl; jz 3f
        self.emit(&PUT_CL);
        self.emit(&[0x48, 0xff, 0xc6, 0xeb, 0xe5]); // inc rsi; jmp 2b; 3:
        self
    }

    /// Prints the byte at `address`, which is less than ten, as a digit on the serial port.
    pub(crate) fn print_digit_at(mut self, address: u32) -> Self {
        self.mov_ebx(address);
        self.emit(&[0x8a, 0x0b, 0x80, 0xc1, b'0']); // mov cl, [rbx]; add cl, '0'
        self.emit(&PUT_CL);
        self
    }

    /// Stores bytes in RAM, four at a time.
    pub(crate) fn store(mut self, address: u32, bytes: &[u8]) -> Self {
        for (at, chunk) in (address..).step_by(4).zip(bytes.chunks(4)) {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            self.store_u32(at, u32::from_le_bytes(word));
        }
        self
    }

    /// Waits until the power button is pressed, by asking again and again.
    pub(crate) fn wait_for_power_button(mut self) -> Self {
        self.mov_dx(0x603);
        self.emit(&[0xec, 0x84, 0xc0, 0x74, 0xfb]); // 2: in al, dx; test al, al; jz 2b
        self
    }

    /// Powers off (ACPI sleep state S5).
    pub(crate) fn power_off(self) -> Self {
        self.out(0x600, &[0x34])
    }

    /// Resets the machine (ACPI reset register).
    pub(crate) fn reset(self) -> Self {
        self.out(0x602, &[1])
    }

    /// Runs an instruction that no processor has.
    pub(crate) fn undefined_instruction(mut self) -> Self {
        self.emit(&[0x0f, 0x0b]); // ud2
        self
    }

    /// Does nothing for ever, with interrupts off.
    pub(crate) fn spin(mut self) -> Self {
        self.emit(&[0xeb, 0xfe]); // 2: jmp 2b
        self
    }

    /// Makes the virtio device with this number and that many queues ready (virtio 1.3, sections
    /// 3.1 and 4.2.2).
    pub(crate) fn start_virtio(mut self, device: u32, queues: u32) -> Self {
        let base = VIRTIO + device * 0x1000;
        self.store_u32(base + 0x70, 0); // Status: reset
        self.store_u32(base + 0x70, 3); // ACKNOWLEDGE and DRIVER
        self.store_u32(base + 0x24, 1); // DriverFeaturesSel: bits 32 to 63
        self.store_u32(base + 0x20, 1); // DriverFeatures: VERSION_1
        self.store_u32(base + 0x70, 11); // and FEATURES_OK
        for queue in 0..queues {
            let rings = rings(device, queue);
            self.store_u32(base + 0x30, queue); // QueueSel
            self.store_u32(base + 0x38, u32::from(QUEUE_SIZE)); // QueueSize
            self.store_u32(base + 0x80, rings); // QueueDesc
            self.store_u32(base + 0x90, rings + 0x100); // QueueDriver
            self.store_u32(base + 0xa0, rings + 0x200); // QueueDevice
            self.store_u32(base + 0x44, 1); // QueueReady
        }
        self.store_u32(base + 0x70, 15); // and DRIVER_OK
        self
    }

    /// Gives a request of at most four buffers to a queue (virtio 1.3, section 2.7.13).
    pub(crate) fn offer(mut self, device: u32, queue: u32, buffers: &[Buffer]) -> Self {
        let rings = rings(device, queue);
        let number = self.offered.get(&rings).copied().unwrap_or(0);
        let first = number * REQUEST_DESCRIPTORS % QUEUE_SIZE;
        for (at, buffer) in (first..).zip(buffers) {
            let (address, len, write) = match *buffer {
                Buffer::Readable(address, len) => (address, len, 0),
                Buffer::Writable(address, len) => (address, len, 2),
            };
            let more = u32::from(at + 1 < first + buffers.len() as u16);
            let descriptor = rings + u32::from(at) * 16;
            self.store_u32(descriptor, address);
            self.store_u32(descriptor + 8, len);
            self.store_u32(descriptor + 12, u32::from(at + 1) << 16 | write | more);
        }
        let slot = rings + 0x104 + u32::from(number % QUEUE_SIZE) * 2;
        self.store_u16(slot, first);
        self.store_u16(rings + 0x102, number + 1); // the driver's index
        self.store_u32(VIRTIO + device * 0x1000 + 0x50, queue); // QueueNotify
        self.offered.insert(rings, number + 1);
        self
    }

    /// Waits until the device has answered all requests of a queue.
    pub(crate) fn wait(mut self, device: u32, queue: u32) -> Self {
        let rings = rings(device, queue);
        let [low, high] = self.offered.get(&rings).map_or([0; 2], |n| n.to_le_bytes());
        self.mov_ebx(rings + 0x202); // the device's index
        self.emit(&[0x66, 0x81, 0x3b, low, high, 0x75, 0xf9]); // 2: cmp word [rbx], n; jne 2b
        self
    }

    /// Has a disk read `len` bytes from `sector` on to `address` (virtio 1.3, section 5.2.6).
    pub(crate) fn read_disk(self, device: u32, sector: u32, address: u32, len: u32) -> Self {
        self.disk_request(device, 0, sector, Buffer::Writable(address, len))
    }

    /// Has a disk write the `len` bytes at `address` from `sector` on.
    pub(crate) fn write_disk(self, device: u32, sector: u32, address: u32, len: u32) -> Self {
        self.disk_request(device, 1, sector, Buffer::Readable(address, len))
    }

    fn disk_request(mut self, device: u32, kind: u32, sector: u32, data: Buffer) -> Self {
        self.store_u32(HEADER, kind);
        self.store_u32(HEADER + 8, sector);
        let (header, status) = (Buffer::Readable(HEADER, 16), Buffer::Writable(STATUS, 1));
        self.offer(device, 0, &[header, data, status])
            .wait(device, 0)
    }

    /// Sends a packet, of which the first 12 bytes are virtio's header (virtio 1.3, section 5.1.6).
    pub(crate) fn send_packet(self, device: u32, packet: &[u8]) -> Self {
        let buffer = Buffer::Readable(PACKET, packet.len() as u32);
        self.store(PACKET, packet)
            .offer(device, 1, &[buffer])
            .wait(device, 1)
    }

    /// Receives a packet to `address`, where there is room for a large one.
    pub(crate) fn receive_packet(self, device: u32, address: u32) -> Self {
        self.offer(device, 0, &[Buffer::Writable(address, 0x1_0000)])
            .wait(device, 0)
    }

    fn store_u32(&mut self, address: u32, value: u32) {
        self.mov_ebx(address);
        self.emit(&[0xc7, 0x03]); // mov dword ptr [rbx], value
        self.emit(&value.to_le_bytes());
    }

    fn store_u16(&mut self, address: u32, value: u16) {
        self.mov_ebx(address);
        self.emit(&[0x66, 0xc7, 0x03]); // mov word ptr [rbx], value
        self.emit(&value.to_le_bytes());
    }

    fn mov_ebx(&mut self, value: u32) {
        self.emit(&[0xbb]);
        self.emit(&value.to_le_bytes());
    }

    fn mov_dx(&mut self, value: u16) {
        self.emit(&[0x66, 0xba]);
        self.emit(&value.to_le_bytes());
    }

    fn emit(&mut self, code: &[u8]) {
        self.code.extend_from_slice(code);
    }
}

fn rings(device: u32, queue: u32) -> u32 {
    RINGS + device * 0x1_0000 + queue * 0x1000
}
