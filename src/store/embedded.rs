//! The journal in one file, through redb.
//!
//! What the outcome of a commit is built on. redb commits are atomic: reopened after anything, the file holds
//! a commit whole or not at all, and holds it once `commit` returned well. When `commit` fails, redb says only
//! that the commit "may already have become durable". [`backend`](super::backend) says more: if no header was
//! sent since the commit began, it can't be in the file, and the commit is `Failed`; otherwise it is `Unknown`.
//!
//! After any failure of its file redb refuses to go on with the open database, reads included. A store whose
//! commit `Failed` therefore opens its file anew at the next call, and checks by the number of commits that it
//! is as it left it. After an `Unknown` it never does: the process must exit and read everything again.

use std::{
    fmt, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use redb::{Builder, Database, ReadableDatabase, ReadableTable, StorageBackend, backends::FileBackend};

use super::{
    backend::{HeaderLast, Sent},
    schema::{self, EVENTS, META, MIGRATIONS, RowError, SCHEMA},
};
use crate::{
    domain::{
        names::{ModelName, ServerName},
        record::{Contents, ServerRow, Write},
    },
    ports::{CommitError, Identity, ModelRows, OpenError, Store},
};

/// Opens what a journal's bytes are kept on, as often as it must be opened anew.
pub type OpenBackend = Box<dyn Fn() -> io::Result<Box<dyn StorageBackend>> + Send + Sync>;

/// How to open a journal.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The file. It and the directories above it are made when they are missing.
    pub path: PathBuf,
    /// Bytes of memory for redb's cache of the file.
    pub cache_bytes: usize,
}

/// The journal in one file.
pub struct EmbeddedStore {
    name: String,
    cache_bytes: usize,
    backend: OpenBackend,
    identity: Identity,
    schema: u64,
    state: Mutex<State>,
}

enum State {
    Open(Opened),
    /// A commit failed without a trace; the file must be opened anew. Holds the commits before it.
    Stale(u64),
    /// Not known any more; and why.
    Lost(String),
}

struct Opened {
    database: Database,
    sent: Sent,
    commits: u64,
}

impl fmt::Debug for EmbeddedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedStore")
            .field("name", &self.name)
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

impl EmbeddedStore {
    /// Opens the journal at `options.path`, and makes a new one with `new_identity` where there is none. An
    /// empty file, and one whose making was interrupted, count as none. Blocks; after a crash for as long as it
    /// takes to read the whole file.
    ///
    /// # Errors
    /// When another process has it, a later Wharf wrote it, it is damaged, or the system refuses.
    pub fn open(options: &OpenOptions, new_identity: impl FnOnce() -> Identity) -> Result<Self, OpenError> {
        let path = options.path.clone();
        let name = path.display().to_string();
        prepare(&path).map_err(|error| io_error(&name, &error))?;
        let backend: OpenBackend = Box::new(move || {
            let file = open_file(&path)?;
            let backend = FileBackend::new(file).map_err(|error| io::Error::other(error.to_string()))?;
            Ok(Box::new(backend))
        });
        Self::open_on(name, backend, options.cache_bytes, new_identity)
    }

    /// Opens the journal that lies on a backend of the caller's, which goes by `name` in errors.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(
        name: String,
        backend: OpenBackend,
        cache_bytes: usize,
        new_identity: impl FnOnce() -> Identity,
    ) -> Result<Self, OpenError> {
        let (database, sent) = open_database(&name, &backend, cache_bytes)?;
        let attempt = catch_unwind(AssertUnwindSafe(|| settle(&name, &database, new_identity)));
        let Meta { identity, commits, schema } =
            attempt.unwrap_or_else(|_| Err(damaged(&name, "reading it failed")))?;
        let state = Mutex::new(State::Open(Opened { database, sent, commits }));
        Ok(Self { name, cache_bytes, backend, identity, schema, state })
    }

    /// Makes it the journal of another history, of this lineage, with `writes` in the same transaction. Blocks.
    ///
    /// # Errors
    /// As [`commit`](Store::commit).
    pub fn begin_lineage(&mut self, lineage: &str, writes: &[Write]) -> Result<(), CommitError> {
        self.write(|transaction| {
            put_meta(transaction, "lineage", lineage)?;
            schema::apply(transaction, writes)
        })?;
        lineage.clone_into(&mut self.identity.lineage);
        Ok(())
    }

    /// The schema that it had when it was opened.
    pub(super) const fn written_in(&self) -> u64 {
        self.schema
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The open database; opens it anew when the last commit failed.
    fn opened<'a>(&self, state: &'a mut State) -> Result<&'a mut Opened, OpenError> {
        let gone = |problem: &str| OpenError::Io { path: self.name.clone(), problem: problem.to_owned() };
        if let State::Stale(commits) = *state {
            let (database, sent) = open_database(&self.name, &self.backend, self.cache_bytes)?;
            let found = read_meta(&self.name, &database)?
                .ok_or_else(|| damaged(&self.name, "it was emptied while it was in use"))?;
            let (identity, found) = (found.identity, found.commits);
            if identity == self.identity && found == commits {
                *state = State::Open(Opened { database, sent, commits });
            } else {
                *state = State::Lost(format!("it had {commits} commits, and when opened anew {found}"));
            }
        }
        match state {
            State::Open(opened) => Ok(opened),
            State::Stale(_) => Err(gone("its last write failed")),
            State::Lost(problem) => Err(gone(problem)),
        }
    }

    fn write(&self, change: impl FnOnce(&redb::WriteTransaction) -> Result<(), RowError>) -> Result<(), CommitError> {
        let mut state = self.state();
        if let Err(error) = self.opened(&mut state) {
            return Err(match &*state {
                State::Lost(problem) => CommitError::Unknown(problem.clone()),
                State::Open(_) | State::Stale(_) => CommitError::Failed(error.to_string()),
            });
        }
        // Whatever unwinds from here leaves the store lost.
        let taken = std::mem::replace(&mut *state, State::Lost("a commit was cut short".to_owned()));
        let State::Open(mut opened) = taken else {
            return Err(CommitError::Unknown("the store is not open".to_owned()));
        };
        let before = opened.commits;
        match opened.write(change) {
            Ok(()) => {
                *state = State::Open(opened);
                Ok(())
            }
            Err(problem) if opened.sent.get() => {
                *state = State::Lost(problem.clone());
                Err(CommitError::Unknown(problem))
            }
            Err(problem) => {
                drop(opened);
                *state = State::Stale(before);
                Err(CommitError::Failed(problem))
            }
        }
    }

    fn read<T>(&self, of: impl FnOnce(&redb::ReadTransaction) -> Result<T, RowError>) -> Result<T, OpenError> {
        let mut state = self.state();
        let opened = self.opened(&mut state)?;
        // redb checks pages as it needs them, and may panic on one that something else has overwritten.
        let read = catch_unwind(AssertUnwindSafe(|| of(&opened.database.begin_read()?)));
        let read = read.unwrap_or_else(|_| {
            Err(RowError::Store(redb::Error::Corrupted("a page does not hold what it should".to_owned())))
        });
        read.map_err(|error| match error {
            RowError::Store(error) => store_error(&self.name, error),
            other => damaged(&self.name, &other.to_string()),
        })
    }
}

impl Opened {
    /// One transaction. What it failed with is the text; whether it can have happened, `self.sent`.
    fn write(&mut self, change: impl FnOnce(&redb::WriteTransaction) -> Result<(), RowError>) -> Result<(), String> {
        self.sent.forget();
        let transaction = self.database.begin_write().map_err(|error| error.to_string())?;
        let commits = self.commits + 1;
        let changed = change(&transaction).and_then(|()| Ok(put_meta(&transaction, "commits", &commits.to_string())?));
        if let Err(error) = changed {
            // Rolling back may fail too, and no failure of it can make a commit.
            drop(transaction);
            return Err(error.to_string());
        }
        transaction.commit().map_err(|error| error.to_string())?;
        self.commits = commits;
        Ok(())
    }
}

impl Store for EmbeddedStore {
    fn identity(&self) -> Identity {
        self.identity.clone()
    }

    fn load(&self) -> Result<Contents, OpenError> {
        self.read(schema::read)
    }

    fn load_model(&self, name: &ModelName) -> Result<Option<ModelRows>, OpenError> {
        self.read(|transaction| schema::read_model(transaction, name))
    }

    fn load_server(&self, name: &ServerName) -> Result<Option<ServerRow>, OpenError> {
        self.read(|transaction| schema::read_server(transaction, name))
    }

    fn commit(&self, writes: &[Write]) -> Result<(), CommitError> {
        if writes.is_empty() {
            return Ok(());
        }
        self.write(|transaction| schema::apply(transaction, writes))
    }

    fn save_events(&self, events: &[Vec<u8>]) -> Result<(), CommitError> {
        self.write(|transaction| {
            transaction.delete_table(EVENTS)?;
            let mut table = transaction.open_table(EVENTS)?;
            for (place, event) in (0_u64..).zip(events) {
                table.insert(place, event.as_slice())?;
            }
            Ok(())
        })
    }

    fn load_events(&self) -> Result<Vec<Vec<u8>>, OpenError> {
        self.read(|transaction| {
            let table = transaction.open_table(EVENTS)?;
            table.iter()?.map(|entry| Ok(entry?.1.value().to_vec())).collect()
        })
    }
}

/// Makes the directories and, where there is none, the file, for its owner alone: specs may hold credentials.
fn prepare(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory)?;
    if path.is_dir() {
        return Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a directory, and must be a file"));
    }
    if !path.exists() {
        drop(open_file(path)?);
        // A new file is only as durable as its directory's entry.
        std::fs::File::open(directory)?.sync_all()?;
    }
    clear_interrupted(path)
}

fn open_file(path: &Path) -> io::Result<std::fs::File> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// redb writes its magic number last when it makes a file, and refuses a file without one. A file that is
/// all zeros but for the header that precedes the magic number was never a journal: it is emptied.
fn clear_interrupted(path: &Path) -> io::Result<()> {
    use std::io::Read as _;
    // redb makes a file of some 4 MiB; a larger one is another story.
    const MADE: u64 = 16 << 20;
    const MAGIC: usize = 9;
    let mut file = open_file(path)?;
    let len = file.metadata()?.len();
    if len == 0 || len > MADE {
        return Ok(());
    }
    let zeros = |range: &[u8]| range.iter().all(|byte| *byte == 0);
    let mut bytes = Vec::new();
    (&mut file).take(512).read_to_end(&mut bytes)?;
    if !zeros(&bytes[..bytes.len().min(MAGIC)]) {
        return Ok(());
    }
    bytes.clear();
    file.read_to_end(&mut bytes)?;
    if !zeros(&bytes) {
        return Ok(());
    }
    let backend = FileBackend::new(file).map_err(|error| io::Error::other(error.to_string()))?;
    let all = (std::ops::Bound::Unbounded, std::ops::Bound::Unbounded);
    // Another process may be making it at this moment; then the real opening finds it locked.
    if backend.try_lock_range(all.0, all.1).map_err(io::Error::from)? {
        let mut magic = [0; MAGIC];
        backend.read(0, &mut magic)?;
        if zeros(&magic) {
            backend.set_len(0)?;
        }
        backend.unlock_range(all.0, all.1).map_err(io::Error::from)?;
    }
    backend.close()
}

fn open_database(name: &str, backend: &OpenBackend, cache_bytes: usize) -> Result<(Database, Sent), OpenError> {
    let (backend, sent) = HeaderLast::new(backend().map_err(|error| io_error(name, &error))?);
    let opened = catch_unwind(AssertUnwindSafe(|| {
        let mut builder = Builder::new();
        builder.set_cache_size(cache_bytes);
        builder.create_with_backend(backend)
    }));
    // redb may panic on a file that something else has altered.
    let opened = opened.unwrap_or_else(|_| Err(redb::StorageError::Corrupted("it holds no sound pages".into()).into()));
    let database = opened.map_err(|error| store_error(name, error.into()))?;
    Ok((database, sent))
}

/// Reads whose journal it is and brings it to the current schema, or makes it a journal when it is new.
fn settle(name: &str, database: &Database, new_identity: impl FnOnce() -> Identity) -> Result<Meta, OpenError> {
    let failed = |error: redb::Error| store_error(name, error);
    if let Some(meta) = read_meta(name, database)? {
        return Ok(meta);
    }
    let identity = new_identity();
    let transaction = database.begin_write().map_err(|error| failed(error.into()))?;
    schema::create_tables(&transaction).map_err(failed)?;
    for (key, value) in [
        ("schema", SCHEMA.to_string().as_str()),
        ("cluster", &identity.cluster),
        ("lineage", &identity.lineage),
        ("commits", "0"),
    ] {
        put_meta(&transaction, key, value).map_err(|error| failed(error.into()))?;
    }
    transaction.commit().map_err(|error| failed(error.into()))?;
    Ok(Meta { identity, commits: 0, schema: SCHEMA })
}

/// What a journal says of itself.
struct Meta {
    identity: Identity,
    commits: u64,
    /// In which it was written.
    schema: u64,
}

/// What it says of itself; nothing when the database is new. Migrates.
fn read_meta(name: &str, database: &Database) -> Result<Option<Meta>, OpenError> {
    let failed = |error: redb::Error| store_error(name, error);
    let read = |key: &str| -> Result<Option<String>, redb::Error> {
        let table = database.begin_read()?.open_table(META)?;
        Ok(table.get(key)?.map(|value| value.value().to_owned()))
    };
    let schema = match read("schema") {
        Ok(schema) => schema,
        Err(redb::Error::TableDoesNotExist(_)) => {
            let tables = database.begin_read().map_err(|error| failed(error.into()))?;
            let mut tables = tables.list_tables().map_err(|error| failed(error.into()))?;
            return match tables.next() {
                None => Ok(None),
                Some(_) => Err(damaged(name, "it is a redb file, and not a journal of wharf")),
            };
        }
        Err(error) => return Err(failed(error)),
    };
    let number = |text: Option<String>, what: &str| {
        text.and_then(|text| text.parse::<u64>().ok())
            .ok_or_else(|| damaged(name, &format!("its {what} is not a number")))
    };
    let found = number(schema, "schema")?;
    if found > SCHEMA {
        return Err(OpenError::Newer { path: name.to_owned(), found, known: SCHEMA });
    }
    let first = usize::try_from(found).ok().and_then(|found| found.checked_sub(1));
    let pending = first.and_then(|first| MIGRATIONS.get(first..)).ok_or_else(|| damaged(name, "it has no schema"))?;
    for (to, migration) in (found + 1..).zip(pending) {
        let transaction = database.begin_write().map_err(|error| failed(error.into()))?;
        migration(&transaction).map_err(failed)?;
        put_meta(&transaction, "schema", &to.to_string()).map_err(|error| failed(error.into()))?;
        transaction.commit().map_err(|error| failed(error.into()))?;
    }
    let text =
        |key: &str| read(key).map_err(failed)?.ok_or_else(|| damaged(name, &format!("it does not say its {key}")));
    let identity = Identity { cluster: text("cluster")?, lineage: text("lineage")? };
    let commits = number(read("commits").map_err(failed)?, "number of commits")?;
    Ok(Some(Meta { identity, commits, schema: found }))
}

fn put_meta(transaction: &redb::WriteTransaction, key: &str, value: &str) -> Result<(), redb::TableError> {
    transaction.open_table(META)?.insert(key, value)?;
    Ok(())
}

fn damaged(name: &str, problem: &str) -> OpenError {
    OpenError::Damaged { path: name.to_owned(), problem: problem.to_owned() }
}

fn io_error(name: &str, error: &io::Error) -> OpenError {
    OpenError::Io { path: name.to_owned(), problem: error.to_string() }
}

fn store_error(name: &str, error: redb::Error) -> OpenError {
    match error {
        redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => {
            OpenError::Locked { path: name.to_owned() }
        }
        // How redb says that it found something else than it wrote: not its magic number, or too few bytes.
        redb::Error::Io(error) if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) => {
            damaged(name, &error.to_string())
        }
        redb::Error::Io(error) => io_error(name, &error),
        redb::Error::PreviousIo | redb::Error::DatabaseClosed => {
            OpenError::Io { path: name.to_owned(), problem: error.to_string() }
        }
        other => damaged(name, &other.to_string()),
    }
}
