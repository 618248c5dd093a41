//! ELF images around the bytes of a guest, good ones and twisted ones, for the `kiln` program.

/// Where the code is loaded and entered.
pub const LOAD_ADDRESS: u64 = 0x10_0000;

const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;

/// A 64-bit ELF image whose one segment is `code`, entered at its first byte by the 64-bit Linux
/// boot protocol.
pub fn image(code: &[u8]) -> Vec<u8> {
    with_segments(&[(LOAD_ADDRESS, code)])
}

/// A 64-bit ELF image with these segments, entered at the first byte of the first.
pub fn with_segments(segments: &[(u64, &[u8])]) -> Vec<u8> {
    let entry = segments
        .first()
        .map_or(LOAD_ADDRESS, |(address, _)| *address);
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend(2u16.to_le_bytes()); // ET_EXEC
    image.extend(62u16.to_le_bytes()); // EM_X86_64
    image.extend(1u32.to_le_bytes()); // EV_CURRENT
    image.extend(entry.to_le_bytes());
    image.extend((HEADER_SIZE as u64).to_le_bytes()); // program headers
    image.extend(0u64.to_le_bytes()); // no section headers
    image.extend(0u32.to_le_bytes()); // flags
    image.extend((HEADER_SIZE as u16).to_le_bytes());
    image.extend((PROGRAM_HEADER_SIZE as u16).to_le_bytes());
    image.extend((segments.len() as u16).to_le_bytes());
    image.extend([0; 6]); // section headers: size, count, names
    let mut offset = HEADER_SIZE + PROGRAM_HEADER_SIZE * segments.len();
    for (address, content) in segments {
        let size = content.len() as u64;
        image.extend(1u32.to_le_bytes()); // PT_LOAD
        image.extend(5u32.to_le_bytes()); // readable and executable
        for field in [offset as u64, *address, *address, size, size, 1] {
            image.extend(field.to_le_bytes());
        }
        offset += content.len();
    }
    for (_, content) in segments {
        image.extend_from_slice(content);
    }
    image
}
