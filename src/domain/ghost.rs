//! What more memory would have spared: a list of copies that were evicted, and of those that had to come back.
//!
//! The rules of this module: an eviction that nobody missed says nothing; a copy would have stayed if there had been
//! room for it and for all that was evicted after it; both lists are bounded, and what fell off counts as what no
//! memory would have spared.

use std::{collections::VecDeque, time::Duration};

use super::{memory::Bytes, time::Instant, version::Generation};

/// Evicted copies that are remembered.
const GHOSTS: usize = 4096;
/// Returns that are remembered.
const RETURNS: usize = 4096;
/// How long a return counts.
pub const WINDOW: Duration = Duration::from_secs(3600);
/// The share of the returns, in percent, that the advised memory spares at least.
const WORTHWHILE: usize = 50;

/// Copies that were evicted, the last one first, and returns in the last window, the last one last.
#[derive(Clone, Debug, Default)]
pub struct Ghosts {
    evicted: VecDeque<(Generation, Bytes)>,
    returns: VecDeque<(Instant, Option<Bytes>)>,
}

/// What more memory would have spared in the last window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Advice {
    /// Copies that had to come back.
    pub returns: u32,
    /// With so much more memory ...
    pub more: Bytes,
    /// ... so many percent of them would have stayed. 0 when no memory that is known of would have spared half.
    pub spared_percent: u32,
}

/// What an agent says of its replica's memory, beside what is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Strain {
    /// Memory of the inference server that no copy accounts for.
    pub leaked: Bytes,
    /// What more memory would have spared.
    pub advice: Advice,
}

impl Strain {
    /// Whether more leaks than `leak_percent` of `capacity`. A few megabytes are no leak.
    #[must_use]
    pub fn leaks(&self, capacity: Bytes, leak_percent: u32) -> bool {
        self.leaked > SMALL && u128::from(self.leaked.0) * 100 > u128::from(capacity.0) * u128::from(leak_percent)
    }

    /// What an operator should know of it, a sentence each, to follow the replica's name: what is done about a leak, if
    /// it leaks, and returns from [`MANY`] on.
    #[must_use]
    pub fn conditions(&self, leak: Option<&str>) -> Vec<String> {
        let mut conditions = Vec::new();
        conditions.extend(
            leak.map(|remedy| format!("leaks: its server keeps {} that no model accounts for; {remedy}", self.leaked)),
        );
        let Advice { returns, more, spared_percent } = self.advice;
        if returns >= MANY {
            let remedy = match spared_percent {
                0 => "no memory that is known of would have spared half of them".to_owned(),
                percent => format!("with {more} more memory {percent} % of them would have stayed"),
            };
            conditions
                .push(format!("thrashes: {returns} evicted copies had to come back within the last hour; {remedy}"));
        }
        conditions
    }
}

/// A leak that nobody has to do anything about, however small the memory is.
const SMALL: Bytes = Bytes(16 << 20);

/// Returns within [`WINDOW`] from which on an operator is told.
pub const MANY: u32 = 20;

impl Ghosts {
    /// A copy was evicted.
    pub fn evicted(&mut self, copy: Generation, bytes: Bytes) {
        self.gone(copy);
        self.evicted.push_front((copy, bytes));
        self.evicted.truncate(GHOSTS);
    }

    /// A copy that was evicted is wanted back, and nothing was evicted for that yet.
    pub fn returned(&mut self, copy: Generation, now: Instant) {
        let at = self.evicted.iter().position(|(other, _)| *other == copy);
        let sum = |at| self.evicted.iter().take(at).fold(0_u64, |sum, (_, bytes)| sum.saturating_add(bytes.0));
        let missing = at.map(|at| Bytes(sum(at + 1)));
        self.gone(copy);
        if self.returns.len() == RETURNS {
            self.returns.pop_front();
        }
        self.returns.push_back((now, missing));
    }

    /// A copy left for good.
    pub fn gone(&mut self, copy: Generation) {
        self.evicted.retain(|(other, _)| *other != copy);
    }

    /// The least memory that would have spared half of the returns in the window before `now`, or more.
    pub fn advice(&mut self, now: Instant) -> Advice {
        while self.returns.front().is_some_and(|(at, _)| now.since(*at) >= WINDOW) {
            self.returns.pop_front();
        }
        let returns = self.returns.len();
        let mut missing: Vec<Bytes> = self.returns.iter().filter_map(|(_, missing)| *missing).collect();
        missing.sort_unstable();
        let count = u32::try_from(returns).unwrap_or(u32::MAX);
        let needed = (returns * WORTHWHILE).div_ceil(100);
        let Some(more) = needed.checked_sub(1).and_then(|at| missing.get(at)).copied() else {
            return Advice { returns: count, ..Advice::default() };
        };
        let spared = missing.partition_point(|bytes| *bytes <= more);
        Advice { returns: count, more, spared_percent: u32::try_from(spared * 100 / returns.max(1)).unwrap_or(0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::version::{Uid, Version};

    fn copy(uid: u64) -> Generation {
        Generation { uid: Uid(uid), version: Version(1), number: 1 }
    }

    fn at(seconds: u64) -> Instant {
        Instant::from_micros(seconds * 1_000_000)
    }

    #[test]
    fn two_that_take_turns_would_both_stay_with_the_memory_of_one_more() {
        let mut ghosts = Ghosts::default();
        for second in 0..10 {
            // It is wanted back before the other is evicted for it.
            ghosts.returned(copy((second + 1) % 2), at(second));
            ghosts.evicted(copy(second % 2), Bytes(7));
        }
        let advice = ghosts.advice(at(10));
        assert_eq!((advice.returns, advice.more, advice.spared_percent), (10, Bytes(7), 90));
    }

    #[test]
    fn an_operator_is_told_of_large_leaks_and_of_many_returns() {
        let advice = |returns, spared_percent| Advice { returns, more: Bytes(1 << 20), spared_percent };
        let said = |leaked: u64, advice| {
            let strain = Strain { leaked: Bytes(leaked << 20), advice };
            strain.conditions(strain.leaks(Bytes(1000 << 20), 10).then_some("restart it")).join("; ")
        };
        assert_eq!(said(100, advice(MANY - 1, 60)), "");
        assert!(said(101, advice(0, 0)).contains("keeps 101 MiB that no model accounts for; restart it"));
        let small =
            |leaked: u64| Strain { leaked: Bytes(leaked << 20), advice: advice(0, 0) }.leaks(Bytes(1 << 20), 10);
        assert!(!small(16) && small(17), "a few megabytes are no leak");
        assert!(said(0, advice(MANY, 60)).contains("with 1 MiB more memory 60 % of them"));
        assert!(said(0, advice(MANY, 0)).contains("no memory that is known of"));
    }

    #[test]
    fn what_was_evicted_after_it_counts_too_and_what_left_for_good_does_not() {
        let mut ghosts = Ghosts::default();
        (1..=3).for_each(|uid| ghosts.evicted(copy(uid), Bytes(10)));
        ghosts.gone(copy(2));
        ghosts.returned(copy(1), at(1));
        assert_eq!(ghosts.advice(at(2)), Advice { returns: 1, more: Bytes(20), spared_percent: 100 });
        assert_eq!(ghosts.advice(at(2) + WINDOW), Advice::default());
    }

    #[test]
    fn what_is_not_remembered_is_advised_nothing_about_and_the_lists_are_bounded() {
        let mut ghosts = Ghosts::default();
        ghosts.returned(copy(1), at(1));
        assert_eq!(ghosts.advice(at(2)), Advice { returns: 1, ..Advice::default() });
        for uid in 0..2 * GHOSTS as u64 {
            ghosts.evicted(copy(uid), Bytes(1));
            ghosts.returned(copy(0), at(2));
        }
        assert!(ghosts.evicted.len() <= GHOSTS && ghosts.returns.len() <= RETURNS);
    }
}
