//! What a machine says that it has done, against what its guest did. Needs `/dev/kvm`, and nothing
//! else.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "../../vmm/examples/guests/mod.rs"]
mod writer;

use std::io;
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_tests::linux::Linux;
use kiln_tests::machines::{LONG, builder, end, start};
use kiln_tests::prometheus::Exposition;
use kiln_tests::tap::Tap;
use kiln_tests::{guests, host};
use kiln_vmm::metrics::{LatencyMetrics, SerialMetrics};
use kiln_vmm::virtio::{QueueError, QueueHandler, Registrar, SimpleDevice, Turn};
use kiln_vmm::{
    BlockBackend, BusDeviceMut, Console, Disk, ExitRequest, GuestSlice, Metrics, Transport,
    VmBuilder, VmExit, VmState,
};
use writer::{Buffer, DATA, Guest};

/// Runs a machine to its end, and gives what it did.
fn run(builder: VmBuilder) -> Metrics {
    let handle = builder.build().unwrap().start().unwrap();
    assert_eq!(end(&handle), VmExit::Shutdown);
    handle.metrics()
}

/// The exits of the only vCPU that are not zero.
fn exits(metrics: &Metrics) -> Vec<(&'static str, u64)> {
    assert_eq!(metrics.vcpus.len(), 1);
    let all = metrics.vcpus[0].exits.by_kind().into_iter();
    all.filter(|(_, count)| *count > 0).collect()
}

#[test]
fn every_exit_of_a_guest_is_counted_by_its_kind() {
    struct Nothing;
    impl BusDeviceMut for Nothing {
        fn read(&mut self, _: u64, _: &mut [u8]) {}
        fn write(&mut self, _: u64, _: &[u8]) -> ControlFlow<ExitRequest> {
            ControlFlow::Continue(())
        }
    }
    let host = host!();
    for _ in 0..20 {
        let hello = run(builder(&host, guests::hello()));
        assert_eq!(exits(&hello), [("pio_out", 7)]);
        let device = Arc::new(Mutex::new(Nothing));
        let machine = builder(&host, guests::mmio_increment());
        let increment = run(machine.mmio_device("nothing", 0xe000_0000, 4, device));
        let expected = [("pio_out", 1), ("mmio_read", 1), ("mmio_write", 1)];
        assert_eq!(exits(&increment), expected);
    }
}

#[test]
fn what_a_serial_port_sends_and_receives_is_counted() {
    let host = host!();
    let (reader, mut typist) = io::pipe().unwrap();
    let input = kiln_vmm::ConsoleInput::fd(reader.into());
    let (output, printed) = kiln_vmm::ConsoleOutput::capture(100);
    let machine = builder(&host, guests::echo()).serial(Console::new(input, output));
    io::Write::write_all(&mut typist, b"words\n").unwrap();
    let SerialMetrics {
        output_bytes,
        dropped_bytes,
        input_bytes,
        ..
    } = run(machine).serial;
    assert_eq!((output_bytes, dropped_bytes, input_bytes), (6, 0, 6));
    assert_eq!(printed.text(), "words\n");
    // A console that takes nothing.
    let serial = run(builder(&host, guests::hello())).serial;
    assert_eq!((serial.output_bytes, serial.dropped_bytes), (6, 6));
}

/// A disk of 64 KiB of nothing, which tells of each read and waits for leave where there is
/// anybody to ask.
struct Zeros(Option<(Sender<()>, Receiver<()>)>);

impl BlockBackend for Zeros {
    fn size(&self) -> u64 {
        64 << 10
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_at(&mut self, _: u64, _: &[GuestSlice<'_>]) -> io::Result<()> {
        if let Some((asked, leave)) = &self.0 {
            asked.send(()).unwrap();
            leave.recv().unwrap();
        }
        Ok(())
    }
    fn write_at(&mut self, _: u64, _: &[GuestSlice<'_>]) -> io::Result<()> {
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn every_request_to_a_disk_is_counted() {
    let _host = host!();
    let guest = Guest::new()
        .start_virtio(0, 1)
        .read_disk(0, 0, DATA, 512)
        .read_disk(0, 8, DATA, 1024)
        .write_disk(0, 0, DATA, 2048)
        .read_disk(0, 128, DATA, 512) // behind the end
        .power_off();
    let metrics = run(guest.machine().unwrap().disk(Disk::new(Zeros(None))));
    let [device] = &metrics.devices[..] else {
        panic!("{:?}", metrics.devices);
    };
    assert_eq!(device.name, "disk 0");
    assert_eq!((device.needs_reset, device.config_interrupts), (0, 0));
    let queue = &device.queues[0];
    assert_eq!(queue.requests, 4);
    assert_eq!(queue.bytes_from_driver, 4 * 16 + 2048);
    assert_eq!(queue.bytes_to_driver, (512 + 1) + (1024 + 1) + 1 + 1);
    assert!((1..=4).contains(&queue.interrupts), "{}", queue.interrupts);
    let block = device.block.as_ref().unwrap();
    assert_eq!((block.reads, block.read_bytes), (2, 1536));
    assert_eq!((block.writes, block.write_bytes), (1, 2048));
    assert_eq!((block.flushes, block.ids, block.errors), (0, 0, 1));
    // The guest does not know of flushes, so each write brings one.
    let count = |latency: &LatencyMetrics| {
        let sum: u64 = latency.buckets.iter().map(|bucket| bucket.count).sum();
        assert_eq!(latency.count, sum);
        assert!(sum == 0 || latency.sum_ns > 0);
        sum
    };
    assert_eq!(count(&block.read_latency), 2);
    assert_eq!(count(&block.write_latency), 1);
    assert_eq!(count(&block.flush_latency), 1);
    let text = Exposition::parse(&metrics.to_prometheus()).unwrap();
    let labels = [("device", "disk 0"), ("kind", "read")];
    assert_eq!(text.get("kiln_block_requests_total", &labels), Some(2.0));
    assert_eq!(
        text.get("kiln_block_latency_seconds_count", &labels),
        Some(2.0)
    );
}

/// Answers each request with eight bytes.
struct Answer;

impl QueueHandler for Answer {
    fn process(&mut self, turn: &mut Turn, _: &mut Registrar) -> Result<(), QueueError> {
        while let Some(mut chain) = turn.pop()? {
            chain.writable.write(&[7; 8])?;
            turn.complete(chain, 8)?;
        }
        Ok(())
    }
}

#[test]
fn a_device_of_ones_own_is_counted_without_its_doing() {
    let _host = host!();
    let request = [Buffer::Readable(DATA, 5), Buffer::Writable(DATA + 16, 100)];
    let guest = Guest::new()
        .start_virtio(0, 2)
        .offer(0, 1, &request)
        .offer(0, 1, &request)
        .offer(0, 1, &request)
        .wait(0, 1)
        // Room for less than an answer: that is a mistake of the driver.
        .offer(0, 0, &[Buffer::Writable(DATA, 4)]);
    let machine = guest.spin().machine().unwrap();
    let device = || SimpleDevice::new(4, [16, 16], Answer);
    let machine = machine
        .name("dice")
        .virtio_device("mine", device())
        .virtio_device("mine", device());
    let handle = machine.build().unwrap().start().unwrap();
    let begun = Instant::now();
    while handle.metrics().devices[0].needs_reset == 0 {
        assert!(begun.elapsed() < LONG);
        std::thread::yield_now();
    }
    handle.stop();
    let metrics = handle.metrics();
    assert_eq!(metrics.name.as_deref(), Some("dice"));
    let names: Vec<_> = metrics.devices.iter().map(|device| &device.name).collect();
    assert_eq!(names, ["mine", "mine (2)"]);
    let [first, second] = &metrics.devices[0].queues[..] else {
        panic!("{metrics:?}");
    };
    assert_eq!((first.requests, first.interrupts), (0, 0));
    assert_eq!(second.requests, 3);
    assert_eq!((second.bytes_from_driver, second.bytes_to_driver), (15, 24));
    assert!((1..=3).contains(&second.interrupts));
    assert_eq!(metrics.devices[0].needs_reset, 1);
    assert!(
        metrics.devices[1]
            .queues
            .iter()
            .all(|queue| queue.requests == 0)
    );
    assert!(metrics.devices[0].block.is_none() && metrics.devices[0].net.is_none());
}

#[test]
fn metrics_are_there_while_a_device_holds_everything_else_up() {
    let _host = host!();
    let (asked, read) = channel();
    let (leave, may_go_on) = channel();
    let guest = Guest::new().start_virtio(0, 1).read_disk(0, 0, DATA, 512);
    let machine = guest.power_off().machine().unwrap();
    let disk = Disk::new(Zeros(Some((asked, may_go_on))));
    let handle = machine.disk(disk).build().unwrap().start().unwrap();
    read.recv_timeout(LONG).unwrap();
    let pausing = handle.clone();
    let pausing = std::thread::spawn(move || pausing.pause());
    let begun = Instant::now();
    while handle.state() != VmState::Paused {
        assert!(begun.elapsed() < LONG);
        std::thread::yield_now();
    }
    // The pause waits for the disk now, with the machine locked.
    let (done, metrics) = channel();
    let asking = handle.clone();
    std::thread::spawn(move || done.send(asking.metrics()));
    let metrics = metrics.recv_timeout(LONG).expect("it waits for the disk");
    assert_eq!(metrics.state, VmState::Paused);
    assert_eq!(metrics.devices[0].block.as_ref().unwrap().reads, 0);
    assert!(!pausing.is_finished());
    leave.send(()).unwrap();
    pausing.join().unwrap().unwrap();
    assert_eq!(handle.metrics().devices[0].queues[0].requests, 1);
    handle.resume().unwrap();
    assert_eq!(end(&handle), VmExit::Shutdown);
}

#[test]
fn metrics_grow_while_a_guest_runs_and_stay_as_they_are_at_its_end() {
    let host = host!();
    let handle = start(&host, guests::exit_storm());
    let mut before = handle.metrics();
    let begun = Instant::now();
    for _ in 0..10 {
        let now = loop {
            let now = handle.metrics();
            if now.vcpus[0].exits.pio_out > before.vcpus[0].exits.pio_out {
                break now;
            }
            assert!(begun.elapsed() < LONG);
            std::thread::sleep(Duration::from_millis(1));
        };
        assert_eq!(now.state, VmState::Running);
        assert!(now.uptime_ns > before.uptime_ns);
        before = now;
    }
    handle.stop();
    let last = handle.metrics();
    assert_eq!(last.state, VmState::Ended);
    assert!(last.uptime_ns > before.uptime_ns);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(handle.metrics(), last);
}

kiln_tests::over_every_transport!(; over mmio when asked: a_linux_guest_and_its_machine_count_the_same);

fn a_linux_guest_and_its_machine_count_the_same(transport: Transport) {
    let _tap = Tap::new("kilntest9", "192.168.119.1/24");
    let linux = Linux::new("6.12", transport);
    let path = |name| linux.folder.path().join(name);
    let (image, metrics) = (path("image"), path("vm.prom"));
    std::fs::write(&image, vec![0; 8 << 20]).unwrap();
    let linux = linux
        .disk(&image, ",id=metrics")
        .arg("--net")
        .arg("tap=kilntest9")
        .cmdline("kiln.ip=eth0:192.168.119.2/24")
        .arg("--metrics")
        .arg(&metrics)
        .arg("--name")
        .arg("linux");
    let script = "ping -c 3 192.168.119.1 | grep received
        dd if=/dev/zero of=/dev/vda bs=64k count=16 conv=fsync
        echo 3 > /proc/sys/vm/drop_caches
        dd if=/dev/vda of=/dev/null bs=64k skip=16 count=32
        cat /sys/block/vda/serial > /dev/null
        ip link set eth0 down
        set -- $(cat /sys/block/vda/stat)
        echo reads=$1; echo read_sectors=$3; echo writes=$5; echo write_sectors=$7; echo flushes=${16}
        for what in rx_packets rx_bytes tx_packets tx_bytes; do
            echo $what=$(cat /sys/class/net/eth0/statistics/$what)
        done";
    let outcome = linux.run(script).unwrap();
    assert_eq!(
        outcome.code,
        Some(0),
        "{}\n{}",
        outcome.output,
        outcome.errors
    );
    let guest = |name: &str| -> f64 {
        let value = outcome.value(name).and_then(|value| value.parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in {}", outcome.output))
    };
    let text = std::fs::read_to_string(&metrics).unwrap();
    let read = Exposition::parse(&text).unwrap();
    let machine = |name: &str, labels: &[(&str, &str)]| {
        let labels = [&[("vm", "linux")], labels].concat();
        read.get(name, &labels)
            .unwrap_or_else(|| panic!("no {name} {labels:?} in {text}"))
    };
    let disk = |name: &str, kind| machine(name, &[("device", "disk 0"), ("kind", kind)]);
    let flushes = disk("kiln_block_requests_total", "flush");
    assert_eq!(flushes, guest("flushes"));
    assert!(flushes > 0.0);
    // To the guest a flush is a write of nothing.
    for (kind, empty) in [("read", 0.0), ("write", flushes)] {
        let requests = disk("kiln_block_requests_total", kind);
        assert_eq!(requests + empty, guest(&format!("{kind}s")), "{kind}s");
        let bytes = 512.0 * guest(&format!("{kind}_sectors"));
        assert_eq!(disk("kiln_block_bytes_total", kind), bytes);
        assert_eq!(disk("kiln_block_latency_seconds_count", kind), requests);
    }
    assert!(guest("write_sectors") >= 2048.0 && guest("read_sectors") >= 4096.0);
    assert!(disk("kiln_block_requests_total", "id") > 0.0);
    let net = |name: &str, way| machine(name, &[("device", "net 0"), ("direction", way)]);
    for way in ["rx", "tx"] {
        assert!(net("kiln_net_packets_total", way) >= 3.0);
        let packets = guest(&format!("{way}_packets"));
        assert_eq!(net("kiln_net_packets_total", way), packets, "{way}");
        assert_eq!(
            net("kiln_net_bytes_total", way),
            guest(&format!("{way}_bytes"))
        );
    }
    let printed = machine("kiln_serial_bytes_total", &[("direction", "output")]);
    assert_eq!(printed, outcome.output.len() as f64);
}
