//! Models and servers whose actor is being made anew, or is about to end.
//!
//! The rule of this file: a name has one actor at most, and what is asked of it is answered. While the actor is
//! absent requests wait here for the one after it. What the other actors tell it is lost: their address of it leads
//! nowhere, but it is there, so that nobody takes its copies for strays. It asks for all of that when it begins.

use std::{
    collections::{BTreeMap, VecDeque},
    mem,
    sync::Arc,
};

use actix::{AsyncContext as _, Context, Handler};

use super::supervisor::Supervisor;
use crate::{
    domain::{
        error::{Code, Refusal},
        model::{Event, Found as FoundCopy, Model},
        names::{ModelName, ServerName},
        record::{ServerRow, Write},
        version::Uid,
    },
    messages::{
        Ask,
        journal::{At, Commit, Committed, Found, Look},
        model::{Happened, Request},
        placement::Only,
        server::{DeclareServer, MarkReplica, Recall},
        supervisor::{Action, AskModel, OnModel, Stays, Stop, Terminated, Who},
    },
};

/// Requests that wait for one absent actor at most.
const HELD: usize = 1000;

/// An actor that is not there, and what waits for the one after it.
pub(super) struct Absent<T> {
    why: Why,
    held: VecDeque<T>,
}

/// Why an actor is not there.
enum Why {
    /// It panicked, for this cause. The journal is asked for its rows.
    Panicked(String),
    /// It was asked to end, and may say that it stays.
    Ending,
    /// It has ended. Its rows are to leave the journal.
    Forgotten,
}

/// What waits for a model's actor.
pub(super) enum ForModel {
    Asked(AskModel),
    Adopt(ModelName, Box<FoundCopy>),
}

/// What waits for a server's actor.
pub(super) enum ForServer {
    Declare(DeclareServer),
    Mark(MarkReplica),
}

/// What can wait.
pub(super) trait Held {
    /// Whether somebody waits for an answer.
    fn is_asked(&self) -> bool;
    /// Answers that it can't be done now.
    fn refuse(self, refusal: Refusal);
}

impl Held for ForModel {
    fn is_asked(&self) -> bool {
        matches!(self, Self::Asked(_))
    }

    fn refuse(self, refusal: Refusal) {
        match self {
            Self::Asked(ask) => drop(ask.reply.send(Err(refusal))),
            Self::Adopt(..) => {}
        }
    }
}

impl Held for ForServer {
    fn is_asked(&self) -> bool {
        true
    }

    fn refuse(self, refusal: Refusal) {
        match self {
            Self::Declare(ask) => drop(ask.reply.send(Err(refusal))),
            Self::Mark(ask) => drop(ask.reply.send(Err(refusal))),
        }
    }
}

impl<T: Held> Absent<T> {
    fn hold(&mut self, wish: T) {
        // Of what agents hold there is no more than they said; requests have no such bound.
        if self.held.len() < HELD || !wish.is_asked() {
            self.held.push_back(wish);
        } else {
            let text = "too many requests wait for a part of the scheduler that restarts; try again shortly";
            wish.refuse(Refusal::new(Code::Exhausted, text));
        }
    }
}

/// Notes why `name` has no actor; what waits goes on waiting.
fn miss<K: Ord, T>(absent: &mut BTreeMap<K, Absent<T>>, name: K, why: Why) {
    match absent.get_mut(&name) {
        Some(known) => known.why = why,
        None => drop(absent.insert(name, Absent { why, held: VecDeque::new() })),
    }
}

impl Supervisor {
    /// Gives the model's actor what is asked of it, or lets it wait for that actor.
    pub(super) fn for_model(&mut self, wish: ForModel, ctx: &mut Context<Self>) {
        let name = match &wish {
            ForModel::Asked(ask) => &ask.question.name,
            ForModel::Adopt(name, _) => name,
        };
        if let Some(absent) = self.absent_models.get_mut(name) {
            absent.hold(wish);
            return;
        }
        let known = self.links.models.get(name).map(|addr| addr.clone());
        let Ask { question: OnModel { name, action }, reply } = match wish {
            ForModel::Asked(ask) => ask,
            ForModel::Adopt(name, found) => {
                let addr = known
                    .unwrap_or_else(|| self.start_model(Arc::new(Model::unborn(name, self.links.clock.now())), ctx));
                addr.do_send(Happened(Event::Adopt(found)));
                return;
            }
        };
        let event = match action {
            Action::Submit(definition) => {
                self.next_uid += 1;
                let addr = known
                    .unwrap_or_else(|| self.start_model(Arc::new(Model::unborn(name, self.links.clock.now())), ctx));
                addr.do_send(Request { event: Event::Submit(definition, Uid(self.next_uid)), reply });
                return;
            }
            Action::Delete(kubernetes) => Event::Delete(kubernetes),
            Action::Rollback(to) => Event::Rollback(to),
            Action::Scale(replicas) => Event::Scale(replicas),
        };
        match known {
            Some(addr) => addr.do_send(Request { event, reply }),
            None => {
                let text = format!("model {name} is not known");
                drop(reply.send(Err(Refusal::new(Code::FailedPrecondition, text))));
            }
        }
    }

    /// Gives the server's actor what is asked of it, or lets it wait for that actor.
    pub(super) fn for_server(&mut self, wish: ForServer, ctx: &mut Context<Self>) {
        let name = match &wish {
            ForServer::Declare(ask) => &ask.question.server,
            ForServer::Mark(ask) => &ask.question.server,
        };
        if let Some(absent) = self.absent_servers.get_mut(name) {
            absent.hold(wish);
            return;
        }
        let (name, known) = (name.clone(), self.links.servers.get(name).map(|addr| addr.clone()));
        match (wish, known) {
            (ForServer::Declare(ask), Some(addr)) => addr.do_send(ask),
            (ForServer::Mark(ask), Some(addr)) => addr.do_send(ask),
            (ForServer::Declare(ask), None) if ask.question.declaration.is_some() => {
                self.start_server(ServerRow::called(name), None, ctx).do_send(ask);
            }
            (wish, None) => {
                let known: Vec<String> =
                    self.links.board.servers().iter().map(|server| server.row.name.to_string()).collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                let text = format!("server {name} is not known; known are: {known}");
                wish.refuse(Refusal::new(Code::NotFound, text));
            }
        }
    }

    /// Makes the actor of a model or a server anew that panicked: from the journal, once all of its own commits that
    /// are still on their way have ended. What it read before them it would write over them.
    pub(super) fn rebuild(&mut self, at: At, cause: &str, ctx: &Context<Self>) {
        let why = Why::Panicked(cause.to_owned());
        match at.clone() {
            At::Model(name) => miss(&mut self.absent_models, name, why),
            At::Server(name) => miss(&mut self.absent_servers, name, why),
        }
        self.links.journal.tell(Look { at, by: ctx.address().recipient() });
    }

    /// Asks a model's actor to end, for nothing is left of the model.
    pub(super) fn retire(&mut self, name: ModelName) {
        if !self.absent_models.contains_key(&name) && self.links.tell_model(&name, Stop) {
            miss(&mut self.absent_models, name, Why::Ending);
        }
    }

    /// A model's actor has ended by intent.
    pub(super) fn model_ended(&mut self, name: &ModelName, ctx: &mut Context<Self>) {
        if !matches!(self.absent_models.get(name), Some(Absent { why: Why::Ending, .. })) {
            return;
        }
        if self.links.board.model(name).is_some() {
            miss(&mut self.absent_models, name.clone(), Why::Forgotten);
            self.forget_rows(name.clone(), ctx);
        } else {
            // Its first submission was refused: it never was a model.
            self.model_gone(name, ctx);
        }
    }

    /// A server's actor has ended by intent.
    pub(super) fn server_ended(&mut self, name: &ServerName, ctx: &mut Context<Self>) {
        if matches!(self.absent_servers.get(name), Some(Absent { why: Why::Ending, .. })) {
            self.links.servers.remove(name);
            self.declared.remove(name);
            self.server_back(name, ctx);
        }
    }

    fn forget_rows(&mut self, name: ModelName, ctx: &Context<Self>) {
        let writes = vec![Write::RemoveModel(name.clone())];
        self.forgetting.push_back(name);
        self.links.journal.tell(Commit { writes, by: ctx.address().recipient() });
    }

    /// Tries again to remove what the journal would not let go.
    pub(super) fn forget_again(&mut self, ctx: &Context<Self>) {
        for name in mem::take(&mut self.unforgotten) {
            self.forget_rows(name, ctx);
        }
    }

    fn model_gone(&mut self, name: &ModelName, ctx: &mut Context<Self>) {
        self.links.models.remove(name);
        self.names.remove(name);
        self.links.board.remove_model(name);
        self.model_back(name, ctx);
    }

    /// The model has an actor again, or needs none: what waited is asked.
    fn model_back(&mut self, name: &ModelName, ctx: &mut Context<Self>) {
        for wish in self.absent_models.remove(name).map(|absent| absent.held).into_iter().flatten() {
            self.for_model(wish, ctx);
        }
    }

    fn server_back(&mut self, name: &ServerName, ctx: &mut Context<Self>) {
        for wish in self.absent_servers.remove(name).map(|absent| absent.held).into_iter().flatten() {
            self.for_server(wish, ctx);
        }
    }
}

impl Handler<Found> for Supervisor {
    type Result = ();

    fn handle(&mut self, found: Found, ctx: &mut Self::Context) {
        match found {
            Found::Model(name, rows) => {
                let Some(Absent { why: Why::Panicked(cause), .. }) = self.absent_models.get(&name) else { return };
                let cause = cause.clone();
                // The ledger may have a place for a copy of which the one that panicked never heard.
                let generations = rows.iter().flat_map(|rows| &rows.copies).map(|copy| copy.generation).collect();
                self.links.placement.tell(Only { model: name.clone(), generations });
                if let Some(rows) = rows {
                    self.restore_model(rows, ctx);
                    self.model_back(&name, ctx);
                } else {
                    self.model_gone(&name, ctx);
                }
                self.restarted(&Who::Model(name), &cause);
            }
            Found::Server(name, row) => {
                let Some(Absent { why: Why::Panicked(cause), .. }) = self.absent_servers.get(&name) else { return };
                let (cause, declared) = (cause.clone(), self.declared.get(&name).cloned());
                let row = row.unwrap_or_else(|| ServerRow::called(name.clone()));
                self.start_server(row, declared, ctx).do_send(Recall);
                self.server_back(&name, ctx);
                self.restarted(&Who::Server(name), &cause);
            }
            Found::Unreadable(at, problem) => {
                let who = match at {
                    At::Model(name) => Who::Model(name),
                    At::Server(name) => Who::Server(name),
                };
                self.fatal(format!("{who} can't be rebuilt from the journal: {problem}"));
            }
        }
    }
}

impl Handler<Committed> for Supervisor {
    type Result = ();

    fn handle(&mut self, Committed(result): Committed, ctx: &mut Self::Context) {
        let Some(name) = self.forgetting.pop_front() else { return };
        let Err(problem) = result else {
            self.model_gone(&name, ctx);
            return;
        };
        if let Some(absent) = self.absent_models.get_mut(&name) {
            let (asked, others) = mem::take(&mut absent.held).into_iter().partition(Held::is_asked);
            absent.held = others;
            let asked: VecDeque<ForModel> = asked;
            for wish in asked {
                let text = format!("the journal could not be written ({problem}); nothing was changed");
                wish.refuse(Refusal::new(Code::Unavailable, text));
            }
        }
        self.unforgotten.insert(name);
    }
}

impl Handler<Terminated> for Supervisor {
    type Result = ();

    fn handle(&mut self, Terminated(who): Terminated, _: &mut Self::Context) {
        match who {
            Who::Model(name) => match self.links.board.model(&name) {
                Some(model) => {
                    self.terminated.extend(model.deleted.map(|at| (at, name)));
                    self.forget();
                }
                None => self.retire(name),
            },
            Who::Server(name) => {
                if !self.absent_servers.contains_key(&name) && self.links.tell_server(&name, Stop) {
                    miss(&mut self.absent_servers, name, Why::Ending);
                }
            }
            Who::Journal | Who::Placement | Who::Router => {}
        }
    }
}

impl Handler<Stays> for Supervisor {
    type Result = ();

    fn handle(&mut self, Stays(who): Stays, ctx: &mut Self::Context) {
        match who {
            Who::Model(name) => {
                if matches!(self.absent_models.get(&name), Some(Absent { why: Why::Ending, .. })) {
                    // Should nothing come of what keeps it, it is asked again with the next scan.
                    let deleted = self.links.board.model(&name).and_then(|model| model.deleted);
                    self.terminated.extend(deleted.map(|at| (at, name.clone())));
                    self.model_back(&name, ctx);
                }
            }
            Who::Server(name) => {
                if matches!(self.absent_servers.get(&name), Some(Absent { why: Why::Ending, .. })) {
                    self.server_back(&name, ctx);
                }
            }
            Who::Journal | Who::Placement | Who::Router => {}
        }
    }
}
