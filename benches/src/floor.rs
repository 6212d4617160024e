//! The floor: a forwarder that does nothing but forward, with the library that Wharf stands on.
//!
//! One connection to the backend for each of a client's, no pool, no routes, no metrics, no retries, no deadlines. What
//! Wharf's gateway costs above this is what its promises cost.

use std::{net::SocketAddr, rc::Rc};

use http::{Request, Uri, header::HOST, uri};
use hyper::{
    body::Incoming,
    client::conn::{http1 as client1, http2 as client2},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Mutex,
};

/// Forwards REST from `rest` and gRPC from `grpc` to `to`, for ever.
pub(crate) async fn serve(rest: SocketAddr, grpc: SocketAddr, to: SocketAddr) -> anyhow::Result<()> {
    let grpc_listener = TcpListener::bind(grpc).await?;
    let listener = TcpListener::bind(rest).await?;
    tokio::task::spawn_local(async move {
        while let Ok((io, _)) = grpc_listener.accept().await {
            tokio::task::spawn_local(async move {
                if let Err(error) = forward_grpc(io, to).await {
                    eprintln!("{error:#}");
                }
            });
        }
    });
    loop {
        let (io, _) = listener.accept().await?;
        tokio::task::spawn_local(async move {
            if let Err(error) = forward_rest(io, to).await {
                eprintln!("{error:#}");
            }
        });
    }
}

async fn forward_rest(io: TcpStream, to: SocketAddr) -> anyhow::Result<()> {
    io.set_nodelay(true)?;
    let next = TcpStream::connect(to).await?;
    next.set_nodelay(true)?;
    let (sender, connection) = client1::handshake(TokioIo::new(next)).await?;
    tokio::task::spawn_local(connection);
    let host: http::HeaderValue = to.to_string().parse()?;
    // A connection has one request at a time, so nobody waits for this.
    let sender = Rc::new(Mutex::new(sender));
    let service = service_fn(move |mut request: Request<Incoming>| {
        let (sender, host) = (Rc::clone(&sender), host.clone());
        async move {
            request.headers_mut().insert(HOST, host);
            let mut sender = sender.lock().await;
            sender.ready().await?;
            sender.send_request(request).await
        }
    });
    http1::Builder::new().max_buf_size(256 * 1024).serve_connection(TokioIo::new(io), service).await?;
    Ok(())
}

async fn forward_grpc(io: TcpStream, to: SocketAddr) -> anyhow::Result<()> {
    const WINDOW: u32 = 256 * 1024;
    io.set_nodelay(true)?;
    let next = TcpStream::connect(to).await?;
    next.set_nodelay(true)?;
    let mut client = client2::Builder::new(TokioExecutor::new());
    client.initial_stream_window_size(WINDOW).initial_connection_window_size(WINDOW * 100).max_frame_size(64 * 1024);
    let (sender, connection) = client.handshake::<_, Incoming>(TokioIo::new(next)).await?;
    tokio::task::spawn_local(connection);
    let authority: uri::Authority = to.to_string().parse()?;
    let service = service_fn(move |mut request: Request<Incoming>| {
        let mut sender = sender.clone();
        let mut parts = uri::Parts::default();
        parts.scheme = Some(uri::Scheme::HTTP);
        parts.authority = Some(authority.clone());
        parts.path_and_query = request.uri().path_and_query().cloned();
        async move {
            if let Ok(uri) = Uri::from_parts(parts) {
                *request.uri_mut() = uri;
            }
            sender.send_request(request).await
        }
    });
    let mut server = http2::Builder::new(TokioExecutor::new());
    server
        .max_concurrent_streams(256)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW * 256)
        .max_frame_size(64 * 1024);
    server.serve_connection(TokioIo::new(io), service).await?;
    Ok(())
}
