//! The kernels in bzImages: each of the formats that Linux packs them in.

use kiln_kernel_cache::unpack as unpack_bzimage;

/// The kernels that are looked for have no more bytes than this: more takes time, and shows nothing.
const MOST: u32 = 1 << 20;
/// Of the bzImage's setup code, which is one sector here.
const HEAD: usize = 0x400;

/// Unpacks these bytes, as if they were what is packed in a bzImage.
pub fn unpack(data: &[u8]) {
    let mut image = vec![0; HEAD];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    put(0x24c, &(data.len() as u32).to_le_bytes());
    image.extend_from_slice(data);
    // The size that is to come out is behind all formats.
    if let Some(size) = image[HEAD..].last_chunk_mut::<4>() {
        *size = (u32::from_le_bytes(*size) % MOST).to_le_bytes();
        let declared = u32::from_le_bytes(*size) as usize;
        if let Ok(kernel) = unpack_bzimage(&image) {
            assert_eq!(kernel.len(), declared);
            assert!(kernel.starts_with(b"\x7fELF"));
        }
    }
}
