//! The ledger and the queue of copies that found no place, as one: whatever makes room for somebody is remembered here,
//! and [`Placement::retry`] offers it to those who wait for it. Nobody has to say what changed.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    filter,
    ledger::{Decision, Ledger, LedgerError, Registered},
    problem::{PlacementRequest, Problem, Scope},
    replica::{Growth, ReplicaFacts},
    report::Report,
    waiting::{Entry, Turn, Waiting},
};
use crate::domain::{
    memory::Resources,
    names::{ModelName, ReplicaId, ServerName},
    replica::ReplicaState,
    time::Instant,
    version::Generation,
};

/// All that placement knows and remembers. A clone of it answers what-if questions.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    ledger: Ledger,
    waiting: Waiting,
    /// Copies to be tried again for a reason of their own.
    stirred: BTreeSet<Turn>,
    /// Replicas with room that is still to be offered.
    sweeps: BTreeMap<ReplicaId, Sweep>,
}

/// How far a replica's room was offered to those who wait.
#[derive(Clone, Debug, Default)]
struct Sweep {
    /// The last one asked.
    after: Option<Turn>,
    /// Whether it has got more room since, so that all are to be asked once more.
    again: bool,
}

/// What a round of second tries came to.
#[derive(Clone, Debug, Default)]
pub struct Retried {
    /// The decisions, in the order in which they were taken. Those who were not tried are not among them.
    pub decisions: Vec<(ModelName, Generation, Decision)>,
    /// Whether there is more to try: call again.
    pub more: bool,
}

impl Placement {
    /// What is registered where.
    #[must_use]
    pub const fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The copies that wait, by model and generation.
    pub fn waiting(&self) -> impl Iterator<Item = &Entry> {
        self.waiting.iter()
    }

    /// How many copies wait.
    #[must_use]
    pub fn waiting_count(&self) -> usize {
        self.waiting.len()
    }

    /// The copies of `model` that wait.
    pub(super) fn waiting_of(&self, model: &ModelName) -> impl Iterator<Item = &Entry> {
        self.waiting.of_model(model)
    }

    /// A copy that waits.
    #[must_use]
    pub fn waits(&self, model: &ModelName, generation: Generation) -> Option<&Entry> {
        self.waiting.get(model, generation)
    }

    /// As [`Ledger::upsert_server`].
    pub fn upsert_server(&mut self, server: ServerName, declared: Option<Resources>) {
        self.ledger.upsert_server(server, declared);
    }

    /// As [`Ledger::remove_server`].
    pub fn remove_server(&mut self, server: &ServerName) {
        self.ledger.remove_server(server);
    }

    /// As [`Ledger::upsert_replica`].
    pub fn upsert_replica(&mut self, id: &ReplicaId, facts: ReplicaFacts) {
        self.changing(id, |ledger| ledger.upsert_replica(id, facts));
    }

    /// As [`Ledger::remove_replica`].
    pub fn remove_replica(&mut self, id: &ReplicaId) -> Vec<(ModelName, Generation, Resources)> {
        let removed = self.ledger.remove_replica(id);
        self.sweeps.remove(id);
        for (model, generation, _) in &removed {
            self.stir_version(model, *generation);
        }
        removed
    }

    /// As [`Ledger::set_state`].
    ///
    /// # Errors
    /// When the replica is not known.
    pub fn set_state(&mut self, id: &ReplicaId, state: ReplicaState) -> Result<(), LedgerError> {
        self.changing(id, |ledger| ledger.set_state(id, state))
    }

    /// As [`Ledger::set_cordoned`].
    ///
    /// # Errors
    /// When the replica is not known.
    pub fn set_cordoned(&mut self, id: &ReplicaId, cordoned: bool) -> Result<(), LedgerError> {
        self.changing(id, |ledger| ledger.set_cordoned(id, cordoned))
    }

    /// As [`Ledger::set_draining`].
    ///
    /// # Errors
    /// When the replica is not known.
    pub fn set_draining(&mut self, id: &ReplicaId, draining: bool) -> Result<(), LedgerError> {
        self.changing(id, |ledger| ledger.set_draining(id, draining))
    }

    /// As [`Ledger::set_reported`].
    ///
    /// # Errors
    /// When the replica is not known.
    pub fn set_reported(&mut self, id: &ReplicaId, reported: Option<Resources>) -> Result<(), LedgerError> {
        self.changing(id, |ledger| ledger.set_reported(id, reported))
    }

    /// As [`Ledger::restore`]. A copy that waited for a replica has one then.
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
        self.ledger.restore(model, generation, replica, need)?;
        self.forget(model, generation);
        self.rebind(model);
        Ok(())
    }

    /// As [`Ledger::resize`].
    ///
    /// # Errors
    /// When it is not registered.
    pub fn resize(&mut self, model: &ModelName, generation: Generation, need: Resources) -> Result<(), LedgerError> {
        self.ledger.resize(model, generation, need)
    }

    /// As [`Ledger::set_pinned`].
    ///
    /// # Errors
    /// When it is not registered.
    pub fn set_pinned(&mut self, model: &ModelName, generation: Generation, pinned: bool) -> Result<(), LedgerError> {
        self.ledger.set_pinned(model, generation, pinned)
    }

    /// As [`Ledger::mark_leaving`].
    ///
    /// # Errors
    /// When it is not registered.
    pub fn mark_leaving(&mut self, model: &ModelName, generation: Generation) -> Result<(), LedgerError> {
        self.edit_copy(model, |ledger| ledger.mark_leaving(model, generation))
    }

    /// Changes what a copy means to the others of its model.
    pub(super) fn edit_copy(
        &mut self,
        model: &ModelName,
        change: impl FnOnce(&mut Ledger) -> Result<(), LedgerError>,
    ) -> Result<(), LedgerError> {
        change(&mut self.ledger)?;
        self.rebind(model);
        Ok(())
    }

    /// Places a copy and reserves its memory, or lets it wait. One that waits already is tried again with this request
    /// (its spec may have changed) and keeps its place in the order.
    pub fn place(&mut self, request: &PlacementRequest, now: Instant) -> Decision {
        let decision = self.ledger.place(request, now);
        if let Some(turn) = self.waiting.turn(&request.model, request.generation) {
            self.stirred.remove(&turn);
        }
        match &decision.outcome {
            Ok(_) => {
                self.waiting.remove(&request.model, request.generation);
                self.rebind(&request.model);
            }
            Err(unplaced) => {
                let target = self.target(request);
                self.waiting.put(request, unplaced.clone(), target, now);
            }
        }
        decision
    }

    /// As [`place`](Self::place); but where the copy failed before is still better than nowhere.
    pub fn place_at_last(&mut self, mut request: PlacementRequest, now: Instant) -> Decision {
        let decision = self.place(&request, now);
        if decision.outcome.is_ok() || request.avoid.is_empty() {
            return decision;
        }
        request.avoid.clear();
        self.place(&request, now)
    }

    /// Places what fits, even when not everything does, and lets the rest wait: by priority, and among equals in the
    /// order given. The decisions are in the order of the requests.
    pub fn place_all(&mut self, requests: &[PlacementRequest], now: Instant) -> Vec<Decision> {
        let mut order: Vec<(usize, &PlacementRequest)> = requests.iter().enumerate().collect();
        order.sort_by_key(|(_, request)| std::cmp::Reverse(request.priority));
        let mut decisions: Vec<(usize, Decision)> =
            order.into_iter().map(|(at, request)| (at, self.place(request, now))).collect();
        decisions.sort_by_key(|(at, _)| *at);
        decisions.into_iter().map(|(_, decision)| decision).collect()
    }

    /// Forgets a copy: gives back its memory if it has any, or lets it wait no longer. Says what was given back.
    pub fn release(&mut self, model: &ModelName, generation: Generation) -> Option<Registered> {
        self.forget(model, generation);
        let released = self.ledger.release(model, generation)?;
        self.stir_version(model, generation);
        Some(released)
    }

    /// Forgets every copy of `model` but these. Says what was given back.
    pub fn keep_only(&mut self, model: &ModelName, generations: &BTreeSet<Generation>) -> Vec<Registered> {
        let placed = self.ledger.copies_of(model).map(|(generation, _)| *generation);
        let waiting = self.waiting.of_model(model).map(|entry| entry.request.generation);
        let over: BTreeSet<Generation> =
            placed.chain(waiting).filter(|generation| !generations.contains(generation)).collect();
        over.into_iter().filter_map(|generation| self.release(model, generation)).collect()
    }

    /// Offers what has come free since the last time to the copies that wait for it: in their order, at most `limit`
    /// looks. Call it after every change, and again while it says that there is more; then no copy waits that could
    /// be placed. Copies that nothing changed for are not tried.
    pub fn retry(&mut self, now: Instant, limit: usize) -> Retried {
        self.notice(now);
        let mut retried = Retried::default();
        let mut looks = 0;
        while looks < limit {
            looks += 1;
            let turn = match self.stirred.pop_first() {
                Some(turn) => turn,
                None => match self.offer(now) {
                    Offer::Nobody => break,
                    Offer::Refused => continue,
                    Offer::Taken(turn) => turn,
                },
            };
            let Some(entry) = self.waiting.get(&turn.model, turn.generation) else { continue };
            let request = entry.request.clone();
            let decision = self.place(&request, now);
            retried.decisions.push((turn.model, turn.generation, decision));
        }
        retried.more = !self.stirred.is_empty() || !self.sweeps.is_empty();
        retried
    }

    /// When [`retry`](Self::retry) is to be called even if nothing happens: a copy may then be tried again where it
    /// failed.
    #[must_use]
    pub fn next_retry(&self) -> Option<Instant> {
        self.waiting.next_expiry()
    }

    /// As [`Ledger::explain`].
    #[must_use]
    pub fn explain(&self, request: &PlacementRequest, now: Instant) -> Report {
        self.ledger.explain(request, now)
    }

    /// As [`Ledger::consistency_check`], and whether those who wait do so in the right place.
    ///
    /// # Errors
    /// Names each thing that does not add up.
    pub fn consistency_check(&self) -> Result<(), Vec<String>> {
        let mut wrong = self.ledger.consistency_check().err().unwrap_or_default();
        self.waiting.check(&mut wrong);
        for entry in self.waiting.iter() {
            let PlacementRequest { model, generation, .. } = &entry.request;
            if self.ledger.copy(model, *generation).is_some() {
                wrong.push(format!("copy {generation} of {model} waits and has a place"));
            }
            if !Waiting::is_bound_to(entry, self.target(&entry.request).as_ref()) {
                wrong.push(format!("copy {generation} of {model} waits for the wrong server"));
            }
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }

    /// Takes note of what has grown and of what is no longer avoided.
    fn notice(&mut self, now: Instant) {
        for (id, growth) in self.ledger.take_grown() {
            if let (Growth::Opened, Some(replica)) = (growth, self.ledger.replica(&id)) {
                self.waiting.unstick(replica);
            }
            let sweep = self.sweeps.entry(id).or_default();
            // Those before the one asked last are asked once more when all have been asked: to begin anew at every
            // change would never come to the last.
            sweep.again = sweep.after.is_some();
        }
        while let Some(turn) = self.waiting.pop_expired(now) {
            self.stirred.insert(turn);
        }
        if self.waiting.len() == 0 {
            self.sweeps.clear();
        }
    }

    /// Offers the room of one replica to the next copy that could use it.
    fn offer(&mut self, now: Instant) -> Offer {
        let Some(mut entry) = self.sweeps.first_entry() else { return Offer::Nobody };
        let next = self.ledger.replica(entry.key()).and_then(|replica| {
            let turn = self.waiting.next_for(replica, entry.get().after.as_ref())?;
            Some((replica, turn))
        });
        match next {
            Some((replica, turn)) => {
                entry.get_mut().after = Some(turn.clone());
                let Some(waits) = self.waiting.get(&turn.model, turn.generation) else { return Offer::Refused };
                let problem = Problem::new(&self.ledger, &waits.request, now);
                // One that is refused here, and of which it is not known what it waits for, is tried to find that out.
                let tried = filter::admits(&problem, replica) || self.waiting.is_unsure(waits);
                if tried { Offer::Taken(turn) } else { Offer::Refused }
            }
            None if entry.get().again => {
                entry.insert(Sweep::default());
                Offer::Refused
            }
            None => {
                entry.remove();
                Offer::Refused
            }
        }
    }

    /// Changes a replica. When its copies no longer keep others on its server, or do so again, those others may go
    /// elsewhere, or may not.
    fn changing<T>(&mut self, id: &ReplicaId, change: impl FnOnce(&mut Ledger) -> T) -> T {
        let keeps = |ledger: &Ledger| ledger.replica(id).is_some_and(super::replica::Replica::keeps_copies);
        let before = keeps(&self.ledger);
        let result = change(&mut self.ledger);
        if before != keeps(&self.ledger) {
            let models: BTreeSet<ModelName> =
                self.ledger.replica(id).into_iter().flat_map(|r| r.copies()).map(|(model, _)| model.clone()).collect();
            for model in &models {
                self.rebind(model);
            }
        }
        result
    }

    /// The one server that a copy can go to, if there is only one.
    fn target(&self, request: &PlacementRequest) -> Option<ServerName> {
        // Where it may go does not depend on the time; what it avoids of late does.
        let problem = Problem::new(&self.ledger, request, Instant::default());
        match problem.scope() {
            Scope::Everywhere => None,
            Scope::Only(server) => Some(server.clone()),
            // None will do until its other copies have moved. It waits where they are, and so is tried again then.
            Scope::Nowhere => problem.anchor.clone(),
        }
    }

    /// Looks again at which server the waiting copies of `model` are bound to, after its other copies have changed.
    fn rebind(&mut self, model: &ModelName) {
        let moved: Vec<(PlacementRequest, Option<ServerName>)> = self
            .waiting
            .of_model(model)
            .filter_map(|entry| {
                let target = self.target(&entry.request);
                (!Waiting::is_bound_to(entry, target.as_ref())).then(|| (entry.request.clone(), target))
            })
            .collect();
        for (request, target) in moved {
            if let Some(entry) = self.waiting.rebind(&request.model, request.generation, target) {
                self.stirred.insert(entry);
            }
        }
    }

    /// Has the waiting copies of a version tried again: another copy of it has gone from where it was.
    fn stir_version(&mut self, model: &ModelName, generation: Generation) {
        let of_version = |entry: &&Entry| entry.request.generation.version == generation.version;
        let turns: Vec<Turn> = self.waiting.of_model(model).filter(of_version).map(Entry::turn).collect();
        self.stirred.extend(turns);
        self.rebind(model);
    }

    fn forget(&mut self, model: &ModelName, generation: Generation) {
        if let Some(turn) = self.waiting.turn(model, generation) {
            self.stirred.remove(&turn);
            self.waiting.remove(model, generation);
        }
    }
}

/// What became of a replica's room.
enum Offer {
    /// No replica has room to offer.
    Nobody,
    /// The one asked can't use it, or there was none to ask.
    Refused,
    /// This one is to be tried.
    Taken(Turn),
}
