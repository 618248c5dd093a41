use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use kiln_virtio_device::testing::wait_until;

use super::*;
use kiln_memory::{GuestMemory, MemoryOptions, allocate};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// What stands in for passt: a shell script, with the socket as descriptor 3.
struct Fake {
    folder: tempfile::TempDir,
}

impl Fake {
    fn new(script: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let fake = Self { folder };
        let text = format!(
            "#!/bin/sh\ncd '{}'\n{script}\n",
            fake.folder.path().display()
        );
        std::fs::write(fake.path("passt"), text).unwrap();
        std::fs::set_permissions(fake.path("passt"), Permissions::from_mode(0o755)).unwrap();
        fake
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn options(&self) -> UserNetOptions {
        UserNetOptions::new().program(self.path("passt"))
    }

    fn start(&self) -> Result<Passt, PasstError> {
        let mut result = Passt::start(&self.options());
        // A program that is being written by a process that another test forks is busy.
        while matches!(&result, Err(PasstError::Ended { problem, .. }) if problem.contains("busy"))
        {
            std::thread::sleep(Duration::from_millis(5));
            result = Passt::start(&self.options());
        }
        result
    }

    fn pid(&self) -> String {
        std::fs::read_to_string(self.path("pid"))
            .unwrap()
            .trim()
            .to_owned()
    }
}

/// Ready, and sends everything back.
const ECHO: &str = "echo $$ >pid; echo $$; exec cat <&3 >&3";

fn is_there(pid: &str) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

struct Memory(GuestMemory);

impl Memory {
    fn new() -> Self {
        Self(allocate(&[(GuestAddress(0), 1 << 20)], &MemoryOptions::default()).unwrap())
    }

    fn slice(&self, at: u64, len: usize) -> GuestSlice<'_> {
        self.0.get_slice(GuestAddress(at), len).unwrap()
    }
}

fn wait_readable(fd: BorrowedFd<'_>) {
    let timeout = Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout));
    assert_eq!(ready, Ok(1), "not readable");
}

/// Receives a packet at 0x8000, of which a part may come first.
fn receive(passt: &mut Passt, memory: &Memory) -> usize {
    loop {
        wait_readable(passt.readiness());
        match passt.receive(&[memory.slice(0x8000, 0x1_8000)]) {
            Ok(len) => return len,
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
    }
}

/// Receives until the network says why it is none.
fn failure(passt: &mut Passt, memory: &Memory) -> String {
    while passt.failure().is_none() {
        wait_readable(passt.readiness());
        let _ = passt.receive(&[memory.slice(0, 0x1_8000)]);
    }
    passt.failure().unwrap().to_owned()
}

#[test]
fn frames_go_through_and_nothing_is_left_afterwards() {
    let fake = Fake::new(ECHO);
    let memory = Memory::new();
    let mut passt = fake.start().unwrap();
    assert_eq!(passt.mtu(), Some(65520));
    let pid = fake.pid();
    memory
        .0
        .write_slice(b"0123456789abthe frame itself", GuestAddress(0x100))
        .unwrap();
    passt.send(&[memory.slice(0x100, 28)]).unwrap();
    passt.flush();
    wait_readable(passt.readiness());
    assert_eq!(
        passt.receive(&[memory.slice(0x8000, 0x1_8000)]).unwrap(),
        28
    );
    let mut bytes = [0; 28];
    memory
        .0
        .read_slice(&mut bytes, GuestAddress(0x8000))
        .unwrap();
    assert_eq!(&bytes, b"\0\0\0\0\0\0\0\0\0\0\0\0the frame itself");
    assert!(is_there(&pid));
    drop(passt);
    // Not even a zombie.
    assert!(!is_there(&pid));
}

#[test]
fn it_is_asked_for_what_the_options_say() {
    let fake = Fake::new(r#"printf '%s ' "$@" >arguments; echo 1; exec cat <&3 >&3"#);
    let options = fake
        .options()
        .forward("tcp:127.0.0.1:47080:80".parse().unwrap());
    let passt = loop {
        match Passt::start(&options) {
            Err(PasstError::Ended { problem, .. }) if problem.contains("busy") => {}
            other => break other.unwrap(),
        }
    };
    let arguments = std::fs::read_to_string(fake.path("arguments")).unwrap();
    assert_eq!(
        arguments,
        "--foreground --quiet --fd 3 --pid /dev/stdout --tcp-ports 127.0.0.1/47080:80 --udp-ports none "
    );
    drop(passt);
}

#[test]
fn what_it_complains_about_is_in_the_error() {
    let fake = Fake::new("echo 'Failed to bind port 80' >&2; exit 3");
    let error = fake.start().unwrap_err().to_string();
    assert!(
        error.ends_with("exit status 3: Failed to bind port 80"),
        "{error}"
    );
    let fake = Fake::new("kill -9 $$");
    let error = fake.start().unwrap_err().to_string();
    assert!(error.ends_with("network: signal 9"), "{error}");
    let absent = UserNetOptions::new().program("/absent/passt");
    let error = Passt::start(&absent).unwrap_err().to_string();
    assert!(
        error.contains("`/absent/passt`") && error.contains("not found"),
        "{error}"
    );
}

#[test]
fn one_that_never_gets_ready_is_killed() {
    let fake = Fake::new("echo $$ >pid; exec sleep 1000");
    let error = loop {
        let error = Passt::start_within(&fake.options(), Duration::from_secs(1)).unwrap_err();
        if fake.path("pid").exists() {
            break error.to_string();
        }
    };
    assert!(error.contains("not ready after 1 s"), "{error}");
    assert!(!is_there(&fake.pid()));
}

#[test]
fn its_end_is_told_with_the_reason_and_leaves_no_zombie() {
    let memory = Memory::new();
    let fake =
        Fake::new("echo $$ >pid; echo $$; head -c 20 <&3 >/dev/null; echo enough >&2; exit 7");
    let mut passt = fake.start().unwrap();
    assert_eq!(passt.failure(), None);
    let pid = fake.pid();
    passt.send(&[memory.slice(0, 100)]).unwrap();
    passt.flush();
    assert_eq!(
        failure(&mut passt, &memory),
        "passt has ended: exit status 7: enough"
    );
    assert!(!is_there(&pid));
    passt.flush();
    for fd in [passt.readiness(), passt.send_readiness().unwrap()] {
        let ready = poll(
            &mut [PollFd::new(&fd, PollFlags::IN)],
            Some(&Timespec::default()),
        );
        assert_eq!(ready, Ok(0), "nothing is left to be waited for");
    }
    let error = passt.send(&[memory.slice(0, 100)]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotConnected);
}

#[test]
fn one_that_closes_its_socket_and_one_that_leaves_it_to_a_child_have_ended_too() {
    let memory = Memory::new();
    let fake = Fake::new("echo $$ >pid; echo $$; exec 3<&-; exec sleep 1000");
    let mut passt = fake.start().unwrap();
    let reason = failure(&mut passt, &memory);
    assert_eq!(reason, "passt has ended: signal 9");
    assert!(!is_there(&fake.pid()));

    let fake = Fake::new("sleep 1000 & echo $! >pid; echo $$; exit 0");
    let mut passt = fake.start().unwrap();
    let reason = failure(&mut passt, &memory);
    assert_eq!(reason, "passt has ended: exit status 0");
    let child = fake.pid();
    let killed = std::process::Command::new("kill")
        .arg(&child)
        .status()
        .unwrap();
    assert!(killed.success());
}

#[test]
fn what_it_complains_about_while_nobody_reads_holds_it_up_no_longer_than_a_pipe_is_full() {
    let fake = Fake::new(
        "echo $$; head -c 300000 /dev/zero | tr '\\0' x >&2 2>/dev/null; echo $$ >pid
         exec cat <&3 >&3",
    );
    let passt = fake.start().unwrap();
    wait_until("it to go on", || fake.path("pid").exists());
    drop(passt);
}

#[test]
fn a_program_that_is_not_there_is_named_with_the_way_to_it() {
    let error = PasstError::NotInstalled.to_string();
    assert!(error.contains("apt-get install passt"), "{error}");
}

/// The real one, where it is installed.
#[test]
fn passt_itself_starts_answers_and_ends() {
    if process::find("passt", std::env::var_os("PATH").as_deref()).is_none() {
        return;
    }
    let mut passt = match Passt::start(&UserNetOptions::new()) {
        Ok(passt) => passt,
        Err(error) => {
            assert!(error.to_string().contains("interface"), "{error}");
            return;
        }
    };
    // What every host asks for when it starts.
    let memory = Memory::new();
    memory.0.write_slice(&[0; 12], GuestAddress(0)).unwrap();
    memory
        .0
        .write_slice(&dhcp_discover(), GuestAddress(12))
        .unwrap();
    passt
        .send(&[memory.slice(0, 12 + dhcp_discover().len())])
        .unwrap();
    passt.flush();
    let len = receive(&mut passt, &memory);
    let mut offer = vec![0; len - 12];
    memory
        .0
        .read_slice(&mut offer, GuestAddress(0x800c))
        .unwrap();
    // To us, an IPv4 packet with UDP from port 67.
    assert_eq!(offer[..6], MAC);
    assert_eq!(offer[12..14], [8, 0]);
    assert_eq!(offer[34..36], [0, 67]);
}

const MAC: [u8; 6] = [6, 0, 0, 0, 0, 1];

/// A DHCPDISCOVER in its UDP, IPv4 and Ethernet frames.
fn dhcp_discover() -> Vec<u8> {
    let mut bootp = vec![1, 1, 6, 0, 1, 2, 3, 4];
    bootp.resize(28, 0);
    bootp.extend(MAC);
    bootp.resize(236, 0);
    // The cookie, the type of message, the end.
    bootp.extend([0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255]);
    bootp.resize(300, 0);
    let mut frame = vec![0xff; 6];
    frame.extend(MAC);
    frame.extend([8, 0]);
    let len = (28 + bootp.len()) as u16;
    let mut header = vec![0x45, 0];
    header.extend(len.to_be_bytes());
    header.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    let sum: u32 = header
        .chunks(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    frame.extend(header);
    frame.extend([0, 68, 0, 67]);
    frame.extend((len - 20).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(bootp);
    frame
}
