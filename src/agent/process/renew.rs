//! A server that the agent runs is ended and started anew, because the scheduler says so.
//!
//! The rules of this module: it is ended only while nothing is in its memory, and nothing is loaded until it is on its
//! way back, so that no request and no load ends with it; an order is about one run, so that one that comes twice or late
//! ends nothing.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use super::{Server, Started};
use crate::{agent::core::Core, domain::memory::Bytes};

/// How long it may take until a server is known to be ending.
const NOTICED: Duration = Duration::from_secs(5);

impl Core {
    /// The run of the server that the agent keeps up for all models, while it answers.
    pub(in crate::agent) fn run(&self) -> Option<u64> {
        match &self.options.started {
            Some(Started::Server(server)) => server.life(),
            Some(Started::Models(_)) | None => None,
        }
    }

    /// Has the server's run `run` ended and another begun.
    pub(in crate::agent) fn recycle(self: &Arc<Self>, run: u64) {
        let Some(Started::Server(server)) = &self.options.started else { return };
        if server.life() == Some(run) {
            let (core, server) = (Arc::clone(self), Arc::clone(server));
            self.spawn(async move { core.recycled(&server, run).await });
        }
    }

    async fn recycled(&self, server: &Server, run: u64) {
        // The order comes again and again until it is seen to be obeyed.
        let Ok(_one) = self.renewing.try_lock() else { return };
        let Ok(_alone) = timeout(self.options.load_deadline, self.scale.alone()).await else { return };
        let (replica, resident) = (&self.options.replica, self.ledger.used().primary);
        if server.life() != Some(run) {
            return;
        }
        if resident != Bytes::ZERO {
            tracing::warn!(%replica, %resident, "the inference server is to be started anew, and models are in its memory: not yet");
            return;
        }
        tracing::info!(%replica, leaked = %self.strain().leaked, "the inference server is ended, to be started anew");
        self.metrics.server_recycled.inc();
        server.renew(run);
        drop(timeout(NOTICED, server.no_longer(run)).await);
    }
}
