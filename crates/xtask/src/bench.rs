//! `cargo xtask bench`: Kiln measured beside a bare KVM loop and QEMU's microvm.
//!
//! The measuring is `crates/bench`'s; this builds the programs and runs it where the figures mean
//! something: in real time on this machine's KVM, and by counts of instructions in the nested one.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use crate::host::{HostKvm, host_kvm};
use crate::{assets, cargo, initrd, packages, process};

/// Counts of instructions repeat, so that few runs do.
const NESTED_RUNS: u32 = 3;
/// The series of Debian's kernels that is booted.
const SERIES: &str = "6.12";

/// What the guests do whose disk and whose network are measured.
const BLOCK_SCRIPT: &str = include_str!("../../../resources/guest/bench/block");
const NET_SCRIPT: &str = include_str!("../../../resources/guest/bench/net");

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Program start to the guest's first effect and to the program's end; lives a second.
    Start,
    /// What an exit to the program costs, in time and in instructions.
    Exits,
    /// Memory beside the guest's.
    Memory,
    /// Many idle machines.
    Density,
    /// Booting Debian's kernel, in instructions.
    Boot,
    /// Disk operations, in instructions.
    Block,
    /// TCP over a tap, in instructions.
    Net,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Exits => "exits",
            Self::Memory => "memory",
            Self::Density => "density",
            Self::Boot => "boot",
            Self::Block => "block",
            Self::Net => "net",
        }
    }

    /// The places that it is measured in.
    fn places(self) -> &'static [Place] {
        match self {
            Self::Start | Self::Memory | Self::Density => &[Place::Host],
            Self::Exits => &[Place::Host, Place::Nested],
            Self::Boot | Self::Block | Self::Net => &[Place::Nested],
        }
    }
}

/// Where something is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// On this machine's KVM, in real time.
    Host,
    /// In the nested machine, where time is instructions.
    Nested,
}

/// The arguments of `cargo xtask bench`.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// What to measure; all parts when none is named.
    parts: Vec<Part>,
    /// How often each is run.
    #[arg(long)]
    runs: Option<u32>,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
}

/// Measures.
///
/// # Errors
///
/// When a program cannot be built or a part fails.
pub fn run(args: &BenchArgs) -> Result<()> {
    packages::ensure(packages::BENCH)?;
    let parts = if args.parts.is_empty() {
        Part::value_variants()
    } else {
        &args.parts
    };
    let uses = |place| parts.iter().any(|part| part.places().contains(&place));
    ensure!(
        !uses(Place::Host) || host_kvm() != HostKvm::None,
        "this machine has no /dev/kvm that we may use"
    );
    let kiln = cargo::build_kiln()?;
    let bench = cargo::build_static("kiln-bench")?;
    let mut common: Vec<OsString> = vec!["--kiln".into(), kiln.into()];
    common.extend(["--floor".into(), bench.join("kvm-floor").into()]);
    if let Some(qemu) = process::find("qemu-system-x86_64") {
        common.extend(["--qemu".into(), qemu.into()]);
    }
    common.extend(args.json.then(|| "--json".into()));
    let folder = tempfile::tempdir().context("make a temporary folder")?;
    let mut inside: Vec<OsString> = Vec::new();
    if uses(Place::Nested) {
        let this = std::env::current_exe().context("find our own program")?;
        inside.extend(["--nested".into(), this.into()]);
        inside.extend(["--guest".into(), guest(folder.path())?.into()]);
    }
    for part in parts {
        for place in part.places() {
            let mut command = process::tied(bench.join("kiln-bench"));
            command.arg(part.name()).args(&common);
            let runs = match place {
                Place::Host => args.runs,
                Place::Nested => Some(args.runs.unwrap_or(NESTED_RUNS)),
            };
            if let Some(runs) = runs {
                command.arg("--runs").arg(runs.to_string());
            }
            match place {
                Place::Host => eprintln!("xtask: {}: in real time, on this KVM", part.name()),
                Place::Nested => {
                    eprintln!(
                        "xtask: {}: in instructions, in a nested machine",
                        part.name()
                    );
                    command.args(&inside);
                }
            }
            let status = command.status().context("start kiln-bench")?;
            ensure!(status.success(), "{} failed: {status}", part.name());
        }
    }
    Ok(())
}

/// Prepares what Linux guests are made of, and writes its description to a file in `folder`, whose
/// path is returned.
fn guest(folder: &Path) -> Result<PathBuf> {
    let assets = assets::guest()?;
    let kernel = assets.kernel(SERIES)?;
    let [hello, block, net] = ["hello", "block", "net"].map(|name| folder.join(name));
    initrd::write_hello(&hello)?;
    initrd::with_script(&kernel.initrd, &block, BLOCK_SCRIPT)?;
    initrd::with_script(&kernel.initrd, &net, NET_SCRIPT)?;
    let files = serde_json::json!({
        "vmlinux": kernel.vmlinux,
        "bzimage": kernel.bzimage,
        "hello": hello,
        "block": block,
        "net": net,
        "tools": assets::tools()?,
    });
    let path = folder.join("guest.json");
    fs::write(&path, files.to_string()).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}
