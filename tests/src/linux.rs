//! Debian's kernels as guests of the `kiln` program.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use kiln_vmm::Transport;
use kiln_xtask::assets::{self, Guest, Kernel};
use kiln_xtask::{initrd, tools};

use crate::program::{self, Outcome, Program};

/// How long a guest may take, from its start to its end. The emulated processors of a nested
/// machine are slow.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Makes tests of functions that take a [`Transport`], over PCI first: `pci::name`, and
/// `then_mmio::name`, for tests run in the order of their names. They need hardware KVM.
///
/// Those behind `over mmio when asked` are `then_mmio_in_full::name` over MMIO, which `cargo xtask
/// test` leaves out unless it is asked for them: tests of guests without virtio devices, for which
/// the transport makes no difference but that there is no PCI bus, and tests that take minutes.
#[macro_export]
macro_rules! over_every_transport {
    ($($name:ident),* $(,)?; over mmio when asked: $($other:ident),* $(,)?; when asked: $($rare:ident),+ $(,)?) => {
        $crate::over_every_transport!(@ pci Pci $($name)* $($other)*);
        $crate::over_every_transport!(@ then_mmio Mmio $($name)*);
        $crate::over_every_transport!(@ pci_in_full Pci $($rare)+);
        $crate::over_every_transport!(@ then_mmio_in_full Mmio $($other)* $($rare)+);
    };
    (; over mmio when asked: $($other:ident),+ $(,)?) => {
        $crate::over_every_transport!(@ pci Pci $($other)+);
        $crate::over_every_transport!(@ then_mmio_in_full Mmio $($other)+);
    };
    ($($name:ident),+ $(,)? $(; over mmio when asked: $($other:ident),+ $(,)?)?) => {
        $crate::over_every_transport!(@ pci Pci $($name)+ $($($other)+)?);
        $crate::over_every_transport!(@ then_mmio Mmio $($name)+);
        $($crate::over_every_transport!(@ then_mmio_in_full Mmio $($other)+);)?
    };
    (@ $module:ident $transport:ident) => {};
    (@ $module:ident $transport:ident $($name:ident)+) => {
        mod $module {
            $(
                #[test]
                #[ignore = "needs hardware KVM: run by cargo xtask test"]
                fn $name() {
                    super::$name(kiln_vmm::Transport::$transport);
                }
            )+
        }
    };
}

/// The kernels and the root disk that guests are made of.
pub fn guest_assets() -> &'static Guest {
    static ASSETS: OnceLock<Guest> = OnceLock::new();
    #[allow(clippy::panic)]
    ASSETS.get_or_init(|| match assets::guest() {
        Ok(guest) => guest,
        Err(error) => panic!("prepare the guests: {error:#}"),
    })
}

/// A guest with a kernel of Debian's, in a folder of its own.
pub struct Linux {
    /// Where its initrd is, and where a test can put its own files.
    pub folder: tempfile::TempDir,
    /// The kernel.
    pub kernel: &'static Kernel,
    image: PathBuf,
    cmdline: String,
    args: Vec<OsString>,
    under: Vec<OsString>,
}

impl Linux {
    /// A guest with the kernel of a series, such as `6.12`, from its bzImage, that reaches its
    /// virtio devices by `transport`.
    pub fn new(series: &str, transport: Transport) -> Self {
        #[allow(clippy::panic)]
        let kernel = match guest_assets().kernel(series) {
            Ok(kernel) => kernel,
            Err(error) => panic!("{error:#}"),
        };
        Self::of(kernel, transport)
    }

    /// A guest with this kernel, else as [`Linux::new`].
    pub fn of(kernel: &'static Kernel, transport: Transport) -> Self {
        #[allow(clippy::panic)]
        let folder = match tempfile::tempdir() {
            Ok(folder) => folder,
            Err(error) => panic!("make a temporary folder: {error}"),
        };
        Self {
            folder,
            kernel,
            image: kernel.bzimage.clone(),
            cmdline: "console=ttyS0 quiet panic=-1".to_owned(),
            args: vec!["--transport".into(), transport.to_string().into()],
            under: Vec::new(),
        }
    }

    /// Takes the ELF kernel instead of the bzImage, entered by `protocol`.
    pub fn vmlinux(mut self, protocol: &str) -> Self {
        self.image = self.kernel.vmlinux.clone();
        self.arg("--boot-protocol").arg(protocol)
    }

    /// Adds words to the kernel's command line.
    pub fn cmdline(mut self, words: &str) -> Self {
        self.cmdline = format!("{} {words}", self.cmdline);
        self
    }

    /// The kernel's whole command line.
    pub fn whole_cmdline(&self) -> &str {
        &self.cmdline
    }

    /// Adds an argument of `kiln run`.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Has another program start `kiln`: a program and its arguments, to which the command is added.
    pub fn under(mut self, words: &[&str]) -> Self {
        self.under = words.iter().map(Into::into).collect();
        self
    }

    /// Adds a disk, with its options in `options`.
    pub fn disk(self, path: &Path, options: &str) -> Self {
        let mut text = path.as_os_str().to_owned();
        text.push(options);
        self.arg("--disk").arg(text)
    }

    /// A copy of the root disk, for this guest alone.
    pub fn root_disk(&self) -> std::io::Result<PathBuf> {
        let path = self.folder.path().join("root.ext4");
        std::fs::copy(&guest_assets().root, &path)?;
        Ok(path)
    }

    /// Adds the disk of tools, which the script mounts with `. kiln-tools`: fio, iperf3, ethtool and
    /// more, from [`kiln_xtask::tools`].
    pub fn tools(self) -> Self {
        static TOOLS: OnceLock<PathBuf> = OnceLock::new();
        #[allow(clippy::panic)]
        let disk = TOOLS.get_or_init(|| match assets::tools() {
            Ok(disk) => disk,
            Err(error) => panic!("prepare the tools: {error:#}"),
        });
        self.disk(disk, &format!(",readonly,id={}", tools::ID))
    }

    /// Starts the guest, which runs `script` and powers off.
    pub fn start(&self, script: &str) -> std::io::Result<Program> {
        let initrd = self.folder.path().join("initrd");
        initrd::with_script(&self.kernel.initrd, &initrd, script).map_err(std::io::Error::other)?;
        let mut args: Vec<OsString> = vec!["run".into(), "--kernel".into()];
        args.push(self.image.clone().into());
        args.push("--initrd".into());
        args.push(initrd.into());
        args.push("--cmdline".into());
        args.push(self.cmdline.clone().into());
        args.extend(self.args.iter().cloned());
        let mut words = self.under.clone();
        words.push(program::kiln().into());
        words.append(&mut args);
        let program = words.remove(0);
        Program::start(program, &words)
    }

    /// Runs the guest to its end.
    pub fn run(&self, script: &str) -> std::io::Result<Outcome> {
        self.start(script)?.wait(PATIENCE)
    }
}

impl Outcome {
    /// The lines of the output, without what a serial console adds to their ends.
    pub fn lines(&self) -> Vec<&str> {
        self.output.lines().map(str::trim_end).collect()
    }

    /// What stands behind `name=` on a line of its own.
    pub fn value(&self, name: &str) -> Option<&str> {
        let prefix = format!("{name}=");
        self.lines()
            .into_iter()
            .find_map(|line| line.strip_prefix(prefix.as_str()))
    }
}
