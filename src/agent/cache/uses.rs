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

/// It was not used yet.
const NEVER: u64 = 0;
/// It was used once: what was before that is no pause.
const ONCE: u64 = u64::MAX;

/// The uses of one copy.
#[derive(Debug)]
pub(crate) struct Uses {
    last: AtomicU64,
    /// How long it usually goes without a use, in microseconds; or one of the two below.
    idle: AtomicU64,
}

impl Uses {
    /// None yet. It counts as used at `now`.
    pub(super) const fn new(now: Instant) -> Self {
        Self { last: AtomicU64::new(now.as_micros()), idle: AtomicU64::new(NEVER) }
    }

    /// A request begins to use it.
    pub(super) fn begin(&self, now: Instant) {
        let before = Instant::from_micros(self.last.fetch_max(now.as_micros(), SeqCst));
        let idle = match self.idle.load(Relaxed) {
            NEVER => ONCE,
            _ => {
                let idle = usual_idle(self.idle(), now.since(before));
                u64::try_from(idle.as_micros()).unwrap_or(ONCE).clamp(NEVER + 1, ONCE - 1)
            }
        };
        // Of two at once one may be forgotten.
        self.idle.store(idle, Relaxed);
    }

    /// A request has used it.
    pub(super) fn end(&self, now: Instant) {
        self.last.fetch_max(now.as_micros(), SeqCst);
    }

    /// When it was used last.
    pub(crate) fn last(&self) -> Instant {
        Instant::from_micros(self.last.load(SeqCst))
    }

    /// How long it usually goes without a use, if it was used more than once.
    pub(crate) fn idle(&self) -> Option<Duration> {
        match self.idle.load(Relaxed) {
            NEVER | ONCE => None,
            idle => Some(Duration::from_micros(idle)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_counted_from_the_end_of_a_use_to_the_begin_of_the_next() {
        let (at, micros) = (Instant::from_micros, |micros| Some(Duration::from_micros(micros)));
        let uses = Uses::new(at(100));
        assert_eq!((uses.last(), uses.idle()), (at(100), None));
        uses.begin(at(180));
        uses.end(at(1000));
        assert_eq!((uses.last(), uses.idle()), (at(1000), None), "it was loaded, and not idle");
        uses.begin(at(1080));
        assert_eq!(uses.idle(), micros(80));
        uses.begin(at(1240));
        assert_eq!(uses.idle(), micros(80 - 10 + 20));
        // Another one begins meanwhile, and looked at the clock before.
        uses.begin(at(1239));
        assert_eq!((uses.last(), uses.idle()), (at(1240), micros(81)), "that is a pause of a quarter");
        uses.begin(at(100_000_000));
        assert_eq!(uses.idle(), micros(111), "and this one of four times as much");
    }
}
