//! What a user asks for: the immutable spec of a version, and the deployment that may change under it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{
    error::SpecError,
    memory::Bytes,
    names::{ModelName, ServerName},
    warmup::Warmup,
};

/// Everything about a version that makes it another version when it changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// Where the artifact is.
    pub uri: String,
    /// Which version folder of the artifact to use; the highest when absent.
    pub artifact_version: Option<u32>,
    /// Where the credentials for `uri` are.
    pub storage: Option<Storage>,
    /// Capabilities that the server must have, compared as exact strings after trimming.
    pub requirements: Vec<String>,
    /// Declared need on the server's primary device.
    pub memory: Option<Bytes>,
    /// The only server it may be placed on.
    pub server: Option<ServerName>,
    /// An explainer or a language model that refers to another model.
    pub companion: Option<Companion>,
    /// Passed on to the inference server.
    pub parameters: Vec<Parameter>,
    /// What the inference server is known to do with it.
    pub runtime: Option<RuntimeInfo>,
    /// The request that a copy must answer before it is Available.
    #[serde(default)]
    pub warmup: Warmup,
}

/// Credentials of a storage URI.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Storage {
    /// The name of a secret.
    SecretName(String),
    /// An rclone configuration, inline. It holds credentials, and is never printed.
    RcloneConfig(String),
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SecretName(name) => f.debug_tuple("SecretName").field(name).finish(),
            Self::RcloneConfig(_) => f.write_str("RcloneConfig(***)"),
        }
    }
}

/// A model that stands beside another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Companion {
    /// Explains the answers of a model or pipeline.
    Explainer {
        /// The explainer's type.
        kind: String,
        /// What it explains.
        of: Reference,
    },
    /// A language model over a model or pipeline.
    Llm {
        /// What it stands on.
        of: Reference,
    },
}

/// A name of a model or of a pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reference {
    /// A model.
    Model(String),
    /// A pipeline.
    Pipeline(String),
}

/// A named setting for the inference server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// How many times an inference server holds a model in memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RuntimeInfo {
    /// `MLServer`'s parallel workers, each with a model of its own.
    MlServer {
        /// Zero means in the server's own process.
        parallel_workers: u32,
    },
    /// Triton's instance count, by CPU instance group.
    Triton {
        /// Instances in each group.
        cpu: Vec<u32>,
    },
}

impl ModelSpec {
    /// Whether `other` would be another version. Like Seldon's, the comparison leaves out what the runtime
    /// was found to do.
    #[must_use]
    pub fn same_version(&self, other: &Self) -> bool {
        let stripped = |spec: &Self| Self { runtime: None, ..spec.clone() };
        stripped(self) == stripped(other)
    }
}

/// What may change without a new version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deployment {
    /// Copies asked for. 0 is scaled down.
    pub replicas: u32,
    /// With fewer copies than this, or with none, the model is not Available.
    pub min_replicas: u32,
    /// Never more copies than this; 0 sets no bound.
    pub max_replicas: u32,
    /// Seldon's payload logging flag, carried for its clients.
    pub log_payloads: bool,
    /// How a new version takes over.
    pub strategy: Strategy,
    /// Whether copies of one version may be on several servers.
    pub spread: Spread,
    /// Who is placed first when not everything fits: the higher.
    pub priority: i32,
    /// Whether its copies are never evicted.
    #[serde(default)]
    pub pinned: bool,
}

impl Default for Deployment {
    fn default() -> Self {
        Self {
            replicas: 1,
            min_replicas: 0,
            max_replicas: 0,
            log_payloads: false,
            strategy: Strategy::default(),
            spread: Spread::default(),
            priority: 0,
            pinned: false,
        }
    }
}

impl Deployment {
    /// Checks what the fields say together.
    ///
    /// # Errors
    /// Names the field and the fix.
    pub fn check(&self) -> Result<(), SpecError> {
        let bad = |field, problem: String| Err(SpecError { field, problem });
        if self.replicas < self.min_replicas {
            return bad("replicas", format!("{} is less than minReplicas {}", self.replicas, self.min_replicas));
        }
        if self.max_replicas != 0 && self.min_replicas > self.max_replicas {
            return bad("minReplicas", format!("{} is more than maxReplicas {}", self.min_replicas, self.max_replicas));
        }
        if self.max_replicas != 0 && self.replicas > self.max_replicas {
            return bad("replicas", format!("{} is more than maxReplicas {}", self.replicas, self.max_replicas));
        }
        if self.strategy == (Strategy::RollingUpdate { max_surge: 0, max_unavailable: 0 }) {
            return bad(
                "maxSurge",
                "maxSurge and maxUnavailable are both 0, so no version could ever follow another; raise one of them, \
                 or use strategy: recreate"
                    .to_owned(),
            );
        }
        Ok(())
    }
}

/// How a new version takes over from the one that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Strategy {
    /// The new version is loaded beside the old one.
    RollingUpdate {
        /// Copies that may exist beyond those asked for.
        max_surge: u32,
        /// Copies that may be missing from those asked for.
        max_unavailable: u32,
    },
    /// The old version is unloaded first, and nothing answers in between.
    Recreate,
}

impl Default for Strategy {
    fn default() -> Self {
        Self::RollingUpdate { max_surge: 1, max_unavailable: 0 }
    }
}

/// Where the copies of one version may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Spread {
    /// All on replicas of one server.
    #[default]
    OneServer,
    /// On replicas of any servers that fit.
    Servers,
}

/// What Kubernetes knows the model by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KubernetesMeta {
    /// The object's namespace.
    pub namespace: String,
    /// The object's `metadata.generation`; 0 from the CLI.
    pub generation: i64,
}

/// Fields of Seldon's API that mean nothing to Wharf and are given back as they came.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passthrough {
    /// `meta.kind`.
    pub kind: Option<String>,
    /// `meta.version`.
    pub version: Option<String>,
    /// `streamSpec`: input and output topic.
    pub stream: Option<(String, String)>,
    /// `dataflowSpec.cleanTopicsOnDelete`.
    pub clean_topics_on_delete: Option<bool>,
}

/// A whole submission, as it comes from the API or a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Definition {
    /// The model.
    pub name: ModelName,
    /// What the version is.
    pub spec: ModelSpec,
    /// How it is deployed; what it leaves out stays as it is.
    pub deployment: DeploymentPatch,
    /// What Kubernetes knows it by.
    pub kubernetes: Option<KubernetesMeta>,
    /// What is only given back.
    pub passthrough: Passthrough,
}

/// The part of a deployment that a submission speaks of. Seldon's API has no word for the rest, so a
/// submission through it leaves the rest alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeploymentPatch {
    /// Replicas and payload logging: all of Seldon's deployment spec, or none of it.
    pub replicas: Option<Replicas>,
    /// How a new version takes over.
    pub strategy: Option<Strategy>,
    /// Where copies may be.
    pub spread: Option<Spread>,
    /// Who is placed first.
    pub priority: Option<i32>,
    /// Whether copies are never evicted.
    pub pinned: Option<bool>,
}

/// Seldon's deployment spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replicas {
    /// Copies asked for.
    pub replicas: u32,
    /// Least copies to be Available.
    pub min: u32,
    /// Most copies; 0 for no bound.
    pub max: u32,
    /// Payload logging.
    pub log_payloads: bool,
}

impl DeploymentPatch {
    /// `base` with what this speaks of.
    ///
    /// # Errors
    /// When the result says two things that can't both hold.
    pub fn over(&self, base: &Deployment) -> Result<Deployment, SpecError> {
        let mut deployment = base.clone();
        if let Some(replicas) = self.replicas {
            deployment.replicas = replicas.replicas;
            deployment.min_replicas = replicas.min;
            deployment.max_replicas = replicas.max;
            deployment.log_payloads = replicas.log_payloads;
        }
        deployment.strategy = self.strategy.unwrap_or(deployment.strategy);
        deployment.spread = self.spread.unwrap_or(deployment.spread);
        deployment.priority = self.priority.unwrap_or(deployment.priority);
        deployment.pinned = self.pinned.unwrap_or(deployment.pinned);
        deployment.check()?;
        Ok(deployment)
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RollingUpdate { max_surge, max_unavailable } => {
                write!(f, "rollingUpdate (maxSurge {max_surge}, maxUnavailable {max_unavailable})")
            }
            Self::Recreate => f.write_str("recreate"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_leaves_alone_what_it_does_not_speak_of() {
        let base = Deployment { strategy: Strategy::Recreate, priority: 5, ..Deployment::default() };
        let patch = DeploymentPatch {
            replicas: Some(Replicas { replicas: 3, min: 1, max: 0, log_payloads: true }),
            ..DeploymentPatch::default()
        };
        let patched = patch.over(&base).expect("valid");
        assert_eq!((patched.replicas, patched.strategy, patched.priority), (3, Strategy::Recreate, 5));
    }

    #[test]
    fn contradictions_name_the_field() {
        let with = |edit: fn(&mut Deployment)| {
            let mut deployment = Deployment::default();
            edit(&mut deployment);
            deployment.check().expect_err("contradiction").field
        };
        assert_eq!(with(|d| d.min_replicas = 2), "replicas");
        assert_eq!(with(|d| (d.replicas, d.min_replicas, d.max_replicas) = (3, 3, 2)), "minReplicas");
        assert_eq!(with(|d| (d.replicas, d.max_replicas) = (3, 2)), "replicas");
        assert_eq!(with(|d| d.strategy = Strategy::RollingUpdate { max_surge: 0, max_unavailable: 0 }), "maxSurge");
    }

    #[test]
    fn what_the_runtime_was_found_to_do_makes_no_new_version() {
        let spec = ModelSpec { uri: "/m".to_owned(), ..ModelSpec::default() };
        let learned = ModelSpec { runtime: Some(RuntimeInfo::MlServer { parallel_workers: 2 }), ..spec.clone() };
        assert!(spec.same_version(&learned));
        let reordered = ModelSpec { requirements: vec!["b".into(), "a".into()], ..spec.clone() };
        assert!(!spec.same_version(&reordered));
    }
}
