//! Artifacts from a web server: a URI that ends in a file name is one file.

use std::sync::Arc;

use futures::{FutureExt as _, future::BoxFuture};
use reqwest::{Client, Url};

use super::{
    refusal::{Asked, With},
    transfer::{Arrived, Transfers, Wanted},
    uri::{bad, decode, file_name, redacted},
    web::{Login, Web, client, is_for},
};
use crate::{
    domain::{
        copy::{Failure, FailureClass},
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
        let login = request.credentials.as_ref().map_or(Ok(Login::Nobody), |secret| login(secret, &url))?;
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

/// What a secret has for the web server of `url`: a token, or a user and a password. Anybody who may submit a model may
/// name any secret and any server, so the secret itself has to say which server it is for.
fn login(credentials: &Credentials, url: &Url) -> Result<Login, Failure> {
    let refused = |message: String| Failure { class: FailureClass::Authorisation, message };
    let (name, server) = (&credentials.name, url.origin().ascii_serialization());
    if let Some(kind) = credentials.kind.as_deref().filter(|kind| !matches!(*kind, "http" | "https")) {
        return Err(refused(format!(
            "{name} is for a store of type {kind}, and the URI needs one of type http; name another"
        )));
    }
    match is_for(credentials, url) {
        Some(true) => {}
        Some(false) => {
            return Err(refused(format!(
                "{name} is for another server than {server}; name another, or correct its url"
            )));
        }
        None => {
            return Err(refused(format!(
                "{name} does not say which server it is for, and is sent to none; add url: {server} to it"
            )));
        }
    }
    if let Some(token) = credentials.get(&["token", "bearer_token"]) {
        return Ok(Login::Token(Secret::new(token)));
    }
    let user = credentials
        .get(&["user", "username"])
        .ok_or_else(|| bad(format!("{name} has nothing for a web server; give it token, or user and password")))?;
    Ok(Login::User(user.to_owned(), Secret::new(credentials.get(&["password", "pass"]).unwrap_or_default())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(uri: &str, kind: Option<&str>, parameters: &[(&str, &str)]) -> Result<Login, String> {
        let parameters = parameters.iter().map(|(name, value)| ((*name).to_owned(), Secret::new(*value))).collect();
        let kind = kind.map(ToOwned::to_owned);
        let secret = Credentials { name: "secret \"s\"".to_owned(), remote: None, kind, parameters };
        login(&secret, &Url::parse(uri).expect("a URL")).map_err(|failure| failure.message)
    }

    #[test]
    fn a_login_is_sent_to_the_server_that_its_secret_names_and_to_no_other() {
        let token = ("token", "hunter22");
        for (place, uri) in [
            (("url", "https://models.example"), "https://models.example/m.onnx"),
            (("url", "https://models.example/private/"), "https://models.example:443/m.onnx"),
            (("host", "models.example"), "https://models.example/m.onnx"),
            (("host", "models.example:8443"), "https://models.example:8443/m.onnx"),
            (("url", "http://10.0.0.1:8080"), "http://10.0.0.1:8080/m.onnx"),
        ] {
            assert!(matches!(sent(uri, None, &[token, place]), Ok(Login::Token(_))), "{uri}");
        }
        for uri in [
            "http://models.example/m.onnx",
            "https://models.example:8443/m.onnx",
            "https://evil.example/m.onnx",
            "https://models.example.evil.example/m.onnx",
            "https://models.example@evil.example/m.onnx",
        ] {
            let refused = sent(uri, None, &[token, ("url", "https://models.example")]).expect_err(uri);
            assert!(refused.contains("for another server"), "{refused}");
        }
        let refused = sent("https://h/m", None, &[token]).expect_err("it names none");
        assert!(refused.contains("add url: https://h") && !refused.contains("hunter22"), "{refused}");
        let refused = sent("https://h/m", Some("s3"), &[token, ("url", "https://h")]).expect_err("of S3");
        assert!(refused.contains("of type s3"), "{refused}");
        assert!(sent("https://h/m", Some("http"), &[("user", "u"), ("url", "https://h")]).is_ok());
    }
}
