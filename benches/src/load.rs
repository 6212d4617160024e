//! The load: a closed loop over connections that are kept. Each asks again when it has its answer.

use std::{
    cell::{Cell, RefCell},
    io::Write as _,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http::{HeaderValue, Request};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};

use crate::{bodies, models::Picks, raw::Head};

/// Bytes on their way on one HTTP/2 stream, at the load and at the backend.
pub(crate) const WINDOW: u32 = 1 << 20;
/// In which every answer must come.
const PATIENCE: Duration = Duration::from_secs(60);

/// How the load speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Rest,
    Grpc,
}

impl Protocol {
    /// As people write it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Rest => "REST",
            Self::Grpc => "gRPC",
        }
    }
}

/// One stretch of load.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) to: SocketAddr,
    pub(crate) protocol: Protocol,
    pub(crate) picks: Picks,
    /// Bytes of a request's body; for gRPC, of its tensor.
    pub(crate) body: usize,
    /// What REST sends in place of a tensor of that size.
    pub(crate) payload: Option<Arc<[u8]>>,
    pub(crate) connections: usize,
    /// Requests at a time on each connection; REST has one.
    pub(crate) streams: usize,
    pub(crate) warm_up: Duration,
    pub(crate) measure: Duration,
}

/// What came of it.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) requests: u64,
    pub(crate) elapsed: Duration,
    /// CPU time that the probe showed between begin and end.
    pub(crate) cpu: Duration,
    /// In microseconds, sorted.
    latencies: Vec<f32>,
}

impl Outcome {
    /// Microseconds of the probed process for each request.
    pub(crate) fn cpu_micros(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.requests as f64
    }

    /// The share of the time in which the probed process ran.
    pub(crate) fn busy(&self) -> f64 {
        self.cpu.as_secs_f64() / self.elapsed.as_secs_f64()
    }

    /// Requests in each second.
    pub(crate) fn rate(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }

    /// The latency in microseconds below which `share` of the requests are.
    pub(crate) fn latency(&self, share: f64) -> f64 {
        let at = ((self.latencies.len() as f64 * share) as usize).min(self.latencies.len().saturating_sub(1));
        self.latencies.get(at).copied().map_or(f64::NAN, f64::from)
    }
}

/// What the connections share; they all run on one thread.
#[derive(Debug, Default)]
struct Shared {
    next: Cell<usize>,
    stop: Cell<bool>,
    measuring: Cell<bool>,
    done: Cell<u64>,
    latencies: RefCell<Vec<f32>>,
}

impl Shared {
    fn note(&self, began: Instant) {
        if self.measuring.get() {
            self.done.set(self.done.get() + 1);
            self.latencies.borrow_mut().push((began.elapsed().as_secs_f64() * 1e6) as f32);
        }
    }

    fn turn(&self) -> usize {
        let turn = self.next.get();
        self.next.set(turn + 1);
        turn
    }
}

/// Runs `plan`. `probe` tells the CPU time of the process that is measured.
///
/// # Errors
/// When any request fails: figures of failing requests mean nothing.
pub(crate) async fn run(plan: Plan, probe: &dyn Fn() -> anyhow::Result<Duration>) -> anyhow::Result<Outcome> {
    let shared = Rc::new(Shared::default());
    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    for _ in 0..plan.connections {
        let (shared, plan) = (Rc::clone(&shared), plan.clone());
        match plan.protocol {
            Protocol::Rest => tasks.spawn_local(rest(plan, shared)),
            Protocol::Grpc => tasks.spawn_local(grpc(plan, shared)),
        };
    }
    let (warm_up, measure, ends) = (plan.warm_up, plan.measure, Rc::clone(&shared));
    let timed = async {
        tokio::time::sleep(warm_up).await;
        let (began, before) = (Instant::now(), probe()?);
        ends.measuring.set(true);
        tokio::time::sleep(measure).await;
        ends.measuring.set(false);
        let (elapsed, cpu) = (began.elapsed(), probe()?.saturating_sub(before));
        ends.stop.set(true);
        anyhow::Ok((elapsed, cpu))
    };
    let failed = async {
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        anyhow::Ok(())
    };
    // A connection that fails ends the run at once.
    let ((elapsed, cpu), ()) = tokio::try_join!(timed, failed)?;
    let mut latencies = shared.latencies.take();
    latencies.sort_by(f32::total_cmp);
    ensure!(!latencies.is_empty(), "no request was answered within {measure:?}");
    Ok(Outcome { requests: shared.done.get(), elapsed, cpu, latencies })
}

async fn rest(plan: Plan, shared: Rc<Shared>) -> anyhow::Result<()> {
    let mut io = TcpStream::connect(plan.to).await?;
    io.set_nodelay(true)?;
    let body = plan.payload.as_deref().map_or_else(|| bodies::json(plan.body).to_vec(), <[u8]>::to_vec);
    let mut request = Vec::with_capacity(plan.body + 512);
    let mut buffer = vec![0; 256 * 1024];
    while !shared.stop.get() {
        let model = plan.picks.get(shared.turn());
        write_request(&mut request, model, &body)?;
        let began = Instant::now();
        timeout(PATIENCE, exchange(&mut io, &request, &mut buffer)).await.context("no answer in time")??;
        shared.note(began);
    }
    Ok(())
}

fn write_request(request: &mut Vec<u8>, model: &str, body: &[u8]) -> std::io::Result<()> {
    request.clear();
    write!(
        request,
        "POST /v2/models/{model}/infer HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
         seldon-model: {model}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    )?;
    request.extend_from_slice(body);
    Ok(())
}

/// Asks `model` once; answers whether it answered.
///
/// # Errors
/// When nobody is there.
pub(crate) async fn once(to: SocketAddr, model: &str, body: &[u8]) -> anyhow::Result<bool> {
    let mut io = TcpStream::connect(to).await?;
    Ok(ask(&mut io, model, body).await.is_ok())
}

/// Asks `model` on a connection.
///
/// # Errors
/// When the answer is not 200, or does not come in time.
pub(crate) async fn ask(io: &mut TcpStream, model: &str, body: &[u8]) -> anyhow::Result<()> {
    let mut request = Vec::new();
    write_request(&mut request, model, body)?;
    timeout(PATIENCE, exchange(io, &request, &mut vec![0; 64 * 1024])).await.context("no answer in time")?
}

async fn exchange(io: &mut TcpStream, request: &[u8], buffer: &mut [u8]) -> anyhow::Result<()> {
    io.write_all(request).await?;
    let mut have = 0;
    let head = loop {
        match io.read(&mut buffer[have..]).await? {
            0 => bail!("the connection was closed; before it came {:?}", String::from_utf8_lossy(&buffer[..have])),
            read => have += read,
        }
        if let Some(head) = Head::read(&buffer[..have])? {
            break head;
        }
    };
    ensure!(buffer.starts_with(b"HTTP/1.1 200"), "not 200: {}", String::from_utf8_lossy(&buffer[..have.min(600)]));
    let whole = head.length as u64 + head.content;
    let mut have = have as u64;
    while have < whole {
        match io.read(buffer).await? {
            0 => bail!("the connection was closed within an answer"),
            read => have += read as u64,
        }
    }
    Ok(())
}

async fn grpc(plan: Plan, shared: Rc<Shared>) -> anyhow::Result<()> {
    let io = TcpStream::connect(plan.to).await?;
    io.set_nodelay(true)?;
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.initial_stream_window_size(WINDOW).initial_connection_window_size(WINDOW * 16).max_frame_size(64 * 1024);
    let (sender, connection) = builder.handshake::<_, Full<Bytes>>(TokioIo::new(io)).await?;
    let connection = tokio::task::spawn_local(connection);
    let mut streams: JoinSet<anyhow::Result<()>> = JoinSet::new();
    for _ in 0..plan.streams {
        let (sender, plan, shared) = (sender.clone(), plan.clone(), Rc::clone(&shared));
        streams.spawn_local(async move {
            while !shared.stop.get() {
                let model = plan.picks.get(shared.turn());
                let request = infer(plan.to, model, plan.body)?;
                let began = Instant::now();
                timeout(PATIENCE, call(sender.clone(), request)).await.context("no answer in time")??;
                shared.note(began);
            }
            Ok(())
        });
    }
    while let Some(ended) = streams.join_next().await {
        ended??;
    }
    connection.abort();
    Ok(())
}

fn infer(to: SocketAddr, model: &str, bytes: usize) -> anyhow::Result<Request<Full<Bytes>>> {
    let request = Request::post(format!("http://{to}/inference.GRPCInferenceService/ModelInfer"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("seldon-model", HeaderValue::from_str(model)?);
    Ok(request.body(Full::new(bodies::message(model, bytes)?))?)
}

async fn call(mut sender: http2::SendRequest<Full<Bytes>>, request: Request<Full<Bytes>>) -> anyhow::Result<()> {
    sender.ready().await?;
    let response = sender.send_request(request).await?;
    ensure!(response.status() == 200, "not 200: {:?}", response.headers());
    let early = response.headers().get("grpc-status").cloned();
    let mut body = response.into_body();
    let mut status = early;
    while let Some(frame) = body.frame().await {
        if let Some(trailers) = frame?.trailers_ref() {
            status = trailers.get("grpc-status").cloned();
        }
    }
    ensure!(status.as_ref().is_some_and(|status| status == "0"), "the answer's grpc-status is {status:?}");
    Ok(())
}
