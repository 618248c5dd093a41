//! The terminal: raw mode while the guest has it, restored on every way out, and the escape
//! sequence that leads back; and its size.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// What begins an escape sequence: Ctrl-A.
const ESCAPE: u8 = 0x01;

/// The modes to go back to; a static because a panic hook has no other way to them.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode of the standard input; dropping it restores what was.
pub(crate) struct RawMode(());

impl RawMode {
    /// Whether the standard input is a terminal, which alone has a raw mode.
    pub(crate) fn is_possible() -> bool {
        isatty(stdin())
    }

    /// Puts the standard input's terminal into raw mode. Output processing stays on, so that what
    /// Kiln itself says keeps its line ends.
    pub(crate) fn enter() -> io::Result<Self> {
        let saved = tcgetattr(stdin())?;
        let mut raw = saved.clone();
        raw.make_raw();
        raw.output_modes = saved.output_modes;
        *lock() = Some(saved);
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            previous(info);
        }));
        tcsetattr(stdin(), OptionalActions::Drain, &raw)?;
        Ok(Self(()))
    }
}

/// The columns and rows of the standard input's terminal; none where nobody knows them.
pub(crate) fn size() -> (u16, u16) {
    tcgetwinsize(stdin()).map_or((0, 0), |size| (size.ws_col, size.ws_row))
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn lock() -> std::sync::MutexGuard<'static, Option<Termios>> {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn restore() {
    if let Some(saved) = lock().take() {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &saved);
    }
}

/// What an escape sequence asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Escape {
    /// Stop the machine.
    Stop,
    /// Press the power button.
    PowerButton,
}

/// Passes the standard input on to the guest through `guest`, without the escape sequences, which
/// go to `on_escape`. Ends with the input.
pub(crate) fn forward(guest: OwnedFd, mut on_escape: impl FnMut(Escape)) {
    let mut guest = std::fs::File::from(guest);
    let mut filter = Filter::default();
    let mut buffer = [0; 256];
    loop {
        let count = match io::stdin().lock().read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let mut pass = Vec::with_capacity(count + 1);
        for byte in &buffer[..count] {
            filter.push(*byte, &mut pass, &mut on_escape);
        }
        if guest.write_all(&pass).is_err() {
            return;
        }
    }
}

#[derive(Default)]
struct Filter {
    escaped: bool,
}

impl Filter {
    fn push(&mut self, byte: u8, pass: &mut Vec<u8>, on_escape: &mut impl FnMut(Escape)) {
        if !self.escaped {
            self.escaped = byte == ESCAPE;
            if !self.escaped {
                pass.push(byte);
            }
            return;
        }
        self.escaped = false;
        match byte {
            b'x' => on_escape(Escape::Stop),
            b'p' => on_escape(Escape::PowerButton),
            ESCAPE => pass.push(ESCAPE),
            other => pass.extend([ESCAPE, other]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(input: &[u8]) -> (Vec<u8>, Vec<Escape>) {
        let (mut pass, mut escapes) = (Vec::new(), Vec::new());
        let mut filter = Filter::default();
        for byte in input {
            filter.push(*byte, &mut pass, &mut |escape| escapes.push(escape));
        }
        (pass, escapes)
    }

    #[test]
    fn escape_sequences_do_not_reach_the_guest() {
        let (pass, escapes) = filtered(b"ls\x01pcat\x01x");
        assert_eq!(pass, b"lscat");
        assert_eq!(escapes, [Escape::PowerButton, Escape::Stop]);
    }

    #[test]
    fn what_is_no_escape_sequence_reaches_the_guest_whole() {
        let (pass, escapes) = filtered(b"\x01\x01a\x01b\x03");
        assert_eq!(pass, b"\x01a\x01b\x03");
        assert_eq!(escapes, []);
    }
}
