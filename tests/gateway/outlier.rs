//! A copy that fails while others of its version answer well is set aside, comes back by one good answer, and the last
//! that answers is never set aside.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use wharf::{
    forward::{Body, Request, Response, Upstream as _},
    gateway::Options,
};

use crate::harness::{Door, World, grpc_message, grpc_post, model, post, text, version};

/// A door whose inference server fails while it is told to: over gRPC in the trailers, where it is harder to see.
fn door(name: &'static str, sick: &Arc<AtomicBool>) -> Arc<Door> {
    let sick = Arc::clone(sick);
    Door::new(move |request: Request| {
        let sick = sick.load(Ordering::SeqCst);
        async move {
            let grpc = request.headers().contains_key("te");
            request.into_body().collect().await.expect("whole");
            Ok(if grpc { grpc_answer(name, sick) } else { rest_answer(name, sick) })
        }
    })
}

fn rest_answer(name: &'static str, sick: bool) -> Response {
    text(if sick { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::OK }, name)
}

fn grpc_answer(name: &'static str, sick: bool) -> Response {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", if sick { 13.into() } else { 0.into() });
    let data = Frame::data(Bytes::from_static(name.as_bytes()));
    let frames = [Ok::<_, std::convert::Infallible>(data), Ok(Frame::trailers(trailers))];
    let mut response = Response::new(Body::new(StreamBody::new(futures::stream::iter(frames))));
    response.headers_mut().insert("content-type", "application/grpc".parse().expect("valid"));
    response
}

/// Asks `times` times over one protocol; how many answers each door gave.
async fn ask(world: &World, grpc: bool, times: usize) -> BTreeMap<String, usize> {
    let mut answers = BTreeMap::new();
    for _ in 0..times {
        let answered = if grpc {
            world.ask(grpc_post("ModelInfer", grpc_message("iris", "", 10))).await
        } else {
            world.ask(post("/v2/models/iris/infer", "x")).await
        };
        *answers.entry(answered.body).or_default() += 1;
    }
    answers
}

struct Two {
    world: World,
    sick: [Arc<AtomicBool>; 2],
}

fn two() -> Two {
    let world = World::new();
    let sick: [Arc<AtomicBool>; 2] = Default::default();
    let places = [world.local("one", door("one", &sick[0])), world.local("two", door("two", &sick[1]))];
    world.routes(vec![model("iris", vec![version(1, 1, &[&places[0], &places[1]])])]);
    Two { world, sick }
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_fails_is_set_aside_and_comes_back_by_a_good_answer() {
    for grpc in [false, true] {
        let Two { world, sick } = two();
        let both = ask(&world, grpc, 60).await;
        assert!(both["one"] > 5 && both["two"] > 5, "{both:?}");

        sick[0].store(true, Ordering::SeqCst);
        let failing = ask(&world, grpc, 200).await;
        assert_eq!(failing.get("one"), Some(&5), "grpc {grpc}: {failing:?}");
        assert_eq!(world.metric(|metrics| &metrics.set_aside), 1);
        let endpoints = world.gateway.inspect()["routes"][0]["targets"][0]["endpoints"].clone();
        assert_eq!((&endpoints[0]["aside"], &endpoints[1]["aside"]), (&true.into(), &false.into()));

        // One request in each wait finds out, and the waits grow.
        for (wait, probes) in [(9, None), (2, Some(1)), (15, None), (6, Some(1))] {
            tokio::time::advance(Duration::from_secs(wait)).await;
            assert_eq!(ask(&world, grpc, 50).await.get("one"), probes.as_ref(), "grpc {grpc}, after {wait} s");
        }

        sick[0].store(false, Ordering::SeqCst);
        assert_eq!(ask(&world, grpc, 50).await.get("one"), None);
        tokio::time::advance(Duration::from_secs(41)).await;
        let back = ask(&world, grpc, 60).await;
        assert!(back["one"] > 5, "grpc {grpc}: {back:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_last_copy_that_answers_is_never_set_aside() {
    for grpc in [false, true] {
        let Two { world, sick } = two();
        ask(&world, grpc, 60).await;
        // Everything fails: no copy is better than another.
        sick.iter().for_each(|sick| sick.store(true, Ordering::SeqCst));
        let failing = ask(&world, grpc, 200).await;
        assert!(failing.values().all(|answers| *answers > 0) && failing.values().sum::<usize>() == 200, "{failing:?}");
        assert!(world.metric(|metrics| &metrics.set_aside) <= 1);
        // The one that is well again answers, whatever happened before.
        sick[1].store(false, Ordering::SeqCst);
        ask(&world, grpc, 200).await;
        let answers = ask(&world, grpc, 50).await;
        assert!(answers["two"] >= 49, "{answers:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_client_did_wrong_and_what_a_door_refused_sets_nothing_aside() {
    let world = World::new();
    let wrong = Door::new(|_| async { Ok(text(StatusCode::BAD_REQUEST, "wrong")) });
    let full = Door::refusing(wharf::forward::NOT_STARTED);
    let well = door("well", &Arc::default());
    let places = [world.local("wrong", wrong), world.local("full", full), world.local("well", well)];
    world.routes(vec![model("iris", vec![version(1, 1, &[&places[0], &places[1], &places[2]])])]);
    let answers = ask(&world, false, 300).await;
    assert!(answers["wrong"] > 50 && answers["well"] > 50, "{answers:?}");
    assert_eq!(world.metric(|metrics| &metrics.set_aside), 0);
}

/// What a door does whose mood this is: it answers with this HTTP status, or not at all.
const SILENT: u16 = 0;

fn moody(name: &'static str, mood: &Arc<AtomicU16>) -> Arc<Door> {
    let mood = Arc::clone(mood);
    Door::new(move |_| {
        let mood = mood.load(Ordering::SeqCst);
        async move {
            if mood == SILENT {
                std::future::pending::<()>().await;
            }
            Ok(text(StatusCode::from_u16(mood).expect("a status"), name))
        }
    })
}

/// Two copies, of which the first has moods.
fn with_moods() -> (World, Arc<AtomicU16>) {
    let world = World::with(Options { request_deadline: Duration::from_secs(1), ..Options::default() });
    let mood = Arc::new(AtomicU16::new(200));
    let places = [world.local("one", moody("one", &mood)), world.local("two", door("two", &Arc::default()))];
    world.routes(vec![model("iris", vec![version(1, 1, &[&places[0], &places[1]])])]);
    (world, mood)
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_says_nothing_is_one_in_its_wait_all_the_same() {
    let (world, mood) = with_moods();
    ask(&world, false, 60).await;
    mood.store(500, Ordering::SeqCst);
    assert_eq!(ask(&world, false, 200).await.get("one"), Some(&5));
    // No capacity, and a client's mistake: no verdict on the copy.
    for status in [503, 404] {
        mood.store(status, Ordering::SeqCst);
        tokio::time::advance(Duration::from_secs(11)).await;
        assert_eq!(ask(&world, false, 50).await.get("one"), Some(&1), "{status}");
    }
    mood.store(200, Ordering::SeqCst);
    tokio::time::advance(Duration::from_secs(11)).await;
    assert!(ask(&world, false, 60).await["one"] > 5, "it is back");
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_does_not_answer_in_time_is_set_aside() {
    let (world, mood) = with_moods();
    ask(&world, false, 60).await;
    mood.store(SILENT, Ordering::SeqCst);
    let answers = ask(&world, false, 100).await;
    assert_eq!(answers["two"], 95, "{answers:?}");
    assert_eq!(world.metric(|metrics| &metrics.set_aside), 1);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_goes_on_and_on_is_not_the_only_probe() {
    let world = World::new();
    let sick = Arc::new(AtomicBool::new(false));
    let endless = Arc::new(AtomicBool::new(false));
    let (failing, streaming) = (Arc::clone(&sick), Arc::clone(&endless));
    let one = Door::new(move |_| {
        let mut answer = grpc_answer("one", failing.load(Ordering::SeqCst));
        if streaming.load(Ordering::SeqCst) {
            *answer.body_mut() = Body::new(StreamBody::new(futures::stream::pending::<
                Result<Frame<Bytes>, std::convert::Infallible>,
            >()));
        }
        std::future::ready(Ok(answer))
    });
    let places = [world.local("one", one), world.local("two", door("two", &Arc::default()))];
    world.routes(vec![model("iris", vec![version(1, 1, &[&places[0], &places[1]])])]);
    ask(&world, true, 60).await;
    sick.store(true, Ordering::SeqCst);
    assert_eq!(ask(&world, true, 200).await.get("one"), Some(&5));
    endless.store(true, Ordering::SeqCst);
    tokio::time::advance(Duration::from_secs(11)).await;
    let open = world.gateway.call(grpc_post("ModelInfer", grpc_message("iris", "", 10))).await.expect("a head");
    sick.store(false, Ordering::SeqCst);
    endless.store(false, Ordering::SeqCst);
    tokio::time::advance(Duration::from_secs(11)).await;
    // It is back, and has more in flight than the other.
    assert_eq!(ask(&world, true, 60).await.get("one"), Some(&1));
    drop(open);
    assert!(ask(&world, true, 60).await["one"] > 5);
}
