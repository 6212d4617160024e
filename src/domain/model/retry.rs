//! When it makes sense to ask again for a model that does not answer.
//!
//! The rule of this module: what is told is computed from how long copies took, never guessed while a copy is under
//! way. It is an instant, which stays true while time passes; only what waits for a user, or for memory that nobody
//! has promised, has a fixed time.

use std::time::Duration;

use super::{Model, Policy};
use crate::domain::{
    copy::{Copy, State},
    rollout,
    routes::Absence,
    time::Instant,
};

/// What a copy takes before any was measured.
const UNMEASURED: Duration = Duration::from_secs(1);
/// How long to leave a model for which nothing is under way.
const LATER: Duration = Duration::from_secs(30);

/// What there is to go by.
#[derive(Clone, Copy, Debug)]
pub struct Outlook<'a> {
    /// When failed copies are tried again.
    pub policy: &'a Policy,
    /// How long copies of all models take from their order to their first answer; absent before one was measured.
    pub usual: Option<Duration>,
}

impl Model {
    /// What a client is told while no copy can be sent to.
    pub(super) fn absence(&self, outlook: Outlook<'_>) -> Absence {
        let standing = self.standing();
        let expected = self.way.or(outlook.usual).unwrap_or(UNMEASURED);
        let retry_at = self.copies.iter().filter_map(|copy| worth_asking(copy, expected, outlook.policy)).min();
        let retry_after = retry_at.is_none().then_some(LATER);
        Absence { state: standing.state.name().to_owned(), reason: standing.sentence(), retry_at, retry_after }
    }
}

/// When the copy should answer, or be tried again; nothing when it won't by itself.
fn worth_asking(copy: &Copy, expected: Duration, policy: &Policy) -> Option<Instant> {
    if copy.draining {
        return None;
    }
    match &copy.state {
        State::Pending { reason: None } | State::Available { .. } | State::Unknown { .. } => {
            Some(copy.since + expected)
        }
        State::Scheduled { .. } | State::Downloading { .. } | State::Loading { .. } => {
            Some(copy.ordered.unwrap_or(copy.since) + expected)
        }
        State::Failed { .. } => rollout::tried_again_at(copy, policy),
        State::Pending { reason: Some(_) } | State::Draining { .. } | State::Unloaded => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        copy::{self, Failure, FailureClass, Progress, Report, Residency},
        model::{Decision, Effect, Event},
        names::{ModelName, ReplicaId, ServerName},
        placement::report::Unplaced,
        spec::{Definition, DeploymentPatch, ModelSpec, Passthrough},
        version::{Generation, Uid},
    };

    const fn at(seconds: u64) -> Instant {
        Instant::from_micros(seconds * 1_000_000)
    }

    fn on() -> ReplicaId {
        ReplicaId::new(ServerName::new("onnx").expect("valid"), 0)
    }

    struct World {
        model: Model,
        policy: Policy,
    }

    impl World {
        /// A model that was submitted at 0 s.
        fn new() -> Self {
            let name = ModelName::new("iris").expect("valid");
            let definition = Definition {
                name: name.clone(),
                spec: ModelSpec { uri: "/m".to_owned(), ..ModelSpec::default() },
                deployment: DeploymentPatch::default(),
                kubernetes: None,
                passthrough: Passthrough::default(),
            };
            let mut world = Self { model: Model::unborn(name, at(0)), policy: Policy::default() };
            world.take(Event::Submit(Box::new(definition), Uid(1)), 0);
            world
        }

        fn take(&mut self, event: Event, now: u64) -> Decision {
            self.model.apply(event, &self.policy, at(now)).expect("it is allowed")
        }

        fn newest(&self) -> Generation {
            self.model.copies.last().expect("a copy").generation
        }

        fn placed(&mut self, now: u64) {
            self.take(Event::Copy(self.newest(), copy::Event::Placed { on: on() }), now);
        }

        fn says(&mut self, report: Report, now: u64) -> Decision {
            self.take(Event::Reported(on(), self.newest(), Some(report)), now)
        }

        fn told(&self, usual: Option<u64>) -> (Option<Instant>, Option<Duration>) {
            let outlook = Outlook { policy: &self.policy, usual: usual.map(Duration::from_secs) };
            let absence = self.model.absence(outlook);
            (absence.retry_at, absence.retry_after)
        }
    }

    const AVAILABLE: Report = Report::Available { residency: Residency::Resident, measured: None, estimate: None };

    #[test]
    fn a_copy_under_way_should_answer_as_long_after_its_order_as_copies_take() {
        let mut world = World::new();
        assert_eq!(world.told(None), (Some(at(1)), None), "nothing was measured yet");
        world.placed(2);
        assert_eq!(world.told(Some(40)), (Some(at(42)), None), "as long as other models take");
        world.says(Report::Downloading(Progress::default()), 5);
        world.says(Report::Loading { estimate: None }, 11);
        assert_eq!(world.told(Some(40)), (Some(at(42)), None), "the way began with the order");
        let decision = world.says(AVAILABLE, 22);
        assert!(decision.effects.contains(&Effect::Arrived(Duration::from_secs(20))), "{decision:?}");
        // The next way of this model is measured by its own.
        world.says(Report::Unloaded, 100);
        assert_eq!(world.told(Some(40)), (Some(at(120)), None));
    }

    #[test]
    fn a_failed_copy_is_tried_again_when_its_pause_is_over() {
        let mut world = World::new();
        world.placed(0);
        let failed = |class| Report::Failed { failure: Failure { class, message: String::new() }, freed: true };
        world.says(failed(FailureClass::Runtime), 10);
        assert_eq!(world.told(Some(40)), (Some(at(11)), None));
        world.take(Event::Reconcile, 11);
        world.placed(11);
        world.says(failed(FailureClass::Runtime), 20);
        assert_eq!(world.told(Some(40)), (Some(at(22)), None), "the pause grows");
        world.take(Event::Reconcile, 22);
        world.placed(22);
        world.says(failed(FailureClass::Incompatible), 30);
        assert_eq!(world.told(Some(40)), (None, Some(LATER)), "only another spec helps");
    }

    #[test]
    fn what_nothing_is_under_way_for_is_left_for_a_fixed_time() {
        let mut world = World::new();
        let nowhere = copy::Event::Unplaced { reason: Unplaced::default() };
        world.take(Event::Copy(world.newest(), nowhere), 0);
        assert_eq!(world.told(Some(40)), (None, Some(LATER)));
        world.take(Event::Scale(0), 5);
        assert_eq!(world.told(Some(40)), (None, Some(LATER)));
    }

    #[test]
    fn a_way_that_was_not_seen_from_its_beginning_is_not_measured() {
        let mut world = World::new();
        world.placed(0);
        world.take(Event::Replica(on(), copy::Event::AgentLost), 1);
        world.says(Report::Loading { estimate: None }, 50);
        let decision = world.says(AVAILABLE, 51);
        assert!(!decision.effects.iter().any(|effect| matches!(effect, Effect::Arrived(_))), "{decision:?}");
    }
}
