//! Who may open an image.

use super::*;

#[test]
fn an_image_is_open_once_for_writing_or_often_for_reading() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.qcow2");
    std::fs::write(&path, small_image()).unwrap();
    let in_use = |read_only| {
        let error = open(&path, read_only).err().map(message);
        error.is_some_and(|error| error.contains("it is in use"))
    };
    let writer = open(&path, false).unwrap();
    assert!(in_use(true) && in_use(false));
    // Raw or qcow2 is all the same.
    assert!(crate::virtio::block::RawFile::open(&path, true).is_err());
    drop(writer);
    let _readers = [open(&path, true).unwrap(), open(&path, true).unwrap()];
    assert!(in_use(false));
}

#[test]
fn a_read_only_image_is_not_touched() {
    let ram = Ram::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.qcow2");
    std::fs::write(&path, small_image()).unwrap();
    let mut permissions = path.metadata().unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&path, permissions).unwrap();
    let mut disk = open(&path, true).unwrap();
    assert!(ram.write(&mut disk, 0, &[1; 512]).is_err());
    disk.flush().unwrap();
    assert!(ram.contents(&mut disk) == small_contents());
    drop(disk);
    assert!(std::fs::read(&path).unwrap() == small_image());
}
