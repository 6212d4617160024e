//! The door: every request to the inference server comes through here.
//!
//! The rules of this module: a request for a copy that is not held is turned away before the inference server
//! hears of it, and the answer says so; the hold lasts as long as the response's stream, however that ends;
//! nothing else than inference, readiness and metadata passes, since a load or unload behind the agent's back
//! would falsify its ledger.

mod answer;
mod held;

use std::{fmt, sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use http::{HeaderName, HeaderValue, StatusCode, header::RETRY_AFTER};
use tokio::time::timeout;
use tracing::Instrument as _;

use super::{
    cache::{Acquired, Entry, Hold},
    core::Core,
    reload::Back,
};
use crate::{
    domain::version::{Generation, Version},
    forward::{
        Body, COPY, NOT_HERE, NOT_STARTED, RESIDENCY, Request, Response, Served, Upstream, UpstreamError, rename,
    },
    telemetry::{
        metrics::{Code, Protocol},
        trace::request_span,
    },
};
use answer::{Dialect, Kind, answer};
use held::HeldBody;

/// Header of direct gRPC requests: the model, when no gateway has named a copy.
const MODEL: &str = "seldon-model";
/// What a gRPC client is told of when to try again, in milliseconds.
const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

/// The agent's data port.
pub(crate) struct Door(pub(crate) Arc<Core>);

impl fmt::Debug for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Door({})", self.0.options.replica)
    }
}

impl Upstream for Door {
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        let span = request_span("door", request.headers());
        async move { Ok(self.serve(request).await) }.instrument(span).boxed()
    }
}

/// What a request is about.
enum Target {
    /// A copy, in the agent's hands or not.
    Copy { entry: Option<Arc<Entry>>, newest: Option<Version> },
    /// The inference server itself.
    Server,
    /// Nothing that passes here.
    Refused(Kind, &'static str),
}

fn started_not() -> (HeaderName, HeaderValue) {
    (NOT_STARTED, HeaderValue::from_static("true"))
}

impl Door {
    async fn serve(&self, mut request: Request) -> Response {
        let dialect = Dialect::of(request.headers());
        let copy = request.headers_mut().remove(COPY);
        let (entry, newest) = match self.target(dialect, &request, copy.as_ref()) {
            Target::Copy { entry, newest } => (entry, newest),
            Target::Server => return self.pass(dialect, request).await,
            Target::Refused(kind, message) => return answer(dialect, kind, message, [started_not()]),
        };
        if entry.is_some()
            && let Some((why, seconds)) = self.0.down()
        {
            return later(dialect, Kind::ENDED, &format!("the inference server {why}"), seconds);
        }
        let (hold, residency) = match entry.as_ref().map(Entry::acquire) {
            Some(Acquired::Ready(hold)) => (hold, "resident"),
            Some(Acquired::Waiting(hold)) => match self.0.bring_back(hold).await {
                Back::Here(hold) => (hold, "reloaded"),
                Back::NotHere => return self.not_here(dialect, entry.as_deref(), newest),
                Back::Later(seconds) => return busy(dialect, seconds),
            },
            Some(Acquired::NotHere) | None => return self.not_here(dialect, entry.as_deref(), newest),
        };
        match rename(request, &hold.entry().served) {
            Ok(mut request) => {
                if self.0.is_many() {
                    request.extensions_mut().insert(Served(hold.entry().served.as_str().into()));
                }
                self.forward(dialect, request, hold, residency).await
            }
            Err(error) => answer(dialect, Kind::INVALID, &error.to_string(), [started_not()]),
        }
    }

    fn target(&self, dialect: Dialect, request: &Request, copy: Option<&HeaderValue>) -> Target {
        let path = request.uri().path();
        let passes = match dialect {
            Dialect::Grpc => {
                let service = path.strip_prefix("/inference.GRPCInferenceService/");
                match service {
                    Some("ModelInfer" | "ModelStreamInfer" | "ModelReady" | "ModelMetadata") => true,
                    Some("ServerLive" | "ServerReady" | "ServerMetadata") => return Target::Server,
                    _ => false,
                }
            }
            Dialect::Rest => match path {
                "/v2" | "/v2/" | "/v2/health/live" | "/v2/health/ready" => return Target::Server,
                _ => path.starts_with("/v2/models/"),
            },
        };
        if !passes {
            return Target::Refused(Kind::FORBIDDEN, "the door lets inference, readiness and metadata pass, not this");
        }
        if let Some(copy) = copy {
            return match copy.to_str().ok().and_then(|text| text.parse::<Generation>().ok()) {
                Some(generation) => {
                    Target::Copy { entry: self.0.book.find(generation), newest: self.0.book.newest_version(generation) }
                }
                None => {
                    Target::Refused(Kind::INVALID, "the header x-wharf-copy does not name the generation of a copy")
                }
            };
        }
        let mut parts = path.strip_prefix("/v2/models/").unwrap_or_default().split('/');
        let named = match dialect {
            Dialect::Rest => parts.next(),
            Dialect::Grpc => request.headers().get(MODEL).and_then(|name| name.to_str().ok()),
        };
        let Some(model) = named.filter(|name| !name.is_empty()) else {
            return Target::Refused(
                Kind::INVALID,
                "the request names no model; over gRPC without a gateway, set the header seldon-model",
            );
        };
        let version = match (parts.next(), parts.next()) {
            (Some("versions"), Some(version)) => match version.parse() {
                Ok(version) => Some(Version(version)),
                Err(_) => return Target::Refused(Kind::INVALID, "the version in the path is not a number"),
            },
            _ => None,
        };
        let newest = self.0.book.newest(model, None).map(|entry| entry.generation.version);
        Target::Copy { entry: self.0.book.newest(model, version), newest }
    }

    fn not_here(&self, dialect: Dialect, entry: Option<&Entry>, newest: Option<Version>) -> Response {
        self.0.metrics.not_here.inc();
        // What was newest before a wait may be leaving since.
        let newest = entry.map_or(newest, |entry| self.0.book.newest_version(entry.generation));
        let value = newest.map_or_else(|| HeaderValue::from_static(""), |version| HeaderValue::from(version.0));
        answer(dialect, Kind::NOT_HERE, "the copy is not on this replica", [(NOT_HERE, value), started_not()])
    }

    async fn forward(&self, dialect: Dialect, request: Request, hold: Hold, residency: &'static str) -> Response {
        let core = &self.0;
        let began = core.clock.now();
        core.metrics.aggregate_infer.inc();
        let entry = Arc::clone(hold.entry());
        let called = tokio::select! {
            biased;
            () = entry.ended.cancelled() => {
                return answer(dialect, Kind::ENDED, "the copy was unloaded at the deadline of its drain", None);
            }
            called = timeout(core.options.answer_deadline, core.server.call(request)) => called,
        };
        let took = core.clock.now().since(began);
        core.metrics.aggregate_infer_micros.add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        self.observe(dialect, &entry, called.as_ref().ok().and_then(|called| called.as_ref().ok()), took);
        match called {
            Ok(Ok(response)) => {
                if unknown(dialect, &response) {
                    core.suspect(&entry);
                }
                let (mut head, body) = response.into_parts();
                head.headers.insert(RESIDENCY, HeaderValue::from_static(residency));
                Response::from_parts(head, Body::new(HeldBody::new(body, hold, dialect)))
            }
            Ok(Err(error)) => {
                if error.started {
                    entry.broke_off();
                }
                core.suspect(&entry);
                self.failed(dialect, &error)
            }
            Err(_) => {
                core.metrics.upstream_failed.inc();
                answer(dialect, Kind::LATE, "the inference server did not answer in time", None)
            }
        }
    }

    /// Counts the inference server's answer, or that there was none.
    fn observe(&self, dialect: Dialect, entry: &Entry, response: Option<&Response>, took: Duration) {
        let Some(shared) = self.0.metrics.shared.get() else { return };
        let (protocol, none) = match dialect {
            Dialect::Rest => (Protocol::Rest, 502),
            Dialect::Grpc => (Protocol::Grpc, 14),
        };
        let status = response.map_or(none, |response| match dialect {
            Dialect::Rest => response.status().as_u16(),
            // A status in trailers is not known yet: the answer has begun well.
            Dialect::Grpc => {
                let status = response.headers().get(tonic::Status::GRPC_STATUS);
                status.and_then(|status| status.to_str().ok()?.parse().ok()).unwrap_or(0)
            }
        });
        let version = entry.generation.version;
        shared.agent.infer(&self.0.options.replica, &entry.model, version, protocol, Code::new(status), took);
    }

    /// Hands a request on that is about no model.
    async fn pass(&self, dialect: Dialect, request: Request) -> Response {
        match timeout(self.0.options.answer_deadline, self.0.server.call(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => self.failed(dialect, &error),
            Err(_) => answer(dialect, Kind::LATE, "the inference server did not answer in time", None),
        }
    }

    fn failed(&self, dialect: Dialect, error: &UpstreamError) -> Response {
        self.0.metrics.upstream_failed.inc();
        let kind = if error.timed_out { Kind::LATE } else { Kind::BROKEN };
        let started = (!error.started).then(started_not);
        answer(dialect, kind, &format!("the inference server did not answer: {error}"), started)
    }
}

fn busy(dialect: Dialect, seconds: u64) -> Response {
    let message = format!("the copy is being brought back to memory; try again in {seconds} s");
    later(dialect, Kind::BUSY, &message, seconds)
}

/// Nothing has begun, and another try makes sense in so many seconds.
fn later(dialect: Dialect, kind: Kind, message: &str, seconds: u64) -> Response {
    let mut headers = vec![(RETRY_AFTER, HeaderValue::from(seconds)), started_not()];
    if dialect == Dialect::Grpc {
        headers.push((PUSHBACK, HeaderValue::from(seconds.saturating_mul(1000))));
    }
    answer(dialect, kind, message, headers)
}

/// Whether an answer says that the inference server does not know the model.
fn unknown(dialect: Dialect, response: &Response) -> bool {
    match dialect {
        Dialect::Rest => response.status() == StatusCode::NOT_FOUND,
        Dialect::Grpc => response.headers().get(tonic::Status::GRPC_STATUS).is_some_and(|status| status == "5"),
    }
}
