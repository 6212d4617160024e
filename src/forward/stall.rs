//! Finds streams whose client has stopped taking what it asked for.
//!
//! The rule of this module: on HTTP/2 a client can leave one stream's window closed and keep the connection lively,
//! and then nothing asks that stream's body for more, so the body can't notice by itself. The connection's task
//! looks instead: a body that gave a piece and was not asked again for two looks in a row is stuck.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};

use super::body::{Body, BoxError};

/// The body waits for its source: whoever reads it is not to blame.
const WAITING: u8 = 0;
/// A piece was given, and no more has been asked for.
const GIVEN: u8 = 1;
/// That was so at the last look already.
const STALE: u8 = 2;

/// The answers that are on their way on one connection.
#[derive(Debug, Default)]
pub(super) struct Answers {
    states: Mutex<Vec<Weak<AtomicU8>>>,
}

impl Answers {
    /// `body`, watched.
    pub(super) fn watch(&self, body: Body) -> Body {
        if body.is_end_stream() {
            return body;
        }
        let state = Arc::new(AtomicU8::new(WAITING));
        let mut states = self.states();
        if let Some(free) = states.iter_mut().find(|state| state.strong_count() == 0) {
            *free = Arc::downgrade(&state);
        } else {
            states.push(Arc::downgrade(&state));
        }
        drop(states);
        Body::new(Watched { body, state })
    }

    /// Whether any has been stuck since the look before.
    pub(super) fn look(&self) -> bool {
        let mut stuck = false;
        self.states().retain(|state| {
            let Some(state) = state.upgrade() else { return false };
            let aged = state.compare_exchange(GIVEN, STALE, Ordering::Relaxed, Ordering::Relaxed);
            stuck |= aged == Err(STALE);
            true
        });
        stuck
    }

    fn states(&self) -> MutexGuard<'_, Vec<Weak<AtomicU8>>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Watched {
    body: Body,
    state: Arc<AtomicU8>,
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        self.state.store(if polled.is_pending() { WAITING } else { GIVEN }, Ordering::Relaxed);
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    #[tokio::test]
    async fn only_a_body_that_nobody_asks_for_more_is_stuck() {
        let (sender, source) = futures::channel::mpsc::unbounded::<Result<Frame<Bytes>, BoxError>>();
        let answers = Answers::default();
        let mut body = answers.watch(Body::new(http_body_util::StreamBody::new(source)));
        // Nobody has asked yet, or its source is slow.
        assert!(!answers.look() && !answers.look() && !answers.look());
        for _ in 0..3 {
            sender.unbounded_send(Ok(Frame::data(Bytes::from_static(b"x")))).expect("open");
            body.frame().await.expect("a frame").expect("good");
            assert!(!answers.look());
        }
        assert!(answers.look() && answers.look());
        drop(body);
        assert!(!answers.look());
    }
}
