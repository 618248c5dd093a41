//! `kiln`: boot Linux in a KVM virtual machine.
//!
//! This is a thin shell over [`kiln_vmm`]: it turns arguments into a [`kiln_vmm::VmConfig`], lends
//! the terminal to the guest, turns signals into presses of the power button, and the end of the
//! machine into an exit code.
//!
//! | module | what lives there |
//! |---|---|
//! | `args` | the command line and the texts of its options |
//! | `config` | from arguments and `--config` to a [`kiln_vmm::VmConfig`] |
//! | `run` | `kiln run` |
//! | `metrics` | `--metrics`: the file that the machine's metrics are written to |
//! | `supervise` | waiting for the end, and for signals |
//! | `process` | how the process begins and ends |
//! | `check` | `kiln check` |
//! | `terminal` | raw mode and the escape sequence |
#![cfg_attr(not(test), no_main)]

mod args;
mod check;
mod config;
mod footprint;
mod metrics;
mod process;
mod run;
mod supervise;
mod terminal;

use clap::Parser;
use clap::error::ErrorKind;
use tracing_subscriber::EnvFilter;

use args::{Cli, Command};
use kiln_vmm::HeadStart;

/// All went well.
const SUCCESS: u8 = 0;
/// The virtual machine could not be built or run, or this host cannot run guests.
const FAILED: u8 = 1;
/// The command line is wrong.
const USAGE: u8 = 2;

/// Called by the C library; the arguments are the standard library's business.
// SAFETY: the program has no other `main`: its own is left out by `no_main`.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn main(
    _count: std::ffi::c_int,
    _arguments: *const *const std::ffi::c_char,
) -> std::ffi::c_int {
    process::run(kiln)
}

/// Tests have a `main` of their own.
#[cfg(test)]
fn main() {
    std::process::exit(process::run(kiln));
}

/// The program; gives its exit code.
fn kiln() -> u8 {
    // KVM makes a machine while we find out which one is wanted.
    let is_run = std::env::args_os().nth(1).is_some_and(|word| word == "run");
    let head_start = is_run.then(|| HeadStart::begin().ok()).flatten();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    log_to_stderr();
    let result = match cli.command {
        Command::Run(args) => run::run(*args, head_start),
        Command::Check => check::check(),
    };
    result.unwrap_or_else(|error| {
        // One line: what was attempted, and why it failed.
        eprintln!("kiln: {error:#}");
        FAILED
    })
}

/// Help goes to the standard output; an error is one line.
fn usage(error: &clap::Error) -> u8 {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        let _ = error.print();
        return SUCCESS;
    }
    let text = error.to_string();
    let mut lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or("wrong arguments");
    let mut message = first.trim_start_matches("error: ").to_owned();
    for line in lines {
        message.push_str(if line.starts_with("tip:") { "; " } else { " " });
        message.push_str(line);
    }
    eprintln!("kiln: {message} (see `kiln run --help`)");
    USAGE
}

fn log_to_stderr() {
    const VARIABLE: &str = "KILN_LOG";
    let log = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time();
    if std::env::var_os(VARIABLE).is_none() {
        log.init();
        return;
    }
    let filter = EnvFilter::builder()
        .with_default_directive(tracing::Level::WARN.into())
        .with_env_var(VARIABLE)
        .from_env_lossy();
    log.with_env_filter(filter).init();
}
