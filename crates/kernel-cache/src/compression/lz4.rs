//! LZ4's legacy frame, which is what `lz4 -l` makes and Linux reads: a magic number, and blocks of
//! up to 8 MiB, each behind its packed size.

use super::DecodeError;

const MAGIC: u32 = 0x184c_2102;
const BLOCK_SIZE: usize = 8 << 20;

pub(super) fn decode(packed: &[u8], content: &mut [u8]) -> Result<usize, DecodeError> {
    let mut rest = packed;
    let mut filled = 0;
    while !rest.is_empty() {
        let (size, behind) = rest
            .split_first_chunk::<4>()
            .ok_or("a block's size is cut short")?;
        let size = u32::from_le_bytes(*size);
        rest = behind;
        // Frames can follow each other.
        if size == MAGIC {
            continue;
        }
        let (block, behind) = usize::try_from(size)
            .ok()
            .and_then(|size| rest.split_at_checked(size))
            .ok_or("a block is cut short")?;
        rest = behind;
        let end = content.len().min(filled + BLOCK_SIZE);
        filled += lz4_flex::block::decompress_into(block, &mut content[filled..end])?;
    }
    Ok(filled)
}
