//! Linux guests on a virtio console, with named ports, and with random numbers of the host's. They
//! need KVM with hardware behind it, and are run as root by `cargo xtask test`.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use kiln_tests::linux::{Linux, PATIENCE};
use kiln_tests::program::{self, Outcome};
use kiln_tests::terminal::Terminal;
use kiln_vmm::Transport;

kiln_tests::over_every_transport!(
    ; over mmio when asked:
    a_named_port_carries_a_megabyte_each_way_and_tells_its_end,
    a_shell_on_the_virtio_console_takes_what_is_typed_and_knows_its_size,
    random_numbers_of_the_host_come_as_fast_as_the_limit_says,
);

fn assert_passed(outcome: &Outcome) {
    let what = format!("{}\n{}", outcome.output, outcome.errors);
    assert_eq!(outcome.code, Some(0), "{what}");
    assert!(
        outcome.lines().contains(&"kiln-test: exit status 0"),
        "{what}"
    );
}

/// A shell of a guest on a terminal; with a port, the console's driver works with ports, too.
fn shell(series: &str, transport: Transport, with_port: bool) {
    let linux = Linux::new(series, transport);
    let mut args: Vec<OsString> = vec!["run".into(), "--kernel".into()];
    args.push(linux.kernel.bzimage.clone().into());
    args.push("--initrd".into());
    args.push(linux.kernel.initrd.clone().into());
    args.extend(["--transport".into(), transport.to_string().into()]);
    args.extend(["--console".into(), "virtio".into()]);
    args.extend(["--cmdline".into(), "console=hvc0 quiet panic=-1".into()]);
    if with_port {
        let socket = linux.folder.path().join("port");
        let port = format!("name=org.kiln.test,socket={}", socket.display());
        args.extend(["--virtio-port".into(), port.into()]);
    }
    let mut terminal = Terminal::start(&program::kiln(), &args, PATIENCE);
    terminal.wait_until_raw();
    terminal.wait_for("here is a shell");
    terminal.type_in(b"echo sum $((40 + 2)) on $(cat /sys/class/tty/console/active)\n");
    terminal.wait_for("sum 42 on hvc0");
    // Rows come first.
    terminal.type_in(b"echo size $(stty size)\n");
    terminal.wait_for("size 25 80");
    terminal.resize(132, 43);
    terminal.type_in(b"until stty size | grep -q '43 132'; do sleep 0.1; done; echo re''sized\n");
    terminal.wait_for("resized");
    terminal.type_in(b"seq 1 400; echo all''of it\n");
    terminal.wait_for("allof it");
    terminal.type_in(b"poweroff -f\n");
    let screen = terminal.assert_ends(0);
    // Every line, and in order.
    let mut lines = screen.lines().map(str::trim);
    for number in 1..=400 {
        assert!(lines.any(|line| line == number.to_string()), "{number}");
    }
}

fn a_shell_on_the_virtio_console_takes_what_is_typed_and_knows_its_size(transport: Transport) {
    // The driver is a module in 6.1, and built into 6.12; each is tried with ports and without.
    let shells = match transport {
        Transport::Pci => [("6.1", false), ("6.12", true)],
        _ => [("6.12", false), ("6.1", true)],
    };
    for (series, with_port) in shells {
        shell(series, transport, with_port);
    }
}

fn a_named_port_carries_a_megabyte_each_way_and_tells_its_end(transport: Transport) {
    let linux = Linux::new("6.12", transport);
    let socket = linux.folder.path().join("port");
    let port = format!("name=org.kiln.test,socket={}", socket.display());
    let linux = linux.arg("--virtio-port").arg(port);
    let bytes: Vec<u8> = (0..1_u32 << 18)
        .flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes())
        .collect();
    let program = linux
        .start(
            "for at in /sys/class/virtio-ports/*; do
                 [ \"$(cat $at/name)\" = org.kiln.test ] && port=/dev/${at##*/}
             done
             echo port=$port
             exec 3<>$port
             head -c 1048576 <&3 >/tmp/got
             cat /tmp/got >&3
             # The end of the file comes when the other end goes.
             echo after=$(cat <&3)",
        )
        .unwrap();
    let end = Instant::now() + PATIENCE;
    let mut stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&bytes).unwrap();
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back).unwrap();
    assert!(back == bytes);
    stream.write_all(b"last words").unwrap();
    drop(stream);
    let outcome = program.wait(PATIENCE).unwrap();
    assert_passed(&outcome);
    assert_eq!(outcome.value("after"), Some("last words"));
    assert!(!socket.exists());
}

fn random_numbers_of_the_host_come_as_fast_as_the_limit_says(transport: Transport) {
    let linux = Linux::new("6.12", transport)
        .arg("--rng")
        .arg("rate=2000,burst=500");
    let start = Instant::now();
    let outcome = linux
        .run(
            "echo current=$(cat /sys/class/misc/hw_random/rng_current)
             for file in one two; do
                 dd if=/dev/hwrng of=/tmp/$file bs=100 count=40 iflag=fullblock 2>/dev/null
             done
             echo bytes=$(cat /tmp/one /tmp/two | wc -c)
             cmp -s /tmp/one /tmp/two && echo same
             true",
        )
        .unwrap();
    let took = start.elapsed();
    assert_passed(&outcome);
    assert_eq!(outcome.value("current"), Some("virtio_rng.0"));
    assert_eq!(outcome.value("bytes"), Some("8000"));
    assert!(!outcome.output.contains("same"));
    // 500 at once, and the others at 2000 a second.
    assert!(took >= Duration::from_millis(3750), "{took:?}");
}
