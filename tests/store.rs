//! The promise: what the journal has acknowledged survives anything, and what it has not is never half there.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on says so"
)]

use std::{
    collections::BTreeMap,
    fs, io,
    ops::Bound,
    path::Path,
    sync::{Arc, Mutex},
};

use proptest::prelude::*;
use redb::{BackendError, StorageBackend};
use wharf::{
    domain::{
        leader::{Leader, Leaders},
        memory::{Bytes, Resources},
        names::{ModelName, ReplicaId, ServerName},
        record::{Contents, CopyRow, Counters, ModelRow, Owner, ServerRow, SizeRow, VersionRow, Write},
        size::SizeKey,
        spec::{Deployment, KubernetesMeta, ModelSpec, Parameter, Passthrough, RuntimeInfo, Storage},
        time::Instant,
        version::{Generation, Uid, Version},
    },
    ports::{CommitError, Identity, OpenError, Store},
    store::{EmbeddedStore, Fault, MemoryStore, OpenBackend, OpenOptions, SCHEMA, inspect, open_existing},
};

const CACHE: usize = 1 << 20;

fn identity() -> Identity {
    Identity { cluster: "c".repeat(32), lineage: "1".repeat(32) }
}

fn another() -> Identity {
    panic!("a journal that is there must not be given a new identity")
}

fn open_file(path: &Path, new_identity: impl FnOnce() -> Identity) -> Result<EmbeddedStore, OpenError> {
    EmbeddedStore::open(&OpenOptions { path: path.to_owned(), cache_bytes: CACHE }, new_identity)
}

// === what a journal is to hold ===

/// The contract, as plainly as it can be said.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    models: BTreeMap<String, ModelRow>,
    versions: BTreeMap<(String, u32), VersionRow>,
    copies: BTreeMap<(String, Generation), CopyRow>,
    sizes: BTreeMap<(String, SizeKey), SizeRow>,
    servers: BTreeMap<String, ServerRow>,
    counters: Counters,
}

impl Model {
    fn apply(&mut self, writes: &[Write]) {
        for write in writes {
            match write.clone() {
                Write::PutModel(row) => drop(self.models.insert(row.name.to_string(), *row)),
                Write::RemoveModel(name) => {
                    self.models.remove(name.as_str());
                    self.versions.retain(|key, _| key.0 != name.as_str());
                    self.copies.retain(|key, _| key.0 != name.as_str());
                    self.sizes.retain(|key, _| key.0 != name.as_str());
                }
                Write::PutVersion(row) => drop(self.versions.insert((row.model.to_string(), row.version.0), *row)),
                Write::RemoveVersion(name, version) => drop(self.versions.remove(&(name.to_string(), version.0))),
                Write::PutCopy(row) => drop(self.copies.insert((row.model.to_string(), row.generation), *row)),
                Write::RemoveCopy(name, generation) => drop(self.copies.remove(&(name.to_string(), generation))),
                Write::PutSize(row) => drop(self.sizes.insert((row.model.to_string(), row.key.clone()), *row)),
                Write::RemoveSize(name, key) => drop(self.sizes.remove(&(name.to_string(), key))),
                Write::PutServer(row) => drop(self.servers.insert(row.name.to_string(), *row)),
                Write::RemoveServer(name) => drop(self.servers.remove(name.as_str())),
                Write::PutCounters(counters) => self.counters = counters,
            }
        }
    }

    fn contents(&self) -> Contents {
        Contents {
            models: self.models.values().cloned().collect(),
            versions: self.versions.values().cloned().collect(),
            copies: self.copies.values().cloned().collect(),
            sizes: self.sizes.values().cloned().collect(),
            servers: self.servers.values().cloned().collect(),
            counters: self.counters.clone(),
        }
    }

    fn after(&self, writes: &[Write]) -> Self {
        let mut next = self.clone();
        next.apply(writes);
        next
    }
}

fn model_name() -> impl Strategy<Value = ModelName> {
    // Names of which one is the start of another, with the characters that sort around the key's zero byte.
    prop::sample::select(vec!["a", "a-", "a-0", "a0", "ab", "b", "z"])
        .prop_filter_map("valid", |name| ModelName::new(name).ok())
}

fn server_name() -> impl Strategy<Value = ServerName> {
    prop::sample::select(vec!["mlserver", "triton", "t"]).prop_map(|name| ServerName::new(name).unwrap())
}

fn generation() -> impl Strategy<Value = Generation> {
    let edge = prop::sample::select(vec![0, 1, 255, 256, u64::MAX]);
    (edge, 1..4_u32, 0..3_u32).prop_map(|(uid, version, number)| Generation {
        uid: Uid(uid),
        version: Version(version),
        number,
    })
}

fn size_key() -> impl Strategy<Value = SizeKey> {
    let part = |of: &[&'static str]| prop::sample::select(of.to_vec()).prop_map(str::to_owned);
    (part(&["a", "ab", "b"]), part(&["oip", "triton"]), part(&["1", "1+a", "10"]))
        .prop_map(|(artifact, runtime, configuration)| SizeKey { artifact, runtime, configuration })
}

fn write() -> impl Strategy<Value = Write> {
    prop_oneof![
        4 => (model_name(), any::<u32>(), any::<bool>()).prop_map(|(name, number, deleted)| Write::PutModel(Box::new(ModelRow {
            name,
            uid: Uid(u64::from(number) << 20),
            created: Instant::from_micros(u64::from(number)),
            deployment: Deployment { replicas: number, priority: -3, ..Deployment::default() },
            kubernetes: deleted.then(|| KubernetesMeta { namespace: "ns".to_owned(), generation: -1 }),
            serving: deleted.then_some(Version(number)),
            number_bound: number,
            version_floor: Version(number),
            deleted: deleted.then_some(Instant::from_micros(7)),
        }))),
        1 => model_name().prop_map(Write::RemoveModel),
        4 => (model_name(), 1..5_u32, 0..2000_usize).prop_map(|(model, version, size)| Write::PutVersion(Box::new(VersionRow {
            model,
            uid: Uid(9),
            version: Version(version),
            created: Instant::default(),
            spec: ModelSpec {
                uri: "u".repeat(size),
                storage: Some(Storage::SecretName("s".to_owned())),
                requirements: vec!["onnx".to_owned()],
                memory: Some(Bytes(size as u64)),
                parameters: vec![Parameter { name: "n".to_owned(), value: "ü\0".to_owned() }],
                runtime: Some(RuntimeInfo::Triton { cpu: vec![1, 2] }),
                ..ModelSpec::default()
            },
            passthrough: Passthrough { stream: Some(("in".to_owned(), "out".to_owned())), ..Passthrough::default() },
            failed: None,
        }))),
        1 => (model_name(), 1..5_u32).prop_map(|(model, version)| Write::RemoveVersion(model, Version(version))),
        4 => (model_name(), generation(), server_name(), any::<bool>()).prop_map(|(model, generation, server, routed)| {
            Write::PutCopy(Box::new(CopyRow {
                model,
                generation,
                replica: ReplicaId::new(server, 3),
                need: Resources { primary: Bytes(5), others: [("gpu0".to_owned(), Bytes(u64::MAX))].into() },
                routed,
                draining: !routed,
            }))
        }),
        1 => (model_name(), generation()).prop_map(|(model, generation)| Write::RemoveCopy(model, generation)),
        2 => (model_name(), size_key(), 1..5_u32).prop_map(|(model, key, version)| Write::PutSize(Box::new(SizeRow {
            model,
            key,
            bytes: Resources::primary(Bytes(7)),
            versions: (1..=version).map(Version).collect(),
        }))),
        1 => (model_name(), size_key()).prop_map(|(model, key)| Write::RemoveSize(model, key)),
        1 => (server_name(), 0..9_u32).prop_map(|(name, marks)| Write::PutServer(Box::new(ServerRow {
            name,
            owner: Owner::Api,
            expected: Some(marks),
            bounds: (0, marks),
            kubernetes: None,
            doors: [(marks, "127.0.0.1:1".to_owned())].into(),
            cordoned: (0..marks).collect(),
            draining: [marks].into(),
        }))),
        1 => server_name().prop_map(Write::RemoveServer),
        1 => any::<[u64; 3]>().prop_map(|[leader_epoch, route_epoch, uid]| {
            let mut leaders = Leaders::default();
            leaders.begin(Leader { epoch: uid, started: Instant::from_micros(route_epoch) });
            Write::PutCounters(Counters { leader_epoch, route_epoch, uid, leaders })
        }),
    ]
}

#[derive(Clone, Debug)]
enum Step {
    Commit(Vec<Write>),
    Events(Vec<Vec<u8>>),
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => prop::collection::vec(write(), 0..12).prop_map(Step::Commit),
        1 => prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..20).prop_map(Step::Events),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..25)
}

/// The contract, for any store: after any steps, and however often it is opened anew, it holds what was
/// committed, in the order of its keys, and says whose it is.
fn keeps_the_contract<S: Store>(steps: &[Step], mut open: impl FnMut(Option<S>) -> S) -> Result<(), TestCaseError> {
    let mut store = open(None);
    let whose = store.identity();
    let mut model = Model::default();
    let mut kept = Vec::new();
    for step in steps {
        match step {
            Step::Commit(writes) => {
                store.commit(writes).map_err(|error| TestCaseError::fail(error.to_string()))?;
                model.apply(writes);
            }
            Step::Events(events) => {
                store.save_events(events).map_err(|error| TestCaseError::fail(error.to_string()))?;
                kept.clone_from(events);
            }
            Step::Reopen => store = open(Some(store)),
        }
        let contents = model.contents();
        for row in &contents.servers {
            prop_assert_eq!(store.load_server(&row.name).unwrap(), Some(row.clone()));
        }
        prop_assert_eq!(store.load_server(&ServerName::new("nobody-s").unwrap()).unwrap(), None);
        for row in &contents.models {
            let found = store.load_model(&row.name).unwrap().expect("a row");
            prop_assert_eq!(&found.model, row);
            prop_assert!(
                found.versions.iter().eq(contents.versions.iter().filter(|version| version.model == row.name))
            );
            prop_assert!(found.copies.iter().eq(contents.copies.iter().filter(|copy| copy.model == row.name)));
        }
        prop_assert_eq!(store.load().unwrap(), contents);
        prop_assert_eq!(&store.load_events().unwrap(), &kept);
        prop_assert_eq!(store.identity(), whose.clone());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn the_store_in_memory_keeps_the_contract(steps in steps()) {
        keeps_the_contract(&steps, |old: Option<MemoryStore>| match old {
            Some(old) => old.reopen(),
            None => MemoryStore::new(identity()),
        })?;
    }

    #[test]
    fn the_embedded_store_keeps_the_contract(steps in steps()) {
        let disk = Disk::default();
        let mut fresh = true;
        keeps_the_contract(&steps, |old: Option<EmbeddedStore>| {
            drop(old);
            disk.open(if std::mem::take(&mut fresh) { identity } else { another }).unwrap()
        })?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn the_embedded_store_keeps_the_contract_on_a_file(steps in steps()) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/er/journal.redb");
        let mut fresh = true;
        keeps_the_contract(&steps, |old: Option<EmbeddedStore>| {
            drop(old);
            open_file(&path, if std::mem::take(&mut fresh) { identity } else { another }).unwrap()
        })?;
    }
}

// === a disk that can lose power, be full, and fail ===

/// A disk in memory. Writes are lost with the power until they are synced, in any order and piece by piece.
#[derive(Clone, Debug, Default)]
struct Disk(Arc<Mutex<Platter>>);

#[derive(Debug, Default)]
struct Platter {
    synced: Vec<u8>,
    current: Vec<u8>,
    unsynced: Vec<Change>,
    // Changes after which the power is gone.
    power: Option<u64>,
    // Blocks of 4 KiB that can still be taken; those that hold something are taken.
    room: Option<usize>,
    taken: std::collections::BTreeSet<u64>,
    sync_fails: bool,
    changes: u64,
}

#[derive(Clone, Debug)]
enum Change {
    Len(u64),
    Write(u64, Vec<u8>),
}

const BLOCK: u64 = 4096;

impl Platter {
    fn change(&mut self) -> io::Result<()> {
        self.changes += 1;
        match &mut self.power {
            Some(0) => Err(io::Error::other("the power is gone")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

fn apply(image: &mut Vec<u8>, change: &Change, sector: impl Fn(usize) -> bool) {
    match change {
        Change::Len(len) => image.resize(usize::try_from(*len).unwrap(), 0),
        Change::Write(offset, data) => {
            let start = usize::try_from(*offset).unwrap();
            if image.len() < start + data.len() {
                image.resize(start + data.len(), 0);
            }
            for (index, piece) in data.chunks(512).enumerate() {
                if sector(index) {
                    image[start + index * 512..][..piece.len()].copy_from_slice(piece);
                }
            }
        }
    }
}

impl Disk {
    fn open(&self, new_identity: impl FnOnce() -> Identity) -> Result<EmbeddedStore, OpenError> {
        let disk = self.clone();
        let backend: OpenBackend = Box::new(move || Ok(Box::new(disk.clone())));
        EmbeddedStore::open_on("disk".to_owned(), backend, CACHE, new_identity)
    }

    /// What is found when the power comes back: what was synced, and of the rest what chance left.
    fn after_power_cut(&self, seed: u64) -> Vec<u8> {
        let platter = self.0.lock().unwrap();
        let mut image = platter.synced.clone();
        let mut state = seed;
        for change in &platter.unsynced {
            // splitmix64
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut bits = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            // Nothing, everything, or anything.
            let fate = match seed % 4 {
                0 => 0,
                1 => 2,
                _ => bits % 8,
            };
            match fate {
                0 => {}
                1 => apply(&mut image, change, |sector| (bits >> (8 + sector % 48)) & 1 == 1),
                _ => apply(&mut image, change, |_| true),
            }
        }
        image
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().current.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let platter = self.0.lock().unwrap();
        let start = usize::try_from(offset).unwrap();
        let bytes = platter.current.get(start..start + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        platter.change()?;
        let change = Change::Len(len);
        apply(&mut platter.current, &change, |_| true);
        platter.unsynced.push(change);
        let kept = len.div_ceil(BLOCK);
        platter.taken.retain(|block| *block < kept);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        platter.change()?;
        if platter.sync_fails {
            return Err(io::Error::other("the disk did not sync"));
        }
        platter.synced = platter.current.clone();
        platter.unsynced.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        platter.change()?;
        for block in offset / BLOCK..(offset + data.len() as u64).div_ceil(BLOCK) {
            if platter.room.is_some_and(|room| platter.taken.len() >= room) && !platter.taken.contains(&block) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            platter.taken.insert(block);
        }
        let change = Change::Write(offset, data.to_vec());
        apply(&mut platter.current, &change, |_| true);
        platter.unsynced.push(change);
        Ok(())
    }

    fn try_lock_range(&self, _start: Bound<u64>, _end: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn unlock_range(&self, _start: Bound<u64>, _end: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }
}

/// Commits until the first that fails. Returns what was acknowledged and, with the error, what was tried.
fn commit_all(store: &EmbeddedStore, batches: &[Vec<Write>], model: &mut Model) -> Option<(CommitError, Vec<Write>)> {
    for batch in batches {
        match store.commit(batch) {
            Ok(()) => model.apply(batch),
            Err(error) => return Some((error, batch.clone())),
        }
    }
    None
}

fn batches(most: usize) -> impl Strategy<Value = Vec<Vec<Write>>> {
    prop::collection::vec(prop::collection::vec(write(), 1..10), 1..most)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn killed_at_any_write_it_reopens_to_the_last_acknowledged_commit(
        batches in batches(16), kill in any::<prop::sample::Index>(), seed in any::<u64>(),
    ) {
        let whole = Disk::default();
        commit_all(&whole.open(identity).unwrap(), &batches, &mut Model::default());
        let changes = usize::try_from(whole.0.lock().unwrap().changes).unwrap();
        let disk = Disk::default();
        disk.0.lock().unwrap().power = Some(kill.index(changes) as u64);
        let mut model = Model::default();
        let mut tried = None;
        if let Ok(store) = disk.open(identity)
            && let Some((error, batch)) = commit_all(&store, &batches, &mut model)
        {
            // Failed promises that the commit is not there, and the power cut can't bring it back.
            tried = matches!(error, CommitError::Unknown(_)).then_some(batch);
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        fs::write(&path, disk.after_power_cut(seed)).unwrap();
        let found = open_file(&path, identity).unwrap().load().unwrap();
        let acknowledged = found == model.contents();
        let in_flight = tried.is_some_and(|tried| found == model.after(&tried).contents());
        prop_assert!(acknowledged || in_flight, "found {found:#?}, acknowledged {model:#?}");
    }

    #[test]
    fn a_full_disk_fails_commits_whole_and_lets_reads_go_on(batches in batches(40), room in 20_usize..120) {
        let disk = Disk::default();
        let store = disk.open(identity).unwrap();
        disk.0.lock().unwrap().room = Some(room);
        let mut model = Model::default();
        for batch in &batches {
            match store.commit(batch) {
                Ok(()) => model.apply(batch),
                Err(CommitError::Failed(_)) => {}
                Err(error) => return Err(TestCaseError::fail(format!("a full disk proves failure: {error}"))),
            }
            prop_assert_eq!(store.load().unwrap(), model.contents());
        }
        disk.0.lock().unwrap().room = None;
        for batch in &batches {
            store.commit(batch).unwrap();
            model.apply(batch);
        }
        drop(store);
        prop_assert_eq!(disk.open(another).unwrap().load().unwrap(), model.contents());
    }
}

#[test]
fn a_sync_that_fails_leaves_the_outcome_unknown_and_the_store_unusable() {
    let disk = Disk::default();
    let store = disk.open(identity).unwrap();
    let counters = |uid| vec![Write::PutCounters(Counters { uid, ..Counters::default() })];
    store.commit(&counters(1)).unwrap();
    disk.0.lock().unwrap().sync_fails = true;
    assert!(matches!(store.commit(&counters(2)), Err(CommitError::Unknown(_))));
    disk.0.lock().unwrap().sync_fails = false;
    assert!(matches!(store.commit(&counters(3)), Err(CommitError::Unknown(_))));
    assert!(matches!(store.save_events(&[]), Err(CommitError::Unknown(_))));
    assert!(store.load().is_err(), "what it holds is not known");
    drop(store);
    let uid = disk.open(another).unwrap().load().unwrap().counters.uid;
    assert!(uid == 1 || uid == 2, "{uid}");
}

// === opening ===

#[test]
fn a_journal_in_use_is_locked_and_free_again_afterwards() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let first = open_file(&path, identity).unwrap();
    let error = open_file(&path, another).unwrap_err();
    assert!(matches!(error, OpenError::Locked { .. }), "{error}");
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    drop(first);
    open_file(&path, another).unwrap();
}

fn options(path: &Path) -> OpenOptions {
    OpenOptions { path: path.to_owned(), cache_bytes: CACHE }
}

#[test]
fn a_look_changes_nothing_even_in_a_journal_that_was_not_closed() {
    let directory = tempfile::tempdir().unwrap();
    let (path, copy) = (directory.path().join("journal"), directory.path().join("copy"));
    let counters = Counters { leader_epoch: 3, route_epoch: 4, uid: 5, ..Counters::default() };
    let store = open_file(&path, identity).unwrap();
    let refused = inspect(&options(&path)).unwrap_err();
    assert!(matches!(refused, OpenError::Locked { .. }), "{refused}");
    store.commit(&[Write::PutCounters(counters.clone())]).unwrap();
    // What a killed process leaves: its file was never closed.
    fs::copy(&path, &copy).unwrap();
    drop(store);
    for path in [&path, &copy] {
        let before = fs::read(path).unwrap();
        let found = inspect(&options(path)).unwrap();
        assert_eq!((found.identity, found.contents.counters), (identity(), counters.clone()));
        assert_eq!((found.schema, found.bytes), (SCHEMA, before.len() as u64));
        assert!(fs::read(path).unwrap() == before, "a look wrote into the file");
    }
    assert_eq!(open_file(&copy, another).unwrap().load().unwrap().counters, counters);
}

#[test]
fn where_there_is_no_journal_a_look_makes_none() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["no/such/journal", "empty"] {
        let path = directory.path().join(name);
        if name == "empty" {
            fs::write(&path, b"").unwrap();
        }
        for error in [inspect(&options(&path)).unwrap_err(), open_existing(&options(&path)).unwrap_err()] {
            assert!(matches!(error, OpenError::Missing { .. }), "{error}");
            assert!(error.to_string().contains("--data-dir"), "{error}");
        }
        assert_eq!(fs::metadata(&path).map_or(0, |found| found.len()), 0);
    }
}

#[test]
fn another_lineage_comes_with_its_writes_and_the_cluster_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    drop(open_file(&path, identity).unwrap());
    let counters = Counters { uid: 7, ..Counters::default() };
    let wanted = Identity { lineage: "2".repeat(32), ..identity() };
    let mut store = open_existing(&options(&path)).unwrap();
    store.begin_lineage(&wanted.lineage, &[Write::PutCounters(counters.clone())]).unwrap();
    assert_eq!(store.identity(), wanted);
    store.commit(&[Write::PutCounters(counters.clone())]).unwrap();
    drop(store);
    let store = open_file(&path, another).unwrap();
    assert_eq!((store.identity(), store.load().unwrap().counters), (wanted, counters));
}

#[test]
fn an_empty_file_is_a_new_journal_and_keeps_its_identity() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    fs::write(&path, b"").unwrap();
    assert_eq!(open_file(&path, identity).unwrap().identity(), identity());
    assert_eq!(open_file(&path, another).unwrap().identity(), identity());
}

#[cfg(unix)]
#[test]
fn a_new_journal_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    open_file(&path, identity).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_directory_is_no_journal() {
    let directory = tempfile::tempdir().unwrap();
    let error = open_file(directory.path(), another).unwrap_err();
    assert!(matches!(error, OpenError::Io { .. }), "{error}");
    assert!(error.to_string().contains("directory"), "{error}");
}

#[test]
fn a_path_through_a_file_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), b"x").unwrap();
    let error = open_file(&directory.path().join("file/journal"), another).unwrap_err();
    assert!(matches!(error, OpenError::Io { .. }), "{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_file_that_may_not_be_written_is_an_error_of_the_system() {
    // Nobody, root included, may write here.
    let error = open_file(Path::new("/proc/version"), another).unwrap_err();
    assert!(matches!(error, OpenError::Io { .. }), "{error}");
    let error = open_file(Path::new("/proc/journal"), another).unwrap_err();
    assert!(matches!(error, OpenError::Io { .. }), "{error}");
}

#[cfg(unix)]
#[test]
fn without_permission_the_error_says_so() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    fs::write(&path, b"").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    match open_file(&path, identity) {
        Err(error) => {
            assert!(matches!(error, OpenError::Io { .. }), "{error}");
            assert!(error.to_string().to_lowercase().contains("permission"), "{error}");
        }
        // Root may open anything; the test above stands for it.
        Ok(_) => assert!(fs::File::open(&path).is_ok()),
    }
}

#[test]
fn another_programs_redb_file_is_no_journal_and_stays_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let theirs = redb::TableDefinition::<u64, u64>::new("theirs");
    let database = redb::Database::create(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.open_table(theirs).unwrap().insert(1, 2).unwrap();
    transaction.commit().unwrap();
    drop(database);
    let error = open_file(&path, another).unwrap_err();
    assert!(matches!(&error, OpenError::Damaged { problem, .. } if problem.contains("not a journal")), "{error}");
}

/// Sets a journal's row of meta data.
fn set_meta(path: &Path, key: &str, value: &str) {
    let database = redb::Database::open(path).unwrap();
    let transaction = database.begin_write().unwrap();
    let meta = redb::TableDefinition::<&str, &str>::new("meta");
    transaction.open_table(meta).unwrap().insert(key, value).unwrap();
    transaction.commit().unwrap();
}

#[test]
fn a_newer_schema_is_refused_with_both_numbers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    open_file(&path, identity).unwrap();
    set_meta(&path, "schema", &(SCHEMA + 6).to_string());
    match open_file(&path, another).unwrap_err() {
        OpenError::Newer { found, known, .. } => assert_eq!((found, known), (SCHEMA + 6, SCHEMA)),
        error => panic!("{error}"),
    }
    set_meta(&path, "schema", &SCHEMA.to_string());
    open_file(&path, another).unwrap();
}

#[test]
fn a_journal_of_schema_1_is_brought_to_this_one_and_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let server = ServerRow::called(ServerName::new("t").unwrap());
    open_file(&path, identity).unwrap().commit(&[Write::PutServer(Box::new(server.clone()))]).unwrap();
    // As the first schema was: without sizes.
    let database = redb::Database::open(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    assert!(transaction.delete_table(redb::TableDefinition::<&[u8], &[u8]>::new("sizes")).unwrap());
    transaction.commit().unwrap();
    drop(database);
    set_meta(&path, "schema", "1");
    let size = SizeRow {
        model: ModelName::new("m").unwrap(),
        key: SizeKey { artifact: "a".to_owned(), runtime: "oip".to_owned(), configuration: "1".to_owned() },
        bytes: Resources::primary(Bytes(5)),
        versions: [Version(1)].into(),
    };
    let store = open_file(&path, another).unwrap();
    assert_eq!(store.load().unwrap().servers, [server]);
    store.commit(&[Write::PutSize(Box::new(size.clone()))]).unwrap();
    drop(store);
    assert_eq!(open_file(&path, another).unwrap().load().unwrap().sizes, [size]);
}

#[test]
fn a_schema_that_never_was_is_damage() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    open_file(&path, identity).unwrap();
    for schema in ["0", "-1", "one", ""] {
        set_meta(&path, "schema", schema);
        let error = open_file(&path, another).unwrap_err();
        assert!(matches!(error, OpenError::Damaged { .. }), "{schema}: {error}");
    }
}

#[test]
fn a_row_that_is_none_is_damage_and_names_its_table() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    open_file(&path, identity).unwrap();
    let database = redb::Database::open(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    let models = redb::TableDefinition::<&[u8], &[u8]>::new("models");
    transaction.open_table(models).unwrap().insert(b"iris".as_slice(), b"\xc1".as_slice()).unwrap();
    transaction.commit().unwrap();
    drop(database);
    let error = open_file(&path, another).unwrap().load().unwrap_err();
    assert!(matches!(&error, OpenError::Damaged { problem, .. } if problem.contains("models")), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn garbage_is_refused_and_left_as_it_is(mut bytes in prop::collection::vec(any::<u8>(), 10..5000), magic: bool) {
        if magic {
            let start = [b'r', b'e', b'd', b'b', 0x1a, 0x0a, 0xa9, 0x0d, 0x0a];
            bytes[..9].copy_from_slice(&start);
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        fs::write(&path, &bytes).unwrap();
        let error = open_file(&path, another).unwrap_err();
        prop_assert!(matches!(error, OpenError::Damaged { .. }), "{}", error);
        prop_assert_eq!(fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn a_truncated_journal_is_refused_or_whole(writes in batches(6), share in 0.001_f64..0.999) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let store = open_file(&path, identity).unwrap();
        let mut model = Model::default();
        prop_assert!(commit_all(&store, &writes, &mut model).is_none());
        drop(store);
        let whole = fs::metadata(&path).unwrap().len();
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share")]
        let kept = ((whole as f64 * share) as u64).max(1);
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(kept).unwrap();
        match open_file(&path, another) {
            Err(error) => prop_assert!(matches!(error, OpenError::Damaged { .. }), "{}", error),
            Ok(store) => prop_assert_eq!(store.load().unwrap(), model.contents()),
        }
    }
}

// === the store in memory, told to fail ===

#[test]
fn the_store_in_memory_fails_as_told() {
    let store = MemoryStore::new(identity());
    let put = |uid| vec![Write::PutCounters(Counters { uid, ..Counters::default() })];
    let uid = |store: &MemoryStore| store.load().unwrap().counters.uid;
    store.inject(Fault::Failed);
    assert!(matches!(store.commit(&put(1)), Err(CommitError::Failed(_))));
    assert_eq!(uid(&store), 0);
    store.commit(&put(2)).unwrap();
    for (kept, found) in [(false, 2), (true, 3)] {
        let store = store.reopen();
        store.inject(Fault::Crash { kept });
        assert!(matches!(store.commit(&put(3)), Err(CommitError::Unknown(_))));
        assert!(matches!(store.commit(&put(4)), Err(CommitError::Unknown(_))), "it has stopped");
        assert!(store.load().is_err());
        assert_eq!(uid(&store.reopen()), found);
    }
}

#[test]
fn a_store_in_memory_that_was_opened_again_elsewhere_writes_nothing() {
    let old = MemoryStore::new(identity());
    let new = old.reopen();
    let put = [Write::PutCounters(Counters { uid: 5, ..Counters::default() })];
    assert!(old.commit(&put).is_err());
    assert_eq!(new.load().unwrap(), Contents::default());
    new.commit(&put).unwrap();
    assert_eq!(new.commits(), 1);
}
