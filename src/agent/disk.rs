//! The agent's files: written so that after a power cut each is there whole or not at all.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{fence::Seen, options::Blocking};
use crate::domain::{
    copy::{Failure, FailureClass},
    memory::Resources,
    names::ModelName,
    order::Order,
    size::{Size, Trust},
    spec::ModelSpec,
    version::Generation,
};

/// The agent can't use its files.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the agent's file {path} can't be used: {problem}; check that the folder exists and may be written")]
pub struct DiskError {
    /// Which file.
    pub path: String,
    /// What the system said.
    pub problem: String,
}

/// Does blocking work where it may be done.
pub(crate) async fn run<T: Send + 'static>(blocking: Blocking, work: impl FnOnce() -> T + Send + 'static) -> T {
    match blocking {
        Blocking::Inline => work(),
        Blocking::Pool => match tokio::task::spawn_blocking(work).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is shutting down: nobody is left to hear the outcome.
                Err(_) => std::future::pending().await,
            },
        },
    }
}

/// A failure of the replica's own disk. Another replica may do better.
pub(crate) fn failure(what: &str, path: &Path, error: &io::Error) -> Failure {
    let advice = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free space there, lower agent.artifact_cache, or move agent.data_dir"
        }
        io::ErrorKind::FileTooLarge => "; raise the limit that the system sets for the agent's files",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => "; let the agent write there",
        _ => "",
    };
    Failure { class: FailureClass::Runtime, message: format!("{what} ({}): {error}{advice}", path.display()) }
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string can't fail.
        let _infallible = write!(text, "{byte:02x}");
        text
    })
}

/// Replaces `path` with `contents`, durably. Only the owner may read it: orders carry credentials.
pub(crate) fn write_whole(path: &Path, contents: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let temporary = path.with_extension("tmp");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(contents)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_folder(folder)
}

/// Makes the names in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Removes a folder or file that may not be there.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Bytes of all files below `folder`, as far as it can be read.
pub(crate) fn size(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => size(&entry.path()),
        Ok(_) => entry.metadata().map_or(0, |meta| meta.len()),
        Err(_) => 0,
    });
    sizes.fold(0, u64::saturating_add)
}

/// One copy, as kept over a restart of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kept {
    model: ModelName,
    generation: Generation,
    spec: Arc<ModelSpec>,
    need: Resources,
    attempt: u32,
    /// Whether the need was measured.
    #[serde(default)]
    measured: bool,
    /// What counts where another amount is declared.
    #[serde(default)]
    trust: Trust,
    /// The artifact that its folder was made from, once it answered.
    pub(crate) artifact: Option<String>,
    /// How often the inference server holds it in memory.
    #[serde(default = "once")]
    pub(crate) instances: u32,
    /// What it was found to take.
    #[serde(default)]
    pub(crate) size: Option<Size>,
    /// Whether that is a guess, and was not measured.
    #[serde(default)]
    pub(crate) guessed: bool,
}

const fn once() -> u32 {
    1
}

impl Kept {
    pub(crate) fn order(&self) -> Order {
        Order::Register {
            model: self.model.clone(),
            generation: self.generation,
            spec: Arc::clone(&self.spec),
            need: self.need.clone(),
            attempt: self.attempt,
            measured: self.measured,
            trust: self.trust,
        }
    }

    /// The copy that `order` registers, with what its folder was made from and how often it is in memory, once it
    /// answered.
    pub(crate) fn of(order: Order, loaded: Option<(String, u32)>) -> Option<Self> {
        let (artifact, instances) = loaded.map_or((None, 1), |(artifact, instances)| (Some(artifact), instances));
        match order {
            Order::Register { model, generation, spec, need, attempt, measured, trust } => {
                let (size, guessed) = (None, false);
                Some(Self {
                    model,
                    generation,
                    spec,
                    need,
                    attempt,
                    measured,
                    trust,
                    artifact,
                    instances,
                    size,
                    guessed,
                })
            }
            Order::Unregister { .. } => None,
        }
    }
}

/// The agent's own folder.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    root: PathBuf,
    blocking: Blocking,
}

impl Disk {
    pub(crate) const fn new(root: PathBuf, blocking: Blocking) -> Self {
        Self { root, blocking }
    }

    fn copies(&self) -> PathBuf {
        self.root.join("copies")
    }

    fn copy(&self, generation: Generation) -> PathBuf {
        // `with_extension` must not eat a part of the generation.
        self.copies().join(format!("{generation}.json"))
    }

    fn fence(&self) -> PathBuf {
        self.root.join("fence.json")
    }

    /// What is known of leaders and copies from before.
    pub(crate) async fn open(&self) -> Result<(Seen, Vec<Kept>), DiskError> {
        let this = self.clone();
        run(self.blocking, move || this.read()).await
    }

    fn read(&self) -> Result<(Seen, Vec<Kept>), DiskError> {
        let copies = self.copies();
        let error = |path: &Path| {
            let path = path.display().to_string();
            move |error: io::Error| DiskError { path, problem: error.to_string() }
        };
        fs::create_dir_all(&copies).map_err(error(&copies))?;
        let fence = self.fence();
        let seen = match fs::read(&fence) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|problem| DiskError { path: fence.display().to_string(), problem: problem.to_string() })?,
            Err(missing) if missing.kind() == io::ErrorKind::NotFound => Seen::default(),
            Err(other) => return Err(error(&fence)(other)),
        };
        let mut kept: Vec<Kept> = Vec::new();
        for entry in fs::read_dir(&copies).map_err(error(&copies))? {
            let path = entry.map_err(error(&copies))?.path();
            if path.extension().is_some_and(|extension| extension == "tmp") {
                // Its writing was cut off before it took the place of the one before it.
                drop(fs::remove_file(&path));
                continue;
            }
            let parsed = fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
            match parsed {
                Some(copy) if path.extension().is_some_and(|extension| extension == "json") => kept.push(copy),
                _ => {
                    // Unreadable or half written: the scheduler orders the copy again.
                    tracing::warn!(path = %path.display(), "a kept order can't be read and is removed");
                    remove(&path).map_err(error(&path))?;
                }
            }
        }
        kept.sort_by_key(|copy| copy.generation);
        Ok((seen, kept))
    }

    /// Keeps a copy.
    pub(crate) async fn keep(&self, kept: Kept) -> Result<(), Failure> {
        let path = self.copy(kept.generation);
        run(self.blocking, move || {
            let text = serde_json::to_vec(&kept).map_err(|error| Failure {
                class: FailureClass::Runtime,
                message: format!("the order can't be written down: {error}"),
            })?;
            write_whole(&path, &text).map_err(|error| failure("the order can't be written down", &path, &error))
        })
        .await
    }

    /// Forgets a copy.
    pub(crate) async fn forget(&self, generation: Generation) -> io::Result<()> {
        let (path, folder) = (self.copy(generation), self.copies());
        run(self.blocking, move || remove(&path).and_then(|()| sync_folder(&folder))).await
    }

    /// Keeps what was seen of leaders.
    pub(crate) async fn keep_fence(&self, seen: Seen) -> Result<(), DiskError> {
        let path = self.fence();
        run(self.blocking, move || {
            let error = |problem: String| DiskError { path: path.display().to_string(), problem };
            let text = serde_json::to_vec(&seen).map_err(|problem| error(problem.to_string()))?;
            write_whole(&path, &text).map_err(|problem| error(problem.to_string()))
        })
        .await
    }

    /// Removes a folder.
    pub(crate) async fn remove(&self, path: PathBuf) -> io::Result<()> {
        run(self.blocking, move || remove(&path)).await
    }

    /// Removes everything in `folder` but what is named, and makes the folder when it is not there.
    pub(crate) async fn clean(&self, folder: PathBuf, keep: Vec<String>) -> Result<Vec<String>, DiskError> {
        run(self.blocking, move || {
            let error = |error: io::Error| DiskError { path: folder.display().to_string(), problem: error.to_string() };
            fs::create_dir_all(&folder).map_err(error)?;
            let mut present = Vec::new();
            for entry in fs::read_dir(&folder).map_err(error)? {
                let entry = entry.map_err(error)?;
                match entry.file_name().into_string() {
                    Ok(name) if keep.contains(&name) => present.push(name),
                    _ => remove(&entry.path()).map_err(error)?,
                }
            }
            Ok(present)
        })
        .await
    }
}
