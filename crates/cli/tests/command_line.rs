//! The `kiln` program with guests of a few bytes, and with all the input that it has to refuse.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_tests::program::{Outcome, Program, have_kvm};
use kiln_tests::{elf, guests};

const LONG: Duration = Duration::from_secs(60);

fn start(args: &[&str]) -> Program {
    Program::start(env!("CARGO_BIN_EXE_kiln"), args).unwrap()
}

fn kiln(args: &[&str]) -> Outcome {
    start(args).wait(LONG).unwrap()
}

/// A folder with files to give to the program.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, content: &[u8]) -> String {
        fs::write(self.path(name), content).unwrap();
        self.path(name).to_str().unwrap().to_owned()
    }

    fn kernel(&self, code: &[u8]) -> String {
        self.file("kernel", &elf::image(code))
    }
}

/// Asserts that the program refused in one line that has all of `words`, with this exit code.
fn assert_refused(outcome: &Outcome, code: i32, words: &[&str]) {
    let errors = outcome.errors.trim_end();
    assert_eq!(outcome.code, Some(code), "{errors}");
    assert!(errors.starts_with("kiln: "), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    assert_eq!(outcome.output, "", "{errors}");
    for word in words {
        assert!(errors.contains(word), "no `{word}` in: {errors}");
    }
}

#[test]
fn each_end_has_its_exit_code_and_its_message() {
    if !have_kvm() {
        return;
    }
    let ends: [(&[u8], i32, &str); 5] = [
        (guests::power_off(), 0, "kiln: the guest powered off"),
        (guests::acpi_reset(), 3, "kiln: the guest asked for a reset"),
        (
            guests::i8042_reset(),
            3,
            "kiln: the guest asked for a reset",
        ),
        (guests::panic(), 4, "kiln: the guest's kernel panicked"),
        (
            guests::triple_fault(),
            5,
            "kiln: the guest crashed: vCPU 0: triple fault",
        ),
    ];
    for (code, exit_code, message) in ends {
        let files = Files::new();
        let outcome = kiln(&["run", "--memory", "16M", "--kernel", &files.kernel(code)]);
        assert_eq!(outcome.code, Some(exit_code), "{}", outcome.errors);
        assert!(outcome.errors.starts_with(message), "{}", outcome.errors);
    }
}

#[test]
fn an_instruction_that_cannot_be_emulated_is_reported_with_its_bytes() {
    if !have_kvm() {
        return;
    }
    let files = Files::new();
    let kernel = files.kernel(guests::not_emulated());
    let outcome = kiln(&["run", "--memory", "16M", "--kernel", &kernel]);
    if kiln(&["check"]).code == Some(0) {
        assert_eq!(outcome.code, Some(0));
        return;
    }
    assert_eq!(outcome.code, Some(6), "{}", outcome.errors);
    for words in ["f3 0f b8 c0", "rip 0x100000", "only emulates"] {
        assert!(outcome.errors.contains(words), "{}", outcome.errors);
    }
}

#[test]
fn the_serial_port_is_the_standard_input_and_output() {
    if !have_kvm() {
        return;
    }
    let files = Files::new();
    let kernel = files.kernel(guests::echo());
    let mut program = start(&["run", "--memory", "16M", "--kernel", &kernel]);
    program.type_in("words for the guest\n").unwrap();
    let outcome = program.wait(LONG).unwrap();
    assert_eq!(outcome.code, Some(0), "{}", outcome.errors);
    assert_eq!(outcome.output, "words for the guest\n");
}

#[test]
fn the_serial_port_can_be_a_file_or_nothing() {
    if !have_kvm() {
        return;
    }
    let files = Files::new();
    let kernel = files.kernel(guests::hello());
    let log = files.file("log", b"what was there before");
    let serial = format!("file={log}");
    let args = ["run", "--memory", "16M", "--kernel", &kernel, "--serial"];
    let outcome = kiln(&[&args[..], &[&serial]].concat());
    assert_eq!((outcome.code, outcome.output.as_str()), (Some(0), ""));
    assert_eq!(fs::read(&log).unwrap(), b"hello\n");
    let outcome = kiln(&[&args[..], &["null"]].concat());
    assert_eq!((outcome.code, outcome.output.as_str()), (Some(0), ""));
    let outcome = kiln(&[&args[..], &["file=/nonexistent/log"]].concat());
    assert_refused(&outcome, 1, &["/nonexistent/log", "serial port"]);
}

#[test]
fn the_first_signal_presses_the_power_button_and_the_second_stops() {
    if !have_kvm() {
        return;
    }
    for signal in ["TERM", "INT", "HUP"] {
        let files = Files::new();
        let kernel = files.kernel(guests::wait_for_power_button());
        let program = start(&["run", "--memory", "16M", "--kernel", &kernel]);
        assert!(program.wait_for("w", LONG));
        program.signal(signal).unwrap();
        let outcome = program.wait(LONG).unwrap();
        assert_eq!(outcome.code, Some(0), "{}", outcome.errors);
        assert_eq!(outcome.output, "w1");

        let kernel = files.kernel(guests::busy());
        let program = start(&["run", "--memory", "16M", "--kernel", &kernel]);
        std::thread::sleep(Duration::from_millis(300));
        program.signal(signal).unwrap();
        assert!(program.wait_for("power button", LONG));
        program.signal(signal).unwrap();
        let outcome = program.wait(LONG).unwrap();
        assert_eq!(outcome.code, Some(7), "{}", outcome.errors);
        assert!(
            outcome.errors.ends_with("kiln: the machine was stopped\n"),
            "{}",
            outcome.errors
        );
    }
}

#[test]
fn a_bad_kernel_is_refused_by_name() {
    let files = Files::new();
    let good = elf::image(guests::power_off());
    let mut narrow = good.clone();
    narrow[4] = 1;
    let mut foreign = good.clone();
    foreign[18] = 183;
    let page = [0x90; 4096];
    let bad: [(&[u8], &str); 8] = [
        (b"", "empty"),
        (b"no kernel at all", "neither"),
        (&[0; 100_000], "neither"),
        (&narrow, "32-bit"),
        (&foreign, "x86"),
        (&good[..good.len() - 1], "truncated"),
        (
            &elf::with_segments(&[(0x10_0000, &page), (0x10_0800, &page)]),
            "overlap",
        ),
        (&elf::with_segments(&[(0x7000_0000, &page)]), "RAM"),
    ];
    for (content, word) in bad {
        let kernel = files.file("bad", content);
        let outcome = kiln(&["run", "--memory", "16M", "--kernel", &kernel]);
        if word == "RAM" && !have_kvm() {
            continue;
        }
        assert_refused(&outcome, 1, &["bad", word]);
    }
    for (path, word) in [("/nonexistent/vmlinuz", "No such file"), ("/", "not a")] {
        assert_refused(&kiln(&["run", "--kernel", path]), 1, &[path, word]);
    }
}

#[test]
fn a_kernel_cut_anywhere_is_refused() {
    let files = Files::new();
    let image = elf::image(&vec![0x90; 64 << 10]);
    for length in (0..image.len()).step_by(4096) {
        let kernel = files.file("cut", &image[..length]);
        let outcome = kiln(&["run", "--kernel", &kernel]);
        assert_refused(&outcome, 1, &["cut"]);
    }
}

#[test]
fn bad_sizes_and_counts_are_refused() {
    let files = Files::new();
    let kernel = files.kernel(guests::power_off());
    let run = |args: &[&str]| kiln(&[&["run", "--kernel", &kernel], args].concat());
    assert_refused(&run(&["--memory", "lots"]), 2, &["lots", "--memory"]);
    assert_refused(&run(&["--cpus", "-1"]), 2, &["-1"]);
    assert_refused(&run(&["--cpus", "two"]), 2, &["two", "--cpus"]);
    if !have_kvm() {
        return;
    }
    for (memory, word) in [
        ("0", "multiple of 4 KiB"),
        ("1000001B", "multiple of 4 KiB"),
    ] {
        assert_refused(&run(&["--memory", memory]), 1, &[word]);
    }
    assert_refused(&run(&["--memory", "99999999T"]), 2, &["99999999T"]);
    for memory in ["8000000T", "300T", "100T"] {
        assert_refused(&run(&["--memory", memory]), 1, &["memory"]);
    }
    assert_refused(&run(&["--cpus", "0"]), 1, &["0 vCPUs", "1 to"]);
    assert_refused(&run(&["--cpus", "100000"]), 1, &["100000 vCPUs", "1 to"]);
    let long = "x".repeat(3000);
    assert_refused(&run(&["--cmdline", &long]), 1, &["command line", "3000"]);
    assert_refused(
        &run(&["--initrd", "/nonexistent/initrd"]),
        1,
        &["/nonexistent/initrd"],
    );
    let initrd = files.file("initrd", &vec![0; 20 << 20]);
    assert_refused(
        &run(&["--memory", "16M", "--initrd", &initrd]),
        1,
        &["initrd", "RAM"],
    );
}

#[test]
fn a_bad_disk_is_refused_by_name() {
    let files = Files::new();
    let kernel = files.kernel(guests::power_off());
    let run = |disks: &[&str]| {
        let mut args = vec!["run", "--memory", "16M", "--kernel", &kernel];
        for disk in disks {
            args.extend(["--disk", disk]);
        }
        kiln(&args)
    };
    let folder = files.path("").to_str().unwrap().to_owned();
    let empty = files.file("empty.img", b"");
    let odd = files.file("odd.img", &[0; 700]);
    let good = files.file("good.img", &[0; 1024]);
    assert_refused(
        &run(&["/nonexistent.img"]),
        1,
        &["/nonexistent.img", "No such file"],
    );
    assert_refused(&run(&[&folder]), 1, &["directory"]);
    assert_refused(&run(&[&empty]), 1, &["empty.img", "0 bytes"]);
    assert_refused(&run(&[&odd]), 1, &["odd.img", "512"]);
    assert_refused(&run(&[&good, &good]), 1, &["good.img", "in use"]);
    assert_refused(&run(&[&format!("{good},rw")]), 2, &["`rw`", "readonly"]);
    let other_name = files.path("./good.img");
    assert_refused(
        &run(&[&good, other_name.to_str().unwrap()]),
        1,
        &["good.img"],
    );
    if have_kvm() {
        let read_only = format!("{good},readonly");
        let outcome = run(&[&read_only, &read_only]);
        assert_eq!(outcome.code, Some(0), "{}", outcome.errors);
    }
}

#[test]
fn a_bad_tap_is_refused_by_name() {
    let files = Files::new();
    let kernel = files.kernel(guests::power_off());
    let run = |net: &str| kiln(&["run", "--memory", "16M", "--kernel", &kernel, "--net", net]);
    assert_refused(
        &run("tap=kilnabsent0"),
        1,
        &["kilnabsent0", "ip tuntap add"],
    );
    assert_refused(&run("tap=lo"), 1, &["lo"]);
    assert_refused(
        &run("tap=a-name-that-is-too-long"),
        1,
        &["a-name-that-is-too-long"],
    );
    assert_refused(&run("tap=tap0,mac=nonsense"), 2, &["nonsense"]);
    assert_refused(&run("mac=06:00:00:00:00:01"), 2, &["tap="]);
    assert!(!Path::new("/sys/class/net/kilnabsent0").exists());
}

#[test]
fn an_unknown_option_is_refused_in_one_line() {
    assert_refused(
        &kiln(&["run", "--kernal", "x"]),
        2,
        &["--kernal", "--kernel"],
    );
    assert_refused(&kiln(&["run"]), 2, &["--kernel"]);
    assert_refused(&kiln(&["fly"]), 2, &["fly"]);
    assert_refused(&kiln(&[]), 2, &["kiln run --help"]);
}

#[test]
fn help_teaches_and_succeeds() {
    let outcome = kiln(&["run", "--help"]);
    assert_eq!((outcome.code, outcome.errors.as_str()), (Some(0), ""));
    for word in ["--kernel", "Exit codes:", "Ctrl-A x", "Example:"] {
        assert!(outcome.output.contains(word), "no {word}");
    }
    assert_eq!(kiln(&["--version"]).code, Some(0));
}

#[test]
fn check_tells_whether_linux_guests_run() {
    let outcome = kiln(&["check"]);
    assert_eq!(outcome.errors, "");
    let last = outcome.output.lines().last().unwrap_or_default();
    match outcome.code {
        Some(0) => assert_eq!(last, "This host runs Linux guests."),
        Some(1) => assert!(outcome.output.contains("no: "), "{}", outcome.output),
        other => panic!("{other:?}: {}", outcome.output),
    }
}
