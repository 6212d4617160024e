//! Copies that the scheduler of another journal left with an agent: they are taken up as they are.
//!
//! The rule of this module: what answers goes on answering. A journal that was lost, or is older than what agents
//! hold, lacks users' wishes, so what is found is what is wanted until a user says otherwise. What this journal
//! calls by the name of something else that was found gets another name; it is never taken for that.

use std::{collections::BTreeSet, sync::Arc};

use serde_json::json;

use super::{Decision, Effect, Entry, Model, Policy};
use crate::domain::{
    copy::{self, Copy, Report, State},
    history,
    memory::Resources,
    names::{ModelName, ReplicaId},
    order::Order,
    record::Write,
    spec::{Deployment, ModelSpec, Passthrough},
    time::Instant,
    version::{Generation, Version},
};

/// A copy that an agent holds and no journal speaks of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where it is.
    pub on: ReplicaId,
    /// Which copy.
    pub generation: Generation,
    /// What it is.
    pub spec: Arc<ModelSpec>,
    /// Memory that was reserved for it.
    pub need: Resources,
    /// Whether it is pinned.
    pub pinned: bool,
    /// How it stands.
    pub report: Report,
}

impl Found {
    /// What an agent on `on` says that it holds, with the order that made it. Nothing when the copy is on its way
    /// out, or never came to be.
    #[must_use]
    pub fn of(on: &ReplicaId, order: &Order, report: &Report) -> Option<(ModelName, Self)> {
        let Order::Register { model, generation, spec, need, pinned, .. } = order else { return None };
        match report {
            Report::Scheduled | Report::Downloading(_) | Report::Loading { .. } | Report::Available { .. } => {}
            Report::Draining { .. } | Report::Unloaded | Report::Failed { .. } => return None,
        }
        let (spec, need, report) = (Arc::clone(spec), need.clone(), report.clone());
        let (on, generation, pinned) = (on.clone(), *generation, *pinned);
        Some((model.clone(), Self { on, generation, spec, need, pinned, report }))
    }
}

impl Model {
    pub(super) fn adopt(&mut self, found: Found, policy: &Policy, now: Instant, decision: &mut Decision) {
        let generation = found.generation;
        if self.is_born() {
            if generation.uid > self.uid {
                // The name was deleted and created again since: what is known of it is over.
                let over = self.versions.drain(..);
                decision.writes.extend(over.map(|entry| Write::RemoveVersion(self.name.clone(), entry.version)));
            } else if generation.uid < self.uid || self.deleted.is_some() {
                // A user has said since what the name is to be.
                return self.reported(found.on, generation, Some(found.report), policy, now, decision);
            }
        }
        if !self.makes_way_for(&found, now, decision) {
            // The number has been given to something else, which an agent holds.
            decision.effects.push(Effect::Unregister { on: found.on, generation });
            return;
        }
        let known = |copy: &Copy| copy.generation == generation && copy.state != State::Unloaded;
        if self.copies.iter().any(known) {
            return self.reported(found.on, generation, Some(found.report), policy, now, decision);
        }
        self.take_up(found, policy, now, decision);
    }

    /// Gives other numbers to what has the found copy's and is something else. False when that can't be, because an
    /// agent holds it.
    fn makes_way_for(&mut self, found: &Found, now: Instant, decision: &mut Decision) -> bool {
        let (generation, version) = (found.generation, found.generation.version);
        let other_spec = self.entry(version).is_some_and(|entry| !entry.spec.same_version(&found.spec));
        let index = self.copies.iter().position(|copy| copy.generation == generation);
        if let Some(index) = index {
            let copy = &self.copies[index];
            let elsewhere = copy.state.replica() != Some(&found.on);
            if (elsewhere || other_spec) && is_held(copy) {
                return false;
            }
            if elsewhere || other_spec {
                self.never_was(index, &found.on, now, decision);
            }
        }
        if !other_spec {
            return true;
        }
        let uid = self.uid;
        let named = |copy: &Copy| (copy.generation.uid, copy.generation.version) == (uid, version) && !copy.draining;
        if self.copies.iter().any(|copy| named(copy) && is_held(copy)) {
            return false;
        }
        for index in 0..self.copies.len() {
            if named(&self.copies[index]) {
                drop(self.step(index, copy::Event::Drain, now, decision));
            }
        }
        self.renumber(version, decision);
        true
    }

    /// The copy was ordered, and is not there: something else has its number.
    fn never_was(&mut self, index: usize, here: &ReplicaId, now: Instant, decision: &mut Decision) {
        let (generation, on) = (self.copies[index].generation, self.copies[index].state.replica().cloned());
        let event = if on.is_some() { copy::Event::ReplicaLost } else { copy::Event::Drain };
        drop(self.step(index, event, now, decision));
        if self.copies[index].state != State::Unloaded {
            // One that failed is Failed still, without a place.
            drop(self.step(index, copy::Event::Drain, now, decision));
        }
        // Here the order is replaced by the one that made what was found.
        let on = on.filter(|on| on != here);
        decision.effects.extend(on.map(|on| Effect::Unregister { on, generation }));
    }

    /// Gives what users submitted as `version` a number above all others, so that it takes over from what was found
    /// under that one as any newer version does.
    fn renumber(&mut self, version: Version, decision: &mut Decision) {
        let newest = self.latest().map_or(version, |latest| latest.version);
        let number = newest.next().max(self.version_floor);
        let Some(at) = self.versions.iter().position(|entry| entry.version == version) else { return };
        let entry = Entry { version: number, ..self.versions.remove(at) };
        self.versions.push(entry);
        decision.writes.push(Write::RemoveVersion(self.name.clone(), version));
        // What was measured of the number is of what had it.
        self.keep_sizes(|other| *other != version, decision);
        decision.writes.extend(self.version_row(number));
        let data = json!({ "from": version.0, "to": number.0 });
        let text = format!("version {version} is version {number} from now on: agents hold another by that number");
        decision.note("Renumbered", text, &data);
    }

    fn take_up(&mut self, found: Found, policy: &Policy, now: Instant, decision: &mut Decision) {
        let Found { on, generation, spec, need, pinned, report } = found;
        let version = generation.version;
        if !self.is_born() {
            self.uid = generation.uid;
            self.created = now;
            self.deleted = None;
            self.kubernetes = None;
            self.deployment = Deployment { pinned, ..Deployment::default() };
            self.raised = None;
            self.serving = Some(version);
            // Others may have been given, and be gone.
            self.version_floor = history::beyond(version).max(self.version_floor);
            self.number_bound = generation.number.saturating_add(history::COPIES).max(self.number_bound);
            self.next_number = self.number_bound;
        }
        if self.entry(version).is_none() {
            let passthrough = Passthrough::default();
            let entry = Entry { version, uid: generation.uid, spec, created: now, passthrough, failed: None };
            self.versions.push(entry);
            self.versions.sort_by_key(|entry| entry.version);
            decision.writes.extend(self.version_row(version));
        }
        let data = json!({ "version": version.0, "replica": on.to_string() });
        decision.note("Adopted", format!("version {version} was found on {on}, and is kept as it is"), &data);
        self.copies.push(Copy {
            generation,
            state: State::Unknown { on },
            since: now,
            need,
            attempts: 0,
            ordered: None,
            avoid: Vec::new(),
            left: 0,
            draining: false,
            routed: false,
            awaited: None,
        });
        let unseen = || {
            let unseen = |copy: &&Copy| matches!(copy.state, State::Unknown { .. }) && copy.generation != generation;
            self.copies.iter().filter(unseen).map(|copy| copy.generation).collect()
        };
        let raised = self.raised.take().unwrap_or_else(|| Raised { from: self.deployment.replicas, unseen: unseen() });
        self.deployment.replicas = raised.from.max(self.as_found(None));
        self.raised = Some(raised);
        self.next_number = self.next_number.max(generation.number.saturating_add(1));
        self.number_bound = self.number_bound.max(self.next_number);
        decision.writes.push(self.row());
        let index = self.copies.len() - 1;
        decision.writes.extend(self.copy_row(index));
        decision.effects.push(Effect::Keep(generation));
        decision.effects.extend(self.register(&self.copies[index]));
        // Whatever it says now has a meaning for a copy that was Unknown.
        self.weigh(index, &report, policy, decision);
        drop(self.step(index, copy::Event::Reported(report), now, decision));
    }

    /// An agent has spoken of a copy for the first time. If it lacks it, and more are wanted only because it was
    /// counted as found, they are not.
    pub(super) fn first_word(&mut self, generation: Generation, lacks: bool, decision: &mut Decision) {
        let Some(raised) = &mut self.raised else { return };
        if !raised.unseen.remove(&generation) || !lacks {
            return;
        }
        let wanted = raised.from.max(self.as_found(Some(generation)));
        if wanted < self.deployment.replicas {
            self.deployment.replicas = wanted;
            decision.writes.push(self.row());
        }
    }

    /// As many copies as there are of one version, those that no agent has spoken of included.
    fn as_found(&self, without: Option<Generation>) -> u32 {
        let there = |copy: &&Copy| {
            let generation = copy.generation;
            generation.uid == self.uid
                && Some(generation) != without
                && !copy.draining
                && copy.state.replica().is_some()
        };
        let alike =
            |version| self.copies.iter().filter(there).filter(|copy| copy.generation.version == version).count();
        let most = self.versions.iter().map(|entry| alike(entry.version)).max().unwrap_or(0);
        u32::try_from(most).unwrap_or(u32::MAX)
    }
}

/// More copies are wanted than before, since more were found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Raised {
    /// Copies wanted before.
    pub(super) from: u32,
    /// Copies of the journal that were counted, and of which no agent has spoken yet.
    pub(super) unseen: BTreeSet<Generation>,
}

/// Whether the copy's agent has said that it is there.
const fn is_held(copy: &Copy) -> bool {
    match copy.state {
        State::Downloading { .. } | State::Loading { .. } | State::Available { .. } | State::Draining { .. } => true,
        State::Pending { .. }
        | State::Scheduled { .. }
        | State::Unloaded
        | State::Failed { .. }
        | State::Unknown { .. } => false,
    }
}
