//! An agent that obeyed the scheduler of another journal calls: what it holds is taken up.
//!
//! The rule of this file: the models' actors know of the copies before the server's actor hears of the agent, so
//! that none is taken for a stray.

use actix::Context;

use super::{absent::ForModel, supervisor::Supervisor};
use crate::{domain::model::Found, messages::server::Hello};

impl Supervisor {
    pub(super) fn adopt(&mut self, hello: &Hello, ctx: &mut Context<Self>) {
        for held in &hello.inventory {
            // A number that was given before is never given again, not even by a journal that forgot: an older copy of
            // it that was put back has given the same numbers to other models.
            self.next_uid = self.next_uid.max(held.generation.uid.0);
        }
        if hello.lineage.is_empty() || hello.lineage == self.links.identity.lineage {
            return;
        }
        self.links.adopt();
        let mut count = 0_usize;
        for held in &hello.inventory {
            let found = held.order.as_ref().and_then(|order| Found::of(&hello.replica, order, &held.report));
            let Some((name, found)) = found else { continue };
            self.for_model(ForModel::Adopt(name, Box::new(found)), ctx);
            count += 1;
        }
        tracing::warn!(target: "wharf::supervision", event = "adopted", replica = %hello.replica, lineage = hello.lineage, copies = count, "an agent of another journal called; its copies are kept");
    }
}
