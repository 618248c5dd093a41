//! The initial RAM disk.

use std::fs::File;
use std::path::Path;

use kiln_memory::GuestMemory;

use crate::Error;
use crate::file::ImageFile;
use crate::kernel::Loaded;
use crate::layout::KERNEL_MIN_START;

const PAGE: u64 = 4096;

/// An initial RAM disk for Linux, or the one module of another PVH kernel.
///
/// It can be loaded into any number of machines; clones share the open file.
#[derive(Clone, Debug)]
pub struct Initrd(ImageFile);

impl Initrd {
    /// Opens an initrd. What is in it is the guest's matter.
    ///
    /// # Errors
    ///
    /// [`Error::File`], [`Error::NotAFile`] or [`Error::Empty`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        ImageFile::open(KIND, path.as_ref()).map(Self)
    }

    /// Takes an open file, named `name` in messages. Its position is moved when it is loaded.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open).
    pub fn from_file(file: File, name: impl Into<String>) -> Result<Self, Error> {
        ImageFile::new(KIND, file, name.into()).map(Self)
    }

    /// Its name, for messages.
    pub fn name(&self) -> &str {
        self.0.name()
    }

    /// Its size in bytes.
    pub(super) fn len(&self) -> u64 {
        self.0.len()
    }

    /// The highest place for it below `end` that begins a page and is free of the kernel.
    pub(super) fn place(&self, end: u64, kernel: &Loaded) -> Result<u64, Error> {
        let free = [
            (kernel.end.max(KERNEL_MIN_START), end),
            (KERNEL_MIN_START, kernel.start.min(end)),
        ];
        let free = free.map(|(start, end)| (start.next_multiple_of(PAGE), end));
        for (start, end) in free {
            let place = end
                .checked_sub(self.len())
                .map(|place| place - place % PAGE);
            if let Some(place) = place.filter(|&place| place >= start) {
                return Ok(place);
            }
        }
        let available = free
            .map(|(start, end)| end.saturating_sub(start))
            .into_iter()
            .max();
        Err(Error::InitrdTooLarge {
            name: self.name().to_owned(),
            size: self.len(),
            available: available.unwrap_or(0),
        })
    }

    /// Copies it to a place that [`place`](Self::place) found.
    pub(super) fn load(&self, memory: &GuestMemory, address: u64) -> Result<(), Error> {
        self.0.read_into(0, self.len(), memory, address)
    }
}

const KIND: &str = "initrd";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::tests::temporary;

    const MIB: u64 = 1 << 20;

    fn initrd(size: usize) -> Initrd {
        Initrd::from_file(temporary(&vec![1; size]), "initrd.img").unwrap()
    }

    fn kernel(start: u64, end: u64) -> Loaded {
        Loaded {
            entry: start,
            start,
            end,
        }
    }

    #[test]
    fn it_is_placed_as_high_as_it_can_be() {
        let kernel = kernel(16 * MIB, 32 * MIB);
        assert_eq!(
            initrd(4096).place(64 * MIB, &kernel).unwrap(),
            64 * MIB - 4096
        );
        assert_eq!(
            initrd(4097).place(64 * MIB, &kernel).unwrap(),
            64 * MIB - 8192
        );
        assert_eq!(
            initrd(1).place(64 * MIB - 1, &kernel).unwrap(),
            64 * MIB - 4096
        );
    }

    #[test]
    fn it_never_lies_over_the_kernel() {
        let kernel = kernel(16 * MIB, 32 * MIB + 1);
        let behind = (MIB - 4096) as usize;
        assert_eq!(
            initrd(behind).place(33 * MIB, &kernel).unwrap(),
            32 * MIB + 4096
        );
        // A byte more, and the room before the kernel is the only one left.
        let before = initrd(behind + 1).place(33 * MIB, &kernel).unwrap();
        assert_eq!(before, 15 * MIB);
        assert_eq!(
            initrd(4096).place(20 * MIB, &kernel).unwrap(),
            16 * MIB - 4096
        );
    }

    #[test]
    fn one_that_does_not_fit_is_refused_with_what_is_left() {
        let kernel = kernel(16 * MIB, 32 * MIB);
        let error = initrd((15 * MIB + 1) as usize)
            .place(33 * MIB, &kernel)
            .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("`initrd.img` of 15728641 bytes"), "{text}");
        assert!(text.contains(": 15728640 bytes are left"), "{text}");
        assert!(initrd(1).place(0, &kernel).is_err());
    }
}
