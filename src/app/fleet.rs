//! The servers of the registry file, and the replicas of them that run in this process.
//!
//! The rules of this module: an edit is obeyed whole or not at all. What the file no longer has stops only once nothing
//! is placed there: a replica goes on serving while its copies move, then its agent stops and its folder goes. One that
//! the file has somewhere else is emptied that way too, one of a server at a time, and started anew.

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
    origins::Origins,
    process::{ProcessError, agent_options, builtin, inference_server, started},
    replica::{self, DoorAt},
};
use crate::{
    actors::Handle,
    agent,
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
        registry::{Location, Place, Registry, RegistryChange, RegistryErrors, RegistryWatch, ServerDecl},
    },
    telemetry::metrics::Metrics,
};

/// How long a declaration may take.
const DECLARE: Duration = Duration::from_secs(30);
/// How often it is looked whether what is to go is empty.
const LOOK: Duration = Duration::from_millis(200);
/// How long an agent may take to stop, besides its inference server; what is left of it then is dropped.
const STOP: Duration = Duration::from_secs(20);

/// See the module.
pub(super) struct Fleet {
    declare: Gate<Declare, Result<(), Refusal>>,
    board: Arc<Board>,
    world: World,
    settings: settings::Agent,
    origins: Origins,
    connections: Arc<Connections>,
    metrics: Arc<Metrics>,
    /// Where agents of this process call; absent when it runs none.
    scheduler: Option<String>,
    replicas: BTreeMap<ReplicaId, Here>,
    registry: Registry,
    /// Servers that the file no longer has, until nothing of them is left.
    removed: BTreeSet<ServerName>,
    /// The replica of each server that is emptied to be started anew somewhere else.
    emptied: BTreeMap<ServerName, u32>,
    /// Servers that may be something else than the registry that was obeyed last says: they are tried at every look.
    unsure: BTreeSet<ServerName>,
}

/// A replica of this process.
struct Here {
    stop: CancellationToken,
    running: replica::Running,
    data: PathBuf,
    place: Place,
    /// Looks in a row that found it empty, and not wanted any more.
    empty: u32,
}

impl Fleet {
    /// A fleet of nothing. It runs replicas when `scheduler`, where their agents call, is there.
    pub(super) fn new(
        handle: &Handle,
        world: World,
        (settings, origins): (settings::Agent, Origins),
        connections: Arc<Connections>,
        metrics: Arc<Metrics>,
        scheduler: Option<String>,
    ) -> Self {
        Self {
            declare: Gate::new(handle.servers(), 1024, DECLARE),
            board: Arc::clone(&handle.links.board),
            world,
            settings,
            origins,
            connections,
            metrics,
            scheduler,
            replicas: BTreeMap::new(),
            registry: Registry::default(),
            removed: BTreeSet::new(),
            emptied: BTreeMap::new(),
            unsure: BTreeSet::new(),
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
                (mut again, edit) = &mut next => {
                    if !self.edited(&path, edit).await {
                        again.refused();
                    }
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

    /// Obeys an edit; false when it is refused.
    async fn edited(&mut self, path: &Path, edit: Result<Registry, RegistryErrors>) -> bool {
        let changed = match edit {
            Ok(registry) => self.become_as(registry).await.map_err(|error| error.to_string()),
            Err(problems) => Err(problems.to_string()),
        };
        match &changed {
            Ok(()) => {
                tracing::info!(target: "wharf::registry", path = %path.display(), "the server registry changed, and is obeyed");
            }
            Err(problem) => {
                tracing::error!(target: "wharf::registry", path = %path.display(), problem, "the server registry's edit is refused, and changes nothing");
            }
        }
        changed.is_ok()
    }

    /// Declares what differs from the registry that was obeyed last. All of it is looked at before any of it is obeyed,
    /// and what is refused all the same takes back what was obeyed before it.
    ///
    /// # Errors
    /// When a server is another's, or a replica can't start.
    pub(super) async fn become_as(&mut self, registry: Registry) -> Result<(), ProcessError> {
        let changes = Registry::diff(&self.registry, &registry);
        self.check(&changes)?;
        for (at, change) in changes.iter().enumerate() {
            if let Err(problem) = self.obey(change.server(), change.wanted()).await {
                for earlier in changes[..=at].iter().rev() {
                    let before = self.registry.server(earlier.server()).cloned();
                    if let Err(stuck) = self.obey(earlier.server(), before.as_ref()).await {
                        tracing::error!(target: "wharf::registry", server = %earlier.server(), problem = %stuck, "a refused edit of the server can't be taken back yet");
                        self.unsure.insert(earlier.server().clone());
                    }
                }
                return Err(problem);
            }
        }
        self.registry = registry;
        for change in &changes {
            self.unsure.remove(change.server());
        }
        Ok(())
    }

    /// Whether all of the changes can be obeyed.
    fn check(&self, changes: &[RegistryChange]) -> Result<(), ProcessError> {
        let foreign = |name: &ServerName| {
            let owner = self.board.server(name)?.row.owner;
            let by = match owner {
                Owner::File | Owner::Agent => return None,
                Owner::Api => "the scheduler API",
            };
            Some(format!(
                "server {name} belongs to {by}: take it out of the file, or have {by} remove it and edit the file again"
            ))
        };
        // What the file takes away was its own, and is nothing to it once another has it.
        let problems: Vec<String> =
            changes.iter().filter_map(RegistryChange::wanted).filter_map(|server| foreign(&server.name)).collect();
        if !problems.is_empty() {
            return Err(ProcessError::Registry(problems.join("; ")));
        }
        if self.scheduler.is_some() {
            for server in changes.iter().filter_map(RegistryChange::wanted) {
                for index in 0..server.replicas {
                    let id = ReplicaId::new(server.name.clone(), index);
                    self.can_start(server, index).map_err(|problem| failed(&id, problem))?;
                }
            }
        }
        Ok(())
    }

    fn can_start(&self, server: &ServerDecl, index: u32) -> Result<(), String> {
        match (&server.location, server.place(index)) {
            (_, Some(Place::At { address, runtime, .. })) => {
                inference_server(&self.world, Some(runtime), &address).map(drop)
            }
            (
                Location::Builtin | Location::Addresses(_) | Location::Command(_),
                Some(Place::Builtin | Place::Started { .. }) | None,
            ) => Ok(()),
        }
    }

    /// Has the server be as `wanted`, or go.
    async fn obey(&mut self, name: &ServerName, wanted: Option<&ServerDecl>) -> Result<(), ProcessError> {
        match wanted {
            Some(server) => self.set(server).await,
            None if self.board.server(name).is_none_or(|server| server.row.owner != Owner::File) => {
                // It is another's by now, or nobody's.
                self.removed.remove(name);
                Ok(())
            }
            None => {
                self.removed.insert(name.clone());
                self.declare(name.clone(), None).await
            }
        }
    }

    /// Stops the inference servers that outlived an earlier life of this process and are not to be started by `registry`
    /// in their place: no agent looks for them any more.
    pub(super) async fn stop_left(&self, registry: &Registry) {
        if self.scheduler.is_none() {
            return;
        }
        let started = |server: &ServerDecl| {
            matches!(server.location, Location::Command(_)) && server.runtime != settings::registry::Runtime::Process
        };
        let servers = registry.servers.iter().filter(|server| started(server));
        let looked_for: BTreeSet<String> = servers
            .flat_map(|server| (0..server.replicas).map(|index| ReplicaId::new(server.name.clone(), index).to_string()))
            .collect();
        let folders = std::fs::read_dir(&self.settings.data_dir).into_iter().flatten().flatten();
        let left = folders.filter(|folder| folder.file_name().to_str().is_none_or(|name| !looked_for.contains(name)));
        let grace = self.settings.stop_deadline;
        let stops = left.map(|folder| async move { agent::process::stop_left(&folder.path(), grace).await });
        futures::future::join_all(stops).await;
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
        // An edit may say where a replica is that was to be emptied.
        self.emptied.remove(&server.name);
        self.emptied.extend(self.misplaced(server).map(|index| (server.name.clone(), index)));
        self.declare_as(server).await?;
        if let Some(scheduler) = self.scheduler.clone() {
            for index in 0..server.replicas {
                let id = ReplicaId::new(server.name.clone(), index);
                match self.replicas.get(&id) {
                    Some(here) => {
                        here.running.agent.evict_by(server.eviction);
                        here.running.agent.restate(facts(server));
                    }
                    None => self.start(id, server, scheduler.clone())?,
                }
            }
        }
        Ok(())
    }

    /// The first replica of the server that runs somewhere else than it is to.
    fn misplaced(&self, server: &ServerDecl) -> Option<u32> {
        let place = |index: u32| self.replicas.get(&ReplicaId::new(server.name.clone(), index)).map(|here| &here.place);
        (0..server.replicas)
            .find(|index| place(*index).is_some_and(|place| Some(place) != server.place(*index).as_ref()))
    }

    async fn declare_as(&self, server: &ServerDecl) -> Result<(), ProcessError> {
        let declaration = Declaration {
            replicas: server.replicas,
            bounds: (0, u32::MAX),
            kubernetes: None,
            capacity: Some(server.capacity.clone()),
            overcommit_percent: Some(server.overcommit_percent),
            capabilities: Some(server.capabilities.clone()),
            emptied: self.emptied.get(&server.name).copied().into_iter().collect(),
        };
        self.declare(server.name.clone(), Some(declaration)).await
    }

    async fn declare(&self, server: ServerName, declaration: Option<Declaration>) -> Result<(), ProcessError> {
        let answer = self.declare.ask(Declare { owner: Owner::File, server, declaration }).await;
        answer.and_then(|answer| answer).map_err(|refusal| ProcessError::Registry(refusal.to_string()))
    }

    fn start(&mut self, id: ReplicaId, server: &ServerDecl, scheduler: String) -> Result<(), ProcessError> {
        self.can_start(server, id.index).map_err(|problem| failed(&id, problem))?;
        let Some(place) = server.place(id.index) else { return Ok(()) };
        let data = self.settings.data_dir.join(id.to_string());
        let mut options = agent_options(&self.settings, id.clone(), server.capacity.clone(), data.clone());
        options.capabilities = server.capabilities.clone();
        options.overcommit_percent = server.overcommit_percent;
        options.runtime = Some(server.runtime);
        options.workers = server.workers;
        options.eviction = server.eviction;
        let upstream: Arc<dyn Upstream> = match &place {
            Place::Builtin => builtin(&mut options, &self.settings),
            Place::At { address, .. } => {
                options.process = agent::Listening::at(&address.http).map(|process| Arc::new(process) as _);
                inference_server(&self.world, options.runtime, address).map_err(|problem| failed(&id, problem))?
            }
            Place::Started { command, .. } => started(&self.world, &self.settings, &mut options, command),
        };
        let stop = CancellationToken::new();
        let door = DoorAt::InProcess(&self.connections);
        let sources = self.origins.ready(&self.settings, &mut options, &self.world.clock);
        let sources = sources.map_err(|problem| failed(&id, problem))?;
        let running = replica::start(&self.world, options, upstream, sources, door, scheduler, &stop);
        expose_agent(&self.metrics, &id, &running.agent);
        self.replicas.insert(id, Here { stop, running, data, place, empty: 0 });
        Ok(())
    }

    /// Starts a replica that was emptied where the file says, and empties the next of its server that is to move.
    async fn start_anew(&mut self, id: &ReplicaId) {
        let Some(server) = self.registry.server(&id.server).cloned() else { return };
        let place = server.place(id.index).map(|place| place.to_string()).unwrap_or_default();
        match self.set(&server).await {
            Ok(()) => {
                tracing::info!(target: "wharf::registry", replica = %id, place, "the replica is started anew");
            }
            Err(problem) => {
                tracing::error!(target: "wharf::registry", replica = %id, place, %problem, "the replica can't be started anew yet");
                self.unsure.insert(id.server.clone());
            }
        }
    }

    /// Stops what is not wanted any more and empty, and forgets the servers of which nothing is left.
    async fn look(&mut self) {
        let wanted: BTreeMap<&ServerName, u32> =
            self.registry.servers.iter().map(|server| (&server.name, server.replicas)).collect();
        let mut stopping = Vec::new();
        for (id, here) in &mut self.replicas {
            let leaves = wanted.get(&id.server).is_none_or(|replicas| id.index >= *replicas)
                || self.emptied.get(&id.server) == Some(&id.index);
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
                here.end(&id, STOP + self.settings.stop_deadline).await;
            }
            if self.emptied.get(&id.server) == Some(&id.index) {
                self.start_anew(&id).await;
            }
        }
        for name in self.unsure.clone() {
            let wanted = self.registry.server(&name).cloned();
            if self.obey(&name, wanted.as_ref()).await.is_ok() {
                self.unsure.remove(&name);
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

/// What an agent is to say of a replica of `server`.
fn facts(server: &ServerDecl) -> agent::Facts {
    agent::Facts {
        capacity: server.capacity.clone(),
        overcommit_percent: server.overcommit_percent,
        capabilities: server.capabilities.clone(),
    }
}

fn failed(id: &ReplicaId, problem: String) -> ProcessError {
    ProcessError::Replica { replica: id.to_string(), problem }
}

impl Here {
    /// Ends the replica: nothing is placed on it and its agent holds nothing.
    async fn end(self, id: &ReplicaId, within: Duration) {
        self.running.agent.retire();
        self.stop.cancel();
        if tokio::time::timeout(within, self.running.stopped()).await.is_err() {
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
