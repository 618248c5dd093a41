//! Whether a thread is in a hurry.
//!
//! A thread that is woken takes the processor from whoever runs there, as it has slept and is owed
//! some. Where an I/O thread shares a processor with the vCPU that wakes it, that makes each request
//! a batch of its own: it is served before the guest can make the next one available, and costs an
//! exit, two switches between threads and an interrupt. That is the shortest time for a single
//! request, and the most expensive way to do many.
//!
//! So a thread that has much to do is one of the policy `SCHED_BATCH` for as long as it has: it does
//! not take the processor from others when it is woken, and finds more to do when it has its turn.
//! Where there is a processor for it, nothing changes: it runs there at once.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::time::{Duration, Instant};

thread_local! {
    /// The work that handlers did since it was looked at last.
    static WORK: Cell<u64> = const { Cell::new(0) };
}

/// The time over which work is counted, at least.
const WINDOW: Duration = Duration::from_millis(5);
/// From so much work a second on a thread is not in a hurry, and from so little on it is again.
const MUCH: u64 = 20_000;
const LITTLE: u64 = 10_000;

/// Counts work of this thread's handlers.
pub(crate) fn note_work(count: u64) {
    WORK.with(|work| work.set(work.get().saturating_add(count)));
}

/// Decides for this thread, whose policy is the default one.
pub(crate) struct Pace {
    batches: bool,
    since: Instant,
    work: u64,
    /// Sets the thread's policy, and says whether that went well.
    set: fn(bool) -> bool,
    /// It cannot be set, or somebody else has chosen it.
    is_fixed: bool,
}

impl Pace {
    pub(crate) fn of_this_thread() -> Self {
        // SAFETY: it only asks, for this thread.
        let policy = unsafe { libc::sched_getscheduler(0) };
        Self {
            is_fixed: policy != libc::SCHED_OTHER,
            ..Self::new(set_policy)
        }
    }

    fn new(set: fn(bool) -> bool) -> Self {
        Self {
            batches: false,
            since: Instant::now(),
            work: 0,
            set,
            is_fixed: false,
        }
    }

    /// To be called each time that this thread's handlers have run.
    pub(crate) fn look(&mut self) {
        if !self.is_fixed {
            self.look_at(WORK.take(), Instant::now());
        }
    }

    fn look_at(&mut self, work: u64, now: Instant) {
        self.work = self.work.saturating_add(work);
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed < WINDOW {
            return;
        }
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        let rate = self.work.saturating_mul(1_000_000) / micros.max(1);
        (self.since, self.work) = (now, 0);
        let batches = rate >= if self.batches { LITTLE } else { MUCH };
        if batches != self.batches {
            self.batches = batches;
            self.is_fixed = !(self.set)(batches);
        }
    }
}

impl Drop for Pace {
    /// A program's own thread may have something else to do later.
    fn drop(&mut self) {
        if self.batches {
            (self.set)(false);
        }
    }
}

fn set_policy(batches: bool) -> bool {
    let policy = if batches {
        libc::SCHED_BATCH
    } else {
        libc::SCHED_OTHER
    };
    let priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: `priority` lives until the call returns, which is about this thread alone.
    unsafe { libc::sched_setscheduler(0, policy, &priority) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether it batches after so much work in each of some windows.
    fn batches(pace: &mut Pace, windows: &[u64]) -> Vec<bool> {
        let each = windows.iter().map(|work| {
            let now = pace.since + WINDOW;
            pace.look_at(*work, now);
            pace.batches
        });
        each.collect()
    }

    fn in_window(rate: u64) -> u64 {
        rate * WINDOW.as_millis() as u64 / 1000
    }

    #[test]
    fn a_thread_with_much_to_do_is_not_in_a_hurry_until_it_has_little() {
        let mut pace = Pace::new(|_| true);
        let [much, between, little] = [MUCH, MUCH - 1000, LITTLE - 1000].map(in_window);
        let windows = [0, little, between, much, between, much, little, between, 0];
        let expected = [false, false, false, true, true, true, false, false, false];
        assert_eq!(batches(&mut pace, &windows), expected);
    }

    #[test]
    fn work_is_counted_over_a_whole_window() {
        let mut pace = Pace::new(|_| true);
        let start = pace.since;
        for part in 1..10 {
            pace.look_at(in_window(MUCH), start + WINDOW * part / 10);
            assert!(!pace.batches);
        }
        pace.look_at(0, start + WINDOW);
        assert!(pace.batches);
        // A long rest, and the first request behind it.
        pace.look_at(1, start + 1000 * WINDOW);
        assert!(!pace.batches);
    }

    #[test]
    fn a_policy_that_cannot_be_set_is_not_tried_again() {
        let mut pace = Pace::new(|_| false);
        batches(&mut pace, &[in_window(MUCH)]);
        assert!(pace.is_fixed);
    }

    #[test]
    fn the_policy_of_the_thread_follows() {
        // SAFETY: it only asks, for this thread.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        let (before, during, after) = std::thread::spawn(move || {
            // Whatever the tests are run by.
            assert!(set_policy(false));
            let mut pace = Pace::of_this_thread();
            let before = policy();
            batches(&mut pace, &[in_window(MUCH)]);
            let during = policy();
            batches(&mut pace, &[0]);
            (before, during, policy())
        })
        .join()
        .unwrap();
        assert_eq!((before, during), (libc::SCHED_OTHER, libc::SCHED_BATCH));
        assert_eq!(after, before);
    }
}
