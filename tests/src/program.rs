//! The `kiln` program as a process of its own.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The `kiln` program to test: what the environment variable `KILN` names, or else the release
/// build of this workspace.
pub fn kiln() -> PathBuf {
    match std::env::var_os("KILN") {
        Some(path) => path.into(),
        None => kiln_xtask::paths::target().join("release/kiln"),
    }
}

/// Whether there is a KVM to test with; says so where there is none.
pub fn have_kvm() -> bool {
    let device = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if device.is_err() {
        eprintln!("skipped: no usable /dev/kvm");
    }
    device.is_ok()
}

/// How a run of the program ended.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code; `None` where a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to the standard output.
    pub output: String,
    /// What it wrote to the standard error output.
    pub errors: String,
}

/// A running program with what it has written so far.
pub struct Program {
    child: Child,
    output: Arc<Mutex<Vec<u8>>>,
    errors: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Program {
    /// Starts `program` with `args`; the standard input is a pipe.
    pub fn start<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, args: &[S]) -> std::io::Result<Self> {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (output, errors) = (Arc::default(), Arc::default());
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            readers.push(collect(pipe, Arc::clone(&output)));
        }
        if let Some(pipe) = child.stderr.take() {
            readers.push(collect(pipe, Arc::clone(&errors)));
        }
        Ok(Self {
            child,
            output,
            errors,
            readers,
        })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Writes to its standard input.
    pub fn type_in(&mut self, text: &str) -> std::io::Result<()> {
        match &mut self.child.stdin {
            Some(pipe) => pipe.write_all(text.as_bytes()),
            None => Ok(()),
        }
    }

    /// Sends it a signal, by name, such as `TERM`.
    pub fn signal(&self, name: &str) -> std::io::Result<()> {
        let id = self.child.id().to_string();
        Command::new("kill").args(["-s", name, &id]).status()?;
        Ok(())
    }

    /// Waits until the standard output or the standard error output has `text`, and says whether
    /// it came within `timeout`.
    pub fn wait_for(&self, text: &str, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        while Instant::now() < end {
            if self.text(&self.output).contains(text) || self.text(&self.errors).contains(text) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    /// Waits for its end; after `timeout` it is killed, and has no exit code then.
    pub fn wait(mut self, timeout: Duration) -> std::io::Result<Outcome> {
        let end = Instant::now() + timeout;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() >= end {
                self.child.kill()?;
                break self.child.wait()?;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        Ok(Outcome {
            code: status.code(),
            output: self.text(&self.output),
            errors: self.text(&self.errors),
        })
    }

    fn text(&self, of: &Mutex<Vec<u8>>) -> String {
        let bytes = of.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // A test that fails leaves no machine behind.
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn collect(mut pipe: impl Read + Send + 'static, to: Arc<Mutex<Vec<u8>>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
            to.extend_from_slice(&buffer[..count]);
        }
    })
}
