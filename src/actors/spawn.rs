//! Where actors run.

use std::{
    fmt,
    sync::atomic::{AtomicUsize, Ordering},
};

use actix::{Actor, Addr, Context};
use actix_rt::ArbiterHandle;

/// Decides on which thread an actor runs. Placement, models and servers never share one where there is a
/// choice: a flooded actor starves every other on its arbiter.
pub enum Spawner {
    /// All on the thread that starts them: a simulation, or a test.
    Local,
    /// On threads of their own.
    Arbiters(Arbiters),
}

/// Threads for actors.
pub struct Arbiters {
    core: [ArbiterHandle; 4],
    models: Vec<ArbiterHandle>,
    next: AtomicUsize,
}

/// What kind of work an actor does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Starting and watching the others.
    Supervision,
    /// Deciding where copies go.
    Placement,
    /// Writing, and telling gateways.
    Journal,
    /// Speaking with agents.
    Servers,
    /// Looking after models.
    Models,
}

impl Spawner {
    /// Four threads for the actors that are one of a kind, and `models` for those of models.
    ///
    /// # Panics
    /// Outside a running actix system.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "the one place that makes arbiters")]
    pub fn arbiters(models: usize) -> Self {
        let arbiter = || actix_rt::Arbiter::new().handle();
        Self::Arbiters(Arbiters {
            core: [arbiter(), arbiter(), arbiter(), arbiter()],
            models: (0..models.max(1)).map(|_| arbiter()).collect(),
            next: AtomicUsize::new(0),
        })
    }

    /// Starts an actor.
    pub(super) fn start<A>(&self, work: Work, make: impl FnOnce() -> A + Send + 'static) -> Addr<A>
    where
        A: Actor<Context = Context<A>> + Send,
    {
        let Self::Arbiters(arbiters) = self else { return make().start() };
        let handle = match work {
            Work::Supervision => &arbiters.core[0],
            Work::Placement => &arbiters.core[1],
            Work::Journal => &arbiters.core[2],
            Work::Servers => &arbiters.core[3],
            Work::Models => {
                let next = arbiters.next.fetch_add(1, Ordering::Relaxed);
                &arbiters.models[next % arbiters.models.len()]
            }
        };
        A::start_in_arbiter(handle, |_| make())
    }
}

impl fmt::Debug for Arbiters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arbiters({})", self.models.len())
    }
}

impl fmt::Debug for Spawner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("Local"),
            Self::Arbiters(arbiters) => arbiters.fmt(f),
        }
    }
}
