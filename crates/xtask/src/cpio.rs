//! Writing cpio archives in the "newc" format, which is what Linux unpacks as an initrd.
//!
//! Linux unpacks archives that follow each other in one initrd, each at a multiple of four bytes,
//! and later files replace earlier ones: so an initrd is extended by appending to it.

/// What archives are padded to, so that another can follow.
const BLOCK: usize = 512;

const MODE_DIRECTORY: u32 = 0o040_000;
const MODE_FILE: u32 = 0o100_000;
const MODE_SYMLINK: u32 = 0o120_000;

/// A cpio archive that is being written, in memory.
///
/// ```
/// let mut archive = kiln_xtask::cpio::Archive::new();
/// archive.file("etc/hostname", 0o644, b"kiln\n");
/// let bytes = archive.finish();
/// assert!(bytes.starts_with(b"070701"));
/// assert_eq!(bytes.len() % 512, 0);
/// ```
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
    directories: std::collections::BTreeSet<String>,
}

impl Archive {
    /// Returns an empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the directory `path` and those above it, where they are not there yet.
    pub fn directory(&mut self, path: &str) {
        let mut end = 0;
        for part in path.split('/') {
            end += part.len();
            let directory = &path[..end];
            if !directory.is_empty() && self.directories.insert(directory.to_owned()) {
                self.entry(directory, MODE_DIRECTORY | 0o755, b"");
            }
            end += 1;
        }
    }

    /// Adds a regular file with the permission bits `mode`, and the directories above it.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.parents(path);
        self.entry(path, MODE_FILE | mode, data);
    }

    /// Adds a symbolic link, and the directories above it.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entry(path, MODE_SYMLINK | 0o777, target.as_bytes());
    }

    /// Ends the archive and returns its bytes, padded so that another archive can follow.
    pub fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, b"");
        self.pad(BLOCK);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.inode += 1;
        let links = if mode & MODE_DIRECTORY != 0 { 2 } else { 1 };
        // Everything belongs to root and has no time, so that equal contents give equal bytes.
        let fields: [usize; 13] = [
            self.inode as usize,
            mode as usize,
            0, // user
            0, // group
            links,
            0, // time
            data.len(),
            0, // device, major and minor
            0,
            0, // device of a node, major and minor
            0,
            path.len() + 1,
            0, // checksum, of another format
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(data);
        self.pad(4);
    }

    fn pad(&mut self, to: usize) {
        let length = self.bytes.len().next_multiple_of(to);
        self.bytes.resize(length, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive as Linux does: entries up to a trailer, then zeros up to the next archive.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let total = bytes.len();
        let mut entries = Vec::new();
        while !bytes.is_empty() {
            if bytes[0] == 0 {
                bytes = &bytes[1..];
                continue;
            }
            assert_eq!((total - bytes.len()) % 4, 0, "headers are aligned");
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + n * 8..14 + n * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name) = (field(1), field(6) as usize, field(11) as usize);
            let path = String::from_utf8(bytes[110..110 + name - 1].to_vec()).unwrap();
            assert_eq!(bytes[110 + name - 1], 0);
            let data = (110 + name).next_multiple_of(4);
            if path != "TRAILER!!!" {
                entries.push((path, mode, bytes[data..data + size].to_vec()));
            }
            bytes = &bytes[(data + size).next_multiple_of(4)..];
        }
        entries
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_only_once() {
        let mut archive = Archive::new();
        archive.file("a/b/c", 0o755, b"1");
        archive.file("a/b/d", 0o644, b"22222");
        archive.symlink("a/e", "b/c");
        let entries = read(&archive.finish());
        let paths: Vec<_> = entries.iter().map(|e| (e.0.as_str(), e.1)).collect();
        assert_eq!(
            paths,
            [
                ("a", 0o040_755),
                ("a/b", 0o040_755),
                ("a/b/c", 0o100_755),
                ("a/b/d", 0o100_644),
                ("a/e", 0o120_777),
            ]
        );
        assert_eq!(entries[3].2, b"22222");
        assert_eq!(entries[4].2, b"b/c");
    }

    #[test]
    fn a_second_archive_can_follow_the_first() {
        let mut first = Archive::new();
        first.file("init", 0o755, b"first");
        let mut second = Archive::new();
        second.file("test.sh", 0o755, b"second");
        let mut both = first.finish();
        both.extend(second.finish());
        let entries = read(&both);
        assert_eq!(entries[0].0, "init");
        assert_eq!(
            (entries[1].0.as_str(), entries[1].2.as_slice()),
            ("test.sh", b"second".as_slice())
        );
    }

    #[test]
    fn equal_contents_give_equal_bytes() {
        let bytes = || {
            let mut archive = Archive::new();
            archive.file("x/y", 0o644, b"z");
            archive.finish()
        };
        assert_eq!(bytes(), bytes());
    }
}
