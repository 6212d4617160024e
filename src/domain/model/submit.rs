//! What users ask of a model, and the versions that follow.
//!
//! The rule of this module: what is refused is refused before anything is changed.

use std::sync::Arc;

use serde_json::json;

use super::{Decision, Effect, Entry, Model};
use crate::domain::{
    copy::{self, State},
    error::{Code, Refusal},
    names::ModelName,
    record::Write,
    spec::{Definition, Deployment, DeploymentPatch, KubernetesMeta, Passthrough, Replicas},
    time::Instant,
    version::{Uid, Version},
};

/// The answer to a submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Submitted {
    /// Of the model's creation.
    pub uid: Uid,
    /// The version that the spec has.
    pub version: Version,
    /// What it led to.
    pub outcome: Outcome,
}

/// What a submission led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It says what was wanted already.
    Unchanged,
    /// The model is new.
    Created,
    /// The spec is another: a rollout begins.
    NewVersion,
    /// Only the deployment is another.
    Rescaled,
}

impl Model {
    /// A name that nothing is known of yet; [`Event::Submit`](super::Event::Submit) makes it a model.
    #[must_use]
    pub fn unborn(name: ModelName, now: Instant) -> Self {
        Self {
            name,
            uid: Uid(0),
            created: now,
            deployment: Deployment { replicas: 0, ..Deployment::default() },
            kubernetes: None,
            serving: None,
            deleted: Some(now),
            versions: Vec::new(),
            copies: Vec::new(),
            changed: now,
            revision: 0,
            next_number: 0,
            number_bound: 0,
            displaced: std::collections::BTreeSet::new(),
            version_floor: Version(0),
            raised: None,
            way: None,
            leaving: std::collections::BTreeSet::new(),
            sizes: super::Sizes::default(),
        }
    }

    /// Whether a submission ever made it a model.
    #[must_use]
    pub fn is_born(&self) -> bool {
        !self.versions.is_empty()
    }

    pub(super) fn submit(
        &mut self,
        definition: Definition,
        uid: Uid,
        now: Instant,
        decision: &mut Decision,
    ) -> Result<(), Refusal> {
        if self.deleted.is_some() {
            return self.create(definition, uid, now, decision);
        }
        let deployment = definition.deployment.over(&self.deployment)?;
        let same = self.latest().is_some_and(|latest| latest.spec.same_version(&definition.spec));
        let resumed = same && self.latest().is_some_and(|latest| latest.failed.is_some());
        let outcome = match (same, deployment == self.deployment) {
            (false, _) => Outcome::NewVersion,
            (true, false) => Outcome::Rescaled,
            (true, true) => Outcome::Unchanged,
        };
        let changed = outcome != Outcome::Unchanged || self.kubernetes != definition.kubernetes || resumed;
        let repinned = deployment.pinned != self.deployment.pinned;
        self.deployment = deployment;
        if repinned {
            self.repin(decision);
        }
        self.raised = None;
        self.kubernetes = definition.kubernetes;
        if outcome == Outcome::NewVersion {
            self.add_version(definition.spec, definition.passthrough, now, decision);
        } else if resumed && let Some(latest) = self.versions.last_mut() {
            // Resubmitting a version whose rollout was given up is how a user asks for another try.
            latest.failed = None;
            let version = latest.version;
            decision.writes.extend(self.version_row(version));
        }
        if changed {
            decision.writes.push(self.row());
        }
        if same {
            self.try_again(now, decision);
        }
        self.answer(outcome, decision)
    }

    /// Tells whoever has a part in it that the model's copies are pinned now, or are not any more. None is loaded anew.
    fn repin(&self, decision: &mut Decision) {
        for copy in &self.copies {
            match &copy.state {
                State::Pending { .. } => decision.effects.extend(self.place(copy)),
                State::Scheduled { .. }
                | State::Downloading { .. }
                | State::Loading { .. }
                | State::Available { .. }
                | State::Unknown { .. } => {
                    decision.effects.push(Effect::Keep(copy.generation));
                    decision.effects.extend(self.register(copy).filter(|_| !copy.draining));
                }
                // What is not coming back has its memory for as long as it takes to leave.
                State::Failed { .. } | State::Draining { .. } | State::Unloaded => {}
            }
        }
    }

    /// Gives up copies that no time would mend, so that others are tried in their place: what was said again is wanted
    /// still, and what stood in its way may be mended since.
    fn try_again(&mut self, now: Instant, decision: &mut Decision) {
        for index in 0..self.copies.len() {
            let hopeless =
                matches!(&self.copies[index].state, State::Failed { on: None, failure } if !failure.class.retryable());
            if hopeless {
                // A copy that is leaving already takes no other order to.
                drop(self.step(index, copy::Event::Drain, now, decision));
            }
        }
    }

    fn create(
        &mut self,
        definition: Definition,
        uid: Uid,
        now: Instant,
        decision: &mut Decision,
    ) -> Result<(), Refusal> {
        self.deployment = definition.deployment.over(&Deployment::default())?;
        // An agent may hold versions of the creation before this one until their copies are gone.
        let held = self.copies.iter().map(|copy| copy.generation.version).max();
        let generation = definition.kubernetes.as_ref().map_or(0, |meta| meta.generation);
        let first = Version::first(generation, held).max(self.version_floor);
        decision
            .writes
            .extend(self.versions.drain(..).map(|entry| Write::RemoveVersion(self.name.clone(), entry.version)));
        self.uid = uid;
        self.created = now;
        self.deleted = None;
        self.kubernetes = definition.kubernetes;
        self.serving = Some(first);
        self.next_number = 0;
        self.number_bound = 0;
        self.push_version(first, definition.spec, definition.passthrough, now, decision);
        decision.writes.push(self.row());
        decision.note("Created", format!("version {first} was submitted"), &json!({ "uid": uid.0, "held": held }));
        self.answer(Outcome::Created, decision)
    }

    fn add_version(
        &mut self,
        spec: crate::domain::spec::ModelSpec,
        passthrough: Passthrough,
        now: Instant,
        decision: &mut Decision,
    ) {
        let version = self.latest().map_or(Version(1), |latest| latest.version.next()).max(self.version_floor);
        // With nothing that answers there is nothing to keep clients on.
        if !self.copies.iter().any(|copy| copy.routed) {
            self.serving = Some(version);
        }
        self.push_version(version, spec, passthrough, now, decision);
        decision.note("NewVersion", format!("version {version} was submitted"), &json!({ "serving": self.serving }));
    }

    fn push_version(
        &mut self,
        version: Version,
        spec: crate::domain::spec::ModelSpec,
        passthrough: Passthrough,
        now: Instant,
        decision: &mut Decision,
    ) {
        let entry = Entry { version, uid: self.uid, spec: Arc::new(spec), created: now, passthrough, failed: None };
        self.versions.push(entry);
        decision.writes.extend(self.version_row(version));
    }

    pub(super) fn rollback(
        &mut self,
        to: Option<Version>,
        now: Instant,
        decision: &mut Decision,
    ) -> Result<(), Refusal> {
        self.refuse_deleted()?;
        let (old, latest) = (&self.versions[..self.versions.len() - 1], &self.versions[self.versions.len() - 1]);
        let known = || {
            let numbers: Vec<String> = old.iter().map(|entry| entry.version.to_string()).collect();
            if numbers.is_empty() {
                "there is none before it".to_owned()
            } else {
                format!("known: {}", numbers.join(", "))
            }
        };
        let entry = match to {
            None => old.iter().rev().find(|entry| !entry.spec.same_version(&latest.spec)),
            Some(version) => self.versions.iter().find(|entry| entry.version == version),
        };
        let Some(entry) = entry else {
            let what = to.map_or_else(|| "an older version".to_owned(), |to| format!("version {to}"));
            let text = format!("model {} has no {what} to roll back to ({})", self.name, known());
            return Err(Refusal::new(Code::FailedPrecondition, text));
        };
        if entry.spec.same_version(&latest.spec) {
            return self.answer(Outcome::Unchanged, decision);
        }
        let (spec, passthrough, from) = (entry.spec.as_ref().clone(), entry.passthrough.clone(), entry.version);
        self.add_version(spec, passthrough, now, decision);
        decision.writes.push(self.row());
        decision.note("Rollback", format!("version {from}'s spec is wanted again"), &json!({ "from": from }));
        self.answer(Outcome::NewVersion, decision)
    }

    pub(super) fn scale(&mut self, replicas: u32, decision: &mut Decision) -> Result<(), Refusal> {
        self.refuse_deleted()?;
        let Deployment { min_replicas, max_replicas, log_payloads, .. } = self.deployment;
        let patch = DeploymentPatch {
            replicas: Some(Replicas { replicas, min: min_replicas, max: max_replicas, log_payloads }),
            ..DeploymentPatch::default()
        };
        let deployment = patch.over(&self.deployment)?;
        let outcome = if deployment == self.deployment { Outcome::Unchanged } else { Outcome::Rescaled };
        self.deployment = deployment;
        self.raised = None;
        if outcome == Outcome::Rescaled {
            decision.writes.push(self.row());
        }
        self.answer(outcome, decision)
    }

    pub(super) fn delete(
        &mut self,
        kubernetes: Option<KubernetesMeta>,
        now: Instant,
        decision: &mut Decision,
    ) -> Result<(), Refusal> {
        if !self.is_born() {
            return Err(Refusal::new(Code::FailedPrecondition, format!("model {} is not known", self.name)));
        }
        if kubernetes.is_some() {
            self.kubernetes = kubernetes;
        }
        if self.deleted.is_none() {
            self.deleted = Some(now);
            decision.note("Deleted", "the model was deleted".to_owned(), &json!({ "uid": self.uid }));
        }
        decision.writes.push(self.row());
        Ok(())
    }

    fn refuse_deleted(&self) -> Result<(), Refusal> {
        if self.deleted.is_some() {
            return Err(Refusal::new(Code::FailedPrecondition, format!("model {} is deleted", self.name)));
        }
        Ok(())
    }

    fn answer(&self, outcome: Outcome, decision: &mut Decision) -> Result<(), Refusal> {
        let version = self.latest().map_or(Version(0), |latest| latest.version);
        decision.submitted = Some(Submitted { uid: self.uid, version, outcome });
        Ok(())
    }
}
