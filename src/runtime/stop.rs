//! The word to a model that runs that nobody waits for its answer any more.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Whether a run is to end, told by its caller's end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    said: bool,
    end: Option<Box<dyn FnOnce() + Send>>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("said", &self.said).finish_non_exhaustive()
    }
}

impl Stop {
    /// Whoever waits for the answer. When that goes, the word is said.
    pub(super) fn caller(&self) -> Caller {
        Caller(self.clone())
    }

    /// Whether the word was said.
    pub(super) fn said(&self) -> bool {
        self.inner().said
    }

    /// Does `end` when the word is said, at once if it was; and not any more once what this gives is gone. `end` must not
    /// take long.
    pub(super) fn heed(&self, end: impl FnOnce() + Send + 'static) -> Heeding<'_> {
        let mut inner = self.inner();
        if inner.said {
            end();
        } else {
            inner.end = Some(Box::new(end));
        }
        Heeding(self)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Stop::caller`].
#[derive(Debug)]
pub(super) struct Caller(Stop);

impl Drop for Caller {
    fn drop(&mut self) {
        let mut inner = self.0.inner();
        inner.said = true;
        if let Some(end) = inner.end.take() {
            end();
        }
    }
}

/// See [`Stop::heed`].
#[derive(Debug)]
pub(super) struct Heeding<'a>(&'a Stop);

impl Drop for Heeding<'_> {
    fn drop(&mut self) {
        self.0.inner().end = None;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    use super::*;

    #[test]
    fn the_end_of_a_caller_is_told_once_to_whoever_heeds_it() {
        let told = Arc::new(AtomicU32::new(0));
        let count = || {
            let told = Arc::clone(&told);
            move || {
                told.fetch_add(1, SeqCst);
            }
        };
        let stop = Stop::default();
        let caller = stop.caller();
        drop(stop.heed(count()));
        assert!(!stop.said());
        let heeding = stop.heed(count());
        drop(caller);
        drop(heeding);
        assert!(stop.said());
        assert_eq!(told.load(SeqCst), 1, "not the one that is over");
        drop(stop.heed(count()));
        assert_eq!(told.load(SeqCst), 2, "at once");
    }
}
