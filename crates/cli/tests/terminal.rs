//! `kiln run` on a terminal: raw mode while the guest has it, and what was there before after
//! every end.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_tests::program::have_kvm;
use kiln_tests::{elf, guests};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

const LONG: Duration = Duration::from_secs(60);

/// A pseudo terminal, as a person has one, with `kiln run` on it.
struct Terminal {
    keyboard: File,
    slave: File,
    screen: Arc<Mutex<Vec<u8>>>,
    before: Termios,
    child: Child,
    _kernel: tempfile::TempDir,
}

impl Terminal {
    fn run(code: &[u8]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = OpenOptions::new()
            .read(true)
            .write(true)
            .open(OsStr::from_bytes(name.to_bytes()))
            .unwrap();
        let before = tcgetattr(&slave).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("kernel");
        std::fs::write(&kernel, elf::image(code)).unwrap();
        let end = || Stdio::from(OwnedFd::from(slave.try_clone().unwrap()));
        let child = Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(["run", "--memory", "16M", "--kernel"])
            .arg(&kernel)
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let keyboard = File::from(master);
        let screen = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, shown) = (keyboard.try_clone().unwrap(), Arc::clone(&screen));
        std::thread::spawn(move || {
            let mut buffer = [0; 1024];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                shown.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        Self {
            keyboard,
            slave,
            screen,
            before,
            child,
            _kernel: folder,
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }

    fn wait_until(&self, what: &str, holds: impl Fn() -> bool) {
        let end = Instant::now() + LONG;
        while !holds() {
            assert!(
                Instant::now() < end,
                "never {what}; on the screen: {}",
                self.text()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.slave).unwrap().local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    fn wait_until_raw(&self) {
        self.wait_until("raw", || self.is_raw());
    }

    fn type_in(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        Command::new("kill")
            .args(["-s", name, &id])
            .status()
            .unwrap();
    }

    /// Waits for the end, and asserts the exit code and that the terminal is as it was.
    fn assert_ends(mut self, code: i32) -> String {
        let end = Instant::now() + LONG;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > end {
                self.child.kill().unwrap();
                panic!("no end; on the screen: {}", self.text());
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(status.code(), Some(code), "{}", self.text());
        let after = tcgetattr(&self.slave).unwrap();
        assert_eq!(after.local_modes, self.before.local_modes);
        assert_eq!(after.input_modes, self.before.input_modes);
        assert_eq!(after.output_modes, self.before.output_modes);
        assert_eq!(after.control_modes, self.before.control_modes);
        self.text()
    }
}

#[test]
fn what_is_typed_reaches_the_guest_as_it_is() {
    if !have_kvm() {
        return;
    }
    let mut terminal = Terminal::run(guests::echo());
    terminal.wait_until_raw();
    // Ctrl-C is the guest's, two Ctrl-A are one, and the newline ends this guest.
    terminal.type_in(b"ab\x03\x01\x01c\n");
    let screen = terminal.assert_ends(0);
    assert!(screen.contains("Ctrl-A x stops"), "{screen}");
    assert!(screen.contains("ab\x03\x01c\r\n"), "{screen:?}");
}

#[test]
fn the_escape_sequence_stops_a_guest_that_does_not_listen() {
    if !have_kvm() {
        return;
    }
    let mut terminal = Terminal::run(guests::busy());
    terminal.wait_until_raw();
    terminal.type_in(b"\x01x");
    terminal.assert_ends(7);
}

#[test]
fn the_escape_sequence_presses_the_power_button() {
    if !have_kvm() {
        return;
    }
    let mut terminal = Terminal::run(guests::wait_for_power_button());
    terminal.wait_until_raw();
    terminal.wait_until("ready", || terminal.text().ends_with('w'));
    terminal.type_in(b"\x01p");
    terminal.assert_ends(0);
}

#[test]
fn the_terminal_is_restored_after_a_crash_and_after_signals() {
    if !have_kvm() {
        return;
    }
    Terminal::run(guests::triple_fault()).assert_ends(5);
    for signal in ["TERM", "INT", "HUP"] {
        let terminal = Terminal::run(guests::busy());
        terminal.wait_until_raw();
        terminal.signal(signal);
        terminal.wait_until("told", || terminal.text().contains("once more"));
        terminal.signal(signal);
        terminal.assert_ends(7);
    }
}
