//! Taking the compressed kernel out of a bzImage.

use anyhow::Result;

/// Returns the ELF kernel that is compressed in the bzImage `image`, as Kiln itself unpacks it.
///
/// # Errors
///
/// When `image` is not a whole bzImage, or it cannot be unpacked.
pub fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    Ok(kiln_kernel_cache::unpack(image)?)
}
