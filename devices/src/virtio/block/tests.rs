use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_memory::GuestSlice;
use kiln_virtio_device::testing::{Buffer, MockDriver, register};
use tempfile::NamedTempFile;

mod control;
mod engines;
mod hostile;
mod limits;
mod ranges;

use super::*;
use crate::virtio::LatencySnapshot;
use crate::virtio::hostile::Random;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
const NO_STATUS: u8 = 0xee;

const HEADER: u64 = 0x1000;
const STATUS: u64 = 0x1800;
const DATA: u64 = 0x20_0000;
const TABLE: u64 = 0x8000;

const FLUSH_FEATURE: u64 = 1 << 9;
const SECTORS: u64 = 64;

fn image(sectors: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..sectors * 512)
        .map(|at| (at / 512 * 3 + at) as u8)
        .collect();
    file.as_file().write_all_at(&bytes, 0).unwrap();
    file
}

fn contents(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

fn driver_of(backend: impl BlockBackend) -> MockDriver {
    let block = Block::new(backend, BlockOptions::default()).unwrap();
    let mut driver = MockDriver::new(Box::new(block));
    driver.start(FLUSH_FEATURE, 64);
    driver
}

fn disk(sectors: u64) -> (MockDriver, NamedTempFile) {
    let image = image(sectors);
    (
        driver_of(RawFile::open(image.path(), false).unwrap()),
        image,
    )
}

fn set_header(driver: &MockDriver, kind: u32, sector: u64) {
    driver.fill(HEADER, &kind.to_le_bytes());
    driver.fill(HEADER + 4, &[0; 4]);
    driver.fill(HEADER + 8, &sector.to_le_bytes());
}

/// A request with data in one buffer; gives the status and the used length.
fn request(driver: &mut MockDriver, kind: u32, sector: u64, len: u32) -> (u8, u32) {
    let data = Buffer {
        address: DATA,
        len,
        writable: kind != WRITE,
    };
    request_with(driver, kind, sector, &[data])
}

fn request_with(driver: &mut MockDriver, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
    set_header(driver, kind, sector);
    let mut buffers = vec![Buffer::readable(HEADER, 16)];
    buffers.extend_from_slice(data);
    buffers.push(Buffer::writable(STATUS, 1));
    send(driver, &buffers)
}

fn send(driver: &mut MockDriver, buffers: &[Buffer]) -> (u8, u32) {
    driver.fill(STATUS, &[NO_STATUS]);
    let used = driver.request(0, buffers);
    (driver.bytes(STATUS, 1)[0], used)
}

#[test]
fn what_is_written_is_on_the_disk_and_read_back() {
    let (mut driver, image) = disk(SECTORS);
    let before = contents(image.path());
    assert_eq!(request(&mut driver, READ, 3, 1024), (OK, 1025));
    assert_eq!(driver.bytes(DATA, 1024), before[3 * 512..5 * 512]);
    driver.fill(DATA, &[0xa5; 1536]);
    assert_eq!(request(&mut driver, WRITE, 61, 1536), (OK, 1));
    assert_eq!(request(&mut driver, FLUSH, 0, 0), (OK, 1));
    let after = contents(image.path());
    assert_eq!(after.len(), before.len());
    assert_eq!(after[..61 * 512], before[..61 * 512]);
    assert!(after[61 * 512..].iter().all(|byte| *byte == 0xa5));
    driver.fill(DATA, &[0; 1536]);
    assert_eq!(request(&mut driver, READ, 61, 1536), (OK, 1537));
    assert_eq!(driver.bytes(DATA, 1536), [0xa5; 1536]);
}

#[test]
fn a_request_may_be_cut_at_any_byte() {
    let (mut driver, image) = disk(SECTORS);
    let expected = contents(image.path())[512..1024].to_vec();
    for cut in 0..=16 {
        // The header in two pieces, in an order of memory that no accident gets right.
        set_header(&driver, READ, 1);
        let header = driver.bytes(HEADER, 16);
        driver.fill(0x5000, &header[..cut]);
        driver.fill(0x4000, &header[cut..]);
        driver.fill(DATA, &[0; 600]);
        let buffers = [
            Buffer::readable(0x5000, cut as u32),
            Buffer::readable(0x4000, 16 - cut as u32),
            Buffer::writable(DATA, 512),
            Buffer::writable(STATUS, 1),
        ];
        assert_eq!(send(&mut driver, &buffers), (OK, 513));
        assert_eq!(driver.bytes(DATA, 512), expected);
    }
    for cut in 0..=513 {
        // Data and status in two pieces: the status is the last byte of the second.
        driver.fill(DATA, &[NO_STATUS; 1100]);
        set_header(&driver, READ, 1);
        let buffers = [
            Buffer::readable(HEADER, 16),
            Buffer::writable(DATA, cut),
            Buffer::writable(DATA + 550, 513 - cut),
        ];
        assert_eq!(driver.request(0, &buffers), 513);
        let mut found = driver.bytes(DATA, cut as usize);
        found.extend(driver.bytes(DATA + 550, 513 - cut as usize));
        assert_eq!(found[..512], expected);
        assert_eq!(found[512], OK);
        assert_eq!(driver.bytes(DATA + 1063, 1), [NO_STATUS]);
    }
    // The header, data to write, all in one buffer.
    set_header(&driver, WRITE, 2);
    driver.fill(HEADER + 16, &[7; 512]);
    let buffers = [Buffer::readable(HEADER, 528), Buffer::writable(STATUS, 1)];
    assert_eq!(send(&mut driver, &buffers), (OK, 1));
    assert_eq!(contents(image.path())[1024..1536], [7; 512]);
}

#[test]
fn a_request_of_very_many_pieces_arrives_in_order() {
    let (mut driver, image) = disk(SECTORS);
    // 1022 buffers of 16 bytes, from high to low addresses, in an indirect table.
    let count = 1022 / 32 * 32;
    let expected = contents(image.path());
    let mut buffers = vec![Buffer::readable(HEADER, 16)];
    buffers.extend((0..count).map(|at| Buffer::writable(DATA + 32 * (count - at), 16)));
    buffers.push(Buffer::writable(STATUS, 1));
    set_header(&driver, READ, 0);
    let head = driver.queues[0].indirect(&driver.memory, TABLE, &buffers);
    driver.queues[0].make_available(&driver.memory, head);
    driver.notify(0);
    let (_, used) = driver.queues[0].wait_used(&driver.memory);
    assert_eq!(used as u64, count * 16 + 1);
    for at in 0..count {
        let found = driver.bytes(DATA + 32 * (count - at), 16);
        assert_eq!(found, expected[16 * at as usize..16 * (at as usize + 1)]);
    }
}

#[test]
fn only_sectors_that_the_disk_has_are_reached() {
    let (mut driver, image) = disk(SECTORS);
    let before = contents(image.path());
    let last = SECTORS - 1;
    for kind in [READ, WRITE] {
        for (sector, len) in [
            (SECTORS, 512),
            (last, 1024),
            (0, 512 * SECTORS as u32 + 512),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (u64::MAX / 512 + 1, 512),
            (1 << 55, 512),
            (1 << 63, 512),
        ] {
            assert_eq!(
                request(&mut driver, kind, sector, len),
                (IO_ERROR, 1),
                "{sector} {len}"
            );
        }
        for len in [0, 1, 511, 513, 1023] {
            assert_eq!(request(&mut driver, kind, 0, len), (IO_ERROR, 1), "{len}");
        }
    }
    assert_eq!(contents(image.path()), before);
    assert_eq!(request(&mut driver, READ, last, 512), (OK, 513));
    assert_eq!(
        request(&mut driver, READ, 0, 512 * SECTORS as u32),
        (OK, 512 * SECTORS as u32 + 1)
    );
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let image = image(SECTORS);
    let before = contents(image.path());
    let mut driver = driver_of(RawFile::open(image.path(), true).unwrap());
    assert_ne!(driver.offered() & 1 << 5, 0);
    assert_eq!(request(&mut driver, WRITE, 0, 512), (IO_ERROR, 1));
    assert_eq!(request(&mut driver, FLUSH, 0, 0), (OK, 1));
    assert_eq!(request(&mut driver, READ, 0, 512), (OK, 513));
    drop(driver);
    assert_eq!(contents(image.path()), before);
    let (driver, _image) = disk(SECTORS);
    assert_eq!(driver.offered() & 1 << 5, 0);
}

#[test]
fn the_driver_gets_the_id_that_was_given() {
    let image = image(1);
    let options = |id: &str| BlockOptions {
        id: Some(id.to_owned()),
        ..BlockOptions::default()
    };
    let open = || RawFile::open(image.path(), false).unwrap();
    for id in ["r", "root", "exactly twenty bytes"] {
        let block = Block::new(open(), options(id)).unwrap();
        let mut driver = MockDriver::new(Box::new(block));
        driver.start(0, 64);
        driver.fill(DATA, &[0xff; 32]);
        assert_eq!(request(&mut driver, GET_ID, 0, 20), (OK, 21));
        let mut expected = [0; 20];
        expected[..id.len()].copy_from_slice(id.as_bytes());
        assert_eq!(driver.bytes(DATA, 20), expected);
        assert_eq!(driver.bytes(DATA + 20, 12), [0xff; 12]);
        assert_eq!(request(&mut driver, GET_ID, 0, 19), (IO_ERROR, 1));
    }
    for id in ["", "more than twenty byte", "new\nline", "ü"] {
        let error = Block::new(open(), options(id)).unwrap_err();
        assert!(matches!(error, BlockError::Id { .. }), "{error}");
    }
    let mut driver = driver_of(open());
    request(&mut driver, GET_ID, 0, 20);
    assert_ne!(driver.bytes(DATA, 1), [0], "a disk has an id by default");
}

#[test]
fn what_is_not_known_is_unsupported() {
    let (mut driver, _image) = disk(SECTORS);
    for kind in [2, 3, 5, 14, 24, 0x8000_0000, u32::MAX] {
        assert_eq!(request(&mut driver, kind, 0, 512), (UNSUPPORTED, 1));
    }
}

#[test]
fn a_chain_that_is_no_request_is_answered_as_far_as_it_can_be() {
    let (mut driver, image) = disk(SECTORS);
    let before = contents(image.path());
    for len in [0, 1, 15] {
        let buffers = [Buffer::readable(HEADER, len), Buffer::writable(STATUS, 1)];
        set_header(&driver, FLUSH, 0);
        assert_eq!(send(&mut driver, &buffers), (IO_ERROR, 1));
    }
    // No byte to write an answer to.
    set_header(&driver, WRITE, 0);
    let buffers = [Buffer::readable(HEADER, 16), Buffer::readable(DATA, 512)];
    assert_eq!(send(&mut driver, &buffers), (NO_STATUS, 0));
    // The data the wrong way round: to be read, but for the device to read; and vice versa.
    set_header(&driver, READ, 0);
    let buffers = [
        Buffer::readable(HEADER, 16),
        Buffer::readable(DATA, 512),
        Buffer::writable(STATUS, 1),
    ];
    assert_eq!(send(&mut driver, &buffers), (IO_ERROR, 1));
    set_header(&driver, WRITE, 0);
    let buffers = [
        Buffer::readable(HEADER, 16),
        Buffer::writable(DATA, 512),
        Buffer::writable(STATUS, 1),
    ];
    assert_eq!(send(&mut driver, &buffers), (IO_ERROR, 1));
    assert_eq!(contents(image.path()), before);
}

#[test]
fn a_chain_of_buffers_that_are_not_ram_makes_the_device_need_a_reset() {
    let (mut driver, _image) = disk(SECTORS);
    for (address, len) in [
        (MockDriver::HOLE, 512),
        (MockDriver::HOLE - 1, 512),
        (MockDriver::END - 511, 512),
        (u64::MAX - 511, 512),
        (u64::MAX, u32::MAX),
        (0, u32::MAX),
    ] {
        set_header(&driver, READ, 0);
        let buffers = [
            Buffer::readable(HEADER, 16),
            Buffer::writable(address, len),
            Buffer::writable(STATUS, 1),
        ];
        driver.queues[0].add(&driver.memory, &buffers);
        driver.notify(0);
        driver.wait_needs_reset();
        driver.start(FLUSH_FEATURE, 64);
        assert_eq!(request(&mut driver, READ, 0, 512), (OK, 513));
    }
}

/// A disk that fails when told to, and counts.
#[derive(Clone, Default)]
struct Faulty {
    fail: Arc<AtomicBool>,
    flushes: Arc<AtomicUsize>,
    log: Arc<Mutex<Vec<&'static str>>>,
}

impl Faulty {
    fn result(&self, what: &'static str) -> io::Result<()> {
        self.log.lock().unwrap().push(what);
        match self.fail.load(Ordering::SeqCst) {
            true => Err(io::Error::other("as the test asked")),
            false => Ok(()),
        }
    }
}

impl BlockBackend for Faulty {
    fn size(&self) -> u64 {
        1 << 40
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_at(&mut self, _: u64, _: &[GuestSlice<'_>]) -> io::Result<()> {
        self.result("read")
    }
    fn write_at(&mut self, _: u64, _: &[GuestSlice<'_>]) -> io::Result<()> {
        self.result("write")
    }
    fn flush(&mut self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.result("flush")
    }
}

#[test]
fn an_error_of_the_disk_is_that_requests_error_and_no_more() {
    let faulty = Faulty::default();
    let block = Block::new(faulty.clone(), BlockOptions::default()).unwrap();
    let counters = block.counters();
    let mut driver = MockDriver::new(Box::new(block));
    driver.start(FLUSH_FEATURE, 64);
    faulty.fail.store(true, Ordering::SeqCst);
    for (kind, len) in [(READ, 512), (WRITE, 512), (FLUSH, 0)] {
        assert_eq!(request(&mut driver, kind, 0, len), (IO_ERROR, 1));
    }
    assert_eq!(counters.errors.load(Ordering::Relaxed), 3);
    faulty.fail.store(false, Ordering::SeqCst);
    assert_eq!(request(&mut driver, READ, 1 << 30, 512), (OK, 513));
    assert_eq!(request(&mut driver, WRITE, 0, 4096), (OK, 1));
    assert_eq!(request(&mut driver, FLUSH, 0, 0), (OK, 1));
    assert_eq!(counters.errors.load(Ordering::Relaxed), 3);
    assert_eq!(counters.read_bytes.load(Ordering::Relaxed), 512);
    assert_eq!(counters.write_bytes.load(Ordering::Relaxed), 4096);
    assert_eq!(counters.flushes.load(Ordering::Relaxed), 1);
    // A request larger than the limits allow is one too, before the disk sees it.
    faulty.log.lock().unwrap().clear();
    let data = [Buffer::writable(0, 16 << 20); 16];
    assert_eq!(request_with(&mut driver, READ, 0, &data), (IO_ERROR, 1));
    assert!(faulty.log.lock().unwrap().is_empty());
}

#[test]
fn every_write_lasts_where_the_driver_does_not_flush() {
    for (features, flushes) in [(FLUSH_FEATURE, 0), (0, 2)] {
        let faulty = Faulty::default();
        let mut driver = driver_of(faulty.clone());
        driver.start(features, 64);
        assert_eq!(request(&mut driver, WRITE, 0, 512), (OK, 1));
        assert_eq!(request(&mut driver, WRITE, 1, 512), (OK, 1));
        assert_eq!(faulty.flushes.load(Ordering::SeqCst), flushes);
    }
}

#[test]
fn the_time_that_the_disk_takes_is_counted_by_the_kind_of_request() {
    struct Slow(Faulty);
    const DELAY: Duration = Duration::from_millis(5);
    impl BlockBackend for Slow {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn is_read_only(&self) -> bool {
            false
        }
        fn read_at(&mut self, at: u64, to: &[GuestSlice<'_>]) -> io::Result<()> {
            self.0.read_at(at, to)
        }
        fn write_at(&mut self, at: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
            std::thread::sleep(DELAY);
            self.0.write_at(at, from)
        }
        fn flush(&mut self) -> io::Result<()> {
            self.0.flush()
        }
    }
    let faulty = Faulty::default();
    let block = Block::new(Slow(faulty.clone()), BlockOptions::default()).unwrap();
    let counters = block.counters();
    let mut driver = MockDriver::new(Box::new(block));
    // Without the feature a write brings a flush with it.
    driver.start(0, 64);
    for (kind, len, count) in [
        (READ, 512, 5),
        (WRITE, 512, 3),
        (FLUSH, 0, 2),
        (GET_ID, 20, 1),
    ] {
        (0..count).for_each(|_| assert_eq!(request(&mut driver, kind, 0, len).0, OK));
    }
    // One that the disk is asked for and fails is counted, one that it never sees is not.
    faulty.fail.store(true, Ordering::SeqCst);
    assert_eq!(request(&mut driver, READ, 0, 512), (IO_ERROR, 1));
    assert_eq!(request(&mut driver, READ, u64::MAX, 512), (IO_ERROR, 1));
    let [read, write, flush] = [
        &counters.read_latency,
        &counters.write_latency,
        &counters.flush_latency,
    ]
    .map(|latency| latency.snapshot());
    let count = |snapshot: &LatencySnapshot| snapshot.buckets.iter().map(|b| b.1).sum::<u64>();
    assert_eq!([&read, &write, &flush].map(count), [6, 3, 5]);
    assert!(write.sum_ns >= 3 * DELAY.as_nanos() as u64);
    let quick = |(bound, _): &&(Option<u64>, u64)| bound.is_some_and(|b| b < 5_000_000);
    let quick_writes = write.buckets.iter().filter(quick).map(|bucket| bucket.1);
    assert_eq!(quick_writes.sum::<u64>(), 0);
    assert_eq!(counters.ids.load(Ordering::Relaxed), 1);
    assert_eq!(counters.errors.load(Ordering::Relaxed), 2);
}

#[test]
fn the_configuration_describes_the_disk() {
    let (driver, _image) = disk(SECTORS);
    let mut config = [0xff; 64];
    driver.config(0, &mut config);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(word(8), 1 << 20);
    assert_eq!(word(12), 254);
    assert_eq!(word(16), 0);
    assert_eq!(word(20), 512);
    assert_eq!(config[24..28], [3, 0, 8, 0]);
    assert_eq!(word(28), 0);
    assert_eq!(config[32..36], [1, 0, 1, 0]);
    // To discard: at most 4 GiB in each of 16 ranges of whole blocks of the file system.
    assert_eq!((word(36), word(40)), (8 << 20, 16));
    assert!(word(44) >= 8 && word(44).is_power_of_two());
    // Zeros: 64 MiB in each of 16 ranges.
    assert_eq!((word(48), word(52)), (128 << 10, 16));
    assert_eq!(config[56..], [1, 0, 0, 0, 0, 0, 0, 0]);
    driver.write(register::QUEUE_SEL, 0);
    assert_eq!(driver.read(register::QUEUE_SIZE_MAX), 256);
    // The driver cannot change it.
    driver.write(register::CONFIG, 1);
    driver.config(0, &mut config[..8]);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
}

#[test]
fn a_disk_behaves_like_a_disk_whatever_the_shape_of_the_requests() {
    let (mut driver, image) = disk(SECTORS);
    let mut model = contents(image.path());
    let mut random = Random::new(1);
    for round in 0..400 {
        let sectors = 1 + random.below(9);
        let sector = random.below(SECTORS - sectors + 1);
        let range = (sector * 512) as usize..((sector + sectors) * 512) as usize;
        let write = random.below(2) == 0;
        // Cut the data into buffers in random places, each in a page of its own.
        let mut data = Vec::new();
        let mut left = sectors * 512;
        while left > 0 {
            let len = if data.len() == 10 {
                left
            } else {
                1 + random.below(left)
            };
            let address = DATA + 0x2000 * data.len() as u64 + random.below(64);
            data.push(Buffer {
                address,
                len: len as u32,
                writable: !write,
            });
            left -= len;
        }
        if write {
            for buffer in &data {
                let bytes: Vec<u8> = (0..buffer.len).map(|_| random.next() as u8).collect();
                driver.fill(buffer.address, &bytes);
            }
        }
        let kind = if write { WRITE } else { READ };
        let used = if write { 1 } else { sectors as u32 * 512 + 1 };
        assert_eq!(
            request_with(&mut driver, kind, sector, &data),
            (OK, used),
            "round {round}"
        );
        let moved: Vec<u8> = data
            .iter()
            .flat_map(|buffer| driver.bytes(buffer.address, buffer.len as usize))
            .collect();
        if write {
            model[range].copy_from_slice(&moved);
        } else {
            assert_eq!(moved, model[range], "round {round}");
        }
        if random.below(50) == 0 {
            driver.transport.pause();
            driver.transport.resume();
        }
    }
    assert_eq!(contents(image.path()), model);
}
