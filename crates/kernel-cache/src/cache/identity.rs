//! By what a file is known again.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

/// The end of the names of links by identity.
pub(super) const SUFFIX: &str = ".seen";

/// No file system's times are coarser, but for FAT's, and those of 2 seconds are its too.
const SETTLED: Duration = Duration::from_secs(2);

/// A file as it is now, in this run of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    boot_id: &'static str,
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Identity {
    /// Looks at a file. `None` where it is not known which run of the host this is.
    pub(super) fn of(file: &File) -> io::Result<Option<Self>> {
        let metadata = file.metadata()?;
        Ok(boot_id().map(|boot_id| Self::from_parts(boot_id, &metadata)))
    }

    fn from_parts(boot_id: &'static str, file: &Metadata) -> Self {
        Self {
            boot_id,
            device: file.dev(),
            inode: file.ino(),
            size: file.size(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        }
    }

    /// Whether a change from `now` on gives the file another time of its last change.
    pub(super) fn is_settled(&self, now: SystemTime) -> bool {
        let Ok(seconds) = u64::try_from(self.changed.0) else {
            return false;
        };
        let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds + 1);
        now.duration_since(changed).is_ok_and(|age| age >= SETTLED)
    }

    /// The name of its link.
    pub(super) fn name(&self) -> String {
        let hash = blake3::hash(format!("{self:?}").as_bytes()).to_hex();
        format!("{}{SUFFIX}", &hash[..32])
    }
}

/// Which run of the host this is: a number that is new each time it starts.
fn boot_id() -> Option<&'static str> {
    static ID: OnceLock<Option<String>> = OnceLock::new();
    let read = || fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
    ID.get_or_init(read).as_deref()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_of_a_file_and_every_run_of_the_host_has_a_name_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "x").unwrap();
        let identity = || Identity::of(&File::open(&path).unwrap()).unwrap().unwrap();
        let first = identity();
        assert_eq!(first, identity());
        assert_eq!(first.name(), identity().name());

        let mut names = vec![first.name()];
        let changes: [fn(&mut Identity); 6] = [
            |it| it.boot_id = "another",
            |it| it.device += 1,
            |it| it.inode += 1,
            |it| it.size += 1,
            |it| it.modified.1 ^= 1,
            |it| it.changed.1 ^= 1,
        ];
        for change in changes {
            let mut other = first;
            change(&mut other);
            names.push(other.name());
        }
        // The time of the last modification can be set back; that of the last change cannot.
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        fs::write(&path, "y").unwrap();
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(modified)
            .unwrap();
        assert_eq!(identity().modified, first.modified);
        names.push(identity().name());

        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn a_file_that_was_just_changed_may_change_again_unseen() {
        let file = tempfile::tempfile().unwrap();
        let identity = Identity::of(&file).unwrap().unwrap();
        let now = SystemTime::now();
        assert!(!identity.is_settled(now));
        assert!(identity.is_settled(now + Duration::from_secs(4)));
        // The clock was set back.
        assert!(!identity.is_settled(now - Duration::from_secs(3600)));
    }
}
