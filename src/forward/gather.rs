//! When a connection of many streams is at work: after the tasks that its last work made ready.
//!
//! The rule of this module: a connection that is woken lets everybody who is ready go first. tokio's workers run who was
//! woken last at once, so that a connection is otherwise run anew by each stream that hands it a frame, and writes
//! that frame alone; a system call for each is the dearest part of a small request. Gathered, what thirty streams have to
//! say goes out in one.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use hyper::rt::Executor;
use tokio::task::yield_now;

/// Whose turn it is: the connection's, or that of those who are ready.
#[derive(Debug, Default)]
pub(super) struct Turn {
    came: bool,
}

impl Turn {
    /// Polls `connection` where it has let the others go first, and lets them where it has not.
    pub(super) fn poll<C: Future>(&mut self, connection: Pin<&mut C>, cx: &mut Context<'_>) -> Poll<C::Output> {
        self.came = !self.came;
        if self.came {
            // Asks to be woken once nobody is ready, and no event has come that makes somebody so.
            if pin!(yield_now()).poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.came = false;
        }
        connection.poll(cx)
    }
}

/// Runs the tasks of a client's connection: the connection itself, which hyper hands over first, after those that are
/// ready, and its streams as they come.
#[derive(Clone, Debug, Default)]
pub(super) struct Gathering {
    begun: Arc<AtomicBool>,
}

impl<T> Executor<T> for Gathering
where
    T: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, task: T) {
        if self.begun.swap(true, Ordering::Relaxed) {
            tokio::spawn(task);
        } else {
            let (mut connection, mut turn) = (Box::pin(task), Turn::default());
            tokio::spawn(poll_fn(move |cx| turn.poll(connection.as_mut(), cx)));
        }
    }
}
