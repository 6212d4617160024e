//! The ledger of registered bytes: which copy has which memory reserved on which replica. It has one writer, and a
//! decision and its reservation are one step, so no two decisions ever see the same free byte.
//!
//! No decision takes a replica over its limit: its memory and the overcommit, on every device. And its pinned copies
//! always fit its memory together, with room left there for each of the others alone. What was decided before (a restart, an
//! adoption), a copy that turns out larger or is pinned since, or a replica that turns out smaller can break that; then the
//! replica says so, and takes nothing that would not fit.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use super::{
    explain,
    index::Index,
    load::Load,
    problem::{PlacementRequest, Problem},
    replica::{Growth, Replica, ReplicaFacts},
    report::{Report, Unplaced},
    score::Score,
    solve,
};
use crate::domain::{
    memory::Resources,
    names::{ModelName, ReplicaId, ServerName},
    replica::ReplicaState,
    time::Instant,
    version::{Generation, Uid, Version},
};

/// All servers, their replicas, and the memory registered on each. A clone of it answers what-if questions.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// What the registry declares as the memory of each replica of a server.
    declared: BTreeMap<ServerName, Option<Resources>>,
    replicas: BTreeMap<ReplicaId, Replica>,
    copies: BTreeMap<(ModelName, Generation), Registered>,
    index: Index,
    /// Replicas that can take more than when this was last asked for. At most one entry for each.
    grown: BTreeMap<ReplicaId, Growth>,
}

/// Two ledgers are equal when every question has the same answer; what changed of late is no part of that.
impl PartialEq for Ledger {
    fn eq(&self, other: &Self) -> bool {
        self.declared == other.declared
            && self.replicas == other.replicas
            && self.copies == other.copies
            && self.index == other.index
    }
}

impl Eq for Ledger {}

/// A copy's reservation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registered {
    /// Where.
    pub replica: ReplicaId,
    /// How much.
    pub need: Resources,
    /// Whether it is never evicted.
    pub pinned: bool,
    /// Whether it is on its way out: it still needs its memory, but keeps no other copy on its server.
    pub leaving: bool,
    /// Whether it does not fit its replica any more and is to move: it keeps no other copy on its server either.
    pub displaced: bool,
}

/// What a placement came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The copy's replica, with its memory reserved; or why there is none.
    pub outcome: Result<Placed, Unplaced>,
    /// How many replicas and parts of indexes were looked at.
    pub examined: u32,
}

/// A replica that was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The replica.
    pub replica: ReplicaId,
    /// What it was chosen for; absent when the copy had its place already.
    pub score: Option<Score>,
}

impl Decision {
    /// The replica, if one was found.
    #[must_use]
    pub fn replica(&self) -> Option<&ReplicaId> {
        self.outcome.as_ref().ok().map(|placed| &placed.replica)
    }
}

/// A change that contradicts what the ledger knows. It changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LedgerError {
    /// The replica is not known.
    #[error("replica {0} is not known")]
    NoReplica(ReplicaId),
    /// The copy is not registered.
    #[error("copy {1} of model {0} is not registered on any replica")]
    NoCopy(ModelName, Generation),
    /// A copy is on one replica, ever.
    #[error("copy {generation} of model {model} is registered on {has}, so it can't be on {wanted}; release it first")]
    Elsewhere {
        /// The model.
        model: ModelName,
        /// The copy.
        generation: Generation,
        /// Where it is.
        has: ReplicaId,
        /// Where it was said to be.
        wanted: ReplicaId,
    },
}

impl Ledger {
    /// Declares `server`, and what memory its owner says that each of its replicas has.
    pub fn upsert_server(&mut self, server: ServerName, declared: Option<Resources>) {
        let ids: Vec<ReplicaId> = self.replicas_of(&server).map(|replica| replica.id.clone()).collect();
        for id in ids {
            self.edit(&id, |replica| replica.declared.clone_from(&declared));
        }
        self.declared.insert(server, declared);
    }

    /// Forgets what was declared of `server`. Its replicas stay until each of them is removed.
    pub fn remove_server(&mut self, server: &ServerName) {
        self.upsert_server(server.clone(), None);
        self.declared.remove(server);
    }

    /// Adds a replica, or brings what is known of it up to date. Its copies and marks stay.
    pub fn upsert_replica(&mut self, id: &ReplicaId, facts: ReplicaFacts) {
        self.ensure(id);
        self.edit(id, |replica| replica.facts = facts);
    }

    /// Forgets a replica, and gives back the copies that were registered on it, with their memory.
    pub fn remove_replica(&mut self, id: &ReplicaId) -> Vec<(ModelName, Generation, Resources)> {
        let Some(replica) = self.replicas.remove(id) else { return Vec::new() };
        self.index.remove(id, &replica.seat());
        self.grown.remove(id);
        let mut copies = Vec::with_capacity(replica.copies.len());
        for key in replica.copies {
            if let Some(copy) = self.copies.remove(&key) {
                copies.push((key.0, key.1, copy.need));
            }
        }
        copies
    }

    /// Sets where a replica stands.
    ///
    /// # Errors
    /// When it is not known.
    pub fn set_state(&mut self, id: &ReplicaId, state: ReplicaState) -> Result<(), LedgerError> {
        self.known(id, |replica| replica.facts.state = state)
    }

    /// Closes a replica to new copies, or opens it again.
    ///
    /// # Errors
    /// When it is not known.
    pub fn set_cordoned(&mut self, id: &ReplicaId, cordoned: bool) -> Result<(), LedgerError> {
        self.known(id, |replica| replica.cordoned = cordoned)
    }

    /// Marks a replica as one that its copies are to leave, or takes the mark back.
    ///
    /// # Errors
    /// When it is not known.
    pub fn set_draining(&mut self, id: &ReplicaId, draining: bool) -> Result<(), LedgerError> {
        self.known(id, |replica| replica.draining = draining)
    }

    /// Sets the memory that the agent sees.
    ///
    /// # Errors
    /// When the replica is not known.
    pub fn set_reported(&mut self, id: &ReplicaId, reported: Option<Resources>) -> Result<(), LedgerError> {
        self.known(id, |replica| replica.facts.reported = reported)
    }

    /// Finds the best replica for a copy and reserves its memory there. A copy that has its place keeps it, so
    /// that a request that comes twice does nothing the second time; with another need it holds that much from then on,
    /// as by [`resize`](Self::resize): its model learned of it before it heard of the place.
    pub fn place(&mut self, request: &PlacementRequest, now: Instant) -> Decision {
        if let Some(copy) = self.copy(&request.model, request.generation) {
            let placed = Placed { replica: copy.replica.clone(), score: None };
            let (need, pinned) = (copy.need != request.need && !request.need.is_zero(), copy.pinned != request.pinned);
            // It was found just now.
            if need {
                drop(self.resize(&request.model, request.generation, request.need.clone()));
            }
            if pinned {
                drop(self.set_pinned(&request.model, request.generation, request.pinned));
            }
            return Decision { outcome: Ok(placed), examined: 1 };
        }
        let decision = self.decide(request, now);
        if let Ok(placed) = &decision.outcome {
            let copy = Registered {
                replica: placed.replica.clone(),
                need: request.need.clone(),
                pinned: request.pinned,
                leaving: false,
                displaced: false,
            };
            self.register((request.model.clone(), request.generation), copy);
        }
        decision
    }

    /// What [`place`](Self::place) would find for a copy that has no place yet. Reserves nothing.
    #[must_use]
    pub fn decide(&self, request: &PlacementRequest, now: Instant) -> Decision {
        let problem = Problem::new(self, request, now);
        let (score, examined) = solve::solve(self, &problem);
        let outcome = match score {
            Some(score) => Ok(Placed { replica: score.replica.clone(), score: Some(score) }),
            None => Err(solve::unplaced(self, &problem)),
        };
        Decision { outcome, examined }
    }

    /// Gives back a copy's memory, and says where it was and how much.
    pub fn release(&mut self, model: &ModelName, generation: Generation) -> Option<Registered> {
        let key = (model.clone(), generation);
        let copy = self.copies.remove(&key)?;
        self.edit(&copy.replica, |replica| {
            replica.copies.remove(&key);
            replica.load.remove(&copy.need, copy.pinned);
        });
        Some(copy)
    }

    /// Registers a copy where it is known to be: at a restart, or when an agent is found to hold it. What is there
    /// is there, so this succeeds beyond any limit; a replica that nobody has spoken of yet is added as Pending. When
    /// the copy is registered there already, its memory is set to `need`.
    ///
    /// # Errors
    /// When it is registered on another replica.
    pub fn restore(
        &mut self,
        model: &ModelName,
        generation: Generation,
        replica: &ReplicaId,
        need: Resources,
    ) -> Result<(), LedgerError> {
        match self.copy(model, generation) {
            Some(copy) if copy.replica == *replica => self.resize(model, generation, need),
            Some(copy) => Err(LedgerError::Elsewhere {
                model: model.clone(),
                generation,
                has: copy.replica.clone(),
                wanted: replica.clone(),
            }),
            None => {
                self.ensure(replica);
                let copy =
                    Registered { replica: replica.clone(), need, pinned: false, leaving: false, displaced: false };
                self.register((model.clone(), generation), copy);
                Ok(())
            }
        }
    }

    /// Sets the memory of a copy to what it was found to need. It holds that much whether or not it may.
    ///
    /// # Errors
    /// When it is not registered.
    pub fn resize(&mut self, model: &ModelName, generation: Generation, need: Resources) -> Result<(), LedgerError> {
        let key = (model.clone(), generation);
        let Some(copy) = self.copies.get_mut(&key) else {
            return Err(LedgerError::NoCopy(key.0, generation));
        };
        let before = std::mem::replace(&mut copy.need, need.clone());
        let (id, pinned) = (copy.replica.clone(), copy.pinned);
        self.edit(&id, |replica| {
            replica.load.remove(&before, pinned);
            replica.load.add(&need, pinned);
        });
        Ok(())
    }

    /// Notes that a copy is never evicted from now on, or that it may be again. It is so whether or not it may.
    ///
    /// # Errors
    /// When it is not registered.
    pub fn set_pinned(&mut self, model: &ModelName, generation: Generation, pinned: bool) -> Result<(), LedgerError> {
        let key = (model.clone(), generation);
        let Some(copy) = self.copies.get_mut(&key) else {
            return Err(LedgerError::NoCopy(key.0, generation));
        };
        let before = std::mem::replace(&mut copy.pinned, pinned);
        if before == pinned {
            return Ok(());
        }
        let (id, need) = (copy.replica.clone(), copy.need.clone());
        self.edit(&id, |replica| {
            replica.load.remove(&need, before);
            replica.load.add(&need, pinned);
        });
        Ok(())
    }

    /// Notes that a copy is on its way out: from now on it keeps no other copy on its server.
    ///
    /// # Errors
    /// When it is not registered.
    pub fn mark_leaving(&mut self, model: &ModelName, generation: Generation) -> Result<(), LedgerError> {
        let key = (model.clone(), generation);
        match self.copies.get_mut(&key) {
            Some(copy) => {
                copy.leaving = true;
                Ok(())
            }
            None => Err(LedgerError::NoCopy(key.0, generation)),
        }
    }

    /// Notes that a copy is to move, or that it need not any more.
    ///
    /// # Errors
    /// When it is not registered.
    pub fn set_displaced(
        &mut self,
        model: &ModelName,
        generation: Generation,
        displaced: bool,
    ) -> Result<(), LedgerError> {
        let copy = self.copies.get_mut(&(model.clone(), generation));
        copy.map(|copy| copy.displaced = displaced).ok_or_else(|| LedgerError::NoCopy(model.clone(), generation))
    }

    /// The whole decision about a copy, filter by filter and replica by replica, as if it had no place yet. Looks at
    /// every replica.
    #[must_use]
    pub fn explain(&self, request: &PlacementRequest, now: Instant) -> Report {
        explain::explain(self, request, now)
    }

    /// All servers, by name, with what is declared as the memory of each replica.
    pub fn declared(&self) -> impl Iterator<Item = (&ServerName, &Option<Resources>)> {
        self.declared.iter()
    }

    /// A replica.
    #[must_use]
    pub fn replica(&self, id: &ReplicaId) -> Option<&Replica> {
        self.replicas.get(id)
    }

    /// All replicas, by server and index.
    pub fn replicas(&self) -> impl Iterator<Item = &Replica> {
        self.replicas.values()
    }

    /// The replicas of `server`, by index.
    pub fn replicas_of<'a>(&'a self, server: &ServerName) -> impl Iterator<Item = &'a Replica> + use<'a> {
        let range = ReplicaId::new(server.clone(), 0)..=ReplicaId::new(server.clone(), u32::MAX);
        self.replicas.range(range).map(|(_, replica)| replica)
    }

    /// A copy's reservation.
    #[must_use]
    pub fn copy(&self, model: &ModelName, generation: Generation) -> Option<&Registered> {
        self.copies.get(&(model.clone(), generation))
    }

    /// The copies of `model`, by generation.
    pub fn copies_of<'a>(
        &'a self,
        model: &ModelName,
    ) -> impl Iterator<Item = (&'a Generation, &'a Registered)> + use<'a> {
        let at =
            |uid, version, number| (model.clone(), Generation { uid: Uid(uid), version: Version(version), number });
        let range = at(0, 0, 0)..=at(u64::MAX, u32::MAX, u32::MAX);
        self.copies.range(range).map(|((_, generation), copy)| (generation, copy))
    }

    /// How many copies are registered in all.
    #[must_use]
    pub fn copy_count(&self) -> usize {
        self.copies.len()
    }

    /// Builds every sum and index again from the copies and replicas, and compares.
    ///
    /// # Errors
    /// Names each thing that does not add up.
    pub fn consistency_check(&self) -> Result<(), Vec<String>> {
        let mut wrong = Vec::new();
        /// What the copies of one replica add up to, and which they are.
        type Sum = (Load, BTreeSet<(ModelName, Generation)>);
        let mut sums: BTreeMap<&ReplicaId, Sum> = BTreeMap::new();
        for (key, copy) in &self.copies {
            if !self.replicas.contains_key(&copy.replica) {
                wrong.push(format!("copy {} of {} is on {}, which is not known", key.1, key.0, copy.replica));
            }
            let (sum, copies) = sums.entry(&copy.replica).or_default();
            sum.add(&copy.need, copy.pinned);
            copies.insert(key.clone());
        }
        let mut index = Index::default();
        for (id, replica) in &self.replicas {
            let (sum, copies) = sums.remove(id).unwrap_or_default();
            if sum != replica.load {
                wrong.push(format!("{id} has {:?} registered, its copies add up to {:?}", replica.load, sum));
            }
            if copies != replica.copies {
                wrong.push(format!(
                    "{id} lists {} copies, {} are registered on it",
                    replica.copies.len(),
                    copies.len()
                ));
            }
            if self.declared.get(&id.server).cloned().flatten() != replica.declared {
                wrong.push(format!("{id} does not have what is declared of its server"));
            }
            let mut fresh = replica.clone();
            fresh.refresh();
            if fresh != *replica {
                wrong.push(format!("{id} has limits that do not follow from its facts"));
            }
            index.add(id, fresh.seat());
        }
        if index != self.index {
            wrong.push("the indexes are not what the replicas make them".to_owned());
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }

    pub(super) const fn index(&self) -> &Index {
        &self.index
    }

    /// The replicas that can take more than when this was last called, and in what way.
    pub(super) fn take_grown(&mut self) -> BTreeMap<ReplicaId, Growth> {
        std::mem::take(&mut self.grown)
    }

    fn ensure(&mut self, id: &ReplicaId) {
        if !self.replicas.contains_key(id) {
            let declared = self.declared.entry(id.server.clone()).or_default().clone();
            let replica = Replica::new(id.clone(), declared);
            self.index.add(id, replica.seat());
            self.replicas.insert(id.clone(), replica);
        }
    }

    fn register(&mut self, key: (ModelName, Generation), copy: Registered) {
        self.edit(&copy.replica, |replica| {
            replica.load.add(&copy.need, copy.pinned);
            replica.copies.insert(key.clone());
        });
        self.copies.insert(key, copy);
    }

    fn known(&mut self, id: &ReplicaId, change: impl FnOnce(&mut Replica)) -> Result<(), LedgerError> {
        if self.edit(id, change) { Ok(()) } else { Err(LedgerError::NoReplica(id.clone())) }
    }

    /// The one place where a replica changes, so that its indexes change with it.
    fn edit(&mut self, id: &ReplicaId, change: impl FnOnce(&mut Replica)) -> bool {
        let Some(replica) = self.replicas.get_mut(id) else { return false };
        let before = replica.seat();
        change(replica);
        replica.refresh();
        let after = replica.seat();
        if before != after {
            if let Some(growth) = before.growth(&after) {
                let known = self.grown.entry(id.clone()).or_insert(growth);
                *known = growth.max(*known);
            }
            self.index.change(id, &before, after);
        }
        true
    }
}
