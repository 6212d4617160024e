//! Everything that the product logs, with the virtual time, to compare runs and to explain a failing seed.

use std::{
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
};

use tracing_subscriber::{
    EnvFilter,
    fmt::{MakeWriter, format::Writer, time::FormatTime},
};

/// Lines, oldest first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<u8>>>);

struct VirtualTime;

impl FormatTime for VirtualTime {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let at = if turmoil::in_simulation() { turmoil::sim_elapsed() } else { None };
        write!(writer, "{:10.3}", at.unwrap_or_default().as_secs_f64())
    }
}

impl Log {
    /// Keeps what this thread logs until the guard is dropped.
    pub(crate) fn keep(&self, filter: &str) -> tracing::subscriber::DefaultGuard {
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::new(filter))
            .with_ansi(false)
            .with_timer(VirtualTime)
            .with_writer(self.clone())
            .finish();
        tracing::subscriber::set_default(subscriber)
    }

    /// One more line.
    pub(crate) fn line(&self, text: &str) {
        let at = if turmoil::in_simulation() { turmoil::sim_elapsed() } else { None };
        let line = format!("{:10.3} --- {text}\n", at.unwrap_or_default().as_secs_f64());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(line.as_bytes());
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
