//! The folder as an open directory: all names are looked up in it, and never through a path that
//! somebody could move.

use std::env;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, Stat, openat, readlinkat, renameat,
    renameat_with, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::geteuid;

use crate::CacheError;

/// Bits of the mode with which others can write.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// See [`KernelCache::user_folder`](super::KernelCache::user_folder).
pub(super) fn user_folder() -> Option<PathBuf> {
    let variable = |name| env::var_os(name).map(PathBuf::from);
    let owner = |path: &Path| fs::metadata(path).ok().map(|metadata| metadata.uid());
    folder_of(
        variable("XDG_CACHE_HOME"),
        variable("HOME"),
        owner,
        geteuid().as_raw(),
    )
}

fn folder_of(
    cache_home: Option<PathBuf>,
    home: Option<PathBuf>,
    owner: impl Fn(&Path) -> Option<u32>,
    user: u32,
) -> Option<PathBuf> {
    // The specification: a relative path is invalid, and to be ignored.
    let cache_home = cache_home.filter(|path| path.is_absolute());
    let home = home.filter(|path| path.is_absolute());
    let (base, cache) = match (cache_home, home) {
        (Some(cache), _) => (cache.clone(), cache),
        (None, Some(home)) => (home.clone(), home.join(".cache")),
        (None, None) => return None,
    };
    // The nearest folder that is there decides whose it is.
    let nearest = base.ancestors().find_map(owner)?;
    (nearest == user).then(|| cache.join("kiln/kernels"))
}

/// An open folder of ours.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    fd: File,
}

/// What a listing says of a file.
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) size: u64,
    pub(crate) modified: SystemTime,
}

impl Folder {
    pub(crate) fn open(path: &Path) -> Result<Self, CacheError> {
        let fail = |source| CacheError::Open {
            path: path.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(fail)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(rustix::fs::CWD, path, flags, Mode::empty()).map_err(|e| fail(e.into()))?;
        let fd = File::from(fd);
        let metadata = fd.metadata().map_err(fail)?;
        let user = geteuid().as_raw();
        if metadata.uid() != user {
            return Err(CacheError::Foreign {
                path: path.to_owned(),
                owner: metadata.uid(),
                user,
            });
        }
        if metadata.mode() & WRITABLE_BY_OTHERS != 0 {
            return Err(CacheError::Shared {
                path: path.to_owned(),
                mode: metadata.mode() & 0o7777,
            });
        }
        Ok(Self {
            path: path.to_owned(),
            fd,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a file of ours to read it; `None` for all else.
    pub(crate) fn open_ours(&self, name: &str) -> Option<File> {
        // Not to be kept waiting by a pipe.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(openat(&self.fd, name, flags, Mode::empty()).ok()?);
        let metadata = file.metadata().ok()?;
        let is_ours = metadata.is_file()
            && metadata.uid() == geteuid().as_raw()
            && metadata.mode() & WRITABLE_BY_OTHERS == 0;
        is_ours.then_some(file)
    }

    /// Makes a file that is not there yet.
    pub(crate) fn create(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR)?;
        Ok(File::from(file))
    }

    /// Renames a file; says whether it did, which it does not where the new name is there.
    pub(crate) fn rename_new(&self, from: &str, to: &str) -> io::Result<bool> {
        match renameat_with(&self.fd, from, &self.fd, to, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            // File systems that cannot: one of two alike replaces the other.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                renameat(&self.fd, from, &self.fd, to)?;
                Ok(true)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Removes a file. Somebody else may have done so already.
    pub(crate) fn remove(&self, name: &str) {
        match unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => {
                let path = self.path.display();
                tracing::debug!("remove `{name}` from `{path}`: {error}");
            }
        }
    }

    pub(crate) fn link(&self, target: &str, name: &str) -> io::Result<()> {
        Ok(symlinkat(target, &self.fd, name)?)
    }

    pub(crate) fn read_link(&self, name: &str) -> Option<String> {
        let target = readlinkat(&self.fd, name, Vec::new()).ok()?;
        target.into_string().ok()
    }

    /// The files and links whose names `wanted` takes. Files that vanish meanwhile are left out.
    pub(crate) fn list(&self, wanted: impl Fn(&str) -> bool) -> io::Result<Vec<Listed>> {
        let mut listed = Vec::new();
        for entry in Dir::read_from(&self.fd)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else {
                continue;
            };
            if !wanted(name) {
                continue;
            }
            let Ok(stat) = statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            if matches!(
                FileType::from_raw_mode(stat.st_mode),
                FileType::RegularFile | FileType::Symlink
            ) {
                listed.push(Listed {
                    name: name.to_owned(),
                    size: u64::try_from(stat.st_size).unwrap_or(0),
                    modified: modified(&stat),
                });
            }
        }
        Ok(listed)
    }
}

fn modified(stat: &Stat) -> SystemTime {
    let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_folder_follows_the_xdg_specification() {
        let ours = |_: &Path| Some(1000);
        let folder = |cache: Option<&str>, home: Option<&str>| {
            folder_of(cache.map(Into::into), home.map(Into::into), ours, 1000)
        };
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(folder(Some("/c"), Some("/h")), path("/c/kiln/kernels"));
        assert_eq!(folder(None, Some("/h")), path("/h/.cache/kiln/kernels"));
        assert_eq!(
            folder(Some("c"), Some("/h")),
            path("/h/.cache/kiln/kernels")
        );
        assert_eq!(folder(Some(""), Some("")), None);
        assert_eq!(folder(None, None), None);
    }

    #[test]
    fn the_home_of_another_user_is_left_alone() {
        let home = || Some(PathBuf::from("/home/me/not/there/yet"));
        let owner = |path: &Path| (path == Path::new("/home/me")).then_some(1000);
        assert!(folder_of(None, home(), owner, 1000).is_some());
        assert_eq!(folder_of(None, home(), owner, 0), None);
        assert_eq!(folder_of(None, home(), |_| None, 1000), None);
    }
}
