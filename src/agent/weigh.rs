//! What copies take in memory: guessed from the artifact, then measured.
//!
//! The rules of this module: the server's own figure is worth most; without one, the server's process is looked at
//! before and after a load that is alone there, and a measurement that anything disturbed is not taken, a request for
//! another copy no less than a load; nobody waits long for the sake of a measurement; neither a guess nor a measurement of
//! the process makes a copy too large for the replica.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use sha2::{Digest as _, Sha256};
use tokio::{
    sync::{Notify, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{sleep, timeout},
};

use super::{
    artifacts::Artifact,
    cache::{Entry, Phase},
    core::Core,
    disk,
};
use crate::{
    domain::{
        ghost::{Ghosts, Strain},
        memory::{Bytes, Resources},
        size::{self, Size, SizeKey},
        spec::Parameter,
        time::Instant,
    },
    ports::Footprint,
};

/// How long loads and evictions have to pause before the process is looked at: to look at it reads all of `/proc`.
const PAUSED: Duration = Duration::from_millis(100);
/// Sizes that the agent remembers of its copies.
const REMEMBERED: usize = 4096;
/// A load that adds less than this share of its artifact's bytes, in percent, used memory that the process had kept from
/// before: what it added is no measure.
const PLAUSIBLE_PERCENT: u64 = 50;
/// What has leaked is room that is not there from this share of the memory on, in percent.
const LEAKED_PERCENT: u32 = 10;
/// How long a load or unload waits for one that is being measured. Then it goes ahead, and that is no measurement.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a first load waits to be alone. No request waits for it yet.
const FIRST: Duration = Duration::from_secs(20);

/// What is known of sizes, and whose turn it is with the server.
#[derive(Debug, Default)]
pub(crate) struct Scale {
    /// Loads and unloads share it; a load that is measured has it alone.
    turns: RwLock<()>,
    /// Loads and unloads that have begun.
    moves: AtomicU64,
    /// Something was loaded or evicted since the process was looked at.
    moved: Notify,
    /// Whether a load is alone, to be measured.
    measuring: AtomicBool,
    /// Whether it was disturbed, so that nobody has to wait for it any more.
    spoiled: AtomicBool,
    /// Loads and unloads under way that went ahead without a turn.
    loose: AtomicU32,
    /// Whether the server gives figures of its own.
    told: AtomicBool,
    /// Whether it is known what the server has loaded.
    begun: AtomicBool,
    known: Mutex<BTreeMap<SizeKey, Resources>>,
    process: Mutex<Watched>,
    ghosts: Mutex<Ghosts>,
}

/// The server's process, as far as it was looked at.
#[derive(Clone, Copy, Debug, Default)]
struct Watched {
    /// Which run of the server that was.
    run: u64,
    /// What it had when nothing was loaded.
    baseline: Option<Bytes>,
    /// What it was last seen to have beyond that and its copies, were it only for a request.
    beyond: Bytes,
    leaked: Bytes,
}

/// A load's or unload's turn with the server.
#[derive(Debug)]
pub(crate) enum Turn<'a> {
    /// Nothing else is loaded or unloaded.
    Alone(Alone<'a>),
    /// Others may be at it.
    Shared(#[expect(dead_code, reason = "held for as long as the turn is")] RwLockReadGuard<'a, ()>),
    /// It did not get its turn in time, and goes ahead.
    Loose(#[expect(dead_code, reason = "held for as long as the turn is")] Loose<'a>),
}

/// The turn of a load that is to be measured.
#[derive(Debug)]
pub(crate) struct Alone<'a> {
    scale: &'a Scale,
    _turn: RwLockWriteGuard<'a, ()>,
    since: Instant,
    /// What the process had then.
    before: Footprint,
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.scale.measuring.store(false, SeqCst);
    }
}

/// Something that is loaded or unloaded without a turn.
#[derive(Debug)]
pub(crate) struct Loose<'a>(&'a Scale);

impl<'a> Loose<'a> {
    fn begin(scale: &'a Scale) -> Self {
        // In this order: who becomes alone in between sees one of the two.
        scale.loose.fetch_add(1, SeqCst);
        scale.spoiled.store(true, SeqCst);
        Self(scale)
    }
}

impl Drop for Loose<'_> {
    fn drop(&mut self) {
        self.0.loose.fetch_sub(1, SeqCst);
    }
}

/// How a copy is configured, as far as its size depends on it.
fn configuration(instances: u32, parameters: &[Parameter]) -> String {
    if parameters.is_empty() {
        return instances.to_string();
    }
    let mut digest = Sha256::new();
    for parameter in parameters {
        for part in [&parameter.name, &parameter.value] {
            digest.update((part.len() as u64).to_be_bytes());
            digest.update(part.as_bytes());
        }
    }
    format!("{instances}+{}", disk::hex(&digest.finalize()[..8]))
}

impl Scale {
    fn known(&self, key: &SizeKey) -> Option<Resources> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    pub(crate) fn remember(&self, size: &Size) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= REMEMBERED && !known.contains_key(&size.key) {
            known.pop_first();
        }
        known.insert(size.key.clone(), size.bytes.clone());
    }

    fn forget(&self, key: &SizeKey) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }

    /// From here on the ledger has what the server has loaded.
    pub(crate) fn begin(&self) {
        self.begun.store(true, SeqCst);
    }

    /// Waits until nothing is loaded or unloaded, and keeps it so for as long as [`PATIENCE`] at least; what went ahead
    /// without a turn has its seat in the ledger. The caller sets the deadline.
    pub(crate) async fn alone(&self) -> RwLockWriteGuard<'_, ()> {
        self.turns.write().await
    }

    /// How long to wait for a turn.
    fn patience(&self) -> Duration {
        // Who has the server to itself for anything but a measurement is always waited for.
        let in_vain = self.measuring.load(SeqCst) && self.spoiled.load(SeqCst);
        if in_vain { Duration::ZERO } else { PATIENCE }
    }

    /// Copies that were evicted.
    pub(crate) fn ghosts(&self) -> MutexGuard<'_, Ghosts> {
        self.ghosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Core {
    /// What there is to say of the replica's memory.
    pub(crate) fn strain(&self) -> Strain {
        let watched = *self.scale.process.lock().unwrap_or_else(PoisonError::into_inner);
        // Of a run that has begun since nothing is known yet.
        let past = self.options.started.is_some() && self.run() != Some(watched.run);
        let leaked = if past { Bytes::ZERO } else { watched.leaked };
        Strain { leaked, advice: self.scale.ghosts().advice(self.clock.now()) }
    }

    /// Forgets what was measured of a copy that is gone, unless it holds for another one that is here: who deletes a model
    /// and loads it again has it measured anew.
    pub(crate) fn forget_size(&self, entry: &Entry) {
        if let Some(Size { key, .. }) = entry.size()
            && !self.book.all().iter().any(|other| other.size().is_some_and(|size| size.key == key))
        {
            self.scale.forget(&key);
        }
    }

    /// Says what a copy is taken for, now that its artifact is on disk.
    pub(crate) fn guess(&self, entry: &Entry, artifact: &Artifact, instances: u32) {
        let key = SizeKey {
            artifact: artifact.digest(),
            runtime: self.runtime.kind().name().to_owned(),
            configuration: configuration(instances, &entry.spec.parameters),
        };
        if let Some(bytes) = self.scale.known(&key) {
            return entry.weighed(Size { key, bytes }, true);
        }
        let guess = self.options.guesses.as_ref().map(|guesses| {
            let bytes = artifact.bytes();
            let guess = guesses.guess(&key.runtime, &entry.spec.requirements, bytes, instances);
            guess.min(self.ledger.capacity().primary.max(bytes))
        });
        // Without a guess there is still something to say: which artifact it is.
        let bytes = guess.map_or_else(|| entry.need(), Resources::primary);
        entry.weighed(Size { key, bytes }, false);
    }

    /// The turn of a load; alone where it is to be measured by what the process gains.
    pub(crate) async fn turn_to_load(&self, entry: &Entry) -> Turn<'_> {
        let wanted = entry.is_unweighed()
            && !self.scale.told.load(SeqCst)
            && self.options.process.is_some()
            && entry.tries_to_be_weighed();
        let patience = if entry.phase() == Phase::Preparing { FIRST } else { PATIENCE };
        if wanted && let Ok(turn) = timeout(patience, self.scale.turns.write()).await {
            self.scale.moves.fetch_add(1, SeqCst);
            self.scale.spoiled.store(false, SeqCst);
            let (others, since) = (self.scale.loose.load(SeqCst), self.clock.now());
            return match self.footprint().await {
                Some(before) if others == 0 => {
                    self.scale.measuring.store(true, SeqCst);
                    Turn::Alone(Alone { scale: &self.scale, _turn: turn, since, before })
                }
                Some(_) | None => Turn::Shared(turn.downgrade()),
            };
        }
        self.turn().await
    }

    /// The turn of what is not measured.
    pub(crate) async fn turn(&self) -> Turn<'_> {
        let turn = timeout(self.scale.patience(), self.scale.turns.read()).await;
        self.scale.moves.fetch_add(1, SeqCst);
        match turn {
            Ok(shared) => Turn::Shared(shared),
            Err(_) => Turn::Loose(Loose::begin(&self.scale)),
        }
    }

    /// Measures a copy that has just been loaded, unless it was measured before.
    pub(crate) async fn measure(self: &Arc<Self>, entry: &Entry, turn: &Turn<'_>) {
        let Some(key) = entry.unweighed() else { return };
        let told = timeout(self.options.probe_deadline, self.runtime.memory(&entry.served)).await;
        let bytes = match told {
            Ok(Ok(Some(bytes))) if !bytes.is_zero() => {
                self.scale.told.store(true, SeqCst);
                Some(bytes)
            }
            Ok(Ok(Some(_) | None) | Err(_)) | Err(_) => self.gained(entry, turn).await,
        };
        let Some(bytes) = bytes else { return };
        tracing::info!(copy = %entry.generation, model = %entry.model, bytes = bytes.primary.0, "a copy's memory was measured");
        let size = Size { key, bytes };
        self.scale.remember(&size);
        entry.weighed(size, true);
        // Others may fit now, or it may be more than there is.
        self.ledger.pressure().eased();
        if !self.ledger.capacity().covers(&self.ledger.used()) {
            let core = Arc::clone(self);
            self.spawn(async move { core.fit().await });
        }
    }

    /// What the server's process gained by the load, if nothing else can have been the cause.
    async fn gained(&self, entry: &Entry, turn: &Turn<'_>) -> Option<Resources> {
        let Turn::Alone(Alone { since, before, .. }) = turn else { return None };
        let after = self.footprint().await?;
        if after.run != before.run || self.scale.spoiled.load(SeqCst) || self.is_used_since(*since, entry) {
            return None;
        }
        let gained = after.bytes.saturating_sub(before.bytes);
        let artifact = entry.artifact.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Artifact::bytes);
        let least = artifact.map_or(0, |bytes| bytes.0 / 100 * PLAUSIBLE_PERCENT).max(1);
        // It was loaded in the memory that there is: what goes beyond that is not its own.
        (gained.0 >= least).then(|| Resources::primary(gained.min(self.ledger.capacity().primary)))
    }

    /// Whether the server may have answered a request for another copy since then: what that took is not told from what
    /// a load took.
    fn is_used_since(&self, since: Instant, entry: &Entry) -> bool {
        self.book.all().iter().filter(|other| other.generation != entry.generation).any(|other| {
            let (phase, holds) = other.snapshot();
            match phase {
                Phase::Resident | Phase::Evicting | Phase::Draining => holds > 0 || other.uses().last() >= since,
                // Who holds it waits.
                Phase::Preparing | Phase::Evicted | Phase::Reloading | Phase::Gone => false,
            }
        })
    }

    async fn footprint(&self) -> Option<Footprint> {
        let process = self.options.process.clone()?;
        disk::run(self.options.blocking, move || process.footprint()).await
    }

    /// Something was loaded or evicted: the process is to be looked at, once requests have had their time.
    pub(crate) fn look_soon(&self) {
        self.scale.moved.notify_one();
    }

    /// Looks at the server's process whenever loads and evictions have paused, for as long as the agent lives.
    pub(crate) async fn keep_looking(self: Arc<Self>) {
        loop {
            self.scale.moved.notified().await;
            sleep(PAUSED).await;
            self.look_at_process().await;
        }
    }

    /// Looks at the server's process: what it has beyond its baseline and what is in it has leaked. Keeps nobody from
    /// loading: a look that was disturbed says nothing, and whatever disturbed it is followed by another look.
    pub(crate) async fn look_at_process(&self) {
        self.look(false).await;
    }

    /// Looks at it although nothing was loaded or unloaded: requests may have made it keep more, and what it kept may
    /// have come free. What it has only while a request runs has not leaked, so what is more is believed the second time.
    pub(crate) async fn look_again(&self) {
        self.look(true).await;
    }

    async fn look(&self, again: bool) {
        let moves = self.scale.moves.load(SeqCst);
        let busy = || self.scale.turns.try_write().is_err() || self.scale.loose.load(SeqCst) > 0;
        if !self.scale.begun.load(SeqCst) || busy() {
            return;
        }
        let taken = self.ledger.taken();
        let Some(now) = self.footprint().await else { return };
        if self.scale.moves.load(SeqCst) != moves {
            // What was loaded or unloaded meanwhile is in one of the two sums only.
            return;
        }
        let mut watched = self.scale.process.lock().unwrap_or_else(PoisonError::into_inner);
        if watched.run != now.run {
            *watched = Watched { run: now.run, baseline: now.empty, ..Watched::default() };
        }
        // Only of a process in which nothing is can it be said what it has without anything.
        let empty = (taken == Bytes::ZERO).then_some(now.bytes);
        watched.baseline = watched.baseline.or(empty);
        // A memory that is smaller than the server is with nothing in it is in units of its own, and so is what is declared.
        let capacity = self.ledger.capacity().primary;
        let comparable = watched.baseline.filter(|baseline| *baseline < capacity);
        let beyond = comparable.map_or(Bytes::ZERO, |baseline| size::leaked(now.bytes, baseline, taken));
        watched.leaked = if again { beyond.min(watched.beyond.max(watched.leaked)) } else { beyond };
        watched.beyond = beyond;
        // Less may be libraries, and is no more than such figures differ by.
        let counts = u128::from(watched.leaked.0) * 100 > u128::from(capacity.0) * u128::from(LEAKED_PERCENT);
        self.ledger.set_leaked(if counts { watched.leaked } else { Bytes::ZERO });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_measurement_that_was_disturbed_is_not_waited_for() {
        let scale = Scale::default();
        drop(Loose::begin(&scale));
        assert_eq!(scale.patience(), PATIENCE, "nothing is measured");
        scale.spoiled.store(false, SeqCst);
        scale.measuring.store(true, SeqCst);
        assert_eq!(scale.patience(), PATIENCE);
        let _loose = Loose::begin(&scale);
        assert_eq!(scale.patience(), Duration::ZERO);
    }

    #[test]
    fn a_configuration_is_told_from_another_by_instances_and_parameters() {
        let parameter = |name: &str, value: &str| Parameter { name: name.to_owned(), value: value.to_owned() };
        let all = [
            configuration(1, &[]),
            configuration(2, &[]),
            configuration(1, &[parameter("a", "bc")]),
            configuration(1, &[parameter("ab", "c")]),
        ];
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len(), "{all:?}");
    }
}
