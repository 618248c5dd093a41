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
