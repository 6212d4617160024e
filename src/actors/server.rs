//! One server: its replicas, the sessions of their agents, what is wanted there and what each reported last.
//!
//! Orders are a set of what is wanted, compared with what is reported on every word of the agent and on a
//! timer; an order that was lost is sent again.

mod leave;
mod refuse;
mod replica;
mod view;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use actix::{Actor, AsyncContext as _, Context, Handler};
use serde_json::json;

use self::replica::Replica;
use super::{life::Life, links::Links};
use crate::{
    domain::{
        copy::Event as CopyEvent,
        error::{Code, Refusal},
        model::{Event, Note},
        names::{ModelName, ReplicaId},
        record::{ServerRow, Write},
        replica::{Event as ReplicaEvent, Patience, ReplicaState, step},
        server::Claim,
    },
    messages::{
        Ask, Reply,
        journal::{Commit, Committed},
        model::{Announce, Happened},
        server::{
            AgentConnected, AgentSpoke, Declaration, Declare, DeclareServer, Down, Enquire, Mark, MarkReplica, SetMark,
            SetOrder, Word,
        },
        supervisor::{Begin, Observe, Who},
    },
};

pub(super) struct ServerActor {
    row: ServerRow,
    declaration: Option<Declaration>,
    removing: bool,
    /// Whether new orders are about to be said.
    saying: bool,
    replicas: BTreeMap<u32, Replica>,
    links: Arc<Links>,
    /// Rows on their way to the journal, oldest first, with who waits for each.
    committing: std::collections::VecDeque<(ServerRow, Done)>,
    _life: Life,
}

/// Who is told once a row is durable.
enum Done {
    Declared(Reply<Result<(), Refusal>>),
    Marked(Reply<Result<BTreeSet<u32>, Refusal>>, BTreeSet<u32>),
    Seen,
    Removed,
}

impl ServerActor {
    pub(super) fn new(row: ServerRow, declaration: Option<Declaration>, links: Arc<Links>, life: Life) -> Self {
        let mut actor = Self {
            row,
            declaration,
            removing: false,
            saying: false,
            replicas: BTreeMap::new(),
            links,
            committing: std::collections::VecDeque::new(),
            _life: life,
        };
        actor.expect();
        actor
    }

    /// Makes room for every replica that is expected.
    fn expect(&mut self) {
        let now = self.links.clock.now();
        let expected = if self.removing { 0 } else { self.row.expected.unwrap_or(0) };
        for index in 0..expected {
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
        let replica = self.replicas.entry(id.index).or_insert_with(|| Replica::new(missed, now));
        match replica.state {
            ReplicaState::Lost => {
                let lost = Event::Replica(id.clone(), CopyEvent::ReplicaLost);
                self.links.tell_model(model, Happened(lost));
                return None;
            }
            // It was given a copy, so its agent has called before.
            ReplicaState::Pending => (replica.state, replica.since) = (missed, now),
            ReplicaState::Available | ReplicaState::Draining | ReplicaState::Unknown { .. } => {}
        }
        Some(replica)
    }

    fn id(&self, index: u32) -> ReplicaId {
        ReplicaId::new(self.row.name.clone(), index)
    }

    fn note(&self, kind: &'static str, message: String) {
        let data = json!({ "owner": self.row.owner.name(), "expected": self.row.expected });
        self.links.note(&Who::Server(self.row.name.clone()), Note { kind, message, data });
    }

    fn set_state(&mut self, index: u32, event: ReplicaEvent) {
        let now = self.links.clock.now();
        let patience = Patience { lease: self.links.timing.lease, grace: self.links.timing.grace };
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
                self.links.tell_model(&model, Happened(Event::Replica(id.clone(), event.clone())));
            }
        }
        self.publish();
    }

    fn tick(&mut self, ctx: &Context<Self>) {
        let now = self.links.clock.now();
        let indexes: Vec<u32> = self.replicas.keys().copied().collect();
        for index in indexes {
            let heard = self.replicas[&index].heard;
            self.set_state(index, ReplicaEvent::Passed { heard });
            if let Some(replica) = self.replicas.get_mut(&index) {
                replica.repeat(now, &self.links);
            }
        }
        self.forget_empty(ctx);
        self.show();
    }

    fn commit(&mut self, row: ServerRow, done: Done, ctx: &Context<Self>) {
        self.links
            .journal
            .tell(Commit { writes: vec![Write::PutServer(Box::new(row.clone()))], by: ctx.address().recipient() });
        self.committing.push_back((row, done));
    }

    /// The row that will be, once all that is on its way is durable.
    fn latest_row(&self) -> &ServerRow {
        self.committing.back().map_or(&self.row, |(row, _)| row)
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
        for model in self.links.all_models() {
            model.do_send(Announce::ToServer);
        }
        self.publish();
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
        if self.outdated(&connected) {
            return;
        }
        drop(connected.link.try_send(Down::Welcome { lease, heartbeat }));
        let door = connected.hello.door.clone();
        let moved = self.links.doors.insert(id.clone(), door.clone()).is_none_or(|before| before != door);
        if self.latest_row().doors.get(&id.index) != Some(&door) {
            let mut row = self.latest_row().clone();
            row.doors.insert(id.index, door);
            self.commit(row, Done::Seen, ctx);
        }
        let replica = self.replicas.entry(id.index).or_insert_with(|| Replica::new(ReplicaState::Pending, now));
        let reports = replica.connect(connected, now);
        let models = replica.models();
        replica.repeat(now, &self.links);
        self.set_state(id.index, ReplicaEvent::Heard);
        self.publish();
        for (model, generation, report) in reports {
            let happened = Happened(Event::Reported(id.clone(), generation, report));
            if !self.links.tell_model(&model, happened)
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
        self.tell_leaving(&models.into_iter().collect());
    }
}

impl Handler<AgentSpoke> for ServerActor {
    type Result = ();

    fn handle(&mut self, spoke: AgentSpoke, _: &mut Self::Context) {
        let now = self.links.clock.now();
        let index = spoke.replica.index;
        let Some(replica) = self.replicas.get_mut(&index).filter(|replica| replica.session == spoke.session) else {
            return;
        };
        match spoke.word {
            Word::Gone => {
                replica.link = None;
                self.set_state(index, ReplicaEvent::Gone);
            }
            Word::Goodbye => {
                replica.stopping = true;
                self.note("Goodbye", format!("replica {index} is about to stop; its models move first"));
                self.publish();
                self.tell_leaving(&self.concerned());
            }
            Word::Restated(restated) => {
                replica.restate(*restated, now);
                self.publish();
            }
            Word::Misread(problem) => self.misread(index, problem),
            Word::Heartbeat { sequence, resident } => {
                replica.heard = now;
                replica.resident = resident;
                replica.tell(Down::Heard(sequence));
                self.set_state(index, ReplicaEvent::Heard);
            }
            Word::Reports(reports) => {
                replica.heard = now;
                for (model, generation, report) in reports {
                    replica.reported(&model, generation, &report);
                    let happened = Happened(Event::Reported(spoke.replica.clone(), generation, Some(report)));
                    if !self.links.tell_model(&model, happened) {
                        replica.stray(model, generation, self.links.timing.drain);
                    }
                }
                self.set_state(index, ReplicaEvent::Heard);
            }
        }
    }
}

impl Handler<SetOrder> for ServerActor {
    type Result = ();

    fn handle(&mut self, order: SetOrder, ctx: &mut Self::Context) {
        let index = order.replica.index;
        let model = order.order.model().clone();
        let Some(replica) = self.spoken_of(&order.replica, &model) else { return };
        let generation = order.order.generation();
        let known = replica.set(order.order);
        if !self.saying {
            // Whatever is in the mailbox by then shares the message.
            self.saying = true;
            ctx.notify(Say);
        }
        if let Some(report) = known {
            // The agent has said how it stands already, perhaps to an actor that is no more.
            self.links.tell_model(&model, Happened(Event::Reported(order.replica, generation, report)));
        }
        if self.leaves(index) {
            self.tell_leaving(&[model].into());
        }
    }
}

#[derive(actix::Message)]
#[rtype(result = "()")]
struct Say;

impl Handler<Say> for ServerActor {
    type Result = ();

    fn handle(&mut self, _: Say, _: &mut Self::Context) {
        self.saying = false;
        let now = self.links.clock.now();
        for replica in self.replicas.values_mut() {
            replica.say_new(now, &self.links);
        }
    }
}

impl Handler<Enquire> for ServerActor {
    type Result = ();

    fn handle(&mut self, Enquire { replica, model, generation }: Enquire, _: &mut Self::Context) {
        let Some(known) = self.spoken_of(&replica, &model) else { return };
        if let Some(report) = known.ask(model.clone(), generation) {
            self.links.tell_model(&model, Happened(Event::Reported(replica, generation, report)));
        }
    }
}

impl Handler<Announce> for ServerActor {
    type Result = ();

    fn handle(&mut self, _: Announce, _: &mut Self::Context) {
        self.publish();
    }
}

impl Handler<DeclareServer> for ServerActor {
    type Result = ();

    fn handle(&mut self, Ask { question, reply }: DeclareServer, ctx: &mut Self::Context) {
        let Declare { owner, declaration, .. } = question;
        let Some(declaration) = declaration else {
            if self.row.owner != owner {
                let text = format!("server {} belongs to the {}", self.row.name, self.row.owner.name());
                drop(reply.send(Err(Refusal::new(Code::PermissionDenied, text))));
                return;
            }
            self.removing = true;
            self.note("Removing", "its owner took it away; its models move first".to_owned());
            self.publish();
            self.tell_leaving(&self.concerned());
            drop(reply.send(Ok(())));
            return;
        };
        let claim = Claim {
            replicas: declaration.replicas,
            bounds: declaration.bounds,
            kubernetes: declaration.kubernetes.clone(),
        };
        match self.latest_row().claimed(owner, &claim) {
            Err(refusal) => drop(reply.send(Err(refusal))),
            Ok(row) => {
                self.removing = false;
                self.declaration = Some(declaration);
                let goes = self.committing.back().is_some_and(|(_, done)| matches!(done, Done::Removed));
                if row == *self.latest_row() && !goes {
                    self.expect();
                    self.publish();
                    self.tell_leaving(&self.concerned());
                    drop(reply.send(Ok(())));
                } else {
                    self.commit(row, Done::Declared(reply), ctx);
                }
            }
        }
    }
}

impl Handler<MarkReplica> for ServerActor {
    type Result = ();

    fn handle(&mut self, Ask { question, reply }: MarkReplica, ctx: &mut Self::Context) {
        let SetMark { replica, mark, server } = question;
        let chosen: BTreeSet<u32> =
            self.replicas.keys().copied().filter(|index| replica.is_none_or(|wanted| wanted == *index)).collect();
        if chosen.is_empty() {
            let known: Vec<String> = self.replicas.keys().map(u32::to_string).collect();
            let text = format!(
                "server {server} has no replica {}; it has {}",
                replica.map_or_else(String::new, |index| index.to_string()),
                if known.is_empty() { "none".to_owned() } else { known.join(", ") }
            );
            drop(reply.send(Err(Refusal::new(Code::NotFound, text))));
            return;
        }
        let mut row = self.latest_row().clone();
        for index in &chosen {
            match mark {
                Mark::Cordon => drop(row.cordoned.insert(*index)),
                Mark::Drain => drop(row.draining.insert(*index)),
                Mark::Clear => {
                    row.cordoned.remove(index);
                    row.draining.remove(index);
                }
            }
        }
        if row == *self.latest_row() {
            drop(reply.send(Ok(chosen)));
        } else {
            self.commit(row, Done::Marked(reply, chosen), ctx);
        }
    }
}

impl Handler<Committed> for ServerActor {
    type Result = ();

    fn handle(&mut self, Committed(result): Committed, ctx: &mut Self::Context) {
        let Some((row, done)) = self.committing.pop_front() else { return };
        let result = result.map_err(|problem| {
            Refusal::new(
                Code::Unavailable,
                format!("the journal could not be written ({problem}); nothing was changed"),
            )
        });
        let durable = result.is_ok();
        if durable && !matches!(done, Done::Removed) {
            let same = row.expected == self.row.expected && row.draining == self.row.draining;
            self.row = row;
            self.expect();
            self.publish();
            // Where a door is is no news to models; to ask all of them whenever an agent calls would take too long.
            if !same {
                self.tell_leaving(&self.concerned());
            }
        }
        match done {
            Done::Removed if durable => self.end(ctx),
            Done::Seen | Done::Removed => {}
            Done::Declared(reply) => drop(reply.send(result)),
            Done::Marked(reply, chosen) => drop(reply.send(result.map(|()| chosen))),
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
            "committing": self.committing.len(),
            "replicas": replicas.collect::<BTreeMap<_, _>>(),
        });
        round.answer(&format!("server/{}", self.row.name), state);
    }
}
