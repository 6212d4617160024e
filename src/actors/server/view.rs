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
    pub(super) fn capacity(&self, replica: &Replica) -> Resources {
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
            capabilities: self.capabilities(replica),
        }
    }

    /// What a replica can serve: of what is declared and what its agent reports, that which both say.
    fn capabilities(&self, replica: &Replica) -> Vec<String> {
        let declared = self.declaration.as_ref().and_then(|declaration| declaration.capabilities.as_ref());
        match (declared, &replica.hello) {
            (Some(declared), Some(hello)) => {
                hello.capabilities.iter().filter(|name| declared.contains(name)).cloned().collect()
            }
            (Some(declared), None) => declared.clone(),
            (None, Some(hello)) => hello.capabilities.clone(),
            (None, None) => Vec::new(),
        }
    }

    /// Tells the placement of every replica that is another than it was last told.
    pub(super) fn publish(&mut self) {
        let indexes: Vec<u32> = self.replicas.keys().copied().collect();
        for index in indexes {
            self.publish_one(index);
        }
    }

    /// Tells the placement of the replica, if it is another than it was last told.
    pub(super) fn publish_one(&mut self, index: u32) {
        let Some(replica) = self.replicas.get(&index) else { return };
        let facts = self.facts(index, replica);
        if replica.facts.as_ref() == Some(&facts) {
            return;
        }
        self.links.placement.tell(ReplicaChanged { replica: self.id(index), facts: Some(facts.clone()) });
        if let Some(replica) = self.replicas.get_mut(&index) {
            replica.facts = Some(facts);
        }
    }

    /// Shows readers how the server is now.
    pub(super) fn show(&self) {
        let mut conditions = Vec::new();
        let replicas = self
            .replicas
            .iter()
            .map(|(index, replica)| {
                let facts = self.facts(*index, replica);
                conditions.extend(self.differences(*index, replica));
                let strained = replica.strain.conditions(self.remedy(*index, replica).as_deref());
                conditions.extend(strained.into_iter().map(|what| format!("replica {index} {what}")));
                if self.emptied(*index) {
                    conditions.push(format!(
                        "replica {index} is started anew where the registry says, once its copies have moved away"
                    ));
                }
                conditions.extend(replica.outdated.iter().chain(&replica.misread).cloned());
                ReplicaView {
                    index: *index,
                    state: facts.state,
                    since: replica.since,
                    capacity: facts.capacity,
                    overcommit_percent: facts.overcommit_percent,
                    resident: replica.resident.clone(),
                    strain: replica.strain,
                    copies_resident: replica.copies_resident(),
                    door: replica.hello.as_ref().map(|hello| hello.door.clone()).unwrap_or_default(),
                }
            })
            .collect();
        let called = self.replicas.values().find(|replica| replica.hello.is_some());
        let first = called.and_then(|replica| replica.hello.as_ref());
        let declared = self.declaration.as_ref().and_then(|declaration| declaration.capabilities.clone());
        self.links.board.put_server(Arc::new(ServerView {
            row: self.row.clone(),
            removing: self.removing,
            replicas,
            capabilities: called.map(|replica| self.capabilities(replica)).or(declared).unwrap_or_default(),
            runtime: first.map(|hello| hello.runtime.clone()).unwrap_or_default(),
            conditions,
        }));
    }

    /// Where what is declared of a replica and what its agent reports are not the same.
    fn differences(&self, index: u32, replica: &Replica) -> Vec<String> {
        let (Some(declaration), Some(hello)) = (&self.declaration, &replica.hello) else { return Vec::new() };
        let mut found = Vec::new();
        if let Some(declared) = declaration.capacity.as_ref().filter(|declared| **declared != hello.capacity) {
            let counted = declared.min(&hello.capacity).primary;
            let (declared, reported) = (declared.primary, hello.capacity.primary);
            found.push(format!("replica {index} reports {reported}, {declared} are declared; {counted} count"));
        }
        if let Some(declared) = &declaration.capabilities {
            let missing = |from: &[String], of: &[String]| -> Vec<String> {
                of.iter().filter(|name| !from.contains(name)).cloned().collect()
            };
            let (more, less) = (missing(declared, &hello.capabilities), missing(&hello.capabilities, declared));
            if !more.is_empty() {
                found.push(format!("replica {index} reports {}, which is not declared", more.join(", ")));
            }
            if !less.is_empty() {
                found.push(format!("replica {index} does not report {}, which is declared", less.join(", ")));
            }
        }
        found
    }
}
