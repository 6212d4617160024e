//! The placement: the only writer of registered bytes. It decides and reserves in one step, before it takes
//! its next message; what it decided leaves the process only once the model's actor has it in the journal.

mod relieve;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use actix::{Actor, AsyncContext as _, Context, Handler};
use serde_json::json;

use super::{life::Life, links::Links};
use crate::{
    domain::{
        copy,
        model::{Event, Wanted},
        names::{ModelName, ReplicaId},
        placement::{Capabilities, Decision, Placement, PlacementRequest, Prefer, ReplicaFacts},
        version::Generation,
    },
    messages::{
        Ask,
        model::{AllHappened, Announce, Happened},
        placement::{Explain, Explanation, Leave, Only, Place, Release, ReplicaChanged, Restore},
        supervisor::Observe,
    },
    telemetry::metrics::Placement as Outcome,
};

/// Waiting copies that one message tries again at most; the rest wait for the next.
const ROUND: usize = 256;
/// How often the ledger is made from scratch and compared.
const CHECK: Duration = Duration::from_secs(60);
/// How long a replica where a copy failed is tried last.
const AVOIDED: Duration = Duration::from_secs(300);

pub(super) struct PlacementActor {
    placement: Placement,
    links: Arc<Links>,
    retrying: bool,
    timer: Option<actix::SpawnHandle>,
    /// Replicas that have copies that do not fit, as far as was seen.
    strained: BTreeSet<ReplicaId>,
    /// Replicas to be looked at, whether their copies fit.
    looks: BTreeSet<ReplicaId>,
    /// Whether such a look is about to be taken.
    looking: bool,
    _life: Life,
}

impl PlacementActor {
    pub(super) fn new(links: Arc<Links>, life: Life) -> Self {
        Self {
            placement: Placement::default(),
            links,
            retrying: false,
            timer: None,
            strained: BTreeSet::new(),
            looks: BTreeSet::new(),
            looking: false,
            _life: life,
        }
    }

    fn request(&self, model: &ModelName, wanted: &Wanted) -> PlacementRequest {
        let until = self.links.clock.now() + AVOIDED;
        PlacementRequest {
            model: model.clone(),
            generation: wanted.generation,
            requirements: Capabilities::new(&wanted.spec.requirements),
            server: wanted.spec.server.clone(),
            need: wanted.need.clone(),
            spread: wanted.spread,
            priority: wanted.priority,
            pinned: wanted.pinned,
            together: wanted.together,
            avoid: wanted.avoid.iter().map(|replica| (replica.clone(), until)).collect::<BTreeMap<_, _>>(),
            prefer: Prefer::default(),
        }
    }

    /// What the model is to know of a decision that was taken.
    fn decided(&self, generation: Generation, decision: Decision) -> Event {
        let event = match decision.outcome {
            Ok(placed) => {
                self.show(&placed.replica);
                copy::Event::Placed { on: placed.replica }
            }
            Err(reason) => copy::Event::Unplaced { reason },
        };
        Event::Copy(generation, event)
    }

    fn place(&mut self, model: &ModelName, wanted: &Wanted, ctx: &mut Context<Self>) -> Event {
        let now = self.links.clock.now();
        let request = self.request(model, wanted);
        let decision = self.placement.place_at_last(request, now);
        let outcome = if decision.outcome.is_ok() { Outcome::Placed } else { Outcome::Unplaced };
        self.links.metrics.scheduler.placement(outcome, self.links.clock.now().since(now));
        if let Some(on) = decision.replica() {
            // One that has its place already may have become larger, or pinned.
            self.look_if_strained(on, ctx);
        }
        self.decided(wanted.generation, decision)
    }

    fn retry_soon(&mut self, ctx: &mut Context<Self>) {
        if !self.retrying && self.placement.waiting_count() > 0 {
            self.retrying = true;
            ctx.notify(Retry);
        }
    }
}

impl Actor for PlacementActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        // Before anyone is asked: an answer must not find the place empty.
        self.links.placement.fill(ctx.address());
        // What is reserved, before anything is decided.
        for model in self.links.board.models() {
            for copy in &model.copies {
                let Some(on) = copy.state.replica() else { continue };
                let (name, generation) = (&model.name, copy.generation);
                if let Err(error) = self.placement.restore(name, generation, on, copy.need.clone()) {
                    tracing::error!(target: "wharf::placement", model = %name, %generation, %error, "a copy's place can't be restored");
                    continue;
                }
                drop(self.placement.set_pinned(name, generation, model.deployment.pinned));
                if copy.draining {
                    drop(self.placement.mark_leaving(name, generation));
                } else if model.displaced().contains(&generation) {
                    drop(self.placement.set_displaced(name, generation, true));
                    self.strained.insert(on.clone());
                }
            }
        }
        for server in self.links.all_servers() {
            server.do_send(Announce::ToPlacement);
        }
        for model in self.links.all_models() {
            model.do_send(Announce::ToPlacement);
        }
        ctx.run_interval(CHECK, |placement, ctx| {
            if let Err(wrong) = placement.placement.consistency_check() {
                placement.links.metrics.scheduler.inconsistencies.inc();
                for what in wrong {
                    tracing::error!(target: "wharf::placement", event = "inconsistent", what, "the ledger contradicts itself");
                }
                debug_assert!(false, "the ledger contradicts itself");
            }
            placement.retry_soon(ctx);
        });
        ctx.run_interval(relieve::AGAIN, |placement, ctx| placement.look_again(ctx));
    }
}

#[derive(actix::Message)]
#[rtype(result = "()")]
struct Retry;

impl Handler<Retry> for PlacementActor {
    type Result = ();

    fn handle(&mut self, _: Retry, ctx: &mut Self::Context) {
        self.retrying = false;
        let retried = self.placement.retry(self.links.clock.now(), ROUND);
        for (model, generation, decision) in retried.decisions {
            self.links.tell_model(&model, Happened(self.decided(generation, decision)));
        }
        if retried.more {
            self.retry_soon(ctx);
        } else if let Some(at) = self.placement.next_retry() {
            let timer = ctx.run_later(at.since(self.links.clock.now()), |placement, ctx| placement.retry_soon(ctx));
            if let Some(earlier) = self.timer.replace(timer) {
                ctx.cancel_future(earlier);
            }
        }
    }
}

impl Handler<Place> for PlacementActor {
    type Result = ();

    fn handle(&mut self, Place { model, wanted }: Place, ctx: &mut Self::Context) {
        let decided = wanted.iter().map(|wanted| self.place(&model, wanted, ctx)).collect();
        self.links.tell_model(&model, AllHappened(decided));
    }
}

impl Handler<Release> for PlacementActor {
    type Result = ();

    fn handle(&mut self, release: Release, ctx: &mut Self::Context) {
        if let Some(released) = self.placement.release(&release.model, release.generation) {
            self.show(&released.replica);
            self.look_if_strained(&released.replica, ctx);
        }
        self.retry_soon(ctx);
    }
}

impl Handler<Leave> for PlacementActor {
    type Result = ();

    fn handle(&mut self, Leave { model, generation }: Leave, ctx: &mut Self::Context) {
        // A copy that was released in between has nothing left to mark.
        drop(self.placement.mark_leaving(&model, generation));
        self.retry_soon(ctx);
    }
}

impl Handler<Restore> for PlacementActor {
    type Result = ();

    fn handle(&mut self, restore: Restore, ctx: &mut Self::Context) {
        let Restore { model, generation, on, need, pinned } = restore;
        let restored = self.placement.restore(&model, generation, &on, need);
        if let Err(error) = restored.and_then(|()| self.placement.set_pinned(&model, generation, pinned)) {
            tracing::error!(target: "wharf::placement", %model, %generation, %error, "a copy's place can't be restored");
        }
        self.show(&on);
        self.look_if_strained(&on, ctx);
        self.retry_soon(ctx);
    }
}

impl Handler<Only> for PlacementActor {
    type Result = ();

    fn handle(&mut self, Only { model, generations }: Only, ctx: &mut Self::Context) {
        for released in self.placement.keep_only(&model, &generations) {
            self.show(&released.replica);
            self.look_if_strained(&released.replica, ctx);
        }
        self.retry_soon(ctx);
    }
}

impl Handler<ReplicaChanged> for PlacementActor {
    type Result = ();

    fn handle(&mut self, changed: ReplicaChanged, ctx: &mut Self::Context) {
        let id = changed.replica;
        match changed.facts {
            None => {
                for (model, ..) in self.placement.remove_replica(&id) {
                    // Placed while the replica was already going: it is wanted elsewhere.
                    let lost = Event::Replica(id.clone(), copy::Event::ReplicaLost);
                    self.links.tell_model(&model, Happened(lost));
                }
                self.links.board.remove_registered(&id);
                self.strained.remove(&id);
                self.looks.remove(&id);
                return self.retry_soon(ctx);
            }
            Some(facts) => {
                let capacity = (!facts.capacity.is_zero()).then_some(facts.capacity);
                let known = ReplicaFacts {
                    reported: capacity,
                    overcommit_percent: facts.overcommit_percent,
                    capabilities: Capabilities::new(&facts.capabilities),
                    runtime: String::new(),
                    state: facts.state,
                };
                if self.placement.ledger().replica(&id).is_none_or(|replica| *replica.facts() != known) {
                    // What it was is no measure of what fits now.
                    self.looks.insert(id.clone());
                    self.look_soon(ctx);
                }
                self.placement.upsert_replica(&id, known);
                if let Err(error) = self.placement.set_cordoned(&id, facts.closed) {
                    tracing::error!(target: "wharf::placement", replica = %id, %error, "a replica can't be closed");
                }
            }
        }
        self.show(&id);
        self.retry_soon(ctx);
    }
}

impl Handler<Explain> for PlacementActor {
    type Result = ();

    fn handle(&mut self, Ask { question, reply }: Explain, _: &mut Self::Context) {
        let now = self.links.clock.now();
        let explanation = self.links.board.model(&question).and_then(|model| {
            let latest = model.latest()?.version;
            let copies = || model.copies.iter().filter(|copy| copy.generation.version == latest && !copy.draining);
            // One that found no place is what a user asks about; else the one that was placed last.
            let copy = copies().find(|copy| copy.state.replica().is_none()).or_else(|| copies().next_back())?;
            let report = self.placement.explain(&self.request(&question, &model.wanted(copy)?), now);
            let stands = match copy.state.replica() {
                Some(on) => {
                    format!("{question} version {latest} is {} on {on}. Were its copy placed now:\n", copy.state.name())
                }
                None => format!("{question} version {latest} has a copy without a place:\n"),
            };
            let data = serde_json::to_value(&report).unwrap_or_default();
            Some(Explanation { text: format!("{stands}{report}"), data })
        });
        drop(reply.send(explanation));
    }
}

impl Handler<Observe> for PlacementActor {
    type Result = ();

    fn handle(&mut self, round: Observe, _: &mut Self::Context) {
        let ledger = self.placement.ledger();
        let state = json!({
            "replicas": ledger.replicas().count(),
            "copies": ledger.copy_count(),
            "waiting": self.placement.waiting_count(),
        });
        round.answer("placement", state);
    }
}
