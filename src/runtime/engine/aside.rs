//! A load that gives way to who is soon done.
//!
//! The kernel lets a thread that works have its core for milliseconds, while requests that need a tenth of one wait. So a
//! compilation steps aside every now and then. The rules of this module: it has waited for no longer than it has worked,
//! but for one turn; so nobody's load takes more than twice as long beside requests without end, and where a core is free
//! none does. And while other loads wait for it to end it does not step aside: they would pay for that too.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tract_onnx::{
    prelude::{TractResult, TypedModel},
    tract_core::{
        internal::TypedModelPatch,
        optim::{Optimizer, OptimizerSession, TypedPass},
    },
};

use crate::runtime::execute::Queue;

/// Work between two turns of others.
const STRETCH: Duration = Duration::from_micros(100);

/// What one load has done and waited for.
#[derive(Debug)]
struct Balance {
    worked: Duration,
    waited: Duration,
    /// The end of the last turn of others, or of a stretch after which they got none.
    since: Instant,
}

impl Balance {
    /// At a place where the work can rest: lets others have a turn by `give`, if it is theirs.
    fn rest(&mut self, now: impl Fn() -> Instant, give: impl FnOnce()) {
        let before = now();
        let stretch = before.saturating_duration_since(self.since);
        if stretch < STRETCH {
            return;
        }
        self.worked += stretch;
        self.since = before;
        if self.waited <= self.worked {
            give();
            self.since = now();
            self.waited += self.since.saturating_duration_since(before);
        }
    }
}

/// One load's turns.
#[derive(Clone, Debug)]
pub(super) struct Aside {
    balance: Arc<Mutex<Balance>>,
    behind: Queue,
}

impl Aside {
    /// Of a load that begins, with others `behind` it.
    pub(super) fn begin(behind: Queue) -> Self {
        let balance = Balance { worked: Duration::ZERO, waited: Duration::ZERO, since: now() };
        Self { balance: Arc::new(Mutex::new(balance)), behind }
    }

    /// Steps aside, if it is time.
    pub(super) fn step(&self) {
        self.step_by(now, thread::yield_now);
    }

    fn step_by(&self, now: impl Fn() -> Instant, give: impl FnOnce()) {
        if self.behind.is_empty() {
            self.balance.lock().unwrap_or_else(PoisonError::into_inner).rest(now, give);
        }
    }

    /// The same optimizer, stepping aside between one change of the model and the next.
    pub(super) fn between(&self, optimizer: Optimizer) -> Optimizer {
        let stepping = |pass| Box::new(Stepping { pass, aside: self.clone() }) as Box<dyn TypedPass>;
        Optimizer { passes: optimizer.passes.into_iter().map(stepping).collect(), ..optimizer }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "how long a thread has had a core is no time that a simulation could hold"
)]
fn now() -> Instant {
    Instant::now()
}

#[derive(Clone, Debug)]
struct Stepping {
    pass: Box<dyn TypedPass>,
    aside: Aside,
}

impl TypedPass for Stepping {
    fn reset(&mut self) -> TractResult<()> {
        self.pass.reset()
    }

    fn next(&mut self, session: &mut OptimizerSession<'_>, model: &TypedModel) -> TractResult<Option<TypedModelPatch>> {
        self.aside.step();
        self.pass.next(session, model)
    }

    fn run_direct(&mut self, model: &mut TypedModel) -> TractResult<bool> {
        self.aside.step();
        self.pass.run_direct(model)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn while_others_wait_for_it_to_end_it_does_not_step_aside() {
        for waiting in [0, 1] {
            let aside = Aside::begin(Queue::of(waiting));
            let (later, mut given) = (now() + STRETCH, false);
            aside.step_by(|| later, || given = true);
            assert_eq!(given, waiting == 0);
        }
    }

    proptest! {
        #[test]
        fn nobody_waits_for_longer_than_they_worked_but_for_one_turn(
            steps in prop::collection::vec((0_u64..2_000, 0_u64..5_000), 1..200),
        ) {
            let clock = Cell::new(now());
            let pass = |micros| clock.set(clock.get() + Duration::from_micros(micros));
            let mut balance = Balance { worked: Duration::ZERO, waited: Duration::ZERO, since: clock.get() };
            let (mut worked, mut waited, mut longest) = (0, 0, 0);
            for (work, turn) in steps {
                pass(work);
                worked += work;
                let (before, due) = (waited, clock.get() - balance.since >= STRETCH);
                balance.rest(|| clock.get(), || {
                    pass(turn);
                    waited += turn;
                });
                prop_assert!(before == waited || due, "it stepped aside within a stretch");
                prop_assert!(before != waited || turn == 0 || !due || before > balance.worked.as_micros() as u64);
                longest = longest.max(turn);
                prop_assert!(waited <= worked + longest);
            }
        }
    }
}
