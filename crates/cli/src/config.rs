//! From arguments, and the file that they may name, to the description of a machine.

use anyhow::{Error, bail};
use kiln_vmm::config::{
    BootProtocolConfig, DiskConfig, NetConfig, RateLimitConfig, RngConfig, SerialConfig, VmConfig,
    VsockConfig,
};

use crate::args::{DiskArg, NetArg, Protocol, RngArg, Run, SerialArg, VsockArg};

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
    set(&mut config.boot_protocol, args.boot_protocol);
    set(&mut config.vcpus, args.cpus);
    set(&mut config.memory, args.memory);
    set(&mut config.transport, args.transport);
    if !args.disk.is_empty() {
        config.disks = args.disk.into_iter().map(DiskConfig::from).collect();
    }
    if !args.net.is_empty() {
        config.nets = args.net.into_iter().map(NetConfig::from).collect();
    }
    if let Some(vsock) = args.vsock {
        config.vsock = Some(vsock.into());
    }
    config.rng = args.rng.map(RngConfig::from).or(config.rng);
    config.balloon = args.balloon.map(|balloon| balloon.0).or(config.balloon);
    config.serial = args
        .serial
        .map(SerialConfig::from)
        .or(config.serial)
        .or(Some(SerialConfig::Stdio));
    Ok(config)
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

impl From<DiskArg> for DiskConfig {
    fn from(disk: DiskArg) -> Self {
        Self {
            path: disk.path,
            readonly: disk.readonly,
            id: disk.id,
            transport: disk.transport,
        }
    }
}

impl From<NetArg> for NetConfig {
    fn from(net: NetArg) -> Self {
        Self {
            tap: net.tap,
            mac: net.mac,
            transport: net.transport,
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

impl From<SerialArg> for SerialConfig {
    fn from(serial: SerialArg) -> Self {
        match serial {
            SerialArg::Stdio => Self::Stdio,
            SerialArg::Null => Self::Null,
            SerialArg::File(path) => Self::File(path),
        }
    }
}
