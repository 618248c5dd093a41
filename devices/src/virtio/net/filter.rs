//! Which packets a driver wants (virtio 1.3, sections 5.1.6.5.1 to 5.1.6.5.3).

use serde::{Deserialize, Serialize};

use super::MacAddress;

/// The most addresses of a table: a driver that has more gets all packets of that kind.
pub(super) const TABLE_LIMIT: usize = 64;
/// There are VLANs 0 to 4095.
pub(super) const VLAN_LIMIT: u16 = 4096;
/// The part of a frame that is looked at: two addresses, a VLAN tag.
pub(super) const HEAD_BYTES: usize = 16;

/// Where a VLAN tag begins, if there is one: with this Ethernet type.
const TAG: usize = 12;
const TAG_TYPE: [u8; 2] = [0x81, 0x00];

/// Which packets a driver wants, as its commands say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiveFilter {
    /// All, whatever else is said here. So it is until the driver says otherwise.
    pub promiscuous: bool,
    /// Those to any group.
    pub all_multicast: bool,
    /// Those to any single interface.
    pub all_unicast: bool,
    /// None to a group but to all (broadcast).
    pub no_multicast: bool,
    /// None to a single interface.
    pub no_unicast: bool,
    /// None to all (broadcast).
    pub no_broadcast: bool,
    /// Those to these single interfaces, and to the driver's own; `None` for all, as there were too
    /// many.
    pub unicast: Option<Vec<MacAddress>>,
    /// Those to these groups; `None` for all, as there were too many.
    pub multicast: Option<Vec<MacAddress>>,
    /// Of those with a VLAN tag, those of these VLANs, in ascending order. It is of no account for
    /// a driver that did not agree on the filtering of VLANs.
    pub vlans: Vec<u16>,
}

impl Default for ReceiveFilter {
    fn default() -> Self {
        Self {
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Some(Vec::new()),
            multicast: Some(Vec::new()),
            vlans: Vec::new(),
        }
    }
}

impl ReceiveFilter {
    /// Whether the driver of the interface with the address `own` wants a packet that begins so.
    pub(super) fn wants(
        &self,
        own: MacAddress,
        filters_vlans: bool,
        frame: &[u8; HEAD_BYTES],
    ) -> bool {
        if self.promiscuous {
            return true;
        }
        let [a, b, c, d, e, f, ..] = *frame;
        let to = MacAddress::new([a, b, c, d, e, f]);
        if filters_vlans && frame[TAG..TAG + 2] == TAG_TYPE {
            let vlan = u16::from_be_bytes([frame[TAG + 2], frame[TAG + 3]]) % VLAN_LIMIT;
            if self.vlans.binary_search(&vlan).is_err() {
                return false;
            }
        }
        if to.is_broadcast() {
            !self.no_broadcast
        } else if to.is_group() {
            !self.no_multicast && (self.all_multicast || is_in(&self.multicast, to))
        } else {
            !self.no_unicast && (self.all_unicast || to == own || is_in(&self.unicast, to))
        }
    }

    pub(super) fn add_vlan(&mut self, vlan: u16) {
        if let Err(place) = self.vlans.binary_search(&vlan) {
            self.vlans.insert(place, vlan);
        }
    }

    pub(super) fn remove_vlan(&mut self, vlan: u16) {
        if let Ok(place) = self.vlans.binary_search(&vlan) {
            self.vlans.remove(place);
        }
    }

    /// Whether it can have come about by commands: a state may come from a file.
    pub(super) fn is_valid(&self) -> bool {
        let tables = [&self.unicast, &self.multicast];
        let short = tables
            .into_iter()
            .flatten()
            .all(|table| table.len() <= TABLE_LIMIT);
        let ascending = self.vlans.windows(2).all(|pair| pair[0] < pair[1]);
        short && ascending && self.vlans.last().is_none_or(|last| *last < VLAN_LIMIT)
    }
}

fn is_in(table: &Option<Vec<MacAddress>>, address: MacAddress) -> bool {
    table
        .as_ref()
        .is_none_or(|addresses| addresses.contains(&address))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: MacAddress = MacAddress::new([2, 0, 0, 0, 0, 1]);
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];
    const ALL: [u8; 6] = [0xff; 6];

    fn frame(to: [u8; 6]) -> [u8; HEAD_BYTES] {
        let mut frame = [0; HEAD_BYTES];
        frame[..6].copy_from_slice(&to);
        frame
    }

    fn tagged(to: [u8; 6], tag: u16) -> [u8; HEAD_BYTES] {
        let mut frame = frame(to);
        frame[12..14].copy_from_slice(&TAG_TYPE);
        frame[14..].copy_from_slice(&tag.to_be_bytes());
        frame
    }

    /// Of packets to the own address, another, a group and all, which are wanted.
    fn wanted(filter: &ReceiveFilter) -> [bool; 4] {
        [OWN.bytes(), OTHER, GROUP, ALL].map(|to| filter.wants(OWN, true, &frame(to)))
    }

    #[test]
    fn a_driver_gets_what_it_asks_for_and_no_more() {
        assert_eq!(wanted(&ReceiveFilter::default()), [true; 4]);
        let quiet = ReceiveFilter {
            promiscuous: false,
            ..Default::default()
        };
        assert_eq!(wanted(&quiet), [true, false, false, true]);
        let with = |change: fn(&mut ReceiveFilter)| {
            let mut filter = quiet.clone();
            change(&mut filter);
            wanted(&filter)
        };
        assert_eq!(with(|f| f.all_unicast = true), [true, true, false, true]);
        assert_eq!(with(|f| f.all_multicast = true), [true, false, true, true]);
        assert_eq!(with(|f| f.no_unicast = true), [false, false, false, true]);
        assert_eq!(with(|f| f.no_broadcast = true), [true, false, false, false]);
        assert_eq!(with(|f| f.unicast = None), [true, true, false, true]);
        assert_eq!(with(|f| f.multicast = None), [true, false, true, true]);
        let none = |f: &mut ReceiveFilter| {
            f.multicast = None;
            f.no_multicast = true;
        };
        assert_eq!(with(none), [true, false, false, true]);
        let tables = |f: &mut ReceiveFilter| {
            f.unicast = Some(vec![MacAddress::new(OTHER)]);
            f.multicast = Some(vec![MacAddress::new([1; 6]), MacAddress::new(GROUP)]);
        };
        assert_eq!(with(tables), [true; 4]);
    }

    #[test]
    fn packets_of_a_vlan_come_to_who_asked_for_it() {
        let mut filter = ReceiveFilter {
            promiscuous: false,
            ..Default::default()
        };
        for vlan in [7, 4095, 0, 7] {
            filter.add_vlan(vlan);
        }
        assert_eq!(filter.vlans, [0, 7, 4095]);
        let own = OWN.bytes();
        // The upper four bits are not the VLAN's.
        for (tag, wanted) in [(7, true), (0xe007, true), (8, false), (0xffff, true)] {
            assert_eq!(filter.wants(OWN, true, &tagged(own, tag)), wanted, "{tag}");
            assert!(filter.wants(OWN, false, &tagged(own, tag)));
            assert!(!filter.wants(OWN, true, &tagged(OTHER, tag)));
        }
        filter.remove_vlan(7);
        filter.remove_vlan(9);
        assert!(!filter.wants(OWN, true, &tagged(own, 7)));
        filter.promiscuous = true;
        assert!(filter.wants(OWN, true, &tagged(own, 7)));
    }

    #[test]
    fn a_filter_that_no_command_makes_is_told() {
        assert!(ReceiveFilter::default().is_valid());
        for vlans in [vec![1, 1], vec![2, 1], vec![4096]] {
            let filter = ReceiveFilter {
                vlans,
                ..Default::default()
            };
            assert!(!filter.is_valid());
        }
        let filter = ReceiveFilter {
            multicast: Some(vec![OWN; TABLE_LIMIT + 1]),
            ..Default::default()
        };
        assert!(!filter.is_valid());
    }
}
