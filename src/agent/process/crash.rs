//! What an agent does when the server that it runs ends, and when that is back.
//!
//! The rules of this module: requests that were with the server have failed and are not sent again; what was in its memory
//! keeps its room and is brought back by the agent alone, what was used last first; a model that takes the server down
//! with it stays out, so that the others can stay in.

use std::{
    cmp::Reverse,
    sync::{Arc, PoisonError},
    time::Duration,
};

use super::{End, Started, Tending};
use crate::{
    agent::{
        cache::{Entry, Phase},
        core::Core,
    },
    domain::{
        copy::{Failure, FailureClass},
        quarantine::{Scene, Suspect},
    },
};

/// How long before the end of a server is known a request may have broken off by it.
const BROKEN: Duration = Duration::from_secs(2);

/// The agent, as one that has to know how its server fares.
pub(in crate::agent) struct Tended(pub(in crate::agent) Arc<Core>);

fn suspect(entry: &Entry) -> Suspect {
    (entry.generation.uid, entry.generation.version)
}

fn runtime(message: &str) -> Failure {
    Failure { class: FailureClass::Runtime, message: message.to_owned() }
}

impl Tending for Tended {
    fn ended(&self, end: &End) {
        let core = &self.0;
        let now = core.clock.now();
        let entries = core.book.all();
        let loading = core.guarded.as_ref().map(|guarded| guarded.loading()).unwrap_or_default();
        let asked = |entry: &Entry| {
            let (phase, holds) = entry.snapshot();
            (phase == Phase::Resident && holds > 0) || entry.broke_off_since(now, BROKEN)
        };
        let loaded = |again: bool| {
            let all = entries.iter().filter(|entry| loading.contains(&entry.served));
            all.filter(|entry| (entry.phase() == Phase::Reloading) == again).map(|one| suspect(one)).collect()
        };
        let scene = Scene {
            loading: loaded(false),
            returning: loaded(true),
            asked: entries.iter().filter(|entry| asked(entry)).map(|one| suspect(one)).collect(),
            killed: end.killed,
        };
        let requests: u32 = entries
            .iter()
            .map(|entry| entry.snapshot())
            .filter(|(phase, _)| *phase == Phase::Resident)
            .map(|(_, holds)| holds)
            .sum();
        let mut lost = Vec::new();
        for entry in &entries {
            if entry.shift(Phase::Resident, Phase::Reloading) {
                core.report(entry);
                lost.push(Arc::clone(entry));
            }
        }
        core.metrics.server_ended.inc();
        tracing::error!(replica = %core.options.replica, how = end.how, copies = lost.len(), requests, "the inference server ended");
        let verdict = core.quarantine.lock().unwrap_or_else(PoisonError::into_inner).ended(&scene, now);
        if let Some(verdict) = verdict {
            core.metrics.quarantined.inc();
            for entry in entries.iter().filter(|entry| suspect(entry) == verdict.who) {
                tracing::error!(copy = %entry.generation, model = %entry.model, why = verdict.why, "a model is quarantined");
                entry.fail(runtime(&verdict.why));
            }
        }
        core.lost.lock().unwrap_or_else(PoisonError::into_inner).extend(lost);
    }

    fn ready(&self) {
        let core = Arc::clone(&self.0);
        let mut lost = std::mem::take(&mut *core.lost.lock().unwrap_or_else(PoisonError::into_inner));
        lost.sort_by_key(|entry| Reverse((entry.uses().last(), entry.generation)));
        let begun = Arc::clone(&core);
        core.spawn(async move {
            // What is known of the run before means nothing from here on.
            begun.look_at_process().await;
            begun.restore(lost).await;
        });
    }

    fn given_up(&self, why: &str) {
        // Others may have what it takes; where there are none the scheduler comes back.
        for entry in self.0.book.all() {
            entry.fail(runtime(why));
        }
    }
}

impl Core {
    /// Brings back what was in the memory of a server that ended: each still has its room.
    async fn restore(self: Arc<Self>, lost: Vec<Arc<Entry>>) {
        for entry in lost {
            let Ok(_turn) = self.reloads.acquire().await else { return };
            if entry.phase() == Phase::Reloading {
                self.load_again(&entry).await;
            }
        }
    }

    /// Why the server can't be asked now, and the seconds after which another try makes sense. Only of one server for all
    /// models: where each has a process of its own, that answers for itself.
    pub(in crate::agent) fn down(&self) -> Option<(String, u64)> {
        match &self.options.started {
            Some(Started::Server(server)) => server.down(),
            Some(Started::Models(_)) | None => None,
        }
    }
}
