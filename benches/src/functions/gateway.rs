//! A request within the gateway: from its head to the last piece of its answer, between two calls of a function.
//!
//! The gateway is the whole one, with the metrics of the product. The door is in the same process and answers at once.
//! Neither HTTP's text and frames nor sockets are in it.

use std::{convert::Infallible, sync::Arc};

use anyhow::ensure;
use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{CONTENT_LENGTH, CONTENT_TYPE},
    request::Parts,
};
use http_body_util::{BodyExt as _, Full};
use wharf::{
    domain::{
        names::{ModelName, ReplicaId, ServerName},
        routes::{Absence, Endpoint, Epoch, Route, Snapshot, Target},
        version::{Generation, Uid, Version},
    },
    forward::{
        Body, ClientOptions, Connections, RESIDENCY, Registration, Request, Response, TcpNetwork, Upstream,
        UpstreamError,
    },
    gateway::{Gateway, Options},
    ports::{Network, SystemClock},
    telemetry::metrics::{Metrics, Protocol, Role},
};

use super::Work;
use crate::{
    bodies,
    models::{self, Random},
};

/// As many models at most are asked, one after another.
const ASKED: usize = 1024;
/// Bytes of a request's body, or of its tensor.
pub(super) const BODY: usize = 200;

/// A gateway with routes, which tells how long its requests take.
#[derive(Debug)]
pub(super) struct Routed {
    pub(super) gateway: Arc<Gateway>,
    doors: Arc<Connections>,
}

impl Routed {
    /// With routes of `count` models, each with one copy behind `door`, which is reached over `network`.
    pub(super) fn new(count: usize, door: &str, network: Arc<dyn Network>) -> anyhow::Result<Self> {
        let clock = Arc::new(SystemClock::new());
        let doors = Connections::new(network, Arc::clone(&clock) as _, ClientOptions::default());
        let gateway = Gateway::new(Options::default(), Arc::clone(&doors), clock, 7);
        let metrics = Metrics::new(&[Role::Gateway], false);
        let seconds = [Protocol::Rest, Protocol::Grpc].map(|protocol| metrics.gateway.request_seconds(protocol));
        drop(gateway.metrics().seconds.set(seconds));
        let replica = ReplicaId::new(ServerName::new("bench")?, 0);
        let route = |number: usize| {
            let endpoint = Endpoint {
                generation: Generation { uid: Uid(number as u64 + 1), version: Version(1), number: 1 },
                replica: replica.clone(),
                door: door.to_owned(),
                resident: true,
            };
            let target = Target { version: Version(1), weight: 100, endpoints: vec![endpoint] };
            let model = ModelName::new(&models::name(number))?;
            anyhow::Ok(Route { model, targets: vec![target], absence: Absence::default() })
        };
        let routes = (0..count).map(route).collect::<anyhow::Result<_>>()?;
        gateway.table().replace(Snapshot { epoch: Epoch(1), routes });
        Ok(Self { gateway, doors })
    }
}

/// Names of models that are asked, out of `count`.
pub(super) fn names(count: usize) -> Vec<String> {
    let mut random = Random(count as u64);
    (0..ASKED.min(count)).map(|_| models::name(random.below(count as u64) as usize)).collect()
}

/// A door that answers with what it was asked, at once.
#[derive(Debug)]
struct AtOnce;

impl Upstream for AtOnce {
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        async move {
            let (head, mut body) = request.into_parts();
            let mut asked = Bytes::new();
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|error| failed(&error.to_string()))?;
                asked = frame.into_data().map_err(|_| failed("trailers came"))?;
            }
            Ok(answer(&head.headers, asked))
        }
        .boxed()
    }
}

fn failed(message: &str) -> UpstreamError {
    UpstreamError { started: true, timed_out: false, message: message.to_owned() }
}

fn answer(asked: &HeaderMap, body: Bytes) -> Response {
    let length = body.len();
    let kind = asked.get(CONTENT_TYPE).cloned().unwrap_or(HeaderValue::from_static("application/json"));
    let mut response = if kind == GRPC {
        let status = HeaderMap::from_iter([(HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
        let status = std::future::ready(Some(Ok::<_, Infallible>(status)));
        Response::new(Body::new(Full::new(body).with_trailers(status)))
    } else {
        let mut response = Response::new(Body::from(body));
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
        response
    };
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response.headers_mut().insert(RESIDENCY, HeaderValue::from_static("resident"));
    response
}

const GRPC: &str = "application/grpc";

/// REST requests to `count` models.
pub(super) fn rest(count: usize) -> anyhow::Result<Work> {
    let body = bodies::json(BODY);
    let asked = names(count).into_iter().map(|model| {
        let request = http::Request::post(format!("/v2/models/{model}/infer"))
            .header("host", "bench")
            .header(CONTENT_TYPE, "application/json")
            .header("seldon-model", &model)
            .header(CONTENT_LENGTH, body.len())
            .body(())?;
        anyhow::Ok((request.into_parts().0, body.clone()))
    });
    passed(count, asked.collect::<anyhow::Result<_>>()?)
}

/// gRPC requests to `count` models.
pub(super) fn grpc(count: usize) -> anyhow::Result<Work> {
    let asked = names(count).into_iter().map(|model| {
        let request = http::Request::post("http://bench/inference.GRPCInferenceService/ModelInfer")
            .header(CONTENT_TYPE, GRPC)
            .header("te", "trailers")
            .header("seldon-model", &model)
            .body(())?;
        anyhow::Ok((request.into_parts().0, bodies::message(&model, BODY)?))
    });
    passed(count, asked.collect::<anyhow::Result<_>>()?)
}

fn passed(count: usize, asked: Vec<(Parts, Bytes)>) -> anyhow::Result<Work> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let routed = Routed::new(count, "inproc:bench", Arc::new(TcpNetwork))?;
    let door = routed.doors.register("bench", Arc::new(AtOnce));
    let mut turn = 0;
    Ok(Box::new(move |times| {
        // It is open as long as it is held.
        let _door: &Registration = &door;
        runtime.block_on(async {
            for _ in 0..times {
                let (head, body) = asked[turn % asked.len()].clone();
                turn += 1;
                read(routed.gateway.call(Request::from_parts(head, body.into())).await?).await?;
            }
            Ok(())
        })
    }))
}

async fn read(response: Response) -> anyhow::Result<()> {
    ensure!(response.status() == 200, "the answer is {}", response.status());
    ensure!(response.headers().get("grpc-status").is_none(), "the answer has no message: {:?}", response.headers());
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        frame.map_err(|error| anyhow::anyhow!("{error}"))?;
    }
    Ok(())
}
