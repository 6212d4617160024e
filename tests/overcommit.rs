//! The promise: more models than memory holds are all served, the memory rule is kept at every instant, and what can't
//! be served is refused with a reason and with a time to come back.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on says so"
)]
#![expect(clippy::disallowed_methods, reason = "a test against a real process has the real clock")]

mod process;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use process::{
    Home, Spec, Wharf, count, full,
    load::{Clients, Load, Protocol, Question, Random, in_turns},
    onnx,
    proof::proof,
    said,
};
use wharf::rpc::proto::wharf::{ModelView, Rollout, ServerView, submit_model_response};

const MIB: u64 = 1 << 20;
/// Models, and how many of them memory holds.
const MODELS: u64 = 55;
const HELD: u64 = 50;

async fn packed(home: &Home) -> Wharf {
    let wharf = home.up().await;
    for number in 0..MODELS {
        wharf.submit(&Spec::new(&format!("m{number}"), artifact_of(number), MIB)).await.unwrap();
    }
    for number in 0..MODELS {
        wharf.until_serving(&format!("m{number}"), 1).await;
    }
    wharf
}

const fn artifact_of(model: u64) -> &'static str {
    if model.is_multiple_of(2) { "iris-1" } else { "iris-2" }
}

fn question(number: u64, model: u64) -> Question {
    let wanted = i64::from(model % 2 == 1);
    let check = move |answer: &process::load::Answer| {
        let right = answer.model == format!("m{model}_1") && answer.label == wanted;
        if right { Ok(()) } else { Err(format!("m{model}_1 says {wanted}")) }
    };
    Question { model: format!("m{model}"), protocol: in_turns(number), check: Box::new(check) }
}

/// Looks at memory until it is told to stop: the limits hold at each look. Gives the looks and the most that was
/// resident.
fn watch_memory(wharf: &Wharf) -> (Arc<AtomicBool>, tokio::task::JoinHandle<(u64, u64)>) {
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, page, mut client) = (Arc::clone(&stop), wharf.page.clone(), wharf.wharf.clone());
    let task = tokio::spawn(async move {
        let (mut looks, mut most) = (0_u64, 0_u64);
        while !stopped.load(Ordering::Acquire) {
            let request = wharf::rpc::proto::wharf::ListServersRequest { name: None };
            let mut servers = client.list_servers(request).await.unwrap().into_inner();
            while let Some(server) = servers.message().await.unwrap() {
                for replica in &server.replicas {
                    let limit = replica.capacity + replica.capacity * u64::from(replica.overcommit_percent) / 100;
                    assert!(replica.resident <= replica.capacity, "over its memory: {replica:?}");
                    assert!(replica.registered <= limit, "over what may be registered: {replica:?}");
                }
            }
            // The agent's own ledger, as it is at this instant.
            let metrics = process::load::get(&page, "/metrics").await;
            let resident = process::sample(&metrics, "seldon_loaded_model_memory_bytes_gauge").expect("it is exported");
            let capacity = process::sample(&metrics, "seldon_server_replica_memory_capacity_bytes_gauge").unwrap();
            assert!(resident <= capacity, "{resident} bytes are resident, {capacity} may be");
            most = most.max(resident as u64);
            looks += 1;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        (looks, most)
    });
    (stop, task)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_five_models_where_fifty_fit_answer_every_request() {
    let requests = count(20_000, 1_500) as u64;
    let home = Home::new(&onnx(1, &format!("{HELD}Mi"), 10)).set("scheduler.heartbeat", "50ms");
    let wharf = packed(&home).await;
    let rate = if full() { 300 } else { 200 };
    for (traffic, zipf) in [("uniform", false), ("Zipf", true)] {
        let evicted = wharf.metric("seldon_cache_evict_count").await;
        let (stop, watched) = watch_memory(&wharf);
        let mut random = Random::new(7);
        // Zipf with exponent 1 over the models: the harmonic numbers as a table.
        let steps: Vec<f64> = (1..=MODELS)
            .scan(0.0, |sum, rank| {
                *sum += 1.0 / rank as f64;
                Some(*sum)
            })
            .collect();
        let load = Load::start(&wharf.gateway, rate, move |number| {
            let model = if zipf {
                let point = random.below(1 << 30) as f64 / f64::from(1 << 30) * steps[steps.len() - 1];
                steps.partition_point(|step| *step < point) as u64
            } else {
                random.below(MODELS)
            };
            question(number, model)
        })
        .await;
        while load.sent() < requests && load.failed() == 0 {
            load.more(100).await;
        }
        let account = load.stop().await;
        stop.store(true, Ordering::Release);
        let (looks, most) = watched.await.unwrap();
        account.assert_clean(&wharf);
        assert_eq!(account.by_version.len() as u64, MODELS, "every model was asked: {:?}", account.by_version);
        assert!(most > (HELD - 5) * MIB, "memory is used: {most}");
        let evictions = wharf.metric("seldon_cache_evict_count").await.unwrap() - evicted.unwrap_or(0.0);
        assert!(evictions > 10.0, "{evictions} evictions: nothing had to make room");
        proof(
            &format!("{MODELS} models where memory holds {HELD}, {traffic} traffic, REST and gRPC"),
            &format!(
                "{}; {evictions} evictions; memory kept at {looks} looks, at most {} MiB of {HELD}",
                account.line(),
                most / MIB
            ),
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_never_fit_is_refused_before_anything_is_evicted() {
    let home = Home::new(&onnx(1, &format!("{HELD}Mi"), 10));
    let wharf = packed(&home).await;
    let evicted = wharf.metric("seldon_cache_evict_count").await;
    let before = wharf.servers().await;
    wharf.submit(&Spec::new("giant", "iris-1", (HELD + 1) * MIB)).await.unwrap();
    let refused = |view: &wharf::rpc::proto::wharf::ModelView| view.state == "ScheduleFailed";
    let view = wharf.until("giant", "refused", refused).await;
    assert!(view.reason.contains("MiB"), "{}", view.reason);
    // And one more than may be registered, small as it is: the reason says how much is missing.
    wharf.submit(&Spec::new("straw", "iris-1", MIB)).await.unwrap();
    let view = wharf.until("straw", "refused", refused).await;
    assert!(view.reason.contains("lacks at least 1 MiB"), "{}", view.reason);
    assert_eq!(wharf.metric("seldon_cache_evict_count").await, evicted, "something was evicted for nothing");
    let after = wharf.servers().await;
    assert_eq!(before[0].replicas[0].registered, after[0].replicas[0].registered);
    // A request for it is refused with a time, and is no 404.
    let clients = Clients::connect(&wharf.gateway).await;
    let refused = clients.ask(0, "giant", Protocol::Rest).await.unwrap_err();
    assert_eq!(refused.status, "503", "{refused:?}");
    assert!(refused.headers.contains("retry-after"), "{refused:?}");
    let refused = clients.ask(0, "giant", Protocol::Grpc).await.unwrap_err();
    assert_eq!(refused.status, "Unavailable", "{refused:?}");
    // Room made is room used.
    wharf.unload("m0").await.unwrap();
    wharf.until_serving("straw", 1).await;
    proof("a model that can't fit is refused with the reason", &view.reason);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_wait_for_an_evicted_copy_are_bounded() {
    // Memory for one copy, and two are registered: each request for the other one waits for a reload.
    let home = Home::new(&onnx(1, "1Mi", 100)).set("agent.waiting_requests", 2).set("agent.wait_deadline", "5s");
    let wharf = home.up().await;
    for model in 0..2 {
        wharf.submit(&Spec::new(&format!("m{model}"), artifact_of(model), MIB)).await.unwrap();
    }
    for model in 0..2 {
        wharf.until_serving(&format!("m{model}"), 1).await;
    }
    let clients = Clients::connect(&wharf.gateway).await;
    let refused = AtomicU64::new(0);
    let answered = AtomicU64::new(0);
    let total = count(20_000, 2_000) as u64;
    let next = AtomicU64::new(0);
    let workers = (0..64).map(|_| async {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= total {
                break;
            }
            let protocol = in_turns(number);
            match clients.ask(number, &format!("m{}", number / 2 % 2), protocol).await {
                Ok(answer) => {
                    assert_eq!(answer.label, i64::from(number / 2 % 2 == 1));
                    answered.fetch_add(1, Ordering::Relaxed);
                }
                Err(refusal) => {
                    let kind = refusal.status.as_str();
                    assert!(["503", "Unavailable", "ResourceExhausted"].contains(&kind), "{refusal:?}");
                    assert!(refusal.headers.contains("retry-after"), "{refusal:?}");
                    refused.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    });
    futures::future::join_all(workers).await;
    let (answered, refused) = (answered.into_inner(), refused.into_inner());
    assert_eq!(answered + refused, total, "each request is counted once");
    assert!(refused > 0, "the queue is bounded, and 64 callers are more");
    assert!(answered > 10, "{answered} of {total} were answered");
    // It is over once the storm is: nothing is stuck.
    for model in [0, 1, 0, 1, 0, 1] {
        let asked = std::time::Instant::now();
        let answer = clients.ask(0, &format!("m{model}"), Protocol::Rest).await;
        let answer = answer.unwrap_or_else(|refusal| {
            panic!(
                "m{model} after {:?}, {answered} answered, {refused} refused: {refusal:?}\n{}",
                asked.elapsed(),
                wharf.tail()
            )
        });
        assert_eq!(answer.label, model);
    }
    proof(
        "more requests than may wait for evicted copies",
        &format!(
            "{total} requests: {answered} answered, {refused} refused with 503 or RESOURCE_EXHAUSTED and a Retry-After"
        ),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pinned_model_stays_in_memory_while_others_take_turns_there() {
    let home = Home::new(&onnx(1, "4Mi", 200));
    let wharf = home.up().await;
    let rollout = |pinned| Some(Rollout { pinned: Some(pinned), ..Rollout::default() });
    let spec = |name: &str, memory: u64, pinned| Spec { rollout: rollout(pinned), ..Spec::new(name, "iris-1", memory) };
    wharf.submit(&spec("kept", 2 * MIB, true)).await.unwrap();
    wharf.until_serving("kept", 1).await;
    let others = ["a", "b", "c"];
    for name in others {
        wharf.submit(&spec(name, 2 * MIB, false)).await.unwrap();
        wharf.until_serving(name, 1).await;
    }
    let clients = Clients::connect(&wharf.gateway).await;
    for number in 0..30 {
        let name = others[number as usize % 3];
        assert_eq!(clients.ask(number, name, in_turns(number)).await.unwrap().model, format!("{name}_1"));
        let view = wharf.view("kept").await.unwrap();
        assert_eq!(view.versions[0].copies[0].residency, "resident", "{view:?}");
    }
    let evictions = wharf.metric("seldon_cache_evict_count").await.unwrap();
    assert!(evictions >= 29.0, "{evictions} evictions: the others did not take turns");
    let status = said(&wharf.cli(&["model", "status", "kept", "-o", "table"]).await);
    assert!(status.contains(", pinned"), "{status}");

    // What could not come in beside it has no place here; and what is pinned leaves room for the others.
    let missing = |view: &ModelView| view.reason.contains("lacks at least 1 MiB beside pinned copies");
    wharf.submit(&spec("large", 3 * MIB, false)).await.unwrap();
    wharf.until("large", "refused", missing).await;
    wharf.submit(&spec("more", MIB, true)).await.unwrap();
    wharf.until("more", "refused", missing).await;

    // It is so after a restart, until its user takes it back: the deployment changes, and no version.
    wharf.kill();
    let wharf = home.up().await;
    let resident = |view: &ModelView, wanted: &str| view.versions[0].copies[0].residency == wanted;
    wharf.until("kept", "in memory again", |view| view.state == "Available" && resident(view, "resident")).await;
    let clients = Clients::connect(&wharf.gateway).await;
    for number in 0..6 {
        clients.ask(number, others[number as usize % 3], in_turns(number)).await.unwrap();
    }
    assert!(resident(&wharf.view("kept").await.unwrap(), "resident"));
    let answer = wharf.submit(&spec("kept", 2 * MIB, false)).await.unwrap();
    assert_eq!((answer.version, answer.outcome()), (1, submit_model_response::Outcome::Rescaled));
    wharf.until_serving("large", 1).await;
    wharf.until_serving("more", 1).await;
    wharf.until("kept", "evicted", |view| resident(view, "evicted")).await;

    // Pinned again, and another one beside it, it is in the way of all others: they are to move, and have nowhere to.
    wharf.submit(&spec("kept", 2 * MIB, true)).await.unwrap();
    let crowded = |servers: &[ServerView]| {
        let conditions = servers[0].conditions.iter();
        conditions.clone().any(|what| what.contains("crowded by pinned copies"))
            && conditions.clone().any(|what| what.contains("keeps 4 copies for want of another place"))
    };
    wharf.until_servers("crowded replica", crowded).await;
}
