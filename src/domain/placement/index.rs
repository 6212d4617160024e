//! The replicas that take new copies, kept in the order of their rank, so that a decision looks at a few of them and
//! not at all.
//!
//! A pool is all replicas with one set of capabilities. Within it every server has a tree of its open replicas, and
//! one more tree orders the servers by their best replica. Every subtree knows the most room there is in it, so
//! that what can't fit is passed over as a whole. What is counted besides lets a refusal name its reasons
//! without asking every replica.

use std::collections::BTreeMap;

use super::{
    filter::Filter,
    problem::{Capabilities, PlacementRequest, Scope},
    replica::{Open, Seat, Standing},
    score::Rank,
    tree::{Summary, Tree},
};
use crate::domain::{
    memory::Resources,
    names::{ReplicaId, ServerName},
};

/// All replicas, by capabilities.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    pub(super) pools: BTreeMap<Capabilities, Pool>,
    /// Replicas of each server, whatever their state.
    pub(super) servers: BTreeMap<ServerName, u32>,
    /// Replicas in all.
    pub(super) replicas: u32,
}

/// All replicas with the same capabilities.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pool {
    pub(super) census: Census,
    pub(super) groups: BTreeMap<ServerName, Group>,
    /// The servers with open replicas here, each at its best replica's rank.
    pub(super) order: Tree<Rank, Most>,
}

/// The replicas of one server with the same capabilities.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) census: Census,
    /// Those that are open.
    pub(super) open: Tree<Rank, Most>,
}

/// How many replicas there are, by what matters to a refusal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Census {
    /// All of them.
    pub(super) replicas: u32,
    /// Those that take nothing new, by the first filter that says so.
    pub(super) closed: BTreeMap<Filter, u32>,
    /// Those that are open, by their memory.
    pub(super) capacities: BTreeMap<Memory, u32>,
}

/// All of a replica's memory, as a key. Resources have no order of their own: they differ device by device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Memory(pub(super) Resources);

impl Ord for Memory {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0.primary, &self.0.others).cmp(&(other.0.primary, &other.0.others))
    }
}

impl PartialOrd for Memory {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// The most that any one replica of a subtree has; on each device it may be another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Most {
    /// Bytes left within its memory.
    pub(super) free: Resources,
    /// The largest copy that it could take.
    pub(super) room: Resources,
    /// The largest pinned copy that it could take.
    pub(super) room_to_pin: Resources,
    /// Open replicas of its server with the same capabilities.
    pub(super) peers: u32,
}

impl Summary for Most {
    fn absorb(&mut self, other: &Self) {
        self.free.raise(&other.free);
        self.room.raise(&other.room);
        self.room_to_pin.raise(&other.room_to_pin);
        self.peers = self.peers.max(other.peers);
    }
}

impl Most {
    /// The room that counts for such a copy.
    pub(super) const fn room_for(&self, request: &PlacementRequest) -> &Resources {
        if request.pinned { &self.room_to_pin } else { &self.room }
    }

    /// Whether there is room for the copy.
    pub(super) fn takes(&self, request: &PlacementRequest) -> bool {
        self.room_for(request).covers(&request.need)
    }
}

impl Index {
    pub(super) fn add(&mut self, id: &ReplicaId, seat: Seat) {
        self.replicas += 1;
        *self.servers.entry(id.server.clone()).or_default() += 1;
        let pool = self.pools.entry(seat.capabilities).or_default();
        pool.census.add(&seat.standing);
        pool.edit(&id.server, |group| group.add(seat.standing));
    }

    /// A replica has another seat than before.
    pub(super) fn change(&mut self, id: &ReplicaId, before: &Seat, after: Seat) {
        match self.pools.get_mut(&before.capabilities) {
            // By far the most often it is but fuller or less full: its server is put in order once.
            Some(pool) if before.capabilities == after.capabilities => {
                pool.census.remove(&before.standing);
                pool.census.add(&after.standing);
                pool.edit(&id.server, |group| {
                    group.remove(&before.standing);
                    group.add(after.standing);
                });
            }
            Some(_) | None => {
                self.remove(id, before);
                self.add(id, after);
            }
        }
    }

    pub(super) fn remove(&mut self, id: &ReplicaId, seat: &Seat) {
        self.replicas -= 1;
        drop_one(&mut self.servers, &id.server);
        let Some(pool) = self.pools.get_mut(&seat.capabilities) else { return };
        pool.census.remove(&seat.standing);
        pool.edit(&id.server, |group| group.remove(&seat.standing));
        if pool.census.replicas == 0 {
            self.pools.remove(&seat.capabilities);
        }
    }

    /// The pools whose replicas are capable of `requirements`.
    pub(super) fn capable(&self, requirements: &Capabilities) -> impl Iterator<Item = &Pool> {
        self.pools.iter().filter(move |(capabilities, _)| capabilities.cover(requirements)).map(|(_, pool)| pool)
    }

    /// How many replicas `server` has.
    pub(super) fn size_of(&self, server: &ServerName) -> u32 {
        self.servers.get(server).copied().unwrap_or(0)
    }
}

impl Pool {
    fn edit(&mut self, server: &ServerName, edit: impl FnOnce(&mut Group)) {
        let group = self.groups.entry(server.clone()).or_default();
        if let Some(first) = group.open.first() {
            self.order.remove(first);
        }
        edit(group);
        if let (Some(first), Some(most)) = (group.open.first(), group.open.total()) {
            self.order.insert(first.clone(), Most { peers: group.open.len(), ..most.clone() });
        }
        if group.census.replicas == 0 {
            self.groups.remove(server);
        }
    }

    /// The part of the pool that `scope` leaves: how many replicas, and the trees to search.
    pub(super) fn census(&self, scope: Scope<'_>) -> Option<&Census> {
        match scope {
            Scope::Everywhere => Some(&self.census),
            Scope::Only(server) => self.groups.get(server).map(|group| &group.census),
            Scope::Nowhere => None,
        }
    }
}

impl Group {
    fn add(&mut self, standing: Standing) {
        self.census.add(&standing);
        if let Standing::Open(open) = standing {
            let Open { rank, free, room, room_to_pin, capacity: _ } = *open;
            self.open.insert(rank, Most { free, room, room_to_pin, peers: 1 });
        }
    }

    fn remove(&mut self, standing: &Standing) {
        self.census.remove(standing);
        if let Standing::Open(open) = standing {
            self.open.remove(&open.rank);
        }
    }
}

impl Census {
    fn add(&mut self, standing: &Standing) {
        self.replicas += 1;
        match standing {
            Standing::Closed(by) => *self.closed.entry(*by).or_default() += 1,
            Standing::Open(open) => *self.capacities.entry(Memory(open.capacity.clone())).or_default() += 1,
        }
    }

    fn remove(&mut self, standing: &Standing) {
        self.replicas -= 1;
        match standing {
            Standing::Closed(by) => drop_one(&mut self.closed, by),
            Standing::Open(open) => drop_one(&mut self.capacities, &Memory(open.capacity.clone())),
        }
    }
}

/// Counts one less of `key`, and forgets it with the last.
fn drop_one<K: Ord>(counts: &mut BTreeMap<K, u32>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}
