//! `cargo xtask`: the commands that a developer of Kiln runs.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use kiln_xtask::{api, assets, bench, boot, fuzz, nested, test};

/// The developer commands of Kiln.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Boot a stock Debian kernel with a disk and a network.
    ///
    /// On a terminal it gives a shell in the guest; otherwise it checks that the guest has all it
    /// should, and powers it off.
    Boot(boot::BootArgs),
    /// The part of `boot` that runs where guests can run.
    #[command(hide = true)]
    BootHere(boot::Prepared),
    /// Run everything that CI runs: lints, unit tests, and tests with real Linux guests.
    Test(test::TestArgs),
    /// Compare the public interfaces of the published crates with the listings in docs/api.
    Api(api::ApiArgs),
    /// Measure Kiln beside a bare KVM loop and QEMU's microvm.
    Bench(bench::BenchArgs),
    /// Fuzz what takes bytes from guests and files.
    Fuzz(fuzz::FuzzArgs),
    /// Prepare kernels, initrds, a root disk and a disk of tools for guests, and print their paths.
    Guest {
        /// Look for newer kernels.
        #[arg(long)]
        update: bool,
    },
    /// Run any command of this machine as root in a nested one that has a real /dev/kvm.
    ///
    /// Exits with the command's status; 124 when it took too long; 125 when the machine failed.
    Nested(NestedArgs),
}

#[derive(Debug, Args)]
struct NestedArgs {
    /// Processors; the emulation of more than one is not quite reliable.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=255))]
    cpus: u32,
    /// Memory, such as 3000M or 4G.
    #[arg(long, default_value = "3000M", value_parser = parse_mebibytes)]
    memory: u32,
    /// Count instructions instead of time, on one processor.
    #[arg(long)]
    icount: bool,
    /// How long the command may take, in seconds [default: 600, no limit on a terminal].
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// A folder that the command may write results to; all else that it writes is discarded.
    #[arg(long, value_name = "FOLDER")]
    output: Option<PathBuf>,
    /// Leave the log of the nested machine's kernel here.
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // The statuses of a nested command are its own, but for this one.
    let failed = match command {
        Action::Nested(_) => nested::FAILED,
        _ => 1,
    };
    let result = match command {
        Action::Boot(args) => boot::run(&args),
        Action::BootHere(prepared) => boot::run_here(&prepared),
        Action::Test(args) => test::run(&args).map(|()| 0),
        Action::Api(args) => api::run(args).map(|()| 0),
        Action::Bench(args) => bench::run(&args).map(|()| 0),
        Action::Fuzz(args) => fuzz::run(&args).map(|()| 0),
        Action::Guest { update } => guest(update),
        Action::Nested(args) => run_nested(args),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(failed)
        }
    }
}

fn guest(update: bool) -> Result<u8> {
    let guest = if update {
        assets::update()
    } else {
        assets::guest()
    }?;
    for kernel in &guest.kernels {
        let series = kernel.series;
        println!("bzimage-{series} {}", kernel.bzimage.display());
        println!("vmlinux-{series} {}", kernel.vmlinux.display());
        println!("initrd-{series} {}", kernel.initrd.display());
    }
    println!("root {}", guest.root.display());
    println!("tools {}", assets::tools()?.display());
    Ok(0)
}

fn run_nested(args: NestedArgs) -> Result<u8> {
    let options = nested::Options {
        cpus: args.cpus,
        memory: args.memory,
        icount: args.icount,
        limit: args.timeout.map(Duration::from_secs),
        output: args.output,
        log: args.log,
        input: true,
    };
    nested::run(&options, &args.command)
}

/// Reads a size, in mebibytes unless it ends with G.
fn parse_mebibytes(text: &str) -> Result<u32> {
    let (number, unit) = match text.strip_suffix(['G', 'g']) {
        Some(number) => (number, 1024),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
    };
    let number: u32 = number.parse().context("a size is a number and M or G")?;
    number
        .checked_mul(unit)
        .filter(|size| *size >= 256)
        .context("a size is 256M at least")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn everything_after_two_dashes_is_the_nested_command() {
        let line = [
            "xtask", "nested", "--cpus", "4", "--", "sh", "--cpus", "--", "x",
        ];
        let Action::Nested(args) = Cli::try_parse_from(line).unwrap().command else {
            panic!("not nested");
        };
        assert_eq!((args.cpus, args.memory), (4, 3000));
        assert_eq!(args.command, ["sh", "--cpus", "--", "x"]);
    }

    #[test]
    fn sizes_are_in_mebibytes_or_gibibytes() {
        assert_eq!(parse_mebibytes("3000M").unwrap(), 3000);
        assert_eq!(parse_mebibytes("3000").unwrap(), 3000);
        assert_eq!(parse_mebibytes("4g").unwrap(), 4096);
        for wrong in ["", "M", "1M", "-1G", "4194304G", "1K"] {
            assert!(parse_mebibytes(wrong).is_err(), "{wrong}");
        }
    }
}
