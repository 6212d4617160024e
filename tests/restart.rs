//! The promise: whatever was acknowledged is there after `kill -9` at any instant, what is wanted comes back, what is not
//! wanted is not there, and a journal that can't be used is refused with what to do.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on says so"
)]
#![expect(clippy::disallowed_methods, reason = "a test against a real process has the real clock")]

mod process;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use process::{
    Home, Spec, Wharf, count,
    load::{Clients, Random, in_turns},
    onnx,
    proof::proof,
    said,
};
use wharf::rpc::proto::wharf::ModelView;

/// Users that work at once, and the models of each.
const USERS: u64 = 4;
const MODELS_EACH: u64 = 3;

/// What a user wants of a model: nothing when it is deleted or never was.
type Wish = Option<Spec>;

/// What users know of what they asked for.
#[derive(Clone, Debug, Default)]
struct Known {
    /// What was acknowledged last.
    acknowledged: Wish,
    /// What was asked since, and not answered yet.
    asked: Option<Wish>,
    /// Acknowledgements.
    count: u64,
}

type Book = Arc<Mutex<BTreeMap<String, Known>>>;

/// What is wanted, in the words of a view: mark, artifact and copies.
fn words(wish: &Wish) -> Option<(String, String, u32)> {
    wish.as_ref().map(|spec| (spec.mark.clone().unwrap_or_default(), spec.uri.clone(), spec.replicas))
}

fn shown(view: &ModelView) -> Option<(String, String, u32)> {
    if view.deleted {
        return None;
    }
    let spec = view.versions.last()?.spec.clone()?;
    let mark = spec.parameters.first().map(|parameter| parameter.value.clone()).unwrap_or_default();
    Some((mark, spec.uri, view.wanted))
}

/// Works on some models until the process is gone, and notes what was acknowledged.
async fn work(wharf: Wharf2, user: u64, mut random: Random, book: Book) {
    loop {
        let name = format!("m{}", user * MODELS_EACH + random.below(MODELS_EACH));
        let now = book.lock().unwrap().get(&name).map(|known| known.acknowledged.clone()).unwrap_or_default();
        let artifact = if random.below(2) == 0 { "iris-1" } else { "iris-2" };
        let fresh = Spec::new(&name, artifact, 1 << 20)
            .replicas(1 + u32::try_from(random.below(2)).unwrap())
            .marked(random.next());
        let wish = match (random.below(10), now) {
            (0..=1, Some(_)) => None,
            (2..=3, Some(spec)) => Some(spec.clone().replicas(3 - spec.replicas)),
            _ => Some(fresh),
        };
        book.lock().unwrap().entry(name.clone()).or_default().asked = Some(wish.clone());
        let answered = match &wish {
            Some(spec) if random.below(2) == 0 => wharf.load(spec).await,
            Some(spec) => wharf.submit(spec).await,
            None => wharf.unload(&name).await,
        };
        if let Err(status) = answered {
            // Only the end of the process may refuse what is right.
            let ended =
                matches!(status.code(), tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::Cancelled);
            assert!(ended, "{name} {wish:?}: {status:?}");
            return;
        }
        let mut book = book.lock().unwrap();
        let known = book.get_mut(&name).unwrap();
        known.acknowledged = wish;
        known.asked = None;
        known.count += 1;
    }
}

/// The clients of a process, which outlive it.
#[derive(Clone)]
struct Wharf2 {
    scheduler: wharf::rpc::proto::scheduler::scheduler_client::SchedulerClient<tonic::transport::Channel>,
    wharf: wharf::rpc::proto::wharf::wharf_client::WharfClient<tonic::transport::Channel>,
}

impl Wharf2 {
    fn of(wharf: &Wharf) -> Self {
        Self { scheduler: wharf.scheduler.clone(), wharf: wharf.wharf.clone() }
    }

    async fn load(&self, spec: &Spec) -> Result<(), tonic::Status> {
        let request = wharf::rpc::proto::scheduler::LoadModelRequest { model: Some(spec.model()) };
        self.scheduler.clone().load_model(request).await.map(drop)
    }

    async fn submit(&self, spec: &Spec) -> Result<(), tonic::Status> {
        let request = wharf::rpc::proto::wharf::SubmitModelRequest { model: Some(spec.model()), rollout: None };
        self.wharf.clone().submit_model(request).await.map(drop)
    }

    async fn unload(&self, name: &str) -> Result<(), tonic::Status> {
        let model = Some(wharf::rpc::proto::scheduler::ModelReference { name: name.to_owned(), version: None });
        let request = wharf::rpc::proto::scheduler::UnloadModelRequest { model, kubernetes_meta: None };
        self.scheduler.clone().unload_model(request).await.map(drop)
    }
}

/// Every acknowledged wish is there, and nothing that nobody asked for. What was on its way may be there or not; from
/// here on it is known.
async fn everything_is_there(wharf: &Wharf, book: &Book, what: &str) {
    let views: BTreeMap<String, ModelView> =
        wharf.views().await.into_iter().map(|view| (view.name.clone(), view)).collect();
    let mut book = book.lock().unwrap();
    for (name, known) in book.iter_mut() {
        let found = views.get(name).and_then(shown);
        if found == words(&known.acknowledged) {
            known.asked = None;
        } else if let Some(asked) = known.asked.take().filter(|asked| found == words(asked)) {
            known.acknowledged = asked;
        } else {
            panic!("{what}: {name} is {found:?}, wanted is {known:#?}\n{:#?}\n{}", views.get(name), wharf.tail());
        }
    }
    let unknown: Vec<&String> = views.keys().filter(|name| !book.contains_key(*name)).collect();
    assert!(unknown.is_empty(), "{what}: nobody asked for {unknown:?}");
}

/// Everything wanted answers with the right artifact, and nothing else is loaded.
async fn settled(wharf: &Wharf, home: &Home, book: &Book, what: &str) -> Duration {
    let begun = Instant::now();
    let book = book.lock().unwrap().clone();
    let clients = Clients::connect(&wharf.gateway).await;
    let mut copies = 0;
    let mut served = BTreeSet::new();
    for (number, (name, known)) in (0..).zip(&book) {
        let Some(spec) = &known.acknowledged else {
            let gone = |view: &ModelView| view.deleted && view.versions.iter().all(|version| version.copies.is_empty());
            if wharf.view(name).await.is_some() {
                wharf.until(name, &format!("gone ({what})"), gone).await;
            }
            let answered = clients.ask(number, name, in_turns(number)).await;
            assert!(answered.is_err(), "{what}: {name} is deleted and answers");
            continue;
        };
        let there = |view: &ModelView| {
            let newest = view.versions.last().unwrap();
            let all: usize = view.versions.iter().map(|version| version.copies.len()).sum();
            let wanted = spec.replicas as usize;
            view.state == "Available"
                && view.serving == Some(newest.version)
                && view.available == spec.replicas
                && (newest.copies.len(), all) == (wanted, wanted)
        };
        let view = wharf.until(name, &format!("there in {} copies ({what})", spec.replicas), there).await;
        let version = view.serving.unwrap();
        let label = i64::from(spec.uri.ends_with("iris-2"));
        let answer = clients.ask(number, name, in_turns(number)).await;
        let answer = answer.unwrap_or_else(|refused| panic!("{what}: {name}: {refused:?}\n{}", wharf.tail()));
        assert_eq!((answer.version(), answer.label), (version, label), "{what}: {name}");
        copies += spec.replicas;
        served.insert(format!("{name}_{version}"));
    }
    // Nothing else: not in the ledger, not in memory, not on the agents' disks.
    wharf
        .until_servers(&format!("{copies} copies and no more ({what})"), |servers| {
            let replicas = || servers.iter().flat_map(|server| &server.replicas);
            let registered: u32 = replicas().map(|replica| replica.copies).sum();
            let resident: u32 = replicas().map(|replica| replica.copies_resident).sum();
            let bytes: u64 = replicas().map(|replica| replica.registered).sum();
            (registered, resident, bytes) == (copies, copies, u64::from(copies) << 20)
        })
        .await;
    let loaded = process::sample(&process::load::get(&wharf.page, "/metrics").await, "seldon_loaded_model_gauge");
    assert_eq!(loaded, Some(f64::from(copies)), "{what}: what the agents have in memory");
    let mut folders = BTreeSet::new();
    for replica in ["onnx-0", "onnx-1", "onnx-2"] {
        if let Ok(entries) = std::fs::read_dir(home.path().join("agent").join(replica).join("repository")) {
            folders.extend(entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()));
        }
    }
    assert_eq!(folders, served, "{what}: what is in the repositories");
    begun.elapsed()
}

fn seed() -> u64 {
    let given = std::env::var("WHARF_SEED").ok().and_then(|seed| seed.parse().ok());
    given.unwrap_or_else(|| u64::from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_a_kill_at_any_instant() {
    let kills = count(200, 12);
    let seed = seed();
    process::proof::tell(&format!("WHARF_SEED={seed} repeats the choices of this run"));
    let mut random = Random::new(seed);
    let home = Home::new(&onnx(3, "64Mi", 10)).set("scheduler.gateway_lease", "500ms").set("log.level", "warn");
    let book: Book = Arc::default();
    let (mut slowest, mut ready) = (Duration::ZERO, Duration::ZERO);
    for kill in 0..kills {
        let begun = Instant::now();
        let wharf = home.up().await;
        ready = ready.max(begun.elapsed());
        let what = format!("seed {seed}, after {kill} kills");
        everything_is_there(&wharf, &book, &what).await;
        // Half of the restarts are killed again before they have come to rest.
        if random.below(2) == 0 {
            slowest = slowest.max(settled(&wharf, &home, &book, &what).await);
        }
        let users: Vec<_> = (0..USERS)
            .map(|user| {
                let (random, book) = (Random::new(random.next()), Arc::clone(&book));
                tokio::spawn(work(Wharf2::of(&wharf), user, random, book))
            })
            .collect();
        // The instant of the kill is what is random here; nothing is waited for.
        tokio::time::sleep(Duration::from_micros(random.below(300_000))).await;
        wharf.kill();
        for user in users {
            user.await.unwrap();
        }
    }
    let wharf = home.up().await;
    let what = format!("seed {seed}, at the end");
    everything_is_there(&wharf, &book, &what).await;
    slowest = slowest.max(settled(&wharf, &home, &book, &what).await);
    let acknowledged: u64 = book.lock().unwrap().values().map(|known| known.count).sum();
    assert!(acknowledged > kills as u64, "{acknowledged} acknowledgements are too few to prove anything");
    proof(
        &format!("kill -9 at {kills} random instants of submissions, rollouts, deletes and rescaling"),
        &format!(
            "{acknowledged} acknowledged changes, 0 lost; ready after at most {ready:.1?}, everything at rest after at most \
             {slowest:.1?} more; seed {seed}"
        ),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_journal_has_one_process() {
    let home = Home::new(&onnx(1, "64Mi", 10));
    let mut wharf = home.up().await;
    wharf.submit(&Spec::new("iris", "iris-1", 1 << 20)).await.unwrap();
    wharf.until_serving("iris", 1).await;
    let (status, told) = home.refused().await;
    assert_eq!(status.code(), Some(1), "{told}");
    assert!(told.contains("is in use by another process; stop that one"), "{told}");
    // The first one does not notice.
    assert!(wharf.is_running());
    let clients = Clients::connect(&wharf.gateway).await;
    for number in 0..10 {
        assert_eq!(clients.ask(number, "iris", in_turns(number)).await.unwrap().label, 0);
    }
    assert!(wharf.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clean_stop_keeps_everything_events_too() {
    let home = Home::new(&onnx(1, "64Mi", 10));
    let wharf = home.up().await;
    wharf.submit(&Spec::new("iris", "iris-1", 1 << 20)).await.unwrap();
    wharf.until_serving("iris", 1).await;
    let before = wharf.events().await;
    assert!(
        before
            .iter()
            .any(|event| event.subject == "model/iris" && event.kind == "Serving" || event.kind == "Available")
    );
    let begun = Instant::now();
    assert!(wharf.stop().await.success());
    assert!(begun.elapsed() < Duration::from_secs(20), "a stop takes {:?}", begun.elapsed());
    let wharf = home.up().await;
    let after = wharf.events().await;
    assert_eq!(after[..before.len()], before[..], "the events of the first run, then those of the second");
    wharf.until_serving("iris", 1).await;
    let listed = said(&wharf.cli(&["events", "iris"]).await);
    assert!(listed.contains("version 1 was submitted"), "{listed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_that_cannot_be_used_is_refused_with_what_to_do() {
    let home = Home::new(&onnx(1, "64Mi", 10));
    let wharf = home.up().await;
    wharf.submit(&Spec::new("iris", "iris-1", 1 << 20)).await.unwrap();
    assert!(wharf.stop().await.success());
    let journal = home.path().join("scheduler/journal.redb");
    let good = std::fs::read(&journal).unwrap();

    // Damaged in its head, and cut off.
    for bad in [vec![0x5a; good.len()], good[..good.len() / 3].to_vec()] {
        std::fs::write(&journal, &bad).unwrap();
        let (status, told) = home.refused().await;
        assert_eq!(status.code(), Some(1), "{told}");
        assert!(told.contains("journal.redb") && told.contains("restore a backup, or move the file away"), "{told}");
        assert_eq!(std::fs::read(&journal).unwrap(), bad, "what can't be read is left as it is");
    }

    // Of a later Wharf.
    std::fs::write(&journal, &good).unwrap();
    newer_schema(&journal);
    let (status, told) = home.refused().await;
    assert_eq!(status.code(), Some(1), "{told}");
    assert!(told.contains("run the newer wharf that wrote it"), "{told}");

    // Put back, it goes on.
    std::fs::write(&journal, &good).unwrap();
    let wharf = home.up().await;
    wharf.until_serving("iris", 1).await;
}

/// Says in the journal that a later Wharf wrote it.
fn newer_schema(journal: &std::path::Path) {
    let meta = redb::TableDefinition::<&str, &str>::new("meta");
    let database = redb::Database::open(journal).unwrap();
    let write = database.begin_write().unwrap();
    write.open_table(meta).unwrap().insert("schema", (wharf::store::SCHEMA + 1).to_string().as_str()).unwrap();
    write.commit().unwrap();
}
