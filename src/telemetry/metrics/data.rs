//! What gateways and agents measure beyond their own counters.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use prometheus_client::{
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        histogram::Histogram,
    },
    registry::Registry,
};

use super::{
    Bucketed, buckets,
    labels::{ByMethod, ByModel, ByProtocol, ByReplica, Code, Protocol},
};
use crate::domain::{
    names::{ModelName, ReplicaId},
    version::{Version, served_name},
};

/// Models that are counted by name at most; the rest count together as `other`.
pub const MAX_MODEL_SERIES: usize = 10_000;

/// Makes the histograms of a family.
#[derive(Clone, Copy, Debug)]
pub(super) struct Make(Bucketed);

impl MetricConstructor<Histogram> for Make {
    fn new_metric(&self) -> Histogram {
        buckets(self.0)
    }
}

/// A gateway's metrics.
#[derive(Debug)]
pub struct GatewayMetrics {
    seconds: Family<ByProtocol, Histogram, Make>,
}

impl GatewayMetrics {
    pub(super) fn new() -> Self {
        let seconds = Family::new_with_constructor(Make(Bucketed::Request));
        Self { seconds }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("wharf_gateway_request_seconds", "Duration of requests", self.seconds.clone());
    }

    /// The histogram of a protocol's requests, to be kept by whoever observes many.
    #[must_use]
    pub fn request_seconds(&self, protocol: Protocol) -> Histogram {
        self.seconds.get_or_create_owned(&ByProtocol { protocol })
    }
}

/// The metrics of every agent in this process, under Seldon's names where they mean the same.
#[derive(Debug)]
pub struct AgentMetrics {
    api_seconds: Family<ByMethod, Histogram, Make>,
    reload_seconds: Family<ByReplica, Histogram, Make>,
    fetch_seconds: Histogram,
    infer: Family<ByModel, Counter>,
    infer_seconds: Family<ByModel, Counter<f64, std::sync::atomic::AtomicU64>>,
    per_model: bool,
    named: Mutex<BTreeSet<String>>,
}

impl AgentMetrics {
    pub(super) fn new(per_model: bool) -> Self {
        Self {
            api_seconds: Family::new_with_constructor(Make(Bucketed::Request)),
            reload_seconds: Family::new_with_constructor(Make(Bucketed::Load)),
            fetch_seconds: buckets(Bucketed::Load),
            infer: Family::default(),
            infer_seconds: Family::default(),
            per_model,
            named: Mutex::new(BTreeSet::new()),
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("seldon_model_infer_api_seconds", "Duration of requests", self.api_seconds.clone());
        registry.register("wharf_reload_seconds", "Duration of reloads on demand", self.reload_seconds.clone());
        registry.register("wharf_artifact_fetch_seconds", "Duration of downloads", self.fetch_seconds.clone());
        if self.per_model {
            registry.register("seldon_model_infer", "Requests by model", self.infer.clone());
            registry.register(
                "seldon_model_infer_seconds",
                "Duration of requests by model",
                self.infer_seconds.clone(),
            );
        }
    }

    /// Counts a request at the door of `replica` and what it took.
    pub fn infer(
        &self,
        replica: &ReplicaId,
        model: &ModelName,
        version: Version,
        method: Protocol,
        code: Code,
        duration: Duration,
    ) {
        let server = replica.server.to_string();
        let server_replica = replica.index;
        let by_method = ByMethod { server: server.clone(), server_replica, method, code };
        self.api_seconds.get_or_create(&by_method).observe(duration.as_secs_f64());
        if self.per_model {
            let (model, model_internal) = self.named(model, version);
            let labels = ByModel { server, server_replica, model, model_internal, method_type: method, code };
            self.infer.get_or_create(&labels).inc();
            self.infer_seconds.get_or_create(&labels).inc_by(duration.as_secs_f64());
        }
    }

    /// Counts a reload on demand.
    pub fn reload(&self, replica: &ReplicaId, duration: Duration) {
        let labels = ByReplica { server: replica.server.to_string(), server_replica: replica.index };
        self.reload_seconds.get_or_create(&labels).observe(duration.as_secs_f64());
    }

    /// Counts a download.
    pub fn fetch(&self, duration: Duration) {
        self.fetch_seconds.observe(duration.as_secs_f64());
    }

    /// The model's labels, while there are series left.
    fn named(&self, model: &ModelName, version: Version) -> (String, String) {
        let served = served_name(model, version);
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        if named.contains(&served) || named.len() < MAX_MODEL_SERIES {
            named.insert(served.clone());
            return (model.to_string(), served);
        }
        ("other".to_owned(), "other".to_owned())
    }
}
