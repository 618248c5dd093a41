//! A pseudo terminal, as a person has one, with the `kiln` program on it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

/// A program on a terminal of its own.
pub struct Terminal {
    keyboard: File,
    slave: File,
    screen: Arc<Mutex<Vec<u8>>>,
    before: Termios,
    child: Child,
    patience: Duration,
}

impl Terminal {
    /// Starts `program` with `args`. What it is waited for has to happen within `patience` each
    /// time.
    ///
    /// # Panics
    ///
    /// Where there is no terminal, or no such program.
    pub fn start<S: AsRef<OsStr>>(program: &Path, args: &[S], patience: Duration) -> Self {
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
        set_size(&slave, 80, 25);
        let end = || Stdio::from(OwnedFd::from(slave.try_clone().unwrap()));
        let child = Command::new(program)
            .args(args)
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
            patience,
        }
    }

    /// What is on the screen.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }

    /// Waits until something holds.
    ///
    /// # Panics
    ///
    /// Where it never does.
    pub fn wait_until(&self, what: &str, holds: impl Fn() -> bool) {
        let end = Instant::now() + self.patience;
        while !holds() {
            assert!(
                Instant::now() < end,
                "never {what}; on the screen: {}",
                self.text()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the terminal is in raw mode.
    pub fn wait_until_raw(&self) {
        self.wait_until("raw", || {
            let modes = tcgetattr(&self.slave).unwrap().local_modes;
            !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
        });
    }

    /// Waits until this is on the screen.
    pub fn wait_for(&self, text: &str) {
        self.wait_until(text, || self.text().contains(text));
    }

    /// Presses keys.
    pub fn type_in(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    /// Sends the program a signal, by name, such as `TERM`.
    pub fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        Command::new("kill")
            .args(["-s", name, &id])
            .status()
            .unwrap();
    }

    /// Pulls at the window.
    pub fn resize(&self, columns: u16, rows: u16) {
        set_size(&self.slave, columns, rows);
        // The system tells the programs that have it as their controlling terminal, as in a shell.
        self.signal("WINCH");
    }

    /// Waits for the end, asserts the exit code and that the terminal is as it was, and gives what
    /// was on the screen.
    ///
    /// # Panics
    ///
    /// Where one of them is not so.
    pub fn assert_ends(mut self, code: i32) -> String {
        let end = Instant::now() + self.patience;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < end, "no end: {}", self.text());
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

impl Drop for Terminal {
    fn drop(&mut self) {
        // A test that fails leaves no machine behind.
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn set_size(terminal: &File, columns: u16, rows: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).unwrap();
}
