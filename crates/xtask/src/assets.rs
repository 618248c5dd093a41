//! What guests are made of: Debian's kernels, an initrd for each, and a root disk.
//!
//! All of it is kept in `guest/` in cargo's target folder, and made once: a kernel is kept under
//! its package's name and version, what is made from our own files under a hash of them. Each
//! thing is made under a temporary name and then renamed, so it is whole if it is there.
//!
//! [`distribution`] has what more Debian ships for a machine to boot, which takes minutes to fetch.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, flock};

use crate::initrd::{self, Busybox};
use crate::modules::{self, Module};
use crate::{bzimage, packages, paths, process, root, tools};

mod distribution;
pub use distribution::{Distribution, Installer, KERNELS, System, distribution};

/// The series of Debian's kernels that guests are tried with.
pub const SERIES: [&str; 2] = ["6.1", "6.12"];
/// The flavour of them: without drivers of hardware that no cloud has.
const FLAVOUR: &str = "cloud-amd64";
/// The series that the nested machine runs.
const NESTED_SERIES: &str = "6.12";

/// What a guest loads: the transports and devices of virtio, the power button, and panic reports.
const GUEST_MODULES: [&str; 11] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_balloon",
    "virtio_console",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "button",
    "evdev",
    "pvpanic_mmio",
];
/// What the nested machine loads.
const NESTED_MODULES: [&str; 4] = ["overlay", "kvm_amd", "tun", "vhost_net"];

/// How the names of folders begin in which things are being made.
const TEMPORARY: &str = "temporary-";

/// All that guests are made of.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Guest {
    /// The kernels, one of each of [`SERIES`].
    pub kernels: Vec<Kernel>,
    /// An image of an ext4 filesystem with a small system on it. Guests that write get a copy.
    pub root: PathBuf,
}

/// One of Debian's kernels.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Kernel {
    /// The series, such as `6.12`.
    pub series: &'static str,
    /// The flavour, such as `cloud-amd64`.
    pub flavour: &'static str,
    /// The whole release, as `uname -r` in the guest prints it.
    pub release: String,
    /// The kernel as Debian ships it.
    pub bzimage: PathBuf,
    /// The ELF kernel that is compressed in it.
    pub vmlinux: PathBuf,
    /// The initrd of a test guest: see [`initrd::with_script`].
    pub initrd: PathBuf,
}

/// The kernel and the initrd of the nested machine.
#[derive(Clone, Debug)]
pub(crate) struct Nested {
    pub(crate) vmlinux: PathBuf,
    pub(crate) initrd: PathBuf,
}

impl Guest {
    /// Returns the kernel of a series.
    ///
    /// # Errors
    ///
    /// When it is not one of [`SERIES`].
    pub fn kernel(&self, series: &str) -> Result<&Kernel> {
        self.kernels
            .iter()
            .find(|kernel| kernel.series == series)
            .with_context(|| format!("there is no kernel {series}"))
    }
}

/// Returns what guests are made of, and makes what is missing of it. Works without a network when
/// nothing is missing.
///
/// # Errors
///
/// When something cannot be fetched or made.
pub fn guest() -> Result<Guest> {
    let store = Store::open()?;
    let kernels = SERIES.map(|series| guest_kernel(&store, series, FLAVOUR, &[]));
    Ok(Guest {
        kernels: kernels.into_iter().collect::<Result<_>>()?,
        root: root::image(&store)?,
    })
}

/// Returns the image of the disk of tools ([`mod@tools`]), and makes it when it is not there: 70 MB
/// to fetch the first time. Works without a network when nothing is missing.
///
/// # Errors
///
/// When something cannot be fetched or made.
pub fn tools() -> Result<PathBuf> {
    tools::image(&Store::open()?)
}

/// Looks for newer kernels, even when there are some, and returns what guests are made of.
///
/// # Errors
///
/// When something cannot be fetched or made.
pub fn update() -> Result<Guest> {
    let store = Store::open()?;
    for series in SERIES {
        store.fetch_kernel(series, FLAVOUR)?;
    }
    drop(store);
    guest()
}

pub(crate) fn nested() -> Result<Nested> {
    let store = Store::open()?;
    let kernel = store.kernel(NESTED_SERIES, FLAVOUR)?;
    let busybox = Busybox::installed()?;
    let inputs = (
        &kernel.folder,
        NESTED_MODULES,
        &busybox,
        initrd::NESTED_FILES,
    );
    let initrd = store.keep("nested-initrd", inputs, |to| {
        let mut modules = kernel.modules(&NESTED_MODULES)?;
        // Nobody judges this kernel by its taint, and an emulated processor is slow to check.
        modules.iter_mut().for_each(modules::take_signature_off);
        write(to, &initrd::nested(&busybox, &modules))
    })?;
    Ok(Nested {
        vmlinux: kernel.folder.join("vmlinux"),
        initrd,
    })
}

/// Returns a kernel with an initrd that loads `more` modules than all guests do.
fn guest_kernel(
    store: &Store,
    series: &'static str,
    flavour: &'static str,
    more: &[&str],
) -> Result<Kernel> {
    let kernel = store.kernel(series, flavour)?;
    let busybox = Busybox::installed()?;
    let wanted = [&GUEST_MODULES, more].concat();
    let inputs = (
        &kernel.folder,
        &wanted,
        &busybox,
        initrd::GUEST_FILES,
        initrd::GUEST_COMMANDS,
        initrd::TOOLS_LINKS,
    );
    let initrd = store.keep(&format!("initrd-{series}-{flavour}"), inputs, |to| {
        write(to, &initrd::guest(&busybox, &kernel.modules(&wanted)?))
    })?;
    Ok(Kernel {
        series,
        flavour,
        bzimage: kernel.folder.join("bzImage"),
        vmlinux: kernel.folder.join("vmlinux"),
        release: kernel.release,
        initrd,
    })
}

fn write(to: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(to, bytes).with_context(|| format!("write {}", to.display()))
}

/// The folder that all is kept in. One process at a time makes things in it.
#[derive(Debug)]
pub(crate) struct Store {
    folder: PathBuf,
    _lock: File,
}

/// A kernel's package in the store.
struct Unpacked {
    folder: PathBuf,
    release: String,
}

impl Unpacked {
    fn modules(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        modules::collect(&self.folder.join("modules"), wanted)
            .with_context(|| format!("take the modules of {}", self.release))
    }
}

impl Store {
    fn open() -> Result<Self> {
        packages::ensure(packages::GUEST)?;
        Self::open_at(paths::target().join("guest"))
    }

    fn open_at(folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let path = folder.join("lock");
        let lock = File::create(&path).with_context(|| format!("write {}", path.display()))?;
        flock(&lock, FlockOperation::LockExclusive)
            .with_context(|| format!("lock {}", path.display()))?;
        let store = Self {
            folder,
            _lock: lock,
        };
        store.sweep()?;
        Ok(store)
    }

    /// Returns the file `name` that is made from `inputs` by `make`, which is given the path to
    /// make it at when it is not there.
    pub(crate) fn keep(
        &self,
        name: &str,
        inputs: impl Hash,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let mut hasher = DefaultHasher::new();
        inputs.hash(&mut hasher);
        let kept = self.folder.join(format!("{name}-{:016x}", hasher.finish()));
        if !kept.exists() {
            let temporary = self.temporary()?;
            let made = temporary.path().join(name);
            make(&made)?;
            self.rename(&made, &kept)?;
        }
        Ok(kept)
    }

    /// Removes what an interrupted process left: nobody else has the lock now.
    fn sweep(&self) -> Result<()> {
        for name in self
            .names()?
            .iter()
            .filter(|name| name.starts_with(TEMPORARY))
        {
            let folder = self.folder.join(name);
            fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
        }
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(&self.folder)
            .with_context(|| format!("list {}", self.folder.display()))?;
        Ok(entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect())
    }

    fn temporary(&self) -> Result<tempfile::TempDir> {
        tempfile::Builder::new()
            .prefix(TEMPORARY)
            .tempdir_in(&self.folder)
            .with_context(|| format!("make a folder in {}", self.folder.display()))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        fs::rename(from, to).with_context(|| format!("make {}", to.display()))
    }

    /// Returns the newest kernel of a series and flavour that is in the store, or fetches it.
    fn kernel(&self, series: &str, flavour: &str) -> Result<Unpacked> {
        match self.newest(series, flavour)? {
            Some(kernel) => Ok(kernel),
            None => self.fetch_kernel(series, flavour),
        }
    }

    fn newest(&self, series: &str, flavour: &str) -> Result<Option<Unpacked>> {
        // Folders are named `PACKAGE_VERSION`.
        let names = self.names()?;
        let package = |name: &str| name.split_once('_').map(|(package, _)| package.to_owned());
        let packages: Vec<_> = names.iter().filter_map(|name| package(name)).collect();
        let packages = packages.join("\n");
        let Some(newest) = packages::newest_kernel(&packages, series, flavour) else {
            return Ok(None);
        };
        let newest = names
            .iter()
            .filter(|name| package(name).as_deref() == Some(newest))
            .max();
        Ok(newest.map(|name| self.unpacked(name)))
    }

    fn unpacked(&self, name: &str) -> Unpacked {
        let package = name.split_once('_').map_or(name, |(package, _)| package);
        let release = package
            .strip_prefix("linux-image-")
            .unwrap_or(package)
            .to_owned();
        Unpacked {
            folder: self.folder.join(name),
            release,
        }
    }

    fn fetch_kernel(&self, series: &str, flavour: &str) -> Result<Unpacked> {
        let package = self.fetch(|| {
            let names =
                process::output(process::tied("apt-cache").args(["pkgnames", "linux-image-"]))?;
            let package = packages::newest_kernel(&names, series, flavour)
                .with_context(|| format!("Debian's lists have no kernel {series}-{flavour}"))?;
            Ok(package.to_owned())
        })?;
        let (name, contents) = (&package.name, &package.contents);
        let kernel = self.unpacked(name);
        if kernel.folder.exists() {
            return Ok(kernel);
        }
        let made = package.temporary.path().join("kernel");
        fs::create_dir(&made).with_context(|| format!("make {}", made.display()))?;
        let bzimage = made.join("bzImage");
        let vmlinuz = contents.join(format!("boot/vmlinuz-{}", kernel.release));
        self.rename(&vmlinuz, &bzimage)?;
        let image = fs::read(&bzimage).with_context(|| format!("read {}", bzimage.display()))?;
        let vmlinux =
            bzimage::unpack(&image).with_context(|| format!("unpack the kernel of {name}"))?;
        write(&made.join("vmlinux"), &vmlinux)?;
        let modules = ["lib/modules", "usr/lib/modules"]
            .map(|folder| contents.join(folder).join(&kernel.release))
            .into_iter()
            .find(|folder| folder.is_dir())
            .with_context(|| format!("{name} has no modules"))?;
        self.rename(&modules, &made.join("modules"))?;
        self.rename(&made, &kernel.folder)?;
        Ok(kernel)
    }

    /// Downloads and unpacks the package that `choose` finds in Debian's lists.
    fn fetch(&self, choose: impl Fn() -> Result<String>) -> Result<Package> {
        let temporary = self.temporary()?;
        let deb = download(choose, temporary.path())?;
        let stem = deb.file_stem().unwrap_or_default().to_string_lossy();
        // `PACKAGE_VERSION_ARCHITECTURE`
        let name = stem.rsplit_once('_').map_or(&*stem, |(name, _)| name);
        eprintln!("xtask: unpacking {name}");
        let contents = temporary.path().join("contents");
        process::run(
            process::tied("dpkg-deb")
                .arg("--extract")
                .arg(&deb)
                .arg(&contents),
        )?;
        Ok(Package {
            name: name.to_owned(),
            contents,
            temporary,
        })
    }
}

/// A package, downloaded and unpacked.
struct Package {
    /// `PACKAGE_VERSION`
    name: String,
    contents: PathBuf,
    temporary: tempfile::TempDir,
}

/// Downloads the package that `choose` finds in Debian's lists into `folder`, and returns its path.
fn download(choose: impl Fn() -> Result<String>, folder: &Path) -> Result<PathBuf> {
    let attempt = || -> Result<()> {
        let package = choose()?;
        eprintln!("xtask: downloading {package}");
        let mut command = process::tied("apt-get");
        // As root, apt would download as a user who may not write here.
        command.args([
            "--quiet=2",
            "--option",
            "APT::Sandbox::User=root",
            "download",
            &package,
        ]);
        process::run(command.current_dir(folder))
    };
    if let Err(error) = attempt() {
        // Lists that are absent or old name packages that are not there.
        if !rustix::process::geteuid().is_root() {
            return Err(error.context("is `sudo apt-get update` needed?"));
        }
        packages::update()?;
        attempt()?;
    }
    let mut debs = fs::read_dir(folder)
        .with_context(|| format!("list {}", folder.display()))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "deb"));
    let deb = debs.next().context("apt-get downloaded nothing")?;
    ensure!(
        debs.next().is_none(),
        "apt-get downloaded more than one package"
    );
    Ok(deb)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_made_once_and_again_when_its_inputs_change() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open_at(folder.path().join("guest")).unwrap();
        let mut made = 0;
        let mut keep = |inputs: &[u8]| {
            let kept = store.keep("thing", inputs, |to| {
                made += 1;
                write(to, inputs)
            });
            fs::read(kept.unwrap()).unwrap()
        };
        assert_eq!(keep(b"one"), b"one");
        assert_eq!(keep(b"one"), b"one");
        assert_eq!(keep(b"two"), b"two");
        assert_eq!(made, 2);
    }

    #[test]
    fn what_could_not_be_made_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open_at(folder.path().to_owned()).unwrap();
        let failed = store.keep("thing", b"", |to| {
            write(to, b"half")?;
            anyhow::bail!("interrupted")
        });
        assert!(failed.is_err());
        let left: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .flatten()
            .map(|e| e.file_name())
            .collect();
        assert_eq!(left, ["lock"]);
    }

    #[test]
    fn what_an_interrupted_process_left_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let left = folder.path().join("temporary-x");
        fs::create_dir(&left).unwrap();
        write(&left.join("half"), b"").unwrap();
        Store::open_at(folder.path().to_owned()).unwrap();
        assert!(!left.exists());
    }

    #[test]
    fn the_newest_kernel_in_the_store_is_used() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open_at(folder.path().to_owned()).unwrap();
        assert!(store.newest("6.1", FLAVOUR).unwrap().is_none());
        for name in [
            "6.1.0-9-cloud-amd64_6.1.9-1",
            "6.1.0-56-cloud-amd64_6.1.192-2",
            "6.12.1+deb12-cloud-amd64_6.12.1-1",
            "6.1.0-57-amd64_6.1.193-1",
        ] {
            fs::create_dir(folder.path().join(format!("linux-image-{name}"))).unwrap();
        }
        let kernel = store.newest("6.1", FLAVOUR).unwrap().unwrap();
        assert_eq!(kernel.release, "6.1.0-56-cloud-amd64");
        assert!(
            kernel
                .folder
                .ends_with("linux-image-6.1.0-56-cloud-amd64_6.1.192-2")
        );
        let full = store.newest("6.1", "amd64").unwrap().unwrap();
        assert_eq!(full.release, "6.1.0-57-amd64");
    }
}
