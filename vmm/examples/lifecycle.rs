//! Several machines in one process, each from its start to a different end.
//!
//! `cargo run -p kiln-vmm --example lifecycle`

mod guests;

use std::error::Error;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use guests::Guest;
use kiln_vmm::{Captured, Console, ConsoleInput, ConsoleOutput, Host, VmHandle};

/// Starts a guest. The host's KVM is opened and probed once for all of them.
fn start(host: &Arc<Host>, guest: Guest) -> Result<(VmHandle, Captured), Box<dyn Error>> {
    let (output, printed) = ConsoleOutput::capture(4096);
    let vm = guest
        .machine()?
        .host(Arc::clone(host))
        .serial(Console::new(ConsoleInput::null(), output))
        .build()?;
    Ok((vm.start()?, printed))
}

fn main() -> Result<(), Box<dyn Error>> {
    let host = Arc::new(Host::open()?);
    let polite = Guest::new()
        .print("waiting for the power button\n")
        .wait_for_power_button()
        .print("powering off\n")
        .power_off();
    let (polite, printed) = start(&host, polite)?;
    let (stubborn, _) = start(&host, Guest::new().spin())?;
    let (rebooting, _) = start(&host, Guest::new().reset())?;
    // No interrupt table to answer an undefined instruction: a triple fault.
    let (crashing, _) = start(&host, Guest::new().undefined_instruction())?;

    // A paused guest keeps its state, and does not run.
    polite.pause()?;
    println!("polite is {:?}", polite.state());
    let exits = polite.exit_counts()[0].total();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(polite.exit_counts()[0].total(), exits);
    polite.resume()?;
    println!("polite is {:?}", polite.state());

    // Pressing the button asks the guest; this one obeys.
    polite.power_button();
    println!("polite: {}", polite.wait()?);
    for line in printed.text().lines() {
        println!("polite printed: {line}");
    }

    // A guest that would never end is stopped, whatever it does. A handle can be cloned and sent:
    // here one thread waits while another one stops.
    let waiter = stubborn.clone();
    let waiting = thread::spawn(move || waiter.wait());
    assert_eq!(stubborn.wait_timeout(Duration::from_millis(20))?, None);
    stubborn.stop();
    let exit = waiting
        .join()
        .map_err(|_| "the waiting thread panicked")??;
    println!("stubborn: {exit}");

    println!("rebooting: {}", rebooting.wait()?);
    println!("crashing: {}", crashing.wait()?);

    // Dropping the last handle of a machine stops it and joins its threads.
    let (dropped, _) = start(&host, Guest::new().spin())?;
    drop(dropped);
    println!("dropped: nothing of it is left");
    Ok(())
}
