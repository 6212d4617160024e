//! Which copies are to move off a replica that they do not fit any more.
//!
//! The rules of this module: what the replica can't serve, or could never hold, is to move; of the pinned copies as few as
//! let the rest of them fit its memory together, and of the others those that could not come in beside these; of what is
//! left as few as bring the replica back within its limit. Copies that find a place elsewhere go before those that find none, and
//! the newest of a size before the oldest. One that is on its way stays on its way while it is needed, so that no
//! two looks move more than one does. Nothing is given up here: a copy stays until another one answers in its place.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use super::{desk::Placement, ledger::LedgerError, problem::PlacementRequest, replica::Replica};
use crate::domain::{
    memory::{Bytes, Resources, Tally},
    names::{ModelName, ReplicaId},
    replica::ReplicaState,
    time::Instant,
    version::Generation,
};

/// Copies for which one look searches a place elsewhere at most; the rest count as having none until the next look.
const SEARCHES: usize = 1024;

/// Copies whose reasons are found anew at every look; those of the rest are as old as their last try.
const EXPLAINED: usize = 8;

/// A copy, by model and generation.
pub type Key = (ModelName, Generation);

/// What a look at a replica came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Relief {
    /// Copies that are to move, those of earlier looks among them.
    pub moves: BTreeSet<Key>,
    /// Copies that were to move and need not any more.
    pub kept: BTreeSet<Key>,
    /// Of those that are to move, those for which no place is found, and why.
    pub stuck: BTreeMap<Key, String>,
}

/// A copy that may have to move.
#[derive(Clone)]
struct Tenant<'a> {
    key: &'a Key,
    need: &'a Resources,
    /// Bytes that it frees where they are short.
    frees: u128,
    standing: Standing,
}

/// How a copy stands that may have to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It is where it is to be, as far as anybody said.
    Settled,
    /// Another one is on its way to a place elsewhere.
    Moving,
    /// It is to move, and the other one finds no place.
    Waiting,
}

impl Placement {
    /// Decides which copies are to move off `id`. `requests` are those of its copies; one without a request is taken to
    /// fit, and to have no place elsewhere. Nothing is decided about a replica whose agent is not heard, and nothing
    /// has to be about one that is drained.
    pub fn relieve(&mut self, id: &ReplicaId, requests: &BTreeMap<Key, PlacementRequest>, now: Instant) -> Relief {
        let ledger = self.ledger();
        let Some(replica) = ledger.replica(id) else { return Relief::default() };
        let before = self.displaced(replica);
        if !is_judged(replica) {
            return Relief { stuck: self.stuck(&before, now), moves: before, kept: BTreeSet::new() };
        }
        let mut moves = BTreeSet::new();
        let (mut pinned, mut rest) = (Vec::new(), Vec::new());
        for key in replica.copies() {
            let Some(copy) = ledger.copy(&key.0, key.1).filter(|copy| !copy.leaving) else { continue };
            if requests.get(key).is_some_and(|request| is_unfit(replica, request)) {
                moves.insert(key.clone());
            } else {
                let standing = match (copy.displaced, self.waits_for_another(key)) {
                    (false, _) => Standing::Settled,
                    (true, false) => Standing::Moving,
                    (true, true) => Standing::Waiting,
                };
                let tenants = if copy.pinned { &mut pinned } else { &mut rest };
                tenants.push(Tenant { key, need: &copy.need, frees: 0, standing });
            }
        }
        let mut searches = 0;
        let mut finds = |key: &Key| {
            searches += 1;
            let request = requests.get(key).filter(|_| searches <= SEARCHES);
            request.is_some_and(|request| ledger.decide(request, now).outcome.is_ok())
        };
        let short = sum(&pinned).shown().saturating_sub(replica.capacity());
        if !short.is_zero() {
            moves.extend(choose(pinned.clone(), short, &mut finds));
            pinned.retain(|tenant| !moves.contains(tenant.key));
        }
        let beside = replica.capacity().saturating_sub(&sum(&pinned).shown());
        moves.extend(rest.iter().filter(|tenant| !beside.covers(tenant.need)).map(|tenant| tenant.key.clone()));
        rest.retain(|tenant| beside.covers(tenant.need));
        rest.append(&mut pinned);
        let short = sum(&rest).shown().saturating_sub(replica.limit());
        if !short.is_zero() {
            moves.extend(choose(rest, short, &mut finds));
        }
        let kept: BTreeSet<Key> = before.difference(&moves).cloned().collect();
        let marks: Vec<(Key, bool)> = kept
            .iter()
            .map(|key| (key, false))
            .chain(moves.iter().map(|key| (key, true)))
            .map(|(k, m)| (k.clone(), m))
            .collect();
        for ((model, generation), displaced) in marks {
            // Each of them was found on the replica just now.
            drop(self.set_displaced(&model, generation, displaced));
        }
        Relief { stuck: self.stuck(&moves, now), moves, kept }
    }

    /// Whether a look at the replica decides anything now: its agent is heard, and it is not drained anyway.
    #[must_use]
    pub fn is_judged(&self, id: &ReplicaId) -> bool {
        self.ledger().replica(id).is_some_and(is_judged)
    }

    fn displaced(&self, replica: &Replica) -> BTreeSet<Key> {
        let is_displaced =
            |key: &&Key| self.ledger().copy(&key.0, key.1).is_some_and(|copy| copy.displaced && !copy.leaving);
        replica.copies().filter(is_displaced).cloned().collect()
    }

    /// Whether a copy of the same version finds no place.
    fn waits_for_another(&self, (model, generation): &Key) -> bool {
        self.waiting_of(model).any(|entry| entry.request.generation.version == generation.version)
    }

    fn stuck(&self, moves: &BTreeSet<Key>, now: Instant) -> BTreeMap<Key, String> {
        let mut stuck = BTreeMap::new();
        for key in moves {
            let of_version = |entry: &&super::Waiting| entry.request.generation.version == key.1.version;
            let Some(waits) = self.waiting_of(&key.0).find(of_version) else { continue };
            let fresh = (stuck.len() < EXPLAINED).then(|| self.ledger().decide(&waits.request, now).outcome.err());
            stuck.insert(key.clone(), fresh.flatten().as_ref().unwrap_or(&waits.unplaced).summary());
        }
        stuck
    }

    /// Marks a copy as one that is to move, or takes that back. While it is to move it keeps no other copy on its
    /// server.
    ///
    /// # Errors
    /// When it is not registered.
    pub fn set_displaced(
        &mut self,
        model: &ModelName,
        generation: Generation,
        displaced: bool,
    ) -> Result<(), LedgerError> {
        self.edit_copy(model, |ledger| ledger.set_displaced(model, generation, displaced))
    }
}

fn is_judged(replica: &Replica) -> bool {
    match replica.facts().state {
        ReplicaState::Available => !replica.draining() && replica.is_known(),
        ReplicaState::Draining | ReplicaState::Pending | ReplicaState::Unknown { .. } | ReplicaState::Lost => false,
    }
}

fn sum(tenants: &[Tenant<'_>]) -> Tally {
    let mut sum = Tally::default();
    tenants.iter().for_each(|tenant| sum.add(tenant.need));
    sum
}

/// Whether the replica can't serve the copy, or could not hold it with nothing else in its memory.
fn is_unfit(replica: &Replica, request: &PlacementRequest) -> bool {
    !replica.facts().capabilities.cover(&request.requirements) || !replica.capacity().covers(&request.need)
}

/// The copies that are to move so that `short` comes free. `finds` says whether a copy has a place elsewhere; it is asked
/// only as long as that matters.
fn choose(mut rest: Vec<Tenant<'_>>, mut short: Resources, mut finds: impl FnMut(&Key) -> bool) -> BTreeSet<Key> {
    for tenant in &mut rest {
        tenant.frees = freed(tenant.need, &short);
    }
    rest.retain(|tenant| tenant.frees > 0);
    rest.sort_unstable_by_key(|tenant| Reverse((tenant.frees, age(tenant.key))));
    let mut chosen = BTreeSet::new();
    let mut take = |tenant: &Tenant<'_>, short: &mut Resources| {
        chosen.insert(tenant.key.clone());
        *short = short.saturating_sub(tenant.need);
    };
    for tenant in rest.iter().filter(|tenant| tenant.standing == Standing::Moving) {
        if freed(tenant.need, &short) > 0 {
            take(tenant, &mut short);
        }
    }
    // The rest, the largest first; and the last of them as small as will do.
    rest.retain(|tenant| tenant.standing != Standing::Moving);
    let mut found: Vec<Option<bool>> = vec![None; rest.len()];
    let mut moves = |at: usize| *found[at].get_or_insert_with(|| finds(rest[at].key));
    let mut taken = vec![false; rest.len()];
    for first in 0..rest.len() {
        if short.is_zero() {
            break;
        }
        let suffices = |at: &usize| rest[*at].need.covers(&short);
        if suffices(&first) {
            let least = (first..rest.len()).rev().filter(suffices).find(|at| moves(*at));
            // The newest of that size.
            let alike = |least: usize| (first..=least).find(|at| rest[*at].need == rest[least].need && moves(*at));
            if let Some(last) = least.and_then(alike) {
                taken[last] = true;
                take(&rest[last], &mut short);
            }
        } else if freed(rest[first].need, &short) > 0 && moves(first) {
            taken[first] = true;
            take(&rest[first], &mut short);
        }
    }
    // No more finds a place now: the largest are to move once there is one, those that wait for it already first.
    for waits in [true, false] {
        for (at, tenant) in rest.iter().enumerate() {
            let turn = (tenant.standing == Standing::Waiting) == waits && !taken[at];
            if turn && freed(tenant.need, &short) > 0 {
                take(tenant, &mut short);
            }
        }
    }
    chosen
}

/// Bytes of `short`, on all devices together, that come free with `need`.
fn freed(need: &Resources, short: &Resources) -> u128 {
    short.devices().map(|(device, missing): (_, Bytes)| u128::from(need.on(device).min(missing).0)).sum()
}

/// What makes a copy newer than another: its model's creation, then its own number.
fn age((model, generation): &Key) -> (u64, u32, ModelName) {
    (generation.uid.0, generation.number, model.clone())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::*, *};
    use crate::domain::{
        names::ServerName,
        version::{Uid, Version},
    };

    const T0: Instant = Instant::from_micros(1_000_000);

    fn on(server: &str) -> ReplicaId {
        ReplicaId::new(ServerName::new(server).expect("a name"), 0)
    }

    fn facts(bytes: u64) -> ReplicaFacts {
        ReplicaFacts {
            reported: Some(Resources::primary(Bytes(bytes))),
            capabilities: Capabilities::new(["onnx"]),
            state: ReplicaState::Available,
            ..ReplicaFacts::default()
        }
    }

    /// The copy of the model that was created as number `uid`.
    fn copy(uid: u64, need: u64) -> PlacementRequest {
        let model = ModelName::new(&format!("m{uid}")).expect("a name");
        let generation = Generation { uid: Uid(uid), version: Version(1), number: 1 };
        let mut request = PlacementRequest::new(model, generation, Resources::primary(Bytes(need)));
        request.requirements = Capabilities::new(["onnx"]);
        request
    }

    fn key(request: &PlacementRequest) -> Key {
        (request.model.clone(), request.generation)
    }

    /// Copies of these sizes on `a`, and what each asks for.
    fn holding(sizes: &[u64]) -> (Placement, BTreeMap<Key, PlacementRequest>) {
        let mut placement = Placement::default();
        placement.upsert_replica(&on("a"), facts(sizes.iter().sum()));
        let requests: Vec<_> = (1..).zip(sizes).map(|(uid, need)| copy(uid, *need)).collect();
        for request in &requests {
            assert_eq!(placement.place(request, T0).replica(), Some(&on("a")));
        }
        (placement, requests.into_iter().map(|request| (key(&request), request)).collect())
    }

    fn uids(keys: &BTreeSet<Key>) -> Vec<u64> {
        keys.iter().map(|(_, generation)| generation.uid.0).collect()
    }

    /// What a model does that is told to move a copy: it asks for a place for another one.
    fn replace(placement: &mut Placement, request: &PlacementRequest) -> Option<ReplicaId> {
        let mut other = request.clone();
        other.generation.number += 1;
        placement.place(&other, T0).replica().cloned()
    }

    #[test]
    fn the_fewest_move_and_the_newest_of_a_size() {
        let (mut placement, requests) = holding(&[3, 3, 1, 5, 3]);
        placement.upsert_replica(&on("b"), facts(100));
        placement.upsert_replica(&on("a"), facts(12));
        // 3 of 15 have to go: the newest that is that small.
        assert_eq!(uids(&placement.relieve(&on("a"), &requests, T0).moves), [5]);
        placement.upsert_replica(&on("a"), facts(9));
        // 6 have to go: the one that is on its way, and one more.
        assert_eq!(uids(&placement.relieve(&on("a"), &requests, T0).moves), [2, 5]);
        placement.upsert_replica(&on("a"), facts(15));
        let relief = placement.relieve(&on("a"), &requests, T0);
        assert_eq!((uids(&relief.moves), uids(&relief.kept)), (vec![], vec![2, 5]));
    }

    #[test]
    fn those_that_find_a_place_go_before_those_that_find_none_which_say_why() {
        let (mut placement, requests) = holding(&[6, 2, 2]);
        placement.upsert_replica(&on("b"), facts(2));
        placement.upsert_replica(&on("a"), facts(7));
        // The large one would do alone, and has nowhere to go.
        let first = placement.relieve(&on("a"), &requests, T0);
        assert_eq!(uids(&first.moves), [2, 3]);
        let places: Vec<_> = first.moves.iter().map(|moved| replace(&mut placement, &requests[moved])).collect();
        assert_eq!(places, [Some(on("b")), None], "there is room for one of them");
        let second = placement.relieve(&on("a"), &requests, T0);
        assert_eq!(uids(&second.moves), [2, 3]);
        let stuck: Vec<_> = second.stuck.iter().map(|((model, _), why)| (model.as_str(), why.as_str())).collect();
        let [("m3", why)] = stuck.as_slice() else { panic!("{stuck:?}") };
        assert!(why.contains("2 B"), "{why}");
        // Room for it: it is tried again of itself.
        placement.upsert_replica(&on("c"), facts(2));
        let retried = placement.retry(T0, 100);
        assert_eq!(retried.decisions[0].2.replica(), Some(&on("c")));
        assert!(placement.relieve(&on("a"), &requests, T0).stuck.is_empty());
    }

    #[test]
    fn what_finds_no_place_is_to_move_all_the_same_when_the_rest_is_not_enough() {
        let (mut placement, requests) = holding(&[6, 2, 1]);
        placement.upsert_replica(&on("b"), facts(1));
        placement.upsert_replica(&on("a"), facts(6));
        assert_eq!(uids(&placement.relieve(&on("a"), &requests, T0).moves), [1, 3]);
    }

    #[test]
    fn what_can_not_be_served_or_held_moves_whatever_the_limit() {
        let (mut placement, mut requests) = holding(&[6, 1, 1]);
        placement.upsert_replica(&on("b"), facts(100));
        let mut larger = facts(5);
        larger.overcommit_percent = 900;
        placement.upsert_replica(&on("a"), larger);
        assert_eq!(uids(&placement.relieve(&on("a"), &requests, T0).moves), [1], "it could never be in memory");
        for request in requests.values_mut().filter(|request| request.generation.uid.0 == 2) {
            request.requirements = Capabilities::new(["onnx", "gpu"]);
        }
        assert_eq!(uids(&placement.relieve(&on("a"), &requests, T0).moves), [1, 2], "it can't be served");
    }

    /// Has a copy pinned where it is, as its user asks for.
    fn pin(placement: &mut Placement, requests: &mut BTreeMap<Key, PlacementRequest>, uid: u64) {
        let request = requests.values_mut().find(|request| request.generation.uid.0 == uid).expect("there");
        request.pinned = true;
        placement.set_pinned(&request.model, request.generation, true).expect("registered");
    }

    #[test]
    fn who_can_not_come_in_beside_pinned_copies_moves_and_of_too_many_pinned_ones_the_fewest() {
        let (mut placement, mut requests) = holding(&[3, 3, 4, 6]);
        placement.upsert_replica(&on("b"), facts(100));
        placement.upsert_replica(&on("a"), ReplicaFacts { overcommit_percent: 100, ..facts(10) });
        assert_eq!(placement.relieve(&on("a"), &requests, T0), Relief::default());
        pin(&mut placement, &mut requests, 3);
        assert_eq!(placement.relieve(&on("a"), &requests, T0), Relief::default(), "6 and 4 are no more than 10");
        pin(&mut placement, &mut requests, 1);
        assert_eq!(uids(&placement.relieve(&on("a"), &requests, T0).moves), [4]);
        let crowded = placement.ledger().replica(&on("a")).and_then(Replica::crowded).expect("7 and 6");
        assert_eq!(
            crowded.to_string(),
            "crowded by pinned copies: 7 B of 10 B pinned, and the largest of the others needs 6 B"
        );
        let (mut placement, mut requests) = holding(&[3, 3, 4, 6]);
        placement.upsert_replica(&on("b"), facts(100));
        placement.upsert_replica(&on("a"), ReplicaFacts { overcommit_percent: 100, ..facts(10) });
        [1, 3, 4].into_iter().for_each(|uid| pin(&mut placement, &mut requests, uid));
        let moves = placement.relieve(&on("a"), &requests, T0).moves;
        assert_eq!(
            uids(&moves),
            [1, 2],
            "the smallest that will do, and the one that could not come in beside the rest"
        );
    }

    #[test]
    fn nothing_is_decided_about_a_replica_that_is_not_heard() {
        let (mut placement, requests) = holding(&[2, 2]);
        placement.upsert_replica(&on("b"), facts(100));
        for state in
            [ReplicaState::Pending, ReplicaState::Draining, ReplicaState::Unknown { since: T0 }, ReplicaState::Lost]
        {
            placement.upsert_replica(&on("a"), ReplicaFacts { state, ..facts(1) });
            assert_eq!(placement.relieve(&on("a"), &requests, T0), Relief::default());
        }
        let unknown = ReplicaFacts { reported: None, ..facts(1) };
        placement.upsert_replica(&on("a"), unknown);
        assert_eq!(placement.relieve(&on("a"), &requests, T0), Relief::default());
    }

    #[test]
    fn one_that_moves_may_leave_its_server_though_its_version_stays_on_one() {
        let (mut placement, requests) = holding(&[4]);
        placement.upsert_replica(&on("b"), facts(4));
        placement.upsert_replica(&on("a"), facts(3));
        let moves = placement.relieve(&on("a"), &requests, T0).moves;
        let moved = moves.first().expect("it does not fit");
        assert_eq!(replace(&mut placement, &requests[moved]), Some(on("b")));
    }

    /// The least number of `sizes` that sum up to `short`.
    fn fewest(sizes: &[u64], short: u64) -> usize {
        let sums = (0_u32..1 << sizes.len()).filter(|set| {
            let sum: u64 = sizes.iter().enumerate().filter(|(at, _)| set >> at & 1 == 1).map(|(_, size)| size).sum();
            sum >= short
        });
        sums.map(|set| set.count_ones() as usize).min().unwrap_or(sizes.len())
    }

    proptest! {
        /// With room elsewhere the fewest copies move that bring the replica within its limit; a second look says the
        /// same, and so does one at a replica that was filled in another order.
        #[test]
        fn as_few_as_will_do(sizes in prop::collection::vec(1_u64..9, 1..9), left in 9_u64..40) {
            let (mut placement, requests) = holding(&sizes);
            placement.upsert_replica(&on("b"), facts(1_000));
            placement.upsert_replica(&on("a"), facts(left));
            let short = sizes.iter().sum::<u64>().saturating_sub(left);
            let first = placement.relieve(&on("a"), &requests, T0);
            prop_assert_eq!(first.moves.len(), fewest(&sizes, short));
            let freed: u64 = first.moves.iter().map(|key| requests[key].need.primary.0).sum();
            prop_assert!(freed >= short);
            prop_assert_eq!(&placement.relieve(&on("a"), &requests, T0).moves, &first.moves);
            let mut other = Placement::default();
            other.upsert_replica(&on("a"), facts(1_000));
            for request in requests.values().rev() {
                other.place(request, T0);
            }
            other.upsert_replica(&on("b"), facts(1_000));
            other.upsert_replica(&on("a"), facts(left));
            prop_assert_eq!(&other.relieve(&on("a"), &requests, T0).moves, &first.moves);
        }

        /// Whoever is pinned where: with room elsewhere one look and the moves that it asks for bring the replica to where
        /// its pinned copies fit together, with room for each of the others.
        #[test]
        fn what_stays_fits_beside_what_is_pinned(
            sizes in prop::collection::vec((1_u64..9, any::<bool>()), 1..9), left in 9_u64..40, overcommit_percent in 0_u32..200,
        ) {
            let (mut placement, mut requests) = holding(&sizes.iter().map(|(size, _)| *size).collect::<Vec<_>>());
            placement.upsert_replica(&on("b"), facts(1_000));
            placement.upsert_replica(&on("a"), ReplicaFacts { overcommit_percent, ..facts(left) });
            for (uid, (_, pinned)) in (1..).zip(&sizes) {
                if *pinned {
                    pin(&mut placement, &mut requests, uid);
                }
            }
            let moves = placement.relieve(&on("a"), &requests, T0).moves;
            for key in &moves {
                prop_assert_eq!(replace(&mut placement, &requests[key]), Some(on("b")));
                placement.release(&key.0, key.1);
            }
            prop_assert!(placement.consistency_check().is_ok());
            let replica = placement.ledger().replica(&on("a")).expect("known");
            prop_assert_eq!((replica.over_limit(), replica.crowded()), (None, None));
            prop_assert_eq!(placement.relieve(&on("a"), &requests, T0), Relief::default());
        }

        /// Whatever room there is elsewhere: looks, places found and copies that leave go on until the replica is
        /// within its limit, or no copy that it would help to move finds a place. It takes a bounded number of looks.
        #[test]
        fn it_ends_within_the_limit_or_with_what_finds_no_place(
            sizes in prop::collection::vec(1_u64..9, 1..9), left in 9_u64..40, room in 0_u64..30,
        ) {
            let (mut placement, requests) = holding(&sizes);
            if room > 0 {
                placement.upsert_replica(&on("b"), facts(room));
            }
            placement.upsert_replica(&on("a"), facts(left));
            let mut last = Relief::default();
            for _ in 0..sizes.len() + 2 {
                last = placement.relieve(&on("a"), &requests, T0);
                for key in &last.kept {
                    let other = Generation { number: 2, ..key.1 };
                    placement.release(&key.0, other);
                }
                for key in &last.moves {
                    if replace(&mut placement, &requests[key]).is_some() {
                        placement.release(&key.0, key.1);
                    }
                }
                prop_assert!(placement.consistency_check().is_ok());
            }
            let over = placement.ledger().replica(&on("a")).and_then(|replica| replica.over_limit()).is_some();
            if over {
                prop_assert!(!last.moves.is_empty());
                let free = placement.ledger().replica(&on("b")).map_or(0, |replica| replica.room().primary.0);
                let there = placement.ledger().replica(&on("a")).expect("known").copies().cloned().collect::<Vec<_>>();
                for key in there {
                    prop_assert!(requests[&key].need.primary.0 > free, "{key:?} would find {free}");
                }
            } else {
                prop_assert!(last.moves.is_empty() || last.stuck.is_empty());
            }
        }
    }
}
