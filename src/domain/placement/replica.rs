//! A replica as the ledger knows it.

use std::collections::BTreeSet;

use serde::Serialize;

use super::{
    filter::{self, Filter},
    ledger::Registered,
    load::Load,
    problem::Capabilities,
    score::{Rank, Share},
};
use crate::domain::{
    memory::{Bytes, Resources},
    names::{ModelName, ReplicaId},
    replica::ReplicaState,
    version::Generation,
};

/// What an agent, or the registry in its place, says about a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaFacts {
    /// The memory that the agent sees; absent until it has called.
    pub reported: Option<Resources>,
    /// How much may be registered beyond the memory, in per cent of it.
    pub overcommit_percent: u32,
    /// What it is capable of.
    pub capabilities: Capabilities,
    /// The runtime's name.
    pub runtime: String,
    /// Where it stands.
    pub state: ReplicaState,
}

impl Default for ReplicaFacts {
    fn default() -> Self {
        Self {
            reported: None,
            overcommit_percent: 0,
            capabilities: Capabilities::default(),
            runtime: String::new(),
            state: ReplicaState::Pending,
        }
    }
}

/// A replica in the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    pub(super) id: ReplicaId,
    pub(super) facts: ReplicaFacts,
    pub(super) declared: Option<Resources>,
    pub(super) cordoned: bool,
    pub(super) draining: bool,
    pub(super) load: Load,
    pub(super) copies: BTreeSet<(ModelName, Generation)>,
    /// Of what is declared and reported, the smaller; follows from the fields above.
    capacity: Resources,
    /// The capacity with what overcommit adds; follows from the fields above.
    limit: Resources,
}

/// What is out of order with a replica's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// The registry and the agent disagree; the smaller counts.
    CapacityDiffers {
        /// The device; absent for the primary one.
        device: Option<String>,
        /// What the registry says.
        declared: Bytes,
        /// What the agent says.
        reported: Bytes,
    },
    /// More is registered than may be; nothing new is placed until that has changed.
    OverLimit {
        /// The device; absent for the primary one.
        device: Option<String>,
        /// Bytes registered.
        registered: Bytes,
        /// The most that may be.
        limit: Bytes,
    },
    /// Its pinned copies do not fit its memory together, or leave too little there for one of the others.
    Crowded {
        /// The device; absent for the primary one.
        device: Option<String>,
        /// Bytes of the pinned copies.
        pinned: Bytes,
        /// What the largest of the others needs.
        largest: Bytes,
        /// All of its memory.
        capacity: Bytes,
    },
}

impl std::fmt::Display for Condition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::CapacityDiffers { device, declared, reported } => write!(
                f,
                "capacity differs{}: {declared} declared, {reported} reported; the smaller counts",
                on_device(device.as_deref())
            ),
            Self::OverLimit { device, registered, limit } => write!(
                f,
                "over its limit{}: {registered} registered, {limit} allowed; nothing new is placed here",
                on_device(device.as_deref())
            ),
            Self::Crowded { device, pinned, largest, capacity } => write!(
                f,
                "crowded by pinned copies{}: {pinned} of {capacity} pinned, and the largest of the others needs {largest}",
                on_device(device.as_deref())
            ),
        }
    }
}

/// ` on gpu0`, or nothing for the primary device.
pub(super) fn on_device(device: Option<&str>) -> String {
    device.map(|device| format!(" on {device}")).unwrap_or_default()
}

/// What is said of memory that only pinned copies keep a copy from.
pub(super) const fn beside(pinned: bool) -> &'static str {
    if pinned { " beside pinned copies" } else { "" }
}

impl Replica {
    pub(super) fn new(id: ReplicaId, declared: Option<Resources>) -> Self {
        let mut replica = Self {
            id,
            facts: ReplicaFacts::default(),
            declared,
            cordoned: false,
            draining: false,
            load: Load::default(),
            copies: BTreeSet::new(),
            capacity: Resources::default(),
            limit: Resources::default(),
        };
        replica.refresh();
        replica
    }

    /// Brings what follows from other fields up to date.
    pub(super) fn refresh(&mut self) {
        self.capacity = match (&self.declared, &self.facts.reported) {
            (None, None) => Resources::default(),
            (Some(one), None) | (None, Some(one)) => one.clone(),
            // A registry that is silent on a device sets no bound to it; a device that the agent does not see is not
            // there, whatever the registry says.
            (Some(declared), Some(reported)) => Resources {
                primary: declared.primary.min(reported.primary),
                others: reported
                    .others
                    .iter()
                    .map(|(device, seen)| {
                        let bound = declared.others.get(device).copied().unwrap_or(*seen);
                        (device.clone(), bound.min(*seen))
                    })
                    .collect(),
            },
        };
        self.limit = self.capacity.plus_percent(self.facts.overcommit_percent);
    }

    /// Which replica.
    #[must_use]
    pub const fn id(&self) -> &ReplicaId {
        &self.id
    }

    /// What was last said about it.
    #[must_use]
    pub const fn facts(&self) -> &ReplicaFacts {
        &self.facts
    }

    /// Whether nothing new is placed on it because an operator said so.
    #[must_use]
    pub const fn cordoned(&self) -> bool {
        self.cordoned
    }

    /// Whether its copies are to leave, by its mark or by its state.
    #[must_use]
    pub const fn draining(&self) -> bool {
        self.draining || matches!(self.facts.state, ReplicaState::Draining)
    }

    /// Its memory: the smaller of what is declared and reported.
    #[must_use]
    pub const fn capacity(&self) -> &Resources {
        &self.capacity
    }

    /// The most that may be registered: its memory and the overcommit.
    #[must_use]
    pub const fn limit(&self) -> &Resources {
        &self.limit
    }

    /// The sum of what is registered.
    #[must_use]
    pub fn registered(&self) -> Resources {
        self.load.all().shown()
    }

    /// The sum of what is pinned.
    #[must_use]
    pub fn pinned(&self) -> Resources {
        self.load.pinned().shown()
    }

    /// What the largest of its copies needs that is not pinned; on each device it may be another one.
    #[must_use]
    pub fn largest_unpinned(&self) -> Resources {
        self.load.largest()
    }

    /// The copies registered on it, by model and generation.
    pub fn copies(&self) -> impl ExactSizeIterator<Item = &(ModelName, Generation)> {
        self.copies.iter()
    }

    /// What is out of order.
    #[must_use]
    pub fn conditions(&self) -> Vec<Condition> {
        let mut conditions = Vec::new();
        if let (Some(declared), Some(reported)) = (&self.declared, &self.facts.reported) {
            let differing = declared.devices().filter(|(device, bytes)| reported.on(*device) != *bytes);
            conditions.extend(differing.map(|(device, bytes)| Condition::CapacityDiffers {
                device: device.map(str::to_owned),
                declared: bytes,
                reported: reported.on(device),
            }));
        }
        if let Some((device, _)) = self.over_limit() {
            conditions.push(Condition::OverLimit {
                device: device.map(str::to_owned),
                registered: self.registered().on(device),
                limit: self.limit.on(device),
            });
        }
        conditions.extend(self.crowded());
        conditions
    }

    /// Whether its pinned copies do not fit its memory together, or leave too little there for one of the others: no
    /// decision makes it so, but a user who pins what is placed may, and a size that turns out larger, and a memory
    /// that turns out smaller.
    #[must_use]
    pub fn crowded(&self) -> Option<Condition> {
        let (pinned, largest) = (self.pinned(), self.load.largest());
        if !self.is_known() || pinned.is_zero() {
            return None;
        }
        let device = pinned.devices().map(|(device, _)| device).find(|device| {
            let together = u128::from(pinned.on(*device).0) + u128::from(largest.on(*device).0);
            pinned.on(*device) > Bytes::ZERO && together > u128::from(self.capacity.on(*device).0)
        })?;
        Some(Condition::Crowded {
            device: device.map(str::to_owned),
            pinned: pinned.on(device),
            largest: largest.on(device),
            capacity: self.capacity.on(device),
        })
    }

    /// The first device with more registered than may be, and by how much. Nothing is known to be over a
    /// limit that is not known.
    #[must_use]
    pub fn over_limit(&self) -> Option<(Option<&str>, Bytes)> {
        if !self.is_known() {
            return None;
        }
        self.load.all().devices().find_map(|(device, used)| {
            let over = used.checked_sub(u128::from(self.limit.on(device).0))?;
            (over > 0).then(|| (device, Bytes(u64::try_from(over).unwrap_or(u64::MAX))))
        })
    }

    /// Whether anybody has said how much memory it has.
    #[must_use]
    pub const fn is_known(&self) -> bool {
        self.declared.is_some() || self.facts.reported.is_some()
    }

    /// Bytes left within its memory, before anything is to be evicted.
    #[must_use]
    pub fn free(&self) -> Resources {
        self.capacity.saturating_sub(&self.registered())
    }

    /// Bytes left within its limit.
    #[must_use]
    pub fn headroom(&self) -> Resources {
        self.limit.saturating_sub(&self.registered())
    }

    /// The largest copy that it could take, by device: within its limit, and never more than its pinned copies leave of
    /// its memory, since such a copy could not be resident.
    #[must_use]
    pub fn room(&self) -> Resources {
        self.headroom().min(&self.capacity.saturating_sub(&self.pinned()))
    }

    /// The largest pinned copy that it could take: of what its pinned copies leave, the largest of the others keeps its
    /// share.
    #[must_use]
    pub fn room_to_pin(&self) -> Resources {
        self.room().min(&self.capacity.saturating_sub(&self.pinned()).saturating_sub(&self.load.largest()))
    }

    /// Where most of `need` is missing from what a copy, pinned or not, could have here.
    pub(super) fn lacks(&self, need: &Resources, pinned: bool) -> Option<Lack> {
        let room = if pinned { self.room_to_pin() } else { self.room() };
        let (device, missing) = filter::worst(&room, need)?;
        let on = device.as_deref();
        let otherwise = need.on(on).saturating_sub(self.headroom().min(&self.capacity).on(on));
        Some(Lack { beside_pinned: otherwise < missing, device, missing })
    }

    /// Whether copies on it are there to stay.
    pub(super) const fn keeps_copies(&self) -> bool {
        match self.facts.state {
            ReplicaState::Pending | ReplicaState::Available | ReplicaState::Unknown { .. } => !self.draining,
            ReplicaState::Draining | ReplicaState::Lost => false,
        }
    }

    pub(super) fn rank(&self) -> Rank {
        Rank {
            used: Share::of(self.load.all(), &self.capacity),
            copies: u32::try_from(self.copies.len()).unwrap_or(u32::MAX),
            replica: self.id.clone(),
        }
    }

    pub(super) fn seat(&self) -> Seat {
        Seat {
            capabilities: self.facts.capabilities.clone(),
            standing: match filter::closed(self) {
                Some(by) => Standing::Closed(by),
                None => Standing::Open(Box::new(Open {
                    rank: self.rank(),
                    free: self.free(),
                    room: self.room(),
                    room_to_pin: self.room_to_pin(),
                    capacity: self.capacity.clone(),
                })),
            },
        }
    }

    /// The replica as it would be without one of its copies.
    pub(super) fn without(&self, model: &ModelName, generation: Generation, copy: &Registered) -> Self {
        let mut replica = self.clone();
        if replica.copies.remove(&(model.clone(), generation)) {
            replica.load.remove(&copy.need, copy.pinned);
        }
        replica
    }
}

/// What a replica lacks for a copy, on the device where it lacks most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lack {
    pub(super) device: Option<String>,
    pub(super) missing: Bytes,
    /// Whether less would be missing if nothing had to stay in memory.
    pub(super) beside_pinned: bool,
}

/// All that the indexes know of a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seat {
    pub(super) capabilities: Capabilities,
    pub(super) standing: Standing,
}

/// Whether anything new may go to a replica at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// No, and the first filter that says so.
    Closed(Filter),
    /// Yes.
    Open(Box<Open>),
}

/// What the indexes know of a replica that takes new copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Open {
    pub(super) rank: Rank,
    pub(super) free: Resources,
    pub(super) room: Resources,
    pub(super) room_to_pin: Resources,
    pub(super) capacity: Resources,
}

/// What a change of a replica means to those who wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Growth {
    /// It has more room than before.
    Freed,
    /// It takes copies that it would have refused for other reasons than room.
    Opened,
}

impl Seat {
    /// What it means that this seat has become `now`; nothing when nobody gains by it.
    pub(super) fn growth(&self, now: &Self) -> Option<Growth> {
        let Standing::Open(after) = &now.standing else { return None };
        let Standing::Open(before) = &self.standing else { return Some(Growth::Opened) };
        if self.capabilities != now.capabilities || !before.capacity.covers(&after.capacity) {
            return Some(Growth::Opened);
        }
        let grown = !before.room.covers(&after.room) || !before.room_to_pin.covers(&after.room_to_pin);
        grown.then_some(Growth::Freed)
    }
}
