//! The same disks with each engine, and requests that are under way when something happens.

use kiln_virtio_device::testing::{InterruptRecorder, wait_until};

use super::*;

const ENGINES: [IoEngine; 3] = [IoEngine::Auto, IoEngine::IoUring, IoEngine::Sync];
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn options(engine: IoEngine, queues: u16) -> BlockOptions {
    BlockOptions {
        engine,
        queues: Some(queues),
        ..BlockOptions::default()
    }
}

/// A disk on an image in this folder.
fn disk_in(folder: &str, size: u64, options: BlockOptions) -> (MockDriver, NamedTempFile) {
    let image = NamedTempFile::new_in(folder).unwrap();
    image.as_file().set_len(size).unwrap();
    let block = Block::new(RawFile::open(image.path(), false).unwrap(), options).unwrap();
    let mut driver = MockDriver::new(Box::new(block));
    let several = driver.offered() & 1 << 12;
    driver.start(FLUSH_FEATURE | several, 64);
    (driver, image)
}

/// A request in memory of its own, so that many can be under way.
struct Request {
    kind: u32,
    sector: u64,
    data: u64,
    len: u32,
}

impl Request {
    const PLACE: u64 = 0x8000;

    /// The memory of the request with this number: a page for header and status, then data.
    fn place(number: usize) -> u64 {
        DATA + number as u64 * Self::PLACE
    }

    fn new(number: usize, kind: u32, sector: u64, len: u32) -> Self {
        Self {
            kind,
            sector,
            data: Self::place(number) + 0x1000,
            len,
        }
    }

    fn make(&self, driver: &mut MockDriver, queue: usize) -> u16 {
        let head = self.data - 0x1000;
        driver.fill(head, &self.kind.to_le_bytes());
        driver.fill(head + 4, &[0; 4]);
        driver.fill(head + 8, &self.sector.to_le_bytes());
        driver.fill(head + 16, &[NO_STATUS]);
        let mut buffers = vec![Buffer::readable(head, 16)];
        // In two pieces.
        let half = self.len / 2;
        for (at, len) in [(0, half), (half, self.len - half)] {
            buffers.push(Buffer {
                address: self.data + u64::from(at),
                len,
                writable: self.kind == READ,
            });
        }
        buffers.retain(|buffer| buffer.len > 0);
        buffers.push(Buffer::writable(head + 16, 1));
        driver.queues[queue].add(&driver.memory, &buffers)
    }

    fn status(&self, driver: &MockDriver) -> u8 {
        driver.bytes(self.data - 0x1000 + 16, 1)[0]
    }
}

#[test]
fn every_engine_keeps_what_it_is_given() {
    for engine in ENGINES {
        for folder in ["/tmp", "/dev/shm"] {
            for direct in [false, true] {
                keeps_what_it_is_given(engine, folder, direct);
            }
        }
    }
}

/// Random requests, many at a time, none of which overlap.
fn keeps_what_it_is_given(engine: IoEngine, folder: &str, direct: bool) {
    const BLOCK: usize = 4096;
    const BLOCKS: usize = 64;
    let image = NamedTempFile::new_in(folder).unwrap();
    image.as_file().set_len((BLOCK * BLOCKS) as u64).unwrap();
    let file = RawFile::open(image.path(), false).unwrap();
    if direct {
        file.set_direct().unwrap();
    }
    let block = Block::new(file, options(engine, 2)).unwrap();
    let mut driver = MockDriver::new(Box::new(block));
    driver.start(FLUSH_FEATURE | 1 << 12, 64);
    let mut model = vec![0; BLOCK * BLOCKS];
    let mut random = Random::new(engine as u64 * 4 + u64::from(direct));
    for round in 0..30 {
        let mut requests = Vec::new();
        let mut block = 0;
        while block < BLOCKS && requests.len() < 12 {
            block += random.below(5) as usize;
            let count = (1 + random.below(6) as usize).min(BLOCKS.saturating_sub(block));
            if count == 0 {
                break;
            }
            let kind = random.one_of(&[READ, WRITE, WRITE, WRITE_ZEROES]);
            let mut request = Request::new(
                requests.len(),
                kind,
                (block * BLOCK / 512) as u64,
                (count * BLOCK) as u32,
            );
            let range = block * BLOCK..(block + count) * BLOCK;
            match kind {
                WRITE => {
                    let bytes: Vec<u8> = range.clone().map(|_| random.next() as u8).collect();
                    driver.fill(request.data, &bytes);
                    model[range.clone()].copy_from_slice(&bytes);
                }
                WRITE_ZEROES => {
                    let mut bytes = request.sector.to_le_bytes().to_vec();
                    bytes.extend((request.len / 512).to_le_bytes());
                    bytes.extend((random.below(2) as u32).to_le_bytes());
                    driver.fill(request.data, &bytes);
                    model[range.clone()].fill(0);
                    request.len = 16;
                }
                _ => driver.fill(request.data, &vec![0xcc; range.len()]),
            }
            requests.push((request, range));
            block += count;
        }
        let queue = round % 2;
        for (request, _) in &requests {
            request.make(&mut driver, queue);
        }
        driver.notify(queue as u32);
        for _ in &requests {
            driver.queues[queue].wait_used(&driver.memory);
        }
        for (request, range) in requests {
            assert_eq!(request.status(&driver), OK);
            if request.kind == READ {
                let found = driver.bytes(request.data, range.len());
                assert!(
                    found == model[range],
                    "{engine:?} {folder} {direct} {round}"
                );
            }
        }
        if round % 10 == 9 {
            assert_eq!(request(&mut driver, FLUSH, 0, 0), (OK, 1));
        }
    }
    assert!(contents(image.path()) == model, "{engine:?} {folder}");
}

#[test]
fn more_requests_than_a_ring_takes_are_all_answered() {
    for engine in ENGINES {
        let options = options(engine, 1);
        let (mut driver, _image) = disk_in("/dev/shm", 1 << 20, options);
        driver.start(FLUSH_FEATURE, 256);
        // Each takes up an indirect table and a descriptor: 250 at once.
        for number in 0..250_u64 {
            driver.fill(HEADER, &READ.to_le_bytes());
            driver.fill(HEADER + 4, &[0; 12]);
            let buffers = [
                Buffer::readable(HEADER, 16),
                Buffer::writable(DATA + number * 4096, 4096),
                Buffer::writable(DATA + 0x10_0000 + number, 1),
            ];
            let table = 0x8000 + number * 64;
            let head = driver.queues[0].indirect(&driver.memory, table, &buffers);
            driver.queues[0].make_available(&driver.memory, head);
        }
        driver.notify(0);
        for _ in 0..250 {
            assert_eq!(driver.queues[0].wait_used(&driver.memory).1, 4097);
        }
    }
}

#[test]
fn what_is_under_way_is_answered_before_a_pause_and_gone_after_a_reset() {
    for engine in [IoEngine::Auto, IoEngine::IoUring] {
        let (mut driver, image) = disk_in("/tmp", 8 << 20, options(engine, 3));
        let mut random = Random::new(5);
        for round in 0..60 {
            let mut requests = Vec::new();
            for number in 0..24 {
                let kind = random.one_of(&[READ, WRITE, FLUSH]);
                let len = if kind == FLUSH { 0 } else { 0x4000 };
                let request = Request::new(number, kind, 32 * number as u64, len);
                let queue = number % 3;
                request.make(&mut driver, queue);
                driver.notify(queue as u32);
                requests.push(request);
            }
            match round % 3 {
                0 => {
                    driver.transport.pause();
                    // Each was answered, or will be: nothing is half done.
                    let used: u16 = (0..3)
                        .map(|queue| driver.queues[queue].used_index(&driver.memory))
                        .sum();
                    let answered = requests.iter().filter(|it| it.status(&driver) == OK);
                    assert_eq!(answered.count(), usize::from(used));
                    driver.transport.resume();
                    for number in 0..24 {
                        driver.queues[number % 3].wait_used(&driver.memory);
                    }
                    assert!(requests.iter().all(|it| it.status(&driver) == OK));
                }
                1 => {}
                _ => driver.transport.pause(),
            }
            // Nothing writes to memory after a reset.
            driver.write(register::STATUS, 0);
            let place = Request::place(0);
            let size = 24 * Request::PLACE as usize;
            driver.fill(place, &vec![0x33; size]);
            std::thread::sleep(Duration::from_millis(2));
            assert!(driver.bytes(place, size).iter().all(|byte| *byte == 0x33));
            if round % 3 == 2 {
                driver.transport.resume();
            }
            driver.start(FLUSH_FEATURE | 1 << 12, 64);
        }
        drop(driver);
        assert_eq!(contents(image.path()).len(), 8 << 20);
    }
}

#[test]
fn a_queue_is_reset_while_its_requests_are_under_way() {
    let (mut driver, _image) = disk_in("/tmp", 8 << 20, options(IoEngine::IoUring, 2));
    for round in 0..40 {
        driver.start(FLUSH_FEATURE | 1 << 12 | MockDriver::RING_RESET, 64);
        for number in 0..20 {
            Request::new(number, WRITE, 32 * number as u64, 0x4000).make(&mut driver, 1);
        }
        driver.notify(1);
        if round % 2 == 0 {
            std::thread::yield_now();
        }
        driver.write(register::QUEUE_SEL, 1);
        driver.write(register::QUEUE_RESET, 1);
        wait_until("the reset of a queue", || {
            driver.read(register::QUEUE_RESET) == 0
        });
        let used = driver.queues[1].used_index(&driver.memory);
        let place = Request::place(0);
        driver.fill(place, &vec![0x44; 20 * Request::PLACE as usize]);
        // The other queue goes on, and the one that is gone stays as it is.
        assert_eq!(request(&mut driver, READ, 0, 512).0, OK);
        assert_eq!(driver.queues[1].used_index(&driver.memory), used);
    }
}

#[test]
fn a_ring_that_a_driver_breaks_lets_go_of_what_is_under_way() {
    let (mut driver, _image) = disk_in("/tmp", 8 << 20, options(IoEngine::IoUring, 1));
    for _ in 0..30 {
        for number in 0..20 {
            Request::new(number, READ, 32 * number as u64, 0x4000).make(&mut driver, 0);
        }
        let jump = driver.queues[0].avail_index().wrapping_add(1000);
        driver.notify(0);
        driver.queues[0].set_avail_index(&driver.memory, jump);
        driver.notify(0);
        driver.wait_needs_reset();
        driver.write(register::STATUS, 0);
        let place = Request::place(0);
        let size = 20 * Request::PLACE as usize;
        driver.fill(place, &vec![0x33; size]);
        std::thread::sleep(Duration::from_millis(1));
        assert!(driver.bytes(place, size).iter().all(|byte| *byte == 0x33));
        driver.start(FLUSH_FEATURE, 64);
        assert_eq!(request(&mut driver, READ, 0, 512), (OK, 513));
    }
}

#[test]
fn a_file_that_became_shorter_is_an_error_of_each_request() {
    for engine in ENGINES {
        let (mut driver, image) = disk_in("/tmp", 1 << 20, options(engine, 1));
        image.as_file().set_len(4096).unwrap();
        assert_eq!(request(&mut driver, READ, 0, 4096), (OK, 4097));
        assert_eq!(request(&mut driver, READ, 8, 4096), (IO_ERROR, 1));
        assert_eq!(request(&mut driver, READ, 0, 8192), (IO_ERROR, 1));
        assert_eq!(request(&mut driver, WRITE, 0, 4096), (OK, 1));
    }
}

#[test]
fn every_engine_makes_writes_last_where_the_driver_does_not() {
    for engine in ENGINES {
        let image = image(SECTORS);
        let options = BlockOptions {
            cache: CacheMode::Writethrough,
            ..options(engine, 1)
        };
        let file = RawFile::open(image.path(), false).unwrap();
        let block = Block::new(file, options).unwrap();
        let counters = block.counters();
        let mut driver = MockDriver::new(Box::new(block));
        driver.start(FLUSH_FEATURE, 64);
        let flushes = || -> u64 {
            let buckets = counters.flush_latency.snapshot().buckets;
            buckets.iter().map(|bucket| bucket.1).sum()
        };
        assert_eq!(request(&mut driver, WRITE, 0, 4096), (OK, 1));
        assert_eq!(flushes(), 1, "{engine:?}");
        driver.fill(DATA, &[0; 16]);
        driver.fill(DATA + 8, &8_u32.to_le_bytes());
        let data = [Buffer::readable(DATA, 16)];
        assert_eq!(request_with(&mut driver, WRITE_ZEROES, 0, &data), (OK, 1));
        assert_eq!(flushes(), 2, "{engine:?}");
        assert_eq!(request_with(&mut driver, DISCARD, 0, &data), (OK, 1));
        assert_eq!(request(&mut driver, FLUSH, 0, 0), (OK, 1));
        assert_eq!(flushes(), 3, "{engine:?}");
        assert_eq!(contents(image.path())[..4096], [0; 4096]);
    }
}

#[test]
fn several_queues_on_threads_of_their_own_serve_one_disk() {
    use kiln_io_thread::{IoThread, IoThreadSet};
    use kiln_virtio_device::MmioTransport;
    for engine in ENGINES {
        let (idle, image) = disk_in("/tmp", 8 << 20, options(IoEngine::Sync, 4));
        let memory = Arc::clone(&idle.memory);
        drop(idle);
        let threads: Vec<_> = (0..3)
            .map(|_| IoThread::spawn("test-io", |panic| eprintln!("{panic}")).unwrap())
            .collect();
        let mut handles = threads.iter().map(|thread| thread.handle().clone());
        let io = IoThreadSet::new(handles.next().unwrap(), handles);
        let file = RawFile::open(image.path(), false).unwrap();
        let block = Block::new(file, options(engine, 4)).unwrap();
        let line = Arc::new(InterruptRecorder::default());
        let mut driver = MockDriver::new(Box::new(
            Block::new(Faulty::default(), options(IoEngine::Sync, 4)).unwrap(),
        ));
        driver.memory = Arc::clone(&memory);
        driver.transport = kiln_virtio_device::testing::TestTransport::Mmio(
            MmioTransport::new(Box::new(block), memory, io, Arc::clone(&line) as _).unwrap(),
        );
        driver.start(FLUSH_FEATURE | 1 << 12, 64);
        for round in 0..50_u8 {
            let requests: Vec<_> = (0..20)
                .map(|number| {
                    let request = Request::new(number, WRITE, 64 * number as u64, 0x4000);
                    driver.fill(request.data, &[round ^ number as u8; 0x4000]);
                    request
                })
                .collect();
            for (number, request) in requests.iter().enumerate() {
                request.make(&mut driver, number % 4);
                driver.notify(number as u32 % 4);
            }
            for number in 0..20 {
                driver.queues[number % 4].wait_used(&driver.memory);
            }
            if round % 20 == 3 {
                driver.transport.pause();
                driver.transport.resume();
            }
        }
        let content = contents(image.path());
        for number in 0..20_usize {
            let at = 64 * 512 * number;
            let expected = 49 ^ number as u8;
            assert!(
                content[at..at + 0x4000]
                    .iter()
                    .all(|byte| *byte == expected)
            );
        }
        drop(driver);
    }
}

#[test]
fn an_engine_that_is_asked_for_is_had_or_refused() {
    let error = Block::new(Faulty::default(), options(IoEngine::IoUring, 1)).unwrap_err();
    assert!(error.to_string().contains("io_uring"), "{error}");
    Block::new(Faulty::default(), options(IoEngine::Sync, 1)).unwrap();
    for engine in ENGINES {
        let image = image(SECTORS);
        let file = RawFile::open(image.path(), true).unwrap();
        Block::new(file, options(engine, 16)).unwrap();
    }
    for (text, engine) in [
        ("auto", IoEngine::Auto),
        ("io_uring", IoEngine::IoUring),
        ("sync", IoEngine::Sync),
    ] {
        assert_eq!(text.parse(), Ok(engine));
        assert_eq!(
            serde_json::to_string(&engine).unwrap(),
            format!("\"{text}\"")
        );
    }
    assert!("uring".parse::<IoEngine>().is_err());
}
