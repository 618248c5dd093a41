//! What a machine has done, as plain values.
//!
//! [`VmHandle::metrics`](crate::VmHandle::metrics) reads a machine's counters at any time: nothing
//! is stopped and nothing waits, so values that belong together may be a few events apart. All of
//! them count from the machine's start (or from the making of its devices), never go back, and stay
//! readable after its end. Times are in nanoseconds, sizes in bytes.
//!
//! A [`Metrics`] can be serialized with serde, and written in the text format of Prometheus with
//! [`Metrics::to_prometheus`]. `docs/metrics.md` has the names there.
//!
//! | module | what lives there |
//! |---|---|
//! | `mod` | [`Metrics`] and its parts |
//! | `source` | the counters of a machine, and their reading |
//! | `prometheus` | the text format |
//!
//! ```
//! use kiln_vmm::{Kernel, MemorySize, VmBuilder};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # if !std::path::Path::new("/dev/kvm").exists() { return Ok(()); }
//! // S5 to the ACPI sleep control register: power off.
//! let code = [0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee];
//! let vm = VmBuilder::new()
//!     .name("short")
//!     .memory(MemorySize::mib(16))
//!     .kernel(Kernel::from_code(&code)?)
//!     .build()?;
//! let handle = vm.start()?;
//! handle.wait()?;
//! let metrics = handle.metrics();
//! assert_eq!(metrics.vcpus[0].exits.pio_out, 1);
//! let line = "kiln_vcpu_exits_total{vm=\"short\",vcpu=\"0\",kind=\"pio_out\"} 1\n";
//! assert!(metrics.to_prometheus().contains(line));
//! # Ok(())
//! # }
//! ```

mod prometheus;
mod source;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::{ExitCounts, VmState};

pub(crate) use source::{CountedDevices, MetricsSource, Work};

/// What a machine has done so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Metrics {
    /// The machine's name, where it was given one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether the guest runs.
    pub state: VmState,
    /// How long ago the machine was started, in nanoseconds; from its end on, how long it lived.
    /// Pauses count.
    pub uptime_ns: u64,
    /// The vCPUs, in the order of their numbers.
    pub vcpus: Vec<VcpuMetrics>,
    /// The serial port.
    pub serial: SerialMetrics,
    /// The virtio devices: disks, networks, the socket device, and the embedder's own.
    pub devices: Vec<DeviceMetrics>,
}

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct VcpuMetrics {
    /// How often it came out of the guest, by kind.
    pub exits: ExitCounts,
}

/// The serial port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SerialMetrics {
    /// Bytes that the guest sent.
    pub output_bytes: u64,
    /// Bytes of these that the console did not take.
    pub dropped_bytes: u64,
    /// Bytes that were read from the console for the guest.
    pub input_bytes: u64,
}

/// One virtio device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DeviceMetrics {
    /// The name that messages give it, such as `disk 0`. A second device of a name has ` (2)`
    /// behind it, and so on.
    pub name: String,
    /// Its queues, in the order of their indices.
    pub queues: Vec<QueueMetrics>,
    /// Interrupts sent because its configuration has changed.
    pub config_interrupts: u64,
    /// How often it asked for a reset by its driver, for a mistake of the driver or of its own.
    pub needs_reset: u64,
    /// What it did as a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<BlockMetrics>,
    /// What it did as a network interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<NetMetrics>,
    /// What it did as a socket device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockMetrics>,
    /// What it did as a memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonMetrics>,
}

/// One queue of a virtio device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct QueueMetrics {
    /// Requests completed: descriptor chains given back to the driver.
    pub requests: u64,
    /// Bytes that these requests had for the device to read.
    pub bytes_from_driver: u64,
    /// Bytes that the device wrote to these requests.
    pub bytes_to_driver: u64,
    /// Interrupts sent because of completed requests.
    pub interrupts: u64,
}

/// A disk. Requests that failed are counted as errors, and nowhere else but in the latencies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BlockMetrics {
    /// Reads.
    pub reads: u64,
    /// The bytes that they read.
    pub read_bytes: u64,
    /// Writes.
    pub writes: u64,
    /// The bytes that they wrote.
    pub write_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Requests to discard.
    #[serde(default)]
    pub discards: u64,
    /// The bytes that they discarded.
    #[serde(default)]
    pub discard_bytes: u64,
    /// Requests to write zeros.
    #[serde(default)]
    pub write_zeroes: u64,
    /// The bytes that they wrote.
    #[serde(default)]
    pub write_zeroes_bytes: u64,
    /// Requests for the disk's identification.
    pub ids: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Reads that had to wait for a limit.
    #[serde(default)]
    pub reads_throttled: u64,
    /// The same for writes, and for all other requests.
    #[serde(default)]
    pub writes_throttled: u64,
    /// How long what is behind the disk took for each read.
    pub read_latency: LatencyMetrics,
    /// The same for each write.
    pub write_latency: LatencyMetrics,
    /// The same for each flush, those included that writes need where they are to last at once.
    pub flush_latency: LatencyMetrics,
    /// The same for each request to discard.
    #[serde(default)]
    pub discard_latency: LatencyMetrics,
    /// The same for each request to write zeros.
    #[serde(default)]
    pub write_zeroes_latency: LatencyMetrics,
}

/// A network interface. Bytes are those of frames; what it received is what the guest received.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NetMetrics {
    /// Packets given to the driver.
    pub rx_packets: u64,
    /// The bytes of these.
    pub rx_bytes: u64,
    /// Packets that were too large or too small for the driver.
    pub rx_dropped: u64,
    /// Errors of the network, and buffers of the driver of no use.
    pub rx_errors: u64,
    /// Packets that the guest does not want: its filters are against them, or the link is down.
    #[serde(default)]
    pub rx_filtered: u64,
    /// Packets that the network took.
    pub tx_packets: u64,
    /// The bytes of these.
    pub tx_bytes: u64,
    /// Packets that the network did not take.
    pub tx_dropped: u64,
    /// How often receiving had to wait for a limit.
    #[serde(default)]
    pub rx_throttled: u64,
    /// How often a packet to be sent had to.
    #[serde(default)]
    pub tx_throttled: u64,
}

/// A socket device. What it received is what the guest received.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct VsockMetrics {
    /// Connections there are now, in whatever state.
    pub open: u64,
    /// Connections that the host asked for and the guest accepted.
    pub from_host: u64,
    /// Connections that the guest asked for and a program of the host took.
    pub from_guest: u64,
    /// Clients and requests of the guest that got no connection.
    pub refused: u64,
    /// Resets sent to the driver, the answers to its own ends of connections among them.
    pub resets: u64,
    /// Packets given to the driver.
    pub rx_packets: u64,
    /// The bytes of data in these.
    pub rx_bytes: u64,
    /// Buffers of the driver that were too short for a packet.
    pub rx_errors: u64,
    /// Packets that the driver sent.
    pub tx_packets: u64,
    /// The bytes of data in these that were passed on.
    pub tx_bytes: u64,
    /// What the driver sent that was no packet of this guest.
    pub tx_dropped: u64,
}

/// A memory balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BalloonMetrics {
    /// The guest's RAM that is to be in the balloon.
    pub target_bytes: u64,
    /// The guest's RAM that is in the balloon, as its driver says.
    pub actual_bytes: u64,
    /// Bytes that the driver put into the balloon, and that were given back to the host.
    pub inflated_bytes: u64,
    /// Bytes that the driver took out of the balloon.
    pub deflated_bytes: u64,
    /// Bytes that the driver reported as free, and that were given back to the host.
    pub reported_bytes: u64,
    /// How often the host did not take memory back.
    pub failures: u64,
}

/// A histogram of durations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LatencyMetrics {
    /// How many there were: the sum of all buckets.
    pub count: u64,
    /// How long they were together, in nanoseconds.
    pub sum_ns: u64,
    /// The buckets, from the shortest durations to the longest. Each has its own durations alone.
    pub buckets: Vec<LatencyBucket>,
}

/// A bucket of a histogram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LatencyBucket {
    /// The longest duration that belongs to it, in nanoseconds; the last bucket has no bound.
    pub up_to_ns: Option<u64>,
    /// How many durations belong to it.
    pub count: u64,
}

impl Metrics {
    /// The metrics in the text format of Prometheus (version 0.0.4). The label `vm` is the
    /// machine's name, and is left out where it has none.
    #[must_use]
    pub fn to_prometheus(&self) -> String {
        Self::all_to_prometheus(std::slice::from_ref(self))
    }

    /// The metrics of several machines in one text. They are told apart by their names, so each
    /// needs one of its own.
    #[must_use]
    pub fn all_to_prometheus(machines: &[Self]) -> String {
        prometheus::text(machines)
    }
}
