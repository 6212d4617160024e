//! All next hops of a process by address, so that whoever names the same door shares its connections.
//!
//! The rule of this module: an address decides the way. `inproc:NAME` is whatever is registered under NAME when
//! the request comes; anything else is a socket.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use arc_swap::ArcSwapOption;
use futures::{FutureExt as _, future::BoxFuture};

use super::{
    Request, Response, Upstream, UpstreamError,
    client::{AddressError, ClientOptions, HttpUpstream},
};
use crate::ports::{Clock, Network};

/// What the address of a door in this process begins with.
pub const IN_PROCESS: &str = "inproc:";

/// Doors of which nobody holds a handle are forgotten when the map has grown by this many.
const PRUNE_EVERY: usize = 64;

/// Finds the next hop at an address.
pub struct Connections {
    network: Arc<dyn Network>,
    clock: Arc<dyn Clock>,
    options: ClientOptions,
    doors: Mutex<HashMap<String, Weak<dyn Upstream>>>,
    local: Mutex<HashMap<String, Arc<Slot>>>,
}

/// What is registered under one name, for now.
#[derive(Debug)]
struct Slot {
    name: String,
    upstream: ArcSwapOption<Arc<dyn Upstream>>,
}

/// Keeps an in-process door registered; dropping it takes the door away.
#[derive(Debug)]
#[must_use = "dropping it takes the door away"]
pub struct Registration {
    slot: Arc<Slot>,
    upstream: Arc<Arc<dyn Upstream>>,
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connections").field("doors", &lock(&self.doors).len()).finish_non_exhaustive()
    }
}

impl Connections {
    /// Next hops reached over `network`.
    #[must_use]
    pub fn new(network: Arc<dyn Network>, clock: Arc<dyn Clock>, options: ClientOptions) -> Arc<Self> {
        Arc::new(Self { network, clock, options, doors: Mutex::default(), local: Mutex::default() })
    }

    /// Makes `upstream` the door at `inproc:NAME`, in place of one that was there.
    pub fn register(&self, name: &str, upstream: Arc<dyn Upstream>) -> Registration {
        let slot = self.slot(name);
        let upstream = Arc::new(upstream);
        slot.upstream.store(Some(Arc::clone(&upstream)));
        Registration { slot, upstream }
    }

    /// The next hop at `address`: `host:port`, or `inproc:NAME`, whether or not anything is there yet.
    ///
    /// # Errors
    /// When `address` is neither.
    pub fn get(&self, address: &str) -> Result<Arc<dyn Upstream>, AddressError> {
        if let Some(name) = address.strip_prefix(IN_PROCESS) {
            return Ok(self.slot(name));
        }
        let mut doors = lock(&self.doors);
        if let Some(door) = doors.get(address).and_then(Weak::upgrade) {
            return Ok(door);
        }
        if doors.len() % PRUNE_EVERY == PRUNE_EVERY - 1 {
            doors.retain(|_, door| door.strong_count() > 0);
        }
        let (network, clock) = (Arc::clone(&self.network), Arc::clone(&self.clock));
        let door: Arc<dyn Upstream> = Arc::new(HttpUpstream::new(address, network, clock, self.options.clone())?);
        doors.insert(address.to_owned(), Arc::downgrade(&door));
        Ok(door)
    }

    fn slot(&self, name: &str) -> Arc<Slot> {
        let mut local = lock(&self.local);
        let slot = local.entry(name.to_owned());
        Arc::clone(slot.or_insert_with(|| Arc::new(Slot { name: name.to_owned(), upstream: ArcSwapOption::empty() })))
    }
}

impl Upstream for Slot {
    fn call(&self, mut request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        async move {
            let Some(upstream) = self.upstream.load_full() else {
                let message = format!("no door named {} is open in this process", self.name);
                return Err(UpstreamError { started: false, timed_out: false, message });
            };
            // The call is the handing over: the door may take long before it reads the body.
            request.body_mut().handed_over();
            upstream.call(request).await
        }
        .boxed()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // Another may have been registered since.
        self.slot.upstream.compare_and_swap(&self.upstream, None);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
