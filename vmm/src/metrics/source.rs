//! The counters of a machine, and their reading.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kiln_devices::legacy::serial::SerialCounters;
use kiln_devices::virtio::LatencyHistogram;
use kiln_devices::virtio::balloon::BalloonControl;
use kiln_devices::virtio::block::BlockControl;
use kiln_devices::virtio::net::NetCounters;
use kiln_devices::virtio::vsock::VsockCounters;
use kiln_virtio_device::{DeviceCounters, QueueCounters};

use super::{
    BalloonMetrics, BlockMetrics, DeviceMetrics, LatencyBucket, LatencyMetrics, Metrics,
    NetMetrics, QueueMetrics, SerialMetrics, VcpuMetrics, VsockMetrics,
};
use crate::{ExitCounts, VmState};

/// What a device counts because of what it is.
pub(crate) enum Work {
    Block(BlockControl),
    Net(Arc<NetCounters>),
    Vsock(Arc<VsockCounters>),
    Balloon(BalloonControl),
    /// Nothing.
    Other,
}

struct Device {
    name: String,
    counters: Arc<DeviceCounters>,
    work: Work,
}

/// The devices of a machine that is being wired.
#[derive(Default)]
pub(crate) struct CountedDevices(Vec<Device>);

impl CountedDevices {
    pub(crate) fn add(&mut self, name: &str, counters: Arc<DeviceCounters>, work: Work) {
        let mut unique = name.to_owned();
        let mut number = 2_u32;
        while self.0.iter().any(|device| device.name == unique) {
            unique = format!("{name} ({number})");
            number += 1;
        }
        self.0.push(Device {
            name: unique,
            counters,
            work,
        });
    }
}

/// The counters of a machine. They are read without a lock, whatever the machine is at.
pub(crate) struct MetricsSource {
    name: Option<String>,
    started: OnceLock<Instant>,
    /// How long it lived.
    ended: OnceLock<Duration>,
    serial: Arc<SerialCounters>,
    devices: Vec<Device>,
}

impl MetricsSource {
    pub(crate) fn new(
        name: Option<String>,
        serial: Arc<SerialCounters>,
        devices: CountedDevices,
    ) -> Self {
        Self {
            name,
            started: OnceLock::new(),
            ended: OnceLock::new(),
            serial,
            devices: devices.0,
        }
    }

    /// The machine is started.
    pub(crate) fn start(&self) {
        let _ = self.started.set(Instant::now());
    }

    /// The machine has ended.
    pub(crate) fn end(&self) {
        let _ = self.ended.set(self.uptime());
    }

    fn uptime(&self) -> Duration {
        match self.ended.get() {
            Some(lived) => *lived,
            None => self.started.get().map_or(Duration::ZERO, Instant::elapsed),
        }
    }

    pub(crate) fn read(&self, state: VmState, exits: Vec<ExitCounts>) -> Metrics {
        let vcpus = exits.into_iter().map(|exits| VcpuMetrics { exits });
        Metrics {
            name: self.name.clone(),
            state,
            uptime_ns: u64::try_from(self.uptime().as_nanos()).unwrap_or(u64::MAX),
            vcpus: vcpus.collect(),
            serial: serial(&self.serial),
            devices: self.devices.iter().map(device).collect(),
        }
    }
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn serial(from: &SerialCounters) -> SerialMetrics {
    SerialMetrics {
        output_bytes: get(&from.output_bytes),
        dropped_bytes: get(&from.dropped_bytes),
        input_bytes: get(&from.input_bytes),
    }
}

fn device(from: &Device) -> DeviceMetrics {
    let counters = &from.counters;
    let mut metrics = DeviceMetrics {
        name: from.name.clone(),
        queues: counters.queues.iter().map(|one| queue(one)).collect(),
        config_interrupts: get(&counters.config_interrupts),
        needs_reset: get(&counters.needs_reset),
        block: None,
        net: None,
        vsock: None,
        balloon: None,
    };
    match &from.work {
        Work::Block(control) => metrics.block = Some(block(control)),
        Work::Net(counters) => metrics.net = Some(net(counters)),
        Work::Vsock(counters) => metrics.vsock = Some(vsock(counters)),
        Work::Balloon(control) => metrics.balloon = Some(balloon(control)),
        Work::Other => {}
    }
    metrics
}

fn queue(from: &QueueCounters) -> QueueMetrics {
    QueueMetrics {
        requests: get(&from.requests),
        bytes_from_driver: get(&from.bytes_from_driver),
        bytes_to_driver: get(&from.bytes_to_driver),
        interrupts: get(&from.interrupts),
    }
}

fn block(from: &BlockControl) -> BlockMetrics {
    let from = from.counters();
    BlockMetrics {
        reads: get(&from.reads),
        read_bytes: get(&from.read_bytes),
        writes: get(&from.writes),
        write_bytes: get(&from.write_bytes),
        flushes: get(&from.flushes),
        discards: get(&from.discards),
        discard_bytes: get(&from.discard_bytes),
        write_zeroes: get(&from.write_zeroes),
        write_zeroes_bytes: get(&from.write_zeroes_bytes),
        ids: get(&from.ids),
        errors: get(&from.errors),
        reads_throttled: get(&from.reads_throttled),
        writes_throttled: get(&from.writes_throttled),
        read_latency: latency(&from.read_latency),
        write_latency: latency(&from.write_latency),
        flush_latency: latency(&from.flush_latency),
        discard_latency: latency(&from.discard_latency),
        write_zeroes_latency: latency(&from.write_zeroes_latency),
    }
}

fn net(from: &NetCounters) -> NetMetrics {
    NetMetrics {
        rx_packets: get(&from.rx_packets),
        rx_bytes: get(&from.rx_bytes),
        rx_dropped: get(&from.rx_dropped),
        rx_errors: get(&from.rx_errors),
        rx_filtered: get(&from.rx_filtered),
        tx_packets: get(&from.tx_packets),
        tx_bytes: get(&from.tx_bytes),
        tx_dropped: get(&from.tx_dropped),
        rx_throttled: get(&from.rx_throttled),
        tx_throttled: get(&from.tx_throttled),
    }
}

fn vsock(from: &VsockCounters) -> VsockMetrics {
    VsockMetrics {
        open: get(&from.open),
        from_host: get(&from.from_host),
        from_guest: get(&from.from_guest),
        refused: get(&from.refused),
        resets: get(&from.resets),
        rx_packets: get(&from.rx_packets),
        rx_bytes: get(&from.rx_bytes),
        rx_errors: get(&from.rx_errors),
        tx_packets: get(&from.tx_packets),
        tx_bytes: get(&from.tx_bytes),
        tx_dropped: get(&from.tx_dropped),
    }
}

fn balloon(from: &BalloonControl) -> BalloonMetrics {
    let counters = from.counters();
    BalloonMetrics {
        target_bytes: from.target().as_bytes(),
        actual_bytes: from.actual().as_bytes(),
        inflated_bytes: get(&counters.inflated_bytes),
        deflated_bytes: get(&counters.deflated_bytes),
        reported_bytes: get(&counters.reported_bytes),
        failures: get(&counters.failures),
    }
}

fn latency(from: &LatencyHistogram) -> LatencyMetrics {
    let snapshot = from.snapshot();
    let buckets = snapshot.buckets.into_iter();
    let buckets: Vec<_> = buckets
        .map(|(up_to_ns, count)| LatencyBucket { up_to_ns, count })
        .collect();
    LatencyMetrics {
        count: buckets.iter().map(|bucket| bucket.count).sum(),
        sum_ns: snapshot.sum_ns,
        buckets,
    }
}
