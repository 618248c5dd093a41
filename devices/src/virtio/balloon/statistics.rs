//! What the guest says of its memory (virtio 1.3, section 5.5.6.3).

use serde::{Deserialize, Serialize};

/// The bytes of an entry: a tag of 16 bits, and a value of 64.
const ENTRY_BYTES: usize = 10;
/// The entries that are looked at. There are 16 tags.
const MAX_ENTRIES: usize = 64;
/// The bytes of a buffer that are looked at.
pub(super) const MAX_BYTES: usize = ENTRY_BYTES * MAX_ENTRIES;

/// What a guest says of its memory. It says what it knows of, so each value may be missing; and it
/// may say what it likes. Amounts are in bytes, all others are counted since the guest's start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct BalloonStatistics {
    /// Bytes read from swap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    /// Bytes written to swap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    /// Page faults that needed a disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Page faults that needed none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Bytes that are not used for anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free: Option<u64>,
    /// Bytes that the guest has in all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// Bytes that programs could still have, without swapping: an estimate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available: Option<u64>,
    /// Bytes of files' contents that the disks have too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    /// Huge pages given to programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_page_allocations: Option<u64>,
    /// Huge pages that programs asked for in vain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_page_failures: Option<u64>,
    /// How often a process was killed because there was no memory. This and what follows are
    /// Linux's, from 6.12 on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_kills: Option<u64>,
    /// How often somebody had to wait for memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocation_stalls: Option<u64>,
    /// Bytes that were looked through in the background for some to reclaim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub background_scanned: Option<u64>,
    /// Bytes that were looked through by those who waited for memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_scanned: Option<u64>,
    /// Bytes that were reclaimed in the background.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub background_reclaimed: Option<u64>,
    /// Bytes that were reclaimed by those who waited for memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_reclaimed: Option<u64>,
}

impl BalloonStatistics {
    /// Reads a buffer of the statistics queue. What has an unknown tag, or is cut off, is left out.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut statistics = Self::default();
        for entry in bytes.chunks_exact(ENTRY_BYTES) {
            let (tag, value) = entry.split_at(2);
            let (Ok(tag), Ok(value)) = (tag.try_into(), value.try_into()) else {
                continue;
            };
            if let Some(field) = statistics.field(u16::from_le_bytes(tag)) {
                *field = Some(u64::from_le_bytes(value));
            }
        }
        statistics
    }

    fn field(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.disk_caches,
            8 => &mut self.huge_page_allocations,
            9 => &mut self.huge_page_failures,
            10 => &mut self.oom_kills,
            11 => &mut self.allocation_stalls,
            12 => &mut self.background_scanned,
            13 => &mut self.direct_scanned,
            14 => &mut self.background_reclaimed,
            15 => &mut self.direct_reclaimed,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }

    #[test]
    fn every_tag_has_a_field_of_its_own() {
        let bytes: Vec<u8> = (0..16)
            .flat_map(|tag| entry(tag, 100 + u64::from(tag)))
            .collect();
        let value = serde_json::to_value(BalloonStatistics::parse(&bytes)).unwrap();
        let mut found: Vec<u64> = value
            .as_object()
            .unwrap()
            .values()
            .map(|value| value.as_u64().unwrap())
            .collect();
        found.sort_unstable();
        assert_eq!(found, (100..116).collect::<Vec<u64>>());
        let statistics = BalloonStatistics::parse(&bytes);
        assert_eq!((statistics.free, statistics.total), (Some(104), Some(105)));
        assert_eq!(statistics.available, Some(106));
        assert_eq!(
            serde_json::from_value::<BalloonStatistics>(value).unwrap(),
            statistics
        );
    }

    #[test]
    fn what_is_unknown_or_cut_off_is_left_out() {
        let known = BalloonStatistics {
            free: Some(7),
            ..BalloonStatistics::default()
        };
        let mut bytes = entry(0xffff, 1);
        bytes.extend(entry(16, 2));
        bytes.extend(entry(4, 7));
        assert_eq!(BalloonStatistics::parse(&bytes), known);
        for cut in 0..ENTRY_BYTES {
            let whole = bytes.len();
            bytes.extend(&entry(5, u64::MAX)[..cut]);
            assert_eq!(BalloonStatistics::parse(&bytes), known);
            bytes.truncate(whole);
        }
        assert_eq!(BalloonStatistics::parse(&[]), BalloonStatistics::default());
    }
}
