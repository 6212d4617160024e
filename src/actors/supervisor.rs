//! Starts the other actors, makes those anew that panic, and writes the supervision log.
//!
//! The rule of this module: a panic ends one actor and nothing else. It is rebuilt from the journal, and the
//! others tell it what it has to know. Too many panics in a short time are a fault that no restart mends:
//! then, or when the journal or the supervisor itself ends, the process exits.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Bound,
    sync::Arc,
};

use actix::{Actor, Addr, AsyncContext as _, Context, Handler};
use serde_json::json;

use super::{
    absent::{Absent, ForModel, ForServer},
    journal::{Fatal, Journal},
    life::{LastWords, Life},
    links::Links,
    model::ModelActor,
    placement::PlacementActor,
    router::RouterActor,
    server::ServerActor,
    spawn::Work,
};
use crate::{
    domain::{
        model::{Event, Model},
        names::{ModelName, ReplicaId, ServerName},
        record::{Contents, ServerRow},
        routes::Epoch,
        time::Instant,
    },
    messages::{
        Ask,
        journal::At,
        model::{Announce, Happened},
        placement::Explain,
        router::{GatewayAcknowledged, GatewayConnected, GatewayGone},
        server::{AgentConnected, AgentSpoke, Declare, DeclareServer, MarkReplica},
        supervisor::{AskModel, Begin, Ended, Inspect, Observe, Taken, Who},
    },
    ports::Store,
    telemetry::metrics::{ActorEvent, Name},
};

/// Numbers that one start reserves of each counter: more than one process can use.
pub(super) const RESERVED: u64 = 1 << 32;
/// Models whose state one look shows at most.
const OBSERVED: usize = 1000;
/// Scans that it takes to reach every model.
const SCANS: usize = 12;

pub(super) struct Supervisor {
    pub(super) links: Arc<Links>,
    pub(super) store: Arc<dyn Store>,
    pub(super) blocking: bool,
    pub(super) fatal: Fatal,
    pub(super) next_uid: u64,
    pub(super) next_route_epoch: u64,
    /// What the journal held at start, until every actor has its part.
    pub(super) contents: Option<Contents>,
    /// What servers' actors took of their owners last, for an actor that is made anew.
    pub(super) declared: BTreeMap<ServerName, Declare>,
    pub(super) panics: VecDeque<Instant>,
    pub(super) restarts: u64,
    /// Every model that has an actor, or is to have one again.
    pub(super) names: BTreeSet<ModelName>,
    pub(super) absent_models: BTreeMap<ModelName, Absent<ForModel>>,
    pub(super) absent_servers: BTreeMap<ServerName, Absent<ForServer>>,
    /// Deleted models, the first to be forgotten first.
    pub(super) terminated: BTreeSet<(Instant, ModelName)>,
    /// Models that are being removed from the journal, in the order of the commits.
    pub(super) forgetting: VecDeque<ModelName>,
    /// Models that the journal would not let go.
    pub(super) unforgotten: BTreeSet<ModelName>,
    /// Whether the journal's models are being started, all at once.
    pub(super) restoring: bool,
    /// The last model that a scan reached.
    pub(super) scanned: Option<ModelName>,
    pub(super) _last_words: LastWords,
}

impl Supervisor {
    fn life(&self, who: Who, ctx: &Context<Self>) -> Life {
        self.count(&who, ActorEvent::Started);
        Life::begin(who, ctx.address().recipient(), self.restoring)
    }

    fn count(&self, who: &Who, event: ActorEvent) {
        self.links.metrics.scheduler.actor(Name(who.kind()), event);
    }

    fn start_journal(&self, ctx: &Context<Self>) {
        let (store, blocking, fatal) = (Arc::clone(&self.store), self.blocking, Arc::clone(&self.fatal));
        let (links, life) = (Arc::clone(&self.links), self.life(Who::Journal, ctx));
        let addr = self.links.spawner.start(Work::Journal, move || Journal::new(store, blocking, fatal, links, life));
        self.links.journal.fill(addr);
    }

    fn start_placement(&self, ctx: &Context<Self>) {
        let (links, life) = (Arc::clone(&self.links), self.life(Who::Placement, ctx));
        let addr = self.links.spawner.start(Work::Placement, move || PlacementActor::new(links, life));
        self.links.placement.fill(addr);
    }

    fn start_router(&mut self, ctx: &Context<Self>) {
        // The epoch goes on: a router made anew starts above all that the one before it can have given.
        let epoch = Epoch(self.next_route_epoch);
        self.next_route_epoch += RESERVED / 1024;
        let (links, life) = (Arc::clone(&self.links), self.life(Who::Router, ctx));
        let addr = self.links.spawner.start(Work::Journal, move || RouterActor::new(epoch, links, life));
        self.links.router.fill(addr);
    }

    pub(super) fn start_server(
        &self,
        row: ServerRow,
        declared: Option<Declare>,
        ctx: &Context<Self>,
    ) -> Addr<ServerActor> {
        let (links, life) = (Arc::clone(&self.links), self.life(Who::Server(row.name.clone()), ctx));
        let name = row.name.clone();
        // Before any model asks for them: a route without its doors would be a route to nowhere.
        for (index, door) in &row.doors {
            self.links.doors.insert(ReplicaId::new(name.clone(), *index), door.clone());
        }
        let addr = self.links.spawner.start(Work::Servers, move || ServerActor::new(row, declared, links, life));
        self.links.servers.insert(name, addr.clone());
        addr.do_send(Begin);
        addr
    }

    pub(super) fn start_model(&mut self, model: Arc<Model>, ctx: &Context<Self>) -> Addr<ModelActor> {
        let name = model.name.clone();
        let (links, life) = (Arc::clone(&self.links), self.life(Who::Model(name.clone()), ctx));
        let addr = self.links.spawner.start(Work::Models, move || ModelActor::new(model, links, life));
        self.links.models.insert(name.clone(), addr.clone());
        self.names.insert(name);
        addr.do_send(Begin);
        addr
    }

    pub(super) fn fatal(&self, why: String) {
        tracing::error!(target: "wharf::supervision", event = "escalated", why, "the process exits");
        (self.fatal)(why);
    }

    /// Makes an actor anew that panicked.
    fn restart(&mut self, who: &Who, cause: &str, ctx: &mut Context<Self>) {
        let now = self.links.clock.now();
        let window = self.links.timing.restart_window;
        self.panics.retain(|at| now.since(*at) <= window);
        self.panics.push_back(now);
        if self.panics.len() > self.links.timing.restarts as usize {
            self.count(who, ActorEvent::Escalated);
            let (count, name) = (self.panics.len(), who.to_string());
            self.fatal(format!(
                "{count} actors panicked within {window:?}, {name} last ({cause}); no restart mends that"
            ));
            return;
        }
        self.restarts += 1;
        self.count(who, ActorEvent::Restarted);
        match who {
            Who::Journal => {
                self.fatal(format!("the journal's actor panicked ({cause})"));
                return;
            }
            Who::Placement => {
                self.links.placement.clear();
                self.start_placement(ctx);
            }
            Who::Router => {
                self.links.router.clear();
                self.start_router(ctx);
            }
            Who::Server(name) => {
                self.rebuild(At::Server(name.clone()), cause, ctx);
                return;
            }
            Who::Model(name) => {
                self.rebuild(At::Model(name.clone()), cause, ctx);
                return;
            }
        }
        self.restarted(who, cause);
    }

    pub(super) fn restarted(&self, who: &Who, cause: &str) {
        tracing::warn!(target: "wharf::supervision", event = "actor_restarted", actor = %who, cause, restarts = self.restarts, "actor restarted");
    }

    /// Forgets deleted models whose retention is over.
    pub(super) fn forget(&mut self) {
        let now = self.links.clock.now();
        let (retention, retained) = (self.links.timing.retention, self.links.timing.retained);
        while let Some((at, _)) = self.terminated.first() {
            if self.terminated.len() <= retained && now.since(*at) < retention {
                return;
            }
            let Some((at, name)) = self.terminated.pop_first() else { return };
            // One that was submitted again since, and deleted again, is another model.
            let over =
                self.links.board.model(&name).is_some_and(|model| model.deleted == Some(at) && model.copies.is_empty());
            if over {
                self.retire(name);
            }
        }
    }

    /// Has a part of all models compare wanted with reported, so that each does once a minute or so.
    fn scan(&mut self) {
        let share = self.names.len().div_ceil(SCANS).max(100);
        let after = self.scanned.take().map_or(Bound::Unbounded, Bound::Excluded);
        let names: Vec<ModelName> = self.names.range((after, Bound::Unbounded)).take(share).cloned().collect();
        if names.len() == share {
            self.scanned = names.last().cloned();
        }
        for name in names {
            if self.links.board.model(&name).is_some() {
                self.links.tell_model(&name, Happened(Event::Reconcile));
                self.links.tell_model(&name, Announce::ToServer);
            } else {
                // It never became a model. Should it be about to become one, it says so.
                self.retire(name);
            }
        }
    }
}

impl Actor for Supervisor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.links.supervisor.fill(ctx.address());
        self.start_journal(ctx);
        self.start_placement(ctx);
        self.start_router(ctx);
        if let Some(contents) = self.contents.take() {
            self.restore(contents, ctx);
        }
        ctx.run_interval(self.links.timing.scan, |supervisor, ctx| {
            supervisor.forget_again(ctx);
            supervisor.forget();
            supervisor.scan();
        });
    }
}

impl Handler<Ended> for Supervisor {
    type Result = ();

    fn handle(&mut self, ended: Ended, ctx: &mut Self::Context) {
        match ended.panic {
            Some(cause) => {
                self.count(&ended.who, ActorEvent::Panicked);
                tracing::error!(target: "wharf::supervision", event = "actor_panicked", actor = %ended.who, cause, "actor panicked");
                self.restart(&ended.who, &cause, ctx);
            }
            None => {
                self.count(&ended.who, ActorEvent::Stopped);
                tracing::info!(target: "wharf::supervision", event = "actor_stopped", actor = %ended.who, "actor stopped");
                match &ended.who {
                    Who::Model(name) => self.model_ended(name, ctx),
                    Who::Server(name) => self.server_ended(name, ctx),
                    Who::Journal | Who::Placement | Who::Router => {}
                }
            }
        }
    }
}

impl Handler<AskModel> for Supervisor {
    type Result = ();

    fn handle(&mut self, ask: AskModel, ctx: &mut Self::Context) {
        self.for_model(ForModel::Asked(ask), ctx);
    }
}

impl Handler<DeclareServer> for Supervisor {
    type Result = ();

    fn handle(&mut self, ask: DeclareServer, ctx: &mut Self::Context) {
        self.for_server(ForServer::Declare(ask), ctx);
    }
}

impl Handler<MarkReplica> for Supervisor {
    type Result = ();

    fn handle(&mut self, ask: MarkReplica, ctx: &mut Self::Context) {
        self.for_server(ForServer::Mark(ask), ctx);
    }
}

impl Handler<Taken> for Supervisor {
    type Result = ();

    fn handle(&mut self, Taken(declare): Taken, _: &mut Self::Context) {
        self.declared.insert(declare.server.clone(), declare);
    }
}

impl Handler<AgentConnected> for Supervisor {
    type Result = ();

    fn handle(&mut self, connected: AgentConnected, ctx: &mut Self::Context) {
        let name = &connected.hello.replica.server;
        if self.absent_servers.contains_key(name) {
            // Its session ends with this; the agent calls again, and by then there is an actor to hear it.
            return;
        }
        let known = self.links.servers.get(name).map(|addr| addr.clone());
        let server = known.unwrap_or_else(|| self.start_server(ServerRow::called(name.clone()), None, ctx));
        self.adopt(&connected.hello, ctx);
        server.do_send(connected);
    }
}

impl Handler<AgentSpoke> for Supervisor {
    type Result = ();

    fn handle(&mut self, spoke: AgentSpoke, _: &mut Self::Context) {
        self.links.tell_server(&spoke.replica.server.clone(), spoke);
    }
}

impl Handler<GatewayConnected> for Supervisor {
    type Result = ();

    fn handle(&mut self, connected: GatewayConnected, _: &mut Self::Context) {
        self.links.router.tell(connected);
    }
}

impl Handler<GatewayAcknowledged> for Supervisor {
    type Result = ();

    fn handle(&mut self, acknowledged: GatewayAcknowledged, _: &mut Self::Context) {
        self.links.router.tell(acknowledged);
    }
}

impl Handler<GatewayGone> for Supervisor {
    type Result = ();

    fn handle(&mut self, gone: GatewayGone, _: &mut Self::Context) {
        self.links.router.tell(gone);
    }
}

impl Handler<Explain> for Supervisor {
    type Result = ();

    fn handle(&mut self, explain: Explain, _: &mut Self::Context) {
        self.links.placement.tell(explain);
    }
}

impl Handler<Inspect> for Supervisor {
    type Result = ();

    fn handle(&mut self, Ask { reply, .. }: Inspect, _: &mut Self::Context) {
        let (links, round) = (&self.links, Observe::round(reply));
        round.answer(
            "supervisor",
            json!({
                "leader_epoch": links.identity.leader.epoch,
                "cluster": links.identity.cluster,
                "lineage": links.identity.lineage,
                "models": links.models.len(),
                "servers": links.servers.len(),
                "restarts": self.restarts,
                "terminated": self.terminated.len(),
                "absent": self.absent_models.len() + self.absent_servers.len(),
            }),
        );
        links.journal.tell(round.clone());
        links.placement.tell(round.clone());
        links.router.tell(round.clone());
        for server in links.servers.iter() {
            server.do_send(round.clone());
        }
        for name in self.names.iter().take(OBSERVED) {
            links.tell_model(name, round.clone());
        }
    }
}
