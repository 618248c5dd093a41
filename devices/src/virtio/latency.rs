//! How long something took, as a histogram that is written without a lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The bound of the first bucket, in nanoseconds, as a power of two: 256 ns.
const FIRST: u32 = 8;
/// The buckets with a bound, each twice the one before: the last is 2^33 ns, about 8.6 s.
const BOUNDED: usize = 26;

/// A histogram of durations in buckets of powers of two nanoseconds. Recording takes neither a
/// lock nor memory.
#[derive(Debug, Default)]
pub struct LatencyHistogram {
    buckets: [AtomicU64; BOUNDED + 1],
    sum: AtomicU64,
}

/// What a [`LatencyHistogram`] holds.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LatencySnapshot {
    /// For each bucket the longest duration that belongs to it, in nanoseconds, and how many there
    /// were; `None` stands for all that were longer than the bounds before.
    pub buckets: Vec<(Option<u64>, u64)>,
    /// The sum of all durations, in nanoseconds. It may be a few durations away from the buckets,
    /// where some were recorded meanwhile.
    pub sum_ns: u64,
}

impl LatencyHistogram {
    /// Counts a duration.
    pub fn record(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(nanos)].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(nanos, Ordering::Relaxed);
    }

    /// Counts how long `f` takes.
    pub fn time<R>(&self, f: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = f();
        self.record(start.elapsed());
        result
    }

    /// What was counted so far; it can be asked for at any time.
    pub fn snapshot(&self) -> LatencySnapshot {
        let bound = |index: usize| (index < BOUNDED).then(|| 1 << (FIRST as usize + index));
        let counts = self
            .buckets
            .iter()
            .map(|count| count.load(Ordering::Relaxed));
        LatencySnapshot {
            buckets: counts.enumerate().map(|(i, n)| (bound(i), n)).collect(),
            sum_ns: self.sum.load(Ordering::Relaxed),
        }
    }
}

/// The first bucket whose bound is not below this.
fn bucket(nanos: u64) -> usize {
    // The logarithm to base two, rounded up.
    let log = u64::BITS - nanos.saturating_sub(1).leading_zeros();
    (log.saturating_sub(FIRST) as usize).min(BOUNDED)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(histogram: &LatencyHistogram) -> Vec<(Option<u64>, u64)> {
        let buckets = histogram.snapshot().buckets;
        buckets
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    #[test]
    fn a_bound_belongs_to_its_bucket_and_one_more_to_the_next() {
        let bounds: Vec<_> = LatencyHistogram::default().snapshot().buckets;
        assert_eq!(bounds.len(), 27);
        assert_eq!(bounds[0], (Some(256), 0));
        assert_eq!(bounds[25], (Some(1 << 33), 0));
        assert_eq!(bounds[26], (None, 0));
        for pair in bounds.windows(2) {
            let bound = pair[0].0.unwrap();
            for (nanos, expected) in [(bound, Some(bound)), (bound + 1, pair[1].0)] {
                let histogram = LatencyHistogram::default();
                histogram.record(Duration::from_nanos(nanos));
                assert_eq!(filled(&histogram), [(expected, 1)], "{nanos} ns");
                assert_eq!(histogram.snapshot().sum_ns, nanos);
            }
        }
    }

    #[test]
    fn the_shortest_and_the_longest_have_a_bucket_too() {
        let histogram = LatencyHistogram::default();
        histogram.record(Duration::ZERO);
        histogram.record(Duration::from_nanos(1));
        histogram.record(Duration::MAX);
        assert_eq!(filled(&histogram), [(Some(256), 2), (None, 1)]);
    }

    #[test]
    fn what_several_threads_record_is_all_there() {
        let histogram = LatencyHistogram::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope
                    .spawn(|| (0..10_000).for_each(|_| histogram.record(Duration::from_micros(1))));
            }
        });
        assert_eq!(filled(&histogram), [(Some(1024), 40_000)]);
        assert_eq!(histogram.snapshot().sum_ns, 40_000_000);
    }

    #[test]
    fn what_is_timed_takes_as_long_as_it_takes() {
        let histogram = LatencyHistogram::default();
        let slept = Duration::from_millis(20);
        assert_eq!(histogram.time(|| (std::thread::sleep(slept), 7).1), 7);
        assert!(histogram.snapshot().sum_ns >= slept.as_nanos() as u64);
    }
}
