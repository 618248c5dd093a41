//! `kiln run --config`: the file alone, the file with options over it, and files to be refused.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use kiln_tests::program::{Outcome, Program, have_kvm};
use kiln_tests::{elf, guests};

const LONG: Duration = Duration::from_secs(60);

/// A folder with a kernel that prints `hello`, and a file that describes a machine.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        files.write("kernel", &elf::image(guests::hello()));
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: &[u8]) -> String {
        fs::write(self.path(name), content).unwrap();
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Runs the program with `vm.toml` of this content, and these options.
    fn run(&self, toml: &str, options: &[&str]) -> Outcome {
        let config = self.write("vm.toml", toml.as_bytes());
        run(&[&["--config", &config], options].concat())
    }
}

fn run(options: &[&str]) -> Outcome {
    let args = [&["run"], options].concat();
    let program = Program::start(env!("CARGO_BIN_EXE_kiln"), &args).unwrap();
    program.wait(LONG).unwrap()
}

/// Asserts that the program refused in one line that has all of `words`.
fn assert_refused(outcome: &Outcome, words: &[&str]) {
    let errors = outcome.errors.trim_end();
    assert_eq!(outcome.code, Some(1), "{errors}");
    assert!(errors.starts_with("kiln: "), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    for word in words {
        assert!(errors.contains(word), "no `{word}` in: {errors}");
    }
}

/// Asserts that the guest powered off after this on the standard output.
fn assert_printed(outcome: &Outcome, output: &str) {
    assert_eq!(outcome.code, Some(0), "{}", outcome.errors);
    assert_eq!(outcome.output, output);
}

#[test]
fn a_machine_is_run_from_a_file_alone() {
    if !have_kvm() {
        return;
    }
    let files = Files::new();
    let toml = "kernel = \"kernel\"\nmemory = 16\n";
    assert_printed(&files.run(toml, &[]), "hello\n");
    let json = files.write("vm.json", b"{\"kernel\": \"kernel\", \"memory\": \"16M\"}");
    assert_printed(&run(&["--config", &json]), "hello\n");
}

#[test]
fn paths_are_taken_from_the_folder_of_the_file() {
    if !have_kvm() {
        return;
    }
    let files = Files::new();
    files.write("root.img", &[0; 1024]);
    let toml = "kernel = \"kernel\"\nmemory = \"16M\"\nserial = { file = \"log\" }\n\
                [[disks]]\npath = \"root.img\"\n";
    assert_printed(&files.run(toml, &[]), "");
    assert_eq!(fs::read(files.path("log")).unwrap(), b"hello\n");
}

#[test]
fn options_go_before_what_the_file_says() {
    if !have_kvm() {
        return;
    }
    let files = Files::new();
    let kernel = files.path("kernel").to_str().unwrap().to_owned();
    let disk = files.write("good.img", &[0; 1024]);
    // Everything in it would be refused.
    let toml = "kernel = \"absent\"\nvcpus = 0\nmemory = \"1000001B\"\nboot_protocol = \"pvh\"\n\
                serial = { file = \"/nonexistent/log\" }\n[[disks]]\npath = \"absent.img\"\n";
    let options = [
        ("--kernel", kernel.as_str()),
        ("--cpus", "1"),
        ("--memory", "16M"),
        ("--boot-protocol", "auto"),
        ("--serial", "stdio"),
        ("--disk", disk.as_str()),
    ];
    let all: Vec<&str> = options.iter().flat_map(|(a, b)| [*a, *b]).collect();
    assert_printed(&files.run(toml, &all), "hello\n");
    // And with any one of them missing it is.
    for left_out in 0..options.len() {
        let mut fewer = all.clone();
        fewer.drain(2 * left_out..2 * left_out + 2);
        assert_refused(&files.run(toml, &fewer), &[]);
    }
}

#[test]
fn a_kernel_must_come_from_one_of_the_two() {
    let files = Files::new();
    assert_refused(
        &files.run("vcpus = 1", &[]),
        &["vm.toml", "kernel", "--kernel FILE"],
    );
    if have_kvm() {
        let kernel = files.path("kernel").to_str().unwrap().to_owned();
        let outcome = files.run("memory = 16", &["--kernel", &kernel]);
        assert_printed(&outcome, "hello\n");
    }
}

#[test]
fn a_bad_file_is_refused_by_name_line_and_key() {
    let files = Files::new();
    let refused = |toml: &str, words: &[&str]| assert_refused(&files.run(toml, &[]), words);
    refused(
        "kernel = \"kernel\"\ncpus = 2",
        &["vm.toml`, line 2", "`cpus`", "`vcpus`"],
    );
    refused("vcpus = 1\nkernel =", &["vm.toml`, line 2"]);
    refused("memory = \"lots\"", &["line 1", "`memory`", "512M"]);
    assert_refused(
        &run(&["--config", "/nonexistent/vm.toml"]),
        &["/nonexistent/vm.toml", "No such file"],
    );
    let yaml = files.write("vm.yaml", b"kernel: kernel");
    assert_refused(&run(&["--config", &yaml]), &["vm.yaml", ".toml or .json"]);
    let folder = files.path("").to_str().unwrap().to_owned();
    assert_refused(&run(&["--config", &folder]), &[".toml or .json"]);
}

/// What is wrong is said in the same words, whichever way it was given.
#[test]
fn a_file_and_the_command_line_are_refused_in_the_same_words() {
    if !have_kvm() {
        return;
    }
    let files = Files::new();
    let kernel = files.path("kernel").to_str().unwrap().to_owned();
    let odd = files.write("odd.img", &[0; 700]);
    let long = "x".repeat(3000);
    let ways: [(String, [&str; 2]); 7] = [
        ("vcpus = 0".into(), ["--cpus", "0"]),
        ("memory = \"1000001B\"".into(), ["--memory", "1000001B"]),
        (format!("cmdline = \"{long}\""), ["--cmdline", &long]),
        (
            "initrd = \"/nonexistent\"".into(),
            ["--initrd", "/nonexistent"],
        ),
        (
            "serial = { file = \"/nonexistent/log\" }".into(),
            ["--serial", "file=/nonexistent/log"],
        ),
        ("disks = [{ path = \"odd.img\" }]".into(), ["--disk", &odd]),
        (
            "nets = [{ tap = \"kilnabsent0\" }]".into(),
            ["--net", "tap=kilnabsent0"],
        ),
    ];
    for (toml, option) in ways {
        let from_file = files.run(&format!("kernel = \"kernel\"\n{toml}"), &[]);
        let from_option = run(&[&["--kernel", &kernel], &option[..]].concat());
        assert_refused(&from_file, &[]);
        assert_eq!(from_file.errors, from_option.errors, "{toml}");
    }
}
