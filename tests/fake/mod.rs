//! A scheduler and a gateway with canned answers, on loopback.

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
};

use futures::{Stream, StreamExt as _, stream};
use tonic::{Request, Response, Status};
use wharf::rpc::proto::{
    inference::{self, grpc_inference_service_server as oip},
    scheduler::{self as seldon, scheduler_server},
    wharf::{self as api, wharf_server},
};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What was asked for, and what a watch is to tell.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Calls that change something, in their order.
    pub(crate) calls: Vec<String>,
    /// What a watch tells, one after another; then it stays silent.
    pub(crate) watched: Vec<api::ModelView>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Fake(pub(crate) Arc<Mutex<State>>);

fn at(seconds: i64) -> Option<prost_types::Timestamp> {
    Some(prost_types::Timestamp { seconds, nanos: 0 })
}

fn copy(number: u32, replica: u32, state: &str) -> api::CopyView {
    api::CopyView {
        number,
        server: "mlserver".into(),
        replica,
        state: state.into(),
        residency: if state == "Available" { "Resident".into() } else { String::new() },
        need: 100 * 1024,
        declared: Some(100 * 1024),
        measured: (state == "Available").then_some(72 * 1024),
        since: at(1_000_000_000 - 90),
        ..Default::default()
    }
}

pub(crate) fn version(version: u32, state: &str, copies: Vec<api::CopyView>) -> api::VersionView {
    let spec = seldon::ModelSpec { uri: format!("gs://bucket/iris/{version}"), ..Default::default() };
    api::VersionView { version, state: state.into(), copies, spec: Some(spec), ..Default::default() }
}

pub(crate) fn view(name: &str, state: &str, serving: Option<u32>, versions: Vec<api::VersionView>) -> api::ModelView {
    let available = versions.iter().flat_map(|v| &v.copies).filter(|copy| copy.state == "Available").count();
    api::ModelView {
        name: name.into(),
        uid: 5,
        state: state.into(),
        serving,
        wanted: 1,
        available: u32::try_from(available).unwrap(),
        versions,
        changed: at(1_000_000_000 - 90),
        rollout: Some(api::Rollout {
            strategy: Some(0),
            max_surge: Some(1),
            max_unavailable: Some(0),
            spread_servers: Some(false),
            priority: Some(0),
        }),
        ..Default::default()
    }
}

pub(crate) fn downloading(done: u64, total: Option<u64>) -> api::CopyView {
    api::CopyView { done, total, ..copy(2, 1, "Downloading") }
}

pub(crate) fn available(number: u32) -> api::CopyView {
    copy(number, 0, "Available")
}

fn models() -> Vec<api::ModelView> {
    let mut rolling = view(
        "iris",
        "Available",
        Some(1),
        vec![
            version(1, "Available", vec![available(1)]),
            version(2, "Progressing", vec![downloading(45 << 20, Some(100 << 20))]),
        ],
    );
    rolling.wanted = 2;
    rolling.reason = "Partial: 1 of 2 copies answer; version 2 is Downloading on mlserver-1".into();
    let mut nowhere = view("huge", "ScheduleFailed", None, vec![version(1, "ScheduleFailed", vec![])]);
    nowhere.reason = "no replica has 64 GiB free: mlserver-0 lacks 60 GiB, mlserver-1 lacks 62 GiB".into();
    let mut evil = view("evil", "Failed", None, vec![version(1, "Failed", vec![copy(1, 0, "Failed")])]);
    evil.reason = "runtime failure: \u{1b}[2J\u{7}cleared your screen\r\n".into();
    let mut gone = view("gone", "Terminated", None, vec![version(3, "Terminated", vec![])]);
    gone.deleted = true;
    vec![nowhere, rolling, evil, gone]
}

fn listed<T: Send + 'static>(items: Vec<T>) -> Answers<T> {
    Box::pin(stream::iter(items.into_iter().map(Ok)))
}

type Answer<T> = Result<Response<T>, Status>;
/// What `async_trait` makes of an async method, for those that a macro writes.
type Later<'b, T> = Pin<Box<dyn Future<Output = Answer<T>> + Send + 'b>>;

#[tonic::async_trait]
impl wharf_server::Wharf for Fake {
    async fn submit_model(&self, request: Request<api::SubmitModelRequest>) -> Answer<api::SubmitModelResponse> {
        let request = request.into_inner();
        let definition = wharf::rpc::wire::definition_from_wire(request.model, request.rollout)
            .map_err(|refusal| Status::failed_precondition(refusal.message))?;
        let name = definition.name.to_string();
        self.0.lock().unwrap().calls.push(format!("submit {name}"));
        use api::submit_model_response::Outcome;
        let (version, outcome) = match name.as_str() {
            "refused" => return Err(Status::failed_precondition("the registry is read-only; ask its owner")),
            "iris" => (2, Outcome::NewVersion),
            "same" => (7, Outcome::Unchanged),
            _ => (1, Outcome::Created),
        };
        Ok(Response::new(api::SubmitModelResponse { uid: 5, version, outcome: outcome.into() }))
    }

    async fn rollback_model(&self, request: Request<api::RollbackModelRequest>) -> Answer<api::SubmitModelResponse> {
        let request = request.into_inner();
        self.0.lock().unwrap().calls.push(format!("rollback {} {:?}", request.name, request.to));
        Ok(Response::new(api::SubmitModelResponse { uid: 5, version: 3, outcome: 2 }))
    }

    async fn scale_model(&self, request: Request<api::ScaleModelRequest>) -> Answer<api::SubmitModelResponse> {
        let request = request.into_inner();
        self.0.lock().unwrap().calls.push(format!("scale {} {}", request.name, request.replicas));
        Ok(Response::new(api::SubmitModelResponse { uid: 5, version: 2, outcome: 3 }))
    }

    type ListModelsStream = Answers<api::ModelView>;
    async fn list_models(&self, request: Request<api::ListModelsRequest>) -> Answer<Self::ListModelsStream> {
        let request = request.into_inner();
        let wanted = |view: &api::ModelView| {
            request.name.as_ref().is_none_or(|name| *name == view.name) && (request.terminated || !view.deleted)
        };
        Ok(Response::new(listed(models().into_iter().filter(wanted).collect())))
    }

    type WatchModelsStream = Answers<api::ModelView>;
    async fn watch_models(&self, _: Request<api::ListModelsRequest>) -> Answer<Self::WatchModelsStream> {
        let told = self.0.lock().unwrap().watched.clone();
        let told = stream::iter(told.into_iter().map(Ok));
        Ok(Response::new(Box::pin(told.chain(stream::pending()))))
    }

    type ListServersStream = Answers<api::ServerView>;
    async fn list_servers(&self, request: Request<api::ListServersRequest>) -> Answer<Self::ListServersStream> {
        let replica = |index: u32, state: &str| api::ReplicaView {
            index,
            state: state.into(),
            capacity: 4 << 30,
            registered: 3 << 29,
            resident: 1 << 30,
            overcommit_percent: 10,
            copies: 3,
            copies_resident: 2,
            door: "10.0.0.7:9500".into(),
            since: at(1_000_000_000 - 7300),
            ..Default::default()
        };
        let mut silent = replica(1, "Unknown");
        silent.reason = "no word for 12 s".into();
        let server = api::ServerView {
            name: "mlserver".into(),
            owner: "file".into(),
            expected: 2,
            replicas: vec![replica(0, "Available"), silent],
            capabilities: vec!["mlserver".into(), "sklearn".into()],
            runtime: "mlserver".into(),
            removing: false,
            conditions: vec!["mlserver-1 is silent".into()],
        };
        let wanted = request.into_inner().name.is_none_or(|name| name == server.name);
        Ok(Response::new(listed(if wanted { vec![server] } else { vec![] })))
    }

    type WatchServersStream = Answers<api::ServerView>;
    async fn watch_servers(&self, request: Request<api::ListServersRequest>) -> Answer<Self::WatchServersStream> {
        self.list_servers(request).await
    }

    type DrainReplicaStream = Answers<api::DrainProgress>;
    async fn drain_replica(&self, request: Request<api::DrainReplicaRequest>) -> Answer<Self::DrainReplicaStream> {
        let request = request.into_inner();
        self.0.lock().unwrap().calls.push(format!("drain {} {:?}", request.server, request.replica));
        let step = |left, moved, done| api::DrainProgress { left, moved, done, stuck: vec![] };
        let mut steps = vec![step(2, 0, false), step(1, 1, false)];
        if request.replica == Some(1) {
            let stuck = vec!["huge: no other replica has 64 GiB free".to_owned()];
            steps.push(api::DrainProgress { left: 1, moved: 1, stuck, done: true });
        } else {
            steps.push(step(0, 2, true));
        }
        Ok(Response::new(listed(steps)))
    }

    async fn cordon_replica(&self, request: Request<api::CordonReplicaRequest>) -> Answer<api::CordonReplicaResponse> {
        let request = request.into_inner();
        self.0.lock().unwrap().calls.push(format!("cordon {} {:?} {}", request.server, request.replica, request.undo));
        Ok(Response::new(api::CordonReplicaResponse { replicas: 1 }))
    }

    type EventsStream = Answers<api::Event>;
    async fn events(&self, request: Request<api::EventsRequest>) -> Answer<Self::EventsStream> {
        let event = |sequence, seconds, kind: &str, message: &str| api::Event {
            sequence,
            time: at(seconds),
            subject: "model iris".into(),
            kind: kind.into(),
            message: message.into(),
            data: "{}".into(),
        };
        let events = if request.into_inner().model == "quiet" {
            vec![]
        } else {
            vec![
                event(1, 1_000_000_000, "Created", "version 1, 1 copy wanted"),
                event(2, 1_000_000_001, "Placed", "version 1 on mlserver-0: best fit"),
                event(3, 1_000_000_002, "Available", "version 1 on mlserver-0"),
            ]
        };
        Ok(Response::new(listed(events)))
    }

    async fn explain(&self, request: Request<api::ExplainRequest>) -> Answer<api::ExplainResponse> {
        let name = request.into_inner().model;
        let text = format!("{name} version 1 is on mlserver-0\n  memory fits: 100 KiB of 2.5 GiB free\n");
        Ok(Response::new(api::ExplainResponse { text, data: r#"{"z":1,"a":[]}"#.into() }))
    }

    async fn inspect(&self, _: Request<api::InspectRequest>) -> Answer<api::InspectResponse> {
        Ok(Response::new(api::InspectResponse { data: r#"{"placement":{"queue":0}}"#.into() }))
    }
}

macro_rules! unary_unimplemented {
    ($($method:ident($request:ident) -> $response:ident),* $(,)?) => {
        $(fn $method<'a, 'b>(&'a self, _: Request<seldon::$request>) -> Later<'b, seldon::$response>
        where
            'a: 'b,
            Self: 'b,
        {
            Box::pin(async { Err(Status::unimplemented(stringify!($method))) })
        })*
    };
}
macro_rules! stream_unimplemented {
    ($($method:ident($request:ident) -> $stream:ident<$response:ident>),* $(,)?) => {
        $(type $stream = Answers<seldon::$response>;
        fn $method<'a, 'b>(&'a self, _: Request<seldon::$request>) -> Later<'b, Self::$stream>
        where
            'a: 'b,
            Self: 'b,
        {
            Box::pin(async { Err(Status::unimplemented(stringify!($method))) })
        })*
    };
}

#[tonic::async_trait]
impl scheduler_server::Scheduler for Fake {
    async fn server_notify(
        &self,
        request: Request<seldon::ServerNotifyRequest>,
    ) -> Answer<seldon::ServerNotifyResponse> {
        for server in request.into_inner().servers {
            let call = format!("notify {} {}", server.name, server.expected_replicas);
            self.0.lock().unwrap().calls.push(call);
        }
        Ok(Response::new(seldon::ServerNotifyResponse {}))
    }

    async fn unload_model(&self, request: Request<seldon::UnloadModelRequest>) -> Answer<seldon::UnloadModelResponse> {
        let name = request.into_inner().model.unwrap_or_default().name;
        if name == "unknown" {
            return Err(Status::failed_precondition("there is no model unknown"));
        }
        self.0.lock().unwrap().calls.push(format!("unload {name}"));
        Ok(Response::new(seldon::UnloadModelResponse {}))
    }

    type ModelStatusStream = Answers<seldon::ModelStatusResponse>;
    async fn model_status(&self, request: Request<seldon::ModelStatusRequest>) -> Answer<Self::ModelStatusStream> {
        let name = request.into_inner().model.map_or_else(|| "iris".to_owned(), |model| model.name);
        if name != "iris" {
            return Err(Status::failed_precondition(format!("Failed to find model {name}")));
        }
        let model = seldon::Model {
            meta: Some(seldon::MetaData { name: name.clone(), ..Default::default() }),
            model_spec: Some(seldon::ModelSpec {
                uri: "gs://bucket/iris/2".into(),
                requirements: vec!["sklearn".into()],
                memory_bytes: Some(102_400),
                ..Default::default()
            }),
            deployment_spec: Some(seldon::DeploymentSpec { replicas: 2, ..Default::default() }),
            ..Default::default()
        };
        let state = seldon::ModelStatus {
            state: seldon::model_status::ModelState::ModelAvailable.into(),
            available_replicas: 1,
            last_change_timestamp: at(1_000_000_000),
            ..Default::default()
        };
        let versions = vec![seldon::ModelVersionStatus {
            version: 2,
            server_name: "mlserver".into(),
            state: Some(state),
            model_defn: Some(model),
            ..Default::default()
        }];
        let status = seldon::ModelStatusResponse { model_name: name, versions, ..Default::default() };
        Ok(Response::new(listed(vec![status])))
    }

    type ServerStatusStream = Answers<seldon::ServerStatusResponse>;
    async fn server_status(&self, _: Request<seldon::ServerStatusRequest>) -> Answer<Self::ServerStatusStream> {
        let resources = vec![seldon::ServerReplicaResources { total_memory_bytes: 4 << 30, ..Default::default() }];
        let status = seldon::ServerStatusResponse {
            server_name: "mlserver".into(),
            resources,
            expected_replicas: 2,
            r#type: 1,
            ..Default::default()
        };
        Ok(Response::new(listed(vec![status])))
    }

    unary_unimplemented!(
        load_model(LoadModelRequest) -> LoadModelResponse,
        load_pipeline(LoadPipelineRequest) -> LoadPipelineResponse,
        unload_pipeline(UnloadPipelineRequest) -> UnloadPipelineResponse,
        start_experiment(StartExperimentRequest) -> StartExperimentResponse,
        stop_experiment(StopExperimentRequest) -> StopExperimentResponse,
        scheduler_status(SchedulerStatusRequest) -> SchedulerStatusResponse,
        model_status_event(ModelUpdateStatusMessage) -> ModelUpdateStatusResponse,
        pipeline_status_event(PipelineUpdateStatusMessage) -> PipelineUpdateStatusResponse,
    );
    stream_unimplemented!(
        pipeline_status(PipelineStatusRequest) -> PipelineStatusStream<PipelineStatusResponse>,
        experiment_status(ExperimentStatusRequest) -> ExperimentStatusStream<ExperimentStatusResponse>,
        subscribe_server_status(ServerSubscriptionRequest) -> SubscribeServerStatusStream<ServerStatusResponse>,
        subscribe_model_status(ModelSubscriptionRequest) -> SubscribeModelStatusStream<ModelStatusResponse>,
        subscribe_experiment_status(ExperimentSubscriptionRequest) -> SubscribeExperimentStatusStream<ExperimentStatusResponse>,
        subscribe_pipeline_status(PipelineSubscriptionRequest) -> SubscribePipelineStatusStream<PipelineStatusResponse>,
        subscribe_control_plane(ControlPlaneSubscriptionRequest) -> SubscribeControlPlaneStream<ControlPlaneResponse>,
    );
}

macro_rules! oip_unimplemented {
    ($($method:ident($request:ident) -> $response:ident),* $(,)?) => {
        $(fn $method<'a, 'b>(&'a self, _: Request<inference::$request>) -> Later<'b, inference::$response>
        where
            'a: 'b,
            Self: 'b,
        {
            Box::pin(async { Err(Status::unimplemented(stringify!($method))) })
        })*
    };
}

#[tonic::async_trait]
impl oip::GrpcInferenceService for Fake {
    async fn model_infer(
        &self,
        request: Request<inference::ModelInferRequest>,
    ) -> Answer<inference::ModelInferResponse> {
        let header = request.metadata().get("seldon-model").map(|value| value.to_str().unwrap().to_owned());
        let request = request.into_inner();
        if header.as_deref() != Some(request.model_name.as_str()) {
            return Err(Status::invalid_argument("the header and the message name different models"));
        }
        if request.model_name != "iris" {
            return Err(Status::unimplemented(format!("there is no model {}", request.model_name)));
        }
        let given = request.inputs[0].contents.clone().unwrap_or_default().fp32_contents;
        let output = inference::model_infer_response::InferOutputTensor {
            name: "predict".into(),
            datatype: "FP32".into(),
            shape: vec![1],
            ..Default::default()
        };
        let answer = inference::ModelInferResponse {
            model_name: "iris_1".into(),
            model_version: "1".into(),
            outputs: vec![output],
            raw_output_contents: vec![given.iter().sum::<f32>().to_le_bytes().to_vec().into()],
            ..Default::default()
        };
        let mut answer = Response::new(answer);
        answer.metadata_mut().insert("x-seldon-route", ":iris_1:".parse().unwrap());
        Ok(answer)
    }

    type ModelStreamInferStream = Answers<inference::ModelStreamInferResponse>;
    async fn model_stream_infer(
        &self,
        _: Request<tonic::Streaming<inference::ModelInferRequest>>,
    ) -> Answer<Self::ModelStreamInferStream> {
        Err(Status::unimplemented("model_stream_infer"))
    }

    oip_unimplemented!(
        server_live(ServerLiveRequest) -> ServerLiveResponse,
        server_ready(ServerReadyRequest) -> ServerReadyResponse,
        model_ready(ModelReadyRequest) -> ModelReadyResponse,
        server_metadata(ServerMetadataRequest) -> ServerMetadataResponse,
        model_metadata(ModelMetadataRequest) -> ModelMetadataResponse,
        repository_index(RepositoryIndexRequest) -> RepositoryIndexResponse,
        repository_model_load(RepositoryModelLoadRequest) -> RepositoryModelLoadResponse,
        repository_model_unload(RepositoryModelUnloadRequest) -> RepositoryModelUnloadResponse,
    );
}

/// Serves the fake; the address, and what ends it when dropped.
pub(crate) async fn serve(fake: &Fake) -> (String, tokio::task::JoinSet<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let router = tonic::transport::Server::builder()
        .add_service(wharf_server::WharfServer::new(fake.clone()))
        .add_service(scheduler_server::SchedulerServer::new(fake.clone()))
        .add_service(oip::GrpcInferenceServiceServer::new(fake.clone()));
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        drop(router.serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)).await);
    });
    (address, tasks)
}

/// Serves REST inference: `iris` answers by turns as version 1 and 2, or as it is told to by the sticky
/// header; `busy` is full; everything else is unknown.
pub(crate) async fn serve_rest() -> (String, tokio::task::JoinSet<()>) {
    use axum::{
        extract::Path,
        http::{HeaderMap, StatusCode},
        response::IntoResponse as _,
        routing,
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let count = Arc::new(Mutex::new(0_u32));
    let infer = move |Path(model): Path<String>, headers: HeaderMap, body: String| async move {
        assert_eq!(headers["seldon-model"], model.as_str());
        match model.as_str() {
            "iris" => {
                let route = headers.get("x-seldon-route").map(|route| route.to_str().unwrap().to_owned());
                let route = route.unwrap_or_else(|| {
                    let mut count = count.lock().unwrap();
                    *count += 1;
                    format!(":iris_{}:", 2 - *count % 2)
                });
                let name = route.trim_matches(':').to_owned();
                let text = format!(r#"{{"model_name":"{name}","outputs":[{{"name":"echo","data":{body}}}]}}"#);
                ([("x-seldon-route", route)], text).into_response()
            }
            "busy" => {
                let text = r#"{"error":"every copy is being brought back"}"#;
                (StatusCode::SERVICE_UNAVAILABLE, [("retry-after", "3")], text).into_response()
            }
            other => (StatusCode::NOT_FOUND, format!(r#"{{"error":"there is no model {other}"}}"#)).into_response(),
        }
    };
    let metadata = |Path(model): Path<String>| async move {
        format!(r#"{{"name":"{model}_1","versions":[],"platform":"","inputs":[]}}"#)
    };
    let router = axum::Router::new()
        .route("/v2/models/{model}/infer", routing::post(infer))
        .route("/v2/models/{model}", routing::get(metadata));
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move { drop(axum::serve(listener, router).await) });
    (address, tasks)
}
