//! The i8042 keyboard controller, with nothing plugged into it.
//!
//! Guests use it to reset the machine. vm-superio has one that only knows that and answers zero to
//! everything else; it calls back on a reset, where we return it, and a driver that probes it waits
//! for answers that never come (half a second each in Linux). So this one is ours: a controller
//! that answers what concerns itself, and says at once that no keyboard and no mouse are there.

use std::ops::ControlFlow;

use kiln_device_api::{BusDeviceMut, ExitRequest};
use serde::{Deserialize, Serialize};

/// Data register (port 0x60).
const DATA: u64 = 0;
/// System control port B (port 0x61), which lies between the two: speaker, timer 2.
const PORT_B: u64 = 1;
/// Status (read) and command (write) register (port 0x64).
const COMMAND: u64 = 4;

/// Status: there is a byte to read in the data register.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
/// Status: the self test has passed.
const STATUS_SYSTEM: u8 = 1 << 2;
/// Status: the device on the port did not answer.
const STATUS_TIMEOUT: u8 = 1 << 6;

const READ_CONFIG: u8 = 0x20;
const WRITE_CONFIG: u8 = 0x60;
const DISABLE_AUX: u8 = 0xa7;
const ENABLE_AUX: u8 = 0xa8;
const TEST_AUX: u8 = 0xa9;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const DISABLE_KEYBOARD: u8 = 0xad;
const ENABLE_KEYBOARD: u8 = 0xae;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const WRITE_KEYBOARD_BUFFER: u8 = 0xd2;
const WRITE_AUX_BUFFER: u8 = 0xd3;
const WRITE_AUX: u8 = 0xd4;
/// Pulses the line that resets the processor.
const RESET: u8 = 0xfe;

const SELF_TEST_PASSED: u8 = 0x55;
const KEYBOARD_TEST_PASSED: u8 = 0x00;
/// The clock line is stuck low: there is no such port.
const AUX_TEST_FAILED: u8 = 0x01;
/// What a controller gives in a keyboard's place when none answers.
const RESEND: u8 = 0xfe;
/// The output port: the processor is not in reset, and address line 20 is on.
const OUTPUT_PORT: u8 = 0b11;

const CONFIG_KEYBOARD_DISABLED: u8 = 1 << 4;
const CONFIG_AUX_DISABLED: u8 = 1 << 5;

/// The bits of port B that software can set: timer 2's gate, speaker, the two NMI enables.
const PORT_B_WRITABLE: u8 = 0x0f;
/// Port B: toggles with the refresh of memory; old code times itself by it.
const PORT_B_REFRESH: u8 = 1 << 4;
/// Port B: timer 2 has run out. There is no timer 2, and who waits for it must not wait for ever.
const PORT_B_TIMER_2: u8 = 1 << 5;

/// The state of an [`I8042`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// The configuration byte.
    pub config: u8,
    /// The byte that waits to be read.
    pub output: Option<u8>,
    /// Whether that byte stands for a device that did not answer.
    pub timeout: bool,
    /// The command whose data byte has not come yet.
    pub command: Option<u8>,
    /// System control port B.
    pub port_b: u8,
}

impl Default for I8042State {
    fn default() -> Self {
        Self {
            config: CONFIG_KEYBOARD_DISABLED | CONFIG_AUX_DISABLED,
            output: None,
            timeout: false,
            command: None,
            port_b: 0,
        }
    }
}

/// The i8042 controller's five ports, from the data port 0x60 to the command port 0x64.
///
/// The command 0xfe ends the machine as [`ExitRequest::Reset`]. There is no interrupt.
#[derive(Debug, Default)]
pub struct I8042 {
    state: I8042State,
}

impl I8042 {
    /// The controller after a reset.
    pub fn new() -> Self {
        Self::from_state(&I8042State::default())
    }

    /// The controller as it was when `state` was taken.
    pub fn from_state(state: &I8042State) -> Self {
        Self {
            state: state.clone(),
        }
    }

    /// The state, for [`from_state`](Self::from_state).
    pub fn state(&self) -> I8042State {
        self.state.clone()
    }

    fn answer(&mut self, byte: u8) {
        self.state.output = Some(byte);
        self.state.timeout = false;
    }

    fn command(&mut self, command: u8) -> ControlFlow<ExitRequest> {
        self.state.command = None;
        match command {
            RESET => return ControlFlow::Break(ExitRequest::Reset),
            READ_CONFIG => self.answer(self.state.config),
            SELF_TEST => self.answer(SELF_TEST_PASSED),
            TEST_KEYBOARD => self.answer(KEYBOARD_TEST_PASSED),
            TEST_AUX => self.answer(AUX_TEST_FAILED),
            READ_OUTPUT_PORT => self.answer(OUTPUT_PORT),
            DISABLE_KEYBOARD => self.state.config |= CONFIG_KEYBOARD_DISABLED,
            ENABLE_KEYBOARD => self.state.config &= !CONFIG_KEYBOARD_DISABLED,
            // Without a second port this bit is stuck, which is how drivers see that there is none.
            DISABLE_AUX | ENABLE_AUX => {}
            WRITE_CONFIG
            | WRITE_OUTPUT_PORT
            | WRITE_KEYBOARD_BUFFER
            | WRITE_AUX_BUFFER
            | WRITE_AUX => self.state.command = Some(command),
            _ => {}
        }
        ControlFlow::Continue(())
    }

    fn data(&mut self, byte: u8) {
        match self.state.command.take() {
            Some(WRITE_CONFIG) => self.state.config = byte | CONFIG_AUX_DISABLED,
            Some(WRITE_OUTPUT_PORT) => {}
            // Without the status bit that marks a second port's bytes, for there is none.
            Some(WRITE_KEYBOARD_BUFFER | WRITE_AUX_BUFFER) => self.answer(byte),
            // For a keyboard or a mouse.
            _ => {
                self.answer(RESEND);
                self.state.timeout = true;
            }
        }
    }
}

impl BusDeviceMut for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            match register {
                DATA => {
                    self.state.timeout = false;
                    *byte = self.state.output.take().unwrap_or(0);
                }
                PORT_B => {
                    self.state.port_b ^= PORT_B_REFRESH;
                    *byte = self.state.port_b | PORT_B_TIMER_2;
                }
                COMMAND => {
                    *byte = STATUS_SYSTEM;
                    if self.state.output.is_some() {
                        *byte |= STATUS_OUTPUT_FULL;
                    }
                    if self.state.timeout {
                        *byte |= STATUS_TIMEOUT;
                    }
                }
                _ => {}
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        for (register, byte) in (offset..).zip(data) {
            match register {
                DATA => self.data(*byte),
                PORT_B => {
                    self.state.port_b =
                        (self.state.port_b & PORT_B_REFRESH) | (byte & PORT_B_WRITABLE);
                }
                COMMAND => self.command(*byte)?,
                _ => {}
            }
        }
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::every_access;
    use std::sync::Mutex;

    fn read(device: &mut I8042, offset: u64) -> u8 {
        let mut data = [0xff];
        device.read(offset, &mut data);
        data[0]
    }

    /// Sends a command, and gives the answer if there is one, with the status it came with.
    fn ask(device: &mut I8042, command: u8) -> Option<(u8, u8)> {
        assert!(device.write(COMMAND, &[command]).is_continue());
        let status = read(device, COMMAND);
        (status & STATUS_OUTPUT_FULL != 0).then(|| (read(device, DATA), status))
    }

    #[test]
    fn the_reset_command_resets() {
        let mut device = I8042::new();
        // What a reset waits for first: the input buffer is never full.
        assert_eq!(read(&mut device, COMMAND) & 0b10, 0);
        let end = device.write(COMMAND, &[0xfe]);
        assert_eq!(end, ControlFlow::Break(ExitRequest::Reset));
        assert!(device.write(DATA, &[0xfe]).is_continue());
    }

    #[test]
    fn a_probing_driver_gets_an_answer_to_everything_it_waits_for() {
        let mut device = I8042::new();
        assert_eq!(read(&mut device, COMMAND) & STATUS_OUTPUT_FULL, 0);
        assert_eq!(ask(&mut device, SELF_TEST).map(|a| a.0), Some(0x55));
        assert_eq!(ask(&mut device, TEST_KEYBOARD).map(|a| a.0), Some(0));
        let config = ask(&mut device, READ_CONFIG).unwrap().0;
        assert_eq!(ask(&mut device, WRITE_CONFIG), None);
        assert!(device.write(DATA, &[config & !0x30 | 1]).is_continue());
        let config = ask(&mut device, READ_CONFIG).unwrap().0;
        assert_eq!(
            config & 0x31,
            0x21,
            "the keyboard is on, a second port is not there"
        );
        // Linux looks for a second port by looping a byte through it, and by its own test.
        assert_eq!(ask(&mut device, WRITE_AUX_BUFFER), None);
        assert!(device.write(DATA, &[0x5a]).is_continue());
        assert_eq!(
            read(&mut device, COMMAND) & 0x21,
            1,
            "not a second port's byte"
        );
        assert_eq!(read(&mut device, DATA), 0x5a);
        assert_eq!(ask(&mut device, TEST_AUX).map(|a| a.0), Some(1));
        // A keyboard command.
        assert!(device.write(DATA, &[0xf2]).is_continue());
        assert_eq!(read(&mut device, COMMAND) & 0x41, 0x41);
        assert_eq!(read(&mut device, DATA), RESEND);
        assert_eq!(read(&mut device, COMMAND) & 0x41, 0);
    }

    #[test]
    fn who_waits_for_timer_2_or_for_a_refresh_does_not_wait_for_ever() {
        let mut device = I8042::new();
        assert!(device.write(PORT_B, &[0xf1]).is_continue());
        let (first, second) = (read(&mut device, PORT_B), read(&mut device, PORT_B));
        assert_eq!(first & 0x2f, 0x21);
        assert_eq!(first ^ second, PORT_B_REFRESH);
    }

    #[test]
    fn the_state_survives_in_the_middle_of_a_command() {
        let mut device = I8042::new();
        assert_eq!(ask(&mut device, WRITE_CONFIG), None);
        let state = serde_json::to_string(&device.state()).unwrap();
        let mut device = I8042::from_state(&serde_json::from_str(&state).unwrap());
        assert!(device.write(DATA, &[0x42]).is_continue());
        assert_eq!(ask(&mut device, READ_CONFIG).map(|a| a.0), Some(0x62));
    }

    #[test]
    fn only_the_reset_command_ends_the_machine() {
        every_access(&Mutex::new(I8042::new()), 5, |offset, data, end| {
            let reset = data.get((4 - offset) as usize) == Some(&0xfe);
            assert_eq!(end.is_break(), reset, "{offset} {data:?}");
        });
    }
}
