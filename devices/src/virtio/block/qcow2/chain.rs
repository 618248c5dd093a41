//! An image and the backing files behind it.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};

use super::header::{self, Backing, Header};
use super::image::{Content, Image, ImageFile};
use super::{BackingFiles, Qcow2Error, guarded, refcounts};
use crate::virtio::block::raw::{Opened, RawFileError, file_id, open_locked};

/// The most backing files behind an image: each has tables in memory.
pub(super) const MOST_BACKING_FILES: usize = 16;

/// An image that is open, with all that is behind it.
pub(super) struct Chain {
    pub(super) access: FormatAccess<Image>,
    pub(super) file: Arc<ImageFile>,
    pub(super) header: Header,
    pub(super) id: String,
}

/// Opens the image `opened`.
pub(super) fn open(
    path: &Path,
    opened: Opened,
    read_only: bool,
    allowed: &BackingFiles,
) -> Result<Chain, Qcow2Error> {
    let id = file_id(&opened.metadata);
    let header = header::read(path, &opened.file, opened.size)?;
    if !read_only {
        refcounts::check(path, &opened.file, &header, opened.size)?;
    }
    let mut seen = vec![identity(&opened.metadata)];
    let backing = match &header.backing {
        Some(backing) => Some(open_backing(path, backing, allowed, &mut seen)?),
        None => None,
    };
    let Opened { file, size, .. } = opened;
    let file = match read_only {
        true => ImageFile::read_only(path, file, size),
        false => {
            let limit = growth_limit(&header, size);
            ImageFile::writable(path, file, size, &header, limit)
        }
    };
    let access = access(path, &file, !read_only, backing)?;
    file.begin_use();
    Ok(Chain {
        access,
        file,
        header,
        id,
    })
}

/// What the file cannot grow beyond: every cluster of the disk once more, and the tables for that,
/// which are a sixteenth of it in the smallest clusters with the widest refcounts.
fn growth_limit(header: &Header, file_size: u64) -> u64 {
    let few = 1_u64 << (header.cluster_bits + 6);
    let disk = header.size.saturating_add(header.size / 16);
    file_size
        .saturating_add(disk)
        .saturating_add(header.refcount_table_bytes)
        .saturating_add(few)
}

/// What tells files apart, whatever their names.
fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Opens a backing file, and what is behind it, for reading.
fn open_backing(
    path: &Path,
    backing: &Backing,
    allowed: &BackingFiles,
    seen: &mut Vec<(u64, u64)>,
) -> Result<FormatAccess<Image>, Qcow2Error> {
    // The recursion ends here, after a few steps.
    if seen.len() > MOST_BACKING_FILES {
        return Err(Qcow2Error::Depth {
            path: path.to_owned(),
            limit: MOST_BACKING_FILES,
        });
    }
    let name = &backing.name;
    let problem = |problem: &str| Qcow2Error::Backing {
        path: path.to_owned(),
        name: name.clone(),
        problem: problem.to_owned(),
    };
    let target = allowed_path(path, name, allowed)?;
    let is_qcow2 = match backing.format.as_deref() {
        Some("qcow2") => true,
        Some("raw") => false,
        // Its content does not tell: where the file was some guest's raw disk, that guest chose it.
        None => {
            return Err(problem(
                "it does not say the format (`qemu-img rebase -u -F` does)",
            ));
        }
        Some(_) => return Err(problem("its format is neither qcow2 nor raw")),
    };
    let metadata = std::fs::metadata(&target).map_err(|source| RawFileError::Open {
        path: target.clone(),
        source,
    })?;
    if seen.contains(&identity(&metadata)) {
        return Err(Qcow2Error::Loop {
            path: path.to_owned(),
            name: name.clone(),
        });
    }
    let opened = open_locked(&target, true)?;
    // The name may lead elsewhere by now.
    if identity(&opened.metadata) != identity(&metadata) {
        return Err(problem("it was replaced while it was opened"));
    }
    seen.push(identity(&metadata));
    if is_qcow2 {
        let header = header::read(&target, &opened.file, opened.size)?;
        let next = match &header.backing {
            Some(next) => Some(open_backing(&target, next, allowed, seen)?),
            None => None,
        };
        let file = ImageFile::read_only(&target, opened.file, opened.size);
        return access(&target, &file, false, next);
    }
    let file = ImageFile::read_only(&target, opened.file, opened.size);
    let raw = guarded(|| Raw::open_image(Image::new(&file, Content::Data), false));
    let raw = raw.map_err(|source| tables_error(&target, source))?;
    Ok(FormatAccess::new(raw))
}

/// Where the backing file is that an image asks for, if it may have it.
fn allowed_path(path: &Path, name: &str, allowed: &BackingFiles) -> Result<PathBuf, Qcow2Error> {
    let refused = || Qcow2Error::BackingRefused {
        path: path.to_owned(),
        name: name.to_owned(),
    };
    if *allowed == BackingFiles::Refuse {
        return Err(refused());
    }
    // QEMU takes names with a protocol in front for something else than files.
    let protocol = name
        .split('/')
        .next()
        .is_some_and(|first| first.contains(':'));
    if protocol {
        return Err(Qcow2Error::Backing {
            path: path.to_owned(),
            name: name.to_owned(),
            problem: "it is not the path of a file".to_owned(),
        });
    }
    let wanted = path.parent().unwrap_or(Path::new("")).join(name);
    let BackingFiles::Only(paths) = allowed else {
        return Ok(wanted);
    };
    // By what it is, and opened by the name that is allowed: the image's own name is not followed.
    let identity_of = |path: &Path| std::fs::metadata(path).ok().map(|file| identity(&file));
    let wanted = identity_of(&wanted).ok_or_else(refused)?;
    let found = paths.iter().find(|path| identity_of(path) == Some(wanted));
    found.cloned().ok_or_else(refused)
}

/// The driver of one image.
fn access(
    path: &Path,
    file: &Arc<ImageFile>,
    writable: bool,
    backing: Option<FormatAccess<Image>>,
) -> Result<FormatAccess<Image>, Qcow2Error> {
    let qcow2 = guarded(|| {
        let mut qcow2 = Qcow2::<Image>::builder(Image::new(file, Content::Tables))
            .write(writable)
            .backing(backing)
            .data_file(None)
            .open(DenyImplicitOpenGate::default())?;
        // The same file once more, so that the guest's data can be told from tables.
        qcow2.set_data_file(Some(Image::new(file, Content::Data)));
        Ok(qcow2)
    });
    let qcow2 = qcow2.map_err(|source| tables_error(path, source))?;
    Ok(FormatAccess::new(qcow2))
}

fn tables_error(path: &Path, source: std::io::Error) -> Qcow2Error {
    Qcow2Error::Tables {
        path: path.to_owned(),
        source,
    }
}

/// Opens an image by its path.
pub(super) fn open_path(
    path: &Path,
    read_only: bool,
    allowed: &BackingFiles,
) -> Result<Chain, Qcow2Error> {
    open(path, open_locked(path, read_only)?, read_only, allowed)
}

/// Opens an image that is open already.
pub(super) fn open_file(
    path: &Path,
    file: File,
    read_only: bool,
    allowed: &BackingFiles,
) -> Result<Chain, Qcow2Error> {
    let opened = crate::virtio::block::raw::lock_open(path, file, read_only)?;
    open(path, opened, read_only, allowed)
}
