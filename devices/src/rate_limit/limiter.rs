//! A limit that the queues of a device share, and the queue's side of it.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kiln_io_thread::{EventSet, Registrar};

use super::line::{Answer, Line, Work};
use super::{RateLimits, Timer};

/// A limit that the queues of a device share, on whatever threads they are worked on.
pub(crate) struct RateLimiter {
    /// There is a limit. Where there is none, this is all that is looked at.
    limited: AtomicBool,
    line: Mutex<Line<Waiter>>,
}

/// One that waits, known by its timer.
#[derive(Clone)]
struct Waiter(Arc<Timer>);

impl PartialEq for Waiter {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Waiter {
    /// Has it ask again now.
    fn wake(&self) {
        // What could fail was tried when the timer was made.
        let _ = self.0.set(std::time::Duration::ZERO);
    }
}

impl RateLimiter {
    pub(crate) fn new(limits: RateLimits) -> Self {
        Self {
            limited: AtomicBool::new(!limits.is_empty()),
            line: Mutex::new(Line::new(limits, Instant::now())),
        }
    }

    /// What this guards is whole at every step, whoever panicked.
    fn line(&self) -> MutexGuard<'_, Line<Waiter>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed)
    }

    pub(crate) fn limits(&self) -> RateLimits {
        self.line().limits()
    }

    /// Changes the limits, also for those that wait.
    pub(crate) fn set_limits(&self, limits: RateLimits) {
        let mut line = self.line();
        self.limited.store(!limits.is_empty(), Ordering::Relaxed);
        for waiter in line.set_limits(limits, Instant::now()) {
            waiter.wake();
        }
    }

    /// Takes what an operation of so many bytes needs that went on before it was known.
    pub(crate) fn charge(&self, bytes: u64) {
        if self.is_limited() {
            self.line().charge(bytes, Instant::now());
        }
    }

    /// Sets the waiter's timer with the lock held: who wakes it comes before or after.
    fn ask(&self, waiter: &Waiter, work: Work, throttled: &AtomicU64) -> io::Result<bool> {
        let mut line = self.line();
        match line.ask(waiter, work, Instant::now()) {
            Answer::Go { next } => {
                if let Some(next) = next {
                    next.wake();
                }
                Ok(true)
            }
            Answer::Wait { time, is_new } => {
                if is_new {
                    throttled.fetch_add(1, Ordering::Relaxed);
                }
                waiter.0.set(time)?;
                Ok(false)
            }
        }
    }

    fn leave(&self, waiter: &Waiter) {
        if let Some(next) = self.line().leave(waiter, Instant::now()) {
            next.wake();
        }
    }
}

impl fmt::Debug for RateLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RateLimiter").field(&self.limits()).finish()
    }
}

/// A queue's side of the limits of its device: it asks before each request, and is woken by a
/// timer on its I/O thread where it has to wait. It costs nothing until it has to wait for the
/// first time.
pub(crate) struct Throttle {
    /// The token of the timer.
    token: u32,
    timer: Option<Waiter>,
    /// The timer is waited for.
    registered: bool,
    /// Where it is in line.
    waits_for: Option<Arc<RateLimiter>>,
}

impl Throttle {
    pub(crate) fn new(token: u32) -> Self {
        Self {
            token,
            timer: None,
            registered: false,
            waits_for: None,
        }
    }

    /// The work on the queue begins anew, on a thread that waits for nothing of it yet.
    pub(crate) fn start(&mut self) {
        self.registered = false;
        self.stop_waiting();
    }

    /// Whether a request of so many bytes may go on now. If not, its chain is to be put back, and
    /// the queue processed again when the timer is ready. `throttled` counts those that wait.
    ///
    /// # Errors
    ///
    /// Where the timer cannot be had, or not be waited for.
    pub(crate) fn may(
        &mut self,
        bytes: u64,
        limiter: &Arc<RateLimiter>,
        throttled: &AtomicU64,
        registrar: &mut Registrar<'_, '_>,
    ) -> io::Result<bool> {
        let work = Work {
            bytes,
            charged_later: false,
        };
        self.ask(work, limiter, throttled, registrar)
    }

    /// The same for a request of which it is not known yet how many bytes it has, or whether there
    /// is one: it is to be [charged](RateLimiter::charge) afterwards.
    ///
    /// # Errors
    ///
    /// As [`may`](Self::may).
    pub(crate) fn may_some(
        &mut self,
        limiter: &Arc<RateLimiter>,
        throttled: &AtomicU64,
        registrar: &mut Registrar<'_, '_>,
    ) -> io::Result<bool> {
        let work = Work {
            bytes: 0,
            charged_later: true,
        };
        self.ask(work, limiter, throttled, registrar)
    }

    fn ask(
        &mut self,
        work: Work,
        limiter: &Arc<RateLimiter>,
        throttled: &AtomicU64,
        registrar: &mut Registrar<'_, '_>,
    ) -> io::Result<bool> {
        if !limiter.is_limited() {
            return Ok(true);
        }
        if let Some(other) = &self.waits_for
            && !Arc::ptr_eq(other, limiter)
        {
            self.stop_waiting();
        }
        let timer = match self.timer.take() {
            Some(timer) => timer,
            None => Waiter(Arc::new(Timer::new()?)),
        };
        let timer = self.timer.insert(timer);
        if !self.registered {
            registrar.add(&*timer.0, self.token, EventSet::IN)?;
            self.registered = true;
        }
        let may = limiter.ask(timer, work, throttled)?;
        self.waits_for = (!may).then(|| Arc::clone(limiter));
        Ok(may)
    }

    /// The timer was ready.
    pub(crate) fn woken(&self) {
        if let Some(timer) = &self.timer {
            // It can fail no more than when it was set.
            let _ = timer.0.clear();
        }
    }

    fn stop_waiting(&mut self) {
        if let (Some(limiter), Some(timer)) = (self.waits_for.take(), &self.timer) {
            limiter.leave(timer);
            let _ = timer.0.clear();
        }
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.stop_waiting();
    }
}

impl fmt::Debug for Throttle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Throttle")
            .field("waits", &self.waits_for.is_some())
            .finish_non_exhaustive()
    }
}
