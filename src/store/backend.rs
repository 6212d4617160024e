//! Between redb and the file: the header goes out last.
//!
//! redb makes a commit by writing its pages and then, in one write to the file's first page, the header that
//! names them; between two syncs the order of those writes is free. Holding the header back until the sync
//! keeps to redb's contract and adds a fact that redb can't tell: a commit that failed before its header was
//! sent has not happened. A full disk fails page writes, so it fails commits provably, and nothing of the
//! commit that failed is in the file's header.

use std::{
    fmt, io,
    ops::Bound,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use redb::{BackendError, StorageBackend};

/// Whether a header was handed to the operating system since [`Sent::forget`].
#[derive(Clone, Debug, Default)]
pub(super) struct Sent(Arc<AtomicBool>);

impl Sent {
    /// Starts to watch anew.
    pub(super) fn forget(&self) {
        self.0.store(false, Ordering::SeqCst);
    }

    /// Whether one was sent.
    pub(super) fn get(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Writes that start below this offset are the header's; every other page starts above it.
const HEADER_END: u64 = 512;

/// A backend that sends the header last.
pub(super) struct HeaderLast {
    inner: Box<dyn StorageBackend>,
    held: Mutex<Option<Held>>,
    sent: Sent,
}

#[derive(Debug)]
struct Held {
    offset: u64,
    data: Vec<u8>,
}

impl fmt::Debug for HeaderLast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeaderLast").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl HeaderLast {
    pub(super) fn new(inner: Box<dyn StorageBackend>) -> (Self, Sent) {
        let sent = Sent::default();
        (Self { inner, held: Mutex::new(None), sent: sent.clone() }, sent)
    }

    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, held: &mut Option<Held>) -> io::Result<()> {
        if let Some(header) = held.as_ref() {
            self.sent.0.store(true, Ordering::SeqCst);
            self.inner.write(header.offset, &header.data)?;
            *held = None;
        }
        Ok(())
    }
}

impl StorageBackend for HeaderLast {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.inner.read(offset, out)?;
        if let Some(header) = self.held().as_ref() {
            let (from, to) = (header.offset, header.offset + header.data.len() as u64);
            let (first, last) = (offset.max(from), (offset + out.len() as u64).min(to));
            if first < last {
                let at = |position: u64, base: u64| usize::try_from(position - base).unwrap_or(usize::MAX);
                out[at(first, offset)..at(last, offset)].copy_from_slice(&header.data[at(first, from)..at(last, from)]);
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.send(&mut self.held())?;
        self.inner.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if offset >= HEADER_END {
            return self.inner.write(offset, data);
        }
        let mut held = self.held();
        match held.as_mut() {
            Some(header) if header.offset == offset && header.data.len() == data.len() => {
                header.data.copy_from_slice(data);
            }
            _ => {
                // A header of another shape: redb writes none, and if it did, the older goes out first.
                self.send(&mut held)?;
                *held = Some(Held { offset, data: data.to_vec() });
            }
        }
        Ok(())
    }

    fn close(&self) -> io::Result<()> {
        // redb syncs when it closes well. What is still held belongs to a commit that failed.
        *self.held() = None;
        self.inner.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.query_lock_range(start, end)
    }
}
