//! Disk images in the qcow2 format, and a guest that is in on what is in them.
//!
//! The first byte says how the image is opened, the next how many steps of [`STEP`] bytes follow;
//! the image is what comes then. A backing file is there for images that name one `base`.

#[path = "../../../devices/src/virtio/block/qcow2/tests/format.rs"]
mod format;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use kiln_devices::virtio::block::{BackingFiles, BlockBackend, Qcow2File};
use kiln_memory::{GuestMemory, GuestSlice, MemoryOptions, allocate, gather, scatter};
use rustix::fs::{MemfdFlags, memfd_create};
use tempfile::TempDir;
use vm_memory::{GuestAddress, GuestMemoryBackend};

const STEPS: usize = 40;
/// A step: what it does, the place on the disk (two bytes), and how many sectors.
const STEP: usize = 4;
const SECTOR: u64 = 512;
/// A step is of so many sectors at most.
const MOST_SECTORS: u64 = 64;
const RAM: usize = (MOST_SECTORS * SECTOR) as usize;
/// The backing file's size.
const BASE: u64 = 16 << 10;
/// The largest disk whose content is compared with what it should be.
const COMPARED: u64 = 1 << 20;
/// What of a header neither the guest nor the driver may change: what the image is, its backing
/// file, and the disk's size.
const FIXED: usize = 32;
/// The bytes of a header.
const HEADER: usize = 104;

struct Place {
    folder: TempDir,
    ram: GuestMemory,
}

thread_local! {
    static PLACE: Place = {
        let folder = tempfile::tempdir().unwrap();
        let base: Vec<u8> = (0..BASE).map(|at| (at / 7) as u8 | 1).collect();
        std::fs::write(folder.path().join("base"), base).unwrap();
        let regions = [(GuestAddress(0), RAM)];
        let ram = allocate(&regions, &MemoryOptions::default()).unwrap();
        Place { folder, ram }
    };
}

/// Opens an image of these bytes, and uses it.
pub fn qcow2(data: &[u8]) {
    let [flags, steps, data @ ..] = data else {
        return;
    };
    let steps = usize::from(*steps) % (STEPS + 1);
    let Some((steps, image)) = data.split_at_checked(steps * STEP) else {
        return;
    };
    PLACE.with(|place| {
        let guest = Guest::new(place, image, flags & 1 == 1);
        if let Some(mut guest) = guest {
            for (number, step) in steps.chunks(STEP).enumerate() {
                guest.step(number as u8, step);
            }
            guest.end(image);
        }
    });
}

/// A guest, and what it knows of its disk.
struct Guest<'a> {
    place: &'a Place,
    file: File,
    read_only: bool,
    disk: Qcow2File,
    /// What the file may grow to.
    limit: u64,
    /// What each sector holds, where that is known: nothing for images that contradict themselves.
    content: Option<Vec<Option<[u8; SECTOR as usize]>>>,
}

impl<'a> Guest<'a> {
    /// With a disk, if the image can be opened.
    fn new(place: &'a Place, image: &[u8], read_only: bool) -> Option<Self> {
        let file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
        file.write_all_at(image, 0).unwrap();
        let disk = match open(place, &file, read_only) {
            Ok(disk) => disk,
            Err(error) => {
                assert!(!error.to_string().contains('\n'), "{error}");
                return None;
            }
        };
        let size = disk.size();
        assert!(size > 0 && size.is_multiple_of(SECTOR));
        let mut guest = Self {
            place,
            file,
            read_only,
            disk,
            limit: growth_limit(image, image.len() as u64, size),
            content: None,
        };
        if is_plain(image) && size <= COMPARED && format::problem(image).is_none() {
            let sectors = (0..size / SECTOR).map(|sector| guest.read(sector, 1).ok());
            let content = sectors.map(|bytes| bytes?.try_into().ok()).collect();
            guest.content = Some(content);
        }
        Some(guest)
    }

    fn buffers(&self, sectors: u64) -> [GuestSlice<'a>; 2] {
        // Not at a sector.
        let len = (sectors * SECTOR) as usize;
        let cut = len / 3;
        let ram = &self.place.ram;
        [(0, cut), (cut, len - cut)]
            .map(|(at, len)| ram.get_slice(GuestAddress(at as u64), len).unwrap())
    }

    fn read(&mut self, sector: u64, sectors: u64) -> io::Result<Vec<u8>> {
        let buffers = self.buffers(sectors);
        // What is not filled is seen.
        scatter(&[0xee; RAM], &buffers);
        self.disk.read_at(sector * SECTOR, &buffers)?;
        Ok(gather(&buffers))
    }

    fn step(&mut self, number: u8, step: &[u8]) {
        let &[kind, high, low, count] = step else {
            return;
        };
        let all = self.disk.size() / SECTOR;
        let place = u64::from(u16::from_be_bytes([high, low]));
        // Anywhere on a large disk.
        let sector = if all > 1 << 16 {
            place * (all >> 16)
        } else {
            place % all
        };
        let sectors = (1 + u64::from(count) % MOST_SECTORS).min(all - sector);
        let (offset, len) = (sector * SECTOR, sectors * SECTOR);
        let properties = self.disk.properties();
        match kind % 8 {
            0 | 1 => {
                if let Ok(bytes) = self.read(sector, sectors) {
                    self.compare(sector, &bytes);
                }
            }
            2 | 3 if !self.read_only => {
                let buffers = self.buffers(sectors);
                let bytes = [number.wrapping_mul(2) | 1; RAM];
                scatter(&bytes[..len as usize], &buffers);
                let result = self.disk.write_at(offset, &buffers);
                let now = [bytes[0]; SECTOR as usize];
                self.note(sector, sectors, result.ok().map(|()| now));
            }
            4 if !self.read_only && properties.discard => {
                let _ = self.disk.discard(offset, len);
                self.note(sector, sectors, None);
            }
            5 if !self.read_only && properties.write_zeroes => {
                let result = self.disk.write_zeroes(offset, len, count & 0x80 != 0);
                self.note(sector, sectors, result.ok().map(|()| [0; SECTOR as usize]));
            }
            6 => self.reopen(),
            _ => drop(self.disk.flush()),
        }
    }

    /// Notes what is in some sectors.
    fn note(&mut self, sector: u64, sectors: u64, now: Option<[u8; SECTOR as usize]>) {
        if let Some(content) = &mut self.content {
            content[sector as usize..][..sectors as usize].fill(now);
        }
    }

    /// Compares sectors that were read with what they should be.
    fn compare(&self, sector: u64, bytes: &[u8]) {
        let Some(content) = &self.content else {
            return;
        };
        let content = &content[sector as usize..];
        for (number, (found, known)) in bytes.chunks(SECTOR as usize).zip(content).enumerate() {
            if let Some(known) = known {
                let sector = sector + number as u64;
                assert!(found == known, "sector {sector} is not what it was");
            }
        }
    }

    /// Closes the image and opens it again.
    fn reopen(&mut self) {
        // An image that is closed with errors may be one that is refused.
        let flushed = self.disk.flush();
        let other = open(self.place, &self.file, self.read_only);
        match (other, flushed, &self.content) {
            (Ok(disk), ..) => {
                let mut header = [0; HEADER];
                let _ = self.file.read_at(&mut header, 0).unwrap();
                self.limit = growth_limit(&header, len(&self.file), disk.size());
                self.disk = disk;
            }
            (Err(error), Ok(()), Some(_)) => panic!("it cannot be opened again: {error}"),
            _ => {}
        }
    }

    /// What has to hold whatever was done.
    fn end(mut self, image: &[u8]) {
        let flushed = self.disk.flush();
        let size = self.disk.size();
        drop(self.disk);
        let mut now = vec![0; FIXED];
        self.file.read_exact_at(&mut now, 0).unwrap();
        assert_eq!(now, image[..FIXED], "the header has changed");
        let (len, most) = (len(&self.file), self.limit);
        assert!(len <= most, "the file has grown to {len}, not {most} bytes");
        if self.content.is_none() || flushed.is_err() {
            return;
        }
        let mut now = vec![0; len as usize];
        self.file.read_exact_at(&mut now, 0).unwrap();
        assert_eq!(format::problem(&now), None);
        self.disk = open(self.place, &self.file, true).unwrap();
        for sector in 0..size / SECTOR {
            if let Ok(bytes) = self.read(sector, 1) {
                self.compare(sector, &bytes);
            }
        }
    }
}

fn open(
    place: &Place,
    file: &File,
    read_only: bool,
) -> Result<Qcow2File, kiln_devices::virtio::block::Qcow2Error> {
    let path: PathBuf = place.folder.path().join("image");
    let backing = BackingFiles::Only(vec![place.folder.path().join("base")]);
    Qcow2File::from_file(file.try_clone().unwrap(), path, read_only, &backing)
}

fn len(file: &File) -> u64 {
    file.metadata().unwrap().len()
}

fn number(image: &[u8], at: usize, len: usize) -> u64 {
    let bytes = image.get(at..at + len).unwrap_or(&[]);
    bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Whether an image is one that [`format::problem`] is for, and small enough.
fn is_plain(image: &[u8]) -> bool {
    let version = number(image, 4, 4);
    let (cluster_bits, l1_entries) = (number(image, 20, 4), number(image, 36, 4));
    let (table_clusters, order) = (number(image, 56, 4), number(image, 96, 4));
    version == 3
        && cluster_bits <= 12
        && l1_entries <= 64
        && table_clusters <= 2
        && (3..=6).contains(&order)
}

/// What a file may grow to while it is open: by the disk once more, with its tables.
fn growth_limit(image: &[u8], len: u64, size: u64) -> u64 {
    let cluster_bits = number(image, 20, 4);
    let parts = [
        len,
        size,
        size / 16,
        number(image, 56, 4) << cluster_bits,
        1 << (cluster_bits + 6),
    ];
    parts.into_iter().fold(0, u64::saturating_add)
}
