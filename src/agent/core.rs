//! What the parts of one agent share.

use std::{
    future::Future,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
};

use arc_swap::ArcSwap;
use tokio::{
    sync::{Notify, Semaphore},
    task::JoinSet,
};

use super::{
    Deps,
    artifacts::Artifacts,
    cache::{Book, Entry, Ledger},
    disk::Disk,
    fence::Seen,
    metrics::Metrics,
    options::{Facts, Options},
    outbox::Outbox,
    process::{Guarded, Started},
    runtimes::{Runtime, adapter},
    session::Link,
    weigh::Scale,
};
use crate::{
    domain::{copy::Report, quarantine::Quarantine},
    forward::Upstream,
    ports::{Clock, Network},
    rpc::agent_wire::CopyReport,
    telemetry::durations::Durations,
};

/// The state of an agent.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) options: Options,
    /// What the scheduler is told of the replica, and that it is another than it was told.
    pub(crate) facts: ArcSwap<Facts>,
    pub(crate) restated: Notify,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) network: Arc<dyn Network>,
    pub(crate) server: Arc<dyn Upstream>,
    pub(crate) runtime: Arc<dyn Runtime>,
    /// The runtime once more, where the agent runs its server.
    pub(crate) guarded: Option<Arc<Guarded>>,
    pub(crate) quarantine: Mutex<Quarantine>,
    /// What was in the memory of a server that ended, until that is back.
    pub(crate) lost: Mutex<Vec<Arc<Entry>>>,
    /// Held while the server is ended to be started anew.
    pub(crate) renewing: tokio::sync::Mutex<()>,
    pub(crate) artifacts: Arc<Artifacts>,
    pub(crate) book: Book,
    pub(crate) ledger: Ledger,
    pub(crate) disk: Disk,
    pub(crate) outbox: Outbox,
    pub(crate) metrics: Arc<Metrics>,
    /// Loads of all copies.
    pub(crate) load_times: Durations,
    /// Requests that wait for evicted copies.
    pub(crate) waiting: AtomicU32,
    /// What copies take.
    pub(crate) scale: Scale,
    pub(crate) fetches: Semaphore,
    pub(crate) loads: Semaphore,
    pub(crate) reloads: Semaphore,
    pub(crate) seen: Mutex<Seen>,
    pub(crate) link: Mutex<Link>,
    tasks: Mutex<Option<JoinSet<()>>>,
}

impl Core {
    pub(crate) fn new(options: Options, deps: Deps) -> Self {
        let metrics = Arc::<Metrics>::default();
        let artifacts = Artifacts::new(&options, deps.sources, Arc::clone(&deps.clock), Arc::clone(&metrics));
        let ledger = Ledger::new(options.capacity.clone());
        ledger.set_rules(options.eviction, options.least_residency);
        let adapter = || adapter(options.runtime, Arc::clone(&deps.server), options.workers);
        let (runtime, guarded): (Arc<dyn Runtime>, _) = match &options.started {
            None => (adapter(), None),
            Some(Started::Server(server)) => {
                let guarded = Arc::new(Guarded::new(adapter(), Arc::clone(server)));
                (Arc::clone(&guarded) as Arc<dyn Runtime>, Some(guarded))
            }
            Some(Started::Models(models)) => (Arc::clone(models) as Arc<dyn Runtime>, None),
        };
        Self {
            facts: ArcSwap::from_pointee(options.facts()),
            restated: Notify::new(),
            runtime,
            guarded,
            quarantine: Mutex::default(),
            lost: Mutex::default(),
            renewing: tokio::sync::Mutex::default(),
            artifacts: Arc::new(artifacts),
            book: Book::new(),
            ledger,
            disk: Disk::new(options.data_dir.clone(), options.blocking),
            outbox: Outbox::default(),
            metrics,
            load_times: Durations::default(),
            waiting: AtomicU32::new(0),
            scale: Scale::default(),
            fetches: Semaphore::new(options.fetches.max(1)),
            loads: Semaphore::new(options.loads.max(1)),
            reloads: Semaphore::new(options.reloads.max(1)),
            seen: Mutex::default(),
            link: Mutex::default(),
            tasks: Mutex::new(Some(JoinSet::new())),
            clock: deps.clock,
            network: deps.network,
            server: deps.server,
            options,
        }
    }

    /// The replica is another than it was: at once for what is to come, and for what is in memory as soon as holds
    /// allow it.
    pub(crate) fn restate(self: &Arc<Self>, facts: Facts) {
        if **self.facts.load() == facts {
            return;
        }
        self.ledger.set_capacity(facts.capacity.clone());
        self.facts.store(Arc::new(facts));
        self.restated.notify_one();
        let core = Arc::clone(self);
        self.spawn(async move { core.fit().await });
    }

    /// Runs `work` for as long as the agent lives. False when it does not any more.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) -> bool {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(tasks) = tasks.as_mut() else { return false };
        while let Some(ended) = tasks.try_join_next() {
            if let Err(error) = ended
                && error.is_panic()
            {
                tracing::error!(%error, "a task of the agent panicked");
            }
        }
        tasks.spawn(work);
        true
    }

    /// Ends everything that was spawned, and refuses more.
    pub(crate) fn end_tasks(&self) {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(tasks);
    }

    /// Whether its inference server is many, one for each copy.
    pub(crate) fn is_many(&self) -> bool {
        matches!(self.options.started, Some(Started::Models(_)))
    }

    /// The folder of a copy in the inference server's repository.
    pub(crate) fn folder(&self, entry: &Entry) -> PathBuf {
        self.options.repository.join(&entry.served)
    }

    /// Says how a copy stands.
    pub(crate) fn report(&self, entry: &Entry) {
        self.say(entry, entry.report());
    }

    /// Says `report` of a copy.
    pub(crate) fn say(&self, entry: &Entry, report: Report) {
        self.outbox.push(CopyReport { model: entry.model.clone(), generation: entry.generation, report, order: None });
    }

    /// How many requests wait for evicted copies.
    pub(crate) fn waiting(&self) -> u32 {
        self.waiting.load(SeqCst)
    }

    pub(crate) fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
