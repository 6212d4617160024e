//! The folders that downloads are written into.
//!
//! The rule of this module: what came of a download that broke is kept so that the next try can go on from it, for
//! a while, and up to as many bytes as one artifact may have; after that nothing of it is left.

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
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
        fs::create_dir_all(&self.notes)?;
        // What is private in a store is nobody else's on its way either.
        self.whole.parent().map_or(Ok(()), |staging| fs::set_permissions(staging, Permissions::from_mode(0o700)))
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
        disk::size(&self.whole)
    }
}

/// What broken downloads left: since when, and how many bytes, once somebody has measured it.
#[derive(Debug, Default)]
pub(super) struct Idle(BTreeMap<String, (Instant, Option<u64>)>);

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
                    idle.0.insert(key, (now, Some(bytes)));
                }
                _ => disk::remove(&entry.path())?,
            }
        }
        Ok(idle)
    }

    /// A download broke and left so many bytes.
    pub(super) fn add(&mut self, key: String, bytes: Option<u64>, now: Instant) {
        self.0.insert(key, (now, bytes));
    }

    /// Those that nobody has measured.
    pub(super) fn unmeasured(&self) -> Vec<String> {
        self.0.iter().filter(|(_, (_, bytes))| bytes.is_none()).map(|(key, _)| key.clone()).collect()
    }

    /// It has so many bytes, unless it is gone on with by now.
    pub(super) fn measured(&mut self, key: &str, bytes: u64) {
        if let Some((_, measured)) = self.0.get_mut(key) {
            *measured = Some(bytes);
        }
    }

    /// It is gone on with.
    pub(super) fn take(&mut self, key: &str) {
        self.0.remove(key);
    }

    /// Those whose time is over, and the oldest of those that are too much.
    pub(super) fn over(&mut self, now: Instant, keep: Duration, most: u64) -> Vec<String> {
        let mut by_age: Vec<(Instant, String, u64)> =
            self.0.iter().map(|(key, (since, bytes))| (*since, key.clone(), bytes.unwrap_or_default())).collect();
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

/// Removes what is over, as [`Idle::over`] has it; each folder whatever became of the one before.
///
/// # Errors
/// The first folder's that can't be removed.
pub(super) fn sweep(root: &Path, idle: &Mutex<Idle>, now: Instant, keep: Duration, most: u64) -> io::Result<()> {
    let lock = || idle.lock().unwrap_or_else(PoisonError::into_inner);
    let unmeasured = lock().unmeasured();
    for key in unmeasured {
        let bytes = Folders::of(root, &key).bytes();
        lock().measured(&key, bytes);
    }
    // Out of the way before anybody else may take it up; removing takes longer.
    let mut idle = lock();
    let over = idle.over(now, keep, most);
    let aside: Vec<_> = over.iter().map(|key| Folders::of(root, key).set_aside()).collect();
    drop(idle);
    let removed: Vec<_> = aside.into_iter().map(|aside| disk::remove(&aside?)).collect();
    removed.into_iter().collect()
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
        self.artifacts.idle().add(self.key.clone(), Some(bytes), now);
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
            // How much it is, is measured where files may be read.
            self.artifacts.idle().add(key, None, now);
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
        idle.add("a".to_owned(), Some(4), at(0));
        idle.add("b".to_owned(), Some(4), at(30));
        idle.add("c".to_owned(), Some(4), at(31));
        idle.add("d".to_owned(), Some(4), at(32));
        idle.take("d");
        assert_eq!(idle.over(at(59), HOUR, 12), Vec::<String>::new());
        assert_eq!(idle.over(at(60), HOUR, 12), ["a"]);
        assert_eq!(idle.over(at(60), HOUR, 7), ["b"]);
        assert_eq!(idle.over(at(99), HOUR, 7), ["c"]);
    }
    #[test]
    fn a_download_that_was_given_up_counts_and_one_that_stays_keeps_no_other() {
        const HOUR: Duration = Duration::from_secs(3600);
        let root = tempfile::tempdir().expect("dir");
        let at = |minute: u64| Instant::from_micros(0) + Duration::from_secs(60 * minute);
        let leave = |key: &str| {
            let folders = Folders::of(root.path(), key);
            folders.make().expect("made");
            fs::write(folders.files.join("m"), [0; 8]).expect("written");
        };
        let there = |key: &str| Folders::of(root.path(), key).whole.exists();
        for key in ["a", "b", "c", "d"] {
            leave(key);
        }
        let mode = fs::metadata(root.path().join("staging")).expect("a folder").permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let mut idle = Idle::default();
        idle.add("a".to_owned(), None, at(0));
        idle.add("b".to_owned(), None, at(1));
        let idle = Mutex::new(idle);
        sweep(root.path(), &idle, at(2), HOUR, 8).expect("swept");
        assert!(!there("a") && there("b"), "the older of two that are too much");
        // Nobody can move one that is no folder's name.
        idle.lock().expect("sound").add(format!("b{}", "x".repeat(300)), Some(1), at(0));
        idle.lock().expect("sound").add("c".to_owned(), Some(8), at(1));
        assert!(sweep(root.path(), &idle, at(90), HOUR, 8).is_err(), "it is told");
        assert!(!there("b") && !there("c"), "and the others are gone");
        assert!(there("d"), "one that is gone on with");
    }
}
