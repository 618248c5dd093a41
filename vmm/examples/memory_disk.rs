//! A disk that is a vector in memory: the guest reads a sector, prints it, and writes an answer
//! to the next sector, where it is found when the machine has ended.
//!
//! `cargo run -p kiln-vmm --example memory_disk`

mod guests;

use std::error::Error;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use guests::{DATA, Guest};
use kiln_vmm::{BlockBackend, Console, Disk, GuestSlice, gather_into, scatter};

const SECTOR: u32 = 512;

/// Cloning it gives the same disk again.
#[derive(Clone)]
struct MemoryDisk(Arc<Mutex<Vec<u8>>>);

impl MemoryDisk {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockBackend for MemoryDisk {
    fn size(&self) -> u64 {
        self.bytes().len() as u64
    }

    // A request never passes the size of the disk, so nothing here can be out of bounds.
    fn read_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        scatter(&self.bytes()[offset as usize..], buffers);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        gather_into(&mut self.bytes()[offset as usize..], buffers);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut content = vec![0; 64 * SECTOR as usize];
    let text = b"this is sector 3\n";
    content[3 * SECTOR as usize..][..text.len()].copy_from_slice(text);
    let disk = MemoryDisk(Arc::new(Mutex::new(content)));

    let vm = Guest::new()
        .start_virtio(0, 1)
        .read_disk(0, 3, DATA, SECTOR)
        .print("the guest read: ")
        .print_at(DATA)
        .store(DATA, b"the guest was here\0")
        .write_disk(0, 4, DATA, SECTOR)
        .power_off()
        .machine()?
        .disk(Disk::new(disk.clone()).id("memory"))
        .serial(Console::writer(io::stdout()))
        .build()?;
    println!("{}", vm.start()?.wait()?);

    let bytes = disk.bytes();
    let sector = &bytes[4 * SECTOR as usize..5 * SECTOR as usize];
    let text = sector.split(|byte| *byte == 0).next().unwrap_or_default();
    println!("sector 4 holds: {}", String::from_utf8_lossy(text));
    Ok(())
}
