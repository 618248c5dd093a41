//! The one signal that this crate uses, and the signal mask of vCPU threads.

use std::io;
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::{Mutex, PoisonError};

use crate::Error;

/// The real-time signal by which a vCPU is brought out of the guest.
///
/// The default is `SIGRTMIN+5`. The signal's disposition is taken for the process when the first
/// machine is started and is kept, for it can't be told who else came to rely on it. The handler
/// does nothing: the signal's arrival alone makes KVM_RUN return. It is only ever sent to vCPU
/// threads of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KickSignal {
    offset: u8,
}

impl KickSignal {
    const DEFAULT_OFFSET: u8 = 5;

    /// The signal `SIGRTMIN + offset`.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchSignal`] where that is above `SIGRTMAX`.
    pub fn real_time(offset: u8) -> Result<Self, Error> {
        let last = u8::try_from(libc::SIGRTMAX() - libc::SIGRTMIN()).unwrap_or(0);
        if offset > last {
            return Err(Error::NoSuchSignal { offset, last });
        }
        Ok(Self { offset })
    }

    /// The signal's number.
    pub fn number(self) -> i32 {
        libc::SIGRTMIN() + i32::from(self.offset)
    }

    /// Installs the handler unless it is there already.
    pub(crate) fn install(self) -> Result<(), Error> {
        // Two managers starting at once must not both find the default disposition; that is
        // harmless between the two, but one could overwrite what a third party has set meanwhile.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);

        let signal = self.number();
        let handler = on_kick as extern "C" fn(libc::c_int) as libc::sighandler_t;
        match disposition(signal).map_err(|source| Error::Signal { signal, source })? {
            current if current == handler => Ok(()),
            libc::SIG_DFL => {
                set_handler(signal, handler).map_err(|source| Error::Signal { signal, source })
            }
            _ => Err(Error::SignalTaken {
                signal,
                offset: self.offset,
            }),
        }
    }
}

impl Default for KickSignal {
    fn default() -> Self {
        Self {
            offset: Self::DEFAULT_OFFSET,
        }
    }
}

/// Does nothing, so it is safe at any point of any thread.
extern "C" fn on_kick(_signal: libc::c_int) {}

fn disposition(signal: i32) -> io::Result<libc::sighandler_t> {
    let mut current = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: a null new action only queries; the current one is written to valid memory.
    if unsafe { libc::sigaction(signal, null(), current.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: sigaction succeeded and so filled it.
    Ok(unsafe { current.assume_init() }.sa_sigaction)
}

fn set_handler(signal: i32, handler: libc::sighandler_t) -> io::Result<()> {
    // SAFETY: all zeroes is a valid `sigaction`: no flags (so no SA_RESTART), an empty mask.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler;
    // SAFETY: `action` is valid, and its handler may interrupt anything since it does nothing.
    if unsafe { libc::sigaction(signal, &raw const action, null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A thread, by the number that the kernel has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadId(libc::pid_t);

impl ThreadId {
    /// The calling thread.
    pub(crate) fn current() -> Self {
        // SAFETY: gettid has no conditions.
        Self(unsafe { libc::gettid() })
    }
}

/// Sends the kick to a thread of this process, and says whether it could.
///
/// It can fail: real-time signals queue, and `RLIMIT_SIGPENDING` bounds how many a user may have in
/// the queue, over all the user's processes. Then there may be room a little later.
///
/// To a thread that has ended it must not be sent: another thread of the process may have its
/// number by now.
pub(crate) fn send(signal: KickSignal, thread: ThreadId) -> bool {
    // SAFETY: tgkill takes plain numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread.0, signal.number()) == 0 }
}

/// While it lives, the current thread has the signal mask that vCPU threads are to inherit: all
/// signals are blocked but the kick and those that a fault of the thread itself raises. So an
/// embedder's signals are handled on the embedder's threads.
pub(crate) struct VcpuSignalMask {
    previous: libc::sigset_t,
}

impl VcpuSignalMask {
    pub(crate) fn set(kick: KickSignal) -> io::Result<Self> {
        let synchronous = [
            libc::SIGABRT,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGSEGV,
            libc::SIGSYS,
            libc::SIGTRAP,
        ];
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigfillset writes the whole set.
        let mut set = unsafe {
            libc::sigfillset(set.as_mut_ptr());
            set.assume_init()
        };
        for signal in synchronous.into_iter().chain([kick.number()]) {
            // SAFETY: `set` is a valid set.
            unsafe { libc::sigdelset(&raw mut set, signal) };
        }
        let mut previous = MaybeUninit::uninit();
        // SAFETY: `set` is valid, `previous` is memory for one.
        let error = unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, previous.as_mut_ptr())
        };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: pthread_sigmask succeeded and so filled it.
        let previous = unsafe { previous.assume_init() };
        Ok(Self { previous })
    }
}

impl VcpuSignalMask {
    /// Gives the current thread this mask for good.
    pub(crate) fn keep(kick: KickSignal) -> io::Result<()> {
        Self::set(kick).map(std::mem::forget)
    }
}

/// Names the current thread, by the first 15 bytes of this.
pub(crate) fn set_own_name(name: &str) {
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().take(15).zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the name ends in a zero byte, and this thread lives.
    unsafe { libc::pthread_setname_np(libc::pthread_self(), bytes.as_ptr()) };
}

impl Drop for VcpuSignalMask {
    fn drop(&mut self) {
        // SAFETY: `previous` is the valid mask that this thread had before.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.previous, null_mut());
        }
    }
}
