//! When a replica whose inference server leaks is emptied, and its server ended and started anew.
//!
//! The rules of this module: of a server one replica at a time is recycled; an inference server is ended only when no
//! copy is there; every turn ends, and a replica whose copies find no other place goes on as it was; what leaks again at
//! once is left alone for longer each time, and after a few times it is only told of.

use std::{collections::BTreeMap, time::Duration};

use super::time::Instant;

/// How patient one is with leaks, and with those that are to be ended for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// How long a leak has to last.
    pub lasting: Duration,
    /// How long none of the copies that are left may find another place.
    pub stuck: Duration,
    /// How long it may take until one copy less is there, or until the server is back.
    pub longest: Duration,
    /// A leak that is back within this time was back at once.
    pub at_once: Duration,
    /// How long a replica is left alone after a turn in vain; after leaks that were back at once it doubles.
    pub pause: Duration,
    /// Leaks in a row that were back at once, after which it is only told.
    pub tries: u32,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            lasting: Duration::from_secs(60),
            stuck: Duration::from_secs(30),
            longest: Duration::from_secs(1800),
            at_once: Duration::from_secs(600),
            pause: Duration::from_secs(1800),
            tries: 3,
        }
    }
}

/// A replica as it is seen now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Its index.
    pub index: u32,
    /// The run of its inference server; nothing while that does not answer, or when its agent does not run it.
    pub run: Option<u64>,
    /// Whether its agent is heard, and nobody else keeps copies from it.
    pub free: bool,
    /// Whether its server leaks more than it may.
    pub leaks: bool,
    /// Copies there, or on their way; asked only of the one whose turn it is.
    pub copies: usize,
    /// Of those, how many find no other place.
    pub stuck: usize,
}

/// What is to be done, or has become of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// The copies of this replica are to leave it.
    Begin(u32),
    /// The run of this replica's server is to end.
    End {
        /// The replica.
        index: u32,
        /// The run.
        run: u64,
    },
    /// Another run has begun: the replica takes copies again.
    Done {
        /// The replica.
        index: u32,
        /// How long all of it took.
        took: Duration,
    },
    /// Its turn is over, and it takes copies again.
    GivenUp {
        /// The replica.
        index: u32,
        /// Why.
        why: Why,
    },
}

/// Why a turn ended without another run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// No copy that is left finds another place.
    NoPlace,
    /// It took too long.
    Late,
    /// The server has given the memory back.
    GivenBack,
    /// Its agent is silent, or somebody else decides about its copies.
    Interrupted,
}

impl Why {
    /// A sentence's end, after "because".
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoPlace => "nothing else has room for its copies",
            Self::Late => "it took too long",
            Self::GivenBack => "its server has given the memory back",
            Self::Interrupted => "its agent is silent, or somebody else decides about its copies",
        }
    }
}

/// How a leaking replica stands, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stand {
    /// Its server is none of its agent's: somebody else has to end it.
    Foreign,
    /// It is looked whether the leak lasts, another replica's turn is waited for, or a pause.
    Waits,
    /// It is its turn.
    Turn,
    /// Nothing else had room for its copies; it is tried again after a pause.
    NoPlace,
    /// It leaked again at once, so many times.
    Hopeless(u32),
}

/// The turns of one server.
#[derive(Clone, Debug, Default)]
pub struct Recycling {
    turn: Option<Turn>,
    pasts: BTreeMap<u32, Past>,
}

/// The turn of a replica.
#[derive(Clone, Copy, Debug)]
struct Turn {
    index: u32,
    run: u64,
    began: Instant,
    /// When a copy left last.
    step: Instant,
    copies: usize,
    stuck: Option<Instant>,
}

/// What is known of a replica from before.
#[derive(Clone, Copy, Debug, Default)]
struct Past {
    /// Since when it leaks, or, while it does not, since when it is well.
    leaks: Option<Instant>,
    well: Option<Instant>,
    /// The end of its last turn that came to another run, until it is known how long that was good for.
    recycled: Option<Instant>,
    /// Leaks in a row that were back at once.
    returns: u32,
    pause: Option<Instant>,
    no_place: bool,
}

impl Past {
    /// Whether its leak has lasted, and it is neither hopeless nor to be left alone.
    fn notice(&mut self, look: &Look, now: Instant, patience: &Patience) -> bool {
        if !look.leaks {
            self.leaks = None;
            if now.since(*self.well.get_or_insert(now)) > patience.at_once {
                (self.returns, self.no_place) = (0, false);
            }
            return false;
        }
        self.well = None;
        let since = *self.leaks.get_or_insert(now);
        if now.since(since) < patience.lasting {
            return false;
        }
        if let Some(recycled) = self.recycled.take() {
            if since.since(recycled) <= patience.at_once {
                self.back_at_once(recycled, patience);
            } else {
                self.returns = 0;
            }
        }
        self.returns < patience.tries && self.pause.is_none_or(|until| now >= until)
    }

    fn back_at_once(&mut self, recycled: Instant, patience: &Patience) {
        let doubled = patience.pause.saturating_mul(1_u32.checked_shl(self.returns).unwrap_or(u32::MAX));
        self.pause = Some(recycled + doubled);
        self.returns = self.returns.saturating_add(1);
    }
}

impl Recycling {
    /// The replica whose turn it is: its copies are to leave it.
    #[must_use]
    pub fn turn(&self) -> Option<u32> {
        self.turn.map(|turn| turn.index)
    }

    /// Looks at all replicas of the server. No turn begins while the server is `busy`: another replica of it is being
    /// emptied for another reason.
    pub fn look(&mut self, looks: &[Look], busy: bool, now: Instant, patience: &Patience) -> Vec<Deed> {
        self.pasts.retain(|index, _| looks.iter().any(|look| look.index == *index));
        let mut due = Vec::new();
        for look in looks {
            let past = self.pasts.entry(look.index).or_default();
            if past.notice(look, now, patience) && look.free {
                due.extend(look.run.map(|run| (look, run)));
            }
        }
        if let Some(turn) = self.turn.take() {
            let look = looks.iter().find(|look| look.index == turn.index);
            return look.and_then(|look| self.go_on(turn, look, now, patience)).into_iter().collect();
        }
        let Some((look, run)) = due.into_iter().next().filter(|_| !busy) else { return Vec::new() };
        let index = look.index;
        self.turn = Some(Turn { index, run, began: now, step: now, copies: usize::MAX, stuck: None });
        vec![Deed::Begin(index)]
    }

    /// What becomes of a turn. It is over unless it is put back.
    fn go_on(&mut self, mut turn: Turn, look: &Look, now: Instant, patience: &Patience) -> Option<Deed> {
        let index = turn.index;
        let past = self.pasts.entry(index).or_default();
        let mut give_up = |why: Why| {
            match why {
                Why::NoPlace | Why::Late => past.pause = Some(now + patience.pause),
                // It may only seem to leak while its copies are there.
                Why::GivenBack => past.back_at_once(now, patience),
                Why::Interrupted => {}
            }
            past.no_place = why == Why::NoPlace;
            Some(Deed::GivenUp { index, why })
        };
        if look.run.is_some_and(|run| run != turn.run) {
            *past = Past { recycled: Some(now), returns: past.returns, ..Past::default() };
            return Some(Deed::Done { index, took: now.since(turn.began) });
        }
        if !look.free {
            return give_up(Why::Interrupted);
        }
        if look.run.is_some() && !look.leaks {
            return give_up(Why::GivenBack);
        }
        if look.copies < turn.copies {
            turn.step = now;
        }
        turn.copies = look.copies;
        turn.stuck = if look.copies > 0 && look.stuck >= look.copies { turn.stuck.or(Some(now)) } else { None };
        if turn.stuck.is_some_and(|since| now.since(since) >= patience.stuck) {
            return give_up(Why::NoPlace);
        }
        if now.since(turn.step) > patience.longest {
            return give_up(Why::Late);
        }
        self.turn = Some(turn);
        // Again and again, until another run is seen.
        look.run.filter(|_| look.copies == 0).map(|run| Deed::End { index, run })
    }

    /// How a replica that leaks stands. `run` is that of its server, if its agent runs it; without patience no server is
    /// ended for its leak.
    #[must_use]
    pub fn stand(&self, index: u32, run: Option<u64>, patience: Option<&Patience>) -> Stand {
        let past = self.pasts.get(&index).copied().unwrap_or_default();
        if self.turn() == Some(index) {
            return Stand::Turn;
        }
        let (Some(_), Some(patience)) = (run, patience) else { return Stand::Foreign };
        match (past.returns >= patience.tries, past.no_place) {
            (true, _) => Stand::Hopeless(past.returns),
            (false, true) => Stand::NoPlace,
            (false, false) => Stand::Waits,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PATIENCE: Patience = Patience {
        lasting: Duration::from_secs(5),
        stuck: Duration::from_secs(3),
        longest: Duration::from_secs(20),
        at_once: Duration::from_secs(60),
        pause: Duration::from_secs(100),
        tries: 3,
    };

    fn at(seconds: u64) -> Instant {
        Instant::from_micros(seconds * 1_000_000)
    }

    /// One that leaks, and has two copies.
    fn leaking(index: u32, run: u64) -> Look {
        Look { index, run: Some(run), free: true, leaks: true, copies: 2, stuck: 0 }
    }

    /// A turn that began with run 7 of replica 0 at second 5.
    fn begun() -> Recycling {
        let mut recycling = Recycling::default();
        assert_eq!(recycling.look(&[leaking(0, 7)], false, at(0), &PATIENCE), []);
        assert_eq!(recycling.look(&[leaking(0, 7)], false, at(4), &PATIENCE), [], "it may not last");
        assert_eq!(recycling.look(&[leaking(0, 7)], false, at(5), &PATIENCE), [Deed::Begin(0)]);
        recycling
    }

    #[test]
    fn a_replica_is_emptied_its_server_ended_and_taken_into_service_again() {
        let mut recycling = begun();
        assert_eq!(recycling.turn(), Some(0));
        let end = [Deed::End { index: 0, run: 7 }];
        for (copies, run, second, deeds) in [
            (2, Some(7), 6, &[][..]),
            (1, Some(7), 20, &[]),
            (0, Some(7), 30, &end),
            (0, Some(7), 31, &end),
            (0, None, 32, &[]),
            (0, Some(8), 40, &[Deed::Done { index: 0, took: Duration::from_secs(35) }]),
        ] {
            let look = Look { copies, run, leaks: run == Some(7), ..leaking(0, 7) };
            assert_eq!(recycling.look(&[look], false, at(second), &PATIENCE), deeds, "second {second}");
        }
        assert_eq!(recycling.turn(), None);
    }

    #[test]
    fn one_at_a_time_and_none_while_another_is_emptied() {
        let mut recycling = begun();
        let both = [leaking(0, 7), leaking(1, 7)];
        for second in 6..20 {
            assert_eq!(recycling.look(&both, false, at(second), &PATIENCE), []);
        }
        let back = [Look { run: Some(8), leaks: false, ..leaking(0, 7) }, leaking(1, 7)];
        assert!(matches!(recycling.look(&back, false, at(20), &PATIENCE)[..], [Deed::Done { index: 0, .. }]));
        assert_eq!(recycling.look(&back, true, at(21), &PATIENCE), [], "an edit goes first");
        assert_eq!(recycling.look(&back, false, at(22), &PATIENCE), [Deed::Begin(1)]);
    }

    #[test]
    fn a_turn_in_vain_ends_and_the_next_one_is_not_soon() {
        let cases = [
            (Look { stuck: 2, ..leaking(0, 7) }, 3, Why::NoPlace),
            (Look { stuck: 1, ..leaking(0, 7) }, 21, Why::Late),
            (Look { leaks: false, ..leaking(0, 7) }, 0, Why::GivenBack),
            (Look { free: false, ..leaking(0, 7) }, 0, Why::Interrupted),
        ];
        for (look, lasts, why) in cases {
            let mut recycling = begun();
            for second in 6..6 + lasts {
                assert_eq!(recycling.look(&[look], false, at(second), &PATIENCE), [], "{why:?} {second}");
            }
            let deeds = recycling.look(&[look], false, at(6 + lasts), &PATIENCE);
            assert_eq!((deeds, recycling.turn()), (vec![Deed::GivenUp { index: 0, why }], None));
            let next = (6 + lasts..500)
                .find(|second| !recycling.look(&[leaking(0, 7)], false, at(*second), &PATIENCE).is_empty());
            // Whoever interrupted it decides when there is a leak again.
            let pause = if why == Why::Interrupted { 0 } else { PATIENCE.pause.as_secs() };
            assert_eq!(next, Some(6 + lasts + pause), "{why:?}");
        }
    }

    #[test]
    fn a_server_that_nobody_here_started_is_only_told_of() {
        let mut recycling = Recycling::default();
        for second in 0..1000 {
            let foreign = Look { run: None, ..leaking(0, 7) };
            assert_eq!(recycling.look(&[foreign], false, at(second), &PATIENCE), []);
        }
        assert_eq!(recycling.stand(0, None, Some(&PATIENCE)), Stand::Foreign);
        assert_eq!(recycling.stand(0, Some(7), None), Stand::Foreign);
        assert_eq!(recycling.stand(0, Some(7), Some(&PATIENCE)), Stand::Waits);
    }

    /// Ends of a server that leaks so many seconds after each start, in so many seconds.
    fn ends(after: u64, seconds: u64) -> (Vec<u64>, Recycling) {
        let (mut recycling, mut run, mut started, mut ends) = (Recycling::default(), 1, 0, Vec::new());
        for second in 0..seconds {
            let look = Look { run: Some(run), leaks: second >= started + after, copies: 0, ..leaking(0, 0) };
            for deed in recycling.look(&[look], false, at(second), &PATIENCE) {
                if let Deed::End { .. } = deed {
                    (run, started) = (run + 1, second);
                    ends.push(second);
                }
            }
        }
        (ends, recycling)
    }

    #[test]
    fn what_leaks_at_once_is_left_alone_for_longer_and_then_for_good_and_what_leaks_slowly_is_not() {
        let (quick, recycling) = ends(10, 100_000);
        let pauses: Vec<u64> = quick.windows(2).map(|two| two[1] - two[0]).collect();
        // The pause counts from the next run, a second after the end of the one before; and a turn takes two looks.
        assert_eq!(pauses, [102, 202], "{quick:?}");
        assert_eq!(recycling.stand(0, Some(9), Some(&PATIENCE)), Stand::Hopeless(3));
        let (slow, recycling) = ends(1000, 100_000);
        assert!(slow.len() > 90, "{slow:?}");
        assert_eq!(recycling.stand(0, Some(9), Some(&PATIENCE)), Stand::Waits);
    }

    proptest! {
        #[test]
        fn a_server_ends_only_when_it_is_empty_and_only_the_one_whose_turn_it_is(
            looks in proptest::collection::vec(
                (proptest::collection::vec((0..3_u64, any::<bool>(), any::<bool>(), 0..3_usize, 0..3_usize), 3), 0..8_u64),
                0..80,
            ),
        ) {
            let (mut recycling, mut turn, mut now) = (Recycling::default(), None, at(0));
            for (replicas, passed) in looks {
                now = now + Duration::from_secs(passed);
                let looks: Vec<Look> = (0..).zip(replicas).map(|(index, (run, free, leaks, copies, stuck))| {
                    // They leak and are free more often than not, or nothing would ever come of it.
                    Look { index, run: Some(run).filter(|run| *run != 0), free: free || run == 1, leaks: leaks || run == 1, copies, stuck }
                }).collect();
                for deed in recycling.look(&looks, false, now, &PATIENCE) {
                    match deed {
                        Deed::Begin(index) => {
                            let look = looks[index as usize];
                            prop_assert!(turn.is_none() && look.free && look.leaks);
                            turn = Some((index, look.run));
                        }
                        Deed::End { index, run } => {
                            prop_assert_eq!(turn, Some((index, Some(run))));
                            prop_assert_eq!((looks[index as usize].copies, looks[index as usize].run), (0, Some(run)));
                        }
                        Deed::Done { index, .. } | Deed::GivenUp { index, .. } => {
                            prop_assert_eq!(turn.take().map(|(whose, _)| whose), Some(index));
                        }
                    }
                }
                prop_assert_eq!(recycling.turn(), turn.map(|(index, _)| index));
            }
        }
    }
}
