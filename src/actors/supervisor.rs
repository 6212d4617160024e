//! Starts the other actors, makes those anew that panic, and writes the supervision log.
//!
//! The rule of this module: a panic ends one actor and nothing else. It is rebuilt from the journal, and the
//! others tell it what it has to know. Too many panics in a short time are a fault that no restart mends:
//! then, or when the journal or the supervisor itself ends, the process exits.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use actix::{Actor, Addr, AsyncContext as _, Context, Handler, Recipient};
use serde_json::json;

use super::{
    journal::{Fatal, Journal},
    life::Life,
    links::Links,
    model::ModelActor,
    placement::PlacementActor,
    router::RouterActor,
    server::ServerActor,
    spawn::Work,
};
use crate::{
    domain::{
        error::{Code, Refusal},
        model::{Event, Model},
        names::{ModelName, ReplicaId, ServerName},
        record::{Contents, ServerRow, Write},
        routes::Epoch,
        time::Instant,
        version::Uid,
    },
    messages::{
        Ask,
        journal::{Commit, Committed},
        model::{Announce, Happened, Request, Stop},
        placement::Explain,
        router::{GatewayAcknowledged, GatewayConnected, GatewayGone},
        server::{AgentConnected, AgentSpoke, Declare, DeclareServer, MarkReplica},
        supervisor::{Action, AskModel, Begin, Ended, Inspect, Observe, OnModel, Terminated, Who},
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
    /// Servers as their owners last wanted them, for an actor that is made anew.
    pub(super) declared: BTreeMap<ServerName, Declare>,
    pub(super) panics: VecDeque<Instant>,
    pub(super) restarts: u64,
    /// Deleted models, the first to be forgotten first.
    pub(super) terminated: VecDeque<(Instant, ModelName)>,
    /// Models whose actors were asked to end.
    pub(super) retiring: BTreeSet<ModelName>,
    pub(super) unheard: Recipient<Committed>,
    /// Whether the journal's models are being started, all at once.
    pub(super) restoring: bool,
    /// The last model that a scan reached.
    pub(super) scanned: Option<ModelName>,
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

    pub(super) fn start_server(&self, row: ServerRow, ctx: &Context<Self>) -> Addr<ServerActor> {
        let declaration = self.declared.get(&row.name).and_then(|declare| declare.declaration.clone());
        let (links, life) = (Arc::clone(&self.links), self.life(Who::Server(row.name.clone()), ctx));
        let name = row.name.clone();
        // Before any model asks for them: a route without its doors would be a route to nowhere.
        for (index, door) in &row.doors {
            self.links.doors.insert(ReplicaId::new(name.clone(), *index), door.clone());
        }
        let addr = self.links.spawner.start(Work::Servers, move || ServerActor::new(row, declaration, links, life));
        self.links.servers.insert(name, addr.clone());
        addr.do_send(Begin);
        addr
    }

    fn server(&self, name: &ServerName, ctx: &Context<Self>) -> Addr<ServerActor> {
        let known = self.links.servers.get(name).map(|addr| addr.clone());
        known.unwrap_or_else(|| self.start_server(ServerRow::called(name.clone()), ctx))
    }

    pub(super) fn start_model(&self, model: Model, ctx: &Context<Self>) -> Addr<ModelActor> {
        let name = model.name.clone();
        let (links, life) = (Arc::clone(&self.links), self.life(Who::Model(name.clone()), ctx));
        let addr = self.links.spawner.start(Work::Models, move || ModelActor::new(model, links, life));
        self.links.models.insert(name, addr.clone());
        addr.do_send(Begin);
        addr
    }

    fn fatal(&self, why: String) {
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
                self.links.servers.remove(name);
                let row = self.links.board.server(name).map(|view| view.row.clone());
                self.start_server(row.unwrap_or_else(|| ServerRow::called(name.clone())), ctx);
            }
            Who::Model(name) => {
                self.links.models.remove(name);
                match self.store.load_model(name) {
                    Ok(Some((row, versions, copies))) => self.restore_model(row, versions, copies, now, ctx),
                    Ok(None) => self.links.board.remove_model(name),
                    Err(error) => {
                        self.fatal(format!("model {name} can't be rebuilt from the journal: {error}"));
                        return;
                    }
                }
            }
        }
        tracing::warn!(target: "wharf::supervision", event = "actor_restarted", actor = %who, cause, restarts = self.restarts, "actor restarted");
    }

    /// Forgets deleted models whose retention is over.
    fn forget(&mut self) {
        let now = self.links.clock.now();
        let (retention, retained) = (self.links.timing.retention, self.links.timing.retained);
        while let Some((at, _)) = self.terminated.front() {
            if self.terminated.len() <= retained && now.since(*at) < retention {
                return;
            }
            let Some((_, name)) = self.terminated.pop_front() else { return };
            let over =
                self.links.board.model(&name).is_some_and(|model| model.deleted.is_some() && model.copies.is_empty());
            if !over {
                continue;
            }
            self.retire(name);
        }
    }

    /// Asks a model's actor to end. What is left of the model goes when it has.
    fn retire(&mut self, name: ModelName) {
        if self.links.tell_model(&name, Stop) {
            self.retiring.insert(name);
        }
    }

    /// A model's actor has ended by intent.
    fn retired(&mut self, name: &ModelName) {
        if !self.retiring.remove(name) {
            return;
        }
        self.links.models.remove(name);
        // One that was submitted again since it was asked to end is another model.
        if self.links.board.model(name).is_some_and(|model| model.deleted.is_some() && model.copies.is_empty()) {
            self.links.board.remove_model(name);
            let by = self.unheard.clone();
            self.links.journal.tell(Commit { writes: vec![Write::RemoveModel(name.clone())], by });
        }
    }

    /// Has a part of all models compare wanted with reported, so that each does once a minute or so.
    fn scan(&mut self) {
        let share = (self.links.models.len() / SCANS).max(100);
        let mut names: Vec<ModelName> = self.links.models.iter().map(|entry| entry.key().clone()).collect();
        names.sort_unstable();
        let from = self.scanned.take().map_or(0, |last| names.partition_point(|name| *name <= last));
        for name in names.iter().skip(from).take(share) {
            self.links.tell_model(name, Happened(Event::Reconcile));
            self.links.tell_model(name, Announce::ToServer);
        }
        self.scanned = names.get(from + share).map(|_| names[from + share - 1].clone());
    }
}

/// Hears the end of a commit that nobody waits for.
pub(super) struct Unheard;

impl Actor for Unheard {
    type Context = Context<Self>;
}

impl Handler<Committed> for Unheard {
    type Result = ();

    fn handle(&mut self, _: Committed, _: &mut Self::Context) {}
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
        ctx.run_interval(self.links.timing.scan, |supervisor, _| {
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
                    Who::Model(name) => self.retired(name),
                    Who::Server(name) if !self.links.servers.contains_key(name) => drop(self.declared.remove(name)),
                    Who::Server(_) | Who::Journal | Who::Placement | Who::Router => {}
                }
            }
        }
    }
}

impl Handler<AskModel> for Supervisor {
    type Result = ();

    fn handle(&mut self, Ask { question, reply }: AskModel, ctx: &mut Self::Context) {
        let OnModel { name, action } = question;
        let known = self.links.models.get(&name).map(|addr| addr.clone());
        let event = match action {
            Action::Submit(definition) => {
                self.next_uid += 1;
                let addr = known.unwrap_or_else(|| self.start_model(Model::unborn(name, self.links.clock.now()), ctx));
                addr.do_send(Request { event: Event::Submit(definition, Uid(self.next_uid)), reply });
                return;
            }
            Action::Delete(kubernetes) => Event::Delete(kubernetes),
            Action::Rollback(to) => Event::Rollback(to),
            Action::Scale(replicas) => Event::Scale(replicas),
        };
        match known {
            Some(addr) => addr.do_send(Request { event, reply }),
            None => {
                let text = format!("model {name} is not known");
                drop(reply.send(Err(Refusal::new(Code::FailedPrecondition, text))));
            }
        }
    }
}

impl Handler<Terminated> for Supervisor {
    type Result = ();

    fn handle(&mut self, Terminated(name): Terminated, _: &mut Self::Context) {
        if self.links.board.model(&name).is_some() {
            self.terminated.push_back((self.links.clock.now(), name));
            self.forget();
        } else {
            // Its first submission was refused: it never was a model.
            self.retire(name);
        }
    }
}

impl Handler<DeclareServer> for Supervisor {
    type Result = ();

    fn handle(&mut self, ask: DeclareServer, ctx: &mut Self::Context) {
        let name = ask.question.server.clone();
        if ask.question.declaration.is_none() && !self.links.servers.contains_key(&name) {
            drop(ask.reply.send(Err(Refusal::new(Code::NotFound, format!("server {name} is not known")))));
            return;
        }
        self.declared.insert(name.clone(), ask.question.clone());
        self.server(&name, ctx).do_send(ask);
    }
}

impl Handler<MarkReplica> for Supervisor {
    type Result = ();

    fn handle(&mut self, ask: MarkReplica, _: &mut Self::Context) {
        let name = ask.question.server.clone();
        match self.links.servers.get(&name).map(|addr| addr.clone()) {
            Some(addr) => addr.do_send(ask),
            None => {
                let known: Vec<String> =
                    self.links.board.servers().iter().map(|server| server.row.name.to_string()).collect();
                let text = format!("server {name} is not known; known are: {}", known.join(", "));
                drop(ask.reply.send(Err(Refusal::new(Code::NotFound, text))));
            }
        }
    }
}

impl Handler<AgentConnected> for Supervisor {
    type Result = ();

    fn handle(&mut self, connected: AgentConnected, ctx: &mut Self::Context) {
        let server = self.server(&connected.hello.replica.server, ctx);
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
                "retiring": self.retiring.len(),
            }),
        );
        links.journal.tell(round.clone());
        links.placement.tell(round.clone());
        links.router.tell(round.clone());
        for server in links.servers.iter() {
            server.do_send(round.clone());
        }
        for model in links.all_models().into_iter().take(OBSERVED) {
            model.do_send(round.clone());
        }
    }
}
