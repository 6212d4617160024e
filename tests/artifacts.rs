//! The promise: an artifact comes from wherever it is, arrives once, is gone on with where it broke, and is what
//! its store says; and when it can't come, the error says why and what to do.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    missing_debug_implementations,
    dead_code,
    reason = "a test stops where it fails, and shares helper modules"
)]

mod agent_world;
mod stores;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use agent_world::{Session, World, entries, generation, unregister};
use stores::{Fake, S3, Speaks, Wire, rclone};
use wharf::{
    agent::{
        Blocking, Options, RcloneUse,
        artifacts::{
            HttpSource, HubSource, LocalSource, ObjectSource, Patience, RcloneOptions, RcloneSource, Secrets, Transfers,
        },
    },
    domain::{
        copy::Report,
        memory::{Bytes, Resources},
        names::ModelName,
        order::Order,
        size::Trust,
        spec::{ModelSpec, Storage},
        version::Generation,
    },
    ports::{ArtifactSource, SystemClock},
};

/// A network that is busy may need more; none of these tests ends later than that.
const SOON: Duration = Duration::from_secs(300);

/// An artifact that the fake server can load: its size in memory, then so many bytes in all.
fn artifact(bytes: usize, kind: u8) -> Vec<u8> {
    let mut content = vec![b' '; bytes];
    content[0] = b'3';
    content[1] = b'\n';
    // Something that differs, and is no part of the number.
    content[bytes - 1] = if kind == 0 { b' ' } else { b'\t' };
    content
}

/// How the sources of a test are set up.
#[derive(Clone)]
struct Setup {
    secrets: PathBuf,
    rclone: RcloneUse,
    program: String,
    config: Option<PathBuf>,
    hub: String,
    tries: u32,
    limit: u64,
}

impl Setup {
    fn new(secrets: &Path) -> Self {
        Self {
            secrets: secrets.to_owned(),
            rclone: RcloneUse::Fallback,
            program: rclone().display().to_string(),
            config: None,
            hub: "http://127.0.0.1:1".to_owned(),
            tries: 4,
            limit: 1 << 30,
        }
    }

    async fn world(&self) -> (World, Session) {
        let patience = Patience { tries: self.tries, first: Duration::from_millis(1), most: Duration::from_millis(50) };
        let transfers = Arc::new(Transfers::new(4, 0, Arc::new(SystemClock::new())).with_patience(patience));
        // Nothing of the machine that runs the test counts.
        let environment = [("AWS_ALLOW_HTTP".to_owned(), "true".to_owned())];
        let options = RcloneOptions {
            program: self.program.clone(),
            config: self.config.clone(),
            folder: self.secrets.join("rclone"),
            hidden: Vec::new(),
        };
        let sources: Vec<Arc<dyn ArtifactSource>> = vec![
            Arc::new(LocalSource::new(None, Blocking::Pool)),
            Arc::new(HttpSource::new(Arc::clone(&transfers)).unwrap()),
            Arc::new(ObjectSource::new(environment, Arc::clone(&transfers)).unwrap()),
            Arc::new(HubSource::new(&self.hub, None, Arc::clone(&transfers)).unwrap()),
            Arc::new(RcloneSource::new(options, transfers)),
        ];
        let edit = |options: &mut Options| {
            options.secrets = Secrets::new(Some(self.secrets.clone()), []);
            options.rclone = self.rclone;
            options.artifact.bytes = self.limit;
        };
        World::with_lease(1000, edit, sources, SOON).await
    }
}

fn secret(name: &str) -> Option<Storage> {
    Some(Storage::SecretName(name.to_owned()))
}

fn register(copy: Generation, uri: &str, storage: Option<Storage>) -> Order {
    Order::Register {
        model: ModelName::new(&format!("m{}", copy.uid.0)).unwrap(),
        generation: copy,
        spec: Arc::new(ModelSpec { uri: uri.to_owned(), storage, ..ModelSpec::default() }),
        need: Resources::primary(Bytes(3)),
        attempt: 0,
        measured: false,
        trust: Trust::Larger,
    }
}

/// Orders a copy and waits until it answers, or says why not.
async fn outcome(session: &mut Session, uid: u64, uri: &str, storage: Option<Storage>) -> Result<(), String> {
    let copy = generation(uid, 1, 1);
    session.obeyed(&[register(copy, uri, storage)]).await;
    let ended = |report: &Report| matches!(report, Report::Available { .. } | Report::Failed { freed: true, .. });
    match tokio::time::timeout(SOON, session.until(copy, ended)).await.expect("an outcome") {
        Report::Failed { failure, .. } => Err(format!("{}: {}", failure.class.name(), failure.message)),
        _ => Ok(()),
    }
}

fn blobs(world: &World) -> Vec<String> {
    entries(&world.options.data_dir.join("artifacts/blobs"))
}

fn count(world: &World) -> u64 {
    world.agent.inspect()["artifacts"]["count"].as_u64().unwrap()
}

/// Secrets for the fakes.
fn write_secrets(folder: &Path, google: &str, azure: &str, http: &str) {
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
    write(
        "google",
        format!("type: google cloud storage\nparameters: {{access_token: right, endpoint: 'http://{}'}}", google),
    );
    write(
        "google-wrong",
        format!("type: google cloud storage\nparameters: {{access_token: wrong-token, endpoint: 'http://{}'}}", google),
    );
    let azure = |sig: &str| {
        format!(
            "type: azureblob\nparameters: {{account: acc, sas_token: 'sv=1&sig={sig}', endpoint: 'http://{}'}}",
            azure
        )
    };
    write("azure", azure("right"));
    write("azure-wrong", azure("wrong-signature"));
    write("web", format!("token: right\nurl: http://{http}"));
    write("web-wrong", format!("token: wrong-token\nurl: http://{http}"));
    write("web-elsewhere", "token: right\nurl: https://elsewhere.invalid".to_owned());
    write("token", "token: right".to_owned());
    write("token-wrong", "token: wrong-token".to_owned());
}

#[tokio::test]
async fn the_same_artifact_from_everywhere_is_on_disk_once() {
    let folder = tempfile::tempdir().unwrap();
    let content = artifact(1 << 20, 0);
    let s3 = S3::start();
    s3.put("models/iris/size", &content);
    let http = Fake::start(Speaks::Http, &[("a/size", &content), ("private/size", &content)]).await;
    let google = Fake::start(Speaks::Google, &[("models/iris/size", &content)]).await;
    let azure = Fake::start(Speaks::Azure, &[("models/iris/size", &content)]).await;
    let hub = Fake::start(Speaks::Hub, &[("org/iris/size", &content), ("org/gated/onnx/size", &content)]).await;
    let secrets = folder.path().join("secrets");
    std::fs::create_dir(&secrets).unwrap();
    std::fs::write(secrets.join("minio"), S3::secret(&s3.address, "ACCESSKEY1", "SECRETKEY1")).unwrap();
    write_secrets(&secrets, &google.address, &azure.address, &http.address);
    let config = folder.path().join("rclone.conf");
    std::fs::write(&config, "[box]\ntype = alias\nremote = /\n").unwrap();
    let local = folder.path().join("local");
    std::fs::create_dir(&local).unwrap();
    std::fs::write(local.join("size"), &content).unwrap();
    let setup = Setup { hub: format!("http://{}", hub.address), config: Some(config), ..Setup::new(&secrets) };
    let (world, mut session) = setup.world().await;
    let inline = Some(Storage::RcloneConfig(S3::secret(&s3.address, "ACCESSKEY1", "SECRETKEY1")));
    let uris = [
        (local.display().to_string(), None),
        (format!("file://{}/size", local.display()), None),
        (format!("http://{}/a/size", http.address), None),
        (format!("http://{}/private/size", http.address), secret("web")),
        ("s3://models/iris".to_owned(), secret("minio")),
        ("s3://models/iris/size".to_owned(), secret("minio")),
        ("gs://models/iris".to_owned(), secret("google")),
        ("gs://models/iris/size".to_owned(), secret("google")),
        ("az://models/iris".to_owned(), secret("azure")),
        ("abfss://models@acc.dfs.core.windows.net/iris/size".to_owned(), secret("azure")),
        ("hf://org/iris".to_owned(), None),
        ("hf://org/gated@v1/onnx".to_owned(), secret("token")),
        ("minio:models/iris".to_owned(), secret("minio")),
        ("minio://models/iris/size".to_owned(), secret("minio")),
        ("s3://models/iris".to_owned(), inline),
        (format!("box:{}", local.display()), None),
    ];
    for (at, (uri, storage)) in uris.iter().enumerate() {
        let outcome = outcome(&mut session, at as u64 + 1, uri, storage.clone()).await;
        assert_eq!(outcome, Ok(()), "{uri}");
    }
    assert_eq!(blobs(&world).len(), 1, "one content, one file");
    assert_eq!(count(&world), uris.len() as u64);
    assert!(entries(&world.options.data_dir.join("artifacts/staging")).is_empty());
    let said = world.agent.inspect().to_string();
    assert!(!said.contains("SECRETKEY1") && !said.contains("sig="), "{said}");
}

#[tokio::test]
async fn a_folder_keeps_its_shape_and_is_known_again() {
    let folder = tempfile::tempdir().unwrap();
    let s3 = S3::start();
    let wire = Wire::to(&s3.address).await;
    s3.put("models/iris/1/size", b"4");
    s3.put("models/iris/2/size", b"3");
    s3.put("models/iris/2/deep/weights.bin", &vec![7; 1 << 20]);
    s3.put("models/iris/config.json", b"{}");
    s3.put("models/iris-other/size", b"9");
    std::fs::write(folder.path().join("minio"), S3::secret(&wire.address, "ACCESSKEY1", "SECRETKEY1")).unwrap();
    let (world, mut session) = Setup::new(folder.path()).world().await;
    for (uid, uri) in [(1, "s3://models/iris/"), (2, "minio:models/iris")] {
        assert_eq!(outcome(&mut session, uid, uri, secret("minio")).await, Ok(()), "{uri}");
        let folder = world.folder_of(&format!("m{uid}_1"));
        assert_eq!(std::fs::read(folder.join("size")).unwrap(), b"3", "{uri}");
        assert_eq!(std::fs::metadata(folder.join("deep/weights.bin")).unwrap().len(), 1 << 20, "{uri}");
        // Again, by another copy: the store is asked, and nothing is fetched.
        let fetched = wire.take();
        assert!(fetched > 1 << 20, "{fetched}");
        let leave = async |session: &mut Session, number: u32| {
            let copy = generation(uid, 1, number);
            session.obeyed(&[unregister(&format!("m{uid}"), copy, Duration::from_secs(1))]).await;
            session.unloaded(copy).await;
        };
        leave(&mut session, 1).await;
        let again = generation(uid, 1, 2);
        session.obeyed(&[register(again, uri, secret("minio"))]).await;
        session.available(again).await;
        let fetched = wire.take();
        assert!(fetched < 64 << 10, "{uri}: {fetched} bytes for what had not changed");
        // And it is seen when it did.
        s3.put("models/iris/2/deep/weights.bin", &vec![uid as u8; 1 << 20]);
        leave(&mut session, 2).await;
        let third = generation(uid, 1, 3);
        session.obeyed(&[register(third, uri, secret("minio"))]).await;
        session.available(third).await;
        let weights = world.folder_of(&format!("m{uid}_1")).join("deep/weights.bin");
        assert_eq!(std::fs::read(weights).unwrap()[0], uid as u8, "{uri}");
        wire.take();
    }
}

/// The stores whose downloads can be gone on with in the middle of a file: by URI, and the secret's name.
async fn breaking(folder: &Path, content: &[u8]) -> (Vec<(String, Wire, Option<Storage>)>, Setup, Vec<Fake>) {
    let s3 = Fake::start(Speaks::S3, &[("models/iris/size", content)]).await;
    let http = Fake::start(Speaks::Http, &[("a/size", content)]).await;
    let google = Fake::start(Speaks::Google, &[("models/iris/size", content)]).await;
    let azure = Fake::start(Speaks::Azure, &[("models/iris/size", content)]).await;
    let hub = Fake::start(Speaks::Hub, &[("org/iris/size", content)]).await;
    let wires = [
        Wire::to(&s3.address).await,
        Wire::to(&http.address).await,
        Wire::to(&google.address).await,
        Wire::to(&azure.address).await,
        Wire::to(&hub.address).await,
    ];
    std::fs::write(folder.join("minio"), S3::secret(&wires[0].address, "ACCESSKEY1", "SECRETKEY1")).unwrap();
    write_secrets(folder, &wires[2].address, &wires[3].address, &wires[1].address);
    let setup = Setup { hub: format!("http://{}", wires[4].address), ..Setup::new(folder) };
    let uris = [
        ("s3://models/iris/size".to_owned(), secret("minio")),
        (format!("http://{}/a/size", wires[1].address), None),
        ("gs://models/iris/size".to_owned(), secret("google")),
        ("az://models/iris".to_owned(), secret("azure")),
        ("hf://org/iris/size".to_owned(), None),
    ];
    let cases = uris.into_iter().zip(wires).map(|((uri, storage), wire)| (uri, wire, storage)).collect();
    (cases, setup, vec![s3, http, google, azure, hub])
}

/// How much more than the file may come over the wire: listings, heads, and what was on its way when it broke.
const SLACK: u64 = 256 << 10;

#[tokio::test]
async fn a_wire_that_breaks_costs_no_byte_twice() {
    let folder = tempfile::tempdir().unwrap();
    let content = artifact(3 << 20, 0);
    let (cases, setup, _fakes) = breaking(folder.path(), &content).await;
    let (world, mut session) = setup.world().await;
    for (at, (uri, wire, storage)) in cases.iter().enumerate() {
        wire.break_after(&[1 << 20, 768 << 10]);
        assert_eq!(outcome(&mut session, at as u64 + 1, uri, storage.clone()).await, Ok(()), "{uri}");
        let passed = wire.take();
        assert_eq!(wire.whole(), 0, "{uri}: it did break");
        assert!(passed < content.len() as u64 + SLACK, "{uri}: {passed} bytes for {}", content.len());
    }
    assert_eq!(blobs(&world).len(), 1);
}

#[tokio::test]
async fn the_next_try_goes_on_where_the_last_one_broke_also_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let content = artifact(3 << 20, 0);
    let (cases, setup, _fakes) = breaking(folder.path(), &content).await;
    let setup = Setup { tries: 1, ..setup };
    let (mut world, mut session) = setup.world().await;
    for (at, (uri, wire, storage)) in cases.iter().enumerate() {
        wire.break_after(&[1 << 20]);
        let uid = at as u64 + 1;
        let failure = outcome(&mut session, uid, uri, storage.clone()).await.expect_err(uri);
        assert!(failure.contains("broke off"), "{uri}: {failure}");
        assert!(wire.take() >= 1 << 20, "{uri}");
        session = world.restart_agent().await;
        let again = generation(uid, 1, 2);
        session.obeyed(&[register(again, uri, storage.clone())]).await;
        session.available(again).await;
        let passed = wire.take();
        assert!(passed < (content.len() as u64) - (1 << 20) + SLACK, "{uri}: {passed} bytes for the rest");
    }
    assert_eq!(blobs(&world).len(), 1);
    assert!(entries(&world.options.data_dir.join("artifacts/staging")).is_empty());
}

#[tokio::test]
async fn files_of_a_folder_that_came_whole_are_not_fetched_again() {
    let folder = tempfile::tempdir().unwrap();
    let s3 = S3::start();
    let wire = Wire::to(&s3.address).await;
    s3.put("models/iris/size", b"3");
    for at in 0..6_u8 {
        s3.put(&format!("models/iris/part{at}"), &vec![at; 512 << 10]);
    }
    std::fs::write(folder.path().join("minio"), S3::secret(&wire.address, "ACCESSKEY1", "SECRETKEY1")).unwrap();
    let setup = Setup { tries: 1, ..Setup::new(folder.path()) };
    let (world, mut session) = setup.world().await;
    // Four at a time: the fifth and sixth come over connections that carried two before.
    wire.break_after(&[1280 << 10]);
    let broke = outcome(&mut session, 1, "s3://models/iris", secret("minio")).await;
    let first = wire.take();
    if broke.is_ok() {
        // Six connections instead of four kept alive: nothing broke, and there is nothing to see.
        assert_eq!(wire.whole(), 1);
        wire.break_after(&[]);
        return;
    }
    assert!(broke.expect_err("it broke").contains("broke off"));
    let again = generation(1, 1, 2);
    session.obeyed(&[register(again, "s3://models/iris", secret("minio"))]).await;
    session.available(again).await;
    let second = wire.take();
    assert!(first + second < (3 << 20) + SLACK, "{first} and {second} bytes");
    assert_eq!(blobs(&world).len(), 7);
}

#[tokio::test]
async fn a_store_that_sends_no_parts_is_read_from_the_beginning() {
    let folder = tempfile::tempdir().unwrap();
    let content = artifact(3 << 20, 0);
    // rclone's S3 server answers a question for a part with 200.
    let s3 = S3::start();
    s3.put("models/iris/size", &content);
    let wire = Wire::to(&s3.address).await;
    std::fs::write(folder.path().join("minio"), S3::secret(&wire.address, "ACCESSKEY1", "SECRETKEY1")).unwrap();
    let (world, mut session) = Setup::new(folder.path()).world().await;
    wire.break_after(&[1 << 20]);
    assert_eq!(outcome(&mut session, 1, "s3://models/iris/size", secret("minio")).await, Ok(()));
    assert_eq!(wire.whole(), 0, "it did break");
    assert!(std::fs::read(world.folder_of("m1_1").join("size")).unwrap() == content);
}

#[tokio::test]
async fn what_changed_meanwhile_is_not_mixed() {
    let folder = tempfile::tempdir().unwrap();
    let http = Fake::start(Speaks::Http, &[("a/size", &artifact(2 << 20, 0))]).await;
    let wire = Wire::to(&http.address).await;
    let setup = Setup { tries: 1, ..Setup::new(folder.path()) };
    let (world, mut session) = setup.world().await;
    let uri = format!("http://{}/a/size", wire.address);
    wire.break_after(&[1 << 20]);
    assert!(outcome(&mut session, 1, &uri, None).await.expect_err("broke").contains("broke off"));
    let newer = artifact(2 << 20, 1);
    http.put("a/size", &newer);
    let again = generation(1, 1, 2);
    session.obeyed(&[register(again, &uri, None)]).await;
    session.available(again).await;
    assert!(std::fs::read(world.folder_of("m1_1").join("size")).unwrap() == newer, "all of it is the newer one");
}

#[tokio::test]
async fn what_a_broken_download_left_does_not_stay() {
    let folder = tempfile::tempdir().unwrap();
    let http = Fake::start(Speaks::Http, &[("a/size", &artifact(2 << 20, 0))]).await;
    let wire = Wire::to(&http.address).await;
    let setup = Setup { tries: 1, ..Setup::new(folder.path()) };
    let (mut world, mut session) = setup.world().await;
    wire.break_after(&[1 << 20]);
    let uri = format!("http://{}/a/size", wire.address);
    assert!(outcome(&mut session, 1, &uri, None).await.is_err());
    let staging = world.options.data_dir.join("artifacts/staging");
    assert_eq!(entries(&staging).len(), 1);
    // An agent that keeps nothing takes its place.
    world.options.keep_downloads = Duration::ZERO;
    drop(world.restart_agent().await);
    world.until(|_| entries(&staging).is_empty()).await;
}

// === rclone ===

/// Processes whose command line has `word` in it.
fn processes(word: &str) -> Vec<(u32, String)> {
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let lines = pids.filter_map(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some((pid, String::from_utf8_lossy(&line).replace('\0', " ")))
    });
    lines.filter(|(_, line)| line.contains(word) && line.contains("rcd")).collect()
}

/// rclone itself, not what guards it.
fn running(word: &str) -> Vec<u32> {
    processes(word).into_iter().filter(|(_, line)| !line.starts_with("sh ")).map(|(pid, _)| pid).collect()
}

fn kill(pid: u32) {
    assert!(std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn rclone_is_started_once_and_again_and_ends_with_the_agent() {
    let folder = tempfile::tempdir().unwrap();
    let s3 = S3::start();
    for at in 1..=4 {
        s3.put(&format!("models/m{at}/size"), b"3");
    }
    std::fs::write(folder.path().join("minio"), S3::secret(&s3.address, "ACCESSKEY1", "SECRETKEY1")).unwrap();
    let (world, mut session) = Setup::new(folder.path()).world().await;
    let word = folder.path().join("rclone").display().to_string();
    assert!(processes(&word).is_empty(), "nothing runs before it is needed");
    assert_eq!(outcome(&mut session, 1, "minio:models/m1", secret("minio")).await, Ok(()));
    assert_eq!(outcome(&mut session, 2, "minio:models/m2", secret("minio")).await, Ok(()));
    let [first] = running(&word)[..] else { panic!("one runs: {:?}", processes(&word)) };
    for (_, line) in processes(&word) {
        assert!(!line.contains("SECRETKEY1") && !line.contains("ACCESSKEY1"), "{line}");
    }
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(folder.path().join("rclone")).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o700);
    kill(first);
    assert_eq!(outcome(&mut session, 3, "minio:models/m3", secret("minio")).await, Ok(()));
    let [second] = running(&word)[..] else { panic!("one runs: {:?}", processes(&word)) };
    assert_ne!(first, second);
    drop((world, session));
    eventually("rclone ends with the agent", || processes(&word).is_empty()).await;
}

#[tokio::test]
async fn an_rclone_that_knows_no_sockets_is_spoken_to_behind_a_password() {
    let folder = tempfile::tempdir().unwrap();
    let s3 = S3::start();
    s3.put("models/m/size", b"3");
    std::fs::write(folder.path().join("minio"), S3::secret(&s3.address, "ACCESSKEY1", "SECRETKEY1")).unwrap();
    // Says what 1.60 says of a socket.
    let old = folder.path().join("old-rclone");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *unix:*) echo 'Failed to start remote control: start server failed: unknown port' >&2; exit 1;; esac\n\
         exec {} \"$@\"\n",
        rclone().display()
    );
    std::fs::write(&old, script).unwrap();
    std::fs::set_permissions(&old, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let setup = Setup { program: old.display().to_string(), ..Setup::new(folder.path()) };
    let (_world, mut session) = setup.world().await;
    assert_eq!(outcome(&mut session, 1, "minio:models/m", secret("minio")).await, Ok(()));
    let word = folder.path().join("rclone").display().to_string();
    let lines = processes(&word);
    assert!(lines.iter().any(|(_, line)| line.contains("127.0.0.1:0")), "{lines:?}");
    assert!(lines.iter().all(|(_, line)| !line.contains("--rc-no-auth") && !line.contains("--rc-pass")), "{lines:?}");
}

#[tokio::test]
async fn a_download_of_rclone_s_that_nobody_wants_is_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let s3 = S3::start();
    // Slow enough to be given up in the middle, and more than the wire carries at once.
    s3.put("models/m/size", &artifact(16 << 20, 0));
    let wire = Wire::to(&s3.address).await;
    std::fs::write(folder.path().join("minio"), S3::secret(&wire.address, "ACCESSKEY1", "SECRETKEY1")).unwrap();
    wire.slow();
    let (_world, mut session) = Setup::new(folder.path()).world().await;
    let copy = generation(1, 1, 1);
    session.obeyed(&[register(copy, "minio:models/m", secret("minio"))]).await;
    session.until(copy, |report| matches!(report, Report::Downloading(progress) if progress.done > 0)).await;
    session.obeyed(&[unregister("m1", copy, Duration::from_secs(1))]).await;
    session.unloaded(copy).await;
    // Connections of a job that is stopped are closed.
    eventually("the wire is quiet", || wire.open() == 0).await;
    assert!(wire.take() < 16 << 20, "not all of it came");
}

#[tokio::test]
async fn what_rclone_fetches_keeps_to_the_limit_while_it_comes() {
    let folder = tempfile::tempdir().unwrap();
    // It does not say how large its file is, and does not end.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answer = |request: axum::extract::Request| async move {
        let response = axum::response::Response::builder();
        if request.uri().path() == "/models/" {
            let page = "<html><body><a href=\"size\">size</a></body></html>";
            return response.header("content-type", "text/html").body(axum::body::Body::from(page)).unwrap();
        }
        if request.method() == axum::http::Method::HEAD {
            return response.body(axum::body::Body::empty()).unwrap();
        }
        let chunks = futures::stream::repeat_with(|| Ok::<_, std::io::Error>(vec![b' '; 64 << 10]));
        response.body(axum::body::Body::from_stream(chunks)).unwrap()
    };
    let mut server = tokio::task::JoinSet::new();
    server.spawn(async move { axum::serve(listener, axum::Router::new().fallback(answer)).await.unwrap() });
    let text = format!("type: http\nparameters: {{url: 'http://{address}'}}");
    std::fs::write(folder.path().join("endless"), text).unwrap();
    let setup = Setup { limit: 4 << 20, ..Setup::new(folder.path()) };
    let (world, mut session) = setup.world().await;
    let said = outcome(&mut session, 1, "endless:models", secret("endless")).await.expect_err("without an end");
    assert!(said.contains("larger than the limit of 4194304 bytes"), "{said}");
    let staging = world.options.data_dir.join("artifacts/staging");
    let size = |folder: PathBuf| -> u64 {
        let mut folders = vec![folder];
        let mut bytes = 0;
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                    _ => bytes += entry.metadata().map_or(0, |meta| meta.len()),
                }
            }
        }
        bytes
    };
    assert_eq!(size(staging), 0, "nothing of it stays, and nothing more comes");
}

#[tokio::test]
async fn two_downloads_of_rclone_s_never_write_into_one_folder() {
    let folder = tempfile::tempdir().unwrap();
    let s3 = S3::start();
    s3.put("models/m/size", &artifact(16 << 20, 0));
    let wire = Wire::to(&s3.address).await;
    std::fs::write(folder.path().join("minio"), S3::secret(&wire.address, "ACCESSKEY1", "SECRETKEY1")).unwrap();
    wire.slow();
    let (world, mut session) = Setup::new(folder.path()).world().await;
    let copy = generation(1, 1, 1);
    session.obeyed(&[register(copy, "minio:models/m", secret("minio"))]).await;
    session.until(copy, |report| matches!(report, Report::Downloading(progress) if progress.done > 0)).await;
    session.obeyed(&[unregister("m1", copy, Duration::from_secs(1))]).await;
    session.unloaded(copy).await;
    // At once, into the same folder, and of something else by now.
    let newer = artifact(1 << 20, 1);
    s3.put("models/m/size", &newer);
    let again = generation(1, 1, 2);
    session.obeyed(&[register(again, "minio:models/m", secret("minio"))]).await;
    session.available(again).await;
    assert!(std::fs::read(world.folder_of("m1_1").join("size")).unwrap() == newer);
}

// === Errors ===

/// The words of a failure without what differs from run to run.
fn plain(text: &str, folder: &Path) -> String {
    let text = text.replace(&folder.display().to_string(), "DIR");
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once("127.0.0.1:") {
        out.push_str(before);
        out.push_str("HOST");
        rest = after.trim_start_matches(|c: char| c.is_ascii_digit());
    }
    out += rest;
    // What a resolver says depends on the machine.
    let Some((before, after)) = out.split_once("lookup address information: ") else { return out };
    let (_, after) = after.split_once(';').unwrap();
    format!("{before}lookup address information: ...;{after}")
}

#[tokio::test]
async fn every_error_says_what_was_answered_and_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let s3 = S3::start();
    let content = artifact(2 << 20, 0);
    s3.put("models/iris/size", &content);
    let http = Fake::start(Speaks::Http, &[("a/size", &content), ("private/size", &content)]).await;
    let google = Fake::start(Speaks::Google, &[("models/iris/size", &content)]).await;
    let azure = Fake::start(Speaks::Azure, &[("models/iris/size", &content)]).await;
    let hub =
        Fake::start(Speaks::Hub, &[("org/iris/size", &content), ("org/gated/size", b"3"), ("org/bad/size", b"3!")])
            .await;
    let wire = Wire::to(&http.address).await;
    write_secrets(folder.path(), &google.address, &azure.address, &http.address);
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("minio", &S3::secret(&s3.address, "ACCESSKEY1", "SECRETKEY1"));
    write("minio-unknown", &S3::secret(&s3.address, "WRONGKEY99", "SECRETKEY1"));
    write("minio-wrong", &S3::secret(&s3.address, "ACCESSKEY1", "WRONGSECRET"));
    write("minio-closed", &S3::secret("127.0.0.1:1", "ACCESSKEY1", "SECRETKEY1"));
    write("minio-nowhere", &S3::secret("nowhere.invalid", "ACCESSKEY1", "SECRETKEY1"));
    write("garbled", "hunter2");
    let setup = Setup { hub: format!("http://{}", hub.address), tries: 2, limit: 3 << 20, ..Setup::new(folder.path()) };
    let (_world, mut session) = setup.world().await;
    s3.put("models/large/size", &vec![b' '; 4 << 20]);
    let http_at = |path: &str| format!("http://{}/{path}", http.address);
    let pinned = format!("{}#sha256={}", http_at("a/size"), "0".repeat(64));
    let truncated = format!("http://{}/a/size", wire.address);
    let cases: Vec<(&str, String, Option<&str>)> = vec![
        ("a secret that is not there", "s3://models/iris".into(), Some("absent")),
        ("a secret that is none", "s3://models/iris".into(), Some("garbled")),
        ("a secret for another store", "s3://models/iris".into(), Some("azure")),
        ("a name that can't be a secret's", "s3://models/iris".into(), Some("../minio")),
        ("an unknown key id", "s3://models/iris".into(), Some("minio-unknown")),
        ("a wrong key", "s3://models/iris/size".into(), Some("minio-wrong")),
        ("a wrong token", "gs://models/iris".into(), Some("google-wrong")),
        ("a wrong signature", "az://models/iris".into(), Some("azure-wrong")),
        ("a missing bucket", "s3://nobucket/iris".into(), Some("minio")),
        ("a missing bucket of Google's", "gs://nobucket/iris".into(), Some("google")),
        ("a missing key", "s3://models/absent".into(), Some("minio")),
        ("a missing folder", "s3://models/absent/".into(), Some("minio")),
        ("a missing blob", "az://models/absent".into(), Some("azure")),
        ("no bucket", "s3:///iris".into(), Some("minio")),
        ("a closed port", "s3://models/iris".into(), Some("minio-closed")),
        ("a name that is no host", "http://nowhere.invalid/a/size".into(), None),
        ("a name that is no endpoint", "s3://models/iris".into(), Some("minio-nowhere")),
        ("a missing file", http_at("a/absent"), None),
        ("a file that asks who it is", http_at("private/size?token=hidden"), None),
        ("the wrong secret for a web server", http_at("private/size"), Some("minio")),
        ("a secret that names no web server", http_at("private/size"), Some("token")),
        ("a secret for another web server", http_at("private/size"), Some("web-elsewhere")),
        ("a wrong token for a web server", http_at("private/size"), Some("web-wrong")),
        ("a digest that was pinned", pinned, None),
        ("a file that breaks off each time", truncated, None),
        ("too large", "s3://models/large".into(), Some("minio")),
        ("a missing model of a hub", "hf://org/absent".into(), None),
        ("a missing path of a hub", "hf://org/iris/onnx".into(), None),
        ("a gated model", "hf://org/gated".into(), None),
        ("a gated model with the wrong token", "hf://org/gated".into(), Some("token-wrong")),
        ("a secret of another store for a hub", "hf://org/gated".into(), Some("google")),
        ("a secret of a web server for a hub", "hf://org/gated".into(), Some("web-elsewhere")),
        ("the description of a remote", ":sftp,host=h,pass=WRONGSECRET:models/iris".into(), None),
        ("a host that is none of Azure's accounts", "az://models@evil%2Ecom?/iris".into(), Some("azure")),
        ("a file that is not what the hub says", "hf://org/bad".into(), None),
        ("rclone: a remote that it does not know", "dropbox:models/iris".into(), None),
        ("rclone: an unknown key id", "minio:models/iris".into(), Some("minio-unknown")),
        ("rclone: a missing prefix", "minio:models/absent".into(), Some("minio")),
        ("rclone: another remote", "dropbox:models/iris".into(), Some("minio")),
        ("rclone: no path", "minio:".into(), Some("minio")),
        ("a missing folder of the machine", folder.path().join("absent").display().to_string(), None),
    ];
    let mut golden = String::new();
    for (at, (what, uri, name)) in cases.iter().enumerate() {
        wire.break_after(&[64 << 10, 0, 0]);
        let said = outcome(&mut session, at as u64 + 1, uri, name.and_then(secret)).await;
        let said = said.expect_err(what);
        for hidden in ["SECRETKEY1", "WRONGSECRET", "WRONGKEY99", "hunter2", "hidden", "wrong-token", "wrong-signature"]
        {
            assert!(!said.contains(hidden), "{what}: {said}");
        }
        golden += &format!("# {what}\n{}\n\n", plain(&said, folder.path()));
    }
    let absent = Setup { program: "/nowhere/rclone".to_owned(), tries: 1, ..setup.clone() };
    golden += &alone(&absent, "rclone is missing", "dropbox:models/iris", None, folder.path()).await;
    let broken = folder.path().join("broken-rclone");
    std::fs::write(&broken, "#!/bin/sh\necho 'unknown flag: --rc-addr' >&2\nexit 2\n").unwrap();
    std::fs::set_permissions(&broken, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let broken = Setup { program: broken.display().to_string(), tries: 1, ..setup.clone() };
    golden += &alone(&broken, "rclone does not start", "dropbox:models/iris", None, folder.path()).await;
    let never = Setup { rclone: RcloneUse::Never, ..setup.clone() };
    golden += &alone(&never, "rclone may not be used", "dropbox:models/iris", None, folder.path()).await;
    let inline = Some(Storage::RcloneConfig(S3::secret(&s3.address, "ACCESSKEY1", "SECRETKEY1")));
    golden += &alone(&never, "rclone is brought and may not be used", "s3://models/iris", inline, folder.path()).await;
    for (what, text) in [
        ("rclone: what is brought wraps another remote", "type: alias\nparameters: {remote: ':local:'}"),
        ("rclone: what is brought runs a program", "type: sftp\nparameters: {host: h, pass: x, ssh: 'touch evil'}"),
        ("rclone: what is brought wants the agent's credentials", "type: s3\nparameters: {env_auth: true}"),
        (
            "rclone: what is brought has no credentials",
            "type: google cloud storage\nparameters: {endpoint: 'http://evil'}",
        ),
    ] {
        let inline = Some(Storage::RcloneConfig(text.to_owned()));
        golden += &alone(&setup, what, "brought:models/iris", inline, folder.path()).await;
    }
    // The store that it is fetched from is this thread's.
    let uri = http_at("a/size");
    let full = tokio::task::spawn_blocking(move || full_disk(&uri)).await.unwrap();
    golden += &format!("# a disk that is full\n{}\n", plain(&full, folder.path()));

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/artifact-errors.txt");
    if std::env::var("UPDATE").is_ok_and(|value| value == "1") {
        std::fs::write(&path, &golden).unwrap();
    }
    let wanted = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(golden == wanted, "UPDATE=1 writes it anew. It should be:\n{golden}");
}

/// The failure of a world of its own.
async fn alone(setup: &Setup, what: &str, uri: &str, storage: Option<Storage>, folder: &Path) -> String {
    let (_world, mut session) = setup.world().await;
    let said = outcome(&mut session, 1, uri, storage).await.expect_err(what);
    format!("# {what}\n{}\n\n", plain(&said, folder))
}

/// What the agent says when the system takes no more bytes: this test again, in a process that may write few.
fn full_disk(uri: &str) -> String {
    let this = std::env::current_exe().unwrap();
    let script = "trap '' XFSZ; ulimit -f 1024; exec \"$@\"";
    let mut command = std::process::Command::new("sh");
    command.args(["-c", script, "sh"]).arg(this).args(["--exact", "a_disk_that_is_full", "--nocapture"]);
    let out = command.env("WHARF_FULL_DISK", uri).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let line = text.lines().find_map(|line| line.split_once("said: ").map(|(_, said)| said.to_owned()));
    let line = line.unwrap_or_else(|| panic!("{text}\n{}", String::from_utf8_lossy(&out.stderr)));
    // The folder is the other process's own.
    let (before, rest) = line.split_once('(').unwrap();
    let (path, after) = rest.split_once(')').unwrap();
    assert!(path.ends_with("/files/size"), "{path}");
    format!("{before}(DIR/files/size){after}")
}

#[tokio::test]
async fn a_disk_that_is_full() {
    // Alone it has nothing to say; the test of errors runs it where little may be written.
    let Ok(uri) = std::env::var("WHARF_FULL_DISK") else { return };
    let folder = tempfile::tempdir().unwrap();
    let (world, mut session) = Setup::new(folder.path()).world().await;
    let said = outcome(&mut session, 1, &uri, None).await.expect_err("full");
    assert!(entries(&world.options.data_dir.join("artifacts/staging")).is_empty(), "what fills a disk does not stay");
    println!("said: {said}");
}

// === A process of its own ===

#[test]
fn rclone_does_not_outlive_an_agent_that_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("rclone.conf");
    std::fs::write(&config, "[box]\ntype = alias\nremote = /\n").unwrap();
    let model = format!("{}/tests/models/iris-1", env!("CARGO_MANIFEST_DIR"));
    let data = folder.path().join("agent");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_wharf"));
    command.arg("up").current_dir(folder.path());
    for port in ["scheduler.listen", "scheduler.agents", "scheduler.http", "gateway.listen"] {
        command.args(["--set", &format!("{port}=127.0.0.1:0")]);
    }
    let set = [
        ("scheduler.data_dir", folder.path().join("scheduler").display().to_string()),
        ("agent.data_dir", data.display().to_string()),
        ("agent.rclone_program", rclone().display().to_string()),
        ("agent.rclone_config", config.display().to_string()),
    ];
    for (name, value) in set {
        command.args(["--set", &format!("{name}={value}")]);
    }
    let log = folder.path().join("log");
    command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::fs::File::create(&log).unwrap());
    let mut wharf = command.spawn().unwrap();
    let wait = |what: &str, condition: &dyn Fn() -> bool| {
        let deadline = Instant::now() + SOON;
        while !condition() {
            assert!(Instant::now() < deadline, "never: {what}\n{}", std::fs::read_to_string(&log).unwrap());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    wait("ready", &|| std::fs::read_to_string(&log).unwrap().contains("ready; Ctrl-C"));
    let said = std::fs::read_to_string(&log).unwrap();
    let api = said.lines().find_map(|line| line.trim_start().strip_prefix("scheduler API")).unwrap().trim().to_owned();
    let manifest = folder.path().join("iris.yaml");
    let text = format!(
        "apiVersion: mlops.seldon.io/v1alpha1\nkind: Model\nmetadata: {{name: iris}}\n\
         spec: {{storageUri: 'box:{model}', requirements: [onnx], memory: 1Mi}}\n"
    );
    std::fs::write(&manifest, text).unwrap();
    let mut load = std::process::Command::new(env!("CARGO_BIN_EXE_wharf"));
    load.args(["model", "load", "--scheduler-host", &api, "-w", "-f"]).arg(&manifest);
    let loaded = load.output().unwrap();
    assert!(
        loaded.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&loaded.stderr),
        std::fs::read_to_string(&log).unwrap()
    );
    let word = data.display().to_string();
    assert!(!running(&word).is_empty(), "rclone fetched it");
    wharf.kill().unwrap();
    wharf.wait().unwrap();
    wait("rclone ends too", &|| processes(&word).is_empty());
}
