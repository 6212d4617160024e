//! The journal's actor: groups what others want written into one commit after the other.
//!
//! While one commit is on its way to the disk the next one gathers, so the disk decides how many share one.
//! Reading and writing have one order: what is read holds every commit that was asked for before, and none after.
//! When a commit's outcome is unknown nothing that is in memory can be trusted: the process exits.

use std::{collections::VecDeque, sync::Arc};

use actix::{Actor, ActorFutureExt as _, AsyncContext as _, Context, Handler, Recipient, WrapFuture as _};
use serde_json::json;

use super::{life::Life, links::Links};
use crate::{
    domain::{record::Write, time::Instant},
    messages::{
        journal::{At, Commit, Committed, Found, Look},
        supervisor::Observe,
    },
    ports::{CommitError, OpenError, Store},
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
    waiting: VecDeque<Wish>,
    /// Whether the disk is at work for one of them.
    working: bool,
    links: Arc<Links>,
    _life: Life,
}

/// What is asked of the journal, in the order in which it is done.
enum Wish {
    Write(Commit),
    Read(Look),
}

impl Journal {
    pub(super) fn new(store: Arc<dyn Store>, blocking: bool, fatal: Fatal, links: Arc<Links>, life: Life) -> Self {
        Self { store, blocking, fatal, waiting: VecDeque::new(), working: false, links, _life: life }
    }

    /// Begins the next piece of work, if the disk has none.
    fn work(&mut self, ctx: &mut Context<Self>) {
        if self.working {
            return;
        }
        let writes = self.commits();
        if !writes.is_empty() {
            self.commit(writes, ctx);
            return;
        }
        let reads = self.reads();
        if !reads.is_empty() {
            self.read(reads, ctx);
        }
    }

    /// The commits before the next reading that fit into one group.
    fn commits(&mut self) -> Vec<Commit> {
        let (mut group, mut rows) = (Vec::new(), 0);
        while let Some(Wish::Write(commit)) = self.waiting.front() {
            rows += commit.writes.len();
            if rows > GROUP && !group.is_empty() {
                break;
            }
            let Some(Wish::Write(commit)) = self.waiting.pop_front() else { break };
            group.push(commit);
        }
        group
    }

    /// The readings before the next commit.
    fn reads(&mut self) -> Vec<Look> {
        let mut group = Vec::new();
        while group.len() < GROUP
            && let Some(Wish::Read(_)) = self.waiting.front()
            && let Some(Wish::Read(look)) = self.waiting.pop_front()
        {
            group.push(look);
        }
        group
    }

    fn commit(&mut self, commits: Vec<Commit>, ctx: &mut Context<Self>) {
        let mut writes: Vec<Write> = Vec::new();
        let mut by: Vec<Recipient<Committed>> = Vec::with_capacity(commits.len());
        for commit in commits {
            writes.extend(commit.writes);
            by.push(commit.by);
        }
        self.working = true;
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

    fn read(&mut self, looks: Vec<Look>, ctx: &mut Context<Self>) {
        self.working = true;
        let (store, blocking) = (Arc::clone(&self.store), self.blocking);
        let (places, by): (Vec<At>, Vec<Recipient<Found>>) = looks.into_iter().map(|look| (look.at, look.by)).unzip();
        let asked = places.clone();
        let work = async move {
            let read = move || places.into_iter().map(|at| found(store.as_ref(), at)).collect::<Vec<_>>();
            if !blocking {
                return read();
            }
            match tokio::task::spawn_blocking(read).await {
                Ok(found) => found,
                Err(error) => asked
                    .into_iter()
                    .map(|at| Found::Unreadable(at, format!("the reading's thread ended: {error}")))
                    .collect(),
            }
        };
        let done = work.into_actor(self).map(move |found, journal, ctx| {
            for (recipient, found) in by.iter().zip(found) {
                recipient.do_send(found);
            }
            journal.working = false;
            journal.work(ctx);
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
        self.working = false;
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
        self.work(ctx);
    }
}

fn found(store: &dyn Store, at: At) -> Found {
    let unreadable = |at: At, error: &OpenError| Found::Unreadable(at, error.to_string());
    match at {
        At::Model(name) => match store.load_model(&name) {
            Ok(rows) => Found::Model(name, rows),
            Err(error) => unreadable(At::Model(name), &error),
        },
        At::Server(name) => match store.load_server(&name) {
            Ok(row) => Found::Server(name, row),
            Err(error) => unreadable(At::Server(name), &error),
        },
    }
}

impl Actor for Journal {
    type Context = Context<Self>;
}

impl Handler<Commit> for Journal {
    type Result = ();

    fn handle(&mut self, commit: Commit, ctx: &mut Self::Context) {
        self.waiting.push_back(Wish::Write(commit));
        self.work(ctx);
    }
}

impl Handler<Look> for Journal {
    type Result = ();

    fn handle(&mut self, look: Look, ctx: &mut Self::Context) {
        self.waiting.push_back(Wish::Read(look));
        self.work(ctx);
    }
}

impl Handler<Observe> for Journal {
    type Result = ();

    fn handle(&mut self, round: Observe, _: &mut Self::Context) {
        round.answer("journal", json!({ "waiting": self.waiting.len(), "committing": self.working }));
    }
}
