//! One server: its replicas, the sessions of their agents, what is wanted there and what each reported last.
//!
//! Orders are a set of what is wanted, compared with what is reported on every word of the agent and on a
//! timer; an order that was lost is sent again.

mod leave;
mod news;
mod recycle;
mod refuse;
mod replica;
mod rows;
mod view;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem,
    sync::Arc,
};

use actix::{Actor, ActorContext as _, AsyncContext as _, Context, Handler};
use serde_json::json;

use self::{
    news::News,
    replica::Replica,
    rows::{Change, Tentative},
};
use super::{life::Life, links::Links};
use crate::{
    domain::{
        copy::Event as CopyEvent,
        model::{Event, Model, Note},
        names::{ModelName, ReplicaId},
        record::ServerRow,
        recycle::Recycling,
        replica::{Event as ReplicaEvent, Patience, ReplicaState, step},
        time::Instant,
    },
    messages::{
        model::Announce,
        server::{AgentConnected, AgentSpoke, Declaration, Declare, Down, Enquire, Recall, SetOrder, SetOrders, Word},
        supervisor::{Begin, Observe, Stays, Stop, Who},
    },
};

pub(super) struct ServerActor {
    row: ServerRow,
    declaration: Option<Declaration>,
    removing: bool,
    begun: Instant,
    /// Replicas whose agents are about to be told something new.
    unsaid: BTreeSet<u32>,
    /// Whether readers are about to be shown how the server is.
    showing: bool,
    replicas: BTreeMap<u32, Replica>,
    /// What agents reported and models are about to be told.
    news: News,
    /// Of those, the ones whose agents said that they are about to stop.
    stopping: BTreeSet<u32>,
    /// Models that were told to leave a replica and not yet that they may stay.
    leavers: BTreeSet<ModelName>,
    /// Whose inference server is ended and started anew.
    recycling: Recycling,
    links: Arc<Links>,
    /// The row on its way to the journal.
    committing: Option<Tentative>,
    /// Changes that wait for it.
    changes: VecDeque<Change>,
    _life: Life,
}

impl ServerActor {
    /// A server as its row has it. `declared` is what the actor before this one took of the owner.
    pub(super) fn new(row: ServerRow, declared: Option<Declare>, links: Arc<Links>, life: Life) -> Self {
        let mut actor = Self {
            removing: declared.as_ref().is_some_and(|declare| declare.declaration.is_none()),
            declaration: declared.and_then(|declare| declare.declaration),
            begun: links.clock.now(),
            row,
            unsaid: BTreeSet::new(),
            showing: false,
            replicas: BTreeMap::new(),
            news: News::default(),
            stopping: BTreeSet::new(),
            leavers: BTreeSet::new(),
            recycling: Recycling::default(),
            links,
            committing: None,
            changes: VecDeque::new(),
            _life: life,
        };
        actor.expect();
        // What an operator said of one that called before is kept until it is known to be gone.
        let called: Vec<u32> = actor.row.doors.keys().copied().collect();
        actor.make_room(called);
        actor
    }

    /// Makes room for every replica that is expected.
    fn expect(&mut self) {
        let expected = if self.removing { 0 } else { self.row.expected.unwrap_or(0) };
        self.make_room(0..expected);
    }

    fn make_room(&mut self, indexes: impl IntoIterator<Item = u32>) {
        let now = self.links.clock.now();
        for index in indexes {
            // One whose agent has called before may hold copies: it is not waited for longer than the grace period.
            let called = self.row.doors.contains_key(&index);
            let state = if called { ReplicaState::Unknown { since: now } } else { ReplicaState::Pending };
            self.replicas.entry(index).or_insert_with(|| Replica::new(state, now));
        }
    }

    /// The replica on which a model says to have a copy. A lost one has none: then the model is told so.
    fn spoken_of(&mut self, id: &ReplicaId, model: &ModelName) -> Option<&mut Replica> {
        let now = self.links.clock.now();
        let missed = ReplicaState::Unknown { since: now };
        let state = self.replicas.entry(id.index).or_insert_with(|| Replica::new(missed, now)).state;
        if state == ReplicaState::Lost {
            self.tell(model, Event::Replica(id.clone(), CopyEvent::ReplicaLost));
            return None;
        }
        let replica = self.replicas.get_mut(&id.index)?;
        if state == ReplicaState::Pending {
            // It was given a copy, so its agent has called before.
            (replica.state, replica.since) = (missed, now);
        }
        Some(replica)
    }

    fn id(&self, index: u32) -> ReplicaId {
        ReplicaId::new(self.row.name.clone(), index)
    }

    fn note(&self, kind: &'static str, message: String) {
        let data = json!({ "owner": self.row.owner.name(), "expected": self.row.expected });
        self.links.note(&Who::Server(self.row.name.clone()), Note::new(kind, message, &data));
    }

    fn patience(&self) -> Patience {
        Patience { lease: self.links.timing.lease, grace: self.links.timing.grace }
    }

    fn set_state(&mut self, index: u32, event: ReplicaEvent, ctx: &mut Context<Self>) {
        let (now, patience) = (self.links.clock.now(), self.patience());
        let id = self.id(index);
        let Some(replica) = self.replicas.get_mut(&index) else { return };
        let before = replica.state;
        replica.state = step(before, event, patience, now);
        if replica.state == before {
            return;
        }
        if replica.state.name() == before.name() {
            // It is silent, or refuses, as before: nobody has to hear of that again.
            return self.show();
        }
        replica.since = now;
        let lost = match replica.state {
            ReplicaState::Unknown { .. } => Some(CopyEvent::AgentLost),
            ReplicaState::Lost => Some(CopyEvent::ReplicaLost),
            ReplicaState::Pending | ReplicaState::Available | ReplicaState::Draining => None,
        };
        let models = replica.models();
        if replica.state == ReplicaState::Lost {
            replica.forget();
        }
        self.note(
            replica_kind(self.replicas[&index].state),
            format!("replica {index} is {}", self.replicas[&index].state.name()),
        );
        if let Some(event) = lost {
            for model in models {
                self.tell(&model, Event::Replica(id.clone(), event.clone()));
            }
        }
        self.publish_one(index);
        self.show_soon(ctx);
    }

    fn tick(&mut self, ctx: &mut Context<Self>) {
        let now = self.links.clock.now();
        let indexes: Vec<u32> = self.replicas.keys().copied().collect();
        for index in indexes {
            let heard = self.replicas[&index].heard;
            self.set_state(index, ReplicaEvent::Passed { heard }, ctx);
            if let Some(replica) = self.replicas.get_mut(&index) {
                replica.repeat(now, &self.links);
            }
        }
        self.recycle();
        self.forget_over(ctx);
        self.compare(ctx);
        self.show();
    }

    fn set_order(&mut self, SetOrder { replica: id, order }: SetOrder, ctx: &mut Context<Self>) {
        let (model, generation) = (order.model().clone(), order.generation());
        let Some(replica) = self.spoken_of(&id, &model) else { return };
        let known = replica.set(order);
        if self.unsaid.is_empty() {
            // Whatever is in the mailbox by then shares the message.
            ctx.notify(Say);
        }
        self.unsaid.insert(id.index);
        let leaves = self.leaves(id.index);
        if let Some(report) = known {
            // The agent has said how it stands already, perhaps to an actor that is no more.
            self.tell(&model, Event::Reported(id, generation, report));
        }
        if leaves {
            self.tell_leaving(&[model].into());
        }
    }

    /// Shows readers how the server is, once for all that is in the mailbox by then.
    fn show_soon(&mut self, ctx: &mut Context<Self>) {
        if !self.showing {
            self.showing = true;
            ctx.notify(Show);
        }
    }
}

fn replica_kind(state: ReplicaState) -> &'static str {
    match state {
        ReplicaState::Pending => "ReplicaPending",
        ReplicaState::Available => "ReplicaAvailable",
        ReplicaState::Draining => "ReplicaDraining",
        ReplicaState::Unknown { .. } => "ReplicaUnknown",
        ReplicaState::Lost => "ReplicaLost",
    }
}

impl Actor for ServerActor {
    type Context = Context<Self>;
}

impl Handler<Begin> for ServerActor {
    type Result = ();

    fn handle(&mut self, _: Begin, ctx: &mut Self::Context) {
        self.publish();
        self.show();
        let often = (self.links.timing.lease / 4).max(std::time::Duration::from_millis(10));
        ctx.run_interval(often, |server, ctx| server.tick(ctx));
    }
}

impl Handler<AgentConnected> for ServerActor {
    type Result = ();

    fn handle(&mut self, connected: AgentConnected, ctx: &mut Self::Context) {
        let now = self.links.clock.now();
        let (lease, heartbeat) = (self.links.timing.lease, self.links.timing.heartbeat);
        let id = connected.hello.replica.clone();
        if let Some(expected) = self.row.expected
            && id.index >= expected
            && !self.replicas.contains_key(&id.index)
        {
            let reason = format!("server {} has {expected} replicas; {id} is not one of them", self.row.name);
            drop(connected.link.try_send(Down::Refused { reason, retry: true }));
            return;
        }
        if let Some(other) =
            self.replicas.get(&id.index).and_then(|replica| replica.held_by_another(&connected.hello.door))
        {
            let live = now.since(self.replicas[&id.index].heard) <= lease;
            if live {
                let reason =
                    format!("another agent, whose door is {other}, stands beside {id}; give each an index of its own");
                drop(connected.link.try_send(Down::Refused { reason, retry: true }));
                return;
            }
        }
        if self.outdated(&connected, ctx) {
            return;
        }
        drop(connected.link.try_send(Down::Welcome { lease, heartbeat }));
        let door = connected.hello.door.clone();
        let moved = self.links.doors.insert(id.clone(), door.clone()).is_none_or(|before| before != door);
        let replica = self.replicas.entry(id.index).or_insert_with(|| Replica::new(ReplicaState::Pending, now));
        let reports = replica.connect(connected, now);
        let models = replica.models();
        replica.repeat(now, &self.links);
        let stopping = self.stopping.remove(&id.index);
        if self.row.doors.get(&id.index) != Some(&door) {
            self.change(Change::Door(id.index, door), ctx);
        }
        self.set_state(id.index, ReplicaEvent::Heard, ctx);
        self.publish_one(id.index);
        self.show_soon(ctx);
        for (model, generation, report) in reports {
            if !self.tell(&model, Event::Reported(id.clone(), generation, report))
                && let Some(replica) = self.replicas.get_mut(&id.index)
            {
                replica.stray(model, generation, self.links.timing.drain);
            }
        }
        if moved {
            // Its door is elsewhere: every route to it is another.
            for model in &models {
                self.links.tell_model(model, Announce::ToRouter);
            }
        }
        // One that was about to stop and is back may be used again, also by those that have left it.
        let others = self.leavers.iter().filter(|_| stopping).cloned().collect::<Vec<_>>();
        self.tell_leaving(&models.into_iter().chain(others).collect());
    }
}

impl Handler<AgentSpoke> for ServerActor {
    type Result = ();

    fn handle(&mut self, spoke: AgentSpoke, ctx: &mut Self::Context) {
        let now = self.links.clock.now();
        let index = spoke.replica.index;
        let Some(replica) = self.replicas.get_mut(&index).filter(|replica| replica.session == spoke.session) else {
            return;
        };
        match spoke.word {
            Word::Gone => {
                replica.link = None;
                self.set_state(index, ReplicaEvent::Gone, ctx);
            }
            Word::Goodbye => {
                let models = replica.models().into_iter().collect();
                self.stopping.insert(index);
                self.note("Goodbye", format!("replica {index} is about to stop; its models move first"));
                self.publish_one(index);
                self.show_soon(ctx);
                self.tell_leaving(&models);
            }
            Word::Restated(restated) => {
                replica.restate(*restated, now);
                self.publish_one(index);
                self.show_soon(ctx);
            }
            Word::Misread(problem) => self.misread(index, problem),
            Word::Heartbeat { sequence, resident, strain, run } => {
                replica.heard = now;
                replica.resident = resident;
                (replica.strain, replica.run) = (strain, run);
                replica.tell(Down::Heard(sequence));
                self.set_state(index, ReplicaEvent::Heard, ctx);
            }
            Word::Reports(reports) => {
                replica.heard = now;
                for (model, generation, report) in reports {
                    if let Some(replica) = self.replicas.get_mut(&index) {
                        replica.reported(&model, generation, &report);
                    }
                    self.gather(index, model, generation, report, ctx);
                }
                self.set_state(index, ReplicaEvent::Heard, ctx);
            }
        }
    }
}

impl Handler<SetOrders> for ServerActor {
    type Result = ();

    fn handle(&mut self, SetOrders(orders): SetOrders, ctx: &mut Self::Context) {
        for order in orders {
            self.set_order(order, ctx);
        }
    }
}

#[derive(actix::Message)]
#[rtype(result = "()")]
struct Say;

impl Handler<Say> for ServerActor {
    type Result = ();

    fn handle(&mut self, _: Say, _: &mut Self::Context) {
        let now = self.links.clock.now();
        for index in mem::take(&mut self.unsaid) {
            if let Some(replica) = self.replicas.get_mut(&index) {
                replica.say_new(now, &self.links);
            }
        }
    }
}

impl Handler<Enquire> for ServerActor {
    type Result = ();

    fn handle(&mut self, Enquire { replica, model, generation }: Enquire, _: &mut Self::Context) {
        let Some(known) = self.spoken_of(&replica, &model) else { return };
        if let Some(report) = known.ask(model.clone(), generation) {
            self.tell(&model, Event::Reported(replica, generation, report));
        }
    }
}

impl Handler<Announce> for ServerActor {
    type Result = ();

    fn handle(&mut self, _: Announce, _: &mut Self::Context) {
        for replica in self.replicas.values_mut() {
            replica.facts = None;
        }
        self.publish();
    }
}

#[derive(actix::Message)]
#[rtype(result = "()")]
struct Show;

impl Handler<Show> for ServerActor {
    type Result = ();

    fn handle(&mut self, _: Show, _: &mut Self::Context) {
        self.showing = false;
        self.show();
    }
}

impl Handler<Recall> for ServerActor {
    type Result = ();

    fn handle(&mut self, _: Recall, _: &mut Self::Context) {
        let name = &self.row.name;
        let here =
            |model: &Model| model.copies.iter().any(|copy| copy.state.replica().is_some_and(|on| on.server == *name));
        let told = |model: &Model| model.leaving().iter().any(|replica| replica.server == *name);
        self.leavers = self.links.board.models_that(told);
        for model in self.links.board.models_that(here) {
            self.links.tell_model(&model, Announce::ToServer);
        }
        self.tell_leaving(&self.leavers.clone());
    }
}

impl Handler<Stop> for ServerActor {
    type Result = ();

    fn handle(&mut self, _: Stop, ctx: &mut Self::Context) {
        if self.is_over() {
            // The last word of a copy may still be among what was gathered: without it, its model waits for ever.
            self.tell_news();
            self.note("Removed", "nothing of it is left".to_owned());
            self.links.board.remove_server(&self.row.name);
            ctx.stop();
        } else {
            self.links.supervisor.tell(Stays(Who::Server(self.row.name.clone())));
        }
    }
}

impl Handler<Observe> for ServerActor {
    type Result = ();

    fn handle(&mut self, round: Observe, _: &mut Self::Context) {
        let replicas = self.replicas.iter().map(|(index, replica)| (index.to_string(), replica.observe()));
        let state = json!({
            "owner": self.row.owner.name(),
            "expected": self.row.expected,
            "removing": self.removing,
            "committing": self.committing.is_some(),
            "waiting": self.changes.len(),
            "replicas": replicas.collect::<BTreeMap<_, _>>(),
        });
        round.answer(&format!("server/{}", self.row.name), state);
    }
}
