//! An agent's start: what it held before is taken up again, what is nobody's is removed.
//!
//! The rule of this module: before the scheduler hears of a copy, the inference server was asked whether it has
//! it, so that the ledger counts what is in memory and nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, PoisonError},
    time::Duration,
};

use tokio::time::{sleep, timeout};

use super::{
    cache::{Entry, InServer, Phase, entry_of},
    core::Core,
    disk::{DiskError, Kept},
    runtimes::Indexed,
};

impl Core {
    /// Takes up what was held before. Waits for the inference server for as long as that takes: an agent without
    /// one has nothing to offer.
    pub(crate) async fn recover(self: &Arc<Self>) -> Result<(), DiskError> {
        let (seen, kept) = self.disk.open().await?;
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = seen;
        self.artifacts.open().await?;
        self.spawn(Arc::clone(&self.artifacts).keep_sweeping());
        let copies: Vec<_> = kept.into_iter().filter_map(|kept| self.taken_up(kept)).collect();
        let names: Vec<String> = copies.iter().map(|(entry, _)| entry.served.clone()).collect();
        let loaded: BTreeMap<String, bool> = self.index().await.into_iter().map(|one| (one.name, one.ready)).collect();
        // While its folder is there: a model whose folder is gone is in memory and in no index of MLServer's.
        for name in loaded.keys().filter(|name| !names.contains(name)) {
            self.remove_foreign(name).await;
        }
        let folders = self.disk.clean(self.options.repository.clone(), names.clone()).await?;

        let mut ours = BTreeSet::new();
        let mut evicted = Vec::new();
        for (entry, artifact) in &copies {
            if artifact.is_none() || !folders.contains(&entry.served) {
                continue;
            }
            if loaded.get(&entry.served) == Some(&true) {
                ours.insert(entry.served.as_str());
                *entry.in_server.lock().await = InServer::Yes;
                self.ledger.found(entry);
                entry.shift(Phase::Preparing, Phase::Resident);
            } else {
                entry.shift(Phase::Preparing, Phase::Evicted);
                evicted.push(Arc::clone(entry));
            }
        }
        // Before anything is loaded: a load of the same name may have been cut off.
        for name in loaded.keys().filter(|name| names.contains(name) && !ours.contains(name.as_str())) {
            self.remove_foreign(name).await;
        }
        for (entry, artifact) in copies {
            let artifact = artifact.and_then(|key| self.artifacts.find(&key));
            *entry.artifact.lock().unwrap_or_else(PoisonError::into_inner) = artifact;
            if self.book.insert(&entry).is_ok() {
                self.begin(entry);
            }
        }
        self.scale.begin();
        self.look_at_process().await;
        // The capacity may have been made smaller.
        let core = Arc::clone(self);
        self.spawn(async move { core.fit().await });
        for entry in evicted {
            self.reload(&entry, false);
        }
        Ok(())
    }

    fn taken_up(&self, kept: Kept) -> Option<(Arc<Entry>, Option<String>)> {
        let (artifact, instances) = (kept.artifact.clone(), kept.instances);
        let (size, measured) = (kept.size.clone(), !kept.guessed);
        let entry = entry_of(kept.order(), &self.ledger, Arc::clone(&self.clock))?;
        entry.set_instances(instances);
        if let Some(size) = size {
            if measured {
                self.scale.remember(&size);
            }
            entry.weighed(size, measured);
        }
        Some((entry, artifact))
    }

    async fn index(&self) -> Vec<Indexed> {
        const LONGEST: Duration = Duration::from_secs(5);
        let mut pause = Duration::from_millis(50);
        loop {
            match timeout(self.patience(self.options.probe_deadline), self.runtime.index()).await {
                Ok(Ok(index)) => return index,
                Ok(Err(failure)) => {
                    tracing::warn!(replica = %self.options.replica, error = %failure.message, "waiting for the inference server");
                }
                Err(_) => tracing::warn!(replica = %self.options.replica, "the inference server gives no index"),
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST);
        }
    }

    /// Unloads what no order speaks of: it would take memory that the ledger believes free.
    async fn remove_foreign(&self, name: &str) {
        let unload = timeout(self.patience(self.options.unload_deadline), self.runtime.unload(name));
        match unload.await {
            Ok(Ok(())) => tracing::info!(served = name, "a model that no order speaks of was unloaded"),
            Ok(Err(failure)) => {
                tracing::error!(served = name, error = %failure.message, "a model that no order speaks of can't be unloaded");
            }
            Err(_) => tracing::error!(served = name, "a model that no order speaks of is not unloaded in time"),
        }
    }
}
