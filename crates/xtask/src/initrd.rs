//! Initrds: what a test guest and the nested machine start in.
//!
//! A guest's initrd is busybox, the kernel's modules and `resources/guest/init`. A test gives the
//! guest something to do by extending the initrd with a script, which [`with_script`] does: Linux
//! unpacks archives that follow each other.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::modules::Module;
use crate::{packages, process};

/// Where a guest's init looks for the script of a test.
pub const SCRIPT: &str = "test.sh";

/// The commands that test scripts have besides busybox's: path and contents.
pub(crate) const GUEST_COMMANDS: [(&str, &str); 6] = [
    (
        "bin/kiln-dhcp",
        include_str!("../../../resources/guest/bin/kiln-dhcp"),
    ),
    (
        "bin/kiln-disks",
        include_str!("../../../resources/guest/bin/kiln-disks"),
    ),
    (
        "bin/kiln-net",
        include_str!("../../../resources/guest/bin/kiln-net"),
    ),
    (
        "bin/kiln-option",
        include_str!("../../../resources/guest/bin/kiln-option"),
    ),
    (
        "bin/kiln-tools",
        include_str!("../../../resources/guest/bin/kiln-tools"),
    ),
    (
        "bin/kiln-wait-power-button",
        include_str!("../../../resources/guest/bin/kiln-wait-power-button"),
    ),
];

/// Where the disk of tools is mounted, an empty folder, and the links to its libraries: programs
/// look for them at fixed paths.
pub(crate) const TOOLS_FOLDER: &str = "tools";
pub(crate) const TOOLS_LINKS: [(&str, &str); 2] = [("lib", "tools/lib"), ("lib64", "tools/lib64")];

/// What the initrd of a guest has besides these commands, busybox and the modules.
pub(crate) const GUEST_FILES: [(&str, &str); 1] =
    [("init", include_str!("../../../resources/guest/init"))];

/// The files that the initrd of the nested machine has besides busybox and the modules.
pub(crate) const NESTED_FILES: [(&str, &str); 2] = [
    ("init", include_str!("../../../resources/nested/init")),
    ("stage2", include_str!("../../../resources/nested/stage2")),
];

/// Busybox: the program, and the commands that it is.
#[derive(Clone, Debug, Hash)]
pub(crate) struct Busybox {
    pub(crate) program: Vec<u8>,
    pub(crate) commands: Vec<String>,
}

impl Busybox {
    pub(crate) fn installed() -> Result<Self> {
        let path = packages::BUSYBOX;
        let program = fs::read(path).with_context(|| format!("read {path}"))?;
        let list = process::output(process::tied(path).arg("--list"))?;
        let commands = list
            .lines()
            .filter(|name| *name != "busybox")
            .map(str::to_owned)
            .collect();
        Ok(Self { program, commands })
    }
}

/// Returns an archive of busybox, `modules` and the empty folders that every initrd mounts upon.
fn base(busybox: &Busybox, modules: &[Module]) -> Archive {
    let mut archive = Archive::new();
    for folder in ["dev", "proc", "root", "sys"] {
        archive.directory(folder);
    }
    archive.file("bin/busybox", 0o755, &busybox.program);
    for command in &busybox.commands {
        archive.symlink(&format!("bin/{command}"), "busybox");
    }
    let mut order = String::new();
    for module in modules {
        archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.data);
        order.push_str(&module.name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    archive
}

/// Returns the initrd of a test guest.
pub(crate) fn guest(busybox: &Busybox, modules: &[Module]) -> Vec<u8> {
    let mut archive = base(busybox, modules);
    for (path, contents) in GUEST_FILES.into_iter().chain(GUEST_COMMANDS) {
        archive.file(path, 0o755, contents.as_bytes());
    }
    archive.directory(TOOLS_FOLDER);
    for (path, target) in TOOLS_LINKS {
        archive.symlink(path, target);
    }
    archive.finish()
}

/// Returns the initrd of the nested machine.
pub(crate) fn nested(busybox: &Busybox, modules: &[Module]) -> Vec<u8> {
    let mut archive = base(busybox, modules);
    for (path, contents) in NESTED_FILES {
        archive.file(path, 0o755, contents.as_bytes());
    }
    archive.finish()
}

/// Writes to `to` the initrd of a guest that says hello and is done: busybox, and an init of two
/// lines.
pub(crate) fn write_hello(to: &Path) -> Result<()> {
    const INIT: &[u8] = b"#!/bin/busybox sh\necho HELLO-FROM-INIT\nexec /bin/busybox reboot -f\n";
    let busybox = Busybox::installed()?;
    let mut archive = Archive::new();
    archive.directory("dev");
    archive.file("bin/busybox", 0o755, &busybox.program);
    archive.file("init", 0o755, INIT);
    fs::write(to, archive.finish()).with_context(|| format!("write {}", to.display()))
}

/// Writes to `to` the initrd `from`, extended with `files`: path, permission bits and contents of
/// each.
///
/// # Errors
///
/// When `from` cannot be read or `to` not be written.
pub fn extend(from: &Path, to: &Path, files: &[(&str, u32, &[u8])]) -> Result<()> {
    let mut bytes = fs::read(from).with_context(|| format!("read {}", from.display()))?;
    let mut archive = Archive::new();
    for (path, mode, contents) in files {
        archive.file(path, *mode, contents);
    }
    // An archive must begin at a multiple of four bytes, and zeros may come before it.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(archive.finish());
    fs::write(to, bytes).with_context(|| format!("write {}", to.display()))
}

/// Writes to `to` the guest initrd `from`, extended with a shell script that the guest runs.
///
/// The guest prints `kiln-test: exit status N` after the script and powers off, unless the script
/// ends the guest itself.
///
/// # Errors
///
/// When `from` cannot be read or `to` not be written.
///
/// ```no_run
/// # fn main() -> anyhow::Result<()> {
/// let guest = kiln_xtask::assets::guest()?;
/// let to = std::path::Path::new("test.initrd");
/// kiln_xtask::initrd::with_script(&guest.kernel("6.12")?.initrd, to, "nproc\nreboot -f\n")?;
/// # Ok(())
/// # }
/// ```
pub fn with_script(from: &Path, to: &Path, script: &str) -> Result<()> {
    extend(from, to, &[(SCRIPT, 0o755, script.as_bytes())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_initrd_is_extended_at_a_place_that_linux_accepts() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::write(&from, b"12345").unwrap();
        with_script(&from, &to, "echo hello\n").unwrap();
        let bytes = fs::read(&to).unwrap();
        assert_eq!(&bytes[..8], b"12345\0\0\0");
        assert_eq!(&bytes[8..14], b"070701");
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("test.sh\0") && text.contains("echo hello\n"));
    }

    #[test]
    fn modules_are_listed_in_the_order_given() {
        let busybox = Busybox {
            program: b"program".to_vec(),
            commands: vec!["sh".into()],
        };
        let module = |name: &str| Module {
            name: name.into(),
            data: b"elf".to_vec(),
        };
        let bytes = guest(&busybox, &[module("zz"), module("aa")]);
        let text = String::from_utf8_lossy(&bytes);
        for part in [
            "modules/zz.ko\0",
            "zz\naa\n",
            "bin/sh\0",
            "bin/kiln-disks\0",
            "init\0",
        ] {
            assert!(text.contains(part), "{part:?}");
        }
    }
}
