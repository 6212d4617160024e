//! What is asked of a placement, and what the ledger knows about the asker before any replica is looked at.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::Serialize;

use super::ledger::Ledger;
use crate::domain::{
    memory::Resources,
    names::{ModelName, ReplicaId, ServerName},
    spec::Spread,
    time::Instant,
    version::Generation,
};

/// A set of capabilities, had or required. They are compared as exact strings, after trimming.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Capabilities(Arc<BTreeSet<String>>);

impl Capabilities {
    /// The set of `names`, trimmed, each once; those with nothing in them are left out.
    pub fn new<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> Self {
        let trimmed = names.into_iter().map(|name| name.as_ref().trim().to_owned());
        Self(Arc::new(trimmed.filter(|name| !name.is_empty()).collect()))
    }

    /// Whether all of `required` are here.
    #[must_use]
    pub fn cover(&self, required: &Self) -> bool {
        required.0.is_subset(&self.0)
    }

    /// Those of `required` that are not here, in order.
    #[must_use]
    pub fn lack(&self, required: &Self) -> Vec<String> {
        required.0.difference(&self.0).cloned().collect()
    }

    /// The capabilities, in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

/// A copy that looks for a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacementRequest {
    /// The model.
    pub model: ModelName,
    /// The copy.
    pub generation: Generation,
    /// What the replica must be capable of.
    pub requirements: Capabilities,
    /// The only server that it may go to.
    pub server: Option<ServerName>,
    /// Memory to register. One of no bytes at all is refused: an unknown size never counts as zero.
    pub need: Resources,
    /// Whether copies of one version may be on several servers.
    pub spread: Spread,
    /// Who goes first when not everything fits: the higher.
    pub priority: i32,
    /// Whether it is never to be evicted.
    pub pinned: bool,
    /// Copies of this version that look for a replica, this one included. A version that has to stay on one server
    /// goes to one that can take them all, if there is any.
    pub together: u32,
    /// Replicas where it failed of late, and until when they are avoided.
    pub avoid: BTreeMap<ReplicaId, Instant>,
    /// Replicas that are better than others for this copy.
    pub prefer: Prefer,
}

impl PlacementRequest {
    /// A request for one copy without any wishes.
    #[must_use]
    pub fn new(model: ModelName, generation: Generation, need: Resources) -> Self {
        Self {
            model,
            generation,
            requirements: Capabilities::default(),
            server: None,
            need,
            spread: Spread::default(),
            priority: 0,
            pinned: false,
            together: 1,
            avoid: BTreeMap::new(),
            prefer: Prefer::default(),
        }
    }
}

/// Replicas that would start a copy sooner, as far as is known. Each is looked at by itself, so the cost of a
/// decision grows with their number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prefer {
    /// Those that have the version in memory.
    pub resident_on: BTreeSet<ReplicaId>,
    /// Those that have its artifact on disk.
    pub artifact_on: BTreeSet<ReplicaId>,
}

/// A request, beside what the ledger knows of the other copies of its version.
#[derive(Debug)]
pub(super) struct Problem<'a> {
    pub(super) request: &'a PlacementRequest,
    pub(super) now: Instant,
    /// Replicas that hold another copy of the version, one that is leaving included: an inference server knows a
    /// version by one name, so it can't hold two copies of it.
    pub(super) held: BTreeMap<ReplicaId, Generation>,
    /// How many copies of the version stay on each server.
    pub(super) staying: BTreeMap<ServerName, u32>,
    /// The server that the version's other copies keep it on.
    pub(super) anchor: Option<ServerName>,
}

/// Which servers can come into question at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope<'a> {
    /// All of them.
    Everywhere,
    /// One.
    Only(&'a ServerName),
    /// None: the manifest names one server, and the other copies are on another.
    Nowhere,
}

impl<'a> Problem<'a> {
    pub(super) fn new(ledger: &Ledger, request: &'a PlacementRequest, now: Instant) -> Self {
        let mut held = BTreeMap::new();
        let mut staying = BTreeMap::new();
        for (generation, copy) in ledger.copies_of(&request.model) {
            if generation.version != request.generation.version || *generation == request.generation {
                continue;
            }
            held.insert(copy.replica.clone(), *generation);
            if !copy.leaving
                && !copy.displaced
                && ledger.replica(&copy.replica).is_some_and(|replica| replica.keeps_copies())
            {
                *staying.entry(copy.replica.server.clone()).or_insert(0) += 1;
            }
        }
        let anchor = match request.spread {
            Spread::Servers => None,
            // The one with most copies; of equals the first by name.
            Spread::OneServer => {
                staying.iter().rev().max_by_key(|(_, copies)| **copies).map(|(server, _)| server.clone())
            }
        };
        Self { request, now, held, staying, anchor }
    }

    /// Where a replica can come into question.
    pub(super) fn scope(&self) -> Scope<'_> {
        match (&self.request.server, &self.anchor) {
            (None, None) => Scope::Everywhere,
            (Some(only), None) | (None, Some(only)) => Scope::Only(only),
            (Some(pinned), Some(anchor)) if pinned == anchor => Scope::Only(pinned),
            (Some(_), Some(_)) => Scope::Nowhere,
        }
    }

    /// How many copies have to go to one server that is still to be chosen; nothing when there is no such choice.
    pub(super) fn together(&self) -> Option<u32> {
        let choice = self.request.spread == Spread::OneServer && self.scope() == Scope::Everywhere;
        (choice && self.request.together > 1).then_some(self.request.together)
    }

    /// Until when `replica` is avoided, if it still is.
    pub(super) fn avoided(&self, replica: &ReplicaId) -> Option<Instant> {
        self.request.avoid.get(replica).copied().filter(|until| *until > self.now)
    }

    /// Replicas about which the request says something of their own.
    pub(super) fn preferred(&self) -> impl Iterator<Item = &ReplicaId> {
        let prefer = &self.request.prefer;
        prefer.resident_on.iter().chain(prefer.artifact_on.difference(&prefer.resident_on))
    }
}
