//! The promise: a request for an evicted model waits little longer than the inference server's own load takes.
//!
//! Both are measured in turns in one run, of the same artifact and on the same server: a call of the server's repository
//! API after an unload, and a request to Wharf's gateway until its answer, less what the request takes while the model is
//! in memory. `make reload-overhead` prints the table of the README. Beside MLServer and Triton, Wharf is of the release
//! profile; the built-in runtime is measured in the profile of the tests, with Wharf and without.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on says so, and one against a real process has the real clock"
)]

mod process;
mod servers;

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use process::{
    Home, SOON, Spec, Wharf, artifact, count,
    load::{Clients, Protocol},
};
use servers::{Server, TURN, entry, trained, triton};
use wharf::{
    agent::runtimes::{Runtime, adapter},
    rpc::proto::wharf::ModelView,
    settings::registry::Runtime as Kind,
};

/// What one model counts for: more than any of them is measured to take, so that the sums are those that are meant.
const ONE: u64 = 1 << 30;
/// The server's memory: two models of that size, or one that counts twice.
const MEMORY: u64 = 2 * ONE;
/// No reload may be slower than the server's own load by more than this at the median, on a machine that is busy.
const BOUND: Duration = Duration::from_millis(150);

/// Times of one kind.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn at(&self, percent: usize) -> Duration {
        let mut all = self.0.clone();
        all.sort_unstable();
        all[(all.len() * percent / 100).min(all.len() - 1)]
    }

    fn median(&self) -> Duration {
        self.at(50)
    }

    fn shown(&self) -> String {
        format!("{:.1} / {:.1} ms", millis(self.at(50)), millis(self.at(95)))
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A reload that is compared: by the server itself, and through Wharf.
#[derive(Default)]
struct Compared {
    itself: Times,
    through: Times,
}

impl Compared {
    fn overhead(&self) -> f64 {
        millis(self.through.median()) - millis(self.itself.median())
    }

    fn line(&self, server: &str, case: &str) -> String {
        let ratio = self.through.median().as_secs_f64() / self.itself.median().as_secs_f64();
        let (itself, through, more) = (self.itself.shown(), self.through.shown(), self.overhead());
        format!("| {server} | {case} | {itself} | {through} | {more:.1} ms | {ratio:.2} |")
    }
}

/// The inference server, and models that lie there beside Wharf's.
struct Itself {
    adapter: Arc<dyn Runtime>,
    repository: PathBuf,
    _server: Server,
}

impl Itself {
    /// Puts a copy of one of Wharf's folders there under a name of its own.
    fn place(&self, from: &Path, name: &str) {
        let own = from.file_name().unwrap().to_str().unwrap();
        let mut folders = vec![from.to_owned()];
        while let Some(folder) = folders.pop() {
            let target = self.repository.join(name).join(folder.strip_prefix(from).unwrap());
            std::fs::create_dir_all(&target).unwrap();
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let bytes = std::fs::read(&path).unwrap();
                // Its settings say its name.
                let bytes = String::from_utf8(bytes)
                    .map_or_else(|bytes| bytes.into_bytes(), |text| text.replace(own, name).into_bytes());
                std::fs::write(target.join(path.file_name().unwrap()), bytes).unwrap();
            }
        }
    }

    async fn load(&self, name: &str) -> Duration {
        let began = Instant::now();
        self.adapter.load(name).await.unwrap();
        began.elapsed()
    }

    async fn unload(&self, name: &str) -> Duration {
        let began = Instant::now();
        self.adapter.unload(name).await.unwrap();
        began.elapsed()
    }
}

fn residency(view: &ModelView) -> impl Iterator<Item = &str> {
    view.versions.iter().flat_map(|version| &version.copies).map(|copy| copy.residency.as_str())
}

async fn until(wharf: &Wharf, name: &str, wanted: &str) {
    let is = |view: &ModelView| residency(view).collect::<Vec<_>>() == [wanted];
    wharf.until(name, wanted, is).await;
}

/// Asks once, and says how long the answer took.
async fn ask(clients: &Clients, name: &str) -> Duration {
    let began = Instant::now();
    let answer = clients.ask(0, name, Protocol::Rest).await.unwrap();
    let took = began.elapsed();
    assert_eq!(answer.model, format!("{name}_1"));
    took
}

async fn compare(kind: Kind, runs: usize) -> [Compared; 2] {
    let home = match std::env::var_os("WHARF_PROGRAM") {
        // The built-in runtime that is asked beside Wharf is in this process, and so of this build.
        Some(program) if kind != Kind::Builtin => Home::new("").program(program),
        _ => Home::new(""),
    };
    let repository = home.path().join("agent/iris-server-0/repository");
    // The built-in runtime within Wharf has no address: beside it another one is asked, by the same program.
    let own = if kind == Kind::Builtin { home.path().join("beside") } else { repository.clone() };
    let server = Server::start(kind, &own, home.path()).await;
    home.write_registry(&entry("iris-server", &server, &MEMORY.to_string(), 400));
    let (uri, version, requirement) = match kind {
        Kind::Builtin | Kind::Oip | Kind::Process => (PathBuf::from(artifact("iris-1")), None, "onnx"),
        Kind::MlServer => (trained("sklearn-iris-1"), None, "sklearn"),
        Kind::Triton => (triton("triton-iris"), Some(1), "triton"),
    };
    let wharf = home.up().await;
    // Two that fit together, two of which each takes all memory, and one that takes all of it for as long as it is there.
    for (name, memory) in [("one", ONE), ("left", MEMORY), ("right", MEMORY), ("filler", MEMORY)] {
        wharf.submit(&Spec { artifact_version: version, ..Spec::at(name, &uri, requirement, memory) }).await.unwrap();
        wharf.until_serving(name, 1).await;
    }
    let itself = Itself { adapter: adapter(Some(kind), server.upstream(), 1), repository: own, _server: server };
    for name in ["beside-a_1", "beside-b_1"] {
        itself.place(&repository.join("one_1"), name);
    }
    itself.load("beside-b_1").await;
    let clients = Clients::connect(&wharf.gateway).await;
    let misses = async || wharf.metric("seldon_cache_miss_count").await.unwrap_or_default();
    let [mut roomy, mut full] = [Compared::default(), Compared::default()];
    let mut plain = Times::default();
    for _ in 0..runs {
        // Room is free: what took it is gone.
        wharf.scale("filler", 1).await.unwrap();
        until(&wharf, "filler", "resident").await;
        wharf.scale("filler", 0).await.unwrap();
        wharf.until("filler", "gone", |view| residency(view).next().is_none()).await;
        until(&wharf, "one", "evicted").await;
        itself.unload("beside-a_1").await;
        roomy.itself.0.push(itself.load("beside-a_1").await);
        let before = misses().await;
        let reload = ask(&clients, "one").await;
        assert_eq!(misses().await - before, 1.0, "it was not on disk alone");
        let mut asked = Times::default();
        for _ in 0..5 {
            asked.0.push(ask(&clients, "one").await);
        }
        roomy.through.0.push(reload.saturating_sub(asked.median()));
        plain.0.append(&mut asked.0);

        // Another one has to leave.
        full.itself.0.push(itself.unload("beside-b_1").await + itself.load("beside-b_1").await);
        for (next, timed) in [("left", false), ("right", true)] {
            let before = misses().await;
            let reload = ask(&clients, next).await;
            assert_eq!(misses().await - before, 1.0, "it was not on disk alone");
            if timed {
                full.through.0.push(reload.saturating_sub(plain.median()));
            }
        }
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("{}: {runs} runs, a plain request {}; load average {}", kind.name(), plain.shown(), load.trim());
    wharf.kill();
    [roomy, full]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_takes_little_longer_than_the_servers_own_load() {
    let _turn = TURN.lock().await;
    let runs = count(50, 3);
    let mut table = String::from(
        "| server | what has to happen | itself, median / p95 | through Wharf, median / p95 | difference | ratio |\n\
         |---|---|---|---|---|---|\n",
    );
    for (kind, name) in [(Kind::Builtin, "built-in"), (Kind::MlServer, "MLServer"), (Kind::Triton, "Triton")] {
        let compared = tokio::time::timeout(SOON * 20, compare(kind, runs)).await.expect("it takes too long");
        for (compared, case) in compared.iter().zip(["a load", "an unload of another, and a load"]) {
            writeln!(table, "{}", compared.line(name, case)).unwrap();
            let more = compared.overhead();
            assert!(more < millis(BOUND), "{name}, {case}: {more:.1} ms more than the server's own\n{table}");
        }
    }
    println!("\n{table}");
}
