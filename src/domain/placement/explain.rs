//! The decision as it would be without indexes: every filter asked of every replica, every score computed. It serves
//! those who want to know why, and it is what the indexed search is tested against.

use std::collections::BTreeMap;

use super::{
    filter::{self, Filter, Rejection},
    ledger::Ledger,
    problem::{Capabilities, PlacementRequest, Problem},
    replica::Replica,
    report::{Candidate, Findings, Report, Short, Unplaced},
    score::{self, Common, Score},
    solve::{self, Miss},
};
use crate::domain::{names::ServerName, time::Instant};

/// A replica as it would be without the copy that is asked about.
struct Judged<'a> {
    replica: std::borrow::Cow<'a, Replica>,
    rejections: Vec<Rejection>,
}

/// Judges every replica, as if the copy had not been placed yet.
pub(super) fn explain(ledger: &Ledger, request: &PlacementRequest, now: Instant) -> Report {
    /// Replicas named as equally near.
    const NAMED: usize = 16;
    let problem = Problem::new(ledger, request, now);
    let judged = judge(ledger, &problem);
    let mut peers: BTreeMap<(&ServerName, &Capabilities), u32> = BTreeMap::new();
    for one in judged.iter().filter(|one| one.rejections.is_empty()) {
        *peers.entry((&one.replica.id.server, &one.replica.facts.capabilities)).or_default() += 1;
    }
    let sized = !request.need.is_zero();
    let mut candidates = Vec::with_capacity(judged.len());
    for one in &judged {
        let replica = &*one.replica;
        let fits = one.rejections.is_empty() && sized;
        let score = fits.then(|| {
            let fitting = peers.get(&(&replica.id.server, &replica.facts.capabilities)).copied().unwrap_or(0);
            let stranded = problem.together().map_or(0, |together| together.saturating_sub(fitting));
            let beside = problem.staying.get(&replica.id.server).copied().unwrap_or(0);
            score::score(&problem, &replica.rank(), &replica.free(), Common { stranded, beside })
        });
        candidates.push(Candidate {
            replica: replica.id.clone(),
            rejections: one.rejections.clone(),
            score,
            free: replica.free(),
            room: if request.pinned { replica.room_to_pin() } else { replica.room() },
        });
    }
    let chosen = best(&candidates).map(|score| score.replica.clone());
    let unplaced = chosen.is_none().then(|| unplaced(ledger, &problem, &judged));
    let short = if unplaced.is_some() { short(&problem, &judged, NAMED) } else { None };
    Report {
        model: request.model.clone(),
        generation: request.generation,
        need: request.need.clone(),
        requirements: request.requirements.clone(),
        candidates,
        chosen,
        unplaced,
        short,
    }
}

/// The best score of all.
pub(super) fn best(candidates: &[Candidate]) -> Option<&Score> {
    candidates.iter().filter_map(|candidate| candidate.score.as_ref()).min()
}

fn judge<'a>(ledger: &'a Ledger, problem: &Problem<'_>) -> Vec<Judged<'a>> {
    let own = ledger.copy(&problem.request.model, problem.request.generation);
    ledger
        .replicas()
        .map(|replica| {
            let replica = match own {
                Some(copy) if copy.replica == replica.id => {
                    std::borrow::Cow::Owned(replica.without(&problem.request.model, problem.request.generation, copy))
                }
                Some(_) | None => std::borrow::Cow::Borrowed(replica),
            };
            let rejections = filter::rejections(problem, &replica).collect();
            Judged { replica, rejections }
        })
        .collect()
}

/// What nothing but memory keeps from taking the copy, by how much is missing.
fn misses<'a>(problem: &Problem<'_>, judged: &'a [Judged<'a>]) -> impl Iterator<Item = (Miss, &'a Replica)> {
    let need = problem.request.need.clone();
    judged
        .iter()
        .filter(|one| {
            !one.rejections.is_empty()
                && one.rejections.iter().all(|by| matches!(by.filter(), Filter::Memory | Filter::TooBig))
        })
        .map(move |one| {
            let room = if problem.request.pinned { one.replica.room_to_pin() } else { one.replica.room() };
            let missing = solve::missing(&room, &need);
            (Miss { missing, rank: one.replica.rank() }, &*one.replica)
        })
}

fn unplaced(ledger: &Ledger, problem: &Problem<'_>, judged: &[Judged<'_>]) -> Unplaced {
    let need = &problem.request.need;
    if need.is_zero() {
        return Unplaced::new(Findings { replicas: count(judged.len()), ..Findings::default() });
    }
    let mut rejected = BTreeMap::new();
    for first in judged.iter().filter_map(|one| one.rejections.first()) {
        *rejected.entry(first.filter()).or_insert(0) += 1;
    }
    let nearest = misses(problem, judged).min_by(|(a, _), (b, _)| a.cmp(b));
    Unplaced::new(Findings {
        replicas: count(judged.len()),
        need: need.clone(),
        nearest: nearest.and_then(|(_, replica)| solve::miss(replica, problem.request)),
        gap: solve::gap(ledger, problem),
        server: problem.request.server.clone(),
        anchor: problem.anchor.clone(),
        known: solve::known(ledger, problem),
        rejected,
    })
}

fn short(problem: &Problem<'_>, judged: &[Judged<'_>], named: usize) -> Option<Short> {
    let least = misses(problem, judged).map(|(miss, _)| miss.missing).min()?;
    let equal: Vec<&Replica> =
        misses(problem, judged).filter(|(miss, _)| miss.missing == least).map(|(_, replica)| replica).collect();
    let miss = solve::miss(equal.first()?, problem.request)?;
    Some(Short {
        device: miss.device,
        missing: miss.missing,
        replicas: equal.iter().take(named).map(|replica| replica.id.clone()).collect(),
        count: count(equal.len()),
    })
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
