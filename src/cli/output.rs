//! Everything that the command line writes.
//!
//! The rule of this module: standard output carries data alone and, when it is no terminal, plain text that
//! scripts can rely on. Whatever comes from elsewhere is stripped of control characters, so that no model's
//! name or reason can play with a terminal.

use std::{
    fmt,
    io::{self, IsTerminal as _, Write},
    process::ExitCode,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
};

use anstyle::{AnsiColor, Style};

use super::{args::Color, failure::Failure};

/// Where output goes, and what is at the other end.
pub struct Streams {
    /// Standard output.
    pub out: Box<dyn Write + Send>,
    /// Standard error.
    pub err: Box<dyn Write + Send>,
    /// Whether a person reads standard output.
    pub out_is_terminal: bool,
    /// Whether a person reads standard error.
    pub err_is_terminal: bool,
    /// The terminal's columns and rows, if there is one.
    pub size: Option<(u16, u16)>,
}

impl Streams {
    /// This process's own.
    #[must_use]
    pub fn of_process() -> Self {
        Self {
            out: Box::new(io::stdout()),
            err: Box::new(io::stderr()),
            out_is_terminal: io::stdout().is_terminal(),
            err_is_terminal: io::stderr().is_terminal(),
            size: terminal_size::terminal_size().map(|(width, height)| (width.0, height.0)),
        }
    }
}

impl fmt::Debug for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streams")
            .field("out_is_terminal", &self.out_is_terminal)
            .field("err_is_terminal", &self.err_is_terminal)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

/// How a piece of text is meant, which decides its colour. The text alone must say enough.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Tone {
    #[default]
    Plain,
    Good,
    Busy,
    Bad,
    Dim,
    Bold,
}

impl Tone {
    const fn style(self) -> Style {
        match self {
            Self::Plain => Style::new(),
            Self::Good => AnsiColor::Green.on_default(),
            Self::Busy => AnsiColor::Yellow.on_default(),
            Self::Bad => AnsiColor::Red.on_default(),
            Self::Dim => Style::new().dimmed(),
            Self::Bold => Style::new().bold(),
        }
    }
}

/// Writes to both streams. Clones write to the same.
#[derive(Clone, Debug)]
pub struct Output(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    streams: Mutex<Streams>,
    out_is_terminal: bool,
    err_is_terminal: bool,
    size: (usize, usize),
    /// Whether colour is allowed where a person reads.
    color_allowed: bool,
    color_out: AtomicBool,
    color_err: AtomicBool,
    verbose: AtomicU8,
    closed: AtomicBool,
}

impl Output {
    /// Writes to `streams`. `NO_COLOR` and `TERM=dumb` forbid colour unless `--color always` says otherwise.
    #[must_use]
    pub fn new(streams: Streams, variable: &dyn Fn(&str) -> Option<String>) -> Self {
        let forbidden =
            variable("NO_COLOR").is_some_and(|v| !v.is_empty()) || variable("TERM").is_some_and(|term| term == "dumb");
        let columns = variable("COLUMNS").and_then(|columns| columns.parse().ok());
        let (width, height) = streams.size.unwrap_or((80, 24));
        let size = (columns.unwrap_or_else(|| usize::from(width)).max(20), usize::from(height).max(4));
        let (out_is_terminal, err_is_terminal) = (streams.out_is_terminal, streams.err_is_terminal);
        Self(Arc::new(Shared {
            streams: Mutex::new(streams),
            out_is_terminal,
            err_is_terminal,
            size,
            color_allowed: !forbidden,
            color_out: AtomicBool::new(!forbidden && out_is_terminal),
            color_err: AtomicBool::new(!forbidden && err_is_terminal),
            verbose: AtomicU8::new(0),
            closed: AtomicBool::new(false),
        }))
    }

    /// Takes what the arguments say.
    pub(crate) fn configure(&self, color: Color, verbose: u8) {
        let on = |terminal: bool| match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => terminal && self.0.color_allowed,
        };
        self.0.color_out.store(on(self.0.out_is_terminal), Ordering::Relaxed);
        self.0.color_err.store(on(self.0.err_is_terminal), Ordering::Relaxed);
        self.0.verbose.store(verbose, Ordering::Relaxed);
    }

    /// Whether a person reads standard output.
    #[must_use]
    pub fn out_is_terminal(&self) -> bool {
        self.0.out_is_terminal
    }

    /// Whether a person reads standard error.
    #[must_use]
    pub fn err_is_terminal(&self) -> bool {
        self.0.err_is_terminal
    }

    /// Whether whoever read standard output has gone: nobody is left to write for.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::Relaxed)
    }

    /// How wide a line of data may be; absent when nobody minds.
    pub(crate) fn width(&self) -> Option<usize> {
        self.0.out_is_terminal.then_some(self.0.size.0)
    }

    /// `text` in the colour of `tone`, if standard output bears colour.
    pub(crate) fn paint(&self, tone: Tone, text: &str) -> String {
        paint(self.0.color_out.load(Ordering::Relaxed), tone, text)
    }

    /// One line of data. The caller has cleaned what came from elsewhere.
    pub fn data(&self, line: &str) {
        let mut streams = self.lock();
        let written = writeln!(streams.out, "{line}").and_then(|()| streams.out.flush());
        if written.is_err() {
            self.0.closed.store(true, Ordering::Relaxed);
        }
    }

    /// Data as it is, without a line's end of its own.
    pub(crate) fn raw(&self, data: &[u8]) {
        let mut streams = self.lock();
        let written = streams.out.write_all(data).and_then(|()| streams.out.flush());
        if written.is_err() {
            self.0.closed.store(true, Ordering::Relaxed);
        }
    }

    /// One line for a person, beside the data.
    pub fn note(&self, line: &str) {
        self.error_line(&self.fit("", &clean(line)));
    }

    /// A line that is told only with `-v`.
    pub fn detail(&self, line: &str) {
        if self.0.verbose.load(Ordering::Relaxed) > 0 {
            let color = self.0.color_err.load(Ordering::Relaxed);
            self.error_line(&paint(color, Tone::Dim, &clean(line)));
        }
    }

    /// Something that went not as wished, and did not stop the command.
    pub fn warning(&self, line: &str) {
        let color = self.0.color_err.load(Ordering::Relaxed);
        let text = self.fit("warning: ", &clean(line));
        self.error_line(&format!("{} {text}", paint(color, Tone::Busy, "warning:")));
    }

    /// Why the command ended.
    pub(crate) fn failure(&self, failure: &Failure) {
        let color = self.0.color_err.load(Ordering::Relaxed);
        let lead = paint(color, Tone::Bad, "error:");
        self.error_line(&format!("{lead} {}", self.fit("error: ", &clean(&failure.to_string()))));
    }

    /// What the arguments' parser has to say: help and version are data, all else is wrong usage.
    pub(crate) fn usage(&self, error: &clap::Error) -> ExitCode {
        let rendered = error.render();
        let asked_for = !error.use_stderr();
        let color = if asked_for { &self.0.color_out } else { &self.0.color_err };
        let text = if color.load(Ordering::Relaxed) { rendered.ansi().to_string() } else { rendered.to_string() };
        if asked_for {
            self.raw(text.as_bytes());
            return ExitCode::SUCCESS;
        }
        self.error_line(text.trim_end());
        ExitCode::from(Failure::Usage(String::new()).code())
    }

    /// A view on standard output that is drawn over itself.
    pub(crate) fn live_data(&self) -> Live {
        Live { output: self.clone(), drawn: 0, on_err: false }
    }

    /// A view on standard error that is drawn over itself.
    pub(crate) fn live_progress(&self) -> Live {
        Live { output: self.clone(), drawn: 0, on_err: true }
    }

    /// `text` broken between words, when a person reads it behind `lead` on a terminal.
    fn fit(&self, lead: &str, text: &str) -> String {
        if !self.0.err_is_terminal {
            return text.to_owned();
        }
        // Counted with the lead, which is printed apart.
        let whole = wrap(&format!("{lead}{text}"), self.0.size.0).join("\n");
        whole.strip_prefix(lead).unwrap_or(text).to_owned()
    }

    fn error_line(&self, line: &str) {
        // Nobody is left to tell when standard error itself is gone.
        drop(writeln!(self.lock().err, "{line}"));
    }

    fn lock(&self) -> MutexGuard<'_, Streams> {
        self.0.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lines on a terminal that are replaced by the next ones. Every frame ends on a line of its own, so an
/// interrupt leaves the terminal as it should be.
#[derive(Debug)]
pub(crate) struct Live {
    output: Output,
    drawn: usize,
    on_err: bool,
}

impl Live {
    /// Draws `lines` over what was drawn before, cut to the terminal.
    pub(crate) fn draw(&mut self, lines: &[String]) {
        let (width, height) = self.output.0.size;
        let fits = height - 1;
        let mut frame = String::new();
        if self.drawn > 0 {
            frame.push_str(&format!("\x1b[{}A\r\x1b[J", self.drawn));
        }
        let shown = if lines.len() > fits { fits - 1 } else { lines.len() };
        for line in &lines[..shown] {
            frame.push_str(&clip_styled(line, width));
            frame.push('\n');
        }
        self.drawn = shown;
        if shown < lines.len() {
            frame.push_str(&format!("... and {} more\n", lines.len() - shown));
            self.drawn += 1;
        }
        let mut streams = self.output.lock();
        let stream = if self.on_err { &mut streams.err } else { &mut streams.out };
        let written = stream.write_all(frame.as_bytes()).and_then(|()| stream.flush());
        if written.is_err() && !self.on_err {
            self.output.0.closed.store(true, Ordering::Relaxed);
        }
    }

    /// Removes what was drawn.
    pub(crate) fn clear(&mut self) {
        if self.drawn > 0 {
            self.draw(&[]);
        }
    }
}

/// `text` without characters that a terminal would act on.
pub(crate) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// `text` cut to `width` characters, with a mark where something is missing.
pub(crate) fn clip(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width.saturating_sub(3)).collect();
    format!("{}...", kept.trim_end())
}

/// `text` in lines of at most `width` characters, broken between words where it can be.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().expect("there is always a line");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

/// As [`clip`], counting no colour codes; a cut line ends its colour.
fn clip_styled(text: &str, width: usize) -> String {
    let mut kept = String::new();
    let mut seen = 0;
    let mut escape = false;
    let mut styled = false;
    for c in text.chars() {
        match (escape, c) {
            (false, '\x1b') => (escape, styled) = (true, true),
            (true, 'm') => escape = false,
            (true, _) => {}
            (false, _) => {
                seen += 1;
                if seen > width {
                    if styled {
                        kept.push_str("\x1b[0m");
                    }
                    return kept;
                }
            }
        }
        kept.push(c);
    }
    kept
}

/// `1 copy`, `2 copies`.
pub(crate) fn counted(count: impl Into<u64>, one: &str, more: &str) -> String {
    let count = count.into();
    format!("{count} {}", if count == 1 { one } else { more })
}

fn paint(color: bool, tone: Tone, text: &str) -> String {
    if !color || tone == Tone::Plain || text.is_empty() {
        return text.to_owned();
    }
    let style = tone.style();
    format!("{style}{text}{style:#}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_from_elsewhere_reaches_the_terminal_as_a_command() {
        assert_eq!(clean("a\x1b[2Jb\r\nc\u{9b}d"), "a [2Jb  c d");
    }

    #[test]
    fn words_are_kept_whole_and_none_is_lost() {
        assert_eq!(wrap("one two  three four", 9), ["one two ", "three", "four"]);
        assert_eq!(wrap("a-word-longer-than-a-line b", 9), ["a-word-longer-than-a-line", "b"]);
        assert_eq!(wrap("", 9), [""]);
    }

    #[test]
    fn cutting_counts_characters_and_ends_the_colour() {
        assert_eq!(clip("éééééééé", 8), "éééééééé");
        assert_eq!(clip("abcdefghij", 8), "abcde...");
        assert_eq!(clip_styled("\x1b[31mabcdef\x1b[0m", 3), "\x1b[31mabc\x1b[0m");
        assert_eq!(clip_styled("\x1b[31mabc\x1b[0m", 3), "\x1b[31mabc\x1b[0m");
    }
}
