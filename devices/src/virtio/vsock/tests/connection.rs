//! The protocol of one connection, without a socket in sight.

use super::*;
use crate::virtio::hostile::Random;

const CID: u64 = 3;
const PORTS: Ports = Ports {
    host: 70,
    guest: 1024,
};

fn packet(op: u16) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: PORTS.guest,
        dst_port: PORTS.host,
        kind: STREAM,
        op,
        buf_alloc: 1000,
        ..Header::default()
    }
}

fn data(len: u32) -> Header {
    Header {
        len,
        ..packet(op::RW)
    }
}

fn shutdown(flags: u32) -> Header {
    Header {
        flags,
        ..packet(op::SHUTDOWN)
    }
}

/// A connection that the guest asked for and got.
fn open() -> Connection {
    let mut connection = Connection::offered(&packet(op::REQUEST));
    connection.accept();
    let response = connection.take_control(CID).unwrap();
    assert_eq!((response.op, response.buf_alloc), (op::RESPONSE, ROOM));
    connection
}

#[test]
fn a_host_asks_and_the_guest_accepts() {
    let mut connection = Connection::request(PORTS);
    assert!(!connection.is_known_to_guest());
    assert_eq!(
        connection.receive(&packet(op::RESPONSE)),
        Err(Violation),
        "the answer comes before the question"
    );
    let request = connection.take_control(CID).unwrap();
    assert_eq!(request.op, op::REQUEST);
    assert_eq!((request.src_cid, request.dst_cid), (HOST_CID, CID));
    assert_eq!((request.src_port, request.dst_port), (70, 1024));
    assert!(connection.is_known_to_guest() && !connection.is_open());
    assert!(!connection.takes_data());
    assert_eq!(
        connection.receive(&packet(op::RESPONSE)),
        Ok(Received::Opened)
    );
    assert!(connection.takes_data());
    assert_eq!(connection.credit(), 1000);
    assert_eq!(connection.take_control(CID), None);
}

#[test]
fn what_comes_out_of_its_place_is_a_violation() {
    let mut requested = Connection::request(PORTS);
    requested.take_control(CID);
    let offered = Connection::offered(&packet(op::REQUEST));
    for (connection, refused) in [
        (requested, &[1, 4, 5, 6, 7, 0, 8, 0xffff][..]),
        (offered, &[1, 2, 5, 6, 7, 0, 8][..]),
        (open(), &[1, 2, 0, 8, 0xffff][..]),
    ] {
        for op in refused {
            let mut connection = connection.clone();
            assert_eq!(connection.receive(&packet(*op)), Err(Violation), "{op}");
        }
        let mut connection = connection;
        assert_eq!(connection.receive(&packet(op::RST)), Ok(Received::Reset));
    }
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut connection = open();
    let header = connection.send(CID, 600);
    assert_eq!((header.op, header.len), (op::RW, 600));
    assert_eq!(connection.credit(), 400);
    connection.send(CID, 400);
    assert_eq!(connection.credit(), 0);
    // Asked once, and again only after an answer.
    connection.ask_for_room();
    connection.ask_for_room();
    assert_eq!(connection.take_control(CID).unwrap().op, op::CREDIT_REQUEST);
    connection.ask_for_room();
    assert_eq!(connection.take_control(CID), None);
    let mut update = packet(op::CREDIT_UPDATE);
    update.fwd_cnt = 700;
    assert_eq!(connection.receive(&update), Ok(Received::Counts));
    assert_eq!(connection.credit(), 700);
    // A guest that lies has no room: it freed what it never got, or shrank what it had.
    update.fwd_cnt = 1001;
    connection.receive(&update).unwrap();
    assert_eq!(connection.credit(), 0);
    update.fwd_cnt = 900;
    update.buf_alloc = 99;
    connection.receive(&update).unwrap();
    assert_eq!(connection.credit(), 0);
}

#[test]
fn a_guest_that_overruns_its_credit_is_cut_off() {
    let mut connection = open();
    assert_eq!(connection.receive(&data(ROOM)), Ok(Received::Data));
    assert_eq!(connection.clone().receive(&data(1)), Err(Violation));
    assert_eq!(connection.receive(&data(0)), Ok(Received::Data));
    connection.forwarded(10);
    assert_eq!(connection.clone().receive(&data(11)), Err(Violation));
    assert_eq!(connection.receive(&data(10)), Ok(Received::Data));
    assert_eq!(open().receive(&data(u32::MAX)), Err(Violation));
}

#[test]
fn the_guest_is_told_of_room_when_it_sees_little_and_when_it_asks() {
    let mut connection = open();
    connection.receive(&data(ROOM / 2 - 1)).unwrap();
    connection.forwarded(ROOM / 2 - 1);
    assert_eq!(connection.take_control(CID), None);
    connection.receive(&data(1)).unwrap();
    connection.forwarded(1);
    let update = connection.take_control(CID).unwrap();
    assert_eq!((update.op, update.fwd_cnt), (op::CREDIT_UPDATE, ROOM / 2));
    connection.receive(&packet(op::CREDIT_REQUEST)).unwrap();
    assert_eq!(connection.take_control(CID).unwrap().op, op::CREDIT_UPDATE);
    // Whatever is sent says it too.
    connection.receive(&data(ROOM)).unwrap();
    connection.forwarded(ROOM);
    assert_eq!(connection.send(CID, 1).fwd_cnt, ROOM / 2 + ROOM);
    assert_eq!(connection.take_control(CID), None);
}

#[test]
fn each_direction_is_closed_apart() {
    let mut connection = open();
    assert_eq!(
        connection.receive(&shutdown(NO_SEND | 0xfff0)),
        Ok(Received::Shutdown)
    );
    assert_eq!(connection.guest_done(), NO_SEND);
    assert!(connection.takes_data());
    assert_eq!(connection.receive(&data(1)), Err(Violation));
    connection.receive(&shutdown(NO_RECEIVE)).unwrap();
    assert_eq!(connection.guest_done(), DONE, "it stays closed");
    assert!(!connection.takes_data());

    let mut connection = open();
    connection.host_is_done(NO_SEND);
    assert!(!connection.takes_data() && !connection.is_closed_by_host());
    let header = connection.take_control(CID).unwrap();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, NO_SEND));
    assert_eq!(connection.receive(&data(7)), Ok(Received::Data));
    connection.host_is_done(NO_SEND);
    assert_eq!(connection.take_control(CID), None, "said once");
    connection.host_is_done(NO_RECEIVE);
    assert!(!connection.is_closed_by_host(), "not said yet");
    assert_eq!(connection.take_control(CID).unwrap().flags, DONE);
    assert!(connection.is_closed_by_host());
    // What was on its way is dropped, and the guest keeps its credit.
    for _ in 0..100 {
        assert_eq!(connection.receive(&data(ROOM - 7)), Ok(Received::Dropped));
    }
}

/// Whatever a guest and a host do, counts stay within bounds and packets do not pile up.
#[test]
fn no_guest_breaks_a_connection() {
    let mut random = Random::new(11);
    for _ in 0..2000 {
        let mut connection = match random.below(3) {
            0 => Connection::request(PORTS),
            1 => Connection::offered(&packet(op::REQUEST)),
            _ => open(),
        };
        let mut waiting: u32 = 0;
        for _ in 0..40 {
            match random.below(7) {
                0..=2 => {
                    let mut header = packet(random.one_of(&[0, 2, 4, 5, 5, 5, 6, 7, 8]));
                    header.len = random.one_of(&[0, 1, 4096, ROOM, ROOM + 1, u32::MAX]);
                    header.flags = random.next() as u32;
                    header.buf_alloc = random.one_of(&[0, 1, 1 << 18, u32::MAX]);
                    header.fwd_cnt = random.one_of(&[0, 1, 4096, u32::MAX]);
                    if connection.receive(&header) == Ok(Received::Data) {
                        waiting += header.len;
                    }
                    assert!(waiting <= ROOM);
                }
                3 => {
                    let len = random.below(u64::from(waiting) + 1) as u32;
                    connection.forwarded(len);
                    waiting -= len;
                }
                4 => {
                    let len = connection.credit().min(5000);
                    if connection.takes_data() && len > 0 {
                        assert_eq!(connection.send(CID, len).len, len);
                    } else {
                        connection.ask_for_room();
                    }
                }
                5 => connection.host_is_done(random.below(4) as u32),
                _ => {
                    let mut packets = 0;
                    while connection.take_control(CID).is_some() {
                        packets += 1;
                    }
                    assert!(packets <= 5);
                }
            }
        }
    }
}
