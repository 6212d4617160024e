//! Copies that do not fit their replicas any more: what the domain decides about them is told to their models, and to
//! whoever looks.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use actix::{AsyncContext as _, Context, Handler, Message};
use serde_json::json;

use super::PlacementActor;
use crate::{
    domain::{
        model::{Event, Note},
        names::{ModelName, ReplicaId},
        placement::{Condition, Key, PlacementRequest, Relief, Replica},
        version::Generation,
    },
    messages::{Registered, model::Happened, supervisor::Who},
};

/// How often a replica that its copies do not fit is looked at again: what was told may be lost, and what is free
/// elsewhere changes.
pub(super) const AGAIN: Duration = Duration::from_secs(1);
/// Copies without a place that are named; the rest are counted.
const NAMED: usize = 3;

#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Look;

impl Handler<Look> for PlacementActor {
    type Result = ();

    fn handle(&mut self, _: Look, ctx: &mut Self::Context) {
        self.looking = false;
        // One at a time: placements do not wait for all of them.
        let Some(id) = self.looks.pop_first() else { return };
        let requests = if self.placement.is_judged(&id) { self.requests(&id) } else { BTreeMap::new() };
        let relief = self.placement.relieve(&id, &requests, self.links.clock.now());
        self.tell_displaced(&relief);
        self.show_with(&id, &relief);
        if self.is_strained(&id) || !relief.moves.is_empty() {
            self.strained.insert(id);
        } else {
            self.strained.remove(&id);
        }
        self.look_soon(ctx);
    }
}

fn copies(count: usize) -> String {
    format!("{count} {}", if count == 1 { "copy" } else { "copies" })
}

impl PlacementActor {
    /// Looks at what is to be looked at, once for all that changes until then.
    pub(super) fn look_soon(&mut self, ctx: &mut Context<Self>) {
        if !self.looking && !self.looks.is_empty() {
            self.looking = true;
            ctx.notify(Look);
        }
    }

    /// Looks again at the replicas that something was out of order with.
    pub(super) fn look_again(&mut self, ctx: &mut Context<Self>) {
        self.looks.extend(self.strained.iter().cloned());
        self.look_soon(ctx);
    }

    /// What is registered on the replica has changed.
    pub(super) fn look_if_strained(&mut self, id: &ReplicaId, ctx: &mut Context<Self>) {
        if self.strained.contains(id) || self.is_strained(id) {
            self.looks.insert(id.clone());
            self.look_soon(ctx);
        }
    }

    fn is_strained(&self, id: &ReplicaId) -> bool {
        let strained = |replica: &Replica| replica.over_limit().is_some() || replica.crowded().is_some();
        self.placement.ledger().replica(id).is_some_and(strained)
    }

    /// What each copy on the replica would ask for elsewhere.
    fn requests(&self, id: &ReplicaId) -> BTreeMap<Key, PlacementRequest> {
        let request = |(name, generation): &Key| {
            let model = self.links.board.model(name)?;
            let copy = model.copies.iter().find(|copy| copy.generation == *generation)?;
            Some(self.request(name, &model.wanted(copy)?))
        };
        let copies = self.placement.ledger().replica(id).into_iter().flat_map(|replica| replica.copies());
        copies.filter_map(|key| Some((key.clone(), request(key)?))).collect()
    }

    /// Tells models which of their copies are to move, where they do not know it.
    fn tell_displaced(&self, relief: &Relief) {
        let models: BTreeSet<&ModelName> = relief.moves.iter().chain(&relief.kept).map(|(model, _)| model).collect();
        for name in models {
            let copies = self.placement.ledger().copies_of(name).filter(|(_, copy)| copy.displaced);
            let displaced: BTreeSet<Generation> = copies.map(|(generation, _)| *generation).collect();
            if self.links.board.model(name).is_some_and(|model| *model.displaced() != displaced) {
                self.links.tell_model(name, Happened(Event::Displaced(displaced)));
            }
        }
    }

    /// Shows readers what is registered on a replica.
    pub(super) fn show(&self, id: &ReplicaId) {
        let Some(replica) = self.placement.ledger().replica(id) else { return };
        let copies = u32::try_from(replica.copies().len()).unwrap_or(u32::MAX);
        let before = self.links.board.registered(id);
        let over_limit = replica.over_limit().is_some();
        // What a look came to holds until the next one.
        let conditions = before.conditions;
        if over_limit != before.over_limit {
            let over = replica.conditions().into_iter().find(|what| matches!(what, Condition::OverLimit { .. }));
            let (kind, message) = match over {
                Some(over) => ("OverLimit", format!("replica {} is {over}", id.index)),
                None => ("WithinLimit", format!("replica {} is within its limit again", id.index)),
            };
            let data = json!({ "registered": replica.registered(), "limit": replica.limit() });
            self.links.note(&Who::Server(id.server.clone()), Note::new(kind, message, &data));
        }
        let registered = Registered { bytes: replica.registered(), copies, over_limit, conditions };
        self.links.board.put_registered(id.clone(), registered);
    }

    /// Shows that, and what a look at the replica came to.
    fn show_with(&self, id: &ReplicaId, relief: &Relief) {
        self.show(id);
        let Some(replica) = self.placement.ledger().replica(id) else { return };
        let mut conditions = Vec::new();
        let strained = |what: &Condition| match what {
            Condition::OverLimit { .. } | Condition::Crowded { .. } => true,
            Condition::CapacityDiffers { .. } => false,
        };
        conditions.extend(replica.conditions().iter().filter(|what| strained(what)).map(|what| format!("is {what}")));
        let (moving, stuck) = (relief.moves.len() - relief.stuck.len(), relief.stuck.len());
        if moving > 0 {
            conditions.push(format!("moves {} away", copies(moving)));
        }
        if stuck > 0 {
            let named = relief.stuck.iter().take(NAMED).map(|((model, _), why)| format!("{model}: {why}"));
            let named = named.collect::<Vec<_>>().join("; ");
            conditions.push(format!("keeps {} for want of another place: {named}", copies(stuck)));
        }
        let registered = self.links.board.registered(id);
        self.links.board.put_registered(id.clone(), Registered { conditions, ..registered });
    }
}
