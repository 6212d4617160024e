//! When nothing will be sent under an older route table any more.
//!
//! The rule of this module: a request takes a [`Guard`] *before* it looks up its route, and a change is published
//! *before* the mark of its epoch. So whoever holds a guard of an epoch has seen its routes or newer ones, and
//! once all guards of older epochs are gone, no request that looked at an older table is still to be sent. The
//! count of an epoch's guards is the reference count of its mark: no lock is taken by a request, and the last
//! guard of an epoch wakes whoever waits for it.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use arc_swap::ArcSwap;
use tokio::sync::Notify;

use crate::domain::routes::Epoch;

/// Marks of which no guard is left are swept when there are this many.
const SWEEP_AT: usize = 64;

/// Counts requests between looking up their route and being handed to a door, by epoch.
#[derive(Debug)]
pub struct Epochs {
    current: ArcSwap<Mark>,
    marks: Mutex<VecDeque<(Turn, Weak<Mark>)>>,
    drained: Arc<Notify>,
}

/// One epoch as this gateway counts it: `sequence` grows even when a new journal's epochs begin anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Turn {
    /// How many epochs came before it, here.
    pub sequence: u64,
    /// Its number in the route table's lineage.
    pub epoch: Epoch,
}

#[derive(Debug)]
struct Mark {
    drained: Arc<Notify>,
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.drained.notify_waiters();
    }
}

/// Held from the look-up of a route until the request is with its door.
#[derive(Debug)]
#[must_use = "dropping it says that nothing will be sent any more"]
pub struct Guard {
    _mark: Arc<Mark>,
}

impl Default for Epochs {
    fn default() -> Self {
        let drained = Arc::new(Notify::new());
        let mark = Arc::new(Mark { drained: Arc::clone(&drained) });
        let marks = Mutex::new(VecDeque::from([(Turn::default(), Arc::downgrade(&mark))]));
        Self { current: ArcSwap::new(mark), marks, drained }
    }
}

impl Epochs {
    /// A guard of the present epoch. Look the route up after this.
    pub fn enter(&self) -> Guard {
        Guard { _mark: self.current.load_full() }
    }

    /// Begins `epoch`, whose routes have been published already.
    pub fn advance(&self, epoch: Epoch) -> Turn {
        let mark = Arc::new(Mark { drained: Arc::clone(&self.drained) });
        let mut marks = self.marks();
        let sequence = marks.back().map_or(0, |(last, _)| last.sequence + 1);
        let turn = Turn { sequence, epoch };
        if marks.len() >= SWEEP_AT {
            // The last is the current one, and always alive.
            marks.retain(|(_, mark)| mark.strong_count() > 0);
        }
        marks.push_back((turn, Arc::downgrade(&mark)));
        self.current.store(mark);
        turn
    }

    /// The newest epoch.
    pub fn latest(&self) -> Turn {
        self.marks().back().map(|(turn, _)| *turn).unwrap_or_default()
    }

    /// The newest epoch under whose predecessors nothing will be sent any more.
    pub fn settled(&self) -> Turn {
        let mut marks = self.marks();
        while marks.len() > 1 && marks.front().is_some_and(|(_, mark)| mark.strong_count() == 0) {
            marks.pop_front();
        }
        marks.front().map(|(turn, _)| *turn).unwrap_or_default()
    }

    /// Waits until nothing will be sent under an epoch before `turn`. How long depends on the requests in flight,
    /// which have deadlines of their own.
    pub async fn settle(&self, turn: Turn) {
        loop {
            let mut drained = std::pin::pin!(self.drained.notified());
            drained.as_mut().enable();
            if self.settled().sequence >= turn.sequence {
                return;
            }
            drained.await;
        }
    }

    fn marks(&self) -> MutexGuard<'_, VecDeque<(Turn, Weak<Mark>)>> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use futures::FutureExt as _;
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Enter,
        Leave(usize),
        Advance,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![3 => Just(Step::Enter), 3 => any::<usize>().prop_map(Step::Leave), 2 => Just(Step::Advance)]
    }

    proptest! {
        #[test]
        fn an_epoch_is_settled_exactly_when_no_older_guard_is_left(steps in prop::collection::vec(step(), 1..300)) {
            let epochs = Epochs::default();
            let mut held: Vec<(u64, Guard)> = Vec::new();
            let mut now = 0;
            for step in steps {
                match step {
                    Step::Enter => held.push((now, epochs.enter())),
                    Step::Leave(_) if held.is_empty() => {}
                    Step::Leave(which) => drop(held.swap_remove(which % held.len())),
                    Step::Advance => {
                        now += 1;
                        prop_assert_eq!(epochs.advance(Epoch(now * 10)), Turn { sequence: now, epoch: Epoch(now * 10) });
                    }
                }
                let oldest = held.iter().map(|(epoch, _)| *epoch).min().unwrap_or(now);
                prop_assert_eq!(epochs.settled(), Turn { sequence: oldest, epoch: Epoch(oldest * 10) });
                let turn = Turn { sequence: now, epoch: Epoch(now * 10) };
                prop_assert_eq!(epochs.settle(turn).now_or_never().is_some(), oldest == now);
            }
        }
    }

    /// Requests on several threads look at a published number under a guard and "send" it; once an epoch is
    /// settled, no number older than it may be sent.
    #[test]
    fn nothing_is_sent_under_an_older_epoch_once_it_is_settled() {
        let epochs = Epochs::default();
        let published = AtomicU64::new(0);
        let acknowledged = AtomicU64::new(0);
        let done = AtomicBool::new(false);
        let sent = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        let guard = epochs.enter();
                        let route = published.load(Ordering::SeqCst);
                        std::hint::spin_loop();
                        let bound = acknowledged.load(Ordering::SeqCst);
                        assert!(route >= bound, "{route} is sent, {bound} was acknowledged");
                        sent.fetch_add(1, Ordering::Relaxed);
                        drop(guard);
                    }
                });
            }
            for epoch in 1..=20_000 {
                published.store(epoch, Ordering::SeqCst);
                epochs.advance(Epoch(epoch));
                let settled = epochs.settled().epoch.0;
                acknowledged.fetch_max(settled, Ordering::SeqCst);
            }
            done.store(true, Ordering::Relaxed);
        });
        assert!(sent.load(Ordering::Relaxed) > 0);
        assert_eq!(epochs.settled().epoch, Epoch(20_000));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_last_guard_wakes_the_one_who_waits() {
        let epochs = Arc::new(Epochs::default());
        for epoch in 1..500 {
            let guard = epochs.enter();
            let turn = epochs.advance(Epoch(epoch));
            let waiting = tokio::spawn({
                let epochs = Arc::clone(&epochs);
                async move { epochs.settle(turn).await }
            });
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished());
            drop(guard);
            tokio::time::timeout(std::time::Duration::from_secs(5), waiting).await.expect("woken").expect("no panic");
        }
    }

    #[test]
    fn many_epochs_under_one_slow_request_take_little_room() {
        let epochs = Epochs::default();
        let slow = epochs.enter();
        for epoch in 1..10_000 {
            epochs.advance(Epoch(epoch));
        }
        assert!(epochs.marks().len() <= SWEEP_AT + 1);
        assert_eq!(epochs.settled().epoch, Epoch(0));
        drop(slow);
        assert_eq!(epochs.settled().epoch, Epoch(9_999));
    }
}
