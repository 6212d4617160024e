//! Agents with which this scheduler does not come to an understanding, and what people are told of it.
//!
//! The rule: an agent that has seen more than this journal is ordered nothing, and what it holds stays routed
//! while it calls: it would not obey, and it answers.

use actix::Context;

use super::{ServerActor, replica::Replica};
use crate::{
    domain::replica::{Event as ReplicaEvent, ReplicaState},
    messages::server::{AgentConnected, Down},
};

impl ServerActor {
    /// Whether the agent has obeyed a leader that this journal does not know. Then it is told so, and operators are.
    pub(super) fn outdated(&mut self, connected: &AgentConnected, ctx: &mut Context<Self>) -> bool {
        let (hello, identity) = (&connected.hello, &self.links.identity);
        let index = hello.replica.index;
        let who = format!("agent {}", hello.replica);
        let problem = identity.leaders.outdated(&who, &hello.lineage, hello.leader, &identity.lineage);
        let now = self.links.clock.now();
        if problem.is_none() && !self.replicas.contains_key(&index) {
            return false;
        }
        let replica = self.replicas.entry(index).or_insert_with(|| Replica::new(ReplicaState::Pending, now));
        let news = replica.outdated != problem;
        replica.outdated.clone_from(&problem);
        // What it could not read before it may be able to read now.
        replica.misread = None;
        let Some(problem) = problem else { return false };
        if news {
            tracing::error!(target: "wharf::agents", replica = %hello.replica, "{problem}");
            self.note("Outdated", problem.clone());
        }
        drop(connected.link.try_send(Down::Refused { reason: problem, retry: true }));
        self.set_state(index, ReplicaEvent::Refuses, ctx);
        true
    }

    /// An agent can't read an order, and can't even say of which copy.
    pub(super) fn misread(&mut self, index: u32, problem: String) {
        let id = self.id(index);
        let Some(replica) = self.replicas.get_mut(&index) else { return };
        let version = replica.hello.as_ref().map(|hello| hello.version.clone()).unwrap_or_default();
        let said = format!("agent {id} (version {version}) can't read an order: {problem}; upgrade the agent");
        if replica.misread.as_ref() == Some(&said) {
            return;
        }
        tracing::error!(target: "wharf::agents", replica = %id, "{said}");
        replica.misread = Some(said.clone());
        self.note("Misread", said);
        self.show();
    }
}
