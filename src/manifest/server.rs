//! Seldon's `Server` manifests.

use super::{ReplicaCounts, fields::Fields, metadata, node::Problem, replicas};
use crate::domain::{names::ServerName, spec::KubernetesMeta};

/// What a `Server` manifest says that is not about pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerManifest {
    /// The server.
    pub name: ServerName,
    /// The name of the `ServerConfig` whose pods it has.
    pub config: Option<String>,
    /// Replicas expected.
    pub replicas: u32,
    /// Least replicas.
    pub min: u32,
    /// Most replicas; no bound when absent.
    pub max: Option<u32>,
    /// Capabilities that stand in place of the config's.
    pub capabilities: Vec<String>,
    /// Capabilities beside the config's.
    pub extra_capabilities: Vec<String>,
    /// What Kubernetes knows it by.
    pub kubernetes: Option<KubernetesMeta>,
}

/// Fields that only speak to Kubernetes.
const OF_KUBERNETES: [&str; 5] = [
    "podSpec",
    "imageOverrides",
    "statefulSetPersistentVolumeClaimRetentionPolicy",
    "deploymentStrategy",
    "disableAutoUpdate",
];

/// Reads the rest of a document of kind `Server`.
pub(super) fn read(mut object: Fields, notes: &mut Vec<String>) -> Result<ServerManifest, Problem> {
    let metadata = metadata(&mut object)?;
    let name = ServerName::new(&metadata.name)
        .map_err(|error| Problem::at(metadata.line, format!("metadata.name: {error}")))?;
    let line = object.line();
    let mut spec = object.child("spec")?.ok_or_else(|| Problem::at(line, "spec: it is missing"))?;
    object.ignore("status");
    object.finish()?;
    let config = spec.text("serverConfig")?.map(|(config, _)| config);
    let ReplicaCounts { replicas, min, max } = replicas(&mut spec)?;
    let capabilities = spec.texts("capabilities")?;
    let extra_capabilities = spec.texts("extraCapabilities")?;
    if !capabilities.is_empty() || !extra_capabilities.is_empty() {
        notes.push("spec.capabilities has no effect here: an agent tells its server's capabilities".to_owned());
    }
    for name in OF_KUBERNETES {
        if spec.ignore(name) {
            notes.push(format!("spec.{name} has no effect here: it describes pods"));
        }
    }
    spec.finish()?;
    Ok(ServerManifest {
        name,
        config,
        replicas,
        min,
        max,
        capabilities,
        extra_capabilities,
        kubernetes: metadata.kubernetes,
    })
}
