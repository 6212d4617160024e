//! One copy as requests see it: its phase and the number of its holds, in one atomic word.
//!
//! The rules of this module: a hold is taken and given back without a lock; eviction succeeds only on a word
//! that says resident with no hold, so the two can't cross. A request that waits for an evicted copy already
//! holds it, so what is brought back for it is not evicted again before its turn.

use std::{
    fmt,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    agent::{
        artifacts::Artifact,
        cache::{
            phase::{InServer, Phase, Stage, holds_of},
            pressure::Pressure,
            uses::Uses,
        },
    },
    domain::{
        copy::{Failure, Report, Residency},
        memory::{Bytes, Resources},
        names::ModelName,
        order::Order,
        size::{Size, SizeKey, Trust},
        spec::ModelSpec,
        time::Instant,
        version::{Generation, served_name},
    },
    ports::Clock,
    telemetry::durations::Durations,
};

/// Why a copy leaves.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fate {
    /// How long holds may keep it, once it was unregistered.
    pub(crate) drain: Option<Duration>,
    /// What went wrong, if something did.
    pub(crate) failure: Option<Failure>,
}

/// What a copy is taken for.
#[derive(Debug)]
struct Weight {
    size: Size,
    measured: bool,
}

/// One copy that the agent was ordered to hold.
pub(crate) struct Entry {
    pub(crate) model: ModelName,
    pub(crate) generation: Generation,
    pub(crate) spec: Arc<ModelSpec>,
    /// What the scheduler counts it for.
    ordered: Resources,
    /// Whether that was measured, so that it is of all instances together.
    ordered_measured: bool,
    /// What counts where another amount is declared.
    trust: Trust,
    /// What it was found to take.
    weight: ArcSwapOption<Weight>,
    /// How often it was to be measured while nothing else was loaded.
    weighings: AtomicU32,
    /// How often the inference server holds it in memory, once that is known.
    instances: AtomicU32,
    /// Whether it is never evicted.
    pinned: AtomicBool,
    pub(crate) attempt: u32,
    /// The name by which the inference server knows it.
    pub(crate) served: String,
    word: AtomicU64,
    uses: Uses,
    reload_began: AtomicU64,
    resident_since: AtomicU64,
    verified: AtomicU64,
    /// When the inference server last broke a request of it off.
    broke_off: AtomicU64,
    /// Requests that wait for it to come back.
    pub(crate) waiting: AtomicU32,
    /// The phase, or the number of holds of a draining copy, changed.
    pub(crate) changed: Notify,
    /// It is to leave.
    pub(crate) stop: CancellationToken,
    /// What still holds it is to end.
    pub(crate) ended: CancellationToken,
    /// Serialises what is asked of the inference server about it.
    pub(crate) in_server: tokio::sync::Mutex<InServer>,
    pub(crate) loads: Durations,
    pub(crate) artifact: Mutex<Option<Artifact>>,
    stage: Mutex<Stage>,
    fate: Mutex<Fate>,
    pressure: Arc<Pressure>,
    clock: Arc<dyn Clock>,
}

/// What an attempt to hold a copy found.
#[derive(Debug)]
pub(crate) enum Acquired {
    /// It is in memory.
    Ready(Hold),
    /// It is not, and comes back.
    Waiting(Hold),
    /// It can't be held.
    NotHere,
}

/// A request's claim on a copy. While one is out the copy is not evicted or unloaded.
pub(crate) struct Hold(Arc<Entry>);

impl Hold {
    pub(crate) fn entry(&self) -> &Arc<Entry> {
        &self.0
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hold({})", self.0.generation)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entry({} {} {:?} holds {})", self.model, self.generation, self.phase(), self.holds())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Entry {
    pub(crate) fn new(
        (model, generation): (ModelName, Generation),
        (spec, need, attempt, ordered_measured, trust): (Arc<ModelSpec>, Resources, u32, bool, Trust),
        pressure: Arc<Pressure>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            served: served_name(&model, generation.version),
            model,
            generation,
            spec,
            ordered: need,
            ordered_measured,
            trust,
            weight: ArcSwapOption::empty(),
            weighings: AtomicU32::new(0),
            instances: AtomicU32::new(1),
            pinned: AtomicBool::new(false),
            attempt,
            word: AtomicU64::new(Phase::Preparing.with(0)),
            uses: Uses::new(clock.now()),
            reload_began: AtomicU64::new(0),
            resident_since: AtomicU64::new(0),
            verified: AtomicU64::new(0),
            broke_off: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            changed: Notify::new(),
            stop: CancellationToken::new(),
            ended: CancellationToken::new(),
            in_server: tokio::sync::Mutex::new(InServer::No),
            loads: Durations::default(),
            artifact: Mutex::new(None),
            stage: Mutex::new(Stage::Scheduled),
            fate: Mutex::new(Fate::default()),
            pressure,
            clock,
        }
    }

    /// Memory that it takes. What was measured of it; where memory is declared, whichever is to count. Until there is a
    /// measurement, a guess where nothing is declared; else what the scheduler counts it for, as often as the inference
    /// server holds it, unless the scheduler knew of that.
    pub(crate) fn need(&self) -> Resources {
        let declared = self.spec.memory.is_some_and(|bytes| bytes != Bytes::ZERO);
        match self.weight.load().as_deref() {
            Some(Weight { size, measured: true }) if declared => match self.trust {
                Trust::Declared => self.expected(),
                Trust::Measured => size.bytes.clone(),
                Trust::Larger => self.expected().max(&size.bytes),
            },
            Some(Weight { size, measured: true }) => size.bytes.clone(),
            Some(Weight { size, measured: false }) if !declared && !self.ordered_measured => size.bytes.clone(),
            Some(Weight { measured: false, .. }) | None => self.expected(),
        }
    }

    fn expected(&self) -> Resources {
        match (&self.spec.runtime, self.instances()) {
            (None, instances @ 2..) if !self.ordered_measured => self.ordered.times(instances),
            (Some(_) | None, _) => self.ordered.clone(),
        }
    }

    /// It is of this size. A measurement stays over any guess.
    pub(crate) fn weighed(&self, size: Size, measured: bool) {
        if measured || self.size().is_none() {
            self.weight.store(Some(Arc::new(Weight { size, measured })));
        }
    }

    /// What it was found to take, and whether that was measured.
    pub(crate) fn weight(&self) -> Option<(Size, bool)> {
        self.weight.load().as_deref().map(|weight| (weight.size.clone(), weight.measured))
    }

    /// What was measured of it.
    pub(crate) fn size(&self) -> Option<Size> {
        self.weight.load().as_deref().filter(|weight| weight.measured).map(|weight| weight.size.clone())
    }

    /// What it takes in the memory of its server, whatever is declared: what was measured, or else the most that anybody
    /// takes it for. What it does not take must not be said to have leaked for want of a measurement.
    pub(crate) fn takes(&self) -> Bytes {
        match self.weight() {
            Some((size, true)) => size.bytes.primary,
            Some((size, false)) if !self.ordered_measured => self.need().max(&size.bytes).primary,
            Some((_, false)) | None => self.expected().primary,
        }
    }

    /// What would be measured of it, if it was not yet.
    pub(crate) fn unweighed(&self) -> Option<SizeKey> {
        self.weight.load().as_deref().filter(|weight| !weight.measured).map(|weight| weight.size.key.clone())
    }

    /// Whether neither this agent nor the scheduler knows what it takes.
    pub(crate) fn is_unweighed(&self) -> bool {
        !self.ordered_measured && self.unweighed().is_some()
    }

    /// Counts one more try to measure it while nothing else is loaded. False when there were enough: where loads show
    /// nothing that counts, others are not to wait at each of them.
    pub(crate) fn tries_to_be_weighed(&self) -> bool {
        const TRIES: u32 = 2;
        self.weighings.fetch_update(SeqCst, SeqCst, |tries| (tries < TRIES).then(|| tries + 1)).is_ok()
    }

    /// How often the inference server holds it in memory. To be told before it has room in the ledger.
    pub(crate) fn set_instances(&self, instances: u32) {
        self.instances.store(instances, SeqCst);
    }

    pub(crate) fn instances(&self) -> u32 {
        self.instances.load(SeqCst)
    }

    /// Whether it is never evicted.
    pub(crate) fn is_pinned(&self) -> bool {
        self.pinned.load(SeqCst)
    }

    /// From now on it is never evicted, or may be again. Says whether that is news.
    pub(crate) fn set_pinned(&self, pinned: bool) -> bool {
        let news = self.pinned.swap(pinned, SeqCst) != pinned;
        if news {
            self.pressure.eased();
        }
        news
    }

    pub(crate) fn phase(&self) -> Phase {
        Phase::of(self.word.load(SeqCst))
    }

    pub(crate) fn holds(&self) -> u32 {
        holds_of(self.word.load(SeqCst))
    }

    /// Phase and holds of one and the same moment.
    pub(crate) fn snapshot(&self) -> (Phase, u32) {
        let word = self.word.load(SeqCst);
        (Phase::of(word), holds_of(word))
    }

    pub(crate) const fn uses(&self) -> &Uses {
        &self.uses
    }

    /// Since when it is in memory.
    pub(crate) fn resident_since(&self) -> Instant {
        Instant::from_micros(self.resident_since.load(SeqCst))
    }

    pub(crate) fn now(&self) -> Instant {
        self.clock.now()
    }

    /// Takes a hold, unless the copy can't be held.
    pub(crate) fn acquire(self: &Arc<Self>) -> Acquired {
        let mut word = self.word.load(SeqCst);
        loop {
            let phase = Phase::of(word);
            if !phase.serves() || holds_of(word) == u32::MAX {
                return Acquired::NotHere;
            }
            match self.word.compare_exchange_weak(word, word + 1, SeqCst, SeqCst) {
                Ok(_) => {
                    self.uses.begin(self.clock.now());
                    let hold = Hold(Arc::clone(self));
                    return if phase == Phase::Resident { Acquired::Ready(hold) } else { Acquired::Waiting(hold) };
                }
                Err(found) => word = found,
            }
        }
    }

    fn release(&self) {
        self.uses.end(self.clock.now());
        let before = self.word.fetch_sub(1, SeqCst);
        if holds_of(before) == 1 {
            if !matches!(Phase::of(before), Phase::Resident) {
                self.changed.notify_waiters();
            }
            self.pressure.eased();
        }
    }

    /// Moves from `from` to `to` and keeps the holds. False when it was not in `from`.
    pub(crate) fn shift(&self, from: Phase, to: Phase) -> bool {
        let mut word = self.word.load(SeqCst);
        while Phase::of(word) == from {
            match self.word.compare_exchange_weak(word, to.with(holds_of(word)), SeqCst, SeqCst) {
                Ok(_) => {
                    if to == Phase::Resident && from != Phase::Evicting {
                        self.resident_since.store(self.clock.now().as_micros(), SeqCst);
                    }
                    if to == Phase::Reloading {
                        self.reload_began.store(self.clock.now().as_micros(), SeqCst);
                    }
                    self.changed.notify_waiters();
                    self.pressure.eased();
                    return true;
                }
                Err(found) => word = found,
            }
        }
        false
    }

    /// Claims a resident copy for eviction. False when it is held or not resident.
    pub(crate) fn claim(&self) -> bool {
        self.word.compare_exchange(Phase::Resident.with(0), Phase::Evicting.with(0), SeqCst, SeqCst).is_ok()
    }

    /// Refuses holds from now on.
    pub(crate) fn drain(&self) {
        let mut word = self.word.load(SeqCst);
        while !matches!(Phase::of(word), Phase::Draining | Phase::Gone) {
            match self.word.compare_exchange_weak(word, Phase::Draining.with(holds_of(word)), SeqCst, SeqCst) {
                Ok(_) => break,
                Err(found) => word = found,
            }
        }
        self.changed.notify_waiters();
    }

    /// Waits until `condition` holds, looking again whenever the phase or a draining copy's holds change.
    pub(crate) async fn until(&self, condition: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if condition(self) {
                return;
            }
            changed.await;
        }
    }

    /// Runs `work` unless the copy is to leave; `None` when it is.
    pub(crate) async fn unless_stopped<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => None,
            done = work => Some(done),
        }
    }

    pub(crate) fn set_stage(&self, stage: Stage) {
        *lock(&self.stage) = stage;
    }

    /// How long the reload that is going on has run.
    pub(crate) fn reloading_for(&self) -> Duration {
        self.clock.now().since(Instant::from_micros(self.reload_began.load(SeqCst)))
    }

    /// The inference server broke a request of it off.
    pub(crate) fn broke_off(&self) {
        self.broke_off.fetch_max(self.clock.now().as_micros(), SeqCst);
    }

    /// Whether it did so within the time before `now`.
    pub(crate) fn broke_off_since(&self, now: Instant, within: Duration) -> bool {
        let at = self.broke_off.load(SeqCst);
        at > 0 && now.since(Instant::from_micros(at)) <= within
    }

    /// Whether it is time to ask the inference server whether it still has the copy; true at most once a second.
    pub(crate) fn verification_due(&self) -> bool {
        const PAUSE: u64 = 1_000_000;
        let now = self.clock.now().as_micros();
        let last = self.verified.load(SeqCst);
        now.saturating_sub(last) >= PAUSE && self.verified.compare_exchange(last, now, SeqCst, SeqCst).is_ok()
    }

    /// It is to leave, by order, its holds within `drain`. A later order may only shorten that.
    pub(crate) fn unregister(&self, drain: Duration) {
        {
            let mut fate = lock(&self.fate);
            fate.drain = Some(fate.drain.map_or(drain, |before| before.min(drain)));
        }
        self.drain();
        self.stop.cancel();
    }

    /// It is to leave because of `failure`.
    pub(crate) fn fail(&self, failure: Failure) {
        lock(&self.fate).failure.get_or_insert(failure);
        self.drain();
        self.stop.cancel();
    }

    pub(crate) fn fate(&self) -> Fate {
        lock(&self.fate).clone()
    }

    /// What there is to say of it now.
    pub(crate) fn report(&self) -> Report {
        let weight =
            |wanted: bool| self.weight().and_then(|(size, measured)| (measured == wanted).then(|| Box::new(size)));
        let available = |residency| {
            let (measured, estimate, pinned) = (weight(true), weight(false), self.is_pinned());
            Report::Available { residency, measured, estimate, pinned }
        };
        match self.snapshot() {
            (Phase::Preparing, _) => match *lock(&self.stage) {
                Stage::Scheduled => Report::Scheduled,
                Stage::Downloading(progress) => Report::Downloading(progress),
                Stage::Loading => Report::Loading { estimate: self.weight().map(|(size, _)| Box::new(size)) },
            },
            (Phase::Resident, _) => available(Residency::Resident),
            (Phase::Evicting, _) => available(Residency::Evicting),
            (Phase::Evicted, _) => available(Residency::Evicted),
            (Phase::Reloading, _) => available(Residency::Reloading),
            (Phase::Draining, holds) => Report::Draining { holds },
            (Phase::Gone, _) => Report::Unloaded,
        }
    }

    /// The order that it came from.
    pub(crate) fn order(&self) -> Order {
        Order::Register {
            model: self.model.clone(),
            generation: self.generation,
            spec: Arc::clone(&self.spec),
            need: self.ordered.clone(),
            attempt: self.attempt,
            measured: self.ordered_measured,
            trust: self.trust,
            pinned: self.is_pinned(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        domain::version::{Uid, Version},
        ports::SystemClock,
    };

    pub(crate) fn entry(uid: u64, size: u64, pressure: &Arc<Pressure>) -> Arc<Entry> {
        Arc::new(Entry::new(
            (
                ModelName::new(&format!("m{uid}")).expect("valid"),
                Generation { uid: Uid(uid), version: Version(1), number: 1 },
            ),
            (Arc::new(ModelSpec::default()), Resources::primary(Bytes(size)), 0, false, Trust::Larger),
            Arc::clone(pressure),
            Arc::new(SystemClock::starting_at(Instant::from_micros(1))),
        ))
    }

    fn resident() -> Arc<Entry> {
        let entry = entry(1, 1, &Arc::default());
        assert!(entry.shift(Phase::Preparing, Phase::Resident));
        entry
    }

    #[test]
    fn a_copy_that_shows_nothing_that_counts_is_measured_alone_twice_at_most() {
        let entry = resident();
        let tries: Vec<bool> = (0..4).map(|_| entry.tries_to_be_weighed()).collect();
        assert_eq!(tries, [true, true, false, false]);
    }

    #[test]
    fn a_held_copy_is_not_claimed_and_a_claimed_one_is_held_only_to_wait() {
        let entry = resident();
        let Acquired::Ready(hold) = entry.acquire() else { panic!("resident") };
        assert!(!entry.claim());
        drop(hold);
        assert!(entry.claim());
        let Acquired::Waiting(hold) = entry.acquire() else { panic!("evicting") };
        assert_eq!(entry.snapshot(), (Phase::Evicting, 1));
        drop(hold);
        entry.drain();
        assert!(matches!(entry.acquire(), Acquired::NotHere));
        assert_eq!(entry.snapshot(), (Phase::Draining, 0));
    }

    #[test]
    fn holds_and_claims_never_cross_under_contention() {
        let entry = resident();
        let evicting = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        if let Acquired::Ready(hold) = entry.acquire() {
                            assert_eq!(evicting.load(SeqCst), 0, "held while it was being evicted");
                            drop(hold);
                        }
                    }
                });
            }
            scope.spawn(|| {
                for _ in 0..20_000 {
                    if entry.claim() {
                        // A holder that got in before the claim is gone; a later one only waits.
                        evicting.store(1, SeqCst);
                        std::hint::spin_loop();
                        evicting.store(0, SeqCst);
                        assert!(entry.shift(Phase::Evicting, Phase::Resident));
                    }
                }
            });
        });
        assert_eq!(entry.snapshot(), (Phase::Resident, 0));
    }

    #[tokio::test]
    async fn the_last_hold_of_a_draining_copy_wakes_who_waits() {
        let entry = resident();
        let (Acquired::Ready(first), Acquired::Ready(second)) = (entry.acquire(), entry.acquire()) else {
            panic!("resident")
        };
        entry.drain();
        let waiter = tokio::spawn({
            let entry = Arc::clone(&entry);
            async move { entry.until(|entry| entry.holds() == 0).await }
        });
        drop(first);
        drop(second);
        tokio::time::timeout(Duration::from_secs(5), waiter).await.expect("woken").expect("no panic");
    }
}
