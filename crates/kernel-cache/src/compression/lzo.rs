//! The container of `lzop`, which Linux packs LZO with: a header, and blocks with checksums. All
//! numbers are big-endian.

use super::DecodeError;

const MAGIC: &[u8] = b"\x89LZO\0\r\n\x1a\n";
/// From this version on the header has a level, the version needed, and a second half of the time.
const VERSION_WITH_LEVEL: u16 = 0x0940;

/// Flags: what the blocks' checksums are of, and what else the header has.
const ADLER32_OF_CONTENT: u32 = 1;
const ADLER32_OF_PACKED: u32 = 1 << 1;
const EXTRA_FIELD: u32 = 1 << 6;
const CRC32_OF_CONTENT: u32 = 1 << 8;
const CRC32_OF_PACKED: u32 = 1 << 9;
const FILTER: u32 = 1 << 11;

/// What is left of the container.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or("it is cut short")?;
        self.0 = rest;
        Ok(bytes)
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.bytes(1)?[0])
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_be_bytes(self.bytes(2)?.try_into()?))
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_be_bytes(self.bytes(4)?.try_into()?))
    }

    /// Skips the header, and gives its flags.
    fn header(&mut self) -> Result<u32, DecodeError> {
        if self.bytes(MAGIC.len())? != MAGIC {
            return Err("it does not begin as lzop does".into());
        }
        let version = self.u16()?;
        self.u16()?; // of the library
        let has_level = version >= VERSION_WITH_LEVEL;
        if has_level {
            self.u16()?; // the version needed
        }
        self.u8()?; // the method: all are unpacked alike
        if has_level {
            self.u8()?;
        }
        let flags = self.u32()?;
        if flags & FILTER != 0 {
            return Err("it has a filter".into());
        }
        self.bytes(if has_level { 12 } else { 8 })?; // the file's mode and time
        let name = self.u8()?;
        self.bytes(name.into())?;
        self.u32()?; // the header's checksum
        if flags & EXTRA_FIELD != 0 {
            let size = self.u32()?;
            self.bytes(usize::try_from(size)?)?;
            self.u32()?;
        }
        Ok(flags)
    }
}

pub(super) fn decode(packed: &[u8], content: &mut [u8]) -> Result<usize, DecodeError> {
    let mut rest = Rest(packed);
    let flags = rest.header()?;
    let mut filled = 0;
    loop {
        let size = usize::try_from(rest.u32()?)?;
        if size == 0 {
            return Ok(filled);
        }
        let packed_size = usize::try_from(rest.u32()?)?;
        let mut sums = Vec::new();
        for flag in [ADLER32_OF_CONTENT, CRC32_OF_CONTENT] {
            if flags & flag != 0 {
                sums.push((flag, rest.u32()?));
            }
        }
        for flag in [ADLER32_OF_PACKED, CRC32_OF_PACKED] {
            if flags & flag != 0 && packed_size < size {
                rest.u32()?;
            }
        }
        let block = rest.bytes(packed_size)?;
        let room = content
            .get_mut(filled..)
            .and_then(|room| room.get_mut(..size))
            .ok_or("it has more than its size says")?;
        if packed_size == size {
            room.copy_from_slice(block);
        } else if lzokay::decompress::decompress(block, room)? != size {
            return Err("a block has another size than it says".into());
        }
        for (flag, expected) in sums {
            if flag == CRC32_OF_CONTENT && crc32fast::hash(room) != expected {
                return Err("a block's checksum is wrong".into());
            }
            if flag == ADLER32_OF_CONTENT && adler32(room) != expected {
                return Err("a block's checksum is wrong".into());
            }
        }
        filled += size;
    }
}

/// RFC 1950, section 8.2.
fn adler32(bytes: &[u8]) -> u32 {
    const MODULUS: u32 = 65521;
    /// As many bytes as can be added before the sums must be reduced.
    const CHUNK: usize = 5552;
    let (mut a, mut b) = (1, 0);
    for chunk in bytes.chunks(CHUNK) {
        for &byte in chunk {
            a += u32::from(byte);
            b += a;
        }
        a %= MODULUS;
        b %= MODULUS;
    }
    b << 16 | a
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_rfc() {
        assert_eq!(adler32(b""), 1);
        assert_eq!(adler32(b"Wikipedia"), 0x11e6_0398);
        assert_eq!(adler32(&[0xff; 100_000]), {
            let (mut a, mut b) = (1_u64, 0_u64);
            for _ in 0..100_000 {
                a = (a + 255) % 65521;
                b = (b + a) % 65521;
            }
            (b << 16 | a) as u32
        });
    }
}
