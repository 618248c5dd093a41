//! MSI-X vectors, the pin, and that no event is lost between them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use kiln_device_api::MsiMessage;
use kiln_io_thread::IoThread;
use kiln_pci::MsixSink;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{driver, echo, read, state, write};
use crate::test_device::EchoDevice;
use crate::testing::{InterruptRecorder, MockDriver, TestPci, TestState};
use crate::{InterruptEvent, PciTransport, TransportError, VirtioInterrupt};

const CONFIG_VECTOR: u64 = 0x10;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_VECTOR: u64 = 0x1a;
/// The mask of a vector in the table.
fn mask_of(vector: u64) -> u64 {
    0x8000 + 16 * vector + 12
}

/// A started device without requests, and its way to the driver.
fn started() -> (MockDriver, Arc<dyn VirtioInterrupt>) {
    let (mut driver, controls) = driver();
    driver.start(0, 8);
    let interrupt = controls.interrupt.lock().unwrap().clone().unwrap();
    (driver, interrupt)
}

#[test]
fn each_queue_and_the_configuration_have_vectors_of_their_own() {
    let (driver, interrupt) = started();
    let pci = driver.transport.pci();
    interrupt.trigger(InterruptEvent::Queue(1));
    interrupt.trigger(InterruptEvent::Queue(0));
    let generation = read(pci, 0x15, 1);
    interrupt.trigger(InterruptEvent::Config);
    assert_ne!(read(pci, 0x15, 1), generation);
    interrupt.trigger(InterruptEvent::Queue(2)); // does not exist
    assert_eq!(driver.line.vectors(), [2, 1, 0]);
    // Several may share one, and each may have none.
    write(pci, QUEUE_SELECT, 2, 0);
    write(pci, QUEUE_VECTOR, 2, 2);
    write(pci, CONFIG_VECTOR, 2, 0xffff);
    interrupt.trigger(InterruptEvent::Queue(0));
    interrupt.trigger(InterruptEvent::Config);
    write(pci, QUEUE_VECTOR, 2, 0xffff);
    interrupt.trigger(InterruptEvent::Queue(0));
    assert_eq!(driver.line.vectors(), [2, 1, 0, 2]);
    assert!(!driver.line.is_asserted());
}

#[test]
fn a_vector_that_does_not_exist_is_refused() {
    let (driver, _) = driver();
    let pci = driver.transport.pci();
    for queue in [0, 1] {
        write(pci, QUEUE_SELECT, 2, queue);
        for field in [CONFIG_VECTOR, QUEUE_VECTOR] {
            assert_eq!(read(pci, field, 2), 0xffff);
            for (vector, kept) in [
                (2, 2),
                (3, 0xffff),
                (0, 0),
                (0x8000, 0xffff),
                (0xffff, 0xffff),
            ] {
                write(pci, field, 2, vector);
                assert_eq!(read(pci, field, 2), kept);
            }
        }
    }
}

#[test]
fn an_event_of_a_masked_vector_is_kept_until_it_is_unmasked() {
    let (driver, interrupt) = started();
    let pci = driver.transport.pci();
    write(pci, mask_of(2), 4, 1);
    interrupt.trigger(InterruptEvent::Queue(1));
    interrupt.trigger(InterruptEvent::Queue(1));
    assert!(driver.line.vectors().is_empty());
    assert_eq!(read(pci, 0x3000, 8), 1 << 2);
    write(pci, mask_of(2), 4, 0);
    assert_eq!(driver.line.vectors(), [2]);
    assert_eq!(read(pci, 0x3000, 8), 0);
    // The function as a whole.
    let control = pci.msix_capability() + 2;
    pci.set_config(control, &0xc000_u16.to_le_bytes());
    interrupt.trigger(InterruptEvent::Queue(0));
    interrupt.trigger(InterruptEvent::Config);
    assert_eq!(driver.line.vectors(), [2]);
    pci.set_config(control, &0x8000_u16.to_le_bytes());
    assert_eq!(driver.line.vectors(), [2, 0, 1]);
    assert!(!driver.line.is_asserted());
}

#[test]
fn a_device_reset_unmaps_vectors_and_keeps_the_table() {
    let (driver, interrupt) = started();
    let pci = driver.transport.pci();
    write(pci, mask_of(1), 4, 1);
    let table: Vec<_> = (0x8000..0x8030).map(|at| read(pci, at, 1)).collect();
    write(pci, 0x14, 1, 0);
    let state = state(&driver);
    assert_eq!(state.config_vector, 0xffff);
    assert_eq!(state.queue_vectors, [0xffff; 2]);
    let after: Vec<_> = (0x8000..0x8030).map(|at| read(pci, at, 1)).collect();
    assert_eq!(after, table);
    assert_eq!(pci.config(pci.msix_capability() + 3), [0x80], "enabled");
    interrupt.trigger(InterruptEvent::Queue(0));
    assert!(driver.line.vectors().is_empty());
}

#[test]
fn a_queue_reset_unmaps_the_vector_of_that_queue() {
    let (mut driver, _) = driver();
    driver.start(MockDriver::RING_RESET, 8);
    let pci = driver.transport.pci();
    write(pci, QUEUE_SELECT, 2, 1);
    write(pci, 0x3a, 2, 1);
    driver.transport.pause();
    assert_eq!(state(&driver).queue_vectors, [1, 0xffff]);
}

#[test]
fn without_msix_the_pin_is_asserted_until_the_status_is_read() {
    let (mut driver, controls) = driver();
    driver.transport.pci().disable_msix();
    driver.start(0, 8);
    echo(&mut driver);
    driver.line.wait_for(1);
    let interrupt = controls.interrupt.lock().unwrap().clone().unwrap();
    let pci = driver.transport.pci();
    let interrupt_status = |pci: &TestPci| pci.config(6) == [0x18];
    for (events, isr) in [
        (&[InterruptEvent::Queue(0)][..], 1),
        (&[InterruptEvent::Config], 2),
        (&[InterruptEvent::Config, InterruptEvent::Queue(1)], 3),
    ] {
        for event in events {
            interrupt.trigger(*event);
            interrupt.trigger(*event);
        }
        assert!(driver.line.is_asserted() && interrupt_status(pci));
        assert_eq!(read(pci, pci.isr(), 1), isr);
        assert!(!driver.line.is_asserted() && !interrupt_status(pci));
        assert_eq!(read(pci, pci.isr(), 1), 0);
    }
    assert!(driver.line.vectors().is_empty());
    // The driver may not want the pin either.
    pci.set_config(4, &[0x06, 0x04]);
    interrupt.trigger(InterruptEvent::Queue(0));
    assert!(!driver.line.is_asserted() && interrupt_status(pci));
    pci.set_config(4, &[0x06, 0x00]);
    assert!(driver.line.is_asserted());
    // A reset of the device lowers it.
    write(pci, 0x14, 1, 0);
    assert!(!driver.line.is_asserted());
    assert_eq!(read(pci, pci.isr(), 1), 0);
}

#[test]
fn the_pin_is_silent_while_msix_is_enabled() {
    let (driver, interrupt) = started();
    let pci = driver.transport.pci();
    interrupt.trigger(InterruptEvent::Queue(0));
    assert_eq!(read(pci, pci.isr(), 1), 0, "queues have messages only");
    interrupt.trigger(InterruptEvent::Config);
    assert!(!driver.line.is_asserted());
    pci.disable_msix();
    assert!(driver.line.is_asserted());
    pci.enable_msix(3);
    assert!(!driver.line.is_asserted());
    assert_eq!(read(pci, pci.isr(), 1), 2);
    pci.disable_msix();
    assert!(!driver.line.is_asserted());
}

#[test]
fn what_is_pending_survives_being_stored() {
    let (mut driver, interrupt) = started();
    write(driver.transport.pci(), mask_of(1), 4, 1);
    interrupt.trigger(InterruptEvent::Queue(0));
    interrupt.trigger(InterruptEvent::Config);
    driver.transport.pause();
    let stored = driver.transport.state().unwrap();
    driver.restore(EchoDevice::boxed().0, &stored).unwrap();
    driver.transport.resume();
    assert_eq!(driver.line.count(), 0);
    let pci = driver.transport.pci();
    write(pci, mask_of(1), 4, 0);
    assert_eq!(driver.line.vectors(), [1]);
    pci.disable_msix();
    assert!(driver.line.is_asserted());

    driver.transport.pause();
    let stored = driver.transport.state().unwrap();
    driver.restore(EchoDevice::boxed().0, &stored).unwrap();
    let pci = driver.transport.pci();
    assert!(driver.line.is_asserted());
    assert_eq!(read(pci, pci.isr(), 1), 2);
    assert!(!driver.line.is_asserted());
}

#[test]
fn a_state_with_other_vectors_is_refused() {
    let (mut driver, _) = driver();
    let good = driver.transport.state().unwrap();
    let bad: [fn(&mut crate::PciTransportState); 6] = [
        |state| state.isr = 4,
        |state| state.config_vector = 3,
        |state| state.queue_vectors[1] = 3,
        |state| state.queue_vectors[0] = 0xfffe,
        |state| state.queue_vectors.truncate(1),
        |state| state.queue_vectors.push(0),
    ];
    for (at, spoil) in bad.into_iter().enumerate() {
        let mut state = good.clone();
        if let TestState::Pci { transport, .. } = &mut state {
            spoil(transport);
        }
        let error = driver
            .restore(EchoDevice::boxed().0, &state)
            .expect_err("a spoiled state");
        assert!(
            matches!(error, TransportError::State { .. }),
            "{at}: {error}"
        );
    }
}

/// A sink with eventfds, which counts what the kernel would deliver.
struct Kernel {
    vectors: Vec<(EventFd, Mutex<bool>)>,
    delivered: AtomicUsize,
    when_asked: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Kernel {
    fn new() -> Self {
        let vector = || (EventFd::new(EFD_NONBLOCK).unwrap(), Mutex::new(false));
        Self {
            vectors: (0..3).map(|_| vector()).collect(),
            delivered: AtomicUsize::new(0),
            when_asked: Mutex::new(None),
        }
    }

    /// Delivers what was written to the eventfds of open vectors.
    fn poll(&self) -> usize {
        for (eventfd, open) in &self.vectors {
            if *open.lock().unwrap() && eventfd.read().is_ok() {
                self.delivered.fetch_add(1, Ordering::SeqCst);
            }
        }
        self.delivered.load(Ordering::SeqCst)
    }
}

impl MsixSink for Kernel {
    fn connect(&self, vector: u16, _message: MsiMessage) {
        *self.vectors[usize::from(vector)].1.lock().unwrap() = true;
    }

    fn disconnect(&self, vector: u16) {
        let (eventfd, open) = &self.vectors[usize::from(vector)];
        let mut open = open.lock().unwrap();
        // The kernel takes each write at once, as long as it is there.
        if *open && eventfd.read().is_ok() {
            self.delivered.fetch_add(1, Ordering::SeqCst);
        }
        *open = false;
    }

    fn take(&self, vector: u16) -> bool {
        self.vectors[usize::from(vector)].0.read().is_ok()
    }

    fn signal(&self, _vector: u16, _message: MsiMessage) {
        self.delivered.fetch_add(1, Ordering::SeqCst);
    }

    fn notifier(&self, vector: u16) -> Option<EventFd> {
        let when_asked = self.when_asked.lock().unwrap().take();
        if let Some(when_asked) = when_asked {
            when_asked();
        }
        self.vectors[usize::from(vector)].0.try_clone().ok()
    }
}

/// A started device behind a sink with eventfds.
struct WithKernel {
    pci: TestPci,
    kernel: Arc<Kernel>,
    line: Arc<InterruptRecorder>,
    interrupt: Arc<dyn VirtioInterrupt>,
    _io: IoThread,
}

fn with_kernel() -> WithKernel {
    let (device, controls) = EchoDevice::boxed();
    let memory = MockDriver::new(EchoDevice::boxed().0).memory;
    let io = IoThread::spawn("test-io", |_| ()).unwrap();
    let kernel = Arc::new(Kernel::new());
    let line = Arc::new(InterruptRecorder::default());
    let sink = Arc::clone(&kernel) as Arc<dyn MsixSink>;
    let (transport, description) =
        PciTransport::new(device, memory, io.handle().clone(), "test", sink).unwrap();
    let pci = TestPci::new(transport, description, Arc::clone(&line) as _);
    pci.enable_memory();
    pci.enable_msix(3);
    write(&pci, 0x08, 4, 1);
    write(&pci, 0x0c, 4, 1); // VERSION_1
    write(&pci, CONFIG_VECTOR, 2, 0);
    for queue in [0, 1] {
        write(&pci, QUEUE_SELECT, 2, queue);
        write(&pci, QUEUE_VECTOR, 2, queue + 1);
    }
    write(&pci, 0x14, 1, 0xf);
    assert_eq!(read(&pci, 0x14, 1), 0xf);
    let interrupt = controls.interrupt.lock().unwrap().clone().unwrap();
    WithKernel {
        pci,
        kernel,
        line,
        interrupt,
        _io: io,
    }
}

#[test]
fn an_event_is_written_to_the_eventfd_of_its_vector() {
    let test = with_kernel();
    let counter = |vector: usize| test.kernel.vectors[vector].0.read().ok();
    test.interrupt.trigger(InterruptEvent::Queue(1));
    test.interrupt.trigger(InterruptEvent::Queue(1));
    assert_eq!([counter(0), counter(1), counter(2)], [None, None, Some(2)]);
    test.interrupt.trigger(InterruptEvent::Config);
    assert_eq!(counter(0), Some(1));
    assert_eq!(test.kernel.delivered.load(Ordering::SeqCst), 0);

    // A worker outside has the same eventfd, where there is one.
    let notifier = |event| test.interrupt.notifier(event);
    notifier(InterruptEvent::Queue(0))
        .unwrap()
        .write(1)
        .unwrap();
    assert_eq!(counter(1), Some(1));
    // Of a change of the configuration the transport has to know.
    assert!(notifier(InterruptEvent::Config).is_none());
    assert!(notifier(InterruptEvent::Queue(2)).is_none());
    write(&test.pci, QUEUE_SELECT, 2, 0);
    write(&test.pci, QUEUE_VECTOR, 2, 0xffff);
    assert!(notifier(InterruptEvent::Queue(0)).is_none());
    test.pci.disable_msix();
    assert!(notifier(InterruptEvent::Queue(1)).is_none());
    test.interrupt.trigger(InterruptEvent::Queue(1));
    assert_eq!(counter(2), None);
    assert!(test.line.is_asserted());
}

#[test]
fn an_event_written_to_a_masked_vector_comes_when_it_is_unmasked() {
    let test = with_kernel();
    write(&test.pci, mask_of(1), 4, 1);
    test.interrupt.trigger(InterruptEvent::Queue(0));
    assert_eq!(test.kernel.poll(), 0);
    assert_eq!(read(&test.pci, 0x3000, 8), 1 << 1);
    write(&test.pci, mask_of(1), 4, 0);
    assert_eq!(test.kernel.poll(), 1);
}

#[test]
fn no_event_is_lost_while_the_guest_reads_the_interrupt_status() {
    const ROUNDS: usize = 3000;
    let (driver, interrupt) = started();
    let pci = driver.transport.pci();
    pci.disable_msix();
    let barrier = Barrier::new(2);
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                barrier.wait();
                for _ in 0..5 {
                    interrupt.trigger(InterruptEvent::Queue(0));
                }
                barrier.wait();
            }
        });
        for round in 0..ROUNDS {
            barrier.wait();
            let seen = (0..5).any(|_| read(pci, pci.isr(), 1) != 0);
            barrier.wait();
            // What was not read is on the line still, and nothing else is.
            let asserted = driver.line.is_asserted();
            let left = read(pci, pci.isr(), 1) != 0;
            assert!(seen || left, "round {round}");
            assert_eq!(asserted, left, "round {round}");
        }
    });
}

#[test]
fn an_event_that_is_written_as_msix_is_disabled_comes_by_the_pin() {
    let test = Arc::new(with_kernel());
    let device = Arc::downgrade(&test);
    // The eventfd is asked for at the first event, when the device has seen that MSI-X is enabled.
    *test.kernel.when_asked.lock().unwrap() = Some(Box::new(move || {
        device.upgrade().unwrap().pci.disable_msix();
    }));
    test.interrupt.trigger(InterruptEvent::Queue(0));
    assert_eq!(test.kernel.poll(), 0);
    assert!(test.line.is_asserted());
    assert_eq!(read(&test.pci, test.pci.isr(), 1), 1);
}

#[test]
fn no_event_is_lost_while_msix_is_enabled_or_disabled() {
    const ROUNDS: usize = 2000;
    let test = with_kernel();
    let barrier = Barrier::new(2);
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                barrier.wait();
                test.interrupt.trigger(InterruptEvent::Queue(0));
                barrier.wait();
            }
        });
        for round in 0..ROUNDS {
            let before = test.kernel.poll();
            barrier.wait();
            if round % 2 == 0 {
                test.pci.disable_msix();
            } else {
                test.pci.enable_msix(3);
            }
            barrier.wait();
            let told = test.kernel.poll() > before || test.line.is_asserted();
            // One that was told by the pin just before messages were enabled is in the status.
            let status = read(&test.pci, test.pci.isr(), 1);
            assert!(told || status == 1, "round {round}");
        }
    });
}
