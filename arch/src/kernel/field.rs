//! Little-endian fields in the bytes of a file; zero where the bytes end before them.

fn bytes<const N: usize>(from: &[u8], offset: usize) -> [u8; N] {
    from.get(offset..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

pub(super) fn u8_at(from: &[u8], offset: usize) -> u8 {
    u8::from_le_bytes(bytes(from, offset))
}

pub(super) fn u16_at(from: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(bytes(from, offset))
}

pub(super) fn u32_at(from: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes(from, offset))
}

pub(super) fn u64_at(from: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes(from, offset))
}
