//! What happened lately, for people: a ring that forgets the oldest.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::domain::time::Instant;

/// Events that one reader may be behind before it loses the oldest.
const BEHIND: usize = 4096;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Its number: grows by one with each.
    pub sequence: u64,
    /// When.
    pub time: Instant,
    /// To which model or server.
    pub subject: String,
    /// One word for what.
    pub kind: String,
    /// One sentence.
    pub message: String,
    /// The data behind it.
    pub data: serde_json::Value,
}

/// The ring.
pub struct EventRing {
    inner: Mutex<Inner>,
    bound: usize,
}

struct Inner {
    ring: VecDeque<Arc<Event>>,
    next: u64,
    readers: Vec<Weak<Reader>>,
}

struct Reader {
    queue: Mutex<(VecDeque<Arc<Event>>, u64)>,
    changed: Notify,
}

impl EventRing {
    /// A ring of at most `bound` events, that starts with those kept from before.
    #[must_use]
    pub fn new(bound: usize, kept: Vec<Event>) -> Self {
        let skip = kept.len().saturating_sub(bound);
        let ring: VecDeque<_> = kept.into_iter().skip(skip).map(Arc::new).collect();
        let next = ring.back().map_or(1, |last| last.sequence + 1);
        Self { inner: Mutex::new(Inner { ring, next, readers: Vec::new() }), bound: bound.max(1) }
    }

    /// Adds an event.
    pub fn record(&self, time: Instant, subject: &str, kind: &str, message: String, data: serde_json::Value) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let event = Arc::new(Event {
            sequence: inner.next,
            time,
            subject: subject.to_owned(),
            kind: kind.to_owned(),
            message,
            data,
        });
        inner.next += 1;
        if inner.ring.len() == self.bound {
            inner.ring.pop_front();
        }
        inner.ring.push_back(Arc::clone(&event));
        inner.readers.retain(|reader| reader.upgrade().is_some_and(|reader| reader.put(&event)));
    }

    /// Everything that is kept, oldest first, and all that follows: nothing between the two is missed.
    #[must_use]
    pub fn subscribe(&self) -> (Vec<Arc<Event>>, Live) {
        let reader = Arc::new(Reader { queue: Mutex::default(), changed: Notify::new() });
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.readers.push(Arc::downgrade(&reader));
        (inner.ring.iter().cloned().collect(), Live(reader))
    }

    /// Everything that is kept, oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Event>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).ring.iter().cloned().collect()
    }
}

impl fmt::Debug for EventRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventRing").field("bound", &self.bound).finish_non_exhaustive()
    }
}

impl Reader {
    fn put(&self, event: &Arc<Event>) -> bool {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.0.len() == BEHIND {
            queue.0.pop_front();
            queue.1 += 1;
        }
        queue.0.push_back(Arc::clone(event));
        drop(queue);
        self.changed.notify_one();
        true
    }
}

/// Events as they happen.
pub struct Live(Arc<Reader>);

/// What a live reader gets.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// An event.
    Event(Arc<Event>),
    /// This many were lost because they were not read fast enough.
    Missed(u64),
}

impl Live {
    /// The next event. Never ends.
    pub async fn next(&mut self) -> Next {
        loop {
            let changed = self.0.changed.notified();
            {
                let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
                match std::mem::take(&mut queue.1) {
                    0 => {
                        if let Some(event) = queue.0.pop_front() {
                            return Next::Event(event);
                        }
                    }
                    missed => return Next::Missed(missed),
                }
            }
            changed.await;
        }
    }
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Live")
    }
}
