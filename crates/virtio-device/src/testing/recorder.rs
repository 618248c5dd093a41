//! The one interrupt recorder.

use std::fmt;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use kiln_device_api::{InterruptLine, MsiMessage};
use kiln_pci::{LevelInterrupt, MsixSink};

use crate::{InterruptEvent, VirtioInterrupt};

/// How long a test waits for what must happen.
pub const LONG: Duration = Duration::from_secs(20);

/// Counts interrupts, as the line or the MSI-X vectors behind a transport, or as the interrupt given
/// to a device.
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
    vectors: Vec<u16>,
    asserted: bool,
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

    /// The MSI-X vectors whose messages came.
    pub fn vectors(&self) -> Vec<u16> {
        self.state.lock().unwrap().vectors.clone()
    }

    /// Whether the line has a level that is asserted.
    pub fn is_asserted(&self) -> bool {
        self.state.lock().unwrap().asserted
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

impl MsixSink for InterruptRecorder {
    fn connect(&self, _vector: u16, _message: MsiMessage) {}

    fn disconnect(&self, _vector: u16) {}

    fn signal(&self, vector: u16, _message: MsiMessage) {
        self.record(|state| state.vectors.push(vector));
    }
}

/// A level counts as an interrupt when it is asserted.
impl LevelInterrupt for InterruptRecorder {
    fn set_level(&self, asserted: bool) {
        if asserted {
            self.record(|state| state.asserted = true);
        } else {
            self.state.lock().unwrap().asserted = false;
        }
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
