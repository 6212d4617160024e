//! When a connection of many streams is at work: after the tasks that its last work made ready.
//!
//! The rule of this module: a connection that is woken while several of its streams are at work lets everybody who is
//! ready go first. tokio's workers run who was woken last at once, so that a connection is otherwise run anew by each stream
//! that hands it a frame, and writes that frame alone; a system call for each is the dearest part of a small request. Gathered, what
//! thirty streams have to say goes out in one. A single stream has nobody to wait for.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use hyper::rt::Executor;
use tokio::task::yield_now;

/// Tasks that one stream may have: on a client's side one hands over its body, and one waits for its answer.
const ONE: usize = 2;

/// Runs the tasks of one connection's streams, and knows how many there are.
#[derive(Clone, Debug, Default)]
pub(super) struct Streams(Arc<AtomicUsize>);

impl Streams {
    /// A turn of their connection.
    pub(super) fn turn(&self) -> Turn {
        Turn { streams: self.clone(), came: false }
    }

    fn are_several(&self) -> bool {
        self.0.load(Ordering::Relaxed) > ONE
    }
}

impl<T> Executor<T> for Streams
where
    T: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, stream: T) {
        let present = Present::new(self);
        tokio::spawn(async move {
            let _present = present;
            stream.await
        });
    }
}

/// One of these tasks.
struct Present(Streams);

impl Present {
    fn new(streams: &Streams) -> Self {
        streams.0.fetch_add(1, Ordering::Relaxed);
        Self(streams.clone())
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whose turn it is: the connection's, or that of those who are ready.
#[derive(Debug)]
pub(super) struct Turn {
    streams: Streams,
    came: bool,
}

impl Turn {
    /// Polls `connection` where it has let the others go first, and lets them where it has not.
    pub(super) fn poll<C: Future>(&mut self, connection: Pin<&mut C>, cx: &mut Context<'_>) -> Poll<C::Output> {
        self.came = !self.came && self.streams.are_several();
        // Asks to be woken when nobody is ready any more, or after the few dozen that the runtime runs between two looks for
        // events.
        if self.came && pin!(yield_now()).poll(cx).is_pending() {
            return Poll::Pending;
        }
        self.came = false;
        connection.poll(cx)
    }
}

/// Runs the tasks of a client's connection: the connection itself, which hyper hands over first, when its [`Turn`] comes, and
/// its streams.
#[derive(Clone, Debug, Default)]
pub(super) struct Gathering {
    begun: Arc<AtomicBool>,
    streams: Streams,
}

impl<T> Executor<T> for Gathering
where
    T: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, task: T) {
        if self.begun.swap(true, Ordering::Relaxed) {
            self.streams.execute(task);
        } else {
            let (mut connection, mut turn) = (Box::pin(task), self.streams.turn());
            tokio::spawn(poll_fn(move |cx| turn.poll(connection.as_mut(), cx)));
        }
    }
}
