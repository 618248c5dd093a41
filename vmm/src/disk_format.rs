//! What the bytes of a disk image mean.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What the bytes of a disk image mean. They are never looked at to find out: a guest could write
/// the header of another format into its raw disk, with the names of files in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DiskFormat {
    /// They are the disk, byte for byte.
    Raw,
    /// The qcow2 format of QEMU, versions 2 and 3.
    Qcow2,
}

impl DiskFormat {
    /// The format of an image where it is not said: qcow2 if its name ends in `.qcow2`, else raw.
    ///
    /// ```
    /// use kiln_vmm::DiskFormat;
    ///
    /// assert_eq!(DiskFormat::of_path("root.qcow2".as_ref()), DiskFormat::Qcow2);
    /// assert_eq!(DiskFormat::of_path("root.img".as_ref()), DiskFormat::Raw);
    /// ```
    pub fn of_path(path: &Path) -> Self {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("qcow2") => Self::Qcow2,
            _ => Self::Raw,
        }
    }
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// Not one of the formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the formats are `raw` and `qcow2`")]
pub struct UnknownDiskFormat;

impl FromStr for DiskFormat {
    type Err = UnknownDiskFormat;

    /// Reads the name that the command line and a configuration have for it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(UnknownDiskFormat),
        }
    }
}
