//! Linux guests on disks that are qcow2 images. They need KVM with hardware behind it, and are run as
//! root by `cargo xtask test`.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs;
use std::path::Path;

use kiln_tests::image;
use kiln_tests::linux::{Linux, guest_assets};
use kiln_vmm::Transport;

kiln_tests::over_every_transport!(
    ; over mmio when asked:
    a_guest_lives_on_a_qcow2_image_over_a_restart,
);

fn a_guest_lives_on_a_qcow2_image_over_a_restart(transport: Transport) {
    let folder = tempfile::tempdir().unwrap();
    let [base, top, alone] = ["base.qcow2", "top.qcow2", "alone"].map(|it| folder.path().join(it));
    let root = &guest_assets().root;
    let size = fs::metadata(root).unwrap().len();
    image::convert((root, "raw"), (&base, "qcow2")).unwrap();
    image::create_qcow2(&top, size, Some((&base, "qcow2"))).unwrap();
    image::create_qcow2(&alone, 64 << 20, None).unwrap();
    let before = fs::read(&base).unwrap();

    let guest = || {
        Linux::new("6.12", transport)
            .cmdline("root=/dev/vda rw")
            .disk(&top, &format!(",backing={},id=root", base.display()))
            .disk(&alone, ",format=qcow2,id=alone")
            .arg("--cpus")
            .arg("2")
    };
    let first = guest().run(
        "dd if=/dev/urandom of=/written bs=1M count=12 2>/dev/null
         dd if=/written of=/dev/vdb bs=64k seek=3 conv=fsync 2>/dev/null
         echo sum=$(sha256sum </written | cut -d' ' -f1)
         sync
         reboot -f",
    );
    let first = first.unwrap();
    assert_eq!(first.code, Some(3), "{}\n{}", first.output, first.errors);
    let sum = first.value("sum").unwrap();
    image::check_qcow2(&top, false).unwrap();
    image::check_qcow2(&alone, false).unwrap();

    let second = guest().run(
        "echo file=$(sha256sum </written | cut -d' ' -f1)
         echo disk=$(dd if=/dev/vdb bs=64k skip=3 count=192 2>/dev/null | sha256sum | cut -d' ' -f1)
         rm /written",
    );
    let second = second.unwrap();
    let what = format!("{}\n{}", second.output, second.errors);
    assert_eq!(second.code, Some(0), "{what}");
    assert_eq!(second.value("file"), Some(sum), "{what}");
    assert_eq!(second.value("disk"), Some(sum), "{what}");
    for path in [&top, &alone] {
        image::check_qcow2(path, false).unwrap();
    }
    assert!(
        fs::read(&base).unwrap() == before,
        "the backing file has changed"
    );
    let raw = folder.path().join("raw");
    image::convert((&top, "qcow2"), (&raw, "raw")).unwrap();
    image::check_ext4(&raw).unwrap();
    assert_written_is_gone(&raw, folder.path());
}

/// What the second guest did last is there, too.
fn assert_written_is_gone(raw: &Path, folder: &Path) {
    let dump = image::fresh_folder(folder, "dump").unwrap();
    image::dump_ext4(raw, &dump).unwrap();
    assert!(!dump.join("written").exists());
    assert!(dump.join("bin").exists());
}
