//! Page numbers to ranges.

use std::ops::Range;

/// The bytes of a page of the balloon, whatever size the guest's own pages have.
pub(super) const PAGE_SIZE: u64 = 4096;

/// Sorts page numbers, and gives the ranges of addresses that they are, as few as there can be:
/// the host is asked once for each.
pub(super) fn ranges(pages: &mut [u32]) -> impl Iterator<Item = Range<u64>> {
    pages.sort_unstable();
    pages
        .chunk_by(|page, next| next - page <= 1)
        .map(|run| address(run[0])..address(run[run.len() - 1]) + PAGE_SIZE)
}

fn address(page: u32) -> u64 {
    u64::from(page) * PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where each range begins and ends.
    fn of(pages: &[u32]) -> Vec<(u64, u64)> {
        let mut pages = pages.to_vec();
        let ranges = ranges(&mut pages);
        ranges.map(|range| (range.start, range.end)).collect()
    }

    #[test]
    fn neighbours_become_one_range_in_whatever_order_they_come() {
        assert_eq!(of(&[]), []);
        assert_eq!(of(&[7]), [(0x7000, 0x8000)]);
        assert_eq!(of(&[9, 8, 7, 6]), [(0x6000, 0xa000)]);
        assert_eq!(of(&[1, 4, 2, 5]), [(0x1000, 0x3000), (0x4000, 0x6000)]);
        assert_eq!(of(&[3, 1]), [(0x1000, 0x2000), (0x3000, 0x4000)]);
    }

    #[test]
    fn a_page_named_twice_is_one() {
        assert_eq!(of(&[2, 2, 1, 2, 1, 3]), [(0x1000, 0x4000)]);
        assert_eq!(of(&[0; 100]), [(0, 0x1000)]);
    }

    #[test]
    fn the_last_page_number_has_an_end() {
        let end = 1_u64 << 44;
        assert_eq!(of(&[u32::MAX]), [(end - 0x1000, end)]);
        assert_eq!(of(&[u32::MAX, 0]), [(0, 0x1000), (end - 0x1000, end)]);
    }
}
