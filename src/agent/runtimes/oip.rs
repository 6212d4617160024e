//! Any server of the Open Inference Protocol with its model repository extension, over REST.

use std::sync::Arc;

use futures::{FutureExt as _, future::BoxFuture};
use http::{Method, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Limited};
use serde::Deserialize;

use super::{Indexed, Runtime};
use crate::{
    domain::copy::{Failure, FailureClass},
    forward::{Body, Request, Upstream},
};

/// Longest answer that is read. An index of 100,000 models has less.
const LONGEST_ANSWER: usize = 16 << 20;

/// The adapter.
#[derive(Debug)]
pub(crate) struct Oip {
    server: Arc<dyn Upstream>,
}

#[derive(Deserialize)]
struct IndexRow {
    name: String,
    #[serde(default)]
    state: String,
}

#[derive(Deserialize)]
struct ErrorBody {
    error: String,
}

impl Oip {
    pub(crate) fn new(server: Arc<dyn Upstream>) -> Self {
        Self { server }
    }

    async fn ask(&self, method: Method, path: String) -> Result<(StatusCode, Vec<u8>), Failure> {
        let runtime = |message: String| Failure { class: FailureClass::Runtime, message };
        let body = if method == Method::POST { Body::from("{}") } else { Body::empty() };
        let request: Request = http::Request::builder()
            .method(method)
            .uri(path)
            .header(CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(|error| runtime(format!("the request to the inference server can't be made: {error}")))?;
        let response = self.server.call(request).await.map_err(|error| Failure {
            class: if error.timed_out { FailureClass::Timeout } else { FailureClass::Runtime },
            message: format!("the inference server did not answer: {error}"),
        })?;
        let status = response.status();
        let body = Limited::new(response.into_body(), LONGEST_ANSWER)
            .collect()
            .await
            .map_err(|error| runtime(format!("the inference server's answer broke off: {error}")))?;
        Ok((status, body.to_bytes().to_vec()))
    }
}

impl Runtime for Oip {
    fn load<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        async move {
            let (status, body) = self.ask(Method::POST, format!("/v2/repository/models/{served}/load")).await?;
            if status.is_success() { Ok(()) } else { Err(load_failure(status, &body)) }
        }
        .boxed()
    }

    fn unload<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        async move {
            let (status, body) = self.ask(Method::POST, format!("/v2/repository/models/{served}/unload")).await?;
            if status.is_success() || status == StatusCode::NOT_FOUND {
                return Ok(());
            }
            let message = format!("the inference server refused to unload it ({status}): {}", text(&body));
            Err(Failure { class: FailureClass::Runtime, message })
        }
        .boxed()
    }

    fn ready<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<bool, Failure>> {
        async move {
            let (status, body) = self.ask(Method::GET, format!("/v2/models/{served}/ready")).await?;
            match status {
                status if status.is_success() => Ok(true),
                // MLServer says 404 of what it does not know, Triton 400, others 503 while they load.
                StatusCode::NOT_FOUND | StatusCode::BAD_REQUEST | StatusCode::SERVICE_UNAVAILABLE => Ok(false),
                _ => Err(Failure {
                    class: FailureClass::Runtime,
                    message: format!("the inference server's readiness probe failed ({status}): {}", text(&body)),
                }),
            }
        }
        .boxed()
    }

    fn index(&self) -> BoxFuture<'_, Result<Vec<Indexed>, Failure>> {
        async move {
            let (status, body) = self.ask(Method::POST, "/v2/repository/index".to_owned()).await?;
            let failure = |message| Failure { class: FailureClass::Runtime, message };
            match status {
                status if status.is_success() => {}
                // A server without an index starts empty.
                StatusCode::NOT_FOUND | StatusCode::NOT_IMPLEMENTED => return Ok(Vec::new()),
                _ => {
                    return Err(failure(format!("the inference server gave no index ({status}): {}", text(&body))));
                }
            }
            let rows: Vec<IndexRow> = serde_json::from_slice(&body)
                .map_err(|error| failure(format!("the inference server's index can't be read: {error}")))?;
            // Triton gives no state for what was never loaded; MLServer says UNKNOWN of what is loading.
            Ok(rows
                .into_iter()
                .filter(|row| !matches!(row.state.as_str(), "" | "UNAVAILABLE"))
                .map(|row| Indexed { ready: row.state == "READY", name: row.name })
                .collect())
        }
        .boxed()
    }
}

/// What a refused load means. Servers agree on little here, so the words decide where the status does not.
fn load_failure(status: StatusCode, body: &[u8]) -> Failure {
    let said = text(body);
    let lower = said.to_ascii_lowercase();
    let any = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    let class = if status == StatusCode::INSUFFICIENT_STORAGE
        || any(&["out of memory", "outofmemory", "cannot allocate", "can't allocate", "bad_alloc"])
    {
        FailureClass::Memory
    } else if matches!(status, StatusCode::NOT_IMPLEMENTED | StatusCode::UNSUPPORTED_MEDIA_TYPE)
        || any(&["not supported", "unsupported", "not implemented", "unimplemented", "unknown op", "no module named"])
    {
        FailureClass::Incompatible
    } else if matches!(status, StatusCode::GATEWAY_TIMEOUT | StatusCode::REQUEST_TIMEOUT) {
        FailureClass::Timeout
    } else if matches!(status, StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY) {
        FailureClass::Artifact
    } else {
        FailureClass::Runtime
    };
    Failure { class, message: format!("the inference server refused to load it ({status}): {said}") }
}

/// As much of an answer as a message can bear.
fn text(body: &[u8]) -> String {
    const SHOWN: usize = 512;
    let text = match serde_json::from_slice::<ErrorBody>(body) {
        Ok(body) => body.error,
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match (text.is_empty(), text.char_indices().nth(SHOWN)) {
        (true, _) => "no reason given".to_owned(),
        (false, Some((end, _))) => format!("{}...", &text[..end]),
        (false, None) => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_loads_are_told_apart() {
        let class =
            |status: u16, body: &str| load_failure(StatusCode::from_u16(status).expect("valid"), body.as_bytes()).class;
        assert_eq!(class(500, r#"{"error":"CUDA out of memory"}"#), FailureClass::Memory);
        assert_eq!(class(507, ""), FailureClass::Memory);
        assert_eq!(class(400, r#"{"error":"operator Foo is not supported"}"#), FailureClass::Incompatible);
        assert_eq!(class(501, ""), FailureClass::Incompatible);
        assert_eq!(class(422, r#"{"error":"no model file"}"#), FailureClass::Artifact);
        assert_eq!(class(500, "Internal Server Error"), FailureClass::Runtime);
        assert_eq!(class(504, ""), FailureClass::Timeout);
    }

    #[test]
    fn a_reason_is_one_short_line() {
        assert_eq!(text(b"{\"error\":\"a\\n  b\"}"), "a b");
        assert_eq!(text(b""), "no reason given");
        assert!(text("x".repeat(9000).as_bytes()).len() < 600);
    }
}
