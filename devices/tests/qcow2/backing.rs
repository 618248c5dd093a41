//! Backing files.

use super::*;

const SIZE: usize = 1 << 20;

/// Makes an image of `name` on top of `backing`.
fn overlay(folder: &Path, name: &str, backing: &str, format: &str) -> PathBuf {
    let path = folder.join(name);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        backing,
        "-F",
        format,
        text(&path),
    ]);
    path
}

fn refused(path: &Path, allowed: &BackingFiles) -> String {
    message(Qcow2File::open(path, false, allowed).unwrap_err())
}

#[test]
fn an_image_gets_no_other_file_unless_that_is_allowed() {
    let Some(_one) = qemu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (base, _) = raw_disk(folder.path(), SIZE);
    let path = overlay(folder.path(), "top.qcow2", "source.raw", "raw");
    let error = refused(&path, &BackingFiles::Refuse);
    assert!(
        error.contains(r#"asks for the backing file "source.raw""#),
        "{error}"
    );
    assert!(error.contains("`backing` option"), "{error}");
    let other = folder.path().join("other.raw");
    std::fs::write(&other, [0; 512]).unwrap();
    for paths in [vec![], vec![other], vec![folder.path().join("missing")]] {
        let error = refused(&path, &BackingFiles::Only(paths));
        assert!(error.contains("asks for the backing file"), "{error}");
    }
    // By whatever name it is allowed.
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&base, &link).unwrap();
    for allowed in [
        BackingFiles::Allow,
        BackingFiles::Only(vec![base.clone()]),
        BackingFiles::Only(vec![folder.path().join("no"), link]),
    ] {
        Qcow2File::open(&path, false, &allowed).unwrap();
    }
}

#[test]
fn writes_go_to_the_image_and_what_is_under_it_stays() {
    let Some(_one) = qemu() else { return };
    let ram = Ram::new();
    let folder = tempfile::tempdir().unwrap();
    let (base, mut model) = raw_disk(folder.path(), SIZE);
    let before = model.clone();
    overlay(folder.path(), "middle.qcow2", "source.raw", "raw");
    // Shorter than what is on top of it, and in a size that is not a whole number of sectors.
    std::fs::OpenOptions::new()
        .append(true)
        .open(&base)
        .unwrap()
        .set_len(SIZE as u64 - 700)
        .unwrap();
    model[SIZE - 700..].fill(0);
    let path = overlay(folder.path(), "top.qcow2", "middle.qcow2", "qcow2");
    let mut disk = Qcow2File::open(&path, false, &BackingFiles::Allow).unwrap();
    assert!(ram.contents(&mut disk) == model);
    let mut random = Random::new(4);
    for round in 0..60 {
        let at = random.below(SIZE as u64 / 512 - 8) * 512;
        let bytes = pattern(round, 512 * (1 + round as usize % 8));
        ram.write(&mut disk, at, &bytes).unwrap();
        model[at as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    assert!(ram.contents(&mut disk) == model);
    // Others may read what is under it, and not write it.
    let middle = folder.path().join("middle.qcow2");
    drop(Qcow2File::open(&middle, true, &BackingFiles::Allow).unwrap());
    let error = refused(&middle, &BackingFiles::Allow);
    assert!(error.contains("it is in use"), "{error}");
    drop(disk);
    assert_clean(&path);
    assert!(qemu_contents(&path) == model);
    assert!(std::fs::read(&base).unwrap()[..] == before[..SIZE - 700]);
}

#[test]
fn a_chain_ends() {
    let Some(_one) = qemu() else { return };
    let folder = tempfile::tempdir().unwrap();
    raw_disk(folder.path(), SIZE);
    overlay(folder.path(), "a.qcow2", "source.raw", "raw");
    let path = overlay(folder.path(), "b.qcow2", "a.qcow2", "qcow2");
    // `-u` does not look at what it names.
    let a = folder.path().join("a.qcow2");
    qemu_img(&["rebase", "-u", "-b", "b.qcow2", "-F", "qcow2", text(&a)]);
    let error = refused(&path, &BackingFiles::Allow);
    assert!(error.contains("an image that is built on it"), "{error}");
    qemu_img(&["rebase", "-u", "-b", "a.qcow2", "-F", "qcow2", text(&a)]);
    assert!(refused(&a, &BackingFiles::Allow).contains("built on it"));

    let mut last = "source.raw".to_owned();
    for number in 0..18 {
        let name = format!("{number}.qcow2");
        let format = if number == 0 { "raw" } else { "qcow2" };
        let path = overlay(folder.path(), &name, &last, format);
        let opened = Qcow2File::open(&path, true, &BackingFiles::Allow);
        match number {
            0..16 => drop(opened.unwrap()),
            _ => assert!(message(opened.unwrap_err()).contains("more than 16 backing files")),
        }
        last = name;
    }
}

#[test]
fn a_backing_file_is_a_file_with_a_known_format() {
    let Some(_one) = qemu() else { return };
    let folder = tempfile::tempdir().unwrap();
    raw_disk(folder.path(), SIZE);
    let path = overlay(folder.path(), "top.qcow2", "source.raw", "raw");
    let rebase = |name: &str, format: &str| {
        qemu_img(&["rebase", "-u", "-b", name, "-F", format, text(&path)]);
        refused(&path, &BackingFiles::Allow)
    };
    assert!(rebase("source.raw", "vmdk").contains("neither qcow2 nor raw"));
    assert!(rebase("nbd://host/disk", "raw").contains("not the path of a file"));
    assert!(rebase("json:{\"file\":{}}", "raw").contains("not the path of a file"));
    assert!(rebase("/dev/null", "raw").contains("it is a character device"));
    assert!(rebase("missing", "raw").contains("missing"));
    // It is never looked at to find its format: this is one, but raw.
    let inner = folder.path().join("inner");
    qemu_img(&["create", "-f", "qcow2", text(&inner), "1M"]);
    qemu_img(&["rebase", "-u", "-b", "inner", "-F", "raw", text(&path)]);
    let mut disk = Qcow2File::open(&path, true, &BackingFiles::Allow).unwrap();
    let start = Ram::new().read(&mut disk, 0, 512).unwrap();
    assert_eq!(start[..4], *b"QFI\xfb");
    drop(disk);
    qemu_img(&[
        "rebase",
        "-u",
        "-b",
        "source.raw",
        "-F",
        "qcow2",
        text(&path),
    ]);
    assert!(refused(&path, &BackingFiles::Allow).contains("does not begin like one"));
}
