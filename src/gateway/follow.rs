//! Keeps the route table that of the scheduler.
//!
//! The rule of this module: what the scheduler sent last stays in force until it sends something newer, however
//! long it is gone. An epoch is acknowledged when nothing will be sent under an older one, and not before; a
//! ping is answered at once with the newest epoch of which that is true, so that a request that is slow to leave
//! delays an acknowledgement but never the lease.

use std::{
    sync::{Arc, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};

use super::{Gateway, epochs::Turn, route::Draft};
use crate::{
    domain::{
        leader::Leader,
        names::ModelName,
        routes::{Absence, Changes, Epoch, Route},
        time::Instant,
    },
    ports::Network,
    rpc::{
        proto::routes::{self as wire, gateway_message, routes_client::RoutesClient, routes_message},
        routes_wire::route_from_wire,
    },
};

/// The largest message that the scheduler may send.
const MESSAGE: usize = 64 << 20;
/// Words to the scheduler on their way at a time.
const OUTBOX: usize = 16;
/// How long the scheduler may be silent until it says what the lease is.
const FIRST_LEASE: Duration = Duration::from_secs(10);
/// How often a silent connection is probed.
const PROBE: Duration = Duration::from_secs(5);

/// The journal whose routes the table holds.
#[derive(Clone, Debug)]
pub(super) struct Lineage {
    pub(super) name: String,
    /// The leader that sent it.
    leader: Leader,
    /// The turn at which the table became this lineage's.
    since: u64,
}

/// Why a connection to the scheduler ended.
#[derive(Debug, Error)]
enum Lost {
    #[error("{0:?} is not an address of the form host:port: {1}")]
    Address(String, tonic::transport::Error),
    #[error("the scheduler at {0} could not be reached: {1}")]
    Connect(String, String),
    #[error("the scheduler ended the stream of routes: {0}")]
    Ended(Status),
    #[error("the scheduler closed the stream of routes")]
    Closed,
    #[error("the scheduler was silent for {0:?}")]
    Silent(Duration),
    #[error("the scheduler speaks of epoch {0}, and nothing made it here: the whole table is asked for again")]
    Missed(u64),
    #[error(
        "the scheduler speaks for leader epoch {epoch} of its journal, and its routes are of epoch {held}: its journal is \
         older than they are, as after restoring a backup"
    )]
    Outdated { epoch: u64, held: u64 },
}

/// One connection to the scheduler.
struct Session {
    inbound: Streaming<wire::RoutesMessage>,
    outbound: mpsc::Sender<wire::GatewayMessage>,
    lease: Duration,
    /// The lineage that the scheduler named.
    lineage: String,
    /// Who it is.
    leader: Leader,
    /// The table that is coming, as far as it has come.
    draft: Option<Draft>,
    /// When it was last told, in the midst of a table, that somebody is here.
    told: Instant,
    /// The turn to acknowledge when it has settled.
    owed: Option<Turn>,
}

impl Session {
    fn forget_draft(&mut self) {
        if let Some(draft) = self.draft.take() {
            tokio::spawn(draft.into_past().forget());
        }
    }
}

impl Gateway {
    /// Keeps the table that of the scheduler at `address`, `host:port`, until `shutdown`. Ends only then.
    pub async fn follow(self: Arc<Self>, network: Arc<dyn Network>, address: String, shutdown: CancellationToken) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.follow_always(network, address) => {}
        }
    }

    async fn follow_always(&self, network: Arc<dyn Network>, address: String) {
        let mut wait = self.options.reconnect_first;
        // When changes were missed, the scheduler must not resume where the table is.
        let mut anew = false;
        loop {
            let lost = match self.connect(&network, &address, anew).await {
                Ok(mut session) => {
                    let heard = self.metrics.epochs.load(Ordering::Relaxed);
                    let lost = self.listen(&mut session).await;
                    session.forget_draft();
                    if self.metrics.epochs.load(Ordering::Relaxed) > heard {
                        wait = self.options.reconnect_first;
                    }
                    lost
                }
                Err(lost) => lost,
            };
            anew = matches!(lost, Lost::Missed(_));
            tracing::warn!(reason = %lost, "routes are not followed; the last ones stay in force");
            // Between half of it and all of it, so that many gateways don't call at the same instant.
            sleep(wait / 2 + (wait / 2).mul_f64((self.random.next() >> 11) as f64 / (1_u64 << 53) as f64)).await;
            wait = (wait * 2).min(self.options.reconnect_most);
        }
    }

    async fn connect(&self, network: &Arc<dyn Network>, address: &str, anew: bool) -> Result<Session, Lost> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| Lost::Address(address.to_owned(), error))?
            .connect_timeout(self.options.connect_timeout)
            .http2_keep_alive_interval(PROBE)
            .keep_alive_timeout(PROBE)
            .keep_alive_while_idle(true);
        let unreachable = |problem: String| Lost::Connect(address.to_owned(), problem);
        let connector = tower::service_fn({
            let (network, address) = (Arc::clone(network), address.to_owned());
            move |_| {
                let (network, address) = (Arc::clone(&network), address.clone());
                async move { network.connect(&address).await.map(TokioIo::new) }
            }
        });
        let connecting = timeout(self.options.connect_timeout, endpoint.connect_with_connector(connector));
        let channel: Channel = connecting
            .await
            .map_err(|_| unreachable(format!("nothing within {:?}", self.options.connect_timeout)))?
            .map_err(|error| unreachable(chain(&error)))?;
        self.metrics.connects.fetch_add(1, Ordering::Relaxed);
        let (outbound, words) = mpsc::channel(OUTBOX);
        let held = self.table.held_epoch().0.zip(self.lineage()).filter(|_| !anew);
        let (epoch, lineage, leader) =
            held.map_or_else(Default::default, |(epoch, lineage)| (epoch.0, lineage.name, lineage.leader));
        let (leader_epoch, leader_started) = (leader.epoch, leader.started.as_micros());
        let hello = wire::Hello { gateway: self.options.name.clone(), lineage, epoch, leader_epoch, leader_started };
        // It is the first word: there is room.
        drop(outbound.try_send(word(gateway_message::Message::Hello(hello))));
        let mut client = RoutesClient::new(channel).max_decoding_message_size(MESSAGE);
        let watching = timeout(self.options.connect_timeout, client.watch(ReceiverStream::new(words)));
        let inbound = watching
            .await
            .map_err(|_| unreachable("it did not begin to send routes".to_owned()))?
            .map_err(Lost::Ended)?
            .into_inner();
        Ok(Session {
            inbound,
            outbound,
            lease: FIRST_LEASE,
            lineage: String::new(),
            leader: Leader::default(),
            draft: None,
            told: self.clock.now(),
            owed: None,
        })
    }

    async fn listen(&self, session: &mut Session) -> Lost {
        loop {
            let (owed, outbound) = (session.owed, session.outbound.clone());
            let settle = async {
                match owed {
                    Some(turn) => self.table.settle(turn).await,
                    None => std::future::pending().await,
                }
                // Without room for the acknowledgement it would be the next ping's, seconds later.
                outbound.reserve().await
            };
            let message = tokio::select! {
                biased;
                room = settle => {
                    session.owed = None;
                    if let (Ok(room), Some(word)) = (room, self.acknowledgement()) {
                        room.send(word);
                    }
                    continue;
                }
                message = timeout(session.lease, session.inbound.message()) => message,
            };
            let message = match message {
                Ok(Ok(Some(message))) => message.message,
                Ok(Ok(None)) => return Lost::Closed,
                Ok(Err(status)) => return Lost::Ended(status),
                Err(_) => return Lost::Silent(session.lease),
            };
            // A message of a later version of the protocol changes nothing here.
            let Some(message) = message else { continue };
            if let Err(lost) = self.take(session, message).await {
                return lost;
            }
            // What else has come is buffered, and would be taken at once.
            tokio::task::yield_now().await;
        }
    }

    async fn take(&self, session: &mut Session, message: routes_message::Message) -> Result<(), Lost> {
        match message {
            routes_message::Message::Welcome(welcome) => {
                let started = Instant::from_micros(welcome.leader_started);
                session.leader = Leader { epoch: welcome.leader_epoch, started };
                session.lineage = welcome.lineage;
                let held =
                    self.lineage().filter(|held| held.name == session.lineage).map_or(0, |held| held.leader.epoch);
                if session.leader.epoch != 0 && session.leader.epoch < held {
                    return Err(Lost::Outdated { epoch: session.leader.epoch, held });
                }
                if welcome.lease_millis > 0 {
                    session.lease = Duration::from_millis(welcome.lease_millis);
                }
                if self.is_same_lineage(session) {
                    // What is held is still good: the lease may begin.
                    session.owed = Some(self.table.latest());
                }
            }
            routes_message::Message::Table(table) => {
                let epoch = Epoch(table.epoch);
                // Pieces of a table that was given up for a newer one are forgotten.
                if session.draft.as_ref().is_some_and(|draft| draft.epoch != epoch) {
                    session.forget_draft();
                }
                let mut draft = session.draft.take().unwrap_or_else(|| Draft::new(epoch));
                self.table.add(&mut draft, table.routes.into_iter().filter_map(|route| self.route(route)));
                if !table.last {
                    session.draft = Some(draft);
                    self.stay(session);
                } else {
                    let (turn, past) = self.table.publish(draft);
                    tokio::spawn(past.forget());
                    self.metrics.epochs.fetch_add(1, Ordering::Relaxed);
                    let (name, leader) = (session.lineage.clone(), session.leader);
                    *self.lineage_mut() = Some(Lineage { name, leader, since: turn.sequence });
                    session.owed = Some(turn);
                }
            }
            routes_message::Message::Changes(changes) => {
                if !self.is_same_lineage(session) {
                    return Err(Lost::Missed(changes.epoch));
                }
                let removed = changes.removed.iter().filter_map(|name| ModelName::new(name).ok()).collect();
                let routes = changes.routes.into_iter().filter_map(|route| self.route(route)).collect();
                if let Some(turn) = self.table.apply(Changes { epoch: Epoch(changes.epoch), routes, removed }).await {
                    self.metrics.epochs.fetch_add(1, Ordering::Relaxed);
                    session.owed = Some(turn);
                }
            }
            routes_message::Message::Ping(ping) => {
                let held = self.table.held_epoch().0;
                if !self.is_same_lineage(session) || held.is_none_or(|held| held.0 < ping.epoch) {
                    return Err(Lost::Missed(ping.epoch));
                }
                if let Some(word) = self.acknowledgement() {
                    // What finds no room is not said: the next ping asks for it again.
                    drop(session.outbound.try_send(word));
                }
            }
        }
        Ok(())
    }

    /// Keeps the lease while a table comes: of very many routes it takes longer than that, and the pings are behind it.
    fn stay(&self, session: &mut Session) {
        let now = self.clock.now();
        if now.since(session.told) >= session.lease / 4 {
            session.told = now;
            let held = self.is_same_lineage(session).then(|| self.acknowledgement()).flatten();
            drop(session.outbound.try_send(held.unwrap_or_else(|| acknowledged(Epoch::default()))));
        }
    }

    /// A route that is not understood leaves its model known, without an endpoint and with the reason: sending to
    /// what it was before could be sending to what it was taken from.
    fn route(&self, route: wire::Route) -> Option<Route> {
        let name = route.model.clone();
        match route_from_wire(route, self.clock.now()) {
            Ok(route) => Some(route),
            Err(error) => {
                tracing::error!(model = name, %error, "a route was not understood");
                let absence = Absence { state: "Unknown".to_owned(), reason: error.to_string(), ..Absence::default() };
                Some(Route { model: ModelName::new(&name).ok()?, targets: Vec::new(), absence })
            }
        }
    }

    /// Says under which epoch, at the oldest, requests are sent from now on.
    fn acknowledgement(&self) -> Option<wire::GatewayMessage> {
        let settled = self.table.settled();
        let known = self.lineage().is_some_and(|lineage| settled.sequence >= lineage.since);
        known.then(|| acknowledged(settled.epoch))
    }

    fn is_same_lineage(&self, session: &Session) -> bool {
        self.lineage_mut().as_ref().is_some_and(|lineage| lineage.name == session.lineage)
    }

    pub(super) fn lineage(&self) -> Option<Lineage> {
        self.lineage_mut().clone()
    }

    fn lineage_mut(&self) -> MutexGuard<'_, Option<Lineage>> {
        self.lineage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Of epoch 0 it says that nothing is held.
const fn acknowledged(epoch: Epoch) -> wire::GatewayMessage {
    word(gateway_message::Message::Acknowledged(wire::Acknowledged { epoch: epoch.0 }))
}

const fn word(message: gateway_message::Message) -> wire::GatewayMessage {
    wire::GatewayMessage { message: Some(message) }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += ": ";
        text += &cause.to_string();
        source = cause.source();
    }
    text
}
