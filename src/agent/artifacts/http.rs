//! Artifacts from a web server: a URI that ends in a file name is one file.

use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture};
use reqwest::{
    Client, Response, StatusCode, Url,
    header::{ETAG, IF_NONE_MATCH},
};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;

use super::uri::{bad, decode, file_name, redacted};
use crate::{
    agent::disk,
    domain::copy::{Failure, FailureClass, Progress},
    ports::{ArtifactSource, FetchRequest, Fetched, FetchedFile, ProgressSink},
};

/// Longest silence of a server.
const SILENCE: Duration = Duration::from_secs(60);
/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Most redirects that are followed.
const REDIRECTS: usize = 5;

/// Fetches over HTTP and HTTPS.
#[derive(Debug)]
pub struct HttpSource {
    client: Client,
}

impl HttpSource {
    /// A source with connections of its own.
    ///
    /// # Errors
    /// When TLS can't be set up.
    pub fn new() -> Result<Self, Failure> {
        // Another part of the process may have chosen already; then that choice stands.
        drop(rustls::crypto::ring::default_provider().install_default());
        let client = Client::builder()
            .connect_timeout(CONNECT)
            .read_timeout(SILENCE)
            .redirect(reqwest::redirect::Policy::limited(REDIRECTS))
            .build()
            .map_err(|error| bad(format!("HTTP downloads can't be set up: {error}")))?;
        Ok(Self { client })
    }

    async fn get(&self, request: FetchRequest, progress: ProgressSink) -> Result<Fetched, Failure> {
        let shown = redacted(&request.uri);
        let url = Url::parse(&request.uri).map_err(|error| bad(format!("{shown} is not a URL: {error}")))?;
        let last = url.path_segments().and_then(Iterator::last).and_then(decode);
        let name = last.as_deref().and_then(file_name).map(ToOwned::to_owned).ok_or_else(|| {
            bad(format!("{shown} does not end in a file name; over HTTP a model is one file, give its URL"))
        })?;
        let mut get = self.client.get(url);
        if let Some(tag) = &request.known {
            get = get.header(IF_NONE_MATCH, tag);
        }
        let response = get.send().await.map_err(|error| broken(&shown, &error))?;
        match response.status() {
            StatusCode::NOT_MODIFIED if request.known.is_some() => return Ok(Fetched::Unchanged),
            StatusCode::OK => {}
            status => return Err(refused(&shown, status)),
        }
        let tag = response.headers().get(ETAG).and_then(|tag| tag.to_str().ok()).map(ToOwned::to_owned);
        let file = save(response, &shown, &name, &request, &progress).await?;
        Ok(Fetched::Files { tag, files: vec![file] })
    }
}

impl ArtifactSource for HttpSource {
    fn schemes(&self) -> &[&str] {
        &["http", "https"]
    }

    fn fetch(&self, request: FetchRequest, progress: ProgressSink) -> BoxFuture<'_, Result<Fetched, Failure>> {
        self.get(request, progress).boxed()
    }
}

async fn save(
    response: Response,
    shown: &str,
    name: &str,
    request: &FetchRequest,
    progress: &ProgressSink,
) -> Result<FetchedFile, Failure> {
    let total = response.content_length();
    let limit = request.limits.bytes;
    let too_large = || bad(format!("{shown} is larger than the limit of {limit} bytes"));
    if total.is_some_and(|total| total > limit) {
        return Err(too_large());
    }
    let path = request.into.join(name);
    let io = |error: std::io::Error| disk::failure("the download can't be written", &path, &error);
    let mut file = tokio::fs::File::create(&path).await.map_err(io)?;
    let mut digest = Sha256::new();
    let mut done = 0_u64;
    let mut chunks = response.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| broken(shown, &error))?;
        done = done.saturating_add(chunk.len() as u64);
        if done > limit {
            return Err(too_large());
        }
        digest.update(&chunk);
        file.write_all(&chunk).await.map_err(io)?;
        progress(Progress { done, total });
    }
    file.flush().await.map_err(io)?;
    if total.is_some_and(|total| total != done) {
        let total = total.unwrap_or_default();
        return Err(bad(format!("{shown} broke off after {done} of {total} bytes")));
    }
    Ok(FetchedFile { path: name.to_owned(), bytes: done, sha256: disk::hex(&digest.finalize()) })
}

fn refused(shown: &str, status: StatusCode) -> Failure {
    let (class, why) = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => (FailureClass::Authorisation, "may not be read"),
        StatusCode::NOT_FOUND | StatusCode::GONE => (FailureClass::Artifact, "does not exist"),
        StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => (FailureClass::Timeout, "took too long"),
        _ => (FailureClass::Artifact, "can't be fetched"),
    };
    Failure { class, message: format!("{shown} {why}: the server answered {status}") }
}

/// What the client says without its URL, which may carry secrets.
fn broken(shown: &str, error: &reqwest::Error) -> Failure {
    let class = if error.is_timeout() { FailureClass::Timeout } else { FailureClass::Artifact };
    let mut cause = std::error::Error::source(error);
    while let Some(deeper) = cause.and_then(std::error::Error::source) {
        cause = Some(deeper);
    }
    let why = match cause {
        Some(cause) => cause.to_string(),
        None if error.is_timeout() => "it took too long".to_owned(),
        None => "the connection failed".to_owned(),
    };
    Failure { class, message: format!("{shown} can't be fetched: {why}") }
}
