//! Disks of machines that are killed, and of hosts that lose their power: what a driver has seen
//! flushed is there.
#![cfg(feature = "qcow2")]
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../src/virtio/block/qcow2/tests/format.rs"]
mod format;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_devices::virtio::block::{
    BackingFiles, Block, BlockBackend, BlockOptions, IoEngine, Qcow2File, RawFile, RawFileError,
};
use kiln_memory::{GuestSlice, MemoryOptions, allocate};
use kiln_virtio_device::testing::{Buffer, LONG, MockDriver, register};
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// How often a disk is killed, and how often one of the other kinds.
const KILLS: u64 = 30;
const FEW_KILLS: u64 = 10;
/// A disk of blocks that are written as a whole.
const BLOCK: usize = 4096;
const BLOCKS: u64 = 512;
const SIZE: u64 = BLOCKS * BLOCK as u64;

const FLUSH_FEATURE: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;
/// The offset of `writeback` in the configuration.
const WRITEBACK: u64 = 32;

/// One test at a time: a program that is being started has all files of this one, with their locks.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The block that the write with this number goes to.
fn place(write: u64) -> u64 {
    let mixed = write.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 32) % BLOCKS
}

/// What it writes: in each sector its number, and where it belongs.
fn content(write: u64) -> Vec<u8> {
    let sectors = (0..BLOCK as u64 / 512).flat_map(|sector| {
        let mut bytes = [write as u8; 512];
        bytes[..8].copy_from_slice(&write.to_le_bytes());
        bytes[8..16].copy_from_slice(&(place(write) * 8 + sector).to_le_bytes());
        bytes
    });
    sectors.collect()
}

/// A driver of a disk.
struct Driver(MockDriver);

const HEADER: u64 = 0x1000;
const STATUS: u64 = 0x1800;
const DATA: u64 = 0x20_0000;

impl Driver {
    fn new(backend: Box<dyn BlockBackend>, engine: IoEngine, features: u64) -> Self {
        let options = BlockOptions {
            engine,
            ..BlockOptions::default()
        };
        let block = Block::new(backend, options).unwrap();
        let mut driver = MockDriver::new(Box::new(block));
        driver.start(features, 64);
        Self(driver)
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.0.fill(HEADER, &header);
        self.0.fill(STATUS, &[0xee]);
        let mut buffers = vec![Buffer::readable(HEADER, 16)];
        buffers.extend_from_slice(data);
        buffers.push(Buffer::writable(STATUS, 1));
        self.0.request(0, &buffers);
        assert_eq!(self.0.bytes(STATUS, 1), [0], "request {kind} of {sector}");
    }

    fn write(&mut self, write: u64) {
        self.0.fill(DATA, &content(write));
        let data = [Buffer::readable(DATA, BLOCK as u32)];
        self.request(1, place(write) * 8, &data);
    }

    fn flush(&mut self) {
        self.request(4, 0, &[]);
    }
}

/// A kind of disk that is killed.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    /// The clusters of a qcow2 image, as a power of two; none for a raw image.
    cluster_bits: Option<u32>,
    engine: IoEngine,
    /// Whether the driver flushes; else each write has to last.
    flushes: bool,
}

const KINDS: [Kind; 6] = [
    Kind {
        name: "raw",
        cluster_bits: None,
        engine: IoEngine::IoUring,
        flushes: true,
    },
    Kind {
        name: "raw-sync",
        cluster_bits: None,
        engine: IoEngine::Sync,
        flushes: true,
    },
    Kind {
        name: "raw-write-through",
        cluster_bits: None,
        engine: IoEngine::Auto,
        flushes: false,
    },
    Kind {
        name: "qcow2",
        cluster_bits: Some(16),
        engine: IoEngine::Auto,
        flushes: true,
    },
    Kind {
        name: "qcow2-small-clusters",
        cluster_bits: Some(9),
        engine: IoEngine::Auto,
        flushes: true,
    },
    Kind {
        name: "qcow2-write-through",
        cluster_bits: Some(12),
        engine: IoEngine::Auto,
        flushes: false,
    },
];

impl Kind {
    fn named(name: &str) -> Self {
        *KINDS.iter().find(|kind| kind.name == name).unwrap()
    }

    fn create(self, folder: &Path) -> PathBuf {
        let path = folder.join(self.name);
        let image = match self.cluster_bits {
            Some(bits) => format::empty_image(bits, 4, SIZE),
            None => vec![0; SIZE as usize],
        };
        std::fs::write(&path, image).unwrap();
        path
    }

    fn open(self, path: &Path) -> Box<dyn BlockBackend> {
        match self.cluster_bits {
            Some(_) => Box::new(Qcow2File::open(path, false, &BackingFiles::Refuse).unwrap()),
            None => Box::new(open_raw(path)),
        }
    }
}

/// The kernel puts an io_uring of a process that was killed away some time after the process is
/// gone, and until then the image is open and locked.
fn open_raw(path: &Path) -> RawFile {
    let end = Instant::now() + LONG;
    loop {
        match RawFile::open(path, false) {
            Err(RawFileError::InUse { .. }) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(1));
            }
            result => return result.unwrap(),
        }
    }
}

const KIND: &str = "KILN_CRASH_KIND";
const IMAGE: &str = "KILN_CRASH_IMAGE";
const FIRST: &str = "KILN_CRASH_FIRST";

#[test]
#[ignore = "what the other tests start, and kill"]
fn the_program_that_is_killed() {
    let variable = |name| std::env::var(name).unwrap();
    let kind = Kind::named(&variable(KIND));
    let disk = kind.open(Path::new(&variable(IMAGE)));
    let features = if kind.flushes { FLUSH_FEATURE } else { 0 };
    let mut driver = Driver::new(disk, kind.engine, features);
    // What the test harness prints goes before.
    let mut report = io::stdout();
    report.write_all(b"begin\n").unwrap();
    for write in variable(FIRST).parse::<u64>().unwrap().. {
        driver.write(write);
        if kind.flushes {
            if !write.wrapping_mul(0x2545_f491_4f6c_dd1d).is_multiple_of(7) {
                continue;
            }
            driver.flush();
        }
        // Everything up to here lasts.
        report.write_all(&write.to_le_bytes()).unwrap();
        report.flush().unwrap();
    }
}

/// Starts the program, and kills it `delay` after its first report; gives the number of the last
/// write that it said lasts.
fn run_and_kill(kind: Kind, path: &Path, first: u64, delay: Duration) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_program_that_is_killed"])
        .args(["--ignored", "--nocapture", "--test-threads=1"])
        .env(KIND, kind.name)
        .env(IMAGE, path)
        .env(FIRST, first.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut reports = child.stdout.take().unwrap();
    let mut before = Vec::new();
    while !before.ends_with(b"begin\n") {
        let mut byte = [0];
        reports.read_exact(&mut byte).unwrap();
        before.push(byte[0]);
    }
    let mut last = [0; 8];
    reports.read_exact(&mut last).unwrap();
    std::thread::sleep(delay);
    kill(&mut child);
    let mut rest = Vec::new();
    reports.read_to_end(&mut rest).unwrap();
    // Half of a number was not reported.
    let whole = rest.chunks_exact(8).last();
    u64::from_le_bytes(whole.map_or(last, |bytes| bytes.try_into().unwrap()))
}

fn kill(child: &mut Child) {
    // It is SIGKILL.
    child.kill().unwrap();
    let status = child.wait().unwrap();
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    assert_eq!(signal, Some(9), "it ended before: {status}");
}

fn read_all(disk: &mut dyn BlockBackend) -> Vec<u8> {
    let regions = [(GuestAddress(0), SIZE as usize)];
    let ram = allocate(&regions, &MemoryOptions::default()).unwrap();
    let all = ram.get_slice(GuestAddress(0), SIZE as usize).unwrap();
    disk.read_at(0, &[all]).unwrap();
    kiln_memory::gather(&[ram.get_slice(GuestAddress(0), SIZE as usize).unwrap()])
}

/// The writes that each sector of a disk is known to hold, or later ones.
struct Known(Vec<u64>);

impl Known {
    /// Notes that everything from `first` to `last` lasts.
    fn lasts(&mut self, first: u64, last: u64) {
        for write in first..=last {
            for sector in 0..BLOCK / 512 {
                self.0[place(write) as usize * 8 + sector] = write;
            }
        }
    }

    /// Checks a disk, and notes what it holds.
    fn check(&mut self, what: &str, disk: &[u8]) {
        for (index, sector) in disk.chunks(512).enumerate() {
            let number = |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().unwrap());
            let write = number(0);
            let known = &mut self.0[index];
            assert!(
                write >= *known,
                "{what}: sector {index} has {write}, not {known}"
            );
            if write > 0 {
                assert_eq!(
                    number(8),
                    index as u64,
                    "{what}: write {write} is elsewhere"
                );
                let block = content(write);
                assert!(
                    sector == &block[index % 8 * 512..][..512],
                    "{what}: {write}"
                );
            }
            *known = write;
        }
    }
}

fn survives_kills(name: &str, kills: u64) {
    let _alone = alone();
    let kind = Kind::named(name);
    let folder = tempfile::tempdir().unwrap();
    let path = kind.create(folder.path());
    let mut known = Known(vec![0; (SIZE / 512) as usize]);
    let mut writes = 0;
    for round in 0..kills {
        let first = 1 + (round << 32);
        let delay = Duration::from_micros(round.wrapping_mul(0x9e37_79b9) % 20_000);
        let last = run_and_kill(kind, &path, first, delay);
        writes += last - first + 1;
        known.lasts(first, last);
        let what = format!("{name}, kill {round}");
        if kind.cluster_bits.is_some() {
            let image = std::fs::read(&path).unwrap();
            assert_eq!(format::problem(&image), None, "{what}");
        }
        known.check(&what, &read_all(&mut *kind.open(&path)));
        if round % 10 == 9 && kind.cluster_bits.is_some() {
            check_with_qemu(&path, &what);
            // A disk that is new now and then has more that is new.
            kind.create(folder.path());
            known.0.fill(0);
        }
    }
    println!("{name}: {kills} kills, {writes} writes that had to last");
}

/// QEMU finds no errors either, where it is installed. Clusters that nothing uses are no harm.
fn check_with_qemu(path: &Path, what: &str) {
    let output = Command::new("qemu-img")
        .args(["check", "-f", "qcow2"])
        .arg(path)
        .output();
    if let Ok(output) = output {
        let code = output.status.code();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(matches!(code, Some(0 | 3)), "{what}: {text}");
    }
}

#[test]
fn a_raw_disk_has_what_was_flushed_whenever_the_machine_is_killed() {
    survives_kills("raw", KILLS);
    survives_kills("raw-sync", KILLS);
    survives_kills("raw-write-through", FEW_KILLS);
}

#[test]
fn a_qcow2_disk_has_what_was_flushed_whenever_the_machine_is_killed() {
    survives_kills("qcow2", KILLS);
    survives_kills("qcow2-small-clusters", FEW_KILLS);
    survives_kills("qcow2-write-through", FEW_KILLS);
}

/// A disk of a host that may lose its power: what was not flushed is then gone.
#[derive(Clone, Default)]
struct Volatile(Arc<Mutex<Halves>>);

#[derive(Default)]
struct Halves {
    cache: BTreeMap<u64, Vec<u8>>,
    platter: BTreeMap<u64, Vec<u8>>,
}

impl Volatile {
    /// What is there when power comes back.
    fn platter(&self) -> BTreeMap<u64, Vec<u8>> {
        self.0.lock().unwrap().platter.clone()
    }
}

impl BlockBackend for Volatile {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_at(&mut self, _: u64, _: &[GuestSlice<'_>]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        let bytes = kiln_memory::gather(buffers);
        self.0.lock().unwrap().cache.insert(offset, bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let halves = &mut *self.0.lock().unwrap();
        halves.platter.append(&mut halves.cache);
        Ok(())
    }
}

#[test]
fn what_a_driver_has_seen_to_last_survives_a_loss_of_power() {
    let disk = Volatile::default();
    let mut driver = Driver::new(
        Box::new(disk.clone()),
        IoEngine::Auto,
        FLUSH_FEATURE | CONFIG_WCE,
    );
    let mut expected = BTreeMap::new();
    let mut pending = BTreeMap::new();
    let mut lasting = false;
    for write in 1..600 {
        driver.write(write);
        pending.insert(place(write) * BLOCK as u64, content(write));
        match write % 13 {
            0 => driver.flush(),
            // The driver turns the cache off, and on again.
            5 | 9 => {
                lasting = write % 13 == 5;
                driver
                    .0
                    .write(register::CONFIG + WRITEBACK, u32::from(!lasting));
            }
            _ => {}
        }
        if lasting || write % 13 == 0 {
            expected.append(&mut pending);
        }
        // Losing power now leaves what had to last, and it may leave more.
        let platter = disk.platter();
        for (offset, bytes) in &expected {
            let newer = pending.get(offset);
            let found = &platter[offset];
            assert!(
                found == bytes || Some(found) == newer,
                "write {write} at {offset}"
            );
        }
    }
    // The test would see it if nothing were flushed.
    assert!(expected.len() > 300 && disk.platter().len() <= BLOCKS as usize);
    assert!(!pending.is_empty(), "nothing is volatile");
    assert_ne!(
        disk.platter().get(pending.first_key_value().unwrap().0),
        pending.values().next()
    );
}
