//! Triton in explicit model control mode: one folder for each copy, with the chosen version of the artifact as its
//! version 1.
//!
//! The rules of this module: of a configuration that an artifact brings the name is changed and nothing else; an
//! unload is over when the index says so, since Triton answers before it has begun; whether a copy is ready is asked
//! of the copy, as the server says that it is not ready whenever any model loads.

use std::{collections::BTreeMap, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use http::{Method, StatusCode};
use serde::Deserialize;
use tokio::time::sleep;

use super::{
    Indexed, Kind, Layout, Listing, Runtime, Wanted, bad,
    oip::indexed,
    pbtxt,
    repository::{Answer, Repository, Row, load_failure, runtime},
    select::{self, Folder},
};
use crate::domain::{
    copy::{Failure, FailureClass},
    memory::{Bytes, Resources},
};

/// The file that configures a model.
const CONFIG: &str = "config.pbtxt";

/// Files that tell which backend a model is for, where no configuration does.
const BACKENDS: [(&str, &str); 8] = [
    ("model.py", "backend: \"python\""),
    ("model.onnx", "backend: \"onnxruntime\""),
    ("model.pt", "backend: \"pytorch\""),
    ("model.plan", "platform: \"tensorrt_plan\""),
    ("model.xml", "backend: \"openvino\""),
    ("model.savedmodel", "platform: \"tensorflow_savedmodel\""),
    ("model.graphdef", "platform: \"tensorflow_graphdef\""),
    ("model.json", "backend: \"vllm\""),
];

/// The adapter.
#[derive(Debug)]
pub(super) struct Triton {
    repository: Repository,
}

#[derive(Deserialize)]
struct Statistics {
    #[serde(default)]
    model_stats: Vec<ModelStatistics>,
}

#[derive(Deserialize)]
struct ModelStatistics {
    #[serde(default)]
    memory_usage: Vec<MemoryUsage>,
}

#[derive(Deserialize)]
struct MemoryUsage {
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    id: i64,
    #[serde(default)]
    byte_size: u64,
}

impl Triton {
    pub(super) fn new(repository: Repository) -> Self {
        Self { repository }
    }

    async fn gone(&self, served: &str) -> Result<bool, Failure> {
        let rows = self.repository.rows().await?;
        Ok(!rows.iter().any(|row| row.name == served && Row::takes_memory(row)))
    }
}

impl Runtime for Triton {
    fn kind(&self) -> Kind {
        Kind::Triton
    }

    fn reads(&self, path: &str) -> bool {
        path.rsplit('/').next() == Some(CONFIG)
    }

    fn layout(&self, artifact: &Listing, wanted: &Wanted<'_>) -> Result<Layout, Failure> {
        let folder = select::version_folder(artifact.paths(), wanted.spec.artifact_version)?;
        let (config_path, version) = match &folder {
            Some(folder) => (beside(&folder.path, CONFIG), folder.files.clone()),
            None => (CONFIG.to_owned(), artifact.paths().map(|path| (path, path)).collect()),
        };
        let brought = artifact.files.contains(&config_path).then(|| artifact.text(&config_path)).transpose()?;
        let (config, instances) = match brought {
            Some(text) => named(text, wanted.served)
                .map_err(|problem| bad(format!("{config_path} is no configuration that Triton reads: {problem}")))?,
            None => (made(version.keys().copied(), wanted.served), None),
        };
        let mut links = BTreeMap::new();
        for (to, from) in &version {
            if folder.is_some() || *to != CONFIG {
                links.insert(format!("1/{to}"), (*from).to_owned());
            }
        }
        for (to, from) in siblings(artifact, folder.as_ref(), &config) {
            links.insert(to.to_owned(), from.to_owned());
        }
        if links.is_empty() {
            return Err(bad(format!("the artifact holds {CONFIG} and no model")));
        }
        Ok(Layout { links, written: BTreeMap::from([(CONFIG.to_owned(), config.into_bytes())]), instances })
    }

    fn load<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        async move {
            let answer = self.repository.load_well(served).await?;
            if answer.status.is_success() { Ok(()) } else { Err(refused(&answer)) }
        }
        .boxed()
    }

    fn unload<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        // Somebody may wait for the memory.
        const LONGEST: Duration = Duration::from_millis(50);
        async move {
            self.repository.unload(served).await?;
            let mut pause = Duration::from_millis(5);
            while !self.gone(served).await? {
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST);
            }
            Ok(())
        }
        .boxed()
    }

    fn ready<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<bool, Failure>> {
        self.repository.ready(served).boxed()
    }

    fn index(&self) -> BoxFuture<'_, Result<Vec<Indexed>, Failure>> {
        async move { Ok(indexed(self.repository.rows().await?)) }.boxed()
    }

    fn memory<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<Option<Resources>, Failure>> {
        async move {
            let answer = self.repository.ask(Method::GET, format!("/v2/models/{served}/stats"), "").await?;
            if !answer.status.is_success() {
                let status = answer.status;
                return Err(runtime(format!("Triton gave no statistics ({status}): {}", answer.text())));
            }
            used(&answer.body)
        }
        .boxed()
    }

    /// Over REST, requests on connections that are open already were seen to wait for a load.
    fn loads_block(&self) -> bool {
        true
    }
}

/// What a refused load means. Of what is wrong with a model's files Triton says that its poll failed.
fn refused(answer: &Answer) -> Failure {
    let failure = load_failure(answer);
    let poll = answer.status == StatusCode::INTERNAL_SERVER_ERROR && answer.text().contains("failed to poll");
    if poll && failure.class == FailureClass::Runtime {
        return Failure { class: FailureClass::Artifact, ..failure };
    }
    failure
}

/// `file` in the folder that holds `folder`.
fn beside(folder: &str, file: &str) -> String {
    match folder.rsplit_once('/') {
        Some((parent, _)) => format!("{parent}/{file}"),
        None => file.to_owned(),
    }
}

/// Files that lie beside the version folder; of an artifact without one, those that its configuration names, as it
/// may mean either place.
fn siblings<'a>(listing: &'a Listing, folder: Option<&Folder<'_>>, config: &str) -> Vec<(&'a str, &'a str)> {
    let parent = folder.map_or_else(String::new, |folder| beside(&folder.path, ""));
    let beside = listing.paths().filter_map(|path| Some((path.strip_prefix(&parent)?, path)));
    let beside = beside.filter(|(name, _)| !name.contains('/') && *name != CONFIG);
    beside.filter(|(name, _)| folder.is_some() || config.contains(name)).collect()
}

/// A configuration that carries the copy's name, and how many instances it asks for.
fn named(text: &str, served: &str) -> Result<(String, Option<u32>), String> {
    let mut config = pbtxt::set_string(text, "name", served)?;
    // Versions by their number: here there is one, and it is 1.
    let policy = pbtxt::fields(&config)?.into_iter().find(|field| field.name == "version_policy");
    if let Some(policy) = policy.map(|policy| policy.span)
        && config[policy.clone()].contains("specific")
    {
        config.replace_range(policy, "");
    }
    let instances = instances(&config)?;
    Ok((config, instances))
}

/// Over all instance groups; nothing when there are none.
fn instances(config: &str) -> Result<Option<u32>, String> {
    let mut sum = 0_u32;
    for group in pbtxt::fields(config)?.into_iter().filter(|field| field.name == "instance_group") {
        for message in pbtxt::messages(&config[group.value])? {
            let count = pbtxt::fields(message)?.into_iter().find(|field| field.name == "count");
            let count = count.and_then(|count| message[count.value].parse().ok()).unwrap_or(1);
            sum = sum.saturating_add(count);
        }
    }
    Ok((sum > 0).then_some(sum))
}

/// A configuration for a model that brings none: its name and its backend. The rest Triton completes by itself,
/// where the backend can.
fn made<'a>(files: impl Iterator<Item = &'a str> + Clone, served: &str) -> String {
    let has = |name: &str| files.clone().any(|file| file == name || file.starts_with(&format!("{name}/")));
    let backend = BACKENDS.iter().find(|(name, _)| has(name)).map_or("", |(_, backend)| backend);
    format!("name: \"{served}\"\n{backend}\n")
}

/// What statistics say of memory. Devices other than the CPU go by their kind and number, as in `gpu0`.
fn used(body: &[u8]) -> Result<Option<Resources>, Failure> {
    let statistics: Statistics =
        serde_json::from_slice(body).map_err(|error| runtime(format!("Triton's statistics can't be read: {error}")))?;
    let mut found: Option<Resources> = None;
    for usage in statistics.model_stats.into_iter().flat_map(|model| model.memory_usage) {
        let resources = found.get_or_insert_default();
        let kind = usage.kind.to_ascii_lowercase();
        let bytes = if matches!(kind.as_str(), "" | "cpu" | "cpu_pinned") {
            &mut resources.primary
        } else {
            resources.others.entry(format!("{kind}{}", usage.id)).or_default()
        };
        *bytes = Bytes(bytes.0.saturating_add(usage.byte_size));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::{super::tests::*, *};
    use crate::domain::spec::ModelSpec;

    fn laid_out(files: &[(&str, &str)], version: Option<u32>) -> Result<Layout, Failure> {
        let triton = Triton::new(Repository::new(nobody()));
        let spec = ModelSpec { artifact_version: version, ..ModelSpec::default() };
        triton.layout(&listing(&triton, files), &wanted(&spec))
    }

    fn config(layout: &Layout) -> &str {
        std::str::from_utf8(&layout.written[CONFIG]).expect("text")
    }

    fn linked(layout: &Layout) -> Vec<(&str, &str)> {
        layout.links.iter().map(|(to, from)| (to.as_str(), from.as_str())).collect()
    }

    #[test]
    fn the_chosen_version_is_version_1_and_what_lies_beside_it_comes_along() {
        let brought = "# mine\nname: \"iris\"\nbackend: \"python\"\ninstance_group [{count: 2}, {count: 3}]\n";
        let files =
            [(CONFIG, brought), ("labels.txt", ""), ("1/model.py", ""), ("2/model.py", ""), ("2/sub/w.bin", "")];
        let layout = laid_out(&files, None).expect("sound");
        assert_eq!(
            linked(&layout),
            [("1/model.py", "2/model.py"), ("1/sub/w.bin", "2/sub/w.bin"), ("labels.txt", "labels.txt")]
        );
        assert_eq!(config(&layout), brought.replace("\"iris\"", "\"iris_3\""));
        assert_eq!(layout.instances, Some(5));
        let first = laid_out(&files, Some(1)).expect("sound");
        assert_eq!(linked(&first), [("1/model.py", "1/model.py"), ("labels.txt", "labels.txt")]);
    }

    #[test]
    fn a_deep_version_folder_brings_the_configuration_beside_it() {
        let files = [("a/config.pbtxt", "backend: 'x'"), ("a/7/m", ""), ("a/l.txt", ""), ("other", "")];
        let layout = laid_out(&files, None).expect("sound");
        assert_eq!(linked(&layout), [("1/m", "a/7/m"), ("l.txt", "a/l.txt")]);
        assert_eq!(config(&layout), "backend: 'x'");
    }

    #[test]
    fn an_artifact_without_version_folders_is_one_version() {
        let brought = "backend: \"python\" output [{ name: \"o\" label_filename: \"labels.txt\" }]";
        let layout = laid_out(&[(CONFIG, brought), ("labels.txt", ""), ("model.py", "")], None).expect("sound");
        assert_eq!(
            linked(&layout),
            [("1/labels.txt", "labels.txt"), ("1/model.py", "model.py"), ("labels.txt", "labels.txt")]
        );
        let bare = laid_out(&[("model.onnx", "")], None).expect("sound");
        assert_eq!(config(&bare), "name: \"iris_3\"\nbackend: \"onnxruntime\"\n");
        let unknown = laid_out(&[("weights", "")], None).expect("sound");
        assert_eq!(config(&unknown), "name: \"iris_3\"\n\n");
    }

    #[test]
    fn versions_that_a_configuration_names_are_not_asked_for() {
        let brought = "name: 'x'\nversion_policy: { specific { versions: [3] } }\nmax_batch_size: 0\n";
        let layout = laid_out(&[(CONFIG, brought), ("3/model.py", "")], None).expect("sound");
        assert_eq!(config(&layout), "name: \"iris_3\"\n\nmax_batch_size: 0\n");
        let all = "version_policy: { all { } }";
        assert_eq!(config(&laid_out(&[(CONFIG, all), ("3/m", "")], None).expect("sound")), all);
    }

    #[test]
    fn what_can_t_be_loaded_is_told_before_triton_is_asked() {
        let said = |files: &[(&str, &str)], version| laid_out(files, version).expect_err("bad").message;
        assert!(said(&[(CONFIG, "name: \"x")], None).contains("line 1"));
        assert!(said(&[(CONFIG, "")], None).contains("no model"));
        assert!(said(&[("1/m", "")], Some(2)).contains("only 1"));
    }

    #[test]
    fn memory_is_what_statistics_say() {
        assert_eq!(used(br#"{"model_stats":[{"name":"m","memory_usage":[]}]}"#).expect("sound"), None);
        assert_eq!(used(br#"{"model_stats":[{"name":"m"}]}"#).expect("sound"), None);
        let body = br#"{"model_stats":[{"memory_usage":[{"type":"CPU","id":0,"byte_size":5},
            {"type":"GPU","id":1,"byte_size":7},{"type":"GPU","id":1,"byte_size":2}]}]}"#;
        let found = used(body).expect("sound").expect("some");
        assert_eq!((found.primary, found.on(Some("gpu1"))), (Bytes(5), Bytes(9)));
        assert!(used(b"<html>").is_err());
    }

    #[test]
    fn files_that_can_t_be_polled_are_the_artifact_s_fault() {
        let answer = |body: &str| Answer { status: StatusCode::INTERNAL_SERVER_ERROR, body: body.as_bytes().to_vec() };
        let class = |body| refused(&answer(body)).class;
        assert_eq!(
            class(r#"{"error":"failed to load 'm', failed to poll from model repository"}"#),
            FailureClass::Artifact
        );
        assert_eq!(class(r#"{"error":"something else"}"#), FailureClass::Runtime);
    }
}
