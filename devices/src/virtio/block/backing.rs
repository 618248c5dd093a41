//! What other files of the host an image may name.

use std::path::PathBuf;

/// Which backing files an image may have.
///
/// An image names its backing file itself, and whoever made the image, or a guest that once had it
/// as a raw disk, may have chosen any file of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BackingFiles {
    /// None: an image that names one is refused.
    #[default]
    Refuse,
    /// These, by whatever name the images call them.
    Only(Vec<PathBuf>),
    /// Any that the image names, and those that these name: for images that are trusted.
    Allow,
}
