//! Reports on their way to the scheduler: the latest word of each copy, and never without its last one.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use crate::{
    domain::{copy::Report, version::Generation},
    rpc::agent_wire::CopyReport,
};

/// The reports that were not sent yet: at most two of each copy.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    waiting: Mutex<BTreeMap<Generation, Slot>>,
    more: Notify,
}

#[derive(Debug, Default)]
struct Slot {
    last_word: Option<CopyReport>,
    latest: Option<CopyReport>,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Generation, Slot>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a report. It replaces what waits of the same copy, except that only another last word replaces
    /// a last word.
    pub(crate) fn push(&self, report: CopyReport) {
        let mut waiting = self.lock();
        let slot = waiting.entry(report.generation).or_default();
        match report.report {
            Report::Unloaded | Report::Failed { .. } => {
                slot.latest = None;
                slot.last_word = Some(report);
            }
            Report::Scheduled
            | Report::Downloading(_)
            | Report::Loading { .. }
            | Report::Available { .. }
            | Report::Draining { .. } => slot.latest = Some(report),
        }
        drop(waiting);
        self.more.notify_one();
    }

    /// Takes the reports of up to `most` copies.
    pub(crate) fn take(&self, most: usize) -> Vec<CopyReport> {
        let mut waiting = self.lock();
        let mut taken = Vec::new();
        for _ in 0..most {
            let Some((_, slot)) = waiting.pop_first() else { break };
            taken.extend(slot.last_word);
            taken.extend(slot.latest);
        }
        if !waiting.is_empty() {
            self.more.notify_one();
        }
        taken
    }

    /// Forgets all: an inventory says it all anew.
    pub(crate) fn clear(&self) {
        self.lock().clear();
    }

    /// Waits until there may be something to take.
    pub(crate) async fn more(&self) {
        self.more.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        copy::{Failure, FailureClass, Progress},
        names::ModelName,
        version::{Uid, Version},
    };

    fn say(outbox: &Outbox, uid: u64, report: Report) {
        let generation = Generation { uid: Uid(uid), version: Version(1), number: 1 };
        outbox.push(CopyReport { model: ModelName::new("m").expect("valid"), generation, report, order: None });
    }

    #[test]
    fn the_latest_wins_and_a_last_word_stays() {
        let outbox = Outbox::default();
        say(&outbox, 1, Report::Scheduled);
        for done in 0..100 {
            say(&outbox, 1, Report::Downloading(Progress { done, total: None }));
        }
        let failed =
            Report::Failed { failure: Failure { class: FailureClass::Runtime, message: String::new() }, freed: true };
        say(&outbox, 2, Report::Loading { estimate: None });
        say(&outbox, 2, failed.clone());
        say(&outbox, 2, Report::Scheduled);
        let said: Vec<_> = outbox.take(10).into_iter().map(|one| (one.generation.uid.0, one.report)).collect();
        assert_eq!(
            said,
            [(1, Report::Downloading(Progress { done: 99, total: None })), (2, failed), (2, Report::Scheduled)]
        );
        assert!(outbox.take(10).is_empty());
    }

    #[tokio::test]
    async fn what_was_not_taken_wakes_again() {
        let outbox = Outbox::default();
        say(&outbox, 1, Report::Loading { estimate: None });
        say(&outbox, 2, Report::Loading { estimate: None });
        outbox.more().await;
        assert_eq!(outbox.take(1).len(), 1);
        outbox.more().await;
        assert_eq!(outbox.take(1).len(), 1);
    }
}
