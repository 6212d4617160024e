//! Commands that speak to a gateway.

use std::{collections::BTreeMap, io::Read, path::Path, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tonic::metadata::{KeyAndValueRef, MetadataMap};

use super::{CALL, gateway_address, tensors};
use crate::{
    cli::{
        Context,
        args::{self, Infer, Mode},
        failure::{Failure, Peer},
        json,
        output::{clean, clip},
    },
    domain::names::ModelName,
    rpc::{
        client::{ClientError, Connection, MAX_MESSAGE, code_name, root_cause},
        proto::inference::ModelInferRequest,
    },
};

/// Says which version answered; sent back, it asks for the same one.
const ROUTE: &str = "x-seldon-route";
/// Names the model beside the path.
const MODEL: &str = "seldon-model";
/// The longest error message of a server that is shown, in characters.
const SHOWN: usize = 400;

/// `model infer`.
pub(super) async fn infer(context: &Context, stdin: Box<dyn Read + Send>, args: Infer) -> Result<(), Failure> {
    check_name(&args.name)?;
    let data = data(context, stdin, args.data.clone(), args.file.as_deref()).await?;
    if args.show_request {
        context.output.note(&data);
    }
    let patience = Duration::from_secs(args.request_timeout);
    let address = gateway_address(context, &args.gateway);
    let mut asker = match args.inference_mode {
        Mode::Rest => Asker::Rest(Box::new(Rest::new(&address, &args, data, patience)?)),
        Mode::Grpc => Asker::Grpc(Box::new(Grpc::new(&address, &args, &data, patience).await?)),
    };
    if args.iterations == 1 && args.seconds == 0 {
        return once(context, &mut asker, &args, &address).await;
    }
    many(context, &mut asker, &args).await
}

async fn once(context: &Context, asker: &mut Asker, args: &Infer, address: &str) -> Result<(), Failure> {
    let answer = asker.ask(context, args).await.map_err(|error| error.into_failure(&args.name, address))?;
    if args.show_response {
        context.output.data(&answer.text);
    }
    Ok(())
}

/// Asks one after another, and counts by the version that answered.
async fn many(context: &Context, asker: &mut Asker, args: &Infer) -> Result<(), Failure> {
    let mut answered: BTreeMap<String, u64> = BTreeMap::new();
    let mut failed: BTreeMap<String, u64> = BTreeMap::new();
    let mut lost = None;
    let end = (args.seconds > 0).then(|| Box::pin(tokio::time::sleep(Duration::from_secs(args.seconds))));
    let asking = async {
        let mut asked = 0;
        while args.seconds > 0 || asked < args.iterations {
            asked += 1;
            match asker.ask(context, args).await {
                Ok(answer) => *answered.entry(answer.route).or_default() += 1,
                Err(error) => {
                    *failed.entry(error.to_string()).or_default() += 1;
                    lost = if let Unanswered::Lost(error) = error { Some(error) } else { None };
                }
            }
        }
    };
    match end {
        None => asking.await,
        // What is on its way at the end is neither a success nor an error.
        Some(end) => drop(futures::future::select(std::pin::pin!(asking), end).await),
    }
    let counts = |map: &BTreeMap<String, u64>| {
        map.iter().map(|(key, count)| format!("{}:{count}", clean(key))).collect::<Vec<_>>().join(" ")
    };
    context.output.data(&format!("Success: map[{}]", counts(&answered)));
    if failed.is_empty() {
        return Ok(());
    }
    context.output.data(&format!("Errors: map[{}]", counts(&failed)));
    if let (true, Some(error)) = (answered.is_empty(), lost) {
        return Err(Failure::of(Peer::Gateway, error));
    }
    let (bad, good): (u64, u64) = (failed.values().sum(), answered.values().sum());
    Err(Failure::Failed(format!("{bad} of {} requests failed", bad + good)))
}

/// `model metadata`.
pub(super) async fn metadata(context: &Context, name: &str, at: &args::Gateway) -> Result<(), Failure> {
    check_name(name)?;
    let address = gateway_address(context, at);
    let mut headers = HeaderMap::new();
    headers.insert(HeaderName::from_static(MODEL), header_value(name)?);
    let call = HttpCall { address: &address, authority: at.authority.as_deref(), patience: CALL };
    let path = format!("/v2/models/{name}");
    let (_, body) = call
        .send(&client(), Method::GET, &path, headers, Bytes::new())
        .await
        .map_err(|error| error.into_failure(name, &address))?;
    context.output.data(&json::indent(&body).unwrap_or_else(|| clean(&body)));
    Ok(())
}

/// The request's text: as given, from a file, or from standard input.
async fn data(
    context: &Context,
    stdin: Box<dyn Read + Send>,
    given: Option<String>,
    file: Option<&Path>,
) -> Result<String, Failure> {
    let file = match (given, file) {
        (Some(data), _) if data != "-" => return Ok(data),
        (_, Some(file)) if file != Path::new("-") => Some(file.to_owned()),
        (None, None) if context.stdin => {
            return Err(Failure::Usage(
                "there is no request: give it as JSON, name a file with -f, or pipe it in".into(),
            ));
        }
        _ => None,
    };
    let name = file.as_ref().map_or_else(|| "standard input".to_owned(), |file| file.display().to_string());
    let read = tokio::task::spawn_blocking(move || -> std::io::Result<String> {
        let mut text = String::new();
        let mut input: Box<dyn Read> = match file {
            Some(file) => Box::new(std::fs::File::open(file)?),
            None => stdin,
        };
        let most = u64::try_from(MAX_MESSAGE).unwrap_or(u64::MAX);
        input.by_ref().take(most).read_to_string(&mut text)?;
        Ok(text)
    });
    let read = read.await.map_err(|error| Failure::Failed(format!("reading {name} stopped: {error}")))?;
    read.map_err(|error| Failure::Failed(format!("{name} can't be read: {}", root_cause(&error))))
}

/// A name goes into a path, so it must be one. An experiment's or a pipeline's has a known ending.
fn check_name(name: &str) -> Result<(), Failure> {
    let bare = name.strip_suffix(".experiment").or_else(|| name.strip_suffix(".pipeline")).unwrap_or(name);
    ModelName::new(bare).map(drop).map_err(|error| Failure::Usage(error.to_string()))
}

/// One answer.
struct Answer {
    /// Which version gave it: `:iris_1:`.
    route: String,
    /// What to show.
    text: String,
}

/// One question that got no answer.
#[derive(Debug)]
enum Unanswered {
    /// The gateway or the server said no.
    Refused { status: String, message: String },
    /// Nothing was said.
    Lost(ClientError),
    /// It was asked wrongly.
    Usage(String),
}

impl std::fmt::Display for Unanswered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused { status, message } if message.is_empty() => f.write_str(status),
            Self::Refused { status, message } => write!(f, "{status}: {message}"),
            Self::Lost(error) => error.fmt(f),
            Self::Usage(problem) => f.write_str(problem),
        }
    }
}

impl Unanswered {
    fn into_failure(self, model: &str, address: &str) -> Failure {
        match self {
            Self::Refused { .. } => Failure::Failed(format!("{model} at {address} answered {self}")),
            Self::Lost(error) => Failure::of(Peer::Gateway, error),
            Self::Usage(problem) => Failure::Usage(problem),
        }
    }
}

enum Asker {
    Rest(Box<Rest>),
    Grpc(Box<Grpc>),
}

impl Asker {
    async fn ask(&mut self, context: &Context, args: &Infer) -> Result<Answer, Unanswered> {
        match self {
            Self::Rest(rest) => rest.ask(context, args).await,
            Self::Grpc(grpc) => grpc.ask(context, args).await,
        }
    }
}

type HttpClient = Client<HttpConnector, Full<Bytes>>;

fn client() -> HttpClient {
    Client::builder(TokioExecutor::new()).build_http()
}

/// Asks by REST, over one kept connection.
struct Rest {
    client: HttpClient,
    address: String,
    authority: Option<String>,
    path: String,
    headers: HeaderMap,
    body: Bytes,
    patience: Duration,
}

impl Rest {
    fn new(address: &str, args: &Infer, data: String, patience: Duration) -> Result<Self, Failure> {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(HeaderName::from_static(MODEL), header_value(&args.name)?);
        for (name, value) in &args.header {
            let key: HeaderName = name.parse().map_err(|_| bad_header(name))?;
            headers.append(key, header_value(value)?);
        }
        let (path, authority) = (format!("/v2/models/{}/infer", args.name), args.gateway.authority.clone());
        let (address, body) = (address.to_owned(), Bytes::from(data));
        Ok(Self { client: client(), address, authority, path, headers, body, patience })
    }

    async fn ask(&mut self, context: &Context, args: &Infer) -> Result<Answer, Unanswered> {
        if args.show_headers {
            context.output.note(&format!("> POST {}", self.path));
            show_headers(context, '>', &self.headers);
        }
        let call = HttpCall { address: &self.address, authority: self.authority.as_deref(), patience: self.patience };
        let sent = call.send(&self.client, Method::POST, &self.path, self.headers.clone(), self.body.clone());
        let (headers, body) = sent.await?;
        if args.show_headers {
            show_headers(context, '<', &headers);
        }
        if args.sticky_session
            && let Some(route) = headers.get(ROUTE)
        {
            self.headers.insert(HeaderName::from_static(ROUTE), route.clone());
        }
        let route = headers.get(ROUTE).and_then(|route| route.to_str().ok()).map(str::to_owned);
        let route = route.unwrap_or_else(|| {
            let named = serde_json::from_str::<serde_json::Value>(&body).ok();
            let name = named.as_ref().and_then(|body| body.get("model_name")).and_then(serde_json::Value::as_str);
            format!(":{}:", name.unwrap_or(&args.name))
        });
        Ok(Answer { route, text: json::indent(&body).unwrap_or_else(|| clean(&body)) })
    }
}

/// One HTTP request and how long it may take.
struct HttpCall<'a> {
    address: &'a str,
    authority: Option<&'a str>,
    patience: Duration,
}

impl HttpCall<'_> {
    async fn send(
        &self,
        client: &HttpClient,
        method: Method,
        path: &str,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<(HeaderMap, String), Unanswered> {
        let bare = self.address.strip_prefix("http://").unwrap_or(self.address).trim_end_matches('/');
        let bad =
            |problem: String| Unanswered::Lost(ClientError::Address { address: self.address.to_owned(), problem });
        if self.address.starts_with("https://") {
            return Err(bad("TLS is not supported".to_owned()));
        }
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() =
            format!("http://{bare}{path}").parse().map_err(|error: http::uri::InvalidUri| bad(error.to_string()))?;
        *request.headers_mut() = headers;
        if let Some(authority) = self.authority {
            let host = HeaderValue::from_str(authority).map_err(|_| bad(format!("{authority:?} is no authority")))?;
            request.headers_mut().insert(header::HOST, host);
        }
        let lost = |cause: String| Unanswered::Lost(ClientError::Unreachable { address: bare.to_owned(), cause });
        let exchange = async {
            let response = client.request(request).await.map_err(|error| lost(root_cause(&error)))?;
            let (parts, body) = response.into_parts();
            let body = Limited::new(body, MAX_MESSAGE).collect().await.map_err(|error| lost(root_cause(&*error)))?;
            Ok((parts, body.to_bytes()))
        };
        let (parts, body) = match tokio::time::timeout(self.patience, exchange).await {
            Ok(done) => done?,
            Err(_) => {
                return Err(Unanswered::Lost(ClientError::TimedOut { address: bare.to_owned(), after: self.patience }));
            }
        };
        let body = String::from_utf8_lossy(&body).into_owned();
        if parts.status.is_success() {
            return Ok((parts.headers, body));
        }
        Err(refusal(parts.status, &parts.headers, &body))
    }
}

/// What a server meant by an answer that is none.
fn refusal(status: StatusCode, headers: &HeaderMap, body: &str) -> Unanswered {
    let said = serde_json::from_str::<serde_json::Value>(body).ok();
    let said = said.as_ref().and_then(|body| body.get("error").or_else(|| body.get("detail")));
    let said = said.and_then(serde_json::Value::as_str).unwrap_or(body).trim();
    let mut message = clip(&clean(said), SHOWN);
    if let Some(after) = headers.get(header::RETRY_AFTER).and_then(|after| after.to_str().ok()) {
        message.push_str(&format!(" (try again in {} s)", clean(after)));
    }
    Unanswered::Refused { status: status.to_string(), message }
}

/// Asks by gRPC, over one connection.
struct Grpc {
    connection: Connection,
    request: ModelInferRequest,
    metadata: MetadataMap,
}

impl Grpc {
    async fn new(address: &str, args: &Infer, data: &str, patience: Duration) -> Result<Self, Failure> {
        let request = tensors::request(&args.name, data)
            .map_err(|problem| Failure::Usage(format!("the request does not fit: {problem}")))?;
        let mut metadata = MetadataMap::new();
        metadata.insert(MODEL, metadata_value(&args.name)?);
        for (name, value) in &args.header {
            let name = name.to_lowercase();
            let key = tonic::metadata::AsciiMetadataKey::from_bytes(name.as_bytes()).map_err(|_| bad_header(&name))?;
            metadata.append(key, metadata_value(value)?);
        }
        let connection = Connection::open(address, args.gateway.authority.as_deref(), patience)
            .await
            .map_err(|error| Failure::of(Peer::Gateway, error))?;
        Ok(Self { connection, request, metadata })
    }

    async fn ask(&mut self, context: &Context, args: &Infer) -> Result<Answer, Unanswered> {
        if args.show_headers {
            show_metadata(context, '>', &self.metadata);
        }
        let mut request = tonic::Request::new(self.request.clone());
        *request.metadata_mut() = self.metadata.clone();
        let mut client = self.connection.inference();
        let mut refused = None;
        let call = async {
            let answer = client.model_infer(request).await;
            if let Err(status) = &answer {
                refused = Some(code_name(status.code()));
            }
            answer
        };
        let answer = self.connection.call(call).await;
        let answer = answer.map_err(|error| match (error, refused) {
            (ClientError::Refused { code, message }, _) => Unanswered::Refused { status: code.to_owned(), message },
            // Gateways answer UNIMPLEMENTED for a model that they don't know, as Seldon's does.
            (ClientError::Unimplemented { method, .. }, Some(code)) => {
                Unanswered::Refused { status: code.to_owned(), message: method }
            }
            (error, _) => Unanswered::Lost(error),
        })?;
        if args.show_headers {
            show_metadata(context, '<', answer.metadata());
        }
        let route = answer.metadata().get(ROUTE).cloned();
        if args.sticky_session
            && let Some(route) = &route
        {
            self.metadata.insert(ROUTE, route.clone());
        }
        let answer = answer.into_inner();
        let named = || {
            let name = if answer.model_name.is_empty() { &args.name } else { &answer.model_name };
            format!(":{name}:")
        };
        let route = route.and_then(|route| route.to_str().ok().map(str::to_owned)).unwrap_or_else(named);
        let text = tensors::response(answer)
            .map_err(|problem| Unanswered::Usage(format!("the answer can't be shown: {problem}")))?;
        Ok(Answer { route, text })
    }
}

fn show_headers(context: &Context, side: char, headers: &HeaderMap) {
    for (name, value) in headers {
        context.output.note(&format!("{side} {name}: {}", String::from_utf8_lossy(value.as_bytes())));
    }
}

fn show_metadata(context: &Context, side: char, metadata: &MetadataMap) {
    for entry in metadata.iter() {
        match entry {
            KeyAndValueRef::Ascii(key, value) => {
                context.output.note(&format!("{side} {key}: {}", value.to_str().unwrap_or("(not text)")));
            }
            KeyAndValueRef::Binary(key, value) => context.output.note(&format!("{side} {key}: {value:?}")),
        }
    }
}

fn header_value(value: &str) -> Result<HeaderValue, Failure> {
    value.parse().map_err(|_| Failure::Usage(format!("{value:?} can't be the value of a header")))
}

fn metadata_value(value: &str) -> Result<tonic::metadata::AsciiMetadataValue, Failure> {
    value.parse().map_err(|_| Failure::Usage(format!("{value:?} can't be the value of a header")))
}

fn bad_header(name: &str) -> Failure {
    Failure::Usage(format!("{name:?} can't be the name of a header"))
}
