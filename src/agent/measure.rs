//! How long loads take, so that whoever must wait can be told for how long.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Durations of one kind of work: their moving average, their maximum, their number.
#[derive(Debug, Default)]
pub(crate) struct Durations {
    average: AtomicU64,
    max: AtomicU64,
    count: AtomicU64,
}

impl Durations {
    /// Takes one more in; it weighs a quarter of the average.
    pub(crate) fn record(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        self.max.fetch_max(micros, Ordering::Relaxed);
        let first = self.count.fetch_add(1, Ordering::Relaxed) == 0;
        let blend = |average: u64| if first { micros } else { average - average / 4 + micros / 4 };
        // A lost race with another load costs one sample of an estimate.
        self.average.store(blend(self.average.load(Ordering::Relaxed)), Ordering::Relaxed);
    }

    /// The moving average, once there is one.
    pub(crate) fn average(&self) -> Option<Duration> {
        match self.average.load(Ordering::Relaxed) {
            0 => None,
            micros => Some(Duration::from_micros(micros)),
        }
    }

    /// The longest.
    pub(crate) fn max(&self) -> Duration {
        Duration::from_micros(self.max.load(Ordering::Relaxed))
    }

    /// How many.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

/// Seconds after which another try makes sense: what is left of a load that should take `expected` and has
/// run for `elapsed`, rounded up; a load that is late is expected to take as long again.
pub(crate) fn retry_after(expected: Option<Duration>, elapsed: Duration) -> u64 {
    const LONGEST: u64 = 300;
    let expected = expected.unwrap_or(Duration::from_secs(1));
    let left = match expected.saturating_sub(elapsed) {
        Duration::ZERO => expected,
        left => left,
    };
    let whole = left.as_secs() + u64::from(left.subsec_nanos() > 0);
    whole.clamp(1, LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_follows_and_the_maximum_stays() {
        let durations = Durations::default();
        assert_eq!(durations.average(), None);
        durations.record(Duration::from_secs(8));
        assert_eq!(durations.average(), Some(Duration::from_secs(8)));
        for _ in 0..40 {
            durations.record(Duration::from_secs(2));
        }
        let average = durations.average().expect("measured");
        assert!(average > Duration::from_millis(1900) && average < Duration::from_millis(2100), "{average:?}");
        assert_eq!((durations.max(), durations.count()), (Duration::from_secs(8), 41));
    }

    #[test]
    fn a_waiter_is_told_what_is_left() {
        let seconds = Duration::from_secs;
        assert_eq!(retry_after(None, Duration::ZERO), 1);
        assert_eq!(retry_after(Some(seconds(10)), seconds(4)), 6);
        assert_eq!(retry_after(Some(Duration::from_millis(2500)), Duration::ZERO), 3);
        assert_eq!(retry_after(Some(seconds(10)), seconds(30)), 10);
        assert_eq!(retry_after(Some(seconds(9000)), Duration::ZERO), 300);
    }
}
