//! The V2 model repository extension over REST, as far as servers agree on it.

use std::sync::Arc;

use http::{Method, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Limited};
use serde::Deserialize;

use super::calls;
use crate::{
    domain::copy::{Failure, FailureClass},
    forward::{Body, Request, Upstream},
};

/// Longest answer that is read. An index of 100,000 models has less.
const LONGEST_ANSWER: usize = 16 << 20;

/// A server's repository, over REST.
#[derive(Clone, Debug)]
pub(crate) struct Repository {
    server: Arc<dyn Upstream>,
}

/// What a server answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Vec<u8>,
}

/// A line of a server's index.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    #[serde(default)]
    state: Option<String>,
    #[serde(default)]
    pub(crate) reason: Option<String>,
}

impl Row {
    /// The state as the server names it; empty when it gives none.
    pub(crate) fn state(&self) -> &str {
        // MLServer over gRPC, and servers that print Python's enumerations: State.READY.
        self.state.as_deref().map_or("", |state| state.strip_prefix("State.").unwrap_or(state))
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.state() == "READY"
    }

    /// Whether it takes memory, or may. Triton gives no state for what was never loaded; MLServer says UNKNOWN of
    /// what is loading.
    pub(crate) fn takes_memory(&self) -> bool {
        !matches!(self.state(), "" | "UNAVAILABLE")
    }
}

#[derive(Deserialize)]
struct ErrorBody {
    error: String,
}

impl Answer {
    /// As much of it as a message can bear.
    pub(crate) fn text(&self) -> String {
        const SHOWN: usize = 512;
        let text = match serde_json::from_slice::<ErrorBody>(&self.body) {
            Ok(body) => body.error,
            Err(_) => String::from_utf8_lossy(&self.body).into_owned(),
        };
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        match (text.is_empty(), text.char_indices().nth(SHOWN)) {
            (true, _) => "no reason given".to_owned(),
            (false, Some((end, _))) => format!("{}...", &text[..end]),
            (false, None) => text,
        }
    }

    /// Whether it has the form that the protocol gives to errors.
    pub(crate) fn is_error_body(&self) -> bool {
        serde_json::from_slice::<ErrorBody>(&self.body).is_ok()
    }
}

impl Repository {
    pub(crate) fn new(server: Arc<dyn Upstream>) -> Self {
        Self { server }
    }

    /// Asks the server. A body is sent with POST only.
    pub(crate) async fn ask(&self, method: Method, path: String, body: &'static str) -> Result<Answer, Failure> {
        let body = if method == Method::POST { Body::from(body) } else { Body::empty() };
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
        Ok(Answer { status, body: body.to_bytes().to_vec() })
    }

    /// What it says of itself.
    pub(crate) async fn metadata(&self) -> Result<Answer, Failure> {
        self.ask(Method::GET, "/v2".to_owned(), "").await
    }

    /// What it answers to a load, whatever that is.
    pub(crate) async fn load(&self, served: &str) -> Result<Answer, Failure> {
        self.ask(Method::POST, format!("/v2/repository/models/{served}/load"), "{}").await
    }

    /// What it answers to a load, over gRPC if it takes that.
    pub(crate) async fn load_well(&self, served: &str) -> Result<Answer, Failure> {
        match calls::load(self.server.as_ref(), served).await? {
            Some(answer) => Ok(answer),
            None => self.load(served).await,
        }
    }

    /// What it answers to an unload, whatever that is.
    pub(crate) async fn ask_to_unload(&self, served: &str) -> Result<Answer, Failure> {
        self.ask(Method::POST, format!("/v2/repository/models/{served}/unload"), "{}").await
    }

    /// Has it unload a model, which may go on after that. One that it does not know counts as unloaded.
    pub(crate) async fn unload(&self, served: &str) -> Result<(), Failure> {
        let answer = self.ask_to_unload(served).await?;
        if answer.status.is_success() || answer.status == StatusCode::NOT_FOUND {
            return Ok(());
        }
        let message = format!("the inference server refused to unload it ({}): {}", answer.status, answer.text());
        Err(runtime(message))
    }

    /// What it answers when it is asked whether a model is ready.
    pub(crate) async fn ask_whether_ready(&self, served: &str) -> Result<Answer, Failure> {
        self.ask(Method::GET, format!("/v2/models/{served}/ready"), "").await
    }

    /// Whether a model is ready.
    pub(crate) async fn ready(&self, served: &str) -> Result<bool, Failure> {
        let answer = self.ask_whether_ready(served).await?;
        match answer.status {
            status if status.is_success() => Ok(true),
            // MLServer says 404 of what it does not know, Triton 400, others 503 while they load.
            StatusCode::NOT_FOUND | StatusCode::BAD_REQUEST | StatusCode::SERVICE_UNAVAILABLE => Ok(false),
            status => {
                let message = format!("the inference server's readiness probe failed ({status}): {}", answer.text());
                Err(runtime(message))
            }
        }
    }

    /// Everything in its index. A server without one has none.
    pub(crate) async fn rows(&self) -> Result<Vec<Row>, Failure> {
        let answer = self.ask(Method::POST, "/v2/repository/index".to_owned(), "{}").await?;
        match answer.status {
            status if status.is_success() => {}
            StatusCode::NOT_FOUND | StatusCode::NOT_IMPLEMENTED => return Ok(Vec::new()),
            status => {
                return Err(runtime(format!("the inference server gave no index ({status}): {}", answer.text())));
            }
        }
        serde_json::from_slice(&answer.body)
            .map_err(|error| runtime(format!("the inference server's index can't be read: {error}")))
    }
}

pub(super) fn runtime(message: String) -> Failure {
    Failure { class: FailureClass::Runtime, message }
}

/// What a refused load means. Servers agree on little here, so the words decide where the status does not.
pub(super) fn load_failure(answer: &Answer) -> Failure {
    let (status, said) = (answer.status, answer.text());
    let lower = said.to_ascii_lowercase();
    let any = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    let class = if status == StatusCode::INSUFFICIENT_STORAGE
        || any(&["out of memory", "outofmemory", "cannot allocate", "can't allocate", "bad_alloc", "memoryerror"])
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

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> Answer {
        Answer { status: StatusCode::from_u16(status).expect("valid"), body: body.as_bytes().to_vec() }
    }

    #[test]
    fn refused_loads_are_told_apart() {
        let class = |status, body| load_failure(&answer(status, body)).class;
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
        assert_eq!(answer(500, "{\"error\":\"a\\n  b\"}").text(), "a b");
        assert_eq!(answer(500, "").text(), "no reason given");
        assert!(answer(500, &"x".repeat(9000)).text().len() < 600);
    }

    fn row(text: &str) -> Row {
        serde_json::from_str(text).expect("a row")
    }

    #[test]
    fn states_are_read_as_servers_write_them() {
        assert!(row(r#"{"name":"m","state":"READY"}"#).is_ready());
        assert!(row(r#"{"name":"m","state":"State.READY","reason":""}"#).is_ready());
        assert!(!row(r#"{"name":"m"}"#).takes_memory());
        assert!(!row(r#"{"name":"m","state":"State.UNAVAILABLE"}"#).takes_memory());
        for state in ["UNKNOWN", "LOADING", "UNLOADING"] {
            let row = row(&format!(r#"{{"name":"m","state":"{state}"}}"#));
            assert!(row.takes_memory() && !row.is_ready(), "{state}");
        }
        assert!(!row(r#"{"name":"m","state":null,"version":null}"#).takes_memory());
    }
}
