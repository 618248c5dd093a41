//! Copies between bytes of our own and guest RAM in several pieces.

use std::borrow::Borrow;

use crate::GuestSlice;

/// Copies `bytes` into pieces of guest RAM, in their order, as far as there is room, and returns
/// how many were copied.
///
/// ```
/// use kiln_memory::{MemoryOptions, allocate, gather, scatter};
/// use vm_memory::{GuestAddress, GuestMemoryBackend};
///
/// let memory = allocate(&[(GuestAddress(0), 0x1000)], &MemoryOptions::default())?;
/// let piece = |at, len| memory.get_slice(GuestAddress(at), len);
/// let pieces = [piece(0x10, 2)?, piece(0x800, 3)?];
/// assert_eq!(scatter(b"guest", &pieces), 5);
/// assert_eq!(gather(&pieces), b"guest");
/// assert_eq!(scatter(b"much longer", &pieces), 5);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn scatter<'m>(
    bytes: &[u8],
    pieces: impl IntoIterator<Item = impl Borrow<GuestSlice<'m>>>,
) -> usize {
    let mut rest = bytes;
    for piece in pieces {
        if rest.is_empty() {
            break;
        }
        let piece = piece.borrow();
        let (now, later) = rest.split_at(rest.len().min(piece.len()));
        piece.copy_from(now);
        rest = later;
    }
    bytes.len() - rest.len()
}

/// Fills `bytes` from pieces of guest RAM, in their order, as far as these go, and returns how many
/// were copied.
pub fn gather_into<'m>(
    bytes: &mut [u8],
    pieces: impl IntoIterator<Item = impl Borrow<GuestSlice<'m>>>,
) -> usize {
    let mut done = 0;
    for piece in pieces {
        if done == bytes.len() {
            break;
        }
        done += piece.borrow().copy_to(&mut bytes[done..]);
    }
    done
}

/// Copies all of these pieces of guest RAM, in their order.
pub fn gather(pieces: &[GuestSlice<'_>]) -> Vec<u8> {
    let mut bytes = vec![0; pieces.iter().map(|piece| piece.len()).sum()];
    gather_into(&mut bytes, pieces);
    bytes
}
