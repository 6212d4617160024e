//! Which copy a request goes to: the domain's choice, over what this gateway knows of its endpoints.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use super::{
    health::Health,
    route::{Entry, Place, Share},
};
use crate::domain::{
    routes::{Load, Rank, choose_endpoint, choose_target},
    time::Instant,
    version::{Generation, Version},
};

/// Random numbers for choices, not for secrets: the same seed gives the same sequence (SplitMix64).
#[derive(Debug)]
pub(super) struct Random(AtomicU64);

impl Random {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

    pub(super) const fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    pub(super) fn next(&self) -> u64 {
        let mut z = self.0.fetch_add(Self::STEP, Ordering::Relaxed).wrapping_add(Self::STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// What this gateway has seen of one copy; kept over changes of its route.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    pub(super) in_flight: AtomicUsize,
    pub(super) resident: AtomicBool,
    /// Microseconds since the epoch until which it counts as hard to reach.
    pub(super) suspect_until: AtomicU64,
    pub(super) health: Health,
}

/// A copy that was chosen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Picked<'e> {
    pub(super) share: &'e Share,
    pub(super) place: &'e Place,
    /// Whether the request finds out about a copy that is set aside.
    pub(super) probe: bool,
}

/// What a request asks of a route.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wish<'a> {
    /// This version and no other.
    pub(super) version: Option<Version>,
    /// The `x-seldon-route` that the client was given before: the same version, if it still has a share.
    pub(super) sticky: Option<&'a [u8]>,
}

/// A copy for one more attempt, not one of `tried`.
pub(super) fn pick<'e>(
    entry: &'e Entry,
    wish: Wish<'_>,
    tried: &[Generation],
    random: &Random,
    now: impl Fn() -> Instant,
) -> Option<Picked<'e>> {
    let open = |share: &Share| {
        wish.version.is_none_or(|version| version == share.version)
            && share.places.iter().any(|place| !tried.contains(&place.generation))
    };
    let same = wish.sticky.filter(|_| wish.version.is_none()).and_then(|sticky| {
        entry.shares.iter().find(|share| share.weight > 0 && open(share) && contains(sticky, share.sticky.as_bytes()))
    });
    // A version that was begun with is stayed with while it has another copy.
    let begun = || entry.shares.iter().find(|s| open(s) && tried.last().is_some_and(|last| last.version == s.version));
    let share = match same.or_else(begun) {
        Some(share) => share,
        None => match entry.shares.as_slice() {
            [only] if open(only) => only,
            shares => {
                let weights = shares.iter().map(|share| open(share).then_some(share.weight));
                &shares[choose_target(weights, random.next())?]
            }
        },
    };
    let place = match share.places.as_slice() {
        [only] => only,
        places => {
            let suspect = |place: &Place| {
                let until = place.pulse.suspect_until.load(Ordering::Relaxed);
                until != 0 && now().as_micros() < until
            };
            let untried = |place: &&Place| !tried.contains(&place.generation);
            // One whose door could not be reached just now would say nothing.
            let claims = |place: &&Place| {
                place.pulse.health.is_aside() && !suspect(place) && place.pulse.health.claim_probe(&now)
            };
            if let Some(place) = places.iter().filter(untried).find(claims) {
                return Some(Picked { share, place, probe: true });
            }
            let load = |index: usize| {
                let place: &Place = places.get(index)?;
                if tried.contains(&place.generation) {
                    return None;
                }
                let suspect = suspect(place);
                let evicted = !place.pulse.resident.load(Ordering::Relaxed);
                let in_flight = place.pulse.in_flight.load(Ordering::Relaxed);
                let aside = place.pulse.health.is_aside();
                Some(Load { rank: Rank { aside, suspect, evicted }, in_flight })
            };
            &places[choose_endpoint(places.len(), load, random.next())?]
        }
    };
    Some(Picked { share, place, probe: false })
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}
