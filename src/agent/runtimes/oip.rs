//! Any server of the Open Inference Protocol with its model repository extension, over REST: the built-in runtime
//! and servers that nothing more is known of. A copy's folder is the artifact as it is.

use futures::{FutureExt as _, future::BoxFuture};
use http::Method;
use serde::Deserialize;

use super::{
    Indexed, Kind, Layout, Listing, Runtime, Wanted,
    repository::{Repository, Row, load_failure},
    select,
};
use crate::domain::{
    copy::Failure,
    memory::{Bytes, Resources},
};

/// What of a model's metadata says how much memory it takes.
#[derive(Deserialize)]
struct Metadata {
    #[serde(default)]
    parameters: Parameters,
}

#[derive(Default, Deserialize)]
struct Parameters {
    memory_bytes: Option<u64>,
}

/// The adapter.
#[derive(Debug)]
pub(super) struct Oip {
    kind: Kind,
    repository: Repository,
}

impl Oip {
    pub(super) fn new(kind: Kind, repository: Repository) -> Self {
        Self { kind, repository }
    }
}

/// What of an index takes memory. A model of several versions has a row for each: it is ready when one of them is.
pub(super) fn indexed(rows: Vec<Row>) -> Vec<Indexed> {
    let mut all: Vec<Indexed> = Vec::new();
    for row in rows.into_iter().filter(Row::takes_memory) {
        let ready = row.is_ready();
        match all.iter_mut().find(|one| one.name == row.name) {
            Some(one) => one.ready |= ready,
            None => all.push(Indexed { ready, name: row.name }),
        }
    }
    all
}

impl Runtime for Oip {
    fn kind(&self) -> Kind {
        self.kind
    }

    fn reads(&self, _: &str) -> bool {
        false
    }

    fn layout(&self, artifact: &Listing, wanted: &Wanted<'_>) -> Result<Layout, Failure> {
        select::plain(artifact.paths(), wanted.spec.artifact_version).map(Layout::of)
    }

    fn load<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        async move {
            let answer = self.repository.load(served).await?;
            if answer.status.is_success() { Ok(()) } else { Err(load_failure(&answer)) }
        }
        .boxed()
    }

    fn unload<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        self.repository.unload(served).boxed()
    }

    fn ready<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<bool, Failure>> {
        self.repository.ready(served).boxed()
    }

    fn index(&self) -> BoxFuture<'_, Result<Vec<Indexed>, Failure>> {
        async move { Ok(indexed(self.repository.rows().await?)) }.boxed()
    }

    /// The built-in runtime says it with a model's metadata; the protocol has no word for it.
    fn memory<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<Option<Resources>, Failure>> {
        async move {
            if self.kind != Kind::Builtin {
                return Ok(None);
            }
            let answer = self.repository.ask(Method::GET, format!("/v2/models/{served}"), "").await?;
            let said = serde_json::from_slice::<Metadata>(&answer.body).ok().filter(|_| answer.status.is_success());
            Ok(said.and_then(|said| said.parameters.memory_bytes).map(|bytes| Resources::primary(Bytes(bytes))))
        }
        .boxed()
    }

    fn loads_block(&self) -> bool {
        false
    }
}
