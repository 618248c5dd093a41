//! Images that mean harm.

use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::virtio::block::qcow2::compressed::tests::stream;

/// How long all images of a test may take together; each takes less than a millisecond.
const PATIENCE: Duration = Duration::from_secs(300);

/// Runs `check` for the numbers from 0 on, on a thread of its own, and fails where it does not end.
fn in_time(count: u64, check: impl Fn(u64) + Send + 'static) {
    let (done, is_done) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        for number in 0..count {
            check(number);
            let _ = done.send(number);
        }
    });
    let mut last = None;
    loop {
        match is_done.recv_timeout(PATIENCE) {
            Ok(number) => last = Some(number),
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("image behind {last:?} takes forever"),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    if let Err(panic) = thread.join() {
        eprintln!("the image behind {last:?}");
        std::panic::resume_unwind(panic);
    }
}

/// Uses an image as a guest would that is in on it. Gives whether it could be opened.
fn use_image(image: &[u8], seed: u64) -> bool {
    let ram = Ram::new();
    let mut random = Random::new(seed);
    let opened = |read_only| open_bytes(image, read_only);
    let mut disk = match opened(seed.is_multiple_of(4)) {
        Ok(disk) => disk,
        Err(error) => {
            let text = message(error);
            assert!(!text.contains("panicked"), "{text}");
            return false;
        }
    };
    let size = disk.size();
    let mut errors = Vec::new();
    for _ in 0..24 {
        let len = 512 * (1 + random.below(8));
        let at = random.below(size.saturating_sub(len) / 512 + 1) * 512;
        let len = len.min(size - at) as usize;
        let result = match random.below(5) {
            0 | 1 => ram.read(&mut disk, at, len).map(drop),
            2 | 3 => ram.write(&mut disk, at, &pattern(at, len)),
            _ => disk.flush(),
        };
        errors.extend(result.err().map(|error| error.to_string()));
    }
    for error in errors {
        assert!(!error.contains("panicked"), "{error}");
        assert!(!error.contains("gave up"), "{error}");
    }
    true
}

/// Numbers that are likely to be at a limit of something.
fn nasty(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << random.below(64),
        3 => (1 << random.below(64)) - 1,
        4 => random.next(),
        5 => random.below(40) * CLUSTER as u64,
        6 => (1 << 63) | (random.below(40) * CLUSTER as u64),
        _ => (1 << 62) | (random.next() >> 2),
    }
}

/// Changes a few things about an image, most of them in its tables.
fn mutate(image: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..1 + random.below(4) {
        let cluster = random.one_of(&[0, 0, 0, 1, 2, 3, 4, 4, 4, 6, 8]) * CLUSTER;
        // Of the tables, the beginning is what is in use.
        let used = if cluster == 0 { 170 } else { 80 };
        let at = cluster + random.below(used) as usize;
        match random.below(6) {
            0 => image[at] ^= 1 << random.below(8),
            1 => image[at] = random.next() as u8,
            2 | 3 => {
                let at = at & !7;
                let value = nasty(random).to_be_bytes();
                image[at..at + 8].copy_from_slice(&value);
            }
            4 => {
                let at = at & !3;
                let value = (nasty(random) as u32).to_be_bytes();
                image[at..at + 4].copy_from_slice(&value);
            }
            _ => {
                let from = random.below(9) as usize * CLUSTER;
                image.copy_within(from..from + CLUSTER, cluster);
            }
        }
    }
    if random.below(20) == 0 {
        image.truncate(random.below(image.len() as u64) as usize);
    }
}

#[test]
fn no_change_of_a_header_field_does_harm() {
    in_time(176 * 8, |number| {
        let mut image = small_image();
        let (at, kind) = (number as usize / 8, number % 8);
        let mut random = Random::new(number);
        image[at] = match kind {
            0 => 0,
            1 => 0xff,
            2 => 0x7f,
            3 => 0x80,
            4 => 1,
            5 => image[at].wrapping_add(1),
            6 => image[at].wrapping_sub(1),
            _ => random.next() as u8,
        };
        use_image(&image, number);
    });
}

#[test]
fn no_image_breaks_the_machine() {
    in_time(6000, |number| {
        let mut random = Random::new(number + 1);
        let mut image = small_image();
        mutate(&mut image, &mut random);
        use_image(&image, number);
    });
}

#[test]
fn a_guest_cannot_write_the_header_of_its_image() {
    let ram = Ram::new();
    // The guest's second cluster is compressed, and in the image's first, which is free when it has
    // been written over; or it is not compressed, and there.
    for entry in [1 << 62, 1 << 62 | 256, 1 << 63, 1 << 63 | 1] {
        let mut image = small_image();
        image[4 * CLUSTER + 8..][..8].copy_from_slice(&u64::to_be_bytes(entry));
        let file = file_with(&image);
        let copy = file.try_clone().unwrap();
        let opened = Qcow2File::from_file(file, "image", false, &BackingFiles::Refuse);
        let mut disk = opened.unwrap();
        for round in 0..60 {
            let _ = ram.write(&mut disk, 512 * (1 + round % 3), &pattern(round, 512));
            let _ = disk.flush();
        }
        drop(disk);
        let mut start = [0; 20];
        std::os::unix::fs::FileExt::read_exact_at(&copy, &mut start, 0).unwrap();
        assert_eq!(start[..20], image[..20], "{entry:#x}");
    }
}

#[test]
fn a_driver_puts_no_table_into_the_header_of_an_image() {
    let ram = Ram::new();
    // A disk with many L2 tables of which none is there yet, and a compressed cluster that seems to
    // be in the image's first: written over, that one is free, and the next table is put there.
    for seed in 0..8 {
        let cluster = CLUSTER as u64;
        let mut image = empty_image(9, 4, 2 << 20);
        let l2 = image.len() as u64;
        image.resize(image.len() + CLUSTER, 0);
        image[3 * CLUSTER..][..8].copy_from_slice(&(1 << 63 | l2).to_be_bytes());
        image[2 * CLUSTER + (l2 / cluster) as usize * 2 + 1] = 1;
        for entry in 0..seed + 1 {
            let at = l2 as usize + 8 * entry;
            image[at..at + 8].copy_from_slice(&u64::to_be_bytes(1 << 62));
        }
        let file = file_with(&image);
        let copy = file.try_clone().unwrap();
        let opened = Qcow2File::from_file(file, "image", false, &BackingFiles::Refuse);
        let mut disk = opened.unwrap();
        for round in 0..60 {
            let place = match round {
                0..8 => round * cluster,
                _ => round * 64 * cluster,
            };
            let _ = ram.write(&mut disk, place % (2 << 20), &pattern(round, 512));
            let _ = disk.flush();
        }
        drop(disk);
        let mut start = [0; 36];
        std::os::unix::fs::FileExt::read_exact_at(&copy, &mut start, 0).unwrap();
        assert_eq!(start[..36], image[..36], "{seed}");
    }
}

#[test]
fn a_damaged_compressed_cluster_does_not_show_what_is_in_memory() {
    let ram = Ram::new();
    let rest = pattern(7, CLUSTER - 4);
    for (distance_code, is_good) in [(0, true), (3, false)] {
        let mut image = small_image();
        let bytes = stream(distance_code, &rest);
        image[6 * CLUSTER + 100..][..bytes.len()].copy_from_slice(&bytes);
        let mut disk = open_bytes(&image, false).unwrap();
        let place = 2 * CLUSTER as u64;
        let expected = [&b"AAAA"[..], &rest].concat();
        let read = ram.read(&mut disk, place, CLUSTER).ok();
        assert_eq!(read, is_good.then_some(expected));
    }
    // Nor is it copied, where a cluster is larger than a sector and is written in part.
    let mut image = empty_image(12, 4, 1 << 20);
    let l2 = image.len() as u64;
    let place = l2 + 4096;
    image.resize(image.len() + 3 * 4096, 0);
    image[3 * 4096..][..8].copy_from_slice(&(1 << 63 | l2).to_be_bytes());
    for cluster in [l2, place, place + 4096] {
        image[2 * 4096 + (cluster >> 12) as usize * 2 + 1] = 1;
    }
    let rest = pattern(7, 4096 - 4);
    for (distance_code, is_good) in [(0, true), (3, false)] {
        let bytes = stream(distance_code, &rest);
        image[place as usize..][..bytes.len()].copy_from_slice(&bytes);
        // The bits for the number of further sectors are the upper four of the place's.
        let entry = 1 << 62 | 8_u64 << 58 | place;
        image[l2 as usize..][..8].copy_from_slice(&entry.to_be_bytes());
        let mut disk = open_bytes(&image, false).unwrap();
        let written = ram.write(&mut disk, 1024, &pattern(9, 512));
        assert_eq!(written.is_ok(), is_good);
        let zeroed = disk.write_zeroes(2048, 512, false);
        assert_eq!(zeroed.is_ok(), is_good);
        let read = ram.read(&mut disk, 0, 8).ok();
        assert_eq!(read, is_good.then(|| [&b"AAAA"[..], &rest[..4]].concat()));
        // All of it is there again when it has been written over.
        ram.write(&mut disk, 0, &pattern(10, 4096)).unwrap();
        assert_eq!(ram.read(&mut disk, 0, 4096).unwrap(), pattern(10, 4096));
    }
}

#[test]
fn tables_that_lead_far_away_do_not_make_the_file_large() {
    let ram = Ram::new();
    let mut image = small_image();
    let far = 1 << 63 | 1_u64 << 40;
    image[4 * CLUSTER..][..8].copy_from_slice(&far.to_be_bytes());
    let file = file_with(&image);
    let copy = file.try_clone().unwrap();
    let mut disk = Qcow2File::from_file(file, "image", false, &BackingFiles::Refuse).unwrap();
    let error = ram.write(&mut disk, 0, &[1; 512]).unwrap_err();
    assert!(
        error.to_string().contains("where no data can be"),
        "{error}"
    );
    assert_eq!(ram.read(&mut disk, 0, 512).unwrap(), [0; 512]);
    // The others are as they were.
    ram.write(&mut disk, 512 * 3, &[7; 512]).unwrap();
    assert_eq!(ram.read(&mut disk, 512 * 3, 512).unwrap(), [7; 512]);
    disk.flush().unwrap();
    assert!(copy.metadata().unwrap().len() <= image.len() as u64);
}
