//! gRPC end to end: a client, the gateway, a door that renames, an inference server, each behind a socket.

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt as _, future::BoxFuture};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request as Call, Response as Reply, Status, Streaming};
use wharf::{
    forward::{self, Request, Response, Upstream, UpstreamError},
    rpc::proto::inference::{
        self as oip, ModelInferRequest, ModelInferResponse, ModelStreamInferResponse,
        grpc_inference_service_client::GrpcInferenceServiceClient,
        grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer},
    },
};

use crate::harness::{PATIENCE, World, model, version};

/// Answers with the name and tensor that it was asked with.
struct Model;

fn answer(request: ModelInferRequest) -> ModelInferResponse {
    ModelInferResponse {
        model_name: request.model_name,
        model_version: request.model_version,
        id: request.id,
        raw_output_contents: request.raw_input_contents,
        ..Default::default()
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for Model {
    type ModelStreamInferStream = Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

    async fn model_infer(&self, call: Call<ModelInferRequest>) -> Result<Reply<ModelInferResponse>, Status> {
        if call.get_ref().id == "fail" {
            return Err(Status::data_loss("the tensor is broken"));
        }
        Ok(Reply::new(answer(call.into_inner())))
    }

    async fn model_stream_infer(
        &self,
        call: Call<Streaming<ModelInferRequest>>,
    ) -> Result<Reply<Self::ModelStreamInferStream>, Status> {
        let answers = call.into_inner().map(|request| {
            Ok(ModelStreamInferResponse { error_message: String::new(), infer_response: Some(answer(request?)) })
        });
        Ok(Reply::new(Box::pin(answers)))
    }

    async fn model_ready(&self, call: Call<oip::ModelReadyRequest>) -> Result<Reply<oip::ModelReadyResponse>, Status> {
        Ok(Reply::new(oip::ModelReadyResponse {
            ready: call.get_ref().name == "iris_2" && call.get_ref().version.is_empty(),
        }))
    }

    async fn model_metadata(
        &self,
        call: Call<oip::ModelMetadataRequest>,
    ) -> Result<Reply<oip::ModelMetadataResponse>, Status> {
        Ok(Reply::new(oip::ModelMetadataResponse { name: call.into_inner().name, ..Default::default() }))
    }

    async fn server_live(&self, _: Call<oip::ServerLiveRequest>) -> Result<Reply<oip::ServerLiveResponse>, Status> {
        Err(Status::internal("the gateway answers this"))
    }

    async fn server_ready(&self, _: Call<oip::ServerReadyRequest>) -> Result<Reply<oip::ServerReadyResponse>, Status> {
        Err(Status::internal("the gateway answers this"))
    }

    async fn server_metadata(
        &self,
        _: Call<oip::ServerMetadataRequest>,
    ) -> Result<Reply<oip::ServerMetadataResponse>, Status> {
        Err(Status::internal("the gateway answers this"))
    }

    async fn repository_index(
        &self,
        _: Call<oip::RepositoryIndexRequest>,
    ) -> Result<Reply<oip::RepositoryIndexResponse>, Status> {
        Err(Status::internal("the gateway answers this"))
    }

    async fn repository_model_load(
        &self,
        _: Call<oip::RepositoryModelLoadRequest>,
    ) -> Result<Reply<oip::RepositoryModelLoadResponse>, Status> {
        Err(Status::internal("the gateway answers this"))
    }

    async fn repository_model_unload(
        &self,
        _: Call<oip::RepositoryModelUnloadRequest>,
    ) -> Result<Reply<oip::RepositoryModelUnloadResponse>, Status> {
        Err(Status::internal("the gateway answers this"))
    }
}

/// A door that holds everything and renames.
#[derive(Debug)]
struct Renaming {
    server: Arc<dyn Upstream>,
}

impl Upstream for Renaming {
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        Box::pin(async move {
            let served = request.headers()["seldon-internal-model"].to_str().expect("text").to_owned();
            match forward::rename(request, &served) {
                Ok(request) => self.server.call(request).await,
                Err(error) => Ok(forward::error_response(true, error.code(), &error.to_string(), None)),
            }
        })
    }
}

/// The whole chain; the client is connected.
async fn chain() -> (World, GrpcInferenceServiceClient<tonic::transport::Channel>) {
    let mut world = World::new();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let server = listener.local_addr().expect("bound").to_string();
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(GrpcInferenceServiceServer::new(Model).max_decoding_message_size(64 << 20))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    let server = world.doors.get(&server).expect("an address");
    let door = world.remote(Arc::new(Renaming { server })).await;
    world.routes(vec![model("iris", vec![version(2, 1, &[&door])])]);
    let address = world.open().await;
    let client = GrpcInferenceServiceClient::connect(format!("http://{address}")).await.expect("connected");
    (world, client.max_decoding_message_size(64 << 20))
}

fn request(id: &str, bytes: usize) -> ModelInferRequest {
    ModelInferRequest {
        model_name: "iris".into(),
        model_version: String::new(),
        id: id.into(),
        raw_input_contents: vec![(0..bytes).map(|n| n as u8).collect::<Vec<_>>().into()],
        ..Default::default()
    }
}

#[tokio::test]
async fn a_unary_call_reaches_the_model_under_its_served_name() {
    let (world, mut client) = chain().await;
    for bytes in [0, 10, 5_000, 300_000, 20_000_000] {
        let sent = request("a", bytes);
        let reply = client.model_infer(sent.clone()).await.expect("an answer");
        assert_eq!(reply.metadata().get("x-seldon-route").expect("there"), ":iris_2:");
        let reply = reply.into_inner();
        assert_eq!((reply.model_name.as_str(), reply.model_version.as_str()), ("iris_2", ""));
        assert!(reply.raw_output_contents == sent.raw_input_contents, "{bytes} bytes came back changed");
    }
    let status = client.model_infer(request("fail", 10)).await.expect_err("the model fails");
    assert_eq!((status.code(), status.message()), (tonic::Code::DataLoss, "the tensor is broken"));
    assert!(
        client
            .model_ready(oip::ModelReadyRequest { name: "iris".into(), version: "2".into() })
            .await
            .expect("an answer")
            .into_inner()
            .ready
    );
    let metadata = client.model_metadata(oip::ModelMetadataRequest { name: "iris".into(), version: String::new() });
    assert_eq!(metadata.await.expect("an answer").into_inner().name, "iris_2");
    assert_eq!(world.metric(|m| &m.grpc.ok), 7);
    assert_eq!(world.metric(|m| &m.grpc.server_error), 1);
}

#[tokio::test]
async fn a_stream_goes_both_ways_message_by_message() {
    let (_world, mut client) = chain().await;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    sender.send(request("0", 100)).await.expect("open");
    let mut answers = client.model_stream_infer(ReceiverStream::new(receiver)).await.expect("begun").into_inner();
    for turn in 0..50 {
        let next =
            tokio::time::timeout(PATIENCE, answers.message()).await.expect("in time").expect("good").expect("more");
        let answer = next.infer_response.expect("an answer");
        assert_eq!((answer.model_name.as_str(), answer.id), ("iris_2", turn.to_string()));
        // Only now is the next one asked.
        sender.send(request(&(turn + 1).to_string(), turn * 500)).await.expect("open");
    }
    drop(sender);
    assert!(answers.message().await.expect("good").is_some());
    assert!(answers.message().await.expect("good").is_none());
}

#[tokio::test]
async fn the_gateway_answers_for_itself_and_refuses_in_grpcs_words() {
    let (_world, mut client) = chain().await;
    assert!(client.server_live(oip::ServerLiveRequest {}).await.expect("an answer").into_inner().live);
    assert!(client.server_ready(oip::ServerReadyRequest {}).await.expect("an answer").into_inner().ready);
    assert_eq!(
        client.server_metadata(oip::ServerMetadataRequest {}).await.expect("an answer").into_inner().name,
        "wharf"
    );
    let status = client.repository_index(oip::RepositoryIndexRequest::default()).await.expect_err("not here");
    assert_eq!(status.code(), tonic::Code::Unimplemented);
    let unknown = ModelInferRequest { model_name: "irsi".into(), ..Default::default() };
    let status = client.model_infer(unknown).await.expect_err("unknown");
    assert_eq!(status.code(), tonic::Code::NotFound);
    assert!(status.message().contains("did you mean \"iris\""), "{status:?}");
    let mut named = Call::new(ModelInferRequest { model_name: "nobody".into(), ..Default::default() });
    named.metadata_mut().insert("seldon-model", "iris".parse().expect("valid"));
    assert_eq!(client.model_infer(named).await.expect("the header wins").into_inner().model_name, "iris_2");
    let status = client
        .send_compressed(tonic::codec::CompressionEncoding::Gzip)
        .model_infer(request("a", 10_000))
        .await
        .expect_err("compressed");
    assert_eq!(status.code(), tonic::Code::Unimplemented);
    assert!(status.message().contains("uncompressed"), "{status:?}");
}

#[tokio::test]
async fn many_calls_share_few_connections() {
    let (world, client) = chain().await;
    let calls = (0..300).map(|n| {
        let mut client = client.clone();
        async move { client.model_infer(request(&n.to_string(), 2_000)).await.expect("an answer").into_inner().id }
    });
    let ids = tokio::time::timeout(PATIENCE, futures::future::join_all(calls)).await.expect("in time");
    assert_eq!(ids, (0..300).map(|n| n.to_string()).collect::<Vec<_>>());
    assert_eq!(world.metric(|m| &m.retries), 0);
}
