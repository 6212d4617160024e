//! The declaration of every setting: name, meaning, default, and what is allowed.

use std::{path::PathBuf, time::Duration};

use super::{
    registry::Lifetime,
    value::{Address, Form, LogFilter, LogFormat, Raw, RcloneUse, RuntimeKind, Value, read},
};
use crate::domain::{
    memory::Bytes,
    residency::Eviction,
    size::{Guesses, Trust},
};

/// A setting, as declared.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    pub(super) name: &'static str,
    /// Lines, each with a space before it.
    pub(super) meaning: &'static [&'static str],
    pub(super) default: &'static str,
    pub(super) bounds: Option<(&'static str, &'static str)>,
    /// Whether a file writes it in quotes.
    pub(super) quoted: bool,
}

/// Why a value was not taken.
#[derive(Debug)]
pub(super) enum Refused {
    /// There is no such key here.
    Key,
    /// The value is none for this key.
    Value(String),
}

/// A section of the settings file.
pub(super) trait Section {
    fn name(&self) -> &'static str;
    fn about(&self) -> &'static [&'static str];
    fn keys(&self) -> &'static [Key];
    fn set(&mut self, key: &str, raw: &Raw<'_>) -> Result<(), Refused>;
}

const fn quoted(form: Form) -> bool {
    matches!(form, Form::Text | Form::TextOrNumber)
}

macro_rules! bounds {
    () => {
        None
    };
    ($low:literal, $high:literal) => {
        Some(($low, $high))
    };
}

macro_rules! section {
    (
        $(#[doc = $about:literal])+
        $section:ident $name:literal {
            $($(#[doc = $meaning:literal])+ $key:ident: $type:ty = $default:literal $(in $low:literal to $high:literal)?;)+
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, PartialEq)]
        pub struct $section {
            $(
                $(#[doc = $meaning])+
                #[doc = concat!("\n\nDefault: `", $default, "`.")]
                pub $key: $type,
            )+
        }

        impl Default for $section {
            fn default() -> Self {
                Self {
                    $($key: <$type as Value>::parse($default).expect("the declared default is a value"),)+
                }
            }
        }

        impl Section for $section {
            fn name(&self) -> &'static str {
                $name
            }

            fn about(&self) -> &'static [&'static str] {
                &[$($about),+]
            }

            fn keys(&self) -> &'static [Key] {
                const {
                    &[$(Key {
                        name: stringify!($key),
                        meaning: &[$($meaning),+],
                        default: $default,
                        bounds: bounds!($($low, $high)?),
                        quoted: quoted(<$type as Value>::FORM),
                    }),+]
                }
            }

            fn set(&mut self, key: &str, raw: &Raw<'_>) -> Result<(), Refused> {
                match key {
                    $(stringify!($key) => {
                        self.$key = read::<$type>(raw, bounds!($($low, $high)?)).map_err(Refused::Value)?;
                    })+
                    _ => return Err(Refused::Key),
                }
                Ok(())
            }
        }
    };
}

section! {
    /// The scheduler: takes submissions, places copies, hands routes out.
    Scheduler "scheduler" {
        /// Where it listens for the scheduler API (gRPC).
        listen: Address = "127.0.0.1:9004";
        /// Where it listens for agents and gateways (gRPC).
        agents: Address = "127.0.0.1:9005";
        /// Where it serves /metrics, /healthz and /readyz.
        http: Address = "127.0.0.1:9008";
        /// The server registry: which inference servers there are. Followed while it runs; where there is no such
        /// file, one server "onnx" of the built-in runtime.
        servers: PathBuf = "config/servers.toml";
        /// The directory of the journal.
        data_dir: PathBuf = "wharf-data/scheduler";
        /// Memory for the journal's cache of its file.
        journal_cache: Bytes = "64Mi" in "1Mi" to "64Gi";
        /// How long an agent may be silent before its replica is Unknown.
        lease: Duration = "5s" in "100ms" to "10m";
        /// How often the scheduler and an agent say that they are there.
        heartbeat: Duration = "1s" in "10ms" to "5m";
        /// How long the copies of an Unknown replica are kept before they are placed elsewhere.
        grace_period: Duration = "30s" in "0s" to "24h";
        /// How long a gateway may go without acknowledging routes before unloads no longer wait for it.
        gateway_lease: Duration = "5s" in "100ms" to "10m";
        /// How long a deleted model stays listed as terminated.
        retention: Duration = "24h" in "0s" to "365d";
        /// How many deleted models stay listed at most.
        retained_models: u32 = "10000" in "0" to "1000000";
        /// How long requests in flight may keep a copy that is to leave.
        drain_deadline: Duration = "30s" in "0s" to "24h";
        /// Memory that a model counts for when its manifest declares none.
        default_memory: Bytes = "256Mi" in "1" to "1Ti";
        /// What counts when a model's manifest declares memory and another amount was measured: what was "declared", what
        /// was "measured", or the "larger" of the two.
        declared_memory: Trust = "declared";
        /// By how much declared and measured memory may differ before the model says so, in percent of the smaller.
        memory_warning_percent: u32 = "200" in "100" to "100000";
        /// From which share of a replica's memory on, in percent, `server status` tells of memory that its server does
        /// not give back. Where Wharf started that server, it is emptied, ended and started anew.
        leak_percent: u32 = "10" in "1" to "100";
        /// Whether such a server is started anew. If not, it is only told of.
        recycle: bool = "true";
        /// How long it has to keep that memory until it is.
        recycle_after: Duration = "1m" in "1s" to "24h";
        /// The pause before the first retry of a copy that failed to load; it doubles from there.
        retry_first: Duration = "1s" in "10ms" to "24h";
        /// The longest pause between two such retries.
        retry_most: Duration = "5m" in "10ms" to "24h";
        /// How often an actor may be restarted within restart_window; once more stops the process.
        restarts: u32 = "5" in "0" to "1000";
        /// The time over which restarts count.
        restart_window: Duration = "1m" in "1s" to "24h";
        /// How many events are kept.
        events: u32 = "10000" in "100" to "1000000";
        /// How many versions of a model are kept to roll back to.
        history: u32 = "10" in "1" to "1000";
    }
}

section! {
    /// The gateway: takes inference requests and sends each to a copy.
    Gateway "gateway" {
        /// Where it listens for inference requests (REST and gRPC on one port).
        listen: Address = "127.0.0.1:9000";
        /// Where it serves /metrics, /healthz and /readyz.
        http: Address = "127.0.0.1:9007";
        /// The scheduler's address for agents and gateways.
        scheduler: Address = "127.0.0.1:9005";
        /// How long a request may take from its first byte to its answer's first.
        request_deadline: Duration = "60s" in "10ms" to "24h";
        /// The largest body of a request.
        body_limit: Bytes = "64Mi" in "1Ki" to "16Gi";
        /// Requests in flight; what is over is refused with a Retry-After.
        max_in_flight: u32 = "10000" in "1" to "1000000";
        /// How many bytes the headers of a request may have together.
        header_limit: Bytes = "64Ki" in "8Ki" to "1Mi";
        /// How long a client may take to send its headers.
        header_deadline: Duration = "10s" in "10ms" to "10m";
        /// How long connecting to a door may take.
        connect_timeout: Duration = "1s" in "1ms" to "1m";
    }
}

section! {
    /// The agent: beside an inference server, loads and evicts its models.
    Agent "agent" {
        /// Where its door listens for requests of gateways (REST and gRPC on one port).
        listen: Address = "127.0.0.1:9001";
        /// Where it serves /metrics, /healthz and /readyz.
        http: Address = "127.0.0.1:9006";
        /// The scheduler's address for agents and gateways.
        scheduler: Address = "127.0.0.1:9005";
        /// The server whose replica it stands beside.
        server: String = "onnx";
        /// The replica's index within the server.
        replica: u32 = "0" in "0" to "9999";
        /// What serves the models: builtin, start for a server that the agent starts, or the REST address of a running
        /// one: http://127.0.0.1:8080.
        runtime: String = "builtin";
        /// The gRPC address of that server, http://host:port, where it is another than the REST address.
        runtime_grpc: String = "";
        /// What that server is: mlserver, triton, oip or process; it is asked when this is empty.
        runtime_kind: RuntimeKind = "";
        /// Its worker processes that each hold every model, if it is an MLServer (its parallel_workers).
        runtime_workers: u32 = "1" in "0" to "1000";
        /// With runtime = "start", the program and its arguments, separated by spaces, with blanks as in the registry; what
        /// starts a server of runtime_kind, when empty.
        command: String = "";
        /// Variables of its environment, NAME=VALUE, separated by spaces.
        env: String = "";
        /// The directory that it starts in; the agent's own, when empty.
        workdir: String = "";
        /// The first of its three ports; free ones are found when it is 0.
        ports: u32 = "0" in "0" to "65000";
        /// How long it lives: agent (it ends with the agent, however that ends) or independent.
        lifetime: Lifetime = "agent";
        /// The path that answers 200 once it is ready, with blanks; /v2/health/ready, when empty.
        health: String = "";
        /// How long it may take to start.
        start_deadline: Duration = "5m" in "1s" to "24h";
        /// How long it may take to stop before it is killed.
        stop_deadline: Duration = "10s" in "100ms" to "10m";
        /// What runs the models of the built-in runtime: the path of libonnxruntime.so; auto looks where ORT_DYLIB_PATH
        /// says and the system keeps its libraries, and takes tract where there is none; off always takes tract.
        onnx_runtime: String = "auto";
        /// What the replica can serve, separated by commas.
        capabilities: String = "onnx";
        /// Memory of the replica for models.
        memory: Bytes = "1Gi" in "1" to "1Pi";
        /// How much memory a model without a declared amount takes until it is measured: a factor of its artifact's
        /// bytes and a constant, by capability or runtime; "*" is for all others.
        memory_guess: Guesses = "builtin=3+16Mi, mlserver=3+128Mi, triton=3+64Mi, *=3+64Mi";
        /// How much more than its memory may be registered on it, in percent.
        overcommit_percent: u32 = "10" in "0" to "1000";
        /// Which copies leave memory first when it is short: "lru", the least recently used; "cost", those whose memory
        /// spares the least reload time. For servers of the registry the registry says it.
        eviction: Eviction = "lru";
        /// How long a copy stays in memory at least, once it is there.
        least_residency: Duration = "0s" in "0s" to "1h";
        /// Where gateways reach the door, host:port; where it listens, when empty.
        advertise: String = "";
        /// The directory of artifacts and of what the agent remembers.
        data_dir: PathBuf = "wharf-data/agent";
        /// Bytes on disk that artifacts may take; the least recently used make room.
        artifact_cache: Bytes = "10Gi" in "1Mi" to "1Pi";
        /// The largest artifact.
        max_artifact: Bytes = "10Gi" in "1Ki" to "1Pi";
        /// How long a download may take.
        fetch_deadline: Duration = "1h" in "1s" to "7d";
        /// How long what came of a broken download is kept to be gone on with.
        keep_downloads: Duration = "1h" in "0s" to "7d";
        /// Files that are downloaded at a time, over all artifacts.
        parallel_downloads: u32 = "8" in "1" to "256";
        /// Bytes a second that downloads may take together; 0 sets no bound.
        download_bandwidth: Bytes = "0" in "0" to "1Ti";
        /// The directory of secrets that models name: each a file, or a directory of files as Kubernetes mounts it.
        /// Without one there are the variables WHARF_SECRET_NAME.
        secrets_dir: String = "";
        /// The hub that hf:// names.
        hub: String = "https://huggingface.co";
        /// What rclone fetches: always, object stores too; fallback, what the agent can't; never, nothing.
        rclone: RcloneUse = "fallback";
        /// The rclone program, 1.60 or later. It is started at first use.
        rclone_program: String = "rclone";
        /// rclone's configuration, whose remotes models may name: dropbox:models/iris.
        rclone_config: String = "";
        /// How long the inference server may take to load a model.
        load_deadline: Duration = "10m" in "1s" to "24h";
        /// Requests that may wait for an evicted copy to come back; what is over is refused.
        waiting_requests: u32 = "1000" in "1" to "1000000";
        /// How long a request may wait for an evicted copy to come back.
        wait_deadline: Duration = "30s" in "10ms" to "1h";
        /// How long an agent that is told to stop waits until its models have moved elsewhere.
        drain_deadline: Duration = "30s" in "0s" to "24h";
    }
}

section! {
    /// What is logged, and how.
    Log "log" {
        /// The least grave level that is logged: error, warn, info, debug or trace; by module: "info,wharf::agent=debug".
        level: LogFilter = "info";
        /// "text" for people, "json" for machines.
        format: LogFormat = "text";
    }
}

section! {
    /// What is counted.
    Metrics "metrics" {
        /// Whether requests are counted by model too. Every model makes a few more series.
        per_model: bool = "false";
    }
}
