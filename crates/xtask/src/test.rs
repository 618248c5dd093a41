//! `cargo xtask test`: everything that CI runs, step by step.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use crate::{api, assets, cargo, fuzz, integration, packages, process};

/// The integration tests that boot all that Debian ships, which takes too long for every run.
const DISTRIBUTION: &str = "distribution";
/// What `cargo xtask test` is asked to do.
#[derive(Clone, Debug, Args)]
pub struct TestArgs {
    /// Run only tests whose name contains this, and no lints.
    filter: Option<String>,
    /// Leave formatting, clippy, rustdoc and the public interfaces out.
    #[arg(long)]
    skip_lint: bool,
    /// Run only this step; can be given more than once, and is the only way to `distribution`.
    #[arg(long, value_name = "STEP")]
    only: Vec<Step>,
}

/// A step of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Step {
    /// Formatting.
    Format,
    /// Clippy, without warnings.
    Clippy,
    /// The documentation builds without warnings.
    Docs,
    /// The public interfaces are as docs/api says.
    Api,
    /// Unit, integration and doc tests on this machine, with its own /dev/kvm where there is one.
    Host,
    /// Each fuzz target on its corpus, and a few seconds more.
    Fuzz,
    /// Integration tests with real Linux guests, in a nested machine where needed.
    Linux,
    /// All that Debian ships for a machine to boot, in the same place: every kernel, the installer,
    /// a whole system.
    Distribution,
}

impl Step {
    const ALL: [Self; 8] = [
        Self::Format,
        Self::Clippy,
        Self::Docs,
        Self::Api,
        Self::Host,
        Self::Fuzz,
        Self::Linux,
        Self::Distribution,
    ];

    fn is_lint(self) -> bool {
        matches!(self, Self::Format | Self::Clippy | Self::Docs | Self::Api)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Format => "format",
            Self::Clippy => "clippy",
            Self::Docs => "docs",
            Self::Api => "api",
            Self::Host => "host",
            Self::Fuzz => "fuzz",
            Self::Linux => "linux",
            Self::Distribution => DISTRIBUTION,
        }
    }

    fn run(self, filter: Option<&str>) -> Result<()> {
        match self {
            Self::Format => {
                succeed(&mut cargo::command(&["fmt", "--all", "--check"]))?;
                let fuzz = ["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"];
                succeed(&mut cargo::command(&fuzz))
            }
            Self::Clippy => succeed(&mut cargo::command(&[
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-Dwarnings",
            ])),
            Self::Docs => {
                let mut command = cargo::command(&["doc", "--quiet", "--workspace", "--no-deps"]);
                succeed(command.env("RUSTDOCFLAGS", "-Dwarnings"))
            }
            Self::Api => api::run(api::ApiArgs::default()),
            Self::Host => {
                packages::ensure(packages::HOST)?;
                let mut command = cargo::command(&["test", "--workspace", "--"]);
                succeed(command.args(filter))
            }
            Self::Fuzz => fuzz::check(),
            Self::Linux => {
                assets::guest()?;
                assets::tools()?;
                linux(filter, |test| test != DISTRIBUTION)
            }
            Self::Distribution => {
                assets::distribution()?;
                linux(filter, |test| test == DISTRIBUTION)
            }
        }
    }
}

/// Runs the steps, and says which one failed.
///
/// # Errors
///
/// When a step fails; those after it are then not run.
pub fn run(args: &TestArgs) -> Result<()> {
    let begun = Instant::now();
    for step in steps(args) {
        eprintln!("xtask: step {}", step.name());
        let begun = Instant::now();
        let result = step.run(args.filter.as_deref());
        let seconds = begun.elapsed().as_secs_f64();
        result.with_context(|| format!("step {} failed after {seconds:.1} s", step.name()))?;
        println!("xtask: step {}: ok, {seconds:.1} s", step.name());
    }
    println!(
        "xtask: all steps passed in {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    Ok(())
}

fn steps(args: &TestArgs) -> Vec<Step> {
    let is_wanted = |step: &Step| {
        if args.only.is_empty() {
            *step != Step::Distribution
                && !(step.is_lint() && (args.skip_lint || args.filter.is_some()))
                // The targets are no tests of a name.
                && !(*step == Step::Fuzz && args.filter.is_some())
        } else {
            args.only.contains(step)
        }
    };
    Step::ALL.into_iter().filter(is_wanted).collect()
}

/// Runs a command with its output on ours.
fn succeed(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("start `{}`", process::show(command)))?;
    ensure!(status.success(), "`{}`: {status}", process::show(command));
    Ok(())
}

/// Runs the integration tests in the files of these names, those with real guests included.
fn linux(filter: Option<&str>, is_wanted: impl Fn(&str) -> bool) -> Result<()> {
    packages::ensure(packages::RUN)?;
    let kiln = cargo::build_kiln()?;
    let mut tests = cargo::build_integration_tests()?;
    tests.retain(|test| is_wanted(name_of(test)));
    integration::run(&kiln, &tests, filter)
}

/// Returns the name of the file that cargo built the program `test` from: `linux` of
/// `linux-0123456789abcdef`.
pub(crate) fn name_of(test: &Path) -> &str {
    let program = test.file_name().and_then(OsStr::to_str).unwrap_or_default();
    program.rsplit_once('-').map_or(program, |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(filter: Option<&str>, skip_lint: bool, only: &[Step]) -> TestArgs {
        TestArgs {
            filter: filter.map(str::to_owned),
            skip_lint,
            only: only.to_vec(),
        }
    }

    #[test]
    fn lints_are_left_out_where_only_tests_are_wanted() {
        assert_eq!(steps(&args(None, false, &[])), Step::ALL[..7]);
        assert_eq!(
            steps(&args(None, true, &[])),
            [Step::Host, Step::Fuzz, Step::Linux]
        );
        assert_eq!(
            steps(&args(Some("x"), false, &[])),
            [Step::Host, Step::Linux]
        );
    }

    #[test]
    fn the_distribution_is_tested_only_where_it_is_asked_for() {
        let only = args(None, false, &[Step::Distribution]);
        assert_eq!(steps(&only), [Step::Distribution]);
        assert!(!steps(&args(Some("x"), true, &[])).contains(&Step::Distribution));
        let program = Path::new("/target/debug/deps/distribution-0123456789abcdef");
        assert_eq!(name_of(program), DISTRIBUTION);
    }

    #[test]
    fn chosen_steps_run_in_the_usual_order() {
        let chosen = args(Some("x"), true, &[Step::Linux, Step::Clippy]);
        assert_eq!(steps(&chosen), [Step::Clippy, Step::Linux]);
    }
}
