//! `cargo xtask boot`: boots a stock Debian kernel with a disk and a network.
//!
//! [`run`] builds the program and prepares the guest; [`run_here`] then runs it, on a machine whose
//! KVM runs any guest: this one, or the nested machine.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use rustix::termios::tcgetwinsize;

use crate::host::{HostKvm, host_kvm};
use crate::{assets, cargo, initrd, nested, packages, place, process};

/// The host's end of the network, which the guest pings.
const HOST_ADDRESS: &str = "192.168.127.1";
const GUEST_ADDRESS: &str = "192.168.127.2/24";
/// What the host says to a guest on its own network.
const GREETING: &str = "hello";
/// Nobody, for a default route.
const ROUTER: &str = "192.168.127.254";
const TAP: &str = "kiln-boot";
const DISK_ID: &str = "root";
/// How long a boot with checks may take.
const LIMIT: Duration = Duration::from_secs(600);

/// How the guest's lines begin that we check. The rest is for people.
const MARK: &str = "kiln-boot: ";

/// What the guest runs on its root disk.
const SHOW: &str = r#"
echo "kiln-boot: kernel $(uname -sr)"
echo "kiln-boot: processors $(nproc)"
kiln-disks | sed 's/^/kiln-boot: disk /'
echo "kiln-boot: root $(awk '$2 == "/" {print $1, $3, substr($4, 1, 2)}' /proc/mounts)"
echo "kiln-boot: address $(ip -4 -o address show dev eth0 | awk '{print $4}')"
"#;
const PING: &str = r#"
ping -c 3 -W 10 192.168.127.1 && echo "kiln-boot: ping ok"
"#;

/// What the guest's network is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Network {
    /// A tap interface between guest and host, in a network of their own.
    Tap,
    /// The host's network, by passt.
    User,
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tap => "tap",
            Self::User => "user",
        })
    }
}

/// What `cargo xtask boot` is asked to do.
#[derive(Clone, Debug, Args)]
pub struct BootArgs {
    /// The series of Debian's kernel: 6.1 or 6.12.
    #[arg(long, default_value = "6.12", value_parser = assets::SERIES)]
    kernel: String,
    /// vCPUs.
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// RAM, as `kiln run --memory` takes it.
    #[arg(long, default_value = "512M")]
    memory: String,
    /// The network: a tap, with the host alone, or the host's own network (`user`).
    #[arg(long, value_enum, default_value_t = Network::Tap)]
    net: Network,
}

/// What the guest is made of, with paths that hold wherever it runs.
#[derive(Clone, Debug, Args)]
pub struct Prepared {
    #[arg(long)]
    kiln: PathBuf,
    #[arg(long)]
    image: PathBuf,
    #[arg(long)]
    initrd: PathBuf,
    #[arg(long)]
    root: PathBuf,
    /// What `uname` in the guest has to say.
    #[arg(long)]
    release: String,
    #[arg(long)]
    cpus: u32,
    #[arg(long)]
    memory: String,
    #[arg(long, value_enum)]
    net: Network,
}

/// Boots the guest, on this machine or in the nested one, and returns the exit status.
///
/// # Errors
///
/// When something cannot be built or prepared, or the nested machine fails.
pub fn run(args: &BootArgs) -> Result<u8> {
    packages::ensure(packages::RUN)?;
    let guest = assets::guest()?;
    let kernel = guest.kernel(&args.kernel)?;
    eprintln!("xtask: building kiln");
    let kiln = cargo::build_kiln()?;
    let prepared = Prepared {
        kiln,
        image: kernel.bzimage.clone(),
        initrd: kernel.initrd.clone(),
        root: guest.root.clone(),
        release: kernel.release.clone(),
        cpus: args.cpus,
        memory: args.memory.clone(),
        net: args.net,
    };
    if args.net == Network::User && host_kvm() == HostKvm::Hardware {
        // As whoever we are, and not in a network of its own.
        return run_here(&prepared);
    }
    let this = std::env::current_exe().context("find our own program")?;
    let mut command: Vec<OsString> = vec![this.into(), "boot-here".into()];
    let options: [(&str, OsString); 8] = [
        ("--kiln", prepared.kiln.into()),
        ("--image", prepared.image.into()),
        ("--initrd", prepared.initrd.into()),
        ("--root", prepared.root.into()),
        ("--release", prepared.release.into()),
        ("--cpus", prepared.cpus.to_string().into()),
        ("--memory", prepared.memory.into()),
        ("--net", prepared.net.to_string().into()),
    ];
    for (name, value) in options {
        command.extend([name.into(), value]);
    }
    let is_interactive = is_interactive();
    let options = nested::Options {
        limit: (!is_interactive).then_some(LIMIT),
        input: is_interactive,
        ..nested::Options::default()
    };
    place::run("booting", &options, &command)
}

fn is_interactive() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// Boots the guest on the machine that we run on: interactively on a terminal, else with checks.
/// Returns the exit status.
///
/// # Errors
///
/// When something cannot be prepared, or a check fails.
pub fn run_here(prepared: &Prepared) -> Result<u8> {
    let folder = tempfile::tempdir().context("make a temporary folder")?;
    let root = folder.path().join("root.ext4");
    // The image stays as it is for others. It is mostly holes, and stays so too.
    let mut copy = process::tied("cp");
    process::run(copy.arg("--sparse=always").arg(&prepared.root).arg(&root))?;
    let network = Carried::start(prepared.net)?;
    let initrd = folder.path().join("initrd");
    let is_interactive = is_interactive();
    let show = format!("{SHOW}{}", network.script);
    let script = if is_interactive {
        interactive_script(&show)
    } else {
        show
    };
    initrd::with_script(&prepared.initrd, &initrd, &script)?;
    let mut command = kiln(prepared, &initrd, &root);
    if is_interactive {
        let status = command
            .status()
            .with_context(|| format!("start `{}`", process::show(&command)))?;
        return Ok(status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(nested::FAILED));
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("start `{}`", process::show(&command)))?;
    let output = child.stdout.take().context("kiln has no output")?;
    let said = follow(output)?;
    let status = child.wait().context("wait for kiln")?;
    check(&said, prepared).with_context(|| format!("kiln ended with {status}"))?;
    ensure!(status.success(), "kiln ended with {status}");
    println!(
        "xtask: booted {} with its disk and network, and powered off",
        prepared.release
    );
    Ok(0)
}

fn kiln(prepared: &Prepared, initrd: &Path, root: &Path) -> Command {
    let mut command = process::tied(&prepared.kiln);
    command
        .arg("run")
        .arg("--kernel")
        .arg(&prepared.image)
        .arg("--initrd")
        .arg(initrd);
    let mut disk = root.as_os_str().to_owned();
    disk.push(format!(",id={DISK_ID}"));
    let (net, address) = match prepared.net {
        Network::Tap => (
            format!("tap={TAP}"),
            format!("eth0:{GUEST_ADDRESS} kiln.gateway={HOST_ADDRESS}"),
        ),
        Network::User => ("user".to_owned(), "eth0:dhcp".to_owned()),
    };
    command.arg("--disk").arg(disk).args(["--net", &net]);
    command.args([
        "--cpus",
        &prepared.cpus.to_string(),
        "--memory",
        &prepared.memory,
    ]);
    command.arg("--cmdline").arg(format!(
        "console=ttyS0 quiet panic=-1 root=/dev/vda rw kiln.ip={address}"
    ));
    command
}

/// Shows the same, and then gives a shell.
fn interactive_script(show: &str) -> String {
    let size = tcgetwinsize(std::io::stdout())
        .map(|size| format!("stty rows {} columns {}\n", size.ws_row, size.ws_col))
        .unwrap_or_default();
    let term = std::env::var("TERM").unwrap_or_default();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-+.".contains(c);
    let term = if term.chars().all(is_plain) {
        term
    } else {
        String::new()
    };
    format!(
        "{show}export TERM='{term}'\n{size}echo 'Here is a shell. Its end, or poweroff, ends the guest.'\nsetsid cttyhack sh -l\n"
    )
}

/// Shows the guest's output and returns it, line by line.
fn follow(output: ChildStdout) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let mut reader = BufReader::new(output);
    let mut line = Vec::new();
    while reader
        .read_until(b'\n', &mut line)
        .context("read the guest's output")?
        > 0
    {
        let mut stdout = std::io::stdout().lock();
        stdout
            .write_all(&line)
            .and_then(|()| stdout.flush())
            .context("show the guest's output")?;
        lines.push(String::from_utf8_lossy(&line).trim_end().to_owned());
        line.clear();
    }
    Ok(lines)
}

/// Checks that the guest said all that a good boot says.
fn check(said: &[String], prepared: &Prepared) -> Result<()> {
    let size = fs::metadata(&prepared.root)
        .with_context(|| format!("open {}", prepared.root.display()))?
        .len();
    let expected = expected(prepared, size);
    let missing = missing(said, &expected);
    if let Some(first) = missing.first() {
        let rest = missing.len() - 1;
        bail!("the guest did not say `{MARK}{first}` ({rest} more of its lines are missing)");
    }
    Ok(())
}

fn expected(prepared: &Prepared, disk_size: u64) -> Vec<String> {
    let mut lines = vec![
        format!("kernel Linux {}", prepared.release),
        format!("processors {}", prepared.cpus),
        format!("disk vda bytes={disk_size} id={DISK_ID} readonly=0"),
        "root /dev/vda ext4 rw".into(),
    ];
    match prepared.net {
        Network::Tap => lines.extend([format!("address {GUEST_ADDRESS}"), "ping ok".into()]),
        Network::User => lines.push(format!("host says {GREETING}")),
    }
    lines
}

fn missing<'a>(said: &[String], expected: &'a [String]) -> Vec<&'a String> {
    let said: Vec<_> = said
        .iter()
        .filter_map(|line| line.strip_prefix(MARK))
        .collect();
    expected
        .iter()
        .filter(|line| !said.contains(&line.as_str()))
        .collect()
}

/// The host's side of the guest's network, as long as this is there.
struct Carried {
    /// By which the guest shows that it works.
    script: String,
    _tap: Option<Tap>,
}

impl Carried {
    fn start(network: Network) -> Result<Self> {
        if network == Network::Tap {
            return Ok(Self {
                script: PING.to_owned(),
                _tap: Some(Tap::new()?),
            });
        }
        let script = greet()?;
        // passt gives the guest the addresses of the interface with the default route, and a nested
        // machine has none.
        let route = process::output(process::tied("ip").args(["route", "show", "default"]))?;
        let needs_route = route.is_empty() && rustix::process::geteuid().is_root();
        let tap = needs_route.then(Tap::new).transpose()?;
        if tap.is_some() {
            ip(&["route", "add", "default", "dev", TAP, "via", ROUTER])?;
        }
        Ok(Self { script, _tap: tap })
    }
}

/// Greets whoever connects to a port of this machine's loopback address, and gives the script of a
/// guest that does so: that address is its gateway's there.
fn greet() -> Result<String> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen at a port")?;
    let port = listener.local_addr().context("listen at a port")?.port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(GREETING.as_bytes());
        }
    });
    // The pipe never ends: passt of 2023 does not go on when the guest closes its direction first.
    Ok(format!(
        r#"
mkfifo /run/open
gateway=$(ip route | awk '/^default/ {{print $3; exit}}')
echo "kiln-boot: host says $(timeout 30 nc "$gateway" {port} <>/run/open)"
"#
    ))
}

/// A tap interface with the host's address, as long as this is there.
struct Tap;

impl Tap {
    fn new() -> Result<Self> {
        ip(&["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"])?;
        let tap = Self;
        ip(&["address", "add", &format!("{HOST_ADDRESS}/24"), "dev", TAP])?;
        ip(&["link", "set", TAP, "up"])?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if let Err(error) = ip(&["link", "delete", TAP]) {
            eprintln!("xtask: {error:#}");
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    process::run(process::tied("ip").args(arguments))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn prepared() -> Prepared {
        Prepared {
            kiln: "/t/kiln".into(),
            image: "/t/bzImage".into(),
            initrd: "/t/initrd".into(),
            root: "/t/root".into(),
            release: "6.12.1".into(),
            cpus: 2,
            memory: "512M".into(),
            net: Network::Tap,
        }
    }

    #[test]
    fn a_boot_is_good_only_with_every_line() {
        let expected = expected(&prepared(), 4096);
        let good: Vec<_> = expected
            .iter()
            .map(|line| format!("{MARK}{line}"))
            .collect();
        assert!(missing(&good, &expected).is_empty());
        for left_out in 0..good.len() {
            let mut said = good.clone();
            said[left_out] = expected[left_out].clone(); // without the mark
            assert_eq!(missing(&said, &expected), [&expected[left_out]]);
        }
    }

    #[test]
    fn the_guest_pings_the_address_that_the_host_has() {
        assert!(PING.contains(&format!(" {HOST_ADDRESS} ")));
        assert!(interactive_script(SHOW).starts_with(SHOW));
    }

    #[test]
    fn kiln_is_given_the_disk_and_the_network() {
        let command = kiln(
            &prepared(),
            Path::new("/x/initrd"),
            Path::new("/x/root.ext4"),
        );
        let line = process::show(&command);
        for part in [
            "/t/kiln run --kernel /t/bzImage --initrd /x/initrd",
            "--disk /x/root.ext4,id=root",
            "--net tap=kiln-boot",
            "--cpus 2 --memory 512M",
            "root=/dev/vda rw kiln.ip=eth0:192.168.127.2/24",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
    }
    #[test]
    fn a_guest_on_the_hosts_network_is_greeted_there() {
        let prepared = Prepared {
            net: Network::User,
            ..prepared()
        };
        let line = process::show(&kiln(&prepared, Path::new("/i"), Path::new("/r")));
        assert!(line.contains("--net user "), "{line}");
        assert!(line.contains("kiln.ip=eth0:dhcp"), "{line}");
        let expected = expected(&prepared, 4096);
        assert!(expected.contains(&"host says hello".to_owned()));
        assert!(!expected.iter().any(|line| line.starts_with("address")));

        let script = greet().unwrap();
        let port = script.split("$gateway\" ").nth(1).unwrap();
        let port: u16 = port.split(' ').next().unwrap().parse().unwrap();
        let mut said = String::new();
        let mut stream = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.read_to_string(&mut said).unwrap();
        assert_eq!(said, GREETING);
    }
}
