//! Models between the wire and the domain, in one place.
//!
//! The rule of this module: whatever comes is either a value of the domain or a [`Refusal`] that names the
//! field, and nothing that comes can crash, escape a folder or grow without bound. Refusals are
//! `FailedPrecondition`, because Seldon's operator takes only that code as final.

pub mod limits;

use std::time::Duration;

use crate::{
    domain::{
        error::{Code, Refusal},
        memory::Bytes,
        names::{ModelName, ServerName},
        spec::{
            Companion, Definition, Deployment, DeploymentPatch, KubernetesMeta, ModelSpec, Parameter, Passthrough,
            Reference, Replicas, RuntimeInfo, Spread, Storage, Strategy,
        },
        time::Instant,
        warmup::Warmup,
    },
    rpc::proto::{scheduler, wharf},
};

/// The spec of a version, as Seldon's API says it.
#[must_use]
pub fn model_spec_to_wire(spec: &ModelSpec) -> scheduler::ModelSpec {
    use scheduler::{model_runtime_info::ModelRuntimeInfo as Runtime, model_spec, storage_config::Config};
    let split = |of: &Reference| match of {
        Reference::Model(name) => (Some(name.clone()), None),
        Reference::Pipeline(name) => (None, Some(name.clone())),
    };
    scheduler::ModelSpec {
        uri: spec.uri.clone(),
        artifact_version: spec.artifact_version,
        storage_config: spec.storage.as_ref().map(|storage| scheduler::StorageConfig {
            config: Some(match storage {
                Storage::SecretName(name) => Config::StorageSecretName(name.clone()),
                Storage::RcloneConfig(config) => Config::StorageRcloneConfig(config.clone()),
            }),
        }),
        requirements: spec.requirements.clone(),
        memory_bytes: spec.memory.map(|bytes| bytes.0),
        server: spec.server.as_ref().map(ToString::to_string),
        model_spec: spec.companion.as_ref().map(|companion| match companion {
            Companion::Explainer { kind, of } => {
                let (model_ref, pipeline_ref) = split(of);
                let r#type = kind.clone();
                model_spec::ModelSpec::Explainer(scheduler::ExplainerSpec { r#type, model_ref, pipeline_ref })
            }
            Companion::Llm { of } => {
                let (model_ref, pipeline_ref) = split(of);
                model_spec::ModelSpec::Llm(scheduler::LlmSpec { model_ref, pipeline_ref })
            }
        }),
        parameters: spec
            .parameters
            .iter()
            .map(|p| scheduler::ParameterSpec { name: p.name.clone(), value: p.value.clone() })
            .collect(),
        model_runtime_info: spec.runtime.as_ref().map(|runtime| scheduler::ModelRuntimeInfo {
            model_runtime_info: Some(match runtime {
                RuntimeInfo::MlServer { parallel_workers } => {
                    Runtime::Mlserver(scheduler::MlServerModelSettings { parallel_workers: *parallel_workers })
                }
                RuntimeInfo::Triton { cpu } => Runtime::Triton(scheduler::TritonModelConfig {
                    cpu: cpu.iter().map(|&instance_count| scheduler::TritonCpu { instance_count }).collect(),
                }),
            }),
        }),
        warmup: spec.warmup.text().map(str::to_owned),
    }
}

/// The spec that a message of Seldon's API means. A declared memory of 0 says nothing, as a missing one does.
///
/// # Errors
/// Names the field that can't be, or that is over one of the [`limits`].
pub fn model_spec_from_wire(wire: scheduler::ModelSpec) -> Result<ModelSpec, Refusal> {
    check_uri("modelSpec.uri", &wire.uri).map_err(refused)?;
    if wire.requirements.len() > limits::REQUIREMENTS {
        return Err(too_many("modelSpec.requirements", wire.requirements.len(), limits::REQUIREMENTS));
    }
    for requirement in &wire.requirements {
        text("modelSpec.requirements", requirement, limits::TEXT)?;
    }
    Ok(ModelSpec {
        uri: wire.uri,
        artifact_version: wire.artifact_version,
        storage: storage(wire.storage_config)?,
        requirements: wire.requirements,
        memory: wire.memory_bytes.filter(|bytes| *bytes != 0).map(Bytes),
        server: match wire.server.as_deref() {
            None | Some("") => None,
            Some(name) => Some(ServerName::new(name)?),
        },
        companion: wire.model_spec.map(companion).transpose()?,
        parameters: parameters(wire.parameters)?,
        runtime: runtime(wire.model_runtime_info)?,
        warmup: Warmup::parse(wire.warmup.as_deref().unwrap_or_default())
            .map_err(|problem| refused(format!("modelSpec.warmup: {problem}")))?,
    })
}

/// A whole submission: Seldon's `Model`, and what Wharf's API says beyond it.
///
/// # Errors
/// Names the message that is absent, or the field that can't be.
pub fn definition_from_wire(
    model: Option<scheduler::Model>,
    rollout: Option<wharf::Rollout>,
) -> Result<Definition, Refusal> {
    let model = model.ok_or_else(|| absent("model"))?;
    let meta = model.meta.ok_or_else(|| absent("model.meta"))?;
    let spec = model.model_spec.ok_or_else(|| absent("model.modelSpec"))?;
    let name = ModelName::new(&meta.name)?;
    for (field, value) in [("model.meta.kind", &meta.kind), ("model.meta.version", &meta.version)] {
        short(field, value.as_deref())?;
    }
    let kubernetes = meta.kubernetes_meta.map(kubernetes_from_wire).transpose()?;
    let replicas = model.deployment_spec.map(replicas_from_wire).transpose()?;
    let stream = match model.stream_spec {
        None => None,
        Some(stream) => {
            short("model.streamSpec.inputTopic", Some(&stream.input_topic))?;
            short("model.streamSpec.outputTopic", Some(&stream.output_topic))?;
            Some((stream.input_topic, stream.output_topic))
        }
    };
    let patch = rollout.as_ref().map(rollout_from_wire).transpose()?.unwrap_or_default();
    Ok(Definition {
        name,
        spec: model_spec_from_wire(spec)?,
        deployment: DeploymentPatch { replicas, ..patch },
        kubernetes,
        passthrough: Passthrough {
            kind: meta.kind,
            version: meta.version,
            stream,
            clean_topics_on_delete: model.dataflow_spec.map(|dataflow| dataflow.clean_topics_on_delete),
        },
    })
}

/// A whole submission as the wire says it; the rollout is absent when it would say nothing.
#[must_use]
pub fn definition_to_wire(definition: &Definition) -> (scheduler::Model, Option<wharf::Rollout>) {
    let Definition { name, spec, deployment, kubernetes, passthrough } = definition;
    let model = model_to_wire(name, spec, deployment.replicas, kubernetes.as_ref(), passthrough);
    let says_more = DeploymentPatch { replicas: None, ..*deployment } != DeploymentPatch::default();
    (model, says_more.then(|| rollout_to_wire(deployment)))
}

/// Seldon's `Model`, from its parts.
#[must_use]
pub fn model_to_wire(
    name: &ModelName,
    spec: &ModelSpec,
    replicas: Option<Replicas>,
    kubernetes: Option<&KubernetesMeta>,
    passthrough: &Passthrough,
) -> scheduler::Model {
    scheduler::Model {
        meta: Some(scheduler::MetaData {
            name: name.to_string(),
            kind: passthrough.kind.clone(),
            version: passthrough.version.clone(),
            kubernetes_meta: kubernetes.map(kubernetes_to_wire),
        }),
        model_spec: Some(model_spec_to_wire(spec)),
        deployment_spec: replicas.map(|replicas| scheduler::DeploymentSpec {
            replicas: replicas.replicas,
            min_replicas: replicas.min,
            max_replicas: replicas.max,
            log_payloads: replicas.log_payloads,
        }),
        stream_spec: passthrough
            .stream
            .as_ref()
            .map(|(input, output)| scheduler::StreamSpec { input_topic: input.clone(), output_topic: output.clone() }),
        dataflow_spec: passthrough
            .clean_topics_on_delete
            .map(|clean_topics_on_delete| scheduler::DataflowSpec { clean_topics_on_delete }),
    }
}

/// Seldon's part of a deployment.
#[must_use]
pub const fn replicas_of(deployment: &Deployment) -> Replicas {
    Replicas {
        replicas: deployment.replicas,
        min: deployment.min_replicas,
        max: deployment.max_replicas,
        log_payloads: deployment.log_payloads,
    }
}

/// Wharf's part of a deployment, whole.
#[must_use]
pub fn rollout_of(deployment: &Deployment) -> wharf::Rollout {
    rollout_to_wire(&DeploymentPatch {
        replicas: None,
        strategy: Some(deployment.strategy),
        spread: Some(deployment.spread),
        priority: Some(deployment.priority),
        pinned: Some(deployment.pinned),
    })
}

/// Wharf's part of a patch, as much as it says; its replicas have no word there.
#[must_use]
pub fn rollout_to_wire(patch: &DeploymentPatch) -> wharf::Rollout {
    use wharf::rollout::Strategy as Wire;
    let (strategy, max_surge, max_unavailable) = match patch.strategy {
        None => (None, None, None),
        Some(Strategy::Recreate) => (Some(Wire::Recreate.into()), None, None),
        Some(Strategy::RollingUpdate { max_surge, max_unavailable }) => {
            (Some(Wire::RollingUpdate.into()), Some(max_surge), Some(max_unavailable))
        }
    };
    let spread_servers = patch.spread.map(|spread| spread == Spread::Servers);
    let DeploymentPatch { priority, pinned, .. } = *patch;
    wharf::Rollout { strategy, max_surge, max_unavailable, spread_servers, priority, pinned }
}

/// The patch that `rollout` means, which leaves replicas alone. A surge without a strategy means a rolling update, and
/// a bound that is left out of one is the default.
///
/// # Errors
/// When the strategy is none that is known, or is recreate beside a surge.
pub fn rollout_from_wire(rollout: &wharf::Rollout) -> Result<DeploymentPatch, Refusal> {
    use wharf::rollout::Strategy as Wire;
    let bounded = rollout.max_surge.is_some() || rollout.max_unavailable.is_some();
    let named = match rollout.strategy.map(Wire::try_from) {
        None => bounded.then_some(Wire::RollingUpdate),
        Some(Ok(strategy)) => Some(strategy),
        Some(Err(unknown)) => {
            return Err(refused(format!(
                "rollout.strategy: {unknown}; the strategies are 0, rolling update, and 1, recreate"
            )));
        }
    };
    let strategy = match named {
        None => None,
        Some(Wire::Recreate) if bounded => {
            return Err(refused(
                "rollout.maxSurge: maxSurge and maxUnavailable mean nothing with strategy recreate; leave them out"
                    .to_owned(),
            ));
        }
        Some(Wire::Recreate) => Some(Strategy::Recreate),
        Some(Wire::RollingUpdate) => Some(rolling_update(rollout.max_surge, rollout.max_unavailable)),
    };
    let spread = rollout.spread_servers.map(|servers| if servers { Spread::Servers } else { Spread::OneServer });
    Ok(DeploymentPatch { replicas: None, strategy, spread, priority: rollout.priority, pinned: rollout.pinned })
}

/// A rolling update with the default for what is left out.
#[must_use]
pub fn rolling_update(max_surge: Option<u32>, max_unavailable: Option<u32>) -> Strategy {
    match Strategy::default() {
        Strategy::RollingUpdate { max_surge: surge, max_unavailable: unavailable } => Strategy::RollingUpdate {
            max_surge: max_surge.unwrap_or(surge),
            max_unavailable: max_unavailable.unwrap_or(unavailable),
        },
        Strategy::Recreate => Strategy::Recreate,
    }
}

/// What Kubernetes knows a model by, as the wire says it.
#[must_use]
pub fn kubernetes_to_wire(meta: &KubernetesMeta) -> scheduler::KubernetesMeta {
    scheduler::KubernetesMeta { namespace: meta.namespace.clone(), generation: meta.generation }
}

/// What Kubernetes knows a model by.
///
/// # Errors
/// When the namespace is no short text.
pub fn kubernetes_from_wire(wire: scheduler::KubernetesMeta) -> Result<KubernetesMeta, Refusal> {
    short("kubernetesMeta.namespace", Some(&wire.namespace))?;
    Ok(KubernetesMeta { namespace: wire.namespace, generation: wire.generation })
}

/// A moment as protobuf says it.
#[must_use]
pub fn timestamp(instant: Instant) -> prost_types::Timestamp {
    const MICROS: u64 = 1_000_000;
    let micros = instant.as_micros();
    prost_types::Timestamp {
        seconds: i64::try_from(micros / MICROS).unwrap_or(i64::MAX),
        nanos: i32::try_from(micros % MICROS * 1000).unwrap_or(0),
    }
}

/// The moment that protobuf means, cut to whole microseconds; none before 1970.
#[must_use]
pub fn instant(timestamp: prost_types::Timestamp) -> Option<Instant> {
    let seconds = u64::try_from(timestamp.seconds).ok()?;
    let nanos = u32::try_from(timestamp.nanos).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    Some(Instant::default() + Duration::new(seconds, nanos))
}

/// Checks where an artifact is said to be: not empty, no control characters, no step up a folder, also not
/// when percent-encoded.
///
/// # Errors
/// One sentence that begins with `field`.
pub fn check_uri(field: &str, uri: &str) -> Result<(), String> {
    if uri.is_empty() {
        return Err(format!("{field}: it is empty; say where the artifact is"));
    }
    if uri.len() > limits::URI {
        return Err(format!("{field}: {} bytes are more than the {} allowed", uri.len(), limits::URI));
    }
    let decoded = percent_decoded(uri);
    if uri.chars().any(char::is_control) || decoded.iter().any(u8::is_ascii_control) {
        return Err(format!("{field}: {:?} holds control characters; remove them", clip(uri)));
    }
    let up = |segment: &[u8]| segment == b"..";
    if decoded.split(|byte| matches!(byte, b'/' | b'\\' | b'?' | b'#' | b':')).any(up) {
        return Err(format!("{field}: {:?} steps out of its folder with '..'; write the path without it", clip(uri)));
    }
    Ok(())
}

fn storage(wire: Option<scheduler::StorageConfig>) -> Result<Option<Storage>, Refusal> {
    use scheduler::storage_config::Config;
    match wire.and_then(|storage| storage.config) {
        None => Ok(None),
        Some(Config::StorageSecretName(name)) => {
            text("modelSpec.storageConfig.storageSecretName", &name, limits::TEXT)?;
            Ok(Some(Storage::SecretName(name)))
        }
        Some(Config::StorageRcloneConfig(config)) if config.len() > limits::RCLONE_CONFIG => {
            Err(too_long("modelSpec.storageConfig.storageRcloneConfig", config.len(), limits::RCLONE_CONFIG))
        }
        Some(Config::StorageRcloneConfig(config)) => Ok(Some(Storage::RcloneConfig(config))),
    }
}

fn companion(wire: scheduler::model_spec::ModelSpec) -> Result<Companion, Refusal> {
    use scheduler::model_spec::ModelSpec as Wire;
    match wire {
        Wire::Explainer(scheduler::ExplainerSpec { r#type, model_ref, pipeline_ref }) => {
            short("modelSpec.explainer.type", Some(&r#type))?;
            let of = reference("modelSpec.explainer", model_ref, pipeline_ref)?;
            Ok(Companion::Explainer { kind: r#type, of })
        }
        Wire::Llm(scheduler::LlmSpec { model_ref, pipeline_ref }) => {
            Ok(Companion::Llm { of: reference("modelSpec.llm", model_ref, pipeline_ref)? })
        }
    }
}

fn reference(field: &str, model: Option<String>, pipeline: Option<String>) -> Result<Reference, Refusal> {
    let given = |name: Option<String>| name.filter(|name| !name.is_empty());
    let reference = match (given(model), given(pipeline)) {
        (Some(model), None) => Reference::Model(model),
        (None, Some(pipeline)) => Reference::Pipeline(pipeline),
        (None, None) => {
            return Err(refused(format!("{field}: it refers to nothing; set modelRef or pipelineRef")));
        }
        (Some(_), Some(_)) => {
            return Err(refused(format!("{field}: modelRef and pipelineRef are both set; leave one out")));
        }
    };
    let (Reference::Model(name) | Reference::Pipeline(name)) = &reference;
    text(field, name, limits::TEXT)?;
    Ok(reference)
}

fn parameters(wire: Vec<scheduler::ParameterSpec>) -> Result<Vec<Parameter>, Refusal> {
    const FIELD: &str = "modelSpec.parameters";
    if wire.len() > limits::PARAMETERS {
        return Err(too_many(FIELD, wire.len(), limits::PARAMETERS));
    }
    let bytes: usize = wire.iter().map(|parameter| parameter.name.len() + parameter.value.len()).sum();
    if bytes > limits::PARAMETER_BYTES {
        return Err(too_long(FIELD, bytes, limits::PARAMETER_BYTES));
    }
    wire.into_iter()
        .map(|parameter| {
            text(FIELD, &parameter.name, limits::TEXT)?;
            Ok(Parameter { name: parameter.name, value: parameter.value })
        })
        .collect()
}

fn runtime(wire: Option<scheduler::ModelRuntimeInfo>) -> Result<Option<RuntimeInfo>, Refusal> {
    use scheduler::model_runtime_info::ModelRuntimeInfo as Wire;
    match wire.and_then(|info| info.model_runtime_info) {
        None => Ok(None),
        Some(Wire::Mlserver(settings)) => {
            Ok(Some(RuntimeInfo::MlServer { parallel_workers: settings.parallel_workers }))
        }
        Some(Wire::Triton(config)) if config.cpu.len() > limits::INSTANCE_GROUPS => {
            Err(too_many("modelSpec.modelRuntimeInfo.triton.cpu", config.cpu.len(), limits::INSTANCE_GROUPS))
        }
        Some(Wire::Triton(config)) => {
            Ok(Some(RuntimeInfo::Triton { cpu: config.cpu.into_iter().map(|group| group.instance_count).collect() }))
        }
    }
}

fn replicas_from_wire(wire: scheduler::DeploymentSpec) -> Result<Replicas, Refusal> {
    if wire.replicas > limits::REPLICAS {
        return Err(refused(format!(
            "deploymentSpec.replicas: {} is more than the {} that one model may have",
            wire.replicas,
            limits::REPLICAS
        )));
    }
    Ok(Replicas {
        replicas: wire.replicas,
        min: wire.min_replicas,
        max: wire.max_replicas,
        log_payloads: wire.log_payloads,
    })
}

/// A text that may be absent or empty.
fn short(field: &str, value: Option<&str>) -> Result<(), Refusal> {
    value.filter(|value| !value.is_empty()).map_or(Ok(()), |value| text(field, value, limits::TEXT))
}

/// A text that must say something.
fn text(field: &str, value: &str, most: usize) -> Result<(), Refusal> {
    if value.is_empty() {
        return Err(refused(format!("{field}: an empty text says nothing; fill it in or leave it out")));
    }
    if value.len() > most {
        return Err(too_long(field, value.len(), most));
    }
    if value.chars().any(char::is_control) {
        return Err(refused(format!("{field}: {:?} holds control characters; remove them", clip(value))));
    }
    Ok(())
}

/// `%2e` and its like read as what they stand for; anything else as it is.
fn percent_decoded(uri: &str) -> Vec<u8> {
    let bytes = uri.as_bytes();
    let hex = |at: usize| bytes.get(at).and_then(|byte| char::from(*byte).to_digit(16));
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        match (byte, hex(at + 1), hex(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                decoded.push(u8::try_from(high * 16 + low).unwrap_or(b'%'));
                at += 3;
            }
            _ => {
                decoded.push(byte);
                at += 1;
            }
        }
    }
    decoded
}

/// As much of a text as an error message can bear.
fn clip(text: &str) -> &str {
    const SHOWN: usize = 80;
    text.char_indices().nth(SHOWN).map_or(text, |(end, _)| &text[..end])
}

fn absent(what: &str) -> Refusal {
    refused(format!("{what}: the message is absent; send it"))
}

fn too_many(field: &str, count: usize, most: usize) -> Refusal {
    refused(format!("{field}: {count} are more than the {most} allowed"))
}

fn too_long(field: &str, bytes: usize, most: usize) -> Refusal {
    refused(format!("{field}: {bytes} bytes are more than the {most} allowed"))
}

fn refused(message: String) -> Refusal {
    Refusal::new(Code::FailedPrecondition, message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Just, Strategy as Generate, any, prop_assert_eq, prop_compose, prop_oneof, proptest};

    use super::*;

    fn short_text() -> impl Generate<Value = String> {
        "[a-zA-Z0-9_./:-]{1,20}"
    }
    fn reference() -> impl Generate<Value = Reference> {
        prop_oneof![short_text().prop_map(Reference::Model), short_text().prop_map(Reference::Pipeline)]
    }

    prop_compose! {
        fn model_spec()(
            uri in "(gs|s3|http)://[a-z0-9.]{0,3}[a-z]/[a-z0-9_/-]{1,30}",
            artifact_version in any::<Option<u32>>(),
            storage in proptest::option::of(prop_oneof![
                short_text().prop_map(Storage::SecretName),
                "[^\\x00]{0,40}".prop_map(Storage::RcloneConfig),
            ]),
            requirements in proptest::collection::vec(short_text(), 0..5),
            memory in proptest::option::of((1..=u64::MAX).prop_map(Bytes)),
            server in proptest::option::of("[a-z0-9]{1,8}".prop_map(|name| ServerName::new(&name).unwrap())),
            companion in proptest::option::of(prop_oneof![
                (short_text(), reference()).prop_map(|(kind, of)| Companion::Explainer { kind, of }),
                reference().prop_map(|of| Companion::Llm { of }),
            ]),
            parameters in proptest::collection::vec(
                (short_text(), ".{0,30}").prop_map(|(name, value)| Parameter { name, value }), 0..4),
            runtime in proptest::option::of(prop_oneof![
                any::<u32>().prop_map(|parallel_workers| RuntimeInfo::MlServer { parallel_workers }),
                proptest::collection::vec(any::<u32>(), 0..4).prop_map(|cpu| RuntimeInfo::Triton { cpu }),
            ]),
            warmup in prop_oneof![
                Just(Warmup::None),
                Just(Warmup::Auto),
                Just(Warmup::parse(r#"[{"name":"x","datatype":"FP32","shape":[1],"data":[0]}]"#).unwrap()),
            ],
        ) -> ModelSpec {
            ModelSpec {
                uri, artifact_version, storage, requirements, memory, server, companion, parameters, runtime, warmup,
            }
        }
    }

    fn strategy() -> impl Generate<Value = Strategy> {
        prop_oneof![
            Just(Strategy::Recreate),
            (any::<u32>(), any::<u32>())
                .prop_map(|(max_surge, max_unavailable)| Strategy::RollingUpdate { max_surge, max_unavailable }),
        ]
    }

    prop_compose! {
        fn definition()(
            name in "[a-z0-9]{1,20}",
            spec in model_spec(),
            replicas in proptest::option::of((0..=limits::REPLICAS, any::<u32>(), any::<u32>(), any::<bool>())),
            strategy in proptest::option::of(strategy()),
            spread in proptest::option::of(prop_oneof![Just(Spread::Servers), Just(Spread::OneServer)]),
            (priority, pinned) in any::<(Option<i32>, Option<bool>)>(),
            kubernetes in proptest::option::of(("[a-z]{0,8}", any::<i64>())),
            kind in proptest::option::of(short_text()),
            version in proptest::option::of(short_text()),
            stream in proptest::option::of((short_text(), short_text())),
            clean_topics_on_delete in any::<Option<bool>>(),
        ) -> Definition {
            Definition {
                name: ModelName::new(&name).unwrap(),
                spec,
                deployment: DeploymentPatch {
                    replicas: replicas
                        .map(|(replicas, min, max, log_payloads)| Replicas { replicas, min, max, log_payloads }),
                    strategy,
                    spread,
                    priority,
                    pinned,
                },
                kubernetes: kubernetes.map(|(namespace, generation)| KubernetesMeta { namespace, generation }),
                passthrough: Passthrough { kind, version, stream, clean_topics_on_delete },
            }
        }
    }

    proptest! {
        #[test]
        fn what_goes_out_comes_back(definition in definition()) {
            let (model, rollout) = definition_to_wire(&definition);
            prop_assert_eq!(definition_from_wire(Some(model), rollout), Ok(definition));
        }

        #[test]
        fn no_bytes_crash_it(bytes in proptest::collection::vec(any::<u8>(), 0..200), rollout in any::<bool>()) {
            use prost::Message as _;
            if let Ok(model) = scheduler::Model::decode(&bytes[..]) {
                let rollout = rollout.then(|| wharf::Rollout::decode(&bytes[..]).unwrap_or_default());
                drop(definition_from_wire(Some(model), rollout));
            }
        }

        #[test]
        fn instants_come_back(micros in 0_u64..253_402_300_799_000_000) {
            prop_assert_eq!(instant(timestamp(Instant::from_micros(micros))), Some(Instant::from_micros(micros)));
        }
    }

    fn iris() -> scheduler::Model {
        scheduler::Model {
            meta: Some(scheduler::MetaData { name: "iris".into(), ..Default::default() }),
            model_spec: Some(scheduler::ModelSpec { uri: "gs://bucket/iris".into(), ..Default::default() }),
            ..Default::default()
        }
    }

    fn refusal(edit: impl FnOnce(&mut scheduler::Model)) -> String {
        let mut model = iris();
        edit(&mut model);
        let refusal = definition_from_wire(Some(model), None).expect_err("refused");
        assert_eq!(refusal.code, Code::FailedPrecondition, "{refusal}");
        refusal.message
    }

    #[test]
    fn absent_messages_are_refused_by_name() {
        assert!(definition_from_wire(None, None).unwrap_err().message.starts_with("model:"));
        assert!(refusal(|model| model.meta = None).starts_with("model.meta:"));
        assert!(refusal(|model| model.model_spec = None).starts_with("model.modelSpec:"));
    }

    #[test]
    fn an_absent_deployment_spec_speaks_of_nothing() {
        let definition = definition_from_wire(Some(iris()), None).unwrap();
        assert_eq!(definition.deployment, DeploymentPatch::default());
    }

    #[test]
    fn a_path_out_of_its_folder_is_refused_in_every_spelling() {
        for uri in [
            "",
            "..",
            "../x",
            "gs://b/../c",
            "/a/..",
            "a\\..\\b",
            "/a/%2e%2e/b",
            "/a/%2E./b",
            "/a/..%2fb",
            "rclone:../x",
            "a\nb",
            "a%0ab",
            "a\0",
            "\u{85}",
        ] {
            assert!(check_uri("uri", uri).is_err(), "{uri:?}");
        }
        for uri in ["gs://b/a..b/c", "/m/...", "/m/v1.2..3", "hf://x/y@main", "/m/100%25", "/m/100%", "/modèles/a"] {
            assert_eq!(check_uri("uri", uri), Ok(()), "{uri:?}");
        }
        assert!(refusal(|m| m.model_spec.as_mut().unwrap().uri = "a/../b".into()).starts_with("modelSpec.uri:"));
    }

    #[test]
    fn what_is_over_a_bound_is_refused_by_name() {
        fn spec(model: &mut scheduler::Model) -> &mut scheduler::ModelSpec {
            model.model_spec.as_mut().unwrap()
        }
        assert!(refusal(|m| spec(m).uri = "x".repeat(limits::URI + 1)).contains("4097 bytes"));
        assert!(refusal(|m| spec(m).requirements = vec!["a".into(); 65]).contains("65 are more than the 64"));
        assert!(refusal(|m| spec(m).requirements = vec!["a".repeat(254)]).contains("254 bytes"));
        assert!(refusal(|m| spec(m).requirements = vec![String::new()]).contains("says nothing"));
        assert!(refusal(|m| spec(m).parameters = vec![Default::default(); 257]).contains("257 are more"));
        let big = scheduler::ParameterSpec { name: "a".into(), value: "x".repeat(limits::PARAMETER_BYTES) };
        assert!(refusal(|m| spec(m).parameters = vec![big]).starts_with("modelSpec.parameters:"));
        assert!(refusal(|m| spec(m).server = Some("Not_A_Name".into())).contains("server name"));
        assert!(
            refusal(|m| {
                m.deployment_spec = Some(scheduler::DeploymentSpec { replicas: u32::MAX, ..Default::default() });
            })
            .starts_with("deploymentSpec.replicas:")
        );
    }

    #[test]
    fn a_companion_refers_to_one_thing() {
        use scheduler::model_spec::ModelSpec as Wire;
        let with = |model_ref: Option<&str>, pipeline_ref: Option<&str>| {
            let llm =
                scheduler::LlmSpec { model_ref: model_ref.map(Into::into), pipeline_ref: pipeline_ref.map(Into::into) };
            companion(Wire::Llm(llm))
        };
        assert!(with(None, None).unwrap_err().message.contains("refers to nothing"));
        assert!(with(Some("a"), Some("b")).unwrap_err().message.contains("both set"));
        assert_eq!(with(Some("a"), Some("")), Ok(Companion::Llm { of: Reference::Model("a".into()) }));
    }

    #[test]
    fn no_declared_memory_is_zero() {
        let wire = scheduler::ModelSpec { uri: "/m".into(), memory_bytes: Some(0), ..Default::default() };
        assert_eq!(model_spec_from_wire(wire).unwrap().memory, None);
    }

    #[test]
    fn a_rollout_leaves_alone_what_it_does_not_speak_of() {
        let parts = |rollout| {
            let patch = rollout_from_wire(&rollout).unwrap();
            (patch.strategy, patch.spread, patch.priority, patch.pinned)
        };
        assert_eq!(parts(wharf::Rollout::default()), (None, None, None, None));
        let some = wharf::Rollout { priority: Some(5), pinned: Some(false), ..Default::default() };
        assert_eq!(parts(some), (None, None, Some(5), Some(false)));
        let surge = wharf::Rollout { max_surge: Some(3), ..Default::default() };
        assert_eq!(parts(surge).0, Some(Strategy::RollingUpdate { max_surge: 3, max_unavailable: 0 }));
        for bad in [
            wharf::Rollout { strategy: Some(7), ..Default::default() },
            wharf::Rollout { strategy: Some(1), max_surge: Some(1), ..Default::default() },
        ] {
            assert!(rollout_from_wire(&bad).is_err());
        }
    }
}
