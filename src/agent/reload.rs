//! Evicted copies come back when a request wants them.
//!
//! The rules of this module: one reload serves all who wait; it belongs to the agent, so a request that gives
//! up ends nothing for the others; a wait has a bound and a deadline, and who is turned away is told when to
//! come again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::time::{sleep, timeout};

use super::{
    cache::{Entry, Hold, InServer, Phase},
    core::Core,
    measure::retry_after,
    residence::NoRoom,
};
use crate::domain::copy::Failure;

/// How a wait for an evicted copy ended.
#[derive(Debug)]
pub(crate) enum Back {
    /// It is in memory.
    Here(Hold),
    /// It leaves.
    NotHere,
    /// Too many wait, or it took too long; the seconds after which another try makes sense.
    Later(u64),
}

/// One waiter more, for as long as it lives.
struct Queued<'a>(&'a AtomicU32);

impl<'a> Queued<'a> {
    fn enter(count: &'a AtomicU32, most: u32) -> Option<Self> {
        let entered = count.fetch_update(SeqCst, SeqCst, |waiting| (waiting < most).then(|| waiting + 1));
        // Made only when it counts: one that is made and dropped would count down what never counted up.
        entered.is_ok().then(|| Self(count))
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Core {
    /// Waits until the copy is back in memory.
    pub(crate) async fn bring_back(self: &Arc<Self>, hold: Hold) -> Back {
        self.metrics.cache_miss.inc();
        let entry = Arc::clone(hold.entry());
        let later = || {
            self.metrics.reload_refused.inc();
            Back::Later(self.comes_back_in(&entry))
        };
        let Some(_here) = Queued::enter(&entry.waiting, self.options.reload_queue) else { return later() };
        let Some(_in_all) = Queued::enter(&self.waiting, self.options.reload_queue_total) else { return later() };
        let back = entry.until(|entry| match entry.phase() {
            Phase::Resident | Phase::Preparing | Phase::Draining | Phase::Gone => true,
            // An agent that ends brings nothing back.
            Phase::Evicted => !self.reload(hold.entry(), true),
            Phase::Evicting | Phase::Reloading => false,
        });
        if timeout(self.options.reload_wait, back).await.is_err() {
            return later();
        }
        match entry.phase() {
            Phase::Resident => Back::Here(hold),
            Phase::Preparing | Phase::Draining | Phase::Gone => Back::NotHere,
            Phase::Evicting | Phase::Evicted | Phase::Reloading => later(),
        }
    }

    /// Seconds until the copy should be back.
    pub(crate) fn comes_back_in(&self, entry: &Entry) -> u64 {
        let expected = entry.loads.average().or_else(|| self.load_times.average());
        let elapsed = if entry.phase() == Phase::Reloading { entry.reloading_for() } else { Duration::ZERO };
        retry_after(expected, elapsed)
    }

    /// Starts to bring an evicted copy back, unless that is going on. With `evict` false only free memory is
    /// used. False when the agent has ended.
    pub(crate) fn reload(self: &Arc<Self>, entry: &Arc<Entry>, evict: bool) -> bool {
        if !entry.shift(Phase::Evicted, Phase::Reloading) {
            return true;
        }
        if evict {
            // Somebody wants it. Before anything is evicted for it.
            self.scale.ghosts().returned(entry.generation, self.clock.now());
        }
        self.report(entry);
        let (core, owned) = (Arc::clone(self), Arc::clone(entry));
        let begun = self.spawn(async move { core.reloading(&owned, evict).await });
        if !begun {
            entry.shift(Phase::Reloading, Phase::Evicted);
        }
        begun
    }

    async fn reloading(self: &Arc<Self>, entry: &Arc<Entry>, evict: bool) {
        // Room first, then a turn: a large copy that waits for room must not keep small ones from their turns.
        // Whoever wanted it may have given up; nothing is evicted for nobody.
        let wanted = || !evict || entry.holds() > 0;
        let room = timeout(self.options.memory_deadline, self.make_room(entry, evict, wanted));
        match entry.unless_stopped(room).await {
            None => return,
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(NoRoom::TooLarge))) => return entry.fail(self.too_large(&entry.need())),
            Some(Ok(Err(NoRoom::Taken | NoRoom::Unwanted)) | Err(_)) => {
                entry.shift(Phase::Reloading, Phase::Evicted);
                if entry.phase().serves() {
                    self.report(entry);
                }
                return;
            }
        }
        // When it is to leave meanwhile, the task that takes it down gives its room back.
        let Some(Ok(_turn)) = entry.unless_stopped(self.reloads.acquire()).await else { return };
        self.load_again(entry).await;
    }

    /// Loads a copy that has its room and is reloading. One that can't be loaded has failed.
    pub(crate) async fn load_again(self: &Arc<Self>, entry: &Arc<Entry>) {
        let _loading = self.loading(entry);
        let mut in_server = entry.in_server.lock().await;
        let known = entry.size().is_some();
        match self.try_to_load(entry, &mut in_server).await {
            Ok(()) => {
                // Of one that drains meanwhile, the task that takes it down unloads it.
                if entry.shift(Phase::Reloading, Phase::Resident) {
                    self.report(entry);
                }
                // That task forgets the copy, and waits for the lock: this comes before.
                if !known
                    && entry.size().is_some()
                    && let Err(failure) = self.keep(entry).await
                {
                    tracing::warn!(copy = %entry.generation, error = %failure.message, "what was measured of a copy can't be kept");
                }
            }
            Err(failure) => {
                tracing::error!(copy = %entry.generation, model = %entry.model, error = %failure.message, "an evicted copy can't be brought back");
                entry.fail(failure);
            }
        }
    }

    async fn try_to_load(self: &Arc<Self>, entry: &Entry, in_server: &mut InServer) -> Result<(), Failure> {
        let mut tried = 0;
        let mut pause = Duration::from_millis(100);
        loop {
            match self.load(entry, in_server).await {
                Ok(()) => return Ok(()),
                Err(failure) => {
                    tried += 1;
                    if tried >= self.options.reload_attempts || entry.stop.is_cancelled() || !failure.class.retryable()
                    {
                        return Err(failure);
                    }
                }
            }
            sleep(pause).await;
            pause *= 2;
        }
    }

    /// The inference server seems not to know a copy that should be in its memory. If so, the copy is loaded
    /// again in the room that it has: a server that was restarted heals itself this way.
    pub(crate) fn suspect(self: &Arc<Self>, entry: &Arc<Entry>) {
        if !entry.verification_due() {
            return;
        }
        let (core, entry) = (Arc::clone(self), Arc::clone(entry));
        self.spawn(async move { core.verify(&entry).await });
    }

    async fn verify(self: &Arc<Self>, entry: &Arc<Entry>) {
        let asked = timeout(self.patience(self.options.probe_deadline), self.runtime.ready(&entry.served));
        let Ok(Ok(false)) = asked.await else { return };
        if !entry.shift(Phase::Resident, Phase::Reloading) {
            return;
        }
        tracing::warn!(copy = %entry.generation, model = %entry.model, "the inference server lost a copy; it is loaded again");
        self.metrics.lost_found.inc();
        self.report(entry);
        let Ok(_turn) = self.reloads.acquire().await else { return };
        self.load_again(entry).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_turned_away_changes_no_count() {
        let count = AtomicU32::new(0);
        let first = Queued::enter(&count, 2);
        let second = Queued::enter(&count, 2);
        assert!(first.is_some() && second.is_some());
        for _ in 0..5 {
            assert!(Queued::enter(&count, 2).is_none());
            assert_eq!(count.load(SeqCst), 2);
        }
        drop((first, second));
        assert_eq!(count.load(SeqCst), 0);
        assert!(Queued::enter(&count, 2).is_some());
    }
}
