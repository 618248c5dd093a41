//! Why a qcow2 image is not taken.

use std::io;
use std::path::PathBuf;

use crate::virtio::block::RawFileError;

/// Why a qcow2 image could not be opened. The message is one line, and what the image itself says
/// stands in it as a quoted string.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Qcow2Error {
    /// The file, or one of its backing files, could not be opened or is in use.
    #[error(transparent)]
    File(#[from] RawFileError),
    /// The file could not be read.
    #[error("read qcow2 image `{}`", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is an image of another format.
    #[error("open `{}` as a qcow2 image: it does not begin like one (give its format: raw?)", path.display())]
    NotQcow2 {
        /// The file.
        path: PathBuf,
    },
    /// The image contradicts itself or the format.
    #[error("open qcow2 image `{}`: it is malformed: {problem}", path.display())]
    Malformed {
        /// The image.
        path: PathBuf,
        /// What is wrong in it.
        problem: String,
    },
    /// The image uses a part of the format that is not there.
    #[error("open qcow2 image `{}`: it has {feature}, which Kiln cannot use (`qemu-img convert` makes an image without)", path.display())]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// What it uses.
        feature: String,
    },
    /// The image has to be repaired first.
    #[error("open qcow2 image `{}`: {problem} (`qemu-img check -r all` repairs it)", path.display())]
    Unclean {
        /// The image.
        path: PathBuf,
        /// What it is in need of.
        problem: &'static str,
    },
    /// The image names another file of the host.
    #[error(
        "open qcow2 image `{}`: it asks for the backing file {name:?}, and an image may name no other \
         file unless the disk's `backing` option allows it (`allow`, or the path of that file)",
        path.display()
    )]
    BackingRefused {
        /// The image.
        path: PathBuf,
        /// The file that it asks for.
        name: String,
    },
    /// The image names a backing file in a way that is not known.
    #[error("open qcow2 image `{}`: it asks for the backing file {name:?}: {problem}", path.display())]
    Backing {
        /// The image.
        path: PathBuf,
        /// The file that it asks for.
        name: String,
        /// What is not known of it.
        problem: String,
    },
    /// The chain of backing files is too long.
    #[error("open qcow2 image `{}`: there are more than {limit} backing files behind it", path.display())]
    Depth {
        /// The image that it began with.
        path: PathBuf,
        /// The most backing files that an image can have.
        limit: usize,
    },
    /// The chain of backing files leads to itself.
    #[error("open qcow2 image `{}`: its backing file {name:?} is an image that is built on it", path.display())]
    Loop {
        /// The image.
        path: PathBuf,
        /// The backing file.
        name: String,
    },
    /// The image's tables could not be used.
    #[error("open qcow2 image `{}`", path.display())]
    Tables {
        /// The image.
        path: PathBuf,
        /// What is wrong with them, or what the system said.
        source: io::Error,
    },
}
