//! A virtio device of one's own: an entropy device whose numbers were chosen by a fair dice roll.
//!
//! `cargo run -p kiln-vmm --example virtio_device`

mod guests;

use std::error::Error;
use std::io;

use guests::Buffer::Writable;
use guests::{DATA, Guest};
use kiln_vmm::Console;
use kiln_vmm::virtio::{
    ActivateError, Activation, ActiveQueue, QueueError, QueueHandler, Registrar, Turn,
    VirtioDevice, Worker,
};

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

/// What the device is; the worker moves the handler to the I/O thread and takes it back.
struct DiceDevice(Worker<Dice>);

impl VirtioDevice for DiceDevice {
    fn device_type(&self) -> u32 {
        4 // entropy (virtio 1.3, section 5.4)
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.0.activate(activation)
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.0.deactivate()
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
        .virtio_device("dice", DiceDevice(Worker::new(Dice)))
        .serial(Console::writer(io::stdout()))
        .build()?;
    println!("{}", vm.start()?.wait()?);
    Ok(())
}
