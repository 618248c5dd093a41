use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::{Bar, Error, MsiMessage};

const ENABLE: u16 = 0x8000;
const FUNCTION_MASK: u16 = 0x4000;
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Connect(u16, MsiMessage),
    Disconnect(u16),
    Signal(u16, MsiMessage),
}

/// Notes what it is told, and has something kept where a test says so.
#[derive(Default)]
struct Recorder {
    calls: Mutex<Vec<Call>>,
    kept: Mutex<Vec<u16>>,
}

impl Recorder {
    fn taken(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

impl MsixSink for Recorder {
    fn connect(&self, vector: u16, message: MsiMessage) {
        self.calls
            .lock()
            .unwrap()
            .push(Call::Connect(vector, message));
    }
    fn disconnect(&self, vector: u16) {
        self.calls.lock().unwrap().push(Call::Disconnect(vector));
    }
    fn take(&self, vector: u16) -> bool {
        let mut kept = self.kept.lock().unwrap();
        let before = kept.len();
        kept.retain(|other| *other != vector);
        kept.len() != before
    }
    fn signal(&self, vector: u16, message: MsiMessage) {
        self.calls
            .lock()
            .unwrap()
            .push(Call::Signal(vector, message));
    }
}

fn recorded(vectors: u16) -> (Arc<Recorder>, Msix) {
    let recorder = Arc::new(Recorder::default());
    (recorder.clone(), Msix::new(vectors, recorder).unwrap())
}

fn message(vector: u16) -> MsiMessage {
    MsiMessage {
        address: 0x1_fee0_0000 + u64::from(vector) * 4,
        data: 0x40 + u32::from(vector),
    }
}

fn set_message(msix: &Msix, vector: u16) {
    let message = message(vector);
    let at = u64::from(vector) * 16;
    msix.write_table(at, &message.address.to_le_bytes());
    msix.write_table(at + 8, &message.data.to_le_bytes());
}

fn set_mask(msix: &Msix, vector: u16, masked: bool) {
    let at = u64::from(vector) * 16 + 12;
    msix.write_table(at, &u32::from(masked).to_le_bytes());
}

fn pending(msix: &Msix) -> u64 {
    let mut data = [0xff; 8];
    msix.read_pending(0, &mut data);
    u64::from_le_bytes(data)
}

#[test]
fn only_counts_of_vectors_that_the_capability_can_tell_are_made() {
    for vectors in [0, MAX_VECTORS + 1, u16::MAX] {
        let error = Msix::new(vectors, Arc::new(Recorder::default())).unwrap_err();
        assert_eq!(error, Error::MsixVectors { vectors });
    }
    assert_eq!(recorded(MAX_VECTORS).1.vectors(), 2048);
}

#[test]
fn the_table_reads_at_any_width_and_takes_whole_words() {
    let (_, msix) = recorded(2);
    let mut table = [0xff; 40];
    msix.read_table(0, &mut table);
    let mut expected = [0; 40];
    expected[12] = 1;
    expected[28] = 1;
    expected[32..].fill(0xff);
    assert_eq!(table, expected);
    msix.write_table(16, &[0xff; 8]);
    msix.write_table(24, &[0xff; 8]);
    expected[16..28].fill(0xff);
    expected[16] = 0xfc;
    // The reserved bits of the control word stay zero.
    expected[28] = 1;
    for at in 0..40_usize {
        for width in [1, 2, 4, 8] {
            let mut data = [0xff; 8];
            msix.read_table(at as u64, &mut data[..width]);
            let end = (at + width).min(40);
            assert_eq!(data[..end - at], expected[at..end], "{width} at {at}");
        }
    }
    let before = msix.state();
    for (at, width) in [
        (16, 1),
        (17, 4),
        (20, 2),
        (20, 8),
        (22, 4),
        (28, 8),
        (32, 4),
        (16, 16),
    ] {
        msix.write_table(at, &[0; 16][..width]);
        assert_eq!(msix.state(), before, "{width} at {at}");
    }
    msix.write_table(u64::MAX - 7, &[0; 8]);
    msix.write_table(1 << 40, &[0; 4]);
    assert_eq!(msix.state(), before);
}

#[test]
fn a_vector_is_open_when_nothing_masks_it() {
    let (recorder, msix) = recorded(1);
    set_message(&msix, 0);
    for control in [0, ENABLE, ENABLE | FUNCTION_MASK, FUNCTION_MASK] {
        for masked in [true, false] {
            set_mask(&msix, 0, masked);
            msix.set_control(control);
            recorder.taken();
            assert_eq!(msix.trigger(0), control & ENABLE != 0);
            assert_eq!(msix.is_enabled(), control & ENABLE != 0);
            let expected = (control == ENABLE && !masked).then(|| Call::Signal(0, message(0)));
            assert_eq!(
                recorder.taken(),
                expected.as_slice(),
                "{control:#x} {masked}"
            );
            set_mask(&msix, 0, true);
            msix.set_control(0);
        }
    }
}

#[test]
fn the_sink_is_told_of_each_opening_closing_and_change() {
    let (recorder, msix) = recorded(2);
    set_message(&msix, 1);
    msix.set_control(ENABLE | FUNCTION_MASK);
    set_mask(&msix, 1, false);
    assert_eq!(recorder.taken(), []);
    msix.set_control(ENABLE);
    assert_eq!(recorder.taken(), [Call::Connect(1, message(1))]);
    msix.write_table(16 + 8, &9_u32.to_le_bytes());
    let other = MsiMessage {
        data: 9,
        ..message(1)
    };
    assert_eq!(recorder.taken(), [Call::Connect(1, other)]);
    // The same once more is no change.
    msix.write_table(16 + 8, &9_u32.to_le_bytes());
    set_mask(&msix, 1, false);
    assert_eq!(recorder.taken(), []);
    set_mask(&msix, 1, true);
    set_mask(&msix, 1, true);
    assert_eq!(recorder.taken(), [Call::Disconnect(1)]);
    // Message and mask in one access come as one.
    msix.write_table(16 + 8, &7_u64.to_le_bytes());
    let other = MsiMessage {
        data: 7,
        ..message(1)
    };
    assert_eq!(recorder.taken(), [Call::Connect(1, other)]);
    msix.set_control(0);
    assert_eq!(recorder.taken(), [Call::Disconnect(1)]);
}

#[test]
fn a_masked_vector_is_pending_and_fires_once_when_it_opens() {
    let (recorder, msix) = recorded(66);
    for vector in [0, 65] {
        set_message(&msix, vector);
    }
    msix.set_control(ENABLE);
    for _ in 0..3 {
        assert!(msix.trigger(0));
        assert!(msix.trigger(65));
    }
    let mut bits = [0xff; 16];
    msix.read_pending(0, &mut bits);
    let mut expected = [0; 16];
    expected[0] = 1;
    expected[8] = 2;
    assert_eq!(bits, expected);
    assert_eq!(recorder.taken(), []);
    set_mask(&msix, 65, false);
    assert_eq!(
        recorder.taken(),
        [
            Call::Connect(65, message(65)),
            Call::Signal(65, message(65))
        ]
    );
    assert_eq!(pending(&msix), 1);
    set_mask(&msix, 65, true);
    set_mask(&msix, 65, false);
    assert_eq!(
        recorder.taken(),
        [Call::Disconnect(65), Call::Connect(65, message(65))]
    );
}

#[test]
fn what_the_sink_kept_is_pending_saved_and_fires_once() {
    let (recorder, msix) = recorded(2);
    set_message(&msix, 1);
    msix.set_control(ENABLE);
    recorder.kept.lock().unwrap().push(1);
    assert_eq!(pending(&msix), 0b10);
    assert!(recorder.kept.lock().unwrap().is_empty());
    recorder.kept.lock().unwrap().push(1);
    assert!(msix.state().vectors[1].pending);
    recorder.kept.lock().unwrap().push(1);
    set_mask(&msix, 1, false);
    assert_eq!(
        recorder.taken(),
        [Call::Connect(1, message(1)), Call::Signal(1, message(1))]
    );
    assert_eq!(pending(&msix), 0);
    assert!(!msix.state().vectors[1].pending);
}

#[test]
fn opening_a_vector_takes_what_the_sink_kept() {
    let (recorder, msix) = recorded(1);
    set_message(&msix, 0);
    msix.set_control(ENABLE);
    recorder.kept.lock().unwrap().push(0);
    set_mask(&msix, 0, false);
    assert_eq!(
        recorder.taken(),
        [Call::Connect(0, message(0)), Call::Signal(0, message(0))]
    );
    // Nothing is left that would come once more after the next mask and unmask.
    assert!(recorder.kept.lock().unwrap().is_empty());
    set_mask(&msix, 0, true);
    set_mask(&msix, 0, false);
    assert_eq!(
        recorder.taken(),
        [Call::Disconnect(0), Call::Connect(0, message(0))]
    );
}

#[test]
fn a_state_is_restored_with_its_pending_events() {
    let (_, msix) = recorded(3);
    for vector in 0..3 {
        set_message(&msix, vector);
    }
    msix.set_control(ENABLE);
    set_mask(&msix, 0, false);
    assert!(msix.trigger(2));
    let text = serde_json::to_string(&msix.state()).unwrap();
    let (recorder, other) = recorded(3);
    let state: MsixState = serde_json::from_str(&text).unwrap();
    other.restore(&state, ENABLE);
    assert_eq!(other.state(), state);
    assert_eq!(recorder.taken(), [Call::Connect(0, message(0))]);
    set_mask(&other, 2, false);
    assert_eq!(
        recorder.taken(),
        [Call::Connect(2, message(2)), Call::Signal(2, message(2))]
    );
}

#[test]
fn a_reset_forgets_what_was_pending() {
    let (recorder, msix) = recorded(2);
    msix.set_control(ENABLE);
    set_mask(&msix, 0, false);
    msix.trigger(1);
    recorder.kept.lock().unwrap().push(1);
    recorder.taken();
    msix.restore(&msix.reset_state(), 0);
    assert_eq!(recorder.taken(), [Call::Disconnect(0)]);
    assert!(!msix.is_enabled());
    assert_eq!(pending(&msix), 0);
    assert_eq!(msix.state(), msix.reset_state());
}

#[test]
fn structures_that_can_not_be_where_they_are_placed_are_refused() {
    let mut bars = [None; 6];
    bars[0] = Some(Bar::memory32(0x1000));
    bars[1] = Some(Bar::io(0x100));
    bars[2] = Some(Bar::memory64(0x8000));
    let place = |table_bar, table_offset, pending_bar, pending_offset| MsixPlacement {
        table_bar,
        table_offset,
        pending_bar,
        pending_offset,
    };
    for (placement, reason) in [
        (place(4, 0, 0, 0), "there is no such BAR"),
        (place(6, 0, 0, 0), "there is no such BAR"),
        (place(0, 0, 3, 0), "there is no such BAR"),
        (place(1, 0, 0, 0), "it is no memory BAR"),
        (place(0, 4, 2, 0), "the offset is not a multiple of 8"),
        (place(0, 0xff8, 2, 0), "it would end beyond the BAR"),
        (place(0, 0, 0, 0xffff_fff8), "it would end beyond the BAR"),
        (place(0, 0, 0, 0x8), "the table is there"),
        (place(2, 0x8, 2, 0x0), ""),
        (place(0, 0, 0, 0x40), ""),
        (place(0, 0, 2, 0), ""),
    ] {
        match placement.check("it", 4, &bars) {
            Ok(()) => assert_eq!(reason, "", "{placement:?}"),
            Err(error) => {
                let text = error.to_string();
                assert!(!reason.is_empty() && text.ends_with(reason), "{text}");
            }
        }
    }
}

/// An eventfd with an interrupt controller behind it, as KVM's irqfd is: it delivers while it is
/// attached, counts while it is not, and delivers what it has counted when it is attached.
#[derive(Default)]
struct Irqfd {
    attached: bool,
    counter: u64,
}

/// A guest's interrupt controller with an irqfd for each of two vectors, and the interrupt handler
/// of the guest, which takes all work that it finds.
#[derive(Default)]
struct Guest {
    irqfds: [Mutex<Irqfd>; 2],
    work: [AtomicU64; 2],
    seen: [AtomicU64; 2],
    interrupts: [AtomicU64; 2],
}

impl Guest {
    fn interrupt(&self, vector: usize) {
        let work = self.work[vector].load(Ordering::SeqCst);
        self.seen[vector].fetch_max(work, Ordering::SeqCst);
        self.interrupts[vector].fetch_add(1, Ordering::SeqCst);
    }

    /// Writes the eventfd.
    fn notify(&self, vector: usize) {
        let mut irqfd = self.irqfds[vector].lock().unwrap();
        if irqfd.attached {
            self.interrupt(vector);
        } else {
            irqfd.counter += 1;
        }
    }
}

impl MsixSink for Guest {
    fn connect(&self, vector: u16, _message: MsiMessage) {
        let vector = usize::from(vector);
        let mut irqfd = self.irqfds[vector].lock().unwrap();
        irqfd.attached = true;
        if std::mem::take(&mut irqfd.counter) > 0 {
            self.interrupt(vector);
        }
    }

    fn disconnect(&self, vector: u16) {
        self.irqfds[usize::from(vector)].lock().unwrap().attached = false;
    }

    fn take(&self, vector: u16) -> bool {
        let mut irqfd = self.irqfds[usize::from(vector)].lock().unwrap();
        assert!(!irqfd.attached, "taken while it is open");
        std::mem::take(&mut irqfd.counter) > 0
    }

    fn signal(&self, vector: u16, _message: MsiMessage) {
        self.notify(usize::from(vector));
    }
}

/// Two device threads make work, one by `trigger` and one by the eventfd, and each waits until the
/// guest has seen it before it makes more, while the guest opens and closes the vectors as
/// `closing` says. An interrupt that is lost is a thread that waits forever.
fn race(rounds: u64, closing: impl Fn(&Msix, bool)) {
    let guest = Arc::new(Guest::default());
    let msix = Msix::new(2, guest.clone()).unwrap();
    for vector in 0..2 {
        set_message(&msix, vector);
        set_mask(&msix, vector, false);
    }
    msix.set_control(ENABLE);
    let done = AtomicU64::new(0);
    thread::scope(|scope| {
        for vector in 0..2_usize {
            let (guest, msix, done) = (&guest, &msix, &done);
            scope.spawn(move || {
                for round in 1..=rounds {
                    guest.work[vector].store(round, Ordering::SeqCst);
                    if vector == 0 {
                        assert!(msix.trigger(0));
                    } else {
                        guest.notify(1);
                    }
                    let start = Instant::now();
                    while guest.seen[vector].load(Ordering::SeqCst) < round {
                        if start.elapsed() > PATIENCE {
                            done.fetch_add(1, Ordering::SeqCst);
                            panic!("the interrupt of round {round} of vector {vector} is lost");
                        }
                        thread::yield_now();
                    }
                }
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        while done.load(Ordering::SeqCst) < 2 {
            closing(&msix, true);
            let count = || [0, 1].map(|vector| guest.interrupts[vector].load(Ordering::SeqCst));
            let before = count();
            thread::yield_now();
            if msix.state().vectors[0].pending {
                assert_eq!(pending(&msix) & 1, 1);
            }
            assert_eq!(count(), before, "interrupted while closed");
            closing(&msix, false);
            thread::yield_now();
        }
    });
    for vector in 0..2 {
        assert_eq!(guest.seen[vector].load(Ordering::SeqCst), rounds);
        // Each round had an interrupt of its own, since the next waited for it.
        assert!(guest.interrupts[vector].load(Ordering::SeqCst) >= rounds);
    }
}

#[test]
fn no_interrupt_is_lost_while_vectors_are_masked_and_unmasked() {
    race(5000, |msix, close| {
        set_mask(msix, 0, close);
        set_mask(msix, 1, close);
    });
}

#[test]
fn no_interrupt_is_lost_while_the_function_is_masked_and_unmasked() {
    race(5000, |msix, close| {
        msix.set_control(if close {
            ENABLE | FUNCTION_MASK
        } else {
            ENABLE
        });
    });
}

#[test]
fn no_interrupt_is_lost_while_messages_change() {
    race(5000, |msix, close| {
        for vector in 0..2 {
            set_mask(msix, vector, close);
            let data = u32::from(close) + 0x30;
            msix.write_table(u64::from(vector) * 16 + 8, &data.to_le_bytes());
        }
    });
}

#[test]
fn every_trigger_of_an_open_vector_is_signalled() {
    let guest = Arc::new(Guest::default());
    let msix = Msix::new(1, guest.clone()).unwrap();
    set_mask(&msix, 0, false);
    msix.set_control(ENABLE);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..2500).for_each(|_| assert!(msix.trigger(0))));
        }
    });
    assert_eq!(guest.interrupts[0].load(Ordering::SeqCst), 10_000);
}
