//! The root disk of test guests: busybox on ext4.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::assets::Store;
use crate::initrd::{Busybox, GUEST_COMMANDS, TOOLS_FOLDER, TOOLS_LINKS};
use crate::process;

/// The bytes of the disk, of which it takes a few mebibytes on the host until a guest writes.
const SIZE: u64 = 192 << 20;

/// Files of the system: path, permission bits and contents.
const FILES: [(&str, u32, &str); 7] = [
    (
        "etc/inittab",
        0o644,
        include_str!("../../../resources/guest/root/inittab"),
    ),
    (
        "etc/rc",
        0o755,
        include_str!("../../../resources/guest/root/rc"),
    ),
    (
        "etc/console",
        0o755,
        include_str!("../../../resources/guest/root/console"),
    ),
    (
        "etc/power-button",
        0o755,
        include_str!("../../../resources/guest/root/power-button"),
    ),
    ("etc/passwd", 0o644, "root::0:0:root:/root:/bin/sh\n"),
    ("etc/group", 0o644, "root:x:0:\n"),
    (
        "etc/issue",
        0o644,
        "Kiln test guest: log in as root, no password\n\n",
    ),
];

/// Folders that are mounted upon or written to.
const FOLDERS: [&str; 9] = [
    "dev",
    "proc",
    "sys",
    "run",
    "tmp",
    "root",
    "mnt",
    "var",
    TOOLS_FOLDER,
];

/// Returns the image, and makes it when it is not in the store.
pub(crate) fn image(store: &Store) -> Result<PathBuf> {
    let busybox = Busybox::installed()?;
    let inputs = (SIZE, FILES, FOLDERS, TOOLS_LINKS, GUEST_COMMANDS, &busybox);
    store.keep("root.ext4", inputs, |to| make(to, &busybox))
}

fn make(to: &Path, busybox: &Busybox) -> Result<()> {
    let tree = to.with_extension("tree");
    fill(&tree, busybox).with_context(|| format!("fill {}", tree.display()))?;
    image_of(&tree, to, SIZE, "kiln-root")
}

/// Makes at `to` the image of an ext4 filesystem of `size` bytes with the files in `tree`.
pub(crate) fn image_of(tree: &Path, to: &Path, size: u64, label: &str) -> Result<()> {
    let file = File::create(to).with_context(|| format!("write {}", to.display()))?;
    file.set_len(size)
        .with_context(|| format!("extend {}", to.display()))?;
    let mut command = process::tied("mkfs.ext4");
    command.args(["-q", "-F", "-b", "4096", "-L", label]);
    // The top belongs to root, whoever makes the image.
    command.args(["-E", "root_owner=0:0", "-d"]);
    process::run(command.arg(tree).arg(to))
}

fn fill(tree: &Path, busybox: &Busybox) -> Result<()> {
    for folder in FOLDERS.into_iter().chain(["bin", "etc", "sbin"]) {
        fs::create_dir_all(tree.join(folder))?;
    }
    let put = |path: &str, mode: u32, contents: &[u8]| -> Result<()> {
        let path = tree.join(path);
        fs::write(&path, contents)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(())
    };
    put("bin/busybox", 0o755, &busybox.program)?;
    for command in &busybox.commands {
        symlink("busybox", tree.join("bin").join(command))?;
    }
    for command in ["init", "poweroff", "reboot"] {
        symlink("../bin/busybox", tree.join("sbin").join(command))?;
    }
    for (path, target) in TOOLS_LINKS {
        symlink(target, tree.join(path))?;
    }
    for (path, contents) in GUEST_COMMANDS {
        put(path, 0o755, contents.as_bytes())?;
    }
    for (path, mode, contents) in FILES {
        put(path, mode, contents.as_bytes())?;
    }
    Ok(())
}
