use super::*;
use crate::test_support::Recorder;
use kiln_io_thread::{EventSet, IoEvent, IoHandler, IoThread, Registrar};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;
use vmm_sys_util::eventfd::EventFd;

mod input;
mod output;
mod registers;

const LONG: Duration = Duration::from_secs(30);

const DATA: u64 = 0;
const LSR_READY: u8 = 1;
const IER_RECEIVE: u8 = 1;
const IER_TRANSMIT: u8 = 2;

/// A serial port with its thread, and a guest's way to it.
struct Bench {
    serial: Serial,
    line: Arc<Recorder>,
    io: IoThread,
}

impl Bench {
    fn new(console: Console) -> Self {
        Self::restore(&SerialState::default(), console)
    }

    fn restore(state: &SerialState, console: Console) -> Self {
        let io = IoThread::spawn("test", |panic| eprintln!("{panic}")).unwrap();
        let line = Arc::new(Recorder::default());
        let serial = Serial::from_state(state, console, line.clone()).unwrap();
        serial.connect(io.handle()).unwrap();
        Self { serial, line, io }
    }

    fn get(&self, register: u8) -> u8 {
        let mut data = [0xff];
        self.serial.read(register.into(), &mut data);
        data[0]
    }

    fn set(&self, register: u8, value: u8) {
        assert!(self.serial.write(register.into(), &[value]).is_continue());
    }

    /// Whether the port says that it takes output.
    fn takes_output(&self) -> bool {
        let bits = self.get(LSR) & LSR_TRANSMITTER;
        assert!(bits == 0 || bits == LSR_TRANSMITTER);
        bits != 0
    }

    /// Sends without a look at whether the port takes it.
    fn send(&self, bytes: &[u8]) {
        for byte in bytes {
            assert!(self.serial.write(DATA, &[*byte]).is_continue());
        }
    }

    /// Sends as a polling driver does.
    fn send_politely(&self, bytes: &[u8]) {
        for byte in bytes {
            wait_for("the port takes output", || self.takes_output());
            self.send(&[*byte]);
        }
    }

    /// Reads what there is to read.
    fn receive(&self, bytes: &mut Vec<u8>) {
        while self.get(LSR) & LSR_READY != 0 {
            bytes.push(self.get(DATA as u8));
        }
    }

    /// Reads until there were `len` bytes.
    fn receive_exactly(&self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        wait_for("input arrives", || {
            self.receive(&mut bytes);
            bytes.len() >= len
        });
        assert_eq!(bytes.len(), len);
        bytes
    }

    fn calls(&self) -> usize {
        self.serial.shared.link.calls.load(Ordering::SeqCst)
    }

    /// Waits until the I/O thread has done all it had to do; fails if it is blocked.
    fn settle(&self) {
        struct Nothing(EventFd);
        impl IoHandler for Nothing {
            fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
                registrar.add(&self.0, 0, EventSet::IN)
            }
            fn ready(&mut self, _: IoEvent, _: &mut Registrar<'_, '_>) {}
        }
        for _ in 0..8 {
            let handle = self.io.handle().clone();
            let (done, wait) = channel();
            std::thread::spawn(move || {
                let attached = handle.attach(Nothing(EventFd::new(0).unwrap())).unwrap();
                attached.detach().unwrap();
                done.send(()).unwrap();
            });
            wait.recv_timeout(LONG).expect("the I/O thread is blocked");
        }
    }

    /// Fails if the I/O thread goes on being called with nothing to do.
    fn assert_quiet(&self) {
        self.settle();
        let before = self.calls();
        std::thread::sleep(Duration::from_millis(100));
        let calls = self.calls() - before;
        assert!(calls <= 4, "called {calls} times for nothing");
    }

    /// Keeps the I/O thread from doing anything until the sender is dropped.
    fn hold(&self) -> Sender<()> {
        struct Hold(EventFd, Sender<()>, Receiver<()>);
        impl IoHandler for Hold {
            fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
                registrar.add(&self.0, 0, EventSet::IN)
            }
            fn ready(&mut self, _: IoEvent, registrar: &mut Registrar<'_, '_>) {
                let _ = registrar.remove(&self.0);
                let _ = self.1.send(());
                let _ = self.2.recv();
            }
        }
        let (release, released) = channel();
        let (hold, held) = channel();
        let wake = EventFd::new(0).unwrap();
        wake.write(1).unwrap();
        let attached = self.io.handle().attach(Hold(wake, hold, released)).unwrap();
        held.recv_timeout(LONG).unwrap();
        // It stays attached: detaching would wait for what it waits for.
        mem::forget(attached);
        release
    }
}

#[track_caller]
fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LONG, "waited for ever until {what}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Bytes in which no two places look alike.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at ^ ((at >> 8) * 7) ^ ((at >> 16) * 13)) as u8)
        .collect()
}
