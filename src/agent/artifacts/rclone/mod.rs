//! Artifacts from everything else that rclone reads.
//!
//! What is there is listed first: rclone says yes to a copy of nothing. Files that are whole already are not
//! copied again, and each is digested here before it counts.

mod call;
mod folder;
mod job;
mod program;
mod remote;

use std::{path::Path, sync::Arc};

use futures::{FutureExt as _, future::BoxFuture};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

pub use self::program::RcloneOptions;
use self::{
    call::CallError,
    job::Job,
    program::{Program, Running, number},
    remote::Remote,
};
use super::{
    refusal::{Asked, Refusal, With},
    transfer::{Cure, Transfers, Trouble, below, within},
    uri::{bad, redacted},
};
use crate::{
    agent::{disk, options::Blocking},
    domain::copy::{Failure, FailureClass, Progress},
    ports::{ArtifactSource, FetchRequest, Fetched, FetchedFile, ProgressSink},
};

/// The name that sources are found by, of this one.
pub(super) const SCHEME: &str = "rclone";
/// The name of credentials that come with a model.
pub(super) const INLINE: &str = "the model's rclone configuration";

/// Fetches through the rclone program.
#[derive(Debug)]
pub struct RcloneSource {
    program: Program,
    transfers: Arc<Transfers>,
}

/// A file, as rclone lists it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    path: String,
    size: i64,
    #[serde(default)]
    mod_time: String,
    is_dir: bool,
}

/// What is to be copied.
struct Found {
    files: Vec<Listed>,
    /// Whether the path is that of one file.
    single: bool,
}

impl RcloneSource {
    /// A source that starts the program at first use.
    #[must_use]
    pub fn new(options: RcloneOptions, transfers: Arc<Transfers>) -> Self {
        Self { program: Program::new(options, transfers.parallel(), transfers.rate()), transfers }
    }

    async fn get(&self, request: FetchRequest, progress: ProgressSink) -> Result<Fetched, Failure> {
        let credentials = request.credentials.as_ref();
        let inline = credentials.is_some_and(|credentials| credentials.name == INLINE);
        let remote = Remote::parse(&request.uri, credentials, inline)?;
        let with = request.credentials.clone().map_or_else(|| With::Own(Vec::new()), With::Secret);
        let asked = Asked { shown: redacted(&request.uri), with, at: None };
        self.transfers.patience.insist(|| self.copy(&remote, &asked, &request, &progress)).await
    }

    async fn copy(
        &self,
        remote: &Remote,
        asked: &Asked,
        request: &FetchRequest,
        progress: &ProgressSink,
    ) -> Result<Fetched, Trouble> {
        let running = self.program.running().await?;
        let found = find(&running, remote, asked).await?;
        let tag = tag(&found.files);
        if request.known.as_ref() == Some(&tag) {
            return Ok(Fetched::Unchanged);
        }
        let total = found.files.iter().try_fold(0_u64, |sum, file| Some(sum + u64::try_from(file.size).ok()?));
        within(request, found.files.len(), total.unwrap_or_default())?;
        let into = std::path::absolute(&request.into).unwrap_or_else(|_| request.into.clone());
        let mut job = Job::new(&running, &into);
        // What an earlier try started may still write there.
        job.quiet(asked).await?;
        let (folder, paths) = (into.clone(), found.files.iter().map(|file| file.path.clone()).collect());
        let there = disk::run(Blocking::Pool, move || folder::tidy(&folder, &paths)).await?;
        let (method, mut input) = if found.single {
            let (fs, name) = remote.parent();
            ("operations/copyfile", json!({ "srcFs": fs, "srcRemote": name, "dstFs": into, "dstRemote": name }))
        } else {
            ("sync/copy", json!({ "srcFs": remote.whole(), "dstFs": into }))
        };
        (input["_async"], input["_group"]) = (json!(true), json!(job.group));
        // Before the job begins: two who are the first to ask for the count at once would each have their own.
        job.bytes(asked, remote).await?;
        job.started();
        let answer = ask(&running, asked, remote, method, &input).await?;
        let id = number(&answer, "jobid");
        let id = id.ok_or_else(|| bad(format!("{}: rclone's answer names no job", asked.shown)))?;
        let copied = job.finish(id, asked, remote, (&into, request.limits), |done| {
            progress(Progress { done, total });
            // Files of an earlier try that are written anew count twice until they are looked at.
            there.saturating_add(done) > request.limits.bytes
        });
        copied.await?;
        // A start of an earlier try may have come later than its stop.
        job.quiet(asked).await?;
        self.program.proved().await;
        let (shown, limit) = (asked.shown.clone(), request.limits.bytes);
        let files = disk::run(Blocking::Pool, move || digests(&into, &found.files, &shown, limit)).await?;
        Ok(Fetched::Files { tag: Some(tag), files })
    }
}

impl ArtifactSource for RcloneSource {
    fn schemes(&self) -> &[&str] {
        &[SCHEME]
    }

    fn fetch(&self, request: FetchRequest, progress: ProgressSink) -> BoxFuture<'_, Result<Fetched, Failure>> {
        self.get(request, progress).boxed()
    }
}

/// Changes with any file.
fn tag(files: &[Listed]) -> String {
    let mut digest = Sha256::new();
    for file in files {
        digest.update(format!("{}\0{}\0{}\n", file.path, file.size, file.mod_time));
    }
    disk::hex(&digest.finalize())
}

/// What is at `remote`.
async fn find(running: &Running, remote: &Remote, asked: &Asked) -> Result<Found, Trouble> {
    let options = json!({ "recurse": true, "filesOnly": true });
    let input = json!({ "fs": remote.whole(), "remote": "", "opt": options });
    let nothing = || asked.refused(&Refusal::Missing, "that nothing is there");
    match running.address.call("operations/list", &input).await {
        Ok(answer) => {
            let mut files: Vec<Listed> = serde_json::from_value(answer["list"].clone())
                .map_err(|error| bad(format!("{}: rclone's listing is not understood: {error}", asked.shown)))?;
            files.retain(|file| !file.is_dir);
            files.sort_by(|a, b| a.path.cmp(&b.path));
            if files.is_empty() { Err(nothing()) } else { Ok(Found { files, single: false }) }
        }
        // It says the same of a file and of an object that it may not look at; which of them, the folder tells.
        Err(CallError::Failed(said)) if said.contains("is a file") => {
            let (fs, name) = remote.parent();
            let input = json!({ "fs": fs, "remote": name });
            let mut answer = ask(running, asked, remote, "operations/stat", &input).await?;
            let item: Option<Listed> = serde_json::from_value(answer["item"].take())
                .map_err(|error| bad(format!("{}: rclone's answer is not understood: {error}", asked.shown)))?;
            let file = item.filter(|item| !item.is_dir).ok_or_else(nothing)?;
            Ok(Found { files: vec![Listed { path: remote.file().to_owned(), ..file }], single: true })
        }
        Err(error) => Err(trouble(asked, remote, error)),
    }
}

async fn ask(running: &Running, asked: &Asked, remote: &Remote, method: &str, input: &Value) -> Result<Value, Trouble> {
    running.address.call(method, input).await.map_err(|error| trouble(asked, remote, error))
}

/// What rclone said, in the words of the agent.
fn trouble(asked: &Asked, remote: &Remote, error: CallError) -> Trouble {
    let said = match error {
        CallError::Gone(problem) => {
            let failure = Failure { class: FailureClass::Runtime, message: format!("{}: {problem}", asked.shown) };
            return Trouble { failure, cure: Cure::Time };
        }
        CallError::Failed(said) => said,
    };
    let has = |words: &[&str]| words.iter().any(|word| said.contains(word));
    if has(&["didn't find section in config file"]) {
        return bad(format!(
            "rclone knows no remote {}; name its configuration in agent.rclone_config, or a secret for it in secretName",
            remote.name
        ))
        .into();
    }
    if has(&["didn't find backend"]) {
        return bad(format!("{}: rclone knows no store of that type: {said}; correct type in the secret", asked.shown))
            .into();
    }
    let refusal = if has(&[
        "StatusCode: 403",
        "status code: 403",
        "StatusCode: 401",
        "AccessDenied",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "Forbidden",
        "Unauthorized",
        "nauthenticated",
        "invalid_grant",
        "oauth",
        "AuthenticationFailed",
    ]) {
        Refusal::Forbidden
    } else if has(&["NoSuchBucket", "bucket does not exist", "ContainerNotFound"]) {
        Refusal::NoBucket
    } else if has(&["not found", "NoSuchKey", "404"]) {
        Refusal::Missing
    } else if has(&["no such host", "connection refused", "dial tcp", "i/o timeout"]) {
        Refusal::Unreachable
    } else if has(&["unexpected EOF", "connection reset", "corrupted on transfer"]) {
        Refusal::Busy
    } else {
        Refusal::Other
    };
    asked.refused(&refusal, &said)
}

/// The digests of what was copied, once all of it is there.
fn digests(into: &Path, files: &[Listed], shown: &str, limit: u64) -> Result<Vec<FetchedFile>, Trouble> {
    let mut all = 0_u64;
    let mut fetched = Vec::with_capacity(files.len());
    for listed in files {
        let path = below(into, &listed.path)?;
        let missing = |why: &str| Trouble {
            failure: bad(format!("{} of {shown} was not copied whole: {why}; it is tried again", listed.path)),
            cure: Cure::Time,
        };
        let mut file = std::fs::File::open(&path).map_err(|error| missing(&error.to_string()))?;
        let mut digest = Sha256::new();
        let bytes = std::io::copy(&mut file, &mut digest).map_err(|error| missing(&error.to_string()))?;
        // Some stores don't say how large a file is.
        if u64::try_from(listed.size).is_ok_and(|size| size != bytes) {
            return Err(missing(&format!("it has {bytes} bytes, and {} were announced", listed.size)));
        }
        all = all.saturating_add(bytes);
        if all > limit {
            return Err(bad(format!("{shown} is larger than the limit of {limit} bytes")).into());
        }
        fetched.push(FetchedFile { path: listed.path.clone(), bytes, sha256: disk::hex(&digest.finalize()) });
    }
    Ok(fetched)
}
