use std::sync::atomic::Ordering;
use std::time::Duration;

use kiln_device_api::BusDevice;
use kiln_memory::{MemorySize, resident};
use kiln_virtio_device::testing::{Buffer, LONG, MockDriver, TransportKind, register, wait_until};

use super::*;
use crate::virtio::hostile::{Random, storm};

mod statistics;

const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORT: usize = 4;

/// The RAM of the mock driver.
const RAM: MemorySize = MemorySize::mib(18);
const PAGE: u64 = 4096;
/// Where page numbers lie.
const NUMBERS: u64 = 0x20_0000;
/// Where what is given back lies, up to the hole.
const DATA: u64 = 0x40_0000;
/// What all RAM is filled with.
const FILLED: u8 = 0xa5;

fn balloon(options: BalloonOptions) -> Balloon {
    Balloon::new(RAM, options).unwrap()
}

/// A driver that has written all of its RAM.
fn driver(features: u64) -> (MockDriver, BalloonControl) {
    let balloon = balloon(BalloonOptions::default());
    let control = balloon.control();
    let mut driver = MockDriver::new(Box::new(balloon));
    driver.fill(0, &vec![FILLED; MockDriver::HOLE as usize]);
    driver.fill(
        MockDriver::HIGH,
        &vec![FILLED; (MockDriver::END - MockDriver::HIGH) as usize],
    );
    driver.start(features, 64);
    assert_eq!(held(&driver), RAM.as_bytes());
    (driver, control)
}

fn held(driver: &MockDriver) -> u64 {
    resident(&driver.memory).unwrap().as_bytes()
}

fn set_numbers(driver: &MockDriver, numbers: &[u32]) -> Buffer {
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    driver.fill(NUMBERS, &bytes);
    Buffer::readable(NUMBERS, bytes.len() as u32)
}

/// Sends the numbers of pages to a queue.
fn send(driver: &mut MockDriver, queue: usize, numbers: &[u32]) {
    let buffer = set_numbers(driver, numbers);
    assert_eq!(driver.request(queue, &[buffer]), 0);
}

/// Has the device do something on another queue, and waits for it.
fn use_deflate_queue(driver: &mut MockDriver) {
    driver.request(DEFLATE, &[Buffer::readable(0x1000, 4)]);
}

fn page(address: u64) -> u32 {
    (address / PAGE) as u32
}

fn write_config(driver: &MockDriver, offset: u64, data: &[u8]) {
    let end = driver.transport.write(register::CONFIG + offset, data);
    assert!(end.is_continue());
}

fn num_pages(driver: &MockDriver) -> u32 {
    let mut bytes = [0xff; 4];
    driver.config(0, &mut bytes);
    u32::from_le_bytes(bytes)
}

#[test]
fn pages_in_the_balloon_are_the_hosts_until_they_are_touched_again() {
    let (mut driver, control) = driver(0);
    let numbers: Vec<u32> = (0..512).map(|n| page(DATA) + 2 * n).collect();
    send(&mut driver, INFLATE, &numbers);
    assert_eq!(held(&driver), RAM.as_bytes() - 512 * PAGE);
    for n in 0..1024 {
        let expected = if n % 2 == 0 { 0 } else { FILLED };
        assert_eq!(driver.bytes(DATA + n * PAGE + n, 1), [expected], "page {n}");
    }
    driver.fill(DATA, b"again");
    send(&mut driver, DEFLATE, &numbers[..3]);
    assert_eq!(driver.bytes(DATA, 6), b"again\0");
    let counters = control.counters();
    assert_eq!(counters.inflated_bytes.load(Ordering::Relaxed), 512 * PAGE);
    assert_eq!(counters.deflated_bytes.load(Ordering::Relaxed), 3 * PAGE);
    assert_eq!(counters.failures.load(Ordering::Relaxed), 0);
}

#[test]
fn exactly_the_pages_that_are_named_go_whatever_the_names_are() {
    let (mut driver, _) = driver(0);
    let mut random = Random::new(4);
    let mut gone = std::collections::BTreeSet::new();
    for _ in 0..20 {
        let mut numbers = Vec::new();
        for _ in 0..random.below(3000) {
            let number = match random.below(8) {
                // In RAM, but for the queues and the numbers.
                0..=3 => page(DATA) + random.below(3072) as u32,
                4 => page(MockDriver::HIGH) + random.below(512) as u32,
                5 => page(MockDriver::HOLE) + random.below(4096) as u32,
                6 => page(MockDriver::END) + random.below(4096) as u32,
                _ => u32::MAX - random.below(4096) as u32,
            };
            numbers.push(number);
        }
        send(&mut driver, INFLATE, &numbers);
        gone.extend(numbers);
    }
    let in_ram = |number: u32| {
        let address = u64::from(number) * PAGE;
        address < MockDriver::HOLE || (MockDriver::HIGH..MockDriver::END).contains(&address)
    };
    let lost = gone.iter().filter(|number| in_ram(**number)).count() as u64;
    assert_eq!(held(&driver), RAM.as_bytes() - lost * PAGE);
    let checked = page(DATA)..page(MockDriver::END);
    for number in checked.filter(|number| in_ram(*number)) {
        let expected = if gone.contains(&number) { 0 } else { FILLED };
        let found = driver.bytes(u64::from(number) * PAGE, PAGE as usize);
        assert!(found.iter().all(|byte| *byte == expected), "page {number}");
    }
}

#[test]
fn an_array_may_be_cut_at_any_byte_and_have_a_rest() {
    let (mut driver, _) = driver(0);
    for cut in 0..=10_u64 {
        let number = page(DATA) + 2 * cut as u32;
        set_numbers(&driver, &[number, number + 1, 1]);
        // Two numbers, and two bytes of a third.
        let buffers = [
            Buffer::readable(NUMBERS, cut as u32),
            Buffer::readable(NUMBERS + cut, 10 - cut as u32),
        ];
        let before = held(&driver);
        driver.request(INFLATE, &buffers);
        assert_eq!(held(&driver), before - 2 * PAGE, "{cut}");
    }
    // Nothing to be read, and less than a number.
    let before = held(&driver);
    driver.request(INFLATE, &[Buffer::writable(DATA + 0x10_0000, 8192)]);
    driver.request(INFLATE, &[Buffer::readable(DATA, 3)]);
    assert_eq!(held(&driver), before);
}

/// Makes a chain of very many page numbers available, most of them the same memory again and again.
fn add_long_chain(driver: &mut MockDriver) {
    let numbers: Vec<u32> = (0..65536).map(|n| page(DATA) + n % 2048).collect();
    let buffer = set_numbers(driver, &numbers);
    let queue = &mut driver.queues[INFLATE];
    let head = queue.indirect(&driver.memory, 0x8000, &[buffer; 64]);
    queue.make_available(&driver.memory, head);
}

#[test]
fn a_chain_that_takes_long_holds_up_nobody_else() {
    let (mut driver, control) = driver(0);
    driver.transport.pause();
    add_long_chain(&mut driver);
    driver.transport.resume();
    // In the time that the array takes the deflate queue is served many times.
    let inflated = || control.counters().inflated_bytes.load(Ordering::Relaxed);
    let all = 64 * 65536 * PAGE;
    let mut served = 0;
    while inflated() < all {
        use_deflate_queue(&mut driver);
        served += 1;
    }
    // There are turns for dozens; how many of them this thread meets is the system's to say.
    assert!(served > 1, "{served}");
    driver.queues[INFLATE].wait_used(&driver.memory);
    assert_eq!(inflated(), all);
    assert_eq!(held(&driver), RAM.as_bytes() - 2048 * PAGE);
}

#[test]
fn a_pause_does_not_wait_for_a_long_chain_which_goes_on_afterwards() {
    for kind in [TransportKind::Mmio, TransportKind::Pci] {
        let device = balloon(BalloonOptions::default());
        let control = device.control();
        let mut driver = MockDriver::over(kind, Box::new(device));
        driver.start(0, 64);
        add_long_chain(&mut driver);
        driver.notify(INFLATE as u32);
        let mut pauses = 0;
        while driver.queues[INFLATE].used_index(&driver.memory) == 0 {
            driver.transport.pause();
            pauses += 1;
            if pauses > 20 {
                // A chain that was begun is begun anew: it has to get to its end.
                driver.transport.resume();
                driver.queues[INFLATE].wait_used(&driver.memory);
                break;
            }
            driver.transport.resume();
        }
        assert!(pauses > 0);
        let inflated = control.counters().inflated_bytes.load(Ordering::Relaxed);
        assert!(inflated >= 64 * 65536 * PAGE);
    }
}

#[test]
fn reported_pages_are_the_hosts() {
    // The queue as the specification numbers it, and as Linux before 6.11 does.
    for queue in [REPORT, 3] {
        let (mut driver, control) = driver(STATS_VQ | PAGE_REPORTING);
        let high = MockDriver::HIGH;
        let buffers = [
            Buffer::writable(DATA, 4 << 20),
            Buffer::writable(high, 1 << 20),
            // Not whole pages: the one between is.
            Buffer::writable(high + 0x10_0800, 0x2000),
            Buffer::writable(high + 0x18_0000, 0xfff),
        ];
        driver.request(queue, &buffers);
        let given = (5 << 20) + PAGE;
        assert_eq!(held(&driver), RAM.as_bytes() - given);
        assert_eq!(
            control.counters().reported_bytes.load(Ordering::Relaxed),
            given
        );
        for (address, expected) in [
            (DATA - 1, FILLED),
            (DATA, 0),
            (DATA + (4 << 20) - 1, 0),
            (DATA + (4 << 20), FILLED),
            (high + 0x10_0fff, FILLED),
            (high + 0x10_1000, 0),
            (high + 0x10_2000, FILLED),
            (high + 0x18_0000, FILLED),
        ] {
            assert_eq!(driver.bytes(address, 1), [expected], "{address:#x}");
        }
    }
}

#[test]
fn what_a_driver_without_statistics_takes_for_the_reporting_queue_is_one() {
    let (mut driver, _) = driver(PAGE_REPORTING);
    driver.request(2, &[Buffer::writable(DATA, 1 << 20)]);
    assert_eq!(held(&driver), RAM.as_bytes() - (1 << 20));
}

#[test]
fn a_report_of_all_ram_many_times_over_holds_up_nobody_else() {
    let (mut driver, control) = driver(STATS_VQ | PAGE_REPORTING);
    let buffers = [Buffer::writable(DATA, 8 << 20); 300];
    let head = driver.queues[REPORT].indirect(&driver.memory, 0x8000, &buffers);
    driver.transport.pause();
    driver.queues[REPORT].make_available(&driver.memory, head);
    driver.transport.resume();
    let reported = || control.counters().reported_bytes.load(Ordering::Relaxed);
    let mut served = 0;
    while reported() < 300 * (8 << 20) {
        use_deflate_queue(&mut driver);
        served += 1;
    }
    // There are turns for dozens; how many of them this thread meets is the system's to say.
    assert!(served > 1, "{served}");
    driver.queues[REPORT].wait_used(&driver.memory);
    assert_eq!(reported(), 300 * (8 << 20));
    assert_eq!(held(&driver), RAM.as_bytes() - (8 << 20));
}

#[test]
fn reports_of_more_pieces_than_a_turn_takes_are_taken_whole() {
    let (mut driver, control) = driver(STATS_VQ | PAGE_REPORTING);
    let pieces: Vec<_> = (0..1000)
        .map(|n| Buffer::writable(DATA + n * PAGE, PAGE as u32))
        .collect();
    let table = |n: u64| NUMBERS + n * 0x4000;
    driver.transport.pause();
    for n in 0..10 {
        let queue = &mut driver.queues[REPORT];
        let head = queue.indirect(&driver.memory, table(n), &pieces);
        queue.make_available(&driver.memory, head);
    }
    driver.transport.resume();
    for _ in 0..10 {
        driver.queues[REPORT].wait_used(&driver.memory);
    }
    let reported = control.counters().reported_bytes.load(Ordering::Relaxed);
    assert_eq!(reported, 10_000 * PAGE);
    assert_eq!(held(&driver), RAM.as_bytes() - 1000 * PAGE);
}

#[test]
fn a_report_that_is_not_all_ram_gives_nothing_back_and_needs_a_reset() {
    for bad in [
        Buffer::writable(MockDriver::HOLE - 0x1000, 0x2000),
        Buffer::writable(MockDriver::HOLE, 0x1000),
        Buffer::writable(MockDriver::END, 0x1000),
        Buffer::writable(u64::MAX - 0xfff, 0x1000),
        Buffer::writable(0, u32::MAX),
    ] {
        let (mut driver, control) = driver(STATS_VQ | PAGE_REPORTING);
        let buffers = [Buffer::writable(DATA, 0x1000), bad];
        driver.queues[REPORT].add(&driver.memory, &buffers);
        driver.notify(REPORT as u32);
        driver.wait_needs_reset();
        assert_eq!(held(&driver), RAM.as_bytes());
        assert_eq!(control.counters().reported_bytes.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn what_the_device_may_not_write_is_not_given_back() {
    let (mut driver, _) = driver(STATS_VQ | PAGE_REPORTING);
    let buffers = [
        Buffer::readable(DATA, 0x4000),
        Buffer::writable(DATA + 0x8000, 0x1000),
    ];
    driver.request(REPORT, &buffers);
    assert_eq!(held(&driver), RAM.as_bytes() - PAGE);
    assert_eq!(driver.bytes(DATA, 1), [FILLED]);
}

#[test]
fn reports_are_taken_where_they_were_agreed_on() {
    let (mut driver, _) = driver(STATS_VQ);
    for queue in [3, REPORT] {
        driver.queues[queue].add(&driver.memory, &[Buffer::writable(DATA, 0x1000)]);
        driver.notify(queue as u32);
    }
    // What comes after shows that the device has seen them.
    use_deflate_queue(&mut driver);
    driver.transport.pause();
    assert_eq!(driver.queues[REPORT].used_index(&driver.memory), 0);
    assert_eq!(held(&driver), RAM.as_bytes());
}

#[test]
fn only_what_the_options_say_is_offered() {
    for (deflate_on_oom, free_page_reporting) in
        [(false, false), (false, true), (true, false), (true, true)]
    {
        let options = BalloonOptions {
            deflate_on_oom,
            free_page_reporting,
            ..BalloonOptions::default()
        };
        let mut driver = MockDriver::new(Box::new(balloon(options)));
        let offered = driver.offered() & 0xff_ffff;
        let mut expected = STATS_VQ;
        if deflate_on_oom {
            expected |= DEFLATE_ON_OOM;
        }
        if free_page_reporting {
            expected |= PAGE_REPORTING;
        }
        assert_eq!(offered, expected);
        driver.start(offered, 64);
        assert_eq!(driver.queues.len(), if free_page_reporting { 5 } else { 3 });
        // Linux wants no less for its reports.
        assert!(driver.queues.iter().skip(3).all(|queue| queue.size >= 32));
    }
}

#[test]
fn a_target_reaches_the_driver() {
    let (driver, control) = driver(0);
    let interrupts = driver.line.count();
    control.set_target(MemorySize::mib(4)).unwrap();
    assert_eq!(driver.line.count(), interrupts + 1);
    assert_eq!(num_pages(&driver), 1024);
    assert_eq!(control.target(), MemorySize::mib(4));
    // It knows it already.
    control.set_target(MemorySize::mib(4)).unwrap();
    assert_eq!(driver.line.count(), interrupts + 1);
    // The driver cannot change it.
    write_config(&driver, 0, &7_u32.to_le_bytes());
    assert_eq!(num_pages(&driver), 1024);
}

#[test]
fn a_target_set_while_nobody_listens_is_told_later() {
    let (mut driver, control) = driver(0);
    driver.transport.pause();
    let interrupts = driver.line.count();
    control.set_target(MemorySize::mib(1)).unwrap();
    assert_eq!(driver.line.count(), interrupts);
    driver.transport.resume();
    assert_eq!(driver.line.count(), interrupts + 1);
    assert_eq!(num_pages(&driver), 256);
    // Without a driver none is bothered; the next one is told.
    driver.transport.reset();
    let interrupts = driver.line.count();
    control.set_target(MemorySize::mib(2)).unwrap();
    assert_eq!(driver.line.count(), interrupts);
    driver.start(0, 64);
    assert_eq!(driver.line.count(), interrupts + 1);
    assert_eq!(num_pages(&driver), 512);
}

#[test]
fn what_is_in_the_balloon_is_what_the_driver_says() {
    let (driver, control) = driver(0);
    assert_eq!(control.actual(), MemorySize::bytes(0));
    write_config(&driver, 4, &256_u32.to_le_bytes());
    assert_eq!(control.actual(), MemorySize::mib(1));
    let mut bytes = [0xff; 8];
    driver.config(0, &mut bytes);
    assert_eq!(bytes, [0, 0, 0, 0, 0, 1, 0, 0]);
    for (at, byte) in (4..).zip([1, 2, 3, 4]) {
        write_config(&driver, at, &[byte]);
    }
    assert_eq!(control.actual().as_bytes(), 0x0403_0201 * PAGE);
    // Beyond it there is nothing.
    write_config(&driver, 8, &[0xff; 4]);
    write_config(&driver, 0xfff0, &[0xff; 4]);
    driver.config(0, &mut bytes);
    assert_eq!(bytes, [0, 0, 0, 0, 1, 2, 3, 4]);
}

#[test]
fn the_balloon_is_empty_after_a_reset_and_not_after_a_pause() {
    let (mut driver, control) = driver(0);
    write_config(&driver, 4, &9_u32.to_le_bytes());
    driver.transport.pause();
    driver.transport.resume();
    assert_eq!(control.actual().as_bytes(), 9 * PAGE);
    driver.start(0, 64);
    assert_eq!(control.actual().as_bytes(), 0);
}

#[test]
fn a_target_is_whole_pages_of_what_the_guest_has() {
    let control = balloon(BalloonOptions::default()).control();
    control.set_target(RAM).unwrap();
    for (bytes, said) in [
        (RAM.as_bytes() + PAGE, "up to the 18M that the guest has"),
        (4097, "let a balloon have 4097B (4097 bytes)"),
        (u64::MAX, "a multiple of 4 KiB"),
    ] {
        let target = MemorySize::bytes(bytes);
        let error = control.set_target(target).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
        let options = BalloonOptions {
            target,
            ..BalloonOptions::default()
        };
        assert_eq!(Balloon::new(RAM, options).unwrap_err().to_string(), error);
    }
    assert_eq!(control.target(), RAM);
}

#[test]
fn the_state_survives_being_stored() {
    let options = BalloonOptions {
        target: MemorySize::mib(3),
        ..BalloonOptions::default()
    };
    let balloon = balloon(options);
    let control = balloon.control();
    let state = BalloonState {
        actual_pages: 5,
        ..balloon.state()
    };
    assert_eq!(control.target(), MemorySize::mib(3));
    let text = serde_json::to_string(&state).unwrap();
    let state: BalloonState = serde_json::from_str(&text).unwrap();
    let restored = Balloon::from_state(RAM, BalloonOptions::default(), &state).unwrap();
    assert_eq!(restored.state(), state);
    assert_eq!(restored.control().target(), MemorySize::mib(3));
    assert_eq!(restored.control().actual(), MemorySize::bytes(5 * PAGE));
    let state = BalloonState {
        target_pages: u32::MAX,
        ..state
    };
    Balloon::from_state(RAM, BalloonOptions::default(), &state).unwrap_err();
}

#[test]
fn a_driver_that_gives_its_own_queues_away_harms_itself_alone() {
    let (mut driver, _) = driver(STATS_VQ | PAGE_REPORTING);
    let queues = page(MockDriver::QUEUES);
    let buffer = set_numbers(&driver, &(queues..queues + 16).collect::<Vec<_>>());
    for _ in 0..3 {
        driver.queues[INFLATE].add(&driver.memory, &[buffer]);
    }
    driver.notify(INFLATE as u32);
    // The available ring is zeros then: far from where the device is.
    driver.wait_needs_reset();
    driver.start(0, 64);
    send(&mut driver, INFLATE, &[page(DATA)]);
    assert_eq!(driver.bytes(DATA, 1), [0]);
}

#[test]
fn no_driver_breaks_a_balloon() {
    for kind in [TransportKind::Mmio, TransportKind::Pci] {
        let device = balloon(BalloonOptions::default());
        let control = device.control();
        let mut driver = MockDriver::over(kind, Box::new(device));
        let mut random = Random::new(5);
        for _ in 0..100 {
            let features = random.next() & (STATS_VQ | DEFLATE_ON_OOM | PAGE_REPORTING);
            let rings = random.one_of(&[0, MockDriver::EVENT_IDX]);
            driver.start(features | rings, 8);
            storm(&mut driver, &mut random, 20);
            control
                .set_target(MemorySize::bytes(random.below(18) << 20))
                .unwrap();
            control.request_statistics();
            storm(&mut driver, &mut random, 20);
            driver.start(features, 64);
            driver.fill(DATA, &[FILLED]);
            send(&mut driver, INFLATE, &[page(DATA), u32::MAX]);
            assert_eq!(driver.bytes(DATA, 1), [0]);
        }
        assert_eq!(control.counters().failures.load(Ordering::Relaxed), 0);
    }
}
