//! Dealing tests out to the places that run them: whichever is free takes the next one.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::path::PathBuf;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

use crate::{nested, test};

/// How many nested machines may fail, one after the other, in one place.
const MACHINES: u32 = 3;

/// What a place says when it waits for a test; the exit status of the one before follows.
pub(super) const NEXT: &str = "xtask-next";
/// What the program of a test says when that has passed.
const PASSED: &str = "test result: ok. 1 passed;";
/// What it says of one that takes long.
const RUNNING: &str = " has been running for over ";

/// A test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Test {
    pub(super) program: PathBuf,
    /// Its name in there.
    pub(super) name: String,
}

impl Test {
    /// Its name behind that of its program's source file.
    fn full_name(&self) -> String {
        format!("{}::{}", test::name_of(&self.program), self.name)
    }
}

/// Tests to be run, and what has come of them.
pub(super) struct Dealer {
    count: usize,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    left: VecDeque<Test>,
    ended: usize,
    /// The names of tests that failed, and what went wrong besides.
    problems: Vec<String>,
}

/// How a place ended.
struct End {
    status: i32,
    /// The test that had not ended.
    unfinished: Option<Test>,
}

impl Dealer {
    pub(super) fn new(tests: Vec<Test>) -> Self {
        Self {
            count: tests.len(),
            table: Mutex::new(Table {
                left: tests.into(),
                ..Table::default()
            }),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the tests in so many places at a time. `start` gives a command that asks for tests on
    /// its output, reads them from its input, and ends with it.
    ///
    /// # Errors
    ///
    /// When a test fails, or a place.
    pub(super) fn run(self, places: usize, start: &(dyn Fn() -> Command + Sync)) -> Result<()> {
        let places = places.min(self.count);
        thread::scope(|scope| {
            for number in 1..=places {
                let dealer = &self;
                scope.spawn(move || {
                    if let Err(error) = dealer.run_place(number, start) {
                        dealer.table().problems.push(format!("{error:#}"));
                    }
                });
            }
        });
        let table = self.table();
        if table.ended < self.count && table.problems.is_empty() {
            bail!("{} of {} tests were not run", table.left.len(), self.count);
        }
        match table.problems.as_slice() {
            [] => Ok(()),
            problems => {
                let ended = format!("{} of {} tests ended", table.ended, self.count);
                Err(anyhow!("{ended}; failed: {}", problems.join(", ")))
            }
        }
    }

    /// Runs tests in one place until there is none left. Where a nested machine fails, and no test
    /// does, another one goes on with the test that it was at.
    fn run_place(&self, number: usize, start: &dyn Fn() -> Command) -> Result<()> {
        for attempt in 1..=MACHINES {
            if self.table().left.is_empty() {
                return Ok(());
            }
            let End { status, unfinished } = self.run_once(number, start())?;
            let during = match &unfinished {
                Some(test) => format!("while it ran {}", test.full_name()),
                None => "between two tests".to_owned(),
            };
            if status != i32::from(nested::FAILED) {
                if status == 0 && unfinished.is_none() {
                    return Ok(());
                }
                bail!("nested machine {number} ended with exit status {status} {during}");
            }
            eprintln!("xtask: nested machine {number} failed {during}");
            if attempt < MACHINES {
                let mut table = self.table();
                unfinished
                    .into_iter()
                    .for_each(|test| table.left.push_front(test));
            }
        }
        bail!("{MACHINES} nested machines failed one after the other")
    }

    /// Starts one machine, and gives it tests as long as it asks for them.
    fn run_once(&self, number: usize, mut command: Command) -> Result<End> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start a place for tests")?;
        let (errors, output) = (child.stderr.take(), child.stdout.take());
        let mut hand = Hand {
            dealer: self,
            number,
            input: child.stdin.take(),
            test: None,
            said: Vec::new(),
        };
        thread::scope(|scope| {
            scope.spawn(move || lines(errors, |line| println!("[{number}] {line}")));
            lines(output, |line| hand.take(line));
        });
        hand.show();
        let status = child.wait().context("wait for a place for tests")?;
        Ok(End {
            status: status.code().unwrap_or(1),
            unfinished: hand.test.map(|(test, _)| test),
        })
    }
}

/// One machine at its tests.
struct Hand<'a> {
    dealer: &'a Dealer,
    number: usize,
    input: Option<ChildStdin>,
    /// The test that runs, and since when.
    test: Option<(Test, Instant)>,
    /// What was said of it: of one that passes, nobody needs to know that.
    said: Vec<String>,
}

impl Hand<'_> {
    /// Takes a line of the machine's output.
    fn take(&mut self, line: &str) {
        if let Some(status) = line.strip_prefix(NEXT) {
            self.end(status.trim() == "0");
            self.next();
        } else if line.contains(RUNNING) {
            println!("[{}] {line}", self.number);
        } else {
            self.said.push(line.to_owned());
        }
    }

    fn end(&mut self, is_good: bool) {
        let Some((test, since)) = self.test.take() else {
            return;
        };
        let is_good = is_good && self.said.iter().any(|line| line.starts_with(PASSED));
        let mut table = self.dealer.table();
        table.ended += 1;
        let result = if is_good { "ok" } else { "FAILED" };
        println!(
            "[{}] {} ... {result}, {:.1} s ({} of {})",
            self.number,
            test.full_name(),
            since.elapsed().as_secs_f64(),
            table.ended,
            self.dealer.count
        );
        if !is_good {
            table.problems.push(test.full_name());
            drop(table);
            self.show();
        }
        self.said.clear();
    }

    /// Hands out the next test, or closes the machine's input where there is none.
    fn next(&mut self) {
        let Some(test) = self.dealer.table().left.pop_front() else {
            self.input = None;
            return;
        };
        let line = format!("{} {}\n", test.name, test.program.display());
        self.test = Some((test, Instant::now()));
        if let Some(input) = &mut self.input {
            // A machine that is gone shows by the end of its output.
            let _ = input.write_all(line.as_bytes());
        }
    }

    fn show(&mut self) {
        for line in self.said.drain(..) {
            println!("[{}] {line}", self.number);
        }
    }
}

/// Calls `take` with each line of a stream, until its end.
fn lines(from: Option<impl Read>, mut take: impl FnMut(&str)) {
    let Some(from) = from else { return };
    let mut reader = BufReader::new(from);
    let mut bytes = Vec::new();
    while matches!(reader.read_until(b'\n', &mut bytes), Ok(1..)) {
        take(String::from_utf8_lossy(&bytes).trim_end());
        bytes.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::super::SCRIPT;
    use super::*;

    /// A program of tests whose names say what they do: `pass`, `fail`, `none`, and `die-N`, of
    /// which the first N kill the place they run in.
    const PROGRAM: &str = r#"#!/bin/sh
        cd "${0%/*}"
        echo $3 in $KILN $1 $2 >>log
        read line && echo input >>log
        case $3 in
        pass*) echo 'test result: ok. 1 passed; 0 failed' ;;
        none*) echo 'test result: ok. 0 passed; 0 failed' ;;
        fail*) echo 'test result: FAILED'; exit 101 ;;
        die*) echo x >>$3
            [ $(wc -l <$3) -gt ${3#die-} ] || { kill -KILL $PPID; exit; }
            echo 'test result: ok. 1 passed; 0 failed' ;;
        esac
    "#;

    /// Runs tests, and returns what came of it, what they were called with, in order, and how many
    /// places there were.
    fn run(names: &[&str], places: usize) -> (Result<(), String>, Vec<String>, u32) {
        let folder = tempfile::Builder::new().prefix("a b").tempdir();
        let folder = folder.unwrap();
        let program = folder.path().join("tests-0123");
        // Written by a process of its own: what other tests start would have our file open, and one
        // that is open for writing cannot be run.
        let write = r#"printf %s "$1" >"$2"; chmod +x "$2""#;
        let mut writer = Command::new("sh");
        writer.args(["-c", write, "sh", PROGRAM]).arg(&program);
        assert!(writer.status().unwrap().success());
        let tests = names.iter().map(|name| Test {
            program: program.clone(),
            name: (*name).to_owned(),
        });
        let started = AtomicU32::new(0);
        let dealer = Dealer::new(tests.collect());
        let result = dealer.run(places, &|| {
            started.fetch_add(1, Ordering::Relaxed);
            let mut command = Command::new("sh");
            // A place that is killed says what a nested machine does.
            command.args(["-c", r#"sh -c "$1" sh kiln; [ $? = 0 ] || exit 125"#, "sh"]);
            command.arg(SCRIPT);
            command
        });
        let log = fs::read_to_string(folder.path().join("log"));
        let log = log.unwrap_or_default().lines().map(str::to_owned).collect();
        let result = result.map_err(|error| format!("{error:#}"));
        (result, log, started.into_inner())
    }

    #[test]
    fn each_test_is_run_once_in_order_and_without_our_input() {
        let (result, log, places) = run(&["pass-1", "pass-2", "pass-3"], 1);
        assert_eq!(result, Ok(()));
        let words = "in kiln --include-ignored --exact";
        assert_eq!(log, ["1", "2", "3"].map(|n| format!("pass-{n} {words}")));
        assert_eq!(places, 1);
    }

    #[test]
    fn two_places_share_the_tests() {
        let names: Vec<String> = (0..20).map(|n| format!("pass-{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (result, log, places) = run(&names, 2);
        assert_eq!(result, Ok(()));
        assert_eq!(places, 2);
        let mut ran: Vec<_> = log.iter().map(|line| line.split(' ').next()).collect();
        let mut all: Vec<_> = names.iter().map(|name| Some(*name)).collect();
        ran.sort_unstable();
        all.sort_unstable();
        assert_eq!(ran, all);
    }

    #[test]
    fn tests_that_fail_or_do_not_run_are_named_and_the_others_run() {
        let (result, log, _) = run(&["fail", "pass", "none"], 1);
        let said = "3 of 3 tests ended; failed: tests::fail, tests::none";
        assert_eq!(result, Err(said.to_owned()));
        assert_eq!(log.len(), 3);
    }

    #[test]
    fn a_test_whose_place_fails_goes_on_in_another() {
        let (result, log, places) = run(&["pass-1", "die-2", "pass-2"], 1);
        assert_eq!(result, Ok(()), "{log:?}");
        assert_eq!((log.len(), places), (5, 3), "{log:?}");
    }

    #[test]
    fn a_test_that_always_ends_its_place_does_not_go_on_for_ever() {
        let (result, log, places) = run(&["die-9"], 2);
        let error = result.unwrap_err();
        assert!(error.contains("3 nested machines failed"), "{error}");
        assert_eq!((log.len(), places), (3, 3), "{log:?}");
    }
}
