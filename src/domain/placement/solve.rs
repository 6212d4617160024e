//! The decision itself, through the indexes: the same answer as judging every replica, at a cost that grows with the
//! logarithm of their number.
//!
//! What makes a score depend on the request alone is looked at first, replica by replica, and is little: those that
//! the request prefers. All others are in the order of their rank in the indexes, and a branch-and-bound search finds
//! the best without visiting a subtree that can hold nothing better. The cost grows linearly in: the sets of
//! capabilities that satisfy the request, the copies of the same version, the preferred and the avoided replicas; and,
//! for several copies that have to share one server, the servers with room for some of them but not for all.

use std::{cell::Cell, collections::BTreeMap};

use super::{
    filter::{self, Filter},
    index::{Group, Most, Pool},
    ledger::Ledger,
    problem::{PlacementRequest, Problem, Scope},
    replica::{Lack, Replica},
    report::{CapabilityGap, Findings, NearestMiss, Unplaced},
    score::{self, Common, Rank, Score},
};
use crate::domain::{
    memory::Resources,
    names::{ReplicaId, ServerName},
};

/// The best replica, and how many replicas and parts of indexes were looked at to find it.
pub(super) fn solve(ledger: &Ledger, problem: &Problem<'_>) -> (Option<Score>, u32) {
    let mut best = None;
    if problem.request.need.is_zero() {
        return (best, 0);
    }
    let search = Search { problem, examined: Cell::new(0) };
    for replica in problem.preferred().filter_map(|id| ledger.replica(id)) {
        search.count_one();
        let Some(pool) = ledger.index().pools.get(&replica.facts.capabilities) else { continue };
        if let Some(group) = pool.groups.get(&replica.id.server)
            && filter::admits(problem, replica)
        {
            let common = search.common(&replica.id.server, group);
            offer(&mut best, score::score(problem, &replica.rank(), &replica.free(), common));
        }
    }
    for pool in ledger.index().capable(&problem.request.requirements) {
        match problem.scope() {
            Scope::Nowhere => {}
            Scope::Only(server) => {
                if let Some(group) = pool.groups.get(server) {
                    search.group(server, group, &mut best);
                }
            }
            Scope::Everywhere => search.pool(pool, &mut best),
        }
    }
    (best, search.examined.get())
}

struct Search<'a> {
    problem: &'a Problem<'a>,
    examined: Cell<u32>,
}

impl Search<'_> {
    fn count_one(&self) {
        self.examined.set(self.examined.get().saturating_add(1));
    }

    fn pool(&self, pool: &Pool, best: &mut Option<Score>) {
        let bound = |most: &Most, low: &Rank| {
            self.count_one();
            let stranded = self.problem.together().map_or(0, |together| together.saturating_sub(most.peers));
            self.promise(most, low, Common { stranded, beside: 0 })
        };
        pool.order.search(best, &bound, &mut |rank, _, best| {
            let server = &rank.replica.server;
            if let Some(group) = pool.groups.get(server) {
                self.group(server, group, best);
            }
        });
    }

    fn group(&self, server: &ServerName, group: &Group, best: &mut Option<Score>) {
        let common = self.common(server, group);
        let bound = |most: &Most, low: &Rank| {
            self.count_one();
            self.promise(most, low, common)
        };
        group.open.search(best, &bound, &mut |rank, most, best| {
            self.count_one();
            if self.takes(&rank.replica) {
                offer(best, score::score(self.problem, rank, &most.free, common));
            }
        });
    }

    fn promise(&self, most: &Most, low: &Rank, common: Common) -> Option<Score> {
        most.takes(self.problem.request).then(|| score::promise(self.problem, low, &most.free, common))
    }

    /// What the filters say that are not in the indexes.
    fn takes(&self, replica: &ReplicaId) -> bool {
        !self.problem.held.contains_key(replica) && self.problem.avoided(replica).is_none()
    }

    fn common(&self, server: &ServerName, group: &Group) -> Common {
        let stranded = self.problem.together().map_or(0, |together| {
            let fits = |most: &Most| {
                self.count_one();
                most.takes(self.problem.request)
            };
            together - group.open.count(together, &fits, &mut |rank, _| self.takes(&rank.replica))
        });
        Common { stranded, beside: self.problem.staying.get(server).copied().unwrap_or(0) }
    }
}

fn offer<B: Ord>(best: &mut Option<B>, found: B) {
    if best.as_ref().is_none_or(|best| found < *best) {
        *best = Some(found);
    }
}

/// Why nothing was found, from what the indexes count.
pub(super) fn unplaced(ledger: &Ledger, problem: &Problem<'_>) -> Unplaced {
    let index = ledger.index();
    let request = problem.request;
    if request.need.is_zero() {
        return Unplaced::new(Findings { replicas: index.replicas, ..Findings::default() });
    }
    let mut rejected = BTreeMap::new();
    let mut count = |filter, replicas: u32| {
        if replicas > 0 {
            *rejected.entry(filter).or_insert(0) += replicas;
        }
    };
    let mut left = index.replicas;
    for (filter, server) in [(Filter::Server, &request.server), (Filter::Anchor, &problem.anchor)] {
        if let Some(server) = server {
            let stay =
                if problem.scope() == Scope::Nowhere && filter == Filter::Anchor { 0 } else { index.size_of(server) };
            count(filter, left - stay);
            left = stay;
        }
    }
    let scope = problem.scope();
    let mut lacking = left;
    for census in index.capable(&request.requirements).filter_map(|pool| pool.census(scope)) {
        lacking -= census.replicas;
        for (filter, replicas) in &census.closed {
            count(*filter, *replicas);
        }
        for (capacity, replicas) in &census.capacities {
            let filter = if capacity.0.covers(&request.need) { Filter::Memory } else { Filter::TooBig };
            count(filter, *replicas);
        }
    }
    count(Filter::Capabilities, lacking);
    // Those few that a filter of the request's own refuses before their memory is asked.
    let own = problem.held.keys().chain(request.avoid.keys().filter(|id| !problem.held.contains_key(*id)));
    for replica in own.filter_map(|id| ledger.replica(id)) {
        let first = filter::rejections(problem, replica).next().map(|rejection| rejection.filter());
        if let Some(first @ (Filter::Held | Filter::Failed)) = first {
            let memory = if replica.capacity().covers(&request.need) { Filter::Memory } else { Filter::TooBig };
            if let Some(counted) = rejected.get_mut(&memory) {
                *counted -= 1;
            }
            *rejected.entry(first).or_insert(0) += 1;
        }
    }
    rejected.retain(|_, replicas| *replicas > 0);
    Unplaced::new(Findings {
        replicas: index.replicas,
        need: request.need.clone(),
        nearest: nearest(ledger, problem),
        gap: gap(ledger, problem),
        server: request.server.clone(),
        anchor: problem.anchor.clone(),
        known: known(ledger, problem),
        rejected,
    })
}

/// How far a replica is from taking a copy: bytes missing on all devices, then as ranked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Miss {
    pub(super) missing: u128,
    pub(super) rank: Rank,
}

/// Bytes missing of `need` on all devices together.
pub(super) fn missing(room: &Resources, need: &Resources) -> u128 {
    room.lacks(need).map(|(_, bytes)| u128::from(bytes.0)).sum()
}

/// The replica that only lacks memory, and least of it.
fn nearest(ledger: &Ledger, problem: &Problem<'_>) -> Option<NearestMiss> {
    let search = Search { problem, examined: Cell::new(0) };
    let need = &problem.request.need;
    let mut best: Option<Miss> = None;
    let lacks = |most: &Most| missing(most.room_for(problem.request), need);
    let bound = |most: &Most, low: &Rank| Some(Miss { missing: lacks(most), rank: low.clone() });
    let mut leaf = |rank: &Rank, most: &Most, best: &mut Option<Miss>| {
        if search.takes(&rank.replica) {
            offer(best, Miss { missing: lacks(most), rank: rank.clone() });
        }
    };
    for pool in ledger.index().capable(&problem.request.requirements) {
        match problem.scope() {
            Scope::Nowhere => {}
            Scope::Only(server) => {
                if let Some(group) = pool.groups.get(server) {
                    group.open.search(&mut best, &bound, &mut leaf);
                }
            }
            Scope::Everywhere => pool.order.search(&mut best, &bound, &mut |rank, _, best| {
                if let Some(group) = pool.groups.get(&rank.replica.server) {
                    group.open.search(best, &bound, &mut leaf);
                }
            }),
        }
    }
    miss(ledger.replica(&best?.rank.replica)?, problem.request)
}

/// What `replica` lacks, on the device where it lacks most.
pub(super) fn miss(replica: &Replica, request: &PlacementRequest) -> Option<NearestMiss> {
    let Lack { device, missing, beside_pinned } = replica.lacks(&request.need, request.pinned)?;
    Some(NearestMiss { replica: replica.id.clone(), device, missing, beside_pinned })
}

/// What no server in question is capable of, when that alone rules all of them out.
pub(super) fn gap(ledger: &Ledger, problem: &Problem<'_>) -> Option<CapabilityGap> {
    /// Examples shown; a cluster has few kinds of servers.
    const SHOWN: usize = 4;
    let scope = problem.scope();
    let required = &problem.request.requirements;
    let pools = || ledger.index().pools.iter().filter(|(_, pool)| pool.census(scope).is_some());
    if pools().next().is_none() || pools().any(|(capabilities, _)| capabilities.cover(required)) {
        return None;
    }
    let missing = required.iter().filter(|name| !pools().any(|(had, _)| had.iter().any(|had| had == *name)));
    let servers = pools().filter_map(|(had, pool)| {
        let server = match scope {
            Scope::Only(server) => server.clone(),
            Scope::Everywhere | Scope::Nowhere => pool.groups.keys().next()?.clone(),
        };
        Some((server, had.clone()))
    });
    Some(CapabilityGap {
        missing: missing.map(str::to_owned).collect(),
        required: required.clone(),
        servers: servers.take(SHOWN).collect(),
        more: u32::try_from(pools().count().saturating_sub(SHOWN)).unwrap_or(u32::MAX),
    })
}

/// Some servers that there are, when the one that is named is not.
pub(super) fn known(ledger: &Ledger, problem: &Problem<'_>) -> Vec<ServerName> {
    const SHOWN: usize = 4;
    match &problem.request.server {
        Some(server) if ledger.index().size_of(server) == 0 => {
            ledger.index().servers.keys().take(SHOWN).cloned().collect()
        }
        Some(_) | None => Vec::new(),
    }
}
