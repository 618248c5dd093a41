//! Network interfaces, and what is behind them.

use std::num::NonZeroU32;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use kiln_devices::virtio::net::Tap;
use serde::{Deserialize, Serialize};

#[cfg(test)]
use super::schema;
use super::{RateLimitsConfig, table};
use crate::{
    BuildError, CpuList, IoThreads, MacAddress, Net, NetRateLimits, PortForward, Transport,
    UserNetOptions,
};

/// A network interface. One of `tap`, `fds`, `user`, `socket` and `socket_fd` says what is behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct NetConfig {
    /// The name of a tap or macvtap interface.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Whether a tap interface of that name is created where there is none, and removed with the
    /// machine. It takes CAP_NET_ADMIN.
    pub create: bool,
    /// The numbers of file descriptors of the process that are open on a tap, with IFF_TAP,
    /// IFF_NO_PI and IFF_VNET_HDR: one for each pair of queues.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fds: Vec<RawFd>,
    /// The host's own network, by passt, which takes no privileges; an empty table for the way out
    /// alone.
    #[serde(
        deserialize_with = "table::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub user: Option<UserNetConfig>,
    /// The path of a Unix stream socket at which another program offers a network, as passt, gvproxy
    /// and QEMU do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// The number of a file descriptor of the process: a stream socket that is connected to such a
    /// program.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = 0)))]
    pub socket_fd: Option<RawFd>,
    /// How many seconds after the end of the program at `socket`, and after each attempt, it is
    /// connected to again. Not given, it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reconnect: Option<NonZeroU32>,
    /// The number of pairs of queues. Not given, it is 1, or as many as there are descriptors of a
    /// tap.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = 1, max = 64)))]
    pub queues: Option<u16>,
    /// The largest payload of a frame in bytes. Not given, it is that of the tap.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = 1280)))]
    pub mtu: Option<u16>,
    /// The interface's address in the guest, such as 06:00:00:00:00:01. Not given, it is that of a
    /// macvtap, or random.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(schema_with = "schema::mac_address"))]
    pub mac: Option<MacAddress>,
    /// Whether the host's kernel carries the packets between a tap and the guest by itself
    /// (vhost-net).
    pub vhost: bool,
    /// How the guest reaches it. Not given, it is as for the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transport: Option<Transport>,
    /// Who works on its queues. Not given, it is as for the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_threads: Option<IoThreads>,
    /// The host's CPUs that its own I/O threads run on, such as 0-3,5. Not given, they are those of
    /// all I/O threads.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(schema_with = "schema::cpu_list"))]
    pub io_affinity: Option<CpuList>,
    /// How much the guest receives in a time. Not given, it is any amount.
    #[serde(
        deserialize_with = "table::one",
        skip_serializing_if = "RateLimitsConfig::is_empty"
    )]
    pub rx_rate_limit: RateLimitsConfig,
    /// How much it sends in a time. Not given, it is any amount.
    #[serde(
        deserialize_with = "table::one",
        skip_serializing_if = "RateLimitsConfig::is_empty"
    )]
    pub tx_rate_limit: RateLimitsConfig,
}

/// What is to be said of an interface.
const ONE_OF: &str = "it needs one of `tap`, `fds`, `user`, `socket` and `socket_fd`";

/// A network by passt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct UserNetConfig {
    /// Ports of the host that lead to the guest: tcp:8080:80 for the host's port 8080 and the
    /// guest's port 80, udp:5353 where both are the same, tcp:127.0.0.1:8080:80 for one address of
    /// the host.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(test, schemars(schema_with = "schema::port_forwards"))]
    pub forward: Vec<PortForward>,
    /// Whether the guest reaches what listens on the host's loopback addresses, at the address of
    /// its gateway.
    pub host_loopback: bool,
    /// The program. Not given, it is the `passt` in PATH.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passt: Option<PathBuf>,
}

impl Default for UserNetConfig {
    fn default() -> Self {
        Self {
            forward: Vec::new(),
            host_loopback: true,
            passt: None,
        }
    }
}

impl From<UserNetConfig> for UserNetOptions {
    fn from(config: UserNetConfig) -> Self {
        let options = Self::new().host_loopback(config.host_loopback);
        let options = match config.passt {
            Some(program) => options.program(program),
            None => options,
        };
        config.forward.into_iter().fold(options, Self::forward)
    }
}

impl NetConfig {
    /// The paths that are taken from the description's folder.
    pub(super) fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let passt = self.user.as_mut().and_then(|user| user.passt.as_mut());
        self.socket.iter_mut().chain(passt)
    }

    pub(super) fn open(self) -> Result<Net, BuildError> {
        let limits = NetRateLimits {
            rx: self.rx_rate_limit.into(),
            tx: self.tx_rate_limit.into(),
        };
        let net = self.open_backend()?.rate_limits(limits).vhost(self.vhost);
        let net = match self.mac {
            Some(mac) => net.mac(mac),
            None => net,
        };
        let net = match self.queues {
            Some(pairs) => net.queues(pairs),
            None => net,
        };
        let net = match self.mtu {
            Some(bytes) => net.mtu(bytes),
            None => net,
        };
        let net = match self.io_threads {
            Some(threads) => net.io_threads(threads),
            None => net,
        };
        let net = match self.io_affinity {
            Some(cpus) => net.io_affinity(cpus),
            None => net,
        };
        Ok(match self.transport {
            Some(transport) => net.transport(transport),
            None => net,
        })
    }

    /// What is behind the interface.
    fn open_backend(&self) -> Result<Net, BuildError> {
        let wrong = |reason| Err(BuildError::NetDescription { reason });
        if self.reconnect.is_some() && self.socket.is_none() {
            return wrong("`reconnect` is for a `socket`, which is a path");
        }
        if self.create && self.tap.is_none() {
            return wrong("`create` is for a `tap`");
        }
        let others = (&self.user, &self.socket, self.socket_fd);
        if !self.fds.is_empty() && self.tap.is_none() && others == (&None, &None, None) {
            return Ok(Net::new(Tap::from_fd_numbers(&self.fds)?));
        }
        match (&self.tap, &self.user, &self.socket, self.socket_fd) {
            _ if !self.fds.is_empty() => wrong(ONE_OF),
            (Some(tap), None, None, None) if self.create => Net::create_tap(tap, self.mtu),
            (Some(tap), None, None, None) => Net::tap(tap),
            (None, Some(user), None, None) => Net::user(&user.clone().into()),
            (None, None, Some(path), None) => {
                let seconds = self.reconnect.map(|seconds| u64::from(seconds.get()));
                Net::socket(path, seconds.map(Duration::from_secs))
            }
            (None, None, None, Some(number)) => Net::socket_fd(inherited(number)?),
            _ => wrong(ONE_OF),
        }
    }
}

/// A descriptor of ours for what a descriptor of the process leads to.
fn inherited(number: RawFd) -> Result<OwnedFd, BuildError> {
    // SAFETY: the call takes any number, and makes a new descriptor where that one is open.
    let fd = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if fd < 0 {
        return Err(BuildError::NetDescription {
            reason: "there is no open file descriptor with the number of `socket_fd`",
        });
    }
    // SAFETY: it is new, so nobody else closes it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
