//! What the demo says while it runs, and the table that it ends with.
//!
//! The rule of this module: a promise that nothing was seen of is not kept.

use std::{sync::Arc, time::Duration};

use super::cast::Cast;
use crate::{
    cli::{
        output::{Output, Tone, clean, wrap},
        table::{Cell, Table},
    },
    domain::time::Instant,
    ports::{Clock, SystemClock},
};

/// What the demo shows, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Promise {
    Start,
    Load,
    Rest,
    Grpc,
    Packed,
    Reload,
    Rollout,
    Drain,
    Durable,
    Recovered,
    Restarted,
    Unload,
}

impl Promise {
    pub(super) const ALL: [Self; 12] = [
        Self::Start,
        Self::Load,
        Self::Rest,
        Self::Grpc,
        Self::Packed,
        Self::Reload,
        Self::Rollout,
        Self::Drain,
        Self::Durable,
        Self::Recovered,
        Self::Restarted,
        Self::Unload,
    ];

    /// In few words: a row of the table is to fit into 80 columns.
    pub(super) fn text(self, cast: &Cast) -> String {
        let text = match self {
            Self::Start if cast.has_processes() => "Wharf and what it starts",
            Self::Start => "everything in one process",
            Self::Load => "a loaded model answers",
            Self::Rest => return format!("REST answers as {}", cast.engine),
            Self::Grpc => return format!("gRPC answers as {}", cast.engine),
            Self::Packed => "more models than memory holds",
            Self::Reload => "evicted models come back",
            Self::Rollout => "rollout without a failure",
            Self::Drain => "drain without a failure",
            Self::Durable => "kill -9 loses nothing",
            Self::Recovered => "after kill -9 it answers again",
            Self::Restarted => "a killed server comes back",
            Self::Unload => "unload leaves nothing behind",
        };
        text.to_owned()
    }
}

/// Tells what happens, each line with the seconds since the demo began, and remembers what was shown.
#[derive(Debug)]
pub(super) struct Story {
    output: Output,
    clock: Arc<dyn Clock>,
    began: Instant,
    chapters: u32,
    promises: Vec<(Promise, String)>,
    shown: Vec<(Promise, String, bool)>,
}

impl Story {
    pub(super) fn new(output: &Output, cast: &Cast) -> Self {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let began = clock.now();
        let promises = cast.promises().into_iter().map(|promise| (promise, promise.text(cast))).collect();
        Self { output: output.clone(), clock, began, chapters: 0, promises, shown: Vec::new() }
    }

    pub(super) fn clock(&self) -> Arc<dyn Clock> {
        Arc::clone(&self.clock)
    }

    pub(super) fn now(&self) -> Instant {
        self.clock.now()
    }

    /// How long ago `then` was.
    pub(super) fn since(&self, then: Instant) -> Duration {
        self.clock.now().since(then)
    }

    pub(super) fn chapter(&mut self, title: &str) {
        self.chapters += 1;
        let title = format!("{}. {title}", self.chapters);
        self.output.data("");
        self.output.data(&self.output.paint(Tone::Bold, &title));
    }

    pub(super) fn tell(&self, line: &str) {
        self.line(Tone::Plain, line);
    }

    /// A line about something that is not as it should be.
    pub(super) fn complain(&self, line: &str) {
        self.line(Tone::Bad, line);
    }

    fn line(&self, tone: Tone, line: &str) {
        let at = format!("{:>7.2} s  ", self.since(self.began).as_secs_f64());
        let width = self.output.width().map_or(usize::MAX, |width| width.saturating_sub(at.len()));
        for (n, part) in wrap(&clean(line), width).iter().enumerate() {
            let lead = if n == 0 { self.output.paint(Tone::Dim, &at) } else { " ".repeat(at.len()) };
            self.output.data(&format!("{lead}{}", self.output.paint(tone, part)));
        }
    }

    /// What was seen of a promise.
    pub(super) fn show(&mut self, promise: Promise, seen: String, kept: bool) {
        self.shown.push((promise, seen, kept));
    }

    /// Prints the table, and returns how many promises were not kept.
    pub(super) fn end(&self) -> usize {
        let mut table = Table::new(&["promised", "seen", "result"]);
        let mut broken = 0;
        for (promise, text) in &self.promises {
            let shown = self.shown.iter().find(|(of, ..)| of == promise);
            let (seen, kept) =
                shown.map_or(("nothing: the demo did not get there", false), |(_, seen, kept)| (seen, *kept));
            broken += usize::from(!kept);
            let result = if kept { Cell::toned("ok", Tone::Good) } else { Cell::toned("NOT OK", Tone::Bad) };
            table.row([Cell::from(text.as_str()), Cell::from(seen), result]);
        }
        self.output.data("");
        table.print(&self.output);
        self.output.data("");
        self.output.data(&format!("{:.1} s in all", self.since(self.began).as_secs_f64()));
        broken
    }
}

/// A duration with about three figures.
pub(super) fn brief(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match seconds {
        0.0..0.01 => format!("{:.2} ms", seconds * 1e3),
        0.01..0.1 => format!("{:.1} ms", seconds * 1e3),
        0.1..1.0 => format!("{:.0} ms", seconds * 1e3),
        1.0..10.0 => format!("{seconds:.2} s"),
        _ => format!("{seconds:.1} s"),
    }
}

/// The middle one of some durations; none of none.
pub(super) fn median(mut durations: Vec<Duration>) -> Option<Duration> {
    durations.sort_unstable();
    durations.get(durations.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::{super::cast::Guests, *};

    #[test]
    fn a_promise_leaves_room_for_what_was_seen() {
        let guests = Guests { mlserver: "mlserver".into(), rclone: "rclone".into() };
        for (cast, promised) in [(Cast::builtin(), 11), (Cast::mlserver(guests), 12)] {
            let texts: Vec<String> = cast.promises().into_iter().map(|promise| promise.text(&cast)).collect();
            assert!(texts.len() == promised && texts.iter().all(|text| text.len() <= 30), "{texts:?}");
        }
    }

    #[test]
    fn durations_are_short() {
        let brief = |micros| super::brief(Duration::from_micros(micros));
        assert_eq!(
            [brief(0), brief(1234), brief(12_345), brief(123_456), brief(1_234_567), brief(12_345_678)],
            ["0.00 ms", "1.23 ms", "12.3 ms", "123 ms", "1.23 s", "12.3 s"]
        );
        assert_eq!(median(vec![]), None);
        assert_eq!(
            median(vec![Duration::from_secs(3), Duration::ZERO, Duration::from_secs(1)]),
            Some(Duration::from_secs(1))
        );
    }
}
