//! Seldon's `Model` manifests, with the few fields that Wharf adds.

use std::fmt::Write as _;

use serde::Serialize;

use super::{
    API_VERSION, ReplicaCounts,
    fields::Fields,
    metadata,
    node::{Node, Problem, Value},
    quantity::from_quantity,
    replicas,
};
use crate::{
    domain::{
        memory::Bytes,
        names::{ModelName, ServerName},
        spec::{
            Companion, Definition, DeploymentPatch, ModelSpec, Parameter, Passthrough, Reference, Replicas, Spread,
            Storage, Strategy,
        },
        warmup::Warmup,
    },
    rpc::wire,
};

/// Reads the rest of a document of kind `Model`.
pub(super) fn read(mut object: Fields, notes: &mut Vec<String>) -> Result<Definition, Problem> {
    let metadata = metadata(&mut object)?;
    let name = ModelName::new(&metadata.name)
        .map_err(|error| Problem::at(metadata.line, format!("metadata.name: {error}")))?;
    let line = object.line();
    let mut fields = object.child("spec")?.ok_or_else(|| Problem::at(line, "spec: it is missing"))?;
    object.ignore("status");
    object.finish()?;
    let line = fields.line();
    let spec = spec(&mut fields, notes)?;
    let counts = replicas(&mut fields)?;
    let log_payloads = logger(&mut fields)?;
    let strategy = strategy(&mut fields)?;
    let spread = spread(&mut fields)?;
    let priority = fields.int::<i32>("priority")?;
    let pinned = fields.flag("pinned")?;
    let clean_topics_on_delete = dataflow(&mut fields)?;
    fields.finish()?;
    let ReplicaCounts { replicas, min, max } = counts;
    let replicas = Replicas { replicas, min, max: max.unwrap_or(0), log_payloads };
    let definition = Definition {
        name,
        spec,
        deployment: DeploymentPatch { replicas: Some(replicas), strategy, spread, priority, pinned },
        kubernetes: metadata.kubernetes,
        passthrough: Passthrough { clean_topics_on_delete, ..Passthrough::default() },
    };
    // What the scheduler would refuse is refused here, with a line.
    let (model, rollout) = wire::definition_to_wire(&definition);
    wire::definition_from_wire(Some(model), rollout).map_err(|refusal| Problem::at(line, refusal.message))?;
    if strategy.is_some() {
        let probe = DeploymentPatch { strategy, ..DeploymentPatch::default() };
        probe.over(&Default::default()).map_err(|error| Problem::at(line, format!("spec.{error}")))?;
    }
    Ok(definition)
}

fn spec(fields: &mut Fields, notes: &mut Vec<String>) -> Result<ModelSpec, Problem> {
    let (uri, uri_line) = fields.required_text("storageUri")?;
    wire::check_uri("spec.storageUri", &uri).map_err(|problem| Problem::at(uri_line, problem))?;
    let artifact_version = fields.int::<u32>("artifactVersion")?;
    let storage = fields.text("secretName")?.map(|(secret, _)| secret).filter(|secret| !secret.is_empty());
    let mut requirements = fields.texts("requirements")?;
    // Seldon's operator treats the type as one more requirement, the last.
    requirements.extend(fields.text("modelType")?.map(|(kind, _)| kind).filter(|kind| !kind.is_empty()));
    let memory = memory(fields)?;
    let server = match fields.text("server")? {
        Some((name, line)) if !name.is_empty() => {
            Some(ServerName::new(&name).map_err(|error| Problem::at(line, format!("spec.server: {error}")))?)
        }
        _ => None,
    };
    let companion = companion(fields)?;
    let parameters = parameters(fields)?;
    let warmup = warmup(fields)?;
    if fields.ignore("schemaUri") {
        notes.push("spec.schemaUri has no effect".to_owned());
    }
    for name in ["preloaded", "dedicated"] {
        if fields.flag(name)? == Some(true) {
            notes.push(format!("spec.{name} has no effect"));
        }
    }
    Ok(ModelSpec {
        uri,
        artifact_version,
        storage: storage.map(Storage::SecretName),
        requirements,
        memory,
        server,
        companion,
        parameters,
        runtime: None,
        warmup,
    })
}

/// The warm-up request: a word, or a list of inputs.
fn warmup(fields: &mut Fields) -> Result<Warmup, Problem> {
    let Some(Node { line, value }) = fields.take("warmup") else { return Ok(Warmup::None) };
    let text = match value {
        Value::Text(text) => text,
        other => other.into_json().to_string(),
    };
    Warmup::parse(&text).map_err(|problem| Problem::at(line, format!("spec.warmup: {problem}")))
}

/// Declared memory; 0 declares nothing.
fn memory(fields: &mut Fields) -> Result<Option<Bytes>, Problem> {
    let Some(Node { line, value }) = fields.take("memory") else { return Ok(None) };
    let quantity = match value {
        Value::Text(text) => text,
        Value::Int(number) => number.to_string(),
        // Rust writes the shortest digits that mean the same number, without an exponent.
        Value::Float(number) => number.to_string(),
        other => {
            let what = other.what();
            return Err(Problem::at(
                line,
                format!("spec.memory: it is {what}, wanted a quantity such as 100Ki or 1.5Gi"),
            ));
        }
    };
    let bytes = from_quantity(&quantity).map_err(|problem| Problem::at(line, format!("spec.memory: {problem}")))?;
    Ok((bytes != Bytes::ZERO).then_some(bytes))
}

fn companion(fields: &mut Fields) -> Result<Option<Companion>, Problem> {
    let explainer = fields.child("explainer")?;
    let llm = fields.child("llm")?;
    match (explainer, llm) {
        (None, None) => Ok(None),
        (Some(mut explainer), None) => {
            let kind = explainer.text("type")?.map(|(kind, _)| kind).unwrap_or_default();
            let of = reference(explainer)?;
            Ok(Some(Companion::Explainer { kind, of }))
        }
        (None, Some(llm)) => Ok(Some(Companion::Llm { of: reference(llm)? })),
        (Some(_), Some(llm)) => Err(Problem::at(llm.line(), "spec.llm: explainer and llm are both set; leave one out")),
    }
}

/// The one thing that an explainer or a language model stands on.
fn reference(mut fields: Fields) -> Result<Reference, Problem> {
    let line = fields.line();
    let mut given = |name| Ok(fields.text(name)?.map(|(name, _)| name).filter(|name| !name.is_empty()));
    let (model, pipeline) = (given("modelRef")?, given("pipelineRef")?);
    let path = fields.path("modelRef");
    fields.finish()?;
    match (model, pipeline) {
        (Some(model), None) => Ok(Reference::Model(model)),
        (None, Some(pipeline)) => Ok(Reference::Pipeline(pipeline)),
        (None, None) => Err(Problem::at(line, format!("{path}: it refers to nothing; set modelRef or pipelineRef"))),
        (Some(_), Some(_)) => Err(Problem::at(line, format!("{path}: pipelineRef is set too; leave one out"))),
    }
}

fn parameters(fields: &mut Fields) -> Result<Vec<Parameter>, Problem> {
    let items = fields.list("parameters")?.into_iter().enumerate();
    items
        .map(|(n, node)| {
            let mut item = Fields::of(node, &format!("spec.parameters[{n}]"))?;
            let (name, _) = item.required_text("name")?;
            let (value, _) = item.required_text("value")?;
            item.finish()?;
            Ok(Parameter { name, value })
        })
        .collect()
}

/// Whether payloads are logged: whenever there is a logger; its percent means nothing, as in Seldon.
fn logger(fields: &mut Fields) -> Result<bool, Problem> {
    let Some(node) = fields.take("logger") else { return Ok(false) };
    let mut logger = Fields::of(node, "spec.logger")?;
    logger.int::<u32>("percent")?;
    logger.finish()?;
    Ok(true)
}

fn dataflow(fields: &mut Fields) -> Result<Option<bool>, Problem> {
    let Some(mut dataflow) = fields.child("dataflow")? else { return Ok(None) };
    let clean = dataflow.flag("cleanTopicsOnDelete")?;
    dataflow.finish()?;
    Ok(Some(clean.unwrap_or(false)))
}

fn strategy(fields: &mut Fields) -> Result<Option<Strategy>, Problem> {
    let line = fields.line();
    let max_surge = fields.int::<u32>("maxSurge")?;
    let max_unavailable = fields.int::<u32>("maxUnavailable")?;
    let bounded = max_surge.is_some() || max_unavailable.is_some();
    match fields.text("strategy")? {
        None if !bounded => Ok(None),
        None => Ok(Some(wire::rolling_update(max_surge, max_unavailable))),
        Some((name, _)) if name == "rollingUpdate" => Ok(Some(wire::rolling_update(max_surge, max_unavailable))),
        Some((name, _)) if name == "recreate" && !bounded => Ok(Some(Strategy::Recreate)),
        Some((name, _)) if name == "recreate" => Err(Problem::at(
            line,
            "spec.maxSurge: maxSurge and maxUnavailable mean nothing with strategy: recreate; leave them out",
        )),
        Some((other, line)) => {
            Err(Problem::at(line, format!("spec.strategy: {other:?} is none; wanted rollingUpdate or recreate")))
        }
    }
}

fn spread(fields: &mut Fields) -> Result<Option<Spread>, Problem> {
    match fields.text("spread")? {
        None => Ok(None),
        Some((name, _)) if name == "servers" => Ok(Some(Spread::Servers)),
        Some((name, _)) if name == "oneServer" => Ok(Some(Spread::OneServer)),
        Some((other, line)) => {
            Err(Problem::at(line, format!("spec.spread: {other:?} is none; wanted servers or oneServer")))
        }
    }
}

/// The manifest that would submit `definition`. What a manifest has no word for is told in a comment.
#[must_use]
pub fn to_yaml(definition: &Definition) -> String {
    let spec = &definition.spec;
    let secret = match &spec.storage {
        Some(Storage::SecretName(name)) => Some(name.as_str()),
        Some(Storage::RcloneConfig(_)) | None => None,
    };
    let (explainer, llm) = match &spec.companion {
        None => (None, None),
        Some(Companion::Explainer { kind, of }) => (Some(ReferenceYaml::of(Some(kind), of)), None),
        Some(Companion::Llm { of }) => (None, Some(ReferenceYaml::of(None, of))),
    };
    let (strategy, max_surge, max_unavailable) = match definition.deployment.strategy {
        None => (None, None, None),
        Some(Strategy::Recreate) => (Some("recreate"), None, None),
        Some(Strategy::RollingUpdate { max_surge, max_unavailable }) => {
            (Some("rollingUpdate"), Some(max_surge), Some(max_unavailable))
        }
    };
    let replicas = definition.deployment.replicas;
    let nonzero = |value: u32| (value != 0).then_some(value);
    let yaml = ModelYaml {
        api_version: API_VERSION,
        kind: "Model",
        metadata: MetadataYaml {
            name: definition.name.as_str(),
            namespace: definition.kubernetes.as_ref().map(|k| k.namespace.as_str()).filter(|n| !n.is_empty()),
            generation: definition.kubernetes.as_ref().map(|k| k.generation).filter(|n| *n != 0),
        },
        spec: SpecYaml {
            storage_uri: &spec.uri,
            artifact_version: spec.artifact_version,
            secret_name: secret,
            requirements: &spec.requirements,
            memory: spec.memory.map(|bytes| bytes.0),
            server: spec.server.as_ref().map(ServerName::as_str),
            explainer,
            llm,
            parameters: spec.parameters.iter().map(|p| ParameterYaml { name: &p.name, value: &p.value }).collect(),
            replicas: replicas.map(|r| r.replicas),
            min_replicas: replicas.and_then(|r| nonzero(r.min)),
            max_replicas: replicas.and_then(|r| nonzero(r.max)),
            logger: replicas.filter(|r| r.log_payloads).map(|_| LoggerYaml { percent: 100 }),
            dataflow: definition
                .passthrough
                .clean_topics_on_delete
                .map(|clean_topics_on_delete| DataflowYaml { clean_topics_on_delete }),
            strategy,
            max_surge,
            max_unavailable,
            spread: definition.deployment.spread.map(|spread| match spread {
                Spread::Servers => "servers",
                Spread::OneServer => "oneServer",
            }),
            priority: definition.deployment.priority,
            pinned: definition.deployment.pinned,
            warmup: spec.warmup.text().map(|text| serde_json::from_str(text).unwrap_or_else(|_| text.into())),
        },
    };
    let mut text = String::new();
    if matches!(spec.storage, Some(Storage::RcloneConfig(_))) {
        text.push_str("# The inline rclone configuration is left out: a manifest has no field for it.\n");
    }
    let options = serde_saphyr::ser_options! { min_fold_chars: usize::MAX };
    // Strings, numbers and maps of them always serialise; a failure would be told where YAML is wanted.
    match serde_saphyr::to_string_with_options(&yaml, options) {
        Ok(yaml) => text.push_str(&yaml),
        Err(error) => drop(writeln!(text, "# not expressible: {error}")),
    }
    text
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ModelYaml<'a> {
    api_version: &'a str,
    kind: &'a str,
    metadata: MetadataYaml<'a>,
    spec: SpecYaml<'a>,
}

#[derive(Serialize)]
struct MetadataYaml<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<i64>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SpecYaml<'a> {
    storage_uri: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    artifact_version: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    secret_name: Option<&'a str>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    requirements: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    explainer: Option<ReferenceYaml<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    llm: Option<ReferenceYaml<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    parameters: Vec<ParameterYaml<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replicas: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_replicas: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_replicas: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logger: Option<LoggerYaml>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dataflow: Option<DataflowYaml>,
    #[serde(skip_serializing_if = "Option::is_none")]
    strategy: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_surge: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_unavailable: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    spread: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pinned: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    warmup: Option<serde_json::Value>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ReferenceYaml<'a> {
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    model_ref: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pipeline_ref: Option<&'a str>,
}

impl<'a> ReferenceYaml<'a> {
    fn of(kind: Option<&'a String>, of: &'a Reference) -> Self {
        let (model_ref, pipeline_ref) = match of {
            Reference::Model(name) => (Some(name.as_str()), None),
            Reference::Pipeline(name) => (None, Some(name.as_str())),
        };
        Self { kind: kind.map(String::as_str), model_ref, pipeline_ref }
    }
}

#[derive(Serialize)]
struct ParameterYaml<'a> {
    name: &'a str,
    value: &'a str,
}

#[derive(Serialize)]
struct LoggerYaml {
    percent: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct DataflowYaml {
    clean_topics_on_delete: bool,
}
