//! Connections to one next hop: HTTP/1.1 ones that wait for another request, and HTTP/2 ones that carry many.
//!
//! The rule of this module: a connection's task lives exactly as long as the connection is in the pool or lent; a
//! connection that is given back in doubt is closed, never used again.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use hyper::client::conn::{http1, http2};
use tokio::{sync::OwnedSemaphorePermit, time::sleep};
use tokio_util::task::AbortOnDropHandle;

use super::body::Body;
use crate::{domain::time::Instant, ports::Clock};

/// One HTTP/1.1 connection. Dropping it closes it.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) sender: http1::SendRequest<Body>,
    pub(super) _task: AbortOnDropHandle<()>,
    pub(super) _permit: OwnedSemaphorePermit,
}

/// One HTTP/2 connection, shared by its streams: it stays open while one of them is there.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) sender: http2::SendRequest<Body>,
    pub(super) streams: AtomicUsize,
    pub(super) used: AtomicU64,
    pub(super) _task: AbortOnDropHandle<()>,
    pub(super) _permit: OwnedSemaphorePermit,
}

/// One stream's claim on its connection.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) connection: Arc<Shared>,
    pool: Weak<Pool>,
}

/// What is open and free.
#[derive(Debug)]
pub(super) struct Pool {
    idle: Mutex<Vec<(Instant, Connection)>>,
    shared: Mutex<Vec<Arc<Shared>>>,
    sweeper: Mutex<Option<AbortOnDropHandle<()>>>,
    clock: Arc<dyn Clock>,
    limits: Bounds,
}

/// The pool's bounds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// How long an HTTP/1.1 connection may wait for its next request.
    pub(super) idle: Duration,
    /// How long an HTTP/2 connection may be without streams.
    pub(super) shared_idle: Duration,
    /// Streams on one HTTP/2 connection.
    pub(super) streams: usize,
}

impl Pool {
    pub(super) fn new(clock: Arc<dyn Clock>, limits: Bounds) -> Arc<Self> {
        Arc::new(Self { idle: Mutex::default(), shared: Mutex::default(), sweeper: Mutex::default(), clock, limits })
    }

    /// The connection that was used last, of those that can take a request now.
    pub(super) fn take(&self) -> Option<Connection> {
        let now = self.clock.now();
        let mut idle = lock(&self.idle);
        let fresh = |(since, connection): &(Instant, Connection)| {
            connection.sender.is_ready() && now.since(*since) < self.limits.idle
        };
        let found = idle.iter().rposition(fresh)?;
        Some(idle.remove(found).1)
    }

    /// Keeps `connection` for the next request. Its response has been read to the end.
    pub(super) fn give(self: &Arc<Self>, connection: Connection) {
        if connection.sender.is_closed() {
            return;
        }
        lock(&self.idle).push((self.clock.now(), connection));
        self.watch();
    }

    /// A place on the HTTP/2 connection with the fewest streams, if one has room.
    pub(super) fn stream(self: &Arc<Self>) -> Option<Stream> {
        let mut shared = lock(&self.shared);
        shared.retain(|connection| !connection.sender.is_closed());
        let least = shared.iter().min_by_key(|connection| connection.streams.load(Ordering::Relaxed))?;
        if least.streams.load(Ordering::Relaxed) >= self.limits.streams {
            return None;
        }
        Some(self.claim(Arc::clone(least)))
    }

    /// Adds `connection`, and claims its first stream.
    pub(super) fn share(self: &Arc<Self>, connection: Shared) -> Stream {
        let connection = Arc::new(connection);
        let stream = self.claim(Arc::clone(&connection));
        lock(&self.shared).push(connection);
        self.watch();
        stream
    }

    fn claim(self: &Arc<Self>, connection: Arc<Shared>) -> Stream {
        connection.streams.fetch_add(1, Ordering::Relaxed);
        Stream { connection, pool: Arc::downgrade(self) }
    }

    /// Sees to it that what is idle for too long is closed.
    fn watch(self: &Arc<Self>) {
        let mut sweeper = lock(&self.sweeper);
        if sweeper.is_none() {
            let pool = Arc::downgrade(self);
            let period = self.limits.idle;
            *sweeper = Some(AbortOnDropHandle::new(tokio::spawn(async move {
                loop {
                    sleep(period).await;
                    match pool.upgrade() {
                        Some(pool) if pool.sweep() => {}
                        _ => return,
                    }
                }
            })));
        }
    }

    /// Closes what is idle for too long; answers whether anything is left to watch.
    fn sweep(&self) -> bool {
        let now = self.clock.now();
        let mut sweeper = lock(&self.sweeper);
        let mut idle = lock(&self.idle);
        let mut shared = lock(&self.shared);
        idle.retain(|(since, held)| !held.sender.is_closed() && now.since(*since) < self.limits.idle);
        shared.retain(|held| {
            let used = Instant::from_micros(held.used.load(Ordering::Relaxed));
            let busy = held.streams.load(Ordering::Relaxed) > 0 || now.since(used) < self.limits.shared_idle;
            busy && !held.sender.is_closed()
        });
        let left = !(idle.is_empty() && shared.is_empty());
        if !left && let Some(this) = sweeper.take() {
            // This is the task that runs here: it ends by itself.
            drop(this.detach());
        }
        left
    }

    /// Connections that could take a request now, and those that are shared.
    pub(super) fn open(&self) -> (usize, usize) {
        let idle = lock(&self.idle).iter().filter(|(_, connection)| connection.sender.is_ready()).count();
        (idle, lock(&self.shared).len())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            self.connection.used.store(pool.clock.now().as_micros(), Ordering::Relaxed);
        }
        self.connection.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
