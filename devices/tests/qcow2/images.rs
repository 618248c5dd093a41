//! Images of QEMU's, read and written, and then looked at by QEMU again.

use super::*;

const SIZE: usize = 5 << 20;

/// Writes and reads at random, and compares with what should be there.
fn exercise(ram: &Ram, disk: &mut Qcow2File, model: &mut [u8], rounds: u64) {
    let mut random = Random::new(rounds);
    for round in 0..rounds {
        let most = if round % 9 == 0 { 600 } else { 12 };
        let sectors = 1 + random.below(most);
        let sector = random.below(model.len() as u64 / 512 - sectors);
        let range = sector as usize * 512..(sector + sectors) as usize * 512;
        if random.below(3) == 0 {
            let found = ram.read(disk, sector * 512, range.len()).unwrap();
            assert!(found == model[range], "round {round}");
        } else if disk.properties().write_zeroes && random.below(6) == 0 {
            let (at, len) = (sector * 512, range.len() as u64);
            disk.write_zeroes(at, len, round % 2 == 0).unwrap();
            model[range].fill(0);
        } else {
            let bytes = pattern(round, range.len());
            ram.write(disk, sector * 512, &bytes).unwrap();
            model[range].copy_from_slice(&bytes);
        }
        if random.below(40) == 0 {
            disk.flush().unwrap();
        }
    }
}

/// Creates an image with these options, works on it, and has QEMU look at it.
fn round_trip(options: &str, compressed: bool) {
    let ram = Ram::new();
    let folder = tempfile::tempdir().unwrap();
    let (raw, mut model) = raw_disk(folder.path(), SIZE);
    let path = folder.path().join("image.qcow2");
    let mut args = vec!["convert", "-O", "qcow2", "-o", options];
    args.extend(compressed.then_some("-c"));
    args.extend([text(&raw), text(&path)]);
    qemu_img(&args);
    let mut disk = open(&path, true).unwrap();
    assert_eq!(disk.size(), SIZE as u64);
    assert!(disk.is_read_only() && !disk.default_id().is_empty());
    assert!(ram.contents(&mut disk) == model, "{options}");
    drop(disk);
    let mut disk = open(&path, false).unwrap();
    exercise(&ram, &mut disk, &mut model, 150);
    assert!(ram.contents(&mut disk) == model, "{options}");
    disk.flush().unwrap();
    // It is whole after a flush, not only when it is closed.
    assert_clean(&path);
    assert!(qemu_contents(&path) == model, "{options}");
    exercise(&ram, &mut disk, &mut model, 20);
    drop(disk);
    assert_clean(&path);
    assert!(qemu_contents(&path) == model, "{options}");
    let mut disk = open(&path, true).unwrap();
    assert!(ram.contents(&mut disk) == model, "{options}");
}

#[test]
fn an_image_of_any_cluster_size_and_version_is_read_and_written() {
    let Some(_one) = qemu() else { return };
    for options in [
        "compat=1.1",
        "compat=0.10",
        "compat=1.1,cluster_size=512",
        "compat=0.10,cluster_size=4096",
        "compat=1.1,cluster_size=2M",
        "compat=1.1,lazy_refcounts=on",
        "compat=1.1,cluster_size=4096,refcount_bits=1",
        "compat=1.1,cluster_size=4096,refcount_bits=64",
        "compat=1.1,preallocation=metadata",
    ] {
        round_trip(options, false);
    }
}

#[test]
fn compressed_clusters_are_read_and_written_over() {
    let Some(_one) = qemu() else { return };
    for options in [
        "compat=1.1",
        "compat=0.10,cluster_size=4096",
        "compat=1.1,cluster_size=2M",
    ] {
        round_trip(options, true);
    }
}

#[test]
fn a_snapshot_keeps_what_it_had() {
    let Some(_one) = qemu() else { return };
    let ram = Ram::new();
    let folder = tempfile::tempdir().unwrap();
    let (raw, mut model) = raw_disk(folder.path(), SIZE);
    let path = folder.path().join("image.qcow2");
    qemu_img(&["convert", "-O", "qcow2", text(&raw), text(&path)]);
    qemu_img(&["snapshot", "-c", "before", text(&path)]);
    let before = model.clone();
    let mut disk = open(&path, false).unwrap();
    exercise(&ram, &mut disk, &mut model, 150);
    drop(disk);
    assert_clean(&path);
    assert!(qemu_contents(&path) == model);
    qemu_img(&["snapshot", "-a", "before", text(&path)]);
    assert!(qemu_contents(&path) == before);
    let mut disk = open(&path, true).unwrap();
    assert!(ram.contents(&mut disk) == before);
}

#[test]
fn an_empty_image_of_terabytes_takes_what_is_written() {
    let Some(_one) = qemu() else { return };
    let ram = Ram::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.qcow2");
    qemu_img(&["create", "-f", "qcow2", text(&path), "8T"]);
    let mut disk = open(&path, false).unwrap();
    assert_eq!(disk.size(), 8 << 40);
    let places = [0, 1 << 30, (7 << 40) + 512, (8 << 40) - 4096];
    for at in places {
        ram.write(&mut disk, at, &pattern(at, 4096)).unwrap();
    }
    for at in places {
        assert!(ram.read(&mut disk, at, 4096).unwrap() == pattern(at, 4096));
    }
    let around = ram.read(&mut disk, (1 << 30) - 4096, 4096).unwrap();
    assert_eq!(around, [0; 4096]);
    drop(disk);
    assert_clean(&path);
    assert!(path.metadata().unwrap().len() < 4 << 20);
}

#[test]
fn what_is_discarded_goes_back_to_the_host_and_reads_as_zeros() {
    let Some(_one) = qemu() else { return };
    let ram = Ram::new();
    let folder = tempfile::tempdir().unwrap();
    let (raw, _) = raw_disk(folder.path(), SIZE);
    for (options, backing) in [
        ("compat=1.1", false),
        ("compat=1.1", true),
        ("compat=0.10", false),
        ("compat=1.1,cluster_size=4096", false),
    ] {
        let path = folder.path().join("image.qcow2");
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
        if backing {
            args.extend(["-b", text(&raw), "-F", "raw"]);
        }
        args.extend([text(&path), "5M"]);
        qemu_img(&args);
        let mut disk = Qcow2File::open(&path, false, &BackingFiles::Allow).unwrap();
        assert!(disk.properties().discard);
        ram.write(&mut disk, 0, &pattern(1, SIZE)).unwrap();
        disk.flush().unwrap();
        let room = || std::os::unix::fs::MetadataExt::blocks(&path.metadata().unwrap()) * 512;
        let full = room();
        // Neither its beginning nor its end is that of a cluster.
        let (start, end) = (512 * 7, (4 << 20) + 512 * 5);
        disk.discard(start, end - start).unwrap();
        disk.flush().unwrap();
        assert!(
            room() + (3 << 20) < full,
            "{options}: {full}, then {}",
            room()
        );
        let mut found = ram.contents(&mut disk);
        let expected = pattern(1, SIZE);
        let (first, last) = ((1 << 16), (4 << 20) - (1 << 16));
        assert!(
            found[first..last].iter().all(|byte| *byte == 0),
            "{options}"
        );
        found[start as usize..end as usize]
            .copy_from_slice(&expected[start as usize..end as usize]);
        assert!(found == expected, "{options}");
        ram.write(&mut disk, 0, &expected).unwrap();
        assert!(ram.contents(&mut disk) == expected);
        drop(disk);
        assert_clean(&path);
    }
    // There are no zeros in version 2 that would hide a backing file.
    let path = folder.path().join("old.qcow2");
    let args = ["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "-b"];
    qemu_img(&[&args[..], &[text(&raw), "-F", "raw", text(&path)]].concat());
    let disk = Qcow2File::open(&path, false, &BackingFiles::Allow).unwrap();
    assert!(!disk.properties().discard && !disk.properties().write_zeroes);
}
