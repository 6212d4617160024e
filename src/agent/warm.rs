//! The warm-up: a first request, before a copy counts as Available.
//!
//! The rules of this module: what the inference server says of a request that failed is told as it is; a copy that can't
//! answer its warm-up has failed, and its memory is given back like that of any other.

use http::{Method, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Limited};
use serde_json::Value;
use tokio::time::timeout;

use super::{cache::Entry, core::Core, residence::late};
use crate::{
    domain::{
        copy::{Failure, FailureClass},
        warmup::{Warmup, inputs_for},
    },
    forward::{Body, Served},
};

/// Longest answer that is read.
const LONGEST_ANSWER: usize = 64 << 20;
/// As much of what the server said as a message can bear, in characters.
const SHOWN: usize = 400;

fn failed(message: String) -> Failure {
    Failure { class: FailureClass::Runtime, message }
}

impl Core {
    /// Has a copy that has just been loaded answer its warm-up, if it has one.
    pub(crate) async fn warm_up(&self, entry: &Entry) -> Result<(), Failure> {
        let within = self.options.probe_deadline;
        let asked = timeout(within, self.ask_first(entry)).await;
        let answered = asked.unwrap_or_else(|_| Err(late("its warm-up request was not answered", within)));
        if answered.is_err() {
            self.metrics.load_failed.inc();
            self.not_loaded(entry).await;
        }
        answered
    }

    async fn ask_first(&self, entry: &Entry) -> Result<(), Failure> {
        let model = format!("/v2/models/{}", entry.served);
        let inputs = match &entry.spec.warmup {
            Warmup::None => return Ok(()),
            Warmup::Inputs(inputs) => inputs.clone(),
            Warmup::Auto => {
                let (status, said) = self.ask(entry, Method::GET, model.clone(), String::new()).await?;
                let metadata: Option<Value> = serde_json::from_slice(&said).ok().filter(|_| status.is_success());
                let metadata = metadata.ok_or_else(|| {
                    failed(format!("it tells nothing of itself to warm it up with ({status}): {}", words(&said)))
                })?;
                inputs_for(&metadata).map_err(|problem| failed(format!("it can't be warmed up: {problem}")))?
            }
        };
        let body = format!("{{\"inputs\":{inputs}}}");
        let (status, said) = self.ask(entry, Method::POST, format!("{model}/infer"), body).await?;
        if status.is_success() {
            return Ok(());
        }
        Err(failed(format!("its warm-up request failed ({status}): {}", words(&said))))
    }

    async fn ask(
        &self,
        entry: &Entry,
        method: Method,
        path: String,
        body: String,
    ) -> Result<(StatusCode, Vec<u8>), Failure> {
        let request = http::Request::builder().method(method).uri(path).header(CONTENT_TYPE, "application/json");
        // It does not come through the door, which says this of all others.
        let request = request.extension(Served(entry.served.as_str().into()));
        let request =
            request.body(Body::from(body)).map_err(|error| failed(format!("its warm-up can't be sent: {error}")))?;
        let response = self.server.call(request).await;
        let response = response.map_err(|error| failed(format!("its warm-up request was not answered: {error}")))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), LONGEST_ANSWER).collect().await;
        let body = body.map_err(|error| failed(format!("the answer to its warm-up request broke off: {error}")))?;
        Ok((status, body.to_bytes().to_vec()))
    }
}

/// What the server said, on one line.
fn words(said: &[u8]) -> String {
    let error = serde_json::from_slice::<Value>(said).ok().and_then(|body| body["error"].as_str().map(str::to_owned));
    let text = error.unwrap_or_else(|| String::from_utf8_lossy(said).into_owned());
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None if line.is_empty() => "no reason given".to_owned(),
        None => line,
    }
}
