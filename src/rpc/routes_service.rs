//! The scheduler's side of a gateway's session: routes down, acknowledgements up.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use actix::Recipient;
use futures::{Stream, StreamExt as _, stream};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    agent_hub::Leader,
    pieces::pieces,
    proto::routes::{self as wire, routes_server::Routes},
    routes_wire::route_to_wire,
};
use crate::{
    domain::{leader, routes::Epoch, time::Instant},
    messages::router::{GatewayAcknowledged, GatewayConnected, GatewayGone, RouteUpdate},
    ports::Clock,
};

/// Bytes of a gateway's name.
const NAME: usize = 253;
/// In which the other side says who it is.
const HELLO: Duration = Duration::from_secs(10);
/// Updates to a gateway that may wait for it to read.
const BOUND: usize = 1024;
/// Routes in one piece of a table: what a gateway reads and makes ready at once.
const PIECE: usize = 200;

/// Serves gateways' sessions.
#[derive(Debug)]
pub struct RouteSessions {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    connected: Recipient<GatewayConnected>,
    acknowledged: Recipient<GatewayAcknowledged>,
    gone: Recipient<GatewayGone>,
    leader: Leader,
    lease: Duration,
    clock: Arc<dyn Clock>,
    sessions: AtomicU64,
}

impl RouteSessions {
    /// Sessions whose words go to these.
    #[must_use]
    pub fn new(
        to: (Recipient<GatewayConnected>, Recipient<GatewayAcknowledged>, Recipient<GatewayGone>),
        leader: Leader,
        lease: Duration,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let (connected, acknowledged, gone) = to;
        let sessions = AtomicU64::new(1);
        Self { shared: Arc::new(Shared { connected, acknowledged, gone, leader, lease, clock, sessions }) }
    }
}

#[tonic::async_trait]
impl Routes for RouteSessions {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<wire::RoutesMessage, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<Streaming<wire::GatewayMessage>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let mut words = request.into_inner();
        let first = timeout(HELLO, words.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("a gateway says hello within 10 seconds"))??;
        let first = first.and_then(|word| word.message);
        let Some(wire::gateway_message::Message::Hello(hello)) = first else {
            return Err(Status::invalid_argument("a gateway's first message is its hello"));
        };
        if hello.gateway.is_empty() {
            return Err(Status::invalid_argument("gateway: a gateway needs a name of its own"));
        }
        if hello.gateway.len() > NAME || hello.gateway.chars().any(char::is_control) {
            let text = format!("gateway: its name is at most {NAME} bytes long and has no control characters");
            return Err(Status::invalid_argument(text));
        }
        let shared = Arc::clone(&self.shared);
        let obeyed = leader::Leader { epoch: hello.leader_epoch, started: Instant::from_micros(hello.leader_started) };
        let who = format!("gateway {}", hello.gateway);
        if let Some(problem) = shared.leader.known.outdated(&who, &hello.lineage, obeyed, &shared.leader.lineage) {
            tracing::error!(target: "wharf::router", "{problem}");
            return Err(Status::failed_precondition(problem));
        }
        let session = shared.sessions.fetch_add(1, Ordering::Relaxed);
        let (updates, down) = mpsc::channel(BOUND);
        shared.connected.do_send(GatewayConnected {
            gateway: hello.gateway.clone(),
            session,
            holds: (hello.lineage == shared.leader.lineage).then_some(Epoch(hello.epoch)),
            foreign: !hello.lineage.is_empty() && hello.lineage != shared.leader.lineage,
            updates,
        });
        let welcome = wire::Welcome {
            lineage: shared.leader.lineage.clone(),
            lease_millis: u64::try_from(shared.lease.as_millis()).unwrap_or(u64::MAX),
            leader_epoch: shared.leader.this.epoch,
            leader_started: shared.leader.this.started.as_micros(),
        };
        let welcome = message(wire::routes_message::Message::Welcome(welcome));
        let listener = Listener { gateway: hello.gateway, session, shared: Arc::clone(&shared) };
        let up = async move {
            while let Some(Ok(word)) = words.next().await {
                if let Some(wire::gateway_message::Message::Acknowledged(acknowledged)) = word.message {
                    listener.acknowledged(Epoch(acknowledged.epoch));
                }
            }
            drop(listener);
        };
        let down =
            ReceiverStream::new(down).flat_map(move |update| stream::iter(update_to_wire(update, &shared.clock)));
        let both = stream::select(down.map(Some).chain(stream::iter([None])), stream::once(up).map(|()| None))
            .take_while(|word| futures::future::ready(word.is_some()))
            .filter_map(futures::future::ready);
        Ok(Response::new(Box::pin(stream::iter([welcome]).chain(both).map(Ok))))
    }
}

struct Listener {
    gateway: String,
    session: u64,
    shared: Arc<Shared>,
}

impl Listener {
    fn acknowledged(&self, epoch: Epoch) {
        let (gateway, session) = (self.gateway.clone(), self.session);
        self.shared.acknowledged.do_send(GatewayAcknowledged { gateway, session, epoch });
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.gone.do_send(GatewayGone { gateway: self.gateway.clone(), session: self.session });
    }
}

const fn message(message: wire::routes_message::Message) -> wire::RoutesMessage {
    wire::RoutesMessage { message: Some(message) }
}

/// The messages of an update, each made when the connection has room for it.
fn update_to_wire(update: RouteUpdate, clock: &Arc<dyn Clock>) -> Box<dyn Iterator<Item = wire::RoutesMessage> + Send> {
    use wire::routes_message::Message;
    let one = |word| -> Box<dyn Iterator<Item = _> + Send> { Box::new(std::iter::once(message(word))) };
    match update {
        RouteUpdate::Ping(epoch) => one(Message::Ping(wire::Ping { epoch: epoch.0 })),
        RouteUpdate::Changes(epoch, changes) => {
            let now = clock.now();
            one(Message::Changes(wire::Changes {
                epoch: epoch.0,
                routes: changes.0.iter().map(|route| route_to_wire(route, now)).collect(),
                removed: changes.1.iter().map(ToString::to_string).collect(),
            }))
        }
        RouteUpdate::Table(epoch, routes) => {
            let clock = Arc::clone(clock);
            Box::new(pieces(routes, PIECE).map(move |(routes, last)| {
                let now = clock.now();
                let routes = routes.iter().map(|route| route_to_wire(route, now)).collect();
                message(Message::Table(wire::Table { epoch: epoch.0, routes, last }))
            }))
        }
    }
}
