//! Starting a scheduler: the journal is read, the counters move on, and the supervisor takes over.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use actix::{Addr, Recipient};

use super::{
    journal::Fatal,
    life::{LastWords, remember_panics},
    links::{Identity, Links, Slot, Timing},
    spawn::{Spawner, Work},
    supervisor::{RESERVED, Supervisor},
};
use crate::{
    domain::{
        leader::Leader,
        model::Policy,
        record::{Counters, Write},
    },
    messages::{
        Board,
        placement::Explain,
        router::{GatewayAcknowledged, GatewayConnected, GatewayGone},
        server::{AgentConnected, AgentSpoke, DeclareServer, MarkReplica},
        supervisor::{AskModel, Inspect},
    },
    ports::{Clock, CommitError, OpenError, Store},
    telemetry::{durations::Durations, events::Events, metrics::Metrics},
};

/// Everything that a scheduler needs from outside.
pub struct Scheduler {
    /// Where the journal is.
    pub store: Arc<dyn Store>,
    /// Whether commits block a thread of their own.
    pub blocking: bool,
    /// The clock.
    pub clock: Arc<dyn Clock>,
    /// What decides over models.
    pub policy: Policy,
    /// How long things may take.
    pub timing: Timing,
    /// Where actors run.
    pub spawner: Spawner,
    /// Events that are kept at most.
    pub events: usize,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Ends the process, after saying why.
    pub fatal: Fatal,
}

impl std::fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scheduler").field("store", &self.store).finish_non_exhaustive()
    }
}

/// A scheduler could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its journal can't be read.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Its journal can't be written.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

/// Reads the journal and starts every actor. Blocks while it reads.
///
/// # Errors
/// When the journal can't be read or written.
pub fn start(scheduler: Scheduler) -> Result<Handle, StartError> {
    remember_panics();
    let contents = scheduler.store.load()?;
    let mut before = contents.counters.clone();
    if before.leader_epoch == 0 {
        // Agents may hold copies of a journal that was lost: numbers that it gave are not to be given again.
        before.uid = before.uid.max(scheduler.clock.now().as_micros());
    }
    let leader = Leader { epoch: before.leader_epoch + 1, started: scheduler.clock.now() };
    let mut leaders = before.leaders;
    leaders.begin(leader);
    let counters = Counters {
        leader_epoch: leader.epoch,
        route_epoch: before.route_epoch + RESERVED,
        uid: before.uid + RESERVED,
        leaders: leaders.clone(),
    };
    scheduler.store.commit(&[Write::PutCounters(counters)])?;
    let identity = scheduler.store.identity();
    // The newest events before a crash were not kept: the leader epoch puts new numbers above theirs.
    let first = leader.epoch << 32;
    let (events, unread) = Events::restore(scheduler.events, first, &scheduler.store.load_events()?);
    if unread > 0 {
        tracing::warn!(target: "wharf::supervision", unread, "events of an earlier time can't be read");
    }
    let links = Arc::new(Links {
        started: leader.started,
        clock: scheduler.clock,
        policy: scheduler.policy,
        timing: scheduler.timing,
        identity: Identity { cluster: identity.cluster, lineage: identity.lineage, leader, leaders },
        board: Arc::new(Board::default()),
        events,
        metrics: scheduler.metrics,
        doors: dashmap::DashMap::new(),
        ways: Durations::default(),
        journal_problem: arc_swap::ArcSwapOption::empty(),
        spawner: scheduler.spawner,
        adopting: std::sync::atomic::AtomicBool::new(false),
        known: tokio_util::sync::CancellationToken::new(),
        restored: tokio_util::sync::CancellationToken::new(),
        supervisor: Slot::empty(),
        journal: Slot::empty(),
        placement: Slot::empty(),
        router: Slot::empty(),
        models: dashmap::DashMap::new(),
        servers: dashmap::DashMap::new(),
    });
    let supervisor = {
        let links = Arc::clone(&links);
        let (store, blocking, fatal) = (scheduler.store, scheduler.blocking, scheduler.fatal);
        let last_words = LastWords::new(Arc::clone(&fatal));
        let spawner = Arc::clone(&links);
        spawner.spawner.start(Work::Supervision, move || Supervisor {
            links,
            store,
            blocking,
            fatal,
            next_uid: before.uid,
            next_route_epoch: before.route_epoch,
            contents: Some(contents),
            declared: BTreeMap::new(),
            panics: VecDeque::new(),
            restarts: 0,
            names: BTreeSet::new(),
            absent_models: BTreeMap::new(),
            absent_servers: BTreeMap::new(),
            terminated: BTreeSet::new(),
            forgetting: VecDeque::new(),
            unforgotten: BTreeSet::new(),
            restoring: false,
            scanned: None,
            _last_words: last_words,
        })
    };
    Ok(Handle { supervisor, links })
}

/// A running scheduler, for whoever composes the process.
#[derive(Clone, Debug)]
pub struct Handle {
    supervisor: Addr<Supervisor>,
    /// What the actors share.
    pub links: Arc<Links>,
}

impl Handle {
    /// Waits until status knows every model that the journal has. Who is told before that a model is unknown, or is
    /// given a list that lacks it, takes it for deleted. What is asked of a model from here on waits until it is restored.
    pub async fn known(&self) {
        self.links.known.cancelled().await;
    }

    /// Waits until everything that the journal has is as it was. Who calls before that waits for an answer in vain.
    pub async fn restored(&self) {
        self.links.restored.cancelled().await;
    }

    /// Where users' requests about models go.
    #[must_use]
    pub fn models(&self) -> Recipient<AskModel> {
        self.supervisor.clone().recipient()
    }

    /// Where declarations of servers go.
    #[must_use]
    pub fn servers(&self) -> Recipient<DeclareServer> {
        self.supervisor.clone().recipient()
    }

    /// Where marks on replicas go.
    #[must_use]
    pub fn marks(&self) -> Recipient<MarkReplica> {
        self.supervisor.clone().recipient()
    }

    /// Where agents' sessions go: their first word.
    #[must_use]
    pub fn agents(&self) -> (Recipient<AgentConnected>, Recipient<AgentSpoke>) {
        (self.supervisor.clone().recipient(), self.supervisor.clone().recipient())
    }

    /// Where gateways' sessions go.
    #[must_use]
    pub fn gateways(&self) -> (Recipient<GatewayConnected>, Recipient<GatewayAcknowledged>, Recipient<GatewayGone>) {
        (self.supervisor.clone().recipient(), self.supervisor.clone().recipient(), self.supervisor.clone().recipient())
    }

    /// Where questions about placement go.
    #[must_use]
    pub fn explain(&self) -> Recipient<Explain> {
        self.supervisor.clone().recipient()
    }

    /// Where questions about actors go.
    #[must_use]
    pub fn inspect(&self) -> Recipient<Inspect> {
        self.supervisor.clone().recipient()
    }
}
