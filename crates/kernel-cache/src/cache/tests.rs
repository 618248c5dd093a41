use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::process::geteuid;
use tempfile::TempDir;

use super::*;
use crate::bzimage::around;
use crate::compression::Compression;
use crate::unpack::tests::{file, lz4, payload, sample};

/// Five kernels have room.
const LIMIT: u64 = 320_000;
const SIZE: usize = 60_000;

/// A folder that is made by the cache.
fn cache() -> (TempDir, KernelCache) {
    let folder = tempfile::tempdir().unwrap();
    let cache = KernelCache::open(folder.path().join("a/b"), LIMIT).unwrap();
    (folder, cache)
}

/// The `n`-th of many different kernels.
fn elf(n: u8) -> Vec<u8> {
    let mut elf = sample(SIZE);
    elf[100] = n;
    elf
}

fn bzimage(n: u8) -> File {
    let elf = elf(n);
    file(&around(&payload(Compression::Lz4, lz4(&elf), elf.len())))
}

fn content(file: &File, size: usize) -> Vec<u8> {
    let mut content = vec![0; size];
    file.read_exact_at(&mut content, 0).unwrap();
    content
}

fn assert_is(vmlinux: &Vmlinux, n: u8, origin: Origin) {
    assert_eq!(vmlinux.origin, origin);
    assert!(content(&vmlinux.file, SIZE) == elf(n));
}

/// The files of the cache with this in their names.
fn files(cache: &KernelCache, part: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(cache.path()).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.to_str().unwrap().contains(part))
        .collect()
}

#[test]
fn a_kernel_is_unpacked_once_and_kept() {
    let (_folder, cache) = cache();
    assert_is(&cache.vmlinux(&bzimage(1)).unwrap(), 1, Origin::Unpacked);
    assert_is(&cache.vmlinux(&bzimage(1)).unwrap(), 1, Origin::Kept);
    assert_is(&cache.vmlinux(&bzimage(2)).unwrap(), 2, Origin::Unpacked);
    let again = KernelCache::open(cache.path(), LIMIT).unwrap();
    assert_is(&again.vmlinux(&bzimage(2)).unwrap(), 2, Origin::Kept);
    assert_eq!(files(&cache, ".vmlinux").len(), 2);
    assert_eq!(files(&cache, "tmp-").len(), 0);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(cache.path()), 0o700);
    assert_eq!(mode(&files(&cache, ".vmlinux")[0]), 0o400);
}

#[test]
fn a_file_that_was_not_changed_is_not_read_again() {
    let (_folder, cache) = cache();
    let (first, second) = (bzimage(1), bzimage(2));
    // Just made, and so perhaps still being made: it is not remembered.
    cache.vmlinux(&first).unwrap();
    assert_eq!(files(&cache, ".seen").len(), 0);
    thread::sleep(Duration::from_millis(3100));
    cache.vmlinux(&first).unwrap();
    let seen = files(&cache, ".seen");
    assert_eq!(seen.len(), 1);

    // What is remembered is believed.
    cache.vmlinux(&second).unwrap();
    let other = blake3::hash(&read_payload(&second).unwrap()).to_hex();
    fs::remove_file(&seen[0]).unwrap();
    symlink(other.as_str(), &seen[0]).unwrap();
    assert_is(&cache.vmlinux(&first).unwrap(), 2, Origin::Kept);

    // Any change makes it another file, also one that leaves size and modification time.
    let modified = first.metadata().unwrap().modified().unwrap();
    let byte = content(&first, 1);
    first.write_all_at(&byte, 0).unwrap();
    first.set_modified(modified).unwrap();
    assert_is(&cache.vmlinux(&first).unwrap(), 1, Origin::Kept);
}

#[test]
fn what_is_remembered_of_a_kernel_that_is_gone_is_no_harm() {
    let (_folder, cache) = cache();
    let image = bzimage(1);
    thread::sleep(Duration::from_millis(3100));
    cache.vmlinux(&image).unwrap();
    assert_eq!(files(&cache, ".seen").len(), 1);
    fs::remove_file(&files(&cache, ".vmlinux")[0]).unwrap();
    assert_is(&cache.vmlinux(&image).unwrap(), 1, Origin::Unpacked);
    assert_is(&cache.vmlinux(&image).unwrap(), 1, Origin::Kept);
    // A link that leads out of the folder.
    let seen = &files(&cache, ".seen")[0];
    fs::remove_file(seen).unwrap();
    symlink("../../../etc/passwd", seen).unwrap();
    assert_is(&cache.vmlinux(&image).unwrap(), 1, Origin::Kept);
}

#[test]
fn only_so_many_files_are_remembered() {
    let (_folder, cache) = cache();
    for n in 0..400 {
        symlink("x", cache.path().join(format!("{n}.seen"))).unwrap();
    }
    entry::forget_old_identities(cache.0.folder().unwrap());
    assert_eq!(files(&cache, ".seen").len(), 256);
}

/// Writes over a file that is read-only.
fn damage(path: &Path, damage: impl FnOnce(&File)) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    damage(&File::options().read(true).write(true).open(path).unwrap());
}

#[test]
fn a_kernel_that_the_disk_lost_a_part_of_is_unpacked_again() {
    let damages: [fn(&File); 5] = [
        |file| file.write_all_at(&[0; 4096], 8192).unwrap(),
        |file| file.set_len(0).unwrap(),
        |file| file.set_len(SIZE as u64 / 2).unwrap(),
        |file| file.set_len(SIZE as u64 * 2).unwrap(),
        |file| {
            let size = file.metadata().unwrap().len();
            file.write_all_at(&vec![0; size as usize], 0).unwrap();
        },
    ];
    for how in damages {
        let (_folder, cache) = cache();
        cache.vmlinux(&bzimage(1)).unwrap();
        damage(&files(&cache, ".vmlinux")[0], how);
        assert_is(&cache.vmlinux(&bzimage(1)).unwrap(), 1, Origin::Unpacked);
        assert_is(&cache.vmlinux(&bzimage(1)).unwrap(), 1, Origin::Kept);
    }
}

#[test]
fn a_kernel_that_was_cut_short_is_found_without_its_checksum() {
    let (_folder, cache) = cache();
    let image = bzimage(1);
    thread::sleep(Duration::from_millis(3100));
    cache.vmlinux(&image).unwrap();
    damage(&files(&cache, ".vmlinux")[0], |file| {
        file.set_len(SIZE as u64 / 2).unwrap();
    });
    assert_is(&cache.vmlinux(&image).unwrap(), 1, Origin::Unpacked);
}

#[test]
fn what_has_a_kernels_name_and_is_none_of_ours_is_replaced() {
    let elsewhere = file(b"");
    let puts: [fn(&Path); 3] = [
        |path| symlink("/etc/passwd", path).unwrap(),
        |path| fs::write(path, "x").unwrap(),
        |path| {
            let made = Command::new("mkfifo").arg(path).status().unwrap();
            assert!(made.success());
        },
    ];
    drop(elsewhere);
    for put in puts {
        let (_folder, cache) = cache();
        cache.vmlinux(&bzimage(1)).unwrap();
        let path = files(&cache, ".vmlinux").remove(0);
        fs::remove_file(&path).unwrap();
        put(&path);
        assert_is(&cache.vmlinux(&bzimage(1)).unwrap(), 1, Origin::Unpacked);
        assert_is(&cache.vmlinux(&bzimage(1)).unwrap(), 1, Origin::Kept);
    }
}

#[test]
fn a_kernel_that_others_can_write_to_is_not_believed() {
    let (_folder, cache) = cache();
    cache.vmlinux(&bzimage(1)).unwrap();
    let path = files(&cache, ".vmlinux").remove(0);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    assert_is(&cache.vmlinux(&bzimage(1)).unwrap(), 1, Origin::Unpacked);
    if geteuid().is_root() {
        chown(&path, Some(1), None).unwrap();
        assert_is(&cache.vmlinux(&bzimage(1)).unwrap(), 1, Origin::Unpacked);
    }
}

#[test]
fn the_kernel_that_was_not_used_for_the_longest_time_goes_first() {
    let (_folder, cache) = cache();
    let hour = Duration::from_secs(3600);
    // Five have room.
    for n in 1..=5 {
        cache.vmlinux(&bzimage(n)).unwrap();
        for path in files(&cache, ".vmlinux") {
            let file = File::open(path).unwrap();
            let modified = file.metadata().unwrap().modified().unwrap();
            file.set_modified(modified - 2 * hour).unwrap();
        }
    }
    assert_is(&cache.vmlinux(&bzimage(1)).unwrap(), 1, Origin::Kept);
    assert_is(&cache.vmlinux(&bzimage(6)).unwrap(), 6, Origin::Unpacked);
    assert_eq!(files(&cache, ".vmlinux").len(), 5);
    for n in [1, 3, 4, 5, 6] {
        assert_is(&cache.vmlinux(&bzimage(n)).unwrap(), n, Origin::Kept);
    }
    let total: u64 = files(&cache, "")
        .iter()
        .map(|path| fs::symlink_metadata(path).unwrap().len())
        .sum();
    assert!(total <= LIMIT);
    assert_is(&cache.vmlinux(&bzimage(2)).unwrap(), 2, Origin::Unpacked);
}

#[test]
fn a_kernel_that_is_removed_while_it_is_used_stays_as_it_is() {
    let (_folder, cache) = cache();
    let first = cache.vmlinux(&bzimage(1)).unwrap();
    for n in 2..=9 {
        cache.vmlinux(&bzimage(n)).unwrap();
    }
    assert_is(&first, 1, Origin::Unpacked);
}

#[test]
fn a_kernel_that_is_larger_than_the_cache_is_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let cache = KernelCache::open(folder.path(), SIZE as u64).unwrap();
    assert_is(&cache.vmlinux(&bzimage(1)).unwrap(), 1, Origin::Memory);
    assert_eq!(files(&cache, "").len(), 0);
}

#[test]
fn what_an_interrupted_writer_left_is_removed_and_what_is_being_written_is_not() {
    let (_folder, cache) = cache();
    let leave = |name: &str, age: u64| {
        let path = cache.path().join(name);
        fs::write(&path, "the beginning of a kernel").unwrap();
        let file = File::options().write(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age))
            .unwrap();
        file
    };
    leave("tmp-1-interrupted", 3600);
    leave("tmp-2-just-made", 1);
    let slow = leave("tmp-3-slow", 3600);
    flock(&slow, FlockOperation::NonBlockingLockExclusive).unwrap();
    leave("something else", 3600);
    cache.vmlinux(&bzimage(1)).unwrap();
    assert_eq!(files(&cache, "interrupted").len(), 0);
    for stays in ["just-made", "slow", "something else", ".vmlinux"] {
        assert_eq!(files(&cache, stays).len(), 1, "{stays}");
    }
}

#[test]
fn many_threads_make_one_kernel() {
    let (_folder, cache) = cache();
    let barrier = Barrier::new(8);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                barrier.wait();
                let vmlinux = cache.vmlinux(&bzimage(1)).unwrap();
                assert_ne!(vmlinux.origin, Origin::Memory);
                assert!(content(&vmlinux.file, SIZE) == elf(1));
            });
        }
    });
    assert_eq!(files(&cache, "").len(), 1);
}

/// For the tests below, in a process of its own.
#[test]
#[ignore = "run by other tests"]
fn a_process_of_its_own() {
    let Some(folder) = std::env::var_os("KILN_TEST_CACHE") else {
        return;
    };
    let rounds: u32 = std::env::var("KILN_TEST_ROUNDS").unwrap().parse().unwrap();
    let cache = KernelCache::open(folder, LIMIT).unwrap();
    for round in 0..rounds {
        let n = (round % 12) as u8;
        let vmlinux = cache.vmlinux(&bzimage(n)).unwrap();
        assert_ne!(vmlinux.origin, Origin::Memory);
        assert!(content(&vmlinux.file, SIZE) == elf(n));
    }
}

fn start_process(cache: &KernelCache, rounds: u32) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cache::tests::a_process_of_its_own", "--ignored"])
        .env("KILN_TEST_CACHE", cache.path())
        .env("KILN_TEST_ROUNDS", rounds.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn many_processes_use_one_folder() {
    let (_folder, cache) = cache();
    // More kernels than have room, so that they also take them from each other.
    let mut processes: Vec<_> = (0..4).map(|_| start_process(&cache, 60)).collect();
    for process in &mut processes {
        assert!(process.wait().unwrap().success());
    }
    assert_eq!(files(&cache, "tmp-").len(), 0);
    assert!(!files(&cache, ".vmlinux").is_empty());
}

#[test]
fn a_writer_that_is_killed_leaves_whole_kernels() {
    let (_folder, cache) = cache();
    for pause in 0..12 {
        let mut process = start_process(&cache, u32::MAX);
        let before: Vec<_> = files(&cache, "");
        while files(&cache, "") == before {
            assert!(process.try_wait().unwrap().is_none());
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(pause * 3));
        process.kill().unwrap();
        process.wait().unwrap();
    }
    assert!(!files(&cache, "").is_empty());
    for path in files(&cache, ".vmlinux") {
        let hash = path.file_stem().unwrap().to_str().unwrap();
        assert!(entry::open_checked(cache.0.folder().unwrap(), hash).is_some());
    }
}

#[test]
fn a_folder_that_is_not_ours_alone_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kernels");
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    let error = KernelCache::open(&path, LIMIT).unwrap_err();
    assert!(error.to_string().contains("(mode 777)"), "{error}");
    if geteuid().is_root() {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        chown(&path, Some(12345), None).unwrap();
        let error = KernelCache::open(&path, LIMIT).unwrap_err();
        assert!(
            matches!(error, CacheError::Foreign { owner: 12345, .. }),
            "{error}"
        );
    }
    let link = folder.path().join("link");
    symlink(folder.path(), &link).unwrap();
    let error = KernelCache::open(&link, LIMIT).unwrap_err();
    assert!(matches!(error, CacheError::Open { .. }), "{error}");
    fs::write(folder.path().join("file"), "").unwrap();
    let error = KernelCache::open(folder.path().join("file/kernels"), LIMIT).unwrap_err();
    assert!(matches!(error, CacheError::Open { .. }), "{error}");
}

#[test]
fn a_folder_that_cannot_be_used_is_done_without() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "").unwrap();
    let cache = KernelCache::on_demand(folder.path().join("file/kernels"), LIMIT);
    assert_is(&cache.vmlinux(&bzimage(1)).unwrap(), 1, Origin::Memory);
    let cache = KernelCache::on_demand(folder.path().join("kernels"), LIMIT);
    assert!(!cache.path().exists());
    assert_is(&cache.vmlinux(&bzimage(1)).unwrap(), 1, Origin::Unpacked);
    assert_is(&cache.vmlinux(&bzimage(1)).unwrap(), 1, Origin::Kept);
}

/// A small file system of its own.
struct Disk(TempDir);

impl Disk {
    fn new(size: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let options = format!("size={size},mode=700");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(folder.path())
            .output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(folder));
        }
        eprintln!("skipped: nothing can be mounted here");
        None
    }

    fn make_read_only(&self) {
        let mut mount = Command::new("mount");
        mount.args(["-o", "remount,ro"]).arg(self.0.path());
        assert!(mount.status().unwrap().success());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.0.path()).status();
        assert!(unmounted.unwrap().success());
    }
}

#[test]
fn on_a_full_disk_a_kernel_is_in_memory() {
    let Some(disk) = Disk::new("40k") else {
        return;
    };
    let cache = KernelCache::open(disk.0.path(), LIMIT).unwrap();
    assert_is(&cache.vmlinux(&bzimage(1)).unwrap(), 1, Origin::Memory);
    assert_eq!(files(&cache, "").len(), 0);
}

#[test]
fn a_read_only_cache_is_used_but_takes_nothing() {
    let Some(disk) = Disk::new("1m") else {
        return;
    };
    let cache = KernelCache::open(disk.0.path(), LIMIT).unwrap();
    cache.vmlinux(&bzimage(1)).unwrap();
    disk.make_read_only();
    let cache = KernelCache::open(disk.0.path(), LIMIT).unwrap();
    assert_is(&cache.vmlinux(&bzimage(1)).unwrap(), 1, Origin::Kept);
    assert_is(&cache.vmlinux(&bzimage(2)).unwrap(), 2, Origin::Memory);
}

#[test]
fn what_is_no_bzimage_is_an_error_of_its_own() {
    let (_folder, cache) = cache();
    let error = cache.vmlinux(&file(b"\x7fELF")).unwrap_err();
    assert!(matches!(error, UnpackError::NotABzImage), "{error}");
    assert_eq!(files(&cache, "").len(), 0);
}
