//! Where in a function's BARs the MSI-X structures are.

use crate::{AddressSpace, Bar, Error};

/// The bytes of a table entry (PCI 3.0, section 6.8.2).
pub(crate) const ENTRY_SIZE: u64 = 16;
/// Table and pending bits begin at multiples of this many bytes.
const ALIGNMENT: u32 = 8;

/// Where the MSI-X table and the pending bits of a function are: in which BAR, and at which offset
/// in bytes (a multiple of 8).
///
/// Nothing else should be in their 4 KiB pages, so that a guest may map those apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixPlacement {
    /// The BAR that the table is in.
    pub table_bar: usize,
    /// The table's offset into it.
    pub table_offset: u32,
    /// The BAR that the pending bits are in.
    pub pending_bar: usize,
    /// The offset of the pending bits into it.
    pub pending_offset: u32,
}

/// One of the structures of MSI-X that are in BARs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Structure {
    Table,
    Pending,
}

impl MsixPlacement {
    /// The bytes of the table for so many vectors.
    pub const fn table_size(vectors: u16) -> u64 {
        vectors as u64 * ENTRY_SIZE
    }

    /// The bytes of the pending bits for so many vectors.
    pub const fn pending_size(vectors: u16) -> u64 {
        (vectors as u64).div_ceil(64) * 8
    }

    /// The structure that an access to a BAR begins in, and the offset into that.
    pub(super) fn find(&self, vectors: u16, bar: usize, offset: u64) -> Option<(Structure, u64)> {
        let table = (
            Structure::Table,
            self.table_bar,
            self.table_offset,
            Self::table_size(vectors),
        );
        let pending = (
            Structure::Pending,
            self.pending_bar,
            self.pending_offset,
            Self::pending_size(vectors),
        );
        [table, pending]
            .into_iter()
            .find_map(|(structure, its_bar, start, size)| {
                let within = offset.checked_sub(start.into())?;
                (bar == its_bar && within < size).then_some((structure, within))
            })
    }

    pub(crate) fn check(
        &self,
        name: &str,
        vectors: u16,
        bars: &[Option<Bar>],
    ) -> Result<(), Error> {
        let refusal = |structure, bar, offset, reason| Error::MsixPlacement {
            name: name.to_owned(),
            structure,
            bar,
            offset,
            reason,
        };
        let table_size = Self::table_size(vectors);
        let pending_size = Self::pending_size(vectors);
        for (structure, bar, offset, size) in [
            ("table", self.table_bar, self.table_offset, table_size),
            (
                "pending bits",
                self.pending_bar,
                self.pending_offset,
                pending_size,
            ),
        ] {
            let Some(it) = bars.get(bar).copied().flatten() else {
                return Err(refusal(structure, bar, offset, "there is no such BAR"));
            };
            let end = u64::from(offset) + size;
            let reason = if it.space() != AddressSpace::Memory {
                "it is no memory BAR"
            } else if !offset.is_multiple_of(ALIGNMENT) {
                "the offset is not a multiple of 8"
            } else if end > it.size() {
                "it would end beyond the BAR"
            } else {
                continue;
            };
            return Err(refusal(structure, bar, offset, reason));
        }
        let (table, pending) = (u64::from(self.table_offset), u64::from(self.pending_offset));
        let overlap = table < pending + pending_size && pending < table + table_size;
        if self.table_bar == self.pending_bar && overlap {
            return Err(refusal(
                "pending bits",
                self.pending_bar,
                self.pending_offset,
                "the table is there",
            ));
        }
        Ok(())
    }

    /// The registers of the capability, behind id and next pointer, and which bits the guest can
    /// write (PCI 3.0, section 6.8.2).
    pub(crate) fn capability(&self, vectors: u16) -> ([u8; 10], [u8; 10]) {
        use crate::registers::{MSIX_CONTROL_ENABLE, MSIX_CONTROL_FUNCTION_MASK};
        let mut body = [0; 10];
        let mut mask = [0; 10];
        let control = MSIX_CONTROL_ENABLE | MSIX_CONTROL_FUNCTION_MASK;
        mask[..2].copy_from_slice(&control.to_le_bytes());
        body[..2].copy_from_slice(&vectors.saturating_sub(1).to_le_bytes());
        let table = self.table_offset | self.table_bar as u32;
        let pending = self.pending_offset | self.pending_bar as u32;
        body[2..6].copy_from_slice(&table.to_le_bytes());
        body[6..].copy_from_slice(&pending.to_le_bytes());
        (body, mask)
    }
}
