//! A journal in memory, for tests and simulations. What is committed outlives the store that committed it, so
//! that a simulated crash keeps exactly that.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    domain::{
        names::{ModelName, ServerName},
        record::{Contents, CopyRow, Counters, ModelRow, ServerRow, SizeRow, VersionRow, Write},
        size::SizeKey,
        version::{Generation, Uid, Version},
    },
    ports::{CommitError, Identity, ModelRows, OpenError, Store},
};

/// What a store is told to let happen at its next write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is written, and it says so.
    Failed,
    /// The process stops within the commit: the outcome is never known, and this store does nothing any more.
    Crash {
        /// Whether the commit was kept.
        kept: bool,
    },
}

/// The journal in memory. [`reopen`](Self::reopen) stands for a process that starts again.
#[derive(Debug)]
pub struct MemoryStore {
    kept: Arc<Mutex<Kept>>,
    term: u64,
}

#[derive(Debug)]
struct Kept {
    identity: Identity,
    // Which store may write: one that has been reopened elsewhere may not.
    term: u64,
    faults: VecDeque<Fault>,
    commits: u64,
    tables: Tables,
    events: Vec<Vec<u8>>,
}

#[derive(Clone, Debug, Default)]
struct Tables {
    models: BTreeMap<ModelName, ModelRow>,
    versions: BTreeMap<(ModelName, Version), VersionRow>,
    copies: BTreeMap<(ModelName, Generation), CopyRow>,
    sizes: BTreeMap<(ModelName, SizeKey), SizeRow>,
    servers: BTreeMap<ServerName, ServerRow>,
    counters: Counters,
}

impl Tables {
    fn apply(&mut self, write: &Write) {
        match write {
            Write::PutModel(row) => drop(self.models.insert(row.name.clone(), row.as_ref().clone())),
            Write::RemoveModel(name) => {
                self.models.remove(name);
                while let Some(key) =
                    self.versions.range((name.clone(), Version(0))..).next().map(|(key, _)| key.clone())
                    && key.0 == *name
                {
                    self.versions.remove(&key);
                }
                let first = Generation { uid: Uid(0), version: Version(0), number: 0 };
                while let Some(key) = self.copies.range((name.clone(), first)..).next().map(|(key, _)| key.clone())
                    && key.0 == *name
                {
                    self.copies.remove(&key);
                }
                self.sizes.retain(|(model, _), _| model != name);
            }
            Write::PutVersion(row) => {
                self.versions.insert((row.model.clone(), row.version), row.as_ref().clone());
            }
            Write::RemoveVersion(model, version) => drop(self.versions.remove(&(model.clone(), *version))),
            Write::PutCopy(row) => {
                self.copies.insert((row.model.clone(), row.generation), row.as_ref().clone());
            }
            Write::RemoveCopy(model, generation) => drop(self.copies.remove(&(model.clone(), *generation))),
            Write::PutSize(row) => {
                self.sizes.insert((row.model.clone(), row.key.clone()), row.as_ref().clone());
            }
            Write::RemoveSize(model, size) => drop(self.sizes.remove(&(model.clone(), size.clone()))),
            Write::PutServer(row) => drop(self.servers.insert(row.name.clone(), row.as_ref().clone())),
            Write::RemoveServer(name) => drop(self.servers.remove(name)),
            Write::PutCounters(counters) => self.counters = counters.clone(),
        }
    }
}

impl MemoryStore {
    /// An empty journal.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let kept = Kept {
            identity,
            term: 0,
            faults: VecDeque::new(),
            commits: 0,
            tables: Tables::default(),
            events: Vec::new(),
        };
        Self { kept: Arc::new(Mutex::new(kept)), term: 0 }
    }

    /// The same journal, as a process that starts again opens it. From here on this store writes nothing:
    /// two processes never have one journal.
    #[must_use]
    pub fn reopen(&self) -> Self {
        let mut kept = self.kept();
        kept.term += 1;
        kept.faults.clear();
        Self { kept: Arc::clone(&self.kept), term: kept.term }
    }

    /// The journal as it is now, kept elsewhere: what happens to this one does not happen to it.
    #[must_use]
    pub fn backup(&self) -> Self {
        let kept = self.kept();
        let kept = Kept {
            identity: kept.identity.clone(),
            term: 0,
            faults: VecDeque::new(),
            commits: kept.commits,
            tables: kept.tables.clone(),
            events: kept.events.clone(),
        };
        Self { kept: Arc::new(Mutex::new(kept)), term: 0 }
    }

    /// As [`EmbeddedStore::begin_lineage`](super::EmbeddedStore::begin_lineage).
    ///
    /// # Errors
    /// As it was told to fail.
    pub fn begin_lineage(&self, lineage: &str, writes: &[Write]) -> Result<(), CommitError> {
        self.write(|kept| {
            lineage.clone_into(&mut kept.identity.lineage);
            writes.iter().for_each(|write| kept.tables.apply(write));
        })
    }

    /// Lets `fault` happen at the next write; several happen one after another.
    pub fn inject(&self, fault: Fault) {
        self.kept().faults.push_back(fault);
    }

    /// Forgets the faults that have not happened yet.
    pub fn heal(&self) {
        self.kept().faults.clear();
    }

    /// How many writes were kept so far.
    #[must_use]
    pub fn commits(&self) -> u64 {
        self.kept().commits
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, change: impl FnOnce(&mut Kept)) -> Result<(), CommitError> {
        let mut kept = self.kept();
        if kept.term != self.term {
            return Err(CommitError::Unknown("this store was stopped".to_owned()));
        }
        let fault = kept.faults.pop_front();
        if matches!(fault, None | Some(Fault::Crash { kept: true })) {
            change(&mut kept);
            kept.commits += 1;
        }
        match fault {
            None => Ok(()),
            Some(Fault::Failed) => Err(CommitError::Failed("it was told to fail".to_owned())),
            Some(Fault::Crash { .. }) => {
                kept.term += 1;
                Err(CommitError::Unknown("it was told to stop within the commit".to_owned()))
            }
        }
    }

    fn read<T>(&self, of: impl FnOnce(&Kept) -> T) -> Result<T, OpenError> {
        let kept = self.kept();
        if kept.term != self.term {
            return Err(OpenError::Locked { path: "memory".to_owned() });
        }
        Ok(of(&kept))
    }
}

impl Store for MemoryStore {
    fn identity(&self) -> Identity {
        self.kept().identity.clone()
    }

    fn load(&self) -> Result<Contents, OpenError> {
        self.read(|kept| Contents {
            models: kept.tables.models.values().cloned().collect(),
            versions: kept.tables.versions.values().cloned().collect(),
            copies: kept.tables.copies.values().cloned().collect(),
            sizes: kept.tables.sizes.values().cloned().collect(),
            servers: kept.tables.servers.values().cloned().collect(),
            counters: kept.tables.counters.clone(),
        })
    }

    fn load_model(&self, name: &ModelName) -> Result<Option<ModelRows>, OpenError> {
        self.read(|kept| {
            let versions = kept.tables.versions.values().filter(|row| row.model == *name).cloned().collect();
            let copies = kept.tables.copies.values().filter(|row| row.model == *name).cloned().collect();
            let sizes = kept.tables.sizes.values().filter(|row| row.model == *name).cloned().collect();
            kept.tables.models.get(name).map(|model| ModelRows { model: model.clone(), versions, copies, sizes })
        })
    }

    fn load_server(&self, name: &ServerName) -> Result<Option<ServerRow>, OpenError> {
        self.read(|kept| kept.tables.servers.get(name).cloned())
    }

    fn commit(&self, writes: &[Write]) -> Result<(), CommitError> {
        if writes.is_empty() {
            return Ok(());
        }
        self.write(|kept| writes.iter().for_each(|write| kept.tables.apply(write)))
    }

    fn save_events(&self, events: &[Vec<u8>]) -> Result<(), CommitError> {
        self.write(|kept| kept.events = events.to_vec())
    }

    fn load_events(&self) -> Result<Vec<Vec<u8>>, OpenError> {
        self.read(|kept| kept.events.clone())
    }
}
