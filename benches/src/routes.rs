//! The scheduler's side of a gateway's session, played: one table of routes, then pings.
//!
//! The gateway is the real one, over its real protocol. Only who decides the routes is not there.

use std::{net::SocketAddr, pin::Pin, time::Duration};

use anyhow::Context as _;
use futures::{Stream, StreamExt as _, stream};
use tokio_stream::wrappers::{IntervalStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};
use wharf::rpc::proto::routes::{
    Endpoint, GatewayMessage, Ping, Route, RoutesMessage, Table, Target, Welcome,
    routes_message::Message,
    routes_server::{Routes, RoutesServer},
};

use crate::models;

/// Routes in one piece of the table.
const PIECE: usize = 1000;
const EPOCH: u64 = 7;

/// Routes of `count` models, all with one copy behind `door`.
#[derive(Clone, Copy, Debug)]
struct Played {
    count: usize,
    door: SocketAddr,
}

/// Serves the routes of `count` models at `at`, on a thread of its own, as long as this process lives.
pub(crate) fn play(at: SocketAddr, count: usize, door: SocketAddr) -> anyhow::Result<()> {
    let listener = std::net::TcpListener::bind(at)?;
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("routes".to_owned()).spawn(move || {
        let served: anyhow::Result<()> = runtime.block_on(async {
            let incoming = TcpListenerStream::new(tokio::net::TcpListener::from_std(listener)?);
            let server = tonic::transport::Server::builder().add_service(RoutesServer::new(Played { count, door }));
            server.serve_with_incoming(incoming).await.context("routes")
        });
        if let Err(error) = served {
            eprintln!("routes are no longer served: {error:#}");
        }
    })?;
    Ok(())
}

impl Played {
    fn route(self, number: usize) -> Route {
        let endpoint = Endpoint {
            replica: "bench-0".to_owned(),
            door: self.door.to_string(),
            uid: number as u64 + 1,
            number: 1,
            resident: true,
        };
        let target = Target { version: 1, weight: 100, endpoints: vec![endpoint] };
        Route { model: models::name(number), targets: vec![target], ..Route::default() }
    }
}

#[tonic::async_trait]
impl Routes for Played {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<RoutesMessage, Status>> + Send>>;

    async fn watch(&self, request: Request<Streaming<GatewayMessage>>) -> Result<Response<Self::WatchStream>, Status> {
        let mut words = request.into_inner();
        // What the gateway acknowledges is read, and decides nothing here.
        tokio::spawn(async move { while let Ok(Some(_)) = words.message().await {} });
        let this = *self;
        let message = |message| Ok(RoutesMessage { message: Some(message) });
        let welcome = Welcome { lineage: "bench".to_owned(), lease_millis: 5000, leader_epoch: 1, leader_started: 1 };
        let pieces = stream::iter((0..this.count.div_ceil(PIECE)).map(move |piece| {
            let (first, next) = (piece * PIECE, ((piece + 1) * PIECE).min(this.count));
            let routes = (first..next).map(|number| this.route(number)).collect();
            message(Message::Table(Table { epoch: EPOCH, routes, last: next == this.count }))
        }));
        // As often as the real one does.
        let pings = IntervalStream::new(tokio::time::interval(Duration::from_secs(1)));
        let pings = pings.skip(1).map(move |_| message(Message::Ping(Ping { epoch: EPOCH })));
        let welcome = stream::iter([message(Message::Welcome(welcome))]);
        Ok(Response::new(Box::pin(welcome.chain(pieces).chain(pings))))
    }
}
