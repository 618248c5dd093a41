//! `cargo xtask boot`: boots a stock Debian kernel with a disk and a network.
//!
//! [`run`] builds the program and prepares the guest; [`run_here`] then runs it, on a machine whose
//! KVM runs any guest: this one, or the nested machine.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rustix::termios::tcgetwinsize;

use crate::{assets, cargo, initrd, nested, packages, place, process};

/// The host's end of the network, which the guest pings.
const HOST_ADDRESS: &str = "192.168.127.1";
const GUEST_ADDRESS: &str = "192.168.127.2/24";
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
ping -c 3 -W 10 192.168.127.1 && echo "kiln-boot: ping ok"
"#;

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
    let this = std::env::current_exe().context("find our own program")?;
    let mut command: Vec<OsString> = vec![this.into(), "boot-here".into()];
    let options: [(&str, OsString); 7] = [
        ("--kiln", kiln.into()),
        ("--image", kernel.bzimage.clone().into()),
        ("--initrd", kernel.initrd.clone().into()),
        ("--root", guest.root.clone().into()),
        ("--release", kernel.release.clone().into()),
        ("--cpus", args.cpus.to_string().into()),
        ("--memory", args.memory.clone().into()),
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
    let _tap = Tap::new()?;
    let initrd = folder.path().join("initrd");
    let is_interactive = is_interactive();
    let script = if is_interactive {
        interactive_script()
    } else {
        SHOW.to_owned()
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
    command
        .arg("--disk")
        .arg(disk)
        .args(["--net", &format!("tap={TAP}")]);
    command.args([
        "--cpus",
        &prepared.cpus.to_string(),
        "--memory",
        &prepared.memory,
    ]);
    command.arg("--cmdline").arg(format!(
        "console=ttyS0 quiet panic=-1 root=/dev/vda rw kiln.ip=eth0:{GUEST_ADDRESS} \
         kiln.gateway={HOST_ADDRESS}"
    ));
    command
}

/// Shows the same, and then gives a shell.
fn interactive_script() -> String {
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
        "{SHOW}export TERM='{term}'\n{size}echo 'Here is a shell. Its end, or poweroff, ends the guest.'\nsetsid cttyhack sh -l\n"
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
    vec![
        format!("kernel Linux {}", prepared.release),
        format!("processors {}", prepared.cpus),
        format!("disk vda bytes={disk_size} id={DISK_ID} readonly=0"),
        "root /dev/vda ext4 rw".into(),
        format!("address {GUEST_ADDRESS}"),
        "ping ok".into(),
    ]
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
        assert!(SHOW.contains(&format!(" {HOST_ADDRESS} ")));
        assert!(interactive_script().starts_with(SHOW));
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
}
