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

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use process::{
    Home, SOON, Spec, Wharf, count,
    load::{Load, Question, in_turns},
    onnx,
    proof::proof,
    server,
};
use wharf::{
    app::process::Process,
    forward::{Limits, Request, Response, TcpNetwork, Upstream, UpstreamError},
    ports::Network as _,
    rpc::proto::{
        scheduler as seldon,
        wharf::{ListServersRequest, ServerView, SubmitModelRequest, wharf_client::WharfClient},
    },
    runtime::{Execution, Options, Runtime},
    settings::Settings,
    telemetry::metrics::Role,
};

const MODELS: u64 = 8;
const MIB: u64 = 1 << 20;

async fn with_models(home: &Home) -> Wharf {
    let wharf = home.up().await;
    for number in 0..MODELS {
        wharf.submit(&Spec::new(&format!("m{number}"), "iris-1", MIB)).await.unwrap();
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

/// A server as the registry has it, with other capabilities.
fn able(text: &str, capabilities: &str) -> String {
    text.replace("capabilities = [\"onnx\"]", &format!("capabilities = [{capabilities}]"))
}

fn named<'a>(servers: &'a [ServerView], name: &str) -> &'a ServerView {
    servers.iter().find(|server| server.name == name).unwrap_or_else(|| panic!("no {name} among {servers:#?}"))
}

/// What there is to say of a server. These tests make replicas bring copies back all the time, which is told too.
fn told(server: &ServerView) -> Vec<&String> {
    server.conditions.iter().filter(|condition| !condition.contains("thrashes")).collect()
}

fn says(server: &ServerView, what: &str) -> bool {
    server.conditions.iter().any(|condition| condition.contains(what))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_memory_is_there_at_once_and_of_less_only_what_is_used_least_is_evicted() {
    let home = Home::new(&onnx(1, "8Mi", 0));
    let wharf = with_models(&home).await;
    let load = load_on(&wharf).await;
    wharf.submit(&Spec::new("large", "iris-1", 6 * MIB)).await.unwrap();
    wharf.until("large", "without a place", |view| view.state == "ScheduleFailed").await;
    load.marks.mark("more memory");
    home.write_registry(&onnx(1, "16Mi", 0));
    wharf.until_serving("large", 1).await;
    load.more(100).await;

    load.marks.mark("less memory, and more overcommit");
    home.write_registry(&onnx(1, "7Mi", 100));
    let servers = wharf
        .until_servers("smaller replica", |servers| {
            let replica = &servers[0].replicas[0];
            replica.capacity == 7 * MIB && replica.resident <= 7 * MIB && replica.overcommit_percent == 100
        })
        .await;
    let replica = &servers[0].replicas[0];
    assert_eq!((replica.registered, replica.copies, told(&servers[0]).len()), (14 * MIB, 9, 0), "{servers:#?}");
    // Every copy is asked for, so each comes back and another leaves.
    load.more(400).await;
    let evicted = wharf.metric("seldon_cache_evict_count").await.unwrap_or_default();
    assert!(evicted >= 7.0, "{evicted}");
    let servers = wharf.servers().await;
    assert!(servers[0].replicas[0].resident <= 7 * MIB, "{servers:#?}");
    let account = load.stop().await;
    account.assert_clean(&wharf);
    proof("memory of a replica changed by edits of the registry", &account.line());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_registered_beyond_a_smaller_memory_moves_and_what_can_not_says_why() {
    let home = Home::new(&onnx(1, "8Mi", 0));
    let wharf = with_models(&home).await;
    let load = load_on(&wharf).await;
    // Four have to go, and there is room for three.
    load.marks.mark("less memory than is registered");
    home.write_registry(&format!("{}{}", onnx(1, "4Mi", 0), server("spare", 1, "3Mi", 0)));
    let servers = wharf
        .until_servers("three copies elsewhere", |servers| {
            servers.len() == 2
                && named(servers, "spare").replicas.iter().any(|r| r.copies == 3)
                && named(servers, "onnx").replicas[0].copies == 5
                && says(named(servers, "onnx"), "keeps 1 copy for want of another place: ")
                // That is said with the look at the replica that comes after the last of them has left.
                && says(named(servers, "onnx"), "replica 0 is over its limit: 5 MiB registered, 4 MiB allowed")
        })
        .await;
    let small = named(&servers, "onnx");
    assert!(small.conditions.iter().any(|condition| condition.contains("lacks at least 1 MiB")), "{small:#?}");
    assert_eq!(wharf.metric("wharf_replicas_over_limit").await, Some(1.0));
    let listed = wharf.cli(&["server", "list"]).await;
    assert!(process::said(&listed).contains("over its limit"), "{}", process::said(&listed));
    // Nothing new is registered there.
    wharf.submit(&Spec::new("late", "iris-1", MIB)).await.unwrap();
    wharf.until("late", "without a place", |view| view.state == "ScheduleFailed").await;
    load.more(200).await;

    load.marks.mark("room elsewhere");
    home.write_registry(&format!("{}{}", onnx(1, "4Mi", 0), server("spare", 1, "8Mi", 0)));
    wharf
        .until_servers("replica within its limit", |servers| {
            let small = named(servers, "onnx");
            small.replicas[0].copies == 4 && told(small).is_empty()
        })
        .await;
    wharf.until_serving("late", 1).await;
    load.more(100).await;
    assert_eq!(wharf.metric("wharf_replicas_over_limit").await, Some(0.0));
    let events = wharf.events().await;
    let kinds: Vec<_> =
        events.iter().filter(|event| event.subject == "server/onnx").map(|event| event.kind.as_str()).collect();
    assert_eq!(kinds.iter().filter(|kind| **kind == "OverLimit").count(), 1, "{kinds:?}");
    assert_eq!(kinds.iter().filter(|kind| **kind == "WithinLimit").count(), 1, "{kinds:?}");
    let moved = events.iter().filter(|event| event.kind == "Displaced").count();
    assert_eq!(moved, 4, "no more than had to");
    let account = load.stop().await;
    account.assert_clean(&wharf);
    proof("a replica made smaller than what is registered there", &account.line());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_larger_than_the_memory_left_answers_until_it_has_moved() {
    let home = Home::new(&onnx(1, "16Mi", 0));
    let wharf = with_models(&home).await;
    wharf.submit(&Spec::new("large", "iris-1", 6 * MIB)).await.unwrap();
    wharf.until_serving("large", 1).await;
    let load = Load::start(&wharf.gateway, 100, |number| Question {
        model: if number / 2 % 3 == 0 { "large".to_owned() } else { format!("m{}", number / 2 % MODELS) },
        protocol: in_turns(number),
        check: Box::new(|answer| if answer.label == 0 { Ok(()) } else { Err("iris-1 says 0".to_owned()) }),
    })
    .await;
    load.marks.mark("less memory than one copy needs");
    home.write_registry(&onnx(1, "4Mi", 1000));
    wharf
        .until_servers("copy without a place", |servers| {
            servers[0].replicas[0].capacity == 4 * MIB && says(&servers[0], "large: ")
        })
        .await;
    load.more(300).await;
    load.marks.mark("a server that is large enough");
    home.write_registry(&format!("{}{}", onnx(1, "4Mi", 1000), server("spare", 1, "8Mi", 0)));
    wharf
        .until_servers("copy elsewhere", |servers| {
            servers.len() == 2
                && named(servers, "spare").replicas.iter().any(|replica| replica.registered == 6 * MIB)
                && named(servers, "onnx").replicas[0].copies == MODELS as u32
                && told(named(servers, "onnx")).is_empty()
        })
        .await;
    load.more(100).await;
    let account = load.stop().await;
    account.assert_clean(&wharf);
    proof("a replica made smaller than one of its copies", &account.line());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_needs_a_capability_that_was_taken_away_moves_where_there_is_one() {
    let home = Home::new(&onnx(1, "64Mi", 10));
    let wharf = with_models(&home).await;
    let load = load_on(&wharf).await;
    load.marks.mark("a capability less");
    home.write_registry(&able(&onnx(1, "64Mi", 10), "\"other\""));
    let servers = wharf
        .until_servers("copies without a place", |s| says(&s[0], "keeps 8 copies for want of another place"))
        .await;
    assert_eq!((servers[0].capabilities.as_slice(), shape(&servers)[0].2), (["other".to_owned()].as_slice(), 8));
    assert!(servers[0].conditions.iter().any(|condition| condition.contains("onnx")), "{servers:#?}");
    load.more(200).await;
    load.marks.mark("a server that has it");
    home.write_registry(&format!("{}{}", able(&onnx(1, "64Mi", 10), "\"other\""), server("spare", 1, "64Mi", 10)));
    wharf
        .until_servers("copies elsewhere", |servers| {
            servers.len() == 2 && shape(servers)[1].2 == 8 && shape(servers)[0].2 == 0 && told(&servers[0]).is_empty()
        })
        .await;
    load.more(100).await;
    let account = load.stop().await;
    account.assert_clean(&wharf);
    proof("a capability taken away by an edit of the registry", &account.line());
}

/// A running inference server of the same models, which counts what it is asked.
struct Elsewhere {
    address: String,
    asked: Arc<AtomicU64>,
    _stop: tokio_util::sync::DropGuard,
}

#[derive(Debug)]
struct Counted(Arc<dyn Upstream>, Arc<AtomicU64>);

impl Upstream for Counted {
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        if request.uri().path().ends_with("/infer") || request.uri().path().ends_with("ModelInfer") {
            self.1.fetch_add(1, Ordering::Relaxed);
        }
        self.0.call(request)
    }
}

impl Elsewhere {
    async fn start(repository: PathBuf) -> Self {
        let runtime = Runtime::new(Options {
            repository,
            execution: Execution::Pool { threads: 2 },
            limits: wharf::runtime::Limits::default(),
        });
        let listener = TcpNetwork.bind("127.0.0.1:0").await.unwrap();
        let (address, asked, stop) = (listener.address(), Arc::new(AtomicU64::new(0)), CancellationToken::new());
        let counted = Arc::new(Counted(runtime, Arc::clone(&asked)));
        tokio::spawn(wharf::forward::serve(listener, counted, Limits::default(), stop.clone()));
        Self { address, asked, _stop: stop.drop_guard() }
    }
}

/// `onnx`, whose replicas run at these addresses.
fn at(places: &[&Elsewhere]) -> String {
    let addresses: Vec<_> = places.iter().map(|place| format!("{{ http = \"http://{}\" }}", place.address)).collect();
    format!(
        "[[server]]\nname = \"onnx\"\nruntime = \"oip\"\ncapabilities = [\"onnx\"]\nmemory = \"64Mi\"\n\
         addresses = [{}]\n\n",
        addresses.join(", ")
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_the_file_has_somewhere_else_are_emptied_and_started_there() {
    let home = Home::new(&onnx(1, "64Mi", 10));
    let wharf = with_models(&home).await;
    let repository = |index: u32| home.path().join(format!("agent/onnx-{index}/repository"));
    let (first, second) = (Elsewhere::start(repository(0)).await, Elsewhere::start(repository(1)).await);
    let load = load_on(&wharf).await;
    // With nowhere to go they stay, and it is said what is waited for.
    load.marks.mark("the only replica is to be elsewhere");
    home.write_registry(&at(&[&first]));
    wharf
        .until_servers("replica that waits", |servers| says(&servers[0], "started anew") && shape(servers)[0].2 == 8)
        .await;
    load.more(200).await;
    assert_eq!((shape(&wharf.servers().await)[0].2, first.asked.load(Ordering::Relaxed)), (8, 0));

    load.marks.mark("a server to move to");
    home.write_registry(&format!("{}{}", at(&[&first]), server("spare", 1, "64Mi", 10)));
    let there = |servers: &[ServerView]| told(&servers[0]).is_empty() && shape(servers)[0].1 == 1;
    wharf.until_servers("replica elsewhere", |s| s.len() == 2 && there(s) && shape(s)[1].2 == 8).await;
    load.marks.mark("back to the replica that is elsewhere now");
    home.write_registry(&at(&[&first]));
    wharf.until_servers("one server with all", |s| s.len() == 1 && there(s) && shape(s)[0].2 == 8).await;
    load.more(100).await;
    assert!(first.asked.load(Ordering::Relaxed) > 0, "it answers there");

    // Two that change places: one after the other, and each takes what the other has.
    load.marks.mark("a second replica");
    home.write_registry(&at(&[&first, &second]));
    wharf.until_servers("two replicas", |s| shape(s)[0].1 == 2).await;
    load.marks.mark("both in this process again");
    home.write_registry(&onnx(2, "64Mi", 10));
    let from = home.log().len();
    logged(&home, from, "onnx-1").await;
    wharf
        .until_servers("two replicas in this process", |s| {
            told(&s[0]).is_empty() && shape(s)[0].1 == 2 && shape(s)[0].2 == 8 && s[0].runtime == "builtin"
        })
        .await;
    load.more(50).await;
    let asked = || first.asked.load(Ordering::Relaxed) + second.asked.load(Ordering::Relaxed);
    let before = asked();
    load.more(100).await;
    assert_eq!(asked(), before, "nothing is asked there any more");
    let account = load.stop().await;
    account.assert_clean(&wharf);
    proof("replicas moved to other places by edits of the registry", &account.line());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edit_that_touches_what_another_owns_is_refused_whole() {
    let home = Home::new(&onnx(2, "64Mi", 10));
    let wharf = with_models(&home).await;
    let notify =
        seldon::ServerNotify { name: "taken".to_owned(), expected_replicas: 1, ..seldon::ServerNotify::default() };
    let request = seldon::ServerNotifyRequest { servers: vec![notify], ..seldon::ServerNotifyRequest::default() };
    wharf.scheduler.clone().server_notify(request).await.unwrap();
    let load = load_on(&wharf).await;
    let before = shape(&wharf.servers().await);
    let edit = format!("{}{}{}", server("another", 1, "8Mi", 0), onnx(1, "32Mi", 50), server("taken", 1, "8Mi", 0));
    // Said again, as after a look at the file, it is refused again.
    for text in [edit.clone(), format!("{edit}# the same\n")] {
        let from = home.log().len();
        load.marks.mark("an edit that names a server of another owner");
        home.write_registry(&text);
        let told = logged(&home, from, "refused").await;
        for word in ["servers.toml", "server taken belongs to the scheduler API", "take it out of the file"] {
            assert!(told.contains(word), "{word:?}: {told}");
        }
        load.more(100).await;
        let servers = wharf.servers().await;
        assert_eq!(shape(&servers), before);
        let kept = &named(&servers, "onnx").replicas;
        assert!(
            kept.iter().all(|replica| (replica.capacity, replica.overcommit_percent) == (64 * MIB, 10)),
            "{kept:#?}"
        );
    }
    // The next one is compared with what was obeyed last.
    home.write_registry(&format!("{}{}", server("another", 1, "8Mi", 0), onnx(2, "32Mi", 10)));
    wharf
        .until_servers("obeyed edit", |servers| {
            servers.len() == 3
                && named(servers, "onnx").replicas.iter().all(|replica| replica.capacity == 32 * MIB)
                && named(servers, "taken").owner == "api"
        })
        .await;
    let account = load.stop().await;
    account.assert_clean(&wharf);
    proof("edits that touch what another owns are refused whole", &account.line());
}

/// One role in this process, on ports that the system chose, with its files in `home`.
fn role(home: &Home, folder: &str, roles: &[Role], set: &[(&str, &str)]) -> Process {
    let dir = home.path().display();
    let mut settings = vec![
        ("scheduler.servers".to_owned(), format!("{dir}/servers.toml")),
        ("scheduler.data_dir".to_owned(), format!("{dir}/{folder}")),
        ("agent.data_dir".to_owned(), format!("{dir}/{folder}")),
    ];
    for port in ["scheduler.listen", "scheduler.agents", "scheduler.http", "gateway.listen", "agent.listen"] {
        settings.push((port.to_owned(), "127.0.0.1:0".to_owned()));
    }
    settings.extend(set.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    let settings = Settings::load(None, std::iter::empty(), settings).unwrap();
    Process::new(settings, roles, CancellationToken::new(), Arc::new(|why| panic!("{why}")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_declaration_is_obeyed_where_agents_are_processes_of_their_own() {
    let home = Home::new(&format!("{}{}", server("far", 1, "8Mi", 0), server("spare", 1, "3Mi", 0)));
    let mut scheduler = role(&home, "scheduler", &[Role::Scheduler], &[]);
    let running = scheduler.scheduler().await.unwrap();
    scheduler.registry(&running.handle, None).await.unwrap();
    let mut agents = Vec::new();
    for server in ["far", "spare"] {
        let set = [
            ("agent.server", server),
            ("agent.memory", "8Mi"),
            ("agent.scheduler", &running.agents),
            ("agent.runtime", "builtin"),
        ];
        let mut agent = role(&home, server, &[Role::Agent], &set);
        agent.agent().await.unwrap();
        agents.push(agent);
    }
    let mut gateway = role(&home, "gateway", &[Role::Gateway], &[]);
    let (address, _gateway) = gateway.gateway(running.agents.clone()).await.unwrap();
    let client = WharfClient::connect(format!("http://{}", running.api)).await.unwrap();
    let servers = || async {
        let views = client.clone().list_servers(ListServersRequest { name: None }).await.unwrap().into_inner();
        futures::StreamExt::collect::<Vec<_>>(futures::StreamExt::map(views, Result::unwrap)).await
    };
    let until = |what: &'static str, reached: fn(&[ServerView]) -> bool| async move {
        let deadline = Instant::now() + SOON;
        loop {
            let seen = servers().await;
            if reached(&seen) {
                return;
            }
            assert!(Instant::now() < deadline, "no {what}: {seen:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    until("agents", |servers| servers.len() == 2 && shape(servers).iter().all(|(_, available, _)| *available == 1))
        .await;
    for number in 0..MODELS {
        let model = Some(Spec::new(&format!("m{number}"), "iris-1", MIB).model());
        client.clone().submit_model(SubmitModelRequest { model, rollout: None }).await.unwrap();
    }
    let clients = process::load::Clients::connect(&address).await;
    let deadline = Instant::now() + SOON;
    for number in 0..MODELS {
        while let Err(refused) = clients.ask(0, &format!("m{number}"), process::load::Protocol::Rest).await {
            assert!(Instant::now() < deadline, "m{number}: {refused:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let load = Load::start(&address, 100, move |number| Question {
        model: format!("m{}", number / 2 % MODELS),
        protocol: in_turns(number),
        check: Box::new(|answer| if answer.label == 0 { Ok(()) } else { Err("iris-1 says 0".to_owned()) }),
    })
    .await;
    load.marks.mark("less declared than reported");
    home.write_registry(&format!("{}{}", server("far", 1, "2Mi", 0), server("spare", 1, "8Mi", 0)));
    until("smaller replica", |servers| {
        let far = named(servers, "far");
        far.replicas[0].copies <= 2
            && shape(servers)[1].2 >= 6
            && says(far, "replica 0 reports 8 MiB, 2 MiB are declared; 2 MiB count")
            && !says(far, "over its limit")
    })
    .await;
    load.marks.mark("a capability that is reported and not declared");
    home.write_registry(&format!("{}{}", able(&server("far", 1, "2Mi", 0), "\"other\""), server("spare", 1, "8Mi", 0)));
    until("copies elsewhere", |servers| {
        let far = named(servers, "far");
        shape(servers)[1].2 == 8 && far.replicas[0].copies == 0 && says(far, "reports onnx, which is not declared")
    })
    .await;
    load.more(50).await;
    let account = load.stop().await;
    assert!(account.sent > 0 && account.failed() == 0, "{}\n{:?}", account.line(), account.shown);
    proof("declarations obeyed where agents are processes of their own", &account.line());
}
