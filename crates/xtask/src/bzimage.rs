//! Taking the compressed kernel out of a bzImage (Linux's Documentation/arch/x86/boot.rst).

use anyhow::{Context, Result, bail, ensure};

use crate::process;

/// Where the setup header counts the 512-byte sectors of the setup code, less the boot sector.
const SETUP_SECTS: usize = 0x1f1;
const SETUP_MAGIC: usize = 0x202;
const PROTOCOL_VERSION: usize = 0x206;
/// Where the payload begins, in bytes from the protected-mode code.
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// The boot protocol that introduced the payload's fields.
const PROTOCOL_WITH_PAYLOAD: u16 = 0x208;

/// How a kernel is compressed, of those that Debian uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    Gzip,
    Lz4,
    Xz,
    Zstd,
}

impl Compression {
    fn of(payload: &[u8]) -> Option<Self> {
        Some(match payload {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x02, 0x21, 0x4c, 0x18, ..] => Self::Lz4,
            [0xfd, b'7', b'z', b'X', b'Z', ..] => Self::Xz,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => return None,
        })
    }

    fn program(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Lz4 => "lz4",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
        }
    }
}

/// The compressed kernel in a bzImage.
#[derive(Debug, PartialEq, Eq)]
struct Payload<'a> {
    compression: Compression,
    data: &'a [u8],
    /// The bytes of the kernel when unpacked.
    size: u32,
}

fn payload(image: &[u8]) -> Result<Payload<'_>> {
    let number = |offset: usize| -> Result<u32> {
        let bytes = image
            .get(offset..offset + 4)
            .context("the setup header is cut short")?;
        Ok(u32::from_le_bytes(bytes.try_into()?))
    };
    ensure!(
        number(SETUP_MAGIC)? == u32::from_le_bytes(*b"HdrS"),
        "there is no setup header"
    );
    let version = number(PROTOCOL_VERSION)? as u16;
    ensure!(
        version >= PROTOCOL_WITH_PAYLOAD,
        "boot protocol {version:#x} is too old"
    );
    let sectors = match image[SETUP_SECTS] {
        0 => 4, // as boot.rst says, for old kernels
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + number(PAYLOAD_OFFSET)? as usize;
    let length = number(PAYLOAD_LENGTH)? as usize;
    let whole = start
        .checked_add(length)
        .and_then(|end| image.get(start..end))
        .context("the compressed kernel is cut short")?;
    let Some(compression) = Compression::of(whole) else {
        bail!(
            "the compressed kernel begins with {:02x?}",
            &whole[..whole.len().min(6)]
        );
    };
    // Linux appends the unpacked size, which is part of gzip's own format only.
    let (data, size) = whole
        .split_last_chunk::<4>()
        .context("the compressed kernel is empty")?;
    Ok(Payload {
        compression,
        data: if compression == Compression::Gzip {
            whole
        } else {
            data
        },
        size: u32::from_le_bytes(*size),
    })
}

/// Returns the ELF kernel that is compressed in the bzImage `image`.
///
/// # Errors
///
/// When `image` is not a whole bzImage, or it cannot be unpacked.
pub fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    let Payload {
        compression,
        data,
        size,
    } = payload(image)?;
    let kernel = process::filter(compression.program(), &["-dc"], data)?;
    ensure!(
        kernel.len() == size as usize,
        "the kernel unpacks to {} bytes instead of {size}",
        kernel.len()
    );
    ensure!(
        kernel.starts_with(b"\x7fELF"),
        "what is compressed is not an ELF kernel"
    );
    Ok(kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 3 * 512 + 0x40];
        image[SETUP_SECTS] = 2;
        image[SETUP_MAGIC..][..4].copy_from_slice(b"HdrS");
        image[PROTOCOL_VERSION..][..2].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[PAYLOAD_OFFSET..][..4].copy_from_slice(&0x40_u32.to_le_bytes());
        image[PAYLOAD_LENGTH..][..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(b"what follows");
        image
    }

    #[test]
    fn the_payload_is_found_without_its_size() {
        let image = image(b"\x02\x21\x4c\x18data\x10\x20\0\0");
        let found = payload(&image).unwrap();
        assert_eq!(found.compression, Compression::Lz4);
        assert_eq!(found.data, b"\x02\x21\x4c\x18data");
        assert_eq!(found.size, 0x2010);
    }

    #[test]
    fn gzip_keeps_the_size_that_its_format_ends_with() {
        let image = image(b"\x1f\x8bdata\x01\0\0\0");
        assert_eq!(payload(&image).unwrap().data, b"\x1f\x8bdata\x01\0\0\0");
    }

    #[test]
    fn what_is_not_a_bzimage_is_refused() {
        let good = image(b"\x28\xb5\x2f\xfddata\x10\0\0\0");
        assert!(payload(&good).is_ok());
        for length in [0, 0x200, 0x210, 0x24e, good.len() - 13] {
            assert!(payload(&good[..length]).is_err(), "cut to {length}");
        }
        let mut no_magic = good.clone();
        no_magic[SETUP_MAGIC] = 0;
        assert!(payload(&no_magic).is_err());
        let mut far = good.clone();
        far[PAYLOAD_OFFSET..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(payload(&far).is_err());
        assert!(payload(&image(b"unknown.")).is_err());
    }
}
