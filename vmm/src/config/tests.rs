//! Descriptions that are read, and descriptions that are refused.

use std::fs;
use std::num::{NonZeroU32, NonZeroU64};
use std::path::{Path, PathBuf};

use super::*;
use crate::{Backing, BuildError, Decompressor, HugePages, IoThreads, VmBuilder};

fn limits(bandwidth: u64, ops: u64) -> RateLimitsConfig {
    let limit = |per_second, burst| RateLimitConfig {
        per_second: NonZeroU64::new(per_second).unwrap(),
        burst: NonZeroU64::new(burst),
    };
    RateLimitsConfig {
        bandwidth: Some(limit(bandwidth, 2 * bandwidth)),
        ops: Some(limit(ops, 0)),
    }
}

fn full() -> VmConfig {
    VmConfig {
        name: Some("web".into()),
        kernel: Some("vmlinux".into()),
        boot_protocol: BootProtocolConfig::Pvh,
        initrd: Some("initrd.img".into()),
        cmdline: "console=ttyS0 root=/dev/vda".into(),
        vcpus: 4,
        memory: MemorySize::gib(5),
        transport: Transport::Mmio,
        kernel_decompressor: Decompressor::Guest,
        serial: Some(SerialConfig::File("console.log".into())),
        memory_options: MemoryOptions {
            backing: Backing::Memfd,
            huge_pages: HugePages::Transparent,
            prefault: true,
            dirty_log: false,
        },
        balloon: Some(BalloonConfig {
            target: MemorySize::gib(2),
            deflate_on_oom: false,
            free_page_reporting: false,
            transport: Some(Transport::Pci),
        }),
        io_threads: IoThreads::Queue,
        io_affinity: Some("0-1".parse().unwrap()),
        disks: vec![
            DiskConfig {
                path: "root.ext4".into(),
                format: Some(DiskFormat::Raw),
                backing: vec!["base.img".into()],
                any_backing: true,
                readonly: false,
                id: Some("root".into()),
                queues: Some(3),
                cache: CacheMode::Writethrough,
                logical_block_size: Some(4096),
                direct: true,
                engine: IoEngine::Sync,
                transport: Some(Transport::Pci),
                io_threads: Some(IoThreads::Device),
                io_affinity: Some("0-3,5".parse().unwrap()),
                rate_limit: limits(1 << 20, 100),
                ..DiskConfig::default()
            },
            DiskConfig {
                path: "/srv/data.img".into(),
                readonly: true,
                write_rate_limit: limits(3, 4),
                ..DiskConfig::default()
            },
        ],
        nets: vec![
            NetConfig {
                tap: Some("tap0".into()),
                mac: Some("06:00:00:00:00:01".parse().unwrap()),
                transport: Some(Transport::Mmio),
                io_threads: Some(IoThreads::Shared),
                tx_rate_limit: limits(5, 6),
                ..NetConfig::default()
            },
            NetConfig {
                user: Some(UserNetConfig {
                    forward: vec!["tcp:8080:80".parse().unwrap(), "udp:5353".parse().unwrap()],
                    host_loopback: false,
                    passt: Some("/opt/passt".into()),
                }),
                ..NetConfig::default()
            },
            NetConfig {
                socket: Some("/run/gvproxy.sock".into()),
                reconnect: Some(NonZeroU32::MIN),
                ..NetConfig::default()
            },
            NetConfig {
                socket_fd: Some(3),
                ..NetConfig::default()
            },
        ],
        vsock: Some(VsockConfig {
            cid: 42,
            socket: "guest.vsock".into(),
            transport: Some(Transport::Mmio),
        }),
        console: Some(VirtioConsoleConfig {
            to: Some(SerialConfig::File("hvc0.log".into())),
            ports: vec![ConsolePortConfig {
                name: "org.example.agent".into(),
                socket: "agent.sock".into(),
            }],
            transport: Some(Transport::Mmio),
        }),
        rng: Some(RngConfig {
            rate_limit: Some(RateLimitConfig {
                per_second: NonZeroU64::new(1000).unwrap(),
                burst: NonZeroU64::new(20),
            }),
            transport: Some(Transport::Pci),
        }),
    }
}

#[test]
fn what_is_written_reads_back_in_both_formats() {
    for config in [full(), VmConfig::default()] {
        let toml = toml::to_string(&config).unwrap();
        assert_eq!(VmConfig::from_toml(&toml).unwrap(), config, "{toml}");
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(VmConfig::from_json(&json).unwrap(), config, "{json}");
    }
}

#[test]
fn nothing_said_is_the_default_of_the_builder() {
    let config = VmConfig::from_toml("").unwrap();
    assert_eq!(config, VmConfig::from_json("{}").unwrap());
    assert_eq!(config, VmConfig::default());
    let (from_config, builder) = (config.builder().unwrap(), VmBuilder::new());
    assert_eq!(from_config.vcpus, builder.vcpus);
    assert_eq!(from_config.memory, builder.memory);
    assert_eq!(from_config.memory_options, builder.memory_options);
    assert_eq!(from_config.cmdline, builder.cmdline);
    assert!(from_config.kernel.is_none() && from_config.initrd.is_none());
}

#[test]
fn every_option_reaches_the_builder() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    file("root.ext4", &[0; 1024]);
    let mut config = full();
    config.kernel = None;
    config.nets.clear();
    config.disks[1].path = file("data.img", &[0; 512]);
    let builder = config.relative_to(folder.path()).builder().unwrap();
    assert_eq!(builder.name, full().name);
    assert_eq!(builder.vcpus, 4);
    assert_eq!(builder.memory, MemorySize::gib(5));
    assert_eq!(builder.transport, full().transport);
    assert_eq!(builder.io_threads, IoThreads::Queue);
    assert_eq!(builder.io_affinity, full().io_affinity);
    assert_eq!(builder.kernel_decompressor, Decompressor::Guest);
    assert_eq!(builder.memory_options, full().memory_options);
    assert_eq!(builder.initrd, Some(folder.path().join("initrd.img")));
    assert_eq!(builder.cmdline, full().cmdline);
    let console = builder.virtio_console.unwrap();
    assert_eq!(console.transport, Some(Transport::Mmio));
    let (console, socket) = (format!("{console:?}"), folder.path().join("agent.sock"));
    for part in [
        "output: ConsoleOutput(\"fd\")",
        "org.example.agent",
        socket.to_str().unwrap(),
    ] {
        assert!(console.contains(part), "{part}: {console}");
    }
    assert!(folder.path().join("hvc0.log").exists());
    let rng = builder.rng.unwrap();
    assert_eq!(rng.transport, Some(Transport::Pci));
    let rng = format!("{rng:?}");
    assert!(rng.contains("per_second: 1000, burst: 20"), "{rng}");
    let vsock = crate::Vsock::new(42, folder.path().join("guest.vsock"));
    assert_eq!(builder.vsock, Some(vsock.transport(Transport::Mmio)));
    let transports: Vec<_> = builder.disks.iter().map(|disk| disk.transport).collect();
    assert_eq!(transports, [Some(Transport::Pci), None]);
    let io = &builder.disks[0].io;
    assert_eq!(io.threads, Some(IoThreads::Device));
    assert_eq!(io.affinity, full().disks[0].io_affinity);
    let balloon = builder.balloon.unwrap();
    assert_eq!(balloon.transport, Some(Transport::Pci));
    let balloon = format!("{balloon:?}");
    assert!(balloon.contains("MemorySize(2147483648)"), "{balloon}");
    assert_eq!(balloon.matches("false").count(), 2, "{balloon}");
    let disks: Vec<String> = builder.disks.iter().map(|d| format!("{d:?}")).collect();
    for limit in [
        "per_second: 1048576, burst: 2097152",
        "per_second: 100, burst: 100",
    ] {
        assert!(disks[0].contains(limit), "{}", disks[0]);
    }
    assert!(
        disks[1].contains("write: RateLimits { bandwidth: Some"),
        "{}",
        disks[1]
    );
    assert!(disks[0].contains("bytes: 1024") && disks[0].contains("read_only: false"));
    for part in [
        "\"root\"",
        "queues: Some(3)",
        "cache: Writethrough",
        "logical_block_size: Some(4096)",
        "direct: true",
        "engine: Sync",
    ] {
        assert!(disks[0].contains(part), "{part}: {}", disks[0]);
    }
    assert!(disks[1].contains("bytes: 512") && disks[1].contains("read_only: true"));
    assert!(folder.path().join("console.log").exists());
}

#[test]
fn a_balloon_is_there_once_it_is_named() {
    let balloon = |text: &str| VmConfig::from_toml(text).unwrap().balloon;
    assert_eq!(balloon(""), None);
    assert_eq!(balloon("[balloon]"), Some(BalloonConfig::default()));
    let expected = BalloonConfig {
        target: MemorySize::mib(64),
        ..BalloonConfig::default()
    };
    assert_eq!(balloon("balloon.target = \"64M\""), Some(expected));
    assert_eq!(
        VmConfig::from_json("{\"balloon\": null}").unwrap().balloon,
        None
    );
    refused("balloon = true", &["line 1", "balloon", "table"]);
    refused(
        "[balloon]\nsize = 1",
        &["line 2", "`size`", "of target, deflate_on_oom"],
    );
}

/// The error of a text in TOML; it has to be one line with all of `words`.
fn refused(text: &str, words: &[&str]) {
    check(VmConfig::from_toml(text), text, words);
}

fn check(result: Result<VmConfig, ConfigError>, text: &str, words: &[&str]) {
    let error = result.expect_err(text).to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
    for word in words {
        assert!(error.contains(word), "no `{word}` in: {error}");
    }
}

#[test]
fn an_unknown_key_is_refused_with_its_line_and_the_nearest_one() {
    refused(
        "kernel = \"k\"\n\ncpus = 2",
        &["line 3", "`cpus`", "nearest known one is `vcpus`"],
    );
    refused(
        "[[disks]]\npath = \"a\"\n[[disks]]\npath = \"b\"\nread_only = true",
        &["line 5", "disks[1]", "nearest known one is `readonly`"],
    );
    refused(
        "[memory_options]\nhugepages = \"size2m\"",
        &["line 2", "memory_options", "`huge_pages`"],
    );
    refused(
        "[[nets]]\ntap = \"t\"\ntpa = 1",
        &["line 3", "nets[0]", "`tpa`", "`tap`", "of tap, create"],
    );
    refused(
        "[[console.ports]]\nname = \"a\"\nsockets = \"b\"",
        &["line 3", "console.ports[0]", "`socket`"],
    );
    refused("console = \"stdio\"", &["line 1", "`console`", "a table"]);
    refused(
        "[console]\nto = \"stdin\"",
        &["line 2", "`console.to`", "`stdio`"],
    );
    let twice = VmConfig::from_toml("serial = \"stdio\"\nconsole = { to = \"stdio\" }").unwrap();
    let error = twice.builder().unwrap_err();
    assert!(matches!(error, BuildError::StdioTwice), "{error}");
    refused("rng = true", &["line 1", "`rng`", "a table"]);
    refused(
        "[rng]\nrate_limit = 5",
        &["line 2", "`rng.rate_limit`", "a table"],
    );
    refused(
        "[rng.rate_limit]\nper_second = 0",
        &["line 2", "`rng.rate_limit.per_second`", "nonzero"],
    );
    let json = "{\n  \"kernal\": \"k\"\n}";
    check(
        VmConfig::from_json(json),
        json,
        &["line 2", "`kernal`", "nearest known one is `kernel`"],
    );
}

#[test]
fn an_unknown_value_is_refused_with_the_nearest_one() {
    refused("boot_protocol = \"linux\"", &["line 1", "`linux64`"]);
    refused("\nserial = \"stdoi\"", &["line 2", "serial", "`stdio`"]);
    refused(
        "[memory_options]\nbacking = \"memfs\"",
        &["line 2", "memory_options.backing", "`memfd`"],
    );
}

#[test]
fn a_wrong_value_is_refused_by_its_key() {
    refused(
        "vcpus = \"two\"",
        &["line 1", "key `vcpus`", "two", "a whole number"],
    );
    refused("vcpus = -1", &["key `vcpus`", "-1"]);
    refused(
        "\n\nmemory = \"lots\"",
        &["line 3", "`memory`", "such as 512M"],
    );
    refused("memory = 1.5", &["`memory`", "such as \"512M\""]);
    refused("memory = \"99999999T\"", &["`memory`", "64 bits"]);
    refused("cmdline = [1]", &["`cmdline`", "string"]);
    refused("[[disks]]\nid = \"a\"", &["`disks[0]", "`path` is missing"]);
    refused(
        "[[nets]]\ntap = \"t\"\nmac = \"06:00\"",
        &["line 3", "nets[0].mac", "06:00", "06:00:00:00:00:01"],
    );
    refused("vcpus = 1\nvcpus = 2", &["line 2"]);
    refused("vsock = [3, \"s\"]", &["`vsock`", "a table"]);
    refused("vsock = { cid = 3 }", &["`vsock", "`socket` is missing"]);
    refused("disks = [[\"a.img\", true]]", &["`disks[0]`", "a table"]);
    refused("memory_options = []", &["`memory_options`", "a table"]);
    let json = "{\"disks\": [\n{\"path\": 7}]}";
    check(
        VmConfig::from_json(json),
        json,
        &["line 2", "`disks[0].path`", "string"],
    );
}

#[test]
fn a_text_that_is_not_of_the_format_is_refused_by_its_line() {
    refused("kernel = \"k\"\nvcpus 2", &["line 2"]);
    refused("kernel = \"k", &["line 1"]);
    refused("a\u{0}b", &["line 1"]);
    for text in ["", "[]", "7", "{\"vcpus\": 1", "{} {}", "{\"vcpus\":\n}"] {
        check(VmConfig::from_json(text), text, &["line"]);
    }
}

#[test]
fn hostile_texts_are_refused() {
    let deep = "[".repeat(200_000);
    check(VmConfig::from_json(&deep), "deep", &[]);
    check(VmConfig::from_toml(&format!("a = {deep}")), "deep", &[]);
    let long = format!("{} = 1", "k".repeat(100_000));
    check(VmConfig::from_toml(&long), "long", &["unknown key"]);
    refused("\"a\\nkiln: b\" = 1", &["a\\nkiln", "line 1"]);
}

#[test]
fn a_file_is_read_by_its_extension_and_from_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("vm.toml"), toml::to_string(&full()).unwrap()).unwrap();
    fs::write(path("vm.json"), serde_json::to_string(&full()).unwrap()).unwrap();
    for name in ["vm.toml", "vm.json"] {
        let config = VmConfig::open(path(name)).unwrap();
        assert_eq!(config.kernel, Some(path("vmlinux")));
        assert_eq!(config.initrd, Some(path("initrd.img")));
        assert_eq!(config.disks[0].path, path("root.ext4"));
        assert_eq!(config.disks[0].backing, [path("base.img")]);
        assert_eq!(config.disks[1].path, PathBuf::from("/srv/data.img"));
        assert_eq!(config.serial, Some(SerialConfig::File(path("console.log"))));
    }
}

#[test]
fn a_bad_file_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let open = |name: &str, words: &[&str]| check(VmConfig::open(path(name)), name, words);
    open("absent.toml", &["absent.toml"]);
    open("vm.yaml", &["vm.yaml", ".toml or .json"]);
    open("vm", &["vm", ".toml or .json"]);
    fs::create_dir(path("folder.toml")).unwrap();
    open("folder.toml", &["folder.toml", "regular file"]);
    fs::write(path("large.toml"), vec![b'#'; (1 << 20) + 1]).unwrap();
    open("large.toml", &["large.toml", "1048576 bytes"]);
    fs::write(path("binary.json"), [0xff; 8]).unwrap();
    open("binary.json", &["binary.json"]);
    fs::write(path("wrong.toml"), "\nvcpu = 1").unwrap();
    open("wrong.toml", &["wrong.toml`, line 2", "`vcpus`"]);
}

#[test]
fn what_cannot_be_opened_is_refused_as_by_the_builder() {
    let absent = Path::new("/nonexistent/x");
    let with_disk = VmConfig {
        disks: vec![DiskConfig {
            path: absent.into(),
            ..DiskConfig::default()
        }],
        ..VmConfig::default()
    };
    assert_eq!(
        with_disk.builder().unwrap_err().to_string(),
        crate::Disk::open(absent).unwrap_err().to_string()
    );
    // A disk is raw unless its name or its format says otherwise, and its content says nothing.
    let folder = tempfile::tempdir().unwrap();
    let disk = |name: &str, format| {
        let path = folder.path().join(name);
        fs::write(&path, b"QFI\xfb".repeat(128)).unwrap();
        let config = VmConfig {
            disks: vec![DiskConfig {
                path,
                format,
                ..DiskConfig::default()
            }],
            ..VmConfig::default()
        };
        config.builder().map(drop)
    };
    disk("a.img", None).unwrap();
    disk("a.qcow2", Some(DiskFormat::Raw)).unwrap();
    for (name, format) in [("a.img", Some(DiskFormat::Qcow2)), ("a.qcow2", None)] {
        let error = disk(name, format).unwrap_err().to_string();
        assert!(error.starts_with("open qcow2 image `"), "{error}");
    }
    let with_net = VmConfig {
        nets: vec![NetConfig {
            tap: Some("kilnabsent0".into()),
            ..NetConfig::default()
        }],
        ..VmConfig::default()
    };
    assert_eq!(
        with_net.builder().unwrap_err().to_string(),
        crate::Net::tap("kilnabsent0").unwrap_err().to_string()
    );
    for (net, said) in [
        (NetConfig::default(), "it needs one of `tap`, `fds`"),
        (
            NetConfig {
                create: true,
                ..NetConfig::default()
            },
            "`create` is for a `tap`",
        ),
        (
            NetConfig {
                tap: Some("t".into()),
                fds: vec![3],
                ..NetConfig::default()
            },
            "it needs one of",
        ),
        (
            NetConfig {
                fds: vec![-1],
                ..NetConfig::default()
            },
            "file descriptor -1",
        ),
    ] {
        let config = VmConfig {
            nets: vec![net],
            ..VmConfig::default()
        };
        let error = config.builder().unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    let with_serial = VmConfig {
        serial: Some(SerialConfig::File("/nonexistent/log".into())),
        ..VmConfig::default()
    };
    let error = with_serial.builder().unwrap_err();
    assert!(matches!(error, BuildError::Console { .. }));
    assert!(error.to_string().contains("/nonexistent/log"));
}

#[test]
fn the_examples_are_descriptions_of_machines() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/examples");
    let mut read = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let config = VmConfig::open(&path).unwrap_or_else(|error| panic!("{error}"));
        assert!(config.kernel.is_some(), "{}: no kernel", path.display());
        read += 1;
    }
    assert!(read >= 3, "only {read} examples");
}

#[test]
fn a_network_interface_has_one_thing_behind_it() {
    let open = |text: &str| {
        let config = VmConfig::from_toml(&format!("[[nets]]\n{text}")).unwrap();
        config.builder().unwrap_err().to_string()
    };
    let one_of = "one of `tap`, `fds`, `user`, `socket` and `socket_fd`";
    for (text, said) in [
        ("", one_of),
        ("tap = \"t\"\nsocket = \"s\"", one_of),
        ("user = {}\nsocket_fd = 3", one_of),
        (
            "tap = \"t\"\nreconnect = 1",
            "`reconnect` is for a `socket`",
        ),
        ("socket_fd = 987654", "no open file descriptor"),
        ("socket_fd = -1", "no open file descriptor"),
        ("socket_fd = 0", "not a connected stream socket"),
        ("socket = \"/nonexistent/s\"", "socket `/nonexistent/s`"),
        (
            "user = { passt = \"/nonexistent/passt\" }",
            "`/nonexistent/passt`",
        ),
        (
            "user = { forward = [\"tcp:47081:1\", \"tcp:47081:2\"] }",
            "forward tcp:47081:2 to the guest: tcp:47081:1 has the same port",
        ),
    ] {
        let error = open(text);
        assert!(error.contains(said), "{text}: {error}");
        assert_eq!(error.lines().count(), 1);
    }
    let error = VmConfig::from_toml("[[nets]]\nuser = { forward = [\"tcp:80:x\"] }").unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("line 2") && error.contains("`x` is no port"),
        "{error}"
    );
}
