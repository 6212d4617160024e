//! What others are told of a server.

use std::sync::Arc;

use super::{ServerActor, replica::Replica};
use crate::{
    domain::{memory::Resources, replica::shown},
    messages::{
        ReplicaView, ServerView,
        placement::{ReplicaChanged, ReplicaFacts},
    },
};

impl ServerActor {
    /// Memory of a replica: of what is declared and what its agent reports, the smaller counts.
    fn capacity(&self, replica: &Replica) -> Resources {
        match (self.declaration.as_ref().and_then(|declaration| declaration.capacity.as_ref()), &replica.hello) {
            (Some(declared), Some(hello)) => declared.min(&hello.capacity),
            (Some(declared), None) => declared.clone(),
            (None, Some(hello)) => hello.capacity.clone(),
            (None, None) => Resources::default(),
        }
    }

    fn facts(&self, index: u32, replica: &Replica) -> ReplicaFacts {
        let declared = self.declaration.as_ref();
        ReplicaFacts {
            state: shown(replica.state, self.leaves(index)),
            closed: self.leaves(index) || self.row.closed(index),
            capacity: self.capacity(replica),
            overcommit_percent: declared
                .and_then(|declaration| declaration.overcommit_percent)
                .or_else(|| replica.hello.as_ref().map(|hello| hello.overcommit_percent))
                .unwrap_or(0),
            // What the agent can do counts; what the owner says is what is expected of it.
            capabilities: match &replica.hello {
                Some(hello) => hello.capabilities.clone(),
                None => declared.and_then(|declaration| declaration.capabilities.clone()).unwrap_or_default(),
            },
        }
    }

    /// Tells everyone how the server is now.
    pub(super) fn publish(&self) {
        for (index, replica) in &self.replicas {
            let facts = Some(self.facts(*index, replica));
            self.links.placement.tell(ReplicaChanged { replica: self.id(*index), facts });
        }
        self.show();
    }

    /// Shows readers how the server is now.
    pub(super) fn show(&self) {
        let mut conditions = Vec::new();
        let replicas = self
            .replicas
            .iter()
            .map(|(index, replica)| {
                let facts = self.facts(*index, replica);
                if let Some(difference) = self.difference(*index, replica) {
                    conditions.push(difference);
                }
                ReplicaView {
                    index: *index,
                    state: facts.state,
                    since: replica.since,
                    capacity: facts.capacity,
                    overcommit_percent: facts.overcommit_percent,
                    resident: replica.resident.clone(),
                    copies_resident: replica.copies_resident(),
                    door: replica.hello.as_ref().map(|hello| hello.door.clone()).unwrap_or_default(),
                }
            })
            .collect();
        let first = self.replicas.values().find_map(|replica| replica.hello.as_ref());
        let declared = self.declaration.as_ref().and_then(|declaration| declaration.capabilities.clone());
        self.links.board.put_server(Arc::new(ServerView {
            row: self.row.clone(),
            removing: self.removing,
            replicas,
            capabilities: first.map(|hello| hello.capabilities.clone()).or(declared).unwrap_or_default(),
            runtime: first.map(|hello| hello.runtime.clone()).unwrap_or_default(),
            conditions,
        }));
    }

    fn difference(&self, index: u32, replica: &Replica) -> Option<String> {
        let declared = self.declaration.as_ref()?.capacity.as_ref()?;
        let reported = &replica.hello.as_ref()?.capacity;
        (declared != reported).then(|| {
            let counted = declared.min(reported).primary;
            let (declared, reported) = (declared.primary, reported.primary);
            format!("replica {index} reports {reported}, {declared} are declared; {counted} count")
        })
    }
}
