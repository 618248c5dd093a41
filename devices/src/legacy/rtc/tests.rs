use super::*;
use crate::test_support::every_access;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A clock at a number of milliseconds since the epoch that a test sets.
fn clock(at: u64) -> (Rtc, Arc<AtomicU64>) {
    let millis = Arc::new(AtomicU64::new(at));
    let time = Arc::clone(&millis);
    let rtc = Rtc::from_state(&RtcState::default(), move || {
        UNIX_EPOCH + Duration::from_millis(time.load(Ordering::SeqCst))
    });
    (rtc, millis)
}

fn read(rtc: &mut Rtc, index: u8) -> u8 {
    assert!(rtc.write(INDEX, &[index]).is_continue());
    let mut data = [0xff];
    rtc.read(DATA, &mut data);
    data[0]
}

fn write(rtc: &mut Rtc, index: u8, value: u8) {
    assert!(rtc.write(INDEX, &[index]).is_continue());
    assert!(rtc.write(DATA, &[value]).is_continue());
}

const ALL: [u8; 8] = [
    CENTURY,
    YEAR,
    MONTH,
    DAY_OF_MONTH,
    HOURS,
    MINUTES,
    SECONDS,
    DAY_OF_WEEK,
];

#[test]
fn the_registers_tell_the_time_in_bcd() {
    for (seconds, expected) in [
        (0, [0x19, 0x70, 0x01, 0x01, 0x00, 0x00, 0x00, 5]),
        // 29 February of a year that 400 divides, a Tuesday.
        (951_827_696, [0x20, 0x00, 0x02, 0x29, 0x12, 0x34, 0x56, 3]),
        // 24 November 2026, a Tuesday.
        (1_795_499_999, [0x20, 0x26, 0x11, 0x24, 0x05, 0x59, 0x59, 3]),
        // 31 December 2100 (no leap year), a Friday, and the second after.
        (4_133_980_799, [0x21, 0x00, 0x12, 0x31, 0x23, 0x59, 0x59, 6]),
        (4_133_980_800, [0x21, 0x01, 0x01, 0x01, 0x00, 0x00, 0x00, 7]),
        (LAST_SECOND, [0x99, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59, 6]),
    ] {
        let (mut rtc, _) = clock(seconds * 1000);
        assert_eq!(
            ALL.map(|index| read(&mut rtc, index)),
            expected,
            "{seconds}"
        );
    }
}

/// Counts the days one by one, with the rule for leap years as everybody knows it.
#[test]
fn no_day_in_a_thousand_years_is_wrong() {
    let divides = |by: u16, year: u16| year.is_multiple_of(by);
    let leap = |year| divides(4, year) && (!divides(100, year) || divides(400, year));
    let (mut year, mut month, mut day, mut day_of_week) = (1970, 1, 1, 5);
    for days in 0..366_000 {
        let date = Date::new(UNIX_EPOCH + Duration::from_secs(days * DAY));
        assert_eq!(
            (date.year, date.month, date.day, date.day_of_week),
            (year, month, day, day_of_week)
        );
        day_of_week = day_of_week % 7 + 1;
        let length = match month {
            2 => 28 + u8::from(leap(year)),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        day += 1;
        if day > length {
            (day, month) = (1, month + 1);
        }
        if month > 12 {
            (month, year) = (1, year + 1);
        }
    }
    assert!(year > 2970);
}

#[test]
fn a_moment_that_the_registers_cannot_tell_is_the_nearest_they_can() {
    let before = Date::new(UNIX_EPOCH - Duration::from_secs(1));
    assert_eq!((before.year, before.second), (1970, 0));
    let after = Date::new(UNIX_EPOCH + Duration::from_secs(LAST_SECOND + 1));
    assert_eq!((after.year, after.second), (9999, 59));
}

#[test]
fn binary_and_twelve_hours_are_honoured() {
    for (hour, twelve) in [
        (0, 12),
        (1, 1),
        (11, 11),
        (12, 12 | PM),
        (13, 1 | PM),
        (23, 11 | PM),
    ] {
        let (mut rtc, _) = clock((hour * 3600 + 58 * 60) * 1000);
        write(&mut rtc, STATUS_B, B_BINARY);
        assert_eq!(read(&mut rtc, HOURS), twelve);
        assert_eq!(read(&mut rtc, MINUTES), 58);
        write(&mut rtc, STATUS_B, B_BINARY | B_24_HOURS);
        assert_eq!(u64::from(read(&mut rtc, HOURS)), hour);
        assert_eq!(read(&mut rtc, STATUS_B), B_BINARY | B_24_HOURS);
    }
}

#[test]
fn registers_read_after_status_a_are_of_one_moment() {
    let (mut rtc, time) = clock(59_999);
    assert_eq!(read(&mut rtc, STATUS_A), A_DEFAULT);
    assert_eq!(read(&mut rtc, SECONDS), 0x59);
    time.store(60_001, Ordering::SeqCst);
    assert_eq!(read(&mut rtc, MINUTES), 0);
    // And not for ever.
    time.store(60_200, Ordering::SeqCst);
    assert_eq!(read(&mut rtc, MINUTES), 1);
    // The host's clock may also be set back.
    assert_eq!(read(&mut rtc, STATUS_A), A_DEFAULT);
    time.store(5_000, Ordering::SeqCst);
    assert_eq!(read(&mut rtc, SECONDS), 5);
}

#[test]
fn time_cannot_be_written_and_ram_can() {
    let (mut rtc, _) = clock(0);
    write(&mut rtc, YEAR, 0x99);
    assert_eq!(read(&mut rtc, YEAR), 0x70);
    write(&mut rtc, STATUS_A, 0xff);
    assert_eq!(read(&mut rtc, STATUS_A), 0x7f);
    write(&mut rtc, STATUS_C, 0xff);
    assert_eq!(read(&mut rtc, STATUS_C), 0);
    write(&mut rtc, STATUS_D, 0);
    assert_eq!(read(&mut rtc, STATUS_D), 0x80);
    // The bit above the index is not part of it; an `outw` writes index and data.
    assert!(rtc.write(INDEX, &[0x8f, 0x0a]).is_continue());
    assert_eq!(read(&mut rtc, 0x0f), 0x0a);
    write(&mut rtc, 0x7f, 0x55);
    assert_eq!(read(&mut rtc, 0xff), 0x55);
    // The index port itself reads as an empty bus.
    let mut data = [0xff];
    rtc.read(INDEX, &mut data);
    assert_eq!(data, [0xff]);
}

#[test]
fn the_state_survives_and_a_short_one_does_no_harm() {
    let (mut rtc, _) = clock(0);
    write(&mut rtc, 0x40, 0x77);
    let state = serde_json::to_string(&rtc.state()).unwrap();
    let state: RtcState = serde_json::from_str(&state).unwrap();
    assert_eq!(state, rtc.state());
    let mut rtc = Rtc::from_state(&state, SystemTime::now);
    let mut data = [0];
    rtc.read(DATA, &mut data);
    assert_eq!(data, [0x77]);
    let hostile = RtcState {
        index: 0xff,
        ram: vec![1; 3],
    };
    let mut rtc = Rtc::from_state(&hostile, SystemTime::now);
    rtc.read(DATA, &mut data);
    assert_eq!(data, [0]);
}

#[test]
fn no_access_ends_the_machine() {
    every_access(&Mutex::new(Rtc::new()), 2, |_, _, end| {
        assert!(end.is_continue());
    });
}
