//! What changes a server's row: its owner, an operator, the doors of its agents.
//!
//! The rule: journal first, memory second. What comes together is decided together, on a copy of the row, and is
//! committed before anything comes of it. Meanwhile the next changes wait: none is ever built on a row that the
//! journal may refuse. A refused commit drops the copy, and all who waited for it are told.

use std::{collections::BTreeSet, mem};

use actix::{AsyncContext as _, Context, Handler};

use super::ServerActor;
use crate::{
    domain::{
        error::{Code, Refusal},
        record::{ServerRow, Write},
        server::Claim,
    },
    messages::{
        Ask, Reply,
        journal::{Commit, Committed},
        server::{Declaration, Declare, DeclareServer, MarkReplica, SetMark},
        supervisor::{Taken, Terminated, Who},
    },
};

/// What is asked of the row.
pub(super) enum Change {
    Declare(DeclareServer),
    Mark(MarkReplica),
    /// Where the door of a replica is.
    Door(u32, String),
    /// Nothing is to be kept of replicas that are not known.
    Prune,
}

/// The row as it will be once the journal has it, and who waits for that.
pub(super) struct Tentative {
    row: ServerRow,
    /// Whether the row leaves the journal.
    gone: bool,
    /// What the owner said last.
    declared: Option<Declare>,
    answers: Vec<Answer>,
}

enum Answer {
    Declared(Reply<Result<(), Refusal>>, Result<(), Refusal>),
    Marked(Reply<Result<BTreeSet<u32>, Refusal>>, Result<BTreeSet<u32>, Refusal>),
}

impl Answer {
    /// Sends it; or, where there is one, the problem that kept it from becoming true. Whoever asked may have given up.
    fn send(self, problem: Option<&str>) {
        let refusal = problem.map(|problem| {
            let text = format!("the journal could not be written ({problem}); nothing was changed");
            Refusal::new(Code::Unavailable, text)
        });
        match self {
            Self::Declared(reply, answer) => drop(reply.send(refusal.map_or(answer, Err))),
            Self::Marked(reply, answer) => drop(reply.send(refusal.map_or(answer, Err))),
        }
    }
}

impl ServerActor {
    pub(super) fn change(&mut self, change: Change, ctx: &mut Context<Self>) {
        self.changes.push_back(change);
        self.decide(ctx);
    }

    fn decide(&mut self, ctx: &mut Context<Self>) {
        if self.committing.is_some() || self.changes.is_empty() {
            return;
        }
        let mut next = Tentative { row: self.row.clone(), gone: false, declared: None, answers: Vec::new() };
        for change in mem::take(&mut self.changes) {
            self.apply(change, &mut next);
        }
        if next.row == self.row {
            self.install(next, ctx);
        } else {
            let write = Write::PutServer(Box::new(next.row.clone()));
            self.commit(write, next, ctx);
        }
    }

    fn commit(&mut self, write: Write, next: Tentative, ctx: &Context<Self>) {
        self.committing = Some(next);
        self.links.journal.tell(Commit { writes: vec![write], by: ctx.address().recipient() });
    }

    fn apply(&self, change: Change, next: &mut Tentative) {
        match change {
            Change::Declare(Ask { question, reply }) => {
                let answer = claim(&next.row, &question).map(|row| {
                    next.row = row;
                    next.declared = Some(question);
                });
                next.answers.push(Answer::Declared(reply, answer));
            }
            Change::Mark(Ask { question, reply }) => {
                let answer = self.chosen(&question).inspect(|chosen| next.row.mark(question.mark, chosen));
                next.answers.push(Answer::Marked(reply, answer));
            }
            Change::Door(index, door) => drop(next.row.doors.insert(index, door)),
            Change::Prune => drop(next.row.keep_only(|index| self.replicas.contains_key(&index))),
        }
    }

    /// The replicas that an operator means.
    fn chosen(&self, mark: &SetMark) -> Result<BTreeSet<u32>, Refusal> {
        let known = || self.replicas.keys().copied();
        let chosen: BTreeSet<u32> =
            known().filter(|index| mark.replica.is_none_or(|wanted| wanted == *index)).collect();
        if !chosen.is_empty() {
            return Ok(chosen);
        }
        let known: Vec<String> = known().map(|index| index.to_string()).collect();
        let text = format!(
            "server {} has no replica {}; it has {}",
            mark.server,
            mark.replica.map_or_else(String::new, |index| index.to_string()),
            if known.is_empty() { "none".to_owned() } else { known.join(", ") }
        );
        Err(Refusal::new(Code::NotFound, text))
    }

    fn install(&mut self, next: Tentative, ctx: &mut Context<Self>) {
        let moves =
            next.declared.is_some() || next.row.expected != self.row.expected || next.row.draining != self.row.draining;
        let closes = next.row.cordoned != self.row.cordoned;
        self.row = next.row;
        if let Some(declare) = next.declared {
            self.take(&declare);
            self.links.supervisor.tell(Taken(declare));
        }
        if moves || closes {
            self.expect();
            self.publish();
        }
        // Where a door is is no news to models; to ask all of them whenever an agent calls would take too long.
        if moves {
            self.tell_leaving(&self.concerned());
        }
        if next.answers.is_empty() {
            self.show_soon(ctx);
        } else {
            // Whoever asked may look at once.
            self.show();
        }
        for answer in next.answers {
            answer.send(None);
        }
        if next.gone {
            // The next one of this name begins with nothing.
            (self.removing, self.declaration) = (false, None);
            if self.is_over() {
                self.links.supervisor.tell(Terminated(Who::Server(self.row.name.clone())));
            }
        }
        self.decide(ctx);
    }

    /// Takes what the owner said: how the server is to be, or that it is to go.
    fn take(&mut self, Declare { declaration, .. }: &Declare) {
        let removes = declaration.is_none();
        if removes && !self.removing {
            self.note("Removing", "its owner took it away; its models move first".to_owned());
        }
        self.removing = removes;
        if let Some(declaration) = declaration {
            self.declaration = Some(declaration.clone());
        }
    }

    /// Brings the row to what is known of replicas, should a commit of it have failed.
    pub(super) fn compare(&mut self, ctx: &mut Context<Self>) {
        if self.committing.is_some() || !self.changes.is_empty() {
            return;
        }
        let told = |(index, replica): (&u32, &super::replica::Replica)| {
            let door = replica.hello.as_ref().map(|hello| &hello.door)?;
            (self.row.doors.get(index) != Some(door)).then(|| Change::Door(*index, door.clone()))
        };
        let mut changes: Vec<Change> = self.replicas.iter().filter_map(told).collect();
        if self.row.kept().any(|index| !self.replicas.contains_key(&index)) {
            changes.push(Change::Prune);
        }
        self.changes.extend(changes);
        self.decide(ctx);
    }

    /// Removes the row, for nothing is left of the server.
    pub(super) fn remove_row(&mut self, ctx: &Context<Self>) {
        let row = ServerRow::called(self.row.name.clone());
        let next = Tentative { row, gone: true, declared: None, answers: Vec::new() };
        self.commit(Write::RemoveServer(self.row.name.clone()), next, ctx);
    }
}

/// The row, once its owner has said this of it.
fn claim(row: &ServerRow, said: &Declare) -> Result<ServerRow, Refusal> {
    match &said.declaration {
        None => row.released(said.owner).map(|()| row.clone()),
        Some(Declaration { replicas, bounds, kubernetes, .. }) => {
            let claim = Claim { replicas: *replicas, bounds: *bounds, kubernetes: kubernetes.clone() };
            row.claimed(said.owner, &claim)
        }
    }
}

impl Handler<DeclareServer> for ServerActor {
    type Result = ();

    fn handle(&mut self, ask: DeclareServer, ctx: &mut Self::Context) {
        self.change(Change::Declare(ask), ctx);
    }
}

impl Handler<MarkReplica> for ServerActor {
    type Result = ();

    fn handle(&mut self, ask: MarkReplica, ctx: &mut Self::Context) {
        self.change(Change::Mark(ask), ctx);
    }
}

impl Handler<Committed> for ServerActor {
    type Result = ();

    fn handle(&mut self, Committed(result): Committed, ctx: &mut Self::Context) {
        let Some(next) = self.committing.take() else { return };
        match result {
            Ok(()) => self.install(next, ctx),
            Err(problem) => {
                for answer in next.answers {
                    answer.send(Some(&problem));
                }
                self.decide(ctx);
            }
        }
    }
}
