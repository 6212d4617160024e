//! When a program that is to run is started again.
//!
//! The rules of this module: a program that ends is started again after a pause, which doubles from end to end up to a
//! longest one; one that has been well for a while begins anew with the first pause. One that ends more often than its
//! budget allows is given up, which is told, and is tried again after a rest: nothing needs a person to come back.

use std::{collections::VecDeque, time::Duration};

use super::time::Instant;

/// How patient one is with a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// How often it may be started again within `window` before it is given up.
    pub restarts: u32,
    /// The time over which its ends count.
    pub window: Duration,
    /// The pause after the first end.
    pub first: Duration,
    /// The longest pause.
    pub longest: Duration,
    /// After this long without an end its pauses begin anew.
    pub well: Duration,
    /// How long one that was given up is left alone.
    pub rest: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            restarts: 8,
            window: Duration::from_secs(300),
            first: Duration::from_millis(100),
            longest: Duration::from_secs(30),
            well: Duration::from_secs(60),
            rest: Duration::from_secs(120),
        }
    }
}

/// How a program stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It was started and does not answer yet.
    Starting,
    /// It answers.
    Ready {
        /// Since then.
        since: Instant,
    },
    /// It ended, and is started again.
    BackingOff {
        /// Then.
        until: Instant,
    },
    /// It ended too often. It is left alone, and then tried again.
    Failed {
        /// Then.
        until: Instant,
    },
}

/// What happens to a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It answers.
    Answered,
    /// It ended, could not be started, or did not answer in time and was ended.
    Ended,
    /// It was ended on purpose, to be started anew.
    Renewed,
    /// Time has passed.
    Passed,
}

/// A program's life so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upkeep {
    /// How it stands.
    pub state: State,
    /// When it ended, the latest last; those within the window, and no more than the budget and one.
    ends: VecDeque<Instant>,
    /// The next pause.
    pause: Duration,
}

impl Upkeep {
    /// A program that is being started for the first time.
    #[must_use]
    pub fn new(patience: &Patience) -> Self {
        Self { state: State::Starting, ends: VecDeque::new(), pause: patience.first }
    }

    /// How often it ended within the window, as of its last end.
    #[must_use]
    pub fn ends(&self) -> usize {
        self.ends.len()
    }

    /// What becomes of it.
    #[must_use]
    pub fn step(self, event: Event, now: Instant, patience: &Patience) -> Self {
        match (self.state, event) {
            (State::Starting, Event::Answered) => Self { state: State::Ready { since: now }, ..self },
            (State::Starting, Event::Ended) => self.ended(now, patience),
            (State::Ready { since }, Event::Ended) if now.since(since) >= patience.well => {
                Self { ends: VecDeque::new(), pause: patience.first, ..self }.ended(now, patience)
            }
            (State::Ready { .. }, Event::Ended) => self.ended(now, patience),
            // That is no end of its own: it counts for nothing, and there is no pause.
            (State::Ready { .. }, Event::Renewed) => Self { state: State::Starting, ..self },
            (State::BackingOff { until }, Event::Passed) if now >= until => Self { state: State::Starting, ..self },
            // The budget begins anew with the rest.
            (State::Failed { until }, Event::Passed) if now >= until => Self::new(patience),
            // What does not run can't end or answer, what runs waits for nothing, and a word that comes twice is one.
            (State::Starting, Event::Passed | Event::Renewed)
            | (State::Ready { .. }, Event::Answered | Event::Passed)
            | (
                State::BackingOff { .. } | State::Failed { .. },
                Event::Answered | Event::Ended | Event::Renewed | Event::Passed,
            ) => self,
        }
    }

    fn ended(mut self, now: Instant, patience: &Patience) -> Self {
        self.ends.push_back(now);
        self.ends.retain(|end| now.since(*end) <= patience.window);
        if self.ends.len() > patience.restarts as usize {
            self.state = State::Failed { until: now + patience.rest };
            return self;
        }
        self.state = State::BackingOff { until: now + self.pause };
        self.pause = (self.pause * 2).min(patience.longest);
        self
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PATIENCE: Patience = Patience {
        restarts: 3,
        window: Duration::from_secs(100),
        first: Duration::from_secs(1),
        longest: Duration::from_secs(3),
        well: Duration::from_secs(20),
        rest: Duration::from_secs(50),
    };

    fn at(seconds: u64) -> Instant {
        Instant::from_micros(seconds * 1_000_000)
    }

    fn pause(upkeep: &Upkeep, now: Instant) -> Option<u64> {
        match upkeep.state {
            State::BackingOff { until } => Some(until.since(now).as_secs()),
            State::Starting | State::Ready { .. } | State::Failed { .. } => None,
        }
    }

    #[test]
    fn pauses_double_to_the_longest_and_the_budget_ends_them() {
        let mut upkeep = Upkeep::new(&PATIENCE);
        let mut now = at(0);
        for expected in [1, 2, 3] {
            upkeep = upkeep.step(Event::Ended, now, &PATIENCE);
            assert_eq!(pause(&upkeep, now), Some(expected));
            assert_eq!(upkeep.clone().step(Event::Passed, now, &PATIENCE), upkeep, "not yet");
            now = now + Duration::from_secs(expected);
            upkeep = upkeep.step(Event::Passed, now, &PATIENCE);
            assert_eq!(upkeep.state, State::Starting);
        }
        upkeep = upkeep.step(Event::Ended, now, &PATIENCE);
        assert_eq!((upkeep.state, upkeep.ends()), (State::Failed { until: now + PATIENCE.rest }, 4));
        now = now + PATIENCE.rest;
        upkeep = upkeep.step(Event::Passed, now, &PATIENCE);
        assert_eq!(upkeep, Upkeep::new(&PATIENCE), "it is tried again, with its whole budget");
    }

    #[test]
    fn one_that_was_well_begins_anew_and_one_that_was_not_does_not() {
        let ended = Upkeep::new(&PATIENCE).step(Event::Ended, at(0), &PATIENCE).step(Event::Passed, at(1), &PATIENCE);
        let ready = ended.step(Event::Answered, at(2), &PATIENCE);
        assert_eq!(pause(&ready.clone().step(Event::Ended, at(3), &PATIENCE), at(3)), Some(2));
        let well = ready.step(Event::Ended, at(30), &PATIENCE);
        assert_eq!((pause(&well, at(30)), well.ends()), (Some(1), 1));
    }

    #[test]
    fn one_that_is_renewed_is_started_at_once_and_that_counts_for_nothing() {
        let ended = Upkeep::new(&PATIENCE).step(Event::Ended, at(0), &PATIENCE).step(Event::Passed, at(1), &PATIENCE);
        let ready = ended.clone().step(Event::Answered, at(2), &PATIENCE);
        assert_eq!(ready.step(Event::Renewed, at(3), &PATIENCE), ended);
        assert_eq!(ended.clone().step(Event::Renewed, at(3), &PATIENCE), ended, "it does not run");
    }

    proptest! {
        #[test]
        fn it_never_rests_for_ever_and_never_pauses_longer_than_said(
            events in proptest::collection::vec((0..4_u8, 0..40_u64), 0..60),
        ) {
            let mut upkeep = Upkeep::new(&PATIENCE);
            let mut now = at(0);
            for (event, passed) in events {
                now = now + Duration::from_secs(passed);
                let event = [Event::Answered, Event::Ended, Event::Renewed, Event::Passed][usize::from(event)];
                upkeep = upkeep.step(event, now, &PATIENCE);
                prop_assert!(upkeep.ends() <= PATIENCE.restarts as usize + 1);
                let until = match upkeep.state {
                    State::BackingOff { until } => until,
                    State::Failed { until } => until,
                    State::Starting | State::Ready { .. } => continue,
                };
                prop_assert!(until.since(now) <= PATIENCE.longest.max(PATIENCE.rest));
                prop_assert_eq!(upkeep.clone().step(Event::Passed, until, &PATIENCE).state, State::Starting);
            }
        }
    }
}
