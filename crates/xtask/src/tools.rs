//! The disk of tools: programs of Debian's that test guests measure and check with, and busybox
//! does not have.
//!
//! It is a disk of its own, so that the root disk and the initrd stay small: a test that needs the
//! tools adds the disk, and the guest's script mounts it with `. kiln-tools`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::assets::Store;
use crate::{packages, process, root};

/// The id that the guest knows the disk by.
pub const ID: &str = "tools";

/// The packages, and the programs that are taken from each.
const PROGRAMS: [(&str, &[&str]); 7] = [
    ("fio", &["fio"]),
    ("iperf3", &["iperf3"]),
    ("ethtool", &["ethtool"]),
    ("iproute2", &["bridge", "ip", "ss", "tc"]),
    ("iputils-ping", &["ping"]),
    (
        "e2fsprogs",
        &["dumpe2fs", "e2fsck", "mke2fs", "mkfs.ext4", "resize2fs"],
    ),
    (
        "util-linux",
        &[
            "blkdiscard",
            "blockdev",
            "fstrim",
            "lsblk",
            "nsenter",
            "unshare",
        ],
    ),
];

/// Where Debian's packages have programs.
const PROGRAM_FOLDERS: [&str; 4] = ["bin", "sbin", "usr/bin", "usr/sbin"];
/// Where they have libraries.
const LIBRARY_FOLDERS: [&str; 3] = [
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu/ceph",
];
/// The program that loads libraries, as programs name it.
const LOADER: &str = "lib64/ld-linux-x86-64.so.2";
/// Where all libraries are on the disk.
const LIBRARIES: &str = "lib/x86_64-linux-gnu";

/// What the filesystem takes beside the files.
const MARGIN: u64 = 24 << 20;

/// Returns the image, and makes it when it is not in the store.
pub(crate) fn image(store: &Store) -> Result<PathBuf> {
    let inputs = (PROGRAMS, PROGRAM_FOLDERS, LIBRARY_FOLDERS, MARGIN);
    store.keep("tools.ext4", inputs, make)
}

fn make(to: &Path) -> Result<()> {
    let (debs, unpacked, tree) = (
        to.with_extension("debs"),
        to.with_extension("unpacked"),
        to.with_extension("tree"),
    );
    let packages: Vec<_> = PROGRAMS.iter().map(|(package, _)| *package).collect();
    eprintln!(
        "xtask: downloading {} and what they need",
        packages.join(", ")
    );
    packages::download_with_dependencies(&packages, &debs)?;
    unpack(&debs, &unpacked)?;
    let size = fill(&tree, &unpacked)?;
    root::image_of(
        &tree,
        to,
        (size + MARGIN).next_multiple_of(1 << 20),
        "kiln-tools",
    )
}

/// Unpacks every package in `debs` to one folder.
fn unpack(debs: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(debs).with_context(|| format!("list {}", debs.display()))? {
        let path = entry
            .with_context(|| format!("list {}", debs.display()))?
            .path();
        if path.extension().is_some_and(|end| end == "deb") {
            process::run(
                process::tied("dpkg-deb")
                    .arg("--extract")
                    .arg(&path)
                    .arg(to),
            )?;
        }
    }
    Ok(())
}

/// Fills the folder `tree` with the programs and their libraries, and returns the bytes of them.
fn fill(tree: &Path, unpacked: &Path) -> Result<u64> {
    for folder in ["bin", LIBRARIES, "lib64"] {
        let folder = tree.join(folder);
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let mut size = 0;
    let mut put = |from: &Path, folder: &str| -> Result<()> {
        let name = from.file_name().context("a file has a name")?;
        // Links are followed.
        size += fs::copy(from, tree.join(folder).join(name))
            .with_context(|| format!("copy {}", from.display()))?;
        Ok(())
    };
    let mut libraries = BTreeSet::new();
    for name in PROGRAMS.iter().flat_map(|(_, names)| *names) {
        let program = find(unpacked, name)?;
        libraries.extend(libraries_of(unpacked, &program)?);
        put(&program, "bin")?;
    }
    for library in &libraries {
        put(library, LIBRARIES)?;
    }
    put(&unpacked.join(LOADER), "lib64")?;
    Ok(size)
}

fn find(unpacked: &Path, name: &str) -> Result<PathBuf> {
    PROGRAM_FOLDERS
        .iter()
        .map(|folder| unpacked.join(folder).join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("the packages have no program {name}"))
}

/// Returns the libraries that a program needs, as its own loader finds them.
fn libraries_of(unpacked: &Path, program: &Path) -> Result<Vec<PathBuf>> {
    let folders = LIBRARY_FOLDERS.map(|folder| unpacked.join(folder));
    let path = std::env::join_paths(&folders).context("join the folders of libraries")?;
    let mut command = process::tied(unpacked.join(LOADER));
    command.args(["--inhibit-cache", "--library-path"]);
    command.arg(path).arg("--list").arg(program);
    let list = process::output(&mut command)?;
    let found: Vec<_> = found(&list).map(PathBuf::from).collect();
    for library in &found {
        ensure!(
            library.starts_with(unpacked),
            "{} needs {}, which its packages do not have",
            program.display(),
            library.display()
        );
    }
    Ok(found)
}

/// The paths in a loader's list, whose lines are `NAME => PATH (ADDRESS)`. The loader itself, whose
/// name is a path, is left out.
fn found(list: &str) -> impl Iterator<Item = &str> {
    list.lines().filter_map(|line| {
        let (name, rest) = line.trim().split_once(" => ")?;
        (!name.starts_with('/')).then(|| rest.rsplit_once(" (").map_or(rest, |(path, _)| path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_the_list_of_the_loader() {
        let list = "\tlinux-vdso.so.1 (0x00007f)\n\tlibz.so.1 => /t/lib/libz.so.1 (0x00007f)\n\
            \t/lib64/ld-linux-x86-64.so.2 => t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n\
            \tlibgone.so => not found\n";
        let found: Vec<_> = found(list).collect();
        assert_eq!(found, ["/t/lib/libz.so.1", "not found"]);
    }

    #[test]
    fn a_program_that_no_package_has_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let sbin = folder.path().join("sbin");
        fs::create_dir(&sbin).unwrap();
        fs::write(sbin.join("one"), "").unwrap();
        assert_eq!(find(folder.path(), "one").unwrap(), sbin.join("one"));
        let error = find(folder.path(), "two").unwrap_err();
        assert_eq!(error.to_string(), "the packages have no program two");
    }
}
