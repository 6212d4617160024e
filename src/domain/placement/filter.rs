//! What a replica must be to hold a copy. Each filter is one small pure function; the first that refuses a replica
//! is the one that it is counted under.

use serde::Serialize;

use super::{
    problem::Problem,
    replica::{Lack, Replica, beside, on_device},
};
use crate::domain::{
    memory::{Bytes, Resources},
    names::ServerName,
    replica::ReplicaState,
    time::Instant,
    version::Generation,
};

/// The filters, in the order in which they are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filter {
    /// The manifest names a server.
    Server,
    /// The version stays on one server, and has copies on another one.
    Anchor,
    /// The replica is capable of what the model requires.
    Capabilities,
    /// Its agent renews its lease.
    Available,
    /// Its copies are not about to leave.
    Draining,
    /// No operator has closed it.
    Cordoned,
    /// Not more is registered on it than may be.
    OverLimit,
    /// It holds no copy of the same version.
    Held,
    /// The copy did not fail there of late.
    Failed,
    /// Its memory, with nothing else in it, holds the copy.
    TooBig,
    /// There is room within its limit and beside what is pinned, on every device.
    Memory,
}

/// Why a filter refuses a replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "filter")]
pub enum Rejection {
    /// See [`Filter::Server`].
    Server {
        /// The server that the manifest names.
        wanted: ServerName,
    },
    /// See [`Filter::Anchor`].
    Anchor {
        /// The server that has the other copies.
        on: ServerName,
    },
    /// See [`Filter::Capabilities`].
    Capabilities {
        /// What it lacks.
        missing: Vec<String>,
    },
    /// See [`Filter::Available`].
    Available {
        /// What it is instead.
        state: ReplicaState,
    },
    /// See [`Filter::Draining`].
    Draining,
    /// See [`Filter::Cordoned`].
    Cordoned,
    /// See [`Filter::OverLimit`].
    OverLimit {
        /// The device; absent for the primary one.
        device: Option<String>,
        /// How many bytes too many.
        by: Bytes,
    },
    /// See [`Filter::Held`].
    Held {
        /// The copy that it holds.
        copy: Generation,
    },
    /// See [`Filter::Failed`].
    Failed {
        /// When it may be tried again.
        until: Instant,
    },
    /// See [`Filter::TooBig`].
    TooBig {
        /// The device; absent for the primary one.
        device: Option<String>,
        /// All of its memory.
        capacity: Bytes,
        /// What the copy needs there.
        need: Bytes,
    },
    /// See [`Filter::Memory`].
    Memory {
        /// The device; absent for the primary one.
        device: Option<String>,
        /// Bytes missing.
        missing: Bytes,
        /// Whether less would be missing if no copy were pinned.
        beside_pinned: bool,
    },
}

impl Rejection {
    /// The filter that it comes from.
    #[must_use]
    pub const fn filter(&self) -> Filter {
        match self {
            Self::Server { .. } => Filter::Server,
            Self::Anchor { .. } => Filter::Anchor,
            Self::Capabilities { .. } => Filter::Capabilities,
            Self::Available { .. } => Filter::Available,
            Self::Draining => Filter::Draining,
            Self::Cordoned => Filter::Cordoned,
            Self::OverLimit { .. } => Filter::OverLimit,
            Self::Held { .. } => Filter::Held,
            Self::Failed { .. } => Filter::Failed,
            Self::TooBig { .. } => Filter::TooBig,
            Self::Memory { .. } => Filter::Memory,
        }
    }
}

impl std::fmt::Display for Rejection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Server { wanted } => write!(f, "the model names server {wanted}"),
            Self::Anchor { on } => write!(f, "its other copies are on server {on}, and it stays on one"),
            Self::Capabilities { missing } => write!(f, "lacks {}", missing.join(", ")),
            Self::Available { state } => write!(f, "is {}, not Available", state.name()),
            Self::Draining => f.write_str("is draining"),
            Self::Cordoned => f.write_str("is cordoned"),
            Self::OverLimit { device, by } => {
                write!(f, "is {by} over its limit{}", on_device(device.as_deref()))
            }
            Self::Held { copy } => write!(f, "holds copy {} of this version", copy.number),
            Self::Failed { .. } => f.write_str("failed to load it of late"),
            Self::TooBig { device, capacity, need } => {
                write!(f, "has {capacity}{} in all, less than the {need} needed", on_device(device.as_deref()))
            }
            Self::Memory { device, missing, beside_pinned } => {
                write!(f, "lacks {missing}{}{}", on_device(device.as_deref()), beside(*beside_pinned))
            }
        }
    }
}

/// Every filter's verdict that refuses `replica`, in order.
pub(super) fn rejections<'a>(problem: &'a Problem<'_>, replica: &'a Replica) -> impl Iterator<Item = Rejection> + 'a {
    const FILTERS: [fn(&Problem<'_>, &Replica) -> Option<Rejection>; 11] = [
        server,
        anchor,
        capabilities,
        |_, replica| available(replica),
        |_, replica| not_draining(replica),
        |_, replica| not_cordoned(replica),
        |_, replica| within_limit(replica),
        not_held,
        not_failed,
        could_be_resident,
        has_room,
    ];
    FILTERS.into_iter().filter_map(move |filter| filter(problem, replica))
}

/// Whether every filter lets `replica` pass.
pub(super) fn admits(problem: &Problem<'_>, replica: &Replica) -> bool {
    rejections(problem, replica).next().is_none()
}

/// The first filter that refuses `replica` whoever asks.
pub(super) fn closed(replica: &Replica) -> Option<Filter> {
    available(replica)
        .or_else(|| not_draining(replica))
        .or_else(|| not_cordoned(replica))
        .or_else(|| within_limit(replica))
        .map(|rejection| rejection.filter())
}

fn server(problem: &Problem<'_>, replica: &Replica) -> Option<Rejection> {
    let wanted = problem.request.server.as_ref()?;
    (*wanted != replica.id.server).then(|| Rejection::Server { wanted: wanted.clone() })
}

fn anchor(problem: &Problem<'_>, replica: &Replica) -> Option<Rejection> {
    let on = problem.anchor.as_ref()?;
    (*on != replica.id.server).then(|| Rejection::Anchor { on: on.clone() })
}

fn capabilities(problem: &Problem<'_>, replica: &Replica) -> Option<Rejection> {
    let missing = replica.facts.capabilities.lack(&problem.request.requirements);
    (!missing.is_empty()).then_some(Rejection::Capabilities { missing })
}

fn available(replica: &Replica) -> Option<Rejection> {
    match replica.facts.state {
        // One that drains is available too; that it drains is the next filter's to say.
        ReplicaState::Available | ReplicaState::Draining => None,
        state @ (ReplicaState::Pending | ReplicaState::Unknown { .. } | ReplicaState::Lost) => {
            Some(Rejection::Available { state })
        }
    }
}

fn not_draining(replica: &Replica) -> Option<Rejection> {
    replica.draining().then_some(Rejection::Draining)
}

fn not_cordoned(replica: &Replica) -> Option<Rejection> {
    replica.cordoned.then_some(Rejection::Cordoned)
}

fn within_limit(replica: &Replica) -> Option<Rejection> {
    let (device, by) = replica.over_limit()?;
    Some(Rejection::OverLimit { device: device.map(str::to_owned), by })
}

fn not_held(problem: &Problem<'_>, replica: &Replica) -> Option<Rejection> {
    problem.held.get(&replica.id).map(|copy| Rejection::Held { copy: *copy })
}

fn not_failed(problem: &Problem<'_>, replica: &Replica) -> Option<Rejection> {
    problem.avoided(&replica.id).map(|until| Rejection::Failed { until })
}

fn could_be_resident(problem: &Problem<'_>, replica: &Replica) -> Option<Rejection> {
    let need = &problem.request.need;
    let (device, _) = worst(replica.capacity(), need)?;
    let on = device.as_deref();
    Some(Rejection::TooBig { capacity: replica.capacity().on(on), need: need.on(on), device: device.clone() })
}

fn has_room(problem: &Problem<'_>, replica: &Replica) -> Option<Rejection> {
    let Lack { device, missing, beside_pinned } = replica.lacks(&problem.request.need, problem.request.pinned)?;
    Some(Rejection::Memory { device, missing, beside_pinned })
}

/// The device on which most of `need` is missing from `have`, the first of equals, and how much.
pub(super) fn worst(have: &Resources, need: &Resources) -> Option<(Option<String>, Bytes)> {
    let mut worst = None;
    for (device, missing) in have.lacks(need) {
        if worst.is_none_or(|(_, most)| missing > most) {
            worst = Some((device, missing));
        }
    }
    worst.map(|(device, missing)| (device.map(str::to_owned), missing))
}
