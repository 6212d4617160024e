//! The cache's shelves: blobs by digest, a manifest per artifact, and which of them are in use.

use std::{
    collections::BTreeMap,
    fs::{self, File, Permissions},
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::uri::{bad, file_name};
use crate::{
    agent::{
        disk::{self, DiskError},
        runtimes::Layout,
    },
    domain::{copy::Failure, time::Instant},
    ports::{FetchLimits, FetchedFile},
};

/// An artifact on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// What it is kept under.
    pub(super) key: String,
    /// Where it is from, for people.
    pub(super) uri: String,
    /// Tells its content from a later one.
    pub(super) tag: Option<String>,
    pub(super) files: Vec<Kept>,
}

/// A file of an artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) path: String,
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

impl Manifest {
    /// Checks what a source says that it fetched.
    pub(super) fn new(
        key: String,
        uri: String,
        tag: Option<String>,
        files: Vec<FetchedFile>,
        limits: FetchLimits,
    ) -> Result<Self, Failure> {
        let files: Vec<_> =
            files.into_iter().map(|file| Kept { path: file.path, bytes: file.bytes, sha256: file.sha256 }).collect();
        let manifest = Self { key, uri, tag, files };
        if manifest.files.is_empty() {
            return Err(bad(format!("{} holds no files", manifest.uri)));
        }
        if manifest.files.len() > limits.files || manifest.bytes() > limits.bytes {
            return Err(bad(format!("{} exceeds the limits of an artifact", manifest.uri)));
        }
        if !manifest.sound() {
            return Err(bad(format!("{} has a file name that can't be served", manifest.uri)));
        }
        Ok(manifest)
    }

    /// Whether every path stays below its folder and every digest is one.
    fn sound(&self) -> bool {
        let digest = |text: &str| text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        self.files.iter().all(|file| digest(&file.sha256) && file.path.split('/').all(|part| file_name(part).is_some()))
    }

    pub(super) fn bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, file| sum.saturating_add(file.bytes))
    }

    /// The digest of the one file, if it is one.
    pub(super) fn digest(&self) -> Option<&String> {
        match self.files.as_slice() {
            [file] => Some(&file.sha256),
            _ => None,
        }
    }
}

/// What is on disk and who uses it.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    manifests: BTreeMap<String, (Arc<Manifest>, Instant)>,
    users: BTreeMap<String, u32>,
    /// Size of each blob, and how many files are it.
    blobs: BTreeMap<String, (u64, u32)>,
}

/// What leaves the disk.
#[derive(Debug, Default)]
pub(super) struct Dropped {
    manifests: Vec<String>,
    blobs: Vec<String>,
    artifacts: u64,
}

impl Shelf {
    pub(super) fn size(&self) -> (u64, usize) {
        (self.bytes(), self.manifests.len())
    }

    fn bytes(&self) -> u64 {
        self.blobs.values().fold(0, |sum, (bytes, _)| sum.saturating_add(*bytes))
    }

    pub(super) fn get(&self, key: &str) -> Option<Arc<Manifest>> {
        self.manifests.get(key).map(|(manifest, _)| Arc::clone(manifest))
    }

    pub(super) fn take(&mut self, key: &str) {
        *self.users.entry(key.to_owned()).or_default() += 1;
    }

    pub(super) fn put_back(&mut self, key: &str, now: Instant) {
        if let Some(count) = self.users.get_mut(key) {
            *count -= 1;
            if *count == 0 {
                self.users.remove(key);
            }
        }
        if let Some((_, last_used)) = self.manifests.get_mut(key) {
            *last_used = now;
        }
    }

    fn add(&mut self, manifest: Arc<Manifest>, now: Instant) {
        for file in &manifest.files {
            self.blobs.entry(file.sha256.clone()).or_insert((file.bytes, 0)).1 += 1;
        }
        self.manifests.insert(manifest.key.clone(), (manifest, now));
    }

    /// Forgets an artifact; what it alone had comes back.
    fn forget(&mut self, key: &str) -> Vec<String> {
        let Some((manifest, _)) = self.manifests.remove(key) else { return Vec::new() };
        let mut orphans = Vec::new();
        for file in &manifest.files {
            if let Some((_, count)) = self.blobs.get_mut(&file.sha256) {
                *count -= 1;
                if *count == 0 {
                    self.blobs.remove(&file.sha256);
                    orphans.push(file.sha256.clone());
                }
            }
        }
        orphans
    }

    /// Takes `manifest` in. Others that nobody uses go, the one unused for longest first, until all fits into
    /// `most` bytes; when it can't, `manifest` itself is not taken in and the answer says so.
    fn place(&mut self, manifest: Arc<Manifest>, now: Instant, most: u64) -> (Dropped, bool) {
        let key = manifest.key.clone();
        let mut dropped = Dropped::default();
        let mut orphans = self.forget(&key);
        self.add(manifest, now);
        while self.bytes() > most {
            let unused = self
                .manifests
                .iter()
                .filter(|(other, _)| **other != key && !self.users.contains_key(*other))
                .min_by_key(|(other, (_, last_used))| (*last_used, (*other).clone()))
                .map(|(other, _)| other.clone());
            let Some(other) = unused else { break };
            orphans.extend(self.forget(&other));
            dropped.manifests.push(other);
            dropped.artifacts += 1;
        }
        let fits = self.bytes() <= most;
        if !fits {
            orphans.extend(self.forget(&key));
            dropped.manifests.push(key);
        }
        orphans.retain(|digest| !self.blobs.contains_key(digest));
        dropped.blobs = orphans;
        (dropped, fits)
    }
}

fn blob(root: &Path, digest: &str) -> PathBuf {
    root.join("blobs").join(digest)
}

fn manifest_file(root: &Path, key: &str) -> PathBuf {
    root.join("manifests").join(format!("{key}.json"))
}

/// Reads the shelves. What no manifest names is removed.
pub(super) fn open(root: &Path) -> Result<Shelf, DiskError> {
    let error = |error: io::Error| DiskError { path: root.display().to_string(), problem: error.to_string() };
    let (manifests, blobs) = (root.join("manifests"), root.join("blobs"));
    fs::create_dir_all(&manifests).map_err(error)?;
    fs::create_dir_all(&blobs).map_err(error)?;
    let mut shelf = Shelf::default();
    for entry in fs::read_dir(&manifests).map_err(error)? {
        let entry = entry.map_err(error)?;
        let parsed = fs::read(entry.path()).ok().and_then(|text| serde_json::from_slice::<Manifest>(&text).ok());
        let modified = entry.metadata().and_then(|meta| meta.modified()).ok();
        let since = modified.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok()).unwrap_or_default();
        match parsed {
            Some(manifest) if manifest.sound() && entry.path() == manifest_file(root, &manifest.key) => {
                shelf.add(Arc::new(manifest), Instant::from_micros(0) + since);
            }
            _ => disk::remove(&entry.path()).map_err(error)?,
        }
    }
    for entry in fs::read_dir(&blobs).map_err(error)? {
        let entry = entry.map_err(error)?;
        if entry.file_name().to_str().is_none_or(|name| !shelf.blobs.contains_key(name)) {
            disk::remove(&entry.path()).map_err(error)?;
        }
    }
    Ok(shelf)
}

/// Whether every file of an artifact is there in its full size.
pub(super) fn whole(root: &Path, manifest: &Manifest) -> bool {
    manifest
        .files
        .iter()
        .all(|file| fs::metadata(blob(root, &file.sha256)).is_ok_and(|meta| meta.is_file() && meta.len() == file.bytes))
}

/// Puts `manifest` and its files, which are in `from`, onto the shelf, and makes room for them in `most` bytes. How many
/// others had to go, and whether it fits.
///
/// # Errors
/// When the disk fails; nothing of `manifest` is left then.
pub(super) fn store(
    root: &Path,
    shelf: &Mutex<Shelf>,
    manifest: &Arc<Manifest>,
    from: &Path,
    now: Instant,
    most: u64,
) -> Result<(u64, bool), Failure> {
    let lock = || shelf.lock().unwrap_or_else(PoisonError::into_inner);
    let (dropped, fits) = lock().place(Arc::clone(manifest), now, most);
    discard(root, &dropped);
    if fits && let Err(failure) = write(root, manifest, from) {
        let blobs = lock().forget(&manifest.key);
        discard(root, &Dropped { manifests: vec![manifest.key.clone()], blobs, artifacts: 0 });
        return Err(failure);
    }
    Ok((dropped.artifacts, fits))
}

/// Moves the files of `manifest` out of `from` onto the shelf, durably, and the manifest last.
fn write(root: &Path, manifest: &Manifest, from: &Path) -> Result<(), Failure> {
    let place = |file: &Kept| -> io::Result<()> {
        let (source, target) = (from.join(&file.path), blob(root, &file.sha256));
        let opened = File::open(&source)?;
        if opened.metadata()?.len() != file.bytes {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its size is not what was fetched"));
        }
        opened.sync_all()?;
        // A server that writes into its folder must not reach the blob.
        fs::set_permissions(&source, Permissions::from_mode(0o444))?;
        fs::rename(&source, &target)
    };
    for file in &manifest.files {
        place(file).map_err(|error| disk::failure("the artifact can't be kept", &from.join(&file.path), &error))?;
    }
    let path = manifest_file(root, &manifest.key);
    let failed = |error: io::Error| disk::failure("the artifact can't be kept", &path, &error);
    disk::sync_folder(&root.join("blobs")).map_err(failed)?;
    let text = serde_json::to_vec(manifest).map_err(|error| failed(io::Error::other(error)))?;
    disk::write_whole(&path, &text).map_err(failed)
}

/// Removes what left the shelf. What can't be removed now is removed at the next start.
fn discard(root: &Path, dropped: &Dropped) {
    let manifests = dropped.manifests.iter().map(|key| manifest_file(root, key));
    for path in manifests.chain(dropped.blobs.iter().map(|digest| blob(root, digest))) {
        if let Err(error) = disk::remove(&path) {
            tracing::warn!(path = %path.display(), %error, "a cached artifact can't be removed");
        }
    }
}

/// What is in these files.
pub(super) fn read(root: &Path, files: &[Kept]) -> Result<BTreeMap<String, Vec<u8>>, Failure> {
    let read = |file: &Kept| {
        let path = blob(root, &file.sha256);
        let contents = fs::read(&path).map_err(|error| disk::failure("the artifact can't be read", &path, &error))?;
        Ok((file.path.clone(), contents))
    };
    files.iter().map(read).collect()
}

/// Puts a folder together from blobs and from what was made for it, beside its place, and renames it there. A blob is
/// linked and never written to: a file that differs from the artifact's is another file.
pub(super) fn lay_out(root: &Path, manifest: &Manifest, layout: &Layout, to: &Path) -> Result<(), Failure> {
    // A name of its own that is no longer than a file system takes, whatever the copy is called.
    let name = to.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let beside = to.with_file_name(format!(".{}", disk::hex(&Sha256::digest(name))));
    let digests: BTreeMap<&str, &str> =
        manifest.files.iter().map(|file| (file.path.as_str(), file.sha256.as_str())).collect();
    let place = |path: &str| -> io::Result<PathBuf> {
        let target = beside.join(path);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        Ok(target)
    };
    let build = || -> io::Result<()> {
        disk::remove(&beside)?;
        fs::create_dir_all(&beside)?;
        for (path, from) in &layout.links {
            let target = place(path)?;
            let digest = digests.get(from.as_str()).ok_or_else(|| io::Error::other(format!("no file {from}")))?;
            let blob = blob(root, digest);
            // Another file system takes no links.
            if fs::hard_link(&blob, &target).is_err() {
                fs::copy(&blob, &target)?;
            }
        }
        for (path, contents) in &layout.written {
            fs::write(place(path)?, contents)?;
        }
        disk::remove(to)?;
        fs::rename(&beside, to)
    };
    build().map_err(|error| disk::failure("the model's folder can't be prepared", to, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .expect("a folder")
            .map(|entry| entry.expect("readable").file_name().into_string().expect("text"))
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_can_t_be_kept_whole_leaves_nothing() {
        let root = tempfile::tempdir().expect("dir");
        let shelf = Mutex::new(open(root.path()).expect("opened"));
        let from = root.path().join("from");
        fs::create_dir(&from).expect("dir");
        let manifest = |key: &str, paths: &[&str]| {
            let files = paths.iter().map(|path| {
                fs::write(from.join(path), path).expect("written");
                let sha256 = disk::hex(&Sha256::digest(path));
                Kept { path: (*path).to_owned(), bytes: path.len() as u64, sha256 }
            });
            Arc::new(Manifest { key: key.to_owned(), uri: String::new(), tag: None, files: files.collect() })
        };
        let now = Instant::from_micros(0);
        let first = manifest("first", &["shared"]);
        assert_eq!(store(root.path(), &shelf, &first, &from, now, 100), Ok((0, true)));
        let broken = manifest("second", &["shared", "new", "absent"]);
        fs::remove_file(from.join("absent")).expect("removed");
        assert!(store(root.path(), &shelf, &broken, &from, now, 100).is_err());
        assert_eq!(names(&root.path().join("blobs")), [first.files[0].sha256.clone()], "what the other has stays");
        assert_eq!(names(&root.path().join("manifests")), ["first.json"]);
        assert_eq!(shelf.lock().expect("sound").size(), (6, 1));
    }
}
