//! How a copy is used: when last, and how often.
//!
//! The rule of this module: a use costs a constant, and nobody waits for anybody.

use std::{
    sync::atomic::{
        AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
    time::Duration,
};

use crate::domain::{residency::usual_idle, time::Instant};

/// The uses of one copy.
#[derive(Debug)]
pub(crate) struct Uses {
    last: AtomicU64,
    /// How long it usually goes without a use, in microseconds; 0 when it was not used yet.
    idle: AtomicU64,
}

impl Uses {
    /// None yet. It counts as used at `now`.
    pub(super) const fn new(now: Instant) -> Self {
        Self { last: AtomicU64::new(now.as_micros()), idle: AtomicU64::new(0) }
    }

    /// A request begins to use it.
    pub(super) fn begin(&self, now: Instant) {
        let before = Instant::from_micros(self.last.fetch_max(now.as_micros(), SeqCst));
        let idle = usual_idle(self.idle(), now.since(before));
        // Of two at once one may be forgotten.
        self.idle.store(u64::try_from(idle.as_micros()).unwrap_or(u64::MAX).max(1), Relaxed);
    }

    /// A request has used it.
    pub(super) fn end(&self, now: Instant) {
        self.last.fetch_max(now.as_micros(), SeqCst);
    }

    /// When it was used last.
    pub(crate) fn last(&self) -> Instant {
        Instant::from_micros(self.last.load(SeqCst))
    }

    /// How long it usually goes without a use, if it was used yet.
    pub(crate) fn idle(&self) -> Option<Duration> {
        Some(Duration::from_micros(self.idle.load(Relaxed))).filter(|idle| !idle.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_counted_from_the_end_of_a_use_to_the_begin_of_the_next() {
        let at = Instant::from_micros;
        let uses = Uses::new(at(100));
        assert_eq!((uses.last(), uses.idle()), (at(100), None));
        uses.begin(at(180));
        uses.end(at(1000));
        assert_eq!((uses.last(), uses.idle()), (at(1000), Some(Duration::from_micros(80))));
        uses.begin(at(1880));
        assert_eq!(uses.idle(), Some(Duration::from_micros(80 - 10 + 110)));
        // Another one begins meanwhile, and looked at the clock before.
        uses.begin(at(1879));
        assert_eq!((uses.last(), uses.idle()), (at(1880), Some(Duration::from_micros(157))));
    }
}
