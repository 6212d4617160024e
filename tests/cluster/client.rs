//! A client of the scheduler's API, over the simulated network.

use std::{future::Future, time::Duration};

use hyper_util::rt::TokioIo;
use tonic::{
    Response, Status,
    transport::{Channel, Endpoint, Uri},
};
use wharf::rpc::proto::{
    scheduler::{self, scheduler_client::SchedulerClient},
    wharf::{self as api, wharf_client::WharfClient},
};

use super::server::uri;

/// The longest that one call may take.
const DEADLINE: Duration = Duration::from_secs(5);

/// What is asked for a model.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    pub(crate) name: String,
    /// What the artifact is called; an answer names it.
    pub(crate) label: String,
    pub(crate) bytes: u64,
    pub(crate) replicas: u32,
    pub(crate) surge: Option<u32>,
    pub(crate) unavailable: Option<u32>,
}

impl Ask {
    pub(crate) fn new(name: &str, label: &str, bytes: u64, replicas: u32) -> Self {
        let (name, label) = (name.to_owned(), label.to_owned());
        Self { name, label, bytes, replicas, surge: None, unavailable: None }
    }

    fn model(&self) -> scheduler::Model {
        scheduler::Model {
            meta: Some(scheduler::MetaData { name: self.name.clone(), ..Default::default() }),
            model_spec: Some(scheduler::ModelSpec {
                uri: uri(&self.label, self.bytes),
                requirements: vec!["sim".to_owned()],
                memory_bytes: Some(self.bytes),
                ..Default::default()
            }),
            deployment_spec: Some(scheduler::DeploymentSpec { replicas: self.replicas, ..Default::default() }),
            ..Default::default()
        }
    }
}

/// Both services of the scheduler.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    wharf: WharfClient<Channel>,
    seldon: SchedulerClient<Channel>,
}

impl Api {
    /// Connects when first used, and again when the connection is lost.
    pub(crate) fn new() -> Self {
        let connector = tower::service_fn(|_: Uri| async {
            turmoil::net::TcpStream::connect("scheduler:9004").await.map(TokioIo::new)
        });
        let channel = Endpoint::from_static("http://scheduler:9004")
            .connect_timeout(Duration::from_secs(1))
            .http2_keep_alive_interval(Duration::from_secs(1))
            .keep_alive_timeout(Duration::from_secs(1))
            .connect_with_connector_lazy(connector);
        Self { wharf: WharfClient::new(channel.clone()), seldon: SchedulerClient::new(channel) }
    }

    pub(crate) async fn submit(&mut self, ask: &Ask) -> Result<api::SubmitModelResponse, Status> {
        let rollout = api::Rollout { max_surge: ask.surge, max_unavailable: ask.unavailable, ..Default::default() };
        let request = api::SubmitModelRequest { model: Some(ask.model()), rollout: Some(rollout) };
        within(self.wharf.submit_model(request)).await
    }

    pub(crate) async fn scale(&mut self, name: &str, replicas: u32) -> Result<api::SubmitModelResponse, Status> {
        within(self.wharf.scale_model(api::ScaleModelRequest { name: name.to_owned(), replicas })).await
    }

    pub(crate) async fn unload(&mut self, name: &str) -> Result<(), Status> {
        let model = Some(scheduler::ModelReference { name: name.to_owned(), version: None });
        let request = scheduler::UnloadModelRequest { model, ..Default::default() };
        within(self.seldon.unload_model(request)).await.map(drop)
    }

    pub(crate) async fn models(&mut self) -> Result<Vec<api::ModelView>, Status> {
        let list = async {
            let request = api::ListModelsRequest { name: None, terminated: false };
            let mut stream = self.wharf.list_models(request).await?.into_inner();
            let mut models = Vec::new();
            while let Some(model) = stream.message().await? {
                models.push(model);
            }
            Ok(Response::new(models))
        };
        within(list).await
    }

    /// The model as status says it; absent when it is not listed.
    pub(crate) async fn model(&mut self, name: &str) -> Result<Option<api::ModelView>, Status> {
        Ok(self.models().await?.into_iter().find(|model| model.name == name))
    }

    /// Follows a drain to its end; what was stuck at last.
    pub(crate) async fn drain(&mut self, replica: u32, deadline: Duration) -> Result<Vec<api::DrainProgress>, Status> {
        let request = api::DrainReplicaRequest {
            server: "sim".to_owned(),
            replica: Some(replica),
            deadline_millis: u64::try_from(deadline.as_millis()).unwrap(),
        };
        let mut stream = self.wharf.drain_replica(request).await?.into_inner();
        let mut told = Vec::new();
        while let Some(progress) = stream.message().await? {
            told.push(progress);
        }
        Ok(told)
    }

    /// Submits until it is acknowledged, whatever happens to the scheduler meanwhile.
    pub(crate) async fn submit_surely(&mut self, ask: &Ask) -> api::SubmitModelResponse {
        loop {
            match self.submit(ask).await {
                Ok(submitted) => return submitted,
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// Waits until status says that the newest version of the model is Available, served, and alone.
    pub(crate) async fn settled(&mut self, name: &str, within: Duration) -> Result<api::ModelView, String> {
        let mut last = String::new();
        let waiting = async {
            loop {
                match self.model(name).await {
                    Ok(Some(model)) if is_settled(&model) => return model,
                    other => last = format!("{other:?}"),
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(within, waiting).await {
            Ok(model) => Ok(model),
            Err(_) => Err(format!("{name} is not settled within {within:?}: {last}")),
        }
    }

    /// Waits until status says that the model is Available.
    pub(crate) async fn available(&mut self, name: &str, within: Duration) -> Result<(), String> {
        let mut last = String::new();
        let waiting = async {
            loop {
                match self.model(name).await {
                    Ok(Some(model)) if model.state == "Available" || model.state == "ModelAvailable" => return,
                    other => last = format!("{other:?}"),
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let ended = tokio::time::timeout(within, waiting).await;
        ended.map_err(|_| format!("{name} is not Available within {within:?}: {last}"))
    }
}

/// Whether the newest version has all its copies and no other version has any.
pub(crate) fn is_settled(model: &api::ModelView) -> bool {
    let newest = model.versions.iter().map(|version| version.version).max();
    let copies = |version: &api::VersionView| version.copies.iter().filter(|copy| copy.state == "Available").count();
    model.serving == newest
        && model.available == model.wanted
        && model.versions.iter().all(|version| {
            if Some(version.version) == newest {
                copies(version) == model.wanted as usize && version.copies.len() == copies(version)
            } else {
                version.copies.is_empty()
            }
        })
}

async fn within<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(DEADLINE, call).await {
        Ok(answer) => answer.map(Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded("the test's own deadline")),
    }
}
