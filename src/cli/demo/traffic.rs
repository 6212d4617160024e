//! Constant traffic in the background, with exact accounts: each request that is sent is answered rightly, answered
//! wrongly or failed, and is counted once.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::ask::{Asker, Outcome, Target, grpc, grpc_request};
use crate::{domain::time::Instant, ports::Clock, rpc::client::Connection};

/// The pause of a client between an answer and its next request.
const PAUSE: Duration = Duration::from_millis(4);
/// Requests that are remembered at most. The demo's scenes are far shorter.
const MOST: usize = 1_000_000;

/// One request that has ended.
#[derive(Clone, Debug)]
pub(super) struct Record {
    pub(super) began: Instant,
    pub(super) ended: Instant,
    pub(super) model: Arc<str>,
    pub(super) outcome: Outcome,
}

/// Clients that ask until they are stopped: for each target one by REST and one by gRPC.
#[derive(Debug)]
pub(super) struct Traffic {
    stop: CancellationToken,
    clients: JoinSet<()>,
    records: Arc<Mutex<Vec<Record>>>,
}

impl Traffic {
    /// Starts the clients.
    ///
    /// # Errors
    /// When the gateway can't be reached.
    pub(super) async fn start(asker: &Asker, clock: &Arc<dyn Clock>, targets: &[Target]) -> anyhow::Result<Self> {
        let mut traffic = Self { stop: CancellationToken::new(), clients: JoinSet::new(), records: Arc::default() };
        for target in targets {
            let connection = asker.connect().await?;
            traffic.client(clock, target, Client::Rest(Box::new(asker.clone())))?;
            traffic.client(clock, target, Client::Grpc(connection))?;
        }
        Ok(traffic)
    }

    fn client(&mut self, clock: &Arc<dyn Clock>, target: &Target, client: Client) -> anyhow::Result<()> {
        let (clock, target, records) = (Arc::clone(clock), target.clone(), Arc::clone(&self.records));
        let (stop, request, model) = (self.stop.clone(), grpc_request(&target)?, Arc::from(target.model.as_str()));
        self.clients.spawn(async move {
            while !stop.is_cancelled() {
                let began = clock.now();
                let outcome = match &client {
                    Client::Rest(asker) => asker.rest(&target).await,
                    Client::Grpc(connection) => grpc(connection, &target, request.clone()).await,
                };
                let record = Record { began, ended: clock.now(), model: Arc::clone(&model), outcome };
                {
                    let mut records = records.lock().unwrap_or_else(PoisonError::into_inner);
                    if records.len() >= MOST {
                        return;
                    }
                    records.push(record);
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
        Ok(())
    }

    /// How many clients there are; each asks one thing after another.
    pub(super) fn clients(&self) -> usize {
        self.clients.len()
    }

    /// How many right answers came since `then`.
    pub(super) fn right_since(&self, then: Instant) -> usize {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        records
            .iter()
            .rev()
            .take_while(|record| record.ended >= then)
            .filter(|record| record.outcome.is_right())
            .count()
    }

    /// When a request failed last, and how; none when none did.
    pub(super) fn last_failure(&self) -> Option<(Instant, Outcome)> {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = records.iter().filter(|record| !record.outcome.is_right());
        failed.max_by_key(|record| record.ended).map(|record| (record.ended, record.outcome.clone()))
    }

    /// Lets every client finish its request, and returns the accounts.
    ///
    /// # Errors
    /// When a client broke, so that the accounts are not whole.
    pub(super) async fn stop(mut self) -> anyhow::Result<Account> {
        self.stop.cancel();
        while let Some(ended) = self.clients.join_next().await {
            ended.map_err(|error| anyhow::anyhow!("a client of the demo broke: {error}"))?;
        }
        let records = std::mem::take(&mut *self.records.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(Account { records })
    }
}

enum Client {
    Rest(Box<Asker>),
    Grpc(Connection),
}

/// Every request of some traffic.
#[derive(Debug)]
pub(super) struct Account {
    pub(super) records: Vec<Record>,
}

impl Account {
    pub(super) fn sent(&self) -> usize {
        self.records.len()
    }

    /// Requests that were not answered rightly.
    pub(super) fn failed(&self) -> usize {
        self.records.iter().filter(|record| !record.outcome.is_right()).count()
    }

    /// Right answers of each version of a model.
    pub(super) fn versions(&self, model: &str) -> BTreeMap<u32, usize> {
        let mut versions = BTreeMap::new();
        for record in self.records.iter().filter(|record| &*record.model == model) {
            if let Outcome::Right(version) = record.outcome {
                *versions.entry(version).or_default() += 1;
            }
        }
        versions
    }

    /// Failures by their kind, and wrong answers one by one.
    pub(super) fn kinds(&self) -> BTreeMap<String, usize> {
        let mut kinds = BTreeMap::new();
        for record in &self.records {
            let kind = match &record.outcome {
                Outcome::Right(_) => continue,
                Outcome::Wrong(wrong) => format!("wrong answer ({wrong})"),
                Outcome::Failed { kind, .. } => kind.clone(),
            };
            *kinds.entry(kind).or_default() += 1;
        }
        kinds
    }

    /// How long the slowest right answer took.
    pub(super) fn slowest(&self) -> Duration {
        let right = self.records.iter().filter(|record| record.outcome.is_right());
        right.map(|record| record.ended.since(record.began)).max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_is_in_exactly_one_account() {
        let at = Instant::from_micros;
        let failed = || Outcome::Failed { kind: "REST 503".into(), said: "later".into() };
        let record = |ended, outcome| Record { began: at(0), ended: at(ended), model: "iris".into(), outcome };
        let account = Account {
            records: vec![
                record(5, Outcome::Right(1)),
                record(7, Outcome::Right(2)),
                record(9, failed()),
                record(6, Outcome::Right(2)),
                record(9, Outcome::Wrong("label".into())),
                record(9, failed()),
            ],
        };
        assert_eq!((account.sent(), account.failed(), account.slowest()), (6, 3, Duration::from_micros(7)));
        assert_eq!(account.versions("iris"), BTreeMap::from([(1, 1), (2, 2)]));
        assert!(account.versions("other").is_empty());
        let kinds = BTreeMap::from([("REST 503".to_owned(), 2), ("wrong answer (label)".to_owned(), 1)]);
        assert_eq!(account.kinds(), kinds);
        assert_eq!(account.versions("iris").values().sum::<usize>() + account.failed(), account.sent());
    }
}
