//! The one way to ask an actor something from outside.

use std::{fmt, sync::Arc, time::Duration};

use actix::{Message, Recipient};
use tokio::sync::{Semaphore, oneshot};

use super::Reply;
use crate::domain::error::{Code, Refusal};

/// A question with the place for its answer.
#[derive(Debug)]
pub struct Ask<Q, A> {
    /// What is asked.
    pub question: Q,
    /// Where the answer goes.
    pub reply: Reply<A>,
}

impl<Q: Send + 'static, A: Send + 'static> Message for Ask<Q, A> {
    type Result = ();
}

/// Permits and a deadline around an actor's mailbox, which has no bound of its own.
pub struct Gate<Q: Send + 'static, A: Send + 'static> {
    to: Recipient<Ask<Q, A>>,
    permits: Arc<Semaphore>,
    deadline: Duration,
}

impl<Q: Send + 'static, A: Send + 'static> Gate<Q, A> {
    /// A gate to `to`: at most `permits` questions wait, each for at most `deadline`.
    #[must_use]
    pub fn new(to: Recipient<Ask<Q, A>>, permits: usize, deadline: Duration) -> Self {
        Self { to, permits: Arc::new(Semaphore::new(permits)), deadline }
    }

    /// Asks and waits. A question that the deadline overtakes may still be carried out.
    ///
    /// # Errors
    /// `Exhausted` when too many wait already, `Unavailable` when the actor is gone or restarting,
    /// `DeadlineExceeded` when no answer came in time.
    pub async fn ask(&self, question: Q) -> Result<A, Refusal> {
        let Ok(_permit) = self.permits.try_acquire() else {
            return Err(Refusal::new(Code::Exhausted, "too many requests wait for the scheduler; try again shortly"));
        };
        let (reply, answer) = oneshot::channel();
        self.to.do_send(Ask { question, reply });
        match tokio::time::timeout(self.deadline, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(Refusal::new(
                Code::Unavailable,
                "the part of the scheduler that answers this has just restarted; try again",
            )),
            Err(_) => Err(Refusal::new(
                Code::DeadlineExceeded,
                format!(
                    "the scheduler did not answer within {:?}; ask for the status before trying again",
                    self.deadline
                ),
            )),
        }
    }
}

impl<Q: Send + 'static, A: Send + 'static> Clone for Gate<Q, A> {
    fn clone(&self) -> Self {
        Self { to: self.to.clone(), permits: Arc::clone(&self.permits), deadline: self.deadline }
    }
}

impl<Q: Send + 'static, A: Send + 'static> fmt::Debug for Gate<Q, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("free", &self.permits.available_permits()).finish_non_exhaustive()
    }
}
