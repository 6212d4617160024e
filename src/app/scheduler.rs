//! The control plane: actors behind two gRPC ports.

use std::{io, sync::Arc, time::Duration};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use super::World;
use crate::{
    actors::{self, Fatal, Handle, Spawner, StartError, Timing},
    domain::model::Policy,
    messages::Gate,
    ports::{Listen, Store},
    rpc::{
        agent_hub::{AgentSessions, Leader},
        directory::Directory,
        proto::{
            DESCRIPTORS, agent::agent_hub_server::AgentHubServer,
            health::health_check_service_server::HealthCheckServiceServer, routes::routes_server::RoutesServer,
            scheduler::scheduler_server::SchedulerServer, wharf::wharf_server::WharfServer,
        },
        routes_service::RouteSessions,
        scheduler_service::SchedulerApi,
        serve::serve,
        wharf_service::WharfApi,
    },
    telemetry::metrics::Metrics,
};

/// Questions that may wait for the actors at a time.
const PERMITS: usize = 10_000;
/// The longest that one may wait.
const DEADLINE: Duration = Duration::from_secs(30);
/// The largest message that is taken: a hello of an agent with a hundred thousand copies.
const MESSAGE: usize = 256 << 20;

/// How a scheduler is started.
#[derive(Debug)]
pub struct Options {
    /// Where clients call: `host:port`.
    pub api: String,
    /// Where agents and gateways call: `host:port`.
    pub agents: String,
    /// The journal.
    pub store: Arc<dyn Store>,
    /// Whether commits, and looks at all models, block threads of their own.
    pub blocking: bool,
    /// Where actors run.
    pub spawner: Spawner,
    /// What decides over models.
    pub policy: Policy,
    /// How long things may take.
    pub timing: Timing,
    /// Events that are kept at most.
    pub events: usize,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// A scheduler could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its journal.
    #[error(transparent)]
    Start(#[from] StartError),
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
}

/// A running scheduler.
#[derive(Debug)]
pub struct Running {
    /// Its actors.
    pub handle: Handle,
    /// Where clients call.
    pub api: String,
    /// Where agents and gateways call.
    pub agents: String,
    store: Arc<dyn Store>,
    tasks: JoinSet<()>,
}

impl Running {
    /// Waits until its ports are closed, after `shutdown`, and keeps the events for the next start.
    pub async fn stopped(mut self) {
        while self.tasks.join_next().await.is_some() {}
        if let Err(error) = self.store.save_events(&self.handle.links.events.encode()) {
            tracing::warn!(%error, "the events of this run are not kept");
        }
    }
}

/// Listens, reads the journal, starts the actors, and serves: clients once status knows what the journal has, agents and
/// gateways once all of it has actors.
///
/// # Errors
/// When an address is taken, or the journal can't be used.
pub async fn start(
    world: &World,
    options: Options,
    fatal: Fatal,
    shutdown: CancellationToken,
) -> Result<Running, Error> {
    let api_listener = bind(world, &options.api, "scheduler.listen").await?;
    let agents_listener = bind(world, &options.agents, "scheduler.agents").await?;
    let (api_address, agents_address) = (api_listener.address(), agents_listener.address());
    let store = Arc::clone(&options.store);
    let handle = actors::start(actors::Scheduler {
        store: options.store,
        blocking: options.blocking,
        clock: Arc::clone(&world.clock),
        policy: options.policy,
        timing: options.timing,
        spawner: options.spawner,
        events: options.events,
        metrics: options.metrics,
        fatal,
    })?;
    let mut tasks = JoinSet::new();
    let mut open = |listener: Box<dyn Listen>, routes: Routes| {
        let (address, shutdown) = (listener.address(), shutdown.clone());
        tasks.spawn(async move {
            if let Err(error) = serve(listener, routes, shutdown).await {
                tracing::error!(address, %error, "a port ended");
            }
        });
    };
    // Meanwhile those who call wait in the listeners' queues: an agent that is not welcomed soon calls again, and each call
    // says all that it holds.
    handle.known().await;
    open(api_listener, api(&handle, options.blocking).await);
    handle.restored().await;
    open(agents_listener, agents(&handle));
    Ok(Running { handle, api: api_address, agents: agents_address, store, tasks })
}

async fn bind(world: &World, address: &str, setting: &'static str) -> Result<Box<dyn Listen>, Error> {
    let bound = world.network.bind(address).await;
    bound.map_err(|problem| Error::Listen { address: address.to_owned(), setting, problem })
}

async fn api(handle: &Handle, blocking: bool) -> Routes {
    let links = &handle.links;
    let models = Gate::new(handle.models(), PERMITS, DEADLINE);
    let directory = Directory::new(Arc::clone(&links.board), blocking);
    let servers = Gate::new(handle.servers(), PERMITS, DEADLINE);
    let scheduler = SchedulerApi::new(models.clone(), servers, directory.clone());
    let wharf = WharfApi {
        models,
        marks: Gate::new(handle.marks(), PERMITS, DEADLINE),
        explain: Gate::new(handle.explain(), PERMITS, DEADLINE),
        inspect: Gate::new(handle.inspect(), PERMITS, DEADLINE),
        directory,
        events: links.events.clone(),
    };
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<SchedulerServer<SchedulerApi>>().await;
    reporter.set_serving::<WharfServer<WharfApi>>().await;
    let routes = Routes::new(SchedulerServer::new(scheduler.clone()))
        .add_service(HealthCheckServiceServer::new(scheduler))
        .add_service(WharfServer::new(wharf))
        .add_service(health);
    // Both forms: many clients know only the older one.
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    match (reflection().build_v1(), reflection().build_v1alpha()) {
        (Ok(now), Ok(older)) => routes.add_service(now).add_service(older),
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!(%error, "gRPC reflection is not served");
            routes
        }
    }
}

fn agents(handle: &Handle) -> Routes {
    let (links, identity) = (&handle.links, &handle.links.identity);
    let leader = Leader {
        cluster: identity.cluster.clone(),
        lineage: identity.lineage.clone(),
        this: identity.leader,
        known: identity.leaders.clone(),
    };
    let (connected, spoke) = handle.agents();
    let sessions = AgentSessions::new(connected, spoke, leader.clone());
    let routes = RouteSessions::new(handle.gateways(), leader, links.timing.gateway_lease, Arc::clone(&links.clock));
    Routes::new(AgentHubServer::new(sessions).max_decoding_message_size(MESSAGE)).add_service(RoutesServer::new(routes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{forward::TcpNetwork, ports::SystemClock};

    #[tokio::test]
    async fn a_port_that_is_taken_is_told_once_with_the_setting_that_names_it() {
        let world = World { network: Arc::new(TcpNetwork), clock: Arc::new(SystemClock::new()) };
        let taken = world.network.bind("127.0.0.1:0").await.unwrap();
        let error = bind(&world, &taken.address(), "scheduler.agents").await.unwrap_err();
        let told = format!("{:#}", anyhow::Error::from(error));
        assert_eq!(told.matches("os error").count(), 1, "{told}");
        assert!(told.ends_with("set scheduler.agents to another address"), "{told}");
    }
}
