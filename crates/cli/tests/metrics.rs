//! `kiln run --metrics`: the file in both formats, while the machine lives and at its end.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kiln_tests::program::{Outcome, Program, have_kvm};
use kiln_tests::prometheus::Exposition;
use kiln_tests::{elf, guests};
use kiln_vmm::{Metrics, VmState};

const LONG: Duration = Duration::from_secs(60);

/// A folder for metrics, and a kernel elsewhere.
struct Files {
    kernel: tempfile::TempDir,
    folder: tempfile::TempDir,
}

impl Files {
    fn new(guest: &[u8]) -> Self {
        let kernel = tempfile::tempdir().unwrap();
        fs::write(kernel.path().join("kernel"), elf::image(guest)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        Self { kernel, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What is in the folder.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
        let mut names: Vec<_> = entries.map(|entry| name(entry.unwrap())).collect();
        names.sort();
        names
    }

    fn start(&self, file: &str, options: &[&str]) -> Program {
        let kernel = self.kernel.path().join("kernel");
        let file = self.path(file);
        let mut args = vec!["run", "--memory", "16M", "--serial", "null", "--kernel"];
        args.extend([
            kernel.to_str().unwrap(),
            "--metrics",
            file.to_str().unwrap(),
        ]);
        args.extend(options);
        Program::start(env!("CARGO_BIN_EXE_kiln"), &args).unwrap()
    }

    fn run(&self, file: &str, options: &[&str]) -> Outcome {
        self.start(file, options).wait(LONG).unwrap()
    }

    fn json(&self, file: &str) -> Metrics {
        serde_json::from_str(&fs::read_to_string(self.path(file)).unwrap()).unwrap()
    }

    fn prometheus(&self, file: &str) -> Exposition {
        Exposition::parse(&fs::read_to_string(self.path(file)).unwrap()).unwrap()
    }
}

#[test]
fn the_last_metrics_are_in_the_file_in_the_format_of_its_name() {
    if !have_kvm() {
        return;
    }
    let files = Files::new(guests::hello());
    for (file, options) in [
        ("a.json", &[][..]),
        ("b.prom", &["--name", "web \"1\""]),
        ("c.txt", &["--metrics-format", "prometheus"]),
        (
            "d.prom",
            &["--metrics-format", "json", "--metrics-interval", "0"],
        ),
    ] {
        let outcome = files.run(file, options);
        assert_eq!(outcome.code, Some(0), "{}", outcome.errors);
    }
    // Nothing else is left beside them.
    assert_eq!(files.names(), ["a.json", "b.prom", "c.txt", "d.prom"]);
    for file in ["a.json", "d.prom"] {
        let metrics = files.json(file);
        assert_eq!((metrics.name, metrics.state), (None, VmState::Ended));
        assert_eq!(metrics.vcpus[0].exits.pio_out, 7);
        assert_eq!(metrics.serial.output_bytes, 6);
        assert!(metrics.uptime_ns > 0);
    }
    for (file, vm) in [("b.prom", Some(("vm", "web \"1\""))), ("c.txt", None)] {
        let metrics = files.prometheus(file);
        let get = |name, labels: &[_]| {
            let labels: Vec<_> = vm.iter().chain(labels).copied().collect();
            metrics.get(name, &labels)
        };
        let pio_out = [("vcpu", "0"), ("kind", "pio_out")];
        assert_eq!(get("kiln_vcpu_exits_total", &pio_out), Some(7.0));
        assert_eq!(get("kiln_vm_state", &[("state", "ended")]), Some(1.0));
        assert_eq!(get("kiln_vm_state", &[("state", "running")]), Some(0.0));
    }
}

#[test]
fn a_file_is_there_and_whole_at_every_moment_of_a_machines_life() {
    if !have_kvm() {
        return;
    }
    let files = Files::new(guests::exit_storm());
    let program = files.start("vm.prom", &["--metrics-interval", "0.01"]);
    let begun = Instant::now();
    while !files.path("vm.prom").exists() {
        assert!(begun.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(1));
    }
    let (mut seen, mut last) = (0, 0.0);
    while seen < 20 {
        assert!(begun.elapsed() < LONG);
        let metrics = files.prometheus("vm.prom");
        assert_eq!(
            metrics.get("kiln_vm_state", &[("state", "running")]),
            Some(1.0)
        );
        let uptime = metrics.get("kiln_vm_uptime_seconds", &[]).unwrap();
        assert!(uptime >= last);
        seen += u32::from(uptime > last);
        last = uptime;
    }
    for _ in 0..2 {
        program.signal("TERM").unwrap();
        assert!(program.wait_for("SIGTERM", LONG));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(program.wait(LONG).unwrap().code, Some(7));
    let metrics = files.prometheus("vm.prom");
    assert_eq!(
        metrics.get("kiln_vm_state", &[("state", "ended")]),
        Some(1.0)
    );
    assert_eq!(files.names(), ["vm.prom"]);
}

#[test]
fn a_machine_is_named_by_the_option_or_else_by_its_description() {
    if !have_kvm() {
        return;
    }
    let files = Files::new(guests::power_off());
    let config = files.kernel.path().join("vm.toml");
    fs::write(&config, "name = \"described\"\n").unwrap();
    let described = ["--config", config.to_str().unwrap()];
    for (options, name) in [
        (&described[..], "described"),
        (&[&described[..], &["--name", "given"]].concat(), "given"),
    ] {
        assert_eq!(files.run("vm.json", options).code, Some(0));
        assert_eq!(files.json("vm.json").name.as_deref(), Some(name));
    }
}

#[test]
fn a_file_behind_a_link_is_replaced_and_the_link_stays() {
    if !have_kvm() {
        return;
    }
    let files = Files::new(guests::power_off());
    fs::write(files.path("file.json"), "old").unwrap();
    symlink(files.path("file.json"), files.path("link.json")).unwrap();
    assert_eq!(files.run("link.json", &[]).code, Some(0));
    assert!(
        fs::symlink_metadata(files.path("link.json"))
            .unwrap()
            .is_symlink()
    );
    assert_eq!(files.json("file.json").state, VmState::Ended);
}

#[test]
fn a_file_that_cannot_be_written_later_does_not_end_the_guest() {
    if !have_kvm() {
        return;
    }
    let files = Files::new(guests::exit_storm());
    fs::create_dir(files.path("sub")).unwrap();
    let program = files.start("sub/vm.json", &["--metrics-interval", "0.01"]);
    let begun = Instant::now();
    while !files.path("sub/vm.json").exists() {
        assert!(begun.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(1));
    }
    // The folder goes away as a whole: one rename cannot meet a file that is being written.
    let gone = tempfile::tempdir().unwrap();
    fs::rename(files.path("sub"), gone.path().join("sub")).unwrap();
    assert!(program.wait_for("(told once)", LONG));
    std::thread::sleep(Duration::from_millis(100));
    for _ in 0..2 {
        program.signal("TERM").unwrap();
        assert!(program.wait_for("SIGTERM", LONG));
        std::thread::sleep(Duration::from_millis(50));
    }
    let outcome = program.wait(LONG).unwrap();
    assert_eq!(outcome.code, Some(7), "{}", outcome.errors);
    // Once while it ran, and once for the last ones.
    assert_eq!(
        outcome.errors.matches("write metrics to").count(),
        2,
        "{}",
        outcome.errors
    );
}

#[test]
fn what_cannot_be_written_is_refused_before_the_guest_starts() {
    let files = Files::new(guests::hello());
    fs::create_dir(files.path("folder")).unwrap();
    symlink("/dev/null", files.path("null")).unwrap();
    for (file, words) in [
        ("absent/vm.json", "No such file or directory"),
        ("folder", "not a regular file"),
        ("null", "not a regular file"),
        ("..", "not a regular file"),
    ] {
        let Outcome { code, errors, .. } = files.run(file, &[]);
        assert_eq!(code, Some(1), "{errors}");
        assert!(errors.starts_with("kiln: write metrics to `"), "{errors}");
        assert!(errors.contains(file) && errors.contains(words), "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
    assert_eq!(files.names(), ["folder", "null"]);
}

#[test]
fn options_of_metrics_that_make_no_sense_are_refused() {
    let files = Files::new(guests::hello());
    for (options, words) in [
        (["--metrics-interval=-1", "--memory=16M"], "0.01 to 86400"),
        (["--metrics-interval", "soon"], "not a number"),
        (["--metrics-interval", "0.001"], "0.01 to 86400"),
        (["--metrics-format", "xml"], "json, prometheus"),
        (["--name", "a\u{7}"], "1 to 64 characters"),
    ] {
        let Outcome { code, errors, .. } = files.run("vm.json", &options);
        assert!(matches!(code, Some(1 | 2)), "{errors}");
        assert!(errors.contains(words), "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
    assert!(files.names().is_empty());
    for options in [["--metrics-interval", "2"], ["--metrics-format", "json"]] {
        let args = [&["run", "--kernel", "k"], &options[..]].concat();
        let program = Program::start(env!("CARGO_BIN_EXE_kiln"), &args).unwrap();
        let Outcome { code, errors, .. } = program.wait(LONG).unwrap();
        assert_eq!(code, Some(2), "{errors}");
        assert!(errors.contains("--metrics <FILE>"), "{errors}");
    }
}
