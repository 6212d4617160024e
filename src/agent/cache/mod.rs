//! The copies that the agent holds, for requests, for the scheduler and for itself.
//!
//! The rule of this module: a request finds its copy in a snapshot and takes no lock that anyone else may
//! hold; everything that changes the set goes through one lock, and in order.

mod entry;
mod ledger;
mod phase;
mod pressure;
mod uses;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use arc_swap::ArcSwap;
use tokio::sync::Notify;

pub(crate) use entry::{Acquired, Entry, Fate, Hold};
pub(crate) use ledger::{Admission, Ledger, Settled};
pub(crate) use phase::{InServer, Phase, Stage};
pub(crate) use pressure::Pressure;

use crate::{
    domain::{
        copy::Report,
        names::ModelName,
        order::Order,
        version::{Generation, Uid, Version},
    },
    rpc::agent_wire::CopyReport,
};

/// Last words that are kept for a scheduler that was not there to hear them.
const LAST_WORDS: usize = 1024;

/// Every copy, by generation, and the snapshots that requests look into.
pub(crate) struct Book {
    inner: Mutex<Inner>,
    by_uid: Shards<Uid>,
    by_model: Shards<ModelName>,
    /// A copy came or went.
    changed: Notify,
}

#[derive(Default)]
struct Inner {
    all: BTreeMap<Generation, Arc<Entry>>,
    /// Who may use a served name, in the order of their registration; the first does.
    names: BTreeMap<String, VecDeque<Generation>>,
    last_words: VecDeque<CopyReport>,
}

impl fmt::Debug for Book {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Book").field("copies", &self.len()).finish_non_exhaustive()
    }
}

impl Book {
    pub(crate) fn new() -> Self {
        Self { inner: Mutex::default(), by_uid: Shards::new(), by_model: Shards::new(), changed: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().all.len()
    }

    /// The copy of that generation.
    pub(crate) fn get(&self, generation: Generation) -> Option<Arc<Entry>> {
        self.lock().all.get(&generation).cloned()
    }

    /// Every copy, in the order of generations.
    pub(crate) fn all(&self) -> Vec<Arc<Entry>> {
        self.lock().all.values().cloned().collect()
    }

    /// Takes a copy in. The one that is there already stays, and comes back as an error.
    pub(crate) fn insert(&self, entry: &Arc<Entry>) -> Result<(), Arc<Entry>> {
        let mut inner = self.lock();
        if let Some(present) = inner.all.get(&entry.generation) {
            return Err(Arc::clone(present));
        }
        inner.last_words.retain(|one| one.generation != entry.generation);
        inner.all.insert(entry.generation, Arc::clone(entry));
        inner.names.entry(entry.served.clone()).or_default().push_back(entry.generation);
        self.by_uid.push(&entry.generation.uid, usize_of(entry.generation.uid.0), entry);
        self.by_model.push(&entry.model, spread(entry.model.as_str()), entry);
        Ok(())
    }

    /// Lets a copy go, with its last words.
    pub(crate) fn remove(&self, entry: &Entry, last_word: Report) {
        {
            let mut inner = self.lock();
            if inner.all.remove(&entry.generation).is_none() {
                return;
            }
            if let Some(queue) = inner.names.get_mut(&entry.served) {
                queue.retain(|one| *one != entry.generation);
                if queue.is_empty() {
                    inner.names.remove(&entry.served);
                }
            }
            if inner.last_words.len() == LAST_WORDS {
                inner.last_words.pop_front();
            }
            inner.last_words.push_back(CopyReport {
                model: entry.model.clone(),
                generation: entry.generation,
                report: last_word,
                order: Some(entry.order()),
            });
            self.by_uid.drop_from(&entry.generation.uid, usize_of(entry.generation.uid.0), entry.generation);
            self.by_model.drop_from(&entry.model, spread(entry.model.as_str()), entry.generation);
        }
        self.changed.notify_waiters();
    }

    /// What was last said of a copy that is gone.
    pub(crate) fn last_word(&self, generation: Generation) -> Option<CopyReport> {
        self.lock().last_words.iter().find(|one| one.generation == generation).cloned()
    }

    /// Everything that there is to say: of every copy, and of those that went lately.
    pub(crate) fn inventory(&self) -> Vec<CopyReport> {
        let inner = self.lock();
        let present = inner.all.values().map(|entry| CopyReport {
            model: entry.model.clone(),
            generation: entry.generation,
            report: entry.report(),
            order: Some(entry.order()),
        });
        present.chain(inner.last_words.iter().cloned()).collect()
    }

    /// Waits until no earlier copy uses the served name.
    pub(crate) async fn turn_of(&self, entry: &Entry) {
        self.until(|inner| inner.names.get(&entry.served).and_then(VecDeque::front) == Some(&entry.generation)).await;
    }

    /// Waits until no copy is left.
    pub(crate) async fn emptied(&self) {
        self.until(|inner| inner.all.is_empty()).await;
    }

    async fn until(&self, condition: impl Fn(&Inner) -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if condition(&self.lock()) {
                return;
            }
            changed.await;
        }
    }

    /// The copy of that generation, from the snapshot.
    pub(crate) fn find(&self, generation: Generation) -> Option<Arc<Entry>> {
        self.by_uid.with(&generation.uid, usize_of(generation.uid.0), |copies| {
            copies.iter().find(|one| one.generation == generation).cloned()
        })
    }

    /// The newest copy of a model, or of one version of it, that answers requests. From the snapshot.
    pub(crate) fn newest(&self, model: &str, version: Option<Version>) -> Option<Arc<Entry>> {
        self.by_model.with(model, spread(model), |copies| newest(copies, version))
    }

    /// The newest version that answers requests, of the model that `generation` is of. From the snapshot.
    pub(crate) fn newest_version(&self, generation: Generation) -> Option<Version> {
        self.by_uid.with(&generation.uid, usize_of(generation.uid.0), |copies| {
            newest(copies, None).map(|entry| entry.generation.version)
        })
    }
}

fn newest(copies: &[Arc<Entry>], version: Option<Version>) -> Option<Arc<Entry>> {
    copies
        .iter()
        .filter(|one| one.phase().serves() && version.is_none_or(|version| version == one.generation.version))
        .max_by_key(|one| (one.generation.version, one.generation))
        .cloned()
}

/// A read-mostly map: readers look into a snapshot, writers replace one of 64 small ones.
struct Shards<K>(Vec<ArcSwap<Shard<K>>>);

type Shard<K> = HashMap<K, Vec<Arc<Entry>>>;

const SHARDS: usize = 64;

fn usize_of(number: u64) -> usize {
    usize::try_from(number % SHARDS as u64).unwrap_or_default()
}

/// FNV-1a: spreads names over the shards.
fn spread(name: &str) -> usize {
    usize_of(
        name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)),
    )
}

impl<K: Clone + Eq + Hash> Shards<K> {
    fn new() -> Self {
        Self((0..SHARDS).map(|_| ArcSwap::default()).collect())
    }

    fn with<Q, T>(&self, key: &Q, shard: usize, read: impl FnOnce(&[Arc<Entry>]) -> Option<T>) -> Option<T>
    where
        K: std::borrow::Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        self.0[shard].load().get(key).and_then(|copies| read(copies))
    }

    fn push(&self, key: &K, shard: usize, entry: &Arc<Entry>) {
        self.change(shard, |map| map.entry(key.clone()).or_default().push(Arc::clone(entry)));
    }

    fn drop_from(&self, key: &K, shard: usize, generation: Generation) {
        self.change(shard, |map| {
            if let Some(copies) = map.get_mut(key) {
                copies.retain(|one| one.generation != generation);
                if copies.is_empty() {
                    map.remove(key);
                }
            }
        });
    }

    /// Writers hold the book's lock, so none of their changes is lost.
    fn change(&self, shard: usize, edit: impl FnOnce(&mut Shard<K>)) {
        let mut map = Shard::clone(&self.0[shard].load());
        edit(&mut map);
        self.0[shard].store(Arc::new(map));
    }
}

/// The parts of a [`Order::Register`] that make an entry.
pub(crate) fn entry_of(order: Order, ledger: &Ledger, clock: Arc<dyn crate::ports::Clock>) -> Option<Arc<Entry>> {
    match order {
        Order::Register { model, generation, spec, need, attempt, measured, trust, pinned } => {
            let pressure = Arc::clone(ledger.pressure());
            let ordered = (spec, need, attempt, measured, trust);
            let entry = Entry::new((model, generation), ordered, pressure, clock);
            entry.set_pinned(pinned);
            Some(Arc::new(entry))
        }
        Order::Unregister { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_found_until_it_is_removed_and_its_last_word_stays() {
        let (book, pressure) = (Book::new(), Arc::default());
        let entry = entry::tests::entry(7, 1, &pressure);
        assert!(book.insert(&entry).is_ok());
        assert!(book.insert(&entry).is_err());
        assert!(book.find(entry.generation).is_some());
        assert!(book.newest("m7", None).is_none(), "it does not answer yet");
        assert!(entry.shift(Phase::Preparing, Phase::Evicted));
        assert_eq!(book.newest("m7", None).map(|one| one.generation), Some(entry.generation));
        assert!(book.newest("m7", Some(Version(2))).is_none());
        assert_eq!(book.newest_version(entry.generation), Some(Version(1)));
        book.remove(&entry, Report::Unloaded);
        assert!(book.find(entry.generation).is_none() && book.newest("m7", None).is_none());
        assert_eq!(book.last_word(entry.generation).map(|one| one.report), Some(Report::Unloaded));
        assert_eq!(book.inventory().len(), 1);
    }

    #[test]
    fn last_words_are_bounded() {
        let (book, pressure) = (Book::new(), Arc::default());
        for uid in 0..LAST_WORDS as u64 + 10 {
            let entry = entry::tests::entry(uid, 1, &pressure);
            assert!(book.insert(&entry).is_ok());
            book.remove(&entry, Report::Unloaded);
        }
        assert_eq!(book.inventory().len(), LAST_WORDS);
    }
}
