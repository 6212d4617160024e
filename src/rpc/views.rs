//! Models and servers as clients see them: Seldon's words and Wharf's.

use std::collections::HashMap;

use super::{
    proto::{
        scheduler::{
            self, ModelReplicaStatus, ModelStatus, ModelStatusResponse, ModelVersionStatus, ServerReplicaResources,
            ServerStatusResponse, model_replica_status::ModelReplicaState as ReplicaWord,
            model_status::ModelState as Word,
        },
        wharf,
    },
    wire::{kubernetes_to_wire, model_spec_to_wire, model_to_wire, replicas_of, rollout_of, timestamp},
};
use crate::{
    domain::{
        copy::{Copy, Drain, Residency, State},
        model::{Model, ModelState},
        names::ReplicaId,
        replica::ReplicaState,
        version::Version,
    },
    messages::{Board, ServerView},
};

/// Seldon's word for a state.
#[must_use]
pub const fn seldon_state(state: ModelState) -> Word {
    match state {
        ModelState::Progressing => Word::ModelProgressing,
        ModelState::Available => Word::ModelAvailable,
        ModelState::Failed => Word::ModelFailed,
        ModelState::ScheduleFailed => Word::ScheduleFailed,
        ModelState::ScaledDown => Word::ModelScaledDown,
        ModelState::Terminating => Word::ModelTerminating,
        ModelState::Terminated => Word::ModelTerminated,
    }
}

/// Seldon's word for a copy's state.
#[must_use]
pub const fn seldon_replica_state(copy: &Copy) -> ReplicaWord {
    match &copy.state {
        State::Pending { .. } | State::Unknown { .. } => ReplicaWord::Unknown,
        State::Scheduled { .. } => ReplicaWord::LoadRequested,
        State::Downloading { .. } | State::Loading { .. } => ReplicaWord::Loading,
        State::Available { .. } => ReplicaWord::Available,
        State::Draining { phase: Drain::Leaving, .. } => ReplicaWord::UnloadEnvoyRequested,
        State::Draining { phase: Drain::Unloading, .. } => ReplicaWord::Unloading,
        State::Unloaded => ReplicaWord::Unloaded,
        State::Failed { .. } => ReplicaWord::LoadFailed,
    }
}

/// A model's status in Seldon's words: its latest version, or all of them.
#[must_use]
pub fn model_status(model: &Model, all_versions: bool) -> ModelStatusResponse {
    let versions = model
        .versions
        .iter()
        .enumerate()
        .filter(|(index, _)| all_versions || index + 1 == model.versions.len())
        .map(|(_, entry)| version_status(model, entry.version))
        .collect();
    ModelStatusResponse {
        model_name: model.name.to_string(),
        versions,
        deleted: model.deleted.is_some(),
        ..ModelStatusResponse::default()
    }
}

fn version_status(model: &Model, version: Version) -> ModelVersionStatus {
    let standing = model.version_standing(version);
    let mut copies = HashMap::new();
    for copy in model.copies.iter().filter(|copy| copy.generation.version == version) {
        if let Some(on) = copy.state.replica() {
            let status = ModelReplicaStatus {
                state: seldon_replica_state(copy).into(),
                reason: reason(copy),
                last_change_timestamp: Some(timestamp(copy.since)),
            };
            copies.insert(i32::try_from(on.index).unwrap_or(i32::MAX), status);
        }
    }
    let entry = model.entry(version);
    // No Kafka gateway is ever there; Seldon's operator removes a model only once this says terminated.
    let gateway = match standing.state {
        ModelState::Terminated => Word::ModelTerminated,
        ModelState::Terminating => Word::ModelTerminate,
        ModelState::Progressing
        | ModelState::Available
        | ModelState::Failed
        | ModelState::ScheduleFailed
        | ModelState::ScaledDown => Word::ModelCreate,
    };
    ModelVersionStatus {
        version: version.0,
        server_name: model.main_server(version).map(|server| server.to_string()).unwrap_or_default(),
        kubernetes_meta: model.kubernetes.as_ref().map(kubernetes_to_wire),
        model_replica_state: copies,
        state: Some(ModelStatus {
            state: seldon_state(standing.state).into(),
            reason: standing.sentence(),
            available_replicas: standing.available,
            unavailable_replicas: standing.unavailable,
            last_change_timestamp: Some(timestamp(model.changed)),
            model_gw_state: gateway.into(),
            model_gw_reason: "No model gateway available to handle model".to_owned(),
        }),
        model_defn: entry.map(|entry| {
            let replicas = Some(replicas_of(&model.deployment));
            model_to_wire(&model.name, &entry.spec, replicas, model.kubernetes.as_ref(), &entry.passthrough)
        }),
    }
}

fn reason(copy: &Copy) -> String {
    match &copy.state {
        State::Pending { reason } => reason.as_ref().map(|reason| reason.summary()).unwrap_or_default(),
        State::Failed { failure, .. } => format!("{} failure: {}", failure.class.name(), failure.message),
        State::Unknown { on } => format!("no word from {on}"),
        State::Draining { phase: Drain::Leaving, .. } => "waiting until every gateway has routes without it".to_owned(),
        State::Draining { phase: Drain::Unloading, .. } => "finishing the requests in flight".to_owned(),
        State::Scheduled { .. }
        | State::Downloading { .. }
        | State::Loading { .. }
        | State::Available { .. }
        | State::Unloaded => String::new(),
    }
}

/// A model, whole.
#[must_use]
pub fn model_view(model: &Model) -> wharf::ModelView {
    let standing = model.standing();
    let mut sentence = standing.sentence();
    if let Some(latest) = model.latest()
        && latest.failed.is_some()
        && model.deleted.is_none()
    {
        sentence = format!("version {}: {}", latest.version, model.version_standing(latest.version).sentence());
    }
    wharf::ModelView {
        name: model.name.to_string(),
        uid: model.uid.0,
        state: standing.state.name().to_owned(),
        reason: sentence,
        serving: model.serving.map(|version| version.0),
        wanted: model.deployment.replicas,
        available: standing.available,
        versions: model.versions.iter().map(|entry| version_view(model, entry.version)).collect(),
        deleted: model.deleted.is_some(),
        changed: Some(timestamp(model.changed)),
        rollout: Some(rollout_of(&model.deployment)),
        conditions: model.misdeclared().map(|what| what.to_string()).collect(),
    }
}

fn version_view(model: &Model, version: Version) -> wharf::VersionView {
    let standing = model.version_standing(version);
    wharf::VersionView {
        version: version.0,
        state: standing.state.name().to_owned(),
        reason: standing.sentence(),
        copies: model
            .copies
            .iter()
            .filter(|copy| copy.generation.version == version)
            .map(|copy| copy_view(model, copy))
            .collect(),
        spec: model.entry(version).map(|entry| model_spec_to_wire(&entry.spec)),
    }
}

fn copy_view(model: &Model, copy: &Copy) -> wharf::CopyView {
    let on = copy.state.replica();
    let residency = match &copy.state {
        State::Available { residency, .. } => match residency {
            Residency::Resident => "resident",
            Residency::Evicting => "evicting",
            Residency::Evicted => "evicted",
            Residency::Reloading => "reloading",
        },
        State::Pending { .. }
        | State::Scheduled { .. }
        | State::Downloading { .. }
        | State::Loading { .. }
        | State::Draining { .. }
        | State::Unloaded
        | State::Failed { .. }
        | State::Unknown { .. } => "",
    };
    let progress = match &copy.state {
        State::Downloading { progress, .. } => *progress,
        State::Pending { .. }
        | State::Scheduled { .. }
        | State::Loading { .. }
        | State::Available { .. }
        | State::Draining { .. }
        | State::Unloaded
        | State::Failed { .. }
        | State::Unknown { .. } => crate::domain::copy::Progress::default(),
    };
    wharf::CopyView {
        number: copy.generation.number,
        server: on.map(|on| on.server.to_string()).unwrap_or_default(),
        replica: on.map_or(0, |on| on.index),
        state: copy.state.name().to_owned(),
        residency: residency.to_owned(),
        reason: reason(copy),
        done: progress.done,
        total: progress.total,
        since: Some(timestamp(copy.since)),
        need: copy.need.primary.0,
        measured: model.measured(copy.generation).map(|bytes| bytes.primary.0),
        declared: model.declared(copy.generation.version).map(|bytes| bytes.0),
    }
}

/// A server's status in Seldon's words.
#[must_use]
pub fn server_status(server: &ServerView, board: &Board) -> ServerStatusResponse {
    let connected = |state: ReplicaState| state == ReplicaState::Available;
    let mut loaded = 0_u32;
    let resources: Vec<ServerReplicaResources> = server
        .replicas
        .iter()
        .filter(|replica| connected(replica.state))
        .map(|replica| {
            let registered = board.registered(&ReplicaId::new(server.row.name.clone(), replica.index));
            loaded += registered.copies;
            let limit = replica.capacity.plus_percent(replica.overcommit_percent);
            ServerReplicaResources {
                replica_idx: replica.index,
                total_memory_bytes: replica.capacity.primary.0,
                available_memory_bytes: limit.primary.saturating_sub(registered.bytes.primary).0,
                num_loaded_models: i32::try_from(registered.copies).unwrap_or(i32::MAX),
                over_commit_percentage: replica.overcommit_percent,
            }
        })
        .collect();
    ServerStatusResponse {
        server_name: server.row.name.to_string(),
        expected_replicas: server.row.expected.map_or(-1, |expected| i32::try_from(expected).unwrap_or(i32::MAX)),
        available_replicas: i32::try_from(resources.len()).unwrap_or(i32::MAX),
        resources,
        num_loaded_model_replicas: i32::try_from(loaded).unwrap_or(i32::MAX),
        kubernetes_meta: server.row.kubernetes.as_ref().map(kubernetes_to_wire),
        r#type: scheduler::server_status_response::Type::StatusUpdate.into(),
    }
}

/// A server, whole.
#[must_use]
pub fn server_view(server: &ServerView, board: &Board) -> wharf::ServerView {
    let replicas = server
        .replicas
        .iter()
        .map(|replica| {
            let registered = board.registered(&ReplicaId::new(server.row.name.clone(), replica.index));
            let cordoned = server.row.cordoned.contains(&replica.index);
            wharf::ReplicaView {
                index: replica.index,
                state: replica.state.name().to_owned(),
                reason: if cordoned { "cordoned: nothing new is placed here".to_owned() } else { String::new() },
                capacity: replica.capacity.primary.0,
                registered: registered.bytes.primary.0,
                resident: replica.resident.primary.0,
                leaked: replica.strain.leaked.0,
                returns: replica.strain.advice.returns,
                more_memory: replica.strain.advice.more.0,
                spared_percent: replica.strain.advice.spared_percent,
                overcommit_percent: replica.overcommit_percent,
                copies: registered.copies,
                copies_resident: replica.copies_resident,
                door: replica.door.clone(),
                since: Some(timestamp(replica.since)),
            }
        })
        .collect();
    let mut conditions = server.conditions.clone();
    for replica in &server.replicas {
        let registered = board.registered(&ReplicaId::new(server.row.name.clone(), replica.index));
        conditions.extend(registered.conditions.iter().map(|what| format!("replica {} {what}", replica.index)));
    }
    wharf::ServerView {
        name: server.row.name.to_string(),
        owner: server.row.owner.name().to_owned(),
        expected: server.row.expected.unwrap_or(0),
        replicas,
        capabilities: server.capabilities.clone(),
        runtime: server.runtime.clone(),
        removing: server.removing,
        conditions,
    }
}
