//! The Debian packages that the developer commands use, and installing those that are missing.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::process;

/// A program that we use, and the Debian package that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tool {
    /// The program's name or its absolute path.
    pub program: &'static str,
    /// The package.
    pub package: &'static str,
}

const fn tool(program: &'static str, package: &'static str) -> Tool {
    Tool { program, package }
}

/// The path of busybox, linked statically, that becomes the userland of guests.
pub const BUSYBOX: &str = "/bin/busybox";
/// The path of the program that shares the host's files with the nested machine.
pub const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// The keys that Debian's lists of packages are signed with.
const ARCHIVE_KEY: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What preparing guests takes.
pub const GUEST: &[Tool] = &[
    tool(BUSYBOX, "busybox-static"),
    tool("mkfs.ext4", "e2fsprogs"),
    tool("lz4", "lz4"),
    tool("xz", "xz-utils"),
    tool("zstd", "zstd"),
    tool("setpriv", "util-linux"),
];

/// What making a whole Debian system takes.
pub(crate) const SYSTEM: &[Tool] = &[
    tool("mmdebstrap", "mmdebstrap"),
    tool(ARCHIVE_KEY, "debian-archive-keyring"),
];

/// What the nested machine takes.
pub const NESTED: &[Tool] = &[
    tool("qemu-system-x86_64", "qemu-system-x86"),
    tool(VIRTIOFSD, "qemu-system-common"),
];

/// What running guests by hand and by the integration tests takes.
pub const RUN: &[Tool] = &[
    tool("ip", "iproute2"),
    tool("e2fsck", "e2fsprogs"),
    tool("passt", "passt"),
    tool("qemu-img", "qemu-utils"),
];

/// What the tests of all packages take.
pub const HOST: &[Tool] = &[tool("qemu-img", "qemu-utils")];

/// What is measured beside Kiln, and with.
pub const BENCH: &[Tool] = &[
    tool("qemu-system-x86_64", "qemu-system-x86"),
    tool("ip", "iproute2"),
    tool("iperf3", "iperf3"),
];

/// What building the fuzz targets takes: libFuzzer comes as C++.
pub(crate) const FUZZ: &[Tool] = &[tool("c++", "g++")];

/// Makes sure that `tools` are there: the packages of those missing are installed when we are
/// root, and named together with the command otherwise.
///
/// # Errors
///
/// When something is missing and cannot be installed.
pub fn ensure(tools: &[Tool]) -> Result<()> {
    let missing = packages_of(tools, |tool| process::find(tool.program).is_some());
    if missing.is_empty() {
        return Ok(());
    }
    let command = format!(
        "apt-get install --yes --no-install-recommends {}",
        missing.join(" ")
    );
    if !rustix::process::geteuid().is_root() {
        bail!("missing Debian packages; install them with: sudo {command}");
    }
    eprintln!("xtask: installing {}", missing.join(" "));
    let lists_are_empty = !has_lists(Path::new("/var/lib/apt/lists"));
    if lists_are_empty {
        update()?;
    }
    if let Err(error) = install(&missing) {
        if lists_are_empty {
            return Err(error);
        }
        update()?;
        install(&missing)?;
    }
    let still = packages_of(tools, |tool| process::find(tool.program).is_some());
    if !still.is_empty() {
        bail!(
            "{} installed, but not all of its programs are there",
            still.join(" ")
        );
    }
    Ok(())
}

/// Fetches the lists of packages.
///
/// # Errors
///
/// When `apt-get update` fails.
pub fn update() -> Result<()> {
    process::run(process::tied("apt-get").args(["--quiet=2", "update"]))
}

/// Downloads the newest of these packages, and all that they need, to the new folder `to`. What is
/// installed on this machine makes no difference.
///
/// # Errors
///
/// When the folder cannot be made or something cannot be downloaded.
pub fn download_with_dependencies(packages: &[&str], to: &Path) -> Result<()> {
    // Where apt has what it has half of.
    let partial = to.join("partial");
    fs::create_dir_all(&partial).with_context(|| format!("make {}", partial.display()))?;
    let attempt = || {
        let mut command = process::tied("apt-get");
        command.args(["--quiet=2", "install", "--yes", "--download-only"]);
        command.arg("--no-install-recommends");
        for option in [
            "Dir::State::Status=/dev/null",
            "Debug::NoLocking=1",
            // As root, apt would download as a user who may not write here.
            "APT::Sandbox::User=root",
            &format!("Dir::Cache::Archives={}", to.display()),
        ] {
            command.args(["--option", option]);
        }
        process::run(command.args(packages))
            .with_context(|| format!("download {}", packages.join(" ")))
    };
    if let Err(error) = attempt() {
        // Lists that are absent or old name packages that are not there.
        if !rustix::process::geteuid().is_root() {
            return Err(error.context("is `sudo apt-get update` needed?"));
        }
        update()?;
        attempt()?;
    }
    Ok(())
}

fn install(packages: &[&str]) -> Result<()> {
    let mut command = process::tied("apt-get");
    command
        .args(["--quiet=2", "install", "--yes", "--no-install-recommends"])
        .args(packages);
    process::run(command.env("DEBIAN_FRONTEND", "noninteractive"))
        .with_context(|| format!("install {}", packages.join(" ")))
}

fn packages_of(tools: &[Tool], is_there: impl Fn(&Tool) -> bool) -> Vec<&'static str> {
    let mut packages: Vec<_> = tools
        .iter()
        .filter(|tool| !is_there(tool))
        .map(|tool| tool.package)
        .collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

fn has_lists(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|entries| {
        entries
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
    })
}

/// Returns the newest package among `names`, one a line, of a series of Debian's kernels, such as
/// 6.12, and a flavour of it, such as `cloud-amd64`.
pub fn newest_kernel<'a>(names: &'a str, series: &str, flavour: &str) -> Option<&'a str> {
    names
        .lines()
        .map(str::trim)
        .filter(|name| kernel_version(name, series, flavour).is_some())
        .max_by_key(|name| kernel_version(name, series, flavour))
}

/// Returns the numbers in the name of a kernel's package when it is of `series` and `flavour`.
fn kernel_version(name: &str, series: &str, flavour: &str) -> Option<Vec<u32>> {
    let release = name
        .strip_prefix("linux-image-")?
        .strip_suffix(flavour)?
        .strip_suffix('-')?;
    let rest = release.strip_prefix(series)?.strip_prefix('.')?;
    rest.split(['.', '-'])
        .map(|part| {
            // `117+deb12`: what follows the plus is the release of Debian.
            part.split_once('+')
                .map_or(part, |(number, _)| number)
                .parse()
                .ok()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: &str = "linux-image-cloud-amd64
linux-image-6.1.0-47-cloud-amd64-unsigned
linux-image-6.1.0-9-cloud-amd64
linux-image-6.1.0-56-cloud-amd64
linux-image-6.1.0-56-cloud-amd64-dbg
linux-image-6.1.0-57-rt-amd64
linux-image-6.1.0-58-amd64
linux-image-6.12-cloud-amd64
linux-image-6.12.99+deb12-cloud-amd64
linux-image-6.12.117+deb12-cloud-amd64
linux-image-6.12.118+deb12-cloud-amd64-unsigned
linux-image-6.12.118+deb12-cloud-arm64
";

    #[test]
    fn the_newest_signed_kernel_of_a_series_and_a_flavour_is_found() {
        for (series, flavour, newest) in [
            (
                "6.1",
                "cloud-amd64",
                Some("linux-image-6.1.0-56-cloud-amd64"),
            ),
            (
                "6.12",
                "cloud-amd64",
                Some("linux-image-6.12.117+deb12-cloud-amd64"),
            ),
            ("6.1", "amd64", Some("linux-image-6.1.0-58-amd64")),
            ("6.1", "rt-amd64", Some("linux-image-6.1.0-57-rt-amd64")),
            ("6.12", "amd64", None),
            ("6.18", "cloud-amd64", None),
        ] {
            assert_eq!(newest_kernel(NAMES, series, flavour), newest);
        }
    }

    #[test]
    fn each_missing_package_is_named_once() {
        let tools = [
            tool("b", "two"),
            tool("a", "one"),
            tool("c", "two"),
            tool("d", "three"),
        ];
        assert_eq!(
            packages_of(&tools, |tool| tool.program == "d"),
            ["one", "two"]
        );
        assert!(packages_of(&tools, |_| true).is_empty());
    }

    #[test]
    fn empty_lists_are_told_from_filled_ones() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!has_lists(&folder.path().join("absent")));
        fs::create_dir(folder.path().join("partial")).unwrap();
        assert!(!has_lists(folder.path()));
        fs::write(
            folder
                .path()
                .join("host_dists_main_binary-amd64_Packages.lz4"),
            "",
        )
        .unwrap();
        assert!(has_lists(folder.path()));
    }
}
