//! The folders that downloads are written into.
//!
//! The rule of this module: what came of a download that broke is kept so that the next try can go on from it, for
//! a while, and up to as many bytes as one artifact may have; after that nothing of it is left.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::Artifacts;
use crate::{agent::disk, domain::time::Instant};

/// Where the files of one download are, and what is noted of them.
#[derive(Clone, Debug)]
pub(super) struct Folders {
    whole: PathBuf,
    pub(super) files: PathBuf,
    pub(super) notes: PathBuf,
}

impl Folders {
    pub(super) fn of(root: &Path, key: &str) -> Self {
        let whole = root.join("staging").join(key);
        Self { files: whole.join("files"), notes: whole.join("notes"), whole }
    }

    pub(super) fn make(&self) -> io::Result<()> {
        fs::create_dir_all(&self.files)?;
        fs::create_dir_all(&self.notes)
    }

    pub(super) fn remove(&self) -> io::Result<()> {
        disk::remove(&self.whole)
    }

    /// Takes it out of the way, to be removed.
    pub(super) fn set_aside(&self) -> io::Result<PathBuf> {
        let aside = self.whole.with_extension("over");
        disk::remove(&aside)?;
        match fs::rename(&self.whole, &aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(aside),
        }
    }

    /// Bytes in it.
    pub(super) fn bytes(&self) -> u64 {
        size(&self.whole)
    }
}

fn size(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => size(&entry.path()),
        Ok(_) => entry.metadata().map_or(0, |meta| meta.len()),
        Err(_) => 0,
    });
    sizes.fold(0, u64::saturating_add)
}

/// What broken downloads left.
#[derive(Debug, Default)]
pub(super) struct Idle(BTreeMap<String, (Instant, u64)>);

impl Idle {
    /// What was left by the process before this one; everything else there is removed.
    pub(super) fn open(root: &Path, now: Instant) -> io::Result<Self> {
        let mut idle = Self::default();
        let entries = match fs::read_dir(root.join("staging")) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(idle),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            match entry.file_name().into_string() {
                Ok(key) if entry.file_type()?.is_dir() && key.len() == 64 => {
                    let bytes = Folders::of(root, &key).bytes();
                    idle.0.insert(key, (now, bytes));
                }
                _ => disk::remove(&entry.path())?,
            }
        }
        Ok(idle)
    }

    /// A download broke and left so many bytes.
    pub(super) fn add(&mut self, key: String, bytes: u64, now: Instant) {
        self.0.insert(key, (now, bytes));
    }

    /// It is gone on with.
    pub(super) fn take(&mut self, key: &str) {
        self.0.remove(key);
    }

    /// Those whose time is over, and the oldest of those that are too much.
    pub(super) fn over(&mut self, now: Instant, keep: Duration, most: u64) -> Vec<String> {
        let mut by_age: Vec<(Instant, String, u64)> =
            self.0.iter().map(|(key, (since, bytes))| (*since, key.clone(), *bytes)).collect();
        by_age.sort();
        let mut bytes = by_age.iter().fold(0_u64, |sum, (_, _, bytes)| sum.saturating_add(*bytes));
        let mut over = Vec::new();
        for (since, key, size) in by_age {
            if now.since(since) >= keep || bytes > most {
                bytes = bytes.saturating_sub(size);
                self.0.remove(&key);
                over.push(key);
            }
        }
        over
    }
}

/// Says in the end that a download left its folders behind, also when it was given up.
pub(super) struct Left {
    artifacts: Arc<Artifacts>,
    key: String,
}

impl Left {
    pub(super) fn new(artifacts: &Arc<Artifacts>, key: &str) -> Self {
        Self { artifacts: Arc::clone(artifacts), key: key.to_owned() }
    }

    pub(super) fn keep(self, bytes: u64) {
        let now = self.artifacts.clock.now();
        self.artifacts.idle().add(self.key.clone(), bytes, now);
        self.nothing();
    }

    pub(super) fn nothing(mut self) {
        self.key.clear();
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        if !self.key.is_empty() {
            let (key, now) = (std::mem::take(&mut self.key), self.artifacts.clock.now());
            // How much it is, nobody has measured; it counts once it is taken up or its time is over.
            self.artifacts.idle().add(key, 0, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_goes_by_age_and_by_size() {
        const HOUR: Duration = Duration::from_secs(3600);
        let at = |minute: u64| Instant::from_micros(0) + Duration::from_secs(60 * minute);
        let mut idle = Idle::default();
        idle.add("a".to_owned(), 4, at(0));
        idle.add("b".to_owned(), 4, at(30));
        idle.add("c".to_owned(), 4, at(31));
        idle.add("d".to_owned(), 4, at(32));
        idle.take("d");
        assert_eq!(idle.over(at(59), HOUR, 12), Vec::<String>::new());
        assert_eq!(idle.over(at(60), HOUR, 12), ["a"]);
        assert_eq!(idle.over(at(60), HOUR, 7), ["b"]);
        assert_eq!(idle.over(at(99), HOUR, 7), ["c"]);
    }
}
