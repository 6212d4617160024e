//! Copies that the scheduler of another journal left with an agent: they are taken up as they are.
//!
//! The rule of this module: what answers goes on answering. A journal that was lost takes the users' wishes with
//! it, so what is found is what is wanted until a user says otherwise.

use std::sync::Arc;

use serde_json::json;

use super::{Decision, Effect, Entry, Model};
use crate::domain::{
    copy::{self, Copy, Report, State},
    memory::Resources,
    names::{ModelName, ReplicaId},
    order::Order,
    spec::{Deployment, ModelSpec, Passthrough},
    time::Instant,
    version::Generation,
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
    /// How it stands.
    pub report: Report,
}

impl Found {
    /// What an agent on `on` says that it holds, with the order that made it. Nothing when the copy is on its way
    /// out, or never came to be.
    #[must_use]
    pub fn of(on: &ReplicaId, order: &Order, report: &Report) -> Option<(ModelName, Self)> {
        let Order::Register { model, generation, spec, need, .. } = order else { return None };
        match report {
            Report::Scheduled | Report::Downloading(_) | Report::Loading | Report::Available { .. } => {}
            Report::Draining { .. } | Report::Unloaded | Report::Failed { .. } => return None,
        }
        let (spec, need, report) = (Arc::clone(spec), need.clone(), report.clone());
        Some((model.clone(), Self { on: on.clone(), generation: *generation, spec, need, report }))
    }
}

impl Model {
    pub(super) fn adopt(&mut self, found: Found, now: Instant, decision: &mut Decision) {
        let Found { on, generation, spec, need, report } = found;
        let spoken_of = self.is_born() && (self.uid != generation.uid || self.deleted.is_some());
        if spoken_of || self.copies.iter().any(|copy| copy.generation == generation) {
            // A user has said since what the name is to be, or it was adopted before.
            return self.reported(on, generation, Some(report), now, decision);
        }
        let version = generation.version;
        if !self.is_born() {
            self.uid = generation.uid;
            self.created = now;
            self.deleted = None;
            self.deployment = Deployment::default();
            self.serving = Some(version);
        }
        if self.entry(version).is_none() {
            let passthrough = Passthrough::default();
            let entry = Entry { version, uid: generation.uid, spec, created: now, passthrough, failed: None };
            self.versions.push(entry);
            self.versions.sort_by_key(|entry| entry.version);
            decision.writes.extend(self.version_row(version));
        }
        let data = json!({ "version": version.0, "replica": on.to_string() });
        decision.note("Adopted", format!("version {version} was found on {on}, and is kept as it is"), data);
        self.copies.push(Copy {
            generation,
            state: State::Unknown { on },
            since: now,
            need,
            attempts: 0,
            avoid: Vec::new(),
            left: 0,
            draining: false,
            routed: false,
            awaited: None,
        });
        // As many as there are of one version were wanted.
        let alike = self.copies.iter().filter(|copy| copy.generation.version == version && !copy.draining).count();
        self.deployment.replicas = self.deployment.replicas.max(u32::try_from(alike).unwrap_or(u32::MAX));
        self.next_number = self.next_number.max(generation.number.saturating_add(1));
        self.number_bound = self.number_bound.max(self.next_number);
        decision.writes.push(self.row());
        let index = self.copies.len() - 1;
        decision.writes.extend(self.copy_row(index));
        decision.effects.push(Effect::Keep(generation));
        decision.effects.extend(self.register(&self.copies[index]));
        // Whatever it says now has a meaning for a copy that was Unknown.
        drop(self.step(index, copy::Event::Reported(report), now, decision));
    }
}
