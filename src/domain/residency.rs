//! Which copies leave a replica's memory so that another may enter it.
//!
//! The rules of this module: what is in memory, loading and leaving included, never exceeds the capacity; a
//! copy with a hold is never evicted; one decision covers the whole need, takes the least recently used first
//! and no more than the need asks for; a need that can't ever fit is refused before anything is evicted.

use super::{
    memory::{Bytes, Resources},
    time::Instant,
    version::Generation,
};

/// Where a copy that takes memory stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is being loaded, or its load is decided and waits for what is leaving.
    Entering,
    /// It answers requests.
    Resident,
    /// It is being unloaded; its bytes are taken until that is done.
    Leaving,
}

/// One copy that takes memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Occupant {
    /// Which copy.
    pub copy: Generation,
    /// Its bytes.
    pub bytes: Resources,
    /// When a request last used it.
    pub last_used: Instant,
    /// Requests that hold it.
    pub holds: u32,
    /// Where it stands.
    pub standing: Standing,
}

/// What to do about a need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// There is room now.
    Fits,
    /// There is room once what is leaving has left: it is to be kept for this need.
    Settle,
    /// There is room once these have left: all of them are to leave, and the room is to be kept for this need.
    Evict(Vec<Generation>),
    /// There would be room, but not without evicting copies that are held or still entering.
    Wait,
    /// The need is more than the whole capacity.
    Refuse,
}

/// Decides about `need` beside `occupants` within `capacity`. The order of `occupants` has no influence.
#[must_use]
pub fn decide(occupants: &[Occupant], capacity: &Resources, need: &Resources) -> Decision {
    if !capacity.covers(need) {
        return Decision::Refuse;
    }
    // What can't be counted can't fit either.
    let Some(now) = total(occupants).and_then(|taken| taken.checked_add(need)) else { return Decision::Wait };
    if capacity.covers(&now) {
        return Decision::Fits;
    }
    let staying = occupants.iter().filter(|one| one.standing != Standing::Leaving);
    let Some(later) = total(staying).and_then(|taken| taken.checked_add(need)) else { return Decision::Wait };
    let missing = later.saturating_sub(capacity);
    if missing.is_zero() {
        return Decision::Settle;
    }
    match victims(occupants, &missing) {
        Some(victims) => Decision::Evict(victims),
        None => Decision::Wait,
    }
}

/// What is to leave because more is in memory than the capacity, which has become smaller: the least recently used
/// copies without a hold, no more than it takes, and fewer where holds don't allow all. Nothing at all once what is in
/// memory is within the capacity; an empty list means that there is something to wait for.
///
/// The copy that was used last stays, even if it alone is more than the capacity: its next request would bring it
/// back as large as it is.
#[must_use]
pub fn excess(occupants: &[Occupant], capacity: &Resources) -> Option<Vec<Generation>> {
    let stays = |one: &&Occupant| one.standing != Standing::Leaving;
    let last = occupants.iter().filter(stays).max_by_key(|one| (one.last_used, one.copy));
    let limit = last.map_or_else(|| capacity.clone(), |last| capacity.max(&last.bytes));
    if total(occupants).is_some_and(|taken| limit.covers(&taken)) {
        return None;
    }
    let missing = total(occupants.iter().filter(stays))?.saturating_sub(&limit);
    let others: Vec<&Occupant> = occupants.iter().filter(|one| last.is_none_or(|last| last.copy != one.copy)).collect();
    Some(chosen(others, &missing).0.into_iter().map(|one| one.copy).collect())
}

/// The least recently used copies without a hold that free `missing`, none of which could be left out.
fn victims(occupants: &[Occupant], missing: &Resources) -> Option<Vec<Generation>> {
    let (chosen, short) = chosen(occupants.iter().collect(), missing);
    short.is_zero().then(|| chosen.into_iter().map(|one| one.copy).collect())
}

/// The least recently used copies without a hold that help to free `missing`, and what they leave missing.
fn chosen<'a>(occupants: Vec<&'a Occupant>, missing: &Resources) -> (Vec<&'a Occupant>, Resources) {
    let mut candidates: Vec<&Occupant> =
        occupants.into_iter().filter(|one| one.standing == Standing::Resident && one.holds == 0).collect();
    candidates.sort_unstable_by_key(|one| (one.last_used, one.copy));
    let mut chosen: Vec<&Occupant> = Vec::new();
    let mut short = missing.clone();
    for one in candidates {
        if short.is_zero() {
            break;
        }
        if helps(&one.bytes, &short) {
            short = short.saturating_sub(&one.bytes);
            chosen.push(one);
        }
    }
    if !short.is_zero() {
        return (chosen, short);
    }
    // A large copy may have made smaller ones before it needless: the most recently used stay.
    let mut keep = chosen.len();
    while keep > 0 {
        keep -= 1;
        let spare = chosen.remove(keep);
        if !total(chosen.iter().copied()).is_none_or(|freed| freed.covers(missing)) {
            chosen.insert(keep, spare);
        }
    }
    (chosen, short)
}

/// Whether `bytes` are on any device that is short.
fn helps(bytes: &Resources, short: &Resources) -> bool {
    let both = |a: Bytes, b: Bytes| a > Bytes::ZERO && b > Bytes::ZERO;
    both(bytes.primary, short.primary)
        || short.others.iter().any(|(device, missing)| both(bytes.on(Some(device)), *missing))
}

fn total<'a>(occupants: impl IntoIterator<Item = &'a Occupant>) -> Option<Resources> {
    occupants.into_iter().try_fold(Resources::default(), |sum, one| sum.checked_add(&one.bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::version::{Uid, Version};

    fn copy(uid: u64) -> Generation {
        Generation { uid: Uid(uid), version: Version(1), number: 1 }
    }

    fn bytes(primary: u64, gpu: u64) -> Resources {
        let mut resources = Resources::primary(Bytes(primary));
        if gpu > 0 {
            resources.others.insert("gpu0".to_owned(), Bytes(gpu));
        }
        resources
    }

    fn resident(uid: u64, size: u64, used: u64, holds: u32) -> Occupant {
        Occupant {
            copy: copy(uid),
            bytes: bytes(size, 0),
            last_used: Instant::from_micros(used),
            holds,
            standing: Standing::Resident,
        }
    }

    #[test]
    fn the_least_recently_used_leaves_first_and_a_held_one_stays() {
        let occupants = [resident(1, 4, 10, 1), resident(2, 4, 30, 0), resident(3, 2, 20, 0)];
        let capacity = bytes(10, 0);
        assert_eq!(decide(&occupants, &capacity, &bytes(2, 0)), Decision::Evict(vec![copy(3)]));
        assert_eq!(decide(&occupants, &capacity, &bytes(3, 0)), Decision::Evict(vec![copy(2)]));
        assert_eq!(decide(&occupants, &capacity, &bytes(6, 0)), Decision::Evict(vec![copy(3), copy(2)]));
        assert_eq!(decide(&occupants, &capacity, &bytes(7, 0)), Decision::Wait);
        assert_eq!(decide(&occupants, &capacity, &bytes(11, 0)), Decision::Refuse);
    }

    #[test]
    fn what_is_leaving_counts_until_it_left_and_its_room_is_not_given_twice() {
        let mut leaving = resident(1, 6, 1, 0);
        leaving.standing = Standing::Leaving;
        let mut entering = resident(2, 6, 2, 0);
        entering.standing = Standing::Entering;
        let capacity = bytes(10, 0);
        assert_eq!(decide(&[leaving.clone()], &capacity, &bytes(6, 0)), Decision::Settle);
        assert_eq!(decide(&[leaving, entering], &capacity, &bytes(6, 0)), Decision::Wait);
    }

    #[test]
    fn a_device_that_the_replica_lacks_is_refused() {
        assert_eq!(decide(&[], &bytes(10, 0), &bytes(1, 1)), Decision::Refuse);
    }

    fn occupants() -> impl Strategy<Value = Vec<Occupant>> {
        proptest::collection::vec((0..6_u64, 0..4_u64, 0..5_u64, 0..2_u32, 0..4_u8), 0..9).prop_map(|all| {
            all.into_iter()
                .enumerate()
                .map(|(index, (primary, gpu, used, holds, standing))| Occupant {
                    copy: copy(index as u64),
                    bytes: bytes(primary, gpu),
                    last_used: Instant::from_micros(used),
                    holds,
                    standing: match standing {
                        0 => Standing::Entering,
                        1 => Standing::Leaving,
                        _ => Standing::Resident,
                    },
                })
                .collect()
        })
    }

    fn fits(occupants: &[Occupant], gone: &[Generation], capacity: &Resources, need: &Resources) -> bool {
        let stays = |one: &&Occupant| one.standing != Standing::Leaving && !gone.contains(&one.copy);
        let sum = total(occupants.iter().filter(stays)).expect("small").checked_add(need).expect("small");
        capacity.covers(&sum)
    }

    proptest! {
        #[test]
        fn a_decision_keeps_the_rules(
            occupants in occupants(), (primary, gpu) in (0..20_u64, 0..8_u64), (need, need_gpu) in (0..12_u64, 0..5_u64),
        ) {
            let (capacity, need) = (bytes(primary, gpu), bytes(need, need_gpu));
            let evictable: Vec<_> = occupants
                .iter()
                .filter(|one| one.standing == Standing::Resident && one.holds == 0)
                .map(|one| one.copy)
                .collect();
            match decide(&occupants, &capacity, &need) {
                Decision::Fits => {
                    let sum = total(&occupants).expect("small").checked_add(&need).expect("small");
                    prop_assert!(capacity.covers(&sum), "over capacity");
                }
                Decision::Settle => prop_assert!(fits(&occupants, &[], &capacity, &need)),
                Decision::Evict(list) => {
                    prop_assert!(list.iter().all(|one| evictable.contains(one)), "evicts a held one");
                    prop_assert!(fits(&occupants, &list, &capacity, &need), "not enough");
                    for spared in 0..list.len() {
                        let mut fewer = list.clone();
                        fewer.remove(spared);
                        prop_assert!(!fits(&occupants, &fewer, &capacity, &need), "more than needed");
                    }
                }
                Decision::Wait => {
                    prop_assert!(capacity.covers(&need));
                    prop_assert!(!fits(&occupants, &evictable, &capacity, &need), "waits without a reason");
                }
                Decision::Refuse => prop_assert!(!capacity.covers(&need)),
            }
        }

        #[test]
        fn one_that_was_used_later_leaves_only_when_the_earlier_ones_of_its_size_do(
            sizes in 1..4_u64, used in proptest::collection::vec(0..50_u64, 1..8), need in 1..12_u64,
        ) {
            let occupants: Vec<_> =
                used.iter().enumerate().map(|(uid, used)| resident(uid as u64, sizes, *used, 0)).collect();
            let capacity = bytes(sizes * occupants.len() as u64, 0);
            if let Decision::Evict(list) = decide(&occupants, &capacity, &bytes(need, 0)) {
                let mut order: Vec<_> = occupants.iter().map(|one| (one.last_used, one.copy)).collect();
                order.sort_unstable();
                let expected: Vec<_> = order.iter().take(list.len()).map(|(_, copy)| *copy).collect();
                prop_assert_eq!(list, expected);
            }
        }

        /// However many looks it takes, and whoever holds what: what leaves is not held, was not used last, and no more than it
        /// takes; once nothing is held the rest is within the capacity, or is the one that was used last.
        #[test]
        fn a_smaller_capacity_is_reached_by_what_is_used_least(mut occupants in occupants(), size in 0..20_u64, gpu in 0..8_u64) {
            let capacity = bytes(size, gpu);
            let last = |occupants: &[Occupant]| {
                let stays = occupants.iter().filter(|one| one.standing != Standing::Leaving);
                stays.max_by_key(|one| (one.last_used, one.copy)).cloned()
            };
            if let Some(victims) = excess(&occupants, &capacity) {
                let kept = last(&occupants);
                for one in occupants.iter().filter(|one| victims.contains(&one.copy)) {
                    prop_assert_eq!((one.holds, one.standing), (0, Standing::Resident));
                    prop_assert_ne!(Some(one.copy), kept.as_ref().map(|kept| kept.copy));
                }
            }
            // Loads end, holds are given back, what leaves has left.
            for one in &mut occupants {
                one.holds = 0;
                if one.standing == Standing::Entering {
                    one.standing = Standing::Resident;
                }
            }
            occupants.retain(|one| one.standing == Standing::Resident);
            let last = last(&occupants);
            if let Some(victims) = excess(&occupants, &capacity) {
                prop_assert!(!victims.is_empty());
                let without = |spared: Option<Generation>| -> Vec<Occupant> {
                    let stays = |one: &&Occupant| !victims.contains(&one.copy) || Some(one.copy) == spared;
                    occupants.iter().filter(stays).cloned().collect()
                };
                prop_assert_eq!(excess(&without(None), &capacity), None);
                for victim in &victims {
                    prop_assert!(excess(&without(Some(*victim)), &capacity).is_some(), "{victim} need not have left");
                }
                let rest = without(None);
                let taken = total(&rest).expect("counted");
                prop_assert!(capacity.covers(&taken) || last.is_some_and(|last| capacity.max(&last.bytes).covers(&taken)));
            } else {
                let taken = total(&occupants).expect("counted");
                prop_assert!(last.map_or(capacity.clone(), |last| capacity.max(&last.bytes)).covers(&taken));
            }
        }

        #[test]
        fn the_order_of_the_occupants_does_not_matter(occupants in occupants(), size in 0..20_u64, need in 0..12_u64) {
            let mut reversed = occupants.clone();
            reversed.reverse();
            prop_assert_eq!(
                decide(&occupants, &bytes(size, 8), &bytes(need, 0)),
                decide(&reversed, &bytes(size, 8), &bytes(need, 0))
            );
        }
    }
}
