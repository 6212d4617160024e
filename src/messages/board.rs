//! What actors publish for whoever reads: the latest of each model and server, and what changes.
//!
//! An actor puts a thing here only once it is durable. A reader never waits for an actor, nor an actor for a
//! reader: a feed that is read too slowly keeps the latest of each model instead of every step.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use dashmap::DashMap;
use tokio::sync::Notify;

use crate::domain::{
    ghost::Strain,
    memory::Resources,
    model::Model,
    names::{ModelName, ReplicaId, ServerName},
    near::Known,
    record::ServerRow,
    replica::ReplicaState,
    time::Instant,
};

/// Changes that a feed keeps one by one before it keeps only the latest of each name.
const FEED_BOUND: usize = 4096;

/// The latest of everything.
#[derive(Default)]
pub struct Board {
    models: DashMap<ModelName, Arc<Model>>,
    servers: DashMap<ServerName, Arc<ServerView>>,
    registered: DashMap<ReplicaId, Registered>,
    model_feeds: Mutex<Vec<Weak<Feed<ModelName, Model>>>>,
    server_feeds: Mutex<Vec<Weak<Feed<ServerName, ServerView>>>>,
}

/// A server as its actor last saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerView {
    /// What is journaled of it.
    pub row: ServerRow,
    /// Whether its owner took it away, and it goes once its copies have moved.
    pub removing: bool,
    /// Its replicas, by index.
    pub replicas: Vec<ReplicaView>,
    /// What its replicas can serve.
    pub capabilities: Vec<String>,
    /// What serves the models there.
    pub runtime: String,
    /// What is not as it should be, a sentence each.
    pub conditions: Vec<String>,
}

/// A replica as its server's actor last saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaView {
    /// Its index.
    pub index: u32,
    /// Where it stands.
    pub state: ReplicaState,
    /// Since when.
    pub since: Instant,
    /// Memory that it has.
    pub capacity: Resources,
    /// How much more may be registered than it has, in percent.
    pub overcommit_percent: u32,
    /// Memory in use, as its agent last said.
    pub resident: Resources,
    /// What else its agent last said of its memory.
    pub strain: Strain,
    /// Copies in memory, as its agent last said.
    pub copies_resident: u32,
    /// Where its door is.
    pub door: String,
}

/// What the placement has registered on a replica.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registered {
    /// The sum of what its copies need.
    pub bytes: Resources,
    /// How many they are.
    pub copies: u32,
    /// Whether more is registered than may be.
    pub over_limit: bool,
    /// What is not as it should be with them, a sentence each.
    pub conditions: Vec<String>,
}

impl Board {
    /// Publishes a model.
    pub fn put_model(&self, model: Arc<Model>) {
        self.models.insert(model.name.clone(), Arc::clone(&model));
        feed(&self.model_feeds, &model.name.clone(), &model);
    }

    /// Forgets a model, at the end of its retention.
    pub fn remove_model(&self, name: &ModelName) {
        self.models.remove(name);
    }

    /// The model of this name.
    #[must_use]
    pub fn model(&self, name: &ModelName) -> Option<Arc<Model>> {
        self.models.get(name).map(|model| Arc::clone(&model))
    }

    /// Every model, by name.
    #[must_use]
    pub fn models(&self) -> Vec<Arc<Model>> {
        let mut models: Vec<_> = self.models.iter().map(|model| Arc::clone(&model)).collect();
        models.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        models
    }

    /// Calls `visit` with each model, in any order. Nobody who changes one waits for it.
    pub fn visit_models(&self, visit: impl FnMut(&Arc<Model>)) {
        let models: Vec<_> = self.models.iter().map(|model| Arc::clone(&model)).collect();
        models.iter().for_each(visit);
    }

    /// The names of the models that are so. Looks at each.
    #[must_use]
    pub fn models_that(&self, so: impl Fn(&Model) -> bool) -> BTreeSet<ModelName> {
        self.models.iter().filter(|model| so(model)).map(|model| model.name.clone()).collect()
    }

    /// Publishes a server.
    pub fn put_server(&self, server: Arc<ServerView>) {
        self.servers.insert(server.row.name.clone(), Arc::clone(&server));
        feed(&self.server_feeds, &server.row.name.clone(), &server);
    }

    /// Forgets a server.
    pub fn remove_server(&self, name: &ServerName) {
        self.servers.remove(name);
    }

    /// The server of this name.
    #[must_use]
    pub fn server(&self, name: &ServerName) -> Option<Arc<ServerView>> {
        self.servers.get(name).map(|server| Arc::clone(&server))
    }

    /// Every server, by name.
    #[must_use]
    pub fn servers(&self) -> Vec<Arc<ServerView>> {
        let mut servers: Vec<_> = self.servers.iter().map(|server| Arc::clone(&server)).collect();
        servers.sort_unstable_by(|a, b| a.row.name.cmp(&b.row.name));
        servers
    }

    /// Publishes what is registered on a replica.
    pub fn put_registered(&self, replica: ReplicaId, registered: Registered) {
        self.registered.insert(replica, registered);
    }

    /// Forgets a replica that is gone.
    pub fn remove_registered(&self, replica: &ReplicaId) {
        self.registered.remove(replica);
    }

    /// What is registered on a replica.
    #[must_use]
    pub fn registered(&self, replica: &ReplicaId) -> Registered {
        self.registered.get(replica).map(|registered| registered.clone()).unwrap_or_default()
    }

    /// Every change to any model from now on. Subscribe first and read the models after, and none is missed.
    #[must_use]
    pub fn watch_models(&self) -> Arc<Feed<ModelName, Model>> {
        subscribe(&self.model_feeds)
    }

    /// Every change to any server from now on.
    #[must_use]
    pub fn watch_servers(&self) -> Arc<Feed<ServerName, ServerView>> {
        subscribe(&self.server_feeds)
    }
}

impl Known for Board {
    fn count(&self) -> usize {
        self.models.len()
    }

    fn knows(&self, name: &str) -> bool {
        ModelName::new(name).is_ok_and(|name| self.models.contains_key(&name))
    }

    fn each(&self, visit: &mut dyn FnMut(&str)) {
        self.visit_models(|model| visit(model.name.as_str()));
    }
}

impl fmt::Debug for Board {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Board")
            .field("models", &self.models.len())
            .field("servers", &self.servers.len())
            .finish_non_exhaustive()
    }
}

/// One reader's changes, in order.
pub struct Feed<K, V> {
    queue: Mutex<Queue<K, V>>,
    changed: Notify,
}

struct Queue<K, V> {
    steps: VecDeque<(K, Arc<V>)>,
    latest: BTreeMap<K, Arc<V>>,
}

impl<K: Ord + Clone, V> Feed<K, V> {
    /// The next change. Never ends.
    pub async fn next(&self) -> Arc<V> {
        loop {
            let changed = self.changed.notified();
            if let Some(next) = self.take() {
                return next;
            }
            changed.await;
        }
    }

    fn take(&self) -> Option<Arc<V>> {
        let mut queue = lock(&self.queue);
        if let Some((_, value)) = queue.steps.pop_front() {
            return Some(value);
        }
        queue.latest.pop_first().map(|(_, value)| value)
    }

    fn put(&self, key: &K, value: &Arc<V>) {
        let mut queue = lock(&self.queue);
        if queue.latest.is_empty() && queue.steps.len() < FEED_BOUND {
            queue.steps.push_back((key.clone(), Arc::clone(value)));
        } else {
            queue.latest.insert(key.clone(), Arc::clone(value));
        }
        drop(queue);
        self.changed.notify_one();
    }
}

impl<K, V> fmt::Debug for Feed<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Feed")
    }
}

type Feeds<K, V> = Mutex<Vec<Weak<Feed<K, V>>>>;

fn subscribe<K, V>(feeds: &Feeds<K, V>) -> Arc<Feed<K, V>> {
    let queue = Mutex::new(Queue { steps: VecDeque::new(), latest: BTreeMap::new() });
    let feed = Arc::new(Feed { queue, changed: Notify::new() });
    let mut feeds = lock(feeds);
    feeds.retain(|feed| feed.strong_count() > 0);
    feeds.push(Arc::downgrade(&feed));
    feed
}

fn feed<K: Ord + Clone, V>(feeds: &Feeds<K, V>, key: &K, value: &Arc<V>) {
    for feed in lock(feeds).iter().filter_map(Weak::upgrade) {
        feed.put(key, value);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
