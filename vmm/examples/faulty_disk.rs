//! A disk that fails by a rule: it wraps any other backend and injects errors, delays and torn
//! writes. The guest sees which requests failed, and goes on.
//!
//! `cargo run -p kiln-vmm --example faulty_disk`

mod guests;

use std::error::Error;
use std::io;
use std::thread;
use std::time::Duration;

use guests::{DATA, Guest, STATUS};
use kiln_vmm::{BlockBackend, Console, Disk, GuestSlice, RawFile};

const SECTOR: u64 = 512;

/// What goes wrong.
enum Fault {
    /// The request fails and does nothing.
    Error,
    /// The request takes that long. It holds up the other devices of the machine, too: they share
    /// the I/O thread.
    Delay(Duration),
    /// A write fails when its first part, of that many bytes, is on the disk.
    Torn(usize),
}

/// A disk with the faults that `rule` names for a request's first sector.
struct FaultyDisk<B, R> {
    inner: B,
    rule: R,
}

impl<B: BlockBackend, R: FnMut(u64) -> Option<Fault> + Send + 'static> BlockBackend
    for FaultyDisk<B, R>
{
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn is_read_only(&self) -> bool {
        self.inner.is_read_only()
    }

    fn read_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        match (self.rule)(offset / SECTOR) {
            Some(Fault::Error) => return Err(io::Error::other("injected")),
            Some(Fault::Delay(time)) => thread::sleep(time),
            Some(Fault::Torn(_)) | None => {}
        }
        self.inner.read_at(offset, buffers)
    }

    fn write_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        match (self.rule)(offset / SECTOR) {
            Some(Fault::Error) => return Err(io::Error::other("injected")),
            Some(Fault::Delay(time)) => thread::sleep(time),
            Some(Fault::Torn(bytes)) => {
                self.inner.write_at(offset, &front(buffers, bytes))?;
                return Err(io::Error::other("injected"));
            }
            None => {}
        }
        self.inner.write_at(offset, buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// The first `bytes` of some buffers.
fn front<'a>(buffers: &[GuestSlice<'a>], mut bytes: usize) -> Vec<GuestSlice<'a>> {
    let mut front = Vec::new();
    for buffer in buffers {
        let len = buffer.len().min(bytes);
        bytes -= len;
        front.extend(buffer.subslice(0, len));
    }
    front
}

fn main() -> Result<(), Box<dyn Error>> {
    let image = tempfile::NamedTempFile::new()?;
    std::fs::write(&image, [b'.'; 10 * SECTOR as usize])?;
    let disk = FaultyDisk {
        inner: RawFile::open(image.path(), false)?,
        rule: |sector| match sector {
            2 => Some(Fault::Error),
            4 => Some(Fault::Torn(SECTOR as usize)),
            6 => Some(Fault::Delay(Duration::from_millis(50))),
            _ => None,
        },
    };

    let mut guest = Guest::new().start_virtio(0, 1);
    for sector in [0, 2, 4, 6, 8] {
        guest = guest
            .store(DATA, &[b'n'; 1024])
            .write_disk(0, sector, DATA, 1024)
            .print(&format!("write of 2 sectors from {sector}: status "))
            .print_digit_at(STATUS)
            .print("\n");
    }
    let vm = guest
        .power_off()
        .machine()?
        .disk(Disk::new(disk))
        .serial(Console::writer(io::stdout()))
        .build()?;
    println!("{}", vm.start()?.wait()?);

    let content = std::fs::read(&image)?;
    let sectors = content.iter().step_by(SECTOR as usize);
    let sectors: String = sectors.map(|byte| *byte as char).collect();
    println!("written (n) or not (.), by sector: {sectors}");
    Ok(())
}
