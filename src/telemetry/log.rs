//! Logging: one line per event, to standard error or wherever it is told.

use std::{
    fmt,
    panic::{PanicHookInfo, set_hook, take_hook},
    sync::Arc,
};

use thiserror::Error;
use tracing::{Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    EnvFilter,
    fmt::{MakeWriter, format::Writer, time::FormatTime},
    layer::SubscriberExt as _,
};

use crate::domain::time::Instant;

/// How events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Time, level, message and fields, for people.
    Text {
        /// Whether the reader shows colours.
        colours: bool,
    },
    /// A JSON object on a line, every field of the event a field of it.
    Json,
}

/// What is logged, and how.
#[derive(Clone, Debug)]
pub struct LogOptions {
    /// A level (`info`), or several by module (`info,wharf::agent=debug`). A level alone is Wharf's own; of the
    /// libraries below it only warnings and errors are logged then.
    pub filter: String,
    /// How.
    pub format: Format,
}

/// Tells the present moment; in the process, its one clock.
pub type Now = Arc<dyn Fn() -> Instant + Send + Sync>;

/// Logging that could not be set up.
#[derive(Debug, Error)]
pub enum LogError {
    /// The filter is none.
    #[error("the log level {filter:?} is not valid ({problem}); write a level such as \"info\", or several by module")]
    Filter {
        /// What came.
        filter: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Something else in this process logs already.
    #[error("logging is set up already in this process")]
    AlreadySet,
}

type Hook = Box<dyn Fn(&PanicHookInfo<'_>) + Send + Sync>;

/// Keeps panics in the log, each as one event, for as long as it lives.
#[must_use = "panics are logged only while this is kept"]
pub struct LogGuard {
    before: Option<Hook>,
}

impl fmt::Debug for LogGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogGuard").finish_non_exhaustive()
    }
}

/// Sets the process's logging up, to standard error. Once per process: a test that looks at what is logged
/// uses [`subscriber`] with `tracing::subscriber::with_default` instead.
///
/// # Errors
/// When the filter is none, or logging is set up already.
pub fn init(options: &LogOptions, now: Now) -> Result<LogGuard, LogError> {
    let subscriber = subscriber(options, now, std::io::stderr)?;
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LogError::AlreadySet)?;
    let before = take_hook();
    set_hook(Box::new(log_panic));
    Ok(LogGuard { before: Some(before) })
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        // The hook can't be changed by a thread that is panicking; then it stays, and the process ends.
        if let Some(before) = self.before.take()
            && !std::thread::panicking()
        {
            set_hook(before);
        }
    }
}

fn log_panic(panic: &PanicHookInfo<'_>) {
    let message = panic.payload_as_str().unwrap_or("a value that is no text");
    let location = panic.location().map(ToString::to_string).unwrap_or_default();
    tracing::error!(location, thread = std::thread::current().name().unwrap_or(""), "panic: {message}");
}

/// What [`init`] sets up, writing to `writer`.
///
/// # Errors
/// When the filter is none.
pub fn subscriber<W>(options: &LogOptions, now: Now, writer: W) -> Result<impl Subscriber + Send + Sync, LogError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = filter(&options.filter)?;
    let layer = tracing_subscriber::fmt::layer().with_timer(Utc(now)).with_writer(writer);
    let layer: Box<dyn tracing_subscriber::Layer<_> + Send + Sync> = match options.format {
        Format::Text { colours } => Box::new(layer.with_ansi(colours).with_target(false)),
        Format::Json => Box::new(layer.json().flatten_event(true).with_current_span(true).with_span_list(false)),
    };
    Ok(tracing_subscriber::registry().with(filter).with(layer))
}

fn filter(text: &str) -> Result<EnvFilter, LogError> {
    let directives = match text.parse::<LevelFilter>() {
        Ok(level) => format!("{},wharf={level}", level.min(LevelFilter::WARN)),
        Err(_) => text.to_owned(),
    };
    EnvFilter::builder()
        .parse(directives)
        .map_err(|error| LogError::Filter { filter: text.to_owned(), problem: error.to_string() })
}

/// RFC 3339 in UTC, to the microsecond.
struct Utc(Now);

impl FormatTime for Utc {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let micros = i64::try_from((self.0)().as_micros()).unwrap_or(i64::MAX);
        match jiff::Timestamp::from_microsecond(micros) {
            Ok(timestamp) => write!(writer, "{timestamp:.6}"),
            Err(_) => write!(writer, "{micros}us"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(filter: &str, format: Format, log: impl FnOnce()) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let now: Now = Arc::new(|| Instant::from_micros(1_700_000_000_000_042));
        let options = LogOptions { filter: filter.to_owned(), format };
        let subscriber = subscriber(&options, now, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, log);
        String::from_utf8(std::mem::take(&mut sink.0.lock().unwrap())).unwrap()
    }

    #[test]
    fn json_lines_hold_the_fields_of_the_event() {
        let text = logged("info", Format::Json, || {
            tracing::info!(model = "iris", version = 3, "placed");
            tracing::debug!("not at this level");
        });
        let line: serde_json::Value = serde_json::from_str(text.trim()).expect("one line of JSON");
        assert_eq!(line["timestamp"], "2023-11-14T22:13:20.000042Z");
        assert_eq!((&line["level"], &line["message"]), (&"INFO".into(), &"placed".into()));
        assert_eq!((&line["model"], &line["version"]), (&"iris".into(), &3.into()));
    }

    #[test]
    fn text_is_a_plain_line() {
        let text = logged("info", Format::Text { colours: false }, || tracing::warn!(model = "iris", "full"));
        assert_eq!(text, "2023-11-14T22:13:20.000042Z  WARN full model=\"iris\"\n");
    }

    #[test]
    fn a_level_alone_is_wharfs_own() {
        let text = logged("debug", Format::Text { colours: false }, || {
            tracing::debug!("ours");
            tracing::info!(target: "h2::proto", "theirs");
            tracing::warn!(target: "h2::proto", "grave");
        });
        assert!(text.contains("ours") && text.contains("grave") && !text.contains("theirs"), "{text}");
        let text = logged("off", Format::Json, || tracing::error!("anything"));
        assert_eq!(text, "");
        let text = logged("warn,h2=debug", Format::Json, || tracing::debug!(target: "h2::proto", "theirs"));
        assert!(text.contains("theirs"), "{text}");
    }

    #[test]
    fn a_filter_that_is_none_is_named() {
        let now: Now = Arc::new(Instant::default);
        let options = LogOptions { filter: "wharf=loud".to_owned(), format: Format::Json };
        let error = subscriber(&options, now, std::io::stderr).err().expect("no filter");
        assert!(error.to_string().contains("wharf=loud"), "{error}");
    }
}
