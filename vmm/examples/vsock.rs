//! A service of the host for its guest: the guest connects to a port by vsock, asks a question, and
//! prints the answer. The program on the host listens on a Unix socket, and nothing else of it
//! knows that there is a machine.
//!
//! `cargo run -p kiln-vmm --example vsock`

mod guests;

use std::error::Error;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;

use guests::{DATA, Guest};
use kiln_vmm::{Console, Vsock};

const GUEST_CID: u32 = 3;
const HOST_CID: u64 = 2;
const GUEST_PORT: u32 = 1024;
/// Where the service listens: at the device's path with `_52` behind it.
const SERVICE_PORT: u32 = 52;

const REQUEST: u16 = 1;
const DATA_FOLLOWS: u16 = 5;
/// A packet's header (virtio 1.3, section 5.10.6).
const HEADER_BYTES: u32 = 44;

/// A packet from the guest to the service.
fn packet(operation: u16, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(u64::from(GUEST_CID).to_le_bytes());
    bytes.extend(HOST_CID.to_le_bytes());
    bytes.extend(GUEST_PORT.to_le_bytes());
    bytes.extend(SERVICE_PORT.to_le_bytes());
    bytes.extend((data.len() as u32).to_le_bytes());
    bytes.extend(1_u16.to_le_bytes()); // a stream
    bytes.extend(operation.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes()); // flags
    bytes.extend(4096_u32.to_le_bytes()); // the guest's room for what it receives
    bytes.extend(0_u32.to_le_bytes()); // what of that it has passed on
    bytes.extend(data);
    bytes
}

/// A guest with a driver for nothing but this. In Linux it would be a `connect` of an `AF_VSOCK`
/// socket, a `send` and a `recv`.
fn guest() -> Guest {
    let (accepted, answer) = (DATA, DATA + 0x2_0000);
    Guest::new()
        .start_virtio(0, 2)
        .send_packet(0, &packet(REQUEST, b""))
        .receive_packet(0, accepted)
        .send_packet(0, &packet(DATA_FOLLOWS, b"what is the answer?"))
        .receive_packet(0, answer)
        .print("the service said: ")
        .print_at(answer + HEADER_BYTES)
        .print("\n")
        .power_off()
}

/// Takes one connection, and answers one question.
fn serve(listener: &UnixListener) -> io::Result<String> {
    let (mut stream, _) = listener.accept()?;
    let mut question = [0; 64];
    let count = stream.read(&mut question)?;
    stream.write_all(b"42\0")?;
    Ok(String::from_utf8_lossy(&question[..count]).into_owned())
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::temp_dir().join(format!("kiln-vsock-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    let path = folder.join("guest.vsock");
    let listener = UnixListener::bind(folder.join(format!("guest.vsock_{SERVICE_PORT}")))?;
    let service = std::thread::spawn(move || serve(&listener));

    let vm = guest()
        .machine()?
        .vsock(Vsock::new(GUEST_CID, &path))
        .serial(Console::writer(io::stdout()))
        .build()?;
    println!("{}", vm.start()?.wait()?);
    println!(
        "the guest asked: {}",
        service.join().map_err(|_| "the service panicked")??
    );
    // The machine has taken its own socket away.
    println!("a socket is left: {}", path.exists());
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}
