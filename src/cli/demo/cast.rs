//! Who plays: the inference servers, the models, and what is to be seen of them.
//!
//! The rule of this module: the play is one and the same. What differs from cast to cast is data here, and the scene that
//! only a server in a process of its own can play.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use super::story::Promise;
use crate::domain::memory::Bytes;

/// The model that is rolled out, drained and recovered.
pub(super) const IRIS: &str = "iris";

/// Programs that are not part of Wharf, and play in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guests {
    /// The program of `MLServer`, of which two are started.
    pub mlserver: PathBuf,
    /// The program that fetches the artifacts.
    pub rclone: PathBuf,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Cast {
    /// The one server.
    pub(super) server: &'static str,
    /// What answers, for people.
    pub(super) engine: &'static str,
    /// What each model is said to need.
    pub(super) need: Bytes,
    /// The models by name, and the samples that they are. The first is [`IRIS`]; the second gets traffic too.
    pub(super) models: [(&'static str, &'static str); 12],
    /// The sample that is the second version of [`IRIS`], which answers differently.
    pub(super) second: &'static str,
    /// A model that is submitted right before the process is killed.
    pub(super) late: (&'static str, &'static str),
    /// How long anything may take to come about.
    pub(super) patience: Duration,
    guests: Option<Guests>,
}

/// Replicas of the server.
pub(super) const REPLICAS: u32 = 2;
/// Models that a replica's memory holds.
pub(super) const HELD: u64 = 4;
/// How much more than its memory may be registered on a replica: enough for all models on one, when the other is
/// drained.
const OVERCOMMIT: u32 = 200;

impl Cast {
    /// The built-in runtime.
    pub(super) const fn builtin() -> Self {
        Self {
            server: "onnx",
            engine: "ONNX Runtime",
            need: Bytes(1 << 20),
            models: [
                (IRIS, "iris-1"),
                ("mlp", "mlp"),
                ("iris-mlp", "iris-mlp"),
                ("add", "add"),
                ("concat", "concat"),
                ("external", "external"),
                ("pick", "pick"),
                ("identity-fp32", "identity-fp32"),
                ("identity-fp64", "identity-fp64"),
                ("identity-int64", "identity-int64"),
                ("identity-bool", "identity-bool"),
                ("identity-bytes", "identity-bytes"),
            ],
            second: "iris-2",
            late: ("late", "identity-int32"),
            patience: Duration::from_secs(30),
            guests: None,
        }
    }

    /// Two of `MLServer`, each in a process that Wharf starts, with artifacts that rclone fetches.
    pub(super) const fn mlserver(guests: Guests) -> Self {
        Self {
            server: "mlserver",
            engine: "scikit-learn",
            // More than the first model takes, whose load brings its libraries along: then all count alike.
            need: Bytes(256 << 20),
            models: [
                (IRIS, "sklearn-iris-1"),
                ("boosted", "xgboost-iris-2"),
                ("tree-1", "sklearn-iris-1"),
                ("tree-2", "sklearn-iris-2"),
                ("boosted-1", "xgboost-iris-2"),
                ("tree-3", "sklearn-iris-1"),
                ("tree-4", "sklearn-iris-2"),
                ("boosted-2", "xgboost-iris-2"),
                ("tree-5", "sklearn-iris-1"),
                ("tree-6", "sklearn-iris-2"),
                ("boosted-3", "xgboost-iris-2"),
                ("tree-7", "sklearn-iris-1"),
            ],
            second: "xgboost-iris-2",
            late: ("late", "sklearn-iris-2"),
            // Two Python programs start at once.
            patience: Duration::from_secs(180),
            guests: Some(guests),
        }
    }

    /// Whether the inference servers are processes of their own.
    pub(super) const fn has_processes(&self) -> bool {
        self.guests.is_some()
    }

    /// What is promised of it, in this order.
    pub(super) fn promises(&self) -> Vec<Promise> {
        let all = Promise::ALL.into_iter();
        all.filter(|promise| self.has_processes() || *promise != Promise::Restarted).collect()
    }

    /// The server registry.
    pub(super) fn registry(&self) -> String {
        let (name, memory) = (self.server, self.need.0 * HELD);
        let runs = match &self.guests {
            None => "runtime = \"builtin\"\n".to_owned(),
            Some(guests) => format!(
                "runtime = \"mlserver\"\ncapabilities = [\"sklearn\", \"xgboost\"]\n\
                 command = [{:?}, \"start\", \"{{repository}}\"]\n",
                guests.mlserver.display().to_string()
            ),
        };
        format!(
            "[[server]]\nname = \"{name}\"\nreplicas = {REPLICAS}\nmemory = \"{memory}\"\n\
             overcommit_percent = {OVERCOMMIT}\n{runs}"
        )
    }

    /// Files that the process needs, by name, with what is in them, for models in the folder `models`.
    pub(super) fn files(&self, models: &Path) -> Vec<(&'static str, String)> {
        let mut files = vec![("servers.toml", self.registry())];
        if self.guests.is_some() {
            let models = models.display();
            files.push(("rclone.conf", format!("[models]\ntype = alias\nremote = {models}\n")));
        }
        files
    }

    /// Settings beyond those that every process of the demo has, with its files in `folder`.
    pub(super) fn settings(&self, folder: &Path) -> Vec<(&'static str, String)> {
        let Some(guests) = &self.guests else { return Vec::new() };
        vec![
            ("agent.rclone_program", guests.rclone.display().to_string()),
            ("agent.rclone_config", folder.join("rclone.conf").display().to_string()),
        ]
    }

    /// Where the sample `name`, which lies in `folder`, is said to be.
    pub(super) fn uri(&self, name: &str, folder: &Path) -> String {
        if self.guests.is_some() { format!("models:{name}") } else { folder.display().to_string() }
    }

    /// What a server has to be capable of to serve the sample.
    pub(super) fn requirement(&self, sample: &'static str) -> &'static str {
        if self.guests.is_none() { "onnx" } else { sample.split('-').next().unwrap_or(sample) }
    }
}
