//! What becomes of replicas and of a server that are not wanted any more.
//!
//! The rule: what is forgotten holds nothing and is wanted for nothing, and what it kept elsewhere goes with it:
//! its place in the ledger, its door, its marks, its row.

use std::collections::BTreeSet;

use actix::{ActorContext as _, AsyncContext as _, Context};

use super::{Done, ServerActor, replica::Replica};
use crate::{
    domain::{model::Event, names::ModelName, record::Write},
    messages::{journal::Commit, model::Happened, placement::ReplicaChanged},
};

impl ServerActor {
    /// Forgets replicas that are not expected and hold nothing; and the server, when it is to go and has none left.
    pub(super) fn forget_empty(&mut self, ctx: &Context<Self>) {
        let expected = self.row.expected.unwrap_or(u32::MAX);
        // While its agent is connected a removed server stays: forgotten, it would be made anew by the next word.
        let gone = |index: u32, replica: &Replica| match self.removing {
            true => replica.is_idle() && replica.link.is_none(),
            false => index >= expected && replica.is_idle(),
        };
        let gone: Vec<u32> =
            self.replicas.iter().filter(|(index, replica)| gone(**index, replica)).map(|(index, _)| *index).collect();
        let mut row = self.latest_row().clone();
        for index in gone {
            self.replicas.remove(&index);
            self.links.doors.remove(&self.id(index));
            self.links.placement.tell(ReplicaChanged { replica: self.id(index), facts: None });
            row.doors.remove(&index);
            row.cordoned.remove(&index);
            row.draining.remove(&index);
            self.note("ReplicaRemoved", format!("replica {index} is not expected any more, and holds nothing"));
        }
        if row != *self.latest_row() {
            self.commit(row, Done::Seen, ctx);
        }
        let ending = self.committing.iter().any(|(_, done)| matches!(done, Done::Removed));
        if self.removing && self.replicas.is_empty() && !ending {
            let writes = vec![Write::RemoveServer(self.row.name.clone())];
            self.links.journal.tell(Commit { writes, by: ctx.address().recipient() });
            self.committing.push_back((self.row.clone(), Done::Removed));
        }
    }

    /// The server's row is gone: so is the server, unless somebody needs it again since.
    pub(super) fn end(&mut self, ctx: &mut Context<Self>) {
        if !self.committing.is_empty() {
            return;
        }
        if !self.removing || !self.replicas.is_empty() {
            self.commit(self.row.clone(), Done::Seen, ctx);
            return;
        }
        self.note("Removed", "nothing of it is left".to_owned());
        self.links.servers.remove(&self.row.name);
        self.links.board.remove_server(&self.row.name);
        ctx.stop();
    }

    /// Whether copies are to leave the replica: its owner, an operator, or its agent says so.
    pub(super) fn leaves(&self, index: u32) -> bool {
        self.removing
            || self.row.leaves(index)
            || self.emptied(index)
            || self.replicas.get(&index).is_some_and(|replica| replica.stopping)
    }

    /// Whether the replica is to be started anew somewhere else, once nothing is there.
    pub(super) fn emptied(&self, index: u32) -> bool {
        self.declaration.as_ref().is_some_and(|declaration| declaration.emptied.contains(&index))
    }

    /// Tells models which replicas their copies are to leave.
    pub(super) fn tell_leaving(&self, models: &BTreeSet<ModelName>) {
        let leaving: BTreeSet<u32> = self.replicas.keys().copied().filter(|index| self.leaves(*index)).collect();
        for model in models {
            self.links.tell_model(model, Happened(Event::Leaving(self.row.name.clone(), leaving.clone())));
        }
    }

    /// Every model that has to know what leaves: those with a copy here, and those that moved away because of a
    /// mark that may be taken back now.
    pub(super) fn concerned(&self) -> BTreeSet<ModelName> {
        let mut concerned: BTreeSet<ModelName> = self.replicas.values().flat_map(Replica::models).collect();
        for model in self.links.board.models() {
            if model.leaving().iter().any(|replica| replica.server == self.row.name) {
                concerned.insert(model.name.clone());
            }
        }
        concerned
    }
}
