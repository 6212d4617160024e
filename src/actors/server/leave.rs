//! What becomes of replicas and of a server that are not wanted any more.
//!
//! The rule: what is forgotten holds nothing and is wanted for nothing, and what it kept elsewhere goes with it:
//! its place in the ledger, its door, its marks, its row.

use std::collections::BTreeSet;

use actix::Context;

use super::{ServerActor, replica::Replica};
use crate::{
    domain::{
        model::Event,
        names::ModelName,
        record::ServerRow,
        replica::{Rest, is_over},
    },
    messages::placement::ReplicaChanged,
};

impl ServerActor {
    /// Forgets replicas that hold nothing and are not wanted any more; and the server, when it is to go and has none
    /// left. One that only agents spoke of goes when its last replica has.
    pub(super) fn forget_over(&mut self, ctx: &mut Context<Self>) {
        let (now, patience) = (self.links.clock.now(), self.patience());
        let rest = |index: u32, replica: &Replica| Rest {
            state: replica.state,
            since: replica.since,
            idle: replica.is_idle(),
            connected: replica.link.is_some(),
            called: replica.hello.is_some(),
            expected: self.row.expected.map(|expected| index < expected),
            removing: self.removing,
        };
        let over = |(index, replica): (&u32, &Replica)| is_over(rest(*index, replica), patience, now).then_some(*index);
        let over: Vec<u32> = self.replicas.iter().filter_map(over).collect();
        for index in over {
            self.replicas.remove(&index);
            self.stopping.remove(&index);
            self.links.doors.remove(&self.id(index));
            self.links.placement.tell(ReplicaChanged { replica: self.id(index), facts: None });
            self.note("ReplicaRemoved", format!("replica {index} is not expected any more, and holds nothing"));
        }
        // An actor that has just begun waits for those who know of replicas.
        let unwanted = self.removing || (self.row.is_only_called() && now.since(self.begun) > patience.grace);
        if unwanted && self.replicas.is_empty() && self.committing.is_none() && self.changes.is_empty() {
            self.tell_leaving(&self.leavers.clone());
            self.remove_row(ctx);
        }
    }

    /// Whether nothing is left of the server, not even a row, and nobody wants it.
    pub(super) fn is_over(&self) -> bool {
        let quiet = self.replicas.is_empty() && self.committing.is_none() && self.changes.is_empty();
        quiet && self.row == ServerRow::called(self.row.name.clone())
    }

    /// Whether copies are to leave the replica: its owner, an operator, or its agent says so, or its server leaks.
    pub(super) fn leaves(&self, index: u32) -> bool {
        self.is_told_to_leave(index) || self.recycling.turn() == Some(index)
    }

    /// Whether its owner, an operator, or its agent says so.
    pub(super) fn is_told_to_leave(&self, index: u32) -> bool {
        self.removing || self.row.leaves(index) || self.emptied(index) || self.stopping.contains(&index)
    }

    /// Every replica that copies are to leave. Asks those that say so, not each replica whether it does.
    fn leaving(&self) -> BTreeSet<u32> {
        if self.removing {
            return self.replicas.keys().copied().collect();
        }
        let emptied = self.declaration.as_ref().map(|declaration| &declaration.emptied);
        let named = self.row.draining.iter().chain(emptied.into_iter().flatten()).chain(&self.stopping).copied();
        let named = named.chain(self.recycling.turn()).filter(|index| self.replicas.contains_key(index));
        let beyond = self.row.expected.into_iter().flat_map(|expected| self.replicas.range(expected..));
        let leaving = beyond.map(|(index, _)| *index).chain(named).collect();
        debug_assert_eq!(leaving, self.replicas.keys().copied().filter(|index| self.leaves(*index)).collect());
        leaving
    }

    /// Whether the replica is to be started anew somewhere else, once nothing is there.
    pub(super) fn emptied(&self, index: u32) -> bool {
        self.declaration.as_ref().is_some_and(|declaration| declaration.emptied.contains(&index))
    }

    /// Tells models which replicas their copies are to leave. Those that were never told of any need not be told that
    /// there is none.
    pub(super) fn tell_leaving(&mut self, models: &BTreeSet<ModelName>) {
        let leaving = self.leaving();
        for model in models {
            let told = self.leavers.contains(model);
            if leaving.is_empty() && !told {
                continue;
            }
            let known = self.tell(model, Event::Leaving(self.row.name.clone(), leaving.clone()));
            if leaving.is_empty() || !known {
                self.leavers.remove(model);
            } else if !told {
                self.leavers.insert(model.clone());
            }
        }
    }

    /// Every model that has to know what leaves: those with a copy here, and those that moved away because of a
    /// mark that may be taken back now.
    pub(super) fn concerned(&self) -> BTreeSet<ModelName> {
        self.replicas.values().flat_map(Replica::models).chain(self.leavers.iter().cloned()).collect()
    }
}
