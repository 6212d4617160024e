//! What the agent counts. Names follow Seldon's agent where the meaning is the same; the rest is Wharf's own.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU64, Ordering},
};

use crate::telemetry::metrics::Metrics as Shared;

/// A number that is only ever read for people.
#[derive(Debug, Default)]
pub struct Cell(AtomicU64);

impl Cell {
    /// One more.
    pub(crate) fn inc(&self) {
        self.add(1);
    }

    /// `more` more.
    pub(crate) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// The number.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! metrics {
    ($($(#[doc = $doc:literal])* $field:ident = $name:literal,)*) => {
        /// The counters of one agent, all growing from zero.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $($(#[doc = $doc])* pub $field: Cell,)*
            /// Where durations are observed; nowhere until it is there.
            pub shared: OnceLock<Arc<Shared>>,
        }

        impl Metrics {
            /// Every counter: its name as exported, what it means, its value.
            #[must_use]
            pub fn samples(&self) -> Vec<(&'static str, &'static str, u64)> {
                vec![$(($name, concat!($($doc),*), self.$field.get())),*]
            }
        }
    };
}

metrics! {
    /// Copies evicted from memory.
    cache_evict = "seldon_cache_evict_count",
    /// Requests that found their copy evicted.
    cache_miss = "seldon_cache_miss_count",
    /// Loads that succeeded, reloads included.
    load_model = "seldon_load_model_counter",
    /// Unloads that succeeded, evictions included.
    unload_model = "seldon_unload_model_counter",
    /// Requests forwarded to the inference server.
    aggregate_infer = "seldon_model_aggregate_infer_total",
    /// Microseconds until the heads of their answers, all together.
    aggregate_infer_micros = "wharf_door_infer_micros_total",
    /// Requests for copies that the door does not hold.
    not_here = "wharf_door_not_here_total",
    /// Requests refused because too many waited for an evicted copy, or for too long.
    reload_refused = "wharf_door_reload_refused_total",
    /// Requests ended at the deadline of a drain.
    drain_ended = "wharf_door_drain_ended_total",
    /// Requests that the inference server did not answer.
    upstream_failed = "wharf_door_upstream_failed_total",
    /// Loads that failed, reloads included.
    load_failed = "wharf_agent_load_failed_total",
    /// Unloads that failed.
    unload_failed = "wharf_agent_unload_failed_total",
    /// Copies that the inference server had lost and that were brought back.
    lost_found = "wharf_agent_lost_copies_total",
    /// Ends of the inference server that the agent runs.
    server_ended = "wharf_agent_server_ended_total",
    /// Times that it was ended and started anew because of what it did not give back.
    server_recycled = "wharf_agent_server_recycled_total",
    /// Models that were quarantined because the inference server ended with them.
    quarantined = "wharf_agent_quarantined_total",
    /// Fetches that succeeded.
    fetched = "wharf_agent_artifact_fetches_total",
    /// Fetches that the artifact cache made needless.
    fetch_hits = "wharf_agent_artifact_cache_hits_total",
    /// Artifacts removed from the cache to make room.
    artifacts_dropped = "wharf_agent_artifact_cache_dropped_total",
    /// Sessions that were welcomed.
    sessions = "wharf_agent_sessions_total",
    /// Orders and sessions refused because a newer leader was seen.
    fenced = "wharf_agent_fenced_total",
    /// Orders that could not be read.
    orders_refused = "wharf_agent_orders_refused_total",
}
