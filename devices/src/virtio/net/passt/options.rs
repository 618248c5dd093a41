//! What a network of passt's can be asked to do.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::PasstError;

/// How a network by [passt](super::Passt) is to be.
///
/// ```
/// use kiln_devices::virtio::net::UserNetOptions;
///
/// let options = UserNetOptions::new()
///     .forward("tcp:8080:80".parse()?)
///     .forward("udp:127.0.0.1:5353:53".parse()?)
///     .host_loopback(false);
/// # Ok::<(), kiln_devices::virtio::net::ParsePortForwardError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserNetOptions {
    forwards: Vec<PortForward>,
    host_loopback: bool,
    program: Option<PathBuf>,
}

impl Default for UserNetOptions {
    fn default() -> Self {
        Self {
            forwards: Vec::new(),
            host_loopback: true,
            program: None,
        }
    }
}

impl UserNetOptions {
    /// The way out, and no ports of the host for the guest.
    pub fn new() -> Self {
        Self::default()
    }

    /// Leads connections to a port of the host to one of the guest.
    #[must_use]
    pub fn forward(mut self, forward: PortForward) -> Self {
        self.forwards.push(forward);
        self
    }

    /// Whether the guest reaches what listens on the host's loopback addresses alone, at the address
    /// of its gateway; it does unless said otherwise. A resolver of the host's that listens there,
    /// as systemd's does, is the guest's only so.
    #[must_use]
    pub fn host_loopback(mut self, reachable: bool) -> Self {
        self.host_loopback = reachable;
        self
    }

    /// The program to run, instead of the `passt` in `PATH`.
    #[must_use]
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.program = Some(path.into());
        self
    }

    /// The program that was chosen.
    pub(super) fn chosen_program(&self) -> Option<&PathBuf> {
        self.program.as_ref()
    }

    /// Refuses ports that two forwards would have to listen at, and those that are not to be had:
    /// passt is content with one of IPv4 and IPv6.
    pub(super) fn check(&self) -> Result<(), PasstError> {
        for (index, one) in self.forwards.iter().enumerate() {
            let earlier = self.forwards.iter().take(index);
            if let Some(other) = earlier.into_iter().find(|other| other.collides_with(one)) {
                return Err(PasstError::PortTwice {
                    forward: *one,
                    other: *other,
                });
            }
            one.probe().map_err(|source| PasstError::Port {
                forward: *one,
                source,
            })?;
        }
        Ok(())
    }

    /// The arguments that say the same to passt.
    pub(super) fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        for (protocol, option) in [
            (IpProtocol::Tcp, "--tcp-ports"),
            (IpProtocol::Udp, "--udp-ports"),
        ] {
            let forwards = self.forwards.iter();
            let mut specs: Vec<_> = forwards
                .filter(|forward| forward.protocol == protocol)
                .map(PortForward::spec)
                .collect();
            if specs.is_empty() {
                specs.push("none".to_owned());
            }
            for spec in specs {
                arguments.extend([option.into(), spec.into()]);
            }
        }
        if !self.host_loopback {
            arguments.push("--no-map-gw".into());
        }
        arguments
    }
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum IpProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host whose connections lead to one of the guest.
///
/// As text it is `tcp:8080:80`: the protocol (`tcp` or `udp`), the host's port and the guest's,
/// which may be left out where it is the same. An address of the host to listen at, instead of all
/// of them, stands in front of the host's port: `tcp:127.0.0.1:8080:80`, `tcp:[::1]:8080:80`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortForward {
    protocol: IpProtocol,
    address: Option<IpAddr>,
    host: u16,
    guest: u16,
}

impl PortForward {
    /// Whether both need the same port of the host.
    fn collides_with(&self, other: &Self) -> bool {
        let same_address = match (self.address, other.address) {
            (Some(one), Some(other)) => one == other,
            _ => true,
        };
        self.protocol == other.protocol && self.host == other.host && same_address
    }

    /// Whether the host's port can be had now.
    fn probe(&self) -> io::Result<()> {
        let everywhere = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        let addresses = match &self.address {
            Some(address) => std::slice::from_ref(address),
            None => &everywhere,
        };
        for &address in addresses {
            let bound = match self.protocol {
                IpProtocol::Tcp => TcpListener::bind((address, self.host)).map(drop),
                IpProtocol::Udp => UdpSocket::bind((address, self.host)).map(drop),
            };
            match bound {
                // The host need not have both families.
                Err(error)
                    if self.address.is_none()
                        && !matches!(
                            error.kind(),
                            ErrorKind::AddrInUse | ErrorKind::PermissionDenied
                        ) => {}
                result => result?,
            }
        }
        Ok(())
    }

    /// The same as passt writes it.
    fn spec(&self) -> String {
        let ports = format!("{}:{}", self.host, self.guest);
        match self.address {
            Some(address) => format!("{address}/{ports}"),
            None => ports,
        }
    }
}

impl fmt::Display for PortForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.protocol {
            IpProtocol::Tcp => "tcp:",
            IpProtocol::Udp => "udp:",
        })?;
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Some(address) => write!(f, "{address}:")?,
            None => {}
        }
        write!(f, "{}:{}", self.host, self.guest)
    }
}

impl TryFrom<String> for PortForward {
    type Error = ParsePortForwardError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<PortForward> for String {
    fn from(forward: PortForward) -> Self {
        forward.to_string()
    }
}

/// A text that is no forwarded port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem}: a forwarded port is `tcp:8080:80`, `udp:5353` or `tcp:127.0.0.1:8080:80`")]
pub struct ParsePortForwardError {
    problem: String,
}

impl FromStr for PortForward {
    type Err = ParsePortForwardError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |problem: String| ParsePortForwardError { problem };
        let (protocol, rest) = text.split_once(':').unwrap_or((text, ""));
        let protocol = match protocol {
            "tcp" => IpProtocol::Tcp,
            "udp" => IpProtocol::Udp,
            other => return Err(wrong(format!("`{other}` is neither `tcp` nor `udp`"))),
        };
        let (address, ports) = split_address(rest).map_err(wrong)?;
        let port = |text: &str| match text.parse() {
            Ok(port) if port != 0 && !text.starts_with('+') => Ok(port),
            _ => Err(wrong(format!("`{text}` is no port from 1 to 65535"))),
        };
        let (host, guest) = match ports.split_once(':') {
            Some((host, guest)) => (port(host)?, port(guest)?),
            None => (port(ports)?, port(ports)?),
        };
        Ok(Self {
            protocol,
            address,
            host,
            guest,
        })
    }
}

/// The address in front of ports, where there is one.
fn split_address(text: &str) -> Result<(Option<IpAddr>, &str), String> {
    let no_address = |text: &str| format!("`{text}` is no IP address");
    if let Some(rest) = text.strip_prefix('[') {
        let (address, ports) = rest.split_once("]:").ok_or_else(|| no_address(text))?;
        let address = address.parse().map_err(|_| no_address(address))?;
        return Ok((Some(IpAddr::V6(address)), ports));
    }
    match text.split_once(':') {
        Some((first, ports)) if first.contains('.') => {
            let address = first.parse().map_err(|_| no_address(first))?;
            Ok((Some(IpAddr::V4(address)), ports))
        }
        _ => Ok((None, text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_are_read_and_written_and_given_to_passt() {
        for (text, written, option, spec) in [
            ("tcp:8080:80", "tcp:8080:80", "--tcp-ports", "8080:80"),
            ("udp:53", "udp:53:53", "--udp-ports", "53:53"),
            (
                "tcp:127.0.0.1:22",
                "tcp:127.0.0.1:22:22",
                "--tcp-ports",
                "127.0.0.1/22:22",
            ),
            (
                "tcp:[::1]:1:65535",
                "tcp:[::1]:1:65535",
                "--tcp-ports",
                "::1/1:65535",
            ),
        ] {
            let forward: PortForward = text.parse().unwrap();
            assert_eq!(forward.to_string(), written);
            let arguments = UserNetOptions::new().forward(forward).arguments();
            let at = arguments.iter().position(|one| one == spec).unwrap();
            assert_eq!(arguments[at - 1], option);
            let none = arguments.iter().filter(|one| *one == "none").count();
            assert_eq!(none, 1, "the other protocol has none");
        }
        let closed = UserNetOptions::new().host_loopback(false).arguments();
        assert!(closed.contains(&"--no-map-gw".into()));
        assert!(
            !UserNetOptions::new()
                .arguments()
                .contains(&"--no-map-gw".into())
        );
    }

    #[test]
    fn what_is_no_forward_is_refused_with_an_example() {
        for text in [
            "",
            "tcp",
            "tcp:",
            "sctp:1:1",
            "tcp:0:1",
            "tcp:1:0",
            "tcp:65536",
            "tcp:a",
            "tcp:1:2:3",
            "tcp:1.2.3:1:1",
            "tcp:1.2.3.4",
            "tcp:[::1]",
            "tcp:[::1:1",
            "tcp:[x]:1",
            "tcp: 1",
            "tcp:+1",
            "tcp:1-5:1-5",
            "tcp:8080:80,all",
            "TCP:1",
        ] {
            let error = text.parse::<PortForward>().unwrap_err().to_string();
            assert!(error.contains("`tcp:8080:80`"), "{text}: {error}");
        }
    }

    #[test]
    fn a_port_that_is_taken_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let tcp = listener.local_addr().unwrap();
        let udp = socket.local_addr().unwrap();
        for text in [
            format!("tcp:{tcp}:1"),
            format!("tcp:{}:1", tcp.port()),
            format!("udp:{udp}:1"),
        ] {
            let options = UserNetOptions::new().forward(text.parse().unwrap());
            let error = options.check().unwrap_err();
            assert!(matches!(error, PasstError::Port { .. }), "{error}");
            assert!(error.to_string().contains(&text), "{error}");
        }
        drop(listener);
        let free = UserNetOptions::new().forward(format!("tcp:{tcp}:1").parse().unwrap());
        free.check().unwrap();
    }

    #[test]
    fn a_port_is_not_given_twice() {
        let check = |texts: [&str; 2]| {
            let forwards = texts.map(|text| text.parse().unwrap());
            let options = forwards
                .into_iter()
                .fold(UserNetOptions::new(), UserNetOptions::forward);
            options.check()
        };
        let twice = |texts| matches!(check(texts), Err(PasstError::PortTwice { .. }));
        for good in [
            ["tcp:47001:1", "udp:47001:1"],
            ["tcp:47001:1", "tcp:47002:1"],
            ["tcp:127.0.0.1:47001:1", "tcp:127.0.0.2:47001:1"],
        ] {
            assert!(!twice(good), "{good:?}");
        }
        for bad in [
            ["tcp:47003:1", "tcp:47003:2"],
            ["tcp:127.0.0.1:47003:1", "tcp:47003:2"],
            ["udp:127.0.0.1:47003", "udp:127.0.0.1:47003"],
        ] {
            assert!(twice(bad), "{bad:?}");
        }
    }
}
