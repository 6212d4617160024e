//! One model: every decision is the domain's, taken on a copy that replaces the model once it is durable.

use std::{collections::VecDeque, iter, mem, sync::Arc};

use actix::{Actor, ActorContext as _, AsyncContext as _, Context, Handler, SpawnHandle};
use serde_json::json;
use tracing::Span;

use super::{life::Life, links::Links};
use crate::{
    domain::{
        copy::{self, Copy, Drain, State},
        error::{Code, Refusal},
        model::{Decision, Effect, Event, Model, Submitted, Wanted},
        names::ReplicaId,
        order::Order,
        record::Write,
        time::Instant,
        version::Version,
    },
    messages::{
        Reply,
        journal::{Commit, Committed},
        model::{AllHappened, Announce, Happened, Request},
        placement::{Leave, Place, Release, Restore},
        router::Publish,
        server::{Enquire, SetOrder, SetOrders},
        supervisor::{Begin, Observe, Stays, Stop, Terminated, Who},
    },
    telemetry::metrics::Submission,
};

type Answer = Result<Option<Submitted>, Refusal>;

/// Events that one decision takes at most, so that a flood of them is committed in pieces.
const BATCH: usize = 256;
/// How long an actor waits before it tries again what the journal refused.
const REFUSED: std::time::Duration = std::time::Duration::from_secs(1);

pub(super) struct ModelActor {
    model: Arc<Model>,
    links: Arc<Links>,
    /// What becomes true once the journal has it.
    committing: Option<Tentative>,
    /// Whether the journal has just refused: nothing is decided until it is tried again, so that events keep their order.
    refused: bool,
    waiting: VecDeque<Pending>,
    wake: Option<(Instant, SpawnHandle)>,
    /// The way of the newest version from its submission to its first available copy.
    submission: Option<(Version, Span)>,
    _life: Life,
}

struct Pending {
    event: Event,
    reply: Option<Reply<Answer>>,
}

struct Tentative {
    model: Model,
    effects: Vec<Effect>,
    answers: Vec<(Reply<Answer>, Answer)>,
    /// What happened whoever asked: taken again if the commit fails.
    happened: Vec<Event>,
}

impl ModelActor {
    pub(super) fn new(model: Arc<Model>, links: Arc<Links>, life: Life) -> Self {
        Self {
            model,
            links,
            committing: None,
            refused: false,
            waiting: VecDeque::new(),
            wake: None,
            submission: None,
            _life: life,
        }
    }

    fn who(&self) -> Who {
        Who::Model(self.model.name.clone())
    }

    /// Takes what happened.
    fn take(&mut self, events: impl IntoIterator<Item = Event>, ctx: &mut Context<Self>) {
        for event in events {
            // Words may come faster than the disk turns, and for as long as the journal refuses.
            self.waiting.retain(|other| other.reply.is_some() || !event.replaces(&other.event));
            self.waiting.push_back(Pending { event, reply: None });
        }
        self.decide(ctx);
    }

    fn decide(&mut self, ctx: &mut Context<Self>) {
        while self.committing.is_none() && !self.refused && !self.waiting.is_empty() {
            let now = self.links.clock.now();
            let mut model = self.model.as_ref().clone();
            let mut writes: Vec<Write> = Vec::new();
            let (mut effects, mut answers, mut happened) = (Vec::new(), Vec::new(), Vec::new());
            let mut batch: VecDeque<Pending> = self.waiting.drain(..self.waiting.len().min(BATCH)).collect();
            while let Some(Pending { event, reply }) = batch.pop_front() {
                let mut take = |decision: Decision| {
                    writes.extend(decision.writes);
                    effects.extend(decision.effects);
                    decision.submitted
                };
                if let Some(reply) = reply {
                    answers.push((reply, model.apply(event, &self.links.policy, now).map(take)));
                    continue;
                }
                // What happened meanwhile is looked at once.
                let asked = batch.iter().position(|pending| pending.reply.is_some()).unwrap_or(batch.len());
                let events: Vec<Event> =
                    iter::once(event).chain(batch.drain(..asked).map(|pending| pending.event)).collect();
                happened.extend(events.iter().cloned());
                take(model.apply_all(events, &self.links.policy, now));
            }
            let tentative = Tentative { model, effects, answers, happened };
            if writes.is_empty() {
                self.install(tentative, ctx);
            } else {
                self.committing = Some(tentative);
                self.links.journal.tell(Commit { writes, by: ctx.address().recipient() });
            }
        }
    }

    fn install(&mut self, tentative: Tentative, ctx: &mut Context<Self>) {
        let span = self.follow_submission(&tentative.model);
        let _within = span.enter();
        if *self.model != tentative.model {
            self.model = Arc::new(tentative.model);
            if self.model.is_born() {
                self.links.board.put_model(Arc::clone(&self.model));
            }
        }
        self.perform(tentative.effects, ctx);
        if !self.model.is_born() && !tentative.answers.is_empty() && self.waiting.is_empty() {
            // What was asked was refused: there is no model, and nothing is to stay of the question.
            self.links.supervisor.tell(Terminated(self.who()));
        }
        for (reply, answer) in tentative.answers {
            let outcome = if answer.is_ok() { Submission::Accepted } else { Submission::Refused };
            self.links.metrics.scheduler.submission(outcome);
            // Whoever asked may have given up.
            drop(reply.send(answer));
        }
    }

    /// Follows the newest version from its submission to its first available copy; gives the span of that way.
    fn follow_submission(&mut self, next: &Model) -> Span {
        let Some(latest) = next.latest() else { return Span::none() };
        if self.submission.as_ref().is_none_or(|(version, _)| *version != latest.version) {
            let span = tracing::info_span!(
                target: "wharf::submission",
                "submission",
                model = %next.name,
                version = latest.version.0,
                uid = latest.uid.0
            );
            self.submission = Some((latest.version, span));
        }
        let answers = |model: &Model| {
            let available = |copy: &Copy| matches!(copy.state, State::Available { .. });
            model.copies.iter().any(|copy| copy.generation.version == latest.version && available(copy))
        };
        let known = self.model.latest().is_some_and(|entry| entry.version == latest.version && entry.uid == latest.uid);
        let span = self.submission.as_ref().map_or_else(Span::none, |(_, span)| span.clone());
        if answers(next) {
            if known && !answers(&self.model) {
                self.links.metrics.scheduler.available(self.links.clock.now().since(latest.created));
            }
            // It has arrived: what happens to it from here on is no part of that way.
            self.submission = Some((latest.version, Span::none()));
        }
        span
    }

    /// Performs them in order; but what several of them have to say to one actor is said in one message.
    fn perform(&mut self, effects: Vec<Effect>, ctx: &mut Context<Self>) {
        let (mut wanted, mut orders) = (Vec::new(), Vec::new());
        for effect in effects {
            if !matches!(effect, Effect::Place(_)) {
                // It may take back what was asked of the placement before it.
                self.tell_wanted(&mut wanted);
            }
            let (links, model) = (&self.links, &self.model);
            let name = &model.name;
            match effect {
                Effect::Place(copy) => wanted.push(*copy),
                Effect::Withdraw(generation) | Effect::Release(generation) => {
                    links.placement.tell(Release { model: name.clone(), generation });
                }
                Effect::Register { .. } | Effect::Unregister { .. } => orders.extend(self.order(effect)),
                Effect::Keep(generation) => {
                    let kept = model.copies.iter().find(|copy| copy.generation == generation);
                    if let Some((copy, on)) = kept.and_then(|copy| Some((copy, copy.state.replica()?.clone()))) {
                        let (need, pinned) = (copy.need.clone(), model.deployment.pinned);
                        links.placement.tell(Restore { model: name.clone(), generation, on, need, pinned });
                    }
                }
                Effect::Leave(generation) => links.placement.tell(Leave { model: name.clone(), generation }),
                // The route is the model's of now: of several revisions only the last is worth telling.
                Effect::Publish(revision) if revision < model.revision => {}
                Effect::Publish(revision) => self.publish(revision),
                Effect::Wake(at) => self.wake_at(at, ctx),
                Effect::Note(note) => links.note(&Who::Model(name.clone()), note),
                Effect::Terminated => links.supervisor.tell(Terminated(Who::Model(name.clone()))),
                Effect::Arrived(way) => links.ways.record(way),
            }
        }
        self.tell_wanted(&mut wanted);
        self.tell_orders(orders, ctx);
    }

    /// The order that is asked for, if it is one.
    fn order(&self, effect: Effect) -> Option<SetOrder> {
        let (model, trust, drain) = (self.model.name.clone(), self.links.policy.trust, self.links.timing.drain);
        match effect {
            Effect::Register { on, generation, spec, need, attempt, measured, pinned } => {
                let order = Order::Register { model, generation, spec, need, attempt, measured, trust, pinned };
                Some(SetOrder { replica: on, order })
            }
            Effect::Unregister { on, generation } => {
                Some(SetOrder { replica: on, order: Order::Unregister { model, generation, drain } })
            }
            _ => None,
        }
    }

    fn publish(&self, revision: u64) {
        let route = self.model.published(|on| self.links.door(on), self.links.outlook());
        self.links.router.tell(Publish { model: self.model.name.clone(), revision, route });
    }

    fn wake_at(&mut self, at: Instant, ctx: &mut Context<Self>) {
        if let Some((earlier, handle)) = self.wake.take() {
            if earlier <= at {
                self.wake = Some((earlier, handle));
                return;
            }
            ctx.cancel_future(handle);
        }
        let delay = at.since(self.links.clock.now());
        let handle = ctx.run_later(delay, |actor, ctx| {
            actor.wake = None;
            actor.take([Event::Reconcile], ctx);
        });
        self.wake = Some((at, handle));
    }

    fn tell_wanted(&self, wanted: &mut Vec<Wanted>) {
        if !wanted.is_empty() {
            self.links.placement.tell(Place { model: self.model.name.clone(), wanted: mem::take(wanted) });
        }
    }

    /// Tells each server what is wanted of its replicas. A server that nobody knows has none: then they are lost.
    fn tell_orders(&self, mut orders: Vec<SetOrder>, ctx: &mut Context<Self>) {
        orders.sort_by(|a, b| a.replica.server.cmp(&b.replica.server));
        while let Some(first) = orders.first() {
            let server = first.replica.server.clone();
            let others = orders.split_off(orders.partition_point(|order| order.replica.server == server));
            let replicas: Vec<ReplicaId> = orders.iter().map(|order| order.replica.clone()).collect();
            if !self.links.tell_server(&server, SetOrders(orders)) {
                replicas.into_iter().for_each(|on| lost(on, ctx));
            }
            orders = others;
        }
    }

    fn announce(&self, to: Announce, ctx: &mut Context<Self>) {
        let (mut wanted, mut orders) = (Vec::new(), Vec::new());
        for copy in &self.model.copies {
            let restored = copy.state.replica().cloned();
            match (to, &copy.state) {
                (Announce::ToPlacement, State::Pending { .. }) => wanted.extend(self.model.wanted(copy)),
                (Announce::ToPlacement, _) => {
                    if let Some(on) = restored {
                        let (model, generation) = (self.model.name.clone(), copy.generation);
                        let (need, pinned) = (copy.need.clone(), self.model.deployment.pinned);
                        self.links.placement.tell(Restore { model, generation, on, need, pinned });
                        if copy.draining {
                            let model = self.model.name.clone();
                            self.links.placement.tell(Leave { model, generation });
                        }
                    }
                }
                (Announce::ToServer, State::Draining { on, phase: Drain::Unloading }) => {
                    orders.extend(self.order(Effect::Unregister { on: on.clone(), generation: copy.generation }));
                }
                (Announce::ToServer, _) if copy.draining => {
                    if let Some(on) = restored {
                        let (model, generation) = (self.model.name.clone(), copy.generation);
                        let enquire = Enquire { replica: on.clone(), model, generation };
                        if !self.links.tell_server(&on.server, enquire) {
                            lost(on, ctx);
                        }
                    }
                }
                (Announce::ToServer, State::Failed { .. }) => {}
                (Announce::ToServer, _) => {
                    orders.extend(self.model.register(copy).and_then(|register| self.order(register)));
                }
                (Announce::ToRouter, _) => {}
            }
        }
        self.tell_wanted(&mut wanted);
        self.tell_orders(orders, ctx);
        if to == Announce::ToRouter && self.model.is_born() {
            self.publish(self.model.revision);
        }
    }
}

/// The replica of a copy is gone, and its server with it.
fn lost(on: ReplicaId, ctx: &mut Context<ModelActor>) {
    ctx.notify(Happened(Event::Replica(on, copy::Event::ReplicaLost)));
}

impl Actor for ModelActor {
    type Context = Context<Self>;
}

impl Handler<Begin> for ModelActor {
    type Result = ();

    fn handle(&mut self, _: Begin, ctx: &mut Self::Context) {
        if self.model.is_born() {
            // The board, the placement and the router were told before it was started.
            self.announce(Announce::ToServer, ctx);
            self.take([Event::Reconcile], ctx);
        }
    }
}

impl Handler<Request> for ModelActor {
    type Result = ();

    fn handle(&mut self, request: Request, ctx: &mut Self::Context) {
        self.waiting.push_back(Pending { event: request.event, reply: Some(request.reply) });
        self.decide(ctx);
    }
}

impl Handler<Happened> for ModelActor {
    type Result = ();

    fn handle(&mut self, Happened(event): Happened, ctx: &mut Self::Context) {
        self.take([event], ctx);
    }
}

impl Handler<AllHappened> for ModelActor {
    type Result = ();

    fn handle(&mut self, AllHappened(events): AllHappened, ctx: &mut Self::Context) {
        self.take(events, ctx);
    }
}

impl Handler<Stop> for ModelActor {
    type Result = ();

    fn handle(&mut self, _: Stop, ctx: &mut Self::Context) {
        let over = self.model.deleted.is_some() && self.model.copies.is_empty();
        if over && self.committing.is_none() && self.waiting.is_empty() {
            ctx.stop();
        } else {
            self.links.supervisor.tell(Stays(self.who()));
        }
    }
}

impl Handler<Announce> for ModelActor {
    type Result = ();

    fn handle(&mut self, to: Announce, ctx: &mut Self::Context) {
        self.announce(to, ctx);
    }
}

impl Handler<Committed> for ModelActor {
    type Result = ();

    fn handle(&mut self, Committed(result): Committed, ctx: &mut Self::Context) {
        let Some(mut tentative) = self.committing.take() else { return };
        match result {
            Ok(()) => {
                self.install(tentative, ctx);
                self.decide(ctx);
            }
            Err(problem) => {
                for (reply, _) in mem::take(&mut tentative.answers) {
                    let text = format!("the journal could not be written ({problem}); nothing was changed");
                    drop(reply.send(Err(Refusal::new(Code::Unavailable, text))));
                }
                if !self.model.is_born() && self.waiting.is_empty() {
                    self.links.supervisor.tell(Terminated(self.who()));
                }
                for event in mem::take(&mut tentative.happened).into_iter().rev() {
                    self.waiting.push_front(Pending { event, reply: None });
                }
                self.refused = true;
                ctx.run_later(REFUSED, |actor, ctx| {
                    actor.refused = false;
                    actor.decide(ctx);
                });
            }
        }
    }
}

impl Handler<Observe> for ModelActor {
    type Result = ();

    fn handle(&mut self, round: Observe, _: &mut Self::Context) {
        let standing = self.model.standing();
        let state = json!({
            "uid": self.model.uid.0,
            "state": standing.state.name(),
            "versions": self.model.versions.len(),
            "serving": self.model.serving.map(|version| version.0),
            "copies": self.model.copies.iter().map(|copy| copy.state.name()).collect::<Vec<_>>(),
            "revision": self.model.revision,
            "committing": self.committing.is_some(),
            "waiting": self.waiting.len(),
        });
        round.answer(&format!("model/{}", self.model.name), state);
    }
}
