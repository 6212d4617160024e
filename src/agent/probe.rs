//! What a running inference server is and how it behaves, found out by asking it.
//!
//! The rule of this module: nothing of the user's is loaded or unloaded but the one model that was named for it; all
//! else is asked about a model that no server has.

use std::{sync::Arc, time::Duration};

use http::{Method, StatusCode};
use serde::Deserialize;
use tokio::time::{sleep, timeout};

use super::runtimes::{Answer, Kind, Repository, Row, kind_of};
use crate::{domain::copy::Failure, forward::Upstream, ports::Clock};

/// A name that no model has.
const NOBODY: &str = "wharf-probe-of-no-model";

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Findings {
    /// What it calls itself; empty when it does not say.
    pub name: String,
    /// Its version, as it says.
    pub version: String,
    /// The extensions that it says it has.
    pub extensions: Vec<String>,
    /// Which adapter it needs.
    pub kind: Kind,
    /// Whether it says that it is ready.
    pub ready: bool,
    /// Its index, if it has one.
    pub index: Option<Index>,
    /// What it answers about a model that it does not have.
    pub missing: Missing,
    /// How it treated the model that it was to load and unload.
    pub trial: Option<Result<Trial, String>>,
}

/// The index of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Index {
    /// Models in it.
    pub models: usize,
    /// Those that take memory.
    pub loaded: usize,
    /// Whether it is only given to a request with a JSON body.
    pub needs_body: bool,
}

/// Answers about a model that is not there, as HTTP statuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// To the question whether it is ready.
    pub ready: u16,
    /// To the question for its metadata.
    pub metadata: u16,
    /// To a load.
    pub load: u16,
    /// To an unload.
    pub unload: u16,
    /// Whether the server knows the calls to load and to unload at all.
    pub repository: bool,
}

/// One load and one unload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial {
    /// How long the load took.
    pub load: Duration,
    /// Whether it was ready once the load had answered.
    pub ready_at_once: bool,
    /// How long the unload took to answer.
    pub unload: Duration,
    /// How long after that the index still had it in memory: zero when it was gone at the first look, nothing when it
    /// stayed there.
    pub in_index: Option<Duration>,
    /// How long after that it was still said to be ready, likewise.
    pub still_ready: Option<Duration>,
    /// Whether it was in memory before, and so was loaded again in the end.
    pub was_loaded: bool,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// One answer.
    pub answer: Duration,
    /// One load or unload.
    pub load: Duration,
    /// What should follow an unload.
    pub after_unload: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { answer: Duration::from_secs(10), load: Duration::from_secs(600), after_unload: Duration::from_secs(10) }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Metadata {
    name: String,
    version: String,
    extensions: Vec<String>,
}

/// Asks a server.
#[derive(Debug)]
pub struct Probe {
    repository: Repository,
    clock: Arc<dyn Clock>,
    patience: Patience,
}

impl Probe {
    /// Asks `server`, over REST.
    #[must_use]
    pub fn new(server: Arc<dyn Upstream>, clock: Arc<dyn Clock>, patience: Patience) -> Self {
        Self { repository: Repository::new(server), clock, patience }
    }

    /// Finds out what there is to find out. `model` is loaded and unloaded for it, if one is named.
    ///
    /// # Errors
    /// When nothing answers, in one sentence.
    pub async fn run(&self, model: Option<&str>) -> Result<Findings, String> {
        let said = self.ask(Method::GET, "/v2", "").await?;
        let metadata: Metadata = serde_json::from_slice(&said.body).unwrap_or_default();
        let ready = self.ask(Method::GET, "/v2/health/ready", "").await?.status.is_success();
        let index = self.index().await?;
        let missing = self.missing().await?;
        let trial = match model {
            Some(model) => Some(self.trial(model).await),
            None => None,
        };
        let kind = kind_of(&metadata.name);
        let Metadata { name, version, extensions } = metadata;
        Ok(Findings { name, version, extensions, kind, ready, index, missing, trial })
    }

    async fn ask(&self, method: Method, path: &str, body: &'static str) -> Result<Answer, String> {
        self.within(self.patience.answer, self.repository.ask(method, path.to_owned(), body)).await
    }

    async fn within<T>(
        &self,
        deadline: Duration,
        answer: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, String> {
        match timeout(deadline, answer).await {
            Ok(answer) => answer.map_err(|failure| failure.message),
            Err(_) => Err(format!("the inference server did not answer within {} s", deadline.as_secs_f64())),
        }
    }

    async fn index(&self) -> Result<Option<Index>, String> {
        let with = self.ask(Method::POST, "/v2/repository/index", "{}").await?;
        let Ok(rows) = serde_json::from_slice::<Vec<Row>>(&with.body) else { return Ok(None) };
        if !with.status.is_success() {
            return Ok(None);
        }
        let without = self.ask(Method::POST, "/v2/repository/index", "").await?;
        Ok(Some(Index {
            models: rows.len(),
            loaded: rows.iter().filter(|row| row.takes_memory()).count(),
            needs_body: !without.status.is_success(),
        }))
    }

    async fn missing(&self) -> Result<Missing, String> {
        let ready = self.within(self.patience.answer, self.repository.ask_whether_ready(NOBODY)).await?;
        let metadata = self.ask(Method::GET, &format!("/v2/models/{NOBODY}"), "").await?;
        let load = self.within(self.patience.answer, self.repository.load(NOBODY)).await?;
        let unload = self.within(self.patience.answer, self.repository.ask_to_unload(NOBODY)).await?;
        // Who has no such call answers as to any other path; who has it names the model, or takes it.
        let no_such_path = self.ask(Method::POST, "/v2/repository/no/such/path/as-this", "{}").await?;
        let known = |answer: &Answer| {
            answer.status.is_success()
                || (answer.status != StatusCode::METHOD_NOT_ALLOWED
                    && answer.status != StatusCode::NOT_IMPLEMENTED
                    && (answer.status != no_such_path.status || answer.text().contains(NOBODY)))
        };
        Ok(Missing {
            ready: ready.status.as_u16(),
            metadata: metadata.status.as_u16(),
            load: load.status.as_u16(),
            unload: unload.status.as_u16(),
            repository: known(&load) && known(&unload),
        })
    }

    async fn trial(&self, model: &str) -> Result<Trial, String> {
        let was_loaded = self.in_index(model).await?;
        let began = self.clock.now();
        let loaded = self.within(self.patience.load, self.repository.load(model)).await?;
        let load = self.clock.now().since(began);
        if !loaded.status.is_success() {
            return Err(format!("{model} was not loaded ({}): {}", loaded.status, loaded.text()));
        }
        let ready_at_once = self.is_ready(model).await?;
        let began = self.clock.now();
        let unloaded = self.within(self.patience.load, self.repository.ask_to_unload(model)).await?;
        let answered = self.clock.now();
        if !unloaded.status.is_success() {
            return Err(format!("{model} was not unloaded ({}): {}", unloaded.status, unloaded.text()));
        }
        let (mut in_index, mut still_ready) = (None, None);
        let mut looks = 0_u32;
        let watching = async {
            loop {
                let since = |looks: u32| if looks == 0 { Duration::ZERO } else { self.clock.now().since(answered) };
                if in_index.is_none() && !self.in_index(model).await? {
                    in_index = Some(since(looks));
                }
                if still_ready.is_none() && !self.is_ready(model).await? {
                    still_ready = Some(since(looks));
                }
                looks += 1;
                if in_index.is_some() && still_ready.is_some() {
                    return Ok::<_, String>(());
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        if let Ok(watched) = timeout(self.patience.after_unload, watching).await {
            watched?;
        }
        if was_loaded {
            self.within(self.patience.load, self.repository.load(model)).await?;
        }
        let unload = answered.since(began);
        Ok(Trial { load, ready_at_once, unload, in_index, still_ready, was_loaded })
    }

    async fn in_index(&self, model: &str) -> Result<bool, String> {
        let rows = self.within(self.patience.answer, self.repository.rows()).await?;
        Ok(rows.iter().any(|row| row.name == model && row.takes_memory()))
    }

    async fn is_ready(&self, model: &str) -> Result<bool, String> {
        Ok(self.within(self.patience.answer, self.repository.ask_whether_ready(model)).await?.status.is_success())
    }
}
