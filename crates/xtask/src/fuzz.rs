//! `cargo xtask fuzz`: the fuzz targets of the folder `fuzz`, built with what coverage takes and run
//! by libFuzzer, on any toolchain that Kiln is built with.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::{cargo, packages, paths, process};

/// What makes a program tell libFuzzer where it has been, in any compiler's own flags.
const COVERAGE: &str = "--cfg fuzzing -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";
/// What finds accesses of freed memory, which only nightly compilers know.
const ADDRESS_SANITIZER: &str = "-Zsanitizer=address -Cunsafe-allow-abi-mismatch=sanitizer";
/// An input that takes more than this many seconds is a finding, as is one that takes more than
/// this many MiB.
const TIMEOUT: u32 = 10;
const MEMORY: u32 = 1024;
/// How long each target is fuzzed by `cargo xtask test`, in seconds, the committed corpus included
/// but run as a whole; and what an input may take on a machine that does many things at once.
const CHECK_SECONDS: u64 = 3;
const CHECK_TIMEOUT: u32 = 60;

/// What `cargo xtask fuzz` is asked to do.
#[derive(Clone, Debug, Args)]
pub struct FuzzArgs {
    /// The target; all of them, one after the other, where none is named.
    target: Option<String>,
    /// How long each target is fuzzed.
    #[arg(long, default_value_t = 60, value_name = "N")]
    seconds: u64,
    /// Look for wrong accesses of memory, too: takes a nightly toolchain.
    #[arg(long)]
    asan: bool,
    /// Run this input only, such as one that was found to fail.
    #[arg(long, value_name = "FILE", requires = "target")]
    input: Option<PathBuf>,
    /// Replace the committed corpus by the least of all inputs known that reaches as much.
    #[arg(long)]
    minimize: bool,
    /// Print the names of the targets.
    #[arg(long)]
    list: bool,
}

/// Does what is asked.
///
/// # Errors
///
/// When the targets cannot be built, or one finds something; the message says what to run then.
pub fn run(args: &FuzzArgs) -> Result<()> {
    let known = targets()?;
    if args.list {
        known.iter().for_each(|target| println!("{target}"));
        return Ok(());
    }
    let wanted = match &args.target {
        None => known,
        Some(target) if known.contains(target) => vec![target.clone()],
        Some(target) => bail!("no fuzz target `{target}`; there are {}", known.join(", ")),
    };
    let programs = build(args.asan, args.target.as_deref())?;
    for target in wanted {
        let job = Job::new(&programs, &target, TIMEOUT);
        if let Some(input) = &args.input {
            let input = std::path::absolute(input).context("find the input")?;
            process::run(job.command([]).arg(input))?;
        } else if args.minimize {
            job.minimize()?;
        } else {
            eprintln!("xtask: fuzzing {target} for {} s", args.seconds);
            job.explain(process::run(&mut job.fuzz(args.seconds)?))?;
        }
    }
    Ok(())
}

/// Runs each target on the committed corpus, and for a few seconds more on what comes of it. It is
/// always the same that comes, as far as the time goes.
///
/// # Errors
///
/// As for [`run`].
pub fn check() -> Result<()> {
    let targets = targets()?;
    let programs = build(false, None)?;
    let left = Mutex::new(targets.iter());
    let work = || -> Result<()> {
        while let Some(target) = left.lock().ok().and_then(|mut left| left.next()) {
            let job = Job::new(&programs, target, CHECK_TIMEOUT);
            job.make_folders()?;
            let found = tempfile::tempdir().context("make a folder for inputs")?;
            let mut command = job.command([
                "-seed=1".to_owned(),
                format!("-max_total_time={CHECK_SECONDS}"),
            ]);
            command.arg(found.path()).arg(job.committed());
            // It says a lot, of which nothing matters where nothing is found.
            job.explain(process::output(command.stderr(Stdio::piped())).map(drop))?;
        }
        Ok(())
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| {
            let ended = worker.join();
            ended.unwrap_or_else(|_| bail!("a thread of the fuzz step panicked"))
        })
    })?;
    println!("xtask: fuzz: {} targets found nothing", targets.len());
    Ok(())
}

fn folder() -> PathBuf {
    paths::workspace().join("fuzz")
}

/// The targets, by their files.
fn targets() -> Result<Vec<String>> {
    let folder = folder().join("fuzz_targets");
    let entries = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    let mut names: Vec<_> = entries
        .flatten()
        .filter_map(|entry| Some(entry.path().file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    ensure!(!names.is_empty(), "{} is empty", folder.display());
    Ok(names)
}

/// Builds one target or all of them, and returns the folder of the programs.
fn build(asan: bool, target: Option<&str>) -> Result<PathBuf> {
    packages::ensure(packages::FUZZ)?;
    let manifest = folder().join("Cargo.toml");
    let output = paths::target().join(if asan { "fuzz-asan" } else { "fuzz" });
    let mut command = if asan {
        // A nightly one comes by its name, whatever toolchain we were started with.
        let mut command = process::tied("rustup");
        command.args(["run", "nightly", "cargo"]);
        command.env_remove("CARGO").env_remove("RUSTUP_TOOLCHAIN");
        command
    } else {
        cargo::command(&[])
    };
    command
        .args(["build", "--quiet", "--target", cargo::TARGET])
        .arg("--manifest-path")
        .arg(&manifest)
        .arg("--target-dir")
        .arg(&output);
    match target {
        Some(target) => command.args(["--bin", target]),
        None => command.arg("--bins"),
    };
    let mut flags = COVERAGE.to_owned();
    if asan {
        flags = format!("{flags} {ADDRESS_SANITIZER}");
    }
    // With a target named, the flags are not for what the build itself runs.
    command.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", flags);
    process::run(&mut command).context("build the fuzz targets")?;
    Ok(output.join(cargo::TARGET).join("debug"))
}

/// One target to be run.
struct Job<'a> {
    program: PathBuf,
    target: &'a str,
    timeout: u32,
}

impl<'a> Job<'a> {
    fn new(programs: &Path, target: &'a str, timeout: u32) -> Self {
        Self {
            program: programs.join(target),
            target,
            timeout,
        }
    }

    /// The inputs that everybody has.
    fn committed(&self) -> PathBuf {
        folder().join("corpus").join(self.target)
    }

    /// The inputs that were found on this machine.
    fn found(&self) -> PathBuf {
        paths::target()
            .join("fuzz")
            .join("corpus")
            .join(self.target)
    }

    /// Where an input is written that fails.
    fn artifacts(&self) -> PathBuf {
        paths::target().join("fuzz").join("artifacts")
    }

    fn command(&self, options: impl IntoIterator<Item = String>) -> Command {
        let mut command = process::tied(&self.program);
        command
            .args(options)
            .arg(format!("-timeout={}", self.timeout))
            .arg(format!("-rss_limit_mb={MEMORY}"));
        let mut prefix = OsString::from("-artifact_prefix=");
        prefix.push(self.artifacts());
        prefix.push(format!("/{}-", self.target));
        command.arg(prefix).current_dir(folder());
        command
    }

    /// Fuzzes from all inputs that are known.
    fn fuzz(&self, seconds: u64) -> Result<Command> {
        self.make_folders()?;
        let mut command = self.command([
            format!("-max_total_time={seconds}"),
            "-print_final_stats=1".to_owned(),
        ]);
        command.arg(self.found()).arg(self.committed());
        Ok(command)
    }

    fn make_folders(&self) -> Result<()> {
        for folder in [self.found(), self.artifacts(), self.committed()] {
            let made = fs::create_dir_all(&folder);
            made.with_context(|| format!("make {}", folder.display()))?;
        }
        Ok(())
    }

    /// Replaces the committed corpus by the smallest inputs that reach what all known ones do.
    fn minimize(&self) -> Result<()> {
        self.make_folders()?;
        let least = tempfile::tempdir().context("make a folder for inputs")?;
        // What is reached counts, and not how often: else there are thousands.
        let mut command = self.command([
            "-set_cover_merge=1".to_owned(),
            "-use_counters=0".to_owned(),
        ]);
        command
            .arg(least.path())
            .arg(self.found())
            .arg(self.committed());
        process::run(&mut command)?;
        let committed = self.committed();
        fs::remove_dir_all(&committed).context("empty the committed corpus")?;
        fs::create_dir_all(&committed).context("make the committed corpus anew")?;
        let entries = fs::read_dir(least.path()).context("read the least inputs")?;
        for entry in entries {
            let entry = entry.context("read the least inputs")?;
            // Their names are the hashes of what is in them.
            let name = entry.file_name();
            fs::copy(entry.path(), committed.join(name)).context("write the committed corpus")?;
        }
        Ok(())
    }

    fn explain<T>(&self, result: Result<T>) -> Result<T> {
        let target = self.target;
        result.with_context(|| {
            let artifacts = self.artifacts();
            format!(
                "fuzz target `{target}` found something; run the input that it wrote to {}/{target}-… \
                 again by: cargo xtask fuzz {target} --input FILE",
                artifacts.display()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_a_program_and_a_corpus() {
        let manifest = fs::read_to_string(folder().join("Cargo.toml")).unwrap();
        for target in targets().unwrap() {
            assert!(
                manifest.contains(&format!("name = \"{target}\"")),
                "{target} is not in fuzz/Cargo.toml"
            );
            let corpus = folder().join("corpus").join(&target);
            let inputs = fs::read_dir(&corpus).unwrap().count();
            assert!(inputs > 0, "{} is empty", corpus.display());
        }
    }

    #[test]
    fn the_committed_corpora_are_small() {
        let mut bytes = 0;
        for target in targets().unwrap() {
            for entry in fs::read_dir(folder().join("corpus").join(target)).unwrap() {
                bytes += entry.unwrap().metadata().unwrap().len();
            }
        }
        assert!(bytes < 1 << 20, "{bytes} bytes");
    }
}
