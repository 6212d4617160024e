//! The inference server behind every proxy: answers each request with the request's own body.
//!
//! It stands in for a model that takes no time, and shares its core with the load. So it is as cheap as it can be:
//! REST is read by hand, and only what the proxies send is understood.

use std::{convert::Infallible, net::SocketAddr};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt as _, Full, combinators::WithTrailers};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::{load::WINDOW, raw::Head};

/// Answers REST and gRPC at `at`, for ever.
pub(crate) async fn serve(at: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(at).await?;
    loop {
        let (io, _) = listener.accept().await?;
        io.set_nodelay(true)?;
        tokio::task::spawn_local(async move {
            if let Err(error) = connection(io).await {
                eprintln!("{error:#}");
            }
        });
    }
}

async fn connection(io: TcpStream) -> anyhow::Result<()> {
    // Every HTTP/2 client begins with `PRI`, and no method of HTTP/1.1 does.
    let mut first = [0; 3];
    while io.peek(&mut first).await? == 1 {}
    if first == *b"PRI" { grpc(io).await } else { rest(io).await }
}

async fn grpc(io: TcpStream) -> anyhow::Result<()> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .max_concurrent_streams(1000)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW * 16)
        .max_frame_size(64 * 1024);
    builder.serve_connection(TokioIo::new(io), service_fn(echo)).await?;
    Ok(())
}

async fn rest(mut io: TcpStream) -> anyhow::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    let mut have = 0;
    loop {
        let head = loop {
            if let Some(head) = Head::read(&buffer[..have])? {
                break head;
            }
            if have == buffer.len() {
                bail!("the head is too long");
            }
            match io.read(&mut buffer[have..]).await? {
                0 if have == 0 => return Ok(()),
                0 => bail!("the connection ended within a head"),
                read => have += read,
            }
        };
        let whole = head.length + usize::try_from(head.content).context("a body is too large")?;
        if buffer.len() < whole {
            buffer.resize(whole, 0);
        }
        while have < whole {
            match io.read(&mut buffer[have..]).await? {
                0 => bail!("the connection ended within a body"),
                read => have += read,
            }
        }
        // The answer's head is written over the request's, in front of the body.
        let answer =
            format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", head.content);
        if answer.len() <= head.length {
            let from = head.length - answer.len();
            buffer[from..head.length].copy_from_slice(answer.as_bytes());
            io.write_all(&buffer[from..whole]).await?;
        } else {
            io.write_all(answer.as_bytes()).await?;
            io.write_all(&buffer[head.length..whole]).await?;
        }
        buffer.copy_within(whole..have, 0);
        have -= whole;
    }
}

type Trailers = std::future::Ready<Option<Result<HeaderMap, Infallible>>>;

async fn echo(request: Request<Incoming>) -> Result<Response<WithTrailers<Full<Bytes>, Trailers>>, hyper::Error> {
    let body = request.into_body().collect().await?.to_bytes();
    let trailers =
        HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
    let body = Full::new(body).with_trailers(std::future::ready(Some(Ok(trailers))));
    let mut response = Response::new(body);
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    Ok(response)
}
