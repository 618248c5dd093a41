//! A virtio device of one's own: an entropy device whose numbers were chosen by a fair dice roll.
//!
//! `cargo run -p kiln-vmm --example virtio_device`

mod guests;

use std::error::Error;
use std::io;

use guests::Buffer::Writable;
use guests::{DATA, Guest};
use kiln_vmm::Console;
use kiln_vmm::virtio::{QueueError, QueueHandler, Registrar, SimpleDevice, Turn};

/// The device type (virtio 1.3, section 5.4).
const ENTROPY: u32 = 4;

/// What the device does with the buffers that the guest gives it, on the machine's I/O thread.
struct Dice;

impl QueueHandler for Dice {
    fn process(&mut self, turn: &mut Turn, _: &mut Registrar) -> Result<(), QueueError> {
        while let Some(mut chain) = turn.pop()? {
            // The guest says how long its buffer is: take no more than we are ready to give.
            let len = chain.writable.len().min(64);
            chain.writable.write(&[b'4'; 64][..len])?;
            turn.complete(chain, len as u32)?;
        }
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let vm = Guest::new()
        .start_virtio(0, 1)
        .offer(0, 0, &[Writable(DATA, 8)])
        .wait(0, 0)
        .print("the guest got: ")
        .print_at(DATA)
        .print("\n")
        .power_off()
        .machine()?
        .virtio_device("dice", SimpleDevice::new(ENTROPY, [64], Dice))
        .serial(Console::writer(io::stdout()))
        .build()?;
    println!("{}", vm.start()?.wait()?);
    Ok(())
}
