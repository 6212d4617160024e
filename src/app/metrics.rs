//! What the parts of a process keep by themselves, read for each scrape.

use std::{collections::BTreeMap, sync::Arc, sync::atomic::Ordering::Relaxed};

use crate::{
    actors::Links,
    agent::Agent,
    domain::{memory::Bytes, names::ReplicaId, replica::ReplicaState},
    gateway::Gateway,
    telemetry::metrics::{Metrics, Protocol, Sample},
};

fn gauge(name: &'static str, help: &'static str, labels: Vec<(&'static str, String)>, value: u64) -> Sample {
    Sample { name, help, labels, value, grows: false }
}

fn counter(name: &'static str, help: &'static str, labels: Vec<(&'static str, String)>, value: u64) -> Sample {
    Sample { name, help, labels, value, grows: true }
}

/// What the process itself has, whatever its roles.
///
/// # Panics
/// Outside an asynchronous runtime.
pub fn expose_process(metrics: &Metrics) {
    let runtime = tokio::runtime::Handle::current();
    metrics.expose(Box::new(move || {
        let tasks = runtime.metrics().num_alive_tasks() as u64;
        vec![gauge("wharf_tasks", "Tasks of connections, sessions and requests that are alive", vec![], tasks)]
    }));
}

/// Models, copies and replicas by state, and memory by replica.
pub fn expose_scheduler(metrics: &Metrics, links: &Arc<Links>) {
    let links = Arc::clone(links);
    metrics.expose(Box::new(move || {
        let (mut models, mut copies, mut replicas) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        links.board.visit_models(|model| {
            *models.entry(model.standing().state.name()).or_insert(0_u64) += 1;
            for copy in &model.copies {
                *copies.entry(copy.state.name()).or_insert(0_u64) += 1;
            }
        });
        let (mut registered, mut capacity, mut over_limit) = (Bytes::ZERO, Bytes::ZERO, 0);
        for server in links.board.servers() {
            for replica in &server.replicas {
                *replicas.entry(replica.state.name()).or_insert(0_u64) += 1;
                let id = ReplicaId::new(server.row.name.clone(), replica.index);
                over_limit += u64::from(links.board.registered(&id).over_limit);
                if matches!(replica.state, ReplicaState::Available | ReplicaState::Draining) {
                    let sum = |a: Bytes, b: Bytes| a.checked_add(b).unwrap_or(Bytes(u64::MAX));
                    registered = sum(registered, links.board.registered(&id).bytes.primary);
                    capacity = sum(capacity, replica.capacity.primary);
                }
            }
        }
        let mut samples = Vec::new();
        for (name, help, counts) in [
            ("wharf_models", "Models by state", models),
            ("wharf_copies", "Copies by state", copies),
            ("wharf_replicas", "Replicas by state", replicas),
        ] {
            let by_state =
                counts.into_iter().map(|(state, count)| gauge(name, help, vec![("state", state.to_owned())], count));
            samples.extend(by_state);
        }
        samples.push(gauge("wharf_registered_bytes", "Memory that placed copies need", vec![], registered.0));
        samples.push(gauge("wharf_capacity_bytes", "Memory of available replicas", vec![], capacity.0));
        let help = "Replicas with more registered than may be";
        samples.push(gauge("wharf_replicas_over_limit", help, vec![], over_limit));
        samples
    }));
}

/// A gateway's counters, and the durations of its requests.
pub fn expose_gateway(metrics: &Metrics, gateway: &Arc<Gateway>) {
    let seconds = [Protocol::Rest, Protocol::Grpc].map(|protocol| metrics.gateway.request_seconds(protocol));
    // One that observes already goes on where it does.
    drop(gateway.metrics().seconds.set(seconds));
    let gateway = Arc::clone(gateway);
    metrics.expose(Box::new(move || {
        let counted = gateway.metrics();
        let mut samples = Vec::new();
        for (protocol, classes) in [("rest", &counted.rest), ("grpc", &counted.grpc)] {
            for (class, value) in [
                ("ok", &classes.ok),
                ("client_error", &classes.client_error),
                ("server_error", &classes.server_error),
                ("cancelled", &classes.cancelled),
            ] {
                let labels = vec![("protocol", protocol.to_owned()), ("class", class.to_owned())];
                let help = "Requests by how they ended";
                samples.push(counter("wharf_gateway_requests_total", help, labels, value.load(Relaxed)));
            }
        }
        for (name, help, value) in [
            ("wharf_gateway_refused_total", "Requests refused because too many were in flight", &counted.refused),
            ("wharf_gateway_retries_total", "Attempts after the first", &counted.retries),
            ("wharf_gateway_not_here_total", "Answers of doors that do not hold the copy", &counted.not_here),
            ("wharf_gateway_not_started_total", "Answers of doors before a server could start", &counted.not_started),
            ("wharf_gateway_set_aside_total", "Copies set aside for their errors", &counted.set_aside),
            ("wharf_gateway_unreachable_total", "Doors that could not be reached", &counted.unreachable),
            (
                "wharf_gateway_deadline_exceeded_total",
                "Requests that ended at their deadline",
                &counted.deadline_exceeded,
            ),
            ("wharf_gateway_unknown_model_total", "Requests for a model without a route", &counted.unknown_model),
            ("wharf_gateway_no_endpoint_total", "Requests for a model that nothing answers for", &counted.no_endpoint),
            ("wharf_gateway_epochs_total", "Route epochs applied", &counted.epochs),
            ("wharf_gateway_connects_total", "Connections made to the scheduler", &counted.connects),
        ] {
            samples.push(counter(name, help, vec![], value.load(Relaxed)));
        }
        let (epoch, routes) = gateway.table().held_epoch();
        let in_flight = counted.in_flight.load(Relaxed);
        samples.push(gauge("wharf_gateway_in_flight_requests", "Requests in flight", vec![], in_flight));
        samples.push(gauge(
            "wharf_gateway_route_epoch",
            "Route epoch that is followed",
            vec![],
            epoch.map_or(0, |e| e.0),
        ));
        samples.push(gauge("wharf_gateway_routes", "Models with a route", vec![], routes as u64));
        samples
    }));
}

/// An agent's counters and durations, for as long as the agent is there.
pub fn expose_agent(metrics: &Arc<Metrics>, replica: &ReplicaId, agent: &Arc<Agent>) {
    drop(agent.metrics().shared.set(Arc::clone(metrics)));
    let (server, index) = (replica.server.to_string(), replica.index.to_string());
    let agent = Arc::downgrade(agent);
    metrics.expose(Box::new(move || {
        let Some(agent) = agent.upgrade() else { return Vec::new() };
        let labels = || vec![("server", server.clone()), ("server_replica", index.clone())];
        let counters = agent.metrics().samples();
        let counters = counters.into_iter().map(|(name, help, value)| counter(name, help, labels(), value));
        let gauges = agent.gauges();
        let gauges = gauges.into_iter().map(|(name, help, value)| gauge(name, help, labels(), value));
        counters.chain(gauges).collect()
    }));
}
