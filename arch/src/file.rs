//! A file whose content goes into guest memory.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_memory::{GuestMemory, map_file};
use vm_memory::{Bytes, GuestAddress};

use crate::Error;

/// A regular file that is not empty, with a name for messages.
#[derive(Clone, Debug)]
pub(crate) struct ImageFile {
    kind: &'static str,
    name: String,
    /// Whole reads move the file's position, which all that share the descriptor see: one at a
    /// time. Everything else reads at offsets.
    file: Arc<Mutex<File>>,
    len: u64,
}

impl ImageFile {
    pub(crate) fn open(kind: &'static str, path: &Path) -> Result<Self, Error> {
        let name = path.display().to_string();
        let fail = |source| Error::File {
            kind,
            name: name.clone(),
            action: "open",
            source,
        };
        // To open a pipe would wait for its other end: look first.
        if !fs::metadata(path).map_err(fail)?.is_file() {
            return Err(Error::NotAFile { kind, name });
        }
        let file = File::open(path).map_err(fail)?;
        Self::new(kind, file, name)
    }

    pub(crate) fn new(kind: &'static str, file: File, name: String) -> Result<Self, Error> {
        let metadata = match file.metadata() {
            Ok(metadata) => metadata,
            Err(source) => {
                return Err(Error::File {
                    kind,
                    name,
                    action: "read",
                    source,
                });
            }
        };
        if !metadata.is_file() {
            return Err(Error::NotAFile { kind, name });
        }
        if metadata.len() == 0 {
            return Err(Error::Empty { kind, name });
        }
        Ok(Self {
            kind,
            name,
            len: metadata.len(),
            file: Arc::new(Mutex::new(file)),
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The bytes that it had when it was opened.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Reads `len` bytes at an offset, or as many as there are.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, Error> {
        let left = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; len.min(left)];
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.read_exact_at(&mut bytes, offset)
            .map_err(|source| self.read_error(source))?;
        Ok(bytes)
    }

    /// Gives the file, at its beginning, to a reader.
    pub(crate) fn rewound<T>(&self, reader: impl FnOnce(&mut File) -> T) -> Result<T, Error> {
        self.unchanged(|file| file.rewind().map(|()| reader(file)))?
            .map_err(|source| self.read_error(source))
    }

    /// Gives the file to someone, if it is as long as it was.
    pub(crate) fn unchanged<T>(&self, f: impl FnOnce(&mut File) -> T) -> Result<T, Error> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // What was checked and placed was the file as it was then.
        if file
            .metadata()
            .map_err(|source| self.read_error(source))?
            .len()
            != self.len
        {
            return Err(Error::Changed {
                kind: self.kind,
                name: self.name.clone(),
            });
        }
        Ok(f(&mut file))
    }

    /// Reads `size` bytes at an offset into guest memory.
    pub(crate) fn read_into(
        &self,
        offset: u64,
        size: u64,
        memory: &GuestMemory,
        address: u64,
    ) -> Result<(), Error> {
        if size == 0 {
            return Ok(());
        }
        let count = usize::try_from(size).unwrap_or(usize::MAX);
        self.unchanged(|file| {
            file.seek(SeekFrom::Start(offset))?;
            memory
                .read_exact_volatile_from(GuestAddress(address), file, count)
                .map_err(io::Error::other)
        })?
        .map_err(|source| self.read_error(source))
    }

    /// Maps `size` bytes at an offset over guest memory, if that can be; says whether it did.
    pub(crate) fn map(
        &self,
        offset: u64,
        size: u64,
        memory: &GuestMemory,
        address: u64,
    ) -> Result<bool, Error> {
        // A file system that cannot map can be read.
        self.unchanged(|file| map_file(memory, GuestAddress(address), file, offset, size))
            .map(|mapped| mapped.unwrap_or(false))
    }

    pub(crate) fn read_error(&self, source: io::Error) -> Error {
        Error::File {
            kind: self.kind,
            name: self.name.clone(),
            action: "read",
            source,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use super::*;

    /// A file with a content, that nobody else sees.
    pub(crate) fn temporary(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn what_is_not_a_regular_file_is_refused_without_waiting_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let error = ImageFile::open("kernel", folder.path()).unwrap_err();
        assert!(
            error.to_string().ends_with("is not a regular file"),
            "{error}"
        );
        let error = ImageFile::open("kernel", Path::new("/dev/zero")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "kernel `/dev/zero` is not a regular file"
        );
        let (reader, _writer) = io::pipe().unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(reader));
        let error = ImageFile::new("initrd", file, "a pipe".to_owned()).unwrap_err();
        assert_eq!(error.to_string(), "initrd `a pipe` is not a regular file");
    }

    #[test]
    fn a_missing_and_an_empty_file_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("none");
        let error = ImageFile::open("initrd", &path).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("open initrd `{}`", path.display())
        );
        assert!(std::error::Error::source(&error).is_some());
        let error = ImageFile::new("kernel", temporary(b""), "x".to_owned()).unwrap_err();
        assert_eq!(error.to_string(), "kernel `x` is empty");
    }

    #[test]
    fn a_read_past_the_end_gives_what_there_is() {
        let file = ImageFile::new("kernel", temporary(b"abcdef"), "x".to_owned()).unwrap();
        assert_eq!(file.read(4, 10).unwrap(), b"ef");
        assert_eq!(file.read(10, 10).unwrap(), b"");
        assert_eq!(file.read(u64::MAX, 10).unwrap(), b"");
    }
}
