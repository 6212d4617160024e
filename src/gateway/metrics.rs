//! What a gateway counts. The labels are few and fixed: a client can't make more of them.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use http::StatusCode;
use prometheus_client::metrics::histogram::Histogram;

use super::health::Flight;
use crate::{
    domain::{outlier::Verdict, time::Instant},
    ports::Clock,
};

/// Counters of one gateway, for whoever exports them.
#[derive(Debug, Default)]
pub struct Metrics {
    /// REST requests that ended, by class.
    pub rest: Classes,
    /// gRPC requests that ended, by class.
    pub grpc: Classes,
    /// Requests in flight, from their headers to the last byte of the answer.
    pub in_flight: AtomicU64,
    /// Requests refused because too many were in flight.
    pub refused: AtomicU64,
    /// Attempts after the first.
    pub retries: AtomicU64,
    /// Answers of doors that do not hold the copy.
    pub not_here: AtomicU64,
    /// Answers of doors that refused before an inference server could start.
    pub not_started: AtomicU64,
    /// Doors that could not be reached.
    pub unreachable: AtomicU64,
    /// Times that a copy was set aside, because it answered with errors while others of its version answered well.
    pub set_aside: AtomicU64,
    /// Requests that ended at their deadline.
    pub deadline_exceeded: AtomicU64,
    /// Requests for a model that has no route.
    pub unknown_model: AtomicU64,
    /// Requests for a model without an endpoint.
    pub no_endpoint: AtomicU64,
    /// Epochs applied.
    pub epochs: AtomicU64,
    /// Connections made to the scheduler.
    pub connects: AtomicU64,
    /// Durations of requests, from their headers to the last byte of the answer: REST, and gRPC. Nothing is
    /// measured until they are there.
    pub seconds: OnceLock<[Histogram; 2]>,
}

/// Requests of one protocol by how they ended.
#[derive(Debug, Default)]
pub struct Classes {
    /// Below 400; OK.
    pub ok: AtomicU64,
    /// 4xx; a gRPC status that says that the request is wrong.
    pub client_error: AtomicU64,
    /// 5xx; any other gRPC status.
    pub server_error: AtomicU64,
    /// The client went away first, or the answer broke off.
    pub cancelled: AtomicU64,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Ok,
    ClientError,
    ServerError,
}

impl Class {
    pub(super) const fn of_http(status: StatusCode) -> Self {
        match status.as_u16() {
            ..400 => Self::Ok,
            400..500 => Self::ClientError,
            _ => Self::ServerError,
        }
    }

    /// Of a `grpc-status`; a malformed one is the server's fault.
    pub(super) fn of_grpc(status: &[u8]) -> Self {
        match status {
            b"0" => Self::Ok,
            // Cancelled, invalid, not found, exists, denied, precondition, range, unimplemented, unauthenticated.
            b"1" | b"3" | b"5" | b"6" | b"7" | b"9" | b"11" | b"12" | b"16" => Self::ClientError,
            _ => Self::ServerError,
        }
    }
}

/// One request in flight: counted in when it is made, counted out by how it ended when it is dropped.
#[derive(Debug)]
pub(super) struct Admitted {
    metrics: Arc<Metrics>,
    grpc: bool,
    class: Option<Class>,
    clock: Arc<dyn Clock>,
    began: Instant,
}

impl Admitted {
    /// `None` when `most` requests are in flight already.
    pub(super) fn enter(metrics: &Arc<Metrics>, grpc: bool, most: u64, clock: &Arc<dyn Clock>) -> Option<Self> {
        if metrics.in_flight.fetch_add(1, Relaxed) >= most {
            metrics.in_flight.fetch_sub(1, Relaxed);
            metrics.refused.fetch_add(1, Relaxed);
            let classes = if grpc { &metrics.grpc } else { &metrics.rest };
            classes.server_error.fetch_add(1, Relaxed);
            return None;
        }
        Some(Self { metrics: Arc::clone(metrics), grpc, class: None, clock: Arc::clone(clock), began: clock.now() })
    }

    /// Says how it ended. One that ends without a word was cancelled.
    pub(super) const fn ended(&mut self, class: Class) {
        self.class = Some(class);
    }

    /// Says how it ended, unless that has been said.
    pub(super) fn ended_unless_known(&mut self, class: Class) {
        self.class.get_or_insert(class);
    }

    pub(super) const fn is_grpc(&self) -> bool {
        self.grpc
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// What the answer says of the copy that gave it.
    pub(super) fn judge(&self, flight: &mut Flight, verdict: Option<Verdict>) {
        if let Some(verdict) = verdict {
            flight.judged(verdict, &self.metrics, || self.clock.now());
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.metrics.in_flight.fetch_sub(1, Relaxed);
        let classes = if self.grpc { &self.metrics.grpc } else { &self.metrics.rest };
        let counter = match self.class {
            Some(Class::Ok) => &classes.ok,
            Some(Class::ClientError) => &classes.client_error,
            Some(Class::ServerError) => &classes.server_error,
            None => &classes.cancelled,
        };
        counter.fetch_add(1, Relaxed);
        if let Some(seconds) = self.metrics.seconds.get() {
            seconds[usize::from(self.grpc)].observe(self.clock.now().since(self.began).as_secs_f64());
        }
    }
}
