//! Follows a registry file.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    super::problem::{Problem, Problems},
    Registry, RegistryErrors,
};

/// The largest registry file that is read.
const LARGEST: u64 = 16 << 20;

/// A registry file that is followed by reading it at an interval. File systems don't tell of every edit (a
/// mounted volume tells of none), and times of change are too coarse to tell two edits apart, so the content
/// decides. An edit counts once two readings in a row agree on it: one caught half-way is nobody's wish.
#[derive(Debug)]
pub struct RegistryWatch {
    path: PathBuf,
    interval: Duration,
    /// What the last answer was about.
    told: Content,
    /// What the last reading found.
    read: Content,
    good: Option<Registry>,
    bad: bool,
}

type Content = Result<String, String>;

impl RegistryWatch {
    /// Reads the file, and will follow it from there, reading it every `interval`.
    ///
    /// The first registry, or its problems, is the answer beside the watch.
    pub fn start(path: &Path, interval: Duration) -> (Self, Result<Registry, RegistryErrors>) {
        let read = content(path);
        let mut watch = Self { path: path.to_owned(), interval, told: read.clone(), read, good: None, bad: false };
        let first = watch.tell();
        (watch, first)
    }

    /// Waits for the next edit: the registry that it made, or its problems, once. A bad edit changes nothing;
    /// taking it back is told with the registry as it was. Giving the wait up loses nothing.
    ///
    /// # Errors
    /// Every problem of the edit.
    pub async fn next(&mut self) -> Result<Registry, RegistryErrors> {
        loop {
            tokio::time::sleep(self.interval).await;
            let found = content(&self.path);
            let settled = found == self.read;
            self.read = found;
            if !settled || self.read == self.told {
                continue;
            }
            self.told = self.read.clone();
            let (before, was_bad) = (self.good.clone(), self.bad);
            match self.tell() {
                // Spaces and comments are no change.
                Ok(registry) if before.as_ref() == Some(&registry) && !was_bad => {}
                answer => return answer,
            }
        }
    }

    /// What was told last is not obeyed: the next edit is told even if it says the same.
    pub const fn refused(&mut self) {
        self.bad = true;
    }

    fn tell(&mut self) -> Result<Registry, RegistryErrors> {
        let name = self.path.display().to_string();
        let answer = match &self.told {
            Ok(text) => Registry::parse(text, &name),
            Err(problem) => Err(Problems(vec![Problem::new("", problem.clone()).at(name)])),
        };
        self.bad = answer.is_err();
        if let Ok(registry) = &answer {
            self.good = Some(registry.clone());
        }
        answer
    }
}

/// A small local file: read in place, without a thread.
fn content(path: &Path) -> Content {
    let mut text = String::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(LARGEST + 1).read_to_string(&mut text));
    match read {
        Ok(_) if text.len() as u64 > LARGEST => Err(format!("it has more than {} MiB", LARGEST >> 20)),
        Ok(_) => Ok(text),
        Err(error) => Err(format!("it can't be read: {error}")),
    }
}
