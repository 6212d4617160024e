//! Questions that take a look at every model.
//!
//! The rule of this module: no thread that serves connections looks at every model. With a million of them that takes
//! tenths of a second, in which every other connection of that thread would wait, and the task that it was to run next can
//! be taken over by no other thread.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tonic::Status;

use crate::messages::Board;

/// Looks that are taken at a time: they are work for a processor, which whoever asks for one thing wants as well.
const LOOKS: usize = 2;

/// What readers see of all models.
#[derive(Clone, Debug)]
pub struct Directory {
    board: Arc<Board>,
    /// A place for each look; none where looks are taken on the thread that asks.
    places: Option<Arc<Semaphore>>,
}

impl Directory {
    /// The directory of the models on `board`; looks that take long on threads for `blocking` work, or, in a simulation of one
    /// thread, on that.
    #[must_use]
    pub fn new(board: Arc<Board>, blocking: bool) -> Self {
        Self { board, places: blocking.then(|| Arc::new(Semaphore::new(LOOKS))) }
    }

    /// What is there, for questions about one thing.
    pub(super) fn board(&self) -> &Arc<Board> {
        &self.board
    }

    /// What a `look` at everything finds.
    ///
    /// # Errors
    /// The look panicked, or the process is ending.
    pub(super) async fn find<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Board) -> T + Send + 'static,
    ) -> Result<T, Status> {
        let Some(places) = &self.places else { return Ok(look(&self.board)) };
        let ended =
            |error: &dyn std::fmt::Display| Status::internal(format!("the look at all models ended early: {error}"));
        let place = Arc::clone(places).acquire_owned().await.map_err(|error| ended(&error))?;
        let board = Arc::clone(&self.board);
        let looking = tokio::task::spawn_blocking(move || {
            // Also when nobody waits for the answer any more.
            let _place = place;
            look(&board)
        });
        looking.await.map_err(|error| ended(&error))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[tokio::test]
    async fn a_look_at_all_models_keeps_the_thread_that_asks_for_it_free() {
        let here = thread::current().id();
        for blocking in [true, false] {
            let directory = Directory::new(Arc::default(), blocking);
            let there = directory.find(|_| thread::current().id()).await.unwrap();
            assert_eq!(there != here, blocking);
        }
    }
}
