//! What an agent is told about itself and its bounds.

use std::{path::PathBuf, sync::Arc, time::Duration};

use super::{artifacts::Secrets, process::Started, runtimes::Kind};
use crate::{
    domain::{
        memory::{Bytes, Resources},
        names::ReplicaId,
        residency::Eviction,
        size::Guesses,
    },
    ports::{FetchLimits, ServerProcess},
};

/// Where blocking file work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocking {
    /// On tokio's blocking threads.
    Pool,
    /// Where it comes up: for simulations, which have one thread.
    Inline,
}

/// When artifacts are fetched through rclone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RcloneUse {
    /// Whenever it reads that kind of store.
    Always,
    /// When the agent itself does not, or the model brings a configuration for it.
    Fallback,
    /// Never: nothing is started.
    Never,
}

/// An agent's settings. [`Options::new`] has the defaults.
#[derive(Clone, Debug)]
pub struct Options {
    /// The replica that it stands beside.
    pub replica: ReplicaId,
    /// Memory of the inference server, by device. Resident copies never exceed it.
    pub capacity: Resources,
    /// How much more than the capacity may be registered, in percent. The scheduler keeps to it.
    pub overcommit_percent: u32,
    /// What the inference server can serve.
    pub capabilities: Vec<String>,
    /// What serves the models; the inference server is asked when nobody says.
    pub runtime: Option<Kind>,
    /// Processes of an `MLServer` that each hold every model.
    pub workers: u32,
    /// Which copies leave memory first when it is short.
    pub eviction: Eviction,
    /// How long a copy stays in memory at least, once it is there.
    pub least_residency: Duration,
    /// How much memory an artifact may take, as long as nobody knows; without it, what the order says.
    pub guesses: Option<Guesses>,
    /// The inference server's process, where it can be looked at.
    pub process: Option<Arc<dyn ServerProcess>>,
    /// What the agent runs, and reaches as its inference server; nothing when that runs by itself.
    pub started: Option<Started>,
    /// What runs the models within a runtime that has a choice, for people.
    pub engine: Option<String>,
    /// Where gateways reach the door: `host:port`, or `inproc:NAME`.
    pub door_address: String,
    /// The agent's own folder: fence, orders, artifact cache.
    pub data_dir: PathBuf,
    /// The inference server's model repository. Everything in it belongs to the agent.
    pub repository: PathBuf,
    /// Where blocking file work is done.
    pub blocking: Blocking,
    /// Bounds of one artifact.
    pub artifact: FetchLimits,
    /// Bytes that cached artifacts may take on disk.
    pub artifact_cache: Bytes,
    /// How long what came of a broken download is kept to be gone on with.
    pub keep_downloads: Duration,
    /// Where the credentials of models are.
    pub secrets: Secrets,
    /// When artifacts are fetched through rclone.
    pub rclone: RcloneUse,
    /// Longest fetch.
    pub fetch_deadline: Duration,
    /// Longest load or reload, without its wait for memory.
    pub load_deadline: Duration,
    /// Longest wait for readiness after a load, and for the answer to a warm-up.
    pub probe_deadline: Duration,
    /// How often what the inference server has is compared with what it should have.
    pub audit: Duration,
    /// Longest unload.
    pub unload_deadline: Duration,
    /// How long a first load waits for memory that is held.
    pub memory_deadline: Duration,
    /// How long a request waits for an evicted copy.
    pub reload_wait: Duration,
    /// Requests that may wait for one evicted copy.
    pub reload_queue: u32,
    /// Requests that may wait for evicted copies, all together.
    pub reload_queue_total: u32,
    /// Tries to bring a copy back before it counts as failed.
    pub reload_attempts: u32,
    /// Longest wait for the head of an answer from the inference server.
    pub answer_deadline: Duration,
    /// Fetches at a time.
    pub fetches: usize,
    /// First loads at a time.
    pub loads: usize,
    /// Reloads at a time.
    pub reloads: usize,
    /// Copies that the agent keeps at most, resident or not.
    pub max_copies: usize,
    /// Longest wait for a connection to the scheduler and for its welcome.
    pub connect_deadline: Duration,
    /// First and longest pause before another try to reach the scheduler.
    pub reconnect: (Duration, Duration),
}

/// What an agent says of its replica. It may change while the agent runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// As [`Options::capacity`].
    pub capacity: Resources,
    /// As [`Options::overcommit_percent`].
    pub overcommit_percent: u32,
    /// As [`Options::capabilities`].
    pub capabilities: Vec<String>,
}

impl Options {
    /// What these options say of the replica.
    #[must_use]
    pub fn facts(&self) -> Facts {
        Facts {
            capacity: self.capacity.clone(),
            overcommit_percent: self.overcommit_percent,
            capabilities: self.capabilities.clone(),
        }
    }

    /// What people are told of `runtime`: `builtin`, or `builtin (ONNX Runtime)`.
    #[must_use]
    pub fn told_runtime(&self, runtime: &str) -> String {
        self.engine.as_ref().map_or_else(|| runtime.to_owned(), |engine| format!("{runtime} ({engine})"))
    }

    /// Defaults for an agent of `replica`, with its own files in `data_dir` and the inference server's
    /// repository below it.
    #[must_use]
    pub fn new(replica: ReplicaId, capacity: Resources, data_dir: PathBuf) -> Self {
        const GIB: u64 = 1 << 30;
        Self {
            replica,
            capacity,
            overcommit_percent: 0,
            capabilities: Vec::new(),
            runtime: Some(Kind::Oip),
            workers: 1,
            eviction: Eviction::Lru,
            least_residency: Duration::ZERO,
            guesses: None,
            process: None,
            started: None,
            engine: None,
            door_address: String::new(),
            repository: data_dir.join("repository"),
            data_dir,
            blocking: Blocking::Pool,
            artifact: FetchLimits { bytes: 64 * GIB, files: 10_000 },
            artifact_cache: Bytes(256 * GIB),
            keep_downloads: Duration::from_secs(3600),
            secrets: Secrets::default(),
            rclone: RcloneUse::Fallback,
            fetch_deadline: Duration::from_secs(3600),
            load_deadline: Duration::from_secs(600),
            probe_deadline: Duration::from_secs(60),
            audit: Duration::from_secs(1),
            unload_deadline: Duration::from_secs(60),
            memory_deadline: Duration::from_secs(60),
            reload_wait: Duration::from_secs(30),
            reload_queue: 256,
            reload_queue_total: 4096,
            reload_attempts: 3,
            answer_deadline: Duration::from_secs(600),
            fetches: 4,
            loads: 4,
            reloads: 4,
            max_copies: 100_000,
            connect_deadline: Duration::from_secs(5),
            reconnect: (Duration::from_millis(100), Duration::from_secs(5)),
        }
    }
}
