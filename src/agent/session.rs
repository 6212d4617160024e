//! The session with the scheduler: tells it everything at first, what changes after that, and obeys.
//!
//! The rules of this module: only the highest leader epoch of the lineage is obeyed, and it is on disk before
//! its first order is; a lost session changes nothing about what is served, and the inventory of the next one
//! repairs whatever was lost with it; the agent tries to come back for ever.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint, Uri},
};

use super::{core::Core, disk::DiskError, fence::Verdict};
use crate::{
    domain::{error::Refusal, ghost::Strain, leader::Leader, names::ModelName, time::Instant, version::Generation},
    rpc::{
        agent_wire::{order_about, order_from_wire, report_to_wire, resources_to_wire},
        proto::agent::{
            AgentMessage, Goodbye, Heartbeat, Hello, Misread, Orders, Recycle, Reports, Restated, SchedulerMessage,
            Welcome, agent_hub_client::AgentHubClient, agent_message, scheduler_message,
        },
    },
};

/// Copies in one message of reports.
const BATCH: usize = 256;
/// Orders that are obeyed at once. Then it is the turn of requests.
const OBEYED: usize = 100;
/// Messages on their way out; with more the scheduler is too slow, and the session ends.
const QUEUE: usize = 64;
/// Longest message from the scheduler. 100,000 orders are less.
const LONGEST_MESSAGE: usize = 64 << 20;
/// The least that a heartbeat or a lease may be, whatever the scheduler says.
const SHORTEST: Duration = Duration::from_millis(10);

/// How the session stands, for people.
#[derive(Clone, Debug, Default)]
pub(crate) struct Link {
    /// Of the session that is going on; absent between two.
    pub(crate) cluster: Option<String>,
    /// Why the last one ended.
    pub(crate) last_error: Option<String>,
}

/// Why a session ended.
#[derive(Debug, Error)]
enum Ended {
    #[error("the scheduler {address} can't be reached: {problem}")]
    Unreachable { address: String, problem: String },
    #[error("the scheduler did not {what} within {} s", within.as_secs_f64())]
    Silent { what: &'static str, within: Duration },
    #[error("the scheduler broke the session off: {0}")]
    Broken(String),
    #[error("the scheduler refused the agent: {reason}")]
    Refused { reason: String, retry: bool },
    #[error("the scheduler speaks for leader epoch {epoch}, and epoch {seen} was seen: it is not obeyed")]
    Stale { epoch: u64, seen: u64 },
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("the agent stops")]
    Stopped,
}

/// Keeps a session with the scheduler at `address` for as long as `shutdown` is not cancelled.
pub(crate) async fn keep(core: Arc<Core>, address: String, leaving: CancellationToken, shutdown: CancellationToken) {
    let (first, longest) = core.options.reconnect;
    let mut pause = first;
    let mut tries = 0_u64;
    loop {
        let mut welcomed = false;
        let session = Session { core: &core, address: &address, leaving: &leaving };
        let ended = tokio::select! {
            biased;
            () = shutdown.cancelled() => Ended::Stopped,
            ended = session.hold(&mut welcomed) => match ended {
                Ok(never) => match never {},
                Err(ended) => ended,
            },
        };
        let stopped = matches!(ended, Ended::Stopped);
        {
            let mut link = core.link.lock().unwrap_or_else(PoisonError::into_inner);
            link.cluster = None;
            link.last_error = (!stopped).then(|| ended.to_string());
        }
        if stopped {
            return;
        }
        if matches!(ended, Ended::Stale { .. }) {
            core.metrics.fenced.inc();
        }
        tracing::warn!(replica = %core.options.replica, error = %ended, "the session with the scheduler ended");
        if welcomed {
            pause = first;
        }
        if matches!(ended, Ended::Refused { retry: false, .. }) {
            pause = longest;
        }
        tries += 1;
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            () = sleep(jittered(pause, core.options.replica.index, tries)) => {}
        }
        pause = (pause * 2).min(longest);
    }
}

/// Between half of `pause` and all of it. Replicas differ, so that they don't all come back at once; the same
/// replica does the same thing again, so that a simulation can be repeated.
fn jittered(pause: Duration, replica: u32, tries: u64) -> Duration {
    let mut mixed = (u64::from(replica) << 32 | tries).wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let thousandths = u32::try_from((mixed ^ (mixed >> 31)) % 500).unwrap_or_default();
    pause / 2 + pause * thousandths / 1000
}

enum Never {}

struct Session<'a> {
    core: &'a Arc<Core>,
    address: &'a str,
    leaving: &'a CancellationToken,
}

impl Session<'_> {
    /// Connects and obeys until something ends that.
    async fn hold(&self, welcomed: &mut bool) -> Result<Never, Ended> {
        let within = self.core.options.connect_deadline;
        let (out, messages) = mpsc::channel(QUEUE);
        // What changes from here on is reported; what was before is in the inventory.
        self.core.outbox.clear();
        self.send(&out, agent_message::Message::Hello(self.hello())).await?;
        let open = async {
            let channel = self.connect().await?;
            let mut client = AgentHubClient::new(channel).max_decoding_message_size(LONGEST_MESSAGE);
            let opened = client.session(ReceiverStream::new(messages)).await;
            let mut orders = opened.map_err(|status| Ended::Broken(said(&status)))?.into_inner();
            let welcome = match next(&mut orders).await? {
                scheduler_message::Message::Welcome(welcome) => welcome,
                scheduler_message::Message::Refused(refused) => {
                    return Err(Ended::Refused { reason: refused.reason, retry: refused.retry });
                }
                scheduler_message::Message::Orders(_)
                | scheduler_message::Message::Recycle(_)
                | scheduler_message::Message::Heartbeat(_) => {
                    return Err(Ended::Broken("it spoke before it welcomed the agent".to_owned()));
                }
            };
            Ok((orders, welcome))
        };
        let (orders, welcome) =
            timeout(within, open).await.map_err(|_| Ended::Silent { what: "welcome the agent", within })??;
        let seen = self.core.seen();
        self.heed(welcome.leader_epoch, seen.welcome(&welcome.lineage, leader(&welcome))).await?;
        *welcomed = true;
        self.core.metrics.sessions.inc();
        self.core.link.lock().unwrap_or_else(PoisonError::into_inner).cluster = Some(welcome.cluster.clone());
        tracing::info!(replica = %self.core.options.replica, cluster = %welcome.cluster, epoch = welcome.leader_epoch, "the scheduler welcomed the agent");
        self.talk(out, orders, &welcome).await
    }

    async fn connect(&self) -> Result<Channel, Ended> {
        let unreachable = |problem: String| Ended::Unreachable { address: self.address.to_owned(), problem };
        let network = Arc::clone(&self.core.network);
        let address = self.address.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let (network, address) = (Arc::clone(&network), address.clone());
            async move { network.connect(&address).await.map(TokioIo::new) }
        });
        Endpoint::from_shared(format!("http://{}", self.address))
            .map_err(|error| unreachable(error.to_string()))?
            .connect_with_connector(connector)
            .await
            .map_err(|error| {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                unreachable(cause.unwrap_or_else(|| error.to_string()))
            })
    }

    fn hello(&self) -> Hello {
        let (options, seen, facts) = (&self.core.options, self.core.seen(), self.core.facts.load());
        Hello {
            server: options.replica.server.to_string(),
            replica: options.replica.index,
            capacity: Some(resources_to_wire(&facts.capacity)),
            capabilities: facts.capabilities.clone(),
            overcommit_percent: facts.overcommit_percent,
            runtime: self.core.options.told_runtime(self.core.runtime.kind().name()),
            door: options.door_address.clone(),
            lineage: seen.lineage,
            leader_epoch: seen.epoch,
            inventory: self.core.book.inventory().iter().map(report_to_wire).collect(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            leader_started: seen.started.as_micros(),
        }
    }

    fn restated(&self) -> Restated {
        let facts = self.core.facts.load();
        Restated {
            capacity: Some(resources_to_wire(&facts.capacity)),
            capabilities: facts.capabilities.clone(),
            overcommit_percent: facts.overcommit_percent,
            runtime: self.core.options.told_runtime(self.core.runtime.kind().name()),
        }
    }

    /// Remembers a newer leader before it is obeyed.
    async fn heed(&self, epoch: u64, verdict: Verdict) -> Result<(), Ended> {
        match verdict {
            Verdict::Known => Ok(()),
            Verdict::Stale => Err(Ended::Stale { epoch, seen: self.core.seen().epoch }),
            Verdict::Newer(seen) => {
                self.core.disk.keep_fence(seen.clone()).await?;
                *self.core.seen.lock().unwrap_or_else(PoisonError::into_inner) = seen;
                Ok(())
            }
        }
    }

    async fn send(&self, out: &mpsc::Sender<AgentMessage>, message: agent_message::Message) -> Result<(), Ended> {
        let within = self.core.options.connect_deadline;
        match timeout(within, out.send(AgentMessage { message: Some(message) })).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Ended::Broken("its end of the stream closed".to_owned())),
            Err(_) => Err(Ended::Silent { what: "take the agent's reports", within }),
        }
    }

    async fn talk(
        &self,
        out: mpsc::Sender<AgentMessage>,
        mut orders: Streaming<SchedulerMessage>,
        welcome: &Welcome,
    ) -> Result<Never, Ended> {
        let lease = Duration::from_millis(welcome.lease_millis).max(SHORTEST);
        let beat = Duration::from_millis(welcome.heartbeat_millis).clamp(SHORTEST, lease);
        let mut ticks = tokio::time::interval(beat);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut sequence = 0;
        let mut said_goodbye = false;
        let silence = sleep(lease);
        tokio::pin!(silence);
        loop {
            tokio::select! {
                biased;
                () = &mut silence => return Err(Ended::Silent { what: "say anything", within: lease }),
                message = next(&mut orders) => {
                    let message = message?;
                    self.listen(&out, message).await?;
                    silence.set(sleep(lease));
                }
                _ = ticks.tick() => {
                    sequence += 1;
                    let resident = Some(resources_to_wire(&self.core.ledger.used()));
                    let Strain { leaked, advice } = self.core.strain();
                    let beat = Heartbeat {
                        sequence,
                        resident,
                        leaked: leaked.0,
                        returns: advice.returns,
                        more_memory: advice.more.0,
                        spared_percent: advice.spared_percent,
                        run: self.core.run().unwrap_or_default(),
                    };
                    self.send(&out, agent_message::Message::Heartbeat(beat)).await?;
                }
                () = self.leaving.cancelled(), if !said_goodbye => {
                    said_goodbye = true;
                    self.send(&out, agent_message::Message::Goodbye(Goodbye {})).await?;
                }
                () = self.core.restated.notified() => {
                    self.send(&out, agent_message::Message::Restated(self.restated())).await?;
                }
                () = self.core.outbox.more() => {
                    let reports: Vec<_> = self.core.outbox.take(BATCH).iter().map(report_to_wire).collect();
                    if !reports.is_empty() {
                        self.send(&out, agent_message::Message::Reports(Reports { reports })).await?;
                    }
                }
            }
        }
    }

    /// Says that an order can't be read: of the copy that it is about, or of the agent when that can't be read either.
    async fn misread(
        &self,
        out: &mpsc::Sender<AgentMessage>,
        about: Option<(ModelName, Generation)>,
        refusal: &Refusal,
    ) -> Result<(), Ended> {
        self.core.metrics.orders_refused.inc();
        tracing::error!(replica = %self.core.options.replica, error = %refusal, "an order can't be read and is not obeyed");
        match about {
            Some((model, generation)) => {
                let version = env!("CARGO_PKG_VERSION");
                let message = format!("agent version {version} can't read this order: {refusal}; upgrade the agent");
                self.core.unreadable(model, generation, message);
                Ok(())
            }
            None => {
                let problem = refusal.to_string();
                self.send(out, agent_message::Message::Misread(Misread { problem })).await
            }
        }
    }

    async fn listen(&self, out: &mpsc::Sender<AgentMessage>, message: scheduler_message::Message) -> Result<(), Ended> {
        match message {
            scheduler_message::Message::Orders(Orders { leader_epoch, orders }) => {
                self.heed(leader_epoch, self.core.seen().word(leader_epoch)).await?;
                for (number, order) in orders.into_iter().enumerate() {
                    if number % OBEYED == OBEYED - 1 {
                        tokio::task::yield_now().await;
                    }
                    let about = order_about(&order);
                    match order_from_wire(order) {
                        Ok(order) => self.core.obey(order),
                        Err(refusal) => self.misread(out, about, &refusal).await?,
                    }
                }
                Ok(())
            }
            scheduler_message::Message::Recycle(Recycle { leader_epoch, run }) => {
                self.heed(leader_epoch, self.core.seen().word(leader_epoch)).await?;
                self.core.recycle(run);
                Ok(())
            }
            scheduler_message::Message::Heartbeat(ack) => {
                self.heed(ack.leader_epoch, self.core.seen().word(ack.leader_epoch)).await
            }
            scheduler_message::Message::Welcome(again) => {
                let verdict = self.core.seen().welcome(&again.lineage, leader(&again));
                self.heed(again.leader_epoch, verdict).await
            }
            scheduler_message::Message::Refused(refused) => {
                Err(Ended::Refused { reason: refused.reason, retry: refused.retry })
            }
        }
    }
}

const fn leader(welcome: &Welcome) -> Leader {
    Leader { epoch: welcome.leader_epoch, started: Instant::from_micros(welcome.leader_started) }
}

/// The next message with something in it: a later scheduler may say what this agent does not know.
async fn next(orders: &mut Streaming<SchedulerMessage>) -> Result<scheduler_message::Message, Ended> {
    loop {
        match orders.message().await {
            Ok(Some(SchedulerMessage { message: Some(message) })) => return Ok(message),
            Ok(Some(SchedulerMessage { message: None })) => {}
            Ok(None) => return Err(Ended::Broken("it closed the stream".to_owned())),
            Err(status) => return Err(Ended::Broken(said(&status))),
        }
    }
}

fn said(status: &tonic::Status) -> String {
    format!("{}: {}", status.code(), status.message())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_stay_in_their_bounds_and_replicas_differ() {
        let pause = Duration::from_secs(4);
        let pauses: Vec<_> = (0..50).map(|replica| jittered(pause, replica, 3)).collect();
        assert!(pauses.iter().all(|one| *one >= pause / 2 && *one < pause));
        let distinct: std::collections::BTreeSet<_> = pauses.iter().collect();
        assert!(distinct.len() > 25, "{distinct:?}");
        assert_eq!(jittered(pause, 7, 9), jittered(pause, 7, 9));
    }
}
