//! Who unpacks the kernel in a bzImage.

use std::fmt;
use std::str::FromStr;

use kiln_arch::{Kernel, KernelFormat};
use kiln_kernel_cache::{KernelCache, UnpackError};
use serde::{Deserialize, Serialize};

/// Who unpacks the kernel in a bzImage. Other kernels are not packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Decompressor {
    /// The host, once for all machines: the guest starts with the kernel itself, always at the
    /// address that it was linked for.
    #[default]
    Host,
    /// The bzImage's own code in the guest, each time, which also moves the kernel to a random
    /// address (KASLR).
    Guest,
}

impl Decompressor {
    /// The kernel as it will be started.
    pub(crate) fn apply(self, kernel: Kernel, cache: Option<&KernelCache>) -> Kernel {
        if self == Self::Guest || kernel.format() != KernelFormat::BzImage {
            return kernel;
        }
        match kernel.clone().unpacked(cache) {
            Ok(unpacked) => unpacked,
            // Not all programs in this format are packed.
            Err(kiln_arch::Error::Unpack {
                source: UnpackError::NoPayload,
                ..
            }) => kernel,
            Err(error) => {
                let source = std::error::Error::source(&error);
                let why = source.map_or_else(String::new, |source| format!(": {source}"));
                tracing::warn!("{error}{why}; the guest will unpack it");
                kernel
            }
        }
    }
}

impl fmt::Display for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::Guest => "guest",
        })
    }
}

/// Not one of the decompressors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are `host` and `guest`")]
pub struct UnknownDecompressor;

impl FromStr for Decompressor {
    type Err = UnknownDecompressor;

    /// Reads the name that the command line and a configuration have for it.
    ///
    /// ```
    /// use kiln_vmm::Decompressor;
    ///
    /// assert_eq!("guest".parse(), Ok(Decompressor::Guest));
    /// assert_eq!(Decompressor::default().to_string(), "host");
    /// ```
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "host" => Ok(Self::Host),
            "guest" => Ok(Self::Guest),
            _ => Err(UnknownDecompressor),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A bzImage in which there is nothing that could be unpacked.
    fn bzimage() -> Kernel {
        let mut image = vec![0x6e; 8 * 512 + 0x5000];
        image[..8 * 512].fill(0);
        for (at, value) in [
            (0x1f1, &[7][..]),
            (0x1f4, &0x500_u32.to_le_bytes()),
            (0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]),
            (0x202, b"HdrS"),
            (0x206, &[0x0f, 2]),
            (0x211, &[1]),
            (0x236, &[0x3f]),
            (0x248, &0x300_u32.to_le_bytes()),
            (0x24c, &0x4000_u32.to_le_bytes()),
            (0x258, &(16_u64 << 20).to_le_bytes()),
            (0x260, &(8_u32 << 20).to_le_bytes()),
        ] {
            image[at..at + value.len()].copy_from_slice(value);
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&image).unwrap();
        Kernel::from_file(file, "vmlinuz").unwrap()
    }

    #[test]
    fn what_the_host_cannot_unpack_is_left_to_the_guest() {
        let folder = tempfile::tempdir().unwrap();
        let cache = KernelCache::on_demand(folder.path().join("kernels"), 1 << 20);
        for who in [Decompressor::Host, Decompressor::Guest] {
            for cache in [None, Some(&cache)] {
                let kernel = who.apply(bzimage(), cache);
                assert_eq!(kernel.format(), KernelFormat::BzImage);
            }
        }
    }

    #[test]
    fn a_kernel_that_is_not_packed_makes_no_cache() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernels");
        let cache = KernelCache::on_demand(&path, 1 << 20);
        let code = Kernel::from_code(&[0xf4]).unwrap();
        let kernel = Decompressor::Host.apply(code, Some(&cache));
        assert_eq!(kernel.format(), KernelFormat::Code);
        assert!(!path.exists());
    }
}
