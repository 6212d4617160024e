//! Which copies leave a replica's memory so that another may enter it.
//!
//! The rules of this module: what is in memory, loading and leaving included, never exceeds the capacity; a
//! copy with a hold is never evicted, and a pinned one never at all; one decision covers the whole need, takes those first
//! that are worth least and no more than the need asks for; a need that can't ever fit is refused before anything is
//! evicted.
//!
//! What a copy is worth is told by one of two policies. The least recently used is worth least; or the one whose memory
//! spares least: its use rate, times how long it takes to come back, by its share of the memory. The rate is one use in
//! the time that usually passes without one; the longer the last one is ago, the less that is believed.

use std::{cmp::Ordering, time::Duration};

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

/// Which copies leave first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Eviction {
    /// The least recently used.
    #[default]
    Lru,
    /// Those whose memory spares least.
    Cost,
}

impl Eviction {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Lru, Self::Cost];

    /// As the registry names it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Cost => "cost",
        }
    }
}

/// How it is decided who leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Which copies leave first.
    pub eviction: Eviction,
    /// How long a copy stays at least, once it is in memory.
    pub least_residency: Duration,
    /// The time of the decision.
    pub now: Instant,
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
    /// How long it usually goes without a use, if it was used more than once.
    pub idle: Option<Duration>,
    /// Requests that hold it.
    pub holds: u32,
    /// Where it stands.
    pub standing: Standing,
    /// Since when it is in memory.
    pub since: Instant,
    /// How long it takes to come back, by itself.
    pub reload: Duration,
    /// Whether it is never to leave.
    pub pinned: bool,
}

/// How long a copy usually goes without a use, after a use that ended a pause of `idle`: what it was `before`, and an
/// eighth of the difference. So it is told by some eight uses. A pause counts as four times what was usual at most, so that
/// one night does not make a copy seldom used that is wanted all day, and as a quarter of it at least.
#[must_use]
pub fn usual_idle(before: Option<Duration>, idle: Duration) -> Duration {
    before.map_or(idle, |before| before - before / 8 + idle.clamp(before / 4, before.saturating_mul(4)) / 8)
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
    /// There would be room, but not without evicting copies that are pinned, held or still entering.
    Wait,
    /// The need is more than the whole capacity.
    Refuse,
}

/// Decides about `need` beside `occupants` within `capacity`. The order of `occupants` has no influence.
#[must_use]
pub fn decide(occupants: &[Occupant], capacity: &Resources, need: &Resources, rules: Rules) -> Decision {
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
    match victims(occupants, &missing, capacity, rules) {
        Some(victims) => Decision::Evict(victims),
        None => Decision::Wait,
    }
}

/// What is to leave because more is in memory than the capacity, which has become smaller, or of which a copy takes more
/// than was thought: the copies without a hold that are worth least, however short they have been there, no more than it
/// takes, and fewer where holds don't allow all. Nothing at all once what is in memory is within the capacity; an empty
/// list means that there is something to wait for.
///
/// Pinned copies stay, even if they are more than the capacity: they leave only when they are moved. Where there is none,
/// the copy that was used last stays, even if it alone is more: its next request would bring it back as large as it is.
#[must_use]
pub fn excess(occupants: &[Occupant], capacity: &Resources, rules: Rules) -> Option<Vec<Generation>> {
    let rules = Rules { least_residency: Duration::ZERO, ..rules };
    let stays = |one: &&Occupant| one.standing != Standing::Leaving;
    let mut spared: Vec<&Occupant> = occupants.iter().filter(stays).filter(|one| one.pinned).collect();
    if spared.is_empty() {
        spared.extend(occupants.iter().filter(stays).max_by_key(|one| (one.last_used, one.copy)));
    }
    let limit = capacity.max(&total(spared.iter().copied())?);
    if total(occupants).is_some_and(|taken| limit.covers(&taken)) {
        return None;
    }
    let missing = total(occupants.iter().filter(stays))?.saturating_sub(&limit);
    let others = occupants.iter().filter(|one| spared.iter().all(|spared| spared.copy != one.copy)).collect();
    Some(chosen(others, &missing, capacity, rules).0.into_iter().map(|one| one.copy).collect())
}

/// The copies that may leave, are worth least and free `missing`, none of which could be left out.
fn victims(occupants: &[Occupant], missing: &Resources, capacity: &Resources, rules: Rules) -> Option<Vec<Generation>> {
    let (chosen, short) = chosen(occupants.iter().collect(), missing, capacity, rules);
    short.is_zero().then(|| chosen.into_iter().map(|one| one.copy).collect())
}

/// The copies that may leave, are worth least and help to free `missing`, and what they leave missing.
fn chosen<'a>(
    occupants: Vec<&'a Occupant>,
    missing: &Resources,
    capacity: &Resources,
    rules: Rules,
) -> (Vec<&'a Occupant>, Resources) {
    let may_leave = |one: &&Occupant| {
        let stayed = rules.now.since(one.since) >= rules.least_residency;
        one.standing == Standing::Resident && one.holds == 0 && !one.pinned && stayed
    };
    let mut candidates: Vec<&Occupant> = occupants.into_iter().filter(may_leave).collect();
    candidates.sort_unstable_by(|a, b| {
        let by_use = (a.last_used, a.copy).cmp(&(b.last_used, b.copy));
        match rules.eviction {
            Eviction::Lru => by_use,
            Eviction::Cost => worth(a, b, capacity, rules.now).then(by_use),
        }
    });
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
    // A large copy may have made smaller ones before it needless: those that are worth most stay.
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

/// Which of the two is worth less: reload time by expected pause and share, compared without a division.
fn worth(a: &Occupant, b: &Occupant, capacity: &Resources, now: Instant) -> Ordering {
    // Units that keep the product within its type: microseconds, millionths of the memory. Of a copy that was found in
    // memory it is not known how long it takes to come back: no load is shorter than a millisecond.
    let reload = |one: &Occupant| one.reload.as_micros().clamp(1000, 1 << 44);
    let pause = |one: &Occupant| expected_pause(one, now).as_micros().clamp(1, 1 << 56);
    let weight = |one: &Occupant| pause(one) * share(&one.bytes, capacity);
    (reload(a) * weight(b)).cmp(&(reload(b) * weight(a)))
}

/// How long the copy can be expected to go without a use: as long as usual; and when that has passed, as if half of what
/// has passed beyond it were usual from now on.
fn expected_pause(one: &Occupant, now: Instant) -> Duration {
    let age = now.since(one.last_used);
    let usual = one.idle.unwrap_or(age);
    usual + age.saturating_sub(usual) / 2
}

/// The share of the memory that `bytes` are, in millionths, on the device where that is most.
fn share(bytes: &Resources, capacity: &Resources) -> u128 {
    const WHOLE: u128 = 1_000_000;
    let of = |(device, bytes): (Option<&str>, Bytes)| {
        let all = u128::from(capacity.on(device).0);
        (u128::from(bytes.0) * WHOLE).checked_div(all).unwrap_or(if bytes == Bytes::ZERO { 0 } else { WHOLE })
    };
    bytes.devices().map(of).max().unwrap_or(0).clamp(1, WHOLE)
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

    const LRU: Rules =
        Rules { eviction: Eviction::Lru, least_residency: Duration::ZERO, now: Instant::from_micros(100) };

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
            idle: None,
            holds,
            standing: Standing::Resident,
            since: Instant::from_micros(0),
            reload: Duration::from_secs(1),
            pinned: false,
        }
    }

    #[test]
    fn the_least_recently_used_leaves_first_and_a_held_one_stays() {
        let occupants = [resident(1, 4, 10, 1), resident(2, 4, 30, 0), resident(3, 2, 20, 0)];
        let capacity = bytes(10, 0);
        assert_eq!(decide(&occupants, &capacity, &bytes(2, 0), LRU), Decision::Evict(vec![copy(3)]));
        assert_eq!(decide(&occupants, &capacity, &bytes(3, 0), LRU), Decision::Evict(vec![copy(2)]));
        assert_eq!(decide(&occupants, &capacity, &bytes(6, 0), LRU), Decision::Evict(vec![copy(3), copy(2)]));
        assert_eq!(decide(&occupants, &capacity, &bytes(7, 0), LRU), Decision::Wait);
        assert_eq!(decide(&occupants, &capacity, &bytes(11, 0), LRU), Decision::Refuse);
    }

    #[test]
    fn by_cost_the_one_whose_memory_spares_least_leaves_first() {
        let by_cost = Rules { eviction: Eviction::Cost, ..LRU };
        let first = |occupants: &[Occupant]| match decide(occupants, &bytes(10, 0), &bytes(2, 0), by_cost) {
            Decision::Evict(victims) => victims[0],
            other => panic!("{other:?}"),
        };
        let old = resident(1, 5, 10, 0);
        let slow = Occupant { reload: Duration::from_secs(3), ..old.clone() };
        let young = resident(2, 5, 60, 0);
        assert_eq!(first(&[old.clone(), young.clone()]), copy(1), "alike but for its use");
        assert_eq!(first(&[slow, young]), copy(2), "90 us and 3 s are worth more than 40 us and 1 s");
        let often = Occupant { idle: Some(Duration::from_micros(20)), ..old.clone() };
        let seldom = Occupant { idle: Some(Duration::from_micros(80)), ..resident(2, 5, 60, 0) };
        assert_eq!(first(&[often, seldom]), copy(2), "20 us and half of 70 are less than 80");
        let small = Occupant { bytes: bytes(2, 0), ..old };
        assert_eq!(first(&[small, resident(2, 8, 50, 0)]), copy(2), "it takes less of the memory");
    }

    #[test]
    fn one_that_has_just_come_stays_for_as_long_as_it_is_to() {
        let mut new = resident(1, 10, 0, 0);
        new.since = Instant::from_micros(60);
        let least = |micros| Rules { least_residency: Duration::from_micros(micros), ..LRU };
        assert_eq!(decide(&[new.clone()], &bytes(10, 0), &bytes(1, 0), least(41)), Decision::Wait);
        assert_eq!(decide(&[new.clone()], &bytes(10, 0), &bytes(1, 0), least(40)), Decision::Evict(vec![copy(1)]));
        assert_eq!(excess(&[new, resident(2, 10, 99, 0)], &bytes(10, 0), least(41)), Some(vec![copy(1)]));
    }

    #[test]
    fn a_pinned_one_stays_under_either_policy_and_in_a_memory_that_became_too_small() {
        let pinned = Occupant { pinned: true, ..resident(1, 6, 0, 0) };
        let other = resident(2, 4, 99, 0);
        for eviction in Eviction::ALL {
            let rules = Rules { eviction, ..LRU };
            let decided = |need| decide(&[pinned.clone(), other.clone()], &bytes(10, 0), &bytes(need, 0), rules);
            assert_eq!(decided(4), Decision::Evict(vec![copy(2)]), "the one that was used last");
            assert_eq!(decided(5), Decision::Wait, "it may be unpinned, or moved");
            let shed = |size| excess(&[pinned.clone(), other.clone()], &bytes(size, 0), rules);
            assert_eq!(shed(9), Some(vec![copy(2)]));
            assert_eq!(shed(5), Some(vec![copy(2)]));
            assert_eq!(
                excess(std::slice::from_ref(&pinned), &bytes(5, 0), rules),
                None,
                "there is nothing to wait for"
            );
        }
    }

    /// Numbers from 0 to 1 that repeat with their seed.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> f64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((self.0 >> 11) as f64) / ((1_u64 << 53) as f64)
        }
    }

    /// How often, and for how long in all, models had to come back: `models` by size and reload time, asked for by
    /// Zipf's law in a shuffled order, in a memory of a third of them.
    fn reloads(eviction: Eviction, models: &[(u64, Duration)], seed: u64) -> (u64, Duration) {
        let mut random = Random(seed);
        let mut order: Vec<usize> = (0..models.len()).collect();
        for at in (1..order.len()).rev() {
            order.swap(at, (random.next() * (at + 1) as f64) as usize);
        }
        let weights: Vec<f64> = (1..=models.len()).map(|rank| 1.0 / rank as f64).collect();
        let all: f64 = weights.iter().sum();
        let capacity = bytes(models.iter().map(|(size, _)| size).sum::<u64>() / 3, 0);
        let mut resident: Vec<Occupant> = Vec::new();
        let mut uses: Vec<(Instant, Option<Duration>)> = vec![(Instant::default(), None); models.len()];
        let (mut count, mut time) = (0, Duration::ZERO);
        for request in 1..20_000_u64 {
            let mut point = random.next() * all;
            let rank = weights.iter().position(|weight| {
                point -= weight;
                point < 0.0
            });
            let wanted = order[rank.unwrap_or(0)];
            let now = Instant::from_micros(request * 1000);
            let (before, idle) = uses[wanted];
            let idle = Some(usual_idle(idle, now.since(before)));
            uses[wanted] = (now, idle);
            if let Some(found) = resident.iter_mut().find(|one| one.copy == copy(wanted as u64)) {
                (found.last_used, found.idle) = (now, idle);
                continue;
            }
            let (size, reload) = models[wanted];
            let rules = Rules { eviction, least_residency: Duration::ZERO, now };
            match decide(&resident, &capacity, &bytes(size, 0), rules) {
                Decision::Fits => {}
                Decision::Evict(victims) => resident.retain(|one| !victims.contains(&one.copy)),
                other => panic!("{other:?}"),
            }
            count += 1;
            time += reload;
            let (copy, bytes, standing) = (copy(wanted as u64), bytes(size, 0), Standing::Resident);
            let pinned = false;
            let used = Occupant { copy, bytes, last_used: now, idle, holds: 0, standing, since: now, reload, pinned };
            resident.push(used);
        }
        (count, time)
    }

    #[test]
    fn by_cost_less_time_is_spent_on_reloads_of_unequal_models_and_there_are_fewer_of_equal_ones() {
        for seed in 1..=5 {
            let mut random = Random(seed * 77);
            let unequal: Vec<(u64, Duration)> = (0..60)
                .map(|_| {
                    (
                        1 + (random.next() * 60.0) as u64,
                        Duration::from_millis(20 + (random.next().powi(3) * 8000.0) as u64),
                    )
                })
                .collect();
            let (lru, cost) = (reloads(Eviction::Lru, &unequal, seed), reloads(Eviction::Cost, &unequal, seed));
            assert!(cost.1 * 10 < lru.1 * 8, "seed {seed}: {cost:?} is not a fifth less than {lru:?}");
            let equal = vec![(10, Duration::from_millis(500)); 60];
            let (lru, cost) = (reloads(Eviction::Lru, &equal, seed), reloads(Eviction::Cost, &equal, seed));
            assert!(cost.0 * 100 < lru.0 * 95, "seed {seed}: {cost:?} is not a twentieth less than {lru:?}");
        }
    }

    #[test]
    fn what_is_leaving_counts_until_it_left_and_its_room_is_not_given_twice() {
        let mut leaving = resident(1, 6, 1, 0);
        leaving.standing = Standing::Leaving;
        let mut entering = resident(2, 6, 2, 0);
        entering.standing = Standing::Entering;
        let capacity = bytes(10, 0);
        assert_eq!(decide(&[leaving.clone()], &capacity, &bytes(6, 0), LRU), Decision::Settle);
        assert_eq!(decide(&[leaving, entering], &capacity, &bytes(6, 0), LRU), Decision::Wait);
    }

    #[test]
    fn a_device_that_the_replica_lacks_is_refused() {
        assert_eq!(decide(&[], &bytes(10, 0), &bytes(1, 1), LRU), Decision::Refuse);
    }

    fn occupants() -> impl Strategy<Value = Vec<Occupant>> {
        let one = (0..6_u64, 0..4_u64, 0..5_u64, 0..2_u32, 0..4_u8, 0..5_u64, proptest::bool::weighted(0.2));
        proptest::collection::vec(one, 0..9).prop_map(|all| {
            all.into_iter()
                .enumerate()
                .map(|(index, (primary, gpu, used, holds, standing, reload, pinned))| Occupant {
                    copy: copy(index as u64),
                    bytes: bytes(primary, gpu),
                    last_used: Instant::from_micros(used),
                    idle: None,
                    holds,
                    standing: match standing {
                        0 => Standing::Entering,
                        1 => Standing::Leaving,
                        _ => Standing::Resident,
                    },
                    since: Instant::from_micros(used * 20),
                    reload: Duration::from_millis(reload),
                    pinned,
                })
                .collect()
        })
    }

    fn rules() -> impl Strategy<Value = Rules> {
        (0..2_usize, 0..3_u64).prop_map(|(eviction, least)| Rules {
            eviction: Eviction::ALL[eviction],
            least_residency: Duration::from_micros(least * 40),
            now: Instant::from_micros(100),
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
            rules in rules(),
        ) {
            let (capacity, need) = (bytes(primary, gpu), bytes(need, need_gpu));
            let evictable: Vec<_> = occupants
                .iter()
                .filter(|one| one.standing == Standing::Resident && one.holds == 0 && !one.pinned)
                .filter(|one| rules.now.since(one.since) >= rules.least_residency)
                .map(|one| one.copy)
                .collect();
            match decide(&occupants, &capacity, &need, rules) {
                Decision::Fits => {
                    let sum = total(&occupants).expect("small").checked_add(&need).expect("small");
                    prop_assert!(capacity.covers(&sum), "over capacity");
                }
                Decision::Settle => prop_assert!(fits(&occupants, &[], &capacity, &need)),
                Decision::Evict(list) => {
                    prop_assert!(list.iter().all(|one| evictable.contains(one)), "evicts a held or pinned one, or one that has just come");
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
            rules in rules(),
        ) {
            let rules = Rules { least_residency: Duration::ZERO, ..rules };
            let occupants: Vec<_> =
                used.iter().enumerate().map(|(uid, used)| resident(uid as u64, sizes, *used, 0)).collect();
            let capacity = bytes(sizes * occupants.len() as u64, 0);
            if let Decision::Evict(list) = decide(&occupants, &capacity, &bytes(need, 0), rules) {
                let mut order: Vec<_> = occupants.iter().map(|one| (one.last_used, one.copy)).collect();
                order.sort_unstable();
                let expected: Vec<_> = order.iter().take(list.len()).map(|(_, copy)| *copy).collect();
                prop_assert_eq!(list, expected);
            }
        }

        /// However many looks it takes, and whoever holds what: what leaves is not held, not pinned, was not used last where
        /// nothing is pinned, and no more than it takes; once nothing is held the rest is within the capacity, or is what is
        /// pinned, or the one that was used last.
        #[test]
        fn a_smaller_capacity_is_reached_by_what_is_used_least(mut occupants in occupants(), size in 0..20_u64, gpu in 0..8_u64, rules in rules()) {
            let capacity = bytes(size, gpu);
            let kept = |occupants: &[Occupant]| -> Vec<Occupant> {
                let stays = || occupants.iter().filter(|one| one.standing != Standing::Leaving);
                if stays().any(|one| one.pinned) {
                    return stays().filter(|one| one.pinned).cloned().collect();
                }
                stays().max_by_key(|one| (one.last_used, one.copy)).cloned().into_iter().collect()
            };
            if let Some(victims) = excess(&occupants, &capacity, rules) {
                for one in occupants.iter().filter(|one| victims.contains(&one.copy)) {
                    prop_assert_eq!((one.holds, one.standing), (0, Standing::Resident));
                    prop_assert!(!kept(&occupants).contains(one));
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
            let limit = capacity.max(&total(&kept(&occupants)).expect("counted"));
            if let Some(victims) = excess(&occupants, &capacity, rules) {
                prop_assert!(!victims.is_empty());
                let without = |spared: Option<Generation>| -> Vec<Occupant> {
                    let stays = |one: &&Occupant| !victims.contains(&one.copy) || Some(one.copy) == spared;
                    occupants.iter().filter(stays).cloned().collect()
                };
                prop_assert_eq!(excess(&without(None), &capacity, rules), None);
                for victim in &victims {
                    prop_assert!(excess(&without(Some(*victim)), &capacity, rules).is_some(), "{victim} need not have left");
                }
                let rest = without(None);
                let taken = total(&rest).expect("counted");
                prop_assert!(limit.covers(&taken));
            } else {
                let taken = total(&occupants).expect("counted");
                prop_assert!(limit.covers(&taken));
            }
        }

        /// What placement keeps free beside the pinned copies is enough: each of the others gets in, once nothing is held.
        #[test]
        fn whoever_fits_beside_the_pinned_ones_comes_in(mut occupants in occupants(), size in 0..20_u64, need in 0..12_u64, rules in rules()) {
            let (capacity, need) = (bytes(size, 8), bytes(need, 0));
            let rules = Rules { least_residency: Duration::ZERO, ..rules };
            occupants.retain(|one| one.standing == Standing::Resident);
            occupants.iter_mut().for_each(|one| one.holds = 0);
            let pinned = total(occupants.iter().filter(|one| one.pinned)).expect("counted");
            prop_assume!(capacity.covers(&total(&occupants).expect("counted")));
            prop_assume!(capacity.covers(&pinned.checked_add(&need).expect("counted")));
            let decided = decide(&occupants, &capacity, &need, rules);
            prop_assert!(matches!(decided, Decision::Fits | Decision::Evict(_)), "{decided:?}");
        }

        #[test]
        fn the_order_of_the_occupants_does_not_matter(occupants in occupants(), size in 0..20_u64, need in 0..12_u64, rules in rules()) {
            let mut reversed = occupants.clone();
            reversed.reverse();
            prop_assert_eq!(
                decide(&occupants, &bytes(size, 8), &bytes(need, 0), rules),
                decide(&reversed, &bytes(size, 8), &bytes(need, 0), rules)
            );
        }
    }
}
