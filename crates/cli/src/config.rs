//! From arguments, and the file that they may name, to the description of a machine.

use anyhow::{Error, bail};
use kiln_vmm::config::{
    BootProtocolConfig, ConsolePortConfig, RateLimitConfig, RngConfig, SerialConfig, VmConfig,
    VsockConfig,
};

use crate::args::{ConsoleArg, Protocol, RngArg, Run, SerialArg, VirtioPortArg, VsockArg};

/// What the file says, or the defaults where there is none, with the arguments put over it.
pub(crate) fn from_args(args: Run) -> Result<VmConfig, Error> {
    let mut config = match &args.config {
        Some(path) => VmConfig::open(path)?,
        None => VmConfig::default(),
    };
    config.kernel = args.kernel.or(config.kernel);
    if let (None, Some(path)) = (&config.kernel, &args.config) {
        bail!(
            "configuration `{}` names no kernel: add a `kernel` to it, or give --kernel FILE",
            path.display()
        );
    }
    config.name = args.name.or(config.name);
    config.initrd = args.initrd.or(config.initrd);
    set(&mut config.cmdline, args.cmdline);
    set(&mut config.kernel_decompressor, args.kernel_decompressor);
    set(&mut config.boot_protocol, args.boot_protocol);
    set(&mut config.vcpus, args.cpus);
    set(&mut config.memory, args.memory);
    set(&mut config.transport, args.transport);
    set(&mut config.io_threads, args.io_threads);
    config.io_affinity = args.io_affinity.or(config.io_affinity);
    if !args.disk.is_empty() {
        config.disks = args.disk.into_iter().map(|disk| disk.0).collect();
    }
    if !args.net.is_empty() {
        config.nets = args.net.into_iter().map(|net| net.0).collect();
    }
    if let Some(vsock) = args.vsock {
        config.vsock = Some(vsock.into());
    }
    config.rng = args.rng.map(RngConfig::from).or(config.rng);
    config.balloon = args.balloon.map(|balloon| balloon.0).or(config.balloon);
    set_consoles(&mut config, args.console, args.serial, args.virtio_port);
    Ok(config)
}

/// Who has the standard input and output, where it is not said: the virtio console if that was asked
/// for, else the serial port.
fn set_consoles(
    config: &mut VmConfig,
    console: Option<ConsoleArg>,
    serial: Option<SerialArg>,
    ports: Vec<VirtioPortArg>,
) {
    let stdio = Some(SerialConfig::Stdio);
    match console {
        None => {}
        Some(ConsoleArg::Serial) => {
            config.serial = stdio.clone();
            if let Some(console) = config
                .console
                .as_mut()
                .filter(|console| console.to == stdio)
            {
                console.to = None;
            }
        }
        Some(ConsoleArg::Virtio { to, transport }) => {
            let console = config.console.get_or_insert_default();
            console.to = Some(to.into());
            console.transport = transport.or(console.transport);
            if console.to == stdio && config.serial == stdio {
                config.serial = None;
            }
        }
    }
    if !ports.is_empty() {
        let ports = ports.into_iter().map(ConsolePortConfig::from);
        config.console.get_or_insert_default().ports = ports.collect();
    }
    let taken = config
        .console
        .as_ref()
        .is_some_and(|console| console.to == stdio);
    let default = if taken {
        SerialConfig::Null
    } else {
        SerialConfig::Stdio
    };
    let serial = serial.map(SerialConfig::from).or(config.serial.take());
    config.serial = serial.or(Some(default));
}

fn set<T>(value: &mut T, given: Option<impl Into<T>>) {
    if let Some(given) = given {
        *value = given.into();
    }
}

impl From<Protocol> for BootProtocolConfig {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Auto => Self::Auto,
            Protocol::Linux64 => Self::Linux64,
            Protocol::Pvh => Self::Pvh,
        }
    }
}

impl From<VsockArg> for VsockConfig {
    fn from(vsock: VsockArg) -> Self {
        Self {
            cid: vsock.cid,
            socket: vsock.socket,
            transport: vsock.transport,
        }
    }
}

impl From<RngArg> for RngConfig {
    fn from(rng: RngArg) -> Self {
        let limit = |per_second| RateLimitConfig {
            per_second,
            burst: rng.burst,
        };
        Self {
            rate_limit: rng.rate.map(limit),
            transport: rng.transport,
        }
    }
}

impl From<VirtioPortArg> for ConsolePortConfig {
    fn from(port: VirtioPortArg) -> Self {
        Self {
            name: port.name,
            socket: port.socket,
        }
    }
}

impl From<SerialArg> for SerialConfig {
    fn from(serial: SerialArg) -> Self {
        match serial {
            SerialArg::Stdio => Self::Stdio,
            SerialArg::Null => Self::Null,
            SerialArg::File(path) => Self::File(path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_vmm::config::VirtioConsoleConfig;

    /// Who has the standard input and output, by what a file and the arguments say.
    fn consoles(
        file: (Option<SerialConfig>, Option<SerialConfig>),
        console: Option<&str>,
        serial: Option<SerialArg>,
    ) -> (Option<SerialConfig>, Option<SerialConfig>) {
        let mut config = VmConfig {
            serial: file.0,
            console: file.1.map(|to| VirtioConsoleConfig {
                to: Some(to),
                ..VirtioConsoleConfig::default()
            }),
            ..VmConfig::default()
        };
        let console = console.map(|text| text.parse().unwrap());
        set_consoles(&mut config, console, serial, Vec::new());
        (config.serial, config.console.and_then(|console| console.to))
    }

    #[test]
    fn the_standard_input_and_output_are_where_they_are_asked_for() {
        let stdio = || Some(SerialConfig::Stdio);
        let null = || Some(SerialConfig::Null);
        assert_eq!(consoles((None, None), None, None), (stdio(), None));
        assert_eq!(consoles((null(), None), None, None), (null(), None));
        assert_eq!(consoles((None, stdio()), None, None), (null(), stdio()));
        let virtio = Some("virtio");
        assert_eq!(consoles((None, None), virtio, None), (null(), stdio()));
        assert_eq!(consoles((stdio(), null()), virtio, None), (null(), stdio()));
        let serial = Some("serial");
        assert_eq!(consoles((None, stdio()), serial, None), (stdio(), None));
        assert_eq!(consoles((null(), null()), serial, None), (stdio(), null()));
        // What is said of both is taken as it is said, and refused later.
        let both = consoles((None, None), virtio, Some(SerialArg::Stdio));
        assert_eq!(both, (stdio(), stdio()));
        let elsewhere = consoles((None, None), Some("virtio,null"), None);
        assert_eq!(elsewhere, (stdio(), null()));
    }
}
