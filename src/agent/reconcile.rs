//! From an order to an answering copy, and from another to nothing left: one task per copy, for all its life.
//!
//! The rules of this module: repeating an order changes nothing; an unregister ends whatever is going on;
//! whichever way a copy leaves, its memory, folder, artifact and order are given back before the last word on
//! it is said.

use std::{
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::timeout;

use super::{
    artifacts::Artifact,
    cache::{Entry, Fate, InServer, Phase, Stage, entry_of},
    core::Core,
    disk::Kept,
    residence::{NoRoom, late},
    runtimes::Wanted,
};
use crate::{
    domain::{
        copy::{Failure, FailureClass, Progress, Report},
        names::ModelName,
        order::Order,
        time::Instant,
        version::Generation,
    },
    rpc::agent_wire::CopyReport,
};

/// Least time between two reports of a download.
const PROGRESS_PAUSE: Duration = Duration::from_millis(200);
/// How long requests have to end after the deadline of their drain.
const ENDING: Duration = Duration::from_secs(2);

/// Why a copy did not come to answer.
enum Halt {
    /// It was unregistered.
    Stopped,
    Failed(Failure),
}

impl From<Failure> for Halt {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl Core {
    /// Does what the scheduler orders.
    pub(crate) fn obey(self: &Arc<Self>, order: Order) {
        match order {
            Order::Register { .. } => self.register(order),
            Order::Unregister { model, generation, drain } => self.unregister(model, generation, drain),
        }
    }

    /// Answers an order that can't be read: it stands as it did, and what was never held has failed.
    pub(crate) fn unreadable(&self, model: ModelName, generation: Generation, message: String) {
        if let Some(entry) = self.book.get(generation) {
            return self.report(&entry);
        }
        let failure = Failure { class: FailureClass::Incompatible, message };
        let report = Report::Failed { failure, freed: true };
        self.outbox.push(CopyReport { model, generation, report, order: None });
    }

    fn register(self: &Arc<Self>, order: Order) {
        let (model, generation) = (order.model().clone(), order.generation());
        if let Some(entry) = self.book.get(generation) {
            return self.report(&entry);
        }
        if let Some(said) = self.book.last_word(generation)
            && !tried_again(&said, &order)
        {
            return self.outbox.push(CopyReport { order: None, ..said });
        }
        let refuse = |class, message: String| {
            let report = Report::Failed { failure: Failure { class, message }, freed: true };
            self.outbox.push(CopyReport { model: model.clone(), generation, report, order: None });
        };
        if self.book.len() >= self.options.max_copies {
            let most = self.options.max_copies;
            return refuse(FailureClass::Memory, format!("the agent holds {most} copies, and takes no more"));
        }
        let suspect = (generation.uid, generation.version);
        let quarantined = self.quarantine.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(why) = quarantined.reason(suspect, self.clock.now()) {
            return refuse(FailureClass::Runtime, why.to_owned());
        }
        drop(quarantined);
        let Some(entry) = entry_of(order, &self.ledger, Arc::clone(&self.clock)) else { return };
        if let Err(present) = self.book.insert(&entry) {
            return self.report(&present);
        }
        self.report(&entry);
        self.begin(entry);
    }

    fn unregister(&self, model: ModelName, generation: Generation, drain: Duration) {
        match self.book.get(generation) {
            Some(entry) => {
                entry.unregister(drain);
                self.report(&entry);
            }
            // It is gone, or never was.
            None => self.outbox.push(CopyReport { model, generation, report: Report::Unloaded, order: None }),
        }
    }

    /// Lives a copy's life: to be called once for each in the book.
    pub(crate) fn begin(self: &Arc<Self>, entry: Arc<Entry>) {
        let core = Arc::clone(self);
        self.spawn(async move { core.live(&entry).await });
    }

    async fn live(self: &Arc<Self>, entry: &Arc<Entry>) {
        if entry.phase() == Phase::Preparing {
            match self.bring_up(entry).await {
                Ok(()) | Err(Halt::Stopped) => {}
                Err(Halt::Failed(failure)) => entry.fail(failure),
            }
        }
        entry.stop.cancelled().await;
        self.take_down(entry).await;
    }

    async fn bring_up(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<(), Halt> {
        entry.unless_stopped(self.book.turn_of(entry)).await.ok_or(Halt::Stopped)?;
        if !self.ledger.capacity().covers(&entry.need()) {
            // Not a byte is fetched of what can never be loaded.
            return Err(self.too_large(&entry.need()).into());
        }
        if let Some(kept) = Kept::of(entry.order(), None) {
            self.disk.keep(kept).await?;
        }
        let artifact = self.fetch(entry).await?;
        let wanted = Wanted { served: &entry.served, version: entry.generation.version, spec: &entry.spec };
        let instances = self.artifacts.lay_out(&artifact, self.runtime.as_ref(), &wanted, &self.folder(entry)).await?;
        entry.set_instances(instances);
        self.guess(entry, &artifact, instances);
        entry.set_stage(Stage::Loading);
        self.report(entry);
        *entry.artifact.lock().unwrap_or_else(PoisonError::into_inner) = Some(artifact);

        let permit = entry.unless_stopped(self.loads.acquire()).await.ok_or(Halt::Stopped)?;
        let room = timeout(self.options.memory_deadline, self.make_room(entry, true, || true));
        match entry.unless_stopped(room).await.ok_or(Halt::Stopped)? {
            Ok(Ok(())) => {}
            Ok(Err(NoRoom::TooLarge | NoRoom::Taken | NoRoom::Unwanted)) => {
                return Err(self.too_large(&entry.need()).into());
            }
            Err(_) => {
                return Err(Halt::Failed(Failure {
                    class: FailureClass::Memory,
                    message: format!(
                        "no memory became free for it within {} s: everything resident is in use",
                        self.options.memory_deadline.as_secs_f64()
                    ),
                }));
            }
        }
        // A load that the server has begun can't be taken back, so it is waited for even if the copy is to
        // leave: only then is its memory known.
        let loading = self.loading(entry);
        let mut in_server = entry.in_server.lock().await;
        self.load(entry, &mut in_server).await?;
        self.warm_up(entry).await?;
        drop(in_server);
        drop(permit);
        self.keep(entry).await?;
        if entry.shift(Phase::Preparing, Phase::Resident) {
            self.report(entry);
        }
        drop(loading);
        Ok(())
    }

    /// Keeps an answering copy over a restart: what its folder was made from, how often it is in memory, and what it was
    /// found to take.
    pub(crate) async fn keep(&self, entry: &Entry) -> Result<(), Failure> {
        let artifact = entry
            .artifact
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(Artifact::key)
            .map(str::to_owned);
        let loaded = artifact.map(|artifact| (artifact, entry.instances()));
        let Some(mut kept) = Kept::of(entry.order(), loaded) else { return Ok(()) };
        if let Some((size, measured)) = entry.weight() {
            (kept.size, kept.guessed) = (Some(size), !measured);
        }
        self.disk.keep(kept).await
    }

    async fn fetch(&self, entry: &Entry) -> Result<Artifact, Halt> {
        let _permit = entry.unless_stopped(self.fetches.acquire()).await.ok_or(Halt::Stopped)?;
        entry.set_stage(Stage::Downloading(Progress::default()));
        self.report(entry);
        let said = AtomicU64::new(self.clock.now().as_micros());
        let progress = |progress| {
            entry.set_stage(Stage::Downloading(progress));
            let now = self.clock.now();
            if now.since(Instant::from_micros(said.load(Relaxed))) >= PROGRESS_PAUSE {
                said.store(now.as_micros(), Relaxed);
                self.report(entry);
            }
        };
        let fetch = timeout(self.options.fetch_deadline, self.artifacts.fetch(&entry.spec, progress));
        match entry.unless_stopped(fetch).await.ok_or(Halt::Stopped)? {
            Ok(fetched) => Ok(fetched?),
            Err(_) => Err(late("the artifact could not be fetched", self.options.fetch_deadline).into()),
        }
    }

    async fn take_down(self: &Arc<Self>, entry: &Arc<Entry>) {
        entry.drain();
        let fate = entry.fate();
        if fate.failure.is_none() {
            self.report(entry);
        }
        self.await_holds(entry).await;
        {
            let mut in_server = entry.in_server.lock().await;
            if *in_server != InServer::No {
                self.ledger.leaving(entry.generation);
                let refused = || {
                    if let Some(failure) = &fate.failure {
                        self.say(entry, Report::Failed { failure: failure.clone(), freed: false });
                    }
                };
                self.unload_in_the_end(entry, refused).await;
                *in_server = InServer::No;
            }
        }
        self.ledger.left(entry.generation);
        self.scale.ghosts().gone(entry.generation);
        self.look_at_process().await;
        if let Err(error) = self.disk.remove(self.folder(entry)).await {
            tracing::warn!(copy = %entry.generation, %error, "a model's folder can't be removed");
        }
        drop(entry.artifact.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Err(error) = self.disk.forget(entry.generation).await {
            tracing::warn!(copy = %entry.generation, %error, "a kept order can't be removed");
        }
        entry.shift(Phase::Draining, Phase::Gone);
        // An unregister may have come meanwhile; then that is what the scheduler waits for.
        let last_word = match entry.fate() {
            Fate { drain: None, failure: Some(failure) } => Report::Failed { failure, freed: true },
            _ => Report::Unloaded,
        };
        self.book.remove(entry, last_word.clone());
        self.forget_size(entry);
        self.say(entry, last_word);
    }

    /// Waits for the last hold, and at the deadline of the drain ends what is left.
    async fn await_holds(&self, entry: &Entry) {
        // A copy that failed answers nobody: what waits for it is told so at once.
        let time_for = |entry: &Entry| entry.fate().drain.unwrap_or(ENDING);
        let unheld = |entry: &Entry| entry.holds() == 0;
        let began = self.clock.now();
        loop {
            let drain = time_for(entry);
            let left = drain.saturating_sub(self.clock.now().since(began));
            let again = entry.until(|entry| unheld(entry) || time_for(entry) != drain);
            if timeout(left, again).await.is_err() {
                break;
            }
            if unheld(entry) {
                return;
            }
        }
        let left = entry.holds();
        self.metrics.drain_ended.add(u64::from(left));
        tracing::warn!(copy = %entry.generation, model = %entry.model, requests = left, "requests are ended at the deadline of a drain");
        entry.ended.cancel();
        // A client that does not read keeps its hold; its stream is dead all the same.
        if timeout(ENDING, entry.until(unheld)).await.is_err() {
            tracing::warn!(copy = %entry.generation, requests = entry.holds(), "requests that were ended are still being read");
        }
    }
}

/// Whether `order` asks for more than what became of the copy, so that saying that again is no answer: another try
/// of one that failed, or one that was let go, which a scheduler with an older journal wants back.
fn tried_again(said: &CopyReport, order: &Order) -> bool {
    let attempt = |order: &Order| match order {
        Order::Register { attempt, .. } => Some(*attempt),
        Order::Unregister { .. } => None,
    };
    if matches!((&said.report, order), (Report::Unloaded, Order::Register { .. })) {
        return true;
    }
    let failed = matches!(said.report, Report::Failed { .. });
    failed && said.order.as_ref().and_then(attempt) < attempt(order)
}
