//! The server registry: which servers there are, and where their replicas run.
//!
//! The rule of this module: a registry is whole and valid, or it is not there. A file with any problem changes
//! nothing, and all its problems are told with their lines.

mod command;
mod parse;
mod places;
mod watch;

use std::collections::BTreeMap;

use crate::domain::{memory::Resources, names::ServerName, residency::Eviction};

pub use super::problem::Problems as RegistryErrors;
pub use command::{Command, Lifetime};
pub use watch::RegistryWatch;

/// The most replicas that one server may have.
pub const MAX_REPLICAS: u32 = 10_000;
/// The most memory that may be registered beyond a replica's own, in percent.
pub const MAX_OVERCOMMIT_PERCENT: u32 = 1_000;
/// The overcommit of a server that states none; Seldon's deployment has the same.
pub const DEFAULT_OVERCOMMIT_PERCENT: u32 = 10;
/// The most worker processes that an inference server may have.
pub const MAX_WORKERS: u32 = 1_000;
/// Ports of one replica that an agent starts.
pub const PORTS: u16 = 3;
/// What the built-in runtime serves.
pub const BUILTIN_CAPABILITY: &str = "onnx";

/// Every declared server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registry {
    /// The servers, by name.
    pub servers: Vec<ServerDecl>,
}

/// A declared server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerDecl {
    /// Its name.
    pub name: ServerName,
    /// How many replicas it has.
    pub replicas: u32,
    /// What it can serve: trimmed, sorted, each once.
    pub capabilities: Vec<String>,
    /// Memory of each replica, by device.
    pub capacity: Resources,
    /// How much more than its capacity may be registered on a replica.
    pub overcommit_percent: u32,
    /// Which copies leave a replica's memory first when it is short.
    pub eviction: Eviction,
    /// What serves its models.
    pub runtime: Runtime,
    /// Processes of an `MLServer` that each hold every model.
    pub workers: u32,
    /// Where its replicas are.
    pub location: Location,
}

/// What serves a server's models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Runtime {
    /// Wharf's own ONNX runtime, within the agent's process.
    Builtin,
    /// `MLServer`.
    MlServer,
    /// Triton in explicit model control mode.
    Triton,
    /// Any server of the Open Inference Protocol with the model repository extension.
    Oip,
    /// A process for each model, of a program that can't load and unload: started and stopped instead.
    Process,
}

impl Runtime {
    const ALL: [Self; 5] = [Self::Builtin, Self::MlServer, Self::Triton, Self::Oip, Self::Process];

    /// The runtime that the registry names so.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|runtime| runtime.name() == name)
    }

    /// The runtime, as the registry names it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Builtin => "builtin",
            Self::MlServer => "mlserver",
            Self::Triton => "triton",
            Self::Oip => "oip",
            Self::Process => "process",
        }
    }
}

/// Where a server's replicas are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// In the agent's process.
    Builtin,
    /// Running already, one address per replica, in the order of their indices.
    Addresses(Vec<ReplicaAddress>),
    /// Started by the agent.
    Command(Command),
}

/// Where one replica runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the agent's process.
    Builtin,
    /// In a running server. One that is spoken to otherwise is another place: what is loaded there was made for the
    /// server that it was.
    At {
        /// Where that listens.
        address: ReplicaAddress,
        /// What it is.
        runtime: Runtime,
        /// In how many processes it holds each model.
        workers: u32,
    },
    /// In what the agent starts.
    Started {
        /// How.
        command: Command,
        /// What it is.
        runtime: Runtime,
        /// In how many processes it holds each model.
        workers: u32,
    },
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Builtin => f.write_str("in this process"),
            Self::At { address, .. } => write!(f, "at {}", address.http),
            Self::Started { command, .. } => write!(f, "started as {}", command.argv.join(" ")),
        }
    }
}

/// How one running inference server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaAddress {
    /// Its REST address: `http://host:port`.
    pub http: String,
    /// Its gRPC address, `http://host:port`, where that is another.
    pub grpc: Option<String>,
}

/// What another registry changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegistryChange {
    /// A server is new.
    Added(ServerDecl),
    /// A server is gone.
    Removed(ServerName),
    /// A server has more or fewer replicas, and its remaining ones are where they were.
    Resized {
        /// The server as it is now.
        server: ServerDecl,
        /// How many it had.
        from: u32,
    },
    /// Something else about a server changed; its replicas too, perhaps.
    Changed {
        /// As it was.
        from: ServerDecl,
        /// As it is now.
        to: ServerDecl,
    },
}

impl Registry {
    /// Reads a registry file; `file_name` goes into errors.
    ///
    /// # Errors
    /// Every problem, with its line and the fix.
    pub fn parse(text: &str, file_name: &str) -> Result<Self, RegistryErrors> {
        parse::registry(text, file_name)
    }

    /// The server of this name.
    #[must_use]
    pub fn server(&self, name: &ServerName) -> Option<&ServerDecl> {
        self.servers.iter().find(|server| server.name == *name)
    }

    /// What leads from `old` to `new`, in the order of the servers' names.
    #[must_use]
    pub fn diff(old: &Self, new: &Self) -> Vec<RegistryChange> {
        let by_name = |registry: &Self| -> BTreeMap<ServerName, ServerDecl> {
            registry.servers.iter().map(|server| (server.name.clone(), server.clone())).collect()
        };
        let (mut old, new) = (by_name(old), by_name(new));
        let mut changes = BTreeMap::new();
        for (name, to) in new {
            let change = match old.remove(&name) {
                None => RegistryChange::Added(to),
                Some(from) if from == to => continue,
                Some(from) if from.is_resized(&to) => RegistryChange::Resized { from: from.replicas, server: to },
                Some(from) => RegistryChange::Changed { from, to },
            };
            changes.insert(name, change);
        }
        changes.extend(old.into_keys().map(|name| (name.clone(), RegistryChange::Removed(name))));
        changes.into_values().collect()
    }
}

impl RegistryChange {
    /// The server that it is about.
    #[must_use]
    pub const fn server(&self) -> &ServerName {
        match self {
            Self::Added(server) | Self::Resized { server, .. } | Self::Changed { to: server, .. } => &server.name,
            Self::Removed(name) => name,
        }
    }

    /// The server as it is to be; nothing when it is gone.
    #[must_use]
    pub const fn wanted(&self) -> Option<&ServerDecl> {
        match self {
            Self::Added(server) | Self::Resized { server, .. } | Self::Changed { to: server, .. } => Some(server),
            Self::Removed(_) => None,
        }
    }
}

impl ServerDecl {
    /// Where its replica of that index runs; nothing when the registry does not say.
    #[must_use]
    pub fn place(&self, index: u32) -> Option<Place> {
        match &self.location {
            Location::Builtin => Some(Place::Builtin),
            Location::Addresses(all) => all.get(index as usize).map(|address| Place::At {
                address: address.clone(),
                runtime: self.runtime,
                workers: self.workers,
            }),
            Location::Command(command) => {
                Some(Place::Started { command: command.clone(), runtime: self.runtime, workers: self.workers })
            }
        }
    }

    /// The ports that its replicas take, where it says which.
    #[must_use]
    pub fn ports(&self) -> Option<std::ops::RangeInclusive<u32>> {
        match &self.location {
            Location::Command(Command { ports: Some(first), .. }) if self.replicas > 0 => {
                let first = u32::from(*first);
                Some(first..=first.saturating_add(self.replicas.saturating_mul(u32::from(PORTS)) - 1))
            }
            Location::Builtin | Location::Addresses(_) | Location::Command(_) => None,
        }
    }

    /// Whether `to` differs by the number of replicas alone.
    fn is_resized(&self, to: &Self) -> bool {
        let kept = |server: &Self| match &server.location {
            Location::Addresses(all) => {
                let kept = usize::try_from(self.replicas.min(to.replicas)).unwrap_or(usize::MAX);
                Location::Addresses(all.iter().take(kept).cloned().collect())
            }
            other => other.clone(),
        };
        let same = |server: &Self| Self { replicas: 0, location: kept(server), ..server.clone() };
        self.replicas != to.replicas && same(self) == same(to)
    }
}
