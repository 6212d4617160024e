//! Copies that found no replica, in the order in which they get the next chance: by priority, then by how long they
//! have waited, then by name.
//!
//! They are indexed by what they wait for, so that a byte that comes free is offered to those that it could serve and
//! to no others: by the server that they are bound to, by what they require, and by size. Those for which no
//! replica lacks memory wait in a line of their own, which freed memory does not move: they wait for a replica.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use super::{
    filter::Filter,
    problem::{Capabilities, PlacementRequest},
    replica::Replica,
    report::Unplaced,
    tree::{Summary, Tree},
};
use crate::domain::{
    memory::Resources,
    names::{ModelName, ServerName},
    time::Instant,
    version::{Generation, Uid, Version},
};

/// The copies that wait.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Waiting {
    entries: BTreeMap<(ModelName, Generation), Entry>,
    /// By the one server that they can go to, if there is only one, and by what they require.
    lines: BTreeMap<Option<ServerName>, BTreeMap<Capabilities, Lines>>,
    /// When the next replica of each is no longer avoided.
    expiries: BTreeSet<(Instant, Turn)>,
}

/// A copy that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it asks for.
    pub request: PlacementRequest,
    /// Since when it waits.
    pub since: Instant,
    /// Why it was not placed when it was last tried.
    pub unplaced: Unplaced,
    target: Option<ServerName>,
    expiry: Option<Instant>,
}

/// A copy's place in the order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Turn {
    priority: Reverse<i32>,
    since: Instant,
    pub(super) model: ModelName,
    pub(super) generation: Generation,
}

/// Copies that require the same of the same servers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Lines {
    /// Those that some replica would take if it had more memory.
    hungry: Tree<Turn, Least>,
    /// Those that no replica would.
    stuck: Tree<Turn, Least>,
    /// Those that no replica would until one came that might; they are hungry until they are tried again.
    unsure: Tree<Turn, Least>,
}

impl Lines {
    fn remove(&mut self, turn: &Turn) -> bool {
        self.hungry.remove(turn) || self.stuck.remove(turn) || self.unsure.remove(turn)
    }

    const fn len(&self) -> u32 {
        self.hungry.len() + self.stuck.len() + self.unsure.len()
    }
}

/// The least that any one copy of a subtree needs; on each device it may be another one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Least(Resources);

impl Summary for Least {
    fn absorb(&mut self, other: &Self) {
        self.0 = self.0.min(&other.0);
    }
}

impl Entry {
    pub(super) fn turn(&self) -> Turn {
        Turn {
            priority: Reverse(self.request.priority),
            since: self.since,
            model: self.request.model.clone(),
            generation: self.request.generation,
        }
    }
}

impl Waiting {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn get(&self, model: &ModelName, generation: Generation) -> Option<&Entry> {
        self.entries.get(&(model.clone(), generation))
    }

    /// All that wait, by model and generation.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    /// The copies of `model` that wait.
    pub(super) fn of_model(&self, model: &ModelName) -> impl Iterator<Item = &Entry> {
        let first = Generation { uid: Uid(0), version: Version(0), number: 0 };
        let model = model.clone();
        self.entries
            .range((model.clone(), first)..)
            .map(|(_, entry)| entry)
            .take_while(move |e| e.request.model == model)
    }

    /// Lets a copy wait, or notes what its last try came to. It keeps its place in the order unless its priority
    /// has changed. `target` is the one server that it can go to, if there is only one.
    pub(super) fn put(
        &mut self,
        request: &PlacementRequest,
        unplaced: Unplaced,
        target: Option<ServerName>,
        now: Instant,
    ) {
        let since = self.remove(&request.model, request.generation).map_or(now, |entry| entry.since);
        let expiry = request.avoid.values().copied().filter(|until| *until > now).min();
        self.insert(Entry { request: request.clone(), since, unplaced, target, expiry });
    }

    fn insert(&mut self, entry: Entry) {
        let turn = entry.turn();
        let PlacementRequest { model, generation, requirements, need, .. } = &entry.request;
        if let Some(expiry) = entry.expiry {
            self.expiries.insert((expiry, turn.clone()));
        }
        let targeted = self.lines.entry(entry.target.clone()).or_default();
        let lines = targeted.entry(requirements.clone()).or_default();
        let hungry = entry.unplaced.rejected(Filter::Memory) > 0;
        let line = if hungry { &mut lines.hungry } else { &mut lines.stuck };
        line.insert(turn, Least(need.clone()));
        self.entries.insert((model.clone(), *generation), entry);
    }

    /// Lets a copy wait no longer.
    pub(super) fn remove(&mut self, model: &ModelName, generation: Generation) -> Option<Entry> {
        let entry = self.entries.remove(&(model.clone(), generation))?;
        let turn = entry.turn();
        if let Some(expiry) = entry.expiry {
            self.expiries.remove(&(expiry, turn.clone()));
        }
        if let Some(targeted) = self.lines.get_mut(&entry.target) {
            if let Some(lines) = targeted.get_mut(&entry.request.requirements) {
                lines.remove(&turn);
                if lines.len() == 0 {
                    targeted.remove(&entry.request.requirements);
                }
            }
            if targeted.is_empty() {
                self.lines.remove(&entry.target);
            }
        }
        Some(entry)
    }

    /// The place in the order of a copy that waits.
    pub(super) fn turn(&self, model: &ModelName, generation: Generation) -> Option<Turn> {
        self.get(model, generation).map(Entry::turn)
    }

    /// Whether `entry` is bound to `target`.
    pub(super) fn is_bound_to(entry: &Entry, target: Option<&ServerName>) -> bool {
        entry.target.as_ref() == target
    }

    /// Binds a copy to another server, or to none, and gives its place in the order.
    pub(super) fn rebind(
        &mut self,
        model: &ModelName,
        generation: Generation,
        target: Option<ServerName>,
    ) -> Option<Turn> {
        let entry = self.remove(model, generation)?;
        let turn = entry.turn();
        self.insert(Entry { target, ..entry });
        Some(turn)
    }

    /// Notes that `replica` takes copies that it would have refused before for other reasons than room: those that
    /// were waiting for a replica now wait for this one, or for memory on it.
    pub(super) fn unstick(&mut self, replica: &Replica) {
        for target in [None, Some(replica.id().server.clone())] {
            for (requirements, lines) in self.lines.get_mut(&target).into_iter().flatten() {
                if replica.facts().capabilities.cover(requirements) {
                    lines.unsure.unite(std::mem::take(&mut lines.stuck));
                }
            }
        }
    }

    /// The first copy after `after` that `replica` is of the right kind and has room for.
    pub(super) fn next_for(&self, replica: &Replica, after: Option<&Turn>) -> Option<Turn> {
        let room = replica.room();
        let fits = |least: &Least| room.covers(&least.0);
        [None, Some(replica.id().server.clone())]
            .iter()
            .filter_map(|target| self.lines.get(target))
            .flatten()
            .filter(|(requirements, _)| replica.facts().capabilities.cover(requirements))
            .flat_map(|(_, lines)| [&lines.hungry, &lines.unsure])
            .filter_map(|line| line.first_after(after, &fits))
            .min()
            .cloned()
    }

    /// Whether it is not known if a copy waits for memory.
    pub(super) fn is_unsure(&self, entry: &Entry) -> bool {
        let lines = self.lines.get(&entry.target).and_then(|targeted| targeted.get(&entry.request.requirements));
        lines.is_some_and(|lines| lines.unsure.contains(&entry.turn()))
    }

    /// When the next copy may be tried on a replica again where it failed.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.expiries.first().map(|(expiry, _)| *expiry)
    }

    /// The first copy that may be tried again on a replica where it failed; asked again, the next one.
    pub(super) fn pop_expired(&mut self, now: Instant) -> Option<Turn> {
        if self.next_expiry()? > now {
            return None;
        }
        let (_, turn) = self.expiries.pop_first()?;
        if let Some(entry) = self.entries.get_mut(&(turn.model.clone(), turn.generation)) {
            entry.expiry = None;
        }
        Some(turn)
    }

    /// Whether every copy waits in exactly the line that it belongs to.
    pub(super) fn check(&self, wrong: &mut Vec<String>) {
        let lined: usize = self.lines.values().flat_map(BTreeMap::values).map(|lines| lines.len() as usize).sum();
        if lined != self.entries.len() {
            wrong.push(format!("{} copies wait, {lined} are in line", self.entries.len()));
        }
        let expiring = self.entries.values().filter(|entry| entry.expiry.is_some()).count();
        if expiring != self.expiries.len() {
            wrong.push(format!("{expiring} copies wait for a time, {} times are kept", self.expiries.len()));
        }
    }
}
