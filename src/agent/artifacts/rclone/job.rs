//! A copy that rclone makes, from before its start to after its end.
//!
//! The rule of this module: two copies never write into one folder. rclone knows each by a name that is made of its
//! folder and a number, so what is still going on there can be asked for and stopped, whoever began it; and a stop that
//! comes late stops no other copy.

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{
    super::{
        refusal::Asked,
        transfer::{Cure, Trouble, too_large},
    },
    ask,
    call::CallError,
    folder,
    program::{Running, number},
    remote::Remote,
    trouble,
};
use crate::{
    agent::{disk, options::Blocking},
    domain::copy::{Failure, FailureClass},
    ports::FetchLimits,
};

/// The first and the longest pause between two looks at a job.
const LOOK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// How long a job that is stopped may take to end.
const QUIET: Duration = Duration::from_secs(30);

/// The job of one folder. It is stopped when this goes, unless it ended.
pub(super) struct Job {
    running: Arc<Running>,
    /// How the names of all jobs of the folder begin.
    folder: String,
    /// What rclone knows it by.
    pub(super) group: String,
    goes_on: bool,
}

impl Drop for Job {
    fn drop(&mut self) {
        if self.goes_on {
            self.running.stop(std::mem::take(&mut self.group));
        }
    }
}

impl Job {
    /// The one of the folder `into`, which has not begun yet.
    pub(super) fn new(running: &Arc<Running>, into: &Path) -> Self {
        let folder = format!("wharf-{}-", disk::hex(&Sha256::digest(into.as_os_str().as_encoded_bytes())));
        let group = format!("{folder}{}", running.jobs.fetch_add(1, Ordering::Relaxed));
        Self { running: Arc::clone(running), folder, group, goes_on: false }
    }

    /// It is asked for now. Whether rclone heard that, nobody knows until it answers.
    pub(super) fn started(&mut self) {
        self.goes_on = true;
    }

    /// Bytes that rclone has copied so far. rclone keeps count from when it was first asked.
    pub(super) async fn bytes(&self, asked: &Asked, remote: &Remote) -> Result<u64, Trouble> {
        let stats = ask(&self.running, asked, remote, "core/stats", &json!({ "group": self.group })).await?;
        Ok(number(&stats, "bytes").unwrap_or_default())
    }

    /// Stops what still writes into the folder, and waits until it has ended.
    pub(super) async fn quiet(&self, asked: &Asked) -> Result<(), Trouble> {
        let gone = |problem: String| Trouble {
            failure: Failure { class: FailureClass::Runtime, message: format!("{}: {problem}", asked.shown) },
            cure: Cure::Time,
        };
        let waited = async {
            while let Some(group) = self.busy().await? {
                self.running.address.call("job/stopgroup", &json!({ "group": group })).await?;
                tokio::time::sleep(LOOK.0).await;
            }
            Ok(())
        };
        match tokio::time::timeout(QUIET, waited).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(CallError::Gone(problem) | CallError::Failed(problem))) => Err(gone(problem)),
            Err(_) => Err(gone(format!("an earlier download of rclone's did not stop within {} s", QUIET.as_secs()))),
        }
    }

    /// The name of a job of the folder that has not ended.
    async fn busy(&self) -> Result<Option<String>, CallError> {
        let list = self.running.address.call("job/list", &json!({})).await?;
        // Every call is a job, and those that ended stay listed for a while. Older ones don't tell them apart.
        let ids = list.get("runningIds").or_else(|| list.get("jobids"));
        for id in ids.and_then(Value::as_array).into_iter().flatten() {
            match self.running.address.call("job/status", &json!({ "jobid": id })).await {
                Ok(status) if status["finished"] != json!(true) => {
                    let group = status["group"].as_str().filter(|group| group.starts_with(&self.folder));
                    if let Some(group) = group {
                        return Ok(Some(group.to_owned()));
                    }
                }
                // One that ended is forgotten after a while.
                Ok(_) | Err(CallError::Failed(_)) => {}
                Err(gone @ CallError::Gone(_)) => return Err(gone),
            }
        }
        Ok(None)
    }

    /// Waits for the job `id`. `tell` is told of its bytes, and says whether they may be too many. Whoever sets the
    /// deadline of the fetch gives it up, and then it is stopped.
    pub(super) async fn finish(
        &mut self,
        id: u64,
        asked: &Asked,
        remote: &Remote,
        (into, limits): (&Path, FetchLimits),
        tell: impl Fn(u64) -> bool,
    ) -> Result<(), Trouble> {
        let mut pause = LOOK.0;
        loop {
            let running = Arc::clone(&self.running);
            let status: Value = ask(&running, asked, remote, "job/status", &json!({ "jobid": id })).await?;
            if tell(self.bytes(asked, remote).await?) {
                let folder = into.to_owned();
                if disk::run(Blocking::Pool, move || disk::size(&folder)).await > limits.bytes {
                    self.quiet(asked).await?;
                    self.goes_on = false;
                    let folder = into.to_owned();
                    let emptied = disk::run(Blocking::Pool, move || folder::empty(&folder)).await;
                    emptied.map_err(|error| disk::failure("the download can't be removed", into, &error))?;
                    return Err(too_large(&asked.shown, limits).into());
                }
            }
            if status["finished"] == json!(true) {
                self.goes_on = false;
                if status["success"] == json!(true) {
                    return Ok(());
                }
                let said = status["error"].as_str().unwrap_or("it does not say why").to_owned();
                return Err(trouble(asked, remote, CallError::Failed(said)));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LOOK.1);
        }
    }
}
