//! What Debian ships for a machine to boot: its kernels of every flavour, its installer, a memory
//! tester, and a whole system.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::{Kernel, Store, guest_kernel};
use crate::{packages, process, root};

/// Debian's kernels: series, and flavour.
pub const KERNELS: [(&str, &str); 6] = [
    ("6.1", "amd64"),
    ("6.1", "cloud-amd64"),
    ("6.1", "rt-amd64"),
    ("6.12", "amd64"),
    ("6.12", "cloud-amd64"),
    ("6.12", "rt-amd64"),
];

/// What the cloud kernels have built in and the others do not: the filesystem of our root disk, and
/// the checksum that it asks the kernel for by name.
const MODULES: [&str; 2] = ["crc32c_generic", "ext4"];

const INSTALLER: &str = "debian-installer-12-netboot-amd64";
/// The installer that speaks on a serial port, in its package.
const INSTALLER_FOLDER: &str =
    "usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64";
const MEMTEST: &str = "memtest86+";
const MEMTEST_IMAGE: &str = "boot/memtest86+x64.bin";

/// The release of Debian that the system is.
const SUITE: &str = "bookworm";
/// What the system has besides what every Debian has.
const INCLUDE: &str = "linux-image-cloud-amd64,initramfs-tools,zstd,systemd-sysv,udev,dbus,\
    iproute2,iputils-ping,pciutils,util-linux,kmod";
/// What is left out of its packages.
const EXCLUDE: [&str; 3] = [
    "path-exclude=/usr/share/doc/*",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/locale/*",
];
/// What is run at its end; `$1` is the system's folder.
const HOOKS: [&str; 2] = [
    r#"chroot "$1" passwd --delete root"#,
    r#"chroot "$1" systemctl enable systemd-networkd"#,
];
const FILES: [(&str, &str); 5] = [
    ("etc/hostname", "kiln\n"),
    // Else it is the one of the machine that made the system.
    ("etc/resolv.conf", ""),
    ("etc/machine-id", ""),
    (
        "etc/fstab",
        "LABEL=kiln-system / ext4 errors=remount-ro 0 1\n",
    ),
    (
        "etc/systemd/network/kiln.network",
        include_str!("../../../../resources/guest/system/kiln.network"),
    ),
];
/// The bytes of the system's disk; about a third of them are used.
const SIZE: u64 = 1 << 30;

/// What Debian ships for a machine to boot.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Distribution {
    /// The kernels, one of each of [`KERNELS`].
    pub kernels: Vec<Kernel>,
    /// An image of an ext4 filesystem with a small system on it, for them.
    pub root: PathBuf,
    /// The installer.
    pub installer: Installer,
    /// The memory tester memtest86+, in the format of a bzImage.
    pub memtest: PathBuf,
    /// A whole system.
    pub system: System,
}

/// Debian's installer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Installer {
    /// Its kernel, a bzImage.
    pub kernel: PathBuf,
    /// Its initrd, which is all of it.
    pub initrd: PathBuf,
}

/// A whole Debian with systemd, of which nothing but a few lines of configuration is ours.
///
/// Its network has the address 192.168.150.2/24; root logs in without a password.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct System {
    /// An image of its disk, an ext4 filesystem. Guests get a copy.
    pub disk: PathBuf,
    /// Its kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initrd that it made for itself.
    pub initrd: PathBuf,
}

impl Distribution {
    /// Returns the kernel of a series and a flavour.
    ///
    /// # Errors
    ///
    /// When it is not one of [`KERNELS`].
    pub fn kernel(&self, series: &str, flavour: &str) -> Result<&Kernel> {
        self.kernels
            .iter()
            .find(|kernel| (kernel.series, kernel.flavour) == (series, flavour))
            .with_context(|| format!("there is no kernel {series}-{flavour}"))
    }
}

/// Returns what Debian ships for a machine to boot, and fetches or makes what is missing of it:
/// 500 MiB, and some minutes, and root is needed for it. Works without a network when nothing is
/// missing.
///
/// # Errors
///
/// When something cannot be fetched or made.
pub fn distribution() -> Result<Distribution> {
    let store = Store::open()?;
    let kernels = KERNELS.map(|(series, flavour)| guest_kernel(&store, series, flavour, &MODULES));
    let installer = ["linux", "initrd.gz"].map(|name| format!("{INSTALLER_FOLDER}/{name}"));
    let installer = store.files(INSTALLER, &[&installer[0], &installer[1]])?;
    Ok(Distribution {
        kernels: kernels.into_iter().collect::<Result<_>>()?,
        root: root::image(&store)?,
        installer: Installer {
            kernel: installer.join("linux"),
            initrd: installer.join("initrd.gz"),
        },
        memtest: store
            .files(MEMTEST, &[MEMTEST_IMAGE])?
            .join("memtest86+x64.bin"),
        system: system(&store)?,
    })
}

impl Store {
    /// Returns the folder with these files of a package, the newest that is in the store, or fetches
    /// it.
    fn files(&self, package: &str, paths: &[&str]) -> Result<PathBuf> {
        let prefix = format!("{package}_");
        let names = self.names()?;
        if let Some(newest) = names.iter().filter(|name| name.starts_with(&prefix)).max() {
            return Ok(self.folder.join(newest));
        }
        let fetched = self.fetch(|| Ok(package.to_owned()))?;
        let made = fetched.temporary.path().join("files");
        fs::create_dir(&made).with_context(|| format!("make {}", made.display()))?;
        for path in paths {
            let from = fetched.contents.join(path);
            let name = from.file_name().context("a file has a name")?;
            self.rename(&from, &made.join(name))?;
        }
        let kept = self.folder.join(&fetched.name);
        self.rename(&made, &kept)?;
        Ok(kept)
    }
}

fn system(store: &Store) -> Result<System> {
    let inputs = (SUITE, INCLUDE, EXCLUDE, HOOKS, FILES, SIZE);
    let folder = store.keep("system", inputs, make_system)?;
    Ok(System {
        disk: folder.join("disk.ext4"),
        kernel: folder.join("vmlinuz"),
        initrd: folder.join("initrd.img"),
    })
}

fn make_system(to: &Path) -> Result<()> {
    packages::ensure(packages::SYSTEM)?;
    ensure!(
        rustix::process::geteuid().is_root(),
        "making a Debian system takes root"
    );
    eprintln!("xtask: making a Debian system");
    let tree = to.with_extension("tree");
    let mut command = process::tied("mmdebstrap");
    command.args(["--quiet", "--mode=root", "--include", INCLUDE]);
    command.args(EXCLUDE.map(|option| format!("--dpkgopt={option}")));
    command.args(HOOKS.map(|hook| format!("--customize-hook={hook}")));
    process::run(command.arg(SUITE).arg(&tree))?;
    for (path, contents) in FILES {
        super::write(&tree.join(path), contents.as_bytes())?;
    }
    fs::create_dir(to).with_context(|| format!("make {}", to.display()))?;
    for name in ["vmlinuz", "initrd.img"] {
        // A link to the newest in `boot`.
        let from = tree.join(name);
        let link = fs::read_link(&from).with_context(|| format!("read {}", from.display()))?;
        let from = tree.join(link.strip_prefix("/").unwrap_or(&link));
        let copy = fs::copy(&from, to.join(name));
        copy.with_context(|| format!("copy {}", from.display()))?;
    }
    root::image_of(&tree, &to.join("disk.ext4"), SIZE, "kiln-system")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_package_are_taken_from_the_store() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open_at(folder.path().to_owned()).unwrap();
        for name in ["memtest86+_6.10-4", "memtest86_7", "memtest86+ia32_8"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let files = store.files("memtest86+", &["boot/x"]).unwrap();
        assert_eq!(files, folder.path().join("memtest86+_6.10-4"));
    }

    #[test]
    fn every_cloud_kernel_of_other_tests_is_among_the_kernels() {
        for series in super::super::SERIES {
            assert!(KERNELS.contains(&(series, super::super::FLAVOUR)));
        }
    }
}
