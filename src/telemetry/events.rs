//! The event ring: what happened lately, for whoever asks and whoever follows.
//!
//! The rule of this module: the ring is bounded, and followers have nothing of their own. A follower is a place
//! in the ring, taken in the same step as the snapshot before it, so nothing is missed in between; one that is
//! slower than the ring turns loses the oldest, and is told how many.

use std::{
    borrow::Cow,
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::domain::time::Instant;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Its number; every event's is greater than the one's before it.
    pub sequence: u64,
    /// When it happened.
    pub time: Instant,
    /// What it happened to: `model/iris`, `server/mlserver`, `replica/mlserver-0`.
    pub subject: String,
    /// What kind of thing happened, in one word of a closed set.
    pub kind: Cow<'static, str>,
    /// One sentence.
    pub message: String,
    /// The same for machines, as JSON.
    #[serde(default, with = "kept")]
    pub data: String,
}

/// JSON is kept as the value that it is the text of.
mod kept {
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};
    use serde_json::Value;

    pub(super) fn serialize<S: Serializer>(data: &str, to: S) -> Result<S::Ok, S::Error> {
        serde_json::from_str::<Value>(data).unwrap_or_default().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
        Value::deserialize(from).map(|data| data.to_string())
    }
}

/// The ring. Clones are the same ring.
#[derive(Clone, Debug)]
pub struct Events {
    ring: Arc<Mutex<Ring>>,
    /// The number of the next event, for followers to wake at.
    next: Arc<watch::Sender<u64>>,
}

#[derive(Debug)]
struct Ring {
    capacity: usize,
    events: VecDeque<Arc<Event>>,
    next: u64,
    /// How many events were ever put in here; places of followers count these.
    put: u64,
}

/// What a follower receives.
#[derive(Clone, Debug, PartialEq)]
pub enum Received {
    /// The next event.
    Event(Arc<Event>),
    /// So many events came and went before they were read.
    Lost(u64),
}

impl Events {
    /// An empty ring of at most `capacity` events, the first of which gets at least the number `first`.
    #[must_use]
    pub fn new(capacity: usize, first: u64) -> Self {
        let ring = Ring { capacity: capacity.max(1), events: VecDeque::new(), next: first, put: 0 };
        Self { ring: Arc::new(Mutex::new(ring)), next: Arc::new(watch::Sender::new(0)) }
    }

    /// A ring with the events that [`encode`](Self::encode) kept, and how many of them could not be read. The
    /// newest before a crash are not among them, so `first` must be above any number given then: the leader
    /// epoch in the upper bits does it.
    #[must_use]
    pub fn restore(capacity: usize, first: u64, kept: &[Vec<u8>]) -> (Self, usize) {
        let events = Self::new(capacity, first);
        let mut unread = 0;
        {
            let mut ring = events.lock();
            for bytes in kept {
                match rmp_serde::from_slice::<Event>(bytes)
                    .ok()
                    .filter(|event| ring.events.back().is_none_or(|last| last.sequence < event.sequence))
                {
                    Some(event) => {
                        ring.next = ring.next.max(event.sequence.saturating_add(1));
                        ring.push(event);
                    }
                    None => unread += 1,
                }
            }
        }
        (events, unread)
    }

    /// Everything in the ring, oldest first, for `Store::save_events`.
    #[must_use]
    pub fn encode(&self) -> Vec<Vec<u8>> {
        let events: Vec<_> = self.lock().events.iter().cloned().collect();
        events.iter().filter_map(|event| rmp_serde::to_vec_named(event.as_ref()).ok()).collect()
    }

    /// Puts an event in; returns its number.
    pub fn publish(
        &self,
        time: Instant,
        subject: impl Into<String>,
        kind: &'static str,
        message: impl Into<String>,
        data: String,
    ) -> u64 {
        let (subject, kind, message) = (subject.into(), Cow::Borrowed(kind), message.into());
        let mut ring = self.lock();
        let sequence = ring.next;
        ring.next = ring.next.saturating_add(1);
        ring.push(Event { sequence, time, subject, kind, message, data });
        let put = ring.put;
        drop(ring);
        // Two publishers may arrive here in the other order; the greater stays.
        self.next.send_if_modified(|seen| {
            let newer = put > *seen;
            *seen = put.max(*seen);
            newer
        });
        sequence
    }

    /// Everything in the ring after `after` (all of it for `None`), oldest first, and a follower of what comes
    /// next, with nothing in between.
    #[must_use]
    pub fn subscribe(&self, after: Option<u64>) -> (Vec<Arc<Event>>, Follower) {
        let wake = self.next.subscribe();
        let ring = self.lock();
        let start = after.map_or(0, |after| ring.events.partition_point(|event| event.sequence <= after));
        let snapshot = ring.events.iter().skip(start).cloned().collect();
        (snapshot, Follower { ring: Arc::clone(&self.ring), wake, place: ring.put })
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn push(&mut self, event: Event) {
        if self.events.len() == self.capacity {
            self.events.pop_front();
        }
        self.events.push_back(Arc::new(event));
        self.put += 1;
    }

    /// What is at `place`, and the place after it.
    fn at(&self, place: u64) -> Option<(Received, u64)> {
        let oldest = self.put - self.events.len() as u64;
        if place < oldest {
            return Some((Received::Lost(oldest - place), oldest));
        }
        let event = self.events.get(usize::try_from(place - oldest).ok()?)?;
        Some((Received::Event(Arc::clone(event)), place + 1))
    }
}

/// A place in the ring.
#[derive(Debug)]
pub struct Follower {
    ring: Arc<Mutex<Ring>>,
    wake: watch::Receiver<u64>,
    place: u64,
}

impl Follower {
    /// Waits for the next event; `None` once the ring is gone. Giving the wait up loses nothing.
    pub async fn next(&mut self) -> Option<Received> {
        loop {
            // Marked as seen before the look, so that what is put in after it wakes.
            self.wake.borrow_and_update();
            if let Some(received) = self.try_next() {
                return Some(received);
            }
            if self.wake.changed().await.is_err() {
                return self.try_next();
            }
        }
    }

    /// The next event, if it is there.
    pub fn try_next(&mut self) -> Option<Received> {
        let (received, place) = self.ring.lock().unwrap_or_else(PoisonError::into_inner).at(self.place)?;
        self.place = place;
        Some(received)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn put(events: &Events) -> u64 {
        events.publish(Instant::from_micros(5), "model/iris", "Placed", "placed", r#"{"n":0.1}"#.to_owned())
    }

    fn number(received: Option<Received>) -> Option<u64> {
        match received? {
            Received::Event(event) => Some(event.sequence),
            Received::Lost(lost) => panic!("lost {lost}"),
        }
    }

    #[test]
    fn a_slow_follower_loses_the_oldest_and_is_told_how_many() {
        let events = Events::new(4, 100);
        let (snapshot, mut follower) = events.subscribe(None);
        assert!(snapshot.is_empty());
        for _ in 0..10 {
            put(&events);
        }
        assert_eq!(follower.try_next(), Some(Received::Lost(6)));
        let rest: Vec<_> = std::iter::from_fn(|| number(follower.try_next())).collect();
        assert_eq!(rest, [106, 107, 108, 109]);
        assert_eq!(follower.try_next(), None);
    }

    #[test]
    fn a_ring_is_kept_and_goes_on_above_every_number_given_before() {
        let events = Events::new(3, 7);
        for _ in 0..5 {
            put(&events);
        }
        let kept = events.encode();
        assert_eq!(kept.len(), 3);
        let lost = put(&events);
        let (restored, unread) = Events::restore(3, 1 << 32, &kept);
        assert_eq!(unread, 0);
        let (snapshot, _) = restored.subscribe(None);
        let (before, _) = events.subscribe(None);
        assert_eq!(snapshot[1..], before[..2], "all but the one that was not kept");
        assert!(put(&restored) > lost);
        // A first number that is not above does not make two events one.
        let (restored, _) = Events::restore(3, 0, &kept);
        assert_eq!(put(&restored), 12);
    }

    #[test]
    fn what_is_said_to_machines_is_kept_as_a_value_and_read_as_its_text() {
        let events = Events::new(1, 0);
        put(&events);
        let kept = events.encode();
        let value: serde_json::Value = rmp_serde::from_slice(&kept[0]).expect("it is one");
        assert_eq!(value["data"]["n"], 0.1);
        let (restored, unread) = Events::restore(1, 0, &kept);
        assert_eq!((unread, restored.subscribe(None).0), (0, events.subscribe(None).0));
    }

    #[test]
    fn what_can_not_be_read_is_left_out_and_counted() {
        let events = Events::new(9, 0);
        put(&events);
        put(&events);
        let mut kept = events.encode();
        kept.push(kept[0].clone());
        kept.insert(1, b"\xc1garbage".to_vec());
        let (restored, unread) = Events::restore(9, 0, &kept);
        assert_eq!((unread, restored.subscribe(None).0.len()), (2, 2));
    }

    #[test]
    fn a_follower_resumes_after_a_number() {
        let events = Events::new(9, 0);
        for _ in 0..5 {
            put(&events);
        }
        let numbers = |after| events.subscribe(after).0.iter().map(|event| event.sequence).collect::<Vec<_>>();
        assert_eq!(numbers(Some(2)), [3, 4]);
        assert_eq!(numbers(Some(99)), [0_u64; 0]);
        assert_eq!(numbers(None).len(), 5);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nothing_falls_between_the_snapshot_and_what_follows() {
        const MANY: u64 = 4000;
        let events = Events::new(usize::try_from(MANY).unwrap() * 2, 0);
        let publisher = tokio::task::spawn_blocking({
            let events = events.clone();
            move || {
                for _ in 0..MANY {
                    put(&events);
                }
            }
        });
        let mut readers = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let events = events.clone();
            readers.spawn(async move {
                let (snapshot, mut follower) = events.subscribe(None);
                let mut expected = 0;
                for event in snapshot {
                    assert_eq!(event.sequence, expected);
                    expected += 1;
                }
                while expected < MANY {
                    assert_eq!(number(follower.next().await), Some(expected));
                    expected += 1;
                }
            });
        }
        let all = async {
            while let Some(reader) = readers.join_next().await {
                reader.expect("a reader");
            }
        };
        tokio::time::timeout(Duration::from_secs(20), all).await.expect("every reader sees every event");
        publisher.await.expect("the publisher");
    }

    #[tokio::test]
    async fn a_follower_ends_with_the_ring() {
        let events = Events::new(3, 0);
        let (_, mut follower) = events.subscribe(None);
        put(&events);
        drop(events);
        assert_eq!(number(follower.next().await), Some(0));
        assert_eq!(follower.next().await, None);
    }

    proptest! {
        #[test]
        fn a_follower_sees_every_event_or_hears_of_it(capacity in 1..8_usize, reads in prop::collection::vec(0..12_usize, 1..30)) {
            let events = Events::new(capacity, 0);
            let (_, mut follower) = events.subscribe(None);
            let (mut published, mut seen) = (0, 0);
            for burst in reads {
                for _ in 0..burst {
                    put(&events);
                    published += 1;
                }
                if burst % 3 != 0 {
                    continue;
                }
                while let Some(received) = follower.try_next() {
                    match received {
                        Received::Event(event) => {
                            prop_assert_eq!(event.sequence, seen);
                            seen += 1;
                        }
                        Received::Lost(lost) => seen += lost,
                    }
                }
                prop_assert_eq!(seen, published);
            }
        }
    }
}
