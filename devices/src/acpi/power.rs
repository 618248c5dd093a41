//! Power management of hardware-reduced ACPI, and the generic event device behind the power
//! button.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kiln_device_api::{BusDevice, ExitRequest, InterruptLine};
use serde::{Deserialize, Serialize};

/// Sleep control register (ACPI 6.5 section 4.8.3.7).
const SLEEP_CONTROL: u64 = 0;
/// Sleep status register (ACPI 6.5 section 4.8.3.7); it has no sleep to wake from, and reads 0.
const SLEEP_STATUS: u64 = 1;
/// Reset register (ACPI 6.5 section 4.8.3.6).
const RESET: u64 = 2;
/// The generic event device's register: the events since the last read.
const GED_EVENTS: u64 = 3;

/// Enter the sleep state whose type is in the same write.
const SLP_EN: u8 = 1 << 5;
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0b111;

/// The type of the soft-off state S5: what the DSDT's `_S5_` package has to say.
pub const S5_SLEEP_TYPE: u8 = 5;
/// The value that resets the machine: what the FADT's `RESET_VALUE` has to say.
pub const RESET_VALUE: u8 = 1;
/// The event that the power button was pressed: a bit of the generic event device's register.
pub const GED_POWER_BUTTON: u8 = 1;

/// The state of [`PowerManagement`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerState {
    /// Events that the guest has not read yet, [`GED_POWER_BUTTON`] among them.
    pub events: u8,
}

struct Ged {
    events: AtomicU8,
    interrupt: Arc<dyn InterruptLine>,
}

/// The four ports of ACPI power management: sleep control, sleep status, reset, and the events of
/// the generic event device, in this order. Each is a byte; a wider access is one of several bytes.
///
/// - Sleep control: `SLP_EN` with the type [`S5_SLEEP_TYPE`] ends the machine as
///   [`ExitRequest::Shutdown`]; other types are not offered, and dropped.
/// - Reset: [`RESET_VALUE`] ends the machine as [`ExitRequest::Reset`].
/// - Events: a read gives them and clears them.
pub struct PowerManagement {
    ged: Arc<Ged>,
}

impl PowerManagement {
    /// The device after a reset; `ged_interrupt` is the generic event device's interrupt.
    pub fn new(ged_interrupt: Arc<dyn InterruptLine>) -> Self {
        Self::from_state(&PowerState::default(), ged_interrupt)
    }

    /// The device as it was when `state` was taken. An event that the guest had not read yet is
    /// announced again.
    pub fn from_state(state: &PowerState, ged_interrupt: Arc<dyn InterruptLine>) -> Self {
        if state.events != 0 {
            ged_interrupt.trigger();
        }
        Self {
            ged: Arc::new(Ged {
                events: AtomicU8::new(state.events),
                interrupt: ged_interrupt,
            }),
        }
    }

    /// The state, for [`from_state`](Self::from_state).
    pub fn state(&self) -> PowerState {
        PowerState {
            events: self.ged.events.load(Ordering::Acquire),
        }
    }

    /// The machine's power button.
    pub fn button(&self) -> PowerButton {
        PowerButton {
            ged: Arc::clone(&self.ged),
        }
    }
}

/// The power button of a machine, to be pressed from any thread.
#[derive(Clone)]
pub struct PowerButton {
    ged: Arc<Ged>,
}

impl PowerButton {
    /// Presses the button: a guest that listens will power off; whether it does is its choice.
    pub fn press(&self) {
        self.ged
            .events
            .fetch_or(GED_POWER_BUTTON, Ordering::Release);
        self.ged.interrupt.trigger();
    }
}

impl std::fmt::Debug for PowerButton {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PowerButton").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for PowerManagement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PowerManagement")
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

impl BusDevice for PowerManagement {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            match register {
                // What was written there is write-only or has no effect.
                SLEEP_CONTROL | SLEEP_STATUS | RESET => *byte = 0,
                GED_EVENTS => *byte = self.ged.events.swap(0, Ordering::AcqRel),
                _ => {}
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        for (register, byte) in (offset..).zip(data) {
            match register {
                SLEEP_CONTROL => {
                    let sleep_type = (byte >> SLP_TYP_SHIFT) & SLP_TYP_MASK;
                    if byte & SLP_EN != 0 && sleep_type == S5_SLEEP_TYPE {
                        return ControlFlow::Break(ExitRequest::Shutdown);
                    }
                }
                RESET if *byte == RESET_VALUE => return ControlFlow::Break(ExitRequest::Reset),
                _ => {}
            }
        }
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{Recorder, every_access};

    fn power() -> (PowerManagement, Arc<Recorder>) {
        let line = Arc::new(Recorder::default());
        (PowerManagement::new(line.clone()), line)
    }

    fn read(device: &PowerManagement, offset: u64) -> u8 {
        let mut data = [0xff];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn soft_off_needs_the_type_and_the_enable_bit() {
        let (power, _) = power();
        assert!(power.write(0, &[5 << 2]).is_continue());
        assert!(power.write(0, &[1 << 5]).is_continue());
        assert!(power.write(0, &[1 << 5 | 3 << 2]).is_continue());
        let end = power.write(0, &[1 << 5 | 5 << 2]);
        assert_eq!(end, ControlFlow::Break(ExitRequest::Shutdown));
    }

    #[test]
    fn the_reset_register_takes_one_value() {
        let (power, _) = power();
        assert!(power.write(2, &[0]).is_continue());
        assert!(power.write(2, &[3]).is_continue());
        let end = power.write(2, &[1]);
        assert_eq!(end, ControlFlow::Break(ExitRequest::Reset));
    }

    #[test]
    fn a_pressed_button_is_announced_and_read_once() {
        let (power, line) = power();
        let button = power.button();
        assert_eq!(read(&power, 3), 0);
        button.clone().press();
        assert_eq!(line.count(), 1);
        assert_eq!(read(&power, 3), GED_POWER_BUTTON);
        assert_eq!(read(&power, 3), 0);
    }

    #[test]
    fn an_event_survives_save_and_restore() {
        let (power, _) = power();
        power.button().press();
        let state = serde_json::to_string(&power.state()).unwrap();
        let line = Arc::new(Recorder::default());
        let state = serde_json::from_str(&state).unwrap();
        let power = PowerManagement::from_state(&state, line.clone());
        assert_eq!(line.count(), 1);
        assert_eq!(read(&power, 3), GED_POWER_BUTTON);
    }

    #[test]
    fn only_the_documented_writes_end_the_machine() {
        let (power, _) = power();
        every_access(&power, 4, |offset, data, end| {
            let mut expected = ControlFlow::Continue(());
            for (register, byte) in (offset..).zip(data) {
                if register == 0 && byte & 0x3c == 0x34 {
                    expected = ControlFlow::Break(ExitRequest::Shutdown);
                    break;
                }
                if register == 2 && *byte == 1 {
                    expected = ControlFlow::Break(ExitRequest::Reset);
                    break;
                }
            }
            assert_eq!(end, expected, "{offset} {data:?}");
        });
    }
}
