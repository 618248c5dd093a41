//! The processes of the nested machine: QEMU, and a virtiofsd for each folder that it shares.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use rustix::process::{Resource, getrlimit};

use super::Options;
use super::script::Settings;
use crate::{packages, process};

/// The command line of the machine's kernel. The first part is about ending at once; the second
/// about watchdogs and clocks, which an emulation on a busy host upsets; the third about speed.
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 panic=-1 oops=panic reboot=t \
     tsc=reliable lpj=8000000 nowatchdog rcupdate.rcu_cpu_stall_suppress=1 no_timer_check \
     mitigations=off audit=0 random.trust_cpu=on";

/// The ports of the console besides the terminal, in the order of their numbers from 1.
const PORTS: [&str; 4] = ["control", "input", "output", "errors"];
/// The terminal's name as a port.
pub(super) const TERMINAL: &str = "terminal";

/// All that the machine is started from.
pub(super) struct Plan<'a> {
    pub(super) options: &'a Options,
    pub(super) settings: &'a Settings,
    pub(super) kernel: &'a Path,
    pub(super) initrd: &'a Path,
    /// Where sockets and logs are.
    pub(super) folder: &'a Path,
}

impl Plan<'_> {
    /// The file that the kernel logs to.
    pub(super) fn log(&self) -> PathBuf {
        self.folder.join("kernel log")
    }

    /// The file that QEMU and virtiofsd write their messages to.
    pub(super) fn messages(&self) -> PathBuf {
        self.folder.join("messages")
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The shared folders: tag and path of each.
    fn shares(&self) -> Vec<(&'static str, &Path)> {
        let output = self
            .settings
            .output
            .as_deref()
            .map(|path| ("results", path));
        std::iter::once(("host", Path::new("/")))
            .chain(output)
            .collect()
    }

    fn ports(&self) -> Vec<&'static str> {
        let terminal = self.settings.terminal.then_some(TERMINAL);
        PORTS.into_iter().chain(terminal).collect()
    }

    fn qemu(&self) -> Command {
        let Options {
            cpus,
            memory,
            icount,
            ..
        } = self.options;
        let mut command = process::tied("qemu-system-x86_64");
        let mut add = |option: &str, value: String| {
            command.args([option, &value]);
        };
        add("-name", "kiln-nested".into());
        add(
            "-machine",
            "q35,memory-backend=ram,hpet=off,vmport=off".into(),
        );
        if *icount {
            // Without erms and fsrm, whose use the emulator would count as one instruction.
            add("-cpu", "max,+svm,-erms,-fsrm".into());
            add("-accel", "tcg,thread=single".into());
            add("-icount", "shift=0,sleep=off".into());
            add("-smp", "1".into());
        } else {
            add("-cpu", "max,+svm".into());
            add("-accel", "tcg,thread=multi".into());
            add("-smp", cpus.to_string());
        }
        add("-m", format!("{memory}M"));
        // The first virtio device, by whose number Linux names the ports.
        add("-device", "virtio-serial-pci".into());
        for (number, port) in self.ports().into_iter().enumerate() {
            let socket = self.socket(port);
            add(
                "-chardev",
                format!("socket,id={port},path={}", socket.display()),
            );
            let device = match port {
                TERMINAL => format!("virtconsole,chardev={port},nr=0"),
                _ => format!(
                    "virtserialport,chardev={port},nr={},name={port}",
                    number + 1
                ),
            };
            add("-device", device);
        }
        // virtiofsd reads and writes the machine's memory.
        add(
            "-object",
            format!("memory-backend-memfd,id=ram,size={memory}M,share=on"),
        );
        for (tag, _) in self.shares() {
            let socket = self.socket(tag);
            add(
                "-chardev",
                format!("socket,id={tag},path={}", socket.display()),
            );
            add(
                "-device",
                format!("vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024"),
            );
        }
        add("-serial", format!("file:{}", self.log().display()));
        add("-kernel", self.kernel.display().to_string());
        add("-initrd", self.initrd.display().to_string());
        add("-append", KERNEL_COMMAND_LINE.into());
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ]);
        command
    }

    fn virtiofsd(&self, path: &Path) -> Command {
        let mut command = process::tied(packages::VIRTIOFSD);
        // The socket that it listens on is its standard input: then it keeps no files of its own.
        command.args(["--fd=0", "-f", "-o", "sandbox=chroot", "-o", "cache=always"]);
        // It keeps a descriptor for each file that the machine knows of.
        let most = getrlimit(Resource::Nofile)
            .maximum
            .unwrap_or(u64::MAX)
            .min(1_000_000);
        command.arg(format!("--rlimit-nofile={most}"));
        command.arg("-o").arg(format!("source={}", path.display()));
        command
    }
}

/// The running machine. Dropping it ends it.
pub(super) struct Machine {
    // In the order that they are ended: QEMU, then what it uses.
    qemu: Running,
    shares: Vec<Running>,
    ports: Vec<(&'static str, UnixStream)>,
}

impl Machine {
    pub(super) fn start(plan: &Plan<'_>) -> Result<Self> {
        let path = plan.messages();
        let messages = File::create(&path).with_context(|| format!("write {}", path.display()))?;
        let mut shares = Vec::new();
        for (tag, path) in plan.shares() {
            let listener = OwnedFd::from(listen(&plan.socket(tag))?);
            let command = plan.virtiofsd(path);
            shares.push(Running::start(command, listener.into(), &messages)?);
        }
        let listeners: Vec<_> = plan
            .ports()
            .into_iter()
            .map(|port| Ok((port, listen(&plan.socket(port))?)))
            .collect::<Result<_>>()?;
        let mut qemu = Running::start(plan.qemu(), Stdio::null(), &messages)?;
        let mut ports = Vec::new();
        for (port, listener) in &listeners {
            let Some(stream) = accept(listener, &mut qemu)? else {
                drop((qemu, shares));
                let said = std::fs::read_to_string(&path).unwrap_or_default();
                bail!("QEMU does not start: {}", said.trim());
            };
            ports.push((*port, stream));
        }
        Ok(Self {
            qemu,
            shares,
            ports,
        })
    }

    /// Returns our end of a port.
    /// The processor time that QEMU has used so far, in the kernel's ticks of 10 ms; `None` where
    /// that cannot be seen.
    pub(super) fn processor_ticks(&self) -> Option<u64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.qemu.0.id())).ok()?;
        // The second field is a name in parentheses.
        let fields = stat.rsplit(')').next()?;
        let ticks = fields.split_whitespace().skip(11).take(2);
        ticks.map(|ticks| ticks.parse::<u64>().ok()).sum()
    }

    pub(super) fn port(&self, name: &str) -> Result<UnixStream> {
        let port = self.ports.iter().find(|(port, _)| *port == name);
        let (_, stream) = port.with_context(|| format!("the machine has no port {name}"))?;
        stream
            .try_clone()
            .with_context(|| format!("share the port {name}"))
    }

    /// Ends the machine at once. What it wrote to its ports can still be read.
    pub(super) fn stop(&mut self) {
        self.qemu.end();
        self.shares.iter_mut().for_each(Running::end);
    }
}

/// A process that ends when this is dropped.
struct Running(Child);

impl Running {
    fn start(mut command: Command, input: Stdio, messages: &File) -> Result<Self> {
        let share = || messages.try_clone().context("share the file of messages");
        command.stdin(input).stdout(share()?).stderr(share()?);
        // A Ctrl-C on our terminal is for us, who then end all in order.
        command.process_group(0);
        let child = command
            .spawn()
            .with_context(|| format!("start `{}`", process::show(&command)))?;
        Ok(Self(child))
    }

    fn end(&mut self) {
        // Both fail only when the process has ended and was waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

fn listen(path: &Path) -> Result<UnixListener> {
    UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))
}

/// Waits until QEMU connects. Returns `None` when it ends instead.
fn accept(listener: &UnixListener, qemu: &mut Running) -> Result<Option<UnixStream>> {
    listener.set_nonblocking(true).context("set up a socket")?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).context("set up a socket")?;
                return Ok(Some(stream));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("wait for QEMU"),
        }
        if qemu.0.try_wait().context("wait for QEMU")?.is_some() {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(command: &Command) -> String {
        process::show(command)
    }

    fn with<T>(options: &Options, settings: &Settings, check: impl FnOnce(&Plan<'_>) -> T) -> T {
        check(&Plan {
            options,
            settings,
            kernel: Path::new("/k/vmlinux"),
            initrd: Path::new("/t/initrd"),
            folder: Path::new("/t"),
        })
    }

    const PLAIN: Settings = Settings {
        terminal: false,
        input: true,
        output: None,
    };

    #[test]
    fn the_machine_has_what_was_asked_for() {
        let options = Options {
            cpus: 3,
            memory: 1234,
            ..Options::default()
        };
        let line = with(&options, &PLAIN, |plan| text(&plan.qemu()));
        for part in [
            "-smp 3",
            "-m 1234M",
            "size=1234M",
            "thread=multi",
            "-kernel /k/vmlinux",
            "path=/t/host",
            "virtserialport,chardev=control,nr=1,name=control",
            "virtserialport,chardev=errors,nr=4,name=errors",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
        assert!(
            !line.contains("virtconsole") && !line.contains("icount"),
            "{line}"
        );
    }

    #[test]
    fn counting_instructions_takes_one_processor() {
        let options = Options {
            cpus: 4,
            icount: true,
            ..Options::default()
        };
        let line = with(&options, &PLAIN, |plan| text(&plan.qemu()));
        assert!(line.contains("-icount shift=0,sleep=off -smp 1"), "{line}");
        assert!(line.contains("-cpu max,+svm,-erms,-fsrm"), "{line}");
    }

    #[test]
    fn a_terminal_and_a_folder_for_results_are_added_on_request() {
        let settings = Settings {
            terminal: true,
            input: false,
            output: Some("/out".into()),
        };
        let options = Options::default();
        let (line, share) = with(&options, &settings, |plan| {
            (text(&plan.qemu()), text(&plan.virtiofsd(Path::new("/out"))))
        });
        assert!(line.contains("virtconsole,chardev=terminal,nr=0"), "{line}");
        assert!(line.contains("tag=results"), "{line}");
        assert!(share.contains("source=/out"), "{share}");
    }

    #[test]
    fn a_machine_that_ends_leaves_no_process() {
        let folder = tempfile::tempdir().unwrap();
        let messages = File::create(folder.path().join("messages")).unwrap();
        let mut command = process::tied("sleep");
        command.arg("1000");
        let running = Running::start(command, Stdio::null(), &messages).unwrap();
        let process = PathBuf::from(format!("/proc/{}", running.0.id()));
        assert!(process.exists());
        drop(running);
        assert!(!process.exists());
    }
}
