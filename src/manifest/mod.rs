//! Manifests: Seldon's `Model` and `Server` YAML, as it is, to the domain and back.
//!
//! The rule of this module: a file is understood whole or refused with its name, the document's number and
//! the line; nothing in it is guessed at or silently dropped. What is accepted without an effect is told in
//! the document's notes.

mod fields;
mod model;
mod node;
pub mod quantity;
mod server;
mod source;

use std::fmt;

use thiserror::Error;

pub use model::to_yaml;
pub use server::ServerManifest;
pub use source::read;

use self::{
    fields::Fields,
    node::{Node, Problem, Value},
};
use crate::domain::spec::Definition;

/// The only `apiVersion` there is.
pub const API_VERSION: &str = "mlops.seldon.io/v1alpha1";

/// One manifest and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Where it came from.
    pub source: Source,
    /// What it asks for.
    pub kind: Kind,
    /// What in it has no effect, one sentence each.
    pub notes: Vec<String>,
}

/// What a manifest asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A model to serve.
    Model(Box<Definition>),
    /// A server whose replicas are expected.
    Server(ServerManifest),
}

/// Where a manifest came from. Shown as `file:line`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The file's path, or `standard input`.
    pub file: String,
    /// Which document of the file, from 1; empty ones don't count.
    pub document: usize,
    /// The line that it starts on.
    pub line: u64,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// A manifest that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ManifestError {
    /// The file can't be read.
    #[error("{file} can't be read: {problem}")]
    Unreadable {
        /// The file.
        file: String,
        /// What the system said.
        problem: String,
    },
    /// There is nothing in it.
    #[error("{file} holds no manifest; wanted documents with apiVersion {API_VERSION} and kind Model or Server")]
    Empty {
        /// The file or folder.
        file: String,
    },
    /// Something in it is wrong.
    #[error("{file}:{}{}: {problem}", .line.map_or_else(String::new, |line| format!("{line}:")), document_label(*.document))]
    Invalid {
        /// The file.
        file: String,
        /// Which document, from 1; absent when the file could not be divided into documents.
        document: Option<usize>,
        /// The line, when it is known.
        line: Option<u64>,
        /// The field, what is wrong with it, and the fix.
        problem: String,
    },
    /// Two manifests say different things of one object.
    #[error("{kind} {name} is defined twice: {first} and {second}; remove one")]
    Twice {
        /// `model` or `server`.
        kind: &'static str,
        /// The name.
        name: String,
        /// The first place.
        first: String,
        /// The second place.
        second: String,
    },
}

fn document_label(document: Option<usize>) -> String {
    document.map_or_else(String::new, |document| format!(" document {document}"))
}

/// Every manifest in `text`, in order. Errors name `file`.
///
/// # Errors
/// The first thing that is wrong. Then nothing of the text is given.
pub fn parse(file: &str, text: &str) -> Result<Vec<Document>, ManifestError> {
    let invalid = |document, problem: Problem| ManifestError::Invalid {
        file: file.to_owned(),
        document,
        line: problem.line,
        problem: problem.message,
    };
    let mut documents = Vec::new();
    for (n, node) in node::documents(text).map_err(|problem| invalid(None, problem))?.into_iter().enumerate() {
        objects(node, file, n + 1, &mut documents).map_err(|problem| invalid(Some(n + 1), problem))?;
    }
    Ok(documents)
}

/// The object that a document is, or the objects in the list that it is.
fn objects(node: Node, file: &str, document: usize, found: &mut Vec<Document>) -> Result<(), Problem> {
    let source = Source { file: file.to_owned(), document, line: node.line };
    let mut object = Fields::of(node, "")
        .map_err(|problem| Problem { message: format!("the document{}", problem.message), ..problem })?;
    let (api_version, api_line) = object.required_text("apiVersion")?;
    let (kind, kind_line) = object.required_text("kind")?;
    if kind == "List" || matches!(kind.as_str(), "ModelList" | "ServerList") {
        object.ignore("metadata");
        let items = object.list("items")?;
        object.finish()?;
        // A list in a list would have no name; what follows refuses it by its kind.
        for item in items {
            if matches!(&item.value, Value::Map(map) if map.iter().any(|(k, v)| is_list(&k.name, &v.value))) {
                return Err(Problem::at(item.line, "items: a list holds models and servers, not lists"));
            }
            objects(item, file, document, found)?;
        }
        return Ok(());
    }
    if api_version != API_VERSION {
        return Err(Problem::at(api_line, format!("apiVersion: {api_version:?} is not known; wanted {API_VERSION}")));
    }
    let mut notes = Vec::new();
    let kind = match kind.as_str() {
        "Model" => Kind::Model(Box::new(model::read(object, &mut notes)?)),
        "Server" => Kind::Server(server::read(object, &mut notes)?),
        other => return Err(Problem::at(kind_line, unsupported(other))),
    };
    found.push(Document { source, kind, notes });
    Ok(())
}

fn is_list(key: &str, value: &Value) -> bool {
    key == "kind" && matches!(value, Value::Text(kind) if kind.ends_with("List"))
}

/// Why a kind is refused, and what to do instead.
fn unsupported(kind: &str) -> String {
    match kind {
        "Pipeline" => {
            "kind: Pipeline is not supported, because it needs Kafka; call the models one after another".into()
        }
        "Experiment" => "kind: Experiment is not supported yet; load the candidates as models of their own".into(),
        "ServerConfig" => "kind: ServerConfig is not supported, because it describes pods; servers are named in \
                           the registry file, or by an agent that calls"
            .into(),
        "SeldonRuntime" | "SeldonConfig" => {
            format!("kind: {kind} is not supported, because it installs Seldon; Wharf's settings are in wharf.toml")
        }
        other => match fields::nearest(other, ["Model", "Server"].into_iter()) {
            Some(nearest) => format!("kind: {other} is not supported; did you mean {nearest}?"),
            None => format!("kind: {other} is not supported; wanted Model or Server"),
        },
    }
}

/// A manifest's `metadata`.
struct Metadata {
    name: String,
    line: u64,
    kubernetes: Option<crate::domain::spec::KubernetesMeta>,
}

/// Reads `metadata`: the name, the namespace and the generation. Whatever else Kubernetes keeps there is
/// taken and left.
fn metadata(object: &mut Fields) -> Result<Metadata, Problem> {
    let line = object.line();
    let mut metadata = object
        .child("metadata")?
        .ok_or_else(|| Problem::at(line, "metadata: it is missing; give the object a name"))?;
    let (name, line) = metadata.required_text("name")?;
    let namespace = metadata.text("namespace")?.map(|(namespace, _)| namespace);
    let generation = metadata.int::<i64>("generation")?;
    let kubernetes = (namespace.is_some() || generation.is_some()).then(|| crate::domain::spec::KubernetesMeta {
        namespace: namespace.unwrap_or_default(),
        generation: generation.unwrap_or_default(),
    });
    Ok(Metadata { name, line, kubernetes })
}

/// What a manifest says of replicas, checked as Seldon's operator checks it.
struct ReplicaCounts {
    replicas: u32,
    min: u32,
    /// No bound when absent.
    max: Option<u32>,
}

/// Reads `replicas`, `minReplicas` and `maxReplicas`: replicas not given are minReplicas, or 1 when those
/// are 0 too.
fn replicas(spec: &mut Fields) -> Result<ReplicaCounts, Problem> {
    let line = spec.line();
    let given = spec.int::<u32>("replicas")?;
    let min = spec.int::<u32>("minReplicas")?.unwrap_or(0);
    let max = spec.int::<u32>("maxReplicas")?;
    let replicas = given.unwrap_or(if min > 0 { min } else { 1 });
    let bad = |message: String| Err(Problem::at(line, message));
    if let Some(max) = max {
        if min > max {
            return bad(format!("{}: {min} is more than maxReplicas {max}", spec.path("minReplicas")));
        }
        if replicas > max {
            return bad(format!("{}: {replicas} is more than maxReplicas {max}", spec.path("replicas")));
        }
    }
    if replicas < min {
        return bad(format!("{}: {replicas} is less than minReplicas {min}", spec.path("replicas")));
    }
    Ok(ReplicaCounts { replicas, min, max })
}

#[cfg(test)]
mod tests;
