//! Disk images, made and looked at with the programs that the formats come from.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs a program of the host.
fn run(program: &str, args: &[&str], paths: &[&Path]) -> io::Result<Output> {
    Command::new(program).args(args).args(paths).output()
}

/// An error with all that a program has said.
fn failure(what: &str, output: &Output) -> io::Error {
    let (out, err) = (&output.stdout, &output.stderr);
    let said = String::from_utf8_lossy(&[&out[..], &err[..]].concat()).into_owned();
    io::Error::other(format!("{what}: {}: {said}", output.status))
}

fn succeed(program: &str, args: &[&str], paths: &[&Path]) -> io::Result<()> {
    let output = run(program, args, paths)?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failure(program, &output)),
    }
}

/// Makes an empty qcow2 image of so many bytes, on a raw or qcow2 backing file if there is one.
///
/// # Errors
///
/// When `qemu-img` fails.
pub fn create_qcow2(path: &Path, bytes: u64, backing: Option<(&Path, &str)>) -> io::Result<()> {
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    let name;
    if let Some((file, format)) = backing {
        name = file.display().to_string();
        args.extend(["-b", name.as_str(), "-F", format]);
    }
    let bytes = bytes.to_string();
    succeed("qemu-img", &args, &[path, Path::new(&bytes)])
}

/// Copies an image into one of another format.
///
/// # Errors
///
/// When `qemu-img` fails.
pub fn convert(from: (&Path, &str), to: (&Path, &str)) -> io::Result<()> {
    let args = ["convert", "-f", from.1, "-O", to.1];
    succeed("qemu-img", &args, &[from.0, to.0])
}

/// Whether a qcow2 image is whole. Clusters that nothing uses are an error where they are not to be
/// there.
///
/// # Errors
///
/// What `qemu-img check` says of it.
pub fn check_qcow2(path: &Path, may_leak: bool) -> io::Result<()> {
    let output = run("qemu-img", &["check", "-f", "qcow2"], &[path])?;
    match output.status.code() {
        Some(0) => Ok(()),
        Some(3) if may_leak => Ok(()),
        _ => Err(failure("qemu-img check", &output)),
    }
}

/// Makes an ext4 file system in a new raw image of so many bytes.
///
/// # Errors
///
/// When `mkfs.ext4` fails.
pub fn create_ext4(path: &Path, bytes: u64) -> io::Result<()> {
    std::fs::File::create(path)?.set_len(bytes)?;
    succeed("mkfs.ext4", &["-q", "-F"], &[path])
}

/// Whether the ext4 file system in a raw image is whole, once its journal is replayed: that is done
/// to the image.
///
/// # Errors
///
/// What `e2fsck` says of it.
pub fn check_ext4(path: &Path) -> io::Result<()> {
    // Its exit status is 1 where there was something to replay. It touches nothing else.
    let output = run("e2fsck", &["-p", "-E", "journal_only"], &[path])?;
    if !matches!(output.status.code(), Some(0 | 1)) {
        return Err(failure("replay the journal", &output));
    }
    succeed("e2fsck", &["-f", "-n"], &[path])
}

/// Copies all files of the ext4 file system in a raw image into an empty folder.
///
/// # Errors
///
/// When `debugfs` fails.
pub fn dump_ext4(path: &Path, folder: &Path) -> io::Result<()> {
    let command = format!("rdump / {}", folder.display());
    succeed("debugfs", &["-R", &command], &[path])
}

/// Waits until nobody has an image locked any more: the kernel finishes what an io_uring of a
/// process that was killed had under way, and lets go of the file some time after the process.
///
/// # Errors
///
/// When that takes longer than a minute.
pub fn wait_unlocked(path: &Path) -> io::Result<()> {
    let words = [path, Path::new("true")];
    succeed("flock", &["--wait", "60"], &words)
}

/// A new folder in `folder`, in place of one of that name.
///
/// # Errors
///
/// Those of the file system.
pub fn fresh_folder(folder: &Path, name: &str) -> io::Result<PathBuf> {
    let path = folder.join(name);
    if path.exists() {
        std::fs::remove_dir_all(&path)?;
    }
    std::fs::create_dir(&path)?;
    Ok(path)
}
