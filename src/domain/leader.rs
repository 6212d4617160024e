//! Which scheduler may command: one that goes on from every leader that was obeyed.
//!
//! The rule of this module: a journal remembers the starts that it has seen. An agent or a gateway that has obeyed
//! a start which the journal does not know has seen more than the journal: it is a copy, as after restoring a
//! backup, however often it was started since.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::time::Instant;

/// Starts that are remembered. Who obeyed an earlier one last is believed.
const REMEMBERED: usize = 1000;

/// One start of a scheduler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leader {
    /// Its leader epoch.
    pub epoch: u64,
    /// When it was; the epoch of time when that is not known. Tells it from another start of a copy of the journal.
    pub started: Instant,
}

/// The starts that a journal has seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Leaders(BTreeMap<u64, Instant>);

impl Leaders {
    /// Remembers a start, the newest.
    pub fn begin(&mut self, leader: Leader) {
        self.0.insert(leader.epoch, leader.started);
        while self.0.len() > REMEMBERED {
            self.0.pop_first();
        }
    }

    /// Whether `leader` is among those that this journal goes on from.
    #[must_use]
    pub fn know(&self, leader: Leader) -> bool {
        let Some((newest, _)) = self.0.last_key_value() else { return leader.epoch == 0 };
        let same = |started: &Instant| leader.started == Instant::default() || leader.started == *started;
        // What is older than all that is remembered was before them.
        leader.epoch <= *newest && self.0.get(&leader.epoch).is_none_or(same)
    }

    /// Why `who`, who has obeyed `leader` of `lineage`, must not be commanded from the journal of `ours`; nothing when it
    /// may be.
    #[must_use]
    pub fn outdated(&self, who: &str, lineage: &str, leader: Leader, ours: &str) -> Option<String> {
        let outdated = lineage == ours && !self.know(leader);
        let newest = self.0.last_key_value().map_or(0, |(newest, _)| *newest);
        outdated.then(|| {
            format!(
                "{who} obeyed leader epoch {} of this journal, which is at {newest}{}: the journal is older than the \
                 agents, as after restoring a backup; stop, run `wharf store adopt`, start",
                leader.epoch,
                if leader.epoch > newest { "" } else { " and knows of another" }
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leader(epoch: u64, started: u64) -> Leader {
        Leader { epoch, started: Instant::from_micros(started) }
    }

    fn leaders(starts: &[(u64, u64)]) -> Leaders {
        let mut leaders = Leaders::default();
        starts.iter().for_each(|(epoch, started)| leaders.begin(leader(*epoch, *started)));
        leaders
    }

    #[test]
    fn only_who_obeyed_starts_of_this_journal_is_commanded() {
        let journal = leaders(&[(3, 30), (4, 40)]);
        for known in [leader(4, 40), leader(3, 30), leader(2, 7), leader(4, 0), leader(0, 0)] {
            assert!(journal.know(known), "{known:?}");
        }
        // A later one; and those of a copy of the journal that was started as often, or less often.
        for unknown in [leader(5, 50), leader(9, 0), leader(4, 41), leader(3, 31)] {
            assert!(!journal.know(unknown), "{unknown:?}");
        }
    }

    #[test]
    fn what_is_told_says_what_to_do() {
        let journal = leaders(&[(3, 30), (4, 40)]);
        let outdated = |lineage, leader| journal.outdated("agent onnx-0", lineage, leader, "a");
        assert_eq!(
            (outdated("a", leader(4, 40)), outdated("b", leader(9, 9)), outdated("", leader(0, 0))),
            (None, None, None)
        );
        let said = outdated("a", leader(9, 90)).expect("it is later");
        assert!(said.starts_with("agent onnx-0 obeyed leader epoch 9 of this journal, which is at 4: "), "{said}");
        assert!(said.ends_with("stop, run `wharf store adopt`, start"), "{said}");
        let said = outdated("a", leader(4, 41)).expect("it is another");
        assert!(said.contains("obeyed leader epoch 4 of this journal, which is at 4 and knows of another: "), "{said}");
    }

    #[test]
    fn starts_are_forgotten_at_last() {
        let mut journal = Leaders::default();
        (1..=2000).for_each(|epoch| journal.begin(leader(epoch, epoch)));
        assert_eq!(journal.0.len(), REMEMBERED);
        assert!(journal.know(leader(1, 77)) && !journal.know(leader(1500, 77)));
    }
}
