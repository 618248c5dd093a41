//! The connections there are: found by their ports, limited in number, and served in turns. No
//! sockets here either.

use std::collections::{HashMap, VecDeque};

use super::connection::Ports;

/// Connections by slot. `S` is what a connection is to its user.
#[derive(Debug)]
pub(super) struct Table<S> {
    slots: Vec<Slot<S>>,
    free: Vec<usize>,
    by_ports: HashMap<Ports, usize>,
    /// Slots with something to do, each once.
    ready: VecDeque<usize>,
    limit: usize,
}

#[derive(Debug)]
struct Slot<S> {
    entry: Option<(Option<Ports>, S)>,
    /// It is in `ready`; also where the connection has gone since.
    queued: bool,
}

impl<S> Table<S> {
    /// A table for so many connections.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            limit,
        }
    }

    /// The connections there are.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether there is room for no more.
    pub(super) fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// Adds a connection, whose ports are not in use; gives its slot, or nothing where the table
    /// is full.
    pub(super) fn insert(&mut self, ports: Ports, connection: S) -> Option<usize> {
        if self.is_full() {
            return None;
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(Slot {
                    entry: None,
                    queued: false,
                });
                self.slots.len() - 1
            }
        };
        self.slots[slot].entry = Some((Some(ports), connection));
        self.by_ports.insert(ports, slot);
        Some(slot)
    }

    /// The slot of the connection with these ports.
    pub(super) fn find(&self, ports: Ports) -> Option<usize> {
        self.by_ports.get(&ports).copied()
    }

    /// The connection in a slot.
    pub(super) fn get_mut(&mut self, slot: usize) -> Option<&mut S> {
        let entry = self.slots.get_mut(slot)?.entry.as_mut()?;
        Some(&mut entry.1)
    }

    /// The slots that have a connection.
    pub(super) fn occupied(&self) -> Vec<usize> {
        let slots = (0..).zip(&self.slots);
        slots
            .filter_map(|(index, slot)| slot.entry.is_some().then_some(index))
            .collect()
    }

    /// Makes the ports of a connection free for another one.
    pub(super) fn detach(&mut self, slot: usize) {
        let entry = self.slots.get_mut(slot).and_then(|s| s.entry.as_mut());
        if let Some(ports) = entry.and_then(|entry| entry.0.take()) {
            self.by_ports.remove(&ports);
        }
    }

    /// Takes a connection out.
    pub(super) fn remove(&mut self, slot: usize) -> Option<S> {
        self.detach(slot);
        let (_, connection) = self.slots.get_mut(slot)?.entry.take()?;
        self.free.push(slot);
        Some(connection)
    }

    /// A connection has something to do: it gets its turn behind the others.
    pub(super) fn mark_ready(&mut self, slot: usize) {
        if let Some(entry) = self.slots.get_mut(slot)
            && !std::mem::replace(&mut entry.queued, true)
        {
            self.ready.push_back(slot);
        }
    }

    /// Whose turn it is.
    pub(super) fn first_ready(&self) -> Option<usize> {
        self.ready.front().copied()
    }

    /// Whoever's turn it is has nothing to do.
    pub(super) fn drop_first(&mut self) {
        if let Some(slot) = self.ready.pop_front() {
            self.slots[slot].queued = false;
        }
    }

    /// Whoever's turn it is has had it.
    pub(super) fn rotate(&mut self) {
        if let Some(slot) = self.ready.pop_front() {
            self.ready.push_back(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(guest: u32) -> Ports {
        Ports { host: 1, guest }
    }

    #[test]
    fn connections_are_found_by_their_ports_up_to_the_limit() {
        let mut table = Table::new(2);
        let first = table.insert(ports(1), "a").unwrap();
        table.insert(ports(2), "b").unwrap();
        assert!(table.insert(ports(3), "c").is_none());
        assert_eq!((table.len(), table.find(ports(1))), (2, Some(first)));
        assert_eq!(table.remove(first), Some("a"));
        assert_eq!((table.find(ports(1)), table.remove(first)), (None, None));
        let third = table.insert(ports(3), "c").unwrap();
        assert_eq!(table.get_mut(third), Some(&mut "c"));
        assert_eq!(table.occupied().len(), 2);
    }

    #[test]
    fn a_detached_connection_keeps_its_slot_and_gives_up_its_ports() {
        let mut table = Table::new(2);
        let old = table.insert(ports(1), "old").unwrap();
        table.detach(old);
        let new = table.insert(ports(1), "new").unwrap();
        assert_eq!(table.find(ports(1)), Some(new));
        assert_eq!(table.remove(old), Some("old"));
        assert_eq!(table.find(ports(1)), Some(new), "still that of the new one");
    }

    #[test]
    fn turns_go_round_and_do_not_pile_up() {
        let mut table = Table::new(3);
        let slots: Vec<_> = (0..3)
            .map(|guest| table.insert(ports(guest), ()).unwrap())
            .collect();
        for slot in [0, 1, 2, 1, 0] {
            table.mark_ready(slots[slot]);
        }
        let mut order = Vec::new();
        for _ in 0..4 {
            order.push(table.first_ready().unwrap());
            table.rotate();
        }
        assert_eq!(order, [slots[0], slots[1], slots[2], slots[0]]);
        // Connections that come and go in a slot whose turn has not come.
        for guest in 10..1000 {
            table.remove(slots[2]);
            assert_eq!(table.insert(ports(guest), ()), Some(slots[2]));
            table.mark_ready(slots[2]);
        }
        assert_eq!(table.ready.len(), 3);
        for _ in 0..3 {
            table.drop_first();
        }
        assert_eq!(table.first_ready(), None);
        table.mark_ready(slots[1]);
        assert_eq!(table.first_ready(), Some(slots[1]));
    }
}
