//! The process's one clock.

use std::{fmt, time::SystemTime};

use crate::domain::time::Instant;

/// Tells the time. Nothing else in the process may.
pub trait Clock: Send + Sync + fmt::Debug {
    /// The present moment. Never goes back.
    fn now(&self) -> Instant;
}

/// The wall clock read once, and tokio's steady clock from there: it never goes back, and it stands still
/// when a simulation makes tokio's stand still.
#[derive(Debug)]
pub struct SystemClock {
    epoch: Instant,
    started: tokio::time::Instant,
}

impl SystemClock {
    /// A clock that starts from the wall clock's present.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
    pub fn new() -> Self {
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self::starting_at(Instant::from_micros(u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX)))
    }

    /// A clock that starts from `epoch`.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the steady clock")]
    pub fn starting_at(epoch: Instant) -> Self {
        Self { epoch, started: tokio::time::Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        self.epoch + self.started.elapsed()
    }
}
