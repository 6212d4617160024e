//! Artifacts from object stores: S3 and what speaks like it, Google's, Azure's. A key is one file, and what lies
//! below a prefix is a folder.

mod place;

use std::{collections::BTreeMap, sync::Arc};

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, future::BoxFuture};
use object_store::{Error, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt as _, path::Path as Location};
use sha2::{Digest as _, Sha256};

use self::place::{Place, SCHEMES};
use super::{
    refusal::{Asked, Refusal, deepest, said},
    transfer::{Answer, Arrived, Opened, Origin, Transfers, Trouble, Wanted, strong, within},
    uri::{bad, redacted},
};
use crate::{
    agent::disk,
    domain::{copy::Failure, secret::Secret},
    ports::{ArtifactSource, FetchRequest, Fetched, ProgressSink},
};

/// Fetches from object stores.
#[derive(Debug)]
pub struct ObjectSource {
    environment: BTreeMap<String, Secret>,
    transfers: Arc<Transfers>,
}

impl ObjectSource {
    /// A source that uses what `environment` says of stores where a model names no secret.
    ///
    /// # Errors
    /// When TLS can't be set up.
    pub fn new(
        environment: impl IntoIterator<Item = (String, String)>,
        transfers: Arc<Transfers>,
    ) -> Result<Self, Failure> {
        // The stores' clients take the process's choice of cryptography.
        super::web::client()?;
        let ours = |name: &str| ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|prefix| name.starts_with(prefix));
        let environment = environment.into_iter().filter(|(name, _)| ours(name));
        Ok(Self { environment: environment.map(|(name, value)| (name, Secret::new(value))).collect(), transfers })
    }

    async fn get(&self, request: FetchRequest, progress: ProgressSink) -> Result<Fetched, Failure> {
        let place = Place::parse(&request.uri)?;
        let opened = place::open(&place, request.credentials.as_ref(), &self.environment)?;
        let asked = Asked { shown: redacted(&request.uri), with: opened.with, at: opened.at };
        let origin = Bucket { store: opened.store, asked };
        self.all(&place, &origin, &request, &progress).await
    }

    async fn all(
        &self,
        place: &Place,
        origin: &Bucket,
        request: &FetchRequest,
        progress: &ProgressSink,
    ) -> Result<Fetched, Failure> {
        // What changed since it was listed is listed anew.
        self.transfers.patience.insist(|| self.copy(place, origin, request, progress)).await
    }

    async fn copy(
        &self,
        place: &Place,
        origin: &Bucket,
        request: &FetchRequest,
        progress: &ProgressSink,
    ) -> Result<Fetched, Trouble> {
        let found = origin.find(place, request.limits.files).await?;
        let tag = tag(&found);
        if request.known.as_ref() == Some(&tag) {
            return Ok(Fetched::Unchanged);
        }
        within(request, found.len(), found.iter().filter_map(|file| file.bytes).sum())?;
        let arrived = self.transfers.fetch(origin, &found, request, progress).await?;
        Ok(Fetched::Files { tag: Some(tag), files: arrived.into_iter().filter_map(Arrived::file).collect() })
    }
}

impl ArtifactSource for ObjectSource {
    fn schemes(&self) -> &[&str] {
        &SCHEMES
    }

    fn fetch(&self, request: FetchRequest, progress: ProgressSink) -> BoxFuture<'_, Result<Fetched, Failure>> {
        self.get(request, progress).boxed()
    }
}

/// The store's own tag of one file, or one that changes with any of several.
fn tag(files: &[Wanted]) -> String {
    if let [Wanted { tag: Some(tag), .. }] = files {
        return tag.clone();
    }
    let mut digest = Sha256::new();
    for file in files {
        let (bytes, tag) = (file.bytes.unwrap_or_default(), file.tag.as_deref().unwrap_or_default());
        digest.update(format!("{}\0{bytes}\0{tag}\n", file.path));
    }
    disk::hex(&digest.finalize())
}

struct Bucket {
    store: Arc<dyn ObjectStore>,
    asked: Asked,
}

impl Bucket {
    /// The files that `place` means.
    async fn find(&self, place: &Place, most: usize) -> Result<Vec<Wanted>, Trouble> {
        let location = Location::parse(&place.key).map_err(|error| {
            let why = deepest(&error).unwrap_or_else(|| error.to_string());
            bad(format!("{} has a path that can't be a key: {why}", self.asked.shown))
        })?;
        let mut missing = None;
        if !place.folder {
            match self.store.head(&location).await {
                Ok(meta) => return Ok(vec![wanted(&meta, name_of(&place.key).to_owned())]),
                // A store tells only those who may list that there is no such key.
                Err(error @ (Error::NotFound { .. } | Error::PermissionDenied { .. })) => missing = Some(error),
                Err(error) => return Err(self.refused(&error)),
            }
        }
        let prefix = (!place.key.is_empty()).then_some(&location);
        let mut listed = self.store.list(prefix);
        let mut files: Vec<ObjectMeta> = Vec::new();
        loop {
            let meta = match (listed.try_next().await, &missing) {
                (Ok(Some(meta)), _) => meta,
                (Ok(None), _) => break,
                // Who may read a key and not list is told what became of the key.
                (Err(Error::PermissionDenied { .. }), Some(missing @ Error::NotFound { .. })) => {
                    return Err(self.refused(missing));
                }
                (Err(error), _) => return Err(self.refused(&error)),
            };
            // One more than the limit is enough to know.
            if files.len() > most {
                return Err(bad(format!("{} has more files than the limit of {most}", self.asked.shown)).into());
            }
            files.push(meta);
        }
        drop(listed);
        let mut wanted: Vec<Wanted> =
            files.iter().filter_map(|meta| Some(wanted(meta, below(&place.key, meta.location.as_ref())?))).collect();
        wanted.sort_by(|a, b| a.path.cmp(&b.path));
        forget_markers(&mut wanted);
        if wanted.is_empty() {
            return Err(self.asked.refused(&Refusal::Missing, "that nothing has that key, or is below it"));
        }
        Ok(wanted)
    }

    async fn ask(&self, file: &Wanted, from: u64, tag: Option<&str>) -> Result<Opened, Trouble> {
        let location = Location::parse(&file.at).map_err(|error| bad(format!("{}: {error}", file.path)))?;
        let if_match = tag.or(file.tag.as_deref()).filter(|tag| strong(tag)).map(ToOwned::to_owned);
        let whole = GetOptions { if_match, ..GetOptions::default() };
        let rest = GetOptions { range: (from > 0).then_some(GetRange::Offset(from)), ..whole.clone() };
        let got = match self.store.get_opts(&location, rest).await {
            // Some stores that speak like S3 send a part and call it the whole. What can't be told apart is not used.
            Err(error) if from > 0 && error.to_string().contains("non-partial response") => {
                self.store.get_opts(&location, whole).await
            }
            got => got,
        };
        let got = got.map_err(|error| self.refused(&error))?;
        let (from, total) = (got.range.start, Some(got.meta.size));
        // Of a part only what the store says of that part counts.
        let tag = got.meta.e_tag.clone().or_else(|| file.tag.clone().filter(|_| from == 0));
        let asked = Asked { shown: self.shown(file), ..self.asked.clone() };
        let chunks = got.into_stream().map(move |chunk| chunk.map_err(|error| asked.broke_off(&error))).boxed();
        Ok(Opened::Stream(Answer { from, total, tag, chunks }))
    }

    fn refused(&self, error: &Error) -> Trouble {
        self.asked.failed(error)
    }
}

impl Origin for Bucket {
    fn open<'a>(&'a self, file: &'a Wanted, from: u64, tag: Option<&'a str>) -> BoxFuture<'a, Result<Opened, Trouble>> {
        self.ask(file, from, tag).boxed()
    }

    fn shown(&self, file: &Wanted) -> String {
        format!("{} of {}", file.path, self.asked.shown)
    }
}

fn wanted(meta: &ObjectMeta, path: String) -> Wanted {
    // Where a store has no tags, size and time have to do; nothing is gone on with then.
    Wanted { path, at: meta.location.to_string(), bytes: Some(meta.size), tag: meta.e_tag.clone(), sha256: None }
}

fn name_of(key: &str) -> &str {
    key.rsplit('/').next().unwrap_or(key)
}

/// `location` as seen from `folder`; nothing for the folder itself.
fn below(folder: &str, location: &str) -> Option<String> {
    let rest = if folder.is_empty() { location } else { location.strip_prefix(folder)?.strip_prefix('/')? };
    (!rest.is_empty()).then(|| rest.to_owned())
}

/// Consoles make empty keys for folders; a folder that has files needs none.
fn forget_markers(files: &mut Vec<Wanted>) {
    let folders: std::collections::BTreeSet<String> =
        files.iter().flat_map(|file| file.path.match_indices('/').map(|(at, _)| file.path[..at].to_owned())).collect();
    files.retain(|file| file.bytes != Some(0) || !folders.contains(&file.path));
}

impl Asked {
    /// What the client of an object store met.
    fn failed(&self, error: &Error) -> Trouble {
        let text = error.to_string();
        let answered = text.split_once("status code: ").map(|(_, rest)| rest.split_once(": ").unwrap_or((rest, "")));
        let (status, body) = answered.unwrap_or_default();
        let code = status.get(..3).and_then(|code| code.parse().ok()).unwrap_or(0);
        let said = said(body).map_or_else(|| status.to_owned(), |said| format!("{status}, {said}"));
        let no_bucket = ["NoSuchBucket", "ContainerNotFound", "specified bucket does not exist"];
        match error {
            _ if text.contains("169.254.169.254") || text.contains("metadata.google.internal") => self.refused(
                &Refusal::Forbidden,
                "nothing, as neither the environment nor the machine has credentials for it",
            ),
            _ if no_bucket.iter().any(|words| said.contains(words)) => self.refused(&Refusal::NoBucket, &said),
            Error::NotFound { .. } => {
                self.refused(&Refusal::Missing, if said.is_empty() { "404 Not Found" } else { &said })
            }
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => self.refused(&Refusal::Forbidden, &said),
            Error::Precondition { .. } => self.refused(&Refusal::Changed, &said),
            _ if code > 0 => self.refused(&Refusal::of(code), &said),
            _ => {
                let why = deepest(error).unwrap_or_else(|| "the connection failed".to_owned());
                let refusal = if why.contains("timed out") { Refusal::Slow } else { Refusal::Unreachable };
                self.refused(&refusal, &why)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, bytes: u64) -> Wanted {
        Wanted {
            path: path.to_owned(),
            at: path.to_owned(),
            bytes: Some(bytes),
            tag: Some(format!("\"{bytes}\"")),
            sha256: None,
        }
    }

    #[test]
    fn a_folder_s_tag_changes_with_any_of_its_files() {
        let one = tag(&[file("a", 1)]);
        assert_eq!(one, "\"1\"");
        let two = [file("a", 1), file("b", 2)];
        assert_eq!(tag(&two), tag(&two));
        assert_ne!(tag(&two), tag(&[file("a", 1), file("b", 3)]));
    }

    #[test]
    fn markers_of_folders_are_no_files() {
        let mut files = vec![file("1", 0), file("1/m", 3), file("empty", 0)];
        forget_markers(&mut files);
        assert_eq!(files.iter().map(|file| file.path.as_str()).collect::<Vec<_>>(), ["1/m", "empty"]);
        assert_eq!(below("a/b", "a/b/c/d").as_deref(), Some("c/d"));
        assert_eq!(below("a/b", "a/bc"), None);
        assert_eq!(below("", "a"), Some("a".to_owned()));
    }
    #[tokio::test]
    async fn what_changes_after_it_was_listed_is_listed_anew() {
        use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
        let store = Arc::new(object_store::memory::InMemory::new());
        let put = |content: &'static [u8]| {
            let key = Location::from("m");
            futures::executor::block_on(store.put(&key, content.into())).expect("put");
        };
        put(b"older");
        let folder = tempfile::tempdir().expect("dir");
        let (into, notes) = (folder.path().join("files"), folder.path().join("notes"));
        std::fs::create_dir(&into).expect("dir");
        std::fs::create_dir(&notes).expect("dir");
        let limits = crate::ports::FetchLimits { bytes: 100, files: 1 };
        let request = FetchRequest { uri: "s3://b/m".to_owned(), credentials: None, known: None, into, notes, limits };
        let transfers = Arc::new(Transfers::new(1, 0, Arc::new(crate::ports::SystemClock::new())));
        let source = ObjectSource::new([], transfers).expect("a source");
        let asked = Asked { shown: "s3://b/m".to_owned(), with: super::super::refusal::With::Nothing, at: None };
        let origin = Bucket { store: Arc::clone(&store) as _, asked };
        // Told of nothing yet, when the file is about to be asked for.
        let looks = AtomicU32::new(0);
        let fetched = {
            let store = Arc::clone(&store);
            let progress: ProgressSink = Arc::new(move |now| {
                if now.done == 0 && looks.fetch_add(1, SeqCst) == 0 {
                    let key = Location::from("m");
                    futures::executor::block_on(store.put(&key, b"newer!".as_slice().into())).expect("put");
                }
            });
            let place = Place::parse(&request.uri).expect("a place");
            source.all(&place, &origin, &request, &progress).await
        };
        assert!(matches!(fetched, Ok(Fetched::Files { .. })), "{fetched:?}");
        assert_eq!(std::fs::read(request.into.join("m")).expect("there"), b"newer!");
    }
}
