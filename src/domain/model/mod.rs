//! A model: its versions, its copies, and every decision about them.
//!
//! The rule of this module: [`Model::apply`] takes one event, and [`Model::apply_all`] what happened meanwhile; they return
//! what to write, and what to do once that is durable. It is level-triggered: after that the whole model is compared
//! with what is wanted ([`rollout`]), so an event that was lost is repaired by the next one, whatever it is.

mod adopt;
mod restore;
mod retry;
mod sizes;
mod state;
mod submit;
#[cfg(test)]
mod tests;
mod told;
mod view;
mod words;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde_json::json;

pub use adopt::Found;
pub use restore::restore;
pub use retry::Outlook;
pub use sizes::{Misdeclared, Sizes};
pub use state::{HeldUp, ModelState, Reason, Standing, standing};
pub use submit::{Outcome, Submitted};
use told::{Details, describe};
pub use words::{Decision, Effect, Event, Note, Wanted};

use super::{
    copy::{self, Copy, Effect as CopyEffect, Failure, Illegal, State},
    error::Refusal,
    memory::Bytes,
    names::{ModelName, ReplicaId},
    record::Write,
    rollout,
    size::Trust,
    spec::{Deployment, KubernetesMeta, ModelSpec, Passthrough},
    time::Instant,
    version::{Generation, Uid, Version},
};

/// Copy numbers that one write of the model's row reserves.
const NUMBERS_AT_ONCE: u32 = 64;

/// One model name, from its creation to the end of its retention.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// Its name.
    pub name: ModelName,
    /// Of the present creation of the name.
    pub uid: Uid,
    /// When it was created.
    pub created: Instant,
    /// How it is deployed.
    pub deployment: Deployment,
    /// What Kubernetes knows it by.
    pub kubernetes: Option<KubernetesMeta>,
    /// The version that clients are kept on until another has taken over.
    pub serving: Option<Version>,
    /// When it was deleted.
    pub deleted: Option<Instant>,
    /// Its versions, oldest first.
    pub versions: Vec<Entry>,
    /// Its copies, oldest first; those of earlier creations until they are gone.
    pub copies: Vec<Copy>,
    /// When it last became what it is.
    pub changed: Instant,
    /// Of the route: grows with each change.
    pub revision: u64,
    next_number: u32,
    /// Copy numbers below this may have been given before the journal was last read.
    number_bound: u32,
    /// Versions below this may have been given by a history that was lost.
    version_floor: Version,
    /// How many copies were wanted before more were found; nothing once a user has said how many there are to be.
    raised: Option<adopt::Raised>,
    /// How long the last copy took from its order to its first answer.
    way: Option<Duration>,
    /// Replicas that their copies are to leave.
    leaving: BTreeSet<ReplicaId>,
    /// Copies that do not fit their replicas any more, and are to move.
    displaced: BTreeSet<Generation>,
    sizes: Sizes,
}

/// One version of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its number.
    pub version: Version,
    /// The creation of the model that it belongs to.
    pub uid: Uid,
    /// What it is.
    pub spec: Arc<ModelSpec>,
    /// When it was submitted.
    pub created: Instant,
    /// Given back to Seldon's clients.
    pub passthrough: Passthrough,
    /// Why its rollout was given up.
    pub failed: Option<Failure>,
}

/// What the operator set for all models.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Need of a model that declares none: never nothing.
    pub default_memory: Bytes,
    /// What is made of a declared size once another was measured.
    pub trust: Trust,
    /// By how much, in percent, the two may differ before users are told.
    pub memory_warning_percent: u32,
    /// From which share of a replica's memory on, in percent, a leak is told.
    pub leak_percent: u32,
    /// Wait before the first retry of a failed copy; doubles with each.
    pub retry_first: Duration,
    /// The longest wait between retries.
    pub retry_cap: Duration,
    /// Failed tries after which a rollout is given up.
    pub rollout_tries: u32,
    /// Versions kept for rollback.
    pub history: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            default_memory: Bytes(256 << 20),
            trust: Trust::default(),
            memory_warning_percent: 200,
            leak_percent: 10,
            retry_first: Duration::from_secs(1),
            retry_cap: Duration::from_secs(300),
            rollout_tries: 3,
            history: 10,
        }
    }
}

impl Model {
    /// Takes one event. On an error nothing has changed.
    ///
    /// # Errors
    /// [`Refusal`] for a user's request that can't be met. Reports that have no meaning any more are not
    /// errors: they change nothing.
    pub fn apply(&mut self, event: Event, policy: &Policy, now: Instant) -> Result<Decision, Refusal> {
        let mut decision = Decision::default();
        let before = self.standing();
        self.take(event, policy, now, &mut decision)?;
        self.settle(&before, policy, now, &mut decision);
        Ok(decision)
    }

    /// Takes events that nobody waits for an answer to, as if all had happened at once: what is wanted is compared with
    /// what is when all are taken. What is refused of them has changed nothing.
    pub fn apply_all(&mut self, events: Vec<Event>, policy: &Policy, now: Instant) -> Decision {
        let mut decision = Decision::default();
        let before = self.standing();
        for event in events {
            drop(self.take(event, policy, now, &mut decision));
        }
        self.settle(&before, policy, now, &mut decision);
        decision
    }

    fn take(&mut self, event: Event, policy: &Policy, now: Instant, decision: &mut Decision) -> Result<(), Refusal> {
        match event {
            Event::Submit(definition, uid) => self.submit(*definition, uid, now, decision)?,
            Event::Rollback(to) => self.rollback(to, now, decision)?,
            Event::Scale(replicas) => self.scale(replicas, decision)?,
            Event::Delete(kubernetes) => self.delete(kubernetes, now, decision)?,
            Event::Copy(generation, event) => {
                let placed = if let copy::Event::Placed { on } = &event { Some(on.clone()) } else { None };
                let index = self.copies.iter().position(|copy| copy.generation == generation);
                let taken = index.is_some_and(|index| self.step(index, event, now, decision).is_ok());
                // A placement that was made anew may tell twice of a place that the copy has.
                let has = index.and_then(|index| self.copies[index].state.replica().cloned());
                if placed.is_some() && !taken && has != placed {
                    // The copy was given up while its place was being looked for.
                    decision.effects.push(Effect::Release(generation));
                    // Or it was given another place, which the placement that was made anew does not know of.
                    decision.effects.extend(has.map(|_| Effect::Keep(generation)));
                }
            }
            Event::Reported(on, generation, report) => self.reported(on, generation, report, policy, now, decision),
            Event::Adopt(found) => self.adopt(*found, policy, now, decision),
            Event::Replica(replica, event) => {
                for index in 0..self.copies.len() {
                    if self.copies[index].state.replica() == Some(&replica) {
                        drop(self.step(index, event.clone(), now, decision));
                    }
                }
            }
            Event::Leaving(server, replicas) => {
                self.leaving.retain(|replica| replica.server != server);
                self.leaving.extend(replicas.into_iter().map(|index| ReplicaId::new(server.clone(), index)));
            }
            Event::Displaced(displaced) => self.displace(displaced, decision),
            Event::RoutesReached(revision) => self.reached(revision),
            Event::RoutesSettled(revision) => {
                self.reached(revision);
                for index in 0..self.copies.len() {
                    if self.copies[index].draining && self.copies[index].left <= revision {
                        drop(self.step(index, copy::Event::RoutesSettled, now, decision));
                    }
                }
            }
            Event::Reconcile => {}
        }
        Ok(())
    }

    /// Compares what is with what is wanted, and with what `before` users were told.
    fn settle(&mut self, before: &Standing, policy: &Policy, now: Instant, decision: &mut Decision) {
        rollout::reconcile(self, policy, now, decision);
        self.tidy(policy, now, decision);
        let standing = self.standing();
        if standing != *before {
            self.changed = now;
            if self.copies.iter().all(|copy| !copy.routed) {
                // What a client is told while nothing answers has changed.
                self.publish(decision);
            }
            let counts = json!({ "available": standing.available, "unavailable": standing.unavailable });
            decision.note(standing.state.name(), standing.sentence(), &counts);
        }
    }

    /// Steps one copy and translates what the step asks.
    pub(super) fn step(
        &mut self,
        index: usize,
        event: copy::Event,
        now: Instant,
        decision: &mut Decision,
    ) -> Result<(), Illegal> {
        let before = self.copies[index].state.clone();
        let ordered = self.copies[index].ordered;
        let leaves = event == copy::Event::Drain && before.replica().is_some();
        let effects = copy::step(&mut self.copies[index], event, now)?;
        let copy = &self.copies[index];
        let generation = copy.generation;
        // Where it was counts for what has to be undone there.
        let on = copy.state.replica().or_else(|| before.replica()).cloned();
        if copy.state.name() != before.name() {
            decision.note(copy.state.name(), describe(copy, on.as_ref()), &Details::of(copy, on.as_ref()));
        }
        if leaves {
            decision.effects.push(Effect::Leave(generation));
        }
        if let (State::Available { .. }, Some(ordered)) = (&copy.state, ordered) {
            let way = now.since(ordered);
            self.way = Some(way);
            decision.effects.push(Effect::Arrived(way));
        }
        for effect in effects {
            match (effect, &on) {
                (CopyEffect::Save, Some(_)) => decision.writes.extend(self.copy_row(index)),
                (CopyEffect::Forget, _) => {
                    decision.writes.push(Write::RemoveCopy(self.name.clone(), generation));
                }
                (CopyEffect::Release, _) => decision.effects.push(Effect::Release(generation)),
                (CopyEffect::Withdraw, _) => decision.effects.push(Effect::Withdraw(generation)),
                (CopyEffect::Register, Some(_)) => decision.effects.extend(self.register(&self.copies[index])),
                (CopyEffect::Unregister, Some(on)) => {
                    decision.effects.push(Effect::Unregister { on: on.clone(), generation });
                }
                (CopyEffect::Route, _) => {
                    self.publish(decision);
                    let revision = self.revision;
                    let copy = &mut self.copies[index];
                    copy.left = revision;
                    copy.awaited = copy.routed.then_some(revision);
                }
                (CopyEffect::Save | CopyEffect::Register | CopyEffect::Unregister, None) => {}
            }
        }
        Ok(())
    }

    /// Takes which copies are to move, and no others.
    fn displace(&mut self, displaced: BTreeSet<Generation>, decision: &mut Decision) {
        for copy in self.copies.iter().filter(|copy| displaced.contains(&copy.generation)) {
            if let (Some(on), false) = (copy.state.replica(), self.displaced.contains(&copy.generation)) {
                let text =
                    format!("version {} on {on} does not fit there any more, and moves", copy.generation.version);
                decision.note("Displaced", text, &Details::of(copy, Some(on)));
            }
        }
        self.displaced = displaced;
    }

    fn reached(&mut self, revision: u64) {
        for copy in self.copies.iter_mut().filter(|copy| copy.awaited.is_some_and(|joined| joined <= revision)) {
            copy.awaited = None;
        }
    }

    fn reported(
        &mut self,
        on: ReplicaId,
        generation: Generation,
        report: Option<copy::Report>,
        policy: &Policy,
        now: Instant,
        decision: &mut Decision,
    ) {
        let holds = |copy: &Copy| copy.generation == generation && copy.state.replica() == Some(&on);
        let gone = matches!(report, None | Some(copy::Report::Unloaded | copy::Report::Failed { freed: true, .. }));
        match self.copies.iter().position(holds) {
            // What a copy can't take is late or repeated, and means nothing.
            Some(index) => {
                if let Some(report) = &report {
                    self.weigh(index, report, policy, decision);
                }
                let event = report.map_or(copy::Event::Missing, copy::Event::Reported);
                let lacks = event == copy::Event::Missing;
                drop(self.step(index, event, now, decision));
                self.first_word(generation, lacks, decision);
            }
            None if gone => {}
            None => decision.effects.push(Effect::Unregister { on, generation }),
        }
    }

    /// Has the route published, once per decision.
    fn publish(&mut self, decision: &mut Decision) {
        if !decision.effects.iter().any(|effect| matches!(effect, Effect::Publish(_))) {
            self.revision += 1;
            decision.effects.push(Effect::Publish(self.revision));
        }
    }

    /// A new copy of `version`, which looks for a place.
    pub(super) fn add_copy(
        &mut self,
        version: Version,
        attempts: u32,
        avoid: Vec<ReplicaId>,
        policy: &Policy,
        now: Instant,
        decision: &mut Decision,
    ) {
        if self.next_number >= self.number_bound {
            self.number_bound = self.next_number.saturating_add(NUMBERS_AT_ONCE);
            decision.writes.push(self.row());
        }
        let generation = Generation { uid: self.uid, version, number: self.next_number };
        self.next_number = self.next_number.saturating_add(1);
        let Some(entry) = self.entry(version) else { return };
        let need = self.need(entry, policy);
        let copy = Copy {
            generation,
            state: State::Pending { reason: None },
            since: now,
            need,
            attempts,
            ordered: None,
            avoid,
            left: 0,
            awaited: None,
            draining: false,
            routed: false,
        };
        decision.effects.extend(self.place(&copy));
        self.copies.push(copy);
    }

    /// Asks for a place for `copy`.
    pub(super) fn place(&self, copy: &Copy) -> Option<Effect> {
        self.wanted(copy).map(|wanted| Effect::Place(Box::new(wanted)))
    }

    /// What `copy` wants of the placement.
    #[must_use]
    pub fn wanted(&self, copy: &Copy) -> Option<Wanted> {
        let version = copy.generation.version;
        let placed = |other: &&Copy| other.generation.version == version && other.state.replica().is_some();
        let placed = u32::try_from(self.copies.iter().filter(placed).count()).unwrap_or(u32::MAX);
        Some(Wanted {
            generation: copy.generation,
            spec: Arc::clone(&self.entry(version)?.spec),
            need: copy.need.clone(),
            spread: self.deployment.spread,
            priority: self.deployment.priority,
            pinned: self.deployment.pinned,
            avoid: copy.avoid.clone(),
            together: self.deployment.replicas.saturating_sub(placed).max(1),
        })
    }

    /// Drops what is over: copies that are gone, and versions beyond the history. Ends the model when it is
    /// deleted and nothing is left.
    fn tidy(&mut self, policy: &Policy, now: Instant, decision: &mut Decision) {
        let had_copies = !self.copies.is_empty();
        self.copies.retain(|copy| copy.state != State::Unloaded);
        let copies = &self.copies;
        self.displaced.retain(|generation| copies.iter().any(|copy| copy.generation == *generation));
        let spare = self.versions.len().saturating_sub(policy.history.max(2));
        let (copies, serving) = (&self.copies, self.serving);
        let keep = |entry: &Entry| {
            serving == Some(entry.version) || copies.iter().any(|copy| copy.generation.version == entry.version)
        };
        let dropped: Vec<Version> =
            self.versions.iter().take(spare).filter(|entry| !keep(entry)).map(|entry| entry.version).collect();
        if !dropped.is_empty() {
            self.versions.retain(|entry| !dropped.contains(&entry.version));
            decision.writes.extend(dropped.into_iter().map(|v| Write::RemoveVersion(self.name.clone(), v)));
        }
        self.tidy_sizes(decision);
        if self.deleted.is_some() && self.copies.is_empty() && (had_copies || self.deleted == Some(now)) {
            decision.effects.push(Effect::Terminated);
        }
        if let Some(at) = rollout::next_retry(self, policy) {
            decision.effects.push(Effect::Wake(at));
        }
    }

    /// The version `version`, if history has it.
    #[must_use]
    pub fn entry(&self, version: Version) -> Option<&Entry> {
        self.versions.iter().find(|entry| entry.version == version)
    }

    pub(super) fn entry_mut(&mut self, version: Version) -> Option<&mut Entry> {
        self.versions.iter_mut().find(|entry| entry.version == version)
    }

    /// The version that was submitted last.
    #[must_use]
    pub fn latest(&self) -> Option<&Entry> {
        self.versions.last()
    }

    /// Replicas that their copies are to leave.
    #[must_use]
    pub const fn leaving(&self) -> &BTreeSet<ReplicaId> {
        &self.leaving
    }

    /// Copies that do not fit their replicas any more, and are to move.
    #[must_use]
    pub const fn displaced(&self) -> &BTreeSet<Generation> {
        &self.displaced
    }

    /// The order to hold `copy`.
    #[must_use]
    pub fn register(&self, copy: &Copy) -> Option<Effect> {
        let measured = self.measured_version(copy.generation.version);
        Some(Effect::Register {
            on: copy.state.replica()?.clone(),
            generation: copy.generation,
            spec: Arc::clone(&self.entry(copy.generation.version)?.spec),
            need: copy.need.clone(),
            attempt: copy.attempts,
            // That there is a measurement does not say that it is what counts.
            measured: measured.is_some_and(|measured| copy.need.covers(&measured)),
            pinned: self.deployment.pinned,
        })
    }
}
