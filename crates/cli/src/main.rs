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
//! | `memory` | the allocator's settings |
//! | `check` | `kiln check` |
//! | `terminal` | raw mode and the escape sequence |

mod args;
mod check;
mod config;
mod memory;
mod metrics;
mod run;
mod supervise;
mod terminal;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use tracing_subscriber::EnvFilter;

use args::{Cli, Command};
use kiln_vmm::HeadStart;

/// The virtual machine could not be built or run, or this host cannot run guests.
const FAILED: u8 = 1;
/// The command line is wrong.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    memory::share_one_heap();
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
        ExitCode::from(FAILED)
    })
}

/// Help goes to the standard output; an error is one line.
fn usage(error: &clap::Error) -> ExitCode {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        let _ = error.print();
        return ExitCode::SUCCESS;
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
    ExitCode::from(USAGE)
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
