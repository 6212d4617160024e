//! What the demo asks of the scheduler, as any client does.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, anyhow, bail};
use http::StatusCode;

use super::{ask::Asker, cast::Cast};
use crate::rpc::{
    client::Connection,
    proto::{
        scheduler::{DeploymentSpec, MetaData, Model, ModelReference, ModelSpec, UnloadModelRequest},
        wharf::{
            CopyView, CordonReplicaRequest, DrainProgress, DrainReplicaRequest, ListModelsRequest, ListServersRequest,
            ModelView, ScaleModelRequest, ServerView, SubmitModelRequest, SubmitModelResponse,
        },
    },
};

/// The longest wait for a call.
const CALL: Duration = Duration::from_secs(10);
/// The pause between two looks at what can't be listened to.
const LOOK: Duration = Duration::from_millis(10);

/// Models by name.
pub(super) type Views = BTreeMap<String, ModelView>;

/// A scheduler and its operators' page.
#[derive(Debug)]
pub(super) struct Cluster {
    api: Connection,
    asker: Asker,
    page: String,
    /// Its one server.
    server: &'static str,
    /// The longest wait for anything to come about.
    patience: Duration,
}

impl Cluster {
    /// # Errors
    /// When the scheduler can't be reached.
    pub(super) async fn connect(api: &str, page: &str, asker: Asker, cast: &Cast) -> anyhow::Result<Self> {
        let api = Connection::open(api, None, CALL).await?;
        Ok(Self { api, asker, page: page.to_owned(), server: cast.server, patience: cast.patience })
    }

    /// Submits a model of one copy and returns once that is durable.
    ///
    /// # Errors
    /// When it is refused or not answered.
    pub(super) async fn submit(
        &self,
        name: &str,
        uri: &str,
        requirement: &str,
        memory: u64,
    ) -> anyhow::Result<SubmitModelResponse> {
        let model = Model {
            meta: Some(MetaData { name: name.to_owned(), ..Default::default() }),
            model_spec: Some(ModelSpec {
                uri: uri.to_owned(),
                requirements: vec![requirement.to_owned()],
                memory_bytes: Some(memory),
                ..Default::default()
            }),
            deployment_spec: Some(DeploymentSpec { replicas: 1, ..Default::default() }),
            ..Default::default()
        };
        let mut client = self.api.wharf();
        let request = SubmitModelRequest { model: Some(model), rollout: None };
        let answer = self.api.call(client.submit_model(request)).await;
        Ok(answer.with_context(|| format!("submitting {name}"))?.into_inner())
    }

    /// Has a model have so many copies.
    ///
    /// # Errors
    /// When it is refused or not answered.
    pub(super) async fn scale(&self, name: &str, replicas: u32) -> anyhow::Result<()> {
        let mut client = self.api.wharf();
        let request = ScaleModelRequest { name: name.to_owned(), replicas };
        self.api.call(client.scale_model(request)).await.with_context(|| format!("scaling {name}"))?;
        Ok(())
    }

    /// Deletes a model.
    ///
    /// # Errors
    /// When it is refused or not answered.
    pub(super) async fn unload(&self, name: &str) -> anyhow::Result<()> {
        let model = Some(ModelReference { name: name.to_owned(), version: None });
        let mut client = self.api.scheduler();
        let request = UnloadModelRequest { model, kubernetes_meta: None };
        self.api.call(client.unload_model(request)).await.with_context(|| format!("unloading {name}"))?;
        Ok(())
    }

    /// Follows all models, deleted ones too, until they are as `met` wants them.
    ///
    /// # Errors
    /// When the scheduler goes away, or it takes too long.
    pub(super) async fn until(&self, what: &str, met: impl Fn(&Views) -> bool) -> anyhow::Result<Views> {
        let mut views = Views::new();
        let follow = async {
            let mut client = self.api.wharf();
            let request = ListModelsRequest { name: None, terminated: true };
            let mut stream = self.api.call(client.watch_models(request)).await?.into_inner();
            while !met(&views) {
                let view = stream.message().await.map_err(|status| self.api.classify(&status))?;
                let view = view.ok_or_else(|| anyhow!("the scheduler ended the stream"))?;
                views.insert(view.name.clone(), view);
            }
            anyhow::Ok(())
        };
        match tokio::time::timeout(self.patience, follow).await {
            Ok(followed) => followed.with_context(|| format!("waiting for {what}"))?,
            Err(_) => bail!("waited {} s for {what}; now there is {}", self.patience.as_secs(), standing(&views)),
        }
        Ok(views)
    }

    /// The server with its replicas.
    ///
    /// # Errors
    /// When the scheduler does not answer, or does not know it.
    pub(super) async fn server(&self) -> anyhow::Result<ServerView> {
        let mut client = self.api.wharf();
        let request = ListServersRequest { name: Some(self.server.to_owned()) };
        let mut stream = self.api.call(client.list_servers(request)).await?.into_inner();
        let view = self.api.call(stream.message()).await?;
        view.ok_or_else(|| anyhow!("the scheduler knows no server {}", self.server))
    }

    /// Looks at the server until it is as `met` wants it.
    ///
    /// # Errors
    /// When it takes too long; what the last look saw.
    pub(super) async fn server_until(
        &self,
        what: &str,
        met: impl Fn(&ServerView) -> bool,
    ) -> anyhow::Result<ServerView> {
        let mut last = String::from("nothing was seen");
        let look = async {
            loop {
                match self.server().await {
                    Ok(server) if met(&server) => return server,
                    Ok(server) => last = format!("{:?}", server.replicas),
                    Err(error) => last = format!("{error:#}"),
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        let server = tokio::time::timeout(self.patience, look).await;
        server.map_err(|_| anyhow!("waited {} s for {what}: {last}", self.patience.as_secs()))
    }

    /// Moves every copy off a replica. Returns the last word about it.
    ///
    /// # Errors
    /// When the scheduler refuses or goes away.
    pub(super) async fn drain(&self, replica: u32) -> anyhow::Result<DrainProgress> {
        let mut client = self.api.wharf();
        let request = DrainReplicaRequest {
            server: self.server.to_owned(),
            replica: Some(replica),
            deadline_millis: u64::try_from(self.patience.as_millis()).unwrap_or(u64::MAX),
        };
        let mut last = DrainProgress::default();
        let follow = async {
            let mut stream = self.api.call(client.drain_replica(request)).await?.into_inner();
            while let Some(progress) = stream.message().await.map_err(|status| self.api.classify(&status))? {
                last = progress;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(self.patience + CALL, follow).await.map_err(|_| anyhow!("the drain had no end"))??;
        Ok(last)
    }

    /// Takes a drain back.
    ///
    /// # Errors
    /// When the scheduler refuses or does not answer.
    pub(super) async fn uncordon(&self, replica: u32) -> anyhow::Result<()> {
        let mut client = self.api.wharf();
        let request = CordonReplicaRequest { server: self.server.to_owned(), replica: Some(replica), undo: true };
        self.api.call(client.cordon_replica(request)).await?;
        Ok(())
    }

    /// Whether the process says that it is ready.
    pub(super) async fn ready(asker: &Asker, page: &str) -> bool {
        matches!(asker.get(&format!("http://{page}/readyz")).await, Ok((StatusCode::OK, _)))
    }

    /// A counter of the operators' page, over all its labels.
    ///
    /// # Errors
    /// When there is none of that name.
    pub(super) async fn counter(&self, name: &str) -> anyhow::Result<u64> {
        let url = format!("http://{}/metrics", self.page);
        let (_, text) = self.asker.get(&url).await.map_err(|cause| anyhow!("{url}: {cause}"))?;
        total(&String::from_utf8_lossy(&text), name).ok_or_else(|| anyhow!("{url} has no {name}"))
    }
}

/// The sum of a metric over its labels, as long as they are whole numbers.
fn total(text: &str, name: &str) -> Option<u64> {
    let samples = text.lines().filter_map(|line| {
        let (metric, value) = line.rsplit_once(' ')?;
        let bare = metric.split('{').next()?;
        if bare == name { value.parse::<u64>().ok() } else { None }
    });
    samples.fold(None, |sum, value| Some(sum.unwrap_or(0) + value))
}

/// Where the copies of a model are that answer.
pub(super) fn answering(view: &ModelView) -> impl Iterator<Item = &CopyView> {
    view.versions.iter().flat_map(|version| &version.copies).filter(|copy| copy.state == "Available")
}

/// Whether `version` serves, with every copy that is wanted.
pub(super) fn serves(views: &Views, name: &str, version: u32) -> bool {
    views.get(name).is_some_and(|view| {
        view.state == "Available" && view.serving == Some(version) && view.available >= view.wanted && view.wanted > 0
    })
}

/// One line about some models, for a failure.
fn standing(views: &Views) -> String {
    let each = views.values().map(|view| match view.reason.as_str() {
        "" => format!("{} {}", view.name, view.state),
        reason => format!("{} {} ({reason})", view.name, view.state),
    });
    let all = each.collect::<Vec<_>>().join(", ");
    if all.is_empty() { "no model".to_owned() } else { all }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_the_sum_over_its_labels() {
        let text = "# TYPE a counter\na_total{replica=\"x 1\"} 3\na_total{replica=\"y\"} 4\nab_total 9\nb 1.5\n";
        assert_eq!(total(text, "a_total"), Some(7));
        assert_eq!(total(text, "ab_total"), Some(9));
        assert_eq!(total(text, "a"), None);
        assert_eq!(total(text, "b"), None);
    }
}
