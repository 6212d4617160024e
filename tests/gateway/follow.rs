//! Following the scheduler: what is applied, what is acknowledged and when, and what stays when it is gone.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::Stream;
use http_body_util::BodyExt as _;
use tokio::{
    sync::mpsc,
    task::{JoinHandle, JoinSet},
    time::timeout,
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request as Call, Response as Reply, Status, Streaming};
use wharf::{
    domain::routes::Route,
    forward::{ClientOptions, Request, TcpNetwork, Upstream as _},
    gateway::Options,
    ports::{Clock as _, Network, SystemClock},
    rpc::{
        proto::routes::{
            self as wire, GatewayMessage, RoutesMessage, gateway_message,
            routes_message::Message,
            routes_server::{Routes, RoutesServer},
        },
        routes_wire::route_to_wire,
    },
};

use crate::harness::{Door, HalfDead, PATIENCE, World, model, post, text, until, version};

type Outbound = mpsc::Sender<Result<RoutesMessage, Status>>;

/// A scheduler that does as the test says: it hands over each stream that a gateway opens.
struct Scheduler {
    streams: mpsc::Sender<(Streaming<GatewayMessage>, Outbound)>,
}

#[tonic::async_trait]
impl Routes for Scheduler {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<RoutesMessage, Status>> + Send>>;

    async fn watch(&self, call: Call<Streaming<GatewayMessage>>) -> Result<Reply<Self::WatchStream>, Status> {
        let (sender, receiver) = mpsc::channel(64);
        self.streams.send((call.into_inner(), sender)).await.map_err(|_| Status::unavailable("no"))?;
        Ok(Reply::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// One gateway's stream as the scheduler sees it.
struct Conversation {
    inbound: Streaming<GatewayMessage>,
    outbound: Outbound,
}

impl Conversation {
    async fn say(&self, message: Message) {
        self.outbound.send(Ok(RoutesMessage { message: Some(message) })).await.expect("the gateway listens");
    }

    async fn hear(&mut self) -> gateway_message::Message {
        let heard = timeout(PATIENCE, self.inbound.message()).await.expect("in time").expect("good").expect("more");
        heard.message.expect("something")
    }

    async fn acknowledged(&mut self) -> u64 {
        match self.hear().await {
            gateway_message::Message::Acknowledged(acknowledged) => acknowledged.epoch,
            other => panic!("{other:?}"),
        }
    }

    /// Hello and welcome; answers what lineage and epoch the gateway holds.
    async fn greet(&mut self, lineage: &str) -> (String, u64) {
        self.greet_as(lineage, 0).await
    }

    /// As a leader of this epoch does.
    async fn greet_as(&mut self, lineage: &str, leader_epoch: u64) -> (String, u64) {
        self.greet_with(lineage, leader_epoch, 60_000).await
    }

    /// As a leader with a lease of so many milliseconds does.
    async fn greet_with(&mut self, lineage: &str, leader_epoch: u64, lease_millis: u64) -> (String, u64) {
        let gateway_message::Message::Hello(hello) = self.hear().await else { panic!("hello comes first") };
        assert_eq!(hello.gateway, "gateway");
        self.say(Message::Welcome(wire::Welcome {
            lineage: lineage.into(),
            lease_millis,
            leader_epoch,
            leader_started: 0,
        }))
        .await;
        (hello.lineage, hello.epoch)
    }
}

struct Bench {
    world: World,
    streams: mpsc::Receiver<(Streaming<GatewayMessage>, Outbound)>,
    address: String,
    server: JoinHandle<()>,
    tasks: JoinSet<()>,
}

async fn serve(address: &str) -> (String, JoinHandle<()>, mpsc::Receiver<(Streaming<GatewayMessage>, Outbound)>) {
    let (sender, streams) = mpsc::channel(4);
    let listener = tokio::net::TcpListener::bind(address).await.expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let server = tokio::spawn(async move {
        let routes = RoutesServer::new(Scheduler { streams: sender });
        let serving = tonic::transport::Server::builder().add_service(routes);
        serving.serve_with_incoming(TcpListenerStream::new(listener)).await.expect("served");
    });
    (address, server, streams)
}

impl Bench {
    async fn new() -> Self {
        Self::over(Arc::new(TcpNetwork)).await
    }

    async fn over(network: Arc<dyn Network>) -> Self {
        let (address, server, streams) = serve("127.0.0.1:0").await;
        let options = Options { reconnect_most: Duration::from_millis(100), ..Options::default() };
        let world =
            World::over(network, ClientOptions { connect_timeout: PATIENCE, ..ClientOptions::default() }, options);
        let mut tasks = JoinSet::new();
        tasks.spawn(Arc::clone(&world.gateway).follow(Arc::new(TcpNetwork), address.clone(), CancellationToken::new()));
        Self { world, streams, address, server, tasks }
    }

    async fn next(&mut self) -> Conversation {
        let (inbound, outbound) = timeout(PATIENCE, self.streams.recv()).await.expect("in time").expect("serving");
        Conversation { inbound, outbound }
    }
}

fn table(epoch: u64, routes: &[Route], last: bool) -> Message {
    Message::Table(wire::Table { epoch, routes: to_wire(routes), last })
}

fn changes(epoch: u64, routes: &[Route], removed: &[&str]) -> Message {
    let removed = removed.iter().map(|name| (*name).to_owned()).collect();
    Message::Changes(wire::Changes { epoch, routes: to_wire(routes), removed })
}

fn to_wire(routes: &[Route]) -> Vec<wire::Route> {
    routes.iter().map(|route| route_to_wire(route, SystemClock::new().now())).collect()
}

#[tokio::test]
async fn a_table_in_pieces_becomes_valid_with_the_last_and_changes_follow() {
    let mut bench = Bench::new().await;
    let door = bench.world.local("a", Door::echo());
    let mut scheduler = bench.next().await;
    assert_eq!(scheduler.greet("first").await, (String::new(), 0));
    scheduler.say(table(5, &[model("iris", vec![version(1, 1, &[&door])])], false)).await;
    scheduler.say(table(5, &[model("wine", vec![version(1, 1, &[&door])])], true)).await;
    assert_eq!(scheduler.acknowledged().await, 5);
    assert_eq!(bench.world.get("/v2/models/iris/ready").await.status, 200);
    assert_eq!(bench.world.get("/v2/health/ready").await.status, 200);

    scheduler.say(changes(7, &[model("iris", vec![version(2, 1, &[&door])])], &["wine"])).await;
    assert_eq!(scheduler.acknowledged().await, 7);
    assert_eq!(bench.world.get("/v2/models/iris/ready").await.header("x-seldon-route"), ":iris_2:");
    assert_eq!(bench.world.get("/v2/models/wine/ready").await.status, 404);
    scheduler.say(Message::Ping(wire::Ping { epoch: 7 })).await;
    assert_eq!(scheduler.acknowledged().await, 7);
}

#[tokio::test]
async fn of_many_epochs_that_come_at_once_the_last_is_acknowledged_without_a_ping() {
    let mut bench = Bench::new().await;
    let door = bench.world.local("a", Door::echo());
    let mut scheduler = bench.next().await;
    scheduler.greet("first").await;
    scheduler.say(table(1, &[], true)).await;
    for epoch in 2..=60 {
        scheduler.say(changes(epoch, &[model(&format!("m{epoch}"), vec![version(1, 1, &[&door])])], &[])).await;
    }
    let mut heard = 0;
    while heard < 60 {
        let epoch = scheduler.acknowledged().await;
        assert!(epoch >= heard, "{epoch} after {heard}");
        heard = epoch;
    }
    assert_eq!(bench.world.get("/v2/models/m60/ready").await.status, 200);
}

#[tokio::test]
async fn a_table_that_takes_longer_than_the_lease_does_not_end_it() {
    let mut bench = Bench::new().await;
    let door = bench.world.local("a", Door::echo());
    let mut scheduler = bench.next().await;
    scheduler.greet_with("first", 0, 1000).await;
    let mut pieces = 0;
    let lasting = async {
        loop {
            pieces += 1;
            scheduler.say(table(5, &[model(&format!("m{pieces}"), vec![version(1, 1, &[&door])])], false)).await;
            if let Ok(heard) = timeout(Duration::from_millis(10), scheduler.acknowledged()).await {
                return heard;
            }
        }
    };
    assert_eq!(timeout(PATIENCE, lasting).await, Ok(0), "it is there, and nothing is in force yet");
    assert_eq!(bench.world.gateway.inspect()["models"], 0);
    scheduler.say(table(5, &[], true)).await;
    assert_eq!(scheduler.acknowledged().await, 5);
    assert_eq!(bench.world.gateway.inspect()["models"], pieces);
}

#[tokio::test]
async fn an_epoch_is_acknowledged_only_when_nothing_is_sent_under_an_older_one() {
    let mut bench = Bench::over(Arc::new(HalfDead)).await;
    let mut scheduler = bench.next().await;
    scheduler.greet("first").await;
    scheduler.say(table(1, &[model("iris", vec![version(1, 1, &["black.hole:1"])])], true)).await;
    assert_eq!(scheduler.acknowledged().await, 1);
    // This request has its route, and is on its way to a door that does not take it.
    let gateway = Arc::clone(&bench.world.gateway);
    let sending = tokio::spawn(async move { gateway.call(post("/v2/models/iris/infer", "x")).await });
    until("it is on its way", || {
        bench.world.gateway.inspect()["routes"][0]["targets"][0]["endpoints"][0]["in_flight"] == 1
    })
    .await;
    scheduler.say(changes(2, &[model("iris", vec![])], &[])).await;
    until("the change is applied", || bench.world.gateway.inspect()["epoch"] == 2).await;
    // A ping is answered at once, and truthfully.
    scheduler.say(Message::Ping(wire::Ping { epoch: 2 })).await;
    assert_eq!(scheduler.acknowledged().await, 1);
    sending.abort();
    assert_eq!(scheduler.acknowledged().await, 2);
}

#[tokio::test]
async fn a_slow_inference_does_not_hold_up_an_acknowledgement() {
    let mut bench = Bench::new().await;
    let (begun, mut arrived) = mpsc::channel(4);
    let slow = Door::new(move |request: Request| {
        let begun = begun.clone();
        async move {
            begun.send(()).await.expect("open");
            // An in-process door may keep the body unread for as long as a reload takes.
            std::future::pending::<()>().await;
            drop(request);
            Ok(text(http::StatusCode::OK, ""))
        }
    });
    let (near, far) = (bench.world.local("a", slow.clone()), bench.world.remote(slow).await);
    let mut scheduler = bench.next().await;
    scheduler.greet("first").await;
    let mut epoch = 0;
    for at in [near, far] {
        epoch += 1;
        let routes = [model("iris", vec![version(1, 1, &[&at])])];
        scheduler.say(if epoch == 1 { table(1, &routes, true) } else { changes(epoch, &routes, &[]) }).await;
        assert_eq!(scheduler.acknowledged().await, epoch);
        let gateway = Arc::clone(&bench.world.gateway);
        bench.tasks.spawn(async move { drop(gateway.call(post("/v2/models/iris/infer", "x")).await) });
        timeout(PATIENCE, arrived.recv()).await.expect("at the door");
        epoch += 1;
        scheduler.say(changes(epoch, &[model("iris", vec![])], &[])).await;
        assert_eq!(scheduler.acknowledged().await, epoch);
    }
}

#[tokio::test]
async fn the_last_routes_stay_when_the_scheduler_is_gone_and_are_resumed_when_it_is_back() {
    let mut bench = Bench::new().await;
    let door = bench.world.local("a", Door::echo());
    let mut scheduler = bench.next().await;
    scheduler.greet("first").await;
    scheduler.say(table(3, &[model("iris", vec![version(1, 1, &[&door])])], true)).await;
    assert_eq!(scheduler.acknowledged().await, 3);
    bench.server.abort();
    drop(scheduler);
    (&mut bench.server).await.expect_err("aborted");
    for _ in 0..20 {
        assert_eq!(bench.world.get("/v2/models/iris/ready").await.status, 200);
    }
    let (_, server, streams) = serve(&bench.address).await;
    (bench.server, bench.streams) = (server, streams);
    let mut scheduler = bench.next().await;
    assert_eq!(scheduler.greet("first").await, ("first".to_owned(), 3));
    assert_eq!(scheduler.acknowledged().await, 3);
    scheduler.say(changes(4, &[], &["iris"])).await;
    assert_eq!(scheduler.acknowledged().await, 4);
    // A ping of an epoch that never arrived: the whole table is asked for.
    scheduler.say(Message::Ping(wire::Ping { epoch: 9 })).await;
    let mut scheduler = bench.next().await;
    assert_eq!(scheduler.greet("first").await, (String::new(), 0));
    // The table is still held, and that may be said.
    assert_eq!(scheduler.acknowledged().await, 4);
    // A table that is begun anew counts from its new beginning.
    scheduler.say(table(8, &[model("iris", vec![version(1, 1, &[&door])])], false)).await;
    scheduler.say(table(9, &[], true)).await;
    assert_eq!(scheduler.acknowledged().await, 9);
    assert_eq!(bench.world.get("/v2/models/iris/ready").await.status, 404);
}

#[tokio::test]
async fn another_journals_epochs_begin_anew() {
    let mut bench = Bench::new().await;
    let door = bench.world.local("a", Door::echo());
    let mut scheduler = bench.next().await;
    scheduler.greet("first").await;
    scheduler.say(table(100, &[model("iris", vec![version(1, 1, &[&door])])], true)).await;
    assert_eq!(scheduler.acknowledged().await, 100);
    drop(scheduler);
    let mut scheduler = bench.next().await;
    assert_eq!(scheduler.greet("second").await, ("first".to_owned(), 100));
    // A change of another lineage means nothing on top of this table.
    let guard = bench.world.gateway.table().enter();
    scheduler.say(table(2, &[model("wine", vec![version(1, 1, &[&door])])], true)).await;
    scheduler.say(Message::Ping(wire::Ping { epoch: 2 })).await;
    until("the table is there", || bench.world.gateway.inspect()["epoch"] == 2).await;
    // 100 must not be said: in this lineage it lies in the future.
    drop(guard);
    assert_eq!(scheduler.acknowledged().await, 2);
    assert_eq!(bench.world.get("/v2/models/iris/ready").await.status, 404);
    let body = bench.world.gateway.call(crate::harness::get("/v2/models/wine/ready")).await.expect("an answer");
    assert!(body.into_body().collect().await.is_ok());
}

#[tokio::test]
async fn an_older_leader_of_the_same_journal_takes_no_route_away() {
    let mut bench = Bench::new().await;
    let door = bench.world.local("a", Door::echo());
    let mut scheduler = bench.next().await;
    scheduler.greet_as("first", 9).await;
    scheduler.say(table(100, &[model("iris", vec![version(1, 1, &[&door])])], true)).await;
    assert_eq!(scheduler.acknowledged().await, 100);
    drop(scheduler);
    // A backup was restored: it does not know the model. The gateway hangs up, and comes again.
    for _ in 0..2 {
        let mut older = bench.next().await;
        older.greet_as("first", 4).await;
        older.say(table(200, &[], true)).await;
    }
    assert_eq!(bench.world.gateway.inspect()["epoch"], 100);
    assert_eq!(bench.world.get("/v2/models/iris/ready").await.status, 200);
    // As another history it is believed.
    let mut adopted = bench.next().await;
    adopted.greet_as("second", 5).await;
    adopted.say(table(1, &[], true)).await;
    until("the other history", || bench.world.gateway.inspect()["epoch"] == 1).await;
    assert_eq!(bench.world.get("/v2/models/iris/ready").await.status, 404);
}
