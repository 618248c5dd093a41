//! Debian's kernels unpacked by the host, from its cache or not, and by themselves.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use kiln_tests::linux::{Linux, PATIENCE};
use kiln_tests::program::{self, Outcome, Program};
use kiln_vmm::Transport;
use kiln_xtask::initrd;

/// Where the kernel is, which only its own decompressor changes, and what it was told.
const SCRIPT: &str = "echo text=$(grep ' _text$' /proc/kallsyms | cut -d' ' -f1)\n\
                      echo cmdline=$(cat /proc/cmdline)\n";
/// Where kernels are linked for.
const LINKED: &str = "ffffffff81000000";
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 kiln.x=1";

/// Boots the bzImage of a series, with the user's cache in `cache`.
fn boot(series: &str, cache: &Path, args: &[&str]) -> Outcome {
    let linux = Linux::new(series, Transport::Pci);
    let initrd = linux.folder.path().join("initrd");
    initrd::with_script(&linux.kernel.initrd, &initrd, SCRIPT).unwrap();
    let mut cache_home = OsString::from("XDG_CACHE_HOME=");
    cache_home.push(cache);
    let mut all: Vec<OsString> = vec![cache_home, program::kiln().into(), "run".into()];
    all.extend(["--kernel".into(), linux.kernel.bzimage.clone().into()]);
    all.extend(["--initrd".into(), initrd.into()]);
    all.extend([
        "--cmdline".into(),
        CMDLINE.into(),
        "--memory".into(),
        "128M".into(),
    ]);
    all.extend(args.iter().map(OsString::from));
    let outcome = Program::start("env", &all).unwrap().wait(PATIENCE).unwrap();
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(outcome.value("cmdline"), Some(CMDLINE), "{outcome:?}");
    outcome
}

fn kept(cache: &Path) -> usize {
    let entries = fs::read_dir(cache.join("kiln/kernels"))
        .into_iter()
        .flatten();
    entries
        .filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_str().unwrap().ends_with(".vmlinux")
        })
        .count()
}

#[test]
#[ignore = "needs hardware KVM: run by cargo xtask test"]
fn a_bzimage_is_unpacked_once_and_starts_where_it_was_linked_for() {
    let cache = tempfile::tempdir().unwrap();
    for (series, kernels) in [("6.1", 1), ("6.12", 2), ("6.12", 2)] {
        let outcome = boot(series, cache.path(), &[]);
        assert_eq!(outcome.value("text"), Some(LINKED));
        assert!(!outcome.errors.contains("WARN"), "{outcome:?}");
        assert_eq!(kept(cache.path()), kernels);
    }
    for series in ["6.1", "6.12"] {
        let outcome = boot(series, cache.path(), &["--boot-protocol", "pvh"]);
        assert_eq!(outcome.value("text"), Some(LINKED));
    }
}

/// Run only when asked for.
mod in_full {
    use super::*;

    #[test]
    #[ignore = "needs hardware KVM: run by cargo xtask test"]
    fn a_bzimage_starts_without_a_cache() {
        let folder = tempfile::tempdir().unwrap();
        let outcome = boot("6.12", folder.path(), &["--no-kernel-cache"]);
        assert_eq!(outcome.value("text"), Some(LINKED));
        assert_eq!(kept(folder.path()), 0);
        // The cache's folder cannot be made.
        fs::write(folder.path().join("kiln"), "").unwrap();
        let outcome = boot("6.1", folder.path(), &[]);
        assert_eq!(outcome.value("text"), Some(LINKED));
        assert!(outcome.errors.contains("open kernel cache"), "{outcome:?}");
    }

    #[test]
    #[ignore = "needs hardware KVM: run by cargo xtask test"]
    fn a_bzimage_can_unpack_itself_to_a_random_address() {
        let cache = tempfile::tempdir().unwrap();
        let mut moved = false;
        for series in ["6.1", "6.12"] {
            let outcome = boot(series, cache.path(), &["--kernel-decompressor", "guest"]);
            let text = outcome.value("text").unwrap();
            assert_eq!(text.len(), LINKED.len(), "{outcome:?}");
            moved |= text != LINKED;
        }
        // One of some hundred places is the one that it was linked for: not for both.
        assert!(moved);
        assert_eq!(kept(cache.path()), 0);
    }
}
