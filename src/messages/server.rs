//! To a server.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use actix::Message;
use tokio::sync::mpsc;

use super::Ask;
pub use crate::domain::server::Mark;
use crate::domain::{
    copy::Report,
    error::Refusal,
    ghost::Strain,
    leader::Leader,
    memory::Resources,
    names::{ModelName, ReplicaId, ServerName},
    order::Order,
    record::Owner,
    spec::KubernetesMeta,
    version::Generation,
};

/// An agent has called.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct AgentConnected {
    /// What it says of itself.
    pub hello: Hello,
    /// This connection of it.
    pub session: u64,
    /// Where words to it go. Bounded: an agent that does not read is cut off.
    pub link: mpsc::Sender<Down>,
}

/// What an agent says of itself.
#[derive(Clone, Debug)]
pub struct Hello {
    /// The replica beside which it stands.
    pub replica: ReplicaId,
    /// Memory that the replica has.
    pub capacity: Resources,
    /// What it can serve.
    pub capabilities: Vec<String>,
    /// How much more may be registered, in percent.
    pub overcommit_percent: u32,
    /// What serves the models.
    pub runtime: String,
    /// Where its door is.
    pub door: String,
    /// The lineage that it last obeyed; empty when it never did.
    pub lineage: String,
    /// The leader that it last obeyed in that lineage.
    pub leader: Leader,
    /// Every copy that it holds, with the order that made it.
    pub inventory: Vec<Held>,
    /// What it is.
    pub version: String,
}

/// A copy that an agent holds.
#[derive(Clone, Debug)]
pub struct Held {
    /// The model.
    pub model: ModelName,
    /// The copy.
    pub generation: Generation,
    /// Where it stands.
    pub report: Report,
    /// The order that made it, for a scheduler that lost its journal.
    pub order: Option<Order>,
}

/// What an agent is told.
#[derive(Clone, Debug)]
pub enum Down {
    /// It is welcome; the leader epoch is with it.
    Welcome {
        /// Silence longer than this makes the replica Unknown.
        lease: Duration,
        /// How often it is to be heard.
        heartbeat: Duration,
    },
    /// Do these.
    Orders(Vec<Order>),
    /// End this run of the inference server, once nothing is in its memory, and begin another.
    Recycle(u64),
    /// Its heartbeat was heard.
    Heard(u64),
    /// The session ends.
    Refused {
        /// Why.
        reason: String,
        /// Whether it is worth calling again.
        retry: bool,
    },
}

/// An agent says something.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct AgentSpoke {
    /// Its replica.
    pub replica: ReplicaId,
    /// Its connection.
    pub session: u64,
    /// What it says.
    pub word: Word,
}

/// What an agent says after its hello.
#[derive(Debug)]
pub enum Word {
    /// Copies changed.
    Reports(Vec<(ModelName, Generation, Report)>),
    /// It is alive.
    Heartbeat {
        /// Its count.
        sequence: u64,
        /// Memory in use.
        resident: Resources,
        /// What else there is to say of it.
        strain: Strain,
        /// Which run of the inference server answers; nothing for one that the agent does not run.
        run: Option<u64>,
    },
    /// The replica is another than its hello said.
    Restated(Box<Restated>),
    /// It is about to stop by intent.
    Goodbye,
    /// It was sent an order of which it can't read even whom it is about; and why.
    Misread(String),
    /// Its connection ended.
    Gone,
}

/// What of a [`Hello`] may change while the session goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restated {
    /// As [`Hello::capacity`].
    pub capacity: Resources,
    /// As [`Hello::capabilities`].
    pub capabilities: Vec<String>,
    /// As [`Hello::overcommit_percent`].
    pub overcommit_percent: u32,
    /// As [`Hello::runtime`].
    pub runtime: String,
}

/// A model wants copies held, or let go, by replicas of the server.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct SetOrders(pub Vec<SetOrder>);

/// A copy that is to be held, or let go.
#[derive(Debug)]
pub struct SetOrder {
    /// The replica.
    pub replica: ReplicaId,
    /// What its agent is to do.
    pub order: Order,
}

/// A model wants to know what became of a copy that it wants no longer.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Enquire {
    /// The replica.
    pub replica: ReplicaId,
    /// The model.
    pub model: ModelName,
    /// The copy.
    pub generation: Generation,
}

/// The owner says how the server is to be; absent when it takes it away.
#[derive(Clone, Debug)]
pub struct Declare {
    /// Who says so.
    pub owner: Owner,
    /// The server.
    pub server: ServerName,
    /// What is wanted of it.
    pub declaration: Option<Declaration>,
}

/// How an owner wants a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declaration {
    /// Replicas expected.
    pub replicas: u32,
    /// Least and most replicas, for Seldon's clients.
    pub bounds: (u32, u32),
    /// What Kubernetes knows it by.
    pub kubernetes: Option<KubernetesMeta>,
    /// Memory of each replica, when the owner says.
    pub capacity: Option<Resources>,
    /// How much more may be registered, when the owner says.
    pub overcommit_percent: Option<u32>,
    /// What its replicas can serve, when the owner says.
    pub capabilities: Option<Vec<String>>,
    /// Replicas that are to be emptied: each is started anew somewhere else once nothing is there.
    pub emptied: BTreeSet<u32>,
}

/// Asks for a declaration to be taken.
pub type DeclareServer = Ask<Declare, Result<(), Refusal>>;

/// An operator's mark on a replica, or on all of a server's.
#[derive(Clone, Debug)]
pub struct SetMark {
    /// The server.
    pub server: ServerName,
    /// The replica; all of them when absent.
    pub replica: Option<u32>,
    /// The mark.
    pub mark: Mark,
}

/// Asks for a mark; answers with the replicas that have it now.
pub type MarkReplica = Ask<SetMark, Result<BTreeSet<u32>, Refusal>>;

/// The actor before you panicked: ask for what it knew.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct Recall;

/// The route of every copy on a replica needs its door.
pub type Doors = Arc<dashmap::DashMap<ReplicaId, String>>;
