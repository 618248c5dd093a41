//! Linux guests and programs of the host that talk by vsock. They need KVM with hardware behind it,
//! and are run as root by `cargo xtask test`.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use kiln_tests::linux::PATIENCE;
use kiln_tests::program::Outcome;
use kiln_tests::vsock::{CID, ECHO, VsockGuest};
use kiln_vmm::Transport;

kiln_tests::over_every_transport!(
    ; over mmio when asked:
    two_hundred_streams_carry_data_both_ways;
    when asked:
    two_hundred_streams_carry_much_data_both_ways,
    programs_killed_on_either_side_leave_nothing_behind,
);

const STREAMS: usize = 200;
/// The bytes of all streams, which come back.
const BYTES: usize = 16 << 20;
const MANY_BYTES: usize = 128 << 20;
/// The port of the host that the guest's programs connect to.
const PORT: u32 = 6000;

fn assert_well(outcome: &Outcome) {
    let what = format!("{}\n{}", outcome.output, outcome.errors);
    assert_eq!(outcome.code, Some(0), "{what}");
    assert_eq!(outcome.value("cid"), Some(CID.to_string().as_str()));
    for word in ["BUG:", "Oops", "stall", "Call Trace"] {
        assert!(!what.contains(word), "{what}");
    }
}

/// Bytes without a short period, so that none can be missing, double or out of order unnoticed.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..bytes / 8 + 4096)
        .flat_map(|_| next().to_le_bytes())
        .collect()
}

/// Sends these bytes to a program that sends everything back, and compares.
fn echo(socket: UnixStream, sent: &'static [u8], number: usize) -> JoinHandle<()> {
    let mut writer = socket.try_clone().unwrap();
    let small = || Builder::new().stack_size(128 << 10);
    let writing = small().spawn(move || {
        writer.write_all(sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let reading = move || {
        let mut reader = socket;
        reader.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut at = 0;
        let mut block = [0; 32 << 10];
        loop {
            let count = reader.read(&mut block).unwrap();
            if count == 0 {
                break;
            }
            assert!(block[..count] == sent[at..][..count], "{number} at {at}");
            at += count;
        }
        assert_eq!(at, sent.len(), "stream {number}");
        writing.unwrap().join().unwrap();
    };
    small().spawn(reading).unwrap()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The file descriptors of a machine without connections: those of before have gone.
fn idle(guest: &VsockGuest) -> usize {
    std::thread::sleep(Duration::from_secs(1));
    guest.descriptors().unwrap()
}

fn two_hundred_streams_carry_data_both_ways(transport: Transport) {
    two_hundred_streams_carry(BYTES, transport);
}

fn two_hundred_streams_carry_much_data_both_ways(transport: Transport) {
    two_hundred_streams_carry(MANY_BYTES, transport);
}

fn two_hundred_streams_carry(bytes: usize, transport: Transport) {
    let bytes = bytes / STREAMS;
    let guest = VsockGuest::start("6.12", transport).unwrap();
    let noise: &'static [u8] = noise(bytes).leak();
    let before = idle(&guest);
    let listener = guest.listen(PORT).unwrap();
    let asked = guest.tell(&format!(
        "i=0; while [ $i -lt {} ]; do vsock connect {PORT} dd bs=64k & i=$((i + 1)); done \
         >/dev/null 2>&1",
        STREAMS / 2
    ));
    assert_eq!(asked.unwrap(), "");
    let mut sockets: Vec<_> = (0..STREAMS / 2)
        .map(|_| listener.accept().unwrap().0)
        .collect();
    sockets.extend((0..STREAMS / 2).map(|_| guest.connect(ECHO).unwrap()));
    // All of them are open before the first byte is sent.
    assert!(guest.descriptors().unwrap() >= before + STREAMS);
    let since = Instant::now();
    let streams: Vec<_> = sockets
        .into_iter()
        .zip(0..)
        .map(|(socket, number)| echo(socket, &noise[number * 8..][..bytes], number))
        .collect();
    for stream in streams {
        stream.join().unwrap();
    }
    eprintln!("{STREAMS} streams took {:?}", since.elapsed());
    wait_until("the end of all connections", || {
        guest.descriptors().unwrap() <= before
    });
    let socket = guest.socket().to_owned();
    assert_well(&guest.end().unwrap());
    assert!(!socket.exists());
}

/// A program of the host, as a process of its own, that connects to the guest's echo, sends without
/// end and reads nothing.
fn flooding(guest: &VsockGuest) -> std::process::Child {
    let script = r#"
        socket my $s, 1, 1, 0 or die;
        connect $s, pack("S a108", 1, $ARGV[0]) or die;
        syswrite $s, "CONNECT $ARGV[1]\n" . "x" x 100;
        while (1) { syswrite $s, "x" x 65536 or die }
    "#;
    Command::new("perl")
        .args(["-e", script])
        .arg(guest.socket())
        .arg(ECHO.to_string())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn programs_killed_on_either_side_leave_nothing_behind(transport: Transport) {
    let guest = VsockGuest::start("6.1", transport).unwrap();
    let idle = idle(&guest);
    let back_to_idle = || {
        wait_until("the end of all connections", || {
            guest.descriptors().unwrap() <= idle
        });
    };
    // On the host, sooner or later after it has connected.
    for delay in [0, 1, 2, 5, 10, 20, 50, 100, 300] {
        let mut program = flooding(&guest);
        std::thread::sleep(Duration::from_millis(delay));
        program.kill().unwrap();
        program.wait().unwrap();
    }
    back_to_idle();
    // In the guest, while data goes both ways, and while it waits.
    for wait in [0, 50, 200] {
        let mut socket = guest.connect(ECHO).unwrap();
        let mut writer = socket.try_clone().unwrap();
        let writing = std::thread::spawn(move || while writer.write_all(&[0; 4096]).is_ok() {});
        std::thread::sleep(Duration::from_millis(wait));
        guest.tell("killall -9 dd").unwrap();
        let mut block = [0; 65536];
        let end = loop {
            match socket.read(&mut block) {
                Ok(1..) => {}
                Ok(0) => break ErrorKind::UnexpectedEof,
                Err(error) => break error.kind(),
            }
        };
        let ends = [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset];
        assert!(ends.contains(&end), "{end:?}");
        writing.join().unwrap();
    }
    back_to_idle();
    // The program that listens, on either side.
    let listener = guest.listen(PORT).unwrap();
    guest
        .tell(&format!("vsock connect {PORT} sleep 1000 &"))
        .unwrap();
    let (mut accepted, _) = listener.accept().unwrap();
    drop(listener);
    let refused = guest.tell(&format!("vsock connect {PORT} cat 2>&1; true"));
    assert!(refused.unwrap().contains("reset by peer"));
    accepted.write_all(b"x").unwrap();
    guest.tell("killall -9 sleep").unwrap();
    assert!(matches!(accepted.read(&mut [0; 1]), Ok(0) | Err(_)));
    drop(accepted);
    guest.kill_echo().unwrap();
    let refused = guest.connect(ECHO).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    back_to_idle();
    // And it works as before.
    guest
        .tell("vsock listen 5000 cat >/dev/null 2>&1 &")
        .unwrap();
    wait_until("an echo", || guest.connect(ECHO).is_ok());
    // The machine goes while streams are open.
    let mut open = guest.connect(ECHO).unwrap();
    assert_well(&guest.end().unwrap());
    assert!(matches!(open.read(&mut [0; 1]), Ok(0) | Err(_)));
}
