//! Routes: from a model's name to weighted versions to the endpoints of their copies.

use std::time::Duration;

use super::{
    names::{ModelName, ReplicaId},
    time::Instant,
    version::{Generation, Version},
};

/// Says which of two route tables is newer: the greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// Where requests for one model go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The model.
    pub model: ModelName,
    /// Versions by weight. An experiment would be one more writer of these.
    pub targets: Vec<Target>,
    /// What a client is told while there is no endpoint.
    pub absence: Absence,
}

/// One version's share of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The version.
    pub version: Version,
    /// Its share, relative to the sum of the route's weights.
    pub weight: u32,
    /// Its copies.
    pub endpoints: Vec<Endpoint>,
}

/// One copy that may be sent to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Which copy.
    pub generation: Generation,
    /// The replica that holds it.
    pub replica: ReplicaId,
    /// Where that replica's door is: `host:port`, or `inproc:NAME` in the same process.
    pub door: String,
    /// Whether it is in memory, as far as is known: a hint.
    pub resident: bool,
}

/// Why a model has no endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Absence {
    /// The model's state.
    pub state: String,
    /// The reason for it.
    pub reason: String,
    /// When a copy that is under way should answer, or the next one is tried.
    pub retry_at: Option<Instant>,
    /// How long to leave it, when nothing is under way.
    pub retry_after: Option<Duration>,
}

impl Absence {
    /// After how long to ask again, at `now`; at least `soonest`.
    #[must_use]
    pub fn wait(&self, now: Instant, soonest: Duration) -> Duration {
        let left = self.retry_at.map(|at| at.since(now)).or(self.retry_after);
        left.unwrap_or(soonest).max(soonest)
    }
}

impl Route {
    /// Whether any copy may be sent to.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.targets.iter().all(|target| target.endpoints.is_empty())
    }
}

/// The whole of a route table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Its epoch.
    pub epoch: Epoch,
    /// Every route, each model at most once.
    pub routes: Vec<Route>,
}

/// What one epoch changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The epoch that they make.
    pub epoch: Epoch,
    /// Routes that are new or replace the one of their model.
    pub routes: Vec<Route>,
    /// Models that have no route any more.
    pub removed: Vec<ModelName>,
}

/// What speaks against an endpoint. The order of the fields is the policy: the smallest is the best.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// It answers with errors while others answer well.
    pub aside: bool,
    /// It could not be reached a moment ago.
    pub suspect: bool,
    /// Its copy is on disk only, as far as is known.
    pub evicted: bool,
}

/// One endpoint as a choice looks at it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// What speaks against it.
    pub rank: Rank,
    /// Requests that this gateway has out there.
    pub in_flight: usize,
}

/// Chooses by weight: the index of one of `shares`, in proportion to its weight. `None` in it is one that can't
/// take a request. When all that can have weight 0, each is as likely as the other: a request is never refused
/// while some copy could answer it.
pub fn choose_target(shares: impl Iterator<Item = Option<u32>> + Clone, random: u64) -> Option<usize> {
    let able = || shares.clone().enumerate().filter_map(|(index, share)| Some((index, u64::from(share?))));
    let total: u64 = able().map(|(_, weight)| weight).sum();
    if total == 0 {
        let count = able().count();
        return able().nth(below(random, count as u64) as usize).map(|(index, _)| index);
    }
    let mut point = below(random, total);
    for (index, weight) in able() {
        if point < weight {
            return Some(index);
        }
        point -= weight;
    }
    None
}

/// Of `count` endpoints, the less busy of two different ones drawn from those of the best rank. `load` answers
/// `None` for one that was tried already.
pub fn choose_endpoint(count: usize, load: impl Fn(usize) -> Option<Load>, random: u64) -> Option<usize> {
    let able = || (0..count).filter_map(|index| Some((index, load(index)?)));
    let best = able().map(|(_, load)| load.rank).min()?;
    let peers = || able().filter(|(_, load)| load.rank == best);
    let many = peers().count();
    let first = below(random << 32, many as u64) as usize;
    let (one, its) = peers().nth(first)?;
    if many == 1 {
        return Some(one);
    }
    let step = 1 + below(random >> 32 << 32, many as u64 - 1) as usize;
    let (other, theirs) = peers().nth((first + step) % many)?;
    Some(if theirs.in_flight < its.in_flight { other } else { one })
}

/// Scales `random` to `0..limit`; 0 when `limit` is 0.
const fn below(random: u64, limit: u64) -> u64 {
    ((random as u128 * limit as u128) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A fixed sequence that spreads over all 64 bits.
    fn randoms() -> impl Iterator<Item = u64> {
        (1_u64..).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17).wrapping_mul(0xbf58_476d_1ce4_e5b9))
    }

    #[test]
    fn targets_get_their_share() {
        let shares = [Some(10), None, Some(30), Some(0)];
        let mut got = [0; 4];
        for random in randoms().take(40_000) {
            got[choose_target(shares.iter().copied(), random).expect("one is able")] += 1;
        }
        assert_eq!((got[1], got[3]), (0, 0));
        assert!((9_000..11_000).contains(&got[0]), "{got:?}");
    }

    #[test]
    fn weight_zero_is_used_rather_than_refusing() {
        assert_eq!(choose_target([None, Some(0)].into_iter(), 7), Some(1));
        assert_eq!(choose_target([None, None].into_iter(), 7), None);
        assert_eq!(choose_target(std::iter::empty(), 7), None);
    }

    #[test]
    fn the_busier_of_two_is_never_taken() {
        for random in randoms().take(1000) {
            let chosen = choose_endpoint(2, |i| Some(Load { in_flight: [3, 2][i], ..Load::default() }), random);
            assert_eq!(chosen, Some(1));
        }
    }

    #[test]
    fn equal_endpoints_share_alike() {
        let mut got = [0; 5];
        for random in randoms().take(50_000) {
            got[choose_endpoint(5, |_| Some(Load::default()), random).expect("all are able")] += 1;
        }
        assert!(got.iter().all(|n| (9_000..11_000).contains(n)), "{got:?}");
    }

    proptest! {
        #[test]
        fn a_choice_is_able_and_of_the_best_rank(
            loads in prop::collection::vec(prop::option::of((any::<bool>(), any::<bool>(), 0..5_usize)), 0..8),
            random: u64,
        ) {
            let load = |i: usize| {
                loads[i].map(|(suspect, evicted, in_flight)| Load { rank: Rank { suspect, evicted, ..Rank::default() }, in_flight })
            };
            let best = (0..loads.len()).filter_map(load).map(|l| l.rank).min();
            let chosen = choose_endpoint(loads.len(), load, random);
            prop_assert_eq!(chosen.and_then(load).map(|l| l.rank), best);
        }

        #[test]
        fn a_target_that_can_is_found(shares in prop::collection::vec(prop::option::of(0..4_u32), 0..6), random: u64) {
            let chosen = choose_target(shares.iter().copied(), random);
            prop_assert_eq!(chosen.is_some(), shares.iter().any(Option::is_some));
            if let Some(index) = chosen {
                prop_assert!(shares[index].is_some());
                prop_assert!(shares[index] > Some(0) || shares.iter().all(|s| s.unwrap_or(0) == 0));
            }
        }
    }
}
