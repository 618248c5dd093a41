//! The statistics queue, from both sides.

use super::*;

const STATISTICS: usize = 2;
const BUFFER: u64 = 0x30_0000;

/// Puts statistics into the buffer: the tag for free memory, and its value.
fn set_free(driver: &MockDriver, free: u64) {
    driver.fill(BUFFER, &4_u16.to_le_bytes());
    driver.fill(BUFFER + 2, &free.to_le_bytes());
}

/// The driver's side: gives statistics with this value.
fn give(driver: &mut MockDriver, free: u64) {
    set_free(driver, free);
    driver.queues[STATISTICS].add(&driver.memory, &[Buffer::readable(BUFFER, 10)]);
    driver.notify(STATISTICS as u32);
}

fn free(control: &BalloonControl) -> Option<u64> {
    control.statistics().and_then(|statistics| statistics.free)
}

fn wait_free(control: &BalloonControl, value: u64) {
    wait_until("statistics", || free(control) == Some(value));
}

/// The device has returned the buffer.
fn wait_asked(driver: &mut MockDriver) {
    driver.queues[STATISTICS].wait_used(&driver.memory);
}

fn is_kept(driver: &mut MockDriver) -> bool {
    driver.transport.pause();
    driver.transport.resume();
    driver.queues[STATISTICS].used(&driver.memory).is_none()
}

#[test]
fn what_a_driver_gives_at_first_is_there_and_its_buffer_is_kept() {
    let (mut driver, control) = driver(STATS_VQ);
    assert_eq!(control.statistics(), None);
    give(&mut driver, 7);
    wait_free(&control, 7);
    // Kicks change nothing, and the buffer is not looked at again.
    set_free(&driver, 8);
    driver.notify(STATISTICS as u32);
    use_deflate_queue(&mut driver);
    assert_eq!(free(&control), Some(7));
    assert!(is_kept(&mut driver));
}

#[test]
fn statistics_that_are_asked_for_are_new_ones() {
    let (mut driver, control) = driver(STATS_VQ | MockDriver::EVENT_IDX);
    give(&mut driver, 1);
    wait_free(&control, 1);
    for value in 2..100 {
        let asker = control.clone();
        let asker = std::thread::spawn(move || asker.wait_for_statistics(LONG));
        wait_asked(&mut driver);
        assert_eq!(free(&control), Some(value - 1));
        give(&mut driver, value);
        assert_eq!(asker.join().unwrap().unwrap().free, Some(value));
    }
}

#[test]
fn an_answer_to_an_earlier_request_is_not_one_to_a_later() {
    let (mut driver, control) = driver(STATS_VQ);
    give(&mut driver, 1);
    wait_free(&control, 1);
    control.request_statistics();
    wait_asked(&mut driver);
    // This request comes while the driver may have looked already.
    let asker = control.clone();
    let asker = std::thread::spawn(move || asker.wait_for_statistics(LONG));
    wait_until("a request", || control.shared.statistics_asked() == 2);
    give(&mut driver, 2);
    wait_asked(&mut driver);
    assert_eq!(free(&control), Some(2));
    give(&mut driver, 3);
    assert_eq!(asker.join().unwrap().unwrap().free, Some(3));
}

#[test]
fn nobody_waits_longer_than_they_want() {
    let (mut driver, control) = driver(STATS_VQ);
    let short = Duration::from_millis(10);
    assert_eq!(control.wait_for_statistics(short), None);
    // What was asked for before there was anything is asked for at the first chance.
    give(&mut driver, 1);
    wait_asked(&mut driver);
    assert_eq!(control.wait_for_statistics(short), None);
    assert_eq!(free(&control), Some(1));
    // A driver that has no statistics.
    driver.start(0, 64);
    assert_eq!(control.wait_for_statistics(short), None);
    use_deflate_queue(&mut driver);
}

#[test]
fn a_request_goes_on_over_a_pause() {
    let (mut driver, control) = driver(STATS_VQ);
    give(&mut driver, 1);
    wait_free(&control, 1);
    driver.transport.pause();
    let asker = control.clone();
    let asker = std::thread::spawn(move || asker.wait_for_statistics(LONG));
    wait_until("a request", || control.shared.statistics_asked() == 1);
    assert!(driver.queues[STATISTICS].used(&driver.memory).is_none());
    driver.transport.resume();
    wait_asked(&mut driver);
    driver.transport.pause();
    driver.transport.resume();
    give(&mut driver, 2);
    assert_eq!(asker.join().unwrap().unwrap().free, Some(2));
}

#[test]
fn a_driver_may_give_as_much_as_it_likes() {
    let (mut driver, control) = driver(STATS_VQ);
    let entry = [&4_u16.to_le_bytes()[..], &9_u64.to_le_bytes()].concat();
    driver.fill(BUFFER, &entry.repeat(400));
    let buffers = [Buffer::readable(BUFFER, 4000); 30];
    let head = driver.queues[STATISTICS].indirect(&driver.memory, 0x8000, &buffers);
    driver.queues[STATISTICS].make_available(&driver.memory, head);
    // And one for the device to write, and one too short: all but the first have to wait.
    driver.queues[STATISTICS].add(&driver.memory, &[Buffer::writable(BUFFER, 4000)]);
    driver.queues[STATISTICS].add(&driver.memory, &[Buffer::readable(BUFFER, 9)]);
    driver.notify(STATISTICS as u32);
    wait_free(&control, 9);
    for _ in 0..2 {
        control.request_statistics();
        wait_asked(&mut driver);
        wait_until("other statistics", || free(&control).is_none());
    }
    assert!(is_kept(&mut driver));
}
