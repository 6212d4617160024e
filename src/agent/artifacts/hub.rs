//! Artifacts from a model hub that speaks Hugging Face's API: `hf://ORG/NAME[@REVISION][/PATH]`.
//!
//! A revision is a branch, a tag or a commit; what is fetched is the commit that it stands for at that moment.

use std::{fmt, sync::Arc};

use futures::{FutureExt as _, future::BoxFuture};
use reqwest::{Client, Url, header::LINK};
use serde::Deserialize;

use super::{
    refusal::{Asked, With},
    transfer::{Arrived, Transfers, Trouble, Wanted, within},
    uri::{bad, redacted},
    web::{Login, Web, client, is_for, refused, send},
};
use crate::{
    domain::{
        copy::{Failure, FailureClass},
        secret::{Credentials, Secret},
    },
    ports::{ArtifactSource, FetchRequest, Fetched, ProgressSink},
};

/// Most pages of a listing.
const PAGES: usize = 200;
/// The largest page.
const PAGE: usize = 16 << 20;

/// Fetches from a model hub.
pub struct HubSource {
    client: Client,
    endpoint: String,
    token: Option<Secret>,
    transfers: Arc<Transfers>,
}

impl fmt::Debug for HubSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSource").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

/// Where in the hub.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    repository: String,
    revision: String,
    /// Without slashes at its ends.
    path: String,
}

impl Place {
    fn parse(uri: &str) -> Result<Self, Failure> {
        let shown = redacted(uri);
        let wrong = || {
            bad(format!(
                "{shown} names no model; it is written hf://ORG/NAME, hf://ORG/NAME@REVISION or hf://ORG/NAME/PATH"
            ))
        };
        let rest = uri.split_once("://").map_or(uri, |(_, rest)| rest).trim_end_matches('/');
        let mut parts = rest.splitn(3, '/');
        let first = parts.next().filter(|first| !first.is_empty()).ok_or_else(wrong)?;
        // A model of the hub's own has no organisation: hf://gpt2.
        let (owner, named) = match parts.next() {
            Some(second) => (Some(first), second),
            None => (None, first),
        };
        let (name, revision) = named.split_once(['@', ':']).unwrap_or((named, "main"));
        let sound = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        };
        if !sound(name) || !owner.is_none_or(sound) || revision.is_empty() {
            return Err(wrong());
        }
        let repository = owner.map_or_else(|| name.to_owned(), |owner| format!("{owner}/{name}"));
        let path = parts.next().unwrap_or_default().trim_matches('/').to_owned();
        Ok(Self { repository, revision: super::uri::decode(revision).ok_or_else(wrong)?, path })
    }
}

#[derive(Deserialize)]
struct Revision {
    sha: String,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    size: u64,
    oid: String,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

impl HubSource {
    /// A source at `endpoint`, which uses `token` for models that name no secret.
    ///
    /// # Errors
    /// When TLS can't be set up.
    pub fn new(endpoint: &str, token: Option<String>, transfers: Arc<Transfers>) -> Result<Self, Failure> {
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        Ok(Self { client: client()?, endpoint, token: token.map(Secret::new), transfers })
    }

    async fn get(&self, request: FetchRequest, progress: ProgressSink) -> Result<Fetched, Failure> {
        let place = Place::parse(&request.uri)?;
        let secret = request.credentials.as_ref();
        let endpoint = secret.and_then(|secret| secret.get(&["endpoint", "hf_endpoint"])).unwrap_or(&self.endpoint);
        if let Some(secret) = secret {
            check(secret, endpoint)?;
        }
        let token = secret.and_then(token_of).or_else(|| if secret.is_none() { self.token.clone() } else { None });
        let with = match (secret, &token) {
            (Some(secret), _) => With::Secret(secret.clone()),
            (None, Some(token)) => With::Own(vec![token.clone()]),
            (None, None) => With::Nothing,
        };
        let asked = Asked { shown: redacted(&request.uri), with, at: Some(redacted(endpoint)) };
        let login = token.map_or(Login::Nobody, Login::Token);
        let hub = Hub { client: &self.client, endpoint, login, asked };
        let patience = self.transfers.patience;
        let commit = patience.insist(|| hub.commit(&place)).await?;
        let tag = format!("{commit}:{}", place.path);
        if request.known.as_ref() == Some(&tag) {
            return Ok(Fetched::Unchanged);
        }
        let files = patience.insist(|| hub.list(&place, &commit, request.limits.files)).await?;
        within(&request, files.len(), files.iter().filter_map(|file| file.bytes).sum())?;
        let origin = Web { client: hub.client, login: hub.login, known: None, asked: hub.asked, commit: true };
        let arrived = self.transfers.fetch(&origin, &files, &request, &progress).await?;
        Ok(Fetched::Files { tag: Some(tag), files: arrived.into_iter().filter_map(Arrived::file).collect() })
    }
}

impl ArtifactSource for HubSource {
    fn schemes(&self) -> &[&str] {
        &["hf"]
    }

    fn fetch(&self, request: FetchRequest, progress: ProgressSink) -> BoxFuture<'_, Result<Fetched, Failure>> {
        self.get(request, progress).boxed()
    }
}

fn token_of(secret: &Credentials) -> Option<Secret> {
    secret.get(&["token", "hf_token", "hugging_face_hub_token"]).map(Secret::new)
}

/// A secret of another kind of store, or for another server, has nothing for the hub at `endpoint`.
fn check(secret: &Credentials, endpoint: &str) -> Result<(), Failure> {
    let refused = |message: String| Err(Failure { class: FailureClass::Authorisation, message });
    let name = &secret.name;
    if let Some(kind) = secret.kind.as_deref().filter(|kind| !matches!(*kind, "hf" | "huggingface" | "hub")) {
        return refused(format!(
            "{name} is for a store of type {kind}, and the URI needs one of type hf; name another"
        ));
    }
    let elsewhere = Url::parse(endpoint).is_ok_and(|hub| is_for(secret, &hub) == Some(false));
    if elsewhere {
        return refused(format!("{name} is for another server than the hub at {}; name another", redacted(endpoint)));
    }
    Ok(())
}

/// One hub, asked by somebody.
struct Hub<'a> {
    client: &'a Client,
    endpoint: &'a str,
    login: Login,
    asked: Asked,
}

impl Hub<'_> {
    fn url(&self, parts: &[&str]) -> Result<Url, Failure> {
        let wrong = || {
            let shown = redacted(self.endpoint);
            bad(format!("{shown} is no address of a hub; correct agent.hub, or the secret's endpoint"))
        };
        let mut url = Url::parse(self.endpoint).map_err(|_| wrong())?;
        url.path_segments_mut().map_err(|()| wrong())?.pop_if_empty().extend(parts);
        Ok(url)
    }

    /// The commit that the revision stands for.
    async fn commit(&self, place: &Place) -> Result<String, Trouble> {
        let mut parts = vec!["api", "models"];
        parts.extend(place.repository.split('/'));
        parts.extend(["revision", place.revision.as_str()]);
        let (revision, _) = self.ask::<Revision>(self.url(&parts)?).await?;
        if revision.sha.is_empty() || !revision.sha.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(bad(format!("{} can't be fetched: the hub's answer names no commit", self.asked.shown)).into());
        }
        Ok(revision.sha)
    }

    /// The files that `place` means.
    async fn list(&self, place: &Place, commit: &str, most: usize) -> Result<Vec<Wanted>, Trouble> {
        let mut parts = vec!["api", "models"];
        parts.extend(place.repository.split('/'));
        parts.extend(["tree", commit]);
        let mut url = self.url(&parts)?;
        url.query_pairs_mut().append_pair("recursive", "true");
        let (mut files, mut next) = (Vec::new(), Some(url));
        for _ in 0..PAGES {
            let Some(url) = next.take() else { break };
            let (entries, following) = self.ask::<Vec<Entry>>(url).await?;
            for entry in entries.into_iter().filter(|entry| entry.kind == "file") {
                let Some(path) = below(&place.path, &entry.path) else { continue };
                if files.len() == most {
                    return Err(bad(format!("{} has more files than the limit of {most}", self.asked.shown)).into());
                }
                files.push(self.wanted(place, commit, path.to_owned(), entry)?);
            }
            next = following;
        }
        if next.is_some() {
            return Err(bad(format!("{} has a listing without an end", self.asked.shown)).into());
        }
        if files.is_empty() {
            return Err(
                bad(format!("{} has no files in the hub; correct the path in storageUri", self.asked.shown)).into()
            );
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(files)
    }

    fn wanted(&self, place: &Place, commit: &str, path: String, entry: Entry) -> Result<Wanted, Failure> {
        let mut parts: Vec<&str> = place.repository.split('/').collect();
        parts.extend(["resolve", commit]);
        parts.extend(entry.path.split('/'));
        let at = self.url(&parts)?.to_string();
        let (bytes, sha256) = match entry.lfs {
            Some(lfs) => (lfs.size, Some(lfs.oid.trim_start_matches("sha256:").to_ascii_lowercase())),
            None => (entry.size, None),
        };
        Ok(Wanted { path, at, bytes: Some(bytes), tag: Some(entry.oid), sha256 })
    }

    /// One page, and the URL of the next.
    async fn ask<T: for<'a> Deserialize<'a>>(&self, url: Url) -> Result<(T, Option<Url>), Trouble> {
        let response = send(self.login.on(self.client.get(url.clone())), &self.asked).await?;
        if !response.status().is_success() {
            return Err(refused(response, &self.asked).await);
        }
        let link = response.headers().get(LINK).and_then(|link| link.to_str().ok()).and_then(next_of);
        let next = link.map(|link| following(&url, link)).transpose().map_err(|()| {
            bad(format!("{} can't be listed: the hub's answer names a next page that is no URL", self.asked.shown))
        })?;
        let mut response = response;
        let mut text = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.asked.broken(&error))? {
            text.extend_from_slice(&chunk);
            if text.len() > PAGE {
                return Err(bad(format!("{} has a listing that is too large", self.asked.shown)).into());
            }
        }
        let parsed = serde_json::from_slice(&text);
        let parsed = parsed
            .map_err(|error| bad(format!("{}: the hub's answer is not understood: {error}", self.asked.shown)))?;
        Ok((parsed, next))
    }
}

/// The page `link`, which comes after the one at `url`, at the same hub: the token is for it alone, and one behind a
/// proxy may call itself otherwise.
fn following(url: &Url, link: &str) -> Result<Url, ()> {
    let named = url.join(link).map_err(drop)?;
    let mut next = url.clone();
    next.set_path(named.path());
    next.set_query(named.query());
    Ok(next)
}

/// The URL that is `rel="next"`.
fn next_of(link: &str) -> Option<&str> {
    link.split(',')
        .find(|part| part.contains("rel=\"next\""))?
        .trim()
        .strip_prefix('<')?
        .split_once('>')
        .map(|(url, _)| url)
}

/// `path` as seen from `folder`, or its own name when it is what is meant.
fn below<'a>(folder: &str, path: &'a str) -> Option<&'a str> {
    if folder.is_empty() {
        return Some(path);
    }
    if folder == path {
        return path.rsplit('/').next();
    }
    path.strip_prefix(folder)?.strip_prefix('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_has_a_repository_a_revision_and_a_path() {
        let place = |uri: &str| {
            let place = Place::parse(uri).expect(uri);
            (place.repository, place.revision, place.path)
        };
        let owned = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
        assert_eq!(place("hf://org/name"), owned("org/name", "main", ""));
        assert_eq!(place("hf://gpt2"), owned("gpt2", "main", ""));
        assert_eq!(place("hf://org/name@v1/onnx/m.onnx"), owned("org/name", "v1", "onnx/m.onnx"));
        assert_eq!(place("hf://org/name:abc/"), owned("org/name", "abc", ""));
        assert_eq!(place("hf://org/name@refs%2Fpr%2F1/x"), owned("org/name", "refs/pr/1", "x"));
        for bad in ["hf://", "hf:///x", "hf://org/name@", "hf://o rg/name", "hf://.org/name"] {
            assert!(Place::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn listings_go_on() {
        assert_eq!(next_of("<https://h/a?cursor=1>; rel=\"next\""), Some("https://h/a?cursor=1"));
        assert_eq!(next_of("<https://h/a>; rel=\"prev\""), None);
        let first = Url::parse("https://hub:8443/api/tree?recursive=true").expect("a URL");
        let next = |link: &str| following(&first, link).map(String::from);
        // Never elsewhere, and never without TLS.
        for link in ["https://evil/api/tree?cursor=1", "http://hub/api/tree?cursor=1", "//evil/api/tree?cursor=1"] {
            assert_eq!(next(link).as_deref(), Ok("https://hub:8443/api/tree?cursor=1"), "{link}");
        }
        assert_eq!(next("?cursor=2").as_deref(), Ok("https://hub:8443/api/tree?cursor=2"));
        assert!(next("https://[").is_err());
        assert_eq!(below("a", "a/b"), Some("b"));
        assert_eq!(below("a/b", "a/b"), Some("b"));
        assert_eq!(below("a", "ab"), None);
    }
}
