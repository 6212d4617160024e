//! What makes one replica better than another that will do as well. The order of [`Score`]'s fields is the
//! policy; the smaller score wins.

use std::fmt;

use serde::Serialize;

use super::problem::Problem;
use crate::domain::{
    memory::{Resources, Tally},
    names::ReplicaId,
};

/// How good a replica is for a copy; the least is the best. Compared field by field from the top, so the order of
/// the fields says what matters more. The last field makes no two scores equal, so equal states give equal answers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Score {
    /// Copies of the version that would find no place beside this one, when they have to share a server. First,
    /// because a version never leaves its server on its own: a wrong choice here would leave it short for good, which
    /// no saved download makes up for.
    pub stranded: u32,
    /// What it takes to answer the first request there: a load or a download costs more than anything below.
    pub warmth: Warmth,
    /// Whether the replica would hold more than its memory at once, and so has to evict. Other models pay for that
    /// with every reload.
    pub evicts: bool,
    /// Copies of the version that its server holds already, when it may spread over servers: a server's failure
    /// should not take all of them.
    pub beside: u32,
    /// How full it is. The emptiest first: what is spread grows and bursts without evictions.
    pub used: Share,
    /// How many copies it serves: of equally full ones, the one with fewer models to answer for.
    pub copies: u32,
    /// Which one it is.
    pub replica: ReplicaId,
}

/// How far a copy is from answering on a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Warmth {
    /// The version is in its memory.
    Resident,
    /// The artifact is on its disk.
    OnDisk,
    /// Everything is to be fetched.
    Cold,
}

/// How much of a replica's memory is registered, in millionths of it, on the device where that is most. More than
/// a million when it is overcommitted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Share(pub u64);

impl Share {
    /// The share that `registered` is of `capacity`, rounded down.
    #[must_use]
    pub fn of(registered: &Tally, capacity: &Resources) -> Self {
        let share = registered.devices().map(|(device, used)| match (used, capacity.on(device).0) {
            (0, _) => 0,
            (_, 0) => u128::MAX,
            (used, all) => used.saturating_mul(1_000_000) / u128::from(all),
        });
        Self(u64::try_from(share.max().unwrap_or(0)).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Share {
    /// In per cent, with one decimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{} %", self.0 / 10_000, self.0 % 10_000 / 1_000)
    }
}

/// The part of a score that is the replica's own, whoever asks: the order in which the indexes keep replicas.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Rank {
    pub(super) used: Share,
    pub(super) copies: u32,
    pub(super) replica: ReplicaId,
}

/// What is the same for all replicas of one server with the same capabilities.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Common {
    pub(super) stranded: u32,
    pub(super) beside: u32,
}

/// The score of a replica at `rank` with `free` bytes left within its memory.
pub(super) fn score(problem: &Problem<'_>, rank: &Rank, free: &Resources, common: Common) -> Score {
    let prefer = &problem.request.prefer;
    let warmth = if prefer.resident_on.contains(&rank.replica) {
        Warmth::Resident
    } else if prefer.artifact_on.contains(&rank.replica) {
        Warmth::OnDisk
    } else {
        Warmth::Cold
    };
    Score { warmth, ..promise(problem, rank, free, common) }
}

/// No more than the score of any replica that ranks no lower than `low`, has no more than `free` bytes left within its
/// memory, shares no less than `common`, and of which the request says nothing of its own.
pub(super) fn promise(problem: &Problem<'_>, low: &Rank, free: &Resources, common: Common) -> Score {
    Score {
        stranded: common.stranded,
        warmth: Warmth::Cold,
        evicts: !free.covers(&problem.request.need),
        beside: common.beside,
        used: low.used,
        copies: low.copies,
        replica: low.replica.clone(),
    }
}
