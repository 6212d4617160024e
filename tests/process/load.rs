//! Requests at a constant rate, REST and gRPC in turns, each counted once with what became of it.
//!
//! The rule of this module: the load does not wait for answers (it is an open loop), so a stall shows as many slow
//! requests and not as few. A request is a success only when its answer is right: status, model and numbers.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::task::{JoinHandle, JoinSet};
use tonic::transport::Channel;
use wharf::rpc::proto::inference::{
    InferTensorContents, ModelInferRequest, grpc_inference_service_client::GrpcInferenceServiceClient,
    model_infer_request::InferInputTensor,
};

/// The longest that an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// Failures that are kept in full.
const SHOWN: usize = 5;
/// gRPC connections.
const CHANNELS: usize = 4;

/// A setosa, in the eyes of `iris-1`; `iris-2` takes it for a versicolor. So the answer shows which artifact gave it.
pub const FLOWER: [f32; 4] = [5.1, 3.5, 1.4, 0.2];

/// How a request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// JSON over HTTP/1.1.
    Rest,
    /// gRPC.
    Grpc,
}

/// What a right answer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The name of the version that answered: `iris_3`.
    pub model: String,
    /// The class that it chose.
    pub label: i64,
}

impl Answer {
    /// The number of the version that answered.
    pub fn version(&self) -> u32 {
        self.model.rsplit_once('_').and_then(|(_, version)| version.parse().ok()).unwrap_or(0)
    }
}

/// What a failed request was answered with.
#[derive(Clone, Debug)]
pub struct Refused {
    /// HTTP status, gRPC code, or what broke.
    pub status: String,
    /// Headers or metadata.
    pub headers: String,
    /// The body or the message.
    pub body: String,
}

/// Says whether an answer is one that may be given.
pub type Check = Box<dyn FnOnce(&Answer) -> Result<(), String> + Send>;

/// One request to be sent.
pub struct Question {
    /// The model.
    pub model: String,
    /// How.
    pub protocol: Protocol,
    /// Whether its answer is right.
    pub check: Check,
}

/// What became of all requests.
#[derive(Debug, Default)]
pub struct Account {
    /// Sent.
    pub sent: u64,
    /// By how they ended: `REST 200`, `gRPC Unavailable`, `REST 200, but wrong`.
    pub outcomes: BTreeMap<String, u64>,
    /// Answered, and rightly.
    pub good: u64,
    /// The first failures in full.
    pub shown: Vec<String>,
    /// By the version that answered.
    pub by_version: BTreeMap<String, u64>,
    /// How long the good ones took.
    pub took: Vec<Duration>,
}

impl Account {
    /// Requests that were not answered rightly.
    pub fn failed(&self) -> u64 {
        self.sent - self.good
    }

    /// The latency that this share of the good requests kept, in percent.
    pub fn percentile(&self, percent: usize) -> Duration {
        let mut took = self.took.clone();
        took.sort_unstable();
        took.get((took.len() * percent / 100).min(took.len().saturating_sub(1))).copied().unwrap_or_default()
    }

    /// Fails unless every request was answered rightly.
    pub fn assert_clean(&self, wharf: &super::Wharf) {
        let counted: u64 = self.outcomes.values().sum();
        assert_eq!(counted, self.sent, "each request is counted once: {:?}", self.outcomes);
        assert!(self.sent > 0, "nothing was sent");
        assert!(
            self.failed() == 0,
            "{} of {} requests failed: {:?}\n{}\n--- the log ---\n{}",
            self.failed(),
            self.sent,
            self.outcomes,
            self.shown.join("\n"),
            wharf.tail(),
        );
    }

    /// In one line.
    pub fn line(&self) -> String {
        let mut line = format!("{} requests, {} failed", self.sent, self.failed());
        let (median, slow) = (self.percentile(50), self.percentile(99));
        let most = self.took.iter().max().copied().unwrap_or_default();
        write!(line, "; {:?}; p50 {median:.1?}, p99 {slow:.1?}, longest {most:.1?}", self.outcomes).unwrap();
        line
    }
}

/// The last thing that the test did to the product, for the accounts of failures.
#[derive(Clone, Debug)]
pub struct Marks(Arc<Mutex<(Instant, String)>>);

impl Marks {
    fn new() -> Self {
        Self(Arc::new(Mutex::new((Instant::now(), "the start of the load".to_owned()))))
    }

    /// Something was just done.
    pub fn mark(&self, what: impl Into<String>) {
        *self.0.lock().unwrap() = (Instant::now(), what.into());
    }

    fn since(&self) -> String {
        let (at, what) = self.0.lock().unwrap().clone();
        format!("{:.0?} after {what}", at.elapsed())
    }
}

/// A load that goes on until it is stopped.
#[derive(Debug)]
pub struct Load {
    /// What the test does meanwhile.
    pub marks: Marks,
    stop: Arc<AtomicBool>,
    account: Arc<Mutex<Account>>,
    task: JoinHandle<()>,
}

impl Load {
    /// Sends what `next` says, `rate` times a second. It is called at the instant of sending.
    pub async fn start(gateway: &str, rate: u32, mut next: impl FnMut(u64) -> Question + Send + 'static) -> Self {
        let clients = Clients::connect(gateway).await;
        let (stop, marks) = (Arc::new(AtomicBool::new(false)), Marks::new());
        let account = Arc::new(Mutex::new(Account::default()));
        let (stopped, accounts, marked) = (Arc::clone(&stop), Arc::clone(&account), marks.clone());
        let task = tokio::spawn(async move {
            let (start, every) = (tokio::time::Instant::now(), Duration::from_secs(1) / rate);
            let mut flying = JoinSet::new();
            for number in 0_u64.. {
                if stopped.load(Ordering::Acquire) {
                    break;
                }
                tokio::time::sleep_until(start + every * u32::try_from(number).unwrap()).await;
                let question = next(number);
                accounts.lock().unwrap().sent += 1;
                let (clients, accounts, marked) = (clients.clone(), Arc::clone(&accounts), marked.clone());
                flying.spawn(async move { ask_and_count(number, question, &clients, &accounts, &marked).await });
                while flying.try_join_next().is_some_and(|ended| {
                    ended.unwrap();
                    true
                }) {}
            }
            while let Some(ended) = flying.join_next().await {
                ended.unwrap();
            }
        });
        Self { marks, stop, account, task }
    }

    /// Requests sent so far.
    pub fn sent(&self) -> u64 {
        self.account.lock().unwrap().sent
    }

    /// Requests that were not answered rightly so far.
    pub fn failed(&self) -> u64 {
        let account = self.account.lock().unwrap();
        account.outcomes.values().sum::<u64>() - account.good
    }

    /// Waits until so many more requests were sent.
    pub async fn more(&self, requests: u64) {
        let target = self.sent() + requests;
        let waited = tokio::time::timeout(Duration::from_secs(120), async {
            while self.sent() < target {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        waited.await.expect("the load goes on");
    }

    /// Sends no more, waits for what is in flight, and gives the account.
    pub async fn stop(self) -> Account {
        self.stop.store(true, Ordering::Release);
        self.task.await.unwrap();
        std::mem::take(&mut *self.account.lock().unwrap())
    }
}

async fn ask_and_count(number: u64, question: Question, clients: &Clients, account: &Mutex<Account>, marks: &Marks) {
    let Question { model, protocol, check } = question;
    let (at, since) = (Instant::now(), marks.since());
    let answered = clients.ask(number, &model, protocol).await;
    let took = at.elapsed();
    let name = match protocol {
        Protocol::Rest => "REST",
        Protocol::Grpc => "gRPC",
    };
    let judged = match &answered {
        Ok(answer) => check(answer)
            .map_err(|wrong| (format!("{name} OK, but wrong"), format!("{wrong}; it said {answer:?}"), String::new())),
        Err(refused) => Err((format!("{name} {}", refused.status), refused.body.clone(), refused.headers.clone())),
    };
    let mut account = account.lock().unwrap();
    match (judged, answered) {
        (Ok(()), Ok(answer)) => {
            account.good += 1;
            account.took.push(took);
            *account.outcomes.entry(format!("{name} OK")).or_default() += 1;
            *account.by_version.entry(answer.model).or_default() += 1;
        }
        (Err((outcome, body, headers)), _) => {
            if account.shown.len() < SHOWN {
                let ended = marks.since();
                account.shown.push(format!(
                    "{outcome}: request {number} to {model}, sent {since}, ended after {took:.1?} ({ended})\n  \
                     headers: {headers}\n  body: {body}"
                ));
            }
            *account.outcomes.entry(outcome).or_default() += 1;
        }
        (Ok(()), Err(_)) => unreachable!("a refusal is never right"),
    }
}

/// Connections to a gateway.
#[derive(Clone, Debug)]
pub struct Clients {
    gateway: String,
    rest: Client<HttpConnector, Full<Bytes>>,
    grpc: Vec<GrpcInferenceServiceClient<Channel>>,
}

impl Clients {
    /// Connects.
    pub async fn connect(gateway: &str) -> Self {
        let rest = Client::builder(TokioExecutor::new()).build_http();
        let mut grpc = Vec::new();
        for _ in 0..CHANNELS {
            let channel = Channel::from_shared(format!("http://{gateway}")).unwrap().connect().await.unwrap();
            grpc.push(GrpcInferenceServiceClient::new(channel));
        }
        Self { gateway: gateway.to_owned(), rest, grpc }
    }

    /// Asks a model of the iris family about [`FLOWER`].
    pub async fn ask(&self, number: u64, model: &str, protocol: Protocol) -> Result<Answer, Refused> {
        let asked = async {
            match protocol {
                Protocol::Rest => self.rest(model).await,
                Protocol::Grpc => self.grpc(number, model).await,
            }
        };
        tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(|_| {
            Err(Refused {
                status: format!("no answer within {PATIENCE:?}"),
                headers: String::new(),
                body: String::new(),
            })
        })
    }

    async fn rest(&self, model: &str) -> Result<Answer, Refused> {
        let broken = |error: &dyn std::error::Error| {
            let mut body = error.to_string();
            let mut cause = error.source();
            while let Some(next) = cause {
                write!(body, ": {next}").unwrap();
                cause = next.source();
            }
            Refused { status: "connection".to_owned(), headers: String::new(), body }
        };
        let tensor = serde_json::json!({"name": "X", "shape": [1, 4], "datatype": "FP32", "data": FLOWER});
        let body = serde_json::json!({"inputs": [tensor]}).to_string();
        let request = http::Request::post(format!("http://{}/v2/models/{model}/infer", self.gateway))
            .header("content-type", "application/json")
            .body(Full::from(body))
            .unwrap();
        let response = self.rest.request(request).await.map_err(|error| broken(&error))?;
        let (parts, body) = response.into_parts();
        let body = body.collect().await.map_err(|error| broken(&error))?.to_bytes();
        let refused = |status: String| Refused {
            status,
            headers: format!("{:?}", parts.headers),
            body: String::from_utf8_lossy(&body).into_owned(),
        };
        if parts.status != http::StatusCode::OK {
            return Err(refused(parts.status.as_u16().to_string()));
        }
        let json: serde_json::Value = serde_json::from_slice(&body).map_err(|_| refused("200, no JSON".to_owned()))?;
        let outputs = json["outputs"].as_array().cloned().unwrap_or_default();
        let said = outputs.iter().find(|output| output["name"].as_str().is_some_and(is_label));
        let label = said.and_then(|output| output["data"][0].as_i64());
        match (json["model_name"].as_str(), label) {
            (Some(model), Some(label)) => Ok(Answer { model: model.to_owned(), label }),
            _ => Err(refused("200, no answer".to_owned())),
        }
    }

    async fn grpc(&self, number: u64, model: &str) -> Result<Answer, Refused> {
        let input = InferInputTensor {
            name: "X".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![1, 4],
            contents: Some(InferTensorContents { fp32_contents: FLOWER.to_vec(), ..InferTensorContents::default() }),
            ..InferInputTensor::default()
        };
        let request =
            ModelInferRequest { model_name: model.to_owned(), inputs: vec![input], ..ModelInferRequest::default() };
        let channel = usize::try_from(number).unwrap_or(0) / 2 % self.grpc.len();
        let response = self.grpc[channel].clone().model_infer(request).await.map_err(|status| Refused {
            status: format!("{:?}", status.code()),
            headers: format!("{:?}", status.metadata()),
            body: status.message().to_owned(),
        })?;
        let response = response.into_inner();
        let place = response.outputs.iter().position(|output| is_label(&output.name));
        let label = place.and_then(|place| match response.raw_output_contents.get(place) {
            Some(raw) => raw.first_chunk().map(|bytes| i64::from_le_bytes(*bytes)),
            None => response.outputs[place].contents.as_ref()?.int64_contents.first().copied(),
        });
        let refused =
            || Refused { status: "OK, no answer".to_owned(), headers: String::new(), body: format!("{response:?}") };
        Ok(Answer { model: response.model_name.clone(), label: label.ok_or_else(refused)? })
    }
}

/// Whether an output of this name is the class; `MLServer` has a name of its own for it.
fn is_label(name: &str) -> bool {
    matches!(name, "label" | "predict")
}

/// The text of a page.
pub async fn get(address: &str, path: &str) -> String {
    let client: Client<HttpConnector, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let response = client.get(format!("http://{address}{path}").parse().unwrap()).await.unwrap();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8_lossy(&body).into_owned()
}

/// REST and gRPC in turns.
pub fn in_turns(number: u64) -> Protocol {
    if number.is_multiple_of(2) { Protocol::Rest } else { Protocol::Grpc }
}

/// Numbers that look random and come again with the same seed (xorshift).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
