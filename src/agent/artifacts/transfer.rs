//! Files on their way from a store to the disk.
//!
//! The rules of this module: bytes that came are fetched once, whatever breaks between them; what lies on disk
//! from before is digested again before it is built upon; a file counts as fetched once its size and its digest
//! are what the store says; trouble that may pass is waited out for a few tries, and no longer.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{
    StreamExt as _,
    future::BoxFuture,
    stream::{BoxStream, FuturesOrdered},
};
use tokio::sync::Semaphore;

use super::{part::Part, uri::bad};
use crate::{
    domain::{
        copy::{Failure, Progress},
        time::Instant,
    },
    ports::{Clock, FetchLimits, FetchRequest, FetchedFile, ProgressSink},
};

/// How trouble that may pass is waited out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Tries in a row that bring nothing.
    pub tries: u32,
    /// The pause after the first of them; it doubles from there.
    pub first: Duration,
    /// The longest pause.
    pub most: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { tries: 5, first: Duration::from_millis(200), most: Duration::from_secs(5) }
    }
}

impl Patience {
    /// The pause after so many tries in vain; nothing when that was the last.
    fn pause(self, tries: u32) -> Option<Duration> {
        let doubled = self.first.saturating_mul(1_u32.checked_shl(tries.saturating_sub(1)).unwrap_or(u32::MAX));
        (tries < self.tries).then(|| doubled.min(self.most))
    }

    /// Does `work` until it succeeds, fails for good, or was tried often enough.
    pub(super) async fn insist<T, F>(self, mut work: impl FnMut() -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Trouble>>,
    {
        let mut tries = 0;
        loop {
            match work().await {
                Ok(done) => return Ok(done),
                Err(trouble) => {
                    tries += 1;
                    match self.pause(tries) {
                        Some(pause) if trouble.passing => tokio::time::sleep(pause).await,
                        _ => return Err(trouble.failure),
                    }
                }
            }
        }
    }
}

/// What the downloads of one agent share.
pub struct Transfers {
    files: Semaphore,
    parallel: usize,
    pace: Pace,
    pub(super) patience: Patience,
}

impl fmt::Debug for Transfers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transfers")
            .field("parallel", &self.parallel)
            .field("rate", &self.pace.rate)
            .finish_non_exhaustive()
    }
}

impl Transfers {
    /// At most `parallel` files at a time, and together `rate` bytes a second; 0 sets no bound.
    #[must_use]
    pub fn new(parallel: usize, rate: u64, clock: Arc<dyn Clock>) -> Self {
        let parallel = parallel.max(1);
        let pace = Pace { rate, clock, free: Mutex::new(Instant::from_micros(0)) };
        Self { files: Semaphore::new(parallel), parallel, pace, patience: Patience::default() }
    }

    /// The same, with another patience.
    #[must_use]
    pub fn with_patience(self, patience: Patience) -> Self {
        Self { patience, ..self }
    }

    /// Files at a time.
    pub(super) const fn parallel(&self) -> usize {
        self.parallel
    }

    /// Bytes a second; 0 when there is no bound.
    pub(super) fn rate(&self) -> u64 {
        self.pace.rate
    }

    /// Fetches all of `files` into the folder of `request`.
    ///
    /// # Errors
    /// The first failure ends the others.
    pub(super) async fn fetch(
        &self,
        origin: &dyn Origin,
        files: &[Wanted],
        request: &FetchRequest,
        progress: &ProgressSink,
    ) -> Result<Vec<Arrived>, Failure> {
        let total = files.iter().try_fold(0_u64, |sum, file| Some(sum.saturating_add(file.bytes?)));
        let tally = Tally { done: AtomicU64::new(0), total, limits: request.limits, progress: Arc::clone(progress) };
        within(request, files.len(), total.unwrap_or_default())?;
        let (mut left, mut pulls, mut arrived) = (files.iter(), FuturesOrdered::new(), Vec::with_capacity(files.len()));
        loop {
            while pulls.len() < self.parallel
                && let Some(file) = left.next()
            {
                pulls.push_back(self.permitted(origin, file, request, &tally));
            }
            match pulls.next().await {
                Some(one) => arrived.push(one?),
                None => return Ok(arrived),
            }
        }
    }

    async fn permitted(
        &self,
        origin: &dyn Origin,
        file: &Wanted,
        request: &FetchRequest,
        tally: &Tally,
    ) -> Result<Arrived, Failure> {
        // The semaphore is never closed.
        let _permit = self.files.acquire().await;
        self.file(origin, file, request, tally).await
    }

    async fn file(
        &self,
        origin: &dyn Origin,
        file: &Wanted,
        request: &FetchRequest,
        tally: &Tally,
    ) -> Result<Arrived, Failure> {
        let mut part = Part::open(request, file).await?;
        tally.add(part.bytes());
        if let Some(sha256) = part.whole(file) {
            return Ok(Arrived::of(file, part.bytes(), sha256, file.tag.clone()));
        }
        let mut tries = 0;
        loop {
            let before = part.bytes();
            let trouble = match self.pull(origin, file, &mut part, tally).await {
                Ok(Pulled::Whole) => match part.close(file, &origin.shown(file)).await? {
                    Some(sha256) => return Ok(Arrived::of(file, part.bytes(), sha256, part.tag())),
                    // What was there from before did not fit what came: all of it once more.
                    None => {
                        tally.take_back(part.bytes());
                        part.start_over().await?;
                        continue;
                    }
                },
                Ok(Pulled::Unchanged) => return Ok(Arrived::Unchanged),
                Err(trouble) => trouble,
            };
            part.note().await?;
            tries = if part.bytes() > before { 1 } else { tries + 1 };
            match self.patience.pause(tries) {
                Some(pause) if trouble.passing => tokio::time::sleep(pause).await,
                _ => return Err(trouble.failure),
            }
        }
    }

    /// One request, to the end of what it brings.
    async fn pull(
        &self,
        origin: &dyn Origin,
        file: &Wanted,
        part: &mut Part,
        tally: &Tally,
    ) -> Result<Pulled, Trouble> {
        let Opened::Stream(mut answer) = origin.open(file, part.bytes(), part.tag().as_deref()).await? else {
            return Ok(Pulled::Unchanged);
        };
        let shown = origin.shown(file);
        if answer.from == 0 {
            // A new file, or one that is not any more what its beginning was taken from.
            tally.take_back(part.bytes());
            part.start_over().await?;
        } else if answer.from != part.bytes() {
            let message = format!("{shown} can't be gone on with: the store sent another part than was asked for");
            return Err(Trouble { failure: bad(message), passing: false });
        }
        part.is_now(answer.tag.take());
        let whole = answer.total.or(file.bytes);
        if let Some(whole) = whole {
            tally.fits(&shown, whole)?;
        }
        while let Some(chunk) = answer.chunks.next().await {
            let chunk = chunk?;
            self.pace.pass(chunk.len() as u64).await;
            if let Err(failure) = tally.count(&shown, chunk.len() as u64) {
                part.start_over().await?;
                return Err(failure.into());
            }
            part.write(&chunk).await?;
        }
        match whole {
            Some(whole) if part.bytes() < whole => {
                let message = format!("{shown} broke off after {} of {whole} bytes", part.bytes());
                Err(Trouble { failure: bad(message), passing: true })
            }
            Some(whole) if part.bytes() > whole => {
                let message = format!("{shown} has {} bytes, and {whole} were announced", part.bytes());
                part.start_over().await?;
                Err(Trouble { failure: bad(message), passing: false })
            }
            _ => Ok(Pulled::Whole),
        }
    }
}

/// Whether an artifact of so many files and bytes may be fetched.
pub(super) fn within(request: &FetchRequest, files: usize, bytes: u64) -> Result<(), Failure> {
    let shown = super::uri::redacted(&request.uri);
    if files > request.limits.files {
        return Err(bad(format!("{shown} has {files} files, more than the limit of {}", request.limits.files)));
    }
    if bytes > request.limits.bytes {
        return Err(too_large(&shown, request.limits));
    }
    Ok(())
}

fn too_large(shown: &str, limits: FetchLimits) -> Failure {
    bad(format!(
        "{shown} is larger than the limit of {} bytes; raise agent.max_artifact if that is right",
        limits.bytes
    ))
}

enum Pulled {
    Whole,
    Unchanged,
}

/// A file in a store.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    /// Its place in the artifact.
    pub(super) path: String,
    /// Its place in the store, in the store's own words.
    pub(super) at: String,
    /// Its size, when the store says.
    pub(super) bytes: Option<u64>,
    /// Tells this content from a later one.
    pub(super) tag: Option<String>,
    /// Its digest, when the store says.
    pub(super) sha256: Option<String>,
}

/// What became of a file.
#[derive(Debug)]
pub(super) enum Arrived {
    /// It is what is known already.
    Unchanged,
    /// It is in the folder, and this is its tag.
    File(FetchedFile, Option<String>),
}

impl Arrived {
    fn of(file: &Wanted, bytes: u64, sha256: String, tag: Option<String>) -> Self {
        Self::File(FetchedFile { path: file.path.clone(), bytes, sha256 }, tag)
    }

    /// The file, of an origin that never says that nothing changed.
    pub(super) fn file(self) -> Option<FetchedFile> {
        match self {
            Self::Unchanged => None,
            Self::File(file, _) => Some(file),
        }
    }
}

/// Where files come from.
pub(super) trait Origin: Send + Sync {
    /// Asks for `file` from byte `from` on, which is past the beginning only when its content had `tag` then. The
    /// store may answer with all of it.
    fn open<'a>(&'a self, file: &'a Wanted, from: u64, tag: Option<&'a str>) -> BoxFuture<'a, Result<Opened, Trouble>>;

    /// The file, for people.
    fn shown(&self, file: &Wanted) -> String;
}

/// A store's answer.
pub(super) enum Opened {
    /// The file is what is known already.
    Unchanged,
    /// Its bytes.
    Stream(Answer),
}

/// The bytes of a file from some byte on.
pub(super) struct Answer {
    /// The first of them.
    pub(super) from: u64,
    /// The size of the whole file.
    pub(super) total: Option<u64>,
    /// The tag of what is sent.
    pub(super) tag: Option<String>,
    pub(super) chunks: BoxStream<'static, Result<Bytes, Trouble>>,
}

/// A failure, and whether it may pass by itself.
#[derive(Debug)]
pub(super) struct Trouble {
    pub(super) failure: Failure,
    pub(super) passing: bool,
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self { failure, passing: false }
    }
}

/// Bytes of one artifact.
struct Tally {
    done: AtomicU64,
    total: Option<u64>,
    limits: FetchLimits,
    progress: ProgressSink,
}

impl Tally {
    fn add(&self, bytes: u64) -> u64 {
        let done = self.done.fetch_add(bytes, Relaxed).saturating_add(bytes);
        (self.progress)(Progress { done, total: self.total });
        done
    }

    fn take_back(&self, bytes: u64) {
        self.done.fetch_sub(bytes, Relaxed);
    }

    fn fits(&self, shown: &str, bytes: u64) -> Result<(), Failure> {
        if bytes > self.limits.bytes { Err(too_large(shown, self.limits)) } else { Ok(()) }
    }

    fn count(&self, shown: &str, bytes: u64) -> Result<(), Failure> {
        if self.add(bytes) > self.limits.bytes { Err(too_large(shown, self.limits)) } else { Ok(()) }
    }
}

/// Keeps all downloads together to a number of bytes a second.
struct Pace {
    rate: u64,
    clock: Arc<dyn Clock>,
    /// When what was let through so far has used up its time.
    free: Mutex<Instant>,
}

impl Pace {
    async fn pass(&self, bytes: u64) {
        if self.rate > 0 {
            tokio::time::sleep(self.reserve(bytes)).await;
        }
    }

    fn reserve(&self, bytes: u64) -> Duration {
        let now = self.clock.now();
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let at = (*free).max(now);
        *free = at + Duration::from_micros(bytes.saturating_mul(1_000_000) / self.rate);
        at.since(now)
    }
}

/// The file of `path` below `folder`, with its parents.
pub(super) fn below(folder: &Path, path: &str) -> Result<PathBuf, Failure> {
    if path.split('/').any(|part| super::uri::file_name(part).is_none()) {
        return Err(bad(format!("the artifact has a file {path:?}, which can't be a name on disk")));
    }
    Ok(folder.join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clock that a test sets.
    #[derive(Debug)]
    struct Hand(AtomicU64);

    impl Clock for Hand {
        fn now(&self) -> Instant {
            Instant::from_micros(self.0.load(Relaxed))
        }
    }

    #[test]
    fn all_downloads_together_keep_to_the_rate() {
        let clock = Arc::new(Hand(AtomicU64::new(5_000_000)));
        let pace = Pace { rate: 1000, clock: Arc::clone(&clock) as _, free: Mutex::new(Instant::from_micros(0)) };
        let second = Duration::from_secs(1);
        assert_eq!(pace.reserve(1000), Duration::ZERO);
        assert_eq!(pace.reserve(500), second);
        assert_eq!(pace.reserve(500), second * 3 / 2);
        clock.0.store(6_500_000, Relaxed);
        assert_eq!(pace.reserve(1), second / 2);
        // What was not used is not saved up.
        clock.0.store(60_000_000, Relaxed);
        assert_eq!(pace.reserve(1000), Duration::ZERO);
        assert_eq!(pace.reserve(1000), second);
    }

    #[test]
    fn patience_doubles_its_pauses_and_ends() {
        let patience = Patience { tries: 4, first: Duration::from_secs(1), most: Duration::from_secs(3) };
        let pauses: Vec<_> = (1..=5).map(|tries| patience.pause(tries).map(|pause| pause.as_secs())).collect();
        assert_eq!(pauses, [Some(1), Some(2), Some(3), None, None]);
    }
}
