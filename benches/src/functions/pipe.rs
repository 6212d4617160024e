//! A request from the bytes that a client writes to those that it reads: HTTP, the gateway, and the way to a door and back.
//!
//! The gateway serves as it does on a port, and its door is behind a connection of its pool. In place of sockets there are
//! pipes in memory; client and door write and read their bytes by hand. So next to Wharf and the libraries that it stands
//! on, little is measured.

mod frames;

use std::{
    io::{self, Write as _},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context as _, bail, ensure};
use futures::{FutureExt as _, future::BoxFuture};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    runtime::Runtime,
};
use tokio_util::sync::CancellationToken;
use wharf::{
    gateway::Gateway,
    ports::{BoxIo, Listen, Network},
};

use self::frames::{Asked, Frames};
use super::{
    Work,
    gateway::{BODY, Routed, names},
};
use crate::{bodies, raw::Head};

/// Bytes that a pipe holds.
const PIPE: usize = 64 * 1024;
const MODELS: usize = 1000;

/// What client and door speak.
#[derive(Clone, Copy, Debug)]
enum Protocol {
    Rest,
    Grpc,
}

/// A network where a door is at every address.
#[derive(Debug)]
struct Doors(Protocol);

impl Network for Doors {
    fn bind<'a>(&'a self, _: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listen>>> {
        async { Err(io::ErrorKind::Unsupported.into()) }.boxed()
    }

    fn connect<'a>(&'a self, _: &'a str) -> BoxFuture<'a, io::Result<BoxIo>> {
        let protocol = self.0;
        async move {
            let (near, far) = duplex(PIPE);
            tokio::spawn(async move {
                let ended = match protocol {
                    Protocol::Rest => rest_door(far).await,
                    Protocol::Grpc => frames::door(far).await,
                };
                if let Err(error) = ended {
                    eprintln!("the door: {error:#}");
                }
            });
            Ok(Box::new(near) as BoxIo)
        }
        .boxed()
    }
}

/// Where one client comes in.
#[derive(Debug)]
struct Port(Option<DuplexStream>);

impl Listen for Port {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<(BoxIo, String)>> {
        match self.0.take() {
            Some(io) => std::future::ready(Ok((Box::new(io) as BoxIo, "client".to_owned()))).boxed(),
            None => std::future::pending().boxed(),
        }
    }

    fn address(&self) -> String {
        "pipe".to_owned()
    }
}

/// A gateway that serves one client; answers its end of the pipe.
fn open(protocol: Protocol) -> anyhow::Result<(Runtime, Arc<Gateway>, DuplexStream)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let gateway = Routed::new(MODELS, "door:1", Arc::new(Doors(protocol)))?.gateway;
    let (near, far) = duplex(PIPE);
    runtime.spawn(Arc::clone(&gateway).serve(Box::new(Port(Some(far))), CancellationToken::new()));
    Ok((runtime, gateway, near))
}

/// Fails unless the gateway counts `times` good answers more than `before`.
fn all_good(counter: &AtomicU64, before: u64, times: u64) -> anyhow::Result<()> {
    let good = counter.load(Ordering::Relaxed) - before;
    ensure!(good == times, "{good} of {times} requests ended well");
    Ok(())
}

/// REST requests, one at a time.
pub(super) fn rest() -> anyhow::Result<Work> {
    let (runtime, gateway, mut io) = open(Protocol::Rest)?;
    let body = bodies::json(BODY);
    let asked: Vec<Vec<u8>> = names(MODELS)
        .iter()
        .map(|model| {
            let head = format!(
                "POST /v2/models/{model}/infer HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
                 seldon-model: {model}\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            [head.as_bytes(), &body].concat()
        })
        .collect();
    let mut turn = 0;
    let mut buffer = vec![0; PIPE];
    Ok(Box::new(move |times| {
        let good = &gateway.metrics().rest.ok;
        let before = good.load(Ordering::Relaxed);
        runtime.block_on(async {
            for _ in 0..times {
                io.write_all(&asked[turn % asked.len()]).await?;
                turn += 1;
                let whole = read(&mut io, &mut buffer).await?.context("the connection was closed")?;
                ensure!(buffer.starts_with(b"HTTP/1.1 200"), "not 200: {}", String::from_utf8_lossy(&buffer[..whole]));
            }
            anyhow::Ok(())
        })?;
        all_good(good, before, times)
    }))
}

/// Reads one message of HTTP/1.1 into `buffer`; answers its length.
async fn read(io: &mut DuplexStream, buffer: &mut [u8]) -> anyhow::Result<Option<usize>> {
    let mut have = 0;
    loop {
        if let Some(head) = Head::read(&buffer[..have])? {
            let whole = head.length + usize::try_from(head.content)?;
            if have >= whole {
                return Ok(Some(whole));
            }
        }
        match io.read(&mut buffer[have..]).await? {
            0 if have == 0 => return Ok(None),
            0 => bail!("the connection ended within a message"),
            read => have += read,
        }
    }
}

/// Answers every request with its own body.
async fn rest_door(mut io: DuplexStream) -> anyhow::Result<()> {
    let mut buffer = vec![0; PIPE];
    let mut answer = Vec::new();
    while let Some(whole) = read(&mut io, &mut buffer).await? {
        let body = Head::read(&buffer[..whole])?.map_or(whole, |head| head.length);
        answer.clear();
        write!(
            answer,
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-wharf-residency: resident\r\n\
             content-length: {}\r\n\r\n",
            whole - body
        )?;
        answer.extend_from_slice(&buffer[body..whole]);
        io.write_all(&answer).await?;
    }
    Ok(())
}

/// gRPC requests, one at a time on one connection.
pub(super) fn grpc() -> anyhow::Result<Work> {
    let (runtime, gateway, io) = open(Protocol::Grpc)?;
    let asked = names(MODELS).into_iter().map(|model| Ok(Asked::new(&model, &bodies::message(&model, BODY)?)));
    let asked = asked.collect::<anyhow::Result<Vec<_>>>()?;
    let mut turn = 0;
    let mut client = runtime.block_on(Frames::client(io))?;
    Ok(Box::new(move |times| {
        let good = &gateway.metrics().grpc.ok;
        let before = good.load(Ordering::Relaxed);
        runtime.block_on(async {
            for _ in 0..times {
                client.ask(&asked[turn % asked.len()]).await?;
                turn += 1;
            }
            anyhow::Ok(())
        })?;
        all_good(good, before, times)
    }))
}
