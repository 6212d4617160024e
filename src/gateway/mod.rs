//! The inference gateway: one port, REST and gRPC, in front of every copy of every model.
//!
//! The rule of this module: it sees only routes. It knows which copies of a model may be sent to, chooses one,
//! passes the bytes, and never parses or stores them; it goes on with the last routes it got when the scheduler
//! is gone.

mod epochs;
mod follow;
mod health;
mod listener;
mod metrics;
mod pass;
mod passage;
mod pick;
mod route;

use std::{
    fmt,
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use http::{Method, StatusCode};
use prost::Message as _;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

pub use self::{
    epochs::{Epochs, Guard, Turn},
    metrics::{Classes, Metrics},
    route::Table,
};
use self::{
    follow::Lineage,
    listener::{Asked, classify},
    metrics::{Admitted, Class},
    pick::Random,
    route::Entry,
};
use crate::{
    domain::error::Code,
    forward::{
        self, Body, Connections, Limits, Request, Response, Upstream, UpstreamError, error_response, grpc,
        respond::json as json_response,
    },
    ports::{Clock, Listen},
    rpc::proto::inference::{ServerLiveResponse, ServerMetadataResponse, ServerReadyResponse},
    telemetry::trace::{TRACEPARENT, TraceContext, request_span},
};

/// As many routes as [`Gateway::inspect`] lists.
const INSPECTED: usize = 1000;

/// How a gateway treats requests and its scheduler.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its name, kept over restarts and unique among the scheduler's gateways.
    pub name: String,
    /// What the port takes from clients.
    pub limits: Limits,
    /// In which an answer must begin, and how long that of a REST request may then be silent. A client's
    /// `grpc-timeout` takes its place, and holds for the whole answer.
    pub request_deadline: Duration,
    /// How long a gRPC answer or a stream may be silent, and the longest wait for the first word of any answer.
    pub stream_idle: Duration,
    /// Bytes of a request's body; of each message of a gRPC stream.
    pub body_limit: u64,
    /// Bytes of a request's body that are kept to send it again; also in which a gRPC message must name its model.
    pub replay: usize,
    /// Requests in flight.
    pub in_flight: u64,
    /// How long a request waits for newer routes, or for the copy, when no door holds the copy that the present ones name.
    pub route_wait: Duration,
    /// In which the scheduler must be reached, and answer.
    pub connect_timeout: Duration,
    /// The first wait before the scheduler is called again; it doubles.
    pub reconnect_first: Duration,
    /// The longest such wait.
    pub reconnect_most: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: "gateway".to_owned(),
            limits: Limits::default(),
            request_deadline: Duration::from_secs(60),
            stream_idle: Duration::from_secs(600),
            body_limit: 256 << 20,
            replay: 64 << 10,
            in_flight: 10_000,
            route_wait: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(2),
            reconnect_first: Duration::from_millis(50),
            reconnect_most: Duration::from_secs(2),
        }
    }
}

/// One gateway. Answers as an [`Upstream`] too, so that a request needs no socket to reach it.
pub struct Gateway {
    options: Options,
    table: Table,
    clock: Arc<dyn Clock>,
    random: Random,
    metrics: Arc<Metrics>,
    lineage: Mutex<Option<Lineage>>,
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway").field("name", &self.options.name).finish_non_exhaustive()
    }
}

impl Gateway {
    /// A gateway without routes. The same `seed` makes the same choices.
    #[must_use]
    pub fn new(options: Options, doors: Arc<Connections>, clock: Arc<dyn Clock>, seed: u64) -> Arc<Self> {
        Arc::new(Self {
            options,
            table: Table::new(doors),
            clock,
            random: Random::new(seed),
            metrics: Arc::default(),
            lineage: Mutex::default(),
        })
    }

    /// Its routes.
    #[must_use]
    pub const fn table(&self) -> &Table {
        &self.table
    }

    /// Its counters.
    #[must_use]
    pub const fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Whether it ever had a whole route table.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.table.held_epoch().0.is_some()
    }

    /// Answers clients on `listener` until `shutdown`, then until requests in flight are done or the drain's deadline.
    pub async fn serve(self: Arc<Self>, listener: Box<dyn Listen>, shutdown: CancellationToken) {
        let limits = self.options.limits.clone();
        forward::serve(listener, self, limits, shutdown).await;
    }

    /// What it holds: the epoch, counts, and up to 1,000 routes, with what is in flight to each copy.
    #[must_use]
    pub fn inspect(&self) -> Value {
        let mut entries: Vec<Arc<Entry>> = Vec::new();
        self.table.visit(|entry| {
            entries.push(Arc::clone(entry));
            entries.len() < INSPECTED
        });
        entries.sort_by(|a, b| a.model.cmp(&b.model));
        let routes: Vec<Value> = entries.iter().map(|entry| inspect_entry(entry)).collect();
        let (epoch, models) = self.table.held_epoch();
        json!({
            "name": self.options.name,
            "ready": epoch.is_some(),
            "epoch": epoch.map(|epoch| epoch.0),
            "settled": self.table.settled().epoch.0,
            "lineage": self.lineage().map(|lineage| lineage.name),
            "in_flight": self.metrics.in_flight.load(Ordering::Relaxed),
            "models": models,
            "routes": routes,
        })
    }

    /// Begins a trace where the client has not.
    fn traced(&self, mut request: Request) -> Request {
        if !request.headers().contains_key(TRACEPARENT) {
            let context = TraceContext::root(&mut || self.random.next(), false);
            request.headers_mut().insert(TRACEPARENT, context.header());
        }
        request
    }

    async fn answer(&self, request: Request) -> Response {
        let grpc = grpc::is_grpc(request.headers());
        let Some(mut admitted) = Admitted::enter(&self.metrics, grpc, self.options.in_flight, &self.clock) else {
            let message =
                format!("{} requests are in flight already, the most this gateway takes", self.options.in_flight);
            return error_response(grpc, Code::Exhausted, &message, Some(Duration::from_secs(1)));
        };
        let (head, body) = request.into_parts();
        // References to what came in: the names stay readable while the head goes on.
        let (uri, named) = (head.uri.clone(), head.headers.get(listener::SELDON_MODEL).cloned());
        let own = match classify(&head.method, uri.path(), named.as_ref(), grpc) {
            Asked::Model(call) => return self.pass(head, call, body, admitted).await,
            own => self.own(&own, grpc, &head.method),
        };
        let failed = own.status().as_u16() >= 400 || own.headers().get("grpc-status").is_some_and(|s| s != "0");
        admitted.ended(if failed { Class::ClientError } else { Class::Ok });
        own
    }

    /// What the gateway answers by itself.
    fn own(&self, asked: &Asked<'_>, grpc: bool, method: &Method) -> Response {
        let ready = self.is_ready();
        let response = match (asked, grpc) {
            (Asked::Live, true) => grpc::reply(&ServerLiveResponse { live: true }.encode_to_vec()),
            (Asked::Ready, true) => grpc::reply(&ServerReadyResponse { ready }.encode_to_vec()),
            (Asked::Metadata, true) => {
                let (name, version) = (env!("CARGO_PKG_NAME").to_owned(), env!("CARGO_PKG_VERSION").to_owned());
                grpc::reply(&ServerMetadataResponse { name, version, extensions: Vec::new() }.encode_to_vec())
            }
            (Asked::Live, false) => json_response(StatusCode::OK, &json!({ "live": true })),
            (Asked::Ready, false) => {
                let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
                json_response(status, &json!({ "ready": ready }))
            }
            (Asked::Metadata, false) => json_response(
                StatusCode::OK,
                &json!({
                    "name": env!("CARGO_PKG_NAME"), "version": env!("CARGO_PKG_VERSION"), "extensions": [],
                }),
            ),
            (Asked::Repository, _) => {
                let message = "a gateway loads and unloads nothing; ask the scheduler's API (LoadModel, UnloadModel, \
                               ModelStatus; port 9004 by default)";
                error_response(grpc, Code::Unimplemented, message, None)
            }
            (Asked::NoMethod, _) => error_response(
                true,
                Code::Unimplemented,
                "there is no such method; the service is inference.GRPCInferenceService",
                None,
            ),
            (Asked::NoPath | Asked::Model(_), _) => error_response(
                grpc,
                Code::NotFound,
                "there is no such path; the Open Inference Protocol's begin with /v2",
                None,
            ),
        };
        if *method == Method::HEAD { response.map(|_| Body::empty()) } else { response }
    }
}

impl Upstream for Gateway {
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        let request = self.traced(request);
        let span = request_span("gateway", request.headers());
        let answer = async move { Ok(self.answer(request).await) };
        if span.is_disabled() { answer.boxed() } else { answer.instrument(span).boxed() }
    }
}

fn inspect_entry(entry: &Entry) -> Value {
    let targets: Vec<Value> = entry
        .shares
        .iter()
        .map(|share| {
            let endpoints: Vec<Value> = share
                .places
                .iter()
                .map(|place| {
                    json!({
                        "replica": place.replica.to_string(),
                        "copy": place.generation.to_string(),
                        "resident": place.pulse.resident.load(Ordering::Relaxed),
                        "in_flight": place.pulse.in_flight.load(Ordering::Relaxed),
                        "aside": place.pulse.health.is_aside(),
                    })
                })
                .collect();
            json!({ "version": share.version.0, "weight": share.weight, "endpoints": endpoints })
        })
        .collect();
    json!({
        "model": entry.model.as_str(),
        "targets": targets,
        "state": entry.absence.state,
        "reason": entry.absence.reason,
    })
}
