//! A qcow2 image as a disk.

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use imago::{FormatAccess, Mapping};
use kiln_memory::{GuestSlice, scatter};

use super::chain::{self, Chain};
use super::compressed::checked;
use super::image::{Image, ImageFile, zero};
use super::{BackingFiles, DriverPanic, Qcow2Error, guarded};
use crate::virtio::block::{BlockBackend, BlockProperties, RawFileError, SECTOR_SIZE};

/// The most bytes that are decompressed at once: the largest cluster.
const BOUNCE: usize = 2 << 20;
/// How much of a disk is discarded at once: a multiple of every cluster size.
const DISCARD_PIECE: u64 = 64 << 20;

/// A disk image in the qcow2 format, with its backing files.
///
/// The image is locked as a [`RawFile`](crate::virtio::block::RawFile) is; its backing files are
/// opened for reading, and locked shared. Data goes straight between the file and guest RAM, but for
/// compressed clusters.
pub struct Qcow2File {
    /// Nothing once the driver has panicked.
    access: Option<FormatAccess<Image>>,
    pub(super) file: Arc<ImageFile>,
    size: u64,
    read_only: bool,
    id: String,
    cluster_bits: u32,
    discard: Discard,
    bounce: Vec<u8>,
}

/// What an image can do with what the guest does not need any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Discard {
    /// Nothing: version 2 of the format has no zeros that hide a backing file.
    None,
    /// It can forget it, and has zeros there as there is no backing file.
    ToNothing,
    /// It can note zeros.
    ToZeros,
}

impl Qcow2File {
    /// Opens an image, for reading and writing unless `read_only`, with the backing files that are
    /// allowed.
    ///
    /// # Errors
    ///
    /// [`Qcow2Error`], which says for each case what is wrong with the image.
    pub fn open(
        path: impl AsRef<Path>,
        read_only: bool,
        backing: &BackingFiles,
    ) -> Result<Self, Qcow2Error> {
        let path = path.as_ref();
        Self::new(path, chain::open_path(path, read_only, backing)?, read_only)
    }

    /// The same for a file that is open already, and open for writing unless `read_only`. `path` is
    /// what it is called in messages, and what the names of backing files are relative to.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open).
    pub fn from_file(
        file: File,
        path: impl AsRef<Path>,
        read_only: bool,
        backing: &BackingFiles,
    ) -> Result<Self, Qcow2Error> {
        let path = path.as_ref();
        let chain = chain::open_file(path, file, read_only, backing)?;
        Self::new(path, chain, read_only)
    }

    fn new(path: &Path, chain: Chain, read_only: bool) -> Result<Self, Qcow2Error> {
        let size = chain.header.size;
        let disk = Self {
            access: Some(chain.access),
            file: chain.file,
            size,
            read_only,
            id: chain.id,
            cluster_bits: chain.header.cluster_bits,
            discard: match (chain.header.version, &chain.header.backing) {
                (3.., _) => Discard::ToZeros,
                (_, None) => Discard::ToNothing,
                _ => Discard::None,
            },
            bounce: Vec::new(),
        };
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
            return Err(RawFileError::Size {
                path: path.to_owned(),
                size,
            }
            .into());
        }
        Ok(disk)
    }

    /// Checks the compressed clusters that a change of this range changes in part: the driver copies
    /// the rest of them.
    fn check_edges(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let (cluster, size) = (1u64 << self.cluster_bits, self.size);
        let end = offset.saturating_add(len);
        self.with(|access, bounce| {
            for edge in [offset, end] {
                let start = edge - edge % cluster;
                if start != edge {
                    check_compressed(access, bounce, start, (start + cluster).min(size))?;
                }
            }
            Ok(())
        })
    }

    /// Has the driver do something, if it can still be asked.
    pub(super) fn with<T>(
        &mut self,
        run: impl FnOnce(&mut FormatAccess<Image>, &mut Vec<u8>) -> io::Result<T>,
    ) -> io::Result<T> {
        let Some(access) = &mut self.access else {
            return Err(io::Error::other("the disk gave up after an earlier error"));
        };
        let result = guarded(|| run(access, &mut self.bounce));
        if let Err(error) = &result
            && error
                .get_ref()
                .is_some_and(|source| source.is::<DriverPanic>())
        {
            // What it has in memory may be half of a change: none of it must get to the file.
            self.file.freeze();
            let access = self.access.take();
            let _ = guarded(|| {
                drop(access);
                Ok(())
            });
            let path = self.file.path().display();
            tracing::error!("disk image `{path}` gives only errors from now on: {error}");
        }
        result
    }
}

impl BlockBackend for Qcow2File {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        self.with(|access, bounce| read(access, bounce, offset, buffers))
    }

    fn write_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        let len = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        self.check_edges(offset, len)?;
        self.with(|access, _| write(access, offset, buffers))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.with(|access, _| access.flush())?;
        self.file.sync()
    }

    fn default_id(&self) -> String {
        self.id.clone()
    }

    fn properties(&self) -> BlockProperties {
        BlockProperties {
            discard: self.discard != Discard::None,
            discard_alignment: 1 << self.cluster_bits,
            write_zeroes: self.discard == Discard::ToZeros,
            ..BlockProperties::default()
        }
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let (file, kind) = (Arc::clone(&self.file), self.discard);
        self.check_edges(offset, len)?;
        self.with(|access, _| {
            give_back(access, &file, offset, len, |access, at, len| match kind {
                Discard::ToZeros => access.discard_to_any(at, len),
                _ => access.discard_to_backing(at, len),
            })
        })
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let file = Arc::clone(&self.file);
        self.check_edges(offset, len)?;
        self.with(|access, _| match unmap {
            true => give_back(access, &file, offset, len, FormatAccess::discard_to_zero),
            false => access.write_zeroes(offset, len),
        })
    }
}

/// Discards a range with `discard`, and gives the host back what the file had for it.
fn give_back(
    access: &mut FormatAccess<Image>,
    file: &ImageFile,
    offset: u64,
    len: u64,
    discard: impl Fn(&mut FormatAccess<Image>, u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let end = offset.saturating_add(len);
    let mut at = offset;
    while at < end {
        // A piece at a time, so that the list of places stays short.
        let piece = DISCARD_PIECE - at % DISCARD_PIECE;
        let piece = piece.min(end - at);
        let places = places(access, at, piece)?;
        discard(access, at, piece)?;
        for (guest, host, len) in places {
            let mut done = 0;
            while done < len {
                // Where the mapping is still there, it was not all of a cluster.
                let (mapping, now) = access.get_mapping(guest + done, len - done)?;
                if now == 0 {
                    break;
                }
                if matches!(mapping, Mapping::Zero { .. }) {
                    file.punch(host + done, now)?;
                }
                done += now;
            }
        }
        at += piece;
    }
    Ok(())
}

/// What of the disk is where in the file, for that part of a range that only this disk uses: the
/// place on the disk, in the file, and the length, of each cluster or several together.
fn places(access: &FormatAccess<Image>, offset: u64, len: u64) -> io::Result<Vec<(u64, u64, u64)>> {
    let mut places = Vec::new();
    let mut done = 0;
    while done < len {
        let (mapping, now) = access.get_mapping(offset + done, len - done)?;
        if now == 0 {
            break;
        }
        if let Mapping::Raw {
            offset: host,
            writable: true,
            ..
        } = mapping
        {
            places.push((offset + done, host, now));
        }
        done += now;
    }
    Ok(places)
}

fn read(
    access: &FormatAccess<Image>,
    bounce: &mut Vec<u8>,
    offset: u64,
    buffers: &[GuestSlice<'_>],
) -> io::Result<()> {
    let total = buffers.iter().map(|buffer| buffer.len()).sum();
    let mut done = 0;
    while done < total {
        let (mapping, len) = access.get_mapping(offset + done as u64, (total - done) as u64)?;
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(total - done);
        let len = match mapping {
            Mapping::Special { .. } => len.min(BOUNCE),
            _ => len,
        };
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let part = part(buffers, done, len);
        match mapping {
            Mapping::Raw {
                storage, offset, ..
            } => storage.read_guest(&part, offset)?,
            Mapping::Zero { .. } => zero(&part, 0),
            Mapping::Special { layer, offset, .. } => {
                bounce.resize(len, 0);
                checked(|| layer.read(&mut bounce[..], offset))?;
                scatter(bounce, part.iter());
            }
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        done += len;
    }
    Ok(())
}

/// Reads what is compressed of a range, to see that it can be.
fn check_compressed(
    access: &FormatAccess<Image>,
    bounce: &mut Vec<u8>,
    mut at: u64,
    end: u64,
) -> io::Result<()> {
    while at < end {
        let (mapping, len) = access.get_mapping(at, end - at)?;
        if len == 0 {
            break;
        }
        if let Mapping::Special { layer, offset, .. } = mapping {
            bounce.resize(usize::try_from(len).unwrap_or(BOUNCE).min(BOUNCE), 0);
            checked(|| layer.read(&mut bounce[..], offset))?;
            at += bounce.len() as u64;
            continue;
        }
        at += len;
    }
    Ok(())
}

fn write(access: &FormatAccess<Image>, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
    let total = buffers.iter().map(|buffer| buffer.len()).sum();
    let mut done = 0;
    while done < total {
        let at = offset + done as u64;
        // Until it is committed, the guest's old data is where it was.
        let place = access.prepare_data_mapping(at, (total - done) as u64, true)?;
        let len = usize::try_from(place.length()).unwrap_or(usize::MAX);
        let len = len.min(total - done);
        if len == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        let part = part(buffers, done, len);
        place.storage().write_guest(&part, place.offset())?;
        access.commit_data_mapping(place)?;
        done += len;
    }
    Ok(())
}

/// `len` bytes of `buffers` behind the first `skip`.
fn part<'s, 'm>(
    buffers: &'s [GuestSlice<'m>],
    mut skip: usize,
    mut len: usize,
) -> Cow<'s, [GuestSlice<'m>]> {
    if skip == 0 && buffers.iter().map(|buffer| buffer.len()).sum::<usize>() == len {
        return Cow::Borrowed(buffers);
    }
    let mut pieces = Vec::new();
    for buffer in buffers {
        let start = skip.min(buffer.len());
        let now = len.min(buffer.len() - start);
        skip -= start;
        len -= now;
        if now > 0
            && let Ok(piece) = buffer.subslice(start, now)
        {
            pieces.push(piece);
        }
    }
    Cow::Owned(pieces)
}

impl Drop for Qcow2File {
    fn drop(&mut self) {
        let Some(access) = self.access.take() else {
            return;
        };
        // What the guest has not flushed need not last, but nothing is lost without need.
        let result = guarded(|| {
            let flushed = access.flush();
            drop(access);
            flushed
        });
        if let Err(error) = result {
            let path = self.file.path().display();
            tracing::warn!("close disk image `{path}`: {error}");
        }
    }
}

impl fmt::Debug for Qcow2File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2File")
            .field("path", &self.file.path())
            .field("size", &self.size)
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}
