//! What copies take in memory: guessed from the artifact, then measured.
//!
//! The rules of this module: the server's own figure is worth most; without one, the server's process is looked at
//! before and after a load that is alone there, and a measurement that anything disturbed is not taken; a guess never
//! makes a copy too large for the replica.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use sha2::{Digest as _, Sha256};
use tokio::{
    sync::{Notify, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{sleep, timeout},
};

use super::{artifacts::Artifact, cache::Entry, core::Core, disk};
use crate::{
    domain::{
        ghost::{Ghosts, Strain},
        memory::{Bytes, Resources},
        size::{self, Size, SizeKey},
        spec::Parameter,
    },
    ports::Footprint,
};

/// How long loads and evictions have to pause before the process is looked at: to look at it reads all of `/proc`.
const PAUSED: Duration = Duration::from_millis(100);
/// Sizes that the agent remembers beyond its copies.
const REMEMBERED: usize = 4096;
/// A load that adds less than this share of its artifact's bytes, in percent, used memory that the process had kept from
/// before: what it added is no measure.
const PLAUSIBLE_PERCENT: u64 = 50;

/// What is known of sizes, and whose turn it is with the server.
#[derive(Debug, Default)]
pub(crate) struct Scale {
    /// Loads and unloads share it; a load that is measured has it alone.
    turns: RwLock<()>,
    /// Loads and unloads that have begun.
    begun: AtomicU64,
    /// Something was loaded or evicted since the process was looked at.
    moved: Notify,
    /// Loads and unloads that did not get their turn in time and went ahead.
    disturbed: AtomicU64,
    /// Whether the server gives figures of its own.
    told: AtomicBool,
    known: Mutex<BTreeMap<SizeKey, Resources>>,
    process: Mutex<Watched>,
    ghosts: Mutex<Ghosts>,
}

/// The server's process, as far as it was looked at.
#[derive(Clone, Copy, Debug, Default)]
struct Watched {
    /// What it had when nothing was loaded.
    baseline: Option<Footprint>,
    leaked: Bytes,
}

/// A load's or unload's turn with the server.
#[derive(Debug)]
pub(crate) enum Turn<'a> {
    /// Nothing else is loaded or unloaded; what the process had before, and how often it was disturbed until then.
    Alone(#[expect(dead_code, reason = "held for as long as the turn is")] RwLockWriteGuard<'a, ()>, Footprint, u64),
    /// Others may be at it.
    Shared(#[expect(dead_code, reason = "held for as long as the turn is")] Option<RwLockReadGuard<'a, ()>>),
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

    /// Copies that were evicted.
    pub(crate) fn ghosts(&self) -> MutexGuard<'_, Ghosts> {
        self.ghosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Core {
    /// What there is to say of the replica's memory.
    pub(crate) fn strain(&self) -> Strain {
        let leaked = self.scale.process.lock().unwrap_or_else(PoisonError::into_inner).leaked;
        Strain { leaked, advice: self.scale.ghosts().advice(self.clock.now()) }
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
        let wanted = entry.is_unweighed() && !self.scale.told.load(SeqCst) && self.options.process.is_some();
        if wanted && let Ok(alone) = timeout(self.options.load_deadline, self.scale.turns.write()).await {
            self.scale.begun.fetch_add(1, SeqCst);
            let disturbed = self.scale.disturbed.load(SeqCst);
            return match self.footprint().await {
                Some(before) => Turn::Alone(alone, before, disturbed),
                None => Turn::Shared(Some(alone.downgrade())),
            };
        }
        self.turn().await
    }

    /// The turn of what is not measured.
    pub(crate) async fn turn(&self) -> Turn<'_> {
        let turn = timeout(self.options.load_deadline, self.scale.turns.read()).await;
        self.scale.begun.fetch_add(1, SeqCst);
        match turn {
            Ok(shared) => Turn::Shared(Some(shared)),
            Err(_) => {
                self.scale.disturbed.fetch_add(1, SeqCst);
                Turn::Shared(None)
            }
        }
    }

    /// Measures a copy that has just been loaded, unless it was measured before.
    pub(crate) async fn measure(&self, entry: &Entry, turn: &Turn<'_>) {
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
    }

    /// What the server's process gained by the load, if nothing else can have been the cause.
    async fn gained(&self, entry: &Entry, turn: &Turn<'_>) -> Option<Resources> {
        let Turn::Alone(_, before, disturbed) = turn else { return None };
        let after = self.footprint().await?;
        if after.process != before.process || self.scale.disturbed.load(SeqCst) != *disturbed {
            return None;
        }
        let gained = after.bytes.saturating_sub(before.bytes);
        let artifact = entry.artifact.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Artifact::bytes);
        let least = artifact.map_or(0, |bytes| bytes.0 / 100 * PLAUSIBLE_PERCENT).max(1);
        (gained.0 >= least).then(|| Resources::primary(gained))
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
        let begun = self.scale.begun.load(SeqCst);
        if self.scale.turns.try_write().is_err() {
            return;
        }
        let resident = self.ledger.used().primary;
        let Some(now) = self.footprint().await else { return };
        if self.scale.begun.load(SeqCst) != begun {
            // What was loaded or unloaded meanwhile is in one of the two sums only.
            return;
        }
        let mut watched = self.scale.process.lock().unwrap_or_else(PoisonError::into_inner);
        match watched.baseline {
            Some(baseline) if baseline.process == now.process => {
                watched.leaked = size::leaked(now.bytes, baseline.bytes, resident);
                self.ledger.set_leaked(watched.leaked);
            }
            // Only of a process in which nothing is can it be said what it has without anything.
            Some(_) | None if resident == Bytes::ZERO => {
                *watched = Watched { baseline: Some(now), leaked: Bytes::ZERO };
                self.ledger.set_leaked(Bytes::ZERO);
            }
            Some(_) | None => *watched = Watched::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
