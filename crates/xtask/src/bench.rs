//! `cargo xtask bench`: Kiln measured beside a bare KVM loop and QEMU's microvm.
//!
//! The measuring is `crates/bench`'s; this builds the programs and runs it where the figures mean
//! something: in real time on this machine's KVM, and by counts of instructions in the nested one.

use std::ffi::OsString;
use std::process::Command;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};

use crate::host::{HostKvm, host_kvm};
use crate::{cargo, nested, packages, process};

/// How long a part may take in the nested machine, in seconds.
const NESTED_LIMIT: u64 = 1800;
/// Counts of instructions repeat, so that few runs do.
const NESTED_RUNS: &str = "3";

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
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Exits => "exits",
            Self::Memory => "memory",
            Self::Density => "density",
        }
    }
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
    ensure!(
        host_kvm() != HostKvm::None,
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
    let program = bench.join("kiln-bench");
    let all = Part::value_variants();
    let parts = if args.parts.is_empty() {
        all
    } else {
        &args.parts
    };
    for part in parts {
        eprintln!(
            "xtask: {}: in real time, on this machine's KVM",
            part.name()
        );
        let mut command = Command::new(&program);
        command.arg(part.name()).args(&common);
        if let Some(runs) = args.runs {
            command.arg("--runs").arg(runs.to_string());
        }
        let status = command.status()?;
        ensure!(status.success(), "{} failed: {status}", part.name());
        if *part == Part::Exits {
            eprintln!("xtask: exits: in instructions, in a nested machine");
            let mut command: Vec<OsString> = vec![program.clone().into(), part.name().into()];
            command.extend(common.iter().cloned());
            command.extend(["--runs".into(), NESTED_RUNS.into()]);
            count_instructions(&command)?;
        }
    }
    Ok(())
}

/// Runs a command where a nanosecond is an instruction.
fn count_instructions(command: &[OsString]) -> Result<()> {
    let options = nested::Options {
        icount: true,
        limit: Some(std::time::Duration::from_secs(NESTED_LIMIT)),
        input: false,
        ..nested::Options::default()
    };
    let status = nested::run(&options, command)?;
    ensure!(status == 0, "it ended with exit status {status}");
    Ok(())
}
