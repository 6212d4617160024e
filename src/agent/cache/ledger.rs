//! The ledger of resident bytes: who takes memory, and who may enter it.
//!
//! The rule of this module: deciding and reserving are one step under one lock, so two decisions never see the
//! same free byte, nor an older capacity. What is decided is told by `domain::residency`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{Entry, Phase, Pressure};
use crate::domain::{
    memory::{Bytes, Resources},
    residency::{Decision, Eviction, Occupant, Rules, Standing, decide, excess},
    version::Generation,
};

/// Who takes memory.
#[derive(Debug)]
pub(crate) struct Ledger {
    room: Mutex<Room>,
    pressure: Arc<Pressure>,
}

/// The memory and who takes it.
#[derive(Debug)]
struct Room {
    capacity: Resources,
    /// Memory of the server that no copy accounts for.
    leaked: Bytes,
    /// How it is decided who leaves; without the time.
    rules: Rules,
    seats: BTreeMap<Generation, Seat>,
}

#[derive(Debug)]
struct Seat {
    entry: Arc<Entry>,
    kind: Kind,
}

/// What a seat stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Room is kept; nothing is in memory yet.
    Promised,
    /// It is, or may be, in memory.
    Taken,
    /// It is being unloaded.
    Leaving,
}

/// The answer to a wish for memory.
#[derive(Debug)]
pub(crate) enum Admission {
    /// It has its room.
    Seated,
    /// Its room is kept until these have left, each already claimed.
    Promised(Vec<Arc<Entry>>),
    /// Not before something is released.
    Wait,
    /// Never.
    TooLarge,
}

/// What became of a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// It has its room.
    Seated,
    /// What is leaving has not left yet.
    NotYet,
    /// What was to leave stays: the promise is taken back.
    Broken,
}

impl Ledger {
    pub(crate) fn new(capacity: Resources) -> Self {
        Self {
            room: Mutex::new(Room { capacity, leaked: Bytes::ZERO, rules: Rules::default(), seats: BTreeMap::new() }),
            pressure: Arc::default(),
        }
    }

    pub(crate) const fn pressure(&self) -> &Arc<Pressure> {
        &self.pressure
    }

    /// The memory there is.
    pub(crate) fn capacity(&self) -> Resources {
        self.lock().capacity.clone()
    }

    /// From now on there is this much memory. What is in it beyond that leaves by [`Ledger::shed`].
    pub(crate) fn set_capacity(&self, capacity: Resources) {
        self.lock().capacity = capacity;
        self.pressure.eased();
    }

    /// So much of the memory is taken by nothing that is known of.
    pub(crate) fn set_leaked(&self, leaked: Bytes) {
        self.lock().leaked = leaked;
        self.pressure.eased();
    }

    /// From now on it is decided so who leaves.
    pub(crate) fn set_rules(&self, eviction: Eviction, least_residency: Duration) {
        let mut room = self.lock();
        room.rules = Rules { eviction, least_residency, ..room.rules };
    }

    /// How long a copy stays at least: a wish that waits for one to have stayed asks again after that.
    pub(crate) fn least_residency(&self) -> Duration {
        self.lock().rules.least_residency
    }

    fn lock(&self) -> MutexGuard<'_, Room> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that are, or may be, in memory.
    pub(crate) fn used(&self) -> Resources {
        used(&self.lock().seats)
    }

    /// Bytes that what is in memory was seen to take, whatever is declared.
    pub(crate) fn taken(&self) -> Bytes {
        let room = self.lock();
        let seats = room.seats.values().filter(|seat| seat.kind != Kind::Promised);
        seats.fold(Bytes::ZERO, |sum, seat| Bytes(sum.0.saturating_add(seat.entry.takes().0)))
    }

    /// Asks for room for `entry`. With `evict` false nothing is evicted for it.
    pub(crate) fn admit(&self, entry: &Arc<Entry>, evict: bool) -> Admission {
        let mut room = self.lock();
        let limit = room.limit_for(entry);
        let rules = Rules { now: entry.now(), ..room.rules };
        let seats = &mut room.seats;
        if seats.contains_key(&entry.generation) {
            // It never left, or is still leaving.
            return Admission::Wait;
        }
        loop {
            let occupants: Vec<_> = seats.values().map(occupant).collect();
            let victims = match decide(&occupants, &limit, &entry.need(), rules) {
                Decision::Fits => {
                    seats.insert(entry.generation, Seat { entry: Arc::clone(entry), kind: Kind::Taken });
                    return Admission::Seated;
                }
                Decision::Refuse => return Admission::TooLarge,
                Decision::Wait => return Admission::Wait,
                Decision::Settle | Decision::Evict(_) if !evict => return Admission::Wait,
                Decision::Settle => Vec::new(),
                Decision::Evict(victims) => victims,
            };
            // A request may have taken a hold since; then the decision is made again.
            if let Some(claimed) = claim(seats, &victims) {
                seats.insert(entry.generation, Seat { entry: Arc::clone(entry), kind: Kind::Promised });
                return Admission::Promised(claimed);
            }
        }
    }

    /// Whether a promise can be kept now.
    pub(crate) fn settle(&self, entry: &Entry) -> Settled {
        let mut room = self.lock();
        let limit = room.limit_for(entry);
        let seats = &mut room.seats;
        let covers = |taken: Option<Resources>| {
            taken.and_then(|taken| taken.checked_add(&entry.need())).is_some_and(|sum| limit.covers(&sum))
        };
        let others = |seats: &BTreeMap<Generation, Seat>, count: fn(Kind) -> bool| {
            seats
                .iter()
                .filter(|(generation, seat)| **generation != entry.generation && count(seat.kind))
                .try_fold(Resources::default(), |sum, (_, seat)| sum.checked_add(&seat.entry.need()))
        };
        if covers(others(seats, |kind| kind != Kind::Promised)) {
            if let Some(seat) = seats.get_mut(&entry.generation) {
                seat.kind = Kind::Taken;
                return Settled::Seated;
            }
            return Settled::Broken;
        }
        if covers(others(seats, |kind| kind != Kind::Leaving)) {
            return Settled::NotYet;
        }
        seats.remove(&entry.generation);
        drop(room);
        self.pressure.eased();
        Settled::Broken
    }

    /// Takes back a promise that nobody waits for any more.
    pub(crate) fn forget_promise(&self, generation: Generation) {
        let mut room = self.lock();
        if room.seats.get(&generation).is_some_and(|seat| seat.kind == Kind::Promised) {
            room.seats.remove(&generation);
            drop(room);
            self.pressure.eased();
        }
    }

    /// Counts a copy that was found in memory, whether or not it fits.
    pub(crate) fn found(&self, entry: &Arc<Entry>) {
        self.lock().seats.insert(entry.generation, Seat { entry: Arc::clone(entry), kind: Kind::Taken });
    }

    /// Claims what can leave now of what is in memory beyond the capacity; nothing once all is within it. What is held,
    /// loading or leaving is asked about again.
    pub(crate) fn shed(&self) -> Option<Vec<Arc<Entry>>> {
        let mut room = self.lock();
        let Room { capacity, rules, seats, .. } = &mut *room;
        let now = seats.values().next().map(|seat| seat.entry.now()).unwrap_or_default();
        let occupants: Vec<_> = seats.values().map(occupant).collect();
        let victims = excess(&occupants, capacity, Rules { now, ..*rules })?;
        // One that a request has just taken hold of does not keep the others.
        Some(victims.iter().filter_map(|victim| claim(seats, &[*victim])).flatten().collect())
    }

    /// An unload begins.
    pub(crate) fn leaving(&self, generation: Generation) {
        self.mark(generation, Kind::Leaving);
    }

    /// An unload did not succeed.
    pub(crate) fn stays(&self, generation: Generation) {
        self.mark(generation, Kind::Taken);
    }

    fn mark(&self, generation: Generation, kind: Kind) {
        if let Some(seat) = self.lock().seats.get_mut(&generation) {
            seat.kind = kind;
        }
        self.pressure.eased();
    }

    /// Its memory is free.
    pub(crate) fn left(&self, generation: Generation) {
        self.lock().seats.remove(&generation);
        self.pressure.eased();
    }
}

impl Room {
    /// The memory without what has leaked.
    fn left(&self) -> Resources {
        let mut left = self.capacity.clone();
        left.primary = left.primary.saturating_sub(self.leaked);
        left
    }

    /// What may be in memory once `entry` is. A copy that answered before comes back, alone if need be, when the memory
    /// has become smaller than the copy: until it is somewhere else, a request for it must not fail.
    fn limit_for(&self, entry: &Entry) -> Resources {
        match entry.phase() {
            Phase::Reloading => self.left().max(&entry.need()),
            Phase::Preparing | Phase::Resident | Phase::Evicting | Phase::Evicted | Phase::Draining | Phase::Gone => {
                // What has leaked keeps no copy out that the memory is large enough for: it gets in alone.
                self.left().max(&entry.need()).min(&self.capacity)
            }
        }
    }
}

/// Claims all of `victims` and marks them leaving, or none.
fn claim(seats: &mut BTreeMap<Generation, Seat>, victims: &[Generation]) -> Option<Vec<Arc<Entry>>> {
    let mut claimed: Vec<Arc<Entry>> = Vec::with_capacity(victims.len());
    for victim in victims {
        match seats.get(victim) {
            Some(seat) if seat.entry.claim() => claimed.push(Arc::clone(&seat.entry)),
            _ => {
                for one in claimed {
                    one.shift(Phase::Evicting, Phase::Resident);
                }
                return None;
            }
        }
    }
    for victim in victims {
        if let Some(seat) = seats.get_mut(victim) {
            seat.kind = Kind::Leaving;
        }
    }
    Some(claimed)
}

fn used(seats: &BTreeMap<Generation, Seat>) -> Resources {
    seats
        .values()
        .filter(|seat| seat.kind != Kind::Promised)
        .try_fold(Resources::default(), |sum, seat| sum.checked_add(&seat.entry.need()))
        .unwrap_or_default()
}

fn occupant(seat: &Seat) -> Occupant {
    let (phase, holds) = seat.entry.snapshot();
    let standing = match (seat.kind, phase) {
        (Kind::Leaving, _) => Standing::Leaving,
        (Kind::Taken, Phase::Resident) => Standing::Resident,
        (Kind::Taken | Kind::Promised, _) => Standing::Entering,
    };
    let bytes = seat.entry.need();
    Occupant {
        copy: seat.entry.generation,
        bytes,
        last_used: seat.entry.uses().last(),
        idle: seat.entry.uses().idle(),
        holds,
        standing,
        since: seat.entry.resident_since(),
        // Others were loaded at the same time, or not: that says nothing of what this one is worth.
        reload: seat.entry.loads.min().unwrap_or_default(),
        pinned: seat.entry.is_pinned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::cache::{Acquired, entry::tests::entry};

    fn ledger(capacity: u64) -> Ledger {
        Ledger::new(Resources::primary(Bytes(capacity)))
    }

    fn seated(ledger: &Ledger, uid: u64, size: u64) -> Arc<Entry> {
        let entry = entry(uid, size, ledger.pressure());
        assert!(matches!(ledger.admit(&entry, true), Admission::Seated));
        assert!(entry.shift(Phase::Preparing, Phase::Resident));
        entry
    }

    #[test]
    fn room_is_kept_for_a_promise_and_given_when_the_victims_left() {
        let ledger = ledger(10);
        let first = seated(&ledger, 1, 6);
        let second = entry(2, 8, ledger.pressure());
        let Admission::Promised(victims) = ledger.admit(&second, true) else { panic!("evicts") };
        assert_eq!(victims.len(), 1);
        assert_eq!(ledger.settle(&second), Settled::NotYet);
        let third = entry(3, 3, ledger.pressure());
        assert!(matches!(ledger.admit(&third, true), Admission::Wait), "it is promised to the second");
        ledger.left(first.generation);
        assert!(matches!(ledger.admit(&third, true), Admission::Wait), "it is promised to the second");
        assert_eq!(ledger.settle(&second), Settled::Seated);
        assert_eq!(ledger.used(), Resources::primary(Bytes(8)));
    }

    #[test]
    fn a_promise_breaks_when_its_victim_stays() {
        let ledger = ledger(10);
        let first = seated(&ledger, 1, 6);
        let second = entry(2, 8, ledger.pressure());
        assert!(matches!(ledger.admit(&second, true), Admission::Promised(_)));
        ledger.stays(first.generation);
        assert!(first.shift(Phase::Evicting, Phase::Resident));
        assert_eq!(ledger.settle(&second), Settled::Broken);
        assert_eq!(ledger.used(), Resources::primary(Bytes(6)));
    }

    #[test]
    fn a_held_copy_makes_the_next_wait_and_an_oversized_one_evicts_nothing() {
        let ledger = ledger(10);
        let first = seated(&ledger, 1, 6);
        let large = entry(3, 11, ledger.pressure());
        assert!(matches!(ledger.admit(&large, true), Admission::TooLarge));
        assert_eq!(first.phase(), Phase::Resident);
        let Acquired::Ready(hold) = first.acquire() else { panic!("resident") };
        let second = entry(2, 8, ledger.pressure());
        assert!(matches!(ledger.admit(&second, true), Admission::Wait));
        drop(hold);
        assert!(matches!(ledger.admit(&second, false), Admission::Wait));
        assert!(matches!(ledger.admit(&second, true), Admission::Promised(_)));
    }

    #[test]
    fn a_pinned_copy_stays_until_it_is_pinned_no_more() {
        let ledger = ledger(10);
        let first = seated(&ledger, 1, 6);
        assert!(first.set_pinned(true) && !first.set_pinned(true));
        let second = entry(2, 5, ledger.pressure());
        assert!(matches!(ledger.admit(&second, true), Admission::Wait));
        ledger.set_capacity(Resources::primary(Bytes(5)));
        assert!(ledger.shed().is_none(), "not even for a memory that became too small");
        assert!(first.set_pinned(false));
        assert!(matches!(ledger.admit(&second, true), Admission::Promised(_)));
    }

    #[test]
    fn what_has_leaked_is_room_that_is_not_there_and_keeps_no_copy_out() {
        let ledger = ledger(10);
        let first = seated(&ledger, 1, 4);
        ledger.set_leaked(Bytes(3));
        let second = entry(2, 4, ledger.pressure());
        assert!(matches!(ledger.admit(&second, true), Admission::Promised(_)), "4 and 4 and 3 are more than 10");
        ledger.left(first.generation);
        assert_eq!(ledger.settle(&second), Settled::Seated);
        ledger.left(second.generation);
        assert!(matches!(ledger.admit(&entry(3, 9, ledger.pressure()), true), Admission::Seated), "alone it fits");
    }

    #[test]
    fn a_smaller_memory_sheds_until_the_rest_fits_and_never_what_is_held() {
        let ledger = ledger(12);
        let copies: Vec<_> = (1..=3).map(|uid| seated(&ledger, uid, 4)).collect();
        let Acquired::Ready(hold) = copies[0].acquire() else { panic!("resident") };
        ledger.set_capacity(Resources::primary(Bytes(4)));
        let mut left = 0;
        let mut leave = |victims: Vec<Arc<Entry>>| {
            for victim in victims {
                left += 1;
                ledger.left(victim.generation);
            }
        };
        let first = ledger.shed().expect("12 of 4");
        assert!(!first.is_empty() && first.iter().all(|one| one.generation != copies[0].generation));
        assert!(ledger.shed().expect("they have not left yet").is_empty());
        leave(first);
        drop(hold);
        while let Some(more) = ledger.shed() {
            assert!(!more.is_empty(), "nothing is held any more");
            leave(more);
        }
        assert_eq!((left, ledger.used()), (2, Resources::primary(Bytes(4))));
    }

    #[test]
    fn a_copy_that_answered_comes_back_into_a_memory_that_became_too_small_and_a_new_one_does_not() {
        let ledger = ledger(10);
        let (large, small) = (seated(&ledger, 1, 6), seated(&ledger, 2, 3));
        ledger.set_capacity(Resources::primary(Bytes(4)));
        assert!(large.claim() && large.shift(Phase::Evicting, Phase::Evicted));
        ledger.left(large.generation);
        assert!(large.shift(Phase::Evicted, Phase::Reloading));
        let Admission::Promised(victims) = ledger.admit(&large, true) else { panic!("alone it may come back") };
        assert_eq!(victims.len(), 1);
        ledger.left(small.generation);
        assert_eq!(ledger.settle(&large), Settled::Seated);
        assert!(matches!(ledger.admit(&entry(3, 6, ledger.pressure()), true), Admission::TooLarge));
    }
}
