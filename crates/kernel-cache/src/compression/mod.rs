//! How Linux packs kernels (its `scripts/Makefile.lib`), and what unpacks them.
//!
//! Every decoder writes to a buffer of the size that the unpacked kernel should have, and gives the
//! size that it has, or an error where it would be larger. None takes memory by a number that is
//! only in the file: that of its dictionary is bounded by the buffer's size.

mod lz4;
mod lzo;

use std::error::Error;
use std::io::{self, Read};

use bzip2::read::BzDecoder;
use flate2::read::GzDecoder;
use lzma_rust2::{LzmaReader, XzReader};

use crate::UnpackError;

/// How a kernel is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Bzip2,
    Lzma,
    Xz,
    Lzo,
    Lz4,
    Zstd,
}

type DecodeError = Box<dyn Error + Send + Sync>;

/// What a decoder may need beside its dictionary, in KiB.
const LZMA_TABLES: u64 = 1 << 12;
/// In the header of an lzma file: the size of the dictionary, behind a byte of properties; and
/// where the content begins, behind a size that is unknown where the content has an end marker.
const LZMA_DICTIONARY: usize = 1;
const LZMA_SIZE: usize = 5;
const LZMA_CONTENT: usize = 13;

impl Compression {
    /// Looks at the first bytes.
    pub(crate) fn of(payload: &[u8]) -> Result<Self, UnpackError> {
        Ok(match payload {
            [0x1f, 0x8b | 0x9e, ..] => Self::Gzip,
            [b'B', b'Z', b'h', ..] => Self::Bzip2,
            [0x5d, 0, 0, ..] => Self::Lzma,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            [0x89, b'L', b'Z', b'O', 0, ..] => Self::Lzo,
            [0x02, 0x21, 0x4c, 0x18, ..] => Self::Lz4,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => {
                return Err(UnpackError::UnknownCompression {
                    start: payload[..payload.len().min(6)].to_vec(),
                });
            }
        })
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "lzma",
            Self::Xz => "xz",
            Self::Lzo => "lzo",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// Unpacks `packed` into `content`, and says how many bytes it has.
    pub(crate) fn decode(self, packed: &[u8], content: &mut [u8]) -> Result<usize, DecodeError> {
        match self {
            Self::Gzip => Ok(read_all(GzDecoder::new(packed), content)?),
            Self::Bzip2 => Ok(read_all(BzDecoder::new(packed), content)?),
            Self::Lzma => lzma(packed, content),
            Self::Xz => {
                let limit = (content.len() as u64 / 1024) + (XZ_DICTIONARY_LIMIT / 1024);
                let limit = u32::try_from(limit + LZMA_TABLES).unwrap_or(u32::MAX - 1);
                Ok(read_all(
                    XzReader::new_mem_limit(packed, false, limit),
                    content,
                )?)
            }
            Self::Lzo => lzo::decode(packed, content),
            Self::Lz4 => lz4::decode(packed, content),
            Self::Zstd => zstd_safe::decompress(content, packed)
                .map_err(|code| zstd_safe::get_error_name(code).into()),
        }
    }
}

/// Linux packs with a dictionary of 32 MiB; `xz -9` takes 64 MiB.
const XZ_DICTIONARY_LIMIT: u64 = 64 << 20;

fn lzma(packed: &[u8], content: &mut [u8]) -> Result<usize, DecodeError> {
    let header: &[u8; LZMA_CONTENT] = packed.first_chunk().ok_or("its header is cut short")?;
    let dictionary = header[LZMA_DICTIONARY..]
        .first_chunk()
        .map(|b| u32::from_le_bytes(*b));
    let size = header[LZMA_SIZE..]
        .first_chunk()
        .map(|b| u64::from_le_bytes(*b));
    let (Some(dictionary), Some(size)) = (dictionary, size) else {
        return Err("its header is cut short".into());
    };
    // Nothing can be further back than the beginning.
    let dictionary = dictionary.min(u32::try_from(content.len())?);
    let reader =
        LzmaReader::new_with_props(&packed[LZMA_CONTENT..], size, header[0], dictionary, None)?;
    Ok(read_all(reader, content)?)
}

/// Fills `content`, and says with how much; fails where there is more.
fn read_all(mut reader: impl Read, content: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    loop {
        // Also at the end, for the reader to find its checksum.
        let mut more = [0];
        let is_full = filled == content.len();
        let room = if is_full {
            &mut more[..]
        } else {
            &mut content[filled..]
        };
        match reader.read(room) {
            Ok(0) => return Ok(filled),
            Ok(_) if is_full => return Err(io::Error::other("it has more than its size says")),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
