//! How long one kind of work takes, as a moving figure that any thread may add to.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Durations of one kind of work: their moving average, the shortest of late and the longest, their number.
#[derive(Debug, Default)]
pub struct Durations {
    average: AtomicU64,
    /// 0 before the first.
    min: AtomicU64,
    max: AtomicU64,
    count: AtomicU64,
}

impl Durations {
    /// Takes one more in; it weighs a quarter of the average.
    pub fn record(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        self.max.fetch_max(micros, Ordering::Relaxed);
        let first = self.count.fetch_add(1, Ordering::Relaxed) == 0;
        let blend = |average: u64| if first { micros } else { average - average / 4 + micros / 4 };
        // A lost race with another load costs one sample of an estimate.
        self.average.store(blend(self.average.load(Ordering::Relaxed)), Ordering::Relaxed);
        let min = self.min.load(Ordering::Relaxed);
        let min = if first { micros } else { micros.min(min.saturating_add(min / 8 + 1)) };
        self.min.store(min, Ordering::Relaxed);
    }

    /// The moving average, once there is one.
    #[must_use]
    pub fn average(&self) -> Option<Duration> {
        match self.average.load(Ordering::Relaxed) {
            0 => None,
            micros => Some(Duration::from_micros(micros)),
        }
    }

    /// The shortest of late, once there is one: what the work takes where nothing else is done. One that is not seen again
    /// counts an eighth more with each that comes.
    #[must_use]
    pub fn min(&self) -> Option<Duration> {
        match self.min.load(Ordering::Relaxed) {
            0 => None,
            micros => Some(Duration::from_micros(micros)),
        }
    }

    /// The longest.
    #[must_use]
    pub fn max(&self) -> Duration {
        Duration::from_micros(self.max.load(Ordering::Relaxed))
    }

    /// How many.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_follows_and_the_extremes_stay() {
        let durations = Durations::default();
        assert_eq!((durations.average(), durations.min()), (None, None));
        durations.record(Duration::from_secs(8));
        assert_eq!(durations.average(), Some(Duration::from_secs(8)));
        for _ in 0..40 {
            durations.record(Duration::from_secs(2));
        }
        let average = durations.average().expect("measured");
        assert!(average > Duration::from_millis(1900) && average < Duration::from_millis(2100), "{average:?}");
        assert_eq!((durations.max(), durations.count()), (Duration::from_secs(8), 41));
        assert_eq!(durations.min(), Some(Duration::from_secs(2)));
        durations.record(Duration::from_millis(1));
        assert_eq!(durations.min(), Some(Duration::from_millis(1)));
        for _ in 0..80 {
            durations.record(Duration::from_secs(2));
        }
        assert_eq!(durations.min(), Some(Duration::from_secs(2)), "that one was a mistake");
    }
}
