//! Running the integration tests where real guests run: all in one place, or, where that is a
//! nested machine, shared out between two of them. A nested machine emulates one processor on one
//! of this machine's, so two take half the time.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::host::{HostKvm, host_kvm};
use crate::{nested, place, process};

/// How long the tests may take together.
const LIMIT: Duration = Duration::from_secs(40 * 60);
/// The memory of a nested machine, in mebibytes: what guests touch, and the files that they and
/// the tests write.
const MEMORY: u32 = 5000;

/// How many nested machines may fail before their tests do.
const MACHINES: u32 = 3;

/// Runs the tests it is given: the `kiln` program, then for each program of tests its path, a
/// number, and so many names of tests.
const SCRIPT: &str = r#"
    kiln=$1; shift
    status=0
    while [ $# -gt 0 ]; do
        program=$1; count=$2; shift 2
        names=
        while [ "$count" -gt 0 ]; do
            names="$names $1"; count=$((count - 1)); shift
        done
        echo "Running $program"
        KILN=$kiln "$program" --include-ignored --exact $names || status=1
    done
    exit $status"#;

/// A test, by its program and its name in there.
type Test = (PathBuf, String);

/// Runs the tests of these programs, with `kiln` as the program under test. Without a filter those
/// are left out that need not run over MMIO as well each time.
///
/// # Errors
///
/// When a test fails, or the place for them.
pub(crate) fn run(kiln: &Path, programs: &[PathBuf], filter: Option<&str>) -> Result<()> {
    let mut tests = Vec::new();
    for program in programs {
        let mut command = Command::new(program);
        command.args(["--list", "--format", "terse"]);
        command.arg(filter.unwrap_or("--skip=in_full"));
        let names = names(&process::output(&mut command)?);
        tests.extend(names.into_iter().map(|name| (program.clone(), name)));
    }
    if tests.is_empty() {
        println!("xtask: no test has such a name");
        return Ok(());
    }
    if host_kvm() == HostKvm::Hardware || tests.len() == 1 {
        let options = nested::Options {
            memory: MEMORY,
            limit: Some(LIMIT),
            input: false,
            ..nested::Options::default()
        };
        let status = place::run("testing with guests", &options, &command(kiln, &tests))?;
        ensure!(status == 0, "the tests ended with exit status {status}");
        return Ok(());
    }
    eprintln!("xtask: this machine's KVM runs no stock kernels: testing in two nested machines");
    let shares = shares(tests);
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let running: Vec<_> = (1..)
            .zip(&shares)
            .map(|(number, share)| scope.spawn(move || run_nested(number, kiln, share)))
            .collect();
        let ended = running.into_iter().map(|one| one.join());
        ended
            .map(|one| one.unwrap_or_else(|_| Err(anyhow!("its thread panicked"))))
            .collect()
    });
    results.into_iter().collect()
}

/// The names of tests in what `--list` prints.
fn names(list: &str) -> Vec<String> {
    list.lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_owned)
        .collect()
}

/// Deals tests out in turn: neighbours, which take a similar time, go to different machines.
fn shares(tests: Vec<Test>) -> [Vec<Test>; 2] {
    let mut shares = [Vec::new(), Vec::new()];
    for (index, test) in tests.into_iter().enumerate() {
        shares[index % 2].push(test);
    }
    shares
}

/// The command that runs these tests, of which those of a program stand together.
fn command(kiln: &Path, tests: &[Test]) -> Vec<OsString> {
    let mut words: Vec<OsString> = ["sh", "-c", SCRIPT, "sh"].map(Into::into).into();
    words.push(kiln.into());
    for group in tests.chunk_by(|one, next| one.0 == next.0) {
        words.extend(group.first().map(|(program, _)| program.into()));
        words.push(group.len().to_string().into());
        words.extend(group.iter().map(|(_, name)| name.into()));
    }
    words
}

/// Runs tests in a nested machine of their own, and says in front of each line which one it is.
/// Where the machine fails, and no test does, the tests that are left go on in another one.
fn run_nested(number: u32, kiln: &Path, tests: &[Test]) -> Result<()> {
    let mut left = tests.to_vec();
    let mut is_good = true;
    for _ in 0..MACHINES {
        let (status, ended) = run_machine(number, kiln, &left)?;
        is_good &= ended.iter().all(|(_, passed)| *passed);
        if status != i32::from(nested::FAILED) {
            ensure!(
                status == 0 && is_good,
                "the tests in nested machine {number} ended with exit status {status}"
            );
            return Ok(());
        }
        left.retain(|test| !ended.iter().any(|(one, _)| one == test));
        let count = left.len();
        eprintln!("xtask: nested machine {number} failed: {count} tests go on in another");
    }
    bail!("{MACHINES} nested machines failed one after the other")
}

/// Runs tests in one nested machine. Gives its exit status, and the tests that have ended, each
/// with whether it passed.
fn run_machine(number: u32, kiln: &Path, tests: &[Test]) -> Result<(i32, Vec<(Test, bool)>)> {
    let xtask = std::env::current_exe().context("find this program")?;
    let mut nested = process::tied(xtask);
    nested
        .args(["nested", "--memory", &format!("{MEMORY}M")])
        .args(["--timeout", &LIMIT.as_secs().to_string(), "--"])
        .args(command(kiln, tests))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = nested.spawn().context("start a nested machine")?;
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    let mut ended = Vec::new();
    let mut program = PathBuf::new();
    thread::scope(|scope| {
        scope.spawn(move || relay(number, errors, |_| {}));
        relay(number, output, |line| {
            if let Some(path) = line.strip_prefix("Running ") {
                program = PathBuf::from(path);
            } else if let Some((name, passed)) = result(line) {
                ended.push(((program.clone(), name.to_owned()), passed));
            }
        });
    });
    let status = child.wait().context("wait for a nested machine")?;
    Ok((status.code().unwrap_or(1), ended))
}

/// The test that a line says the result of, and whether it passed.
fn result(line: &str) -> Option<(&str, bool)> {
    let (name, result) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    match result {
        "ok" => Some((name, true)),
        "FAILED" => Some((name, false)),
        _ => None,
    }
}

fn relay(number: u32, from: Option<impl Read>, mut look: impl FnMut(&str)) {
    let Some(from) = from else { return };
    let mut reader = BufReader::new(from);
    let mut bytes = Vec::new();
    while matches!(reader.read_until(b'\n', &mut bytes), Ok(1..)) {
        let text = String::from_utf8_lossy(&bytes);
        let line = text.trim_end();
        println!("[{number}] {line}");
        look(line);
        bytes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_tests_only() {
        let list = "one: test\nmodule::two: test\nthree: benchmark\n\n2 tests, 1 benchmark\n";
        assert_eq!(names(list), ["one", "module::two"]);
    }

    #[test]
    fn results_are_read_from_the_lines_that_have_them() {
        let passed = result("test pci::it_works ... ok");
        assert_eq!(passed, Some(("pci::it_works", true)));
        let failed = result("test it_does_not ... FAILED");
        assert_eq!(failed, Some(("it_does_not", false)));
        assert_eq!(result("test result: ok. 1 passed; 0 failed"), None);
        assert_eq!(result("test something ..."), None);
    }

    #[test]
    fn tests_are_dealt_out_and_named_by_program() {
        let test = |program: &str, name: &str| (PathBuf::from(program), name.to_owned());
        let tests = vec![
            test("a", "1"),
            test("a", "2"),
            test("a", "3"),
            test("b", "4"),
            test("b", "5"),
        ];
        let [first, second] = shares(tests);
        let words = command(Path::new("kiln"), &first);
        assert_eq!(words[4..], ["kiln", "a", "2", "1", "3", "b", "1", "5"]);
        let words = command(Path::new("kiln"), &second);
        assert_eq!(words[4..], ["kiln", "a", "1", "2", "b", "1", "4"]);
    }

    #[test]
    fn the_script_runs_each_program_with_its_tests() {
        let tests = [
            (PathBuf::from("echo"), "x".to_owned()),
            (PathBuf::from("echo"), "y::z".to_owned()),
            (PathBuf::from("false"), "w".to_owned()),
        ];
        let words = command(Path::new("kiln"), &tests);
        let output = Command::new(&words[0]).args(&words[1..]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            text.contains("--include-ignored --exact x y::z\n"),
            "{text}"
        );
        assert_eq!(output.status.code(), Some(1));
    }
}
