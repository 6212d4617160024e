//! What others see of a model: its standing, its route, its rows.

use super::{Model, ModelState, Outlook, Reason, Standing, standing};
use crate::domain::{
    copy::{self, State},
    names::{ReplicaId, ServerName},
    record::{CopyRow, ModelRow, VersionRow, Write},
    routes::{Endpoint, Route, Target},
    version::Version,
};

impl Model {
    /// The model's own state, over all its versions.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let deployment = &self.deployment;
        let over = self.deleted.is_some();
        let mut standing = standing(self.copies.iter(), deployment.replicas, deployment.min_replicas, over);
        if (standing.state, &standing.reason) == (ModelState::Available, &Reason::None)
            && let Some(latest) = self.latest().map(|entry| entry.version)
            && self.serving != Some(latest)
        {
            // It answers, with another version than the one that was asked for last.
            let newest = self.version_standing(latest);
            if matches!(newest.state, ModelState::Failed | ModelState::ScheduleFailed) {
                standing.reason = Reason::Held(latest, newest.sentence());
            }
        }
        standing
    }

    /// The state of one version, as Seldon's clients ask for it.
    #[must_use]
    pub fn version_standing(&self, version: Version) -> Standing {
        let latest = self.latest().is_some_and(|entry| entry.version == version);
        let copies = || self.copies.iter().filter(|copy| copy.generation.version == version);
        let over = self.deleted.is_some() || (!latest && self.serving != Some(version));
        let mut standing = standing(copies(), self.deployment.replicas, self.deployment.min_replicas, over);
        if let Some(failure) = self.entry(version).and_then(|entry| entry.failed.as_ref())
            && !over
        {
            standing.state = ModelState::Failed;
            standing.reason = Reason::RolloutFailed(failure.clone());
        }
        standing
    }

    /// Where requests go: every routed copy, versions weighted by their number of copies.
    #[must_use]
    pub fn route(&self, door: impl Fn(&ReplicaId) -> Option<String>, outlook: Outlook<'_>) -> Route {
        let mut targets: Vec<Target> = Vec::new();
        for copy in self.copies.iter().filter(|copy| copy.routed) {
            let Some((replica, door)) = copy.state.replica().and_then(|on| Some((on.clone(), door(on)?))) else {
                continue;
            };
            let resident = !matches!(
                copy.state,
                State::Available { residency: copy::Residency::Evicted | copy::Residency::Evicting, .. }
            );
            let endpoint = Endpoint { generation: copy.generation, replica, door, resident };
            match targets.iter_mut().find(|target| target.version == copy.generation.version) {
                Some(target) => {
                    target.weight += 1;
                    target.endpoints.push(endpoint);
                }
                None => {
                    targets.push(Target { version: copy.generation.version, weight: 1, endpoints: vec![endpoint] });
                }
            }
        }
        targets.sort_by_key(|target| target.version);
        Route { model: self.name.clone(), targets, absence: self.absence(outlook) }
    }

    /// The route as gateways are told it; none of a model that is deleted and that nobody may be sent to.
    #[must_use]
    pub fn published(&self, door: impl Fn(&ReplicaId) -> Option<String>, outlook: Outlook<'_>) -> Option<Route> {
        let gone = self.deleted.is_some() && self.copies.iter().all(|copy| !copy.routed);
        (!gone).then(|| self.route(door, outlook))
    }

    /// The journal's row of the model.
    #[must_use]
    pub fn row(&self) -> Write {
        Write::PutModel(Box::new(ModelRow {
            name: self.name.clone(),
            uid: self.uid,
            created: self.created,
            deployment: self.deployment.clone(),
            kubernetes: self.kubernetes.clone(),
            serving: self.serving,
            number_bound: self.number_bound,
            version_floor: self.version_floor,
            deleted: self.deleted,
        }))
    }

    pub(in crate::domain) fn version_row(&self, version: Version) -> Option<Write> {
        let entry = self.entry(version)?;
        Some(Write::PutVersion(Box::new(VersionRow {
            model: self.name.clone(),
            uid: entry.uid,
            version,
            created: entry.created,
            spec: entry.spec.as_ref().clone(),
            passthrough: entry.passthrough.clone(),
            failed: entry.failed.clone(),
        })))
    }

    pub(super) fn copy_row(&self, index: usize) -> Option<Write> {
        let copy = &self.copies[index];
        Some(Write::PutCopy(Box::new(CopyRow {
            model: self.name.clone(),
            generation: copy.generation,
            replica: copy.state.replica()?.clone(),
            need: copy.need.clone(),
            routed: copy.routed,
            draining: copy.draining,
        })))
    }

    /// The server that holds most copies of the version, then the first by name: Seldon's API knows but one.
    #[must_use]
    pub fn main_server(&self, version: Version) -> Option<ServerName> {
        let mut counts: std::collections::BTreeMap<&ServerName, usize> = std::collections::BTreeMap::new();
        for copy in self.copies.iter().filter(|copy| copy.generation.version == version) {
            if let Some(on) = copy.state.replica() {
                *counts.entry(&on.server).or_default() += 1;
            }
        }
        counts.into_iter().rev().max_by_key(|(_, count)| *count).map(|(server, _)| server.clone())
    }
}
