//! A copy that the inference server has lost is noticed without a request for it.
//!
//! The rules of this module: what the server says it has is compared with what it should have, again and again, so that
//! no word about a loss is needed; the server is asked about each copy in doubt before anything is done; the audit takes
//! a small part of the server's time, however long its index is, and comes again soon all the same.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};

use super::{
    cache::{Entry, Phase},
    core::Core,
    runtimes::Indexed,
};
use crate::domain::version::Generation;

/// Copies that the server is asked about in one round. The next round goes on from there.
const ASKED: usize = 64;
/// Audits from one look at the server's memory to the next.
const LOOKS: u32 = 10;
/// The audit takes at most one part in so many of the time.
const SHARE: u32 = 20;
/// The longest pause for that: an index that took longer had to wait for something else.
const LONGEST: Duration = Duration::from_secs(60);

/// How long to wait after an index that took so long, where the settings say `every`.
fn pause(every: Duration, took: Duration) -> Duration {
    every.max(took.saturating_mul(SHARE).min(LONGEST))
}

impl Core {
    /// Compares for as long as the agent lives.
    pub(crate) async fn audit(self: Arc<Self>) {
        let mut last = None;
        let mut told = false;
        let mut took = Duration::ZERO;
        let mut rounds = 0_u32;
        loop {
            sleep(pause(self.options.audit, took)).await;
            rounds = rounds.wrapping_add(1);
            if rounds.is_multiple_of(LOOKS) {
                self.look_again().await;
            }
            // Before the index: what is loaded while it is made is not missed in it.
            let resident: Vec<Arc<Entry>> =
                self.book.all().into_iter().filter(|entry| entry.phase() == Phase::Resident).collect();
            if resident.is_empty() {
                continue;
            }
            let began = self.clock.now();
            let index = timeout(self.patience(self.options.probe_deadline), self.runtime.index()).await;
            took = self.clock.now().since(began);
            let problem = match index {
                Ok(Ok(index)) => {
                    told = false;
                    for entry in in_doubt(&resident, &index, last) {
                        last = Some(entry.generation);
                        self.suspect(entry);
                    }
                    continue;
                }
                Ok(Err(failure)) => failure.message,
                Err(_) => "it gives no index in time".to_owned(),
            };
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(replica = %self.options.replica, problem, "the inference server does not say what it has loaded");
            }
        }
    }
}

/// The copies of `resident` that `index` does not call ready, up to [`ASKED`] of them, first those behind `last`.
fn in_doubt<'a>(
    resident: &'a [Arc<Entry>],
    index: &[Indexed],
    last: Option<Generation>,
) -> impl Iterator<Item = &'a Arc<Entry>> {
    let ready: BTreeSet<&str> = index.iter().filter(|one| one.ready).map(|one| one.name.as_str()).collect();
    let missing = resident.iter().filter(|entry| !ready.contains(entry.served.as_str()));
    let (before, behind): (Vec<_>, Vec<_>) = missing.partition(|entry| Some(entry.generation) <= last);
    behind.into_iter().chain(before).take(ASKED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_index_is_asked_for_less_often_and_a_blocked_one_not_much_less() {
        let seconds = Duration::from_secs;
        assert_eq!(pause(seconds(1), Duration::from_millis(10)), seconds(1));
        assert_eq!(pause(seconds(1), Duration::from_millis(500)), seconds(10));
        assert_eq!(pause(seconds(1), seconds(600)), LONGEST, "it waited for a load");
        assert_eq!(pause(seconds(90), seconds(600)), seconds(90));
    }
}
