//! A server that nobody says the kind of: it is asked once, when its index is first wanted.

use std::sync::{Arc, OnceLock};

use futures::{FutureExt as _, future::BoxFuture};
use http::StatusCode;
use serde::Deserialize;

use super::{Indexed, Kind, Layout, Listing, Oip, Repository, Runtime, Wanted, known, repository::runtime};
use crate::domain::{copy::Failure, memory::Resources};

/// Stands for the adapter until it is known, and for it after that. An agent wants the index before anything else,
/// so nothing is laid out or loaded before the kind is known.
#[derive(Debug)]
pub(super) struct Asked {
    repository: Repository,
    workers: u32,
    found: OnceLock<Arc<dyn Runtime>>,
    until_then: Oip,
}

#[derive(Deserialize)]
struct Metadata {
    #[serde(default)]
    name: String,
}

/// The kind of a server that calls itself so.
pub(in crate::agent) fn kind_of(name: &str) -> Kind {
    match name {
        "mlserver" => Kind::MlServer,
        "triton" => Kind::Triton,
        _ => Kind::Oip,
    }
}

impl Asked {
    pub(super) fn new(repository: Repository, workers: u32) -> Self {
        let until_then = Oip::new(Kind::Oip, repository.clone());
        Self { repository, workers, found: OnceLock::new(), until_then }
    }

    fn inner(&self) -> &dyn Runtime {
        match self.found.get() {
            Some(found) => found.as_ref(),
            None => &self.until_then,
        }
    }

    async fn find(&self) -> Result<(), Failure> {
        if self.found.get().is_some() {
            return Ok(());
        }
        let answer = self.repository.metadata().await?;
        let kind = match answer.status {
            status if status.is_success() => {
                serde_json::from_slice::<Metadata>(&answer.body).map_or(Kind::Oip, |metadata| kind_of(&metadata.name))
            }
            // A server need not tell about itself.
            StatusCode::NOT_FOUND | StatusCode::NOT_IMPLEMENTED => Kind::Oip,
            status => {
                let message = format!("the inference server does not say what it is ({status}): {}", answer.text());
                return Err(runtime(message));
            }
        };
        tracing::info!(kind = kind.name(), "the inference server was asked what it is");
        // Two that ask at once are told the same.
        self.found.get_or_init(|| known(kind, self.repository.clone(), self.workers));
        Ok(())
    }
}

impl Runtime for Asked {
    fn kind(&self) -> Kind {
        self.inner().kind()
    }

    fn reads(&self, path: &str) -> bool {
        self.inner().reads(path)
    }

    fn layout(&self, artifact: &Listing, wanted: &Wanted<'_>) -> Result<Layout, Failure> {
        self.inner().layout(artifact, wanted)
    }

    fn load<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        self.inner().load(served)
    }

    fn unload<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        self.inner().unload(served)
    }

    fn ready<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<bool, Failure>> {
        self.inner().ready(served)
    }

    fn index(&self) -> BoxFuture<'_, Result<Vec<Indexed>, Failure>> {
        async move {
            self.find().await?;
            self.inner().index().await
        }
        .boxed()
    }

    fn memory<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<Option<Resources>, Failure>> {
        self.inner().memory(served)
    }

    fn loads_block(&self) -> bool {
        self.inner().loads_block()
    }
}
