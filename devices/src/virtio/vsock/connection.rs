//! One connection as the protocol sees it: who may send what, and how much. No sockets here.
//!
//! Each side tells the other how much room it has for what it receives (`buf_alloc`) and how much
//! of that it has passed on (`fwd_cnt`), and sends no more than what the other has room for. All
//! counts wrap around at 32 bits (virtio 1.3, section 5.10.6.3).

use std::num::Wrapping;

use super::packet::{DONE, HOST_CID, Header, NO_RECEIVE, NO_SEND, STREAM, op};

/// The room for what a guest sends on a connection and its peer has not taken yet, in bytes.
pub(super) const ROOM: u32 = 128 << 10;

/// What a connection is known by; the context ids are always the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The host has asked for the connection, and the guest has not answered.
    Requested,
    /// The guest has asked for the connection, and the host has not answered.
    Offered,
    Open,
}

/// What a packet of the guest means for its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// Nothing but that the counts are new.
    Counts,
    /// The guest has accepted the connection.
    Opened,
    /// The data of the packet is to be passed on.
    Data,
    /// The data of the packet comes too late for a host that does not receive any more.
    Dropped,
    /// The guest does not send or does not receive any more: see [`Connection::guest_done`].
    Shutdown,
    /// The guest has ended the connection.
    Reset,
}

/// A packet that does not belong where it comes: it ends its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Violation;

/// Packets without data that are to be sent. Each is a bit, so none of them can pile up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Pending {
    request: bool,
    response: bool,
    shutdown: bool,
    credit_update: bool,
    credit_request: bool,
}

/// A connection between a port of the guest and one of the host.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    ports: Ports,
    phase: Phase,
    pending: Pending,
    /// What the guest said of its room.
    guest_room: u32,
    guest_freed: Wrapping<u32>,
    /// Bytes sent to the guest.
    sent: Wrapping<u32>,
    /// The guest was asked for room, and has not answered.
    asked: bool,
    /// Bytes received from the guest, those of them passed on, and what it was told of that.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    told: Wrapping<u32>,
    guest_done: u32,
    host_done: u32,
}

impl Connection {
    fn new(ports: Ports, phase: Phase) -> Self {
        Self {
            ports,
            phase,
            pending: Pending::default(),
            guest_room: 0,
            guest_freed: Wrapping(0),
            sent: Wrapping(0),
            asked: false,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            guest_done: 0,
            host_done: 0,
        }
    }

    /// A connection that the host asks for.
    pub(super) fn request(ports: Ports) -> Self {
        let mut connection = Self::new(ports, Phase::Requested);
        connection.pending.request = true;
        connection
    }

    /// A connection that the guest asks for with this `REQUEST`.
    pub(super) fn offered(header: &Header) -> Self {
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let mut connection = Self::new(ports, Phase::Offered);
        connection.take_counts(header);
        connection
    }

    /// Accepts the connection that the guest asked for.
    pub(super) fn accept(&mut self) {
        if self.phase == Phase::Offered {
            self.phase = Phase::Open;
            self.pending.response = true;
        }
    }

    pub(super) fn ports(&self) -> Ports {
        self.ports
    }

    pub(super) fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// The guest knows of the connection, and has to be told if it ends.
    pub(super) fn is_known_to_guest(&self) -> bool {
        !self.pending.request
    }

    /// What the guest does not do any more: [`NO_SEND`], [`NO_RECEIVE`].
    pub(super) fn guest_done(&self) -> u32 {
        self.guest_done
    }

    /// What the host does not do any more.
    pub(super) fn host_done(&self) -> u32 {
        self.host_done
    }

    /// Takes a packet of this connection from the guest.
    pub(super) fn receive(&mut self, header: &Header) -> Result<Received, Violation> {
        if header.op == op::RST {
            return Ok(Received::Reset);
        }
        self.take_counts(header);
        match (header.op, self.phase) {
            (op::RESPONSE, Phase::Requested) if !self.pending.request => {
                self.phase = Phase::Open;
                Ok(Received::Opened)
            }
            (op::RW, Phase::Open) => self.receive_data(header.len),
            (op::SHUTDOWN, Phase::Open | Phase::Offered) => {
                self.guest_done |= header.flags & DONE;
                Ok(Received::Shutdown)
            }
            (op::CREDIT_REQUEST, Phase::Open) => {
                self.pending.credit_update = true;
                Ok(Received::Counts)
            }
            (op::CREDIT_UPDATE, Phase::Open) => Ok(Received::Counts),
            _ => Err(Violation),
        }
    }

    fn receive_data(&mut self, len: u32) -> Result<Received, Violation> {
        let used = (self.received - self.forwarded).0;
        if self.guest_done & NO_SEND != 0 || len > ROOM.saturating_sub(used) {
            return Err(Violation);
        }
        self.received += len;
        if self.host_done & NO_RECEIVE != 0 {
            self.forwarded(len);
            return Ok(Received::Dropped);
        }
        Ok(Received::Data)
    }

    fn take_counts(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_freed = Wrapping(header.fwd_cnt);
        if self.credit() > 0 {
            self.asked = false;
            self.pending.credit_request = false;
        }
    }

    /// The bytes for which the guest has room. A guest that frees more than it was sent has none.
    pub(super) fn credit(&self) -> u32 {
        let on_the_way = (self.sent - self.guest_freed).0;
        self.guest_room.saturating_sub(on_the_way)
    }

    /// Data can go to the guest, as soon as it has room.
    pub(super) fn takes_data(&self) -> bool {
        self.is_open() && self.guest_done & NO_RECEIVE == 0 && self.host_done & NO_SEND == 0
    }

    /// There is data for a guest that has no room: asks it, once, how much it has.
    pub(super) fn ask_for_room(&mut self) {
        if !self.asked {
            self.asked = true;
            self.pending.credit_request = true;
        }
    }

    /// `len` bytes that the guest sent have left the room for them.
    pub(super) fn forwarded(&mut self, len: u32) {
        self.forwarded += len;
        // The guest is told when it sees less than half of the room, and not for every packet.
        let seen = ROOM.saturating_sub((self.received - self.told).0);
        if seen <= ROOM / 2 && self.forwarded != self.told {
            self.pending.credit_update = true;
        }
    }

    /// The host does not do this any more: [`NO_SEND`], [`NO_RECEIVE`].
    pub(super) fn host_is_done(&mut self, with: u32) {
        if with & !self.host_done != 0 {
            self.host_done |= with;
            self.pending.shutdown = self.is_open();
        }
    }

    /// The host is done, and has said so: only the guest's answer is missing.
    pub(super) fn is_closed_by_host(&self) -> bool {
        self.is_open() && self.host_done == DONE && !self.pending.shutdown
    }

    /// Whether a packet without data is to be sent.
    pub(super) fn has_control(&self) -> bool {
        self.next_control().is_some()
    }

    fn next_control(&self) -> Option<u16> {
        let pending = &self.pending;
        [
            (pending.request, op::REQUEST),
            (pending.response, op::RESPONSE),
            (pending.shutdown, op::SHUTDOWN),
            (pending.credit_update && self.is_open(), op::CREDIT_UPDATE),
            (pending.credit_request, op::CREDIT_REQUEST),
        ]
        .into_iter()
        .find_map(|(is_pending, op)| is_pending.then_some(op))
    }

    /// Takes the next packet without data that is to be sent.
    pub(super) fn take_control(&mut self, guest_cid: u64) -> Option<Header> {
        let op = self.next_control()?;
        let pending = &mut self.pending;
        let flag = match op {
            op::REQUEST => &mut pending.request,
            op::RESPONSE => &mut pending.response,
            op::SHUTDOWN => &mut pending.shutdown,
            op::CREDIT_UPDATE => &mut pending.credit_update,
            _ => &mut pending.credit_request,
        };
        *flag = false;
        let mut header = self.header(guest_cid, op);
        if op == op::SHUTDOWN {
            header.flags = self.host_done;
        }
        Some(header)
    }

    /// The header in front of `len` bytes of data, at most [`credit`](Self::credit), which are
    /// sent with it.
    pub(super) fn send(&mut self, guest_cid: u64, len: u32) -> Header {
        self.sent += len;
        Header {
            len,
            ..self.header(guest_cid, op::RW)
        }
    }

    /// The packet that ends the connection.
    pub(super) fn reset(&mut self, guest_cid: u64) -> Header {
        self.header(guest_cid, op::RST)
    }

    /// Every packet tells the guest of our room.
    fn header(&mut self, guest_cid: u64, op: u16) -> Header {
        self.told = self.forwarded;
        self.pending.credit_update = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            kind: STREAM,
            op,
            buf_alloc: ROOM,
            fwd_cnt: self.forwarded.0,
            ..Header::default()
        }
    }
}

#[cfg(test)]
#[path = "tests/connection.rs"]
mod tests;
