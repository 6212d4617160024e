//! Replicas whose inference servers leak: what the domain decides about them is done, and told.
//!
//! The rule: one that is to be emptied is closed to new copies before its models are told to move theirs; and it is
//! ended by its agent, which knows best that nothing is in its memory.

use serde_json::json;

use super::{ServerActor, replica::Replica};
use crate::{
    domain::{
        copy::State,
        model::Note,
        names::ModelName,
        recycle::{Deed, Look, Stand, Why},
        replica::ReplicaState,
    },
    messages::{server::Down, supervisor::Who},
};

/// Copies without another place that are named; the rest are counted.
const NAMED: usize = 3;

impl ServerActor {
    /// Looks whether a server is to be ended and started anew, and does what comes of it.
    pub(super) fn recycle(&mut self) {
        let Some(patience) = self.links.timing.recycle else { return };
        let looks: Vec<Look> = self.replicas.iter().map(|(index, replica)| self.look(*index, replica)).collect();
        let busy = self.replicas.keys().any(|index| self.is_told_to_leave(*index));
        let before = self.recycling.turn();
        let deeds = self.recycling.look(&looks, busy, self.links.clock.now(), &patience);
        for deed in deeds {
            self.carry_out(deed);
        }
        if self.recycling.turn() != before {
            self.publish();
            self.tell_leaving(&self.concerned());
        }
    }

    fn look(&self, index: u32, replica: &Replica) -> Look {
        let (copies, stuck) = if self.recycling.turn() == Some(index) {
            let registered = self.links.board.registered(&self.id(index)).copies;
            let models = replica.models().len();
            (models.max(usize::try_from(registered).unwrap_or(usize::MAX)), self.stuck(replica).len())
        } else {
            (0, 0)
        };
        let free = replica.state == ReplicaState::Available && replica.link.is_some();
        Look {
            index,
            run: replica.run,
            free: free && !self.is_told_to_leave(index) && !self.row.closed(index),
            leaks: self.leaks(replica),
            copies,
            stuck,
        }
    }

    fn leaks(&self, replica: &Replica) -> bool {
        replica.strain.leaks(self.capacity(replica).primary, self.links.policy.leak_percent)
    }

    /// The models that have a copy on the replica and find no place for another one, and why.
    fn stuck(&self, replica: &Replica) -> Vec<(ModelName, String)> {
        let reason = |name: &ModelName| {
            let model = self.links.board.model(name)?;
            model.copies.iter().find_map(|copy| match &copy.state {
                State::Pending { reason } => reason.as_ref().map(|reason| reason.summary()),
                State::Scheduled { .. }
                | State::Downloading { .. }
                | State::Loading { .. }
                | State::Available { .. }
                | State::Draining { .. }
                | State::Unloaded
                | State::Failed { .. }
                | State::Unknown { .. } => None,
            })
        };
        replica.models().into_iter().filter_map(|name| reason(&name).map(|why| (name, why))).collect()
    }

    fn carry_out(&mut self, deed: Deed) {
        let leaked = |index: &u32| self.replicas.get(index).map(|replica| replica.strain.leaked).unwrap_or_default();
        let (kind, message, index) = match deed {
            Deed::End { index, run } => {
                if let Some(replica) = self.replicas.get_mut(&index) {
                    replica.tell(Down::Recycle(run));
                }
                return;
            }
            Deed::Begin(index) => {
                let leaked = leaked(&index);
                let message = format!(
                    "replica {index} leaks: its server keeps {leaked} that no model accounts for; its models move, then \
                     its server is started anew"
                );
                ("Recycling", message, index)
            }
            Deed::Done { index, took } => {
                let message = format!("replica {index} has its server started anew, after {} s", took.as_secs());
                ("Recycled", message, index)
            }
            Deed::GivenUp { index, why } => {
                let why = why.name();
                ("NotRecycled", format!("replica {index} goes on with the server that it has: {why}"), index)
            }
        };
        let data = json!({ "replica": index, "leaked": leaked(&index) });
        self.links.note(&Who::Server(self.row.name.clone()), Note::new(kind, message, &data));
    }

    /// What is done about the leak of a replica, for people; nothing if it has none.
    pub(super) fn remedy(&self, index: u32, replica: &Replica) -> Option<String> {
        let patience = self.links.timing.recycle;
        let stand = self.recycling.stand(index, replica.run, patience.as_ref());
        if stand != Stand::Turn && !self.leaks(replica) {
            return None;
        }
        Some(match stand {
            Stand::Foreign => "drain it and restart the server".to_owned(),
            Stand::Waits => "it is recycled if that lasts".to_owned(),
            Stand::Turn => {
                let stuck = self.stuck(replica);
                let mut remedy = "its server is started anew once its copies have moved away".to_owned();
                if !stuck.is_empty() {
                    let named = stuck.iter().take(NAMED).map(|(model, why)| format!("{model}: {why}"));
                    let named = named.collect::<Vec<_>>().join("; ");
                    remedy = format!("{remedy}; {} of them find no other place: {named}", stuck.len());
                }
                remedy
            }
            Stand::NoPlace => format!("its server can't be started anew yet, for {}", Why::NoPlace.name()),
            Stand::Hopeless(turns) => format!(
                "after {turns} turns it leaked again at once, so its server is left alone: look for the model that leaks, \
                 then drain it and restart the server"
            ),
        })
    }
}
