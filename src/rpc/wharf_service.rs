//! What Wharf adds to the scheduler API.

use std::{collections::BTreeSet, pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _, stream};
use tonic::{Request, Response, Status};

use super::{
    directory::Directory,
    proto::wharf::{self as wire, wharf_server::Wharf},
    scheduler_service::ModelGate,
    status::status,
    views::{model_view, server_view},
    wire::{definition_from_wire, timestamp},
};
use crate::{
    domain::{
        copy::State,
        error::{Code, Refusal},
        model::{Model, Outcome, Submitted},
        names::{ModelName, ReplicaId, ServerName},
        near::nearest,
        version::Version,
    },
    messages::{
        Board, Gate, ServerView,
        placement::Explanation,
        server::{Mark, SetMark},
        supervisor::{Action, OnModel},
    },
    telemetry::events::{Event, Events, Received},
};

/// The gate to a replica's marks.
pub type MarkGate = Gate<SetMark, Result<BTreeSet<u32>, Refusal>>;
/// The gate to the placement's explanations.
pub type ExplainGate = Gate<ModelName, Option<Explanation>>;
/// The gate to the actors' observable state.
pub type InspectGate = Gate<(), serde_json::Value>;

/// The longest that a drain is watched when the client names no deadline.
const DRAIN: Duration = Duration::from_secs(300);
/// How often a drain's progress is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Serves `wharf.v1`.
#[derive(Clone, Debug)]
pub struct WharfApi {
    /// Where requests about models go.
    pub models: ModelGate,
    /// Where marks go.
    pub marks: MarkGate,
    /// Where questions about placement go.
    pub explain: ExplainGate,
    /// Where questions about actors go.
    pub inspect: InspectGate,
    /// What readers see.
    pub directory: Directory,
    /// What happened.
    pub events: Events,
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl WharfApi {
    async fn act(&self, name: ModelName, action: Action) -> Result<Response<wire::SubmitModelResponse>, Status> {
        let submitted = self.models.ask(OnModel { name, action }).await.map_err(status)?.map_err(status)?;
        let Some(Submitted { uid, version, outcome }) = submitted else {
            return Err(Status::internal("the model's answer has no version"));
        };
        use wire::submit_model_response::Outcome as Word;
        let outcome = match outcome {
            Outcome::Unchanged => Word::Unchanged,
            Outcome::Created => Word::Created,
            Outcome::NewVersion => Word::NewVersion,
            Outcome::Rescaled => Word::Rescaled,
        };
        Ok(Response::new(wire::SubmitModelResponse { uid: uid.0, version: version.0, outcome: outcome.into() }))
    }

    async fn chosen(&self, request: &wire::ListModelsRequest) -> Result<Vec<Arc<Model>>, Status> {
        let Some(name) = &request.name else {
            let terminated = request.terminated;
            let all = move |board: &Board| {
                let mut models = board.models();
                models.retain(|model| terminated || shown(model));
                models
            };
            return self.directory.find(all).await;
        };
        let found = ModelName::new(name).ok().and_then(|name| self.board().model(&name));
        Ok(vec![found.ok_or_else(|| Status::not_found(self.unknown(name)))?])
    }

    fn board(&self) -> &Arc<Board> {
        self.directory.board()
    }

    fn unknown(&self, name: &str) -> String {
        match nearest(&**self.board(), name) {
            Some(nearest) => format!("model {name} is not known; did you mean {nearest}?"),
            None => format!("model {name} is not known; `wharf model list` shows those that are"),
        }
    }

    fn servers(&self, request: &wire::ListServersRequest) -> Result<Vec<Arc<ServerView>>, Status> {
        let Some(name) = &request.name else { return Ok(self.board().servers()) };
        let found = ServerName::new(name).ok().and_then(|name| self.board().server(&name));
        let text = || format!("server {name} is not known; `wharf server list` shows those that are");
        Ok(vec![found.ok_or_else(|| Status::not_found(text()))?])
    }
}

/// How far the replicas' copies have moved.
fn progress(board: &Board, server: &ServerName, replicas: &BTreeSet<u32>, before: u32) -> wire::DrainProgress {
    let here = |on: &ReplicaId| on.server == *server && replicas.contains(&on.index);
    let mut left = 0;
    let mut stuck = Vec::new();
    board.visit_models(|model| {
        let count = model.copies.iter().filter(|copy| copy.state.replica().is_some_and(here)).count();
        if count == 0 {
            return;
        }
        left += u32::try_from(count).unwrap_or(u32::MAX);
        let reason = model.copies.iter().find_map(|copy| match &copy.state {
            State::Pending { reason: Some(reason) } => Some(reason.summary()),
            _ => None,
        });
        stuck.extend(reason.map(|reason| (model.name.clone(), reason)));
    });
    stuck.sort_unstable();
    let stuck = stuck.into_iter().map(|(model, reason)| format!("{model}: {reason}")).collect();
    wire::DrainProgress { left, moved: before.saturating_sub(left), stuck, done: left == 0 }
}

fn shown(model: &Model) -> bool {
    model.deleted.is_none() || !model.copies.is_empty()
}

fn event_to_wire(event: &Event) -> wire::Event {
    wire::Event {
        sequence: event.sequence,
        time: Some(timestamp(event.time)),
        subject: event.subject.clone(),
        kind: event.kind.to_string(),
        message: event.message.clone(),
        data: event.data.clone(),
    }
}

#[tonic::async_trait]
impl Wharf for WharfApi {
    async fn submit_model(
        &self,
        request: Request<wire::SubmitModelRequest>,
    ) -> Result<Response<wire::SubmitModelResponse>, Status> {
        let request = request.into_inner();
        let definition = definition_from_wire(request.model, request.rollout).map_err(status)?;
        self.act(definition.name.clone(), Action::Submit(Box::new(definition))).await
    }

    async fn rollback_model(
        &self,
        request: Request<wire::RollbackModelRequest>,
    ) -> Result<Response<wire::SubmitModelResponse>, Status> {
        let request = request.into_inner();
        let name = ModelName::new(&request.name).map_err(|error| status(error.into()))?;
        self.act(name, Action::Rollback(request.to.map(Version))).await
    }

    async fn scale_model(
        &self,
        request: Request<wire::ScaleModelRequest>,
    ) -> Result<Response<wire::SubmitModelResponse>, Status> {
        let request = request.into_inner();
        let name = ModelName::new(&request.name).map_err(|error| status(error.into()))?;
        self.act(name, Action::Scale(request.replicas)).await
    }

    type ListModelsStream = Replies<wire::ModelView>;

    async fn list_models(
        &self,
        request: Request<wire::ListModelsRequest>,
    ) -> Result<Response<Self::ListModelsStream>, Status> {
        let models = self.chosen(&request.into_inner()).await?;
        Ok(Response::new(Box::pin(stream::iter(models).map(|model| Ok(model_view(&model))))))
    }

    type WatchModelsStream = Replies<wire::ModelView>;

    async fn watch_models(
        &self,
        request: Request<wire::ListModelsRequest>,
    ) -> Result<Response<Self::WatchModelsStream>, Status> {
        let request = request.into_inner();
        let feed = self.board().watch_models();
        let snapshot = match self.chosen(&request).await {
            Ok(models) => models,
            // A watch may wait for a model that is yet to come.
            Err(_) if request.name.is_some() => Vec::new(),
            Err(error) => return Err(error),
        };
        let changes = stream::unfold(feed, |feed| async move { Some((feed.next().await, feed)) });
        let name = request.name;
        let replies = stream::iter(snapshot)
            .chain(changes)
            .filter(move |model| {
                let wanted = name.as_ref().is_none_or(|name| model.name.as_str() == name);
                futures::future::ready(wanted)
            })
            .map(|model| Ok(model_view(&model)));
        Ok(Response::new(Box::pin(replies)))
    }

    type ListServersStream = Replies<wire::ServerView>;

    async fn list_servers(
        &self,
        request: Request<wire::ListServersRequest>,
    ) -> Result<Response<Self::ListServersStream>, Status> {
        let servers = self.servers(&request.into_inner())?;
        let views: Vec<_> = servers.iter().map(|server| Ok(server_view(server, self.board()))).collect();
        Ok(Response::new(Box::pin(stream::iter(views))))
    }

    type WatchServersStream = Replies<wire::ServerView>;

    async fn watch_servers(
        &self,
        request: Request<wire::ListServersRequest>,
    ) -> Result<Response<Self::WatchServersStream>, Status> {
        let request = request.into_inner();
        let feed = self.board().watch_servers();
        let snapshot = self.servers(&request)?;
        let changes = stream::unfold(feed, |feed| async move { Some((feed.next().await, feed)) });
        let (name, board) = (request.name, Arc::clone(self.board()));
        let replies = stream::iter(snapshot)
            .chain(changes)
            .filter(move |server| {
                let wanted = name.as_ref().is_none_or(|name| server.row.name.as_str() == name);
                futures::future::ready(wanted)
            })
            .map(move |server| Ok(server_view(&server, &board)));
        Ok(Response::new(Box::pin(replies)))
    }

    type DrainReplicaStream = Replies<wire::DrainProgress>;

    async fn drain_replica(
        &self,
        request: Request<wire::DrainReplicaRequest>,
    ) -> Result<Response<Self::DrainReplicaStream>, Status> {
        let request = request.into_inner();
        let server = ServerName::new(&request.server).map_err(|error| status(error.into()))?;
        let mark = SetMark { server: server.clone(), replica: request.replica, mark: Mark::Drain };
        let chosen = self.marks.ask(mark).await.map_err(status)?.map_err(status)?;
        let patience = match request.deadline_millis {
            0 => DRAIN,
            millis => Duration::from_millis(millis),
        };
        let looks = patience.as_millis() / LOOK.as_millis();
        let look = {
            let directory = self.directory.clone();
            move |before: u32| {
                let (directory, server, chosen) = (directory.clone(), server.clone(), chosen.clone());
                async move { directory.find(move |board| progress(board, &server, &chosen, before)).await }
            }
        };
        let before = look(0).await?.left;
        let start = (None::<wire::DrainProgress>, 0_u128, false);
        let replies = stream::unfold(start, move |(last, mut looked, ended)| {
            let look = look.clone();
            async move {
                if ended {
                    return None;
                }
                loop {
                    let progress = match look(before).await {
                        Ok(progress) => progress,
                        Err(status) => return Some((Err(status), (last, looked, true))),
                    };
                    let over = progress.done || looked >= looks;
                    if over || last.as_ref() != Some(&progress) {
                        return Some((Ok(progress.clone()), (Some(progress), looked, over)));
                    }
                    tokio::time::sleep(LOOK).await;
                    looked += 1;
                }
            }
        });
        Ok(Response::new(Box::pin(replies)))
    }

    async fn cordon_replica(
        &self,
        request: Request<wire::CordonReplicaRequest>,
    ) -> Result<Response<wire::CordonReplicaResponse>, Status> {
        let request = request.into_inner();
        let server = ServerName::new(&request.server).map_err(|error| status(error.into()))?;
        let mark = if request.undo { Mark::Clear } else { Mark::Cordon };
        let set = SetMark { server, replica: request.replica, mark };
        let chosen = self.marks.ask(set).await.map_err(status)?.map_err(status)?;
        let replicas = u32::try_from(chosen.len()).unwrap_or(u32::MAX);
        Ok(Response::new(wire::CordonReplicaResponse { replicas }))
    }

    type EventsStream = Replies<wire::Event>;

    async fn events(&self, request: Request<wire::EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        let wire::EventsRequest { model, follow } = request.into_inner();
        let (past, live) = self.events.subscribe(None);
        let past = stream::iter(past).map(Received::Event);
        let live = stream::unfold(live, |mut live| async move { Some((live.next().await?, live)) });
        let subject = if model.is_empty() { model } else { format!("model/{model}") };
        let events = if follow { past.chain(live).boxed() } else { past.boxed() };
        let replies = events.filter_map(move |received| {
            let event = match received {
                Received::Event(event) => {
                    (subject.is_empty() || event.subject == subject).then(|| Ok(event_to_wire(&event)))
                }
                Received::Lost(count) => Some(Err(Status::data_loss(format!(
                    "{count} events were lost because they were not read fast enough; ask again"
                )))),
            };
            futures::future::ready(event)
        });
        Ok(Response::new(Box::pin(replies)))
    }

    async fn explain(&self, request: Request<wire::ExplainRequest>) -> Result<Response<wire::ExplainResponse>, Status> {
        let name = request.into_inner().model;
        let known = ModelName::new(&name).ok().filter(|name| self.board().model(name).is_some());
        let Some(known) = known else { return Err(Status::not_found(self.unknown(&name))) };
        let answer = self.explain.ask(known).await.map_err(status)?;
        let Some(Explanation { text, data }) = answer else {
            let refusal = Refusal::new(Code::FailedPrecondition, format!("model {name} wants no copy"));
            return Err(status(refusal));
        };
        Ok(Response::new(wire::ExplainResponse { text, data: data.to_string() }))
    }

    async fn inspect(&self, _: Request<wire::InspectRequest>) -> Result<Response<wire::InspectResponse>, Status> {
        let data = self.inspect.ask(()).await.map_err(status)?.to_string();
        Ok(Response::new(wire::InspectResponse { data }))
    }
}
