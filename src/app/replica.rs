//! One replica: an inference server and the agent beside it.

use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::World;
use crate::{
    agent::{self, Agent, Deps},
    forward::{self, Connections, IN_PROCESS, Limits, Registration, Upstream},
    ports::{ArtifactSource, Listen},
};

/// A running replica. What it does ends when it is dropped.
#[derive(Debug)]
pub struct Running {
    /// Its agent.
    pub agent: Arc<Agent>,
    tasks: JoinSet<()>,
    /// Keeps the door open for this process's gateway.
    _door: Option<Registration>,
}

impl Running {
    /// Waits until the replica has stopped, after `shutdown`.
    pub async fn stopped(mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Where a replica's door is.
pub enum DoorAt<'a> {
    /// In this process, for this process's gateway.
    InProcess(&'a Arc<Connections>),
    /// On a port.
    Port(Box<dyn Listen>),
}

impl std::fmt::Debug for DoorAt<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::InProcess(_) => f.write_str("InProcess"),
            Self::Port(listener) => write!(f, "Port({})", listener.address()),
        }
    }
}

/// Starts the agent of `server`, opens its door, and keeps a session with the scheduler at `scheduler`. What
/// the options say of the door's address is replaced by where it is; for a port on every address of the
/// machine, by what they say.
pub fn start(
    world: &World,
    mut options: agent::Options,
    server: Arc<dyn Upstream>,
    sources: Vec<Arc<dyn ArtifactSource>>,
    door: DoorAt<'_>,
    scheduler: String,
    shutdown: &CancellationToken,
) -> Running {
    let name = options.replica.to_string();
    match &door {
        DoorAt::InProcess(_) => options.door_address = format!("{IN_PROCESS}{name}"),
        DoorAt::Port(listener) if options.door_address.is_empty() => options.door_address = listener.address(),
        DoorAt::Port(_) => {}
    }
    let deps = Deps { clock: Arc::clone(&world.clock), network: Arc::clone(&world.network), server, sources };
    let agent = Agent::new(options, deps);
    let mut tasks = JoinSet::new();
    let registration = match door {
        DoorAt::InProcess(connections) => Some(connections.register(&name, agent.door())),
        DoorAt::Port(listener) => {
            tasks.spawn(forward::serve(listener, agent.door(), Limits::default(), shutdown.clone()));
            None
        }
    };
    let (running, shutdown) = (Arc::clone(&agent), shutdown.clone());
    tasks.spawn(async move {
        if let Err(error) = running.run(scheduler, shutdown).await {
            tracing::error!(replica = name, %error, "the agent can't go on");
        }
    });
    Running { agent, tasks, _door: registration }
}
