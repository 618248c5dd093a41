//! `kiln run` on a terminal: raw mode while the guest has it, and what was there before after
//! every end.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::path::Path;
use std::time::Duration;

use kiln_tests::program::have_kvm;
use kiln_tests::terminal::Terminal;
use kiln_tests::{elf, guests};

const LONG: Duration = Duration::from_secs(60);

/// `kiln run` with this guest on a terminal.
fn run(code: &[u8]) -> Terminal {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    std::fs::write(&kernel, elf::image(code)).unwrap();
    let args = [
        "run",
        "--memory",
        "16M",
        "--kernel",
        kernel.to_str().unwrap(),
    ];
    let terminal = Terminal::start(Path::new(env!("CARGO_BIN_EXE_kiln")), &args, LONG);
    // The kernel has been opened by then, or there is an error to see.
    terminal.wait_until("started", || !terminal.text().is_empty());
    terminal
}

#[test]
fn what_is_typed_reaches_the_guest_as_it_is() {
    if !have_kvm() {
        return;
    }
    let mut terminal = run(guests::echo());
    terminal.wait_until_raw();
    // Ctrl-C is the guest's, two Ctrl-A are one, and the newline ends this guest.
    terminal.type_in(b"ab\x03\x01\x01c\n");
    let screen = terminal.assert_ends(0);
    assert!(screen.contains("Ctrl-A x stops"), "{screen}");
    assert!(screen.contains("ab\x03\x01c\r\n"), "{screen:?}");
}

#[test]
fn the_escape_sequence_stops_a_guest_that_does_not_listen() {
    if !have_kvm() {
        return;
    }
    let mut terminal = run(guests::busy());
    terminal.wait_until_raw();
    terminal.type_in(b"\x01x");
    terminal.assert_ends(7);
}

#[test]
fn the_escape_sequence_presses_the_power_button() {
    if !have_kvm() {
        return;
    }
    let mut terminal = run(guests::wait_for_power_button());
    terminal.wait_until_raw();
    terminal.wait_until("ready", || terminal.text().ends_with('w'));
    terminal.type_in(b"\x01p");
    terminal.assert_ends(0);
}

#[test]
fn the_terminal_is_restored_after_a_crash_and_after_signals() {
    if !have_kvm() {
        return;
    }
    run(guests::triple_fault()).assert_ends(5);
    for signal in ["TERM", "INT", "HUP"] {
        let terminal = run(guests::busy());
        terminal.wait_until_raw();
        terminal.signal(signal);
        terminal.wait_until("told", || terminal.text().contains("once more"));
        terminal.signal(signal);
        terminal.assert_ends(7);
    }
}
