//! A request body that can be sent again.
//!
//! The rule of this module: what was read stays at hand, as references into the buffers that it came in, as long
//! as it is no more than a bound; beyond that nothing is kept, and the body can't be sent again. One reader at a
//! time: a new one makes the one before it fail, so that an attempt that was given up can't eat the bytes of the
//! next.

use std::{
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};

use super::{
    body::{Body, BoxError},
    grpc::Messages,
};

/// What bounds the size of a body.
#[derive(Debug)]
pub enum SizeLimit {
    /// All of it, in bytes.
    Total(u64),
    /// Each gRPC message of it.
    Message(Messages, u64),
}

impl SizeLimit {
    /// Every gRPC message at most `bytes`.
    #[must_use]
    pub fn per_message(bytes: u64) -> Self {
        Self::Message(Messages::default(), bytes)
    }

    /// Counts `chunk`, and says whether the limit still holds.
    fn admits(&mut self, chunk: &[u8]) -> bool {
        match self {
            Self::Total(left) => match left.checked_sub(chunk.len() as u64) {
                Some(rest) => {
                    *left = rest;
                    true
                }
                None => false,
            },
            Self::Message(messages, limit) => messages.largest(chunk) <= *limit,
        }
    }
}

/// Keeps a body's first bytes, and hands out readers of the whole. Dropping it before
/// [`release`](Self::release) ends the reader that is out.
#[derive(Debug)]
pub struct Replay {
    source: Arc<Mutex<Source>>,
    released: bool,
}

/// A body read through a [`Replay`].
pub struct Reader {
    source: Arc<Mutex<Source>>,
    turn: u32,
}

struct Source {
    inner: Body,
    limit: SizeLimit,
    /// What was read from `inner` and may be read again.
    kept: Vec<Bytes>,
    trailers: Option<HeaderMap>,
    kept_bytes: usize,
    keep: usize,
    /// Whether what is read is still kept.
    keeping: bool,
    /// Whether bytes were read that are no longer kept.
    lost: bool,
    /// How far in `kept` the present reader is.
    position: usize,
    trailers_read: bool,
    ended: bool,
    over_limit: bool,
    failed: bool,
    turn: u32,
    waker: Option<Waker>,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("kept_bytes", &self.kept_bytes).field("lost", &self.lost).finish_non_exhaustive()
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("turn", &self.turn).finish_non_exhaustive()
    }
}

impl Replay {
    /// Reads `inner`, keeping it while it is at most `keep` bytes, and failing it over `limit`.
    #[must_use]
    pub fn new(inner: Body, keep: usize, limit: SizeLimit) -> Self {
        let source = Source {
            inner,
            limit,
            kept: Vec::new(),
            trailers: None,
            kept_bytes: 0,
            keep,
            keeping: true,
            lost: false,
            position: 0,
            trailers_read: false,
            ended: false,
            over_limit: false,
            failed: false,
            turn: 0,
            waker: None,
        };
        Self { source: Arc::new(Mutex::new(source)), released: false }
    }

    /// The body from its first byte, unless too much of it was read by the reader before, or it broke off. That
    /// reader fails from here on.
    #[must_use]
    pub fn reader(&self) -> Option<Reader> {
        let (turn, waker) = {
            let mut source = lock(&self.source);
            if source.lost || source.failed {
                return None;
            }
            source.turn += 1;
            source.position = 0;
            source.trailers_read = false;
            (source.turn, source.waker.take())
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        Some(Reader { source: Arc::clone(&self.source), turn })
    }

    /// Stops keeping: the present reader is the last.
    pub fn release(mut self) {
        self.released = true;
        let mut source = lock(&self.source);
        source.keeping = false;
        source.lost = true;
        if source.position == source.kept.len() {
            source.kept = Vec::new();
            source.position = 0;
        }
    }

    /// Whether the body was over its limit.
    #[must_use]
    pub fn over_limit(&self) -> bool {
        lock(&self.source).over_limit
    }

    /// Reads on, before any reader is made, until `decide` finds in the bytes so far what it looks for. `None` when
    /// the body ended or broke off, or the kept bytes are up, before it did.
    pub async fn peek<T>(&self, mut decide: impl FnMut(&[u8]) -> Option<T>) -> Option<T> {
        std::future::poll_fn(|cx| self.poll_peek(cx, &mut decide)).await
    }

    fn poll_peek<T>(&self, cx: &mut Context<'_>, decide: &mut impl FnMut(&[u8]) -> Option<T>) -> Poll<Option<T>> {
        let mut source = lock(&self.source);
        loop {
            let found = match source.kept.as_slice() {
                [] => None,
                [one] => decide(one),
                many => decide(&many.concat()),
            };
            if found.is_some() || source.ended || source.failed || source.kept_bytes >= source.keep {
                return Poll::Ready(found);
            }
            match source.poll_inner(cx, true) {
                Poll::Ready(_) => {}
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        if !self.released {
            let waker = {
                let mut source = lock(&self.source);
                source.turn += 1;
                source.waker.take()
            };
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

impl Source {
    /// One frame of the inner body, kept when there is room (always, when `must_keep`).
    fn poll_inner(&mut self, cx: &mut Context<'_>, must_keep: bool) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = match Pin::new(&mut self.inner).poll_frame(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(None) => {
                self.ended = true;
                return Poll::Ready(None);
            }
            Poll::Ready(Some(Err(error))) => {
                self.failed = true;
                return Poll::Ready(Some(Err(error)));
            }
            Poll::Ready(Some(Ok(frame))) => frame,
        };
        if let Some(data) = frame.data_ref() {
            if !self.limit.admits(data) {
                self.over_limit = true;
                self.failed = true;
                return Poll::Ready(Some(Err("the request's body is over the limit".into())));
            }
            if must_keep || (self.keeping && self.kept_bytes + data.len() <= self.keep) {
                self.kept_bytes += data.len();
                self.kept.push(data.clone());
                self.position += usize::from(!must_keep);
            } else if self.keeping {
                self.keeping = false;
                self.lost = true;
                self.kept = Vec::new();
                self.position = 0;
            }
        } else if let Some(trailers) = frame.trailers_ref() {
            self.ended = true;
            if self.keeping || must_keep {
                self.trailers = Some(trailers.clone());
                self.trailers_read = !must_keep;
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn poll_reader(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(kept) = self.kept.get_mut(self.position) {
            let data = if self.keeping { kept.clone() } else { std::mem::take(kept) };
            self.position += 1;
            if self.keeping && self.kept_bytes > self.keep && self.position == self.kept.len() {
                // A peek had to keep more than the bound; now that it is read, it is not kept longer.
                self.keeping = false;
                self.lost = true;
            }
            if !self.keeping && self.position == self.kept.len() {
                self.kept = Vec::new();
                self.position = 0;
            }
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if self.ended {
            if self.trailers_read {
                return Poll::Ready(None);
            }
            self.trailers_read = true;
            let trailers = if self.keeping { self.trailers.clone() } else { self.trailers.take() };
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        if self.failed {
            return Poll::Ready(Some(Err("the request's body broke off".into())));
        }
        let polled = self.poll_inner(cx, false);
        if polled.is_pending() && !self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.waker = Some(cx.waker().clone());
        }
        polled
    }
}

impl http_body::Body for Reader {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut source = lock(&self.source);
        if source.turn != self.turn {
            return Poll::Ready(Some(Err("the request was given up here".into())));
        }
        source.poll_reader(cx)
    }

    fn is_end_stream(&self) -> bool {
        let source = lock(&self.source);
        source.turn == self.turn
            && source.position == source.kept.len()
            && if source.ended {
                source.trailers.is_none() || source.trailers_read
            } else {
                !source.failed && source.inner.is_end_stream()
            }
    }

    fn size_hint(&self) -> SizeHint {
        let source = lock(&self.source);
        let kept: usize = source.kept.iter().skip(source.position).map(Bytes::len).sum();
        let inner = if source.ended { SizeHint::with_exact(0) } else { source.inner.size_hint() };
        let mut hint = SizeHint::new();
        hint.set_lower(inner.lower() + kept as u64);
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper + kept as u64);
        }
        hint
    }
}

fn lock(source: &Mutex<Source>) -> MutexGuard<'_, Source> {
    source.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt as _, StreamBody};
    use proptest::prelude::*;

    use super::*;

    fn chunks(parts: &[&'static str]) -> Body {
        let frames: Vec<_> =
            parts.iter().map(|p| Ok::<_, BoxError>(Frame::data(Bytes::from_static(p.as_bytes())))).collect();
        Body::new(StreamBody::new(futures::stream::iter(frames)))
    }

    async fn text(reader: Reader) -> String {
        let bytes = reader.collect().await.expect("it reads").to_bytes();
        String::from_utf8(bytes.to_vec()).expect("text")
    }

    #[tokio::test]
    async fn a_small_body_is_read_again_and_again() {
        let replay = Replay::new(chunks(&["he", "llo"]), 5, SizeLimit::Total(100));
        for _ in 0..3 {
            assert_eq!(text(replay.reader().expect("within the bound")).await, "hello");
        }
        let last = replay.reader().expect("still");
        replay.release();
        assert_eq!(text(last).await, "hello");
    }

    #[tokio::test]
    async fn a_body_over_the_bound_is_read_once() {
        let replay = Replay::new(chunks(&["he", "llo", "!"]), 5, SizeLimit::Total(100));
        let mut first = replay.reader().expect("nothing is read yet");
        for _ in 0..2 {
            first.frame().await.expect("a frame").expect("good");
        }
        let again = replay.reader().expect("five bytes are kept");
        assert_eq!(text(again).await, "hello!");
        assert!(replay.reader().is_none(), "six bytes are too many");
    }

    #[tokio::test]
    async fn a_new_reader_ends_the_one_before_and_wakes_it() {
        let (sender, receiver) = futures::channel::mpsc::unbounded::<Result<Frame<Bytes>, BoxError>>();
        let replay = Replay::new(Body::new(StreamBody::new(receiver)), 64, SizeLimit::Total(100));
        let mut first = replay.reader().expect("fresh");
        let waiting = tokio::spawn(async move { first.frame().await.expect("an error").is_err() });
        tokio::task::yield_now().await;
        let second = replay.reader().expect("nothing is read");
        assert!(waiting.await.expect("it ends"));
        sender.unbounded_send(Ok(Frame::data(Bytes::from_static(b"x")))).expect("open");
        drop(sender);
        assert_eq!(text(second).await, "x");
    }

    #[tokio::test]
    async fn dropping_the_replay_ends_its_reader_but_releasing_does_not() {
        let replay = Replay::new(chunks(&["a"]), 64, SizeLimit::Total(100));
        let mut reader = replay.reader().expect("fresh");
        drop(replay);
        assert!(reader.frame().await.expect("an error").is_err());
    }

    #[tokio::test]
    async fn a_peek_takes_nothing_away() {
        let replay = Replay::new(chunks(&["ab", "cd", "ef"]), 64, SizeLimit::Total(100));
        let seen = replay.peek(|bytes| (bytes.len() >= 3).then(|| bytes.to_vec())).await;
        assert_eq!(seen.as_deref(), Some(b"abcd".as_slice()));
        assert_eq!(text(replay.reader().expect("kept")).await, "abcdef");
        assert_eq!(text(replay.reader().expect("kept")).await, "abcdef");
    }

    #[tokio::test]
    async fn a_peek_gives_up_at_the_end_and_at_the_bound() {
        let replay = Replay::new(chunks(&["ab"]), 64, SizeLimit::Total(100));
        assert_eq!(replay.peek(|_| None::<()>).await, None);
        let endless = Body::new(StreamBody::new(futures::stream::repeat_with(|| {
            Ok::<_, BoxError>(Frame::data(Bytes::from_static(b"0123456789")))
        })));
        let replay = Replay::new(endless, 64, SizeLimit::Total(1000));
        assert_eq!(replay.peek(|_| None::<()>).await, None);
    }

    #[tokio::test]
    async fn what_is_over_the_limit_fails() {
        let replay = Replay::new(chunks(&["abc", "de"]), 64, SizeLimit::Total(4));
        let mut reader = replay.reader().expect("fresh");
        assert!(reader.frame().await.expect("a frame").is_ok());
        assert!(reader.frame().await.expect("an error").is_err());
        assert!(replay.over_limit());
        assert!(replay.reader().is_none());
    }

    proptest! {
        #[test]
        fn any_two_reads_see_the_same_bytes(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..8),
            read_first in 0..10_usize, keep in 0..100_usize, peeked in 0..60_usize,
        ) {
            let whole: Vec<u8> = parts.concat();
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
            runtime.block_on(async {
                let frames: Vec<_> = parts.into_iter().map(|p| Ok::<_, BoxError>(Frame::data(Bytes::from(p)))).collect();
                let replay = Replay::new(Body::new(StreamBody::new(futures::stream::iter(frames))), keep, SizeLimit::Total(1000));
                if peeked > 0 {
                    replay.peek(|bytes| (bytes.len() >= peeked).then_some(())).await;
                }
                let mut first = replay.reader().expect("fresh");
                let mut seen = 0;
                for _ in 0..read_first {
                    if let Some(frame) = first.frame().await {
                        seen += frame.expect("good").into_data().expect("data").len();
                    }
                }
                match replay.reader() {
                    Some(again) => {
                        let hint = again.size_hint();
                        let bytes = again.collect().await.expect("it reads").to_bytes();
                        assert_eq!(bytes.as_ref(), whole.as_slice());
                        assert!(hint.lower() <= bytes.len() as u64);
                    }
                    None => assert!(seen > keep, "{seen} bytes were read, {keep} are kept"),
                }
            });
        }
    }
}
