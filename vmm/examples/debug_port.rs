//! A port device of one's own: what the guest writes to port 0x402 is printed, a line at a time,
//! and a read tells the guest how many bytes that were.
//!
//! `cargo run -p kiln-vmm --example debug_port`

mod guests;

use std::error::Error;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use guests::Guest;
use kiln_vmm::{BusDeviceMut, ExitRequest, VmExit};

const PORT: u16 = 0x402;

#[derive(Default)]
struct DebugPort {
    line: Vec<u8>,
    written: u32,
}

impl BusDeviceMut for DebugPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        for (byte, count) in data.iter_mut().zip(self.written.to_le_bytes()) {
            *byte = count;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        self.written = self.written.wrapping_add(data.len() as u32);
        self.line.extend_from_slice(data);
        if data.ends_with(b"\n") || self.line.len() >= 1000 {
            print!("debug port: {}", String::from_utf8_lossy(&self.line));
            self.line.clear();
        }
        ControlFlow::Continue(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // A device is shared with the machine, so that it can be looked at while the guest runs.
    let port = Arc::new(Mutex::new(DebugPort::default()));
    let vm = Guest::new()
        .out(PORT, b"hello from the guest\n")
        .out(PORT, b"and good bye\n")
        .power_off()
        .machine()?
        .pio_device("debug port", PORT, 1, port.clone())
        .build()?;

    let exit = vm.start()?.wait()?;
    let written = port.lock().map_err(|_| "the debug port failed")?.written;
    println!("{exit}, having written {written} bytes");
    match exit {
        VmExit::Shutdown => Ok(()),
        other => Err(other.to_string().into()),
    }
}
