//! Limits on how much may be done in a time.
//!
//! A [`TokenBucket`] holds tokens - bytes, or operations - and gets new ones at a steady rate, up
//! to its burst. What is done takes tokens out, and waits while there are too few. It knows no
//! clock: every call is told what time it is. Its arithmetic is that of integers, so nothing is
//! lost to rounding: what is taken in any time is at most the burst and what the rate gives in
//! that time.
//!
//! A device has such limits in each direction ([`RateLimits`]), which all its queues share. A
//! request goes on when there are as many tokens as it needs, or as many as there ever are: then
//! what it takes too much is a debt, which is paid before anything else goes on. Those that wait are
//! served in the order in which they came. So in any time there is no more done than the burst and
//! what comes in that time, and one request that is larger than the burst.
//!
//! | module | what lives there |
//! |---|---|
//! | `rate_limit` | [`RateLimits`], [`RateLimit`], [`TokenBucket`], the timer |
//! | `line` | who may go on, and who has to wait |
//! | `limiter` | a limit that queues share, and a queue's side of it |
//!
//! # Example
//!
//! ```
//! use kiln_devices::rate_limit::{RateLimit, TokenBucket};
//! use std::num::NonZeroU64;
//! use std::time::{Duration, Instant};
//!
//! let limit = RateLimit::per_second(NonZeroU64::new(1000).unwrap());
//! let start = Instant::now();
//! let mut bucket = TokenBucket::new(limit, start);
//! assert_eq!(bucket.take(600, start), Ok(()));
//! // 400 are left: the other 200 come in a fifth of a second.
//! let wait = Duration::from_millis(200);
//! assert_eq!(bucket.take(600, start), Err(wait));
//! assert_eq!(bucket.take(600, start + wait), Ok(()));
//! ```

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

mod limiter;
mod line;

pub(crate) use limiter::{RateLimiter, Throttle};

/// The parts that a token is counted in, so that a nanosecond of any rate is a whole number of
/// them.
const PARTS: i128 = 1_000_000_000;

/// How much may be done in a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// The tokens that come in a second.
    pub per_second: NonZeroU64,
    /// The most tokens that are kept for later, which is what can be done at once after a rest.
    pub burst: NonZeroU64,
}

impl RateLimit {
    /// So much in a second, with a burst of as much.
    pub const fn per_second(tokens: NonZeroU64) -> Self {
        Self {
            per_second: tokens,
            burst: tokens,
        }
    }

    /// The same rate with another burst.
    #[must_use]
    pub const fn with_burst(mut self, tokens: NonZeroU64) -> Self {
        self.burst = tokens;
        self
    }
}

/// How much a device may do in one direction, or in both together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// The bytes.
    pub bandwidth: Option<RateLimit>,
    /// The operations, whatever their size: requests of a disk, packets of a network.
    pub ops: Option<RateLimit>,
}

impl RateLimits {
    /// Whether nothing is limited.
    pub fn is_empty(&self) -> bool {
        self.bandwidth.is_none() && self.ops.is_none()
    }
}

/// Tokens that come at a steady rate, and are taken in bursts.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    limit: RateLimit,
    /// What there is, in parts of a token. What takes more than the burst leaves a debt.
    level: i128,
    /// The time up to which tokens have come.
    filled: Instant,
}

impl TokenBucket {
    /// A full bucket.
    pub fn new(limit: RateLimit, now: Instant) -> Self {
        Self {
            limit,
            level: parts(limit.burst.get()),
            filled: now,
        }
    }

    /// The limit.
    pub fn limit(&self) -> RateLimit {
        self.limit
    }

    /// Changes the limit. What came until now stays, as far as the new burst allows.
    pub fn set_limit(&mut self, limit: RateLimit, now: Instant) {
        self.fill(now);
        self.limit = limit;
        self.level = self.level.min(parts(limit.burst.get()));
    }

    /// Whole tokens that there are now.
    pub fn available(&mut self, now: Instant) -> u64 {
        self.fill(now);
        u64::try_from(self.level / PARTS).unwrap_or(0)
    }

    /// Takes `count` tokens. More than the burst can be taken only from a full bucket; later takes
    /// then wait until what was taken too much has come.
    ///
    /// # Errors
    ///
    /// The time after which it will be possible, if nobody else takes any. Nothing is taken now.
    pub fn take(&mut self, count: u64, now: Instant) -> Result<(), Duration> {
        match self.time_for(count, now) {
            Duration::ZERO => {
                self.charge(count, now);
                Ok(())
            }
            time => Err(time),
        }
    }

    /// The time after which `count` tokens [can be taken](Self::take), if nobody takes any.
    pub fn time_for(&mut self, count: u64, now: Instant) -> Duration {
        self.fill(now);
        let missing = parts(count.min(self.limit.burst.get())).saturating_sub(self.level);
        self.time_to_come(missing.max(0))
    }

    /// Takes `count` tokens, also where there are not as many: later takes then wait until what was
    /// taken too much has come.
    pub fn charge(&mut self, count: u64, now: Instant) {
        self.fill(now);
        self.level = self.level.saturating_sub(parts(count));
    }

    /// Adds what has come since the last time. A clock that goes back brings nothing.
    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled);
        self.filled = self.filled.max(now);
        let passed = i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX);
        let came = passed.saturating_mul(i128::from(self.limit.per_second.get()));
        let full = parts(self.limit.burst.get());
        self.level = self.level.saturating_add(came).min(full);
    }

    /// How long it takes for so many parts to come: at least so long, and less than a nanosecond
    /// longer.
    fn time_to_come(&self, parts: i128) -> Duration {
        let rate = i128::from(self.limit.per_second.get());
        let nanos = parts.saturating_add(rate - 1) / rate;
        // A debt can be one of centuries, which no timer takes.
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

fn parts(tokens: u64) -> i128 {
    i128::from(tokens) * PARTS
}

/// Wakes a handler on an I/O thread when it may go on. Anybody may set it, on any thread.
pub(crate) struct Timer(OwnedFd);

impl Timer {
    /// The longest time that is set at once, so that no time is too long for the system.
    const LONGEST: Duration = Duration::from_secs(24 * 3600);

    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Is ready after this time, or after a day.
    pub(crate) fn set(&self, after: Duration) -> io::Result<()> {
        // A time of zero would be none.
        self.set_time(after.clamp(Duration::from_nanos(1), Self::LONGEST))
    }

    /// Is not ready any more.
    pub(crate) fn clear(&self) -> io::Result<()> {
        self.set_time(Duration::ZERO)
    }

    fn set_time(&self, after: Duration) -> io::Result<()> {
        let time = Itimerspec {
            it_interval: Timespec::default(),
            it_value: after.try_into().map_err(io::Error::other)?,
        };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &time)?;
        Ok(())
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    use super::*;
    use crate::test_support::Random;

    fn limit(per_second: u64, burst: u64) -> RateLimit {
        RateLimit {
            per_second: NonZeroU64::new(per_second).unwrap(),
            burst: NonZeroU64::new(burst).unwrap(),
        }
    }

    fn nanos(count: u64) -> Duration {
        Duration::from_nanos(count)
    }

    #[test]
    fn a_bucket_begins_full_and_gets_no_fuller() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(limit(10, 25), start);
        assert_eq!(bucket.available(start), 25);
        assert_eq!(bucket.available(start + Duration::from_secs(100)), 25);
        assert_eq!(bucket.take(25, start + Duration::from_secs(100)), Ok(()));
        assert_eq!(bucket.available(start + Duration::from_secs(101)), 10);
    }

    #[test]
    fn the_wait_that_is_told_is_the_shortest_that_is_enough() {
        let mut random = Random::new(7);
        for _ in 0..1000 {
            let limit = limit(
                1 + random.next() % 3_000_000_000,
                1 + random.next() % 10_000,
            );
            let mut now = Instant::now();
            let mut bucket = TokenBucket::new(limit, now);
            bucket.take(limit.burst.get(), now).unwrap();
            for _ in 0..10 {
                let count = 1 + random.next() % limit.burst.get();
                let Err(wait) = bucket.take(count, now) else {
                    continue;
                };
                assert!(bucket.clone().take(count, now + wait - nanos(1)).is_err());
                now += wait;
                assert_eq!(bucket.take(count, now), Ok(()));
            }
        }
    }

    #[test]
    fn over_any_time_it_gives_what_the_rate_says_and_not_one_more() {
        // A rate that no step divides.
        let limit = limit(999_999_937, 1000);
        let mut random = Random::new(3);
        let start = Instant::now();
        let mut bucket = TokenBucket::new(limit, start);
        let (mut now, mut taken) = (start, 0);
        for _ in 0..100_000 {
            let count = 1 + random.next() % 500;
            if let Err(wait) = bucket.take(count, now) {
                now += wait;
                bucket.take(count, now).unwrap();
            }
            taken += u128::from(count);
            let came = (now - start).as_nanos() * 999_999_937 / 1_000_000_000;
            assert!(taken <= 1000 + came);
            // Nothing but the last wait's rounding is missing.
            assert!(taken + u128::from(bucket.available(now)) >= 1000 + came);
        }
    }

    #[test]
    fn more_than_the_burst_waits_for_a_full_bucket_and_is_paid_for() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(limit(100, 10), start);
        assert_eq!(bucket.take(1, start), Ok(()));
        assert_eq!(bucket.take(110, start), Err(Duration::from_millis(10)));
        let full = start + Duration::from_millis(10);
        assert_eq!(bucket.take(110, full), Ok(()));
        assert_eq!(bucket.available(full), 0);
        assert_eq!(bucket.take(1, full), Err(Duration::from_millis(1010)));
        assert_eq!(bucket.take(0, full), Err(Duration::from_secs(1)));
    }

    #[test]
    fn a_limit_is_changed_while_time_goes_on() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(limit(100, 100), start);
        bucket.take(100, start).unwrap();
        let later = start + Duration::from_millis(500);
        bucket.set_limit(limit(1000, 100), later);
        assert_eq!(bucket.limit(), limit(1000, 100));
        assert_eq!(bucket.available(later), 50);
        assert_eq!(bucket.available(later + Duration::from_millis(10)), 60);
        bucket.set_limit(limit(1, 20), later);
        assert_eq!(bucket.available(later), 20);
    }

    #[test]
    fn no_number_and_no_clock_is_too_much() {
        let start = Instant::now() + Duration::from_secs(1 << 30);
        let mut bucket = TokenBucket::new(limit(u64::MAX, u64::MAX), start);
        assert_eq!(bucket.take(u64::MAX, start), Ok(()));
        let far = start + Duration::from_secs(1 << 40);
        assert_eq!(bucket.available(far), u64::MAX);
        // Back in time.
        assert_eq!(bucket.available(start), u64::MAX);
        assert_eq!(bucket.take(u64::MAX, start), Ok(()));
        assert_eq!(bucket.available(far), 0);

        let mut bucket = TokenBucket::new(limit(1, 1), start);
        assert_eq!(bucket.take(u64::MAX, start), Ok(()));
        assert_eq!(bucket.take(1, start), Err(nanos(u64::MAX)));
    }

    #[test]
    fn a_timer_is_ready_once_and_not_after_it_was_cleared() {
        let timer = Timer::new().unwrap();
        let epoll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll
            .ctl(ControlOperation::Add, timer.as_raw_fd(), event)
            .unwrap();
        let is_ready = |milliseconds| {
            let mut events = [EpollEvent::default()];
            epoll.wait(milliseconds, &mut events).unwrap() == 1
        };
        assert!(!is_ready(0));
        timer.set(Duration::ZERO).unwrap();
        assert!(is_ready(20_000));
        timer.clear().unwrap();
        assert!(!is_ready(0));
        timer.set(Duration::MAX).unwrap();
        assert!(!is_ready(0));
    }
}
