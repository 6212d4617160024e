//! Where the work is done that would hold up an async thread.
//!
//! Inline, it is done at once on the caller's thread, so that a simulation on one thread gives the same result
//! each time. In a pool, so many jobs run at once, so many more wait, and what is over is refused. Jobs that have to
//! take turns wait for theirs outside of the pool, so that those of one model never keep all of it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::AbortOnDropHandle;

use super::failure::{Failure, Kind};

/// Where models are loaded and run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Execution {
    /// On the thread of whoever calls, which waits meanwhile.
    Inline,
    /// On tokio's blocking threads.
    Pool {
        /// How many inferences run at once, and apart from them how many loads; at least one of each.
        threads: usize,
    },
}

/// Whose turn it is of jobs that can't be done at once. Half of the jobs that may wait for the pool may wait for one turn.
#[derive(Debug)]
pub(super) struct Turn {
    seat: Arc<Semaphore>,
    waiting: AtomicUsize,
}

impl Default for Turn {
    fn default() -> Self {
        Self { seat: Arc::new(Semaphore::new(1)), waiting: AtomicUsize::new(0) }
    }
}

/// Runs jobs of one kind.
#[derive(Debug)]
pub(super) struct Executor {
    pool: Option<Arc<Semaphore>>,
    waiting: Arc<AtomicUsize>,
    most_waiting: usize,
}

/// Those who wait for an executor's pool, as its jobs may see them.
#[derive(Clone, Debug, Default)]
pub(super) struct Queue(Arc<AtomicUsize>);

impl Queue {
    /// Whether anybody waits for a job to end.
    pub(super) fn is_empty(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }

    #[cfg(test)]
    pub(super) fn of(waiting: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(waiting)))
    }
}

impl Executor {
    /// Of whose jobs at most `most_waiting` wait for their turn.
    pub(super) fn new(execution: Execution, most_waiting: usize) -> Self {
        let pool = match execution {
            Execution::Inline => None,
            Execution::Pool { threads } => Some(Arc::new(Semaphore::new(threads.clamp(1, Semaphore::MAX_PERMITS)))),
        };
        Self { pool, waiting: Arc::default(), most_waiting }
    }

    /// Who waits for its pool.
    pub(super) fn queue(&self) -> Queue {
        Queue(Arc::clone(&self.waiting))
    }

    /// Runs `job`. Dropping the future gives the job up unless it has begun.
    ///
    /// # Errors
    /// The job's own; or too many are waiting.
    pub(super) async fn run<T, F>(&self, job: F) -> Result<T, Failure>
    where
        F: FnOnce() -> Result<T, Failure> + Send + 'static,
        T: Send + 'static,
    {
        self.run_in(None, job).await
    }

    /// The same, once it is the job's `turn`.
    ///
    /// # Errors
    /// The job's own; or too many are waiting.
    pub(super) async fn run_in<T, F>(&self, turn: Option<&Turn>, job: F) -> Result<T, Failure>
    where
        F: FnOnce() -> Result<T, Failure> + Send + 'static,
        T: Send + 'static,
    {
        let Some(pool) = &self.pool else {
            return job();
        };
        let turn = match turn {
            Some(turn) => Some(acquire(&turn.seat, &turn.waiting, self.most_waiting.div_ceil(2)).await?),
            None => None,
        };
        let permit = acquire(pool, &self.waiting, self.most_waiting).await?;
        let job = tokio::task::spawn_blocking(move || {
            // Also when nobody waits any more: what they stand for is taken until the job has ended.
            let _held = (permit, turn);
            job()
        });
        AbortOnDropHandle::new(job)
            .await
            .unwrap_or_else(|error| Err(Failure::new(Kind::Internal, format!("the job ended early: {error}"))))
    }
}

/// One of `permits`, which at most `most` wait for, counted in `waiting`.
async fn acquire(
    permits: &Arc<Semaphore>,
    waiting: &AtomicUsize,
    most: usize,
) -> Result<OwnedSemaphorePermit, Failure> {
    if let Ok(permit) = Arc::clone(permits).try_acquire_owned() {
        return Ok(permit);
    }
    let _place = queue(waiting, most)?;
    let acquired = Arc::clone(permits).acquire_owned().await;
    acquired.map_err(|_| Failure::new(Kind::Internal, "the runtime is stopping"))
}

fn queue(waiting: &AtomicUsize, most: usize) -> Result<Place<'_>, Failure> {
    let place = Place(waiting);
    if waiting.fetch_add(1, Ordering::Relaxed) >= most {
        return Err(Failure::new(Kind::Busy, format!("{most} requests are waiting for the models already; try later")));
    }
    Ok(place)
}

/// A place in the queue.
struct Place<'a>(&'a AtomicUsize);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    #[tokio::test]
    async fn what_is_over_the_bound_is_refused_and_the_rest_gets_its_turn() {
        let executor = Executor::new(Execution::Pool { threads: 1 }, 1);
        let (release, held) = mpsc::channel::<()>();
        let mut first = Box::pin(executor.run(move || held.recv().map_err(|_| Failure::invalid("gone"))));
        let mut second = Box::pin(executor.run(|| Ok(2)));
        assert!(futures::poll!(&mut first).is_pending());
        assert!(futures::poll!(&mut second).is_pending());
        let refused = executor.run(|| Ok(3)).await.unwrap_err();
        assert_eq!(refused.kind, Kind::Busy);
        release.send(()).unwrap();
        let both = tokio::time::timeout(Duration::from_secs(30), futures::future::join(first, second)).await.unwrap();
        assert_eq!(both, (Ok(()), Ok(2)));
        assert_eq!(executor.waiting.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn one_that_gives_up_waiting_leaves_its_place() {
        let executor = Executor::new(Execution::Pool { threads: 1 }, 1);
        let (release, held) = mpsc::channel::<()>();
        let mut first = Box::pin(executor.run(move || held.recv().map_err(|_| Failure::invalid("gone"))));
        assert!(futures::poll!(&mut first).is_pending());
        for _ in 0..3 {
            let mut waiting = Box::pin(executor.run(|| Ok(())));
            assert!(futures::poll!(&mut waiting).is_pending());
        }
        drop(release);
        assert!(tokio::time::timeout(Duration::from_secs(30), first).await.unwrap().is_err());
    }
    #[tokio::test]
    async fn those_that_wait_for_one_turn_keep_nobody_else_out() {
        let executor = Executor::new(Execution::Pool { threads: 2 }, 4);
        let (slow, other) = (Turn::default(), Turn::default());
        let (release, held) = mpsc::channel::<()>();
        let mut first =
            Box::pin(executor.run_in(Some(&slow), move || held.recv().map_err(|_| Failure::invalid("gone"))));
        assert!(futures::poll!(&mut first).is_pending());
        let mut behind: Vec<_> = (0..2).map(|_| Box::pin(executor.run_in(Some(&slow), || Ok(())))).collect();
        for waiting in &mut behind {
            assert!(futures::poll!(waiting).is_pending());
        }
        let refused = executor.run_in(Some(&slow), || Ok(())).await.unwrap_err();
        assert_eq!(refused.kind, Kind::Busy, "half of the places are for all others");
        let soon = Duration::from_secs(30);
        assert_eq!(tokio::time::timeout(soon, executor.run_in(Some(&other), || Ok(1))).await.unwrap(), Ok(1));
        // One that nobody waits for any more keeps its turn until it has ended.
        drop(first);
        assert!(futures::poll!(&mut behind[0]).is_pending());
        release.send(()).unwrap();
        for waiting in behind {
            assert_eq!(tokio::time::timeout(soon, waiting).await.unwrap(), Ok(()));
        }
        assert_eq!(slow.waiting.load(Ordering::Relaxed), 0);
    }
}
