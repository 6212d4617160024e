//! An inference server and an artifact store that a simulation holds in its hands. The server notes each breach
//! of what Wharf promises about it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use sha2::{Digest as _, Sha256};
use wharf::{
    domain::copy::{Failure, FailureClass},
    forward::{Body, Request, Response, Upstream, UpstreamError},
    ports::{ArtifactSource, FetchRequest, Fetched, FetchedFile, ProgressSink},
};

use super::random::Random;

/// The file of an artifact: `LABEL BYTES`.
const FILE: &str = "model.sim";

/// One inference server. It outlives its agent, as another process would.
#[derive(Debug)]
pub(crate) struct FakeServer(Mutex<State>);

#[derive(Debug)]
struct State {
    capacity: u64,
    repository: PathBuf,
    loaded: BTreeMap<String, Loaded>,
    in_flight: BTreeMap<String, u32>,
    load_millis: (u64, u64),
    infer_millis: (u64, u64),
    /// Loads that fail, of a hundred.
    failing: u64,
    random: Random,
    breaches: Vec<String>,
    /// Every load and unload.
    history: Vec<String>,
    /// The ids of the requests that some inference server has begun with.
    begun: Arc<Mutex<BTreeSet<String>>>,
}

#[derive(Clone, Debug)]
struct Loaded {
    bytes: u64,
    label: String,
    ready: bool,
}

impl FakeServer {
    pub(crate) fn new(capacity: u64, repository: PathBuf, seed: u64, begun: Arc<Mutex<BTreeSet<String>>>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State {
            capacity,
            repository,
            loaded: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            load_millis: (5, 300),
            infer_millis: (1, 20),
            failing: 0,
            random: Random::new(seed),
            breaches: Vec::new(),
            history: Vec::new(),
            begun,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many of a hundred loads fail from now on.
    pub(crate) fn fail(&self, percent: u64) {
        self.state().failing = percent;
    }

    /// The process dies: its memory is gone.
    pub(crate) fn die(&self) {
        let mut state = self.state();
        state.loaded.clear();
        state.in_flight.clear();
    }

    /// Breaches noted so far.
    pub(crate) fn breaches(&self) -> Vec<String> {
        self.state().breaches.clone()
    }

    /// Served names in memory.
    pub(crate) fn loaded(&self) -> Vec<String> {
        self.state().loaded.keys().cloned().collect()
    }

    /// Every load and unload so far.
    pub(crate) fn history(&self) -> Vec<String> {
        self.state().history.clone()
    }

    async fn serve(&self, request: Request) -> Response {
        let path = request.uri().path().to_owned();
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        match parts.as_slice() {
            ["v2", "repository", "index"] => {
                let row = |(name, one): (&String, &Loaded)| serde_json::json!({"name": name, "state": if one.ready { "READY" } else { "LOADING" }});
                let rows: Vec<_> = self.state().loaded.iter().map(row).collect();
                answer(200, &serde_json::to_string(&rows).unwrap())
            }
            ["v2", "repository", "models", name, "load"] => self.load(name).await,
            ["v2", "repository", "models", name, "unload"] => self.unload(name),
            ["v2", "models", name, "ready"] => {
                let ready = self.state().loaded.get(*name).is_some_and(|one| one.ready);
                answer(if ready { 200 } else { 404 }, "")
            }
            ["v2", "models", name, "infer"] => {
                let id = request.headers().get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
                self.begin(id, name);
                self.infer(name).await
            }
            _ => answer(404, "no such path"),
        }
    }

    async fn load(&self, name: &str) -> Response {
        let (millis, failing) = {
            let mut state = self.state();
            let file = state.repository.join(name).join(FILE);
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            let Some((label, bytes)) = text.trim().split_once(' ') else {
                return answer(422, &format!("no {}", file.display()));
            };
            let loaded = Loaded { bytes: bytes.parse().unwrap(), label: label.to_owned(), ready: false };
            state.history.push(format!("load {name} {label}"));
            if state.loaded.insert(name.to_owned(), loaded).is_some() {
                state.breaches.push(format!("{name} was loaded in the place of itself"));
            }
            let used: u64 = state.loaded.values().map(|one| one.bytes).sum();
            if used > state.capacity {
                let capacity = state.capacity;
                state.breaches.push(format!("{used} bytes are resident of {capacity}, with {name}"));
            }
            let (first, last) = state.load_millis;
            let failing = state.failing;
            (state.random.between(first, last), state.random.percent(failing))
        };
        tokio::time::sleep(Duration::from_millis(millis)).await;
        let mut state = self.state();
        if failing {
            state.loaded.remove(name);
            return answer(500, "it was told to fail");
        }
        match state.loaded.get_mut(name) {
            Some(one) => {
                one.ready = true;
                answer(200, "")
            }
            None => answer(500, "it died meanwhile"),
        }
    }

    fn unload(&self, name: &str) -> Response {
        let mut state = self.state();
        let held = state.in_flight.get(name).copied().unwrap_or(0);
        if held > 0 {
            state.breaches.push(format!("{name} was unloaded under {held} requests"));
        }
        state.history.push(format!("unload {name}"));
        match state.loaded.remove(name) {
            Some(_) => answer(200, ""),
            None => answer(404, "not loaded"),
        }
    }

    /// Notes a request that comes a second time.
    fn begin(&self, id: &str, name: &str) {
        let mut state = self.state();
        let new = state.begun.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned());
        if !new {
            state.breaches.push(format!("the request {id} for {name} came a second time"));
        }
    }

    async fn infer(&self, name: &str) -> Response {
        let (label, millis) = {
            let mut state = self.state();
            let Some(one) = state.loaded.get(name).filter(|one| one.ready).cloned() else {
                state.breaches.push(format!("{name} was asked for an inference while it was not loaded"));
                return answer(404, "not loaded");
            };
            *state.in_flight.entry(name.to_owned()).or_default() += 1;
            let (first, last) = state.infer_millis;
            (one.label, state.random.between(first, last))
        };
        let _done = InFlight(self, name);
        tokio::time::sleep(Duration::from_millis(millis)).await;
        answer(200, &label)
    }
}

struct InFlight<'a>(&'a FakeServer, &'a str);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        if let Some(count) = self.0.state().in_flight.get_mut(self.1) {
            *count = count.saturating_sub(1);
        }
    }
}

fn answer(code: u16, text: &str) -> Response {
    http::Response::builder().status(code).body(Body::from(text.to_owned())).unwrap()
}

impl Upstream for FakeServer {
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        self.serve(request).map(Ok).boxed()
    }
}

/// Artifacts that their URI describes: `sim://LABEL/BYTES`, or `sim://LABEL/missing`.
#[derive(Debug)]
pub(crate) struct FakeSource;

/// The URI of an artifact.
pub(crate) fn uri(label: &str, bytes: u64) -> String {
    format!("sim://{label}/{bytes}")
}

impl ArtifactSource for FakeSource {
    fn schemes(&self) -> &[&str] {
        &["sim"]
    }

    fn fetch(&self, request: FetchRequest, _: ProgressSink) -> BoxFuture<'_, Result<Fetched, Failure>> {
        async move {
            let (label, bytes) = request.uri.strip_prefix("sim://").and_then(|rest| rest.split_once('/')).unwrap();
            tokio::time::sleep(Duration::from_millis(10)).await;
            if bytes == "missing" {
                let message = format!("{} is not there", request.uri);
                return Err(Failure { class: FailureClass::Artifact, message });
            }
            let text = format!("{label} {bytes}");
            std::fs::write(request.into.join(FILE), &text).unwrap();
            let sha256 = Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect();
            let file = FetchedFile { path: FILE.to_owned(), bytes: text.len() as u64, sha256 };
            Ok(Fetched::Files { tag: None, files: vec![file] })
        }
        .boxed()
    }
}
