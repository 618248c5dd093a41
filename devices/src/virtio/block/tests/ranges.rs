//! Requests to discard and to write zeros.

use super::*;

const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;

/// A request with these ranges: sector, sectors, flags.
fn request_ranges(driver: &mut MockDriver, kind: u32, ranges: &[(u64, u32, u32)]) -> (u8, u32) {
    let mut bytes = Vec::new();
    for (sector, sectors, flags) in ranges {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    driver.fill(DATA, &bytes);
    request_with(
        driver,
        kind,
        0,
        &[Buffer::readable(DATA, bytes.len() as u32)],
    )
}

/// A disk of a mebibyte in this folder.
fn large(folder: &str) -> (MockDriver, NamedTempFile) {
    let image = NamedTempFile::new_in(folder).unwrap();
    image.as_file().write_all_at(&[7; 1 << 20], 0).unwrap();
    let driver = driver_of(RawFile::open(image.path(), false).unwrap());
    (driver, image)
}

#[test]
fn what_is_discarded_makes_the_file_smaller() {
    use std::os::unix::fs::MetadataExt;
    let (mut driver, image) = large("/dev/shm");
    assert_ne!(driver.offered() & 1 << 13, 0);
    let before = image.as_file().metadata().unwrap().blocks();
    let ranges = [(0, 512, 0), (1024, 0, 0), (1024, 512, 0)];
    assert_eq!(request_ranges(&mut driver, DISCARD, &ranges), (OK, 1));
    let after = image.as_file().metadata().unwrap().blocks();
    assert_eq!(before - after, 1024);
    let content = contents(image.path());
    assert_eq!(content.len(), 1 << 20);
    for (sector, bytes) in content.chunks(512).enumerate() {
        let discarded = sector < 512 || (1024..1536).contains(&sector);
        assert_eq!(bytes, [if discarded { 0 } else { 7 }; 512], "{sector}");
    }
}

#[test]
fn zeros_are_written_whether_or_not_the_file_may_become_smaller() {
    for folder in ["/tmp", "/dev/shm"] {
        let (mut driver, image) = large(folder);
        let ranges = [(3, 5, 0), (16, 16, UNMAP), (2047, 1, 0)];
        assert_eq!(request_ranges(&mut driver, WRITE_ZEROES, &ranges), (OK, 1));
        for (sector, bytes) in contents(image.path()).chunks(512).enumerate() {
            let zero = (3..8).contains(&sector) || (16..32).contains(&sector) || sector == 2047;
            assert_eq!(bytes, [if zero { 0 } else { 7 }; 512], "{folder} {sector}");
        }
    }
}

#[test]
fn a_request_with_one_bad_range_does_nothing() {
    let (mut driver, image) = large("/dev/shm");
    let last = (1 << 20) / 512;
    for kind in [DISCARD, WRITE_ZEROES] {
        for (bad, status) in [
            ((last, 1, 0), IO_ERROR),
            ((last - 1, 2, 0), IO_ERROR),
            ((u64::MAX, 1, 0), IO_ERROR),
            ((u64::MAX, u32::MAX, 0), IO_ERROR),
            ((0, u32::MAX, 0), IO_ERROR),
            ((1 << 63, 0, 0), IO_ERROR),
            ((0, 1, 2), UNSUPPORTED),
            ((0, 1, 0x8000_0000), UNSUPPORTED),
            ((0, 1, u32::MAX), UNSUPPORTED),
        ] {
            let ranges = [(0, 8, 0), bad, (8, 8, 0)];
            let answer = request_ranges(&mut driver, kind, &ranges);
            assert_eq!(answer, (status, 1), "{kind} {bad:?}");
        }
    }
    // To discard is to unmap, and not to be said.
    let answer = request_ranges(&mut driver, DISCARD, &[(0, 8, UNMAP)]);
    assert_eq!(answer, (UNSUPPORTED, 1));
    assert!(contents(image.path()).iter().all(|byte| *byte == 7));
}

#[test]
fn a_list_of_ranges_has_a_length() {
    let (mut driver, image) = large("/dev/shm");
    for kind in [DISCARD, WRITE_ZEROES] {
        driver.fill(DATA, &[0; 4096]);
        for len in [0, 1, 15, 17, 31, 16 * 17, 4096, 8 << 20] {
            let data = Buffer::readable(DATA, len);
            let answer = request_with(&mut driver, kind, 0, &[data]);
            assert_eq!(answer, (IO_ERROR, 1), "{kind} {len}");
        }
        // Of nothing, but as many as there can be; and a writable buffer is not for the device.
        let nothing = [(0, 0, 0); 16];
        assert_eq!(request_ranges(&mut driver, kind, &nothing), (OK, 1));
        let data = Buffer::writable(DATA, 16);
        assert_eq!(request_with(&mut driver, kind, 0, &[data]), (IO_ERROR, 1));
    }
    assert!(contents(image.path()).iter().all(|byte| *byte == 7));
}

#[test]
fn a_range_may_be_cut_at_any_byte() {
    for cut in 0..=32 {
        let (mut driver, image) = large("/dev/shm");
        let mut bytes = Vec::new();
        for sector in [8_u64, 40] {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(8_u64.to_le_bytes());
        }
        driver.fill(0x5000, &bytes[..cut]);
        driver.fill(0x4000, &bytes[cut..]);
        let data = [
            Buffer::readable(0x5000, cut as u32),
            Buffer::readable(0x4000, 32 - cut as u32),
        ];
        assert_eq!(request_with(&mut driver, DISCARD, 0, &data), (OK, 1));
        for (sector, bytes) in contents(image.path()).chunks(512).enumerate() {
            let gone = (8..16).contains(&sector) || (40..48).contains(&sector);
            assert_eq!(bytes[0], if gone { 0 } else { 7 }, "{cut} {sector}");
        }
    }
}

#[test]
fn a_disk_that_can_do_neither_offers_neither() {
    let image = image(SECTORS);
    let before = contents(image.path());
    let read_only = driver_of(RawFile::open(image.path(), true).unwrap());
    for mut driver in [read_only, driver_of(Faulty::default())] {
        assert_eq!(driver.offered() & (1 << 13 | 1 << 14), 0);
        let mut config = [0xff; 24];
        driver.config(36, &mut config);
        assert_eq!(config, [0; 24]);
        for kind in [DISCARD, WRITE_ZEROES] {
            let answer = request_ranges(&mut driver, kind, &[(0, 8, 0)]);
            assert_eq!(answer, (UNSUPPORTED, 1));
        }
    }
    assert_eq!(contents(image.path()), before);
}

#[test]
fn they_are_counted_and_zeros_last_where_writes_do() {
    struct Able(Faulty);
    impl BlockBackend for Able {
        fn size(&self) -> u64 {
            1 << 20
        }
        fn read_at(&mut self, at: u64, to: &[GuestSlice<'_>]) -> io::Result<()> {
            self.0.read_at(at, to)
        }
        fn write_at(&mut self, at: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
            self.0.write_at(at, from)
        }
        fn flush(&mut self) -> io::Result<()> {
            self.0.flush()
        }
        fn properties(&self) -> BlockProperties {
            BlockProperties {
                discard: true,
                write_zeroes: true,
                ..BlockProperties::default()
            }
        }
        fn discard(&mut self, _: u64, _: u64) -> io::Result<()> {
            self.0.result("discard")
        }
        fn write_zeroes(&mut self, _: u64, _: u64, _: bool) -> io::Result<()> {
            self.0.result("zeroes")
        }
    }
    let faulty = Faulty::default();
    let block = Block::new(Able(faulty.clone()), BlockOptions::default()).unwrap();
    let counters = block.counters();
    let mut driver = MockDriver::new(Box::new(block));
    // A driver that does not flush.
    driver.start(0, 64);
    let ranges = [(0, 8, 0), (8, 0, 0), (16, 1, 0)];
    assert_eq!(request_ranges(&mut driver, DISCARD, &ranges), (OK, 1));
    assert_eq!(*faulty.log.lock().unwrap(), ["discard", "discard"]);
    assert_eq!(request_ranges(&mut driver, WRITE_ZEROES, &ranges), (OK, 1));
    assert_eq!(
        faulty.log.lock().unwrap()[2..],
        ["zeroes", "zeroes", "flush"]
    );
    faulty.fail.store(true, Ordering::SeqCst);
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(request_ranges(&mut driver, kind, &ranges), (IO_ERROR, 1));
    }
    let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!(get(&counters.discards), 1);
    assert_eq!(get(&counters.discard_bytes), 9 * 512);
    assert_eq!(get(&counters.write_zeroes), 1);
    assert_eq!(get(&counters.write_zeroes_bytes), 9 * 512);
    assert_eq!(get(&counters.errors), 2);
    let latencies = [&counters.discard_latency, &counters.write_zeroes_latency];
    for latency in latencies {
        let buckets = latency.snapshot().buckets;
        assert_eq!(buckets.iter().map(|bucket| bucket.1).sum::<u64>(), 2);
    }
}
