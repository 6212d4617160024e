//! A process on a real machine: the roles that it has, on real ports and real disks.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{
    World,
    fleet::Fleet,
    metrics::{expose_agent, expose_gateway, expose_process, expose_scheduler},
    origins::Origins,
    page::Page,
    replica::{self, DoorAt},
    scheduler,
};
use crate::{
    actors::{Fatal, Handle, Spawner, Timing},
    agent::{
        self,
        process::{Launch, Models, Server, Started},
        runtimes::Kind,
    },
    domain::{
        memory::Resources,
        model::Policy,
        names::{ReplicaId, ServerName},
        recycle,
    },
    forward::{self, ClientOptions, Connections, HttpUpstream, Limits, Split, TcpNetwork, Upstream},
    gateway::{self, Gateway},
    ports::{Clock, Identity, Network, SystemClock},
    runtime::{self, Execution, Library, Onnx, Runtime},
    settings::{
        STARTED, Settings,
        registry::{self, Registry, RegistryWatch, ReplicaAddress},
    },
    store::{EmbeddedStore, OpenOptions},
    telemetry::{
        http::{Check, Checks, router},
        metrics::{Metrics, Role},
    },
};

/// How often the registry file is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How long the gateway's first routes are waited for at start, and how often it is looked for them.
const FIRST_ROUTES: Duration = Duration::from_secs(5);
const FIRST_LOOK: Duration = Duration::from_millis(2);
/// The registry of a process that was given none.
const DEFAULT_REGISTRY: &str = include_str!("../../config/servers.toml");

/// The process can't start, or can't go on.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The scheduler.
    #[error(transparent)]
    Scheduler(#[from] scheduler::Error),
    /// The journal.
    #[error(transparent)]
    Open(#[from] crate::ports::OpenError),
    /// An address.
    #[error("can't listen on {address}: {problem}; is another wharf running? set {setting} to another address")]
    Listen {
        /// The address.
        address: String,
        /// The setting that names it.
        setting: &'static str,
        /// What the system said.
        problem: io::Error,
    },
    /// The server registry.
    #[error("{0}")]
    Registry(String),
    /// A replica.
    #[error("replica {replica} can't start: {problem}")]
    Replica {
        /// Which one.
        replica: String,
        /// Why.
        problem: String,
    },
}

/// What all parts of the process share.
#[derive(Debug)]
pub struct Process {
    world: World,
    settings: Settings,
    origins: Origins,
    connections: Arc<Connections>,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
    fatal: Fatally,
    tasks: JoinSet<()>,
}

/// Ends the process; `Debug` shows nothing of it.
#[derive(Clone)]
struct Fatally(Fatal);

impl std::fmt::Debug for Fatally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Fatally")
    }
}

/// Where people find what runs.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// The scheduler API.
    pub api: Option<String>,
    /// The gateway.
    pub gateway: Option<String>,
    /// Metrics and health, by role.
    pub pages: Vec<(&'static str, String)>,
}

impl Process {
    /// A process with these settings, that ends when `shutdown` is cancelled, or by `fatal` when it can't go on.
    ///
    /// # Panics
    /// Outside an asynchronous runtime.
    #[must_use]
    pub fn new(settings: Settings, roles: &[Role], shutdown: CancellationToken, fatal: Fatal) -> Self {
        let network: Arc<dyn Network> = Arc::new(TcpNetwork);
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let options = ClientOptions { connect_timeout: settings.gateway.connect_timeout, ..ClientOptions::default() };
        let connections = Connections::new(Arc::clone(&network), Arc::clone(&clock), options);
        let metrics = Arc::new(Metrics::new(roles, settings.metrics.per_model));
        expose_process(&metrics);
        let fatal = Fatally(fatal);
        let tasks = JoinSet::new();
        let origins = Origins::default();
        Self { world: World { network, clock }, settings, origins, connections, metrics, shutdown, fatal, tasks }
    }

    /// The same, with `origins` for the artifacts of its agents.
    #[must_use]
    pub fn with_origins(self, origins: Origins) -> Self {
        Self { origins, ..self }
    }

    /// Opens the journal and starts the control plane.
    ///
    /// # Errors
    /// When the journal or a port can't be had.
    pub async fn scheduler(&self) -> Result<scheduler::Running, ProcessError> {
        let settings = &self.settings.scheduler;
        let store = EmbeddedStore::open(&journal_options(settings), new_identity)?;
        let options = scheduler::Options {
            api: settings.listen.as_str().to_owned(),
            agents: settings.agents.as_str().to_owned(),
            store: Arc::new(store),
            blocking: true,
            spawner: actor_threads(),
            policy: Policy {
                default_memory: settings.default_memory,
                trust: settings.declared_memory,
                memory_warning_percent: settings.memory_warning_percent,
                leak_percent: settings.leak_percent,
                retry_first: settings.retry_first,
                retry_cap: settings.retry_most,
                history: settings.history as usize,
                ..Policy::default()
            },
            timing: Timing {
                lease: settings.lease,
                heartbeat: settings.heartbeat,
                grace: settings.grace_period,
                gateway_lease: settings.gateway_lease,
                drain: settings.drain_deadline,
                retention: settings.retention,
                retained: settings.retained_models as usize,
                restarts: settings.restarts,
                restart_window: settings.restart_window,
                recycle: settings
                    .recycle
                    .then(|| recycle::Patience { lasting: settings.recycle_after, ..recycle::Patience::default() }),
                ..Timing::default()
            },
            events: settings.events as usize,
            metrics: Arc::clone(&self.metrics),
        };
        let running = scheduler::start(&self.world, options, self.fatal.0.clone(), self.shutdown.clone()).await?;
        expose_scheduler(&self.metrics, &running.handle.links);
        Ok(running)
    }

    /// Follows the server registry: declares its servers, and, with `here`, runs the replicas that this process
    /// can run. The first reading has to be good; a later one that is not changes nothing.
    ///
    /// # Errors
    /// When the registry's first reading has problems.
    pub async fn registry(&mut self, handle: &Handle, here: Option<String>) -> Result<(), ProcessError> {
        let path = self.settings.scheduler.servers.clone();
        let default = path == Settings::default().scheduler.servers && !path.exists();
        let (watch, first) = if default {
            (None, Registry::parse(DEFAULT_REGISTRY, "the built-in registry"))
        } else {
            let (watch, first) = RegistryWatch::start(&path, LOOK);
            (Some(watch), first)
        };
        let first = first.map_err(|problems| ProcessError::Registry(problems.to_string()))?;
        let mut fleet = Fleet::new(
            handle,
            self.world.clone(),
            (self.settings.agent.clone(), self.origins.clone()),
            Arc::clone(&self.connections),
            Arc::clone(&self.metrics),
            here,
        );
        // First, as they may have the ports of those that are to be started.
        fleet.stop_left(&first).await;
        fleet.become_as(first).await?;
        fleet.take_away_undeclared();
        self.tasks.spawn(fleet.follow(path, watch, self.shutdown.clone()));
        Ok(())
    }

    /// Starts the gateway, which follows the scheduler at `scheduler`.
    ///
    /// # Errors
    /// When its port can't be had.
    pub async fn gateway(&mut self, scheduler: String) -> Result<(String, Arc<Gateway>), ProcessError> {
        let settings = &self.settings.gateway;
        let listener = self.bind(settings.listen.as_str(), "gateway.listen").await?;
        let address = listener.address();
        let limits = Limits {
            header_bytes: u32::try_from(settings.header_limit.0).unwrap_or(u32::MAX),
            header_timeout: settings.header_deadline,
            ..Limits::default()
        };
        let options = gateway::Options {
            name: format!("gateway@{address}#{}", std::process::id()),
            limits,
            request_deadline: settings.request_deadline,
            body_limit: settings.body_limit.0,
            in_flight: u64::from(settings.max_in_flight),
            connect_timeout: settings.connect_timeout,
            ..gateway::Options::default()
        };
        let connections = Arc::clone(&self.connections);
        let gateway = Gateway::new(options, connections, Arc::clone(&self.world.clock), random());
        expose_gateway(&self.metrics, &gateway);
        self.tasks.spawn(Arc::clone(&gateway).serve(listener, self.shutdown.clone()));
        let network = Arc::clone(&self.world.network);
        self.tasks.spawn(Arc::clone(&gateway).follow(network, scheduler, self.shutdown.clone()));
        Ok((address, gateway))
    }

    /// Starts the one agent that the settings name.
    ///
    /// # Errors
    /// When its port or its inference server can't be had.
    pub async fn agent(&mut self) -> Result<(String, Arc<agent::Agent>), ProcessError> {
        let settings = self.settings.agent.clone();
        let failed = |problem: String| ProcessError::Replica { replica: settings.server.clone(), problem };
        let server = ServerName::new(&settings.server).map_err(|error| failed(error.to_string()))?;
        let id = ReplicaId::new(server, settings.replica);
        let listener = self.bind(settings.listen.as_str(), "agent.listen").await?;
        let address = listener.address();
        let mut options = agent_options(&settings, id, Resources::primary(settings.memory), settings.data_dir.clone());
        options.capabilities = settings.capabilities.split(',').map(|name| name.trim().to_owned()).collect();
        options.overcommit_percent = settings.overcommit_percent;
        options.door_address = settings.advertise.clone();
        options.workers = settings.runtime_workers;
        if settings.runtime != STARTED || settings.runtime_kind.0 == Some(Kind::Process) {
            // One that an earlier agent started here.
            agent::process::stop_left(&settings.data_dir, settings.stop_deadline).await;
        }
        let server: Arc<dyn Upstream> = if settings.runtime == "builtin" {
            options.runtime = Some(Kind::Builtin);
            builtin(&mut options, &settings)
        } else if settings.runtime == STARTED {
            options.runtime = settings.runtime_kind.0;
            let command = settings.started().map_err(|(setting, problem)| failed(format!("{setting}: {problem}")))?;
            started(&self.world, &settings, &mut options, &command)
        } else {
            options.runtime = settings.runtime_kind.0;
            options.process = agent::Listening::at(&settings.runtime).map(|process| Arc::new(process) as _);
            let grpc = Some(settings.runtime_grpc.clone()).filter(|grpc| !grpc.is_empty());
            let address = ReplicaAddress { http: settings.runtime.clone(), grpc };
            inference_server(&self.world, options.runtime, &address).map_err(failed)?
        };
        let sources = self.origins.ready(&settings, &mut options, &self.world.clock).map_err(failed)?;
        let scheduler = settings.scheduler.as_str().to_owned();
        let door = DoorAt::Port(listener);
        let id = options.replica.clone();
        let running = replica::start(&self.world, options, server, sources, door, scheduler, &self.shutdown);
        let agent = Arc::clone(&running.agent);
        expose_agent(&self.metrics, &id, &agent);
        self.tasks.spawn(running.stopped());
        Ok((address, agent))
    }

    /// Serves metrics and health at `address`.
    ///
    /// # Errors
    /// When the port can't be had.
    pub async fn page(&mut self, address: &str, setting: &'static str, checks: Checks) -> Result<String, ProcessError> {
        let listener = self.bind(address, setting).await?;
        let address = listener.address();
        let page = Arc::new(Page(router(Arc::clone(&self.metrics), checks)));
        self.tasks.spawn(forward::serve(listener, page, Limits::default(), self.shutdown.clone()));
        Ok(address)
    }

    async fn bind(&self, address: &str, setting: &'static str) -> Result<Box<dyn crate::ports::Listen>, ProcessError> {
        let bound = self.world.network.bind(address).await;
        bound.map_err(|problem| ProcessError::Listen { address: address.to_owned(), setting, problem })
    }

    /// Waits until every part has stopped, after `shutdown`.
    pub async fn stopped(mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Every role in one process.
///
/// # Errors
/// When a part can't start.
pub async fn up(process: &mut Process) -> Result<(Places, scheduler::Running), ProcessError> {
    let running = process.scheduler().await?;
    process.registry(&running.handle, Some(running.agents.clone())).await?;
    let (address, gateway) = process.gateway(running.agents.clone()).await?;
    // Who is told that all is ready may ask at once. After that long it is the readiness page that tells the truth.
    let routes = async {
        while !gateway.is_ready() {
            tokio::time::sleep(FIRST_LOOK).await;
        }
    };
    if tokio::time::timeout(FIRST_ROUTES, routes).await.is_err() {
        tracing::warn!("the gateway has no routes yet");
    }
    let page = process.settings.scheduler.http.as_str().to_owned();
    let handle = running.handle.clone();
    let checks: Checks = Arc::new(move || vec![journal_check(&handle), routes_check(&gateway)]);
    let page = process.page(&page, "scheduler.http", checks).await?;
    let places = Places { api: Some(running.api.clone()), gateway: Some(address), pages: vec![("all roles", page)] };
    Ok((places, running))
}

/// Whether a scheduler can make things durable.
#[must_use]
pub fn journal_check(handle: &Handle) -> Check {
    match handle.links.journal_problem.load().as_deref() {
        None => Check::ready("journal"),
        Some(problem) => Check::not_ready("journal", problem.clone()),
    }
}

/// Whether an agent has a session with its scheduler.
#[must_use]
pub fn session_check(agent: &agent::Agent) -> Check {
    match agent.session_problem() {
        None => Check::ready("scheduler"),
        Some(problem) => Check::not_ready("scheduler", problem),
    }
}

/// Whether a gateway ever had its routes.
#[must_use]
pub fn routes_check(gateway: &Gateway) -> Check {
    if gateway.is_ready() {
        Check::ready("routes")
    } else {
        Check::not_ready("routes", "the scheduler has not sent the routes yet")
    }
}

pub(super) fn agent_options(
    settings: &crate::settings::Agent,
    id: ReplicaId,
    capacity: Resources,
    data: PathBuf,
) -> agent::Options {
    let mut options = agent::Options::new(id, capacity, data);
    options.artifact_cache = settings.artifact_cache;
    options.artifact.bytes = settings.max_artifact.0;
    options.fetch_deadline = settings.fetch_deadline;
    options.load_deadline = settings.load_deadline;
    options.reload_queue = settings.waiting_requests;
    options.reload_wait = settings.wait_deadline;
    options.least_residency = settings.least_residency;
    options.eviction = settings.eviction;
    options.guesses = Some(settings.memory_guess.clone());
    options
}

/// The built-in runtime for an agent with these options, which say from then on what runs its models.
pub(super) fn builtin(options: &mut agent::Options, settings: &crate::settings::Agent) -> Arc<dyn Upstream> {
    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let (onnx, problem) = Onnx::find(Library::of(&settings.onnx_runtime));
    if let Some(problem) = problem {
        tracing::error!(replica = %options.replica, problem, "ONNX Runtime is not used; tract runs the models");
    }
    options.engine = onnx.is_onnx_runtime().then(|| "ONNX Runtime".to_owned());
    let runtime = runtime::Options {
        repository: options.repository.clone(),
        execution: Execution::Pool { threads },
        limits: runtime::Limits { load: options.load_deadline, ..runtime::Limits::default() },
    };
    Runtime::with(runtime, onnx)
}

/// The inference server that the agent of these options is to run, or each of them: what `command` starts.
pub(super) fn started(
    world: &World,
    settings: &crate::settings::Agent,
    options: &mut agent::Options,
    command: &registry::Command,
) -> Arc<dyn Upstream> {
    let kind = options.runtime.unwrap_or(Kind::Oip);
    let mut launch = Launch::new(options.replica.clone(), kind, command.clone(), options.data_dir.clone());
    launch.repository = options.repository.clone();
    launch.start = settings.start_deadline;
    launch.grace = settings.stop_deadline;
    let (network, clock) = (Arc::clone(&world.network), Arc::clone(&world.clock));
    if kind == Kind::Process {
        let models = Arc::new(Models::new(launch, network, clock));
        options.started = Some(Started::Models(Arc::clone(&models)));
        models
    } else {
        let server = Arc::new(Server::new(launch, network, clock));
        options.process = Some(Arc::clone(&server) as _);
        options.started = Some(Started::Server(Arc::clone(&server)));
        server
    }
}

/// A running inference server of this kind, or of one that nobody says. With one address only, it takes both
/// protocols there, unless it is of a kind that never does.
pub(super) fn inference_server(
    world: &World,
    kind: Option<Kind>,
    address: &ReplicaAddress,
) -> Result<Arc<dyn Upstream>, String> {
    let at = |url: &str| -> Result<Arc<dyn Upstream>, String> {
        let address = url.trim_end_matches('/');
        let address = address.strip_prefix("http://").unwrap_or(address);
        let (network, clock) = (Arc::clone(&world.network), Arc::clone(&world.clock));
        let upstream = HttpUpstream::new(address, network, clock, ClientOptions::default());
        Ok(Arc::new(upstream.map_err(|error| error.to_string())?))
    };
    let rest = at(&address.http)?;
    let grpc = address.grpc.as_deref().map(at).transpose()?;
    match (kind, grpc) {
        (Some(Kind::MlServer | Kind::Triton), grpc) => Ok(Arc::new(Split::new(rest, grpc))),
        (_, Some(grpc)) => Ok(Arc::new(Split::new(rest, Some(grpc)))),
        (_, None) => Ok(rest),
    }
}

/// Threads for actors, which live as long as the process.
#[must_use]
pub fn actor_threads() -> Spawner {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        actix_rt::System::new().block_on(async move {
            let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
            if send.send(Spawner::arbiters(cores)).is_ok() {
                std::future::pending::<()>().await;
            }
        });
    });
    receive.recv().unwrap_or(Spawner::Local)
}

/// Where a scheduler with these settings keeps its journal.
#[must_use]
pub fn journal_options(settings: &crate::settings::Scheduler) -> OpenOptions {
    let cache_bytes = usize::try_from(settings.journal_cache.0).unwrap_or(usize::MAX);
    OpenOptions { path: settings.data_dir.join("journal.redb"), cache_bytes }
}

/// A lineage that no journal has.
#[must_use]
pub fn new_lineage() -> String {
    format!("{:016x}{:016x}", random(), random())
}

fn new_identity() -> Identity {
    Identity { cluster: new_lineage(), lineage: new_lineage() }
}

/// A number that nobody can guess.
fn random() -> u64 {
    // Without the system's randomness nothing on this machine is safe.
    getrandom::u64().expect("the system gives random numbers")
}
