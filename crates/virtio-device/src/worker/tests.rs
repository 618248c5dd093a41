use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::test_device::{Controls, EchoDevice};
use crate::testing::{
    Buffer, DriverQueue, InterruptRecorder, MockDriver, RawDescriptor, TransportKind,
    over_each_transport, register, wait_until,
};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Where tables and data may lie, clear of the queues.
const DATA: u64 = 0x20_0000;

over_each_transport!(
    a_batch_is_told_by_one_interrupt,
    a_driver_that_wants_no_interrupt_gets_none,
    an_interrupt_comes_when_the_used_index_passes_the_event_index,
    an_idle_device_asks_for_a_notification_and_a_waiting_one_does_not,
    with_an_event_index_every_request_is_noticed_if_the_driver_keeps_to_it,
    a_handler_is_called_for_a_file_descriptor_of_its_own,
    a_long_turn_ends_so_that_others_get_theirs,
    a_handler_that_panics_is_not_called_again_and_its_queues_come_back,
    a_ring_that_no_driver_writes_makes_the_device_need_a_reset,
);

fn driver(kind: TransportKind, features: u64, size: u16) -> (MockDriver, Arc<Controls>) {
    let (device, controls) = EchoDevice::boxed();
    let mut driver = MockDriver::over(kind, device);
    driver.start(features, size);
    (driver, controls)
}

fn add(driver: &mut MockDriver, count: usize) {
    for _ in 0..count {
        let buffers = [Buffer::readable(0x1000, 4), Buffer::writable(0x2000, 4)];
        driver.queues[0].add(&driver.memory, &buffers);
    }
}

fn wait_all_used(driver: &mut MockDriver, count: usize) {
    for _ in 0..count {
        assert_eq!(driver.queues[0].wait_used(&driver.memory).1, 4);
    }
}

/// Lets the device serve `count` requests at once; gives the interrupts that this made.
fn interrupts_of_a_batch(driver: &mut MockDriver, count: usize) -> usize {
    driver.transport.pause();
    driver.write(register::INTERRUPT_ACK, 3);
    let before = driver.line.count();
    add(driver, count);
    driver.transport.resume();
    wait_all_used(driver, count);
    // Once the device is stopped no interrupt can follow.
    driver.transport.pause();
    let interrupts = driver.line.count() - before;
    driver.write(register::INTERRUPT_ACK, 3);
    driver.transport.resume();
    interrupts
}

fn a_batch_is_told_by_one_interrupt(kind: TransportKind) {
    for features in [0, MockDriver::EVENT_IDX] {
        let (mut driver, _) = driver(kind, features, 64);
        assert_eq!(interrupts_of_a_batch(&mut driver, 20), 1);
    }
}

fn a_driver_that_wants_no_interrupt_gets_none(kind: TransportKind) {
    let (mut driver, _) = driver(kind, 0, 64);
    driver.queues[0].set_flags(&driver.memory, 1);
    assert_eq!(interrupts_of_a_batch(&mut driver, 20), 0);
    driver.queues[0].set_flags(&driver.memory, 0);
    assert_eq!(interrupts_of_a_batch(&mut driver, 20), 1);
}

fn an_interrupt_comes_when_the_used_index_passes_the_event_index(kind: TransportKind) {
    let (mut driver, _) = driver(kind, MockDriver::EVENT_IDX, 64);
    let mut used = 0_u16;
    // (how far ahead the driver wants its interrupt, how many are used, interrupts)
    for (ahead, count, interrupts) in [
        (0, 1, 1),
        (1, 1, 0),
        (4, 5, 1),
        (5, 5, 0),
        (60, 20, 0),
        (0, 20, 1),
        (u16::MAX, 9, 0),
    ] {
        driver.queues[0].set_used_event(&driver.memory, used.wrapping_add(ahead));
        let seen = interrupts_of_a_batch(&mut driver, count);
        assert_eq!(
            seen, interrupts,
            "{count} used from {used}, wanted behind {ahead} more"
        );
        used += count as u16;
    }
    // The indices wrap.
    while used < u16::MAX - 7 {
        driver.queues[0].set_used_event(&driver.memory, used.wrapping_sub(1));
        let count = (u16::MAX - 7 - used).min(20);
        add(&mut driver, usize::from(count));
        driver.notify(0);
        wait_all_used(&mut driver, usize::from(count));
        used += count;
    }
    driver.queues[0].set_used_event(&driver.memory, 2);
    assert_eq!(interrupts_of_a_batch(&mut driver, 10), 0);
    assert_eq!(interrupts_of_a_batch(&mut driver, 10), 1);
}

fn an_idle_device_asks_for_a_notification_and_a_waiting_one_does_not(kind: TransportKind) {
    let (mut driver, controls) = driver(kind, 0, 8);
    add(&mut driver, 1);
    driver.notify(0);
    wait_all_used(&mut driver, 1);
    wait_until("notifications on", || {
        driver.queues[0].used_flags(&driver.memory) == 0
    });
    driver.transport.pause();
    assert_eq!(driver.queues[0].used_flags(&driver.memory), 0);
    controls.hold.store(true, Ordering::SeqCst);
    add(&mut driver, 1);
    let calls = controls.calls.load(Ordering::SeqCst);
    driver.transport.resume();
    wait_until("a call", || controls.calls.load(Ordering::SeqCst) > calls);
    driver.transport.pause();
    assert_eq!(driver.queues[0].used_flags(&driver.memory), 1);
    // What it put back is not lost.
    assert_eq!(
        driver.transport.state().unwrap().core().queues[0].next_avail,
        1
    );
    controls.hold.store(false, Ordering::SeqCst);
    driver.transport.resume();
    wait_all_used(&mut driver, 1);
}

fn with_an_event_index_every_request_is_noticed_if_the_driver_keeps_to_it(kind: TransportKind) {
    let (mut driver, _) = driver(kind, MockDriver::EVENT_IDX, 8);
    for round in 0..2000_u16 {
        add(&mut driver, 1);
        std::sync::atomic::fence(Ordering::SeqCst);
        // A driver that has added one entry notifies only if the device asked for this one.
        if driver.queues[0].avail_event(&driver.memory) == round {
            driver.notify(0);
        }
        wait_all_used(&mut driver, 1);
    }
}

fn a_handler_is_called_for_a_file_descriptor_of_its_own(kind: TransportKind) {
    let (device, controls) = EchoDevice::boxed();
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    *controls.wake.lock().unwrap() = Some(Arc::clone(&wake));
    controls.hold.store(true, Ordering::SeqCst);
    let mut driver = MockDriver::over(kind, device);
    driver.start(0, 8);
    add(&mut driver, 3);
    driver.notify(0);
    wait_until("a call", || controls.calls.load(Ordering::SeqCst) >= 2);
    assert_eq!(driver.queues[0].used(&driver.memory), None);
    wake.write(1).unwrap();
    wait_all_used(&mut driver, 3);
    // The fd can be waited for again after a reset, and stays open all the time.
    driver.start(0, 8);
    controls.hold.store(true, Ordering::SeqCst);
    add(&mut driver, 1);
    wake.write(1).unwrap();
    wait_all_used(&mut driver, 1);
}

fn a_long_turn_ends_so_that_others_get_theirs(kind: TransportKind) {
    let (mut driver, controls) = driver(kind, 0, 8);
    driver.transport.pause();
    for _ in 0..3 {
        let buffers = [
            Buffer::readable(DATA, 4),
            Buffer::readable(DATA, 9 << 20),
            Buffer::writable(0x2000, 4),
        ];
        driver.queues[0].indirect(&driver.memory, 0x3000, &buffers);
    }
    for head in 0..3 {
        driver.queues[0].make_available(&driver.memory, head);
    }
    let before = controls.calls.load(Ordering::SeqCst);
    driver.transport.resume();
    wait_all_used(&mut driver, 3);
    driver.transport.pause();
    // Queue 1 was called once, and queue 0 for each of its long chains.
    assert!(controls.calls.load(Ordering::SeqCst) - before >= 4);
}

fn a_handler_that_panics_is_not_called_again_and_its_queues_come_back(kind: TransportKind) {
    let (mut driver, controls) = driver(kind, 0, 8);
    controls.panic.store(true, Ordering::SeqCst);
    let calls = controls.calls.load(Ordering::SeqCst);
    add(&mut driver, 1);
    driver.notify(0);
    wait_until("a call", || controls.calls.load(Ordering::SeqCst) > calls);
    driver.notify(0);
    driver.transport.pause();
    assert_eq!(*controls.given_back.lock().unwrap(), [0, 1]);
    assert_eq!(controls.drained.load(Ordering::SeqCst), 0);
    controls.panic.store(false, Ordering::SeqCst);
    driver.transport.resume();
    driver.start(0, 8);
    add(&mut driver, 1);
    driver.notify(0);
    wait_all_used(&mut driver, 1);
}

fn a_ring_that_no_driver_writes_makes_the_device_need_a_reset(kind: TransportKind) {
    for jump in [9, 100, 0x7fff, 0x8000, 0xffff] {
        let (mut driver, controls) = driver(kind, 0, 8);
        wait_until("the first calls", || {
            controls.calls.load(Ordering::SeqCst) == 2
        });
        driver.queues[0].set_avail_index(&driver.memory, jump);
        driver.notify(0);
        driver.wait_needs_reset();
        assert_eq!(driver.read(register::INTERRUPT_STATUS), 2);
        // Nobody listens any more.
        let calls = controls.calls.load(Ordering::SeqCst);
        driver.notify(0);
        driver.notify(1);
        driver.transport.pause();
        assert_eq!(controls.calls.load(Ordering::SeqCst), calls);
        driver.transport.resume();
        driver.start(0, 8);
        add(&mut driver, 2);
        driver.notify(0);
        wait_all_used(&mut driver, 2);
    }
}

/// A queue of 8 descriptors with no transport around it.
struct Bare {
    memory: Arc<GuestMemory>,
    driver: DriverQueue,
    active: ActiveQueue,
}

impl Bare {
    fn new() -> Self {
        let (device, _) = EchoDevice::boxed();
        let memory = MockDriver::new(device).memory;
        let driver = DriverQueue::new(&memory, MockDriver::QUEUES, 8);
        let mut queue = Queue::new(8).unwrap();
        queue.set_desc_table_address(Some(driver.desc_table as u32), None);
        queue.set_avail_ring_address(Some(driver.avail_ring as u32), None);
        queue.set_used_ring_address(Some(driver.used_ring as u32), None);
        queue.set_ready(true);
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        Self {
            memory,
            driver,
            active: ActiveQueue {
                index: 3,
                queue,
                kick,
                counters: Arc::default(),
            },
        }
    }

    fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let descriptor = RawDescriptor {
            address,
            len,
            flags,
            next,
        };
        self.driver
            .write_descriptor(&self.memory, index, descriptor);
    }

    /// Makes `head` available, and gives what taking it says.
    fn pop(&mut self, head: u16) -> Result<(usize, usize), QueueError> {
        self.driver.make_available(&self.memory, head);
        let mut turn = Turn::new(&mut self.active, &self.memory, SpareChains::default());
        let chain = turn.pop()?.unwrap();
        Ok((chain.readable.len(), chain.writable.len()))
    }

    fn chain_error(&mut self, head: u16) -> ChainError {
        match self.pop(head) {
            Err(QueueError::Chain(error)) => error,
            other => panic!("{other:?}"),
        }
    }

    fn turn(
        &mut self,
        process: impl FnMut(&mut Turn<'_>) -> Result<(), QueueError>,
    ) -> (TurnEnd, usize) {
        let line = InterruptRecorder::default();
        let mut spare = SpareChains::default();
        let end = turn_on(&mut self.active, &self.memory, &mut spare, &line, process).unwrap();
        assert!(
            line.events()
                .iter()
                .all(|event| *event == InterruptEvent::Queue(3))
        );
        (end, line.count())
    }
}

#[test]
fn a_chain_is_split_into_what_is_read_and_what_is_written() {
    let mut bare = Bare::new();
    bare.descriptor(0, DATA, 16, NEXT, 3);
    bare.descriptor(3, MockDriver::END - 1, 1, NEXT, 1);
    bare.descriptor(1, DATA, 0, NEXT, 2);
    bare.descriptor(2, DATA, 513, WRITE, 7);
    assert_eq!(bare.pop(0).unwrap(), (17, 513));
    // A chain of as many descriptors as the queue has.
    for index in 0..8 {
        bare.descriptor(index, DATA, 1, if index < 7 { NEXT } else { 0 }, index + 1);
    }
    assert_eq!(bare.pop(0).unwrap(), (8, 0));
    // An indirect table with more descriptors than the queue has, behind a direct one.
    let mut table = DriverQueue::new(&bare.memory, DATA, 64);
    table.chain(&bare.memory, &[Buffer::writable(0x3000, 4); 64]);
    bare.descriptor(0, 0x1000, 8, NEXT, 1);
    bare.descriptor(1, DATA, 16 * 64, INDIRECT, 0);
    assert_eq!(bare.pop(0).unwrap(), (8, 4 * 64));
    // A buffer over the whole of the lower RAM.
    bare.descriptor(0, 0, MockDriver::HOLE as u32, WRITE, 0);
    assert_eq!(bare.pop(0).unwrap(), (0, MockDriver::HOLE as usize));
}

#[test]
fn chains_that_do_not_end_are_told_apart_from_good_ones() {
    let mut bare = Bare::new();
    // A head, and a next, outside of the table.
    assert_eq!(bare.chain_error(8), ChainError::Broken { descriptors: 0 });
    assert_eq!(
        bare.chain_error(0xffff),
        ChainError::Broken { descriptors: 0 }
    );
    bare.descriptor(0, DATA, 1, NEXT, 8);
    assert_eq!(bare.chain_error(0), ChainError::Broken { descriptors: 1 });
    // Loops of one and of three.
    bare.descriptor(0, DATA, 1, NEXT, 0);
    assert_eq!(bare.chain_error(0), ChainError::Broken { descriptors: 8 });
    bare.descriptor(0, DATA, 1, NEXT, 1);
    bare.descriptor(1, DATA, 1, NEXT, 2);
    bare.descriptor(2, DATA, 1, NEXT, 0);
    assert_eq!(bare.chain_error(1), ChainError::Broken { descriptors: 8 });
    // More than 4 GiB in all.
    bare.descriptor(0, 0, MockDriver::HOLE as u32, NEXT | WRITE, 1);
    bare.descriptor(1, 0, 0xff00_0000, WRITE, 0);
    assert_eq!(bare.chain_error(0), ChainError::Broken { descriptors: 1 });
}

#[test]
fn indirect_tables_are_followed_one_level_and_only_where_well_formed() {
    let mut bare = Bare::new();
    let inner = RawDescriptor {
        address: DATA,
        len: 16,
        flags: INDIRECT,
        next: 0,
    };
    let mut table = DriverQueue::new(&bare.memory, DATA, 8);
    table.write_descriptor(&bare.memory, 0, inner);
    bare.descriptor(0, DATA, 16, INDIRECT, 0);
    assert_eq!(bare.chain_error(0), ChainError::Broken { descriptors: 0 });
    for (address, len) in [
        (DATA, 0),
        (DATA, 8),
        (DATA, 17),
        (DATA, 16 << 16),
        (DATA, 0xffff_fff0),
        (MockDriver::HOLE, 16),
        (MockDriver::END - 8, 16),
        (u64::MAX - 7, 16),
        (u64::MAX - 15, 32),
    ] {
        bare.descriptor(0, address, len, INDIRECT, 0);
        assert_eq!(
            bare.chain_error(0),
            ChainError::Broken { descriptors: 0 },
            "{address:#x}"
        );
    }
    // A table that loops in itself, and more descriptors than any device takes.
    table.chain(&bare.memory, &[Buffer::readable(0x1000, 1)]);
    let loops = RawDescriptor {
        address: 0x1000,
        len: 1,
        flags: NEXT,
        next: 0,
    };
    table.write_descriptor(&bare.memory, 0, loops);
    bare.descriptor(0, DATA, 16 * 8, INDIRECT, 0);
    assert_eq!(bare.chain_error(0), ChainError::Broken { descriptors: 8 });
    bare.descriptor(0, DATA, 16 * 2000, INDIRECT, 0);
    assert_eq!(bare.chain_error(0), ChainError::TooLong { limit: 1024 });
}

#[test]
fn buffers_that_are_not_ram_or_in_the_wrong_order_are_refused() {
    let mut bare = Bare::new();
    for (address, len) in [
        (MockDriver::HOLE, 1),
        (MockDriver::HOLE - 1, 2),
        (MockDriver::HIGH - 1, 2),
        (MockDriver::END - 1, 2),
        (MockDriver::END, 1),
        (u64::MAX, 1),
        (u64::MAX - 3, 8),
        (0, u32::MAX),
        (MockDriver::HIGH, u32::MAX),
    ] {
        for flags in [0, WRITE] {
            bare.descriptor(0, address, len, flags, 0);
            assert_eq!(bare.chain_error(0), ChainError::Address { address, len });
        }
    }
    bare.descriptor(0, DATA, 4, NEXT | WRITE, 1);
    bare.descriptor(1, DATA, 4, 0, 0);
    assert_eq!(bare.chain_error(0), ChainError::Order);
    bare.descriptor(0, DATA, 0, NEXT, 1);
    bare.descriptor(1, u64::MAX, 0, WRITE, 0);
    assert_eq!(bare.chain_error(0), ChainError::Empty);
}

#[test]
fn several_chains_are_completed_as_one() {
    let mut bare = Bare::new();
    for _ in 0..3 {
        bare.driver.add(&bare.memory, &[Buffer::writable(DATA, 8)]);
    }
    let (end, interrupts) = bare.turn(|turn| {
        let mut chains = Vec::new();
        while let Some(chain) = turn.pop()? {
            chains.push((chain, 5 + chains.len() as u32));
        }
        turn.complete_all(chains)
    });
    assert_eq!((end, interrupts), (TurnEnd::Drained, 1));
    assert_eq!(bare.driver.used_index(&bare.memory), 3);
    let used: Vec<_> = std::iter::from_fn(|| bare.driver.used(&bare.memory)).collect();
    assert_eq!(used, [(0, 5), (1, 6), (2, 7)]);
}

#[test]
fn chains_that_are_put_back_come_again_in_their_order() {
    let mut bare = Bare::new();
    for len in 1..=4 {
        bare.driver
            .add(&bare.memory, &[Buffer::writable(DATA, len)]);
    }
    let (end, interrupts) = bare.turn(|turn| {
        let chains = [
            turn.pop()?.unwrap(),
            turn.pop()?.unwrap(),
            turn.pop()?.unwrap(),
        ];
        let [first, second, third] = chains;
        turn.complete(first, 0)?;
        turn.put_back(third);
        turn.put_back(second);
        Ok(())
    });
    assert_eq!((end, interrupts), (TurnEnd::Left, 1));
    let mut seen = Vec::new();
    let (end, interrupts) = bare.turn(|turn| {
        while let Some(chain) = turn.pop()? {
            seen.push(chain.writable.len());
            turn.complete(chain, 0)?;
        }
        Ok(())
    });
    assert_eq!((end, interrupts), (TurnEnd::Drained, 1));
    assert_eq!(seen, [2, 3, 4]);
}

#[test]
fn waiting_for_more_asks_for_a_notification_behind_what_was_put_back() {
    let mut bare = Bare::new();
    bare.active.queue.set_event_idx(true);
    for _ in 0..2 {
        bare.driver.add(&bare.memory, &[Buffer::writable(DATA, 1)]);
    }
    let (end, interrupts) = bare.turn(|turn| {
        let chains = [turn.pop()?.unwrap(), turn.pop()?.unwrap()];
        assert!(turn.pop()?.is_none());
        for chain in chains.into_iter().rev() {
            turn.put_back(chain);
        }
        turn.wait_for_more();
        Ok(())
    });
    assert_eq!((end, interrupts), (TurnEnd::Drained, 0));
    assert_eq!(bare.driver.avail_event(&bare.memory), 2);
    assert_eq!(bare.active.queue.next_avail(), 0);
}

#[test]
fn a_handler_that_gives_way_with_a_chain_half_done_gets_it_again() {
    let mut bare = Bare::new();
    for len in [8, 4] {
        bare.driver
            .add(&bare.memory, &[Buffer::writable(DATA, len)]);
    }
    let (mut done, mut seen) = (0, Vec::new());
    let mut ends = Vec::new();
    while ends.last() != Some(&TurnEnd::Drained) {
        let (end, _) = bare.turn(|turn| {
            while let Some(mut chain) = turn.pop()? {
                chain.writable.skip(done)?;
                seen.push(chain.writable.len());
                if chain.writable.len() > 4 {
                    done += 4;
                    turn.put_back(chain);
                    turn.give_way();
                    break;
                }
                done = 0;
                turn.complete(chain, 0)?;
            }
            Ok(())
        });
        ends.push(end);
    }
    assert_eq!(ends, [TurnEnd::Yielded, TurnEnd::Drained]);
    assert_eq!(seen, [8, 4, 4]);
}
