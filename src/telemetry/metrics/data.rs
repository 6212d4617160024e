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
        gauge::Gauge,
        histogram::Histogram,
    },
    registry::Registry,
};

use super::{
    Bucketed, buckets,
    labels::{ByMethod, ByModel, ByProtocol, ByReplica, Code, Protocol},
};
use crate::domain::{
    memory::Bytes,
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
    /// The newest route epoch that is followed.
    pub route_epoch: Gauge,
    /// Models with a route.
    pub routes: Gauge,
}

impl GatewayMetrics {
    pub(super) fn new() -> Self {
        let seconds = Family::new_with_constructor(Make(Bucketed::Request));
        Self { seconds, route_epoch: Gauge::default(), routes: Gauge::default() }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("wharf_gateway_request_seconds", "Duration of requests", self.seconds.clone());
        registry.register("wharf_gateway_route_epoch", "Route epoch that is followed", self.route_epoch.clone());
        registry.register("wharf_gateway_routes", "Models with a route", self.routes.clone());
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
    capacity: Family<ByReplica, Gauge>,
    overcommit: Family<ByReplica, Gauge>,
    resident: Family<ByReplica, Gauge>,
    reload_seconds: Family<ByReplica, Histogram, Make>,
    fetch_seconds: Family<ByReplica, Histogram, Make>,
    infer: Family<ByModel, Counter>,
    infer_seconds: Family<ByModel, Counter<f64, std::sync::atomic::AtomicU64>>,
    per_model: bool,
    named: Mutex<BTreeSet<String>>,
}

impl AgentMetrics {
    pub(super) fn new(per_model: bool) -> Self {
        Self {
            api_seconds: Family::new_with_constructor(Make(Bucketed::Request)),
            capacity: Family::default(),
            overcommit: Family::default(),
            resident: Family::default(),
            reload_seconds: Family::new_with_constructor(Make(Bucketed::Load)),
            fetch_seconds: Family::new_with_constructor(Make(Bucketed::Load)),
            infer: Family::default(),
            infer_seconds: Family::default(),
            per_model,
            named: Mutex::new(BTreeSet::new()),
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("seldon_model_infer_api_seconds", "Duration of requests", self.api_seconds.clone());
        registry.register(
            "seldon_server_replica_memory_capacity_bytes_gauge",
            "Memory of the replica",
            self.capacity.clone(),
        );
        registry.register(
            "seldon_server_replica_memory_capacity_overcommit_bytes_gauge",
            "Memory of the replica with what may be registered beyond it",
            self.overcommit.clone(),
        );
        registry.register("wharf_resident_bytes", "Memory of resident copies", self.resident.clone());
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

    /// Sets the memory of `replica`: its own, with overcommit, and what resident copies take, on the primary
    /// device.
    pub fn memory(&self, replica: &ReplicaId, capacity: Bytes, overcommit_percent: u32, resident: Bytes) {
        let labels = ByReplica { server: replica.server.to_string(), server_replica: replica.index };
        for (family, bytes) in [
            (&self.capacity, capacity),
            (&self.overcommit, capacity.plus_percent(overcommit_percent)),
            (&self.resident, resident),
        ] {
            family.get_or_create(&labels).set(i64::try_from(bytes.0).unwrap_or(i64::MAX));
        }
    }

    /// Counts a reload on demand.
    pub fn reload(&self, replica: &ReplicaId, duration: Duration) {
        let labels = ByReplica { server: replica.server.to_string(), server_replica: replica.index };
        self.reload_seconds.get_or_create(&labels).observe(duration.as_secs_f64());
    }

    /// Counts a download.
    pub fn fetch(&self, replica: &ReplicaId, duration: Duration) {
        let labels = ByReplica { server: replica.server.to_string(), server_replica: replica.index };
        self.fetch_seconds.get_or_create(&labels).observe(duration.as_secs_f64());
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
