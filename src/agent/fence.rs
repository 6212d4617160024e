//! Which leader is obeyed: the one with the highest epoch of the lineage that was last welcomed.

use serde::{Deserialize, Serialize};

/// The highest leader epoch seen, and the lineage in which it was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// Of the journal that the leader wrote; empty before the first one.
    pub(crate) lineage: String,
    /// Of the leader.
    pub(crate) epoch: u64,
}

/// What to do with a leader's word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is the leader that is known.
    Known,
    /// It is a newer one: to be remembered before it is obeyed.
    Newer(Seen),
    /// A newer one was seen.
    Stale,
}

impl Seen {
    /// Judges a welcome. Another lineage is another history, in which epochs start anew.
    pub(crate) fn welcome(&self, lineage: &str, epoch: u64) -> Verdict {
        if lineage == self.lineage {
            self.word(epoch)
        } else {
            Verdict::Newer(Self { lineage: lineage.to_owned(), epoch })
        }
    }

    /// Judges any later word in a session of this lineage.
    pub(crate) fn word(&self, epoch: u64) -> Verdict {
        match epoch.cmp(&self.epoch) {
            std::cmp::Ordering::Less => Verdict::Stale,
            std::cmp::Ordering::Equal => Verdict::Known,
            std::cmp::Ordering::Greater => Verdict::Newer(Self { lineage: self.lineage.clone(), epoch }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_highest_epoch_of_the_lineage_is_obeyed() {
        let seen = Seen { lineage: "a".to_owned(), epoch: 5 };
        assert_eq!(seen.word(4), Verdict::Stale);
        assert_eq!(seen.word(5), Verdict::Known);
        assert_eq!(seen.word(6), Verdict::Newer(Seen { lineage: "a".to_owned(), epoch: 6 }));
        assert_eq!(seen.welcome("a", 4), Verdict::Stale);
        assert_eq!(seen.welcome("b", 1), Verdict::Newer(Seen { lineage: "b".to_owned(), epoch: 1 }));
    }
}
