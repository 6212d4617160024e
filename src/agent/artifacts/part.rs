//! A file that is there in part, and what is known of it.
//!
//! The rule of this module: a beginning from before counts only as far as its digest was noted, only when it still
//! has that digest, and only for the content whose tag was noted with it.

use std::{
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::{
    fs::{File, OpenOptions},
    io::{AsyncSeekExt as _, AsyncWriteExt as _},
};

use super::{
    transfer::{Wanted, below, strong},
    uri::bad,
};
use crate::{
    agent::{disk, options::Blocking},
    domain::copy::Failure,
    ports::FetchRequest,
};

/// Bytes after which it is noted how far a file is.
const NOTED: u64 = 32 << 20;

/// What is kept beside a part.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    /// The digest of where it is from, which can have credentials in it.
    at: String,
    tag: Option<String>,
    bytes: u64,
    sha256: String,
    whole: bool,
}

/// A file on its way.
#[derive(Debug)]
pub(super) struct Part {
    path: PathBuf,
    note: PathBuf,
    at: String,
    file: File,
    digest: Sha256,
    tag: Option<String>,
    bytes: u64,
    noted: u64,
    /// Whether all of it was there from before.
    whole: bool,
    /// Whether some of it was.
    resumed: bool,
}

impl Part {
    /// What is there of `wanted`, as far as it can be trusted.
    pub(super) async fn open(request: &FetchRequest, wanted: &Wanted) -> Result<Self, Failure> {
        let path = below(&request.into, &wanted.path)?;
        let note = request.notes.join(disk::hex(&Sha256::digest(&wanted.path)));
        let at = disk::hex(&Sha256::digest(&wanted.at));
        let (there, from) = (path.clone(), at.clone());
        let beside = note.clone();
        let found = disk::run(Blocking::Pool, move || {
            if let Some(parent) = there.parent() {
                std::fs::create_dir_all(parent)?;
            }
            Ok(find(&there, &beside, &from))
        });
        let found = found.await.map_err(|error| written(&path, &error))?;
        let opened = OpenOptions::new().write(true).create(true).truncate(false).open(&path).await;
        let file = opened.map_err(|error| written(&path, &error))?;
        let (digest, tag, bytes, whole) = match found {
            // A tag from the listing says at once whether the content is another one by now.
            Some((digest, note)) if wanted.tag.is_none() || wanted.tag == note.tag => {
                (digest, note.tag, note.bytes, note.whole)
            }
            _ => (Sha256::new(), None, 0, false),
        };
        let mut part = Self { path, note, at, file, digest, tag, bytes, noted: bytes, whole, resumed: bytes > 0 };
        // Without a tag nothing says that the rest would be of the same content.
        if part.tag.as_deref().is_none_or(|tag| !strong(tag)) || (whole && part.whole(wanted).is_none()) {
            part.start_over().await?;
        } else {
            part.place().await.map_err(|error| written(&part.path, &error))?;
        }
        Ok(part)
    }

    /// Bytes that are there.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The tag of what they are from.
    pub(super) fn tag(&self) -> Option<String> {
        self.tag.clone()
    }

    /// What comes from now on has this tag.
    pub(super) fn is_now(&mut self, tag: Option<String>) {
        self.tag = tag;
    }

    /// Whether it has all the bytes that were announced, of the content that was.
    pub(super) fn all(&self, wanted: &Wanted) -> bool {
        self.bytes > 0 && wanted.tag.is_some() && self.tag == wanted.tag && wanted.bytes == Some(self.bytes)
    }

    /// The digest, if nothing is missing and nothing of it can have changed.
    pub(super) fn whole(&self, wanted: &Wanted) -> Option<String> {
        let sha256 = disk::hex(&self.digest.clone().finalize());
        let right = wanted.sha256.as_ref().is_none_or(|wanted| *wanted == sha256)
            && wanted.bytes.is_none_or(|bytes| bytes == self.bytes);
        (self.whole && wanted.tag.is_some() && right).then_some(sha256)
    }

    /// Forgets what is there.
    pub(super) async fn start_over(&mut self) -> Result<(), Failure> {
        (self.digest, self.tag) = (Sha256::new(), None);
        (self.bytes, self.noted) = (0, 0);
        (self.whole, self.resumed) = (false, false);
        // Another file, not the same one emptied: a write of a download that was given up may still be on its way.
        let anew = async {
            match tokio::fs::remove_file(&self.path).await {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            OpenOptions::new().write(true).create_new(true).open(&self.path).await
        };
        self.file = anew.await.map_err(|error| written(&self.path, &error))?;
        Ok(())
    }

    async fn place(&mut self) -> io::Result<()> {
        self.file.set_len(self.bytes).await?;
        self.file.seek(io::SeekFrom::Start(self.bytes)).await?;
        Ok(())
    }

    /// Adds what came.
    pub(super) async fn write(&mut self, chunk: &[u8]) -> Result<(), Failure> {
        self.file.write_all(chunk).await.map_err(|error| written(&self.path, &error))?;
        self.digest.update(chunk);
        self.bytes += chunk.len() as u64;
        if self.bytes - self.noted >= NOTED { self.note().await } else { Ok(()) }
    }

    /// Notes how far it is.
    pub(super) async fn note(&mut self) -> Result<(), Failure> {
        self.file.flush().await.map_err(|error| written(&self.path, &error))?;
        let note = Note {
            at: self.at.clone(),
            tag: self.tag.clone(),
            bytes: self.bytes,
            sha256: disk::hex(&self.digest.clone().finalize()),
            whole: self.whole,
        };
        self.noted = self.bytes;
        let text = serde_json::to_vec(&note).unwrap_or_default();
        let write = async {
            let mut options = OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&self.note).await?;
            file.write_all(&text).await?;
            file.flush().await
        };
        write.await.map_err(|error| written(&self.note, &error))
    }

    /// Its digest, now that all of it came; nothing when only what was there from before can be to blame that it
    /// is another one than the store says.
    pub(super) async fn close(&mut self, wanted: &Wanted, shown: &str) -> Result<Option<String>, Failure> {
        let sha256 = disk::hex(&self.digest.clone().finalize());
        if let Some(right) = wanted.sha256.as_ref().filter(|right| **right != sha256) {
            if self.resumed {
                return Ok(None);
            }
            self.start_over().await?;
            return Err(bad(format!(
                "{shown} is not what the store says: its SHA-256 digest is {sha256}, and {right} was announced; upload it again"
            )));
        }
        self.whole = true;
        self.note().await?;
        Ok(Some(sha256))
    }
}

fn written(path: &Path, error: &io::Error) -> Failure {
    disk::failure("the download can't be written", path, error)
}

/// What `note` says of the file at `path`, if that is so, with the digest to go on from.
fn find(path: &Path, note: &Path, at: &str) -> Option<(Sha256, Note)> {
    const CHUNK: usize = 256 << 10;
    let note: Note = serde_json::from_slice(&std::fs::read(note).ok()?).ok()?;
    let mut digest = Sha256::new();
    let mut file = std::fs::File::open(path).ok()?.take(note.bytes);
    let (mut buffer, mut read) = (vec![0; CHUNK], 0_u64);
    loop {
        match file.read(&mut buffer).ok()? {
            0 => break,
            more => {
                digest.update(&buffer[..more]);
                read += more as u64;
            }
        }
    }
    let same = note.at == at && read == note.bytes && disk::hex(&digest.clone().finalize()) == note.sha256;
    same.then_some((digest, note))
}
