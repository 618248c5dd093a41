//! Machines with several I/O threads: needs `/dev/kvm`, and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_tests::machines::{
    LONG, assert_belongings, belongings, builder, end, is_alone, settled_belongings, start,
};
use kiln_tests::{guests, host};
use kiln_vmm::virtio::{
    EventSet, IoEvent, QueueError, QueueHandler, Registrar, SimpleDevice, Turn,
};
use kiln_vmm::{CpuList, Disk, HandleError, Host, IoThreads, Transport, VmEvent, VmExit, VmHandle};
use vmm_sys_util::eventfd::EventFd;

/// The names of this process's threads, with the CPUs that each may run on.
fn threads() -> BTreeMap<String, String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    // One that has just ended has none.
    tasks
        .filter_map(|task| thread(&task.unwrap().path()))
        .collect()
}

/// The name of the thread with this folder, and the CPUs that it may run on.
fn thread(folder: &Path) -> Option<(String, String)> {
    let status = std::fs::read_to_string(folder.join("status")).ok()?;
    let value = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_default().trim().to_owned()
    };
    Some((value("Name:"), value("Cpus_allowed_list:")))
}

/// A file of a megabyte.
fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

#[test]
fn devices_have_the_threads_that_they_ask_for_and_leave_none() {
    if !is_alone("devices_have_the_threads_that_they_ask_for_and_leave_none") {
        return;
    }
    let host = host!();
    start(&host, guests::power_off()).wait().unwrap();
    let (first, second) = (image(), image());
    let before = settled_belongings();
    let built = |threads| {
        builder(&host, guests::busy())
            .name("box")
            .io_threads(threads)
            .disk(Disk::open(first.path()).unwrap())
            .disk(
                Disk::open(second.path())
                    .unwrap()
                    .io_threads(IoThreads::Shared),
            )
            .rng(kiln_vmm::Rng::new())
            .build()
            .unwrap()
    };
    // A thread names itself, some time after it was made.
    let assert_ours = |expected: &[&str], setting| {
        let is_ours = |name: &String| name.starts_with("box-");
        let names = || -> Vec<String> { threads().into_keys().filter(is_ours).collect() };
        let since = Instant::now();
        while names() != expected && since.elapsed() < LONG {
            std::thread::yield_now();
        }
        assert_eq!(names(), expected, "{setting}");
    };
    for (setting, expected) in [
        (IoThreads::Shared, &["box-io"][..]),
        (IoThreads::Device, &["box-disk0", "box-io", "box-rng"]),
    ] {
        let vm = built(setting);
        assert_ours(expected, setting);
        drop(vm);
        assert_belongings(before, &format!("{setting}, not started"));

        let handle = built(setting).start().unwrap();
        let expected = [expected, &["box-vcpu0"]].concat();
        assert_ours(&expected, setting);
        handle.pause().unwrap();
        handle.resume().unwrap();
        handle.stop();
        assert_eq!(end(&handle), VmExit::Stopped);
        drop(handle);
        assert_belongings(before, &format!("{setting}, stopped"));

        drop(built(setting).start().unwrap());
        assert_belongings(before, &format!("{setting}, dropped"));
    }
    assert_eq!(belongings(), before);
}

#[test]
fn io_threads_run_on_the_cpus_that_were_chosen_and_others_on_all() {
    if !is_alone("io_threads_run_on_the_cpus_that_were_chosen_and_others_on_all") {
        return;
    }
    let host = host!();
    let (_, own) = thread(Path::new("/proc/thread-self")).unwrap();
    let usable: CpuList = own.parse().unwrap();
    let (first, last) = (usable.iter().next().unwrap(), usable.iter().last().unwrap());
    let one = |cpu: u32| cpu.to_string().parse::<CpuList>().unwrap();
    let disk = image();
    let vm = builder(&host, guests::busy())
        .io_threads(IoThreads::Device)
        .io_affinity(one(first))
        .disk(Disk::open(disk.path()).unwrap().io_affinity(one(last)))
        .rng(kiln_vmm::Rng::new())
        .build()
        .unwrap();
    let handle = vm.start().unwrap();
    while !threads().contains_key("kiln-vcpu0") {
        std::thread::yield_now();
    }
    let threads = threads();
    assert_eq!(threads["kiln-io"], first.to_string());
    assert_eq!(threads["kiln-rng"], first.to_string());
    assert_eq!(threads["kiln-disk0"], last.to_string());
    assert_eq!(threads["kiln-vcpu0"], own);
    handle.stop();
}

#[test]
fn cpus_that_cannot_be_are_refused_in_one_line() {
    let host = host!();
    let disk = image();
    let disk = || Disk::open_read_only(disk.path()).unwrap();
    let far: CpuList = "1020-1023".parse().unwrap();
    let near: CpuList = CpuList::online().unwrap();
    let machine = || builder(&host, guests::power_off());
    for (machine, said) in [
        (machine().io_affinity(far.clone()), "1020-1023 not online"),
        (
            machine().disk(disk().io_threads(IoThreads::Device).io_affinity(far)),
            "1020-1023 not online",
        ),
        (machine().disk(disk().io_affinity(near)), "`disk 0`"),
    ] {
        let error = machine.build().unwrap_err().to_string();
        assert!(error.contains(said) && !error.contains('\n'), "{error}");
    }
}

/// Does something on its I/O thread once it is told to.
struct Told<F> {
    told: EventFd,
    act: F,
}

impl<F: FnMut() + Send + 'static> QueueHandler for Told<F> {
    fn start(&mut self, _features: u64, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        registrar.add(&self.told, Self::FIRST_TOKEN, EventSet::IN)
    }
    fn ready(&mut self, _event: IoEvent) -> Option<u16> {
        let _ = self.told.read();
        (self.act)();
        None
    }
    fn process(&mut self, _: &mut Turn<'_>, _: &mut Registrar<'_, '_>) -> Result<(), QueueError> {
        Ok(())
    }
}

/// A machine whose driver is at work with a device that does this on a thread of its own.
fn with_device(host: &Arc<Host>, act: impl FnMut() + Send + 'static) -> (VmHandle, EventFd) {
    let told = EventFd::new(0).unwrap();
    let tell = told.try_clone().unwrap();
    let handle = builder(host, guests::virtio_driver_ok())
        .io_threads(IoThreads::Device)
        .virtio_device_on(
            Transport::Mmio,
            "told\0", // A name that no thread can have.
            SimpleDevice::new(42, [16], Told { told, act }),
        )
        .build()
        .unwrap()
        .start()
        .unwrap();
    while handle.exit_counts()[0].pio_out == 0 {
        std::thread::yield_now();
    }
    (handle, tell)
}

#[test]
fn a_device_that_panics_on_its_own_thread_ends_its_machine() {
    let host = host!();
    let (handle, tell) = with_device(&host, || panic!("no more"));
    let events = handle.events().unwrap();
    tell.write(1).unwrap();
    let VmExit::DeviceFailure(reason) = end(&handle) else {
        panic!("{:?}", end(&handle));
    };
    assert!(reason.contains("no more"), "{reason}");
    assert!(matches!(
        events.recv_timeout(LONG),
        Some(VmEvent::DeviceError { .. })
    ));
}

#[test]
fn a_device_can_drop_the_last_handle_on_its_own_thread() {
    let host = host!();
    let place: Arc<Mutex<Option<VmHandle>>> = Arc::default();
    let dropped = Arc::new(AtomicBool::new(false));
    let (at, seen) = (Arc::clone(&place), Arc::clone(&dropped));
    let (handle, tell) = with_device(&host, move || {
        if let Some(handle) = at.lock().unwrap().take() {
            assert!(matches!(handle.wait(), Err(HandleError::OnOwnThread)));
            assert!(matches!(handle.pause(), Err(HandleError::OnOwnThread)));
            handle.stop();
            drop(handle);
            seen.store(true, Ordering::SeqCst);
        }
    });
    let events = handle.events().unwrap();
    *place.lock().unwrap() = Some(handle);
    tell.write(1).unwrap();
    let ended = events.recv_timeout(LONG);
    assert_eq!(ended, Some(VmEvent::Ended(VmExit::Stopped)));
    assert!(dropped.load(Ordering::SeqCst));
    let gone = (0..6000).any(|_| {
        std::thread::sleep(Duration::from_millis(1));
        Arc::strong_count(&place) == 1
    });
    assert!(gone, "the machine still holds its device");
}

#[test]
fn a_stop_does_not_wait_for_a_thread_that_is_busy() {
    let host = host!();
    let (release, blocked) = std::sync::mpsc::channel::<()>();
    let (entered, is_in) = std::sync::mpsc::channel();
    let (handle, tell) = with_device(&host, move || {
        entered.send(()).unwrap();
        let _ = blocked.recv_timeout(LONG);
    });
    tell.write(1).unwrap();
    is_in.recv_timeout(LONG).unwrap();
    handle.stop();
    assert_eq!(handle.try_wait().unwrap(), None);
    drop(release);
    assert_eq!(end(&handle), VmExit::Stopped);
}
