//! What the host and the driver change while a disk is in use, and disks with several queues.

use kiln_device_api::BusDevice;

use super::*;

const WCE_FEATURE: u64 = 1 << 11;
const MQ_FEATURE: u64 = 1 << 12;
const WRITEBACK: u64 = 32;

fn sectors(driver: &MockDriver) -> u64 {
    let mut bytes = [0; 8];
    driver.config(0, &mut bytes);
    u64::from_le_bytes(bytes)
}

fn writeback(driver: &MockDriver) -> u8 {
    let mut byte = [0xff];
    driver.config(WRITEBACK, &mut byte);
    byte[0]
}

fn set_writeback(driver: &MockDriver, value: u8) {
    let address = register::CONFIG + WRITEBACK;
    assert!(driver.transport.write(address, &[value]).is_continue());
}

#[test]
fn the_driver_decides_when_writes_last() {
    let faulty = Faulty::default();
    let mut driver = driver_of(faulty.clone());
    assert_ne!(driver.offered() & WCE_FEATURE, 0);
    driver.start(FLUSH_FEATURE | WCE_FEATURE, 64);
    let flushes = || faulty.flushes.load(Ordering::SeqCst);
    assert_eq!(writeback(&driver), 1);
    assert_eq!(request(&mut driver, WRITE, 0, 512), (OK, 1));
    assert_eq!(flushes(), 0);
    // What was written before is flushed then: the driver will not do it any more.
    set_writeback(&driver, 0);
    assert_eq!((writeback(&driver), flushes()), (0, 1));
    assert_eq!(request(&mut driver, WRITE, 0, 512), (OK, 1));
    assert_eq!(flushes(), 2);
    set_writeback(&driver, 1);
    assert_eq!(request(&mut driver, WRITE, 0, 512), (OK, 1));
    assert_eq!(flushes(), 2);
    // A driver that begins anew finds it as it was at first, and one that goes on as it left it.
    set_writeback(&driver, 0);
    driver.transport.pause();
    driver.transport.resume();
    assert_eq!(writeback(&driver), 0);
    driver.start(FLUSH_FEATURE, 64);
    assert_eq!(writeback(&driver), 1);
}

#[test]
fn a_disk_can_begin_with_writes_that_last() {
    let faulty = Faulty::default();
    let options = BlockOptions {
        cache: CacheMode::Writethrough,
        ..BlockOptions::default()
    };
    let block = Block::new(faulty.clone(), options.clone()).unwrap();
    let mut driver = MockDriver::new(Box::new(block));
    driver.start(FLUSH_FEATURE, 64);
    assert_eq!(writeback(&driver), 0);
    assert_eq!(request(&mut driver, WRITE, 0, 512), (OK, 1));
    assert_eq!(faulty.flushes.load(Ordering::SeqCst), 1);
    set_writeback(&driver, 1);
    assert_eq!(request(&mut driver, WRITE, 0, 512), (OK, 1));
    assert_eq!(faulty.flushes.load(Ordering::SeqCst), 1);
    driver.start(FLUSH_FEATURE, 64);
    assert_eq!(writeback(&driver), 0);
}

#[test]
fn the_choice_of_the_driver_is_in_the_state() {
    let faulty = Faulty::default();
    let (first, control) = {
        let block = Block::new(faulty.clone(), BlockOptions::default()).unwrap();
        let control = block.control();
        (block, control)
    };
    assert_eq!(
        first.state(),
        BlockState {
            cache: CacheMode::Writeback
        }
    );
    let mut driver = MockDriver::new(Box::new(first));
    driver.start(FLUSH_FEATURE | WCE_FEATURE, 64);
    set_writeback(&driver, 0);
    driver.transport.pause();
    let state = driver.transport.state().unwrap();
    let block_state = BlockState {
        cache: control.cache(),
    };
    let text = serde_json::to_string(&block_state).unwrap();
    assert_eq!(text, "{\"cache\":\"writethrough\"}");
    let read = serde_json::from_str(&text).unwrap();
    let second = Block::from_state(faulty.clone(), BlockOptions::default(), &read).unwrap();
    assert_eq!(second.state(), block_state);
    driver.restore(Box::new(second), &state).unwrap();
    driver.transport.resume();
    assert_eq!(writeback(&driver), 0);
    let before = faulty.flushes.load(Ordering::SeqCst);
    assert_eq!(request(&mut driver, WRITE, 0, 512), (OK, 1));
    assert_eq!(faulty.flushes.load(Ordering::SeqCst), before + 1);
}

#[test]
fn a_disk_that_grows_tells_its_driver() {
    let image = image(SECTORS);
    let block = Block::new(
        RawFile::open(image.path(), false).unwrap(),
        BlockOptions::default(),
    )
    .unwrap();
    let control = block.control();
    let mut driver = MockDriver::new(Box::new(block));
    driver.start(FLUSH_FEATURE, 64);
    assert_eq!(sectors(&driver), SECTORS);
    let interrupts = driver.line.count();
    assert_eq!(control.refresh_size().unwrap(), SECTORS * 512);
    assert_eq!(driver.line.count(), interrupts);
    assert_eq!(request(&mut driver, READ, SECTORS, 512), (IO_ERROR, 1));
    // A part of a sector does not count.
    image.as_file().set_len(2 * SECTORS * 512 + 100).unwrap();
    let generation = driver.read(register::CONFIG_GENERATION);
    assert_eq!(control.refresh_size().unwrap(), 2 * SECTORS * 512);
    assert_eq!(control.size(), 2 * SECTORS * 512);
    assert_ne!(driver.read(register::CONFIG_GENERATION), generation);
    assert_eq!(driver.read(register::INTERRUPT_STATUS) & 2, 2);
    assert_eq!(sectors(&driver), 2 * SECTORS);
    assert_eq!(request(&mut driver, WRITE, SECTORS, 512), (OK, 1));
    // And smaller; what is too small to be a disk is no size.
    image.as_file().set_len(512).unwrap();
    assert_eq!(control.refresh_size().unwrap(), 512);
    assert_eq!(request(&mut driver, READ, SECTORS, 512), (IO_ERROR, 1));
    assert_eq!(request(&mut driver, READ, 0, 512), (OK, 513));
    image.as_file().set_len(511).unwrap();
    assert!(control.refresh_size().is_err());
    assert_eq!(sectors(&driver), 1);
    // The file's end is behind it, which the disk does not know.
    assert_eq!(request(&mut driver, READ, 0, 512), (IO_ERROR, 1));
}

#[test]
fn a_disk_that_grows_in_a_pause_tells_its_driver_afterwards() {
    let image = image(SECTORS);
    let file = RawFile::open(image.path(), false).unwrap();
    let block = Block::new(file, BlockOptions::default()).unwrap();
    let control = block.control();
    let mut driver = MockDriver::new(Box::new(block));
    // Before there is a driver, nobody is to be told.
    image.as_file().set_len(2 * SECTORS * 512).unwrap();
    control.refresh_size().unwrap();
    driver.start(FLUSH_FEATURE, 64);
    assert_eq!(driver.read(register::INTERRUPT_STATUS) & 2, 0);
    driver.transport.pause();
    image.as_file().set_len(3 * SECTORS * 512).unwrap();
    control.refresh_size().unwrap();
    assert_eq!(driver.read(register::INTERRUPT_STATUS) & 2, 0);
    driver.transport.resume();
    assert_eq!(driver.read(register::INTERRUPT_STATUS) & 2, 2);
    assert_eq!(sectors(&driver), 3 * SECTORS);
}

#[test]
fn every_queue_is_served() {
    for backend in 0..2 {
        let image = image(SECTORS);
        let options = BlockOptions {
            queues: Some(4),
            ..BlockOptions::default()
        };
        let block = if backend == 0 {
            Block::new(RawFile::open(image.path(), false).unwrap(), options)
        } else {
            Block::new(Faulty::default(), options)
        };
        let mut driver = MockDriver::new(Box::new(block.unwrap()));
        assert_ne!(driver.offered() & MQ_FEATURE, 0);
        driver.start(FLUSH_FEATURE | MQ_FEATURE, 16);
        assert_eq!(driver.queues.len(), 4);
        let mut count = [0; 2];
        driver.config(34, &mut count);
        assert_eq!(count, [4, 0]);
        for round in 0..20 {
            let queue = (round * 7) % 4;
            set_header(&driver, READ, round as u64);
            let buffers = [
                Buffer::readable(HEADER, 16),
                Buffer::writable(DATA, 512),
                Buffer::writable(STATUS, 1),
            ];
            assert_eq!(driver.request(queue, &buffers), 513);
            assert_eq!(driver.bytes(STATUS, 1), [OK]);
            if round == 10 {
                driver.transport.pause();
                driver.transport.resume();
            }
        }
    }
}

#[test]
fn a_driver_need_not_use_all_queues() {
    let image = image(SECTORS);
    let options = BlockOptions {
        queues: Some(4),
        ..BlockOptions::default()
    };
    let block = Block::new(RawFile::open(image.path(), false).unwrap(), options).unwrap();
    let mut driver = MockDriver::new(Box::new(block));
    driver.start(FLUSH_FEATURE, 16);
    let queues = std::mem::take(&mut driver.queues);
    assert!(driver.negotiate(FLUSH_FEATURE));
    // The second and the last.
    for index in [1, 3] {
        driver.enable_queue(index, &queues[index as usize]);
    }
    driver.write(register::STATUS, driver.status() | 4);
    driver.queues = queues;
    for queue in [1, 3] {
        set_header(&driver, FLUSH, 0);
        let buffers = [Buffer::readable(HEADER, 16), Buffer::writable(STATUS, 1)];
        assert_eq!(driver.request(queue, &buffers), 1);
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let image = image(SECTORS);
    let with = |options| {
        let file = RawFile::open(image.path(), true).unwrap();
        Block::new(file, options).map(drop)
    };
    for queues in [0, 257, u16::MAX] {
        let options = BlockOptions {
            queues: Some(queues),
            ..BlockOptions::default()
        };
        let error = with(options).unwrap_err().to_string();
        assert!(error.contains(&format!("{queues} queues")), "{error}");
    }
    for size in [0, 1, 511, 1024, 8192, u32::MAX] {
        let options = BlockOptions {
            logical_block_size: Some(size),
            ..BlockOptions::default()
        };
        let error = with(options).unwrap_err().to_string();
        assert!(error.contains("it can have 512 or 4096"), "{error}");
    }
    let blocks = |logical_block_size| BlockOptions {
        logical_block_size: Some(logical_block_size),
        ..BlockOptions::default()
    };
    with(blocks(512)).unwrap();
    with(blocks(4096)).unwrap();
    image.as_file().set_len(4096 + 512).unwrap();
    with(blocks(512)).unwrap();
    let error = with(blocks(4096)).unwrap_err().to_string();
    assert!(error.contains("not a multiple of 4096"), "{error}");
}

#[test]
fn large_blocks_are_told_to_the_driver() {
    let image = image(SECTORS);
    let options = BlockOptions {
        logical_block_size: Some(4096),
        ..BlockOptions::default()
    };
    let file = RawFile::open(image.path(), false).unwrap();
    let driver = MockDriver::new(Box::new(Block::new(file, options).unwrap()));
    let mut config = [0; 60];
    driver.config(0, &mut config);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[20..24], 4096_u32.to_le_bytes());
    assert_eq!(config[24..32], [0, 0, 1, 0, 0, 0, 0, 0]);
}

#[test]
fn a_disk_past_the_page_cache_takes_any_memory() {
    let image = image(SECTORS);
    let file = RawFile::open(image.path(), false).unwrap();
    file.set_direct().unwrap();
    let block_size = file.properties().logical_block_size;
    let mut driver = driver_of(file);
    let mut model = contents(image.path());
    let sectors = u64::from(block_size / 512);
    let mut random = Random::new(7);
    for round in 0..100 {
        let len = block_size * (1 + random.below(4) as u32);
        let sector = random.below(8) * sectors;
        let at = (sector * 512) as usize;
        let kind = random.one_of(&[READ, WRITE]);
        let cut = random.below(u64::from(len) + 1) as u32;
        let (one, other) = (
            DATA + random.below(600),
            DATA + 0x1_0000 + random.below(600),
        );
        let piece = |address, len| Buffer {
            address,
            len,
            writable: kind == READ,
        };
        let bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        if kind == WRITE {
            driver.fill(one, &bytes[..cut as usize]);
            driver.fill(other, &bytes[cut as usize..]);
            model[at..at + len as usize].copy_from_slice(&bytes);
        }
        let data = [piece(one, cut), piece(other, len - cut)];
        let (status, _) = request_with(&mut driver, kind, sector, &data);
        assert_eq!(status, OK, "round {round}");
        if kind == READ {
            let mut found = driver.bytes(one, cut as usize);
            found.extend(driver.bytes(other, (len - cut) as usize));
            assert_eq!(found, model[at..at + len as usize], "round {round}");
        }
    }
    assert_eq!(contents(image.path()), model);
}
