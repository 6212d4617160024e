//! The route table as requests see it.
//!
//! The rule of this module: a request takes no lock to find its route, and a change costs what it changes. The
//! table is 4,096 shards, each an immutable map behind an atomic pointer: a look-up reads one pointer and one
//! map, the same for one model as for a million; a change copies the shards that it touches (25 entries
//! each with 100,000 models, 250 with a million) and swaps their pointers. That a request may meet one
//! change half applied is no harm: routes of different models are independent, and the epoch that the
//! change makes is marked only after its last shard ([`Epochs`]).

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    hash::{BuildHasherDefault, Hasher},
    io::Write as _,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::HeaderValue;
use smallvec::SmallVec;
use tokio::sync::watch;

use super::{
    epochs::{Epochs, Guard, Turn},
    pick::Pulse,
};
use crate::{
    domain::{
        names::{ModelName, ReplicaId},
        near::Known,
        routes::{Absence, Changes, Epoch, Route, Snapshot},
        version::{Generation, Version, served_name},
    },
    forward::{Connections, Upstream},
};

/// A power of two.
const SHARDS: usize = 4096;

/// Routes and shards that are dealt with at once. Then it is the turn of requests.
const PART: usize = 100;

type Shard = HashMap<Key, Arc<Entry>, BuildHasherDefault<Fnv>>;

/// A model's name, within the map itself if it is no longer than most: a look-up that compares it waits for no other
/// piece of memory. A longer one is copied with its shard.
type Key = SmallVec<[u8; 24]>;

/// Routes of all models.
#[derive(Debug)]
pub struct Table {
    shards: Box<[ArcSwap<Shard>]>,
    /// A bit for each shard that has routes: with few models, who looks through the table reads few shards.
    occupied: Box<[AtomicU64]>,
    epochs: Epochs,
    /// Grows with every change, for those who wait for one.
    changed: watch::Sender<u64>,
    held: Mutex<Held>,
    doors: Arc<Connections>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Held {
    epoch: Option<Epoch>,
    models: usize,
}

/// Why a name has no route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// There was no table yet.
    NoTable,
    /// The table has no such model.
    Unknown,
}

/// One model's route, ready for requests. With one version of one copy, as most have, it is one piece of memory beside
/// its texts: of many models, none is likely to be in the processor's cache.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) model: ModelName,
    pub(super) shares: SmallVec<[Share; 1]>,
    pub(super) absence: Absence,
}

/// One version's share of a route.
#[derive(Debug)]
pub(super) struct Share {
    pub(super) version: Version,
    pub(super) weight: u32,
    /// The name under which doors know it: `iris_2`.
    pub(super) served: HeaderValue,
    /// What clients see of it: `:iris_2:`.
    pub(super) sticky: HeaderValue,
    pub(super) places: SmallVec<[Place; 1]>,
}

/// One endpoint.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) generation: Generation,
    /// The generation as the door reads it.
    pub(super) copy: HeaderValue,
    pub(super) replica: ReplicaId,
    pub(super) door: Arc<dyn Upstream>,
    pub(super) pulse: Arc<Pulse>,
}

impl Table {
    pub(super) fn new(doors: Arc<Connections>) -> Self {
        let empty = Arc::new(Shard::default());
        Self {
            shards: (0..SHARDS).map(|_| ArcSwap::new(Arc::clone(&empty))).collect(),
            occupied: (0..SHARDS / 64).map(|_| AtomicU64::new(0)).collect(),
            epochs: Epochs::default(),
            changed: watch::Sender::new(0),
            held: Mutex::default(),
            doors,
        }
    }

    /// A guard of the present epoch, to be taken before a route is looked up.
    pub fn enter(&self) -> Guard {
        self.epochs.enter()
    }

    /// The route of the model named `name`.
    pub(super) fn get(&self, name: &str) -> Option<Arc<Entry>> {
        self.shards[shard_of(name)].load().get(name.as_bytes()).map(Arc::clone)
    }

    /// The route of the model named `name`. Who finds none waits for the change that is being applied, if there is
    /// one: in the midst of the first table a model may be missing that is in it.
    ///
    /// # Errors
    /// Why there is none, as it was at one instant.
    pub(super) fn find(&self, name: &str) -> Result<Arc<Entry>, Missing> {
        if let Some(entry) = self.get(name) {
            return Ok(entry);
        }
        let held = self.held();
        self.get(name).ok_or(if held.epoch.is_some() { Missing::Unknown } else { Missing::NoTable })
    }

    /// Waits for a route of `entry`'s model other than `entry`. `None` when the model has none any more.
    pub(super) async fn next(&self, entry: &Arc<Entry>) -> Option<Arc<Entry>> {
        let mut changed = self.changed.subscribe();
        loop {
            changed.borrow_and_update();
            match self.get(entry.model.as_str()) {
                Some(now) if Arc::ptr_eq(&now, entry) => {}
                other => return other,
            }
            if changed.changed().await.is_err() {
                return None;
            }
        }
    }

    /// Replaces the whole table. What is known of a copy's load and residency stays with it.
    pub fn replace(&self, snapshot: Snapshot) -> Turn {
        let mut draft = Draft::new(snapshot.epoch);
        self.add(&mut draft, snapshot.routes);
        self.publish(draft).0
    }

    /// Makes routes of a coming table ready for requests.
    pub(super) fn add(&self, draft: &mut Draft, routes: impl IntoIterator<Item = Route>) {
        for route in routes {
            let shard = shard_of(route.model.as_str());
            let before = self.get(route.model.as_str());
            draft.shards[shard].insert(key(&route.model), self.entry(route, before.as_deref()));
        }
    }

    /// Replaces the whole table by what has come, and answers what was held before.
    pub(super) fn publish(&self, draft: Draft) -> (Turn, Past) {
        let mut held = self.held();
        held.models = draft.shards.iter().map(HashMap::len).sum();
        let past = draft.shards.into_iter().enumerate().map(|(shard, new)| self.put(shard, new)).collect();
        (self.mark(&mut held, draft.epoch), Past(past))
    }

    /// Applies what one epoch changed, in parts. Changes that are not newer than the table change nothing: `None`.
    pub async fn apply(&self, changes: Changes) -> Option<Turn> {
        if self.held().epoch.is_none_or(|epoch| changes.epoch <= epoch) {
            return None;
        }
        let mut touched: BTreeMap<usize, (Vec<Route>, Vec<ModelName>)> = BTreeMap::new();
        for route in changes.routes {
            touched.entry(shard_of(route.model.as_str())).or_default().0.push(route);
        }
        for model in changes.removed {
            touched.entry(shard_of(model.as_str())).or_default().1.push(model);
        }
        let mut part = 0;
        for (shard, (routes, removed)) in touched {
            part += 1 + routes.len();
            self.change(shard, routes, &removed);
            if part >= PART {
                part = 0;
                tokio::task::yield_now().await;
            }
        }
        Some(self.mark(&mut self.held(), changes.epoch))
    }

    fn change(&self, shard: usize, routes: Vec<Route>, removed: &[ModelName]) {
        let mut held = self.held();
        let before = self.shards[shard].load_full();
        let mut after = Shard::clone(&before);
        for route in routes {
            let key = key(&route.model);
            let known = before.get(&key).map(Arc::as_ref);
            after.insert(key, self.entry(route, known));
        }
        for model in removed {
            after.remove(model.as_str().as_bytes());
        }
        held.models = held.models + after.len() - before.len();
        self.put(shard, after);
    }

    /// Puts `after` in the place of a shard, and answers what was there. The lock on `held` is taken: there is one writer.
    fn put(&self, shard: usize, after: Shard) -> Arc<Shard> {
        let (word, bit) = (&self.occupied[shard / 64], 1 << (shard % 64));
        if after.is_empty() {
            word.fetch_and(!bit, Ordering::Relaxed);
        } else {
            word.fetch_or(bit, Ordering::Relaxed);
        }
        self.shards[shard].swap(Arc::new(after))
    }

    fn mark(&self, held: &mut Held, epoch: Epoch) -> Turn {
        held.epoch = Some(epoch);
        let turn = self.epochs.advance(epoch);
        self.changed.send_modify(|count| *count += 1);
        turn
    }

    fn entry(&self, route: Route, before: Option<&Entry>) -> Arc<Entry> {
        let known = |generation: Generation| {
            let shares = before.into_iter().flat_map(|entry| entry.shares.iter());
            let mut places = shares.flat_map(|share| share.places.iter());
            places.find(|place| place.generation == generation).map(|place| Arc::clone(&place.pulse))
        };
        let mut texts = Texts::new(&route);
        let shares = route.targets.into_iter().map(|target| {
            let sticky = texts.next();
            let places = target.endpoints.into_iter().filter_map(|endpoint| {
                let copy = texts.next();
                let door = match self.doors.get(&endpoint.door) {
                    Ok(door) => door,
                    Err(error) => {
                        tracing::error!(model = %route.model, replica = %endpoint.replica, %error, "endpoint left out");
                        return None;
                    }
                };
                let pulse = known(endpoint.generation).unwrap_or_default();
                pulse.resident.store(endpoint.resident, Ordering::Relaxed);
                Some(Place {
                    generation: endpoint.generation,
                    copy: header(copy),
                    replica: endpoint.replica,
                    door,
                    pulse,
                })
            });
            let places = places.collect();
            let served = sticky.slice(1..sticky.len() - 1);
            Share {
                version: target.version,
                weight: target.weight,
                sticky: header(sticky),
                served: header(served),
                places,
            }
        });
        Arc::new(Entry { shares: shares.collect(), model: route.model.clone(), absence: route.absence })
    }

    /// The epoch of the table that is held, and how many models are in it.
    pub fn held_epoch(&self) -> (Option<Epoch>, usize) {
        let held = self.held();
        (held.epoch, held.models)
    }

    /// The newest epoch.
    pub(super) fn latest(&self) -> Turn {
        self.epochs.latest()
    }

    /// The newest epoch that may be acknowledged.
    pub fn settled(&self) -> Turn {
        self.epochs.settled()
    }

    /// Waits until `turn` may be acknowledged.
    pub async fn settle(&self, turn: Turn) {
        self.epochs.settle(turn).await;
    }

    /// Calls `visit` for each route until it answers false, in an order of the table's own.
    pub(super) fn visit(&self, mut visit: impl FnMut(&Arc<Entry>) -> bool) {
        for (word, shards) in self.occupied.iter().zip(self.shards.chunks(64)) {
            let mut occupied = word.load(Ordering::Relaxed);
            while occupied != 0 {
                let shard = &shards[occupied.trailing_zeros() as usize];
                occupied &= occupied - 1;
                if !shard.load().values().all(&mut visit) {
                    return;
                }
            }
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known for Table {
    fn count(&self) -> usize {
        self.held().models
    }

    fn knows(&self, name: &str) -> bool {
        self.shards[shard_of(name)].load().contains_key(name.as_bytes())
    }

    fn each(&self, visit: &mut dyn FnMut(&str)) {
        self.visit(|entry| {
            visit(entry.model.as_str());
            true
        });
    }
}

/// A table that comes piece by piece.
#[derive(Debug)]
pub(super) struct Draft {
    /// Its epoch.
    pub(super) epoch: Epoch,
    shards: Vec<Shard>,
}

impl Draft {
    /// One without a route.
    pub(super) fn new(epoch: Epoch) -> Self {
        Self { epoch, shards: (0..SHARDS).map(|_| Shard::default()).collect() }
    }

    /// What has come of one that is not to be finished.
    pub(super) fn into_past(self) -> Past {
        Past(self.shards.into_iter().map(Arc::new).collect())
    }
}

/// Routes that are not held any more. To let go of them takes as long as there are many.
#[derive(Debug)]
pub(super) struct Past(Vec<Arc<Shard>>);

impl Past {
    /// Lets go of it in parts.
    pub(super) async fn forget(self) {
        let mut part = 0;
        for shard in self.0 {
            part += 1 + shard.len();
            drop(shard);
            if part >= PART {
                part = 0;
                tokio::task::yield_now().await;
            }
        }
    }
}

/// The values of a route's headers, side by side in one piece of memory, with the count of who refers to it if they are no
/// longer than those of one or two copies: for each version, what clients see of it, then each of its copies.
struct Texts {
    all: Bytes,
    ends: std::vec::IntoIter<usize>,
    from: usize,
}

impl Texts {
    fn new(route: &Route) -> Self {
        let (mut all, mut ends) = (SmallVec::<[u8; 64]>::new(), Vec::new());
        let mut add = |text: fmt::Arguments<'_>| {
            // A vector takes whatever there is.
            drop(all.write_fmt(text));
            ends.push(all.len());
        };
        for target in &route.targets {
            add(format_args!(":{}:", served_name(&route.model, target.version)));
            for endpoint in &target.endpoints {
                add(format_args!("{}", endpoint.generation));
            }
        }
        Self { all: Bytes::from_owner(all), ends: ends.into_iter(), from: 0 }
    }

    fn next(&mut self) -> Bytes {
        let from = self.from;
        self.from = self.ends.next().unwrap_or(from);
        self.all.slice(from..self.from)
    }
}

/// Names and numbers that were checked are valid in a header. Those of one model are of no use to requests for the
/// next: HTTP/2 leaves them out of its table.
fn header(text: Bytes) -> HeaderValue {
    let mut value = HeaderValue::from_maybe_shared(text).unwrap_or(HeaderValue::from_static(""));
    value.set_sensitive(true);
    value
}

/// FNV-1a: short keys, and the same order in every run, so that a simulation can be repeated. The names in the
/// table are the scheduler's, so no client can choose ones that collide.
#[derive(Debug)]
pub(super) struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

fn key(model: &ModelName) -> Key {
    Key::from_slice(model.as_str().as_bytes())
}

fn shard_of(name: &str) -> usize {
    let mut hash = Fnv::default();
    hash.write(name.as_bytes());
    // The upper half: the maps within a shard use the rest.
    (hash.finish() >> 40) as usize & (SHARDS - 1)
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        domain::{
            names::ServerName,
            routes::{Endpoint, Target},
            version::Uid,
        },
        forward::{ClientOptions, TcpNetwork},
        ports::SystemClock,
    };

    fn table() -> Table {
        let clock = Arc::new(SystemClock::new());
        Table::new(Connections::new(Arc::new(TcpNetwork), clock, ClientOptions::default()))
    }

    fn route(model: u8, version: u32) -> Route {
        let version = Version(version);
        let endpoint = Endpoint {
            generation: Generation { uid: Uid(1), version, number: 1 },
            replica: ReplicaId::new(ServerName::new("s").expect("valid"), 0),
            door: "inproc:a".to_owned(),
            resident: true,
        };
        let target = Target { version, weight: 1, endpoints: vec![endpoint] };
        Route { model: name(model), targets: vec![target], absence: Absence::default() }
    }

    fn name(model: u8) -> ModelName {
        ModelName::new(&format!("m{model}")).expect("valid")
    }

    #[derive(Clone, Debug)]
    struct Step {
        whole: bool,
        epoch_ahead: bool,
        routes: BTreeMap<u8, u32>,
        removed: Vec<u8>,
    }

    fn step() -> impl Strategy<Value = Step> {
        let routes = prop::collection::btree_map(0..20_u8, 1..5_u32, 0..10);
        (prop::bool::weighted(0.2), prop::bool::weighted(0.8), routes, prop::collection::vec(20..40_u8, 0..3)).prop_map(
            |(whole, epoch_ahead, routes, removed)| {
                // What is removed is never among what is set.
                let removed = removed.into_iter().map(|m| m - 20).filter(|m| !routes.contains_key(m)).collect();
                Step { whole, epoch_ahead, routes, removed }
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn the_table_is_what_the_steps_made_it(steps in prop::collection::vec(step(), 1..20)) {
            let table = table();
            let mut expected: BTreeMap<u8, u32> = BTreeMap::new();
            let mut epoch = None;
            for step in steps {
                let routes = step.routes.iter().map(|(model, version)| route(*model, *version)).collect();
                let next = Epoch(epoch.map_or(1, |Epoch(now)| if step.epoch_ahead { now + 1 } else { now }));
                if step.whole {
                    table.replace(Snapshot { epoch: next, routes });
                    (expected, epoch) = (step.routes, Some(next));
                } else {
                    let removed = step.removed.iter().map(|model| name(*model)).collect();
                    let applied = block_on(table.apply(Changes { epoch: next, routes, removed }));
                    prop_assert_eq!(applied.is_some(), epoch.is_some_and(|now| next > now));
                    if applied.is_some() {
                        expected.extend(step.routes);
                        expected.retain(|model, _| !step.removed.contains(model));
                        epoch = Some(next);
                    }
                }
                for model in 0..20 {
                    let found = table.get(name(model).as_str()).map(|entry| entry.shares[0].version.0);
                    prop_assert_eq!(found, expected.get(&model).copied());
                }
                prop_assert_eq!(table.held_epoch(), (epoch, expected.len()));
                prop_assert_eq!(table.settled().epoch, epoch.unwrap_or_default());
            }
        }
    }

    #[test]
    fn while_the_first_table_is_put_in_place_no_model_of_it_is_unknown() {
        let many = |n: u32| ModelName::new(&format!("model-{n}")).expect("valid");
        for _ in 0..20 {
            let table = table();
            let routes = (0..500).map(|n| Route { model: many(n), ..route(0, 1) }).collect();
            std::thread::scope(|scope| {
                let placing = scope.spawn(|| table.replace(Snapshot { epoch: Epoch(1), routes }));
                for n in (0..500).cycle().take_while(|_| !placing.is_finished()) {
                    assert_ne!(table.find(many(n).as_str()).err(), Some(Missing::Unknown));
                }
            });
            assert_eq!(table.find("another").err(), Some(Missing::Unknown));
        }
    }

    #[test]
    fn what_is_known_of_a_copy_outlives_changes_of_its_route() {
        let table = table();
        table.replace(Snapshot { epoch: Epoch(1), routes: vec![route(1, 1)] });
        let pulse = |table: &Table| Arc::clone(&table.get("m1").expect("known").shares[0].places[0].pulse);
        let first = pulse(&table);
        let changes = Changes { epoch: Epoch(2), routes: vec![route(1, 1), route(2, 1)], removed: vec![] };
        block_on(table.apply(changes)).expect("newer");
        assert!(Arc::ptr_eq(&first, &pulse(&table)));
        table.replace(Snapshot { epoch: Epoch(3), routes: vec![route(1, 1)] });
        assert!(Arc::ptr_eq(&first, &pulse(&table)));
        block_on(table.apply(Changes { epoch: Epoch(4), routes: vec![route(1, 2)], removed: vec![] })).expect("newer");
        assert!(!Arc::ptr_eq(&first, &pulse(&table)));
    }

    #[test]
    fn a_change_of_one_model_in_a_hundred_thousand_copies_one_shard() {
        let table = table();
        let many = |n: u32| ModelName::new(&format!("model-{n}")).expect("valid");
        let routes = (0..100_000).map(|n| Route { model: many(n), ..route(0, 1) }).collect();
        table.replace(Snapshot { epoch: Epoch(1), routes });
        let before: Vec<_> = table.shards.iter().map(ArcSwap::load_full).collect();
        assert!(before.iter().all(|shard| shard.len() < 80), "the names are spread");
        let changed = Route { model: many(77), ..route(0, 2) };
        block_on(table.apply(Changes { epoch: Epoch(2), routes: vec![changed], removed: vec![] })).expect("newer");
        let copied = table.shards.iter().zip(&before).filter(|(now, before)| !Arc::ptr_eq(&now.load_full(), before));
        assert_eq!(copied.count(), 1);
    }
}
