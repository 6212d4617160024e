//! Artifacts in the agent's own file system: a plain path, or `file://`.
//!
//! Files are copied, not linked: a version never changes, so a file that its owner writes to in place must not
//! be the file that is served. Nothing outside the named folder is read, wherever a link points.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::UNIX_EPOCH,
};

use futures::{FutureExt as _, future::BoxFuture};
use sha2::{Digest as _, Sha256};

use super::uri::{bad, decode, file_name, redacted};
use crate::{
    agent::{disk, options::Blocking},
    domain::copy::{Failure, FailureClass, Progress},
    ports::{ArtifactSource, FetchLimits, FetchRequest, Fetched, FetchedFile, ProgressSink},
};

/// Deepest folder that is read.
const DEEPEST: usize = 32;

/// Reads files and folders.
#[derive(Debug)]
pub struct LocalSource {
    base: Option<PathBuf>,
    blocking: Blocking,
}

impl LocalSource {
    /// A source that takes relative paths from `base`, and refuses them without one.
    #[must_use]
    pub const fn new(base: Option<PathBuf>, blocking: Blocking) -> Self {
        Self { base, blocking }
    }

    fn path(&self, uri: &str) -> Result<PathBuf, Failure> {
        let shown = redacted(uri);
        let path = match uri.strip_prefix("file://") {
            None => PathBuf::from(uri),
            Some(rest) => {
                let rest = rest.strip_prefix("localhost").unwrap_or(rest);
                if !rest.starts_with('/') {
                    return Err(bad(format!("{shown} names another host; a file URI here begins with file:///")));
                }
                PathBuf::from(decode(rest).ok_or_else(|| bad(format!("{shown} has escapes that give no text")))?)
            }
        };
        match (&self.base, path.is_absolute()) {
            (_, true) => Ok(path),
            (Some(base), false) => Ok(base.join(path)),
            (None, false) => Err(bad(format!("{shown} is a relative path; give an absolute one"))),
        }
    }
}

impl ArtifactSource for LocalSource {
    fn schemes(&self) -> &[&str] {
        &["", "file"]
    }

    fn fetch(&self, request: FetchRequest, progress: ProgressSink) -> BoxFuture<'_, Result<Fetched, Failure>> {
        async move {
            let path = self.path(&request.uri)?;
            let given_up = Flag::default();
            let stop = Arc::clone(&given_up.0);
            disk::run(self.blocking, move || copy(&path, &request, &progress, &stop)).await
        }
        .boxed()
    }
}

/// Set when its owner goes, so that blocking work for it can end.
#[derive(Default)]
struct Flag(Arc<AtomicBool>);

impl Drop for Flag {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Source {
    path: PathBuf,
    name: String,
    bytes: u64,
}

fn copy(
    path: &Path,
    request: &FetchRequest,
    progress: &ProgressSink,
    given_up: &AtomicBool,
) -> Result<Fetched, Failure> {
    let root = path.canonicalize().map_err(|error| denied(path, &error))?;
    let mut tag = Sha256::new();
    let mut sources = Vec::new();
    let mut list = Listing { root: &root, limits: request.limits, bytes: 0, tag: &mut tag, sources: &mut sources };
    let meta = fs::metadata(&root).map_err(|error| denied(path, &error))?;
    if meta.is_dir() {
        list.folder(&root, "", 0)?;
    } else {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        list.file(&root, name, &meta)?;
    }
    let total = list.bytes;
    if sources.is_empty() {
        return Err(bad(format!("{} holds no files", path.display())));
    }
    let tag = disk::hex(&tag.finalize());
    if request.known.as_deref() == Some(tag.as_str()) {
        return Ok(Fetched::Unchanged);
    }
    let mut done = 0;
    let mut files = Vec::with_capacity(sources.len());
    for source in sources {
        let to = request.into.join(&source.name);
        let sha256 = copy_file(&source, &to, |more| {
            done += more;
            progress(Progress { done, total: Some(total) });
            !given_up.load(Ordering::Relaxed)
        })?;
        files.push(FetchedFile { path: source.name, bytes: source.bytes, sha256 });
    }
    Ok(Fetched::Files { tag: Some(tag), files })
}

struct Listing<'a> {
    root: &'a Path,
    limits: FetchLimits,
    bytes: u64,
    tag: &'a mut Sha256,
    sources: &'a mut Vec<Source>,
}

impl Listing<'_> {
    fn folder(&mut self, folder: &Path, prefix: &str, depth: usize) -> Result<(), Failure> {
        if depth > DEEPEST {
            return Err(bad(format!("{} is nested deeper than {DEEPEST} folders", folder.display())));
        }
        let entries = fs::read_dir(folder).map_err(|error| denied(folder, &error))?;
        let mut names: Vec<_> = entries
            .map(|entry| entry.map(|entry| entry.file_name()).map_err(|error| denied(folder, &error)))
            .collect::<Result<_, _>>()?;
        names.sort();
        for name in names {
            let path = folder.join(&name);
            let name = name
                .to_str()
                .and_then(file_name)
                .ok_or_else(|| bad(format!("{} has a name that can't be served; rename it", path.display())))?;
            let name = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
            // Links are followed only to what lies in the folder itself.
            let real = path.canonicalize().map_err(|error| denied(&path, &error))?;
            if !real.starts_with(self.root) {
                return Err(bad(format!(
                    "{} leads out of {}; only what is in the folder is served",
                    path.display(),
                    self.root.display()
                )));
            }
            let meta = fs::metadata(&real).map_err(|error| denied(&path, &error))?;
            if meta.is_dir() {
                self.folder(&real, &name, depth + 1)?;
            } else {
                self.file(&real, &name, &meta)?;
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, name: &str, meta: &fs::Metadata) -> Result<(), Failure> {
        if !meta.is_file() {
            return Err(bad(format!("{} is neither a file nor a folder", path.display())));
        }
        self.bytes = self.bytes.saturating_add(meta.len());
        if self.bytes > self.limits.bytes {
            return Err(bad(format!("the artifact is larger than the limit of {} bytes", self.limits.bytes)));
        }
        if self.sources.len() == self.limits.files {
            return Err(bad(format!("the artifact has more files than the limit of {}", self.limits.files)));
        }
        let modified = meta.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        self.tag.update(format!("{name}\0{}\0{}\n", meta.len(), modified.as_nanos()));
        self.sources.push(Source { path: path.to_owned(), name: name.to_owned(), bytes: meta.len() });
        Ok(())
    }
}

/// Copies and digests in one pass. `go_on` is told of each chunk.
fn copy_file(source: &Source, to: &Path, mut go_on: impl FnMut(u64) -> bool) -> Result<String, Failure> {
    const CHUNK: usize = 256 << 10;
    let io = |error: std::io::Error| disk::failure("the artifact can't be copied", to, &error);
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(io)?;
    }
    let mut from = File::open(&source.path).map_err(|error| denied(&source.path, &error))?;
    // Another file than the one that a copy which was given up may still be writing.
    disk::remove(to).map_err(io)?;
    let mut file = File::create_new(to).map_err(io)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let mut left = source.bytes;
    loop {
        let read = from.read(&mut buffer).map_err(|error| denied(&source.path, &error))?;
        if read == 0 {
            break;
        }
        let Some(rest) = left.checked_sub(read as u64) else {
            return Err(bad(format!("{} grew while it was read", source.path.display())));
        };
        left = rest;
        digest.update(&buffer[..read]);
        file.write_all(&buffer[..read]).map_err(io)?;
        if !go_on(read as u64) {
            return Err(bad("the fetch was given up"));
        }
    }
    if left > 0 {
        return Err(bad(format!("{} shrank while it was read", source.path.display())));
    }
    Ok(disk::hex(&digest.finalize()))
}

fn denied(path: &Path, error: &std::io::Error) -> Failure {
    use std::io::ErrorKind;
    let (class, why) = match error.kind() {
        ErrorKind::NotFound => (FailureClass::Artifact, "does not exist on this replica".to_owned()),
        ErrorKind::PermissionDenied => (FailureClass::Authorisation, "may not be read by the agent".to_owned()),
        _ => (FailureClass::Artifact, format!("can't be read: {error}")),
    };
    Failure { class, message: format!("{} {why}", path.display()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fetch(uri: &str, into: &Path, limits: FetchLimits, known: Option<String>) -> Result<Fetched, Failure> {
        let source = LocalSource::new(None, Blocking::Inline);
        let (into, notes) = (into.to_owned(), into.to_owned());
        let request = FetchRequest { uri: uri.to_owned(), credentials: None, known, into, notes, limits };
        futures::executor::block_on(source.fetch(request, Arc::new(|_| {})))
    }

    const LIMITS: FetchLimits = FetchLimits { bytes: 100, files: 3 };

    #[test]
    fn a_folder_is_copied_and_known_again() {
        let (from, into) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
        fs::create_dir(from.path().join("1")).expect("dir");
        fs::write(from.path().join("1/m.onnx"), b"abc").expect("file");
        let uri = format!("file://{}", from.path().display());
        let Ok(Fetched::Files { tag, files }) = fetch(&uri, into.path(), LIMITS, None) else { panic!("copied") };
        assert_eq!((files[0].path.as_str(), files[0].bytes), ("1/m.onnx", 3));
        assert_eq!(files[0].sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(fs::read(into.path().join("1/m.onnx")).expect("copied"), b"abc");
        assert_eq!(fetch(&uri, into.path(), LIMITS, tag.clone()), Ok(Fetched::Unchanged));
        fs::write(from.path().join("1/m.onnx"), b"abcd").expect("file");
        assert!(matches!(fetch(&uri, into.path(), LIMITS, tag), Ok(Fetched::Files { .. })));
    }

    #[test]
    fn links_out_of_the_folder_and_limits_are_refused() {
        let (from, into) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
        let uri = from.path().display().to_string();
        assert!(fetch(&uri, into.path(), LIMITS, None).is_err(), "no files");
        std::os::unix::fs::symlink("/etc/hostname", from.path().join("leak")).expect("link");
        let failure = fetch(&uri, into.path(), LIMITS, None).expect_err("leads out");
        assert!(failure.message.contains("leads out"), "{failure:?}");
        fs::remove_file(from.path().join("leak")).expect("removed");
        fs::write(from.path().join("a"), vec![0; 101]).expect("file");
        assert!(fetch(&uri, into.path(), LIMITS, None).expect_err("large").message.contains("larger"));
        for name in ["a", "b", "c", "d"] {
            fs::write(from.path().join(name), b"x").expect("file");
        }
        assert!(fetch(&uri, into.path(), LIMITS, None).expect_err("many").message.contains("more files"));
    }

    #[test]
    fn what_is_missing_or_relative_is_said_so() {
        let into = tempfile::tempdir().expect("dir");
        assert!(
            fetch("/nowhere/at/all", into.path(), LIMITS, None).expect_err("missing").message.contains("not exist")
        );
        assert!(fetch("models/iris", into.path(), LIMITS, None).expect_err("relative").message.contains("absolute"));
        assert!(fetch("file://host/x", into.path(), LIMITS, None).expect_err("host").message.contains("another host"));
    }

    #[test]
    fn a_loop_of_links_ends() {
        let (from, into) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
        std::os::unix::fs::symlink(from.path(), from.path().join("again")).expect("link");
        assert!(fetch(&from.path().display().to_string(), into.path(), LIMITS, None).is_err());
    }
}
