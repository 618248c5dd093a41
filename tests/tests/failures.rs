//! Every step of building and starting a machine, failing: each system call that can be refused is
//! refused once, and what is left behind is nothing. Needs `/dev/kvm`, and nothing else.
//!
//! The functions of the C library that make these calls are defined here, and so come before the C
//! library's own.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use kiln_tests::machines::{assert_belongings, builder, settled_belongings};
use kiln_tests::{guests, host};
use kiln_vmm::{
    Console, ConsoleInput, ConsoleOutput, Disk, IoThreads, Vm, VmBuilder, VmExit, VmHandle,
};

thread_local! {
    /// Whether this is the thread of the test.
    static IS_TEST: Cell<bool> = const { Cell::new(false) };
}
/// Whether calls of the test's thread count, or those of all others: counted together, they would
/// come in another order each time.
static ON_TEST: AtomicBool = AtomicBool::new(true);
/// How many calls from now the one that fails is; below zero where none does.
static COUNTDOWN: AtomicI64 = AtomicI64::new(-1);
/// What failed.
static FAILED: Mutex<Option<&'static str>> = Mutex::new(None);

/// Whether this call is the one that is to fail.
fn is_to_fail(name: &'static str) -> bool {
    let mine = IS_TEST.get() == ON_TEST.load(Ordering::SeqCst)
        && COUNTDOWN.load(Ordering::SeqCst) >= 0
        && COUNTDOWN.fetch_sub(1, Ordering::SeqCst) == 0;
    if mine {
        *FAILED.lock().unwrap() = Some(name);
    }
    mine
}

/// The C library's own definition of a function.
fn next(name: &CStr) -> *mut c_void {
    // SAFETY: the name is a C string, and a look-up has no other conditions.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    assert!(!found.is_null(), "{name:?}");
    found
}

/// Defines functions of the C library that fail when it is their turn: with `$failure`, and the
/// error number set.
macro_rules! interpose {
    ($(fn $name:ident($($arg:ident: $type:ty),*) -> $result:ty, or $failure:expr;)+) => {$(
        /// As in the C library, but it may be its turn to fail.
        ///
        /// # Safety
        ///
        /// That of the C library's function.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($arg: $type),*) -> $result {
            if is_to_fail(stringify!($name)) {
                // SAFETY: the error number of this thread is there to be written.
                unsafe { *libc::__errno_location() = libc::ENOMEM };
                return $failure;
            }
            let name = concat!(stringify!($name), "\0").as_bytes();
            let function = next(CStr::from_bytes_with_nul(name).unwrap());
            type Function = unsafe extern "C" fn($($type),*) -> $result;
            // SAFETY: this is the type of the C library's function of that name. Where that is
            // variadic, its callers pass at most so many arguments, in registers either way.
            let function = unsafe { std::mem::transmute::<*mut c_void, Function>(function) };
            // SAFETY: the caller's promise.
            unsafe { function($($arg),*) }
        }
    )+};
}

interpose! {
    fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int, or -1;
    fn mmap(at: *mut c_void, length: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64)
        -> *mut c_void, or libc::MAP_FAILED;
    fn open64(path: *const c_char, flags: c_int, mode: c_uint) -> c_int, or -1;
    fn open(path: *const c_char, flags: c_int, mode: c_uint) -> c_int, or -1;
    fn lseek64(fd: c_int, offset: i64, whence: c_int) -> i64, or -1;
    fn pread64(fd: c_int, to: *mut c_void, count: usize, offset: i64) -> isize, or -1;
    fn fcntl(fd: c_int, command: c_int, argument: *mut c_void) -> c_int, or -1;
    fn fstat64(fd: c_int, to: *mut c_void) -> c_int, or -1;
    fn eventfd(value: c_uint, flags: c_int) -> c_int, or -1;
    fn epoll_create1(flags: c_int) -> c_int, or -1;
    fn epoll_ctl(epoll: c_int, operation: c_int, fd: c_int, event: *mut c_void) -> c_int, or -1;
    fn timerfd_create(clock: c_int, flags: c_int) -> c_int, or -1;
    fn memfd_create(name: *const c_char, flags: c_uint) -> c_int, or -1;
    fn madvise(at: *mut c_void, length: usize, advice: c_int) -> c_int, or -1;
    fn sched_setaffinity(thread: c_int, size: usize, set: *const c_void) -> c_int, or -1;
    fn sigaction(signal: c_int, new: *const c_void, old: *mut c_void) -> c_int, or -1;
    fn pthread_create(thread: *mut c_void, attributes: *const c_void, start: *mut c_void,
        argument: *mut c_void) -> c_int, or libc::EAGAIN;
}

/// As in the C library, but it may be its turn to fail where it reads a file.
///
/// # Safety
///
/// That of the C library's function.
#[unsafe(no_mangle)]
unsafe extern "C" fn read(fd: c_int, to: *mut c_void, count: usize) -> isize {
    let mut status = MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the call writes a status, and a zeroed one is one too.
    let status = unsafe {
        libc::syscall(libc::SYS_fstat, fd, status.as_mut_ptr());
        status.assume_init()
    };
    if status.st_mode & libc::S_IFMT == libc::S_IFREG && is_to_fail("read") {
        // SAFETY: the error number of this thread is there to be written.
        unsafe { *libc::__errno_location() = libc::EIO };
        return -1;
    }
    // SAFETY: the caller's promise.
    unsafe { libc::syscall(libc::SYS_read, fd, to, count) as isize }
}

/// Does `what` with the call that comes after `skip` others failing; says which failed, if so many
/// were made at all.
fn failing<T>(on_test: bool, skip: i64, what: impl FnOnce() -> T) -> (T, Option<&'static str>) {
    *FAILED.lock().unwrap() = None;
    IS_TEST.set(true);
    ON_TEST.store(on_test, Ordering::SeqCst);
    COUNTDOWN.store(skip, Ordering::SeqCst);
    let result = what();
    COUNTDOWN.store(-1, Ordering::SeqCst);
    (result, FAILED.lock().unwrap().take())
}

/// A machine with something of everything.
fn rich(builder: VmBuilder, folder: &Path) -> Result<VmBuilder, Box<dyn std::error::Error>> {
    let (ours, theirs) = UnixStream::pair()?;
    Ok(builder
        .vcpus(2)
        .initrd(folder.join("initrd"))
        .serial(Console::new(
            ConsoleInput::fd(ours.into()),
            ConsoleOutput::fd(theirs.into()),
        ))
        .disk(
            Disk::open(folder.join("disk"))?
                .id("first")
                .io_threads(IoThreads::Device)
                .io_affinity("0".parse()?),
        )
        .disk(Disk::open_read_only(folder.join("other"))?))
}

/// A folder with the files of [`rich`].
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, size) in [("initrd", 10_000), ("disk", 1 << 20), ("other", 1 << 20)] {
        std::fs::write(folder.path().join(name), vec![1; size]).unwrap();
    }
    folder
}

#[test]
fn a_machine_whose_making_fails_at_any_step_leaves_nothing() {
    let host = host!();
    let folder = folder();
    let build = || -> Result<Vm, Box<dyn std::error::Error>> {
        Ok(rich(builder(&host, guests::power_off()), folder.path())?.build()?)
    };
    // Once, so that what is made once a process is there.
    let exit = build().unwrap().start().unwrap().wait().unwrap();
    assert_eq!(exit, VmExit::Shutdown);

    for (on_test, expected) in [
        (
            true,
            &[
                "ioctl",
                "mmap",
                "eventfd",
                "open64",
                "read",
                "pthread_create",
            ][..],
        ),
        (false, &["eventfd", "epoll_create1", "epoll_ctl"]),
    ] {
        let before = settled_belongings();
        let mut failed = BTreeMap::new();
        for step in 0.. {
            let (built, call) = failing(on_test, step, build);
            let Some(call) = call else { break };
            *failed.entry(call).or_insert(0) += 1;
            match built {
                Err(error) => {
                    let text = error.to_string();
                    assert!(!text.is_empty() && !text.contains('\n'), "{call}: {text}");
                }
                // What failed could be done without: then the machine works.
                Ok(vm) => {
                    let exit = vm.start().unwrap().wait().unwrap();
                    assert_eq!(exit, VmExit::Shutdown, "{call}");
                }
            }
            assert_belongings(before, &format!("after step {step}, {call}"));
        }
        eprintln!("building, on the test's thread: {on_test}: {failed:?}");
        for call in expected {
            assert!(failed.contains_key(call), "no {call} in {failed:?}");
        }
    }

    for on_test in [true, false] {
        let before = settled_belongings();
        let mut failed = BTreeMap::new();
        for step in 0.. {
            let vm = build().unwrap();
            let (started, call) = failing(on_test, step, || {
                vm.start().map(|handle: VmHandle| handle.wait().unwrap())
            });
            let Some(call) = call else { break };
            *failed.entry(call).or_insert(0) += 1;
            if let Ok(exit) = started {
                assert_ne!(exit, VmExit::Stopped, "{call}");
            }
            assert_belongings(before, &format!("after the start's step {step}, {call}"));
        }
        eprintln!("starting, on the test's thread: {on_test}: {failed:?}");
        let expected = if on_test { "pthread_create" } else { "ioctl" };
        assert!(failed.contains_key(expected), "{failed:?}");
    }
}
