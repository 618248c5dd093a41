//! The command line: its words, and what each option's text means.

mod net;

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use kiln_vmm::config::{BalloonConfig, DiskConfig, RateLimitConfig};
use kiln_vmm::{CpuList, Decompressor, IoThreads, MemorySize, Transport};

pub(crate) use net::NetArg;

/// Boot Linux in a KVM virtual machine.
#[derive(Debug, Parser)]
#[command(name = "kiln", version, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a virtual machine until it ends
    Run(Box<Run>),
    /// Say whether this host can run guests, and if not, why
    ///
    /// Exits with 0 if a stock Linux kernel will run here, with 1 if not.
    Check,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES, after_long_help = after_long_help())]
pub(crate) struct Run {
    /// A description of the machine, in TOML or JSON; the options given here go before what it
    /// says, and --disk or --net replace all of its disks or networks
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// What the machine is called in messages and in its metrics
    #[arg(long)]
    pub(crate) name: Option<String>,

    /// The kernel to boot: a Linux bzImage, or a 64-bit ELF file (vmlinux)
    #[arg(long, value_name = "FILE", required_unless_present = "config")]
    pub(crate) kernel: Option<PathBuf>,

    /// Who unpacks the kernel in a bzImage: the host, once for all starts, or the bzImage's own code
    /// in the guest each time, which takes longer and also moves the kernel to a random address
    /// (KASLR) [default: host]
    #[arg(long, value_name = "host|guest")]
    pub(crate) kernel_decompressor: Option<Decompressor>,

    /// Do not keep what the host unpacks in the user's cache folder, nor look there: unpack it in
    /// memory at each start
    #[arg(long)]
    pub(crate) no_kernel_cache: bool,

    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,

    /// The kernel's command line, passed on exactly as given [default: console=ttyS0]
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub(crate) cmdline: Option<String>,

    /// How the kernel is entered [default: auto]
    #[arg(long, value_enum, value_name = "PROTOCOL")]
    pub(crate) boot_protocol: Option<Protocol>,

    /// The number of vCPUs [default: 1]
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u32>,

    /// The guest's RAM: a number with K, M, G or T; MiB without [default: 512M]
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<MemorySize>,

    /// How the guest reaches its virtio devices, but for those that say otherwise: on PCI, which
    /// every kernel finds, or by registers in memory that it finds through ACPI [default: pci]
    #[arg(long, value_name = "pci|mmio")]
    pub(crate) transport: Option<Transport>,

    /// Who works on the queues of the virtio devices, but for those that say otherwise: one thread
    /// that all share, one for each device, or one for each queue of a disk and each pair of queues
    /// of a network interface [default: shared]
    #[arg(long, value_name = "shared|device|queue")]
    pub(crate) io_threads: Option<IoThreads>,

    /// The host's CPUs that the I/O threads run on, such as 0-3,5 [default: all]. In the options of
    /// a disk or a network interface, which must have threads of its own for that, a comma of the
    /// list is written twice
    #[arg(long, value_name = "CPUS")]
    pub(crate) io_affinity: Option<CpuList>,

    /// A disk (virtio-blk), in the order of /dev/vda, /dev/vdb, …: an image file or a block device.
    /// It is a qcow2 image if its name ends in .qcow2 or `format` says so, else raw; a qcow2 image
    /// may have no backing file but those that `backing` names, or with `backing=allow` any that it
    /// asks for. It has a queue for each vCPU, up to 16, unless `queues` says how many; writes last
    /// when the guest flushes them, or each at once (`cache=writethrough`); `direct` does without
    /// the host's page cache. `bandwidth` and `iops` limit what it does in a second, and at once
    /// after a rest (BURST; as much as in a second by default), with `read-` or `write-` before them
    /// in one direction; BYTES can have K, M, G or T. A comma in the path is written twice
    #[arg(
        long,
        value_name = "PATH[,readonly][,format=raw|qcow2][,backing=allow|PATH]…[,id=ID][,queues=N]\
                      [,cache=writeback|writethrough][,direct]\
                      [,logical-block-size=512|4096][,bandwidth=BYTES[:BURST]][,iops=N[:BURST]]\
                      [,transport=pci|mmio]\
                      [,io-threads=shared|device|queue][,io-affinity=CPUS]"
    )]
    pub(crate) disk: Vec<DiskArg>,

    /// A network interface (virtio-net) on a tap or macvtap interface of the host (`tap`, which
    /// is created for the machine with `create`, or `fd` for one that is open already, once for each
    /// pair of queues; with `vhost=on` the host's kernel carries the packets by itself); on the host's own network, without privileges, by passt (`user`), where each `forward` leads a port
    /// of the host to one of the guest, and the guest reaches the host's loopback addresses at that
    /// of its gateway unless that is off; or on the network that another program offers at a Unix
    /// stream socket, such as gvproxy (`socket`, or `socket-fd` for one that is open already). A
    /// comma in a path is written twice
    #[arg(
        long,
        value_name = "tap=NAME[,create][,vhost=on|off]|fd=N[,fd=N]...[,vhost=on|off]|user[,forward=tcp|udp:[ADDRESS:]PORT[:GUEST_PORT]]...\
                      [,host-loopback=on|off][,passt=PATH]|socket=PATH[,reconnect=SECONDS]\
                      |socket-fd=N[,queues=N][,mtu=BYTES][,mac=MAC][,transport=pci|mmio]\
                      [,rx-bandwidth=BYTES[:BURST]][,rx-packets=N[:BURST]]\
                      [,tx-bandwidth=BYTES[:BURST]][,tx-packets=N[:BURST]]\
                      [,io-threads=shared|device|queue][,io-affinity=CPUS]"
    )]
    pub(crate) net: Vec<NetArg>,

    /// A socket device (virtio-vsock) for streams between programs of the guest and of the host: a
    /// context id from 3 on, and the path of a Unix socket that is made with the machine. A program
    /// of the host connects there and sends `CONNECT PORT` on a line; the guest's connections to
    /// CID 2 go to `SOCKET_PORT`. A comma in the path is written twice
    #[arg(long, value_name = "cid=CID,socket=PATH[,transport=pci|mmio]")]
    pub(crate) vsock: Option<VsockArg>,

    /// An entropy device (virtio-rng): random numbers of the host for the guest, as many bytes in a
    /// second as `rate` says, and at once after a rest as `burst` says [default: none; without a
    /// value: one without a limit]
    #[arg(
        long,
        value_name = "[rate=BYTES][,burst=BYTES][,transport=pci|mmio]",
        num_args = 0..=1,
        default_missing_value = ""
    )]
    pub(crate) rng: Option<RngArg>,

    /// A memory balloon (virtio-balloon). The guest reports free pages, which go back to the host
    /// until it uses them again; and SIZE of its RAM (as for --memory; nothing by default) is to be
    /// in the balloon, from which a guest that is out of memory may take it. Each of it can be
    /// turned off. The size cannot be changed while the guest runs
    #[arg(
        long,
        num_args = 0..=1,
        default_missing_value = "",
        value_name = "[target=SIZE][,deflate-on-oom=on|off][,free-page-reporting=on|off]\
                      [,transport=pci|mmio]"
    )]
    pub(crate) balloon: Option<BalloonArg>,

    /// Which console has the standard input and output: the serial port (ttyS0), or a virtio console
    /// (hvc0, which takes console=hvc0 on the kernel's command line), which can also lead elsewhere.
    /// On a terminal the virtio console has its size [default: serial]
    #[arg(
        long,
        value_name = "serial|virtio[,stdio|,null|,file=PATH][,transport=pci|mmio]"
    )]
    pub(crate) console: Option<ConsoleArg>,

    /// A named port of the virtio console, /dev/virtio-ports/NAME in the guest: the programs that
    /// connect to a Unix socket, which is made with the machine, have it one after the other. A
    /// comma in the path is written twice
    #[arg(long, value_name = "name=NAME,socket=PATH")]
    pub(crate) virtio_port: Vec<VirtioPortArg>,

    /// Where the guest's serial port (ttyS0) leads [default: stdio, or null where the virtio
    /// console has that]
    #[arg(long, value_name = "stdio|null|file=PATH")]
    pub(crate) serial: Option<SerialArg>,

    #[command(flatten)]
    pub(crate) metrics: MetricsArgs,
}

/// What is written about the machine while it lives.
#[derive(Debug, Args)]
pub(crate) struct MetricsArgs {
    /// A file for the machine's metrics, replaced as a whole while the machine lives and at its end
    #[arg(long, value_name = "FILE")]
    pub(crate) metrics: Option<PathBuf>,

    /// How often, in seconds; 0 for at the end only
    #[arg(
        long,
        value_name = "SECONDS",
        default_value = "1",
        requires = "metrics"
    )]
    pub(crate) metrics_interval: Interval,

    /// In what format [default: prometheus for a file name that ends in .prom, else json]
    #[arg(long, value_enum, value_name = "FORMAT", requires = "metrics")]
    pub(crate) metrics_format: Option<MetricsFormat>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MetricsFormat {
    /// The fields of `kiln_vmm::Metrics`
    Json,
    /// The text format of Prometheus
    Prometheus,
}

/// A time between two things; none where there is no second one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Interval(pub(crate) Option<Duration>);

impl std::str::FromStr for Interval {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let seconds: f64 = text.parse().map_err(|_| "it is not a number")?;
        if seconds == 0.0 {
            return Ok(Self(None));
        }
        if !(0.01..=86400.0).contains(&seconds) {
            return Err("there are 0.01 to 86400 seconds, and 0".to_owned());
        }
        Ok(Self(Some(Duration::from_secs_f64(seconds))))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Protocol {
    /// PVH for an ELF file with a PVH note, the 64-bit Linux boot protocol for all others
    Auto,
    /// The 64-bit Linux boot protocol
    Linux64,
    /// PVH: 32-bit protected mode, for ELF files with a PVH note
    Pvh,
}

/// A disk as it is on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskArg(pub(crate) DiskConfig);

impl std::str::FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut options = split_options(text).into_iter();
        let path = options.next().unwrap_or_default();
        if path.is_empty() {
            return Err("the path of the disk is empty".to_owned());
        }
        let mut disk = DiskConfig {
            path: path.into(),
            ..DiskConfig::default()
        };
        for option in options {
            match option.split_once('=') {
                None if option == "readonly" => disk.readonly = true,
                None if option == "direct" => disk.direct = true,
                Some(("format", name)) => disk.format = Some(parse(name)?),
                Some(("backing", "allow")) => disk.any_backing = true,
                Some(("backing", path)) if !path.is_empty() => disk.backing.push(path.into()),
                Some(("id", id)) => disk.id = Some(id.to_owned()),
                Some(("queues", count)) => disk.queues = Some(parse(count)?),
                Some(("cache", mode)) => {
                    disk.cache = parse(mode)?;
                }
                Some(("logical-block-size", size)) => {
                    disk.logical_block_size = Some(parse(size)?);
                }
                Some(("engine", word)) => disk.engine = parse(word)?,
                Some(("transport", name)) => disk.transport = Some(transport(name)?),
                Some(("bandwidth", rate)) => disk.rate_limit.bandwidth = Some(bandwidth(rate)?),
                Some(("iops", rate)) => disk.rate_limit.ops = Some(operations(rate)?),
                Some(("read-bandwidth", rate)) => {
                    disk.read_rate_limit.bandwidth = Some(bandwidth(rate)?);
                }
                Some(("read-iops", rate)) => disk.read_rate_limit.ops = Some(operations(rate)?),
                Some(("write-bandwidth", rate)) => {
                    disk.write_rate_limit.bandwidth = Some(bandwidth(rate)?);
                }
                Some(("write-iops", rate)) => disk.write_rate_limit.ops = Some(operations(rate)?),
                Some(("io-threads", word)) => disk.io_threads = Some(parse(word)?),
                Some(("io-affinity", cpus)) => disk.io_affinity = Some(cpu_list(cpus)?),
                _ => {
                    return Err(format!(
                        "unknown disk option `{option}`: there are `readonly`, `format=raw|qcow2`, \
                         `backing=allow|PATH`, `id=ID`, `queues=N`, \
                         `cache=writeback|writethrough`, `direct`, \
                         `logical-block-size=512|4096`, `engine=auto|io_uring|sync`, `transport=pci|mmio`, \
                         `[read-|write-]bandwidth=BYTES[:BURST]`, `[read-|write-]iops=N[:BURST]`, \
                         `io-threads=shared|device|queue` and `io-affinity=CPUS`"
                    ));
                }
            }
        }
        Ok(Self(disk))
    }
}

/// Reads a value by its own words.
fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|e| format!("`{text}`: {e}"))
}

/// A limit: how much in a second, and at once.
fn rate(text: &str, amount: fn(&str) -> Option<u64>) -> Option<RateLimitConfig> {
    let (per_second, burst) = match text.split_once(':') {
        None => (text, None),
        Some((per_second, burst)) => (per_second, Some(burst)),
    };
    let amount = |text| amount(text).and_then(NonZeroU64::new);
    Some(RateLimitConfig {
        per_second: amount(per_second)?,
        burst: match burst {
            None => None,
            Some(burst) => Some(amount(burst)?),
        },
    })
}

/// A limit in bytes: a number of them, or one with K, M, G or T.
pub(crate) fn bandwidth(text: &str) -> Result<RateLimitConfig, String> {
    let bytes = |text: &str| match text.parse() {
        Ok(bytes) => Some(bytes),
        // Without a suffix, it would be so many MiB.
        Err(_) if text.ends_with(|last: char| last.is_ascii_digit()) => None,
        Err(_) => text.parse().ok().map(MemorySize::as_bytes),
    };
    rate(text, bytes)
        .ok_or_else(|| format!("`{text}`: say how many bytes in a second, such as 10M or 10M:40M"))
}

/// A limit in operations.
pub(crate) fn operations(text: &str) -> Result<RateLimitConfig, String> {
    rate(text, |text| text.parse().ok())
        .ok_or_else(|| format!("`{text}`: say how many in a second, such as 1000 or 1000:5000"))
}

fn cpu_list(text: &str) -> Result<CpuList, String> {
    text.parse().map_err(|e| format!("{e}"))
}

fn transport(name: &str) -> Result<Transport, String> {
    name.parse().map_err(|e| format!("`{name}`: {e}"))
}

/// Splits at single commas; two commas in the first piece stand for one.
fn split_path(text: &str) -> (String, Vec<&str>) {
    let mut path = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(',') {
        path.push_str(before);
        match after.strip_prefix(',') {
            Some(after) => {
                path.push(',');
                rest = after;
            }
            None => return (path, after.split(',').collect()),
        }
    }
    path.push_str(rest);
    (path, Vec::new())
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VsockArg {
    pub(crate) cid: u32,
    pub(crate) socket: PathBuf,
    pub(crate) transport: Option<Transport>,
}

impl std::str::FromStr for VsockArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut cid = None;
        let mut socket = None;
        let mut chosen = None;
        for option in split_options(text) {
            match option.split_once('=') {
                Some(("cid", number)) => {
                    cid = Some(number.parse().map_err(|e| format!("`{number}`: {e}"))?);
                }
                Some(("socket", path)) if !path.is_empty() => socket = Some(path.into()),
                Some(("transport", name)) => chosen = Some(transport(name)?),
                _ => {
                    return Err(format!(
                        "unknown vsock option `{option}`: there are `cid=CID`, `socket=PATH` and \
                         `transport=pci|mmio`"
                    ));
                }
            }
        }
        Ok(Self {
            cid: cid.ok_or("the guest's context id is missing: say `cid=CID`")?,
            socket: socket.ok_or("the path of the socket is missing: say `socket=PATH`")?,
            transport: chosen,
        })
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RngArg {
    pub(crate) rate: Option<NonZeroU64>,
    pub(crate) burst: Option<NonZeroU64>,
    pub(crate) transport: Option<Transport>,
}

impl std::str::FromStr for RngArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut rng = Self::default();
        for option in text.split(',').filter(|_| !text.is_empty()) {
            match option.split_once('=') {
                Some(("rate", bytes)) => rng.rate = Some(count(bytes)?),
                Some(("burst", bytes)) => rng.burst = Some(count(bytes)?),
                Some(("transport", name)) => rng.transport = Some(transport(name)?),
                _ => {
                    return Err(format!(
                        "unknown option `{option}` of an entropy device: there are `rate=BYTES`, \
                         `burst=BYTES` and `transport=pci|mmio`"
                    ));
                }
            }
        }
        if rng.burst.is_some() && rng.rate.is_none() {
            return Err("a `burst` needs a `rate`".to_owned());
        }
        Ok(rng)
    }
}

fn count(text: &str) -> Result<NonZeroU64, String> {
    text.parse()
        .map_err(|_| format!("`{text}` is not a number of bytes from 1 on"))
}

/// A balloon as it is on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BalloonArg(pub(crate) BalloonConfig);

impl std::str::FromStr for BalloonArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut balloon = BalloonConfig::default();
        for option in text.split(',').filter(|_| !text.is_empty()) {
            match option.split_once('=') {
                Some(("target", size)) => {
                    balloon.target = size.parse().map_err(|e| format!("{e}"))?;
                }
                Some(("deflate-on-oom", word)) => balloon.deflate_on_oom = on_or_off(word)?,
                Some(("free-page-reporting", word)) => {
                    balloon.free_page_reporting = on_or_off(word)?;
                }
                Some(("transport", name)) => balloon.transport = Some(transport(name)?),
                _ => {
                    return Err(format!(
                        "unknown balloon option `{option}`: there are `target=SIZE`, \
                         `deflate-on-oom=on|off`, `free-page-reporting=on|off` and \
                         `transport=pci|mmio`"
                    ));
                }
            }
        }
        Ok(Self(balloon))
    }
}

fn on_or_off(word: &str) -> Result<bool, String> {
    match word {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("`{word}`: there are `on` and `off`")),
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ConsoleArg {
    Serial,
    Virtio {
        to: SerialArg,
        transport: Option<Transport>,
    },
}

impl std::str::FromStr for ConsoleArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rest = match text.strip_prefix("virtio") {
            None if text == "serial" => return Ok(Self::Serial),
            Some("") => "",
            Some(rest) if rest.starts_with(',') => &rest[1..],
            _ => return Err("there are `serial` and `virtio`".to_owned()),
        };
        let (mut to, mut chosen) = (SerialArg::Stdio, None);
        for option in split_options(rest) {
            match option.split_once('=') {
                Some(("transport", name)) => chosen = Some(transport(name)?),
                _ => {
                    to = option.parse().map_err(|_| {
                        format!(
                            "unknown console option `{option}`: there are `stdio`, `null`, \
                             `file=PATH` and `transport=pci|mmio`"
                        )
                    })?;
                }
            }
        }
        Ok(Self::Virtio {
            to,
            transport: chosen,
        })
    }
}

/// The pieces of a text between single commas; two commas stand for one.
fn split_options(text: &str) -> Vec<String> {
    let mut pieces = Vec::new();
    let mut rest = text.to_owned();
    while !rest.is_empty() {
        let (piece, others) = split_path(&rest);
        rest = others.join(",");
        pieces.push(piece);
    }
    pieces
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VirtioPortArg {
    pub(crate) name: String,
    pub(crate) socket: PathBuf,
}

impl std::str::FromStr for VirtioPortArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut name, mut socket) = (None, None);
        for option in split_options(text) {
            match option.split_once('=') {
                Some(("name", text)) => name = Some(text.to_owned()),
                Some(("socket", path)) if !path.is_empty() => socket = Some(path.into()),
                _ => {
                    return Err(format!(
                        "unknown port option `{option}`: there are `name=NAME` and `socket=PATH`"
                    ));
                }
            }
        }
        Ok(Self {
            name: name.ok_or("the port's name is missing: say `name=NAME`")?,
            socket: socket.ok_or("the path of the socket is missing: say `socket=PATH`")?,
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SerialArg {
    Stdio,
    Null,
    File(PathBuf),
}

impl std::str::FromStr for SerialArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.split_once('=')) {
            ("stdio", _) => Ok(Self::Stdio),
            ("null", _) => Ok(Self::Null),
            (_, Some(("file", path))) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err("there are `stdio`, `null` and `file=PATH`".to_owned()),
        }
    }
}

const EXIT_CODES: &str = "\
Exit codes:
  0  the guest powered off
  1  the virtual machine could not be built or run; one line says why
  2  the command line is wrong
  3  the guest asked for a reset (reboot)
  4  the guest's kernel panicked (said through pvpanic)
  5  a triple fault
  6  the guest crashed: KVM could not go on, or a device failed
  7  stopped from outside: a second signal, or the escape sequence";

fn after_long_help() -> String {
    format!(
        "{EXIT_CODES}

Signals: the first SIGTERM, SIGINT or SIGHUP presses the guest's power button, the second stops the
machine at once.

On a terminal the console that has it is interactive: Ctrl-A x stops the machine, Ctrl-A p presses the power
button, Ctrl-A Ctrl-A sends a Ctrl-A.

KILN_LOG sets what is logged to the standard error output, such as `info` or `kiln_vmm=debug`.

Example:
  kiln run --kernel vmlinuz --initrd initrd.img --disk root.ext4 --net tap=tap0 \\
    --cpus 2 --memory 1G --cmdline \"console=ttyS0 root=/dev/vda rw\"
  kiln run --config vm.toml --memory 2G"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use kiln_vmm::{CacheMode, DiskFormat, IoEngine};

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    fn disk_config(text: &str) -> DiskConfig {
        text.parse::<DiskArg>().unwrap().0
    }

    #[test]
    fn a_disk_can_be_told_how_to_work() {
        let text = "a,queues=4,cache=writethrough,direct,logical-block-size=4096,engine=io_uring";
        let expected = DiskConfig {
            path: "a".into(),
            queues: Some(4),
            cache: CacheMode::Writethrough,
            direct: true,
            logical_block_size: Some(4096),
            engine: IoEngine::IoUring,
            ..DiskConfig::default()
        };
        assert_eq!(disk_config(text), expected);
        for (wrong, part) in [
            ("a,queues=x", "`x`"),
            ("a,queues=65536", "`65536`"),
            ("a,cache=none", "there are `writeback` and `writethrough`"),
            ("a,logical-block-size=4k", "`4k`"),
            ("a,engine=aio", "there are `auto`, `io_uring` and `sync`"),
            ("a,direct=maybe", "unknown disk option"),
        ] {
            let error = wrong.parse::<DiskArg>().unwrap_err();
            assert!(error.contains(part), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_disk_has_a_format_and_backing_files_that_it_may_have() {
        let disk = disk_config("a.img,format=qcow2,backing=base,,1,backing=/images/b");
        assert_eq!(disk.format, Some(DiskFormat::Qcow2));
        assert_eq!(disk.backing, ["base,1", "/images/b"].map(PathBuf::from));
        assert!(!disk.any_backing);
        assert_eq!(
            disk_config("a.qcow2,format=raw").format,
            Some(DiskFormat::Raw)
        );
        let disk = disk_config("a.qcow2,backing=allow");
        assert_eq!((disk.format, disk.any_backing), (None, true));
        for (text, part) in [
            ("a,format=vmdk", "`vmdk`: the formats are `raw` and `qcow2`"),
            ("a,backing=", "unknown disk option"),
        ] {
            let error = text.parse::<DiskArg>().unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_disk_has_a_path_and_options() {
        let disk = disk_config("a.img,readonly,id=root");
        assert_eq!(disk.path, PathBuf::from("a.img"));
        assert!(disk.readonly);
        assert_eq!(disk.id.as_deref(), Some("root"));
    }

    #[test]
    fn a_doubled_comma_belongs_to_the_path() {
        let disk = disk_config("a,,b,,readonly");
        assert_eq!(disk.path, PathBuf::from("a,b,readonly"));
        assert!(!disk.readonly);
        let disk = disk_config("a,,b,readonly");
        assert_eq!(disk.path, PathBuf::from("a,b"));
        assert!(disk.readonly);
    }

    #[test]
    fn an_unknown_option_of_a_disk_is_named() {
        let error = "a.img,ro".parse::<DiskArg>().unwrap_err();
        assert!(error.contains("`ro`") && error.contains("readonly"));
        assert!("".parse::<DiskArg>().is_err());
    }

    #[test]
    fn a_balloon_has_what_is_not_turned_off() {
        let balloon = |text: &str| text.parse::<BalloonArg>().map(|balloon| balloon.0);
        assert_eq!(balloon(""), Ok(BalloonConfig::default()));
        let expected = BalloonConfig {
            target: MemorySize::mib(256),
            deflate_on_oom: false,
            free_page_reporting: false,
            transport: Some(Transport::Mmio),
        };
        let text = "target=256M,deflate-on-oom=off,free-page-reporting=off,transport=mmio";
        assert_eq!(balloon(text), Ok(expected));
        assert!(
            balloon("free-page-reporting=on")
                .unwrap()
                .free_page_reporting
        );
        for (text, said) in [
            ("256M", "unknown balloon option `256M`"),
            ("target=", "memory size ``"),
            ("target=1G,", "unknown balloon option ``"),
            ("deflate-on-oom=yes", "`yes`: there are `on` and `off`"),
            ("deflate-on-oom", "unknown balloon option `deflate-on-oom`"),
        ] {
            let error = balloon(text).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn an_interval_is_a_number_of_seconds_or_none() {
        assert_eq!("0".parse(), Ok(Interval(None)));
        assert_eq!(
            "0.5".parse(),
            Ok(Interval(Some(Duration::from_millis(500))))
        );
        assert_eq!("60".parse(), Ok(Interval(Some(Duration::from_secs(60)))));
        for text in ["", "1s", "-1", "0.001", "1e9", "inf", "NaN"] {
            assert!(text.parse::<Interval>().is_err(), "{text}");
        }
    }

    #[test]
    fn each_device_can_have_a_transport_of_its_own() {
        let disk = disk_config("a.img,transport=mmio");
        assert_eq!(disk.transport, Some(Transport::Mmio));
        let net: NetArg = "tap=tap0,transport=pci".parse().unwrap();
        assert_eq!(net.0.transport, Some(Transport::Pci));
        let expected = "`isa`: the transports are `pci` and `mmio`";
        assert_eq!(
            "a.img,transport=isa".parse::<DiskArg>(),
            Err(expected.into())
        );
    }

    #[test]
    fn each_device_can_have_io_threads_of_its_own() {
        let disk: DiskArg = "a,,b,io-threads=device,io-affinity=0-1,,3".parse().unwrap();
        assert_eq!(disk.0.path, PathBuf::from("a,b"));
        assert_eq!(disk.0.io_threads, Some(IoThreads::Device));
        assert_eq!(disk.0.io_affinity.unwrap().to_string(), "0-1,3");
        let net: NetArg = "tap=t,io-affinity=2,io-threads=queue".parse().unwrap();
        assert_eq!(net.0.io_threads, Some(IoThreads::Queue));
        assert_eq!(net.0.io_affinity.unwrap().to_string(), "2");
        for (text, said) in [
            ("a,io-threads=two", "`two`: there are `shared`"),
            ("a,io-affinity=", "`` is not a list of CPUs"),
            ("a,io-affinity=0,3", "unknown disk option `3`"),
        ] {
            let error = text.parse::<DiskArg>().unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn limits_are_so_much_in_a_second_and_at_once() {
        let limit = |per_second, burst| {
            let per_second = NonZeroU64::new(per_second).unwrap();
            let burst = NonZeroU64::new(burst);
            Some(RateLimitConfig { per_second, burst })
        };
        let disk = disk_config("a,bandwidth=10M:40MiB,iops=1000");
        assert_eq!(disk.rate_limit.bandwidth, limit(10 << 20, 40 << 20));
        assert_eq!(disk.rate_limit.ops, limit(1000, 0));
        let disk = disk_config("a,read-bandwidth=4096,read-iops=5:6,write-iops=7");
        assert_eq!(disk.read_rate_limit.bandwidth, limit(4096, 0));
        assert_eq!(disk.read_rate_limit.ops, limit(5, 6));
        assert_eq!(disk.write_rate_limit.ops, limit(7, 0));
        for text in [
            "bandwidth=0",
            "bandwidth=x",
            "bandwidth=1M:",
            "bandwidth=",
            "bandwidth=-1",
            "iops=1K",
            "iops=1:0",
            "read-bandwidth=99999999999999999999",
        ] {
            let error = format!("a,{text}").parse::<DiskArg>().unwrap_err();
            assert!(error.contains("in a second, such as"), "{error}");
        }
    }

    #[test]
    fn a_socket_device_needs_a_context_id_and_a_socket() {
        let vsock: VsockArg = "cid=3,socket=/run/a,,b,transport=mmio".parse().unwrap();
        assert_eq!((vsock.cid, vsock.socket), (3, "/run/a,b".into()));
        assert_eq!(vsock.transport, Some(Transport::Mmio));
        let vsock: VsockArg = "socket=s,cid=4294967294".parse().unwrap();
        assert_eq!((vsock.cid, vsock.transport), (u32::MAX - 1, None));
        for (text, word) in [
            ("cid=3", "socket=PATH"),
            ("socket=s", "cid=CID"),
            ("cid=3,socket=", "`socket=`"),
            ("cid=x,socket=s", "`x`"),
            ("cid=3,socket=s,port=4", "`port=4`"),
            ("", "cid=CID"),
        ] {
            let error = text.parse::<VsockArg>().unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn an_entropy_device_has_a_limit_or_none() {
        assert_eq!("".parse(), Ok(RngArg::default()));
        let rng: RngArg = "rate=1000,burst=10,transport=mmio".parse().unwrap();
        assert_eq!(rng.rate, NonZeroU64::new(1000));
        assert_eq!(rng.burst, NonZeroU64::new(10));
        assert_eq!(rng.transport, Some(Transport::Mmio));
        for text in ["rate=0", "rate=1k", "burst=5", "speed=1", ",", "rate"] {
            assert!(text.parse::<RngArg>().is_err(), "{text}");
        }
        let given = |args: &[&str]| {
            let args = [&["kiln", "run", "--kernel", "k"], args].concat();
            match Cli::try_parse_from(args).unwrap().command {
                Command::Run(run) => run.rng,
                Command::Check => None,
            }
        };
        assert_eq!(given(&[]), None);
        assert_eq!(given(&["--rng", "--cpus", "2"]), Some(RngArg::default()));
        assert!(given(&["--rng", "rate=5"]).unwrap().rate.is_some());
    }

    #[test]
    fn a_console_is_the_serial_port_or_a_virtio_console() {
        assert_eq!("serial".parse(), Ok(ConsoleArg::Serial));
        let virtio = |to, transport| Ok(ConsoleArg::Virtio { to, transport });
        assert_eq!("virtio".parse(), virtio(SerialArg::Stdio, None));
        assert_eq!("virtio,null".parse(), virtio(SerialArg::Null, None));
        let (file, mmio) = (SerialArg::File("a,b".into()), Some(Transport::Mmio));
        assert_eq!(
            "virtio,file=a,,b,transport=mmio".parse(),
            virtio(file, mmio)
        );
        for text in [
            "",
            "hvc0",
            "virtio2",
            "serial,null",
            "virtio,pty",
            "virtio,transport=x",
        ] {
            assert!(text.parse::<ConsoleArg>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_port_needs_a_name_and_a_socket() {
        let port: VirtioPortArg = "name=a=b,socket=/run/a,,b".parse().unwrap();
        assert_eq!((&*port.name, port.socket), ("a=b", "/run/a,b".into()));
        for (text, word) in [
            ("name=a", "socket=PATH"),
            ("socket=s", "name=NAME"),
            ("name=a,socket=", "`socket=`"),
            ("name=a,socket=s,tap=t", "`tap=t`"),
            ("", "name=NAME"),
        ] {
            let error = text.parse::<VirtioPortArg>().unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn the_host_or_the_guest_unpacks_a_kernel() {
        let given = |args: &[&str]| {
            let args = [&["kiln", "run", "--kernel", "k"], args].concat();
            match Cli::try_parse_from(args)?.command {
                Command::Run(run) => Ok((run.kernel_decompressor, run.no_kernel_cache)),
                Command::Check => panic!("it is another command"),
            }
        };
        let parsed = |args: &[&str]| given(args).unwrap();
        assert_eq!(parsed(&[]), (None, false));
        assert_eq!(parsed(&["--no-kernel-cache"]), (None, true));
        let guest = parsed(&["--kernel-decompressor", "guest"]);
        assert_eq!(guest, (Some(Decompressor::Guest), false));
        let error: clap::Error = given(&["--kernel-decompressor", "both"]).unwrap_err();
        assert!(error.to_string().contains("`host` and `guest`"), "{error}");
    }

    #[test]
    fn a_serial_port_leads_to_one_of_three() {
        assert_eq!("stdio".parse(), Ok(SerialArg::Stdio));
        assert_eq!("null".parse(), Ok(SerialArg::Null));
        assert_eq!("file=x".parse(), Ok(SerialArg::File("x".into())));
        assert!("file=".parse::<SerialArg>().is_err());
        assert!("pty".parse::<SerialArg>().is_err());
    }
}
