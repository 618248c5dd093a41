//! How long `VmHandle::stop` takes, whatever the guest does, beside the floor: a thread in KVM_RUN
//! that is brought out by a signal and joined. `cargo bench -p kiln-tests --bench stop`.
//!
//! The stop of a machine whose console takes nothing waits 50 ms for it, and that of a machine
//! whose backend does not return 80 ms; the others wait for nothing.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kiln_tests::stubborn::STUBBORN;
use kiln_vmm::Host;
use kvm_ioctls::Kvm;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

const RUNS: usize = 30;

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// A vCPU without memory, whose thread runs it until it is told to end.
fn floor() -> Duration {
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    // Application processors wait in KVM_RUN for their start-up interrupt.
    let _first = vm.create_vcpu(0).unwrap();
    let mut vcpu = vm.create_vcpu(1).unwrap();
    let end = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&end);
    let thread = std::thread::spawn(move || {
        while !told.load(Ordering::SeqCst) {
            let _ = vcpu.run();
        }
    });
    std::thread::sleep(Duration::from_millis(5));
    let since = Instant::now();
    end.store(true, Ordering::SeqCst);
    thread.kill(SIGRTMIN()).unwrap();
    thread.join().unwrap();
    since.elapsed()
}

fn row(name: &str, mut times: Vec<Duration>, floor: Option<Duration>) -> Duration {
    times.sort_unstable();
    let middle = times[times.len() / 2];
    let (least, most) = (times[0], times[times.len() - 1]);
    let ratio = floor.map_or(String::new(), |floor| {
        format!("{:.2}", middle.as_secs_f64() / floor.as_secs_f64())
    });
    let figures = [least, middle, most].map(|time| format!("{:>9.1}", time.as_secs_f64() * 1e6));
    println!("{name:<22} {} {ratio:>8}", figures.join(" "));
    middle
}

fn main() {
    let host = match Host::open() {
        Ok(host) => Arc::new(host),
        Err(error) => return eprintln!("skipped: {error}"),
    };
    register_signal_handler(SIGRTMIN(), nothing).unwrap();
    println!("{RUNS} stops each, in microseconds\n");
    println!(
        "{:<22} {:>9} {:>9} {:>9} {:>8}",
        "", "least", "median", "most", "ratio"
    );
    let bare = (0..RUNS).map(|_| floor()).collect();
    let bare = row("floor", bare, None);
    for (name, start) in STUBBORN {
        let times = (0..RUNS).map(|_| {
            let (handle, _guard) = start(&host);
            let since = Instant::now();
            handle.stop();
            since.elapsed()
        });
        row(name, times.collect(), Some(bare));
    }
}
