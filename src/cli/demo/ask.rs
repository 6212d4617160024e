//! Asking a model by REST and by gRPC, once: a request is sent one time only, and what became of it is known
//! exactly.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};

use super::samples::Case;
use crate::rpc::{
    client::{ClientError, Connection, MAX_MESSAGE},
    proto::inference::ModelInferRequest,
};

/// Says which version answered: `:iris_2:`.
const ROUTE: &str = "x-seldon-route";
/// The longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// This version gave its answer.
    Right(u32),
    /// An answer came that is not that of the version that gave it.
    Wrong(String),
    /// No answer came: `REST 503`, `gRPC UNAVAILABLE`, and what was said about it.
    Failed { kind: String, said: String },
}

impl Outcome {
    pub(super) const fn is_right(&self) -> bool {
        matches!(self, Self::Right(_))
    }

    fn failed(kind: &str, said: impl Into<String>) -> Self {
        Self::Failed { kind: kind.to_owned(), said: said.into() }
    }
}

/// A model, and what each version of it is to answer.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) model: String,
    pub(super) versions: BTreeMap<u32, Arc<Case>>,
}

impl Target {
    pub(super) fn new(model: &str, version: u32, case: Arc<Case>) -> Self {
        Self { model: model.to_owned(), versions: BTreeMap::from([(version, case)]) }
    }

    /// The request: the same for every version.
    fn case(&self) -> Option<&Arc<Case>> {
        self.versions.values().next()
    }

    /// Compares an answer with that of the version which gave it, as its route says.
    fn judge(&self, route: Option<&str>, judge: impl Fn(&Case) -> Result<(), String>) -> Outcome {
        let version = route.and_then(|route| {
            let served = route.trim_matches(':').strip_prefix(&self.model)?.strip_prefix('_')?;
            served.parse::<u32>().ok()
        });
        let Some(version) = version else {
            return Outcome::Wrong(format!("{}: the route is {route:?}", self.model));
        };
        match self.versions.get(&version).map(|case| judge(case)) {
            Some(Ok(())) => Outcome::Right(version),
            Some(Err(wrong)) => Outcome::Wrong(format!("{} version {version}: {wrong}", self.model)),
            None => Outcome::Wrong(format!("{}: nobody submitted a version {version}", self.model)),
        }
    }
}

/// Asks a gateway. Clones share their connections.
#[derive(Clone, Debug)]
pub(super) struct Asker {
    http: Client<HttpConnector, Full<Bytes>>,
    gateway: String,
}

impl Asker {
    pub(super) fn new(gateway: &str) -> Self {
        // A request that is sent again behind our back could not be counted.
        let http = Client::builder(TokioExecutor::new()).retry_canceled_requests(false).build_http();
        Self { http, gateway: gateway.to_owned() }
    }

    /// Asks by REST.
    pub(super) async fn rest(&self, target: &Target) -> Outcome {
        let Some(case) = target.case() else { return Outcome::failed("REST", "nothing to ask") };
        let url = format!("http://{}/v2/models/{}/infer", self.gateway, target.model);
        let request = Request::post(url).header(header::CONTENT_TYPE, "application/json").body(Full::new(case.rest()));
        let request = match request {
            Ok(request) => request,
            Err(error) => return Outcome::failed("REST", error.to_string()),
        };
        match self.exchange(request).await {
            Err(cause) => Outcome::failed(&format!("REST {cause}"), ""),
            Ok((status, _, body)) if status != StatusCode::OK => {
                Outcome::failed(&format!("REST {}", status.as_u16()), String::from_utf8_lossy(&body))
            }
            Ok((_, route, body)) => target.judge(route.as_deref(), |case| case.judge_rest(&body)),
        }
    }

    /// The status and body of a page.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) async fn get(&self, url: &str) -> Result<(StatusCode, Bytes), String> {
        let request = Request::get(url).body(Full::default()).map_err(|error| error.to_string())?;
        self.exchange(request).await.map(|(status, _, body)| (status, body))
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Option<String>, Bytes), String> {
        let exchange = async {
            let response = self.http.request(request).await.map_err(|error| {
                let kind = if error.is_connect() { "can't connect" } else { "connection lost" };
                kind.to_owned()
            })?;
            let (parts, body) = response.into_parts();
            let body = Limited::new(body, MAX_MESSAGE).collect().await.map_err(|_| "answer cut off".to_owned())?;
            let route = parts.headers.get(ROUTE).and_then(|route| route.to_str().ok()).map(str::to_owned);
            Ok((parts.status, route, body.to_bytes()))
        };
        tokio::time::timeout(PATIENCE, exchange).await.unwrap_or_else(|_| Err("no answer in time".to_owned()))
    }

    /// A connection for gRPC.
    ///
    /// # Errors
    /// When the gateway can't be reached.
    pub(super) async fn connect(&self) -> Result<Connection, ClientError> {
        Connection::open(&self.gateway, None, PATIENCE).await
    }
}

/// The gRPC request for a target.
///
/// # Errors
/// When there is none.
pub(super) fn grpc_request(target: &Target) -> anyhow::Result<ModelInferRequest> {
    target.case().ok_or_else(|| anyhow::anyhow!("nothing to ask"))?.grpc(&target.model)
}

/// Asks by gRPC.
pub(super) async fn grpc(connection: &Connection, target: &Target, request: ModelInferRequest) -> Outcome {
    let mut client = connection.inference();
    let mut code = None;
    let call = async {
        let answer = client.model_infer(request).await;
        code = answer.as_ref().err().map(tonic::Status::code);
        answer
    };
    match connection.call(call).await {
        Ok(answer) => {
            let route = answer.metadata().get(ROUTE).and_then(|route| route.to_str().ok()).map(str::to_owned);
            let answer = answer.into_inner();
            target.judge(route.as_deref(), |case| case.judge_grpc(&answer))
        }
        Err(ClientError::TimedOut { .. }) => Outcome::failed("gRPC no answer in time", ""),
        Err(error) => {
            let kind = format!("gRPC {}", code.map_or("lost", crate::rpc::client::code_name));
            Outcome::failed(&kind, error.to_string())
        }
    }
}
