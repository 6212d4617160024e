//! The agent: stands beside one inference server, holds its copies, and opens the door to them.
//!
//! What the scheduler orders comes through `session` and is done by `reconcile`; what clients want comes
//! through `door` and takes a hold in `cache`; `residence` and `reload` move copies into memory and out of
//! it. The rules: resident bytes stay within the capacity, and come back within it when it becomes smaller; no copy is unloaded under a hold; the agent goes on
//! serving, evicting and reloading what it knows when no scheduler is to be had.

pub mod artifacts;
mod audit;
mod cache;
mod core;
mod disk;
mod door;
mod fence;
mod measure;
mod metrics;
mod options;
mod outbox;
pub mod probe;
pub mod process;
mod procfs;
mod reconcile;
mod recover;
mod reload;
mod residence;
pub mod runtimes;
mod session;
mod warm;
mod weigh;

use std::{
    fmt,
    sync::{Arc, PoisonError},
};

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use self::{
    cache::{Entry, Phase},
    core::Core,
    door::Door,
};
use crate::{
    domain::{copy::Report, ghost::Strain, memory::Resources, residency::Eviction},
    forward::Upstream,
    ports::{ArtifactSource, Clock, Network},
};

pub use self::{
    disk::DiskError,
    metrics::{Cell, Metrics},
    options::{Blocking, Facts, Options, RcloneUse},
    procfs::Listening,
};

/// What an agent needs from the world.
#[derive(Clone, Debug)]
pub struct Deps {
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
    /// How the scheduler is reached.
    pub network: Arc<dyn Network>,
    /// The inference server.
    pub server: Arc<dyn Upstream>,
    /// Where artifacts come from.
    pub sources: Vec<Arc<dyn ArtifactSource>>,
}

/// An agent. What it does in the background ends when it is dropped.
pub struct Agent {
    core: Arc<Core>,
    leaving: CancellationToken,
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Agent({})", self.core.options.replica)
    }
}

impl Agent {
    /// An agent that does nothing yet.
    #[must_use]
    pub fn new(options: Options, deps: Deps) -> Arc<Self> {
        Arc::new(Self { core: Arc::new(Core::new(options, deps)), leaving: CancellationToken::new() })
    }

    /// Takes up what was held before a restart, then keeps a session with the scheduler at `scheduler`
    /// (`host:port`) until `shutdown` is cancelled. To be called once.
    ///
    /// # Errors
    /// When the agent's files can't be used.
    pub async fn run(&self, scheduler: String, shutdown: CancellationToken) -> Result<(), DiskError> {
        let stop = shutdown.child_token();
        let serve = async {
            let done = self.serve(scheduler, shutdown).await;
            stop.cancel();
            done
        };
        match &self.core.options.started {
            None => serve.await,
            Some(process::Started::Server(server)) => {
                let tended = process::Tended(Arc::clone(&self.core));
                tokio::join!(serve, server.keep_up(&tended, stop.clone())).0
            }
            Some(process::Started::Models(models)) => {
                let done = serve.await;
                models.stop_all().await;
                done
            }
        }
    }

    async fn serve(&self, scheduler: String, shutdown: CancellationToken) -> Result<(), DiskError> {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return Ok(()),
            recovered = self.core.recover() => recovered?,
        }
        self.core.spawn(Arc::clone(&self.core).audit());
        self.core.spawn(Arc::clone(&self.core).keep_looking());
        session::keep(Arc::clone(&self.core), scheduler, self.leaving.clone(), shutdown).await;
        Ok(())
    }

    /// The replica goes for good: a server that the agent runs is stopped with it, also one that was to live on.
    pub fn retire(&self) {
        if let Some(process::Started::Server(server)) = &self.core.options.started {
            server.retire();
        }
    }

    /// Where requests come in.
    #[must_use]
    pub fn door(&self) -> Arc<dyn Upstream> {
        Arc::new(Door(Arc::clone(&self.core)))
    }

    /// The replica has another memory, or can serve something else, from now on. What is in memory beyond the new
    /// capacity is evicted as holds allow it, and the scheduler is told.
    pub fn restate(&self, facts: Facts) {
        self.core.restate(facts);
    }

    /// From now on copies leave memory in this order.
    pub fn evict_by(&self, eviction: Eviction) {
        self.core.ledger.set_rules(eviction, self.core.options.least_residency);
    }

    /// Tells the scheduler that the agent stops by intent, so that its copies are moved away. The agent goes
    /// on serving; [`drained`](Self::drained) says when it may stop.
    pub fn drain(&self) {
        self.leaving.cancel();
    }

    /// Waits until the agent holds no copy. The caller sets the deadline.
    pub async fn drained(&self) {
        self.core.book.emptied().await;
    }

    /// Why there is no session with the scheduler; nothing while there is one.
    #[must_use]
    pub fn session_problem(&self) -> Option<String> {
        let link = self.core.link.lock().unwrap_or_else(PoisonError::into_inner);
        if link.cluster.is_some() {
            return None;
        }
        Some(link.last_error.clone().unwrap_or_else(|| "the scheduler has not answered yet".to_owned()))
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.core.metrics
    }

    /// What can also fall: name as exported, meaning, value. Bytes are those of the primary device.
    #[must_use]
    pub fn gauges(&self) -> Vec<(&'static str, &'static str, u64)> {
        let facts = self.core.facts.load();
        let capacity = &facts.capacity;
        let overcommit = capacity.plus_percent(facts.overcommit_percent).saturating_sub(capacity);
        let (mut loaded, mut loaded_bytes, mut evicted_bytes) = (0_u64, 0_u64, 0_u64);
        for entry in self.core.book.all() {
            match entry.phase() {
                Phase::Resident | Phase::Evicting => {
                    loaded += 1;
                    loaded_bytes = loaded_bytes.saturating_add(entry.need().primary.0);
                }
                Phase::Evicted | Phase::Reloading => {
                    evicted_bytes = evicted_bytes.saturating_add(entry.need().primary.0);
                }
                Phase::Preparing | Phase::Draining | Phase::Gone => {}
            }
        }
        let Strain { leaked, advice } = self.core.strain();
        vec![
            ("seldon_loaded_model_gauge", "copies in memory", loaded),
            ("seldon_loaded_model_memory_bytes_gauge", "bytes of the copies in memory", loaded_bytes),
            ("seldon_evicted_model_memory_bytes_gauge", "bytes of the copies that are evicted", evicted_bytes),
            ("seldon_server_replica_memory_capacity_bytes_gauge", "the replica's memory", capacity.primary.0),
            (
                "seldon_server_replica_memory_capacity_overcommit_bytes_gauge",
                "what may be registered beyond the replica's memory",
                overcommit.primary.0,
            ),
            ("wharf_agent_leaked_bytes", "memory of the inference server that no copy accounts for", leaked.0),
            (
                "wharf_agent_returns_last_hour",
                "evicted copies that had to come back within the last hour",
                u64::from(advice.returns),
            ),
            ("wharf_agent_more_memory_bytes", "how much more memory would have spared half of them", advice.more.0),
            (
                "wharf_agent_more_memory_spares_percent",
                "how many percent of them it would have spared",
                u64::from(advice.spared_percent),
            ),
        ]
    }

    /// Everything there is to see, for people and tests.
    #[must_use]
    pub fn inspect(&self) -> Value {
        let core = &self.core;
        let (link, seen) = (core.link.lock().unwrap_or_else(PoisonError::into_inner).clone(), core.seen());
        let (bytes, artifacts) = core.artifacts.size();
        let metrics = core.metrics.samples();
        json!({
            "replica": core.options.replica.to_string(),
            "runtime": core.runtime.kind().name(),
            "capacity": resources(&core.ledger.capacity()),
            "resident": resources(&core.ledger.used()),
            "session": {
                "connected": link.cluster.is_some(),
                "cluster": link.cluster,
                "lastError": link.last_error,
                "lineage": seen.lineage,
                "leaderEpoch": seen.epoch,
            },
            "copies": core.book.all().iter().map(|entry| copy(entry)).collect::<Vec<_>>(),
            "waiting": core.waiting(),
            "artifacts": { "count": artifacts, "bytes": bytes },
            "counters": metrics.iter().map(|(name, _, value)| ((*name).to_owned(), json!(value))).collect::<serde_json::Map<_, _>>(),
        })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.core.end_tasks();
    }
}

fn resources(resources: &Resources) -> Value {
    json!({ "primary": resources.primary.0, "others": resources.others })
}

fn copy(entry: &Entry) -> Value {
    let state = match entry.report() {
        Report::Scheduled => "Scheduled",
        Report::Downloading(_) => "Downloading",
        Report::Loading { .. } => "Loading",
        Report::Available { .. } => "Available",
        Report::Draining { .. } => "Draining",
        Report::Unloaded => "Unloaded",
        Report::Failed { .. } => "Failed",
    };
    json!({
        "model": entry.model.as_str(),
        "version": entry.generation.version.0,
        "generation": entry.generation.to_string(),
        "servedName": entry.served,
        "state": state,
        "phase": format!("{:?}", entry.phase()),
        "holds": entry.holds(),
        "waiting": entry.waiting.load(std::sync::atomic::Ordering::SeqCst),
        "need": resources(&entry.need()),
        "uri": artifacts::redacted(&entry.spec.uri),
        "lastUsedMicros": entry.uses().last().as_micros(),
        "loads": {
            "count": entry.loads.count(),
            "averageMillis": entry.loads.average().map(|average| average.as_millis()),
            "maxMillis": entry.loads.max().as_millis(),
        },
    })
}
