//! When a copy is set aside: it answers with errors while others of its version answer well.
//!
//! The rules of this module: errors alone set nothing aside, for a version that fails everywhere has no better copy; what
//! is set aside comes back by one good answer to one request, never by time alone; in each wait there is one such request,
//! whatever becomes of it.

use std::time::Duration;

use super::time::Instant;

/// As many errors in a row set a copy aside.
pub const ERRORS: u32 = 5;
/// How long a copy is set aside at first; each probe that fails doubles it.
pub const FIRST: Duration = Duration::from_secs(10);
/// The longest that it is.
pub const LONGEST: Duration = Duration::from_secs(300);

/// What is known of one copy by its answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// It has not answered yet.
    #[default]
    Unknown,
    /// Its last answer was good.
    Well,
    /// Its last answers were errors.
    Failing {
        /// How many, counted up to [`ERRORS`].
        in_row: u32,
    },
    /// Nothing is sent to it while another copy of its version can take the request.
    Aside {
        /// When one request may find out whether it is well again.
        until: Instant,
        /// How many such requests have failed.
        probes: u32,
    },
}

/// What an answer says of its copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The model answered.
    Good,
    /// The inference server failed.
    Error,
}

/// What is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The copy is set aside.
    SetAside,
    /// It is back.
    Back,
}

/// What `verdict` makes of a copy. `probe` says that the request was sent to find out about a copy that is set aside;
/// `others_well` that another copy of its version answers well.
#[must_use]
pub fn judge(
    standing: Standing,
    verdict: Verdict,
    probe: bool,
    others_well: bool,
    now: Instant,
) -> (Standing, Option<Change>) {
    let failed = |in_row: u32| {
        if in_row >= ERRORS && others_well {
            (Standing::Aside { until: now + FIRST, probes: 0 }, Some(Change::SetAside))
        } else {
            (Standing::Failing { in_row: in_row.min(ERRORS) }, None)
        }
    };
    match (standing, verdict) {
        (Standing::Unknown | Standing::Well | Standing::Failing { .. }, Verdict::Good) => (Standing::Well, None),
        (Standing::Unknown | Standing::Well, Verdict::Error) => failed(1),
        (Standing::Failing { in_row }, Verdict::Error) => failed(in_row.saturating_add(1)),
        (Standing::Aside { .. }, Verdict::Good) if probe => (Standing::Well, Some(Change::Back)),
        (Standing::Aside { probes, .. }, Verdict::Error) if probe => {
            let probes = probes.saturating_add(1);
            (Standing::Aside { until: now + pause(probes), probes }, None)
        }
        // The answer to a request that was under way when the copy was set aside.
        (Standing::Aside { .. }, Verdict::Good | Verdict::Error) => (standing, None),
    }
}

/// Claims the request that finds out about a copy: how that stands from then on. Nothing when it is not aside, or not
/// for long enough. The next wait begins with the claim, for there may never be a verdict.
#[must_use]
pub fn claim(standing: Standing, now: Instant) -> Option<Standing> {
    match standing {
        Standing::Aside { until, probes } if now >= until => {
            Some(Standing::Aside { until: now + pause(probes), probes })
        }
        Standing::Unknown | Standing::Well | Standing::Failing { .. } | Standing::Aside { .. } => None,
    }
}

/// How long a copy stays aside after so many probes have failed.
fn pause(probes: u32) -> Duration {
    FIRST.saturating_mul(1 << probes.min(16)).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn at(seconds: u64) -> Instant {
        Instant::from_micros(seconds * 1_000_000)
    }

    fn after(errors: u32, others_well: bool) -> Standing {
        (0..errors)
            .fold(Standing::Well, |standing, n| judge(standing, Verdict::Error, false, others_well, at(u64::from(n))).0)
    }

    #[test]
    fn errors_in_a_row_set_a_copy_aside_and_one_good_answer_begins_anew() {
        assert_eq!(after(ERRORS - 1, true), Standing::Failing { in_row: ERRORS - 1 });
        assert_eq!(judge(after(ERRORS - 1, true), Verdict::Good, false, true, at(9)), (Standing::Well, None));
        let (standing, change) = judge(after(ERRORS - 1, true), Verdict::Error, false, true, at(9));
        assert_eq!((standing, change), (Standing::Aside { until: at(19), probes: 0 }, Some(Change::SetAside)));
    }

    #[test]
    fn a_version_that_fails_everywhere_keeps_all_its_copies() {
        let failing = after(1000, false);
        assert_eq!(failing, Standing::Failing { in_row: ERRORS });
        // Once another is well, the next error is one too many.
        assert_eq!(judge(failing, Verdict::Error, false, true, at(0)).1, Some(Change::SetAside));
    }

    #[test]
    fn only_a_probe_brings_it_back_and_one_that_fails_doubles_the_wait() {
        let mut aside = after(ERRORS, true);
        for verdict in [Verdict::Good, Verdict::Error] {
            assert_eq!(judge(aside, verdict, false, true, at(9)), (aside, None));
        }
        for wait in [20, 40, 80, 160, 300, 300] {
            let change;
            (aside, change) = judge(aside, Verdict::Error, true, true, at(100));
            assert!(matches!(aside, Standing::Aside { until, .. } if until == at(100 + wait)), "{aside:?}");
            assert_eq!(change, None);
        }
        assert_eq!(judge(aside, Verdict::Good, true, false, at(9)), (Standing::Well, Some(Change::Back)));
    }

    #[test]
    fn there_is_one_probe_in_each_wait_whether_it_has_a_verdict_or_not() {
        let aside = Standing::Aside { until: at(10), probes: 1 };
        assert_eq!(claim(aside, at(9)), None);
        let claimed = claim(aside, at(12)).expect("it is time");
        assert_eq!(claimed, Standing::Aside { until: at(32), probes: 1 });
        assert_eq!((claim(claimed, at(31)), claim(claimed, at(32)).is_some()), (None, true));
        for standing in [Standing::Unknown, Standing::Well, Standing::Failing { in_row: ERRORS }] {
            assert_eq!(claim(standing, at(99)), None);
        }
    }

    proptest! {
        #[test]
        fn nothing_is_set_aside_unless_another_is_well(
            answers in prop::collection::vec((any::<bool>(), any::<bool>()), 0..60),
        ) {
            let mut standing = Standing::default();
            for (good, others_well) in answers {
                let verdict = if good { Verdict::Good } else { Verdict::Error };
                let (next, change) = judge(standing, verdict, false, others_well, at(0));
                prop_assert!(change != Some(Change::SetAside) || others_well && !good);
                prop_assert_eq!(
                    change == Some(Change::SetAside),
                    matches!(next, Standing::Aside { .. }) && !matches!(standing, Standing::Aside { .. })
                );
                standing = next;
            }
        }
    }
}
