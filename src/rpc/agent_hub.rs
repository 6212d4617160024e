//! The scheduler's side of an agent's session: wire to messages and back.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use actix::Recipient;
use futures::{Stream, StreamExt as _, stream};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    agent_wire::{order_to_wire, report_from_wire, resources_from_wire},
    pieces::pieces,
    proto::agent::{self as wire, agent_hub_server::AgentHub},
};
use crate::{
    domain::{
        ghost::{Advice, Strain},
        leader,
        memory::Bytes,
        names::{ReplicaId, ServerName},
        time::Instant,
    },
    messages::server::{AgentConnected, AgentSpoke, Down, Held, Hello, Restated, Word},
};

/// In which the other side says who it is.
const HELLO: Duration = Duration::from_secs(10);
/// Characters of what an agent calls its version, and of what it says of an order that it can't read.
const VERSION: usize = 64;
const PROBLEM: usize = 500;
/// Words to an agent that may wait for it to read.
const BOUND: usize = 1024;
/// Orders in one message, at most.
const ORDERS: usize = 200;

/// Serves agents' sessions.
#[derive(Debug)]
pub struct AgentSessions {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    connected: Recipient<AgentConnected>,
    spoke: Recipient<AgentSpoke>,
    leader: Leader,
    sessions: AtomicU64,
}

/// Who orders.
#[derive(Clone, Debug)]
pub struct Leader {
    /// The cluster's id.
    pub cluster: String,
    /// The journal's lineage.
    pub lineage: String,
    /// This start.
    pub this: leader::Leader,
    /// The starts of this journal.
    pub known: leader::Leaders,
}

impl AgentSessions {
    /// Sessions whose words go to these.
    #[must_use]
    pub fn new(connected: Recipient<AgentConnected>, spoke: Recipient<AgentSpoke>, leader: Leader) -> Self {
        Self { shared: Arc::new(Shared { connected, spoke, leader, sessions: AtomicU64::new(1) }) }
    }
}

#[tonic::async_trait]
impl AgentHub for AgentSessions {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<wire::SchedulerMessage, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<wire::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut words = request.into_inner();
        let first = timeout(HELLO, words.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("an agent says hello within 10 seconds"))??;
        let first = first.and_then(|word| word.message);
        let Some(wire::agent_message::Message::Hello(hello)) = first else {
            return Err(Status::invalid_argument("an agent's first message is its hello"));
        };
        let hello = hello_from_wire(hello)?;
        let session = self.shared.sessions.fetch_add(1, Ordering::Relaxed);
        let replica = hello.replica.clone();
        let (link, down) = mpsc::channel(BOUND);
        self.shared.connected.do_send(AgentConnected { hello, session, link });
        let shared = Arc::clone(&self.shared);
        let listener = Listener { replica, session, shared: Arc::clone(&shared) };
        let leader = shared.leader.clone();
        let down = ReceiverStream::new(down).flat_map(move |word| stream::iter(word_to_wire(word, &leader))).map(Ok);
        // The listener lives in the answer's stream: when either direction ends, the agent is gone.
        let up = async move {
            while let Some(Ok(word)) = words.next().await {
                listener.hear(word);
            }
            drop(listener);
        };
        let stream = futures::stream::select(
            down.map(Some).chain(futures::stream::iter([None])),
            futures::stream::once(up).map(|()| None),
        )
        .take_while(|word| futures::future::ready(word.is_some()))
        .filter_map(futures::future::ready);
        Ok(Response::new(Box::pin(stream)))
    }
}

/// Passes an agent's words on; its end is the session's.
struct Listener {
    replica: ReplicaId,
    session: u64,
    shared: Arc<Shared>,
}

impl Listener {
    fn hear(&self, word: wire::AgentMessage) {
        let word = match word.message {
            Some(wire::agent_message::Message::Reports(reports)) => {
                let read = |report| match report_from_wire(report) {
                    Ok(report) => Some((report.model, report.generation, report.report)),
                    Err(refusal) => {
                        tracing::warn!(target: "wharf::agents", replica = %self.replica, problem = %refusal, "a report can't be read");
                        None
                    }
                };
                Word::Reports(reports.reports.into_iter().filter_map(read).collect())
            }
            Some(wire::agent_message::Message::Heartbeat(heartbeat)) => Word::Heartbeat {
                sequence: heartbeat.sequence,
                resident: heartbeat.resident.map(resources_from_wire).unwrap_or_default(),
                strain: Strain {
                    leaked: Bytes(heartbeat.leaked),
                    advice: Advice {
                        returns: heartbeat.returns,
                        more: Bytes(heartbeat.more_memory),
                        spared_percent: heartbeat.spared_percent,
                    },
                },
                run: Some(heartbeat.run).filter(|run| *run != 0),
            },
            Some(wire::agent_message::Message::Goodbye(_)) => Word::Goodbye,
            Some(wire::agent_message::Message::Restated(restated)) => Word::Restated(Box::new(Restated {
                capacity: restated.capacity.map(resources_from_wire).unwrap_or_default(),
                capabilities: restated.capabilities,
                overcommit_percent: restated.overcommit_percent,
                runtime: restated.runtime,
            })),
            Some(wire::agent_message::Message::Misread(misread)) => {
                Word::Misread(misread.problem.chars().filter(|c| !c.is_control()).take(PROBLEM).collect())
            }
            Some(wire::agent_message::Message::Hello(_)) | None => return,
        };
        self.speak(word);
    }

    fn speak(&self, word: Word) {
        self.shared.spoke.do_send(AgentSpoke { replica: self.replica.clone(), session: self.session, word });
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.speak(Word::Gone);
    }
}

fn hello_from_wire(hello: wire::Hello) -> Result<Hello, Status> {
    let server = ServerName::new(&hello.server).map_err(|error| Status::invalid_argument(error.to_string()))?;
    let mut inventory = Vec::with_capacity(hello.inventory.len());
    for report in hello.inventory {
        let report = report_from_wire(report).map_err(super::status::status)?;
        inventory.push(Held {
            model: report.model,
            generation: report.generation,
            report: report.report,
            order: report.order,
        });
    }
    Ok(Hello {
        replica: ReplicaId::new(server, hello.replica),
        capacity: hello.capacity.map(resources_from_wire).unwrap_or_default(),
        capabilities: hello.capabilities,
        overcommit_percent: hello.overcommit_percent,
        runtime: hello.runtime,
        door: hello.door,
        lineage: hello.lineage,
        leader: leader::Leader { epoch: hello.leader_epoch, started: Instant::from_micros(hello.leader_started) },
        inventory,
        version: hello.agent_version.chars().filter(|c| !c.is_control()).take(VERSION).collect(),
    })
}

/// The messages of a word, each made when the connection has room for it.
fn word_to_wire(word: Down, leader: &Leader) -> Box<dyn Iterator<Item = wire::SchedulerMessage> + Send> {
    use wire::scheduler_message::Message;
    let millis = |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let message = match word {
        Down::Welcome { lease, heartbeat } => Message::Welcome(wire::Welcome {
            cluster: leader.cluster.clone(),
            lineage: leader.lineage.clone(),
            leader_epoch: leader.this.epoch,
            lease_millis: millis(lease),
            heartbeat_millis: millis(heartbeat),
            leader_started: leader.this.started.as_micros(),
        }),
        Down::Orders(orders) => {
            let leader_epoch = leader.this.epoch;
            return Box::new(pieces(orders, ORDERS).map(move |(orders, _)| {
                let orders = orders.iter().map(order_to_wire).collect();
                wire::SchedulerMessage { message: Some(Message::Orders(wire::Orders { leader_epoch, orders })) }
            }));
        }
        Down::Recycle(run) => Message::Recycle(wire::Recycle { leader_epoch: leader.this.epoch, run }),
        Down::Heard(sequence) => Message::Heartbeat(wire::HeartbeatAck { sequence, leader_epoch: leader.this.epoch }),
        Down::Refused { reason, retry } => Message::Refused(wire::Refused { reason, retry }),
    };
    Box::new(std::iter::once(wire::SchedulerMessage { message: Some(message) }))
}
