//! What a journal's file is, for people; and opening one that must be there already.
//!
//! The rule of this module: looking changes nothing. A file that was not closed well is repaired in memory, and
//! one that a scheduler has open is not read at all.

use std::{
    collections::BTreeMap,
    fmt, io,
    ops::Bound,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use redb::{BackendError, StorageBackend, backends::FileBackend};

use super::embedded::{EmbeddedStore, OpenBackend, OpenOptions};
use crate::{
    domain::record::Contents,
    ports::{Identity, OpenError, Store as _},
};

/// What a journal's file holds.
#[derive(Debug)]
pub struct Inspected {
    /// Bytes of the file.
    pub bytes: u64,
    /// The schema in which it was written.
    pub schema: u64,
    /// Whose journal it is.
    pub identity: Identity,
    /// Everything in it.
    pub contents: Contents,
}

/// Reads the journal at `options.path`, and leaves it as it is. Blocks.
///
/// # Errors
/// When there is none, a process has it open, or it can't be read.
pub fn inspect(options: &OpenOptions) -> Result<Inspected, OpenError> {
    let path = options.path.clone();
    let name = path.display().to_string();
    let missing = || OpenError::Missing { path: name.clone() };
    let bytes = match std::fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing()),
        Err(error) => return Err(OpenError::Io { path: name, problem: error.to_string() }),
        Ok(found) if found.is_file() && found.len() == 0 => return Err(missing()),
        Ok(found) => found.len(),
    };
    let backend: OpenBackend = Box::new(move || Ok(Box::new(InMemory::over(&path)?)));
    // What was being made when its process was killed is no journal yet, and becomes one in memory only.
    let nobody = || Identity { cluster: String::new(), lineage: String::new() };
    let store = EmbeddedStore::open_on(name.clone(), backend, options.cache_bytes, nobody)?;
    let identity = store.identity();
    if identity == nobody() {
        return Err(missing());
    }
    Ok(Inspected { bytes, schema: store.written_in(), identity, contents: store.load()? })
}

/// Opens the journal at `options.path`, which has to be there.
///
/// # Errors
/// As [`inspect`] and [`EmbeddedStore::open`].
pub fn open_existing(options: &OpenOptions) -> Result<EmbeddedStore, OpenError> {
    let Inspected { identity, .. } = inspect(options)?;
    EmbeddedStore::open(options, || identity)
}

/// Bytes of one piece that was written.
const PIECE: usize = 4096;

/// A file whose changes stay in memory.
struct InMemory {
    file: FileBackend,
    changed: Mutex<Changed>,
}

struct Changed {
    len: u64,
    /// Bytes of the file that are still part of it.
    kept: u64,
    /// Pieces by their number.
    pieces: BTreeMap<u64, Box<[u8; PIECE]>>,
}

impl fmt::Debug for InMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InMemory").field("file", &self.file).finish_non_exhaustive()
    }
}

impl InMemory {
    fn over(path: &Path) -> io::Result<Self> {
        // Written to never; a lock that keeps a scheduler out needs the right to.
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
        let len = file.metadata()?.len();
        let file = FileBackend::new(file).map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Self { file, changed: Mutex::new(Changed { len, kept: len, pieces: BTreeMap::new() }) })
    }

    fn changed(&self) -> MutexGuard<'_, Changed> {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the file has at `offset`; zeros beyond what is kept of it.
    fn original(&self, kept: u64, offset: u64, out: &mut [u8]) -> io::Result<()> {
        out.fill(0);
        let there = kept.saturating_sub(offset).min(out.len() as u64);
        self.file.read(offset, &mut out[..size(there)])
    }
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// The pieces that lie in a range: each with its number, and where it and the range have in common.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>, std::ops::Range<usize>)> {
    let (piece, end) = (PIECE as u64, offset + len as u64);
    (offset / piece..end.div_ceil(piece)).map(move |number| {
        let (from, to) = ((number * piece).max(offset), ((number + 1) * piece).min(end));
        let within = size(from - number * piece)..size(to - number * piece);
        (number, within, size(from - offset)..size(to - offset))
    })
}

impl StorageBackend for InMemory {
    fn len(&self) -> io::Result<u64> {
        Ok(self.changed().len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let changed = self.changed();
        if offset + out.len() as u64 > changed.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.original(changed.kept, offset, out)?;
        for (number, within, common) in pieces(offset, out.len()) {
            if let Some(piece) = changed.pieces.get(&number) {
                out[common].copy_from_slice(&piece[within]);
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut changed = self.changed();
        // What is cut off must come back as zeros.
        for (number, within, _) in pieces(len, size(changed.len.saturating_sub(len))) {
            if let Some(piece) = changed.pieces.get_mut(&number) {
                piece[within].fill(0);
            }
        }
        (changed.len, changed.kept) = (len, changed.kept.min(len));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut changed = self.changed();
        changed.len = changed.len.max(offset + data.len() as u64);
        for (number, within, common) in pieces(offset, data.len()) {
            if !changed.pieces.contains_key(&number) {
                let mut piece = Box::new([0; PIECE]);
                self.original(changed.kept, number * PIECE as u64, piece.as_mut_slice())?;
                changed.pieces.insert(number, piece);
            }
            if let Some(piece) = changed.pieces.get_mut(&number) {
                piece[within].copy_from_slice(&data[common]);
            }
        }
        Ok(())
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}
