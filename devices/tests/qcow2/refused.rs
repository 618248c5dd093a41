//! Images that use what is not there.

use super::*;

#[test]
fn images_of_qemus_with_what_is_not_there_are_refused() {
    let Some(_one) = qemu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data.raw");
    let path = folder.path().join("image.qcow2");
    let data_file = format!("data_file={}", data.display());
    for (options, part) in [
        ("extended_l2=on", "extended L2 entries"),
        ("compression_type=zstd", "a compression other than zlib"),
        (&*data_file, "an external data file"),
    ] {
        qemu_img(&["create", "-f", "qcow2", "-o", options, text(&path), "1M"]);
        let error = message(open(&path, false).unwrap_err());
        assert!(error.contains(part), "{error}");
    }
    let secret = ["--object", "secret,id=s,data=x"];
    let encrypt = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let args = [
        &secret[..],
        &["-f", "qcow2", "-o", encrypt, text(&path), "1M"],
    ]
    .concat();
    qemu_img(&[&["create"], &args[..]].concat());
    let error = message(open(&path, false).unwrap_err());
    assert!(error.contains("it has encryption"), "{error}");
}
