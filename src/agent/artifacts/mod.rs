//! Artifacts: fetched once, kept on disk by content, put together into the folder that an inference server
//! loads.
//!
//! The rules of this module: a file is visible under its digest only once it is whole, checked and durable;
//! whoever asks for an artifact that is being fetched shares that fetch; one that a copy uses is never
//! removed, and of the others the one unused for longest goes first. What broke is gone on with, and no message
//! has credentials in it.

mod http;
mod hub;
mod local;
mod object;
mod part;
mod rclone;
mod refusal;
mod secrets;
mod shelf;
mod staging;
mod transfer;
mod uri;
mod web;

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared, WeakShared},
};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

pub use http::HttpSource;
pub use hub::HubSource;
pub use local::LocalSource;
pub use object::ObjectSource;
pub use rclone::{RcloneOptions, RcloneSource};
pub use secrets::{SECRET_PREFIX, Secrets};
use shelf::{Kept, Manifest, Shelf};
use staging::{Folders, Idle, Left};
pub use transfer::{Patience, Transfers};
pub(crate) use uri::redacted;
use uri::{Through, Uri, bad};

use super::{
    disk::{self, DiskError},
    metrics::Metrics,
    options::{Blocking, Options, RcloneUse},
    runtimes::{LARGEST_CONFIGURATION, Listing, Runtime, Wanted},
};
use crate::{
    domain::{
        copy::{Failure, FailureClass, Progress},
        memory::Bytes,
        secret::{Credentials, Secret},
        spec::{ModelSpec, Storage},
    },
    ports::{ArtifactSource, Clock, FetchLimits, FetchRequest, Fetched, FetchedFile, ProgressSink},
};

/// The cache of artifacts.
pub(crate) struct Artifacts {
    root: PathBuf,
    sources: Vec<Arc<dyn ArtifactSource>>,
    limits: FetchLimits,
    most_bytes: u64,
    keep_downloads: Duration,
    secrets: Secrets,
    rclone: RcloneUse,
    blocking: Blocking,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
    shelf: Arc<Mutex<Shelf>>,
    flights: Mutex<HashMap<String, Flight>>,
    idle: Arc<Mutex<Idle>>,
    /// Held while the shelves on disk change, so that no blob is removed that another artifact just took.
    writing: Arc<tokio::sync::Mutex<()>>,
}

type Landing = Shared<BoxFuture<'static, Result<Arc<Manifest>, Failure>>>;

/// A fetch that is going on. It ends when nobody waits for it any more.
struct Flight {
    landing: WeakShared<BoxFuture<'static, Result<Arc<Manifest>, Failure>>>,
    progress: watch::Receiver<Progress>,
}

/// An artifact on disk. It stays there for as long as this lives.
pub(crate) struct Artifact {
    manifest: Arc<Manifest>,
    _use: Use,
}

impl Artifact {
    /// What it is kept under.
    pub(crate) fn key(&self) -> &str {
        &self.manifest.key
    }

    /// Bytes of all its files.
    pub(crate) fn bytes(&self) -> Bytes {
        Bytes(self.manifest.bytes())
    }

    /// The digest of what it is, wherever it came from: of its files' paths and digests.
    pub(crate) fn digest(&self) -> String {
        let mut files: Vec<_> = self.manifest.files.iter().map(|file| (&file.path, &file.sha256)).collect();
        files.sort_unstable();
        let mut digest = Sha256::new();
        for (path, sha256) in files {
            digest.update((path.len() as u64).to_be_bytes());
            digest.update(path.as_bytes());
            digest.update(sha256.as_bytes());
        }
        disk::hex(&digest.finalize())
    }
}

impl fmt::Debug for Artifact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Artifact({})", self.manifest.uri)
    }
}

/// Keeps an artifact, or the place for one, from being removed.
struct Use {
    artifacts: Arc<Artifacts>,
    key: String,
}

impl Drop for Use {
    fn drop(&mut self) {
        let now = self.artifacts.clock.now();
        self.artifacts.shelf().put_back(&self.key, now);
    }
}

impl fmt::Debug for Artifacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Artifacts").field("root", &self.root).finish_non_exhaustive()
    }
}

impl Artifacts {
    pub(crate) fn new(
        options: &Options,
        sources: Vec<Arc<dyn ArtifactSource>>,
        clock: Arc<dyn Clock>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            root: options.data_dir.join("artifacts"),
            sources,
            limits: options.artifact,
            most_bytes: options.artifact_cache.0,
            keep_downloads: options.keep_downloads,
            secrets: options.secrets.clone(),
            rclone: options.rclone,
            blocking: options.blocking,
            clock,
            metrics,
            shelf: Arc::default(),
            flights: Mutex::default(),
            idle: Arc::default(),
            writing: Arc::default(),
        }
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what is on disk from before, and clears what can't be gone on with.
    pub(crate) async fn open(&self) -> Result<(), DiskError> {
        let (root, now) = (self.root.clone(), self.clock.now());
        let opened = disk::run(self.blocking, move || {
            let shelf = shelf::open(&root)?;
            let idle = Idle::open(&root, now).map_err(|error| DiskError {
                path: root.join("staging").display().to_string(),
                problem: error.to_string(),
            })?;
            Ok((shelf, idle))
        });
        let (shelf, idle) = opened.await?;
        (*self.shelf(), *self.idle()) = (shelf, idle);
        self.sweep().await;
        Ok(())
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes what broken downloads left, for as long as the agent lives.
    pub(crate) async fn keep_sweeping(self: Arc<Self>) {
        const LONGEST: Duration = Duration::from_secs(60);
        let pause = (self.keep_downloads / 4).clamp(Duration::from_secs(1), LONGEST);
        loop {
            tokio::time::sleep(pause).await;
            self.sweep().await;
        }
    }

    async fn sweep(&self) {
        let (root, idle, now) = (self.root.clone(), Arc::clone(&self.idle), self.clock.now());
        let (keep, most) = (self.keep_downloads, self.limits.bytes);
        let swept = disk::run(self.blocking, move || staging::sweep(&root, &idle, now, keep, most));
        if let Err(error) = swept.await {
            tracing::warn!(%error, "what a broken download left can't be removed");
        }
    }

    async fn clear(&self, folders: Folders) {
        if let Err(error) = disk::run(self.blocking, move || folders.remove()).await {
            tracing::warn!(%error, "a staging folder can't be removed");
        }
    }

    /// Bytes and artifacts on disk.
    pub(crate) fn size(&self) -> (u64, usize) {
        self.shelf().size()
    }

    /// The artifact of `spec`, from disk or from where it is; `progress` is told how far that is.
    pub(crate) async fn fetch(
        self: &Arc<Self>,
        spec: &ModelSpec,
        progress: impl Fn(Progress),
    ) -> Result<Artifact, Failure> {
        let uri = Uri::parse(&spec.uri)?;
        let key = key(spec);
        self.shelf().take(&key);
        let in_use = Use { artifacts: Arc::clone(self), key: key.clone() };
        let (landing, mut seen) = self.join(&key, uri, spec);
        tokio::pin!(landing);
        let manifest = loop {
            tokio::select! {
                biased;
                landed = &mut landing => break landed?,
                Ok(()) = seen.changed() => {
                    let now = *seen.borrow_and_update();
                    progress(now);
                }
            }
        };
        Ok(Artifact { manifest, _use: in_use })
    }

    /// An artifact that was on disk before a restart, unless it is not any more.
    pub(crate) fn find(self: &Arc<Self>, key: &str) -> Option<Artifact> {
        let mut shelf = self.shelf();
        let manifest = shelf.get(key)?;
        shelf.take(key);
        drop(shelf);
        Some(Artifact { manifest, _use: Use { artifacts: Arc::clone(self), key: key.to_owned() } })
    }

    /// The fetch for `key` that is going on, or a new one.
    fn join(self: &Arc<Self>, key: &str, uri: Uri, spec: &ModelSpec) -> (Landing, watch::Receiver<Progress>) {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(key)
            && let Some(landing) = flight.landing.upgrade()
            && landing.peek().is_none()
        {
            return (landing, flight.progress.clone());
        }
        flights.retain(|_, flight| flight.landing.upgrade().is_some());
        let (tell, progress) = watch::channel(Progress::default());
        let this = Arc::clone(self);
        let (owned, storage) = (key.to_owned(), spec.storage.clone());
        let sink: ProgressSink = Arc::new(move |now| {
            tell.send_replace(now);
        });
        let landing = async move { this.download(owned, uri, storage, sink).await }.boxed().shared();
        if let Some(weak) = landing.downgrade() {
            flights.insert(key.to_owned(), Flight { landing: weak, progress: progress.clone() });
        }
        (landing, progress)
    }

    async fn download(
        self: Arc<Self>,
        key: String,
        uri: Uri,
        storage: Option<Storage>,
        sink: ProgressSink,
    ) -> Result<Arc<Manifest>, Failure> {
        let known = self.shelf().get(&key);
        let known = match known {
            Some(manifest) => {
                let (root, check) = (self.root.clone(), Arc::clone(&manifest));
                disk::run(self.blocking, move || shelf::whole(&root, &check)).await.then_some(manifest)
            }
            None => None,
        };
        // A pinned artifact that is here can't be another one there.
        if let (Some(manifest), Some(pinned)) = (&known, &uri.pinned)
            && manifest.digest() == Some(pinned)
        {
            self.metrics.fetch_hits.inc();
            return Ok(Arc::clone(manifest));
        }
        let source = self.source(&uri, storage.as_ref())?;
        let credentials = self.credentials(&uri, storage).await?;
        let folders = Folders::of(&self.root, &key);
        let request = FetchRequest {
            uri: uri.address.clone(),
            credentials,
            known: known.as_ref().and_then(|manifest| manifest.tag.clone()),
            into: folders.files.clone(),
            notes: folders.notes.clone(),
            limits: self.limits,
        };
        // What an earlier download of it fetched may still be on its way onto the shelf.
        drop(self.writing.lock().await);
        self.idle().take(&key);
        let left = Left::new(&self, &key);
        let make = folders.clone();
        disk::run(self.blocking, move || make.make())
            .await
            .map_err(|error| disk::failure("the download can't be written", &folders.files, &error))?;
        let began = self.clock.now();
        let fetched = source.fetch(request, sink).await;
        // What was fetched whole and is not kept would only be in the way, and so is anything on a disk that failed.
        let go_on = fetched.as_ref().is_err_and(|failure| failure.class != FailureClass::Runtime);
        let landed = match fetched {
            Ok(Fetched::Unchanged) => known.ok_or_else(|| bad("the source says unchanged of what was not known")),
            Ok(Fetched::Files { tag, files }) => self.take_in(key, &uri, tag, files, folders.files.clone()).await,
            Err(failure) => Err(failure),
        };
        if landed.is_ok() {
            self.metrics.fetched.inc();
            if let Some(shared) = self.metrics.shared.get() {
                shared.agent.fetch(self.clock.now().since(began));
            }
        }
        if go_on {
            let measured = folders.clone();
            let bytes = disk::run(self.blocking, move || measured.bytes()).await;
            left.keep(bytes);
        } else {
            self.clear(folders).await;
            left.nothing();
        }
        self.sweep().await;
        landed
    }

    /// Checks what was fetched and puts it onto the shelf.
    async fn take_in(
        &self,
        key: String,
        uri: &Uri,
        tag: Option<String>,
        files: Vec<FetchedFile>,
        from: PathBuf,
    ) -> Result<Arc<Manifest>, Failure> {
        let manifest = Manifest::new(key, redacted(&uri.address), tag, files, self.limits)?;
        match &uri.pinned {
            Some(pinned) if manifest.digest() != Some(pinned) => Err(bad(format!(
                "{} is not what was pinned: its digest is {}, {pinned} was wanted",
                redacted(&uri.address),
                manifest.digest().map_or("that of a folder", String::as_str),
            ))),
            _ => self.store(manifest, from).await,
        }
    }

    /// What fetches `uri`.
    fn source(&self, uri: &Uri, storage: Option<&Storage>) -> Result<&Arc<dyn ArtifactSource>, Failure> {
        let by = |scheme: &str| self.sources.iter().find(|source| source.schemes().contains(&scheme));
        let known = if uri.remote.is_some() { None } else { by(&uri.scheme) };
        let inline = matches!(storage, Some(Storage::RcloneConfig(_)));
        let through = match uri.through(known.is_some(), inline, self.rclone)? {
            Through::Agent => known,
            Through::Rclone => by(rclone::SCHEME),
        };
        through.ok_or_else(|| {
            let known: Vec<String> = self
                .sources
                .iter()
                .flat_map(|source| source.schemes())
                .filter(|scheme| **scheme != rclone::SCHEME)
                .map(|scheme| if scheme.is_empty() { "plain paths".to_owned() } else { format!("{scheme}://") })
                .collect();
            let more = "; with agent.rclone = \"fallback\" it knows what rclone knows";
            let more = if self.rclone == RcloneUse::Never { more } else { "" };
            bad(format!("nothing here fetches {}; this agent knows {}{more}", redacted(&uri.address), known.join(", ")))
        })
    }

    /// The credentials that the model names. What lies in the agent's own file system needs none.
    async fn credentials(&self, uri: &Uri, storage: Option<Storage>) -> Result<Option<Credentials>, Failure> {
        if uri.remote.is_none() && matches!(uri.scheme.as_str(), "" | "file") {
            return Ok(None);
        }
        match storage {
            None => Ok(None),
            Some(Storage::SecretName(name)) => {
                let secrets = self.secrets.clone();
                disk::run(self.blocking, move || secrets.find(&name)).await.map(Some)
            }
            Some(Storage::RcloneConfig(text)) => {
                secrets::parse(rclone::INLINE, vec![(String::new(), Secret::new(text))]).map(Some)
            }
        }
    }

    /// Puts fetched files onto the shelf, and makes room for them.
    async fn store(&self, manifest: Manifest, from: PathBuf) -> Result<Arc<Manifest>, Failure> {
        let (manifest, now, most) = (Arc::new(manifest), self.clock.now(), self.most_bytes);
        let writing = Arc::clone(&self.writing).lock_owned().await;
        let (root, shelf, kept) = (self.root.clone(), Arc::clone(&self.shelf), Arc::clone(&manifest));
        // All of it, once it has begun: nobody may be waiting any more when the disk is done.
        let stored = disk::run(self.blocking, move || {
            let _writing = writing;
            shelf::store(&root, &shelf, &kept, &from, now, most)
        });
        let (dropped, fits) = stored.await?;
        self.metrics.artifacts_dropped.add(dropped);
        if fits {
            return Ok(manifest);
        }
        Err(bad(format!(
            "the artifact has {} bytes, and what is in use leaves no room for it in the artifact cache of {} bytes; \
             make the cache larger",
            manifest.bytes(),
            self.most_bytes
        )))
    }

    /// Puts the folder `to` together from an artifact, as `runtime` wants it: whole, or not at all. How often the
    /// inference server will hold it in memory, as far as can be told.
    pub(crate) async fn lay_out(
        &self,
        artifact: &Artifact,
        runtime: &dyn Runtime,
        wanted: &Wanted<'_>,
        to: &Path,
    ) -> Result<u32, Failure> {
        let (root, manifest) = (self.root.clone(), Arc::clone(&artifact.manifest));
        let read: Vec<Kept> = manifest
            .files
            .iter()
            .filter(|file| file.bytes <= LARGEST_CONFIGURATION && runtime.reads(&file.path))
            .cloned()
            .collect();
        let contents = disk::run(self.blocking, move || shelf::read(&root, &read)).await?;
        let files = manifest.files.iter().map(|file| file.path.clone()).collect();
        let layout = runtime.layout(&Listing { files, contents }, wanted)?;
        let instances = layout.instances.unwrap_or(1);
        let (root, to) = (self.root.clone(), to.to_owned());
        disk::run(self.blocking, move || shelf::lay_out(&root, &manifest, &layout, &to)).await?;
        Ok(instances)
    }
}

/// What an artifact is kept under: where it is from, which version of it is meant, and with which credentials.
fn key(spec: &ModelSpec) -> String {
    let mut digest = Sha256::new();
    let storage = match &spec.storage {
        None => ("none", ""),
        Some(Storage::SecretName(name)) => ("secret", name.as_str()),
        Some(Storage::RcloneConfig(text)) => ("rclone", text.as_str()),
    };
    digest.update(format!("{}\0{:?}\0{}\0{}", spec.uri.trim(), spec.artifact_version, storage.0, storage.1));
    disk::hex(&digest.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        domain::{memory::Resources, names::ReplicaId},
        ports::SystemClock,
    };

    #[tokio::test]
    async fn the_shelf_is_locked_until_the_disk_is_done_whoever_waits() {
        let data = tempfile::tempdir().expect("dir");
        let replica = ReplicaId::new("onnx".parse().expect("a name"), 0);
        let options = Options::new(replica, Resources::primary(Bytes(1)), data.path().to_owned());
        let clock = Arc::new(SystemClock::new());
        let artifacts = Artifacts::new(&options, Vec::new(), clock, Arc::default());
        artifacts.open().await.expect("opened");
        // Who opens this to read it waits until somebody writes.
        let from = data.path().join("from");
        std::fs::create_dir(&from).expect("dir");
        let made = std::process::Command::new("mkfifo").arg(from.join("m")).status();
        assert!(made.expect("mkfifo").success());
        let kept = Kept { path: "m".to_owned(), bytes: 1, sha256: "0".repeat(64) };
        let manifest = Manifest { key: "k".to_owned(), uri: String::new(), tag: None, files: vec![kept] };
        let mut storing = Box::pin(artifacts.store(manifest, from.clone()));
        assert!(futures::poll!(&mut storing).is_pending());
        drop(storing);
        assert!(artifacts.writing.try_lock().is_err(), "the disk is not done");
        let writer = std::fs::OpenOptions::new().write(true).open(from.join("m"));
        drop(writer.expect("opened"));
        let locked = tokio::time::timeout(Duration::from_secs(30), artifacts.writing.lock()).await;
        drop(locked.expect("the disk is done"));
        assert_eq!(artifacts.size(), (0, 0), "and what could not be kept is not on the shelf");
    }
}
