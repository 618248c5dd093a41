//! Linux guests on the host's own network, by passt and without privileges. They need KVM with
//! hardware behind it, and are run as root by `cargo xtask test`, which then becomes nobody special.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kiln_tests::linux::{Linux, PATIENCE};
use kiln_tests::tap::Tap;
use kiln_vmm::Transport;

/// A user with no rights but to /dev/kvm.
const USER: &str = "--reuid=4711 --regid=4711 --clear-groups --no-new-privs --inh-caps=-all";
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
