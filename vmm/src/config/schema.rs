//! The JSON schema of [`VmConfig`](super::VmConfig), made from its types and compared with the
//! committed one.

use std::num::{NonZeroU32, NonZeroU64};
use std::path::{Path, PathBuf};

use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings, json_schema};
use serde_json::Value;

use super::UserNetConfig;
use super::error::explain;
use super::{
    BalloonConfig, DiskConfig, NetConfig, RateLimitConfig, RateLimitsConfig, RngConfig,
    SerialConfig, VmConfig, VsockConfig,
};
use super::{ConsolePortConfig, VirtioConsoleConfig};
use crate::{IoThreads, MemoryOptions, MemorySize, Transport};

/// Set to write the schema instead of comparing it.
const BLESS: &str = "KILN_BLESS";

pub(super) fn memory_size(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["string", "integer"],
        "pattern": "^ *[0-9]+([KkMmGgTt]([Ii]?[Bb])?|[Bb])? *$",
        "minimum": 0
    })
}

pub(super) fn cpu_list(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["string", "null"],
        "pattern": "^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$"
    })
}

pub(super) fn mac_address(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["string", "null"],
        "pattern": "^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$"
    })
}

pub(super) fn cache_mode(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "enum": ["writeback", "writethrough"] })
}

pub(super) fn io_engine(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "enum": ["auto", "io_uring", "sync"] })
}

pub(super) fn block_size(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": ["integer", "null"], "enum": [512, 4096, null] })
}

pub(super) fn port_forwards(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": {
            "type": "string",
            "pattern": "^(tcp|udp):(([0-9.]+|\\[[0-9A-Fa-f:.]+\\]):)?[0-9]{1,5}(:[0-9]{1,5})?$"
        }
    })
}

// The keys of `MemoryOptions`, which is another crate's; a test below holds the two together.
/// How guest RAM is backed by the host.
#[derive(JsonSchema)]
#[schemars(rename = "MemoryOptions", deny_unknown_fields)]
#[allow(dead_code)]
pub(super) struct MemoryOptionsKeys {
    /// What is behind the mappings: private memory, or a memfd that can be shared.
    #[schemars(default)]
    backing: BackingValue,
    /// The size of the host's pages: what the host does by default, transparent huge pages, or
    /// pages of 2 MiB or 1 GiB from its reserved pool.
    #[schemars(default)]
    huge_pages: HugePagesValue,
    /// Take all memory from the host at once: a slower start, and no faults later.
    #[schemars(default)]
    prefault: bool,
    /// Note which pages the VMM itself writes.
    #[schemars(default)]
    dirty_log: bool,
}

#[derive(Default, JsonSchema, serde::Serialize)]
#[schemars(inline, rename_all = "lowercase")]
#[serde(rename_all = "lowercase")]
#[allow(dead_code)]
enum BackingValue {
    #[default]
    Anonymous,
    Memfd,
}

#[derive(Default, JsonSchema, serde::Serialize)]
#[schemars(inline, rename_all = "lowercase")]
#[serde(rename_all = "lowercase")]
#[allow(dead_code)]
enum HugePagesValue {
    #[default]
    None,
    Transparent,
    Size2M,
    Size1G,
}

fn generate() -> Value {
    let generator = SchemaSettings::draft2020_12().into_generator();
    let mut schema = generator.into_root_schema_for::<VmConfig>();
    schema.insert("title".to_owned(), "Kiln virtual machine".into());
    schema.into()
}

fn committed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/vm-config.schema.json")
}

#[test]
fn the_committed_schema_is_that_of_the_types() {
    let path = committed();
    let schema = generate();
    if std::env::var_os(BLESS).is_some() {
        let text = serde_json::to_string_pretty(&schema).unwrap() + "\n";
        std::fs::write(&path, text).unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap();
    let found: Value = serde_json::from_str(&text).unwrap();
    assert!(
        found == schema,
        "{} is not that of the types: run this test with {BLESS}=1 and look at the difference",
        path.display()
    );
}

fn names(values: &Value) -> Vec<String> {
    let mut names: Vec<String> = match values {
        Value::Object(map) => map.keys().cloned().collect(),
        Value::Array(list) => list.iter().map(|v| v.as_str().unwrap().into()).collect(),
        other => panic!("no names in {other}"),
    };
    names.sort();
    names
}

#[test]
fn the_schema_knows_the_keys_and_values_of_memory_options() {
    let schema = generate();
    let keys = &schema["$defs"]["MemoryOptions"]["properties"];
    let options = serde_json::to_value(MemoryOptions::default()).unwrap();
    assert_eq!(names(keys), names(&options));
    for key in ["backing", "huge_pages"] {
        // What is refused lists all that is known.
        let wrong = format!("{{\"{key}\": \"?\"}}");
        let error = serde_json::from_str::<MemoryOptions>(&wrong).unwrap_err();
        let message = explain(error.to_string().split(" at line").next().unwrap());
        let list = message.split("(of ").nth(1).unwrap().trim_end_matches(')');
        let mut known: Vec<&str> = list.split(", ").collect();
        known.sort_unstable();
        let values = &keys[key]["enum"];
        assert_eq!(names(values), known, "{key}: {message}");
    }
}

#[test]
fn the_schema_has_every_key_that_is_written() {
    let limit = RateLimitConfig {
        per_second: NonZeroU64::MIN,
        burst: Some(NonZeroU64::MIN),
    };
    let limits = RateLimitsConfig {
        bandwidth: Some(limit),
        ops: Some(limit),
    };
    let full = VmConfig {
        name: Some("n".into()),
        kernel: Some("k".into()),
        initrd: Some("i".into()),
        io_affinity: Some("0".parse().unwrap()),
        memory: MemorySize::mib(64),
        serial: Some(SerialConfig::File("s".into())),
        balloon: Some(BalloonConfig {
            transport: Some(Transport::Mmio),
            ..BalloonConfig::default()
        }),
        disks: vec![DiskConfig {
            format: Some(crate::DiskFormat::Qcow2),
            backing: vec!["b".into()],
            id: Some("i".into()),
            queues: Some(1),
            logical_block_size: Some(512),
            transport: Some(Transport::Mmio),
            io_threads: Some(IoThreads::Device),
            io_affinity: Some("0".parse().unwrap()),
            rate_limit: limits,
            read_rate_limit: limits,
            write_rate_limit: limits,
            ..DiskConfig::default()
        }],
        nets: vec![NetConfig {
            tap: Some("t".into()),
            user: Some(UserNetConfig {
                forward: vec!["tcp:1".parse().unwrap()],
                passt: Some("p".into()),
                ..UserNetConfig::default()
            }),
            socket: Some("s".into()),
            socket_fd: Some(3),
            reconnect: Some(NonZeroU32::MIN),
            create: true,
            vhost: true,
            fds: vec![3],
            queues: Some(1),
            mtu: Some(1500),
            mac: Some("06:00:00:00:00:01".parse().unwrap()),
            transport: Some(Transport::Mmio),
            io_threads: Some(IoThreads::Device),
            io_affinity: Some("0".parse().unwrap()),
            rx_rate_limit: limits,
            tx_rate_limit: limits,
        }],
        vsock: Some(VsockConfig {
            transport: Some(Transport::Mmio),
            ..VsockConfig::default()
        }),
        console: Some(VirtioConsoleConfig {
            to: Some(SerialConfig::Null),
            ports: vec![ConsolePortConfig::default()],
            transport: Some(Transport::Mmio),
        }),
        rng: Some(RngConfig {
            rate_limit: Some(limit),
            transport: Some(Transport::Mmio),
        }),
        ..VmConfig::default()
    };
    let (schema, value) = (generate(), serde_json::to_value(full).unwrap());
    assert_eq!(names(&schema["properties"]), names(&value));
    let definitions = &schema["$defs"];
    for (definition, written) in [
        ("DiskConfig", &value["disks"][0]),
        ("NetConfig", &value["nets"][0]),
        ("UserNetConfig", &value["nets"][0]["user"]),
        ("VsockConfig", &value["vsock"]),
        ("VirtioConsoleConfig", &value["console"]),
        ("ConsolePortConfig", &value["console"]["ports"][0]),
        ("RngConfig", &value["rng"]),
        ("BalloonConfig", &value["balloon"]),
        ("RateLimitsConfig", &value["disks"][0]["rate_limit"]),
        ("RateLimitConfig", &value["rng"]["rate_limit"]),
    ] {
        let keys = names(&definitions[definition]["properties"]);
        assert_eq!(keys, names(written));
        assert_eq!(definitions[definition]["additionalProperties"], false);
    }
    assert_eq!(schema["additionalProperties"], false);
}
