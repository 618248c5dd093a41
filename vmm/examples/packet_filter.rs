//! Two machines in one process on one wire, with a packet filter in between: the guests exchange
//! packets, and those of a forbidden kind do not arrive.
//!
//! `cargo run -p kiln-vmm --example packet_filter`

mod guests;

use std::error::Error;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use guests::{DATA, Guest};
use kiln_vmm::{
    Captured, Console, ConsoleInput, ConsoleOutput, GuestSlice, Net, NetBackend, VmHandle, gather,
    scatter,
};

/// A packet is a header of virtio (12 bytes) and an Ethernet frame, whose type is at 12.
const ETHER_TYPE: usize = 12 + 12;
const FORBIDDEN: [u8; 2] = [0x08, 0x00]; // IPv4
const ALLOWED: [u8; 2] = [0x88, 0xb5]; // local experiments
const LARGEST_PACKET: usize = 65_566;

/// One end of the wire, which drops packets of one kind instead of sending them.
struct Filter {
    wire: UnixDatagram,
    dropped: Arc<AtomicU32>,
}

impl NetBackend for Filter {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.wire.as_fd()
    }

    fn send(&mut self, packet: &[GuestSlice<'_>]) -> io::Result<()> {
        // Copied first and judged then: the guest could change its own memory in between.
        let bytes = gather(packet);
        let rest = bytes.get(ETHER_TYPE..).unwrap_or_default();
        if rest.starts_with(&FORBIDDEN) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        self.wire.send(&bytes).map(drop)
    }

    fn receive(&mut self, buffers: &[GuestSlice<'_>]) -> io::Result<usize> {
        let mut bytes = vec![0; LARGEST_PACKET];
        let len = self.wire.recv(&mut bytes)?;
        Ok(scatter(&bytes[..len], buffers))
    }
}

/// A broadcast packet with a text in it.
fn packet(kind: [u8; 2], text: &str) -> Vec<u8> {
    let addresses = b"\xff\xff\xff\xff\xff\xff\x06\0\0\0\0\x01";
    [&[0; 12], &addresses[..], &kind, text.as_bytes(), b"\0"].concat()
}

fn start(guest: Guest, filter: Filter) -> Result<(VmHandle, Captured), Box<dyn Error>> {
    filter.wire.set_nonblocking(true)?;
    let (output, printed) = ConsoleOutput::capture(4096);
    let vm = guest
        .power_off()
        .machine()?
        .net(Net::new(filter))
        .serial(Console::new(ConsoleInput::null(), output))
        .build()?;
    Ok((vm.start()?, printed))
}

fn main() -> Result<(), Box<dyn Error>> {
    let (left, right) = UnixDatagram::pair()?;
    let dropped = Arc::new(AtomicU32::new(0));
    let filter = |wire| Filter {
        wire,
        dropped: dropped.clone(),
    };

    let text = DATA + ETHER_TYPE as u32 + 2;
    let first = Guest::new()
        .start_virtio(0, 2)
        .send_packet(0, &packet(FORBIDDEN, "this is forbidden"))
        .send_packet(0, &packet(ALLOWED, "hello"))
        .receive_packet(0, DATA)
        .print_at(text);
    let second = Guest::new()
        .start_virtio(0, 2)
        .receive_packet(0, DATA)
        .print_at(text)
        .send_packet(0, &packet(ALLOWED, "hello to you"));

    let first = start(first, filter(left))?;
    let second = start(second, filter(right))?;
    for (handle, printed) in [second, first] {
        println!("{}, having received: {}", handle.wait()?, printed.text());
    }
    println!("dropped by the filter: {}", dropped.load(Ordering::Relaxed));
    Ok(())
}
