//! Routes between the domain and `wharf.routes.v1`, both ways.
//!
//! The rule of this module: what comes off the wire is checked here once; a message that breaks a rule is an
//! error that names the field, never a guess.

use std::time::Duration;

use thiserror::Error;

use super::proto::routes as wire;
use crate::domain::{
    error::InvalidName,
    names::{ModelName, ReplicaId, ServerName},
    routes::{Absence, Endpoint, Route, Target},
    time::Instant,
    version::{Generation, Uid, Version},
};

/// A route that can't be what was meant.
#[derive(Debug, Error)]
pub enum WireError {
    /// A name breaks the rule for names.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// Not `server-index`.
    #[error("replica {0:?} of a route is not of the form server-index")]
    Replica(String),
    /// An endpoint without an address.
    #[error("an endpoint of model {model} version {version} has no door")]
    NoDoor {
        /// The model.
        model: ModelName,
        /// The version.
        version: Version,
    },
    /// A version is listed twice, or is 0.
    #[error("model {model} has version {version} twice, or one that is 0")]
    Versions {
        /// The model.
        model: ModelName,
        /// The version.
        version: Version,
    },
}

/// A route as it goes to a gateway; an instant goes as the time from `now` on.
#[must_use]
pub fn route_to_wire(route: &Route, now: Instant) -> wire::Route {
    let millis = |duration: Option<Duration>| {
        duration.map_or(0, |d| u64::try_from(d.max(Duration::from_millis(1)).as_millis()).unwrap_or(u64::MAX))
    };
    wire::Route {
        model: route.model.as_str().to_owned(),
        targets: route.targets.iter().map(target_to_wire).collect(),
        state: route.absence.state.clone(),
        reason: route.absence.reason.clone(),
        retry_after_millis: millis(route.absence.retry_at.map(|at| at.since(now))),
        retry_later_millis: millis(route.absence.retry_after),
    }
}

fn target_to_wire(target: &Target) -> wire::Target {
    let endpoints = target.endpoints.iter().map(|endpoint| wire::Endpoint {
        replica: endpoint.replica.to_string(),
        door: endpoint.door.clone(),
        uid: endpoint.generation.uid.0,
        number: endpoint.generation.number,
        resident: endpoint.resident,
    });
    wire::Target { version: target.version.0, weight: target.weight, endpoints: endpoints.collect() }
}

/// A route as a gateway got it.
///
/// # Errors
/// When a name, a replica, a version or a door is not valid.
pub fn route_from_wire(route: wire::Route, now: Instant) -> Result<Route, WireError> {
    let model = ModelName::new(&route.model)?;
    let mut targets: Vec<Target> = Vec::with_capacity(route.targets.len());
    for target in route.targets {
        let version = Version(target.version);
        if version.0 == 0 || targets.iter().any(|known| known.version == version) {
            return Err(WireError::Versions { model, version });
        }
        let endpoints = target.endpoints.into_iter().map(|endpoint| {
            if endpoint.door.is_empty() {
                return Err(WireError::NoDoor { model: model.clone(), version });
            }
            Ok(Endpoint {
                generation: Generation { uid: Uid(endpoint.uid), version, number: endpoint.number },
                replica: replica(&endpoint.replica)?,
                door: endpoint.door,
                resident: endpoint.resident,
            })
        });
        targets.push(Target { version, weight: target.weight, endpoints: endpoints.collect::<Result<_, _>>()? });
    }
    let some = |millis: u64| (millis > 0).then(|| Duration::from_millis(millis));
    let retry_at = some(route.retry_after_millis).map(|after| now + after);
    let retry_after = some(route.retry_later_millis);
    Ok(Route { model, targets, absence: Absence { state: route.state, reason: route.reason, retry_at, retry_after } })
}

fn replica(text: &str) -> Result<ReplicaId, WireError> {
    let wrong = || WireError::Replica(text.chars().take(80).collect());
    let (server, index) = text.rsplit_once('-').ok_or_else(wrong)?;
    Ok(ReplicaId::new(ServerName::new(server)?, index.parse().map_err(|_| wrong())?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn endpoint()(
            index in 0..9_u32, uid: u64, number: u32, resident: bool, door in "[a-z]{1,8}:[0-9]{1,4}",
        ) -> (u32, u64, u32, bool, String) { (index, uid, number, resident, door) }
    }

    prop_compose! {
        fn route()(
            model in "[a-z0-9]{1,12}",
            targets in prop::collection::vec((any::<u32>(), prop::collection::vec(endpoint(), 0..4)), 0..4),
            state in "[A-Z][a-z]{0,8}",
            retry in prop::option::of(1..10_000_u64),
            later in prop::option::of(1..10_000_u64),
        ) -> Route {
            let targets = targets.into_iter().enumerate().map(|(i, (weight, endpoints))| {
                let version = Version(i as u32 + 1);
                Target { version, weight, endpoints: endpoints.into_iter().map(|(index, uid, number, resident, door)| Endpoint {
                    generation: Generation { uid: Uid(uid), version, number },
                    replica: ReplicaId::new(ServerName::new("ml-server").expect("valid"), index),
                    door, resident,
                }).collect() }
            });
            Route {
                model: ModelName::new(&model).expect("valid"),
                targets: targets.collect(),
                absence: Absence {
                    state, reason: String::new(),
                    retry_at: retry.map(|ms| Instant::from_micros(5) + Duration::from_millis(ms)),
                    retry_after: later.map(Duration::from_millis),
                },
            }
        }
    }

    proptest! {
        #[test]
        fn a_route_is_read_back_as_written(route in route()) {
            let now = Instant::from_micros(5);
            prop_assert_eq!(route_from_wire(route_to_wire(&route, now), now).expect("it was valid"), route);
        }
    }

    #[test]
    fn what_breaks_a_rule_is_refused_by_name() {
        let good = wire::Route {
            model: "iris".into(),
            targets: vec![wire::Target {
                version: 1,
                weight: 1,
                endpoints: vec![wire::Endpoint { replica: "s-0".into(), door: "a:1".into(), ..Default::default() }],
            }],
            ..Default::default()
        };
        let refused = |change: &dyn Fn(&mut wire::Route)| {
            let mut route = good.clone();
            change(&mut route);
            route_from_wire(route, Instant::default()).expect_err("it breaks a rule").to_string()
        };
        assert!(route_from_wire(good.clone(), Instant::default()).is_ok());
        assert!(refused(&|r| r.model = "A".into()).contains("\"A\""));
        assert!(refused(&|r| r.targets[0].endpoints[0].replica = "s".into()).contains("server-index"));
        assert!(refused(&|r| r.targets[0].endpoints[0].replica = "s-x".into()).contains("server-index"));
        assert!(refused(&|r| r.targets[0].endpoints[0].door = String::new()).contains("no door"));
        assert!(refused(&|r| r.targets.push(r.targets[0].clone())).contains("twice"));
        assert!(refused(&|r| r.targets[0].version = 0).contains('0'));
    }
}
