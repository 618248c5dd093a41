//! Linux guests on the host's own network, by passt and without privileges. They need KVM with
//! hardware behind it, and are run as root by `cargo xtask test`, which then becomes nobody special.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kiln_tests::bytes::{noise, sha256};
use kiln_tests::linux::{Linux, PATIENCE};
use kiln_tests::tap::Tap;
use kiln_vmm::Transport;

/// A user with no rights but to /dev/kvm.
const USER: &str = "--reuid=4711 --regid=4711 --clear-groups --no-new-privs --inh-caps=-all";
const UID: u32 = 4711;
/// The bytes that go each way by TCP, and those that come by UDP.
const BYTES: usize = 1 << 20;
const UDP_BYTES: usize = 50_000;
/// What the resolver says for every name.
const ANSWER: [u8; 4] = [192, 0, 2, 77];

/// passt gives the guest the addresses and routes of the host's interface with the default route:
/// the nested machine has none of its own.
fn default_route() -> Option<Tap> {
    let show = Command::new("ip")
        .args(["-4", "route", "show", "default"])
        .output();
    if !show.unwrap().stdout.is_empty() {
        return None;
    }
    let tap = Tap::new("kilnroute0", "192.0.2.2/24");
    let add = [
        "route",
        "add",
        "default",
        "via",
        "192.0.2.1",
        "dev",
        "kilnroute0",
    ];
    assert!(Command::new("ip").args(add).status().unwrap().success());
    Some(tap)
}

/// A guest that such a user starts, with a network.
fn guest(transport: Transport, net: &str) -> Linux {
    let linux = Linux::new("6.12", transport);
    for path in [linux.folder.path(), Path::new("/dev/kvm")] {
        let mode = if path.is_dir() { 0o755 } else { 0o666 };
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
    // The resolver is ours for what is started here, and for nothing else.
    let resolver = linux.folder.path().join("resolv.conf");
    fs::write(&resolver, "nameserver 127.0.0.1\n").unwrap();
    let script = format!(
        "mount --bind {} /etc/resolv.conf && exec setpriv {USER} \"$0\" \"$@\"",
        resolver.display()
    );
    linux
        .under(&["unshare", "--mount", "sh", "-c", &script])
        .arg("--no-kernel-cache")
        .arg("--net")
        .arg(net)
        .cmdline("kiln.ip=eth0:dhcp")
}

/// Says that every name has one address (RFC 1035), and no IPv6 address.
fn resolve(socket: &UdpSocket) {
    let mut query = [0; 512];
    while let Ok((len, from)) = socket.recv_from(&mut query) {
        let name = query.get(12..len).unwrap_or_default();
        let Some(end) = name.iter().position(|byte| *byte == 0) else {
            continue;
        };
        // The name's end, and the type and class behind it.
        let question = &query[12..12 + end + 5];
        let is_address = question.ends_with(&[0, 1, 0, 1]);
        let mut answer = query[..2].to_vec();
        answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
        answer.extend(question);
        if is_address {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(ANSWER);
        }
        let _ = socket.send_to(&answer, from);
    }
}

/// Gives a file by TFTP (RFC 1350), whatever its name: datagrams both ways, each acknowledged.
fn give_by_udp(socket: &UdpSocket, file: &[u8]) {
    let mut request = [0; 512];
    while let Ok((_, from)) = socket.recv_from(&mut request) {
        let block = match request[..4] {
            [0, 1, ..] => 1,
            [0, 4, high, low] => u16::from_be_bytes([high, low]) + 1,
            _ => continue,
        };
        if let Some(rest) = file.get((usize::from(block) - 1) * 512..) {
            let mut data = [[0, 3], block.to_be_bytes()].concat();
            data.extend(&rest[..rest.len().min(512)]);
            let _ = socket.send_to(&data, from);
        }
    }
}

/// The processes that this one has started and that are there.
fn children(id: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name();
        let Some(child) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // Behind the name in brackets: the state, and the parent.
        let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        if rest.split(' ').nth(1) == Some(&id.to_string()) {
            found.push(child);
        }
    }
    found
}

fn wait_gone(id: u32) {
    let since = Instant::now();
    while Path::new(&format!("/proc/{id}")).exists() {
        assert!(since.elapsed() < PATIENCE, "process {id} is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
#[ignore = "needs hardware KVM: run by cargo xtask test"]
fn a_user_has_the_resolver_the_way_out_and_a_port_in() {
    let _route = default_route();
    let noise = noise(BYTES);
    // What the guest reaches at its gateway's address is the host's loopback address.
    let resolver = UdpSocket::bind("127.0.0.1:53").unwrap();
    let by_udp = UdpSocket::bind("127.0.0.1:7103").unwrap();
    let give = TcpListener::bind("127.0.0.1:7101").unwrap();
    let take = TcpListener::bind("127.0.0.1:7102").unwrap();
    std::thread::spawn(move || resolve(&resolver));
    let udp_file = noise[..UDP_BYTES].to_vec();
    std::thread::spawn(move || give_by_udp(&by_udp, &udp_file));
    let given = noise.clone();
    let giver = std::thread::spawn(move || {
        let (mut stream, _) = give.accept().unwrap();
        stream.write_all(&given).unwrap();
    });
    let taker = std::thread::spawn(move || {
        let (mut stream, _) = take.accept().unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let net = "user,forward=tcp:127.0.0.1:7180:80,mac=06:00:00:00:03:01";
    let linux = guest(Transport::Pci, net);
    let program = linux
        .start(
            "sum() { sha256sum <$1 | cut -d' ' -f1; }
             gateway=$(ip route | awk '/^default/ {print $3}')
             echo mac=$(cat /sys/class/net/eth0/address)
             echo mtu=$(cat /sys/class/net/eth0/mtu)
             mount -t tmpfs tmpfs /tmp
             # Never at its end: passt of 2023 loses its way when the guest closes a direction while
             # the other still has something to bring.
             mkfifo /tmp/open
             nc -l -p 80 <>/tmp/open >/tmp/in &
             until netstat -ltn | grep -q :80; do sleep 0.1; done
             echo listening
             wait
             echo in=$(sum /tmp/in)
             echo resolved=$(nslookup kiln.example | grep -c 192.0.2.77)
             timeout 60 nc $gateway 7101 <>/tmp/open >/tmp/got
             echo got=$(sum /tmp/got)
             timeout 60 nc $gateway 7102 </tmp/got
             timeout 60 tftp -g -l /tmp/udp -r any $gateway 7103
             echo udp=$(sum /tmp/udp)",
        )
        .unwrap();
    let is_listening = program.wait_for("listening", PATIENCE);
    let passt = children(program.id());
    let user = fs::metadata(format!("/proc/{}", program.id())).map(|of| of.uid());
    if is_listening {
        let mut stream = TcpStream::connect("127.0.0.1:7180").unwrap();
        stream.write_all(&noise).unwrap();
    }
    let outcome = program.wait(PATIENCE).unwrap();
    let what = format!("{}\n{}", outcome.output, outcome.errors);
    assert!(is_listening, "{what}");
    assert_eq!(outcome.code, Some(0), "{what}");
    assert_eq!(user.unwrap(), UID, "a user without rights runs it");
    let sum = sha256(&noise);
    for (name, value) in [
        ("mac", "06:00:00:00:03:01"),
        ("mtu", "65520"),
        ("in", &sum),
        ("resolved", "1"),
        ("got", &sum),
        ("udp", &sha256(&noise[..UDP_BYTES])),
    ] {
        assert_eq!(outcome.value(name), Some(value), "{name}: {what}");
    }
    giver.join().unwrap();
    assert!(taker.join().unwrap() == noise, "what the guest sent");
    assert_eq!(passt.len(), 1, "its only child is passt");
    assert!(!Path::new(&format!("/proc/{}", passt[0])).exists());
}

#[test]
#[ignore = "needs hardware KVM: run by cargo xtask test"]
fn passt_and_the_machine_survive_each_other_by_no_more_than_a_moment() {
    let _route = default_route();
    let linux = guest(Transport::Pci, "user");
    let script = "echo up=$(cat /sys/class/net/eth0/carrier); echo going
         until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done; echo down";
    // passt dies: the guest goes on, without a link.
    let program = linux.start(script).unwrap();
    assert!(program.wait_for("going", PATIENCE));
    let passt = children(program.id())[0];
    let kill = |id: u32| Command::new("kill").args(["-9", &id.to_string()]).status();
    assert!(kill(passt).unwrap().success());
    assert!(program.wait_for("down", PATIENCE));
    wait_gone(passt);
    let outcome = program.wait(PATIENCE).unwrap();
    assert_eq!(outcome.code, Some(0), "{}", outcome.errors);
    assert_eq!(outcome.value("up"), Some("1"));
    let told = "the link is down: passt has ended: signal 9";
    assert!(outcome.errors.contains(told), "{}", outcome.errors);
    // The machine dies in the hardest way: passt goes, too.
    let program = linux.start(script).unwrap();
    assert!(program.wait_for("going", PATIENCE));
    let passt = children(program.id())[0];
    program.signal("KILL").unwrap();
    wait_gone(passt);
    drop(program.wait(PATIENCE));
}
