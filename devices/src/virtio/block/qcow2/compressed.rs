//! Compressed clusters, before the driver decompresses them.
//!
//! The driver decompresses into memory that nobody has cleared, and lets what is compressed refer to
//! bytes before its own first one: a damaged cluster would show the guest what this process had in
//! that memory. So what the driver reads is decompressed here first, where such a reference is an
//! error.

use std::cell::Cell;
use std::io;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

/// The largest cluster.
const LARGEST: usize = 2 << 20;

thread_local! {
    /// Whether all data that this thread's drivers read now is compressed.
    static IS_COMPRESSED: Cell<bool> = const { Cell::new(false) };
}

/// Runs something of the driver's that reads no other data than compressed clusters, each of which is
/// checked.
pub(super) fn checked<T>(run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    /// Ends it also where the driver panics.
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            IS_COMPRESSED.set(false);
        }
    }
    IS_COMPRESSED.set(true);
    let _end = End;
    run()
}

/// Checks what the driver has read, if that is to be a compressed cluster.
pub(super) fn check(data: &[u8]) -> io::Result<()> {
    if !IS_COMPRESSED.get() {
        return Ok(());
    }
    let mut cleared = vec![0; LARGEST];
    let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (status, _, _) = decompress(&mut DecompressorOxide::new(), data, &mut cleared, 0, flags);
    match status {
        // Whether it is as much as a cluster is checked by the driver.
        TINFLStatus::Done | TINFLStatus::HasMoreOutput => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a compressed cluster of the image is damaged",
        )),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A literal `A`, a match of length 3 at this distance code, and what follows as it is.
    pub(in crate::virtio::block::qcow2) fn stream(distance_code: u32, rest: &[u8]) -> Vec<u8> {
        let mut bits = Vec::new();
        let mut push = |value: u32, count: u32, is_code: bool| {
            for bit in 0..count {
                // Codes begin with their highest bit, and all else with its lowest.
                let at = if is_code { count - 1 - bit } else { bit };
                bits.push(value >> at & 1);
            }
        };
        // A block with the fixed codes, and its end.
        push(0, 1, false);
        push(1, 2, false);
        push(0x30 + u32::from(b'A'), 8, true);
        push(1, 7, true);
        push(distance_code, 5, true);
        push(0, 7, true);
        // The last block: stored.
        push(1, 1, false);
        push(0, 2, false);
        let byte = |bits: &[u32]| {
            let bits = (0..).zip(bits);
            bits.fold(0, |byte, (at, bit)| byte | (*bit as u8) << at)
        };
        let mut bytes: Vec<u8> = bits.chunks(8).map(byte).collect();
        let len = rest.len() as u16;
        bytes.extend(len.to_le_bytes());
        bytes.extend((!len).to_le_bytes());
        bytes.extend(rest);
        bytes
    }

    #[test]
    fn a_cluster_refers_to_itself_alone() {
        // The byte before, which is the literal; and the one before that.
        assert!(checked(|| check(&stream(0, b"rest"))).is_ok());
        let error = checked(|| check(&stream(1, b"rest"))).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn other_data_can_be_anything() {
        assert!(check(&stream(1, &[])).is_ok());
        let panicked = std::panic::catch_unwind(|| checked(|| -> io::Result<()> { panic!() }));
        assert!(panicked.is_err() && check(&stream(1, &[])).is_ok());
    }

    #[test]
    fn what_ends_too_soon_is_refused() {
        let stream = stream(0, b"rest");
        assert!(checked(|| check(&stream[..2])).is_err());
        assert!(checked(|| check(&[])).is_err());
    }
}
