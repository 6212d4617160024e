//! An agent keeps its promises: to the scheduler, to requests, to the memory beside it.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    missing_debug_implementations,
    reason = "a test stops where it fails, and shares a helper module"
)]

mod agent_world;

use std::{sync::Arc, time::Duration};

use agent_world::{Server, World, entries, generation, register, rest, text, unregister};
use futures::future::join_all;
use http_body_util::BodyExt as _;
use wharf::{
    agent::{Facts, runtimes::Kind},
    domain::{
        copy::{FailureClass, Report, Residency},
        memory::{Bytes, Resources},
        order::Order,
        warmup::Warmup,
    },
    forward::{Body, COPY, NOT_HERE, NOT_STARTED, RESIDENCY},
    rpc::proto::{agent::agent_message, inference::ModelInferRequest},
};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn a_copy_lives_from_its_order_to_its_last_word_and_leaves_nothing_behind() {
    let (world, mut session) = World::new(10, |_| {}).await;
    world.server.edit(|state| state.load_time = SECOND);
    let first = generation(1, 1, 1);
    session.obeyed(&[world.register("iris", first, 4)]).await;
    session.until(first, |report| matches!(report, Report::Loading { .. })).await;
    session.available(first).await;
    assert_eq!(entries(&world.folder_of("iris_1")), ["size"]);

    let response = world.infer("iris", first).await;
    assert_eq!((response.status().as_u16(), response.headers()[RESIDENCY].to_str().unwrap()), (200, "resident"));
    assert_eq!(text(response).await, "iris_1");
    let direct = world.door.call(rest("iris", None)).await.unwrap();
    assert_eq!(text(direct).await, "iris_1");

    // The second version is loaded beside the first, and the first one's door then names it.
    let second = generation(1, 2, 2);
    session.obeyed(&[world.register("iris", second, 5)]).await;
    session.available(second).await;
    assert!(world.server.is_loaded("iris_1") && world.server.is_loaded("iris_2"));
    session.obeyed(&[unregister("iris", first, SECOND)]).await;
    session.unloaded(first).await;
    let response = world.infer("iris", first).await;
    assert_eq!(response.status().as_u16(), 421);
    assert_eq!(response.headers()[NOT_HERE], "2");
    assert!(response.headers().contains_key(NOT_STARTED));

    session.obeyed(&[unregister("iris", second, SECOND)]).await;
    session.unloaded(second).await;
    assert!(entries(&world.options.repository).is_empty());
    assert!(entries(&world.options.data_dir.join("copies")).is_empty());
    let inspected = world.agent.inspect();
    assert_eq!(
        (inspected["resident"]["primary"].as_u64(), inspected["copies"].as_array().unwrap().len()),
        (Some(0), 0)
    );
    // An order that is repeated late is answered, not obeyed.
    session.obeyed(&[unregister("iris", second, SECOND)]).await;
    session.unloaded(second).await;
    assert_eq!(world.server.loads_of("iris_2"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_grpc_request_is_renamed_and_refused_in_its_own_words() {
    let (world, mut session) = World::new(10, |_| {}).await;
    let copy = world.all_available(&mut session, &[4]).await[0];
    let message =
        ModelInferRequest { model_name: "m0".into(), model_version: "7".into(), id: "x".into(), ..Default::default() };
    let call = |copy: wharf::domain::version::Generation| {
        let encoded = prost::Message::encode_to_vec(&message);
        let mut framed = vec![0];
        framed.extend_from_slice(&u32::try_from(encoded.len()).unwrap().to_be_bytes());
        framed.extend_from_slice(&encoded);
        let request = http::Request::post("/inference.GRPCInferenceService/ModelInfer")
            .header("content-type", "application/grpc")
            .header(COPY, copy.to_string())
            .body(Body::from(bytes::Bytes::from(framed)))
            .unwrap();
        world.door.call(request)
    };
    assert_eq!(text(call(copy).await.unwrap()).await, "grpc");
    let body = world.server.0.lock().unwrap().bodies[0].clone();
    assert_eq!(u32::from_be_bytes(body[1..5].try_into().unwrap()) as usize, body.len() - 5);
    let seen: ModelInferRequest = prost::Message::decode(&body[5..]).unwrap();
    assert_eq!((seen.model_name.as_str(), seen.model_version.as_str(), seen.id.as_str()), ("m0_1", "", "x"));

    let response = call(generation(99, 1, 1)).await.unwrap();
    assert_eq!(response.status().as_u16(), 200);
    assert_eq!(response.headers()["grpc-status"], "14");
    assert_eq!(response.headers()[NOT_HERE], "");
    assert!(response.into_body().collect().await.unwrap().to_bytes().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_door_lets_no_load_or_unload_pass() {
    let (world, mut session) = World::new(10, |_| {}).await;
    world.all_available(&mut session, &[4]).await;
    let post = |path: &str| world.door.call(http::Request::post(path).body(Body::empty()).unwrap());
    for path in ["/v2/repository/models/m0_1/unload", "/v2/repository/index", "/metrics"] {
        assert_eq!(post(path).await.unwrap().status().as_u16(), 403, "{path}");
    }
    assert!(world.server.is_loaded("m0_1"));
    let mut request = rest("m0", None);
    request.headers_mut().insert(COPY, "nonsense".parse().unwrap());
    assert_eq!(world.door.call(request).await.unwrap().status().as_u16(), 400);
    let live = http::Request::get("/v2/health/live").body(Body::empty()).unwrap();
    assert_eq!(world.door.call(live).await.unwrap().status().as_u16(), 200);
}

#[tokio::test(start_paused = true)]
async fn one_reload_serves_all_who_wait() {
    let (world, mut session) = World::new(10, |_| {}).await;
    let copies = world.all_available(&mut session, &[6, 6]).await;
    assert!(!world.server.is_loaded("m0_1"), "evicted for the second");
    world.server.edit(|state| state.load_time = SECOND);
    let answers = join_all((0..50).map(|_| world.infer("m0", copies[0]))).await;
    assert!(answers.iter().all(|one| one.status() == 200 && one.headers()[RESIDENCY] == "reloaded"));
    assert_eq!(world.server.loads_of("m0_1"), 2, "one first load, one reload");
    assert!(world.server.0.lock().unwrap().most_bytes <= 10);
    assert_eq!(world.agent.metrics().cache_evict.get(), 2);
    assert_eq!(world.agent.metrics().cache_miss.get(), 50);
}

#[tokio::test(start_paused = true)]
async fn memory_holds_and_every_request_is_answered_under_pressure() {
    for seed in 0..8 {
        under_pressure(seed, 40).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_same_holds_when_all_of_it_happens_at_once() {
    for seed in 100..103 {
        under_pressure(seed, 30).await;
    }
}

/// Twelve clients ask for eight models, of which about three fit, and read their answers slowly.
async fn under_pressure(mut seed: u64, requests: usize) {
    let (world, mut session) = World::new(12, |options| options.reload_wait = 600 * SECOND).await;
    world.server.edit(|state| {
        state.load_time = Duration::from_millis(3);
        state.unload_time = Duration::from_millis(1);
    });
    let copies = world.all_available(&mut session, &[3, 4, 5, 6, 2, 7, 3, 4]).await;
    let mut next = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).unwrap()
    };
    let world = Arc::new(world);
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..12 {
        let plan: Vec<usize> = (0..requests).map(|_| next() % 8).collect();
        let (world, copies) = (Arc::clone(&world), copies.clone());
        clients.spawn(async move {
            for one in plan {
                let model = format!("m{one}");
                let asking = world.infer(&model, copies[one]);
                // Who waits too long gives up.
                let Ok(response) = tokio::time::timeout(Duration::from_millis(200 + one as u64 * 50), asking).await
                else {
                    continue;
                };
                assert_eq!(response.status(), 200);
                tokio::time::sleep(Duration::from_millis(1)).await;
                assert!(world.server.is_loaded(&format!("m{one}_1")), "unloaded under a stream");
                assert_eq!(text(response).await, format!("m{one}_1"));
            }
        });
    }
    while let Some(ended) = tokio::time::timeout(3600 * SECOND, clients.join_next()).await.expect("nobody starves") {
        ended.unwrap();
    }
    let most = world.server.0.lock().unwrap().most_bytes;
    assert!(most <= 12, "{most} bytes were resident");
    let settled = |world: &World| {
        let all = world.agent.inspect();
        all["copies"]
            .as_array()
            .unwrap()
            .iter()
            .all(|one| one["holds"] == 0 && matches!(one["phase"].as_str(), Some("Resident" | "Evicted")))
    };
    world.until(settled).await;
    let loaded: u64 = world.server.0.lock().unwrap().loaded.values().sum();
    assert_eq!(world.agent.inspect()["resident"]["primary"].as_u64(), Some(loaded), "the ledger says what is loaded");
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_gives_up_ends_nothing_for_the_others() {
    let (world, mut session) = World::new(10, |_| {}).await;
    let copies = world.all_available(&mut session, &[6, 6]).await;
    world.server.edit(|state| state.load_time = 5 * SECOND);
    let first = tokio::time::timeout(SECOND, world.infer("m0", copies[0]));
    let second = world.infer("m0", copies[0]);
    let (first, second) = tokio::join!(first, second);
    assert!(first.is_err());
    assert_eq!(second.status(), 200);
    drop(second);
    assert_eq!(world.server.loads_of("m0_1"), 2);
    let inspected = world.agent.inspect();
    assert_eq!((inspected["waiting"].as_u64(), inspected["copies"][0]["holds"].as_u64()), (Some(0), Some(0)));
}

#[tokio::test(start_paused = true)]
async fn who_waits_too_long_or_among_too_many_is_told_when_to_come_again() {
    let (world, mut session) = World::new(10, |options| {
        options.reload_queue = 2;
        options.reload_wait = 3 * SECOND;
    })
    .await;
    world.server.edit(|state| state.load_time = 8 * SECOND);
    let copies = world.all_available(&mut session, &[6, 6]).await;
    let answers = join_all((0..3).map(|_| world.infer("m0", copies[0]))).await;
    for one in &answers {
        assert_eq!(one.status(), 503);
        assert!(one.headers().contains_key(NOT_STARTED));
    }
    // The third was refused at once, while a load of 8 s had not begun; the others 3 s into it.
    assert_eq!(answers[2].headers()["retry-after"], "8");
    assert_eq!(answers[0].headers()["retry-after"], "5");
    assert_eq!(world.agent.metrics().reload_refused.get(), 3);
    world.until(|world| world.server.is_loaded("m0_1") && world.phase(copies[0]).as_deref() == Some("Resident")).await;
    assert_eq!(world.infer("m0", copies[0]).await.status(), 200);
}

#[tokio::test(start_paused = true)]
async fn a_held_copy_is_not_evicted_and_the_next_one_waits_for_it() {
    let (world, mut session) = World::new(10, |_| {}).await;
    let copies = world.all_available(&mut session, &[6]).await;
    let held = world.infer("m0", copies[0]).await;
    let second = generation(2, 1, 1);
    session.obeyed(&[world.register("m1", second, 6)]).await;
    session.until(second, |report| matches!(report, Report::Loading { .. })).await;
    tokio::time::sleep(SECOND).await;
    assert!(world.server.is_loaded("m0_1") && !world.server.is_loaded("m1_1"));
    // The client disconnects: its stream is dropped unread.
    drop(held);
    session.available(second).await;
    assert!(!world.server.is_loaded("m0_1"));
}

#[tokio::test(start_paused = true)]
async fn a_hold_ends_with_its_stream_not_with_whoever_keeps_the_response() {
    let (world, mut session) = World::new(10, |_| {}).await;
    let copy = world.all_available(&mut session, &[6]).await[0];
    let holds = || world.agent.inspect()["copies"][0]["holds"].as_u64();
    let mut response = world.infer("m0", copy).await;
    assert_eq!(holds(), Some(1));
    while response.body_mut().frame().await.is_some() {}
    assert_eq!(holds(), Some(0), "the stream is at its end, though the response lives");
    drop(response);
    assert_eq!(holds(), Some(0));
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_the_last_hold() {
    let (world, mut session) = World::new(10, |_| {}).await;
    let copy = world.all_available(&mut session, &[6]).await[0];
    world.server.answer(false);
    let asking = tokio::spawn({
        let door = Arc::clone(&world.door);
        async move { door.call(rest("m0", Some(copy))).await.unwrap() }
    });
    world.until(|world| world.server.0.lock().unwrap().in_flight.get("m0_1") == Some(&1)).await;
    session.obeyed(&[unregister("m0", copy, 60 * SECOND)]).await;
    session.until(copy, |report| *report == Report::Draining { holds: 1 }).await;
    assert_eq!(world.infer("m0", copy).await.status(), 421, "no new holds");
    tokio::time::sleep(10 * SECOND).await;
    assert!(world.server.is_loaded("m0_1"));
    world.server.answer(true);
    assert_eq!(text(asking.await.unwrap()).await, "m0_1");
    session.unloaded(copy).await;
    assert_eq!(world.agent.metrics().drain_ended.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn at_the_deadline_of_a_drain_what_is_left_is_ended_and_counted() {
    let (world, mut session) = World::new(10, |_| {}).await;
    let copy = world.all_available(&mut session, &[6]).await[0];
    let streaming = world.infer("m0", copy).await;
    world.server.answer(false);
    let asking = tokio::spawn({
        let door = Arc::clone(&world.door);
        async move { door.call(rest("m0", Some(copy))).await.unwrap() }
    });
    world.until(|world| world.server.0.lock().unwrap().in_flight.get("m0_1") == Some(&1)).await;
    session.obeyed(&[unregister("m0", copy, 3 * SECOND)]).await;
    let answer = asking.await.unwrap();
    assert_eq!(answer.status(), 503);
    assert!(!answer.headers().contains_key(NOT_STARTED), "the inference server had started");
    assert!(streaming.into_body().collect().await.is_err(), "a stream breaks off");
    session.unloaded(copy).await;
    assert_eq!(world.agent.metrics().drain_ended.get(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_later_version_of_the_same_name_waits_until_the_earlier_one_is_gone() {
    let (world, mut session) = World::new(10, |_| {}).await;
    let old = world.all_available(&mut session, &[6]).await[0];
    let held = world.infer("m0", old).await;
    let new = generation(old.uid.0, 1, 2);
    session.obeyed(&[unregister("m0", old, 60 * SECOND), world.register("m0", new, 6)]).await;
    session.until(new, |report| *report == Report::Scheduled).await;
    tokio::time::sleep(SECOND).await;
    assert_eq!(world.server.loads_of("m0_1"), 1);
    drop(held);
    session.available(new).await;
    let log = world.server.0.lock().unwrap().log.clone();
    assert_eq!(log, ["load m0_1", "unload m0_1", "load m0_1"]);
}

#[tokio::test(start_paused = true)]
async fn an_unregister_ends_whatever_is_going_on() {
    let (world, mut session) = World::new(10, |_| {}).await;
    world.server.edit(|state| state.load_time = 20 * SECOND);
    let copy = generation(1, 1, 1);
    session.obeyed(&[world.register("m0", copy, 6)]).await;
    session.until(copy, |report| matches!(report, Report::Loading { .. })).await;
    world.until(|world| world.server.is_loaded("m0_1")).await;
    session.obeyed(&[unregister("m0", copy, SECOND)]).await;
    session.unloaded(copy).await;
    assert!(!world.server.is_loaded("m0_1"));
    assert!(entries(&world.options.repository).is_empty());
    assert_eq!(world.agent.inspect()["resident"]["primary"], 0);
}

#[tokio::test(start_paused = true)]
async fn only_the_highest_leader_of_the_lineage_is_obeyed_also_after_a_restart() {
    let (mut world, mut session) = World::new(10, |_| {}).await;
    assert_eq!((session.hello.lineage.as_str(), session.hello.leader_epoch), ("", 0));
    world.all_available(&mut session, &[2]).await;
    // Within a session an older leader's word ends it.
    session.order(4, &[world.register("ghost", generation(9, 1, 1), 2)]).await;
    let session = world.session().await;
    assert_eq!((session.hello.lineage.as_str(), session.hello.leader_epoch), ("lineage-a", 5));
    // To end the inference server is an order like any other.
    session.recycle(4, 1).await;
    let session = world.session().await;
    assert_eq!(world.agent.metrics().fenced.get(), 2);
    // A newer one is remembered ...
    session.order(7, &[world.register("m1", generation(8, 1, 1), 2)]).await;
    world.until(|world| world.server.is_loaded("m1_1")).await;
    // ... over a restart of the agent, which then does not obey the older one.
    let stale = world.restart_agent().await;
    assert_eq!(stale.hello.leader_epoch, 7);
    stale.order(5, &[world.register("ghost", generation(9, 1, 1), 2)]).await;
    world.until(|world| world.agent.metrics().fenced.get() > 0).await;
    assert_eq!(world.server.loads_of("ghost_1"), 0);
    // Another lineage is another history.
    world.leader("lineage-b", 1);
    let mut fresh = loop {
        let session = world.session().await;
        if session.epoch == 1 {
            break session;
        }
    };
    let copy = generation(9, 1, 1);
    fresh.obeyed(&[world.register("ghost", copy, 2)]).await;
    fresh.available(copy).await;
}

#[tokio::test(start_paused = true)]
async fn the_agent_serves_on_without_a_scheduler_and_then_says_it_all() {
    let (mut world, mut session) = World::new(10, |_| {}).await;
    let copies = world.all_available(&mut session, &[6, 6]).await;
    let gone = generation(7, 1, 1);
    world.server.edit(|state| {
        state.load_time = 5 * SECOND;
        state.refuse_load.insert("bad_1".to_owned(), (500, "boom"));
    });
    session.obeyed(&[world.register("bad", gone, 1), unregister("m1", copies[1], SECOND)]).await;
    session.until(copies[1], |report| matches!(report, Report::Draining { .. })).await;
    world.hang_up(session);
    // Evicted copies come back, failures and drains end, with nobody to tell.
    assert_eq!(world.infer("m0", copies[0]).await.status(), 200);
    world.until(|world| world.phase(gone).is_none() && world.phase(copies[1]).is_none()).await;
    tokio::time::sleep(60 * SECOND).await;
    world.no_session().await;
    world.listen();
    let session = world.session().await;
    let inventory = session.inventory();
    let report = |copy| inventory.iter().find(|one| one.generation == copy).map(|one| one.report.clone());
    assert!(matches!(report(copies[0]), Some(Report::Available { residency: Residency::Resident, .. })));
    assert_eq!(report(copies[1]), Some(Report::Unloaded));
    assert!(matches!(report(gone), Some(Report::Failed { freed: true, .. })));
    let order = inventory.iter().find(|one| one.generation == copies[0]).and_then(|one| one.order.clone());
    assert_eq!(order, Some(world.register("m0", copies[0], 6)), "a scheduler without a journal can adopt it");
}

#[tokio::test(start_paused = true)]
async fn a_silent_scheduler_is_left_and_called_again() {
    let (mut world, session) = World::new(10, |_| {}).await;
    // Its acknowledgements end with the session that the test drops, its connection does not.
    drop(session);
    let again = world.session().await;
    assert_eq!(again.hello.server, "mlserver");
    assert_eq!(world.agent.metrics().sessions.get(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_need_beyond_the_capacity_is_refused_before_anything_is_evicted_or_fetched() {
    let (world, mut session) = World::new(10, |_| {}).await;
    world.all_available(&mut session, &[6]).await;
    let copy = generation(2, 1, 1);
    session.obeyed(&[world.register("huge", copy, 11)]).await;
    let failure = session.failed(copy).await;
    assert_eq!(failure.class, FailureClass::Memory);
    assert!(failure.message.contains("11 B") && failure.message.contains("10 B"), "{}", failure.message);
    assert!(world.server.is_loaded("m0_1"));
    assert_eq!((world.agent.metrics().cache_evict.get(), world.agent.metrics().fetched.get()), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn failures_are_told_apart_and_everything_is_given_back() {
    let (world, mut session) = World::new(10, |options| options.load_deadline = 30 * SECOND).await;
    let mut uid = 0;
    let mut failing = async |uri: String, edit: &dyn Fn(&Server, &str)| {
        uid += 1;
        let (model, copy) = (format!("f{uid}"), generation(uid, 1, 1));
        edit(&world.server, &format!("{model}_1"));
        session.obeyed(&[register(&model, copy, 4, &uri)]).await;
        let failure = session.failed(copy).await;
        assert!(!world.server.is_loaded(&format!("{model}_1")));
        failure.class
    };
    let good = world.artifact(4);
    let nothing: &dyn Fn(&Server, &str) = &|_, _| {};
    let refuse = |code, text| move |server: &Server, served: &str| server.refuse(served, code, text);
    assert_eq!(failing("/nowhere/model".to_owned(), nothing).await, FailureClass::Artifact);
    assert_eq!(failing("gs://bucket/iris".to_owned(), nothing).await, FailureClass::Artifact);
    assert_eq!(failing(good.clone(), &refuse(500, "boom")).await, FailureClass::Runtime);
    assert_eq!(failing(good.clone(), &refuse(501, "operator Scan is not supported")).await, FailureClass::Incompatible);
    assert_eq!(failing(good.clone(), &refuse(500, "out of memory")).await, FailureClass::Memory);
    assert_eq!(failing(good.clone(), &refuse(422, "broken file")).await, FailureClass::Artifact);
    assert_eq!(failing(good, &|server, _| server.edit(|state| state.hang_load = true)).await, FailureClass::Timeout);
    assert!(entries(&world.options.repository).is_empty());
    assert!(entries(&world.options.data_dir.join("copies")).is_empty());
    assert_eq!(world.agent.inspect()["resident"]["primary"], 0);
}

#[tokio::test(start_paused = true)]
async fn a_restarted_agent_takes_up_what_is_loaded_and_removes_what_is_nobodys() {
    let (mut world, mut session) = World::new(10, |_| {}).await;
    let copies = world.all_available(&mut session, &[3, 4, 2]).await;
    world.server.edit(|state| {
        state.loaded.insert("stranger".to_owned(), 1);
        // Lost while the agent was away; it fits, so it comes back by itself.
        state.loaded.remove("m1_1");
    });
    std::fs::create_dir_all(world.folder_of("stranger/1")).unwrap();
    let mut session = world.restart_agent().await;
    let inventory = session.inventory();
    assert_eq!(inventory.len(), 3);
    assert!(inventory.iter().all(|one| matches!(one.report, Report::Available { .. })), "{inventory:?}");
    world.until(|world| world.server.is_loaded("m1_1")).await;
    assert!(!world.server.is_loaded("stranger"));
    assert_eq!(entries(&world.options.repository), ["m0_1", "m1_1", "m2_1"]);
    assert_eq!((world.server.loads_of("m0_1"), world.server.loads_of("m1_1")), (1, 2));
    assert_eq!(world.infer("m0", copies[0]).await.status(), 200);
    // Repeating an order loads nothing again.
    session.obeyed(&[world.register("m0", copies[0], 3)]).await;
    session.available(copies[0]).await;
    assert_eq!(world.server.loads_of("m0_1"), 1);
    // And the artifact is still in the cache.
    let again = generation(20, 1, 1);
    session.obeyed(&[world.register("again", again, 2)]).await;
    session.available(again).await;
}

#[tokio::test(start_paused = true)]
async fn an_inference_server_that_lost_its_models_gets_them_back() {
    let (world, mut session) = World::new(10, |_| {}).await;
    let copy = world.all_available(&mut session, &[6]).await[0];
    tokio::time::sleep(2 * SECOND).await;
    world.server.edit(|state| {
        state.loaded.clear();
        state.load_time = SECOND;
    });
    assert_eq!(world.infer("m0", copy).await.status(), 404, "the server said so");
    session.until(copy, |report| matches!(report, Report::Available { residency: Residency::Reloading, .. })).await;
    assert_eq!(world.infer("m0", copy).await.status(), 200);
    assert_eq!(world.agent.metrics().lost_found.get(), 1);
    assert_eq!(world.agent.inspect()["resident"]["primary"], 6);
}

#[tokio::test(start_paused = true)]
async fn lost_models_come_back_without_a_request_for_them() {
    let (world, mut session) = World::new(10, |_| {}).await;
    world.all_available(&mut session, &[2, 3, 4]).await;
    tokio::time::sleep(2 * SECOND).await;
    assert_eq!(world.agent.metrics().lost_found.get(), 0);
    world.server.edit(|state| {
        state.loaded.remove("m0_1");
        state.loaded.remove("m2_1");
    });
    let back = world.until(|world| world.server.is_loaded("m0_1") && world.server.is_loaded("m2_1"));
    tokio::time::timeout(2 * SECOND, back).await.expect("noticed within two audits");
    world
        .until(|world| {
            world.agent.inspect()["copies"].as_array().unwrap().iter().all(|copy| copy["phase"] == "Resident")
        })
        .await;
    assert_eq!((world.server.loads_of("m1_1"), world.agent.metrics().lost_found.get()), (1, 2));
    assert_eq!(world.agent.inspect()["resident"]["primary"], 9);
}

#[tokio::test(start_paused = true)]
async fn a_copy_is_available_once_its_warm_up_was_answered_and_failed_when_it_was_not() {
    let (world, mut session) = World::new(10, |_| {}).await;
    let warm = |name: &str, generation, warmup: &str| {
        let mut order = world.register(name, generation, 2);
        if let Order::Register { spec, .. } = &mut order {
            Arc::make_mut(spec).warmup = Warmup::parse(warmup).unwrap();
        }
        order
    };
    let inputs = r#"[{"name":"x","datatype":"FP32","shape":[1],"data":[0]}]"#;
    let good = generation(1, 1, 1);
    world.server.answer(false);
    session.obeyed(&[warm("good", good, inputs)]).await;
    world.until(|world| world.server.0.lock().unwrap().paths == ["infer good_1"]).await;
    assert_eq!(world.agent.inspect()["copies"][0]["state"], "Loading");
    world.server.answer(true);
    session.available(good).await;

    // This server's metadata tells nothing.
    let bad = generation(2, 1, 1);
    session.obeyed(&[warm("bad", bad, "auto")]).await;
    let report = session.until(bad, |report| matches!(report, Report::Failed { freed: true, .. })).await;
    let Report::Failed { failure, .. } = report else { panic!("{report:?}") };
    assert_eq!(failure.class, FailureClass::Runtime);
    assert!(failure.message.contains("warm it up"), "{}", failure.message);
    assert!(!world.server.is_loaded("bad_1"));
    assert_eq!(world.agent.inspect()["resident"]["primary"], 2);
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_can_not_come_back_fails_and_its_waiters_go_elsewhere() {
    let (world, mut session) = World::new(10, |_| {}).await;
    let copies = world.all_available(&mut session, &[6, 6]).await;
    world.server.refuse("m0_1", 500, "boom");
    let response = world.infer("m0", copies[0]).await;
    assert_eq!(response.status(), 421);
    assert_eq!(session.failed(copies[0]).await.class, FailureClass::Runtime);
    assert_eq!(world.server.loads_of("m0_1"), 4, "one first load, three tries");
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_asked_to_drain_says_goodbye_and_waits() {
    let (world, mut session) = World::new(10, |_| {}).await;
    let copy = world.all_available(&mut session, &[6]).await[0];
    world.agent.drain();
    loop {
        if let agent_message::Message::Goodbye(_) = session.said.recv().await.expect("the session goes on") {
            break;
        }
    }
    assert_eq!(world.infer("m0", copy).await.status(), 200, "it serves on");
    assert!(tokio::time::timeout(SECOND, world.agent.drained()).await.is_err());
    session.obeyed(&[unregister("m0", copy, SECOND)]).await;
    tokio::time::timeout(60 * SECOND, world.agent.drained()).await.expect("drained");
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_becomes_smaller_evicts_as_holds_allow_it_and_fails_no_request() {
    let (world, mut session) = World::new(12, |_| {}).await;
    let copies = world.all_available(&mut session, &[4, 4, 4]).await;
    let held = world.infer("m0", copies[0]).await;
    drop(world.infer("m2", copies[2]).await);
    let smaller = |bytes: u64| Facts {
        capacity: Resources::primary(Bytes(bytes)),
        capabilities: vec!["other".to_owned()],
        ..world.options.facts()
    };
    let loaded = |world: &World| ["m0_1", "m1_1", "m2_1"].map(|served| world.server.is_loaded(served));
    world.agent.restate(smaller(4));
    let restated = loop {
        if let agent_message::Message::Restated(restated) = session.said.recv().await.expect("the session goes on") {
            break restated;
        }
    };
    assert_eq!(restated.capacity.map(|capacity| capacity.primary), Some(4));
    assert_eq!(restated.capabilities, ["other"]);
    world.until(|world| loaded(world) == [true, false, true]).await;
    tokio::time::sleep(SECOND).await;
    assert_eq!(loaded(&world), [true, false, true], "one is held, the other was used last");
    drop(held);
    world.until(|world| loaded(world).iter().filter(|loaded| **loaded).count() == 1).await;
    // Smaller than any of them: each comes back alone, and nothing new is taken.
    world.agent.restate(smaller(3));
    for (number, copy) in copies.iter().enumerate() {
        let answer = world.infer(&format!("m{number}"), *copy).await;
        assert_eq!(answer.status(), 200, "m{number}");
        drop(answer);
        assert_eq!(loaded(&world).iter().filter(|loaded| **loaded).count(), 1);
    }
    let fourth = generation(4, 1, 1);
    session.obeyed(&[world.register("m3", fourth, 4)]).await;
    assert_eq!(session.failed(fourth).await.class, FailureClass::Memory);
    world.agent.restate(smaller(12));
    for (number, copy) in copies.iter().enumerate() {
        assert_eq!(world.infer(&format!("m{number}"), *copy).await.status(), 200, "m{number}");
    }
    assert_eq!(loaded(&world), [true; 3], "there is room for all of them again");
}

#[tokio::test(start_paused = true)]
async fn an_order_that_cannot_be_read_is_answered_and_harms_nothing() {
    use wharf::rpc::{agent_wire::order_to_wire, proto::agent as wire};
    let (world, mut session) = World::new(10, |_| {}).await;
    let held = world.all_available(&mut session, &[2]).await[0];
    let unreadable = |model: &str, copy| {
        let mut order = order_to_wire(&world.register(model, copy, 2));
        if let Some(wire::order::Order::Register(register)) = &mut order.order {
            register.need = None;
        }
        order
    };
    // Whom it is about can be read: that copy has failed, and no other order is lost with it.
    let (copy, good) = (generation(8, 1, 1), generation(9, 1, 1));
    session.order_raw(vec![unreadable("m8", copy), order_to_wire(&world.register("m9", good, 2))]).await;
    let failure = session.failed(copy).await;
    assert_eq!(failure.class, FailureClass::Incompatible);
    let version = env!("CARGO_PKG_VERSION");
    assert!(failure.message.starts_with(&format!("agent version {version} can't read this order: ")), "{failure:?}");
    assert!(
        failure.message.contains("need is absent") && failure.message.ends_with("; upgrade the agent"),
        "{failure:?}"
    );
    session.available(good).await;
    // One that it holds stands as it did.
    session.order_raw(vec![unreadable("m0", held)]).await;
    session.available(held).await;
    // Not even that can be read.
    session.order_raw(vec![wire::Order { order: None }]).await;
    let said = session.misread().await;
    assert!(said.contains("order is absent"), "{said}");
    assert_eq!(world.agent.metrics().orders_refused.get(), 3);
    assert_eq!(world.infer("m0", held).await.status(), 200);
}

#[tokio::test(start_paused = true)]
async fn a_name_may_be_as_long_as_names_are() {
    let (world, mut session) = World::new(10, |_| {}).await;
    let (name, copy) = ("m".repeat(253), generation(1, 1, 1));
    session.obeyed(&[world.register(&name, copy, 4)]).await;
    session.available(copy).await;
    assert_eq!(entries(&world.options.repository), [format!("{name}_1")]);
}

#[tokio::test(start_paused = true)]
async fn a_copy_counts_as_often_as_mlservers_workers_hold_it() {
    let (mut world, mut session) = World::new(40, |options| {
        options.runtime = Some(Kind::MlServer);
        options.workers = 4;
    })
    .await;
    let resident = |world: &World| world.agent.inspect()["resident"]["primary"].as_u64();
    let (four, too_large, once) = (generation(1, 1, 1), generation(2, 1, 1), generation(3, 1, 1));
    let uri = world.artifact_with_settings(10, r#"{"implementation":"m.Mine"}"#);
    session.obeyed(&[register("four", four, 10, &uri)]).await;
    session.available(four).await;
    assert_eq!(resident(&world), Some(40));
    // After a restart the agent still knows.
    world.hang_up(session);
    world.listen();
    let mut session = world.restart_agent().await;
    assert_eq!(resident(&world), Some(40));

    let uri = world.artifact_with_settings(11, r#"{"implementation":"m.Mine"}"#);
    session.obeyed(&[register("too-large", too_large, 11, &uri)]).await;
    let failure = session.failed(too_large).await;
    assert!(failure.class == FailureClass::Memory && failure.message.contains("44"), "{}", failure.message);

    // One that refuses workers is in memory once.
    let uri = world.artifact_with_settings(12, r#"{"implementation":"m.Mine","parallel_workers":0}"#);
    session.obeyed(&[unregister("four", four, SECOND)]).await;
    session.unloaded(four).await;
    session.obeyed(&[register("once", once, 12, &uri)]).await;
    session.available(once).await;
    assert_eq!(resident(&world), Some(12));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_a_load_keeps_busy_is_given_the_time_of_a_load() {
    for (kind, answers) in [(Kind::MlServer, true), (Kind::Oip, false)] {
        let (world, mut session) = World::new(10, |options| {
            options.runtime = Some(kind);
            options.probe_deadline = SECOND;
            options.load_deadline = 60 * SECOND;
        })
        .await;
        // Another model is being loaded meanwhile.
        world.server.edit(|state| state.ready_time = 20 * SECOND);
        let copy = generation(1, 1, 1);
        let uri = world.artifact_with_settings(4, r#"{"implementation":"m.Mine"}"#);
        session.obeyed(&[register("iris", copy, 4, &uri)]).await;
        if answers {
            session.available(copy).await;
        } else {
            assert_eq!(session.failed(copy).await.class, FailureClass::Timeout);
        }
    }
}
