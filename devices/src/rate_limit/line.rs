//! Who may go on, and who has to wait: the rules by which those that share a limit take turns.
//! It knows no clock and no threads.

use std::time::{Duration, Instant};

use super::{RateLimits, TokenBucket};

/// How long the first in line keeps those behind it waiting once it could go on. It is to come at
/// once, and does not where its work was ended.
const GRACE: Duration = Duration::from_secs(1);

/// What is to be done: an operation of so many bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    pub(super) bytes: u64,
    /// What there is to do is known only afterwards: it goes on with the first token that there is,
    /// and is charged later, or not at all.
    pub(super) charged_later: bool,
}

/// What one who asks is told.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer<W> {
    /// Go on. The one who is first in line now has to ask again, if there is one.
    Go { next: Option<W> },
    /// Ask again after this time, or earlier if told.
    Wait {
        time: Duration,
        /// It did not wait before.
        is_new: bool,
    },
}

/// The buckets of a limit, and those that wait for them: first come, first served, so that nobody
/// starves who wants more than others.
#[derive(Debug)]
pub(super) struct Line<W> {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
    /// Those that wait, and since when the first could go on.
    waiting: Vec<(W, Instant)>,
}

impl<W: Clone + PartialEq> Line<W> {
    pub(super) fn new(limits: RateLimits, now: Instant) -> Self {
        let bucket = |limit| TokenBucket::new(limit, now);
        Self {
            bandwidth: limits.bandwidth.map(bucket),
            ops: limits.ops.map(bucket),
            waiting: Vec::new(),
        }
    }

    pub(super) fn limits(&self) -> RateLimits {
        RateLimits {
            bandwidth: self.bandwidth.as_ref().map(TokenBucket::limit),
            ops: self.ops.as_ref().map(TokenBucket::limit),
        }
    }

    /// Changes the limits, and gives those that waited and have to ask again. What was done counts
    /// on, where there was a limit of that kind.
    pub(super) fn set_limits(&mut self, limits: RateLimits, now: Instant) -> Vec<W> {
        for (bucket, limit) in [
            (&mut self.bandwidth, limits.bandwidth),
            (&mut self.ops, limits.ops),
        ] {
            match (bucket.as_mut(), limit) {
                (Some(bucket), Some(limit)) => bucket.set_limit(limit, now),
                _ => *bucket = limit.map(|limit| TokenBucket::new(limit, now)),
            }
        }
        self.waiting.drain(..).map(|(who, _)| who).collect()
    }

    /// Whether `who` may go on with this work.
    pub(super) fn ask(&mut self, who: &W, work: Work, now: Instant) -> Answer<W> {
        // One that has nothing to wait for any more, and does not come.
        while let Some((first, due)) = self.waiting.first()
            && first != who
            && now.saturating_duration_since(*due) > GRACE
        {
            self.waiting.remove(0);
        }
        let place = self.waiting.iter().position(|(waits, _)| waits == who);
        let time = match self.waiting.first() {
            Some((first, due)) if first != who => due.saturating_duration_since(now) + GRACE,
            _ => self.time_for(work, now),
        };
        if time.is_zero() {
            if !work.charged_later {
                self.charge(work.bytes, now);
            }
            return Answer::Go {
                next: self.leave(who, now),
            };
        }
        // A time that the clock has no room for is far enough away.
        let due = now.checked_add(time).unwrap_or(now);
        match place {
            Some(place) => self.waiting[place].1 = due,
            None => self.waiting.push((who.clone(), due)),
        }
        Answer::Wait {
            time,
            is_new: place.is_none(),
        }
    }

    /// Takes what an operation of so many bytes needs.
    pub(super) fn charge(&mut self, bytes: u64, now: Instant) {
        for (bucket, count) in [(&mut self.bandwidth, bytes), (&mut self.ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.charge(count, now);
            }
        }
    }

    /// `who` does not wait any more. Gives the one who is first then and has to ask again.
    pub(super) fn leave(&mut self, who: &W, now: Instant) -> Option<W> {
        let place = self.waiting.iter().position(|(waits, _)| waits == who)?;
        self.waiting.remove(place);
        let (first, due) = self.waiting.first_mut().filter(|_| place == 0)?;
        *due = now;
        Some(first.clone())
    }

    fn time_for(&mut self, work: Work, now: Instant) -> Duration {
        let bytes = if work.charged_later { 1 } else { work.bytes };
        let mut time = Duration::ZERO;
        for (bucket, count) in [(&mut self.bandwidth, bytes), (&mut self.ops, 1)] {
            if let Some(bucket) = bucket
                && count > 0
            {
                time = time.max(bucket.time_for(count, now));
            }
        }
        time
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use proptest::prelude::*;

    use super::super::RateLimit;
    use super::*;

    fn limit(per_second: u64, burst: u64) -> RateLimit {
        RateLimit {
            per_second: NonZeroU64::new(per_second).unwrap(),
            burst: NonZeroU64::new(burst).unwrap(),
        }
    }

    fn work(bytes: u64) -> Work {
        Work {
            bytes,
            charged_later: false,
        }
    }

    fn bytes_a_second(per_second: u64) -> RateLimits {
        RateLimits {
            bandwidth: Some(limit(per_second, per_second)),
            ops: None,
        }
    }

    fn wait(milliseconds: u64, is_new: bool) -> Answer<u32> {
        Answer::Wait {
            time: Duration::from_millis(milliseconds),
            is_new,
        }
    }

    #[test]
    fn who_wants_more_does_not_starve_behind_those_who_want_less() {
        let start = Instant::now();
        let mut line = Line::new(bytes_a_second(1000), start);
        assert_eq!(line.ask(&1, work(1000), start), Answer::Go { next: None });
        // All that there ever is at once; and another comes, for whom there would be enough soon.
        assert_eq!(line.ask(&1, work(1000), start), wait(1000, true));
        let later = start + Duration::from_millis(500);
        assert_eq!(line.ask(&2, work(10), later), wait(500 + 1000, true));
        assert_eq!(line.ask(&3, work(10), later), wait(500 + 1000, true));
        let due = start + Duration::from_secs(1);
        let next = Some(2);
        assert_eq!(line.ask(&1, work(1000), due), Answer::Go { next });
        assert_eq!(line.ask(&2, work(10), due), wait(10, false));
        let due = due + Duration::from_millis(10);
        let next = Some(3);
        assert_eq!(line.ask(&2, work(10), due), Answer::Go { next });
    }

    #[test]
    fn one_that_does_not_come_is_not_waited_for() {
        let start = Instant::now();
        let mut line = Line::new(bytes_a_second(1000), start);
        assert_eq!(line.ask(&1, work(1000), start), Answer::Go { next: None });
        assert_eq!(line.ask(&1, work(100), start), wait(100, true));
        assert_eq!(line.ask(&2, work(100), start), wait(1100, true));
        // As long as it is told to wait is long enough.
        let late = start + Duration::from_millis(1101);
        assert_eq!(line.ask(&2, work(100), late), Answer::Go { next: None });
    }

    #[test]
    fn one_that_leaves_lets_the_next_go_on() {
        let start = Instant::now();
        let mut line = Line::new(bytes_a_second(1000), start);
        assert_eq!(line.ask(&1, work(1000), start), Answer::Go { next: None });
        line.ask(&1, work(1000), start);
        line.ask(&2, work(100), start);
        line.ask(&3, work(100), start);
        assert_eq!(line.leave(&3, start), None);
        assert_eq!(line.leave(&4, start), None);
        assert_eq!(line.leave(&1, start), Some(2));
        assert_eq!(line.ask(&2, work(100), start), wait(100, false));
    }

    #[test]
    fn both_kinds_of_limit_hold_and_nothing_is_taken_in_vain() {
        let limits = RateLimits {
            bandwidth: Some(limit(1000, 100)),
            ops: Some(limit(10, 2)),
        };
        let start = Instant::now();
        let mut line = Line::new(limits, start);
        assert_eq!(line.ask(&1, work(100), start), Answer::Go { next: None });
        // A flush has no bytes.
        assert_eq!(line.ask(&1, work(0), start), Answer::Go { next: None });
        assert_eq!(line.ask(&1, work(0), start), wait(100, true));
        assert_eq!(line.ask(&1, work(200), start), wait(100, false));
        let due = start + Duration::from_millis(100);
        assert_eq!(line.ask(&1, work(200), due), Answer::Go { next: None });
        // More than the burst was let through, and is paid for.
        let due = due + Duration::from_millis(100);
        assert_eq!(line.ask(&1, work(1), due), wait(1, true));
    }

    #[test]
    fn what_is_charged_later_is_paid_before_anything_else() {
        let start = Instant::now();
        let mut line = Line::new(bytes_a_second(1000), start);
        let later = Work {
            bytes: 0,
            charged_later: true,
        };
        assert_eq!(line.ask(&1, later, start), Answer::Go { next: None });
        line.charge(1500, start);
        assert_eq!(line.ask(&1, later, start), wait(501, true));
    }

    #[test]
    fn whoever_waits_asks_again_when_the_limits_change() {
        let start = Instant::now();
        let mut line = Line::new(bytes_a_second(1), start);
        assert_eq!(line.ask(&1, work(100), start), Answer::Go { next: None });
        assert_eq!(line.ask(&1, work(1), start), wait(100_000, true));
        line.ask(&2, work(1), start);
        let asked_again = line.set_limits(bytes_a_second(1000), start);
        assert_eq!(asked_again, [1, 2]);
        assert_eq!(line.limits(), bytes_a_second(1000));
        // What was done before is not forgotten.
        assert_eq!(line.ask(&2, work(1), start), wait(100, true));
        assert_eq!(line.set_limits(RateLimits::default(), start), [2]);
        let much = work(u64::MAX);
        assert_eq!(line.ask(&1, much, start), Answer::Go { next: None });
    }

    /// Something that was done, and when.
    type Done = (Duration, u64);

    /// Lets `queues` that always have something to do share a limit, on a clock of its own, and
    /// gives what was done when.
    fn simulate(limits: RateLimits, queues: usize, sizes: &[u64]) -> Vec<Done> {
        let start = Instant::now();
        let mut line = Line::new(limits, start);
        let mut now = start;
        // When each queue asks next.
        let mut asks = vec![start; queues];
        let mut sizes = sizes.iter().copied();
        let mut wanted: Vec<Option<u64>> = (0..queues).map(|_| sizes.next()).collect();
        let mut done = Vec::new();
        while let Some(queue) = (0..queues)
            .filter(|queue| wanted[*queue].is_some())
            .min_by_key(|queue| asks[*queue])
        {
            now = now.max(asks[queue]);
            let bytes = wanted[queue].unwrap();
            match line.ask(&queue, work(bytes), now) {
                Answer::Go { next } => {
                    done.push((now - start, bytes));
                    wanted[queue] = sizes.next();
                    asks[queue] = now;
                    if wanted[queue].is_none() {
                        assert_eq!(line.leave(&queue, now), None);
                    }
                    if let Some(next) = next {
                        asks[next] = now;
                    }
                }
                Answer::Wait { time, .. } => {
                    assert!(time > Duration::ZERO);
                    asks[queue] = now + time;
                }
            }
        }
        done
    }

    /// The most that was counted of what was done in any time, above what came in that time.
    fn excess(done: &[Done], limit: RateLimit, count: impl Fn(u64) -> u64) -> u128 {
        let mut worst = 0;
        for (index, (from, _)) in done.iter().enumerate() {
            let mut sum = 0;
            for (to, bytes) in &done[index..] {
                sum += u128::from(count(*bytes));
                let came = (*to - *from).as_nanos() * u128::from(limit.per_second.get());
                worst = worst.max((sum * 1_000_000_000).saturating_sub(came));
            }
        }
        worst.div_ceil(1_000_000_000)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_time_has_more_than_the_burst_and_what_comes_in_it(
            rate in 1..10_000_000_000_u64,
            burst in 1..1_000_000_u64,
            ops_rate in 1..100_000_u64,
            ops_burst in 1..50_u64,
            queues in 1..6_usize,
            sizes in prop::collection::vec(0..1_500_000_u64, 1..80),
        ) {
            let limits = RateLimits {
                bandwidth: Some(limit(rate, burst)),
                ops: Some(limit(ops_rate, ops_burst)),
            };
            let done = simulate(limits, queues, &sizes);
            prop_assert_eq!(done.len(), sizes.len());
            // What is larger than the burst goes at once, and is paid for afterwards.
            let largest = sizes.iter().copied().max().unwrap_or(0).max(burst);
            prop_assert!(excess(&done, limits.bandwidth.unwrap(), |bytes| bytes) <= u128::from(largest));
            prop_assert!(excess(&done, limits.ops.unwrap(), |_| 1) <= u128::from(ops_burst));
        }

        #[test]
        fn whoever_always_has_something_to_do_gets_all_that_comes(
            rate in 1_000..1_000_000_000_u64,
            queues in 1..6_usize,
            sizes in prop::collection::vec(1..1_000_u64, 20..200),
        ) {
            let limits = bytes_a_second(rate);
            let done = simulate(limits, queues, &sizes);
            let all: u64 = sizes.iter().sum();
            let (last, _) = done.last().unwrap();
            // The burst at once, the rest as it comes, with the rounding of each wait.
            let needed = u128::from(all.saturating_sub(rate)) * 1_000_000_000;
            let slack = (sizes.len() as u128) * u128::from(rate);
            prop_assert!(last.as_nanos() * u128::from(rate) >= needed);
            prop_assert!(last.as_nanos() * u128::from(rate) <= needed + slack);
        }
    }
}
