//! Kernel modules: finding them in a Debian package, and the order that they are loaded in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::process;

/// A kernel module, unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// The name, with underscores.
    pub name: String,
    /// The ELF object.
    pub data: Vec<u8>,
}

/// Returns `wanted` modules and all that they depend on, in an order that they can be loaded in.
/// What the kernel has built in is left out. `folder` is the kernel's folder of modules.
///
/// # Errors
///
/// When a module is neither there nor built in, cannot be read or unpacked, or depends on itself.
pub fn collect(folder: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let files = files(folder)?;
    let list = folder.join("modules.builtin");
    let list = fs::read_to_string(&list).with_context(|| format!("read {}", list.display()))?;
    let built_in: BTreeSet<_> = list.lines().map(|path| name_of(Path::new(path))).collect();
    let load = |name: &str| -> Result<Option<Vec<u8>>> {
        match files.get(name) {
            Some(file) => read(file).map(Some),
            None => {
                ensure!(built_in.contains(name), "this kernel has no module {name}");
                Ok(None)
            }
        }
    };
    let mut order = Order {
        load,
        begun: BTreeSet::new(),
        modules: Vec::new(),
    };
    for name in wanted {
        order.add(&name.replace('-', "_"))?;
    }
    Ok(order.modules)
}

/// The modules collected so far, each after those it depends on.
struct Order<F> {
    load: F,
    begun: BTreeSet<String>,
    modules: Vec<Module>,
}

impl<F: Fn(&str) -> Result<Option<Vec<u8>>>> Order<F> {
    fn add(&mut self, name: &str) -> Result<()> {
        if !self.begun.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(data) = (self.load)(name)? else {
            return Ok(());
        };
        for dependency in dependencies(&data) {
            self.add(&dependency)?;
        }
        self.modules.push(Module {
            name: name.to_owned(),
            data,
        });
        Ok(())
    }
}

/// Takes the signature off a module: loading it is then faster, and taints the kernel.
pub fn take_signature_off(module: &mut Module) {
    const MARK: &[u8] = b"~Module signature appended~\n";
    /// What stands before the mark; its last four bytes are the length of the signature before it.
    const TRAILER: usize = 12;
    let Some(before) = module.data.strip_suffix(MARK) else {
        return;
    };
    let Some((_, length)) = before.split_last_chunk::<4>() else {
        return;
    };
    let length = u32::from_be_bytes(*length) as usize;
    if let Some(rest) = before.len().checked_sub(TRAILER + length) {
        module.data.truncate(rest);
    }
}

/// Returns what a module depends on, from its `.modinfo` section: zero-ended `key=value` strings.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..]
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split_once(".ko")
        .map_or(name.as_ref(), |(stem, _)| stem)
        .replace('-', "_")
}

fn files(folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))?;
        for entry in entries {
            let path = entry
                .with_context(|| format!("list {}", folder.display()))?
                .path();
            if path.is_dir() {
                folders.push(path);
            } else if matches!(path.extension(), Some(end) if end == "ko" || end == "xz") {
                files.insert(name_of(&path), path);
            }
        }
    }
    Ok(files)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    let data = fs::read(file).with_context(|| format!("read {}", file.display()))?;
    if file.extension().is_some_and(|end| end == "xz") {
        return process::filter("xz", &["-dc"], &data)
            .with_context(|| format!("unpack {}", file.display()));
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(depends: &str) -> Vec<u8> {
        format!("\x7fELF..\0license=GPL\0depends={depends}\0retpoline=Y\0").into_bytes()
    }

    fn kernel() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        fs::create_dir_all(at("kernel/net")).unwrap();
        fs::write(
            at("modules.builtin"),
            "kernel/fs/ext4/ext4.ko\nkernel/x/built-in.ko\n",
        )
        .unwrap();
        fs::write(
            at("kernel/net/virtio_net.ko"),
            module("net-failover,virtio,built-in"),
        )
        .unwrap();
        fs::write(at("kernel/net/net_failover.ko"), module("failover")).unwrap();
        fs::write(at("kernel/net/failover.ko"), module("")).unwrap();
        let packed = process::filter("xz", &["-c"], &module("")).unwrap();
        fs::write(at("kernel/virtio.ko.xz"), packed).unwrap();
        fs::write(at("kernel/broken.ko"), module("absent")).unwrap();
        folder
    }

    #[test]
    fn modules_come_after_what_they_depend_on() {
        let kernel = kernel();
        let modules = collect(kernel.path(), &["ext4", "virtio-net", "virtio"]).unwrap();
        let names: Vec<_> = modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["failover", "net_failover", "virtio", "virtio_net"]);
        assert_eq!(modules[2].data, module(""), "unpacked");
    }

    #[test]
    fn a_signature_is_taken_off_whole() {
        let mut data = b"elf".to_vec();
        data.extend_from_slice(b"signature\0\0\0\0\0\0\0\0\0\0\0\x09~Module signature appended~\n");
        let mut signed = Module {
            name: "x".into(),
            data,
        };
        take_signature_off(&mut signed);
        assert_eq!(signed.data, b"elf");
        take_signature_off(&mut signed);
        assert_eq!(signed.data, b"elf", "there is none any more");
    }

    #[test]
    fn an_absent_module_is_named() {
        let kernel = kernel();
        for wanted in ["absent", "broken"] {
            let error = collect(kernel.path(), &[wanted]).unwrap_err();
            assert_eq!(error.to_string(), "this kernel has no module absent");
        }
    }
}
