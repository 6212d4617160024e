//! Which model takes its inference server down with it.
//!
//! The rules of this module: under suspicion is what the server was loading for the first time when it ended, or, when
//! there was no such thing, what it was bringing back and what it was asked then. Whoever was under suspicion at two ends within a while, and more often than anyone else who
//! was at the last one, is quarantined. Where two are as suspicious as each other nobody is: an innocent model is never
//! taken out with a guilty one. A quarantine ends by time, for it may have met an innocent one that is asked much.

use std::{collections::BTreeMap, time::Duration};

use super::{
    time::Instant,
    version::{Uid, Version},
};

/// How often one may be under suspicion within [`WINDOW`].
const ENOUGH: usize = 2;
/// The time over which ends count.
pub const WINDOW: Duration = Duration::from_secs(600);
/// How long a quarantine lasts.
pub const OUT: Duration = Duration::from_secs(1800);
/// Versions that are remembered at most, of each kind.
const MOST: usize = 1024;

/// Who may be to blame: one version of one creation of a model. Another version is another model here.
pub type Suspect = (Uid, Version);

/// What a server did when it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scene {
    /// What it was loading that had not been in its memory yet.
    pub loading: Vec<Suspect>,
    /// What it was loading again: that was well before, as it is after any end.
    pub returning: Vec<Suspect>,
    /// What had requests with it.
    pub asked: Vec<Suspect>,
}

/// A model that is kept out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Which.
    pub who: Suspect,
    /// Why, for people.
    pub why: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sighting {
    at: Instant,
    loading: bool,
}

/// What is known of all models of one server.
#[derive(Clone, Debug, Default)]
pub struct Quarantine {
    seen: BTreeMap<Suspect, Vec<Sighting>>,
    /// Who is kept out, until when, and why.
    out: BTreeMap<Suspect, (Instant, String)>,
}

impl Quarantine {
    /// Why a model is kept out, if it is.
    #[must_use]
    pub fn reason(&self, who: Suspect, now: Instant) -> Option<&str> {
        self.out.get(&who).filter(|(until, _)| now < *until).map(|(_, why)| why.as_str())
    }

    /// Whether anyone is under suspicion: then models are to be loaded one by one, so that the next end has one cause.
    #[must_use]
    pub fn suspects_anyone(&self, now: Instant) -> bool {
        self.seen.values().flatten().any(|sighting| now.since(sighting.at) <= WINDOW)
    }

    /// The server ended. Who is quarantined for it, if anyone.
    pub fn ended(&mut self, scene: &Scene, now: Instant) -> Option<Verdict> {
        for sightings in self.seen.values_mut() {
            sightings.retain(|sighting| now.since(sighting.at) <= WINDOW);
        }
        self.seen.retain(|_, sightings| !sightings.is_empty());
        // What is asked all the time is asked at every end: a load that is the first tells more. One that brings back what
        // an end took does not, for a request may come before the last is back.
        let mut here: BTreeMap<Suspect, bool> = if scene.loading.is_empty() {
            let asked = scene.asked.iter().map(|who| (*who, false));
            asked.chain(scene.returning.iter().map(|who| (*who, true))).collect()
        } else {
            scene.loading.iter().map(|who| (*who, true)).collect()
        };
        here.retain(|who, _| self.seen.len() < MOST || self.seen.contains_key(who));
        for (who, loading) in &here {
            self.seen.entry(*who).or_default().push(Sighting { at: now, loading: *loading });
        }
        let weight = |who: &Suspect| {
            let sightings = self.seen.get(who).map_or(&[][..], Vec::as_slice);
            (sightings.len(), sightings.iter().filter(|sighting| sighting.loading).count())
        };
        let most = here.keys().map(weight).max()?;
        let mut worst = here.keys().filter(|who| weight(who) == most);
        let (Some(who), None, true) = (worst.next(), worst.next(), most.0 >= ENOUGH) else { return None };
        let (who, (times, loads)) = (*who, most);
        let doing = match loads {
            0 => "it answered requests for this model",
            all if all == times => "it loaded this model",
            _ => "it loaded this model or answered requests for it",
        };
        let why = format!(
            "quarantined: the inference server ended {times} times while {doing}; it is tried again after {} minutes, or \
             resubmit the model",
            OUT.as_secs() / 60
        );
        self.seen.remove(&who);
        self.out.retain(|_, (until, _)| now < *until);
        while self.out.len() >= MOST {
            self.out.pop_first();
        }
        self.out.insert(who, (now + OUT, why.clone()));
        Some(Verdict { who, why })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn model(uid: u64) -> Suspect {
        (Uid(uid), Version(1))
    }

    fn scene(loading: &[u64], asked: &[u64]) -> Scene {
        let all = |uids: &[u64]| uids.iter().map(|uid| model(*uid)).collect();
        Scene { loading: all(loading), returning: Vec::new(), asked: all(asked) }
    }

    fn returning(returning: &[u64], asked: &[u64]) -> Scene {
        let Scene { loading, asked, .. } = scene(returning, asked);
        Scene { loading: Vec::new(), returning: loading, asked }
    }

    fn at(seconds: u64) -> Instant {
        Instant::from_micros(seconds * 1_000_000)
    }

    #[test]
    fn the_second_end_while_it_loads_is_enough() {
        let mut quarantine = Quarantine::default();
        assert_eq!(quarantine.ended(&scene(&[1], &[]), at(0)), None);
        assert!(quarantine.suspects_anyone(at(1)));
        let verdict = quarantine.ended(&scene(&[1], &[]), at(9)).expect("enough");
        assert_eq!(verdict.who, model(1));
        assert!(verdict.why.contains("ended 2 times while it loaded this model"), "{}", verdict.why);
        assert_eq!(quarantine.reason(model(1), at(9)), Some(verdict.why.as_str()));
        assert_eq!(quarantine.reason((Uid(1), Version(2)), at(9)), None, "another version may try");
        assert!(quarantine.reason(model(1), at(8 + OUT.as_secs())).is_some());
        assert_eq!(quarantine.reason(model(1), at(9 + OUT.as_secs())), None, "it may try again");
        assert_eq!(quarantine.ended(&scene(&[1], &[]), at(9 + OUT.as_secs())), None, "and begins anew");
    }

    #[test]
    fn the_only_one_that_was_asked_is_to_blame_and_two_together_are_not() {
        let mut quarantine = Quarantine::default();
        for second in 0..5 {
            assert_eq!(quarantine.ended(&scene(&[], &[1, 2]), at(second)), None, "either may be it");
        }
        let verdict = quarantine.ended(&scene(&[], &[2]), at(6)).expect("it was there once more");
        assert_eq!(verdict.who, model(2));
        assert!(verdict.why.contains("while it answered requests"), "{}", verdict.why);
    }

    #[test]
    fn what_is_asked_all_the_time_is_not_to_blame_for_what_is_loaded() {
        let mut quarantine = Quarantine::default();
        assert_eq!(quarantine.ended(&scene(&[2], &[1]), at(0)), None);
        assert_eq!(quarantine.ended(&scene(&[3], &[1]), at(1)), None, "it may have been either load");
        assert_eq!(quarantine.ended(&scene(&[], &[1]), at(2)), None, "and this is the first end without one");
        assert_eq!(quarantine.ended(&scene(&[2], &[1]), at(3)).map(|verdict| verdict.who), Some(model(2)));
    }

    #[test]
    fn what_is_brought_back_hides_nobody_and_is_told_from_what_is_asked() {
        // A request takes the server down, and the next one before all are back.
        let mut quarantine = Quarantine::default();
        assert_eq!(quarantine.ended(&scene(&[], &[1]), at(0)), None);
        assert_eq!(quarantine.ended(&returning(&[2], &[1]), at(1)).map(|verdict| verdict.who), Some(model(1)));
        // What can't come back, while another is asked.
        let mut quarantine = Quarantine::default();
        assert_eq!(quarantine.ended(&returning(&[2], &[1]), at(0)), None);
        assert_eq!(quarantine.ended(&returning(&[2], &[1]), at(1)).map(|verdict| verdict.who), Some(model(2)));
    }

    #[test]
    fn many_at_once_are_told_apart_by_loading_them_alone() {
        let mut quarantine = Quarantine::default();
        assert_eq!(quarantine.ended(&scene(&[1, 2, 3, 4], &[]), at(0)), None);
        assert_eq!(quarantine.ended(&scene(&[3], &[]), at(5)).map(|verdict| verdict.who), Some(model(3)));
    }

    #[test]
    fn what_is_long_ago_counts_no_more() {
        let mut quarantine = Quarantine::default();
        assert_eq!(quarantine.ended(&scene(&[1], &[]), at(0)), None);
        assert_eq!(quarantine.ended(&scene(&[1], &[]), at(WINDOW.as_secs() + 1)), None);
        assert_eq!(quarantine.ended(&Scene::default(), at(0)), None);
    }

    proptest! {
        #[test]
        fn nobody_is_out_who_was_not_there_twice_and_memory_is_bounded(
            scenes in proptest::collection::vec((proptest::collection::vec(0..4_u64, 0..3), proptest::collection::vec(0..4_u64, 0..3)), 0..12),
        ) {
            let mut quarantine = Quarantine::default();
            let mut times = BTreeMap::<Suspect, usize>::new();
            for (second, (loading, asked)) in scenes.iter().enumerate() {
                let scene = scene(loading, asked);
                let there: std::collections::BTreeSet<_> = scene.loading.iter().chain(&scene.asked).copied().collect();
                for who in &there {
                    *times.entry(*who).or_default() += 1;
                }
                if let Some(verdict) = quarantine.ended(&scene, at(second as u64)) {
                    prop_assert!(there.contains(&verdict.who) && times[&verdict.who] >= ENOUGH);
                }
            }
        }
    }
}
