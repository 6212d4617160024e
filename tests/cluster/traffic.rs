//! Clients that send inference requests without a pause, and judge every answer.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http_body_util::BodyExt as _;
use wharf::forward::{Body, Connections};

use super::{
    random::Random,
    world::{World, lock},
};

/// What a client may expect of a model.
#[derive(Clone, Debug, Default)]
pub(crate) struct Expected {
    /// Which artifacts may answer.
    pub(crate) labels: BTreeSet<String>,
    /// Grows with each change of `labels`.
    pub(crate) changed: u64,
}

/// Which answers break a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tolerance {
    /// All that are not a version's own.
    Nothing,
    /// Those that deny that a model is there, and those of a version that is not allowed.
    Refusals,
}

impl World {
    /// From now on `label` may answer for `name`, beside what may already.
    pub(crate) fn allow(&self, name: &str, label: &str) {
        let mut expected = lock(&self.expected);
        let model = expected.entry(name.to_owned()).or_default();
        model.labels.insert(label.to_owned());
        model.changed += 1;
    }

    /// Whether clients ask for the model.
    pub(crate) fn is_expected(&self, name: &str) -> bool {
        lock(&self.expected).contains_key(name)
    }

    /// From now on only `label` may answer for `name`.
    pub(crate) fn only(&self, name: &str, label: &str) {
        let mut expected = lock(&self.expected);
        let model = expected.entry(name.to_owned()).or_default();
        model.labels = [label.to_owned()].into();
        model.changed += 1;
    }

    /// The model is about to go: nobody asks for it any more.
    pub(crate) fn forget(&self, name: &str) {
        lock(&self.expected).remove(name);
    }

    pub(crate) fn tolerate(&self, tolerance: Tolerance) {
        *lock(&self.tolerance) = tolerance;
    }

    /// One request for `name` through a gateway: the status, and the body as text.
    pub(crate) async fn infer(
        &self,
        connections: &Arc<Connections>,
        gateway: usize,
        name: &str,
    ) -> Result<(u16, String), String> {
        let door = connections.get(&format!("gateway-{gateway}:9000")).map_err(|error| error.to_string())?;
        let id = self.requests.fetch_add(1, Ordering::Relaxed);
        let request = http::Request::post(format!("/v2/models/{name}/infer")).header("x-request-id", id);
        let request = request.body(Body::from("{}")).unwrap();
        let call = async {
            let response = door.call(request).await.map_err(|error| error.to_string())?;
            let status = response.status().as_u16();
            let body = response.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
            Ok((status, String::from_utf8_lossy(&body).into_owned()))
        };
        match tokio::time::timeout(Duration::from_secs(20), call).await {
            Ok(answer) => answer,
            Err(_) => Err("no answer within 20 s".to_owned()),
        }
    }

    fn judge(
        &self,
        gateway: usize,
        name: &str,
        (before, tolerance): (&Expected, Tolerance),
        answer: &Result<(u16, String), String>,
    ) {
        // A model that is changing hands meanwhile is judged by the next answer.
        let Some(after) = lock(&self.expected).get(name).cloned() else { return };
        match answer {
            Ok((200, label)) => {
                self.answered.fetch_add(1, Ordering::Relaxed);
                if !before.labels.contains(label) && !after.labels.contains(label) {
                    self.fail(format!(
                        "gateway {gateway} gave an answer of {label} for {name}, of which only {:?} may answer",
                        after.labels
                    ));
                }
            }
            Ok((404, text)) if before.changed > 0 => {
                self.fail(format!("gateway {gateway} denied {name}, which exists: {text}"));
            }
            other => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                if tolerance == Tolerance::Nothing {
                    self.fail(format!("a request for {name} through gateway {gateway} failed: {other:?}"));
                }
            }
        }
    }
}

/// Sends one request after the other to `gateway`, for any model that is expected to answer.
pub(crate) async fn traffic(world: Arc<World>, gateway: usize, seed: u64, pause_millis: (u64, u64)) {
    let mut random = Random::new(seed);
    let connections = World::connections();
    while !world.stop.load(Ordering::Relaxed) {
        let names: Vec<(String, Expected)> =
            lock(&world.expected).iter().map(|(name, expected)| (name.clone(), expected.clone())).collect();
        if let Some((name, before)) = random.one(&names) {
            let tolerance = *lock(&world.tolerance);
            let answer = world.infer(&connections, gateway, name).await;
            world.judge(gateway, name, (before, tolerance), &answer);
        }
        let pause = random.between(pause_millis.0, pause_millis.1);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}
