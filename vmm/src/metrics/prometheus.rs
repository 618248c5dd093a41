//! Metrics in the text format of Prometheus, version 0.0.4: a family's help and type, then all its
//! samples, whatever machine they are of.

use std::fmt::Write;

use super::{
    BalloonMetrics, BlockMetrics, DeviceMetrics, LatencyMetrics, Metrics, NetMetrics, QueueMetrics,
    VsockMetrics,
};
use crate::VmState;

const COUNTER: &str = "counter";
const GAUGE: &str = "gauge";
const HISTOGRAM: &str = "histogram";

const STATES: [(VmState, &str); 3] = [
    (VmState::Running, "running"),
    (VmState::Paused, "paused"),
    (VmState::Ended, "ended"),
];

/// All families, in their order.
pub(super) fn text(machines: &[Metrics]) -> String {
    let mut text = Text {
        machines,
        out: String::new(),
    };
    machine_families(&mut text);
    device_families(&mut text);
    block_families(&mut text);
    net_families(&mut text);
    vsock_families(&mut text);
    balloon_families(&mut text);
    serial_families(&mut text);
    text.out
}

fn machine_families(text: &mut Text<'_>) {
    let help = "1 for the state that the machine is in, 0 for the others.";
    text.family("kiln_vm_state", GAUGE, help, |vm, samples| {
        for (state, name) in STATES {
            samples.add(&[("state", name)], u64::from(vm.state == state));
        }
    });
    let help = "Time since the machine's start, or from its start to its end.";
    text.family("kiln_vm_uptime_seconds", GAUGE, help, |vm, samples| {
        samples.add(&[], seconds(vm.uptime_ns));
    });
    let help = "Times that a vCPU came out of the guest.";
    text.family("kiln_vcpu_exits_total", COUNTER, help, |vm, samples| {
        for (index, vcpu) in vm.vcpus.iter().enumerate() {
            for (kind, count) in vcpu.exits.by_kind() {
                samples.add(&[("vcpu", &index.to_string()), ("kind", kind)], count);
            }
        }
    });
}

fn device_families(text: &mut Text<'_>) {
    let help = "Requests that a device completed.";
    text.family(
        "kiln_device_requests_total",
        COUNTER,
        help,
        |vm, samples| {
            each_queue(vm, |device, queue, of| {
                samples.add(&[("device", device), ("queue", queue)], of.requests);
            });
        },
    );
    let help = "Bytes that completed requests had for the device, and got from it.";
    text.family("kiln_device_bytes_total", COUNTER, help, |vm, samples| {
        each_queue(vm, |device, queue, of| {
            for (direction, bytes) in [
                ("from_driver", of.bytes_from_driver),
                ("to_driver", of.bytes_to_driver),
            ] {
                let labels = [
                    ("device", device),
                    ("queue", queue),
                    ("direction", direction),
                ];
                samples.add(&labels, bytes);
            }
        });
    });
    let help = "Interrupts that a device sent because of completed requests.";
    text.family(
        "kiln_device_interrupts_total",
        COUNTER,
        help,
        |vm, samples| {
            each_queue(vm, |device, queue, of| {
                samples.add(&[("device", device), ("queue", queue)], of.interrupts);
            });
        },
    );
    let help = "Interrupts that a device sent because its configuration has changed.";
    let name = "kiln_device_config_interrupts_total";
    text.devices(name, help, |device| Some(device.config_interrupts));
    let help = "Times that a device asked for a reset by its driver.";
    let name = "kiln_device_needs_reset_total";
    text.devices(name, help, |device| Some(device.needs_reset));
}

fn block_families(text: &mut Text<'_>) {
    let disks = |vm: &Metrics, each: &mut dyn FnMut(&str, &BlockMetrics)| {
        for device in &vm.devices {
            if let Some(block) = &device.block {
                each(&device.name, block);
            }
        }
    };
    let help = "Requests that a disk served.";
    text.family("kiln_block_requests_total", COUNTER, help, |vm, samples| {
        disks(vm, &mut |device, of| {
            for (kind, count) in [
                ("read", of.reads),
                ("write", of.writes),
                ("flush", of.flushes),
                ("discard", of.discards),
                ("write_zeroes", of.write_zeroes),
                ("id", of.ids),
            ] {
                samples.add(&[("device", device), ("kind", kind)], count);
            }
        });
    });
    let help = "Bytes of a disk that were read, written, discarded and made zero.";
    text.family("kiln_block_bytes_total", COUNTER, help, |vm, samples| {
        disks(vm, &mut |device, of| {
            for (kind, bytes) in [
                ("read", of.read_bytes),
                ("write", of.write_bytes),
                ("discard", of.discard_bytes),
                ("write_zeroes", of.write_zeroes_bytes),
            ] {
                samples.add(&[("device", device), ("kind", kind)], bytes);
            }
        });
    });
    let help = "Requests to a disk that had to wait for a limit.";
    text.family(
        "kiln_block_throttled_total",
        COUNTER,
        help,
        |vm, samples| {
            disks(vm, &mut |device, of| {
                for (kind, count) in [("read", of.reads_throttled), ("write", of.writes_throttled)]
                {
                    samples.add(&[("device", device), ("kind", kind)], count);
                }
            });
        },
    );
    let help = "Requests to a disk that failed.";
    text.devices("kiln_block_errors_total", help, |device| {
        device.block.as_ref().map(|block| block.errors)
    });
    let help = "Time that what is behind a disk took for a request.";
    text.family(
        "kiln_block_latency_seconds",
        HISTOGRAM,
        help,
        |vm, samples| {
            disks(vm, &mut |device, of| {
                for (kind, latency) in [
                    ("read", &of.read_latency),
                    ("write", &of.write_latency),
                    ("flush", &of.flush_latency),
                    ("discard", &of.discard_latency),
                    ("write_zeroes", &of.write_zeroes_latency),
                ] {
                    samples.histogram(&[("device", device), ("kind", kind)], latency);
                }
            });
        },
    );
}

fn net_families(text: &mut Text<'_>) {
    let mut both_ways = |name, help, values: fn(&NetMetrics) -> [u64; 2]| {
        text.family(name, COUNTER, help, |vm, samples| {
            for device in &vm.devices {
                let values = device.net.as_ref().map(values);
                for (direction, value) in ["rx", "tx"].into_iter().zip(values.into_iter().flatten())
                {
                    samples.add(&[("device", &device.name), ("direction", direction)], value);
                }
            }
        });
    };
    let help = "Packets that the guest received (rx) and sent (tx).";
    both_ways("kiln_net_packets_total", help, |net| {
        [net.rx_packets, net.tx_packets]
    });
    let help = "Bytes of the frames that the guest received and sent.";
    both_ways("kiln_net_bytes_total", help, |net| {
        [net.rx_bytes, net.tx_bytes]
    });
    let help = "Packets that did not fit the driver, and that the network did not take.";
    both_ways("kiln_net_dropped_packets_total", help, |net| {
        [net.rx_dropped, net.tx_dropped]
    });
    let help = "Times that receiving and sending had to wait for a limit.";
    both_ways("kiln_net_throttled_total", help, |net| {
        [net.rx_throttled, net.tx_throttled]
    });
    let help = "Errors of a network, and useless buffers of its driver.";
    text.devices("kiln_net_errors_total", help, |device| {
        device.net.as_ref().map(|net| net.rx_errors)
    });
    let help = "Packets that the guest does not want, or that came while the link was down.";
    text.devices("kiln_net_filtered_packets_total", help, |device| {
        device.net.as_ref().map(|net| net.rx_filtered)
    });
}

fn vsock_families(text: &mut Text<'_>) {
    let vsocks = |vm: &Metrics, each: &mut dyn FnMut(&str, &VsockMetrics)| {
        for device in &vm.devices {
            if let Some(vsock) = &device.vsock {
                each(&device.name, vsock);
            }
        }
    };
    let help = "Connections of a socket device, in whatever state.";
    text.family("kiln_vsock_open", GAUGE, help, |vm, samples| {
        vsocks(vm, &mut |device, of| {
            samples.add(&[("device", device)], of.open);
        });
    });
    let mut pairs = |name, help, label, values: fn(&VsockMetrics) -> [(&'static str, u64); 2]| {
        text.family(name, COUNTER, help, |vm, samples| {
            vsocks(vm, &mut |device, of| {
                for (kind, value) in values(of) {
                    samples.add(&[("device", device), (label, kind)], value);
                }
            });
        });
    };
    let help = "Connections that were made, by who asked for them.";
    pairs("kiln_vsock_connections_total", help, "from", |of| {
        [("host", of.from_host), ("guest", of.from_guest)]
    });
    let help = "Packets that the guest received (rx) and sent (tx).";
    pairs("kiln_vsock_packets_total", help, "direction", |of| {
        [("rx", of.rx_packets), ("tx", of.tx_packets)]
    });
    let help = "Bytes of data that the guest received and sent.";
    pairs("kiln_vsock_bytes_total", help, "direction", |of| {
        [("rx", of.rx_bytes), ("tx", of.tx_bytes)]
    });
    let help = "Useless buffers of the driver, and packets of it that are none.";
    pairs("kiln_vsock_errors_total", help, "direction", |of| {
        [("rx", of.rx_errors), ("tx", of.tx_dropped)]
    });
    let help = "Connections that somebody asked for and did not get.";
    text.devices("kiln_vsock_refused_total", help, |device| {
        device.vsock.as_ref().map(|vsock| vsock.refused)
    });
    let help = "Resets of connections that were sent to the driver.";
    text.devices("kiln_vsock_resets_total", help, |device| {
        device.vsock.as_ref().map(|vsock| vsock.resets)
    });
}

fn balloon_families(text: &mut Text<'_>) {
    let mut each = |name, kind, help, value: fn(&BalloonMetrics) -> u64| {
        text.family(name, kind, help, |vm, samples| {
            for device in &vm.devices {
                if let Some(balloon) = &device.balloon {
                    samples.add(&[("device", &device.name)], value(balloon));
                }
            }
        });
    };
    let help = "RAM of the guest that is to be in the balloon.";
    each("kiln_balloon_target_bytes", GAUGE, help, |of| {
        of.target_bytes
    });
    let help = "RAM of the guest that is in the balloon, as its driver says.";
    each("kiln_balloon_actual_bytes", GAUGE, help, |of| {
        of.actual_bytes
    });
    let help = "Bytes that came into the balloon, and were given back to the host.";
    each("kiln_balloon_inflated_bytes_total", COUNTER, help, |of| {
        of.inflated_bytes
    });
    let help = "Bytes that the driver took out of the balloon.";
    each("kiln_balloon_deflated_bytes_total", COUNTER, help, |of| {
        of.deflated_bytes
    });
    let help = "Bytes that were reported as free, and given back to the host.";
    each("kiln_balloon_reported_bytes_total", COUNTER, help, |of| {
        of.reported_bytes
    });
    let help = "Times that the host did not take memory back.";
    each("kiln_balloon_failures_total", COUNTER, help, |of| {
        of.failures
    });
}

fn serial_families(text: &mut Text<'_>) {
    let help = "Bytes that the guest sent on its serial port (output) and was given (input).";
    text.family("kiln_serial_bytes_total", COUNTER, help, |vm, samples| {
        samples.add(&[("direction", "output")], vm.serial.output_bytes);
        samples.add(&[("direction", "input")], vm.serial.input_bytes);
    });
    let help = "Bytes that the guest sent on its serial port and the console did not take.";
    text.family(
        "kiln_serial_dropped_bytes_total",
        COUNTER,
        help,
        |vm, samples| {
            samples.add(&[], vm.serial.dropped_bytes);
        },
    );
}

fn each_queue(vm: &Metrics, mut each: impl FnMut(&str, &str, &QueueMetrics)) {
    for device in &vm.devices {
        for (index, queue) in device.queues.iter().enumerate() {
            each(&device.name, &index.to_string(), queue);
        }
    }
}

struct Text<'a> {
    machines: &'a [Metrics],
    out: String,
}

impl Text<'_> {
    /// Writes a family, if any machine has a sample of it.
    fn family(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        mut each: impl FnMut(&Metrics, &mut Samples<'_>),
    ) {
        let mut lines = String::new();
        for vm in self.machines {
            let vm_name = vm.name.as_deref();
            let mut samples = Samples {
                name,
                vm: vm_name,
                lines: &mut lines,
            };
            each(vm, &mut samples);
        }
        if !lines.is_empty() {
            // A write to a string does not fail.
            let _ = write!(
                self.out,
                "# HELP {name} {help}\n# TYPE {name} {kind}\n{lines}"
            );
        }
    }

    /// Writes a family of counters with one sample for each device that has it.
    fn devices(&mut self, name: &str, help: &str, value: impl Fn(&DeviceMetrics) -> Option<u64>) {
        self.family(name, COUNTER, help, |vm, samples| {
            for device in &vm.devices {
                if let Some(value) = value(device) {
                    samples.add(&[("device", &device.name)], value);
                }
            }
        });
    }
}

/// The samples of one machine in a family.
struct Samples<'a> {
    name: &'a str,
    vm: Option<&'a str>,
    lines: &'a mut String,
}

impl Samples<'_> {
    fn add(&mut self, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.sample("", labels, value);
    }

    /// Buckets that each include those before them, then sum and count.
    fn histogram(&mut self, labels: &[(&str, &str)], latency: &LatencyMetrics) {
        let mut so_far = 0;
        for bucket in &latency.buckets {
            so_far += bucket.count;
            let bound = bucket.up_to_ns.map_or_else(|| "+Inf".to_owned(), seconds);
            let labels = [labels, &[("le", &bound)]].concat();
            self.sample("_bucket", &labels, so_far);
        }
        self.sample("_sum", labels, seconds(latency.sum_ns));
        self.sample("_count", labels, latency.count);
    }

    fn sample(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.lines.push_str(self.name);
        self.lines.push_str(suffix);
        let vm = self.vm.map(|name| ("vm", name));
        let mut before = '{';
        for (label, value) in vm.iter().chain(labels) {
            let _ = write!(self.lines, "{before}{label}=\"{}\"", escaped(value));
            before = ',';
        }
        if before == ',' {
            self.lines.push('}');
        }
        let _ = writeln!(self.lines, " {value}");
    }
}

/// A label's value as it stands between quotes.
fn escaped(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for character in value.chars() {
        match character {
            '\\' => escaped.push_str("\\\\"),
            '"' => escaped.push_str("\\\""),
            '\n' => escaped.push_str("\\n"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// Nanoseconds in seconds, exactly.
fn seconds(nanos: u64) -> String {
    let (whole, rest) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
    if rest == 0 {
        return whole.to_string();
    }
    let digits = format!("{rest:09}");
    format!("{whole}.{}", digits.trim_end_matches('0'))
}
