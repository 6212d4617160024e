//! The adapter of a server that the agent runs: the same as of any other, and it knows that the server may end.
//!
//! The rules of this module: what was loaded in a run that has ended takes no memory, and is unloaded as soon as someone
//! asks; whoever loads waits until the server runs; what is loaded is under suspicion until it is in memory and has
//! answered what is asked first; after an end models are loaded one at a time, so that the next end has one cause.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use tokio::{sync::OwnedMutexGuard, time::timeout};

use super::Server;
use crate::{
    agent::{
        cache::Entry,
        core::Core,
        runtimes::{Indexed, Kind, Layout, Listing, Runtime, Wanted},
    },
    domain::{
        copy::{Failure, FailureClass},
        memory::Resources,
    },
};

/// How long it may take until the end of a server is known that answers nothing any more.
const NOTICED: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub(crate) struct Guarded {
    inner: Arc<dyn Runtime>,
    server: Arc<Server>,
    /// What is, or may be, in memory, and in which run.
    loaded: Mutex<BTreeMap<String, u64>>,
    /// What is being loaded; with the turn of one that is to be alone.
    loading: Mutex<BTreeMap<String, Option<OwnedMutexGuard<()>>>>,
    alone: Arc<tokio::sync::Mutex<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A copy on its way into memory, for as long as this lives. From its load on it is under suspicion.
pub(crate) struct Loading<'a>(&'a Guarded, &'a str);

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        lock(&self.0.loading).remove(self.1);
    }
}

impl Guarded {
    pub(crate) fn new(inner: Arc<dyn Runtime>, server: Arc<Server>) -> Self {
        Self { inner, server, loaded: Mutex::default(), loading: Mutex::default(), alone: Arc::default() }
    }

    /// What is being loaded.
    pub(super) fn loading(&self) -> Vec<String> {
        lock(&self.loading).keys().cloned().collect()
    }

    /// Whether it may be in the memory of the server that runs.
    fn may_be_loaded(&self, served: &str) -> bool {
        let loaded = lock(&self.loaded).get(served).copied();
        loaded.is_some() && loaded == self.server.life()
    }

    /// An end breaks the connection first and is known a moment later; until then this is what was being loaded.
    async fn end_is_known(&self, served: &str) {
        let life = lock(&self.loaded).get(served).copied();
        if let Some(life) = life
            && !matches!(timeout(NOTICED, self.inner.ready(served)).await, Ok(Ok(_)))
        {
            drop(timeout(NOTICED, self.server.no_longer(life)).await);
        }
    }

    async fn load_in_turn(&self, served: &str) -> Result<(), Failure> {
        let turn = || Arc::clone(&self.alone).lock_owned();
        let mut alone = None;
        if self.server.is_careful() {
            alone = Some(turn().await);
        }
        let life = self.server.up().await;
        let alone = match alone {
            // It ended while this waited.
            None if self.server.is_careful() => Some(turn().await),
            alone => alone,
        };
        lock(&self.loaded).insert(served.to_owned(), life);
        lock(&self.loading).insert(served.to_owned(), alone);
        let Err(failure) = self.inner.load(served).await else { return Ok(()) };
        self.end_is_known(served).await;
        lock(&self.loading).remove(served);
        match self.server.life() {
            Some(now) if now == life => Err(failure),
            Some(_) | None => Err(gone("ended while it loaded the model")),
        }
    }
}

impl Core {
    /// Has a copy count as being loaded, from its load on and for as long as this lives.
    pub(in crate::agent) fn loading<'a>(&'a self, entry: &'a Entry) -> Option<Loading<'a>> {
        self.guarded.as_ref().map(|guarded| Loading(guarded, &entry.served))
    }

    /// A load, or what is asked first, has failed: the server's end is known if that was why, and the next one may load.
    pub(in crate::agent) async fn not_loaded(&self, entry: &Entry) {
        if let Some(guarded) = &self.guarded
            && guarded.loading().contains(&entry.served)
        {
            guarded.end_is_known(&entry.served).await;
            lock(&guarded.loading).remove(&entry.served);
        }
    }
}

fn gone(what: &str) -> Failure {
    Failure { class: FailureClass::Runtime, message: format!("the inference server {what}") }
}

impl Runtime for Guarded {
    fn kind(&self) -> Kind {
        self.inner.kind()
    }

    fn reads(&self, path: &str) -> bool {
        self.inner.reads(path)
    }

    fn layout(&self, artifact: &Listing, wanted: &Wanted<'_>) -> Result<Layout, Failure> {
        self.inner.layout(artifact, wanted)
    }

    fn load<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        self.load_in_turn(served).boxed()
    }

    fn unload<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        async move {
            if !self.may_be_loaded(served) {
                return Ok(());
            }
            let done = self.inner.unload(served).await;
            if done.is_err() && self.may_be_loaded(served) {
                return done;
            }
            lock(&self.loaded).remove(served);
            Ok(())
        }
        .boxed()
    }

    fn ready<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<bool, Failure>> {
        self.inner.ready(served)
    }

    fn index(&self) -> BoxFuture<'_, Result<Vec<Indexed>, Failure>> {
        async move {
            let life = self.server.up().await;
            let index = self.inner.index().await?;
            lock(&self.loaded).extend(index.iter().map(|one| (one.name.clone(), life)));
            Ok(index)
        }
        .boxed()
    }

    fn memory<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<Option<Resources>, Failure>> {
        self.inner.memory(served)
    }

    fn loads_block(&self) -> bool {
        self.inner.loads_block()
    }
}
