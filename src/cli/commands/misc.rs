//! Events, explanations, the inside of a scheduler, and completion scripts.

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::{next, refused, scheduler, unprintable};
use crate::{
    cli::{
        Context,
        args::{self, Args, Events, Explain, Plain},
        failure::Failure,
        json,
        output::{Tone, clean},
    },
    rpc::{
        proto::wharf::{Event, EventsRequest, ExplainRequest, InspectRequest},
        wire,
    },
};

/// `events`.
pub(super) async fn events(context: &Context, args: Events) -> Result<(), Failure> {
    let connection = scheduler(context, &args.scheduler).await?;
    let mut client = connection.wharf();
    let request = EventsRequest { model: args.model.unwrap_or_default(), follow: args.follow };
    let mut stream = connection.call(client.events(request)).await.map_err(refused)?.into_inner();
    let mut seen = false;
    while let Some(event) = next(context, &connection, &mut stream).await? {
        seen = true;
        let line = match args.output {
            Plain::Json => json::line("wharf.v1.Event", &event).map_err(unprintable)?,
            Plain::Table => event_line(context, &event),
        };
        context.output.data(&line);
    }
    if !seen && !args.follow {
        context.output.note("nothing has happened yet");
    }
    Ok(())
}

/// Time, subject, kind, message: one line, in columns that mostly align.
fn event_line(context: &Context, event: &Event) -> String {
    let time = event.time.and_then(wire::instant).map_or_else(String::new, rfc3339);
    let tone = match event.kind.as_str() {
        "Available" => Tone::Good,
        "Failed" | "ScheduleFailed" | "Lost" => Tone::Bad,
        _ => Tone::Plain,
    };
    let kind = format!("{:<14}", clean(&event.kind));
    let line = format!(
        "{}  {:<20}  {}  {}",
        context.output.paint(Tone::Dim, &time),
        clean(&event.subject),
        context.output.paint(tone, &kind),
        clean(&event.message)
    );
    line.trim_end().to_owned()
}

/// A moment in UTC, to the millisecond.
fn rfc3339(instant: crate::domain::time::Instant) -> String {
    let millis = i64::try_from(instant.as_micros() / 1000).unwrap_or(i64::MAX);
    jiff::Timestamp::from_millisecond(millis).map_or_else(|_| String::new(), |time| format!("{time:.3}"))
}

/// `explain`.
pub(super) async fn explain(context: &Context, args: Explain) -> Result<(), Failure> {
    let connection = scheduler(context, &args.scheduler).await?;
    let mut client = connection.wharf();
    let answer =
        connection.call(client.explain(ExplainRequest { model: args.model })).await.map_err(refused)?.into_inner();
    match args.output {
        Plain::Json => context.output.data(&json::indent(&answer.data).unwrap_or(answer.data)),
        Plain::Table => answer.text.lines().for_each(|line| context.output.data(&clean(line))),
    }
    Ok(())
}

/// `inspect`.
pub(super) async fn inspect(context: &Context, at: &args::Scheduler) -> Result<(), Failure> {
    let connection = scheduler(context, at).await?;
    let mut client = connection.wharf();
    let answer = connection.call(client.inspect(InspectRequest {})).await.map_err(refused)?.into_inner();
    context.output.data(&json::indent(&answer.data).unwrap_or(answer.data));
    Ok(())
}

/// `completions`.
pub(super) fn completions(context: &Context, shell: Shell) {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "wharf", &mut script);
    context.output.raw(&script);
}
