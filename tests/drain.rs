//! The promise: a replica is emptied without a failed request, with its progress shown; what has nowhere to go stays
//! served and is named; and a drain can be taken back.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on says so"
)]
#![expect(clippy::disallowed_methods, reason = "a test against a real process has the real clock")]

mod process;

use process::{
    Home, Spec, Wharf, count,
    load::{Load, Question, in_turns},
    onnx,
    proof::proof,
    said, server,
};
use wharf::rpc::proto::wharf::{ReplicaView, ServerView};

/// `models` models of one copy, each available.
async fn with_models(home: &Home, models: usize, memory: u64) -> Wharf {
    let wharf = home.up().await;
    for number in 0..models {
        wharf.submit(&Spec::new(&format!("m{number}"), "iris-1", memory)).await.unwrap();
    }
    for number in 0..models {
        wharf.until_serving(&format!("m{number}"), 1).await;
    }
    wharf
}

/// A load over all models, in turns.
async fn load_on(wharf: &Wharf, models: usize) -> Load {
    Load::start(&wharf.gateway, 200, move |number| Question {
        model: format!("m{}", number / 2 % models as u64),
        protocol: in_turns(number),
        check: Box::new(|answer| if answer.label == 0 { Ok(()) } else { Err("iris-1 says 0".to_owned()) }),
    })
    .await
}

fn replica<'a>(servers: &'a [ServerView], name: &str, index: u32) -> &'a ReplicaView {
    let server = servers.iter().find(|server| server.name == name).unwrap();
    server.replicas.iter().find(|replica| replica.index == index).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_replica_loses_its_copies_and_no_request_and_can_come_back() {
    let rounds = count(20, 2);
    let home = Home::new(&onnx(2, "64Mi", 10));
    let wharf = with_models(&home, 12, 1 << 20).await;
    let load = load_on(&wharf, 12).await;
    for round in 0..rounds {
        let index = u32::try_from(round % 2).unwrap();
        let before = replica(&wharf.servers().await, "onnx", index).copies;
        load.marks.mark(format!("draining replica {index} in round {round}"));
        let drained = wharf.cli(&["server", "drain", "onnx", "--replica", &index.to_string(), "-t", "60"]).await;
        let words = said(&drained);
        assert!(drained.status.success(), "{words}\n{}", wharf.tail());
        assert!(words.contains(&format!("replica onnx-{index}: drained")), "{words}");
        if before > 0 {
            assert!(words.contains("left"), "its progress is shown: {words}");
        }
        let servers = wharf.until_servers("empty replica", |s| replica(s, "onnx", index).copies_resident == 0).await;
        let empty = replica(&servers, "onnx", index);
        assert_eq!((empty.state.as_str(), empty.copies, empty.registered), ("Draining", 0, 0));
        assert_eq!(replica(&servers, "onnx", 1 - index).copies, 12);
        load.more(100).await;

        load.marks.mark(format!("taking back the drain of replica {index} in round {round}"));
        let undone = wharf.cli(&["server", "uncordon", "onnx", "--replica", &index.to_string()]).await;
        assert!(undone.status.success(), "{}", said(&undone));
        wharf.until_servers("open replica", |servers| replica(servers, "onnx", index).state == "Available").await;
    }
    let account = load.stop().await;
    account.assert_clean(&wharf);
    proof(&format!("{rounds} drains of a replica with 12 models under 200 requests a second"), &account.line());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_go_to_another_server_and_back_again() {
    let home = Home::new(&format!("{}{}", onnx(1, "64Mi", 10), server("other", 1, "64Mi", 10)));
    let wharf = with_models(&home, 6, 1 << 20).await;
    let load = load_on(&wharf, 6).await;
    for _ in 0..count(10, 2) {
        for (from, to) in [("onnx", "other"), ("other", "onnx")] {
            load.marks.mark(format!("draining {from}"));
            let drained = wharf.cli(&["server", "drain", from, "-t", "60"]).await;
            assert!(drained.status.success(), "{}\n{}", said(&drained), wharf.tail());
            let servers = wharf.servers().await;
            assert_eq!((replica(&servers, from, 0).copies, replica(&servers, to, 0).copies), (0, 6));
            let undone = wharf.cli(&["server", "uncordon", from]).await;
            assert!(undone.status.success(), "{}", said(&undone));
            load.more(100).await;
        }
    }
    let account = load.stop().await;
    account.assert_clean(&wharf);
    proof("drains of a whole server, there and back", &account.line());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_nowhere_to_go_stays_served_and_is_named() {
    // Two replicas that are full: one of the five models fits nowhere else.
    let home = Home::new(&onnx(2, "3Mi", 0)).set("scheduler.gateway_lease", "500ms");
    let wharf = with_models(&home, 5, 1 << 20).await;
    let load = load_on(&wharf, 5).await;
    load.marks.mark("draining without room");
    let drained = wharf.cli(&["server", "drain", "onnx", "--replica", "0", "-t", "5"]).await;
    let words = said(&drained);
    assert_eq!(drained.status.code(), Some(1), "{words}");
    let views = wharf.views().await;
    let on_it = |view: &&wharf::rpc::proto::wharf::ModelView| {
        view.versions.iter().flat_map(|v| &v.copies).any(|copy| copy.server == "onnx" && copy.replica == 0)
    };
    let stuck: Vec<&str> = views.iter().filter(on_it).map(|view| view.name.as_str()).collect();
    assert!((1..=2).contains(&stuck.len()), "one is moved where there is room: {stuck:?}\n{words}\n{}", wharf.tail());
    for name in &stuck {
        assert!(words.contains(&format!("{name}: ")), "{name} is named: {words}");
        let view = wharf.view(name).await.unwrap();
        assert_eq!((view.state.as_str(), view.available), ("Available", 1), "{view:#?}");
    }
    assert!(words.contains("still serving") && words.contains("lacks at least"), "{words}");
    load.more(200).await;
    // Room comes, and they go: the drain is still wanted.
    wharf.unload("m4").await.unwrap();
    wharf.unload("m3").await.unwrap();
    let account = load.stop().await;
    let failed_before_the_end: u64 = account.failed();
    let other = account
        .outcomes
        .keys()
        .filter(|outcome| !outcome.contains("OK") && !outcome.contains("404") && !outcome.contains("NotFound"));
    assert_eq!(
        other.count(),
        0,
        "{failed_before_the_end} failed: {:?}\n{}",
        account.outcomes,
        account.shown.join("\n")
    );
    wharf.until_servers("empty replica", |servers| replica(servers, "onnx", 0).copies == 0).await;
    proof("a drain without room elsewhere names what is stuck, which stays served", &account.line());

    let nobody = wharf.cli(&["server", "drain", "onnx", "--replica", "7", "-t", "3"]).await;
    assert_eq!(nobody.status.code(), Some(1), "{}", said(&nobody));
    assert!(said(&nobody).contains("no replica 7"), "{}", said(&nobody));
}
