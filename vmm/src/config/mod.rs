//! A machine's description as a value, and as a TOML or JSON file.
//!
//! [`VmConfig`] holds every option of a [`VmBuilder`] that is data; what is code (backends and
//! devices of your own) and what belongs to the process rather than to the machine (the host, the
//! kick signal) is given to the builder that [`VmConfig::builder`] makes. That function is the one
//! way from a description to a machine: a file, the command line of `kiln run` and a program that
//! fills the structs meet the same checks and the same messages.
//!
//! | module | what lives there |
//! |---|---|
//! | `read` | from a text or a file to a value |
//! | `error` | [`ConfigError`]: where a description is wrong, and what is known there |
//! | `nearest` | the known name that a wrong one is most like |
//! | `table` | structs that are read from tables alone |
//! | `console` | what the serial port and the virtio console lead to |
//! | `net` | what is behind network interfaces |
//! | `convert` | from a value to a [`VmBuilder`] |
//!
//! `resources/vm-config.schema.json` describes the format to editors, and `resources/examples` has
//! files to start from.
//!
//! [`VmBuilder`]: crate::VmBuilder
//!
//! # Example
//!
//! ```
//! use kiln_vmm::MemorySize;
//! use kiln_vmm::config::VmConfig;
//!
//! let config = VmConfig::from_toml(
//!     r#"
//!     kernel = "vmlinuz"
//!     vcpus = 2
//!     memory = "1G"
//!
//!     [[disks]]
//!     path = "root.ext4"
//!     id = "root"
//!     "#,
//! )?;
//! assert_eq!(config.memory, MemorySize::gib(1));
//! assert_eq!(config.disks[0].id.as_deref(), Some("root"));
//!
//! let error = VmConfig::from_toml("vcpu = 2").unwrap_err().to_string();
//! assert!(error.contains("line 1") && error.contains("the nearest known one is `vcpus`"));
//! # Ok::<(), kiln_vmm::config::ConfigError>(())
//! ```

mod console;
mod convert;
mod error;
mod nearest;
mod net;
mod read;
#[cfg(test)]
mod schema;
mod table;
#[cfg(test)]
mod tests;

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    BootProtocol, CacheMode, CpuList, Decompressor, DiskFormat, IoEngine, IoThreads, MemoryOptions,
    MemorySize, Transport,
};

pub use console::{ConsolePortConfig, SerialConfig, VirtioConsoleConfig};
pub use error::{ConfigError, Place};
pub use net::{NetConfig, UserNetConfig};

/// What a virtual machine is made of.
///
/// Every key may be left out (only the kernel has no default then); an unknown key is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct VmConfig {
    /// What the machine is called in messages, in its metrics and in the names of its threads: 1 to
    /// 64 characters, none of them a control character.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(length(min = 1, max = 64)))]
    pub name: Option<String>,
    /// The kernel to boot: a Linux bzImage, or a 64-bit ELF file (vmlinux).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Who unpacks the kernel in a bzImage.
    pub kernel_decompressor: Decompressor,
    /// How the kernel is entered.
    pub boot_protocol: BootProtocolConfig,
    /// The initial RAM disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, delivered exactly as it is here.
    pub cmdline: String,
    /// The number of vCPUs.
    #[cfg_attr(test, schemars(range(min = 1)))]
    pub vcpus: u32,
    /// The size of the guest's RAM: a whole number with K, M, G or T, or a number of MiB.
    #[cfg_attr(test, schemars(schema_with = "schema::memory_size"))]
    pub memory: MemorySize,
    /// How the guest reaches the virtio devices, but for those that say otherwise themselves.
    pub transport: Transport,
    /// Who works on the queues of the virtio devices, but for those that say otherwise themselves:
    /// one thread that all share, one for each device, or one for each queue of a disk and each
    /// pair of queues of a network interface.
    pub io_threads: IoThreads,
    /// The host's CPUs that the I/O threads run on, such as 0-3,5. Not given, they are all that the
    /// process has.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(schema_with = "schema::cpu_list"))]
    pub io_affinity: Option<CpuList>,
    /// Where the guest's serial port (ttyS0) leads. Not given, it leads nowhere; `kiln run` then
    /// takes its standard input and output, unless the console has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<SerialConfig>,
    /// The virtio console (hvc0), and its named ports. Not given, there is none.
    #[serde(
        deserialize_with = "table::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub console: Option<VirtioConsoleConfig>,
    /// What is behind the guest's RAM.
    #[cfg_attr(test, schemars(with = "schema::MemoryOptionsKeys"))]
    #[serde(deserialize_with = "table::one")]
    pub memory_options: MemoryOptions,
    /// The entropy device (virtio-rng), by which the guest has random numbers of the host's; an
    /// empty table for one without a limit. Not given, there is none.
    #[serde(
        deserialize_with = "table::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub rng: Option<RngConfig>,
    /// The memory balloon (virtio-balloon), by which the guest's RAM gets back to the host; an empty
    /// table for one with the defaults. Not given, there is none.
    #[serde(
        deserialize_with = "table::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub balloon: Option<BalloonConfig>,
    /// The disks (virtio-blk), in the order of /dev/vda, /dev/vdb, …
    #[serde(
        deserialize_with = "table::list",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub disks: Vec<DiskConfig>,
    /// The network interfaces (virtio-net).
    #[serde(
        deserialize_with = "table::list",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub nets: Vec<NetConfig>,
    /// The socket device (virtio-vsock): streams between programs of the guest and of the host.
    #[serde(
        deserialize_with = "table::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub vsock: Option<VsockConfig>,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            name: None,
            kernel: None,
            kernel_decompressor: Decompressor::default(),
            boot_protocol: BootProtocolConfig::default(),
            initrd: None,
            cmdline: "console=ttyS0".to_owned(),
            vcpus: 1,
            memory: MemorySize::mib(512),
            transport: Transport::default(),
            io_threads: IoThreads::default(),
            io_affinity: None,
            serial: None,
            console: None,
            memory_options: MemoryOptions::default(),
            rng: None,
            balloon: None,
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: None,
        }
    }
}

impl VmConfig {
    /// The same machine with every relative path taken from `folder` instead of the process's
    /// working directory. An empty path stays empty, to be refused as such.
    #[must_use]
    pub fn relative_to(mut self, folder: &Path) -> Self {
        let disks = self.disks.iter_mut();
        let disks = disks.flat_map(|disk| disk.backing.iter_mut().chain([&mut disk.path]));
        let serial = self.serial.as_mut().and_then(SerialConfig::path_mut);
        let vsock = self.vsock.as_mut().map(|vsock| &mut vsock.socket);
        let nets = self.nets.iter_mut().flat_map(NetConfig::paths_mut);
        let console = self.console.iter_mut();
        let console = console.flat_map(VirtioConsoleConfig::paths_mut);
        let paths = self.kernel.iter_mut().chain(&mut self.initrd);
        for path in paths
            .chain(disks)
            .chain(serial)
            .chain(vsock)
            .chain(console)
            .chain(nets)
        {
            if !path.as_os_str().is_empty() {
                *path = folder.join(&*path);
            }
        }
        self
    }
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum BootProtocolConfig {
    /// PVH for an ELF file with a PVH note, the 64-bit Linux boot protocol for all others.
    #[default]
    Auto,
    /// The 64-bit Linux boot protocol.
    Linux64,
    /// PVH: 32-bit protected mode, for ELF files with a PVH note.
    Pvh,
}

impl BootProtocolConfig {
    /// The protocol asked for, or `None` where the kernel decides.
    pub(crate) fn chosen(self) -> Option<BootProtocol> {
        match self {
            Self::Auto => None,
            Self::Linux64 => Some(BootProtocol::Linux64),
            Self::Pvh => Some(BootProtocol::Pvh),
        }
    }
}

/// A disk: an image, or a block device of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The image file or block device.
    pub path: PathBuf,
    /// What its bytes mean. Not given, it is qcow2 if the path ends in `.qcow2`, else raw; the
    /// content is not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// The backing files that a qcow2 image may have, by their paths. Not given, there are none, and
    /// an image that asks for one is refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<PathBuf>,
    /// Whether a qcow2 image may have any backing file that it asks for, and that any other in
    /// turn: only for images that are trusted.
    #[serde(default)]
    pub any_backing: bool,
    /// Whether it is only read. Several machines can have a disk so at the same time.
    #[serde(default)]
    pub readonly: bool,
    /// The id that the guest sees as the disk's serial number: 1 to 20 printable ASCII characters.
    /// Not given, it is made from what the image is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// How many queues it has, from 1 to 256. Not given, it is one for each vCPU, but no more than
    /// 16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = 1, max = 256)))]
    pub queues: Option<u16>,
    /// When what the guest has written lasts: when it flushes it, or when each write is completed.
    /// The guest can change it.
    #[serde(default)]
    #[cfg_attr(test, schemars(schema_with = "schema::cache_mode"))]
    pub cache: CacheMode,
    /// The size of blocks in bytes that the guest sees: 512 or 4096. Not given, it is that of the
    /// host's block device, and 512 for a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(schema_with = "schema::block_size"))]
    pub logical_block_size: Option<u32>,
    /// How the image is read and written: by io_uring where a request would have to wait for a
    /// device, by io_uring alone, or one request behind the other.
    #[serde(default)]
    #[cfg_attr(test, schemars(schema_with = "schema::io_engine"))]
    pub engine: IoEngine,
    /// Whether the image is read and written without the host's page cache (O_DIRECT).
    #[serde(default)]
    pub direct: bool,
    /// How the guest reaches it. Not given, it is as for the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transport: Option<Transport>,
    /// Who works on its queues. Not given, it is as for the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_threads: Option<IoThreads>,
    /// The host's CPUs that its own I/O threads run on, such as 0-3,5. Not given, they are those of
    /// all I/O threads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(schema_with = "schema::cpu_list"))]
    pub io_affinity: Option<CpuList>,
    /// How much its reads and writes together may be in a time. Not given, it is any amount.
    #[serde(
        default,
        deserialize_with = "table::one",
        skip_serializing_if = "RateLimitsConfig::is_empty"
    )]
    pub rate_limit: RateLimitsConfig,
    /// The same for reads by themselves, in place of both together.
    #[serde(
        default,
        deserialize_with = "table::one",
        skip_serializing_if = "RateLimitsConfig::is_empty"
    )]
    pub read_rate_limit: RateLimitsConfig,
    /// The same for writes, and for all other requests.
    #[serde(
        default,
        deserialize_with = "table::one",
        skip_serializing_if = "RateLimitsConfig::is_empty"
    )]
    pub write_rate_limit: RateLimitsConfig,
}

/// A socket device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, from 3 to 4294967294.
    #[cfg_attr(test, schemars(range(min = 3, max = 4_294_967_294_u32)))]
    pub cid: u32,
    /// The path of the Unix socket that programs of the host connect to, and which is made with
    /// the machine. The guest's connections to a port go to the same path with `_` and the port
    /// behind it.
    pub socket: PathBuf,
    /// How the guest reaches it. Not given, it is as for the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transport: Option<Transport>,
}

/// An entropy device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// How many bytes the guest can have. Not given, it is any number.
    #[serde(
        default,
        deserialize_with = "table::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub rate_limit: Option<RateLimitConfig>,
    /// How the guest reaches it. Not given, it is as for the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transport: Option<Transport>,
}

/// How much a device may do in a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RateLimitsConfig {
    /// The bytes. Not given, it is any number.
    #[serde(
        default,
        deserialize_with = "table::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub bandwidth: Option<RateLimitConfig>,
    /// The operations: requests of a disk, packets of a network. Not given, it is any number.
    #[serde(
        default,
        deserialize_with = "table::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub ops: Option<RateLimitConfig>,
}

impl RateLimitsConfig {
    /// Whether nothing is limited.
    pub fn is_empty(&self) -> bool {
        self.bandwidth.is_none() && self.ops.is_none()
    }
}

/// How much of something there can be in a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RateLimitConfig {
    /// How much in a second.
    pub per_second: NonZeroU64,
    /// How much at once after a rest. Not given, it is as much as in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<NonZeroU64>,
}

/// A memory balloon (virtio-balloon).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct BalloonConfig {
    /// How much of the guest's RAM is to be in the balloon at first: a multiple of 4K.
    #[cfg_attr(test, schemars(schema_with = "schema::memory_size"))]
    pub target: MemorySize,
    /// Whether the guest may take RAM out of the balloon where it would have to kill a process
    /// otherwise.
    pub deflate_on_oom: bool,
    /// Whether the guest reports free pages, which are given back to the host until they are used
    /// again.
    pub free_page_reporting: bool,
    /// How the guest reaches it. Not given, it is as for the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transport: Option<Transport>,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self {
            target: MemorySize::bytes(0),
            deflate_on_oom: true,
            free_page_reporting: true,
            transport: None,
        }
    }
}
