use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use bzip2::write::BzEncoder;
use flate2::write::GzEncoder;
use lzma_rust2::{CheckType, LzmaOptions, LzmaWriter, XzOptions, XzWriter};

use super::*;
use crate::bzimage::around;

/// As an ELF image: some of it packs well and some does not, and it is more than a block of LZ4.
fn elf() -> Vec<u8> {
    let mut elf = sample(9 << 20);
    let end = elf.len();
    elf[end - 8..].copy_from_slice(b"the end.");
    elf
}

/// The beginning of an ELF image.
pub(crate) fn sample(size: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = move |at: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // Calls of x86 code, which xz's filter changes, and noise.
        match at / 64 % 4 {
            0 => (state >> 24) as u8,
            1 => [0xe8, (at >> 8) as u8, (at >> 16) as u8, 0, 0][at % 5],
            _ => (at / 4096) as u8,
        }
    };
    let mut bytes: Vec<u8> = (0..size).map(&mut next).collect();
    bytes[..4].copy_from_slice(b"\x7fELF");
    bytes
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn bzip2(content: &[u8]) -> Vec<u8> {
    let mut encoder = BzEncoder::new(Vec::new(), bzip2::Compression::best());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn lzma(content: &[u8]) -> Vec<u8> {
    let options = LzmaOptions::with_preset(1);
    let mut writer = LzmaWriter::new_use_header(Vec::new(), &options, None).unwrap();
    writer.write_all(content).unwrap();
    writer.finish().unwrap()
}

fn xz(content: &[u8]) -> Vec<u8> {
    let mut options = XzOptions::with_preset(1);
    options.set_check_sum_type(CheckType::Crc32);
    options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
    let mut writer = XzWriter::new(Vec::new(), options).unwrap();
    writer.write_all(content).unwrap();
    writer.finish().unwrap()
}

/// Blocks as `lzop` makes them, with checksums of the content and of what is packed.
fn lzo(content: &[u8]) -> Vec<u8> {
    let mut out = b"\x89LZO\0\r\n\x1a\n".to_vec();
    for field in [0x1040_u16, 0x20a0, 0x0940] {
        out.extend(field.to_be_bytes());
    }
    out.extend([3, 9]);
    out.extend(0x0300_0300_u32.to_be_bytes());
    out.extend([0; 12]);
    out.extend([7]);
    out.extend(b"vmlinux");
    out.extend([0; 4]);
    for block in content.chunks(256 << 10) {
        let packed = lzokay::compress::compress(block).unwrap();
        let is_packed = packed.len() < block.len();
        let packed = if is_packed { &packed } else { block };
        for number in [
            block.len() as u32,
            packed.len() as u32,
            crc32fast::hash(block),
        ] {
            out.extend(number.to_be_bytes());
        }
        if is_packed {
            out.extend(crc32fast::hash(packed).to_be_bytes());
        }
        out.extend(packed);
    }
    out.extend([0; 4]);
    out
}

pub(crate) fn lz4(content: &[u8]) -> Vec<u8> {
    let mut out = vec![0x02, 0x21, 0x4c, 0x18];
    for block in content.chunks(8 << 20) {
        let packed = lz4_flex::block::compress(block);
        out.extend((packed.len() as u32).to_le_bytes());
        out.extend(packed);
    }
    out
}

fn zstd(content: &[u8]) -> Vec<u8> {
    let mut out = vec![0; zstd_safe::compress_bound(content.len())];
    let size = zstd_safe::compress(&mut out[..], content, 3).unwrap();
    out.truncate(size);
    out
}

type Packer = fn(&[u8]) -> Vec<u8>;

const PACKERS: [(Compression, Packer); 7] = [
    (Compression::Gzip, gzip),
    (Compression::Bzip2, bzip2),
    (Compression::Lzma, lzma),
    (Compression::Xz, xz),
    (Compression::Lzo, lzo),
    (Compression::Lz4, lz4),
    (Compression::Zstd, zstd),
];

/// A payload as Linux makes it: the size follows, but for gzip.
pub(crate) fn payload(compression: Compression, mut packed: Vec<u8>, size: usize) -> Vec<u8> {
    if compression != Compression::Gzip {
        packed.extend((size as u32).to_le_bytes());
    }
    packed
}

pub(crate) fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

#[test]
fn a_kernel_is_unpacked_from_every_format() {
    let elf = elf();
    for (compression, pack) in PACKERS {
        let payload = payload(compression, pack(&elf), elf.len());
        assert_eq!(Compression::of(&payload).unwrap(), compression);
        assert!(unpack(&around(&payload)).unwrap() == elf, "{compression:?}");
    }
}

#[test]
fn what_the_programs_that_linux_is_packed_with_make_is_unpacked() {
    let elf = elf();
    for (compression, command) in [
        (Compression::Gzip, "gzip -n -f -9"),
        (Compression::Bzip2, "bzip2 -9"),
        (Compression::Lzma, "xz --format=lzma -9"),
        (
            Compression::Xz,
            "xz --check=crc32 --x86 --lzma2=preset=6,dict=32MiB",
        ),
        (Compression::Lzo, "lzop -9"),
        (Compression::Lz4, "lz4 -l -9 -c"),
        (Compression::Zstd, "zstd -19 --long=27"),
    ] {
        let Some(packed) = filter(command, &elf) else {
            eprintln!("skipped: there is no `{command}` here");
            continue;
        };
        let bzimage = around(&payload(compression, packed, elf.len()));
        assert!(unpack(&bzimage).unwrap() == elf, "{command}");
    }
}

fn filter(command: &str, input: &[u8]) -> Option<Vec<u8>> {
    let mut words = command.split(' ');
    let mut child = Command::new(words.next()?)
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .ok()?;
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{command}: {}", output.status);
    Some(output.stdout)
}

#[test]
fn debians_kernels_unpack_to_what_the_programs_make_of_them() {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest");
    let folders = std::fs::read_dir(target).into_iter().flatten().flatten();
    for folder in folders {
        let Ok(bzimage) = std::fs::read(folder.path().join("bzImage")) else {
            continue;
        };
        let payload = read_payload(&file(&bzimage)).unwrap();
        let program = match Compression::of(&payload).unwrap() {
            Compression::Lz4 => "lz4 -dc",
            Compression::Xz => "xz -dc",
            Compression::Zstd => "zstd -dc --long=31",
            other => panic!("{other:?}"),
        };
        let (packed, _) = payload.split_last_chunk::<SIZE_FIELD>().unwrap();
        match filter(program, packed) {
            Some(expected) => assert!(unpack(&bzimage).unwrap() == expected, "{folder:?}"),
            None => eprintln!("skipped: there is no `{program}` here"),
        }
    }
}

#[test]
fn a_kernel_that_lost_its_end_is_refused() {
    let elf = sample(200_000);
    for (compression, pack) in PACKERS {
        let packed = pack(&elf);
        for cut in [1, 7, packed.len() / 2, packed.len() - 6] {
            let cut = packed[..packed.len() - cut].to_vec();
            let error = decompress(&payload(compression, cut, elf.len())).unwrap_err();
            let known = matches!(
                error,
                UnpackError::Decode { .. }
                    | UnpackError::Size { .. }
                    | UnpackError::TooLarge { .. }
                    | UnpackError::UnknownCompression { .. }
            );
            assert!(known, "{compression:?}: {error:?}");
        }
    }
}

#[test]
fn no_damage_does_more_than_an_error() {
    let elf = sample(20_000);
    for (compression, pack) in PACKERS {
        let good = payload(compression, pack(&elf), elf.len());
        let mut state = 7_u64;
        for _ in 0..2000 {
            let mut bad = good.clone();
            for _ in 0..=state % 3 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                // The first bytes are where the numbers are; the size is left as it is.
                let range = if state & 1 == 0 { 64 } else { bad.len() - 4 };
                let at = (state >> 33) as usize % range.min(bad.len() - 4);
                bad[at] ^= (state >> 25) as u8 | 1;
            }
            if let Ok(content) = decompress(&bad) {
                assert_eq!(content.len(), elf.len());
            }
        }
    }
}

#[test]
fn a_false_size_is_found() {
    let elf = sample(200_000);
    for (compression, pack) in PACKERS {
        let mut payload = payload(compression, pack(&elf), elf.len());
        let end = payload.len() - SIZE_FIELD;
        for size in [0_u32, 4, 199_999, 200_001] {
            payload[end..].copy_from_slice(&size.to_le_bytes());
            let error = decompress(&payload).unwrap_err();
            let known = matches!(error, UnpackError::Decode { .. } | UnpackError::Size { .. });
            assert!(known, "{compression:?} {size}: {error:?}");
        }
        payload[end..].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = decompress(&payload).unwrap_err();
        assert!(matches!(error, UnpackError::TooLarge { .. }), "{error:?}");
    }
}

#[test]
fn no_kernel_takes_memory_for_more_than_it_says() {
    let test = "unpack::tests::in_a_process_whose_memory_is_measured";
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored"])
        .status();
    assert!(status.unwrap().success());
}

#[test]
#[ignore = "run by another test"]
fn in_a_process_whose_memory_is_measured() {
    /// In KiB: what the decoders may take beside the packed and the unpacked kernel.
    const LIMIT: u64 = 16 << 10;
    for (compression, pack) in PACKERS {
        if compression == Compression::Lzo {
            continue; // its encoder takes too long
        }
        let packed = pack(&vec![0; 1 << 26]);
        let mut payload = payload(compression, packed, 1 << 20);
        // A format that has the size itself is told a wrong one.
        let end = payload.len() - SIZE_FIELD;
        payload[end..].copy_from_slice(&(1_u32 << 20).to_le_bytes());
        let grown = memory_taken(|| {
            let error = decompress(&payload).unwrap_err();
            assert!(matches!(error, UnpackError::Decode { .. }), "{error:?}");
        });
        assert!(grown < LIMIT, "{compression:?}: {grown} KiB");
    }
    // A dictionary is no larger than what there is to find in it.
    let elf = sample(200_000);
    let mut packed = lzma(&elf);
    packed[1..5].copy_from_slice(&0xf000_0000_u32.to_le_bytes());
    let payload = payload(Compression::Lzma, packed, elf.len());
    let grown = memory_taken(|| assert!(decompress(&payload).unwrap() == elf));
    assert!(grown < LIMIT, "a large dictionary: {grown} KiB");
}

/// By how many KiB the process grows at most.
fn memory_taken(work: impl FnOnce()) -> u64 {
    let status = |field: &str| -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with(field));
        line.unwrap()
            .split_whitespace()
            .nth(1)
            .unwrap()
            .parse()
            .unwrap()
    };
    // The peak from now on (Linux: Documentation/filesystems/proc.rst).
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS");
    work();
    status("VmHWM").saturating_sub(before)
}

#[test]
fn what_is_no_kernel_is_refused() {
    let error = decompress(b"neither of them").unwrap_err();
    assert!(error.to_string().contains("6e"), "{error}");
    let text = vec![b'x'; 1000];
    let error = decompress(&payload(Compression::Lz4, lz4(&text), 1000)).unwrap_err();
    assert!(matches!(error, UnpackError::NotElf), "{error:?}");
    let error = unpack(b"MZ").unwrap_err();
    assert!(matches!(error, UnpackError::NotABzImage), "{error:?}");
    let error = decompress(b"BZh").unwrap_err();
    assert!(matches!(error, UnpackError::NoPayload), "{error:?}");
}

#[test]
fn an_unpacked_kernel_can_be_a_file_in_memory() {
    let mut elf = sample(1 << 20);
    elf[200_000..900_000].fill(0);
    let image = around(&payload(Compression::Lz4, lz4(&elf), elf.len()));
    let unpacked = unpack_into_memory(&file(&image)).unwrap();
    let mut content = vec![0; elf.len()];
    unpacked.read_exact_at(&mut content, 0).unwrap();
    assert!(content == elf);
    let metadata = unpacked.metadata().unwrap();
    assert_eq!(metadata.len(), elf.len() as u64);
    // What is zero takes no memory.
    assert!(metadata.blocks() * 512 < 600_000, "{metadata:?}");
}
