//! The promise: an edit of the server registry is obeyed while Wharf runs and serves, without a failed request; a bad
//! edit changes nothing and is told with its file, line and key.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on says so"
)]
#![expect(clippy::disallowed_methods, reason = "a test against a real process has the real clock")]

mod process;

use std::time::{Duration, Instant};

use process::{
    Home, SOON, Spec, Wharf, count,
    load::{Load, Question, in_turns},
    onnx,
    proof::proof,
    server,
};
use wharf::rpc::proto::wharf::ServerView;

const MODELS: u64 = 8;

async fn with_models(home: &Home) -> Wharf {
    let wharf = home.up().await;
    for number in 0..MODELS {
        wharf.submit(&Spec::new(&format!("m{number}"), "iris-1", 1 << 20)).await.unwrap();
    }
    for number in 0..MODELS {
        wharf.until_serving(&format!("m{number}"), 1).await;
    }
    wharf
}

async fn load_on(wharf: &Wharf) -> Load {
    Load::start(&wharf.gateway, 200, move |number| Question {
        model: format!("m{}", number / 2 % MODELS),
        protocol: in_turns(number),
        check: Box::new(|answer| if answer.label == 0 { Ok(()) } else { Err("iris-1 says 0".to_owned()) }),
    })
    .await
}

/// Name, replicas that are available, and copies there.
fn shape(servers: &[ServerView]) -> Vec<(String, usize, u32)> {
    let available = |server: &ServerView| server.replicas.iter().filter(|r| r.state == "Available").count();
    let copies = |server: &ServerView| server.replicas.iter().map(|replica| replica.copies).sum();
    servers.iter().map(|server| (server.name.clone(), available(server), copies(server))).collect()
}

/// Waits until the log says it.
async fn logged(home: &Home, from: usize, what: &str) -> String {
    let deadline = Instant::now() + SOON;
    loop {
        let log = home.log().split_off(from);
        if let Some(line) = log.lines().find(|line| line.contains(what)) {
            return line.to_owned();
        }
        assert!(Instant::now() < deadline, "{what:?} is not in the log:\n{log}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn edits_are_obeyed_while_every_request_is_answered() {
    let home = Home::new(&onnx(1, "64Mi", 10));
    let wharf = with_models(&home).await;
    let load = load_on(&wharf).await;
    for round in 0..count(10, 1) {
        // A server more, and more replicas.
        load.marks.mark(format!("adding a server in round {round}"));
        home.write_registry(&format!("{}{}", onnx(3, "64Mi", 10), server("spare", 2, "64Mi", 10)));
        wharf
            .until_servers("added server", |servers| {
                let shape = shape(servers);
                shape.len() == 2 && shape[0].1 == 3 && shape[1].1 == 2
            })
            .await;
        wharf.scale("m0", 3).await.unwrap();
        wharf.until("m0", "there three times", |view| view.available == 3).await;
        load.more(100).await;

        // Fewer replicas, and the folders of those that went go too.
        wharf.scale("m0", 1).await.unwrap();
        load.marks.mark(format!("taking replicas away in round {round}"));
        home.write_registry(&format!("{}{}", onnx(1, "64Mi", 10), server("spare", 2, "64Mi", 10)));
        wharf.until_servers("smaller server", |servers| servers[0].replicas.len() == 1).await;
        let gone = || ["onnx-1", "onnx-2"].iter().all(|name| !home.path().join("agent").join(name).exists());
        let deadline = Instant::now() + SOON;
        while !gone() {
            assert!(Instant::now() < deadline, "the folders of replicas that went are left\n{}", wharf.tail());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        load.more(100).await;

        // The server that has everything goes; its models move first.
        load.marks.mark(format!("removing the server with the models in round {round}"));
        home.write_registry(&server("spare", 2, "64Mi", 10));
        let moved = wharf.until_servers("one server", |servers| servers.len() == 1).await;
        let there = &shape(&moved)[0];
        assert_eq!((there.0.as_str(), there.2), ("spare", u32::try_from(MODELS).unwrap()));
        load.more(100).await;

        // And back again: the name is free.
        load.marks.mark(format!("moving back in round {round}"));
        home.write_registry(&onnx(1, "64Mi", 10));
        let back = wharf.until_servers("the first server alone", |s| s.len() == 1 && s[0].name == "onnx").await;
        assert_eq!(shape(&back)[0].2, u32::try_from(MODELS).unwrap());
        load.more(100).await;
    }
    let account = load.stop().await;
    account.assert_clean(&wharf);
    proof("servers added, resized and removed by edits of the registry", &account.line());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_edit_changes_nothing_and_is_told_with_its_place() {
    let home = Home::new(&onnx(2, "64Mi", 10));
    let wharf = with_models(&home).await;
    let load = load_on(&wharf).await;
    let before = shape(&wharf.servers().await);
    let good = onnx(2, "64Mi", 10);
    let bad = [
        (good.replace("replicas = 2", "replicas = \"two\""), "replicas", 5),
        (good.replace("memory = \"64Mi\"", "memory = \"64Mo\""), "memory", 6),
        (good.replace("runtime = \"builtin\"", "runtim = \"builtin\""), "runtim", 3),
        (good.replace("[[server]]", "[[server"), "", 1),
        (format!("{good}{good}"), "name", 9),
    ];
    for (text, key, line) in bad {
        let from = home.log().len();
        load.marks.mark(format!("a bad edit at {key:?}"));
        home.write_registry(&text);
        let told = logged(&home, from, "refused").await;
        assert!(
            told.contains(&format!("servers.toml:{line}")) && told.contains(key),
            "line {line}, key {key:?}: {told}"
        );
        load.more(50).await;
        assert_eq!(shape(&wharf.servers().await), before);
    }
    // Taken away altogether: that is no wish for no servers.
    let from = home.log().len();
    std::fs::remove_file(home.path().join("servers.toml")).unwrap();
    logged(&home, from, "refused").await;
    load.more(50).await;
    assert_eq!(shape(&wharf.servers().await), before);
    // The next good edit is obeyed.
    home.write_registry(&onnx(3, "64Mi", 10));
    wharf.until_servers("third replica", |servers| shape(servers)[0].1 == 3).await;
    let account = load.stop().await;
    account.assert_clean(&wharf);
    proof("bad edits of the registry change nothing and are told with file, line and key", &account.line());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_removed_while_nothing_ran_goes_and_its_models_move() {
    let home = Home::new(&format!("{}{}", onnx(1, "64Mi", 10), server("spare", 1, "64Mi", 10)))
        .set("scheduler.grace_period", "1s");
    let wharf = with_models(&home).await;
    assert!(wharf.stop().await.success());
    home.write_registry(&server("spare", 1, "64Mi", 10));
    let wharf = home.up().await;
    let left = wharf.until_servers("one server with all", |s| s.len() == 1 && shape(s)[0].2 == MODELS as u32).await;
    assert_eq!(left[0].name, "spare");
    for number in 0..MODELS {
        wharf.until_serving(&format!("m{number}"), 1).await;
    }
    // What was forgotten does not come back.
    assert!(wharf.stop().await.success());
    let wharf = home.up().await;
    wharf.until_servers("one server with all", |s| s.len() == 1 && shape(s)[0].2 == MODELS as u32).await;
}
