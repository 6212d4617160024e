//! What the journal holds becomes actors again: all of it when the scheduler starts, one model after a panic.
//!
//! The rule of this file: the ledger and the route table have everything before any model's actor asks for a place
//! or any gateway for its routes. A table with only some of the models would tell a gateway that the others are gone;
//! a ledger with only some of the copies would give their memory away.

use std::{
    collections::BTreeSet,
    iter::{self, Peekable},
    sync::Arc,
    vec::IntoIter,
};

use actix::Context;

use super::supervisor::Supervisor;
use crate::{
    domain::{
        model::{Model, restore},
        names::{ModelName, ServerName},
        record::{Contents, ServerRow},
        time::Instant,
    },
    messages::{
        placement::{Leave, Restore},
        router::Publish,
    },
    ports::ModelRows,
};

impl Supervisor {
    /// Starts an actor for everything that the journal holds.
    pub(super) fn restore(&mut self, contents: Contents, ctx: &Context<Self>) {
        let now = self.links.clock.now();
        self.restoring = true;
        let mut known: BTreeSet<ServerName> = BTreeSet::new();
        for row in contents.servers {
            known.insert(row.name.clone());
            self.start_server(row, None, ctx);
        }
        for copy in &contents.copies {
            // Its row may have been refused when its agent called: somebody has to wait for that agent all the same.
            if known.insert(copy.replica.server.clone()) {
                self.start_server(ServerRow::called(copy.replica.server.clone()), None, ctx);
            }
        }
        debug_assert!(contents.models.is_sorted_by(|a, b| a.name < b.name));
        debug_assert!(contents.versions.is_sorted_by(|a, b| a.model <= b.model));
        debug_assert!(contents.sizes.is_sorted_by(|a, b| a.model <= b.model));
        debug_assert!(contents.copies.is_sorted_by(|a, b| a.model <= b.model));
        let mut versions = contents.versions.into_iter().peekable();
        let mut sizes = contents.sizes.into_iter().peekable();
        let mut copies = contents.copies.into_iter().peekable();
        let mut models = Vec::with_capacity(contents.models.len());
        for model in contents.models {
            let versions = of_model(&mut versions, &model.name, |row| &row.model);
            let sizes = of_model(&mut sizes, &model.name, |row| &row.model);
            let copies = of_model(&mut copies, &model.name, |row| &row.model);
            models.push(self.rebuilt(ModelRows { model, versions, copies, sizes }, now));
        }
        // What is asked of a model waits until this has ended; how it stands is on the board.
        self.links.known.cancel();
        for model in &models {
            self.reserve(model);
        }
        let count = models.len();
        for model in models {
            self.start_model(model, ctx);
        }
        self.restoring = false;
        self.links.restored.cancel();
        tracing::info!(target: "wharf::supervision", event = "restored", models = count, leader_epoch = self.links.identity.leader.epoch, "the journal is read");
    }

    pub(super) fn restore_model(&mut self, rows: ModelRows, ctx: &Context<Self>) {
        let model = self.rebuilt(rows, self.links.clock.now());
        self.reserve(&model);
        self.start_model(model, ctx);
    }

    /// A model as its rows have it. Status knows of it from here on.
    fn rebuilt(&mut self, rows: ModelRows, now: Instant) -> Arc<Model> {
        let ModelRows { model: row, versions, copies, sizes } = rows;
        if let (Some(deleted), true) = (row.deleted, copies.is_empty()) {
            self.terminated.insert((deleted, row.name.clone()));
        }
        // One that was adopted may be above what the journal reserved.
        self.next_uid = self.next_uid.max(row.uid.0);
        let mut model = restore(row, versions, copies, now).with_sizes(sizes);
        if let Some(before) = self.links.board.model(&model.name) {
            // What is still to be acknowledged for the actor that panicked must say nothing about this one's routes.
            model.revision = before.revision;
        }
        let model = Arc::new(model);
        if model.is_born() {
            self.links.board.put_model(Arc::clone(&model));
        }
        model
    }

    /// Tells the placement which memory the model's copies have, and the router its route.
    fn reserve(&self, model: &Model) {
        let links = &self.links;
        for copy in &model.copies {
            let Some(on) = copy.state.replica().cloned() else { continue };
            let (name, generation) = (model.name.clone(), copy.generation);
            let (need, pinned) = (copy.need.clone(), model.deployment.pinned);
            links.placement.tell(Restore { model: name.clone(), generation, on, need, pinned });
            if copy.draining {
                links.placement.tell(Leave { model: name, generation });
            }
        }
        if model.is_born() {
            let route = model.published(|on| links.door(on), links.outlook());
            links.router.tell(Publish { model: model.name.clone(), revision: model.revision, route });
        }
    }
}

/// The rows of model `name` from `rows`, which lie in the order of their models' names as those models do.
fn of_model<R>(rows: &mut Peekable<IntoIter<R>>, name: &ModelName, model: impl Fn(&R) -> &ModelName) -> Vec<R> {
    // A row without a model is nobody's.
    while rows.next_if(|row| model(row) < name).is_some() {}
    // Most models have one of each: room for more would be most of what a restart takes.
    let mut mine = Vec::with_capacity(usize::from(rows.peek().is_some_and(|row| model(row) == name)));
    mine.extend(iter::from_fn(|| rows.next_if(|row| model(row) == name)));
    mine
}
