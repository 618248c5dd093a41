//! What is on the disk after a loss of power: all that was written before the last sync, and of
//! what came after it, anything.

use super::super::image::Operation;
use super::*;

const SIZE: usize = 1 << 20;

/// A loss of power: how many of the operations came before it, and what the disk then held of the
/// guest's data that had been flushed.
struct Point {
    operations: usize,
    flushed: Vec<u8>,
    /// Where the guest has written since.
    written: Vec<std::ops::Range<usize>>,
}

/// Writes as a guest does, and notes a point before and after each request.
fn work(ram: &Ram, disk: &mut Qcow2File, mut model: Vec<u8>, seed: u64, rounds: u64) -> Vec<Point> {
    let mut random = Random::new(seed);
    let mut points = Vec::new();
    let (mut flushed, mut written) = (model.clone(), Vec::new());
    for round in 0..rounds {
        let sectors = 1 + random.below(40);
        let sector = random.below(SIZE as u64 / 512 - sectors);
        if random.below(9) == 0 {
            disk.flush().unwrap();
            (flushed, written) = (model.clone(), Vec::new());
        } else {
            let range = sector as usize * 512..(sector + sectors) as usize * 512;
            let bytes = pattern(round, range.len());
            ram.write(disk, sector * 512, &bytes).unwrap();
            model[range.clone()].copy_from_slice(&bytes);
            written.push(range);
        }
        points.push(Point {
            operations: disk.file.journal.lock().unwrap().len(),
            flushed: flushed.clone(),
            written: written.clone(),
        });
    }
    points
}

/// The file as a loss of power may leave it: sectors are written as a whole or not at all.
fn after_power_loss(image: &[u8], journal: &[Operation], random: &mut Random) -> Vec<u8> {
    let is_sync = |operation: &Operation| matches!(operation, Operation::Sync);
    let synced = journal.iter().rposition(is_sync).unwrap_or(0);
    let mut image = image.to_vec();
    // Each sector, each operation, or all of them alike.
    let grain = random.below(3);
    let all = random.below(2) == 0;
    for (index, operation) in journal.iter().enumerate() {
        let Operation::Write(offset, bytes) = operation else {
            continue;
        };
        let one = random.below(2) == 0;
        for (number, sector) in bytes.chunks(512).enumerate() {
            let kept = match grain {
                0 => random.below(2) == 0,
                1 => one,
                _ => all,
            };
            if index < synced || kept {
                let at = *offset as usize + 512 * number;
                image.resize(image.len().max(at + sector.len()), 0);
                image[at..at + sector.len()].copy_from_slice(sector);
            }
        }
    }
    image
}

fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, 0).unwrap();
    bytes
}

fn survives(cluster_bits: u32, order: u32, backing: bool) {
    let what = format!("clusters of 2^{cluster_bits}, refcounts of 2^{order}");
    let ram = Ram::new();
    let folder = tempfile::tempdir().unwrap();
    // Its files are in memory, but for what is under it.
    let open = |file: &File| {
        let (file, path) = (file.try_clone().unwrap(), folder.path().join("image"));
        Qcow2File::from_file(file, path, false, &BackingFiles::Allow).unwrap()
    };
    let mut before = empty_image(cluster_bits, order, SIZE as u64);
    let mut model = vec![0; SIZE];
    if backing {
        model = pattern(77, SIZE);
        std::fs::write(folder.path().join("base"), &model).unwrap();
        // An extension with the format, and the end of the header's extensions.
        before[104..120].copy_from_slice(b"\xe2\x79\x2a\xca\0\0\0\x03raw\0\0\0\0\0");
        before[8..20].copy_from_slice(b"\0\0\0\0\0\0\x01\0\0\0\0\x04");
        before[256..260].copy_from_slice(b"base");
    }
    assert_eq!(problem(&before), None);
    let file = file_with(&before);
    let mut disk = open(&file);
    let start = Point {
        operations: 0,
        flushed: model.clone(),
        written: Vec::new(),
    };
    let points = work(&ram, &mut disk, model, 7, 160);
    let journal = disk.file.journal.lock().unwrap().clone();
    drop(disk);
    assert_eq!(problem(&bytes_of(&file)), None);
    let mut random = Random::new(8);
    for round in 0..50 {
        // In the middle of a request, too.
        let operations = random.below(journal.len() as u64 + 1) as usize;
        let next = points.partition_point(|point| point.operations <= operations);
        let point = points[..next].last().unwrap_or(&start);
        let journal = &journal[..operations];
        let image = after_power_loss(&before, journal, &mut random);
        assert_eq!(problem(&image), None, "{what}, round {round}");
        let file = file_with(&image);
        let mut disk = open(&file);
        let again = ram.contents(&mut disk);
        let (mut found, mut expected) = (again.clone(), point.flushed.clone());
        // What was written since may be there or not, and that of the request that was being done.
        let written = points
            .get(next)
            .map_or(&point.written, |next| &next.written);
        for range in point.written.iter().chain(written) {
            found[range.clone()].fill(0);
            expected[range.clone()].fill(0);
        }
        assert!(found == expected, "{what}, round {round}");
        // It can be worked with as if nothing had been.
        drop(work(&ram, &mut disk, again, round, 40));
        drop(disk);
        let later = problem(&bytes_of(&file));
        assert_eq!(later, None, "{what}, round {round}, later");
    }
}

#[test]
fn a_loss_of_power_leaves_the_image_whole_and_what_was_flushed_in_it() {
    survives(16, 4, false);
    survives(16, 4, true);
    survives(12, 6, false);
    survives(9, 4, true);
}

#[test]
fn a_panic_of_the_driver_ends_the_disk_and_nothing_else() {
    let ram = Ram::new();
    let file = file_with(&small_image());
    let copy = file.try_clone().unwrap();
    let opened = Qcow2File::from_file(file, "image", false, &BackingFiles::Refuse);
    let mut disk = opened.unwrap();
    // In memory only.
    ram.write(&mut disk, 10_000 / 512 * 512, &[1; 512]).unwrap();
    let before = copy.metadata().unwrap().modified().unwrap();
    let error = disk.with::<()>(|_, _| panic!("table {}", 7)).unwrap_err();
    assert_eq!(error.to_string(), "the qcow2 driver panicked: table 7");
    let error = ram.read(&mut disk, 0, 512).unwrap_err();
    assert!(error.to_string().contains("gave up"), "{error}");
    assert!(disk.flush().is_err());
    drop(disk);
    assert_eq!(copy.metadata().unwrap().modified().unwrap(), before);
    // The image is the next one's.
    Qcow2File::from_file(copy, "image", false, &BackingFiles::Refuse).unwrap();
}
