//! The two forms in which metrics are written.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kiln_devices::legacy::serial::SerialCounters;
use kiln_devices::virtio::balloon::{Balloon, BalloonOptions};
use kiln_devices::virtio::block::{Block, BlockBackend, BlockControl, BlockOptions};
use kiln_devices::virtio::net::NetCounters;
use kiln_devices::virtio::vsock::VsockCounters;
use kiln_memory::MemorySize;
use kiln_virtio_device::DeviceCounters;

use super::*;

struct NoDisk;

impl BlockBackend for NoDisk {
    fn size(&self) -> u64 {
        512
    }
    fn read_at(&mut self, _: u64, _: &[kiln_memory::GuestSlice<'_>]) -> std::io::Result<()> {
        Ok(())
    }
    fn write_at(&mut self, _: u64, _: &[kiln_memory::GuestSlice<'_>]) -> std::io::Result<()> {
        Ok(())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn disk_control() -> BlockControl {
    let block = Block::new(NoDisk, BlockOptions::default()).unwrap();
    block.control()
}

/// A machine with a disk, a network, a socket device and two of somebody's own.
fn metrics(name: Option<&str>) -> Metrics {
    let set = |counter: &std::sync::atomic::AtomicU64, value| {
        counter.store(value, Ordering::Relaxed);
    };
    let serial = SerialCounters::default();
    set(&serial.output_bytes, 12);
    set(&serial.input_bytes, 3);
    let mut disk = DeviceCounters::default();
    disk.queues.push(Arc::default());
    set(&disk.queues[0].requests, 4);
    set(&disk.queues[0].bytes_to_driver, u64::MAX);
    let block_control = disk_control();
    let block = block_control.counters();
    set(&block.reads, 2);
    set(&block.errors, 1);
    for nanos in [100, 256, 257, 3_000_000_000, 9_000_000_000] {
        block.read_latency.record(Duration::from_nanos(nanos));
    }
    let net = NetCounters::default();
    set(&net.rx_packets, 5);
    set(&net.tx_bytes, 60);
    let vsock = VsockCounters::default();
    set(&vsock.open, 8);
    set(&vsock.from_host, 9);
    let mut devices = CountedDevices::default();
    devices.add("disk 0", Arc::new(disk), Work::Block(block_control));
    devices.add("net 0", Arc::default(), Work::Net(Arc::new(net)));
    devices.add("vsock", Arc::default(), Work::Vsock(Arc::new(vsock)));
    let options = BalloonOptions {
        target: MemorySize::mib(1),
        ..BalloonOptions::default()
    };
    let balloon = Balloon::new(MemorySize::mib(2), options).unwrap().control();
    set(&balloon.counters().reported_bytes, 10);
    devices.add("balloon", Arc::default(), Work::Balloon(balloon));
    devices.add("mine", Arc::default(), Work::Other);
    devices.add("mine", Arc::default(), Work::Other);
    let source = MetricsSource::new(name.map(str::to_owned), Arc::new(serial), devices);
    let mut exits = ExitCounts::default();
    exits.pio_out = 7;
    let mut metrics = source.read(VmState::Paused, vec![ExitCounts::default(), exits]);
    metrics.uptime_ns = 1_500_000_000;
    metrics
}

#[test]
fn metrics_in_json_read_back() {
    for name in [Some("web"), None] {
        let metrics = metrics(name);
        let text = serde_json::to_string(&metrics).unwrap();
        assert_eq!(serde_json::from_str::<Metrics>(&text).unwrap(), metrics);
    }
    let value = serde_json::to_value(metrics(None)).unwrap();
    assert_eq!(value["state"], "paused");
    assert_eq!(value["vcpus"][1]["exits"]["pio_out"], 7);
    let latency = &value["devices"][0]["block"]["read_latency"];
    assert_eq!(latency["count"], 5);
    assert_eq!(latency["buckets"][0]["up_to_ns"], 256);
    assert_eq!(latency["buckets"][0]["count"], 2);
    assert!(value.get("name").is_none() && value["devices"][2].get("block").is_none());
}

#[test]
fn two_devices_of_one_name_are_told_apart() {
    let names: Vec<_> = metrics(None).devices.into_iter().map(|d| d.name).collect();
    assert_eq!(
        names,
        ["disk 0", "net 0", "vsock", "balloon", "mine", "mine (2)"]
    );
}

#[test]
fn a_family_is_help_and_type_and_the_samples_of_all_machines() {
    let text = Metrics::all_to_prometheus(&[metrics(Some("a")), metrics(Some("b"))]);
    let expected = "\
# HELP kiln_vm_uptime_seconds Time since the machine's start, or from its start to its end.
# TYPE kiln_vm_uptime_seconds gauge
kiln_vm_uptime_seconds{vm=\"a\"} 1.5
kiln_vm_uptime_seconds{vm=\"b\"} 1.5
# HELP kiln_vcpu_exits_total Times that a vCPU came out of the guest.
# TYPE kiln_vcpu_exits_total counter
kiln_vcpu_exits_total{vm=\"a\",vcpu=\"0\",kind=\"pio_in\"} 0
";
    assert!(text.contains(expected), "{text}");
    assert_eq!(text.matches("# TYPE kiln_vcpu_exits_total").count(), 1);
    for line in [
        "kiln_vm_state{vm=\"b\",state=\"paused\"} 1",
        "kiln_vm_state{vm=\"b\",state=\"running\"} 0",
        "kiln_vcpu_exits_total{vm=\"b\",vcpu=\"1\",kind=\"pio_out\"} 7",
        "kiln_device_requests_total{vm=\"a\",device=\"disk 0\",queue=\"0\"} 4",
        "kiln_device_bytes_total{vm=\"a\",device=\"disk 0\",queue=\"0\",direction=\"to_driver\"} \
         18446744073709551615",
        "kiln_device_needs_reset_total{vm=\"a\",device=\"mine (2)\"} 0",
        "kiln_block_errors_total{vm=\"a\",device=\"disk 0\"} 1",
        "kiln_net_packets_total{vm=\"a\",device=\"net 0\",direction=\"rx\"} 5",
        "kiln_net_bytes_total{vm=\"a\",device=\"net 0\",direction=\"tx\"} 60",
        "kiln_vsock_open{vm=\"a\",device=\"vsock\"} 8",
        "kiln_vsock_connections_total{vm=\"a\",device=\"vsock\",from=\"host\"} 9",
        "kiln_balloon_target_bytes{vm=\"a\",device=\"balloon\"} 1048576",
        "kiln_balloon_reported_bytes_total{vm=\"a\",device=\"balloon\"} 10",
        "kiln_serial_bytes_total{vm=\"a\",direction=\"input\"} 3",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

#[test]
fn the_buckets_of_a_histogram_include_those_before_them() {
    let text = metrics(None).to_prometheus();
    let labels = "device=\"disk 0\",kind=\"read\"";
    let name = format!("kiln_block_latency_seconds_bucket{{{labels},le=\"");
    let buckets: Vec<(&str, u64)> = text
        .lines()
        .filter_map(|line| line.strip_prefix(&name)?.split_once("\"} "))
        .map(|(bound, count)| (bound, count.parse().unwrap()))
        .collect();
    assert_eq!(buckets.len(), 27);
    assert_eq!(buckets[..2], [("0.000000256", 2), ("0.000000512", 3)]);
    assert_eq!(
        buckets[24..],
        [("4.294967296", 4), ("8.589934592", 4), ("+Inf", 5)]
    );
    for (what, value) in [("sum", "12.000000613"), ("count", "5")] {
        let line = format!("kiln_block_latency_seconds_{what}{{{labels}}} {value}\n");
        assert!(text.contains(&line), "{line}");
    }
}

#[test]
fn a_name_cannot_break_out_of_its_label() {
    let mut metrics = metrics(Some("a\"} 1\n\\"));
    metrics.devices.clear();
    let text = metrics.to_prometheus();
    let line = "kiln_vm_uptime_seconds{vm=\"a\\\"} 1\\n\\\\\"} 1.5";
    assert!(text.lines().any(|found| found == line), "{text}");
    // What no machine has is not there at all.
    assert!(!text.contains("kiln_device"), "{text}");
}

#[test]
fn a_sample_without_labels_has_no_braces() {
    let text = metrics(None).to_prometheus();
    assert!(text.contains("\nkiln_vm_uptime_seconds 1.5\n"), "{text}");
}

#[test]
fn the_documentation_names_every_family_and_no_other() {
    let text = metrics(None).to_prometheus();
    let families = text.lines().filter_map(|line| {
        let (name, kind) = line.strip_prefix("# TYPE ")?.split_once(' ')?;
        Some(format!("{name} {kind}"))
    });
    let documentation = include_str!("../../../docs/metrics.md");
    let documented = documentation.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `kiln_")?.split('|').map(str::trim);
        let (name, kind) = (cells.next()?.trim_end_matches('`'), cells.next()?);
        Some(format!("kiln_{name} {kind}"))
    });
    let families: BTreeSet<_> = families.collect();
    assert_eq!(documented.collect::<BTreeSet<_>>(), families);
    assert!(families.len() > 10);
}
