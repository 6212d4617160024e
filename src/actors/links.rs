//! How actors reach each other and what they share.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use actix::{Actor, Addr, Context, Handler, Message, dev::ToEnvelope};
use arc_swap::ArcSwapOption;
use dashmap::DashMap;
use tokio_util::sync::CancellationToken;

use super::{
    journal::Journal, model::ModelActor, placement::PlacementActor, router::RouterActor, server::ServerActor,
    spawn::Spawner, supervisor::Supervisor,
};
use crate::{
    domain::{
        leader::{Leader, Leaders},
        model::{Note, Outlook, Policy},
        names::{ModelName, ReplicaId, ServerName},
        recycle,
        time::Instant,
    },
    messages::{Board, supervisor::Who},
    ports::Clock,
    telemetry::{durations::Durations, events::Events, metrics::Metrics},
};

/// Everything that an actor needs beyond its own state.
pub struct Links {
    /// The clock.
    pub clock: Arc<dyn Clock>,
    /// What decides over models.
    pub policy: Policy,
    /// How long things may take.
    pub timing: Timing,
    /// Whose journal this is, and which leader.
    pub identity: Identity,
    /// When this scheduler started.
    pub started: Instant,
    /// What readers see.
    pub board: Arc<Board>,
    /// What happened.
    pub events: Events,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Where each replica's door is, as its agent said.
    pub doors: DashMap<ReplicaId, String>,
    /// Why the journal's last commit failed; nothing once one has succeeded again.
    pub journal_problem: ArcSwapOption<String>,
    /// How long copies take from their order to their first answer.
    pub ways: Durations,
    /// Where actors run.
    pub spawner: Spawner,
    /// Whether agents or gateways of another journal have called.
    pub(super) adopting: AtomicBool,
    /// Cancelled once the board has every model of the journal.
    pub(super) known: CancellationToken,
    /// Cancelled once each of them has its actor.
    pub(super) restored: CancellationToken,
    pub(super) supervisor: Slot<Supervisor>,
    pub(super) journal: Slot<Journal>,
    pub(super) placement: Slot<PlacementActor>,
    pub(super) router: Slot<RouterActor>,
    pub(super) models: DashMap<ModelName, Addr<ModelActor>>,
    pub(super) servers: DashMap<ServerName, Addr<ServerActor>>,
}

/// How long things may take.
#[derive(Clone, Debug)]
pub struct Timing {
    /// An agent that is silent for longer is Unknown.
    pub lease: Duration,
    /// How often an agent is to be heard.
    pub heartbeat: Duration,
    /// A replica that is Unknown for longer is Lost.
    pub grace: Duration,
    /// A gateway that acknowledges nothing for longer is not waited for.
    pub gateway_lease: Duration,
    /// How long requests in flight may keep a copy that is to leave.
    pub drain: Duration,
    /// How often each actor compares wanted with reported though nothing happened.
    pub scan: Duration,
    /// How long a deleted model is still listed.
    pub retention: Duration,
    /// How many deleted models are still listed.
    pub retained: usize,
    /// Panics that an actor may have within [`restart_window`](Self::restart_window).
    pub restarts: u32,
    /// See [`restarts`](Self::restarts).
    pub restart_window: Duration,
    /// How patient one is with inference servers that leak; absent when none is ended for that.
    pub recycle: Option<recycle::Patience>,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(5),
            heartbeat: Duration::from_secs(1),
            grace: Duration::from_secs(30),
            gateway_lease: Duration::from_secs(5),
            drain: Duration::from_secs(30),
            scan: Duration::from_secs(5),
            retention: Duration::from_secs(24 * 3600),
            retained: 10_000,
            restarts: 10,
            restart_window: Duration::from_secs(60),
            recycle: Some(recycle::Patience::default()),
        }
    }
}

/// Whose journal this is, and which leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Of the cluster.
    pub cluster: String,
    /// Of the journal.
    pub lineage: String,
    /// This start.
    pub leader: Leader,
    /// The starts of this journal, this one included.
    pub leaders: Leaders,
}

impl Links {
    /// Tells a model, if it has an actor.
    pub(super) fn tell_model<M>(&self, name: &ModelName, message: M) -> bool
    where
        M: Message + Send + 'static,
        M::Result: Send,
        ModelActor: Handler<M>,
    {
        let Some(addr) = self.models.get(name).map(|addr| addr.clone()) else { return false };
        addr.do_send(message);
        true
    }

    /// Tells a server, if it has an actor.
    pub(super) fn tell_server<M>(&self, name: &ServerName, message: M) -> bool
    where
        M: Message + Send + 'static,
        M::Result: Send,
        ServerActor: Handler<M>,
    {
        let Some(addr) = self.servers.get(name).map(|addr| addr.clone()) else { return false };
        addr.do_send(message);
        true
    }

    /// Where the replica's door is, as far as is known.
    pub(super) fn door(&self, on: &ReplicaId) -> Option<String> {
        self.doors.get(on).map(|door| door.clone())
    }

    /// What tells when a model that does not answer will.
    pub(super) fn outlook(&self) -> Outlook<'_> {
        Outlook { policy: &self.policy, usual: self.ways.average() }
    }

    /// Every model that has an actor.
    pub(super) fn all_models(&self) -> Vec<Addr<ModelActor>> {
        let mut models: Vec<_> = self.models.iter().map(|entry| (entry.key().clone(), entry.clone())).collect();
        models.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        models.into_iter().map(|(_, addr)| addr).collect()
    }

    /// Every server that has an actor.
    pub(super) fn all_servers(&self) -> Vec<Addr<ServerActor>> {
        let mut servers: Vec<_> = self.servers.iter().map(|entry| (entry.key().clone(), entry.clone())).collect();
        servers.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        servers.into_iter().map(|(_, addr)| addr).collect()
    }

    /// When the first unload may be ordered: until then a gateway may still send by a table of the scheduler
    /// before this one.
    pub(super) fn unloads_from(&self) -> Instant {
        self.adopts_until().unwrap_or(self.started) + self.timing.gateway_lease
    }

    /// Agents or gateways of another journal have called: there is something to adopt.
    pub(super) fn adopt(&self) {
        self.adopting.store(true, Ordering::Relaxed);
    }

    /// Until when agents of another journal may still call for the first time, if any did.
    pub(super) fn adopts_until(&self) -> Option<Instant> {
        self.adopting.load(Ordering::Relaxed).then(|| self.started + self.timing.grace)
    }

    /// Records something for people.
    pub(super) fn note(&self, who: &Who, note: Note) {
        tracing::info!(target: "wharf::events", subject = %who, kind = note.kind, "{}", note.message);
        self.events.publish(self.clock.now(), who.to_string(), note.kind, note.message, note.data);
    }
}

impl fmt::Debug for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Links").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// Where an actor is that may be made anew: empty in between.
pub(super) struct Slot<A: Actor>(ArcSwapOption<Addr<A>>);

impl<A: Actor<Context = Context<A>>> Slot<A> {
    pub(super) const fn empty() -> Self {
        Self(ArcSwapOption::const_empty())
    }

    pub(super) fn fill(&self, addr: Addr<A>) {
        self.0.store(Some(Arc::new(addr)));
    }

    pub(super) fn clear(&self) {
        self.0.store(None);
    }

    /// Tells the actor. While it is being made anew the message is lost: it asks everyone when it is back.
    pub(super) fn tell<M>(&self, message: M)
    where
        M: Message + Send + 'static,
        M::Result: Send,
        A: Handler<M>,
        A::Context: ToEnvelope<A, M>,
    {
        if let Some(addr) = &*self.0.load() {
            addr.do_send(message);
        }
    }
}
