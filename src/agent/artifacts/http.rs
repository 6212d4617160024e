//! Artifacts from a web server: a URI that ends in a file name is one file.

use std::sync::Arc;

use futures::{FutureExt as _, future::BoxFuture};
use reqwest::{Client, Url};

use super::{
    refusal::{Asked, With},
    transfer::{Arrived, Transfers, Wanted},
    uri::{bad, decode, file_name, redacted},
    web::{Login, Web, client},
};
use crate::{
    domain::{
        copy::Failure,
        secret::{Credentials, Secret},
    },
    ports::{ArtifactSource, FetchRequest, Fetched, ProgressSink},
};

/// Fetches over HTTP and HTTPS.
#[derive(Debug)]
pub struct HttpSource {
    client: Client,
    transfers: Arc<Transfers>,
}

impl HttpSource {
    /// A source with connections of its own.
    ///
    /// # Errors
    /// When TLS can't be set up.
    pub fn new(transfers: Arc<Transfers>) -> Result<Self, Failure> {
        Ok(Self { client: client()?, transfers })
    }

    async fn get(&self, request: FetchRequest, progress: ProgressSink) -> Result<Fetched, Failure> {
        let shown = redacted(&request.uri);
        let url = Url::parse(&request.uri).map_err(|error| bad(format!("{shown} is not a URL: {error}")))?;
        let last = url.path_segments().and_then(Iterator::last).and_then(decode);
        let name = last.as_deref().and_then(file_name).map(ToOwned::to_owned).ok_or_else(|| {
            bad(format!("{shown} does not end in a file name; over HTTP a model is one file, give its URL"))
        })?;
        let login = request.credentials.as_ref().map_or(Ok(Login::Nobody), login)?;
        let with = request.credentials.clone().map_or(With::Nothing, With::Secret);
        let asked = Asked { shown, with, at: None };
        let origin = Web { client: &self.client, login, known: request.known.as_deref(), asked, commit: false };
        let file = Wanted { path: name, at: request.uri.clone(), bytes: None, tag: None, sha256: None };
        let mut arrived = self.transfers.fetch(&origin, &[file], &request, &progress).await?;
        Ok(match arrived.pop() {
            Some(Arrived::File(file, tag)) => Fetched::Files { tag, files: vec![file] },
            Some(Arrived::Unchanged) | None => Fetched::Unchanged,
        })
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

/// What a secret has for a web server: a token, or a user and a password.
fn login(credentials: &Credentials) -> Result<Login, Failure> {
    if let Some(token) = credentials.get(&["token", "bearer_token"]) {
        return Ok(Login::Token(Secret::new(token)));
    }
    let user = credentials.get(&["user", "username"]).ok_or_else(|| {
        bad(format!("{} has nothing for a web server; give it token, or user and password", credentials.name))
    })?;
    Ok(Login::User(user.to_owned(), Secret::new(credentials.get(&["password", "pass"]).unwrap_or_default())))
}
