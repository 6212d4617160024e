//! Which leader is obeyed: the one with the highest epoch of the lineage that was last welcomed.

use serde::{Deserialize, Serialize};

use crate::domain::{leader::Leader, time::Instant};

/// The highest leader epoch seen, and the lineage in which it was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// Of the journal that the leader wrote; empty before the first one.
    pub(crate) lineage: String,
    /// Of the leader.
    pub(crate) epoch: u64,
    /// When that leader started, as it said.
    #[serde(default)]
    pub(crate) started: Instant,
}

/// What to do with a leader's word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is the leader that is known.
    Known,
    /// It is a newer one: to be remembered before it is obeyed.
    Newer(Seen),
    /// A newer one was seen, or another of the same epoch.
    Stale,
}

impl Seen {
    /// Judges a welcome. Another lineage is another history, in which epochs start anew; another leader of the same
    /// epoch has a copy of the journal.
    pub(crate) fn welcome(&self, lineage: &str, leader: Leader) -> Verdict {
        let Leader { epoch, started } = leader;
        let newer = || Verdict::Newer(Self { lineage: lineage.to_owned(), epoch, started });
        if lineage != self.lineage || epoch > self.epoch {
            return newer();
        }
        let unsaid = Instant::default();
        match (epoch == self.epoch, started == self.started || started == unsaid) {
            (true, true) => Verdict::Known,
            (true, false) if self.started == unsaid => newer(),
            (true | false, false) | (false, true) => Verdict::Stale,
        }
    }

    /// Judges any later word in a session of this lineage.
    pub(crate) fn word(&self, epoch: u64) -> Verdict {
        match epoch.cmp(&self.epoch) {
            std::cmp::Ordering::Less => Verdict::Stale,
            std::cmp::Ordering::Equal => Verdict::Known,
            std::cmp::Ordering::Greater => {
                Verdict::Newer(Self { lineage: self.lineage.clone(), epoch, started: Instant::default() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(lineage: &str, epoch: u64, started: u64) -> Seen {
        Seen { lineage: lineage.to_owned(), epoch, started: Instant::from_micros(started) }
    }

    fn leader(epoch: u64, started: u64) -> Leader {
        Leader { epoch, started: Instant::from_micros(started) }
    }

    #[test]
    fn only_the_highest_epoch_of_the_lineage_is_obeyed() {
        let known = seen("a", 5, 50);
        assert_eq!(known.word(4), Verdict::Stale);
        assert_eq!(known.word(5), Verdict::Known);
        assert_eq!(known.word(6), Verdict::Newer(seen("a", 6, 0)));
        assert_eq!(known.welcome("a", leader(4, 40)), Verdict::Stale);
        assert_eq!(known.welcome("a", leader(5, 50)), Verdict::Known);
        assert_eq!(known.welcome("a", leader(6, 60)), Verdict::Newer(seen("a", 6, 60)));
        assert_eq!(known.welcome("b", leader(1, 10)), Verdict::Newer(seen("b", 1, 10)));
    }

    #[test]
    fn another_leader_of_the_same_epoch_has_a_copy_of_the_journal() {
        assert_eq!(seen("a", 5, 50).welcome("a", leader(5, 51)), Verdict::Stale);
        // One side does not say when it was.
        assert_eq!(seen("a", 5, 50).welcome("a", leader(5, 0)), Verdict::Known);
        assert_eq!(seen("a", 5, 0).welcome("a", leader(5, 50)), Verdict::Newer(seen("a", 5, 50)));
    }
}
