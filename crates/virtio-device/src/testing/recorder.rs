//! The one interrupt recorder.

use std::fmt;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use kiln_device_api::InterruptLine;

use crate::{InterruptEvent, VirtioInterrupt};

/// How long a test waits for what must happen.
pub const LONG: Duration = Duration::from_secs(20);

/// Counts interrupts, as the line behind a transport or as the interrupt given to a device.
#[derive(Debug, Default)]
pub struct InterruptRecorder {
    state: Mutex<Recorded>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Recorded {
    count: usize,
    events: Vec<InterruptEvent>,
    needs_reset: Option<String>,
}

impl InterruptRecorder {
    /// The interrupts so far.
    pub fn count(&self) -> usize {
        self.state.lock().unwrap().count
    }

    /// What a device's interrupts were for.
    pub fn events(&self) -> Vec<InterruptEvent> {
        self.state.lock().unwrap().events.clone()
    }

    /// Why a device said that it needs to be reset.
    pub fn needs_reset_reason(&self) -> Option<String> {
        self.state.lock().unwrap().needs_reset.clone()
    }

    /// Waits until there were at least `count` interrupts.
    pub fn wait_for(&self, count: usize) {
        let state = self.state.lock().unwrap();
        let (state, timeout) = self
            .changed
            .wait_timeout_while(state, LONG, |state| state.count < count)
            .unwrap();
        assert!(
            !timeout.timed_out(),
            "{} interrupts, expected {count}",
            state.count
        );
    }

    fn record(&self, change: impl FnOnce(&mut Recorded)) {
        let mut state = self.state.lock().unwrap();
        state.count += 1;
        change(&mut state);
        self.changed.notify_all();
    }
}

impl InterruptLine for InterruptRecorder {
    fn trigger(&self) {
        self.record(|_| ());
    }
}

impl VirtioInterrupt for InterruptRecorder {
    fn trigger(&self, event: InterruptEvent) {
        self.record(|state| state.events.push(event));
    }

    fn needs_reset(&self, reason: &dyn fmt::Display) {
        self.record(|state| state.needs_reset = Some(reason.to_string()));
    }
}

/// Waits until `condition` holds.
///
/// # Panics
///
/// Where it does not within [`LONG`].
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LONG, "waited in vain: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}
