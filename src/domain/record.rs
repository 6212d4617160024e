//! The rows of the journal: what is wanted and what was decided, and nothing that can be derived or observed.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{
    copy::Failure,
    leader::Leaders,
    memory::Resources,
    names::{ModelName, ReplicaId, ServerName},
    size::SizeKey,
    spec::{Deployment, KubernetesMeta, ModelSpec, Passthrough},
    time::Instant,
    version::{Generation, Uid, Version},
};

/// One change to the journal. A transaction is a list of them, applied in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Creates or replaces a model.
    PutModel(Box<ModelRow>),
    /// Removes a model with all its versions, copies and sizes.
    RemoveModel(ModelName),
    /// Creates or replaces a version.
    PutVersion(Box<VersionRow>),
    /// Forgets a version that history no longer keeps.
    RemoveVersion(ModelName, Version),
    /// Creates or replaces an assignment.
    PutCopy(Box<CopyRow>),
    /// Removes an assignment.
    RemoveCopy(ModelName, Generation),
    /// Creates or replaces a measured size.
    PutSize(Box<SizeRow>),
    /// Forgets a measured size.
    RemoveSize(ModelName, SizeKey),
    /// Creates or replaces a server.
    PutServer(Box<ServerRow>),
    /// Removes a server.
    RemoveServer(ServerName),
    /// Replaces the counters.
    PutCounters(Counters),
}

/// A model, apart from its versions and copies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelRow {
    /// Its name: the key.
    pub name: ModelName,
    /// Of this creation of the name.
    pub uid: Uid,
    /// When it was created.
    pub created: Instant,
    /// How it is deployed.
    pub deployment: Deployment,
    /// What Kubernetes knows it by.
    pub kubernetes: Option<KubernetesMeta>,
    /// The version that clients are kept on until another has taken over.
    pub serving: Option<Version>,
    /// Every number that a copy may have been given is below this.
    pub number_bound: u32,
    /// No version below this is given any more: a history that was lost may have given it.
    #[serde(default)]
    pub version_floor: Version,
    /// When it was deleted, if it was.
    pub deleted: Option<Instant>,
}

/// One version of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionRow {
    /// The model: the key's first part.
    pub model: ModelName,
    /// The creation of the model that it belongs to.
    pub uid: Uid,
    /// Its number: the key's second part.
    pub version: Version,
    /// When it was submitted.
    pub created: Instant,
    /// What it is.
    pub spec: ModelSpec,
    /// Given back to Seldon's clients.
    pub passthrough: Passthrough,
    /// Why its rollout was given up, if it was.
    pub failed: Option<Failure>,
}

/// A copy's assignment to a replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyRow {
    /// The model: the key's first part.
    pub model: ModelName,
    /// Which copy: the key's second part.
    pub generation: Generation,
    /// Where it is.
    pub replica: ReplicaId,
    /// The memory reserved for it.
    pub need: Resources,
    /// Whether it is, or was when last decided, in the routes.
    pub routed: bool,
    /// Whether it is to leave.
    pub draining: bool,
}

/// What a model was found to take in memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SizeRow {
    /// The model: the key's first part.
    pub model: ModelName,
    /// What was measured: the key's second part.
    pub key: SizeKey,
    /// What it takes.
    pub bytes: Resources,
    /// The model's versions that are of this artifact.
    pub versions: BTreeSet<Version>,
}

/// Who decides over a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Owner {
    /// The registry file.
    File,
    /// The scheduler API (`ServerNotify`).
    Api,
    /// Nobody yet: an agent called that no registry names.
    Agent,
}

impl Owner {
    /// The owner, as people see it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Api => "api",
            Self::Agent => "agent",
        }
    }
}

/// A server and the marks that an operator set on its replicas.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerRow {
    /// Its name: the key.
    pub name: ServerName,
    /// Who decides over it.
    pub owner: Owner,
    /// Replicas that its owner expects; absent when it was never told.
    pub expected: Option<u32>,
    /// Least and most replicas, for Seldon's clients.
    pub bounds: (u32, u32),
    /// What Kubernetes knows it by.
    pub kubernetes: Option<KubernetesMeta>,
    /// Where each replica's door was when its agent last called: routes need it before the agents are back.
    #[serde(default)]
    pub doors: BTreeMap<u32, String>,
    /// Replicas on which nothing new is placed.
    pub cordoned: BTreeSet<u32>,
    /// Replicas that their copies leave.
    pub draining: BTreeSet<u32>,
}

/// Numbers that must never be given twice. Each is a reserved bound: everything below it may have been given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// The leader epoch of the last scheduler that started.
    pub leader_epoch: u64,
    /// Route epochs.
    pub route_epoch: u64,
    /// Model uids.
    pub uid: u64,
    /// The starts before, and the last one.
    #[serde(default)]
    pub leaders: Leaders,
}

/// Everything that a journal holds, as read at start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Models, by name.
    pub models: Vec<ModelRow>,
    /// Versions, by model and number.
    pub versions: Vec<VersionRow>,
    /// Copies, by model and generation.
    pub copies: Vec<CopyRow>,
    /// Measured sizes, by model and what was measured.
    pub sizes: Vec<SizeRow>,
    /// Servers, by name.
    pub servers: Vec<ServerRow>,
    /// The counters.
    pub counters: Counters,
}
