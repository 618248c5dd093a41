//! Running the integration tests where real guests run: on this machine, or, where that takes a
//! nested machine, in two of them. A nested machine emulates one processor on one of this
//! machine's, so two take half the time. Whichever is free takes the next test.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::host::{HostKvm, host_kvm};
use crate::{nested, place, process};

mod dealing;

use dealing::{Dealer, Test};

/// How long one place may run tests.
const LIMIT: Duration = Duration::from_secs(40 * 60);
/// The memory of a nested machine, in mebibytes: what guests touch, and the files that they and
/// the tests write.
const MEMORY: u32 = 5000;

/// Runs the tests that it reads, each a line with a name and then the path of its program, with
/// `kiln` as its argument. Asks for each one by [`dealing::NEXT`], with the exit status of the one
/// before.
const SCRIPT: &str = r#"
    status=
    while echo "xtask-next $status" && read -r name program; do
        KILN=$1 "$program" --include-ignored --exact "$name" </dev/null
        status=$?
    done"#;

/// The tests that take about a minute or more in a nested machine, by a part of their names: they
/// begin first, so that no machine is left alone with one at the end. A test that is missing here
/// costs that time, and nothing else.
const LONG: [&str; 12] = [
    "a_bzimage_is_unpacked_once_and_starts_where_it_was_linked_for",
    "a_network_carries_pings_and_streams_both_ways",
    "modules_are_removed_and_loaded_under_load",
    "each_end_of_a_linux_guest_is_told_apart",
    "four_guests_in_one_process_end_each_in_its_own_way",
    "two_hundred_streams_carry_data_both_ways",
    "without_message_interrupts_devices_use_the_lines",
    "any_machine_is_stopped_soon_whatever_it_is_at",
    "what_fio_writes_is_what_it_reads",
    "each_queue_has_a_message_interrupt_of_its_own",
    "a_guest_gives_room_back_and_chooses_when_writes_last",
    "forty_devices_all_work",
];

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
        tests.extend(names.into_iter().map(|name| Test {
            program: program.clone(),
            name,
        }));
    }
    if tests.is_empty() {
        println!("xtask: no test has such a name");
        return Ok(());
    }
    let words = ["sh", "-c", SCRIPT, "sh"].map(OsString::from);
    let script = [words.as_slice(), &[kiln.into()]].concat();
    tests.sort_by_key(|test| rank(&test.name));
    let dealer = Dealer::new(tests);
    if host_kvm() == HostKvm::Hardware {
        let options = nested::Options {
            limit: Some(LIMIT),
            ..nested::Options::default()
        };
        return dealer.run(1, &|| place::here(&options, &script));
    }
    eprintln!("xtask: this machine's KVM runs no stock kernels: testing in two nested machines");
    let xtask = std::env::current_exe().context("find this program")?;
    dealer.run(2, &|| {
        let mut command = process::tied(&xtask);
        command
            .args(["nested", "--memory", &format!("{MEMORY}M")])
            .args(["--timeout", &LIMIT.as_secs().to_string(), "--"])
            .args(&script);
        command
    })
}

/// When a test begins: those of [`LONG`] first, in that order, and the others as they are listed.
fn rank(name: &str) -> usize {
    let long = LONG.iter().position(|part| name.contains(part));
    long.unwrap_or(LONG.len())
}

/// The names of tests in what `--list` prints.
fn names(list: &str) -> Vec<String> {
    list.lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_owned)
        .collect()
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
    fn long_tests_begin_first() {
        let mut names = ["a", "b", LONG[0], "c"];
        names.sort_by_key(|name| rank(name));
        assert_eq!(names, [LONG[0], "a", "b", "c"]);
    }
}
