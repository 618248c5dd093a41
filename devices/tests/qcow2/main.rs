//! Images of QEMU's, read and written by Kiln, and then looked at by QEMU again.
#![cfg(feature = "qcow2")]
#![allow(clippy::unwrap_used, missing_docs)]

mod backing;
mod images;
mod ram;
mod refused;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_devices::virtio::block::{BackingFiles, BlockBackend, Qcow2Error, Qcow2File};
use ram::Ram;

fn open(path: &Path, read_only: bool) -> Result<Qcow2File, Qcow2Error> {
    Qcow2File::open(path, read_only, &BackingFiles::Refuse)
}

fn message(error: Qcow2Error) -> String {
    let text = error.to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

/// Random numbers that are the same in every run (xorshift64).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// What `qemu-img` is used with, one test at a time: a program that is being started has for a
/// moment all files of this one, with their locks. Nothing where it is not installed; CI has it.
fn qemu() -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    if Command::new("qemu-img").arg("--version").output().is_err() {
        eprintln!("skipped: no qemu-img (Debian's package qemu-utils)");
        return None;
    }
    Some(guard)
}

fn qemu_img(args: &[&str]) -> Output {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "qemu-img {args:?}: {text}");
    output
}

/// The image has neither errors nor leaks.
fn assert_clean(path: &Path) {
    let output = Command::new("qemu-img").arg("check").arg(path).output();
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success(),
        "{}: {text}{errors}",
        path.display()
    );
}

/// What QEMU reads from an image.
fn qemu_contents(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("by-qemu");
    qemu_img(&["convert", "-O", "raw", text(path), text(&raw)]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Bytes that are not the same at any two places, nor zero.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..len).map(|_| random.next() as u8 | 1).collect()
}

/// A folder with a raw file of data in some places and holes between.
fn raw_disk(folder: &Path, size: usize) -> (PathBuf, Vec<u8>) {
    let mut bytes = vec![0; size];
    let mut random = Random::new(9);
    for _ in 0..6 {
        let at = random.below(size as u64 - 70_000) as usize;
        let len = 1 + random.below(70_000) as usize;
        bytes[at..at + len].copy_from_slice(&pattern(at as u64, len));
    }
    let path = folder.join("source.raw");
    std::fs::write(&path, &bytes).unwrap();
    (path, bytes)
}
