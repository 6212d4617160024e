//! Into memory and out of it: room, loads, unloads, evictions.
//!
//! The rules of this module: nothing is loaded without room in the ledger, and nothing gives its room back
//! before the inference server has said that it is out of memory.

use std::{sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};

use super::{
    cache::{Admission, Entry, InServer, Phase, Settled},
    core::Core,
};
use crate::domain::{
    copy::{Failure, FailureClass},
    memory::Resources,
};

/// Why there is no room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NoRoom {
    /// There never will be.
    TooLarge,
    /// Not without evicting, which was not allowed.
    Taken,
    /// Nobody wants it any more.
    Unwanted,
}

/// Pause after an unload that failed, before another is tried.
const AFTER_FAILURE: Duration = Duration::from_millis(100);
/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Takes an unkept promise back when the wait for it is given up.
struct Promise<'a>(&'a Core, &'a Entry);

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        self.0.ledger.forget_promise(self.1.generation);
    }
}

impl Core {
    /// Waits until `entry` has its room in the ledger; evicts others for it when `evict` says so. It has the
    /// room when this returns `Ok`, and only then. The caller sets the deadline. `wanted` is asked again
    /// whenever the wait goes on.
    pub(crate) async fn make_room(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        evict: bool,
        wanted: impl Fn() -> bool,
    ) -> Result<(), NoRoom> {
        let waiting = self.ledger.pressure().enter();
        let _promise = Promise(self, entry);
        loop {
            let changed = waiting.changed().notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if !wanted() {
                return Err(NoRoom::Unwanted);
            }
            match self.ledger.admit(entry, evict) {
                Admission::Seated => return Ok(()),
                Admission::TooLarge => return Err(NoRoom::TooLarge),
                Admission::Wait if !evict => return Err(NoRoom::Taken),
                // Time alone may let one leave.
                Admission::Wait => match self.ledger.least_residency() {
                    Duration::ZERO => changed.await,
                    least => drop(timeout(least, changed).await),
                },
                Admission::Promised(victims) => {
                    self.evict_all(victims);
                    if self.settled(entry, waiting.changed()).await {
                        return Ok(());
                    }
                    // A victim could not be unloaded. It is resident again.
                    sleep(AFTER_FAILURE).await;
                }
            }
        }
    }

    /// Waits until the promise to `entry` is kept or broken.
    async fn settled(&self, entry: &Entry, changed: &tokio::sync::Notify) -> bool {
        loop {
            let again = changed.notified();
            tokio::pin!(again);
            again.as_mut().enable();
            match self.ledger.settle(entry) {
                Settled::Seated => return true,
                Settled::Broken => return false,
                Settled::NotYet => again.await,
            }
        }
    }

    /// Evicts what is in memory beyond the capacity, as holds allow it, until nothing is.
    pub(crate) async fn fit(self: &Arc<Self>) {
        let waiting = self.ledger.pressure().enter();
        loop {
            let changed = waiting.changed().notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let Some(victims) = self.ledger.shed() else { return };
            self.evict_all(victims);
            if timeout(self.options.memory_deadline, changed).await.is_err() {
                tracing::warn!(
                    replica = %self.options.replica, resident = %self.ledger.used().primary,
                    capacity = %self.ledger.capacity().primary,
                    "more is in memory than the capacity allows, and what is there is in use"
                );
            }
        }
    }

    /// Evicts claimed copies, each in a task of its own: whoever wanted the room may give up meanwhile.
    pub(crate) fn evict_all(self: &Arc<Self>, victims: Vec<Arc<Entry>>) {
        for victim in victims {
            let core = Arc::clone(self);
            self.spawn(async move { core.evict(&victim).await });
        }
    }

    async fn evict(&self, entry: &Arc<Entry>) {
        self.report(entry);
        let mut in_server = entry.in_server.lock().await;
        if *in_server == InServer::No {
            // The task that takes it down was faster, and gave its room back.
            return;
        }
        match self.unload(entry).await {
            Ok(()) => {
                *in_server = InServer::No;
                self.metrics.cache_evict.inc();
                self.scale.ghosts().evicted(entry.generation, entry.need().primary);
                entry.shift(Phase::Evicting, Phase::Evicted);
                self.ledger.left(entry.generation);
                self.look_soon();
            }
            Err(failure) => {
                tracing::warn!(copy = %entry.generation, model = %entry.model, error = %failure.message, "an eviction failed");
                // First the phase: a seat that may be evicted again must be resident.
                entry.shift(Phase::Evicting, Phase::Resident);
                self.ledger.stays(entry.generation);
            }
        }
        drop(in_server);
        if entry.phase().serves() {
            self.report(entry);
        }
    }

    /// Has the inference server load a copy, and waits until it answers. The caller holds its lock.
    pub(crate) async fn load(self: &Arc<Self>, entry: &Entry, in_server: &mut InServer) -> Result<(), Failure> {
        let turn = self.turn_to_load(entry).await;
        *in_server = InServer::Maybe;
        let began = self.clock.now();
        let loaded = match timeout(self.options.load_deadline, self.runtime.load(&entry.served)).await {
            Ok(Ok(())) => self.probe(entry).await,
            Ok(Err(failure)) => Err(failure),
            Err(_) => Err(late("the inference server did not finish to load it", self.options.load_deadline)),
        };
        match loaded {
            Ok(()) => {
                *in_server = InServer::Yes;
                let took = self.clock.now().since(began);
                entry.loads.record(took);
                self.load_times.record(took);
                self.metrics.load_model.inc();
                self.measure(entry, &turn).await;
                drop(turn);
                self.look_soon();
                if let Some(shared) = self.metrics.shared.get()
                    && entry.phase() == Phase::Reloading
                {
                    shared.agent.reload(&self.options.replica, took);
                }
                Ok(())
            }
            Err(failure) => {
                self.metrics.load_failed.inc();
                drop(turn);
                self.not_loaded(entry).await;
                Err(failure)
            }
        }
    }

    /// How long an answer is waited for that should come within `deadline`: where a load keeps the server from
    /// answering, as long as a load may take.
    pub(crate) fn patience(&self, deadline: Duration) -> Duration {
        if self.runtime.loads_block() { deadline.max(self.options.load_deadline) } else { deadline }
    }

    /// Asks until the copy answers.
    async fn probe(&self, entry: &Entry) -> Result<(), Failure> {
        const LONGEST: Duration = Duration::from_millis(500);
        let asking = async {
            let mut pause = Duration::from_millis(5);
            loop {
                if self.runtime.ready(&entry.served).await? {
                    return Ok(());
                }
                sleep(pause).await;
                // A request waits: what it waits too long for is a small part of what it waits for anyway.
                pause = (pause + pause / 8).min(LONGEST);
            }
        };
        let within = self.patience(self.options.probe_deadline);
        match timeout(within, asking).await {
            Ok(answer) => answer,
            Err(_) => Err(late("it was loaded and did not become ready", within)),
        }
    }

    /// Has the inference server unload a copy: three tries. The caller holds its lock.
    pub(crate) async fn unload(&self, entry: &Entry) -> Result<(), Failure> {
        const TRIES: u32 = 3;
        let mut pause = AFTER_FAILURE;
        let mut tried = 0;
        let within = self.patience(self.options.unload_deadline);
        let turn = self.turn().await;
        loop {
            let failure = match timeout(within, self.runtime.unload(&entry.served)).await {
                Ok(Ok(())) => {
                    self.metrics.unload_model.inc();
                    drop(turn);
                    return Ok(());
                }
                Ok(Err(failure)) => failure,
                Err(_) => late("the inference server did not finish to unload it", within),
            };
            self.metrics.unload_failed.inc();
            tried += 1;
            if tried == TRIES {
                return Err(failure);
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Unloads a copy however long that takes. `refused` is called once, when it takes more than a few tries.
    pub(crate) async fn unload_in_the_end(&self, entry: &Entry, refused: impl FnOnce()) {
        let mut refused = Some(refused);
        let mut pause = AFTER_FAILURE;
        while let Err(failure) = self.unload(entry).await {
            if let Some(refused) = refused.take() {
                tracing::error!(
                    copy = %entry.generation, model = %entry.model, error = %failure.message,
                    "a copy can't be unloaded; its memory stays reserved and the unload is tried again"
                );
                refused();
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Why `need` does not fit, for people.
    pub(crate) fn too_large(&self, need: &Resources) -> Failure {
        let capacity = self.ledger.capacity();
        let device = need.others.keys().find(|device| need.on(Some(device)) > capacity.on(Some(device)));
        let device = device.filter(|_| need.primary <= capacity.primary).map(String::as_str);
        let place = device.map_or_else(String::new, |device| format!(" on {device}"));
        Failure {
            class: FailureClass::Memory,
            message: format!(
                "it needs {}{place} and the replica has {} in all; declare less memory or place it on a larger replica",
                need.on(device),
                capacity.on(device)
            ),
        }
    }
}

/// A failure of class `timeout`.
pub(crate) fn late(what: &str, deadline: Duration) -> Failure {
    Failure { class: FailureClass::Timeout, message: format!("{what} within {} s", deadline.as_secs_f64()) }
}
