//! What the answers of a copy say of it, and a request's place in its counts.
//!
//! The rules of this module: the domain judges; a good answer of a copy that is well costs one look at one word; only
//! what the inference server answered counts, not what a door refused before. That it did not answer in this gateway's own
//! time counts as a failure; a deadline that a client set says nothing.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU8, AtomicU64, Ordering},
};

use super::{
    metrics::Metrics,
    pick::{Picked, Pulse},
    route::Entry,
};
use crate::domain::{
    outlier::{self, Change, Standing, Verdict},
    time::Instant,
    version::Generation,
};

/// What [`Health`]'s word says.
const WELL: u8 = 1;
const ASIDE: u8 = 2;

/// One copy's standing with this gateway.
#[derive(Debug, Default)]
pub(super) struct Health {
    standing: Mutex<Standing>,
    /// The same for those who only look: [`WELL`], [`ASIDE`] or anything else.
    word: AtomicU8,
    /// When a copy that is set aside may be probed, in microseconds since the epoch.
    until: AtomicU64,
}

impl Health {
    pub(super) fn is_well(&self) -> bool {
        self.word.load(Ordering::Relaxed) == WELL
    }

    pub(super) fn is_aside(&self) -> bool {
        self.word.load(Ordering::Relaxed) == ASIDE
    }

    /// Claims the probe of a copy that was set aside long enough.
    pub(super) fn claim_probe(&self, now: impl FnOnce() -> Instant) -> bool {
        if !self.is_aside() {
            return false;
        }
        let now = now();
        if now.as_micros() < self.until.load(Ordering::Relaxed) {
            return false;
        }
        let mut standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(next) = outlier::claim(*standing, now) else { return false };
        self.stands(&mut standing, next);
        true
    }

    fn judge(&self, verdict: Verdict, probe: bool, others_well: bool, now: Instant) -> Option<Change> {
        let mut standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        let (next, change) = outlier::judge(*standing, verdict, probe, others_well, now);
        self.stands(&mut standing, next);
        change
    }

    /// Keeps how it stands, also for those who only look.
    fn stands(&self, standing: &mut Standing, next: Standing) {
        *standing = next;
        let word = match next {
            Standing::Unknown | Standing::Failing { .. } => 0,
            Standing::Well => WELL,
            Standing::Aside { until, .. } => {
                self.until.store(until.as_micros(), Ordering::Relaxed);
                ASIDE
            }
        };
        self.word.store(word, Ordering::Relaxed);
    }
}

/// The verdict on an answer's HTTP status. What the client did wrong says nothing, and neither does a lack of capacity.
pub(super) const fn of_http(status: http::StatusCode) -> Option<Verdict> {
    match status.as_u16() {
        ..400 => Some(Verdict::Good),
        400..=499 | 501 | 503 => None,
        _ => Some(Verdict::Error),
    }
}

/// The verdict on a `grpc-status`: INTERNAL, UNKNOWN, UNAVAILABLE and DATA_LOSS are the server's failures.
pub(super) fn of_grpc(status: &[u8]) -> Option<Verdict> {
    match status {
        b"0" => Some(Verdict::Good),
        b"2" | b"13" | b"14" | b"15" => Some(Verdict::Error),
        _ => None,
    }
}

/// One request's place in a copy's count, and what its answer says of the copy.
#[derive(Debug)]
pub(super) struct Flight {
    pulse: Arc<Pulse>,
    entry: Arc<Entry>,
    generation: Generation,
    probe: bool,
    /// Whether the answer counts.
    counts: bool,
}

impl Flight {
    pub(super) fn board(entry: &Arc<Entry>, picked: &Picked<'_>) -> Self {
        let pulse = Arc::clone(&picked.place.pulse);
        pulse.in_flight.fetch_add(1, Ordering::Relaxed);
        let generation = picked.place.generation;
        Self { pulse, entry: Arc::clone(entry), generation, probe: picked.probe, counts: true }
    }

    /// The answer is the door's, not the inference server's.
    pub(super) const fn refused(mut self) -> Self {
        self.counts = false;
        self
    }

    /// The answer is `verdict`.
    pub(super) fn judged(&mut self, verdict: Verdict, metrics: &Metrics, now: impl FnOnce() -> Instant) {
        let health = &self.pulse.health;
        if !self.counts || verdict == Verdict::Good && health.is_well() {
            return;
        }
        self.counts = false;
        let share = self.entry.shares.iter().find(|share| share.version == self.generation.version);
        let places = share.map_or(&[][..], |share| &share.places);
        let others_well =
            places.iter().any(|place| place.generation != self.generation && place.pulse.health.is_well());
        let (model, copy) = (&self.entry.model, self.generation);
        let replica = || places.iter().find(|place| place.generation == copy).map(|place| place.replica.to_string());
        match health.judge(verdict, self.probe, others_well, now()) {
            Some(Change::SetAside) => {
                metrics.set_aside.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(
                    %model, %copy, replica = replica(), errors = outlier::ERRORS,
                    "a copy is set aside: it answers with errors while others of its version answer well"
                );
            }
            Some(Change::Back) => {
                tracing::info!(%model, %copy, replica = replica(), "a copy that was set aside answers well again");
            }
            None => {}
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.pulse.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
