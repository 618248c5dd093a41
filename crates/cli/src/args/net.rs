//! `--net`: what is behind a network interface.

use std::str::FromStr;

use kiln_vmm::config::{NetConfig, UserNetConfig};

use super::{bandwidth, cpu_list, on_or_off, operations, parse, split_options, transport};

/// A network interface as it is on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetArg(pub(crate) NetConfig);

/// The options that say what is behind an interface; one of them comes.
const BACKENDS: &str = "`tap=NAME`, `fd=N`, `user`, `socket=PATH` and `socket-fd=N`";

impl FromStr for NetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut net = NetConfig::default();
        // Options of `user` may come before the word.
        let (mut user, mut is_user) = (UserNetConfig::default(), false);
        for option in split_options(text) {
            if option == "user" {
                is_user = true;
                continue;
            }
            if option == "create" {
                net.create = true;
                continue;
            }
            let Some((name, value)) = option.split_once('=') else {
                return Err(unknown(&option));
            };
            if !set_backend(&mut net, name, value)?
                && !set_user(&mut user, name, value)?
                && !set_common(&mut net, name, value)?
            {
                return Err(unknown(&option));
            }
        }
        if is_user {
            net.user = Some(user);
        } else if user != UserNetConfig::default() {
            return Err("`forward`, `host-loopback` and `passt` are for `user`".to_owned());
        }
        let given = [
            net.tap.is_some(),
            !net.fds.is_empty(),
            net.user.is_some(),
            net.socket.is_some(),
            net.socket_fd.is_some(),
        ];
        if given.into_iter().filter(|one| *one).count() != 1 {
            return Err(format!("say what is behind it, by one of {BACKENDS}"));
        }
        Ok(Self(net))
    }
}

fn unknown(option: &str) -> String {
    format!(
        "unknown network option `{option}`: there are {BACKENDS}; `forward=PROTOCOL:PORT`, \
         `host-loopback=on|off` and `passt=PATH` for `user`; `reconnect=SECONDS` for `socket`; `create` \
         for `tap`; `vhost=on|off` for `tap` and `fd`; and `queues=N`, `mac=MAC`, `mtu=BYTES`, `rx-bandwidth=BYTES[:BURST]`, `rx-packets=N[:BURST]`, \
         `tx-bandwidth=BYTES[:BURST]`, `tx-packets=N[:BURST]`, `transport=pci|mmio`, `io-threads=shared|device|queue` and `io-affinity=CPUS`"
    )
}

fn set_backend(net: &mut NetConfig, name: &str, value: &str) -> Result<bool, String> {
    match name {
        "tap" => net.tap = Some(value.to_owned()),
        "fd" => net.fds.push(descriptor(value)?),
        "socket" => net.socket = Some(value.into()),
        "socket-fd" => {
            net.socket_fd = Some(descriptor(value)?);
        }
        "reconnect" => {
            let seconds = value.parse();
            let seconds =
                seconds.map_err(|_| format!("`{value}` is no number of seconds from 1"))?;
            net.reconnect = Some(seconds);
        }
        _ => return Ok(false),
    }
    Ok(true)
}

fn descriptor(text: &str) -> Result<i32, String> {
    let number = text.parse().ok().filter(|number| *number >= 0);
    number.ok_or_else(|| format!("`{text}` is no file descriptor"))
}

fn set_user(user: &mut UserNetConfig, name: &str, value: &str) -> Result<bool, String> {
    match name {
        "forward" => user.forward.push(parse(value)?),
        "host-loopback" => user.host_loopback = on_or_off(value)?,
        "passt" => user.passt = Some(value.into()),
        _ => return Ok(false),
    }
    Ok(true)
}

fn set_common(net: &mut NetConfig, name: &str, value: &str) -> Result<bool, String> {
    match name {
        "queues" => net.queues = Some(parse(value)?),
        "vhost" => net.vhost = on_or_off(value)?,
        "mtu" => net.mtu = Some(parse(value)?),
        "mac" => net.mac = Some(value.parse().map_err(|e| format!("`{value}`: {e}"))?),
        "transport" => net.transport = Some(transport(value)?),
        "io-threads" => net.io_threads = Some(parse(value)?),
        "rx-bandwidth" => net.rx_rate_limit.bandwidth = Some(bandwidth(value)?),
        "rx-packets" => net.rx_rate_limit.ops = Some(operations(value)?),
        "tx-bandwidth" => net.tx_rate_limit.bandwidth = Some(bandwidth(value)?),
        "tx-packets" => net.tx_rate_limit.ops = Some(operations(value)?),
        "io-affinity" => net.io_affinity = Some(cpu_list(value)?),
        _ => return Ok(false),
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> NetConfig {
        text.parse::<NetArg>().unwrap().0
    }

    #[test]
    fn limits_have_directions() {
        let limits = net("tap=t,rx-bandwidth=1M:2M,rx-packets=5,tx-bandwidth=3,tx-packets=4:6");
        let shown = |limits| serde_json::to_string(&limits).unwrap();
        assert_eq!(
            shown(limits.rx_rate_limit),
            r#"{"bandwidth":{"per_second":1048576,"burst":2097152},"ops":{"per_second":5}}"#
        );
        assert_eq!(
            shown(limits.tx_rate_limit),
            r#"{"bandwidth":{"per_second":3},"ops":{"per_second":4,"burst":6}}"#
        );
        assert!("tap=x,rx-packets=1K".parse::<NetArg>().is_err());
    }

    #[test]
    fn a_network_interface_needs_one_thing_behind_it() {
        let tap = net("tap=tap0,mac=06:00:00:00:00:01");
        assert_eq!(tap.tap.as_deref(), Some("tap0"));
        assert!(tap.mac.is_some());
        assert_eq!(net("user").user, Some(UserNetConfig::default()));
        for text in [
            "mac=06:00:00:00:00:01",
            "tap=t,user",
            "socket=a,socket-fd=3",
            "",
        ] {
            let error = text.parse::<NetArg>().unwrap_err();
            assert!(
                error.contains("one of") || text.is_empty(),
                "{text}: {error}"
            );
        }
        for text in [
            "tap=tap0,mac=06:00",
            "tap0",
            "user=yes",
            "tap=t,socket-fd=-1",
        ] {
            assert!(text.parse::<NetArg>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_tap_can_have_queues_be_created_and_be_handed_over() {
        let made = net("tap=t,create,queues=4,mtu=9000");
        assert!(made.create);
        assert_eq!((made.queues, made.mtu), (Some(4), Some(9000)));
        assert_eq!(net("fd=3,fd=4").fds, [3, 4]);
        assert!(!net("tap=t").vhost && net("tap=t,vhost=on").vhost);
        for (text, said) in [
            ("fd=3,tap=t", "one of"),
            ("fd=-1", "`-1` is no file descriptor"),
            ("tap=t,queues=65536", "`65536`"),
            ("tap=t,mtu=x", "`x`"),
            ("tap=t,vhost=1", "`1`"),
            ("tap=t,create=on", "unknown network option `create=on`"),
        ] {
            let error = text.parse::<NetArg>().unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn a_users_network_has_ports_and_a_program() {
        let user = net("user,forward=tcp:8080:80,forward=udp:53,host-loopback=off,passt=/a,,b");
        let user = user.user.unwrap();
        let forwards: Vec<_> = user.forward.iter().map(ToString::to_string).collect();
        assert_eq!(forwards, ["tcp:8080:80", "udp:53:53"]);
        assert!(!user.host_loopback);
        assert_eq!(user.passt.unwrap().to_str(), Some("/a,b"));
        let error = |text: &str| text.parse::<NetArg>().unwrap_err();
        assert!(error("user,forward=tcp:80:x").contains("`x` is no port"));
        assert!(error("tap=t,forward=tcp:80").contains("are for `user`"));
        assert!(error("user,forward").contains("unknown network option `forward`"));
    }

    #[test]
    fn a_network_can_be_at_a_socket() {
        let by_path = net("socket=/run/a,,b,reconnect=5,transport=mmio");
        assert_eq!(by_path.socket.unwrap().to_str(), Some("/run/a,b"));
        assert_eq!(by_path.reconnect.map(u32::from), Some(5));
        assert_eq!(net("socket-fd=7").socket_fd, Some(7));
        assert!("socket=a,reconnect=0".parse::<NetArg>().is_err());
    }
}
