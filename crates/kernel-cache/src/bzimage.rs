//! Where the packed kernel is in a bzImage (Linux: Documentation/arch/x86/boot.rst).

use std::ops::Range;

use crate::UnpackError;

/// As much of the file as [`payload`] looks at.
pub(crate) const HEAD_SIZE: usize = 0x250;

/// Where the setup header counts the 512-byte sectors of the setup code, less the boot sector.
const SETUP_SECTS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
/// From the protected-mode code, which follows the setup code.
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

const SECTOR: u64 = 512;
/// Of `setup_sects`, where it says 0.
const DEFAULT_SETUP_SECTS: u64 = 4;
/// The version of the boot protocol that brought the payload's fields.
const VERSION_WITH_PAYLOAD: u16 = 0x208;

/// Where the payload is in a bzImage of `len` bytes that begins with `head`.
pub(crate) fn payload(head: &[u8], len: u64) -> Result<Range<u64>, UnpackError> {
    let number = |at: usize| -> Result<u32, UnpackError> {
        let bytes = head.get(at..).and_then(|rest| rest.first_chunk());
        bytes
            .map(|bytes| u32::from_le_bytes(*bytes))
            .ok_or(UnpackError::NotABzImage)
    };
    if number(MAGIC)? != u32::from_le_bytes(*b"HdrS") {
        return Err(UnpackError::NotABzImage);
    }
    // The upper half of the number is another field.
    let version = number(VERSION)? as u16;
    if version < VERSION_WITH_PAYLOAD {
        return Err(UnpackError::NoPayload);
    }
    let sectors = match number(SETUP_SECTS)? as u8 {
        0 => DEFAULT_SETUP_SECTS,
        sectors => u64::from(sectors),
    };
    let size = u64::from(number(PAYLOAD_LENGTH)?);
    let start = (sectors + 1) * SECTOR + u64::from(number(PAYLOAD_OFFSET)?);
    match start + size {
        _ if size == 0 => Err(UnpackError::NoPayload),
        end if end > len => Err(UnpackError::Truncated {
            has: len,
            needs: end,
        }),
        end => Ok(start..end),
    }
}

/// The smallest bzImage around a payload.
pub(crate) fn around(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 3 * SECTOR as usize + 0x40];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(SETUP_SECTS, &[2]);
    put(MAGIC, b"HdrS");
    put(VERSION, &0x20f_u16.to_le_bytes());
    put(PAYLOAD_OFFSET, &0x40_u32.to_le_bytes());
    put(PAYLOAD_LENGTH, &(payload.len() as u32).to_le_bytes());
    image.extend_from_slice(payload);
    image.extend_from_slice(b"what follows");
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(image: &[u8]) -> Result<Range<u64>, UnpackError> {
        payload(&image[..image.len().min(HEAD_SIZE)], image.len() as u64)
    }

    #[test]
    fn the_payload_is_found() {
        let image = around(b"payload");
        let range = found(&image).unwrap();
        assert_eq!(&image[range.start as usize..range.end as usize], b"payload");
        // Boot sector and four sectors, where none are counted.
        let mut old = image;
        old[SETUP_SECTS] = 0;
        old.resize(5000, 0);
        assert_eq!(found(&old).unwrap(), 5 * 512 + 0x40..5 * 512 + 0x40 + 7);
    }

    #[test]
    fn what_is_no_whole_bzimage_has_no_payload() {
        let image = around(b"payload");
        for cut in [0, 0x1f1, 0x202, 0x24f] {
            let error = found(&image[..cut]).unwrap_err();
            assert!(matches!(error, UnpackError::NotABzImage), "{cut}: {error}");
        }
        let end = image.len() - b"what follows".len();
        assert!(found(&image[..end]).is_ok());
        let error = found(&image[..end - 1]).unwrap_err();
        assert!(matches!(error, UnpackError::Truncated { .. }), "{error}");

        let with = |at: usize, bytes: &[u8]| {
            let mut image = image.clone();
            image[at..at + bytes.len()].copy_from_slice(bytes);
            found(&image).unwrap_err()
        };
        assert!(matches!(with(MAGIC, b"x"), UnpackError::NotABzImage));
        assert!(matches!(with(VERSION, &[7, 2]), UnpackError::NoPayload));
        assert!(matches!(
            with(PAYLOAD_LENGTH, &[0; 4]),
            UnpackError::NoPayload
        ));
        for at in [PAYLOAD_OFFSET, PAYLOAD_LENGTH] {
            assert!(matches!(
                with(at, &[0xff; 4]),
                UnpackError::Truncated { .. }
            ));
        }
    }
}
