//! The same parts in a simulated network: partitions cost no request that can go elsewhere, and a seed repeats.

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::future::BoxFuture;
use http_body_util::BodyExt as _;
use tokio_util::sync::CancellationToken;
use wharf::{
    domain::{
        routes::{Epoch, Snapshot},
        time::Instant,
    },
    forward::{self, ClientOptions, Connections, Limits, Request, Upstream as _},
    gateway::{Gateway, Options},
    ports::{BoxIo, Listen, Network, SystemClock},
};

use crate::harness::{Door, grpc_message, grpc_post, model, post, text, version};

#[derive(Debug)]
struct Simulated;

struct SimulatedListen(turmoil::net::TcpListener);

impl std::fmt::Debug for SimulatedListen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SimulatedListen")
    }
}

impl Network for Simulated {
    fn bind<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listen>>> {
        Box::pin(async move {
            let listener = turmoil::net::TcpListener::bind(address).await?;
            Ok(Box::new(SimulatedListen(listener)) as Box<dyn Listen>)
        })
    }

    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<BoxIo>> {
        Box::pin(async move { Ok(Box::new(turmoil::net::TcpStream::connect(address).await?) as BoxIo) })
    }
}

impl Listen for SimulatedListen {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<(BoxIo, String)>> {
        Box::pin(async move {
            let (stream, peer) = self.0.accept().await?;
            Ok((Box::new(stream) as BoxIo, peer.to_string()))
        })
    }

    fn address(&self) -> String {
        self.0.local_addr().map(|address| address.to_string()).unwrap_or_default()
    }
}

/// Sixty requests over two doors, of which one is cut off for a while; answers who answered each.
fn run(seed: u64) -> Vec<String> {
    let log = Arc::new(Mutex::new(Vec::new()));
    let mut sim = turmoil::Builder::new().rng_seed(seed).simulation_duration(Duration::from_secs(120)).build();
    for name in ["one", "two"] {
        sim.host(name, move || async move {
            let door = Door::new(move |request: Request| async move {
                request.into_body().collect().await.expect("whole");
                Ok(text(http::StatusCode::OK, name))
            });
            let listener = Simulated.bind("0.0.0.0:9100").await?;
            forward::serve(listener, door, Limits::default(), CancellationToken::new()).await;
            Ok(())
        });
    }
    let written = Arc::clone(&log);
    sim.client("gateway", async move {
        let clock = Arc::new(SystemClock::starting_at(Instant::from_micros(0)));
        let client = ClientOptions { connect_timeout: Duration::from_millis(500), ..ClientOptions::default() };
        let doors = Connections::new(Arc::new(Simulated), Arc::clone(&clock) as _, client);
        let gateway = Gateway::new(Options::default(), doors, clock, seed);
        let routes = vec![model("iris", vec![version(1, 1, &["one:9100", "two:9100"])])];
        gateway.table().replace(Snapshot { epoch: Epoch(1), routes });
        for turn in 0..60 {
            if turn == 20 {
                // Between two requests: what is idle is closed first, so that none can have begun.
                tokio::time::sleep(Duration::from_secs(70)).await;
                turmoil::partition("gateway", "one");
            }
            if turn == 40 {
                turmoil::repair("gateway", "one");
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
            let request = match turn % 2 {
                0 => post("/v2/models/iris/infer", "x"),
                _ => grpc_post("ModelInfer", grpc_message("iris", "", 100)),
            };
            let response = gateway.call(request).await.expect("a gateway always answers");
            assert_eq!(response.headers().get("grpc-status"), None, "turn {turn}");
            assert_eq!(response.status(), 200, "turn {turn}");
            let body = response.into_body().collect().await.expect("whole").to_bytes();
            written.lock().expect("no panic").push(String::from_utf8_lossy(&body).into_owned());
        }
        Ok(())
    });
    sim.run().expect("the simulation ends well");
    let log = log.lock().expect("no panic").clone();
    assert_eq!(log.len(), 60);
    log
}

#[test]
fn a_partition_costs_no_request_and_a_seed_repeats() {
    let log = run(3);
    assert!(log[..20].contains(&"one".to_owned()) && log[40..].contains(&"one".to_owned()), "{log:?}");
    assert!(log[20..40].iter().all(|door| door == "two"), "{log:?}");
    assert_eq!(log, run(3));
    assert_ne!(log, run(4));
}
