//! The rules that never break, as functions that look for a breach. Property tests and the simulation call them after
//! every step, and a running scheduler calls them on a timer and counts what they find. They trust no counter:
//! each compares with what follows from the facts.

use std::fmt;

use super::{
    memory::Bytes,
    placement::{Decision, Ledger, Placement, PlacementRequest},
};

/// A rule, by what it promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Invariant {
    /// Every sum and index of the placement follows from its copies and replicas.
    LedgerAddsUp,
    /// No decision takes registered memory over a replica's limit, or registers a copy that could never be resident.
    RegisteredWithinLimit,
    /// No decision lets pinned copies take what they do not leave to each of the others, or could never have together.
    RoomBesidePinned,
}

impl Invariant {
    /// Every rule, for metrics that start at zero.
    pub const ALL: [Self; 3] = [Self::LedgerAddsUp, Self::RegisteredWithinLimit, Self::RoomBesidePinned];

    /// The rule's name, as a metric's label.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::LedgerAddsUp => "ledger_adds_up",
            Self::RegisteredWithinLimit => "registered_within_limit",
            Self::RoomBesidePinned => "room_beside_pinned",
        }
    }
}

/// A rule that was found broken: a fault of Wharf's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The rule.
    pub invariant: Invariant,
    /// What was found.
    pub detail: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.invariant.name(), self.detail)
    }
}

/// What is wrong with the placement's books. Looks at every copy.
#[must_use]
pub fn placement(placement: &Placement) -> Vec<Violation> {
    let wrong = placement.consistency_check().err().unwrap_or_default();
    wrong.into_iter().map(|detail| Violation { invariant: Invariant::LedgerAddsUp, detail }).collect()
}

/// What is wrong with a decision, given the ledger right after it. A copy that had its place before was not decided
/// on again, and may well be over a limit that has changed since.
#[must_use]
pub fn decision(after: &Ledger, request: &PlacementRequest, decision: &Decision) -> Option<Violation> {
    let placed = decision.outcome.as_ref().ok()?;
    placed.score.as_ref()?;
    let broken = |detail| Some(Violation { invariant: Invariant::RegisteredWithinLimit, detail });
    let copy = format!("copy {} of {}", request.generation, request.model);
    let Some(replica) = after.replica(&placed.replica) else {
        return broken(format!("{copy} was placed on {}, which is not known", placed.replica));
    };
    if !replica.capacity().covers(&request.need) {
        return broken(format!("{copy} was placed on {}, whose memory could never hold it", placed.replica));
    }
    if let Some((_, by)) = replica.over_limit() {
        return broken(format!("{copy} took {} over its limit by {by}", placed.replica));
    }
    let (pinned, held) =
        (replica.pinned(), if request.pinned { replica.largest_unpinned() } else { request.need.clone() });
    let together = |device| u128::from(pinned.on(device).0) + u128::from(held.on(device).0);
    let over = |device| together(device) > u128::from(replica.capacity().on(device).0);
    if request.need.devices().any(|(device, bytes)| bytes > Bytes::ZERO && over(device)) {
        let detail = format!(
            "{copy} was placed on {}, where {} can't come in beside {}",
            placed.replica, held.primary, pinned.primary
        );
        return Some(Violation { invariant: Invariant::RoomBesidePinned, detail });
    }
    None
}
