//! INTx: four interrupt pins a device, wired to four lines that all devices share.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The interrupt lines that the pins of all devices are wired to.
pub const INTX_LINES: usize = 4;

/// A level-triggered interrupt input of the machine, such as a pin of an IOAPIC.
///
/// As long as it is asserted the guest is interrupted again after each end of interrupt: who is
/// behind this keeps the level, and looks at it again at each end of interrupt (and when the input
/// is unmasked). Nothing is lost or counted: the device lowers its pin when its driver has read
/// why it was raised.
///
/// PCI's pins are low when asserted; here `true` is asserted, whatever the voltage.
pub trait LevelInterrupt: Send + Sync {
    /// Some device asserts the line, or none does any more. Called at changes only, one call at a
    /// time and in their order, with a lock held that [`IntxPin::set`] takes.
    fn set_level(&self, asserted: bool);
}

/// One of the lines that INTx pins are wired to.
#[derive(Clone)]
pub struct IntxLine {
    /// The global system interrupt that it is: what `_PRT` and the interrupt line register say.
    pub gsi: u32,
    /// How to drive it.
    pub level: Arc<dyn LevelInterrupt>,
}

impl fmt::Debug for IntxLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IntxLine")
            .field("gsi", &self.gsi)
            .finish_non_exhaustive()
    }
}

/// Which of the four lines a pin (0 for `INTA#` to 3 for `INTD#`) of the device in a slot is wired
/// to. Neighbours start with different lines, so that the first pins, which most devices have
/// only, don't all share one.
///
/// ```
/// use kiln_pci::intx_line;
///
/// assert_eq!(intx_line(1, 0), 1);
/// assert_eq!(intx_line(4, 3), 3);
/// assert_eq!(intx_line(31, 1), 0);
/// ```
pub const fn intx_line(slot: u8, pin: u8) -> usize {
    (slot as usize + pin as usize) % INTX_LINES
}

/// A line with all pins that are wired to it: it is asserted while any of them is.
pub(crate) struct SharedLine {
    level: Arc<dyn LevelInterrupt>,
    asserting: Mutex<usize>,
}

impl SharedLine {
    pub(crate) fn new(level: Arc<dyn LevelInterrupt>) -> Self {
        Self {
            level,
            asserting: Mutex::new(0),
        }
    }

    /// One pin more asserts the line, or one less.
    fn change(&self, assert: bool) {
        let mut asserting = lock(&self.asserting);
        let before = *asserting > 0;
        *asserting = if assert {
            asserting.saturating_add(1)
        } else {
            asserting.saturating_sub(1)
        };
        let after = *asserting > 0;
        if before != after {
            self.level.set_level(after);
        }
    }
}

/// The INTx pin of a function.
///
/// While the guest has MSI-X enabled the bus keeps the pin from its line, and the device tells of
/// its events with [`Msix::trigger`](crate::Msix::trigger).
pub struct IntxPin(Mutex<PinState>);

#[derive(Default)]
struct PinState {
    /// What the device wants.
    asserted: bool,
    /// The guest has set `COMMAND_INTX_DISABLE`, or enabled MSI-X.
    disabled: bool,
    /// What is on the line.
    driving: bool,
    line: Option<Arc<SharedLine>>,
}

impl IntxPin {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(PinState::default()))
    }

    /// Asserts the pin, or lowers it. Asserting it again changes nothing.
    ///
    /// The interrupt status bit of the function shows it, even while the guest has INTx disabled or
    /// MSI-X enabled, which keeps it from the line.
    pub fn set(&self, asserted: bool) {
        self.update(|state| state.asserted = asserted);
    }

    /// Whether the device asserts its pin.
    pub fn is_asserted(&self) -> bool {
        lock(&self.0).asserted
    }

    pub(crate) fn set_disabled(&self, disabled: bool) {
        self.update(|state| state.disabled = disabled);
    }

    pub(crate) fn connect(&self, line: Arc<SharedLine>) {
        self.update(|state| state.line = Some(line));
    }

    fn update(&self, change: impl FnOnce(&mut PinState)) {
        let mut state = lock(&self.0);
        change(&mut state);
        let drive = state.asserted && !state.disabled && state.line.is_some();
        if drive != state.driving {
            state.driving = drive;
            if let Some(line) = &state.line {
                line.change(drive);
            }
        }
    }
}

impl fmt::Debug for IntxPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IntxPin")
            .field("asserted", &self.is_asserted())
            .finish_non_exhaustive()
    }
}

/// A thread that panicked with the lock held leaves plain values behind it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<bool>>);

    impl LevelInterrupt for Recorder {
        fn set_level(&self, asserted: bool) {
            lock(&self.0).push(asserted);
        }
    }

    fn pins(count: usize) -> (Arc<Recorder>, Vec<Arc<IntxPin>>) {
        let recorder = Arc::new(Recorder::default());
        let line = Arc::new(SharedLine::new(recorder.clone()));
        let pins: Vec<_> = (0..count).map(|_| Arc::new(IntxPin::new())).collect();
        for pin in &pins {
            pin.connect(line.clone());
        }
        (recorder, pins)
    }

    #[test]
    fn a_line_is_asserted_while_any_of_its_pins_is() {
        let (recorder, pins) = pins(2);
        pins[0].set(true);
        pins[0].set(true);
        pins[1].set(true);
        assert_eq!(*lock(&recorder.0), [true]);
        pins[0].set(false);
        pins[0].set(false);
        assert_eq!(*lock(&recorder.0), [true]);
        pins[1].set(false);
        assert_eq!(*lock(&recorder.0), [true, false]);
    }

    #[test]
    fn a_disabled_pin_keeps_its_state_from_the_line() {
        let (recorder, pins) = pins(1);
        pins[0].set_disabled(true);
        pins[0].set(true);
        assert!(pins[0].is_asserted());
        assert!(lock(&recorder.0).is_empty());
        pins[0].set_disabled(false);
        assert_eq!(*lock(&recorder.0), [true]);
        pins[0].set_disabled(true);
        pins[0].set(false);
        assert_eq!(*lock(&recorder.0), [true, false]);
    }

    #[test]
    fn a_pin_that_is_asserted_before_it_is_connected_reaches_the_line() {
        let recorder = Arc::new(Recorder::default());
        let pin = IntxPin::new();
        pin.set(true);
        pin.connect(Arc::new(SharedLine::new(recorder.clone())));
        assert_eq!(*lock(&recorder.0), [true]);
    }

    #[test]
    fn pins_that_change_on_several_threads_leave_the_line_low() {
        let (recorder, pins) = pins(4);
        std::thread::scope(|scope| {
            for pin in &pins {
                scope.spawn(move || {
                    for _ in 0..1000 {
                        pin.set(true);
                        pin.set(false);
                    }
                });
            }
        });
        let levels = lock(&recorder.0);
        assert_eq!(levels.last(), Some(&false));
        assert!(levels.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn the_four_pins_of_a_slot_reach_the_four_lines() {
        for slot in 0..32 {
            let mut lines: Vec<_> = (0..4).map(|pin| intx_line(slot, pin)).collect();
            lines.sort_unstable();
            assert_eq!(lines, [0, 1, 2, 3]);
        }
    }
}
