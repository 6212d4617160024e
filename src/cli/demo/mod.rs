//! `wharf demo`: the life of a model, played for real on this machine.
//!
//! The rule of this module: what is told was measured in this run, and the demo succeeds only if all that it
//! promises came true. It leaves no process and no file behind.

mod ask;
mod cast;
mod child;
mod cluster;
mod endings;
mod processes;
mod samples;
mod scenes;
mod story;
mod traffic;

use std::path::Path;

use tokio::signal::unix::{SignalKind, signal};

pub use self::cast::Guests;
use self::{cast::Cast, child::Wharf, samples::Samples, scenes::Demo, story::Story};
use super::{Output, failure::Failure};

/// Plays the demo with the sample models in `models`: on the built-in runtime, or on what the guests bring.
///
/// # Errors
/// When a promise was not kept, the demo can't run here, or it was interrupted.
pub(super) async fn run(models: &Path, guests: Option<Guests>, output: &Output) -> anyhow::Result<()> {
    let mut terminated = signal(SignalKind::terminate())?;
    let cast = guests.map_or_else(Cast::builtin, Cast::mlserver);
    let samples = Samples::open(models)?;
    let wharf = Wharf::new(&cast.files(samples.folder()), |folder| cast.settings(folder))?;
    let mut demo = Demo::new(Story::new(output, &cast), cast, samples, wharf);
    let played = tokio::select! {
        played = demo.play() => Some(played),
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            None
        }
        _ = terminated.recv() => None,
    };
    let killed = demo.end().await;
    let Some(played) = played else { return Err(Failure::Interrupted.into()) };
    if let Err(error) = &played {
        demo.story.complain(&format!("{error:#}"));
    }
    let broken = demo.story.end();
    if broken > 0 {
        output.note("");
        output.note("the last lines of wharf up:");
        demo.wharf.log().iter().for_each(|line| output.note(line));
        let all = demo.cast.promises().len();
        return Err(Failure::Failed(format!("{broken} of {all} promises were not kept")).into());
    }
    killed
}
