//! Wire to domain and back, for what the scheduler API and the agent session share.

use crate::{
    domain::{
        error::{Code, Refusal},
        memory::Bytes,
        names::ServerName,
        spec::{Companion, ModelSpec, Parameter, Reference, RuntimeInfo, Storage},
    },
    rpc::proto::scheduler as wire,
};

/// The wire form of a spec.
#[must_use]
pub fn model_spec_to_wire(spec: &ModelSpec) -> wire::ModelSpec {
    use wire::{model_runtime_info::ModelRuntimeInfo as Info, model_spec, storage_config::Config};
    let refs = |of: &Reference| match of {
        Reference::Model(name) => (Some(name.clone()), None),
        Reference::Pipeline(name) => (None, Some(name.clone())),
    };
    wire::ModelSpec {
        uri: spec.uri.clone(),
        artifact_version: spec.artifact_version,
        storage_config: spec.storage.as_ref().map(|storage| wire::StorageConfig {
            config: Some(match storage {
                Storage::SecretName(name) => Config::StorageSecretName(name.clone()),
                Storage::RcloneConfig(text) => Config::StorageRcloneConfig(text.clone()),
            }),
        }),
        requirements: spec.requirements.clone(),
        memory_bytes: spec.memory.map(|bytes| bytes.0),
        server: spec.server.as_ref().map(ToString::to_string),
        model_spec: spec.companion.as_ref().map(|companion| match companion {
            Companion::Explainer { kind, of } => {
                let (model_ref, pipeline_ref) = refs(of);
                model_spec::ModelSpec::Explainer(wire::ExplainerSpec { r#type: kind.clone(), model_ref, pipeline_ref })
            }
            Companion::Llm { of } => {
                let (model_ref, pipeline_ref) = refs(of);
                model_spec::ModelSpec::Llm(wire::LlmSpec { model_ref, pipeline_ref })
            }
        }),
        parameters: spec
            .parameters
            .iter()
            .map(|one| wire::ParameterSpec { name: one.name.clone(), value: one.value.clone() })
            .collect(),
        model_runtime_info: spec.runtime.as_ref().map(|runtime| wire::ModelRuntimeInfo {
            model_runtime_info: Some(match runtime {
                RuntimeInfo::MlServer { parallel_workers } => {
                    Info::Mlserver(wire::MlServerModelSettings { parallel_workers: *parallel_workers })
                }
                RuntimeInfo::Triton { cpu } => Info::Triton(wire::TritonModelConfig {
                    cpu: cpu.iter().map(|count| wire::TritonCpu { instance_count: *count }).collect(),
                }),
            }),
        }),
    }
}

/// The spec that `wire` means.
///
/// # Errors
/// When a field can't be what was meant.
pub fn model_spec_from_wire(wire: wire::ModelSpec) -> Result<ModelSpec, Refusal> {
    use wire::{model_runtime_info::ModelRuntimeInfo as Info, model_spec, storage_config::Config};
    let reference = |model: Option<String>, pipeline: Option<String>| match (model, pipeline) {
        (Some(model), None) => Ok(Reference::Model(model)),
        (None, Some(pipeline)) => Ok(Reference::Pipeline(pipeline)),
        _ => Err(Refusal::new(Code::FailedPrecondition, "modelRef or pipelineRef: name exactly one of the two")),
    };
    Ok(ModelSpec {
        uri: wire.uri,
        artifact_version: wire.artifact_version,
        storage: wire.storage_config.and_then(|storage| storage.config).map(|config| match config {
            Config::StorageSecretName(name) => Storage::SecretName(name),
            Config::StorageRcloneConfig(text) => Storage::RcloneConfig(text),
        }),
        requirements: wire.requirements,
        memory: wire.memory_bytes.map(Bytes),
        server: wire.server.filter(|name| !name.is_empty()).map(ServerName::try_from).transpose()?,
        companion: match wire.model_spec {
            None => None,
            Some(model_spec::ModelSpec::Explainer(one)) => {
                Some(Companion::Explainer { kind: one.r#type, of: reference(one.model_ref, one.pipeline_ref)? })
            }
            Some(model_spec::ModelSpec::Llm(one)) => {
                Some(Companion::Llm { of: reference(one.model_ref, one.pipeline_ref)? })
            }
        },
        parameters: wire.parameters.into_iter().map(|one| Parameter { name: one.name, value: one.value }).collect(),
        runtime: wire.model_runtime_info.and_then(|info| info.model_runtime_info).map(|info| match info {
            Info::Mlserver(one) => RuntimeInfo::MlServer { parallel_workers: one.parallel_workers },
            Info::Triton(one) => {
                RuntimeInfo::Triton { cpu: one.cpu.into_iter().map(|group| group.instance_count).collect() }
            }
        }),
    })
}
