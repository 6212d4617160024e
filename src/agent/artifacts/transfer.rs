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
                        Some(pause) if trouble.cure != Cure::Nothing => tokio::time::sleep(pause).await,
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
    /// The first trouble ends the others. What time or a new beginning helps against was waited for already.
    pub(super) async fn fetch(
        &self,
        origin: &dyn Origin,
        files: &[Wanted],
        request: &FetchRequest,
        progress: &ProgressSink,
    ) -> Result<Vec<Arrived>, Trouble> {
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
    ) -> Result<Arrived, Trouble> {
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
    ) -> Result<Arrived, Trouble> {
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
            let (failure, cure) = (trouble.failure, trouble.cure);
            match (cure, self.patience.pause(tries)) {
                (Cure::Look, _) => return Err(Trouble { failure, cure }),
                (Cure::Nothing, _) | (Cure::Time | Cure::Anew, None) => return Err(failure.into()),
                (Cure::Anew, Some(_)) if part.bytes() > 0 => {
                    tally.take_back(part.bytes());
                    part.start_over().await?;
                }
                (Cure::Time | Cure::Anew, Some(pause)) => tokio::time::sleep(pause).await,
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
        // All that was announced is there, and there is no rest to ask for.
        if part.all(file) {
            return Ok(Pulled::Whole);
        }
        // Without a tag nothing would say that the rest is of the same content.
        let tag = part.tag().filter(|tag| strong(tag));
        let from = if tag.is_some() { part.bytes() } else { 0 };
        let Opened::Stream(mut answer) = origin.open(file, from, tag.as_deref()).await? else {
            return Ok(Pulled::Unchanged);
        };
        let shown = origin.shown(file);
        if answer.from > 0 && (tag.is_none() || answer.tag != tag) {
            tally.take_back(part.bytes());
            part.start_over().await?;
            match origin.open(file, 0, None).await? {
                Opened::Stream(anew) => answer = anew,
                Opened::Unchanged => return Ok(Pulled::Unchanged),
            }
        }
        if answer.from == 0 {
            // A new file, or one that is not any more what its beginning was taken from.
            tally.take_back(part.bytes());
            part.start_over().await?;
        } else if answer.from != part.bytes() {
            let message = format!("{shown} can't be gone on with: the store sent another part than was asked for");
            return Err(Trouble { failure: bad(message), cure: Cure::Nothing });
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
                Err(Trouble { failure: bad(message), cure: Cure::Time })
            }
            Some(whole) if part.bytes() > whole => {
                let message = format!("{shown} has {} bytes, and {whole} were announced", part.bytes());
                part.start_over().await?;
                Err(Trouble { failure: bad(message), cure: Cure::Nothing })
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

/// That an artifact has more bytes than it may.
pub(super) fn too_large(shown: &str, limits: FetchLimits) -> Failure {
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

/// What may help against trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cure {
    /// Nothing that the agent does.
    Nothing,
    /// Time.
    Time,
    /// The file once more from its beginning.
    Anew,
    /// Another look at what files there are.
    Look,
}

/// A failure, and what may help.
#[derive(Debug)]
pub(super) struct Trouble {
    pub(super) failure: Failure,
    pub(super) cure: Cure,
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        trouble.failure
    }
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self { failure, cure: Cure::Nothing }
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

/// Whether two contents with this tag have the same bytes. A weak one may stand for other bytes.
pub(super) fn strong(tag: &str) -> bool {
    !tag.starts_with("W/")
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

    /// A store that answers as it is told to.
    struct Told {
        answers: Mutex<Vec<Result<Answer, Trouble>>>,
        asked: Mutex<Vec<(u64, Option<String>)>>,
    }

    impl Origin for Told {
        fn open<'a>(
            &'a self,
            _: &'a Wanted,
            from: u64,
            tag: Option<&'a str>,
        ) -> BoxFuture<'a, Result<Opened, Trouble>> {
            self.asked.lock().expect("sound").push((from, tag.map(ToOwned::to_owned)));
            let answer = self.answers.lock().expect("sound").remove(0);
            Box::pin(async { answer.map(Opened::Stream) })
        }

        fn shown(&self, file: &Wanted) -> String {
            file.path.clone()
        }
    }

    /// Bytes from `from` on, of so many, and whether the connection breaks after them.
    fn part(from: u64, total: u64, tag: Option<&str>, bytes: &'static [u8], breaks: bool) -> Result<Answer, Trouble> {
        let broke = Trouble { failure: bad("broke"), cure: Cure::Time };
        let mut chunks = vec![Ok(Bytes::from_static(bytes))];
        if breaks {
            chunks.push(Err(broke));
        }
        let chunks = futures::stream::iter(chunks).boxed();
        Ok(Answer { from, total: Some(total), tag: tag.map(ToOwned::to_owned), chunks })
    }

    fn refused(cure: Cure) -> Result<Answer, Trouble> {
        Err(Trouble { failure: bad("refused"), cure })
    }

    /// What becomes of one file, what is on disk then, and what was asked: from which byte, with which tag.
    async fn fetched(
        folder: &Path,
        wanted: &Wanted,
        answers: Vec<Result<Answer, Trouble>>,
    ) -> (Result<Vec<Arrived>, Trouble>, Vec<u8>, Vec<(u64, Option<String>)>) {
        let (into, notes) = (folder.join("files"), folder.join("notes"));
        std::fs::create_dir_all(&into).expect("dir");
        std::fs::create_dir_all(&notes).expect("dir");
        let limits = FetchLimits { bytes: 100, files: 1 };
        let request = FetchRequest { uri: "s3://b/k".to_owned(), credentials: None, known: None, into, notes, limits };
        let patience = Patience { tries: 3, first: Duration::ZERO, most: Duration::ZERO };
        let transfers = Transfers::new(1, 0, Arc::new(Hand(AtomicU64::new(0)))).with_patience(patience);
        let origin = Told { answers: Mutex::new(answers), asked: Mutex::default() };
        let progress: ProgressSink = Arc::new(|_| {});
        let done = transfers.fetch(&origin, std::slice::from_ref(wanted), &request, &progress).await;
        let content = std::fs::read(request.into.join("m")).unwrap_or_default();
        (done, content, origin.asked.into_inner().expect("sound"))
    }

    fn wanted(bytes: Option<u64>, tag: Option<&str>) -> Wanted {
        let (path, at) = ("m".to_owned(), "https://h/m?token=hunter22".to_owned());
        Wanted { path, at, bytes, tag: tag.map(ToOwned::to_owned), sha256: None }
    }

    fn asked(all: &[(u64, Option<&str>)]) -> Vec<(u64, Option<String>)> {
        all.iter().map(|(from, tag)| (*from, tag.map(ToOwned::to_owned))).collect()
    }

    #[tokio::test]
    async fn two_versions_are_never_mixed() {
        for other in [Some("\"2\""), None, Some("W/\"1\"")] {
            let folder = tempfile::tempdir().expect("dir");
            // A server that sends a part of what is there now, whatever it was asked for.
            let answers = vec![
                part(0, 6, Some("\"1\""), b"aaa", true),
                part(3, 6, other, b"bbb", false),
                part(0, 6, other, b"bbbbbb", false),
            ];
            let (done, content, came) = fetched(folder.path(), &wanted(None, None), answers).await;
            assert!(done.is_ok(), "{other:?}: {done:?}");
            assert_eq!(content, b"bbbbbb", "{other:?}");
            assert_eq!(came, asked(&[(0, None), (3, Some("\"1\"")), (0, None)]), "{other:?}");
        }
        let folder = tempfile::tempdir().expect("dir");
        let same = vec![part(0, 6, Some("\"1\""), b"aaa", true), part(3, 6, Some("\"1\""), b"aaa", false)];
        assert_eq!(fetched(folder.path(), &wanted(None, None), same).await.1, b"aaaaaa");
    }

    #[tokio::test]
    async fn what_has_no_strong_tag_is_asked_for_from_its_beginning() {
        for tag in [None, Some("W/\"1\"")] {
            let folder = tempfile::tempdir().expect("dir");
            let answers = vec![part(0, 6, tag, b"aaa", true), part(0, 6, tag, b"bbbbbb", false)];
            let (done, content, came) = fetched(folder.path(), &wanted(None, None), answers).await;
            assert!(done.is_ok(), "{done:?}");
            assert_eq!((content.as_slice(), came), (&b"bbbbbb"[..], asked(&[(0, None), (0, None)])));
        }
    }

    #[tokio::test]
    async fn a_part_that_the_store_has_not_is_begun_anew() {
        let folder = tempfile::tempdir().expect("dir");
        let one = Some("\"1\"");
        let answers = vec![part(0, 9, one, b"aaa", true), refused(Cure::Anew), part(0, 2, Some("\"2\""), b"bb", false)];
        let (done, content, came) = fetched(folder.path(), &wanted(None, None), answers).await;
        assert!(done.is_ok(), "{done:?}");
        assert_eq!((content.as_slice(), came), (&b"bb"[..], asked(&[(0, None), (3, one), (0, None)])));
        // And not for ever.
        let folder = tempfile::tempdir().expect("dir");
        let never = (0..3).map(|_| refused(Cure::Anew)).collect();
        assert!(fetched(folder.path(), &wanted(None, None), never).await.0.is_err());
    }

    #[tokio::test]
    async fn a_part_with_all_that_was_announced_is_whole() {
        let folder = tempfile::tempdir().expect("dir");
        let one = Some("\"1\"");
        // It broke before anybody knew that nothing was missing.
        let answers = vec![part(0, 3, one, b"aaa", true)];
        let (done, content, came) = fetched(folder.path(), &wanted(Some(3), one), answers).await;
        assert!(done.is_ok(), "{done:?}");
        assert_eq!((content.as_slice(), came.len()), (&b"aaa"[..], 1));
    }

    #[tokio::test]
    async fn what_changed_since_it_was_listed_is_not_asked_for_again() {
        let folder = tempfile::tempdir().expect("dir");
        let (done, _, came) = fetched(folder.path(), &wanted(Some(3), Some("\"1\"")), vec![refused(Cure::Look)]).await;
        assert_eq!(done.expect_err("changed").cure, Cure::Look);
        assert_eq!(came.len(), 1);
    }

    #[tokio::test]
    async fn what_is_noted_of_a_part_has_no_address_in_it_and_is_nobody_else_s() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().expect("dir");
        let answers = (0..3).map(|_| part(0, 6, None, b"aaa", true)).collect();
        assert!(fetched(folder.path(), &wanted(None, None), answers).await.0.is_err());
        let notes: Vec<_> = std::fs::read_dir(folder.path().join("notes")).expect("notes").flatten().collect();
        assert_eq!(notes.len(), 1);
        assert!(!std::fs::read_to_string(notes[0].path()).expect("a note").contains("hunter22"));
        assert_eq!(notes[0].metadata().expect("a file").permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn patience_doubles_its_pauses_and_ends() {
        let patience = Patience { tries: 4, first: Duration::from_secs(1), most: Duration::from_secs(3) };
        let pauses: Vec<_> = (1..=5).map(|tries| patience.pause(tries).map(|pause| pause.as_secs())).collect();
        assert_eq!(pauses, [Some(1), Some(2), Some(3), None, None]);
    }
}
