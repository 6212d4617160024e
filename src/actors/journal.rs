//! The journal's actor: groups what others want written into one commit after the other.
//!
//! While one commit is on its way to the disk the next one gathers, so the disk decides how many share one.
//! When a commit's outcome is unknown nothing that is in memory can be trusted: the process exits.

use std::sync::Arc;

use actix::{Actor, ActorFutureExt as _, AsyncContext as _, Context, Handler, Recipient, WrapFuture as _};
use serde_json::json;

use super::{life::Life, links::Links};
use crate::{
    domain::{record::Write, time::Instant},
    messages::{
        journal::{Commit, Committed},
        supervisor::Observe,
    },
    ports::{CommitError, Store},
    telemetry::metrics::Commit as Outcome,
};

/// Writes of one group, at most. A larger one would hold the reservation of too many back.
const GROUP: usize = 16_384;

/// Ends the process, after saying why.
pub type Fatal = Arc<dyn Fn(String) + Send + Sync>;

pub(super) struct Journal {
    store: Arc<dyn Store>,
    /// Whether commits run on a thread for blocking work.
    blocking: bool,
    fatal: Fatal,
    waiting: Vec<Commit>,
    committing: bool,
    links: Arc<Links>,
    _life: Life,
}

impl Journal {
    pub(super) fn new(store: Arc<dyn Store>, blocking: bool, fatal: Fatal, links: Arc<Links>, life: Life) -> Self {
        Self { store, blocking, fatal, waiting: Vec::new(), committing: false, links, _life: life }
    }

    fn commit(&mut self, ctx: &mut Context<Self>) {
        if self.committing || self.waiting.is_empty() {
            return;
        }
        let mut writes: Vec<Write> = Vec::new();
        let mut by: Vec<Recipient<Committed>> = Vec::new();
        let fitting = self
            .waiting
            .iter()
            .scan(0, |sum, commit| {
                *sum += commit.writes.len();
                Some(*sum)
            })
            .take_while(|sum| *sum <= GROUP)
            .count();
        for commit in self.waiting.drain(..fitting.max(1)) {
            writes.extend(commit.writes);
            by.push(commit.by);
        }
        self.committing = true;
        let (store, blocking) = (Arc::clone(&self.store), self.blocking);
        let (rows, begun) = (writes.len(), self.links.clock.now());
        let work = async move {
            if !blocking {
                return store.commit(&writes);
            }
            match tokio::task::spawn_blocking(move || store.commit(&writes)).await {
                Ok(result) => result,
                Err(error) => Err(CommitError::Unknown(format!("the commit's thread ended: {error}"))),
            }
        };
        let done = work.into_actor(self).map(move |result, journal, ctx| {
            journal.count(&result, rows, begun);
            journal.committed(result, &by, ctx);
        });
        ctx.spawn(done);
    }

    fn count(&self, result: &Result<(), CommitError>, rows: usize, begun: Instant) {
        let outcome = match result {
            Ok(()) => Outcome::Committed,
            Err(CommitError::Failed(_)) => Outcome::Failed,
            Err(CommitError::Unknown(_)) => Outcome::Unknown,
        };
        let links = &self.links;
        links.metrics.scheduler.commit(outcome, rows, links.clock.now().since(begun));
    }

    fn committed(&mut self, result: Result<(), CommitError>, by: &[Recipient<Committed>], ctx: &mut Context<Self>) {
        self.committing = false;
        let result = match result {
            Ok(()) => {
                self.links.journal_problem.store(None);
                Ok(())
            }
            Err(CommitError::Failed(problem)) => {
                tracing::error!(target: "wharf::journal", %problem, "a commit failed; nothing of it was written");
                self.links.journal_problem.store(Some(Arc::new(problem.clone())));
                Err(problem)
            }
            Err(CommitError::Unknown(problem)) => {
                (self.fatal)(format!(
                    "the journal's last commit has an unknown outcome ({problem}); exiting to read it again"
                ));
                return;
            }
        };
        for recipient in by {
            recipient.do_send(Committed(result.clone()));
        }
        self.commit(ctx);
    }
}

impl Actor for Journal {
    type Context = Context<Self>;
}

impl Handler<Commit> for Journal {
    type Result = ();

    fn handle(&mut self, commit: Commit, ctx: &mut Self::Context) {
        self.waiting.push(commit);
        self.commit(ctx);
    }
}

impl Handler<Observe> for Journal {
    type Result = ();

    fn handle(&mut self, round: Observe, _: &mut Self::Context) {
        round.answer("journal", json!({ "waiting": self.waiting.len(), "committing": self.committing }));
    }
}
