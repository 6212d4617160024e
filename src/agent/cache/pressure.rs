//! Who waits for memory.
//!
//! The rule of this module: whoever frees memory pays nothing while nobody waits.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::SeqCst},
};

use tokio::sync::Notify;

/// Wakes those who wait for memory whenever some may have become free.
#[derive(Debug, Default)]
pub(crate) struct Pressure {
    waiting: AtomicU32,
    changed: Notify,
}

impl Pressure {
    /// Something may have changed in favour of those who wait.
    pub(crate) fn eased(&self) {
        if self.waiting.load(SeqCst) > 0 {
            self.changed.notify_waiters();
        }
    }

    /// Counts a waiter for as long as the guard lives. From then on no release goes unnoticed.
    pub(crate) fn enter(self: &Arc<Self>) -> Waiting {
        self.waiting.fetch_add(1, SeqCst);
        Waiting(Arc::clone(self))
    }
}

/// One waiter for memory.
#[derive(Debug)]
pub(crate) struct Waiting(Arc<Pressure>);

impl Waiting {
    pub(crate) fn changed(&self) -> &Notify {
        &self.0.changed
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, SeqCst);
    }
}
