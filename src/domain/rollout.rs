//! How many copies of which version there should be, and which may leave.
//!
//! The rule of this module: the version that serves keeps its copies until min(its Available copies, wanted)
//! copies of the next one are Available; between the two there are never more than wanted + maxSurge copies
//! nor, by a decision of ours, fewer than wanted - maxUnavailable that answer. `reconcile` looks only at
//! what is, never at what just happened.

use std::time::Duration;

use serde_json::json;

use super::{
    copy::{Copy, Event, Failure, State},
    model::{Decision, Model, Policy},
    spec::Strategy,
    time::Instant,
    version::Version,
};

/// Compares the model's copies with what is wanted and decides what is missing to get there.
pub(super) fn reconcile(model: &mut Model, policy: &Policy, now: Instant, decision: &mut Decision) {
    let wanted = model.deployment.replicas;
    let Some(latest) = model.latest().map(|entry| entry.version) else { return };
    if model.deleted.is_some() || wanted == 0 {
        drain_where(model, now, decision, |_| true);
        if model.deleted.is_none() {
            serve(model, latest, decision);
        }
        return;
    }
    // A name created again waits until nothing of its earlier life is left.
    let uid = model.uid;
    drain_where(model, now, decision, |copy| copy.generation.uid != uid);
    if model.copies.iter().any(|copy| copy.generation.uid != uid && copy.state != State::Unloaded) {
        return;
    }
    retry_failed(model, policy, now, decision);
    give_up(model, latest, policy, decision);

    let serving = model.serving.unwrap_or(latest);
    let given_up = model.entry(latest).is_some_and(|entry| entry.failed.is_some()) && serving != latest;
    let goal = if given_up { serving } else { latest };
    let (surge, slack) = match model.deployment.strategy {
        Strategy::RollingUpdate { max_surge, max_unavailable } => (max_surge, max_unavailable),
        Strategy::Recreate => {
            if goal != serving {
                drain_where(model, now, decision, |copy| copy.generation.version != goal);
                if model.copies.iter().any(|copy| copy.generation.version != goal && copy.state != State::Unloaded) {
                    return;
                }
                serve(model, goal, decision);
            }
            (0, wanted)
        }
    };
    let mut serving = model.serving.unwrap_or(latest);
    if goal != serving && available(model, goal) >= routed(model, serving).min(wanted).max(1) {
        serve(model, goal, decision);
        serving = goal;
    }
    // Versions that are neither served nor wanted, and do not answer, only take room.
    drain_where(model, now, decision, |copy| {
        copy.generation.version != goal && copy.generation.version != serving && !copy.routed
    });
    let floor = wanted.saturating_sub(slack);
    let kept = if goal == serving { wanted } else { floor.saturating_sub(available(model, goal)) };
    shed(model, serving, kept, goal, floor, now, decision);
    // What is kept on clients' side is made whole first, then the next version grows within the surge.
    if goal != serving {
        while staying(model, serving) < kept {
            model.add_copy(serving, 0, Vec::new(), policy, now, decision);
        }
    }
    let ceiling = wanted.saturating_add(surge);
    while staying(model, goal) < wanted && others(model, goal).saturating_add(staying(model, goal)) < ceiling {
        model.add_copy(goal, 0, Vec::new(), policy, now, decision);
    }
}

/// When a failed copy is due for its next try, soonest first.
pub(super) fn next_retry(model: &Model, policy: &Policy) -> Option<Instant> {
    model.copies.iter().filter_map(|copy| due(copy, policy)).min()
}

fn due(copy: &Copy, policy: &Policy) -> Option<Instant> {
    match &copy.state {
        State::Failed { on: None, .. } => tried_again_at(copy, policy),
        _ => None,
    }
}

/// When another copy is tried in the place of one that failed, if its memory is free by then.
pub(super) fn tried_again_at(copy: &Copy, policy: &Policy) -> Option<Instant> {
    match &copy.state {
        State::Failed { failure, .. } if failure.class.retryable() && !copy.draining => {
            Some(copy.since + backoff(copy.attempts, policy))
        }
        _ => None,
    }
}

/// Doubles with each attempt, up to the cap.
fn backoff(attempts: u32, policy: &Policy) -> Duration {
    policy.retry_first.saturating_mul(1 << attempts.min(20)).min(policy.retry_cap)
}

/// Puts a new copy in the place of each failed one whose time has come.
fn retry_failed(model: &mut Model, policy: &Policy, now: Instant, decision: &mut Decision) {
    let ready: Vec<usize> =
        (0..model.copies.len()).filter(|i| due(&model.copies[*i], policy).is_some_and(|at| at <= now)).collect();
    for index in ready {
        let copy = &model.copies[index];
        let (version, attempts, avoid) = (copy.generation.version, copy.attempts + 1, copy.avoid.clone());
        drop(model.step(index, Event::Drain, now, decision));
        model.add_copy(version, attempts, avoid, policy, now, decision);
    }
}

/// Gives a rollout up when its version can't load, or failed too often, while another one serves.
fn give_up(model: &mut Model, latest: Version, policy: &Policy, decision: &mut Decision) {
    if model.serving.is_none_or(|serving| serving == latest)
        || model.entry(latest).is_none_or(|entry| entry.failed.is_some())
    {
        return;
    }
    let hopeless = |copy: &Copy| match &copy.state {
        State::Failed { failure, .. } if !failure.class.retryable() || copy.attempts + 1 >= policy.rollout_tries => {
            Some(failure.clone())
        }
        _ => None,
    };
    let failure: Option<Failure> =
        model.copies.iter().filter(|copy| copy.generation.version == latest).find_map(hopeless);
    if let (Some(failure), Some(entry)) = (failure, model.entry_mut(latest)) {
        decision.note("RolloutFailed", format!("version {latest} is given up: {}", failure.message), &failure);
        entry.failed = Some(failure);
        decision.writes.extend(model.version_row(latest));
    }
}

/// Lets copies go that are beyond what is kept, as far as the floor of answering copies allows.
fn shed(
    model: &mut Model,
    serving: Version,
    kept: u32,
    goal: Version,
    floor: u32,
    now: Instant,
    decision: &mut Decision,
) {
    loop {
        let answering = count(model, |copy| matches!(copy.state, State::Available { .. }));
        let surplus = |copy: &Copy| {
            let version = copy.generation.version;
            let limit = if version == goal {
                model.deployment.replicas
            } else if version == serving {
                kept
            } else {
                0
            };
            must_leave(model, copy) || staying(model, version) > limit
        };
        let replaced = replaced(model);
        let may_go = |copy: &Copy| match copy.state {
            State::Available { .. } if must_leave(model, copy) => replaced,
            State::Available { .. } => answering > floor,
            State::Unknown { .. } => !copy.routed || answering >= floor,
            State::Pending { .. }
            | State::Scheduled { .. }
            | State::Downloading { .. }
            | State::Loading { .. }
            | State::Draining { .. }
            | State::Unloaded
            | State::Failed { .. } => true,
        };
        let victim = model
            .copies
            .iter()
            .enumerate()
            .filter(|(_, copy)| is_live(copy) && surplus(copy) && may_go(copy))
            .max_by_key(|(index, copy)| (dispensable(model, copy), *index))
            .map(|(index, _)| index);
        let Some(index) = victim else { return };
        drop(model.step(index, Event::Drain, now, decision));
    }
}

/// Whether its replica is being drained, or does not fit it any more.
fn must_leave(model: &Model, copy: &Copy) -> bool {
    model.displaced().contains(&copy.generation) || copy.state.replica().is_some_and(|on| model.leaving().contains(on))
}

/// Whether every copy that can answer elsewhere does, so that those on draining replicas may go. A copy that
/// finds no place elsewhere keeps them.
fn replaced(model: &Model) -> bool {
    let elsewhere = |copy: &Copy| !must_leave(model, copy);
    let answering = count(model, |copy| elsewhere(copy) && matches!(copy.state, State::Available { .. }));
    let hoped_for = count(model, |copy| elsewhere(copy) && !matches!(copy.state, State::Failed { .. }));
    answering > 0 && answering >= hoped_for.min(model.deployment.replicas)
}

/// The order in which surplus copies go: those that answer last.
fn dispensable(model: &Model, copy: &Copy) -> (bool, bool, bool, bool) {
    (
        !copy.routed,
        matches!(copy.state, State::Unknown { .. }),
        must_leave(model, copy),
        matches!(copy.state, State::Available { residency: super::copy::Residency::Evicted, .. }),
    )
}

fn drain_where(model: &mut Model, now: Instant, decision: &mut Decision, which: impl Fn(&Copy) -> bool) {
    for index in 0..model.copies.len() {
        if is_live(&model.copies[index]) && which(&model.copies[index]) {
            drop(model.step(index, Event::Drain, now, decision));
        }
    }
}

fn serve(model: &mut Model, version: Version, decision: &mut Decision) {
    if model.serving != Some(version) {
        decision.note(
            "Serving",
            format!("version {version} is the one that clients are kept on"),
            &json!({ "from": model.serving }),
        );
        model.serving = Some(version);
        decision.writes.push(model.row());
    }
}

fn is_live(copy: &Copy) -> bool {
    !copy.draining && copy.state != State::Unloaded
}

fn count(model: &Model, which: impl Fn(&Copy) -> bool) -> u32 {
    u32::try_from(model.copies.iter().filter(|copy| is_live(copy) && which(copy)).count()).unwrap_or(u32::MAX)
}

/// Live copies of the version that need not leave their replica.
fn staying(model: &Model, version: Version) -> u32 {
    count(model, |copy| copy.generation.version == version && !must_leave(model, copy))
}

fn others(model: &Model, version: Version) -> u32 {
    count(model, |copy| copy.generation.version != version && !must_leave(model, copy))
}

fn available(model: &Model, version: Version) -> u32 {
    count(model, |copy| copy.generation.version == version && matches!(copy.state, State::Available { .. }))
}

/// Copies that clients may be sent to: those that answer, and those that did when last heard.
fn routed(model: &Model, version: Version) -> u32 {
    count(model, |copy| copy.generation.version == version && copy.routed)
}
