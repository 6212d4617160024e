//! The REST half of the protocol.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use http_body::Body as _;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    EXTENSIONS, SERVER, Shared, VERSION, deadline,
    failure::{Failure, Kind, clip},
    json as wire,
    plan::{Plan, Port},
};
use crate::forward::{Body, Request, Response};

/// Where the JSON ends in a body with binary tensors behind it.
const HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// What a path means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route<'a> {
    Live,
    Ready,
    Server,
    Model { name: &'a str, version: &'a str },
    ModelReady { name: &'a str, version: &'a str },
    Infer { name: &'a str, version: &'a str },
    Index,
    Load { name: &'a str },
    Unload { name: &'a str },
}

impl<'a> Route<'a> {
    fn of(path: &'a str) -> Option<Self> {
        let mut segments = [""; 7];
        let mut count = 0;
        for segment in path.strip_prefix('/')?.trim_end_matches('/').split('/') {
            *segments.get_mut(count)? = segment;
            count += 1;
        }
        Some(match segments.get(..count)? {
            ["v2"] => Self::Server,
            ["v2", "health", "live"] => Self::Live,
            ["v2", "health", "ready"] => Self::Ready,
            ["v2", "models", name] => Self::Model { name, version: "" },
            ["v2", "models", name, "ready"] => Self::ModelReady { name, version: "" },
            ["v2", "models", name, "infer"] => Self::Infer { name, version: "" },
            ["v2", "models", name, "versions", version] => Self::Model { name, version },
            ["v2", "models", name, "versions", version, "ready"] => Self::ModelReady { name, version },
            ["v2", "models", name, "versions", version, "infer"] => Self::Infer { name, version },
            ["v2", "repository", "index"] => Self::Index,
            ["v2", "repository", "models", name, "load"] => Self::Load { name },
            ["v2", "repository", "models", name, "unload"] => Self::Unload { name },
            _ => return None,
        })
    }

    const fn method(self) -> Method {
        match self {
            Self::Live | Self::Ready | Self::Server | Self::Model { .. } | Self::ModelReady { .. } => Method::GET,
            Self::Infer { .. } | Self::Index | Self::Load { .. } | Self::Unload { .. } => Method::POST,
        }
    }
}

/// Answers a REST request.
pub(super) async fn answer(shared: &Arc<Shared>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let path = head.uri.path();
    let Some(route) = Route::of(path) else {
        let path = clip(path, 128);
        return refuse(&Failure::new(Kind::NotFound, format!("the protocol has no path {path:?}")), None);
    };
    if head.method != route.method() {
        let (came, wanted) = (&head.method, route.method());
        let message = format!("{path} takes {wanted}, {came} came");
        return refuse(&Failure::new(Kind::Method, message), Some(&wanted));
    }
    let result = match route {
        Route::Live => Ok(document(&json!({ "live": true }))),
        Route::Ready => Ok(document(&json!({ "ready": true }))),
        Route::Server => {
            let version = env!("CARGO_PKG_VERSION");
            Ok(document(&json!({ "name": SERVER, "version": version, "extensions": EXTENSIONS })))
        }
        Route::Model { name, version } => shared.plan(name, version).map(|plan| document(&metadata(&plan))),
        Route::ModelReady { name, version } => ready(shared, name, version),
        Route::Infer { name, version } => infer(shared, name, version, &head.headers, body).await,
        Route::Index => index(shared, &head.headers, body).await,
        Route::Load { name } => match read(shared, &head.headers, body).await {
            Ok(_) => shared.load(name).await.map(|()| document(&json!({}))),
            Err(failure) => Err(failure),
        },
        Route::Unload { name } => match read(shared, &head.headers, body).await {
            Ok(_) => shared.unload(name).map(|()| document(&json!({}))),
            Err(failure) => Err(failure),
        },
    };
    result.unwrap_or_else(|failure| refuse(&failure, None))
}

/// The protocol says 4xx for what is not ready.
fn ready(shared: &Shared, name: &str, version: &str) -> Result<Response, Failure> {
    match shared.plan(name, version) {
        Ok(plan) => Ok(document(&json!({ "name": plan.name, "ready": true }))),
        Err(failure) if failure.kind == Kind::Loading => Err(Failure::invalid(failure.message)),
        Err(failure) => Err(failure),
    }
}

fn metadata(plan: &Plan) -> Value {
    let tensors = |ports: &[Port]| -> Vec<Value> {
        ports
            .iter()
            .map(|port| json!({ "name": port.name, "datatype": port.datatype.name(), "shape": port.wire_shape() }))
            .collect()
    };
    json!({
        "name": plan.name,
        "versions": [VERSION],
        "platform": plan.platform,
        "inputs": tensors(&plan.inputs),
        "outputs": tensors(&plan.outputs),
        "parameters": { "artifact_bytes": plan.artifact_bytes, "memory_bytes": plan.memory_bytes },
    })
}

async fn infer(
    shared: &Shared,
    name: &str,
    version: &str,
    headers: &http::HeaderMap,
    body: Body,
) -> Result<Response, Failure> {
    // Before the body: a model that is not here needs no tensors.
    let plan = shared.plan(name, version)?;
    let header = header_length(headers)?;
    let body = read(shared, headers, body).await?;
    let limit = shared.limits.body_bytes;
    let answer = shared
        .infer(plan, move |plan, stop| {
            let mut call = wire::read(plan, &body, header, limit)?;
            drop(body);
            let outputs = plan.run(std::mem::take(&mut call.inputs), &call.wanted, stop)?;
            wire::write(plan, &call, outputs)
        })
        .await?;
    let mut response = Response::new(Body::from(Bytes::from(answer.body)));
    let content_type = if answer.header.is_some() { "application/octet-stream" } else { "application/json" };
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    if let Some(length) = answer.header {
        response.headers_mut().insert(HEADER_LENGTH, HeaderValue::from(length));
    }
    Ok(response)
}

fn header_length(headers: &http::HeaderMap) -> Result<Option<usize>, Failure> {
    let Some(value) = headers.get(HEADER_LENGTH) else { return Ok(None) };
    let length = value.to_str().ok().and_then(|text| text.parse().ok());
    length.map(Some).ok_or_else(|| Failure::invalid(format!("{HEADER_LENGTH} is not a number of bytes")))
}

async fn index(shared: &Shared, headers: &http::HeaderMap, body: Body) -> Result<Response, Failure> {
    #[derive(Default, Deserialize)]
    struct Filter {
        #[serde(default)]
        ready: bool,
    }
    let body = read(shared, headers, body).await?;
    let filter = if body.trim_ascii().is_empty() {
        Filter::default()
    } else {
        serde_json::from_slice(&body).map_err(|error| {
            let problem = clip(&error.to_string(), 200);
            Failure::invalid(format!("the body is not {{\"ready\": true or false}}: {problem}"))
        })?
    };
    let models: Vec<_> = shared
        .index(filter.ready)
        .await?
        .into_iter()
        .map(|model| json!({ "name": model.name, "version": VERSION, "state": model.state, "reason": model.reason }))
        .collect();
    Ok(document(&Value::Array(models)))
}

/// Reads a body, unless it is too long.
async fn read(shared: &Shared, headers: &http::HeaderMap, body: Body) -> Result<Bytes, Failure> {
    if let Some(encoding) = headers.get(header::CONTENT_ENCODING)
        && encoding != "identity"
    {
        return Err(Failure::new(Kind::Encoding, "the body has a content-encoding; send it as it is"));
    }
    let limit = shared.limits.body_bytes;
    let too_large =
        || Failure::new(Kind::TooLarge, format!("the body is longer than the {limit} bytes that it may have"));
    if body.size_hint().lower() > limit as u64 {
        return Err(too_large());
    }
    let collect = async {
        match Limited::new(body, limit).collect().await {
            Ok(collected) => Ok(collected.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
            Err(error) => Err(Failure::invalid(format!("the body ended early: {error}"))),
        }
    };
    deadline(shared.limits.inference, "reading the body", collect).await
}

fn document(value: &Value) -> Response {
    let mut response = Response::new(Body::from(value.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn refuse(failure: &Failure, allow: Option<&Method>) -> Response {
    let mut response = document(&json!({ "error": failure.message }));
    *response.status_mut() = failure.status();
    let headers = response.headers_mut();
    if let Some(allow) = allow.and_then(|method| HeaderValue::from_str(method.as_str()).ok()) {
        headers.insert(header::ALLOW, allow);
    }
    if failure.status() == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}
