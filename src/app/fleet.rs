//! The servers of the registry file, and the replicas of them that run in this process.
//!
//! The rule of this module: what the file no longer has stops only once nothing is placed there. A replica goes
//! on serving while its copies move, then its agent stops and its folder goes.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::FutureExt as _;
use tokio_util::sync::CancellationToken;

use super::{
    World,
    metrics::expose_agent,
    process::{ProcessError, agent_options, builtin, inference_server, sources},
    replica::{self, DoorAt},
};
use crate::{
    actors::Handle,
    domain::{
        error::Refusal,
        names::{ReplicaId, ServerName},
        record::Owner,
    },
    forward::{Connections, Upstream},
    messages::{
        Board, Gate,
        server::{Declaration, Declare},
    },
    settings::{
        self,
        registry::{Location, Registry, RegistryChange, RegistryErrors, RegistryWatch, ServerDecl},
    },
    telemetry::metrics::Metrics,
};

/// How long a declaration may take.
const DECLARE: Duration = Duration::from_secs(30);
/// How often it is looked whether what is to go is empty.
const LOOK: Duration = Duration::from_millis(200);
/// How long an agent may take to stop; what is left of it then is dropped.
const STOP: Duration = Duration::from_secs(10);

/// See the module.
pub(super) struct Fleet {
    declare: Gate<Declare, Result<(), Refusal>>,
    board: Arc<Board>,
    world: World,
    settings: settings::Agent,
    connections: Arc<Connections>,
    metrics: Arc<Metrics>,
    /// Where agents of this process call; absent when it runs none.
    scheduler: Option<String>,
    replicas: BTreeMap<ReplicaId, Here>,
    registry: Registry,
    /// Servers that the file no longer has, until nothing of them is left.
    removed: BTreeSet<ServerName>,
}

/// A replica of this process.
struct Here {
    stop: CancellationToken,
    running: replica::Running,
    data: PathBuf,
    /// Looks in a row that found it empty, and not wanted any more.
    empty: u32,
}

impl Fleet {
    /// A fleet of nothing. It runs replicas when `scheduler`, where their agents call, is there.
    pub(super) fn new(
        handle: &Handle,
        world: World,
        settings: settings::Agent,
        connections: Arc<Connections>,
        metrics: Arc<Metrics>,
        scheduler: Option<String>,
    ) -> Self {
        Self {
            declare: Gate::new(handle.servers(), 1024, DECLARE),
            board: Arc::clone(&handle.links.board),
            world,
            settings,
            connections,
            metrics,
            scheduler,
            replicas: BTreeMap::new(),
            registry: Registry::default(),
            removed: BTreeSet::new(),
        }
    }

    /// Obeys each edit of the registry until `shutdown`.
    pub(super) async fn follow(mut self, path: PathBuf, mut watch: Option<RegistryWatch>, shutdown: CancellationToken) {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // Made once: a reading that is given up half-way would start its interval again with every look.
        let mut next = Box::pin(next_edit(watch.take()));
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                (again, edit) = &mut next => {
                    self.edited(&path, edit).await;
                    next = Box::pin(next_edit(Some(again)));
                }
                _ = looks.tick() => self.look().await,
            }
        }
        drop(next);
        for here in self.replicas.values() {
            here.stop.cancel();
        }
        for here in self.replicas.into_values() {
            here.running.stopped().await;
        }
    }

    async fn edited(&mut self, path: &Path, edit: Result<Registry, RegistryErrors>) {
        let changed = match edit {
            Ok(registry) => self.become_as(registry).await.map_err(|error| error.to_string()),
            Err(problems) => Err(problems.to_string()),
        };
        match changed {
            Ok(()) => {
                tracing::info!(target: "wharf::registry", path = %path.display(), "the server registry changed, and is obeyed");
            }
            Err(problem) => {
                tracing::error!(target: "wharf::registry", path = %path.display(), problem, "the server registry's edit is refused, and changes nothing");
            }
        }
    }

    /// Declares what differs from the registry so far.
    ///
    /// # Errors
    /// When a server is another's, or a replica can't start.
    pub(super) async fn become_as(&mut self, registry: Registry) -> Result<(), ProcessError> {
        for change in Registry::diff(&self.registry, &registry) {
            match change {
                RegistryChange::Added(server) | RegistryChange::Resized { server, .. } => self.set(&server).await?,
                RegistryChange::Changed { from, to } => {
                    if (&from.capacity, &from.capabilities, &from.location)
                        != (&to.capacity, &to.capabilities, &to.location)
                    {
                        tracing::warn!(
                            target: "wharf::registry", server = %to.name,
                            "replicas that run already keep their memory, capabilities and address until wharf starts again; of memory the smaller counts"
                        );
                    }
                    self.set(&to).await?;
                }
                RegistryChange::Removed(name) => {
                    self.removed.insert(name.clone());
                    self.declare(name, None).await?;
                }
            }
        }
        self.registry = registry;
        Ok(())
    }

    /// Takes away the servers that the file had in an earlier life of this process, and has no more.
    pub(super) fn take_away_undeclared(&mut self) {
        let declared: BTreeSet<&ServerName> = self.registry.servers.iter().map(|server| &server.name).collect();
        let servers = self.board.servers();
        let mine = servers.iter().filter(|server| server.row.owner == Owner::File);
        self.removed.extend(mine.map(|server| server.row.name.clone()).filter(|name| !declared.contains(name)));
    }

    async fn set(&mut self, server: &ServerDecl) -> Result<(), ProcessError> {
        self.removed.remove(&server.name);
        let declaration = Declaration {
            replicas: server.replicas,
            bounds: (0, u32::MAX),
            kubernetes: None,
            capacity: Some(server.capacity.clone()),
            overcommit_percent: Some(server.overcommit_percent),
            capabilities: Some(server.capabilities.clone()),
        };
        self.declare(server.name.clone(), Some(declaration)).await?;
        if let Some(scheduler) = self.scheduler.clone() {
            for index in 0..server.replicas {
                let id = ReplicaId::new(server.name.clone(), index);
                if !self.replicas.contains_key(&id) {
                    self.start(id, server, scheduler.clone())?;
                }
            }
        }
        Ok(())
    }

    async fn declare(&self, server: ServerName, declaration: Option<Declaration>) -> Result<(), ProcessError> {
        let answer = self.declare.ask(Declare { owner: Owner::File, server, declaration }).await;
        answer.and_then(|answer| answer).map_err(|refusal| ProcessError::Registry(refusal.to_string()))
    }

    fn start(&mut self, id: ReplicaId, server: &ServerDecl, scheduler: String) -> Result<(), ProcessError> {
        let failed = |problem: String| ProcessError::Replica { replica: id.to_string(), problem };
        let data = self.settings.data_dir.join(id.to_string());
        let mut options = agent_options(&self.settings, id.clone(), server.capacity.clone(), data.clone());
        options.capabilities = server.capabilities.clone();
        options.overcommit_percent = server.overcommit_percent;
        options.runtime = server.runtime.name().to_owned();
        let upstream: Arc<dyn Upstream> = match &server.location {
            Location::Builtin => builtin(&options),
            Location::Addresses(addresses) => {
                let Some(address) = addresses.get(id.index as usize) else { return Ok(()) };
                inference_server(&self.world, &address.http).map_err(failed)?
            }
            Location::Command(_) => {
                return Err(failed(
                    "wharf does not start inference servers yet; start it, and give its address".to_owned(),
                ));
            }
        };
        let stop = CancellationToken::new();
        let door = DoorAt::InProcess(&self.connections);
        let sources = sources().map_err(failed)?;
        let running = replica::start(&self.world, options, upstream, sources, door, scheduler, &stop);
        expose_agent(&self.metrics, &id, &running.agent);
        self.replicas.insert(id, Here { stop, running, data, empty: 0 });
        Ok(())
    }

    /// Stops what is not wanted any more and empty, and forgets the servers of which nothing is left.
    async fn look(&mut self) {
        let wanted: BTreeMap<&ServerName, u32> =
            self.registry.servers.iter().map(|server| (&server.name, server.replicas)).collect();
        let mut stopping = Vec::new();
        for (id, here) in &mut self.replicas {
            let leaves = wanted.get(&id.server).is_none_or(|replicas| id.index >= *replicas);
            let empty = leaves
                && self.board.registered(id).copies == 0
                && here.running.agent.drained().now_or_never().is_some();
            here.empty = if empty { here.empty + 1 } else { 0 };
            // An order may have been on its way at the first look.
            if here.empty > 1 {
                stopping.push(id.clone());
            }
        }
        for id in stopping {
            if let Some(here) = self.replicas.remove(&id) {
                here.end(&id).await;
            }
        }
        let board = Arc::clone(&self.board);
        self.removed.retain(|name| board.server(name).is_some_and(|server| server.row.owner == Owner::File));
        let unheard: Vec<ServerName> = self
            .removed
            .iter()
            .filter(|name| board.server(name).is_some_and(|server| !server.removing))
            .cloned()
            .collect();
        for name in unheard {
            if let Err(problem) = self.declare(name.clone(), None).await {
                tracing::warn!(target: "wharf::registry", server = %name, %problem, "the server can't be taken away yet");
            }
        }
    }
}

impl Here {
    /// Ends the replica: nothing is placed on it and its agent holds nothing.
    async fn end(self, id: &ReplicaId) {
        self.stop.cancel();
        if tokio::time::timeout(STOP, self.running.stopped()).await.is_err() {
            tracing::warn!(target: "wharf::registry", replica = %id, "its agent does not stop, and is dropped");
        }
        if let Err(problem) = tokio::fs::remove_dir_all(&self.data).await {
            tracing::warn!(target: "wharf::registry", replica = %id, path = %self.data.display(), %problem, "its folder can't be removed");
        }
        tracing::info!(target: "wharf::registry", replica = %id, "the replica is empty and stopped");
    }
}

/// The next edit of a file that is followed; never without one.
async fn next_edit(watch: Option<RegistryWatch>) -> (RegistryWatch, Result<Registry, RegistryErrors>) {
    match watch {
        Some(mut watch) => {
            let edit = watch.next().await;
            (watch, edit)
        }
        None => std::future::pending().await,
    }
}
