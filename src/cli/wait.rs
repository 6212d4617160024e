//! Waiting for models to come to a state.
//!
//! The rule of this module: a wait listens, it does not poll; it ends as soon as the state can't come any
//! more, and says why.

use std::{collections::BTreeMap, time::Duration};

use super::{
    Context,
    commands::view::{copy_progress, newest, next_step},
    failure::{Failure, Peer, seconds},
    output::Live,
};
use crate::rpc::{
    client::{ClientError, Connection},
    proto::wharf::{CopyView, ListModelsRequest, ModelView},
};

/// How long to leave between two tries to reach a scheduler that was there before.
const RETRY: Duration = Duration::from_millis(500);
/// The most models that a live view names one by one.
const NAMED: usize = 5;

const STATES: [&str; 8] =
    ["StateUnknown", "Progressing", "Available", "Failed", "Terminating", "Terminated", "ScheduleFailed", "ScaledDown"];

/// Seldon writes `Model` before most of its states' names.
fn bare(state: &str) -> &str {
    state.strip_prefix("Model").unwrap_or(state)
}

/// Whether `text` names a state of a model, with or without `Model` before it.
pub(crate) fn is_state(text: &str) -> bool {
    STATES.contains(&bare(text))
}

/// A state that a model is to come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Goal {
    pub(crate) model: String,
    pub(crate) state: String,
    /// The submission that is waited for; whatever is newest when absent.
    pub(crate) submission: Option<(u64, u32)>,
}

/// What a view says about a goal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Reached,
    Waiting,
    Hopeless(String),
}

/// Whether `view` is what `goal` waits for, or can still become it.
pub(crate) fn judge(goal: &Goal, view: &ModelView) -> Verdict {
    let wanted = bare(&goal.state);
    let ending = matches!(wanted, "Terminated" | "Terminating");
    if let Some((uid, version)) = goal.submission {
        if view.uid < uid {
            // The model of that name that was deleted before.
            return Verdict::Waiting;
        }
        if view.uid > uid {
            return Verdict::Hopeless("it was deleted, and created again".to_owned());
        }
        match newest(view) {
            Some(last) if last.version > version => {
                return Verdict::Hopeless(format!("version {version} was superseded by version {}", last.version));
            }
            Some(last) if last.version < version => return Verdict::Waiting,
            _ => {}
        }
    }
    if view.deleted && !ending {
        return Verdict::Hopeless("it is deleted".to_owned());
    }
    if wanted != "Available" {
        return if bare(&view.state) == wanted { Verdict::Reached } else { Verdict::Waiting };
    }
    let Some(last) = newest(view) else { return Verdict::Waiting };
    let taken_over = view.serving.is_none_or(|serving| serving == last.version);
    if bare(&view.state) == "Available" && bare(&last.state) == "Available" && taken_over {
        return Verdict::Reached;
    }
    let reason = || [&last.reason, &view.reason].into_iter().find(|reason| !reason.is_empty()).cloned();
    if bare(&view.state) == "ScaledDown" && view.wanted == 0 {
        return Verdict::Hopeless("it is scaled down to 0 copies; raise replicas".to_owned());
    }
    let moving = |copy: &CopyView| !matches!(copy.state.as_str(), "Failed" | "Unloaded" | "Draining");
    if bare(&last.state) == "Failed" && !last.copies.iter().any(moving) {
        let reason = reason().unwrap_or_else(|| "no reason was given".to_owned());
        let step = next_step(&reason);
        return Verdict::Hopeless(format!("version {} failed: {reason}; {step}", last.version));
    }
    Verdict::Waiting
}

/// Waits until every goal is reached. Live on a terminal; elsewhere one line for each change.
///
/// # Errors
/// The first goal that can't be reached, a scheduler that can't be reached, or the end of `patience`.
pub(crate) async fn wait(
    context: &Context,
    connection: &Connection,
    goals: Vec<Goal>,
    patience: Duration,
) -> Result<Vec<ModelView>, Failure> {
    let mut progress = Progress::new(context, goals);
    let outcome = tokio::time::timeout(patience, listen(connection, &mut progress)).await;
    progress.live.clear();
    match outcome {
        Ok(done) => done.map(|()| progress.reached),
        Err(_) => Err(Failure::TimedOut(progress.standing(patience))),
    }
}

/// Follows the models until all goals are reached. A scheduler that goes away is waited for: it is the
/// models' state that matters, not who tells it.
async fn listen(connection: &Connection, progress: &mut Progress<'_>) -> Result<(), Failure> {
    let mut heard = false;
    loop {
        match follow(connection, progress, &mut heard).await {
            Ok(()) => return Ok(()),
            Err(Stop::Judged(failure)) => return Err(failure),
            Err(Stop::Lost(ClientError::Unreachable { .. } | ClientError::TimedOut { .. })) if heard => {
                progress.context.output.detail("lost the scheduler; trying again");
                tokio::time::sleep(RETRY).await;
            }
            Err(Stop::Lost(error)) => return Err(Failure::of(Peer::Scheduler, error)),
        }
    }
}

enum Stop {
    Judged(Failure),
    Lost(ClientError),
}

async fn follow(connection: &Connection, progress: &mut Progress<'_>, heard: &mut bool) -> Result<(), Stop> {
    let name = match progress.open.as_slice() {
        [] => return Ok(()),
        [one] => Some(one.model.clone()),
        _ => None,
    };
    let mut client = connection.wharf();
    let request = ListModelsRequest { name, terminated: true };
    let mut views = connection.call(client.watch_models(request)).await.map_err(Stop::Lost)?.into_inner();
    loop {
        let view = match views.message().await {
            Ok(Some(view)) => view,
            Ok(None) => {
                let (address, cause) = (connection.address().to_owned(), "the stream ended".to_owned());
                return Err(Stop::Lost(ClientError::Unreachable { address, cause }));
            }
            Err(status) => return Err(Stop::Lost(connection.classify(&status))),
        };
        *heard = true;
        progress.take(view).map_err(Stop::Judged)?;
        if progress.open.is_empty() {
            return Ok(());
        }
    }
}

/// What is still waited for, and what was last told of it.
struct Progress<'a> {
    context: &'a Context,
    open: Vec<Goal>,
    all: usize,
    seen: BTreeMap<String, String>,
    reached: Vec<ModelView>,
    live: Live,
}

impl<'a> Progress<'a> {
    fn new(context: &'a Context, goals: Vec<Goal>) -> Self {
        let all = goals.len();
        let live = context.output.live_progress();
        Self { context, open: goals, all, seen: BTreeMap::new(), reached: Vec::new(), live }
    }

    fn take(&mut self, view: ModelView) -> Result<(), Failure> {
        let Some(at) = self.open.iter().position(|goal| goal.model == view.name) else { return Ok(()) };
        let goal = &self.open[at];
        match judge(goal, &view) {
            Verdict::Hopeless(why) => {
                return Err(Failure::Failed(format!("{} can't become {}: {why}", goal.model, goal.state)));
            }
            Verdict::Reached => {
                self.open.remove(at);
                self.seen.remove(&view.name);
                self.reached.push(view);
            }
            Verdict::Waiting => {
                let line = describe(goal, &view);
                let before = self.seen.insert(view.name.clone(), line.clone());
                let stage = |line: &str| line.split('[').next().unwrap_or_default().trim_end().to_owned();
                let changed = before.is_none_or(|before| stage(&before) != stage(&line));
                if changed && !self.context.output.err_is_terminal() {
                    self.context.output.note(&stage(&line));
                }
            }
        }
        if self.context.output.err_is_terminal() {
            self.draw();
        }
        Ok(())
    }

    fn draw(&mut self) {
        let mut lines: Vec<String> = self.seen.values().take(NAMED).cloned().collect();
        if self.all > 1 {
            lines.push(format!("{} of {} models are there", self.all - self.open.len(), self.all));
        }
        self.live.draw(&lines);
    }

    /// What is still missing when patience has ended.
    fn standing(&self, patience: Duration) -> String {
        let after = seconds(patience);
        let [first, rest @ ..] = self.open.as_slice() else { return format!("nothing was missing after {after}") };
        let others = match rest.len() {
            0 => String::new(),
            more => format!(", and {more} more are waited for"),
        };
        let stands = self.seen.get(&first.model).map_or("nothing was heard of it", String::as_str);
        let step = if stands.contains("ScheduleFailed") {
            format!("it is placed as soon as a replica can take it; `wharf explain {}` shows each", first.model)
        } else {
            "it goes on, so ask again or raise --timeout".to_owned()
        };
        format!("{} is not {} after {after}: {stands}{others}; {step}", first.model, first.state)
    }
}

/// One line about where a model is; a progress bar, if any, is in brackets at its end.
fn describe(goal: &Goal, view: &ModelView) -> String {
    let Some(last) = newest(view) else { return super::output::clean(&format!("{} {}", view.name, view.state)) };
    if let Some((_, version)) = goal.submission
        && last.version < version
    {
        return super::output::clean(&format!("{} version {version}: submitted", view.name));
    }
    let mut line = format!("{} version {}: ", view.name, last.version);
    let copy = last.copies.iter().find(|copy| !matches!(copy.state.as_str(), "Available" | "Unloaded"));
    match copy {
        Some(copy) if !copy.server.is_empty() => {
            line.push_str(&format!("{} on {}-{}", copy.state, copy.server, copy.replica));
        }
        _ => line.push_str(&last.state),
    }
    if let Some(serving) = view.serving.filter(|serving| copy.is_none() && *serving != last.version) {
        line.push_str(&format!(", taking over from version {serving}"));
    }
    let reasons = [copy.map(|copy| &copy.reason), Some(&last.reason), Some(&view.reason)];
    // A model on its way has where its copy is for a reason, which is said already.
    let said = line.split_once(": ").map_or_else(String::new, |(_, stands)| format!(" is {stands}"));
    if let Some(reason) = reasons.into_iter().flatten().find(|r| !r.is_empty() && !r.ends_with(&said)) {
        line.push_str(&format!(", {reason}"));
    }
    if let Some((done, Some(total))) = copy_progress(&last.copies) {
        line.push_str(&format!(" {}", bar(done, total)));
    }
    super::output::clean(&line)
}

/// `[=====>    ] 45 %`, with the bytes.
fn bar(done: u64, total: u64) -> String {
    const WIDTH: u64 = 20;
    let share = |of: u64| u64::try_from(u128::from(done.min(total)) * u128::from(of) / u128::from(total.max(1)));
    let filled = usize::try_from(share(WIDTH).unwrap_or(0)).unwrap_or(0);
    let rest = usize::try_from(WIDTH).unwrap_or(0).saturating_sub(filled);
    let bytes = crate::domain::memory::Bytes;
    format!("[{}{}] {} % of {}", "=".repeat(filled), " ".repeat(rest), share(100).unwrap_or(0), bytes(total))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::proto::wharf::VersionView;

    fn goal(state: &str, submission: Option<(u64, u32)>) -> Goal {
        Goal { model: "iris".into(), state: state.into(), submission }
    }

    fn view(state: &str, serving: Option<u32>, versions: &[(u32, &str)]) -> ModelView {
        ModelView {
            name: "iris".into(),
            uid: 5,
            state: state.into(),
            serving,
            wanted: 1,
            versions: versions
                .iter()
                .map(|(version, state)| VersionView { version: *version, state: (*state).into(), ..Default::default() })
                .collect(),
            ..Default::default()
        }
    }

    #[test]
    fn available_means_the_newest_version_has_taken_over() {
        let goal = goal("ModelAvailable", Some((5, 2)));
        let old_serves = view("Available", Some(1), &[(1, "Available"), (2, "Progressing")]);
        assert_eq!(judge(&goal, &old_serves), Verdict::Waiting);
        let taking_over = view("Available", Some(1), &[(1, "Available"), (2, "Available")]);
        assert_eq!(judge(&goal, &taking_over), Verdict::Waiting);
        let done = view("Available", Some(2), &[(1, "Terminating"), (2, "Available")]);
        assert_eq!(judge(&goal, &done), Verdict::Reached);
        let seldon = view("ModelAvailable", Some(2), &[(2, "ModelAvailable")]);
        assert_eq!(judge(&goal, &seldon), Verdict::Reached);
    }

    #[test]
    fn a_view_from_before_the_submission_says_nothing() {
        let goal = goal("ModelAvailable", Some((5, 2)));
        assert_eq!(judge(&goal, &view("Available", Some(1), &[(1, "Available")])), Verdict::Waiting);
        let deleted = ModelView { uid: 4, deleted: true, ..view("Terminated", None, &[(1, "Terminated")]) };
        assert_eq!(judge(&goal, &deleted), Verdict::Waiting);
    }

    #[test]
    fn what_can_not_come_any_more_is_said_at_once() {
        let hopeless = |verdict| match verdict {
            Verdict::Hopeless(why) => why,
            other => panic!("{other:?}"),
        };
        let want = goal("ModelAvailable", Some((5, 2)));
        let newer = view("Available", Some(3), &[(3, "Available")]);
        assert!(hopeless(judge(&want, &newer)).contains("superseded by version 3"));
        let mut failed = view("Available", Some(1), &[(1, "Available"), (2, "Failed")]);
        failed.versions[1].reason = "artifact failure: no such object".into();
        assert!(hopeless(judge(&want, &failed)).contains("no such object"));
        failed.versions[1].copies = vec![CopyView { state: "Pending".into(), ..Default::default() }];
        assert_eq!(judge(&want, &failed), Verdict::Waiting, "a copy is tried again elsewhere");
        let gone = ModelView { deleted: true, ..view("Terminating", None, &[(2, "Terminating")]) };
        assert!(hopeless(judge(&want, &gone)).contains("deleted"));
        let zero = ModelView { wanted: 0, ..view("ScaledDown", None, &[(2, "ScaledDown")]) };
        assert!(hopeless(judge(&want, &zero)).contains("raise replicas"));
        assert_eq!(judge(&want, &view("ScheduleFailed", None, &[(2, "ScheduleFailed")])), Verdict::Waiting);
    }

    #[test]
    fn other_states_are_compared_by_name() {
        let gone = ModelView { deleted: true, ..view("Terminated", None, &[(2, "Terminated")]) };
        assert_eq!(judge(&goal("ModelTerminated", None), &gone), Verdict::Reached);
        assert_eq!(judge(&goal("ScheduleFailed", None), &view("ScheduleFailed", None, &[])), Verdict::Reached);
        assert_eq!(judge(&goal("Failed", None), &view("Progressing", None, &[])), Verdict::Waiting);
    }

    #[test]
    fn a_bar_is_never_over_full() {
        assert_eq!(bar(0, 100), "[                    ] 0 % of 100 B");
        assert_eq!(bar(50, 100), "[==========          ] 50 % of 100 B");
        assert_eq!(bar(u64::MAX, u64::MAX), "[====================] 100 % of 16384 PiB");
        assert_eq!(bar(9, 0), "[                    ] 0 % of 0 B");
    }
}
