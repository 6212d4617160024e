//! The scheduler API that Seldon's clients speak. Outcomes of loading are told through status only, as those
//! clients expect; what can't be right is refused at once.

use std::{collections::BTreeSet, pin::Pin, sync::Arc};

use futures::{Stream, StreamExt as _, stream};
use tonic::{Request, Response, Status};

use super::{
    directory::Directory,
    proto::{
        health,
        scheduler::{self as wire, scheduler_server::Scheduler},
    },
    status::status,
    views::{model_status, server_status},
    wire::{definition_from_wire, kubernetes_from_wire},
};
use crate::{
    domain::{
        error::{Code, Refusal},
        model::Submitted,
        names::{ModelName, ServerName},
        record::Owner,
    },
    messages::{
        Board, Gate,
        server::{Declaration, Declare},
        supervisor::{Action, OnModel},
    },
};

/// The gate to a model by name.
pub type ModelGate = Gate<OnModel, Result<Option<Submitted>, Refusal>>;
/// The gate to a server's declaration.
pub type ServerGate = Gate<Declare, Result<(), Refusal>>;

/// Serves the scheduler API.
#[derive(Clone, Debug)]
pub struct SchedulerApi {
    models: ModelGate,
    servers: ServerGate,
    directory: Directory,
}

impl SchedulerApi {
    /// The API over these.
    #[must_use]
    pub const fn new(models: ModelGate, servers: ServerGate, directory: Directory) -> Self {
        Self { models, servers, directory }
    }

    fn find(&self, name: &str) -> Result<Arc<crate::domain::model::Model>, Refusal> {
        let found = ModelName::new(name).ok().and_then(|name| self.directory.board().model(&name));
        found.ok_or_else(|| Refusal::new(Code::FailedPrecondition, format!("Failed to find model {name}")))
    }
}

/// Another's server stays another's: Seldon's operator asks again for ever unless it is told so in the one code
/// that it takes as final.
fn as_final(refusal: Refusal) -> Refusal {
    match refusal.code {
        Code::PermissionDenied => Refusal { code: Code::FailedPrecondition, ..refusal },
        _ => refusal,
    }
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn pipelines<T>() -> Result<T, Status> {
    Err(Status::unimplemented(
        "pipelines are not part of Wharf; chain models in the client, or keep them in Seldon Core 2",
    ))
}

fn experiments<T>() -> Result<T, Status> {
    Err(Status::unimplemented(
        "experiments are not part of this Wharf yet; give each candidate a model name of its own",
    ))
}

#[tonic::async_trait]
impl Scheduler for SchedulerApi {
    async fn server_notify(
        &self,
        request: Request<wire::ServerNotifyRequest>,
    ) -> Result<Response<wire::ServerNotifyResponse>, Status> {
        let mut declared = Vec::new();
        // All of it is read before any of it is obeyed.
        for notify in request.into_inner().servers {
            let server = ServerName::new(&notify.name).map_err(|error| status(error.into()))?;
            let kubernetes = notify.kubernetes_meta.map(kubernetes_from_wire).transpose().map_err(status)?;
            let declaration = Declaration {
                replicas: notify.expected_replicas,
                bounds: (notify.min_replicas, notify.max_replicas),
                kubernetes,
                capacity: None,
                overcommit_percent: None,
                capabilities: None,
                emptied: BTreeSet::new(),
            };
            declared.push(Declare { owner: Owner::Api, server, declaration: Some(declaration) });
        }
        for declare in declared {
            self.servers.ask(declare).await.map_err(status)?.map_err(|refusal| status(as_final(refusal)))?;
        }
        Ok(Response::new(wire::ServerNotifyResponse {}))
    }

    async fn load_model(
        &self,
        request: Request<wire::LoadModelRequest>,
    ) -> Result<Response<wire::LoadModelResponse>, Status> {
        let definition = definition_from_wire(request.into_inner().model, None).map_err(status)?;
        let name = definition.name.clone();
        let question = OnModel { name, action: Action::Submit(Box::new(definition)) };
        self.models.ask(question).await.map_err(status)?.map_err(status)?;
        Ok(Response::new(wire::LoadModelResponse {}))
    }

    async fn unload_model(
        &self,
        request: Request<wire::UnloadModelRequest>,
    ) -> Result<Response<wire::UnloadModelResponse>, Status> {
        let request = request.into_inner();
        let Some(reference) = request.model else {
            return Err(Status::failed_precondition("model: the request names no model"));
        };
        let name = ModelName::new(&reference.name).map_err(|error| status(error.into()))?;
        let kubernetes = request.kubernetes_meta.map(kubernetes_from_wire).transpose().map_err(status)?;
        let question = OnModel { name, action: Action::Delete(kubernetes) };
        self.models.ask(question).await.map_err(status)?.map_err(status)?;
        Ok(Response::new(wire::UnloadModelResponse {}))
    }

    type ModelStatusStream = Replies<wire::ModelStatusResponse>;

    async fn model_status(
        &self,
        request: Request<wire::ModelStatusRequest>,
    ) -> Result<Response<Self::ModelStatusStream>, Status> {
        let request = request.into_inner();
        let models = match request.model {
            Some(reference) => vec![self.find(&reference.name).map_err(status)?],
            None => self.directory.find(Board::models).await?,
        };
        let replies = models.into_iter().map(move |model| Ok(model_status(&model, request.all_versions)));
        Ok(Response::new(Box::pin(stream::iter(replies))))
    }

    type SubscribeModelStatusStream = Replies<wire::ModelStatusResponse>;

    async fn subscribe_model_status(
        &self,
        _: Request<wire::ModelSubscriptionRequest>,
    ) -> Result<Response<Self::SubscribeModelStatusStream>, Status> {
        // Subscribed before the snapshot is read: what changes in between comes twice rather than never.
        let feed = self.directory.board().watch_models();
        let snapshot = stream::iter(self.directory.find(Board::models).await?);
        let changes = stream::unfold(feed, |feed| async move { Some((feed.next().await, feed)) });
        let replies = snapshot.chain(changes).map(|model| Ok(model_status(&model, false)));
        Ok(Response::new(Box::pin(replies)))
    }

    type ServerStatusStream = Replies<wire::ServerStatusResponse>;

    async fn server_status(
        &self,
        request: Request<wire::ServerStatusRequest>,
    ) -> Result<Response<Self::ServerStatusStream>, Status> {
        let servers = match request.into_inner().name {
            Some(name) => {
                let found = ServerName::new(&name).ok().and_then(|name| self.directory.board().server(&name));
                let missing = || Status::failed_precondition(format!("Failed to find server {name}"));
                vec![found.ok_or_else(missing)?]
            }
            None => self.directory.board().servers(),
        };
        let replies: Vec<_> = servers.iter().map(|server| Ok(server_status(server, self.directory.board()))).collect();
        Ok(Response::new(Box::pin(stream::iter(replies))))
    }

    type SubscribeServerStatusStream = Replies<wire::ServerStatusResponse>;

    async fn subscribe_server_status(
        &self,
        _: Request<wire::ServerSubscriptionRequest>,
    ) -> Result<Response<Self::SubscribeServerStatusStream>, Status> {
        let feed = self.directory.board().watch_servers();
        let snapshot = stream::iter(self.directory.board().servers());
        let changes = stream::unfold(feed, |feed| async move { Some((feed.next().await, feed)) });
        let board = Arc::clone(self.directory.board());
        let replies = snapshot.chain(changes).map(move |server| Ok(server_status(&server, &board)));
        Ok(Response::new(Box::pin(replies)))
    }

    async fn scheduler_status(
        &self,
        _: Request<wire::SchedulerStatusRequest>,
    ) -> Result<Response<wire::SchedulerStatusResponse>, Status> {
        let application_version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Response::new(wire::SchedulerStatusResponse { application_version }))
    }

    type SubscribeControlPlaneStream = Replies<wire::ControlPlaneResponse>;

    async fn subscribe_control_plane(
        &self,
        _: Request<wire::ControlPlaneSubscriptionRequest>,
    ) -> Result<Response<Self::SubscribeControlPlaneStream>, Status> {
        use wire::control_plane_response::Event;
        // The order that Seldon's operator waits for; the stream then stays open and silent.
        let markers = [Event::SendServers, Event::SendExperiments, Event::SendModels, Event::SendPipelines];
        let replies = stream::iter(markers).map(|event| Ok(wire::ControlPlaneResponse { event: event.into() }));
        Ok(Response::new(Box::pin(replies.chain(stream::pending()))))
    }

    async fn model_status_event(
        &self,
        _: Request<wire::ModelUpdateStatusMessage>,
    ) -> Result<Response<wire::ModelUpdateStatusResponse>, Status> {
        Err(Status::unimplemented("Kafka model gateways are not part of Wharf"))
    }

    async fn load_pipeline(
        &self,
        _: Request<wire::LoadPipelineRequest>,
    ) -> Result<Response<wire::LoadPipelineResponse>, Status> {
        pipelines()
    }

    async fn unload_pipeline(
        &self,
        _: Request<wire::UnloadPipelineRequest>,
    ) -> Result<Response<wire::UnloadPipelineResponse>, Status> {
        pipelines()
    }

    type PipelineStatusStream = Replies<wire::PipelineStatusResponse>;

    async fn pipeline_status(
        &self,
        _: Request<wire::PipelineStatusRequest>,
    ) -> Result<Response<Self::PipelineStatusStream>, Status> {
        pipelines()
    }

    type SubscribePipelineStatusStream = Replies<wire::PipelineStatusResponse>;

    async fn subscribe_pipeline_status(
        &self,
        _: Request<wire::PipelineSubscriptionRequest>,
    ) -> Result<Response<Self::SubscribePipelineStatusStream>, Status> {
        pipelines()
    }

    async fn pipeline_status_event(
        &self,
        _: Request<wire::PipelineUpdateStatusMessage>,
    ) -> Result<Response<wire::PipelineUpdateStatusResponse>, Status> {
        pipelines()
    }

    async fn start_experiment(
        &self,
        _: Request<wire::StartExperimentRequest>,
    ) -> Result<Response<wire::StartExperimentResponse>, Status> {
        experiments()
    }

    async fn stop_experiment(
        &self,
        _: Request<wire::StopExperimentRequest>,
    ) -> Result<Response<wire::StopExperimentResponse>, Status> {
        experiments()
    }

    type ExperimentStatusStream = Replies<wire::ExperimentStatusResponse>;

    async fn experiment_status(
        &self,
        _: Request<wire::ExperimentStatusRequest>,
    ) -> Result<Response<Self::ExperimentStatusStream>, Status> {
        experiments()
    }

    type SubscribeExperimentStatusStream = Replies<wire::ExperimentStatusResponse>;

    async fn subscribe_experiment_status(
        &self,
        _: Request<wire::ExperimentSubscriptionRequest>,
    ) -> Result<Response<Self::SubscribeExperimentStatusStream>, Status> {
        experiments()
    }
}

#[tonic::async_trait]
impl health::health_check_service_server::HealthCheckService for SchedulerApi {
    async fn health_check(
        &self,
        _: Request<health::HealthCheckRequest>,
    ) -> Result<Response<health::HealthCheckResponse>, Status> {
        Ok(Response::new(health::HealthCheckResponse { ok: true }))
    }
}
