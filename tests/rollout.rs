//! The promise: a model goes from version to version without a failed request, and clients are answered by the
//! version that served or by one that was submitted since, never by another.

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
        atomic::{AtomicU32, Ordering},
    },
    time::Instant,
};

use process::{
    Home, Spec, Wharf, count,
    load::{Answer, Load, Question, in_turns},
    onnx,
    proof::proof,
    said,
};
use wharf::rpc::proto::wharf::{ModelView, Rollout, rollout::Strategy, submit_model_response::Outcome};

/// The versions that may answer: from the one that was known to serve to the newest submitted.
#[derive(Clone, Debug)]
struct Allowed {
    serving: Arc<AtomicU32>,
    newest: Arc<AtomicU32>,
}

impl Allowed {
    fn new(version: u32) -> Self {
        Self { serving: Arc::new(AtomicU32::new(version)), newest: Arc::new(AtomicU32::new(version)) }
    }

    /// Version `version` is about to be submitted.
    fn submitting(&self, version: u32) {
        self.newest.fetch_max(version, Ordering::SeqCst);
    }

    /// Version `version` is known to serve.
    fn serves(&self, version: u32) {
        self.serving.fetch_max(version, Ordering::SeqCst);
    }

    /// A request about the flower, that is right when an allowed version answers it with its own artifact's label.
    /// Odd versions have `iris-1`, which says 0; even ones have `iris-2`, which says 1.
    fn question(&self, number: u64, model: &str) -> Question {
        let (oldest, newest) = (self.serving.load(Ordering::SeqCst), Arc::clone(&self.newest));
        let check = move |answer: &Answer| {
            let (version, newest) = (answer.version(), newest.load(Ordering::SeqCst));
            if version < oldest || version > newest {
                return Err(format!("version {version} answered, {oldest} to {newest} may"));
            }
            let label = i64::from(version.is_multiple_of(2));
            if answer.label == label { Ok(()) } else { Err(format!("version {version} says {label}")) }
        };
        Question { model: model.to_owned(), protocol: in_turns(number), check: Box::new(check) }
    }
}

/// The artifact of a version: odd ones have the first.
fn artifact_of(version: u32) -> &'static str {
    if version.is_multiple_of(2) { "iris-2" } else { "iris-1" }
}

fn iris(version: u32) -> Spec {
    Spec::new("iris", artifact_of(version), 1 << 20).marked(version)
}

/// Version 1 of `iris` is served.
async fn first(home: &Home, spec: &Spec) -> Wharf {
    let wharf = home.up().await;
    let answer = wharf.submit(spec).await.unwrap();
    assert_eq!((answer.version, answer.outcome()), (1, Outcome::Created));
    wharf.until_serving("iris", 1).await;
    wharf
}

const RATE: u32 = 200;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_rollouts_fail_no_request() {
    let rollouts = u32::try_from(count(1000, 40)).unwrap();
    let home = Home::new(&onnx(2, "64Mi", 10));
    let wharf = first(&home, &iris(1).replicas(2)).await;
    let allowed = Allowed::new(1);
    let asked = allowed.clone();
    let load = Load::start(&wharf.gateway, RATE, move |number| asked.question(number, "iris")).await;
    let begun = Instant::now();
    for version in 2..=rollouts + 1 {
        allowed.submitting(version);
        load.marks.mark(format!("submitting version {version}"));
        let answer = wharf.submit(&iris(version).replicas(2)).await.unwrap();
        assert_eq!((answer.version, answer.outcome()), (version, Outcome::NewVersion));
        load.marks.mark(format!("version {version} was accepted"));
        if version.is_multiple_of(3) {
            // The next one is submitted while the earlier ones are still leaving.
            wharf.until_serving("iris", version).await;
        } else {
            wharf.until_alone("iris", version).await;
            allowed.serves(version);
        }
        load.marks.mark(format!("version {version} was seen to serve"));
        if load.failed() > 0 {
            break;
        }
    }
    let took = begun.elapsed();
    load.more(u64::from(RATE)).await;
    let account = load.stop().await;
    account.assert_clean(&wharf);
    assert!(account.by_version.len() > 3, "answers come from many versions: {:?}", account.by_version);
    proof(
        &format!("{rollouts} rollouts of one model under {RATE} requests a second, REST and gRPC"),
        &format!("{}; {:.0} ms a rollout", account.line(), took.as_secs_f64() * 1e3 / f64::from(rollouts)),
    );
}

/// A load on `iris` that may be answered by these versions.
async fn under_load(wharf: &Wharf, allowed: &Allowed) -> Load {
    let asked = allowed.clone();
    Load::start(&wharf.gateway, RATE, move |number| asked.question(number, "iris")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_fails_to_load_leaves_the_old_one_serving_and_the_model_says_so() {
    let home = Home::new(&onnx(2, "64Mi", 10)).set("scheduler.retry_first", "50ms");
    let wharf = first(&home, &iris(1).replicas(2)).await;
    let allowed = Allowed::new(1);
    let load = under_load(&wharf, &allowed).await;
    load.marks.mark("submitting a version that can't load");
    let answer = wharf.submit(&Spec::new("iris", "broken", 1 << 20).replicas(2)).await.unwrap();
    assert_eq!((answer.version, answer.outcome()), (2, Outcome::NewVersion));
    let failed =
        |view: &ModelView| view.versions.iter().any(|version| version.version == 2 && version.state == "Failed");
    let view = wharf.until("iris", "failed in version 2", failed).await;
    let version = view.versions.iter().find(|version| version.version == 2).unwrap();
    assert!(version.reason.contains("model.onnx") || version.reason.contains("artifact"), "{}", version.reason);
    assert_eq!(view.serving, Some(1));
    assert_eq!(view.state, "Available");
    assert!(view.reason.contains("version 2"), "the model itself says what keeps it on version 1: {view:#?}");
    load.more(u64::from(RATE)).await;

    // A person is told, and a script by the exit code.
    let status = wharf.cli(&["model", "status", "iris", "-w", "-t", "20"]).await;
    assert_eq!(status.status.code(), Some(1), "{}", said(&status));
    assert!(said(&status).contains(&version.reason), "{}", said(&status));

    // Submitted right, it goes on.
    allowed.submitting(3);
    wharf.submit(&iris(3).replicas(2)).await.unwrap();
    let view = wharf.until_alone("iris", 3).await;
    allowed.serves(3);
    assert_eq!(view.reason, "");
    load.more(u64::from(RATE)).await;
    let account = load.stop().await;
    account.assert_clean(&wharf);
    assert!(!account.by_version.contains_key("iris_2"), "{:?}", account.by_version);
    proof("a version that fails to load leaves the old one serving", &account.line());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_spec_again_changes_nothing_and_another_number_of_copies_is_no_version() {
    let home = Home::new(&onnx(3, "64Mi", 10));
    let wharf = first(&home, &iris(1)).await;
    let allowed = Allowed::new(1);
    let load = under_load(&wharf, &allowed).await;
    let copies = |view: &ModelView| -> Vec<(u32, u32)> {
        view.versions.iter().flat_map(|version| version.copies.iter().map(|copy| (copy.replica, copy.number))).collect()
    };
    let before = copies(&wharf.view("iris").await.unwrap());
    for _ in 0..20 {
        let answer = wharf.submit(&iris(1)).await.unwrap();
        assert_eq!((answer.version, answer.outcome()), (1, Outcome::Unchanged));
        wharf.load(&iris(1)).await.unwrap();
    }
    let view = wharf.view("iris").await.unwrap();
    assert_eq!((copies(&view), view.versions.len()), (before, 1));

    for replicas in [3, 1, 2] {
        let answer = wharf.submit(&iris(1).replicas(replicas)).await.unwrap();
        assert_eq!((answer.version, answer.outcome()), (1, Outcome::Rescaled));
        let enough = |view: &ModelView| view.available == replicas && copies(view).len() == replicas as usize;
        wharf.until("iris", &format!("there {replicas} times"), enough).await;
        load.more(50).await;
    }
    // The same by the command line.
    let scaled = wharf.cli(&["model", "scale", "iris", "3", "-w", "-t", "30"]).await;
    assert!(scaled.status.success(), "{}", said(&scaled));
    let view = wharf.until("iris", "there 3 times", |view| view.available == 3).await;
    assert_eq!((view.versions.len(), view.serving), (1, Some(1)));
    let account = load.stop().await;
    account.assert_clean(&wharf);
    proof("the same spec again changes nothing; another number of copies makes no version", &account.line());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_that_is_overtaken_goes_straight_to_the_newest() {
    let home = Home::new(&onnx(2, "64Mi", 10));
    let wharf = first(&home, &iris(1).replicas(2)).await;
    let allowed = Allowed::new(1);
    let load = under_load(&wharf, &allowed).await;
    // Somebody takes the connection for the second version's artifact, and never answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut stuck = iris(2).replicas(2);
    stuck.uri = format!("http://{}/model.onnx", silent.local_addr().unwrap());
    wharf.submit(&stuck).await.unwrap();
    let fetching = |view: &ModelView| {
        view.versions
            .iter()
            .any(|version| version.version == 2 && version.copies.iter().any(|copy| copy.state == "Downloading"))
    };
    wharf.until("iris", "fetching version 2", fetching).await;
    // Then many at once, and only the last counts.
    for version in 3..=9 {
        allowed.submitting(version);
        load.marks.mark(format!("submitting version {version}"));
        wharf.submit(&iris(version).replicas(2)).await.unwrap();
    }
    wharf.until_alone("iris", 9).await;
    allowed.serves(9);
    load.more(u64::from(RATE)).await;
    let account = load.stop().await;
    account.assert_clean(&wharf);
    assert!(!account.by_version.contains_key("iris_2"), "{:?}", account.by_version);
    let servers = wharf.until_servers("free memory", |servers| servers[0].replicas.iter().all(|r| r.copies == 1)).await;
    assert!(servers[0].replicas.iter().all(|replica| replica.registered == 1 << 20), "{servers:#?}");
    proof("a rollout that is overtaken, even while it downloads, goes straight to the newest", &account.line());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_is_a_new_version_with_the_old_spec() {
    let home = Home::new(&onnx(2, "64Mi", 10));
    let wharf = first(&home, &iris(1)).await;
    wharf.submit(&iris(2)).await.unwrap();
    wharf.until_alone("iris", 2).await;
    let allowed = Allowed::new(2);
    let load = under_load(&wharf, &allowed).await;
    // Version 3 has the artifact of version 1, as odd versions have.
    allowed.submitting(3);
    load.marks.mark("rolling back");
    let rolled = wharf.cli(&["model", "rollback", "iris", "--to", "1", "-w", "-t", "30"]).await;
    assert!(rolled.status.success(), "{}", said(&rolled));
    let view = wharf.until_alone("iris", 3).await;
    allowed.serves(3);
    let spec = |number: u32| view.versions.iter().find(|version| version.version == number).unwrap().spec.clone();
    assert_eq!(spec(3), spec(1));
    load.more(u64::from(RATE)).await;
    let account = load.stop().await;
    account.assert_clean(&wharf);
    let unknown = wharf.cli(&["model", "rollback", "iris", "--to", "77"]).await;
    assert_eq!(unknown.status.code(), Some(1), "{}", said(&unknown));
    assert!(said(&unknown).contains("77"), "{}", said(&unknown));
    proof("`wharf model rollback` goes back without a failed request", &account.line());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recreate_unloads_the_old_version_before_it_loads_the_new_one() {
    // One replica with memory for one copy: side by side is not possible.
    let home = Home::new(&onnx(1, "10Mi", 0));
    let recreate = Some(Rollout { strategy: Some(Strategy::Recreate.into()), ..Rollout::default() });
    let spec =
        |version: u32| Spec { rollout: recreate, ..Spec::new("iris", artifact_of(version), 8 << 20).marked(version) };
    let wharf = first(&home, &spec(1)).await;
    let rounds = u32::try_from(count(50, 10)).unwrap();
    for version in 2..=rounds {
        let answer = wharf.submit(&spec(version)).await.unwrap();
        assert_eq!(answer.version, version);
        let both = std::cell::Cell::new(false);
        let alone = |view: &ModelView| {
            let held = |version: &&wharf::rpc::proto::wharf::VersionView| {
                version.copies.iter().any(|copy| !copy.server.is_empty() && copy.state != "Unloaded")
            };
            both.set(both.get() || view.versions.iter().filter(held).count() > 1);
            view.serving == Some(version) && view.state == "Available"
        };
        wharf.until("iris", &format!("recreated as version {version}"), alone).await;
        assert!(!both.get(), "two versions had a place at once");
        let clients = process::load::Clients::connect(&wharf.gateway).await;
        let answer = clients.ask(0, "iris", process::load::Protocol::Rest).await.unwrap();
        assert_eq!((answer.version(), answer.label), (version, i64::from(version.is_multiple_of(2))));
    }
    proof("strategy recreate never holds two versions at once", &format!("{rounds} versions"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_room_for_both_versions_is_said_and_harms_nobody() {
    let home = Home::new(&onnx(1, "10Mi", 0));
    let spec = |version: u32| Spec::new("iris", artifact_of(version), 8 << 20).marked(version);
    let wharf = first(&home, &spec(1)).await;
    let allowed = Allowed::new(1);
    let load = under_load(&wharf, &allowed).await;
    allowed.submitting(2);
    load.marks.mark("submitting what has no room beside version 1");
    wharf.submit(&spec(2)).await.unwrap();
    let told = |view: &ModelView| {
        view.versions.iter().any(|version| {
            let copy = version.copies.first();
            version.version == 2
                && copy.is_some_and(|copy| copy.state == "Pending" && copy.reason.contains("lacks at least 6 MiB"))
        })
    };
    let view = wharf.until("iris", "without room for version 2", told).await;
    assert_eq!((view.serving, view.state.as_str()), (Some(1), "Available"));
    assert!(view.reason.contains("version 2 does not take over: 1 replica matches"), "{}", view.reason);
    let explained = wharf.cli(&["explain", "iris"]).await;
    assert!(said(&explained).contains("onnx-0") && said(&explained).contains("MiB"), "{}", said(&explained));
    load.more(u64::from(RATE)).await;
    let account = load.stop().await;
    account.assert_clean(&wharf);

    // What is said to help, helps: room.
    home.write_registry(&onnx(2, "10Mi", 0));
    wharf.until_alone("iris", 2).await;
    proof("a rollout without room for both versions waits, says why, and goes on when there is room", &account.line());
}
