//! `MLServer`: one folder for each copy, with a `model-settings.json` that carries the copy's name.
//!
//! The rules of this module: the settings that an artifact brings are kept whole, down to keys that nobody here
//! knows; a folder has one settings file, since `MLServer` would take each further one for a model of its own.

use std::collections::BTreeMap;

use futures::{FutureExt as _, future::BoxFuture};
use http::StatusCode;
use indexmap::IndexMap;
use serde_json::{
    Value, json,
    value::{RawValue, to_raw_value},
};

use super::{
    Indexed, Kind, Layout, Listing, Runtime, Wanted, bad,
    oip::indexed,
    repository::{Answer, Repository, load_failure},
    select::{self, Folder},
};
use crate::domain::{
    copy::{Failure, FailureClass},
    memory::Resources,
    spec::{Companion, Parameter},
};

/// The file that makes a folder a model.
pub(super) const SETTINGS: &str = "model-settings.json";

/// The adapter.
#[derive(Debug)]
pub(super) struct MlServer {
    repository: Repository,
    workers: u32,
}

/// A requirement that settings can be made for: what serves it, and which file it serves.
struct Made {
    requirement: &'static str,
    implementation: &'static str,
    /// Endings of model files, best first; none when the folder itself is the model.
    endings: &'static [&'static str],
}

const MADE: [Made; 4] = [
    Made {
        requirement: "sklearn",
        implementation: "mlserver_sklearn.SKLearnModel",
        endings: &["joblib", "pickle", "pkl"],
    },
    Made { requirement: "xgboost", implementation: "mlserver_xgboost.XGBoostModel", endings: &["bst", "json", "ubj"] },
    Made { requirement: "lightgbm", implementation: "mlserver_lightgbm.LightGBMModel", endings: &["bst"] },
    Made { requirement: "mlflow", implementation: "mlserver_mlflow.MLflowRuntime", endings: &[] },
];

/// What stands in a JSON object, in its order, each value as it was written.
type Object = IndexMap<String, Box<RawValue>>;

impl MlServer {
    pub(super) fn new(repository: Repository, workers: u32) -> Self {
        Self { repository, workers }
    }

    /// In how many processes `MLServer` holds a model.
    fn instances(&self, settings: &Object) -> u32 {
        let asked = settings.get("parallel_workers").and_then(|value| value.get().parse::<i64>().ok());
        // A model may only refuse to be in workers; how many there are is the server's.
        if asked.is_some_and(|asked| asked <= 0) { 1 } else { self.workers.max(1) }
    }
}

impl Runtime for MlServer {
    fn kind(&self) -> Kind {
        Kind::MlServer
    }

    fn reads(&self, path: &str) -> bool {
        path == SETTINGS || path.ends_with("/model-settings.json")
    }

    fn layout(&self, artifact: &Listing, wanted: &Wanted<'_>) -> Result<Layout, Failure> {
        let version = wanted.spec.artifact_version;
        let brought = select::with_settings(artifact.paths(), SETTINGS, version)?;
        let (mut settings, files) = match brought {
            Some(folder) => {
                let path = folder.files.get(SETTINGS).copied().unwrap_or(SETTINGS);
                let settings = object(artifact.text(path)?, path)?;
                (settings, links(&folder))
            }
            None => {
                let files = select::plain(artifact.paths(), version)?;
                (made(files.keys().map(String::as_str), wanted)?, files)
            }
        };
        complete(&mut settings, &files, wanted)?;
        let instances = Some(self.instances(&settings));
        let text = serde_json::to_vec_pretty(&settings).map_err(|error| bad(error.to_string()))?;
        let links = files.into_iter().filter(|(to, _)| !self.reads(to)).collect();
        Ok(Layout { links, written: BTreeMap::from([(SETTINGS.to_owned(), text)]), instances })
    }

    fn load<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        async move {
            let answer = self.repository.load_well(served).await?;
            if answer.status.is_success() { Ok(()) } else { Err(refused(&answer)) }
        }
        .boxed()
    }

    fn unload<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        self.repository.unload(served).boxed()
    }

    fn ready<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<bool, Failure>> {
        self.repository.ready(served).boxed()
    }

    fn index(&self) -> BoxFuture<'_, Result<Vec<Indexed>, Failure>> {
        async move { Ok(indexed(self.repository.rows().await?)) }.boxed()
    }

    fn memory<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Option<Resources>, Failure>> {
        async { Ok(None) }.boxed()
    }

    /// Without workers a model is loaded on the thread that answers, probes included.
    fn loads_block(&self) -> bool {
        true
    }
}

/// What a refused load means. An exception of the model's own code is a 500, over REST without a word.
fn refused(answer: &Answer) -> Failure {
    let failure = load_failure(answer);
    if answer.status != StatusCode::INTERNAL_SERVER_ERROR || failure.class != FailureClass::Runtime {
        return failure;
    }
    if !answer.is_error_body() {
        return Failure {
            class: FailureClass::Artifact,
            message: "MLServer could not load it and does not say why (500); the exception is in MLServer's own log: \
                      a broken file, or a package that is missing there, as a rule"
                .to_owned(),
        };
    }
    // When its workers die, none of them has read the file.
    let class = if answer.text().contains("orker process") { FailureClass::Runtime } else { FailureClass::Artifact };
    Failure { class, ..failure }
}

fn links(folder: &Folder<'_>) -> BTreeMap<String, String> {
    folder.files.iter().map(|(to, from)| ((*to).to_owned(), (*from).to_owned())).collect()
}

fn object(text: &str, path: &str) -> Result<Object, Failure> {
    serde_json::from_str(text)
        .map_err(|error| bad(format!("{path} is not the JSON object that MLServer wants: {error}")))
}

/// A value within settings that has to be an object; none counts as an empty one.
fn inner(settings: &Object, key: &str, place: &str) -> Result<Object, Failure> {
    match settings.get(key).map(|value| value.get()) {
        None | Some("null") => Ok(Object::new()),
        Some(text) => serde_json::from_str(text)
            .map_err(|_| bad(format!("{place} in {SETTINGS} is {text:.40}, and MLServer wants an object there"))),
    }
}

fn raw(value: &Value) -> Result<Box<RawValue>, Failure> {
    to_raw_value(value).map_err(|error| bad(error.to_string()))
}

/// Settings for an artifact that brings none.
fn made<'a>(mut files: impl Iterator<Item = &'a str>, wanted: &Wanted<'_>) -> Result<Object, Failure> {
    let requirements: Vec<&str> = wanted.spec.requirements.iter().map(|one| one.trim()).collect();
    let Some(made) = MADE.iter().find(|made| requirements.contains(&made.requirement)) else {
        let can: Vec<&str> = MADE.iter().map(|made| made.requirement).collect();
        let elsewhere = files.find(|file| file.ends_with("/model-settings.json"));
        let elsewhere = elsewhere.map_or_else(String::new, |file| format!(" ({file} is in no numbered folder)"));
        return Err(bad(format!(
            "the artifact has no {SETTINGS}{elsewhere}, and Wharf makes one only for {}; put one beside the model that \
             names its \"implementation\" ({} was required)",
            can.join(", "),
            if requirements.is_empty() { "nothing".to_owned() } else { requirements.join(", ") },
        )));
    };
    let uri = if made.endings.is_empty() { ".".to_owned() } else { format!("./{}", model_file(files, made)?) };
    let mut settings = Object::new();
    settings.insert("name".to_owned(), raw(&json!(wanted.served))?);
    settings.insert("implementation".to_owned(), raw(&json!(made.implementation))?);
    settings.insert("parameters".to_owned(), raw(&json!({ "uri": uri }))?);
    Ok(settings)
}

/// The one file at the top of the folder that has to be the model.
fn model_file<'a>(files: impl Iterator<Item = &'a str>, made: &Made) -> Result<&'a str, Failure> {
    let ending =
        |file: &str| file.rsplit_once('.').and_then(|(_, end)| made.endings.iter().position(|one| *one == end));
    let mut found: Vec<&str> = files.filter(|file| !file.contains('/') && ending(file).is_some()).collect();
    found.sort_by_key(|file| (!file.starts_with("model."), ending(file)));
    let endings = || made.endings.iter().map(|ending| format!(".{ending}")).collect::<Vec<_>>().join(", ");
    match found.as_slice() {
        [one] => Ok(one),
        // The name that MLServer itself looks for.
        [first, ..] if first.starts_with("model.") => Ok(first),
        [] => Err(bad(format!(
            "the artifact has no {SETTINGS} and no file that ends in {}, which a model of {} is",
            endings(),
            made.requirement
        ))),
        several => Err(bad(format!(
            "the artifact has no {SETTINGS} and several files that could be the model: {}; call the right one model{} or \
             put a {SETTINGS} beside it",
            several.join(", "),
            several.first().and_then(|file| file.rfind('.').map(|dot| &file[dot..])).unwrap_or_default(),
        ))),
    }
}

/// Puts into settings what makes them those of this copy: its name, its version, where its files are, and what the
/// user wants passed on.
fn complete(settings: &mut Object, files: &BTreeMap<String, String>, wanted: &Wanted<'_>) -> Result<(), Failure> {
    let mut parameters = inner(settings, "parameters", "\"parameters\"")?;
    let mut extra = inner(&parameters, "extra", "\"parameters.extra\"")?;
    if let Some(companion) = &wanted.spec.companion
        && !extra.contains_key("infer_uri")
    {
        return Err(homeless(companion));
    }
    for Parameter { name, value } in &wanted.spec.parameters {
        extra.insert(name.clone(), raw(&json!(value))?);
    }
    if let Some(uri) = parameters.get("uri").and_then(|uri| serde_json::from_str::<String>(uri.get()).ok())
        && let Some(uri) = relocated(&uri, files)?
    {
        parameters.insert("uri".to_owned(), raw(&json!(uri))?);
    }
    parameters.insert("version".to_owned(), raw(&json!(wanted.version.0.to_string()))?);
    if !extra.is_empty() {
        parameters.insert("extra".to_owned(), to_raw_value(&extra).map_err(|error| bad(error.to_string()))?);
    }
    settings.insert("name".to_owned(), raw(&json!(wanted.served))?);
    settings.insert("parameters".to_owned(), to_raw_value(&parameters).map_err(|error| bad(error.to_string()))?);
    Ok(())
}

/// What `uri` has to be in the copy's folder; nothing when it is right as it is.
fn relocated(uri: &str, files: &BTreeMap<String, String>) -> Result<Option<String>, Failure> {
    let path = match uri.split_once("://") {
        None => uri,
        Some(("file", path)) => path,
        // A place that MLServer's runtime reads by itself.
        Some(_) => return Ok(None),
    };
    let parts: Vec<&str> = path.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    if parts.contains(&"..") {
        return Err(bad(format!("the uri {path:?} in {SETTINGS} leaves the artifact; put the file into it")));
    }
    let there = |path: &str| files.contains_key(path) || files.keys().any(|file| file.starts_with(&format!("{path}/")));
    if !path.starts_with('/') && (parts.is_empty() || there(&parts.join("/"))) {
        return Ok(None);
    }
    // Settings written on another machine name a path there; the file is here under the end of it.
    let ends = (0..parts.len()).map(|from| parts[from..].join("/"));
    Ok(ends.into_iter().find(|end| there(end)).map(|end| format!("./{end}")))
}

/// Why a model that refers to another one can't be served.
fn homeless(companion: &Companion) -> Failure {
    let what = match companion {
        Companion::Explainer { .. } => "an explainer",
        Companion::Llm { .. } => "a language model that stands on another model",
    };
    Failure {
        class: FailureClass::Incompatible,
        message: format!(
            "it is {what}, and an agent does not know through which gateway that one asks its model; put \
             \"infer_uri\" into parameters.extra of its {SETTINGS}: http://GATEWAY/v2/models/NAME/infer"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::*, *};
    use crate::domain::spec::{ModelSpec, Reference};

    fn mlserver(workers: u32) -> MlServer {
        MlServer::new(Repository::new(nobody()), workers)
    }

    fn laid_out(files: &[(&str, &str)], spec: &ModelSpec) -> Result<Layout, Failure> {
        let mlserver = mlserver(1);
        mlserver.layout(&listing(&mlserver, files), &wanted(spec))
    }

    fn settings(layout: &Layout) -> String {
        String::from_utf8(layout.written[SETTINGS].clone()).expect("text")
    }

    fn requiring(requirement: &str) -> ModelSpec {
        ModelSpec { requirements: vec![requirement.to_owned()], ..ModelSpec::default() }
    }

    #[test]
    fn settings_are_kept_whole_but_for_name_version_and_uri() {
        let brought = r#"{"zeta": 1.0, "name": "mine", "implementation": "m.Mine", "odd": {"b": 1e3, "a": [2, null]},
            "parameters": {"uri": "/home/me/models/iris.joblib", "format": "x", "extra": {"k": 0.10}}, "max_batch_size": 5}"#;
        let spec = ModelSpec {
            parameters: vec![Parameter { name: "k2".to_owned(), value: "v".to_owned() }],
            ..ModelSpec::default()
        };
        let layout = laid_out(&[(SETTINGS, brought), ("iris.joblib", ""), ("code/m.py", "")], &spec).expect("sound");
        let text = settings(&layout);
        let compact: String = text.split_whitespace().collect();
        assert_eq!(
            compact,
            r#"{"zeta":1.0,"name":"iris_3","implementation":"m.Mine","odd":{"b":1e3,"a":[2,null]},"parameters":{"uri":"./iris.joblib","format":"x","extra":{"k":0.10,"k2":"v"},"version":"3"},"max_batch_size":5}"#
        );
        let links: Vec<_> = layout.links.keys().map(String::as_str).collect();
        assert_eq!((links, layout.instances), (vec!["code/m.py", "iris.joblib"], Some(1)));
    }

    #[test]
    fn settings_are_made_from_the_requirement() {
        for (requirement, file, implementation, uri) in [
            ("sklearn", "iris.joblib", "mlserver_sklearn.SKLearnModel", "./iris.joblib"),
            ("sklearn", "m.pkl", "mlserver_sklearn.SKLearnModel", "./m.pkl"),
            ("xgboost", "model.json", "mlserver_xgboost.XGBoostModel", "./model.json"),
            ("lightgbm", "x.bst", "mlserver_lightgbm.LightGBMModel", "./x.bst"),
            ("mlflow", "MLmodel", "mlserver_mlflow.MLflowRuntime", "."),
        ] {
            let layout = laid_out(&[(file, ""), ("README.md", "")], &requiring(requirement)).expect(requirement);
            let made: Value = serde_json::from_str(&settings(&layout)).expect("JSON");
            assert_eq!(
                made,
                json!({"name": "iris_3", "implementation": implementation, "parameters": {"uri": uri, "version": "3"}})
            );
        }
    }

    #[test]
    fn what_can_t_be_made_is_told_with_what_to_bring() {
        let said =
            |files: &[(&str, &str)], requirement| laid_out(files, &requiring(requirement)).expect_err("bad").message;
        let text = said(&[("model.bin", "")], "huggingface");
        assert!(
            text.contains("sklearn, xgboost, lightgbm, mlflow") && text.contains("huggingface was required"),
            "{text}"
        );
        assert!(text.contains("\"implementation\""), "{text}");
        let text = said(&[("a.txt", "")], "sklearn");
        assert!(text.contains(".joblib, .pickle, .pkl"), "{text}");
        let text = said(&[("a.pkl", ""), ("b.joblib", "")], "sklearn");
        assert!(text.contains("b.joblib, a.pkl") && text.contains("model.joblib"), "{text}");
        assert!(laid_out(&[("model.pkl", ""), ("b.joblib", "")], &requiring("sklearn")).is_ok());
        assert!(said(&[(SETTINGS, "[1]")], "sklearn").contains("JSON object"));
        assert!(said(&[(SETTINGS, r#"{"parameters": 7}"#)], "sklearn").contains("\"parameters\""));
        assert!(said(&[(SETTINGS, r#"{"parameters": {"uri": "../other/m"}}"#)], "sklearn").contains("leaves"));
    }

    #[test]
    fn a_folder_has_one_settings_file_and_it_is_of_the_version_that_is_meant() {
        let files = [
            ("1/model-settings.json", r#"{"name":"one"}"#),
            ("1/m.pkl", ""),
            ("2/model-settings.json", r#"{"name":"two","x":2}"#),
            ("2/sub/model-settings.json", "{}"),
            ("2/m.pkl", ""),
        ];
        let layout = laid_out(&files, &ModelSpec::default()).expect("sound");
        assert!(settings(&layout).contains("\"x\": 2"));
        assert_eq!(layout.links, BTreeMap::from([("m.pkl".to_owned(), "2/m.pkl".to_owned())]));
        let first = ModelSpec { artifact_version: Some(1), ..ModelSpec::default() };
        assert_eq!(laid_out(&files, &first).expect("sound").links["m.pkl"], "1/m.pkl");
        // Without settings the numbered folders count as for any other server.
        let numbered = laid_out(&[("1/model.pkl", ""), ("2/model.pkl", "")], &requiring("sklearn")).expect("sound");
        assert_eq!(numbered.links["model.pkl"], "2/model.pkl");
    }

    #[test]
    fn a_uri_is_left_alone_where_it_is_right() {
        let files = BTreeMap::from([("a/b.pkl".to_owned(), String::new()), ("c.pkl".to_owned(), String::new())]);
        let of = |uri| relocated(uri, &files).expect("inside");
        for right in ["./c.pkl", "a", "a/b.pkl", ".", "s3://bucket/c.pkl", "missing.pkl", "/elsewhere/d.pkl"] {
            assert_eq!(of(right), None, "{right}");
        }
        assert_eq!(of("/mnt/x/a/b.pkl"), Some("./a/b.pkl".to_owned()));
        assert_eq!(of("file:///mnt/c.pkl"), Some("./c.pkl".to_owned()));
        assert_eq!(of("x/c.pkl"), Some("./c.pkl".to_owned()));
    }

    #[test]
    fn workers_count_unless_the_model_refuses_them() {
        let count = |text: &str| mlserver(4).instances(&object(text, SETTINGS).expect("an object"));
        assert_eq!((count("{}"), count(r#"{"parallel_workers":0}"#), count(r#"{"parallel_workers":2}"#)), (4, 1, 4));
        assert_eq!(mlserver(0).instances(&Object::new()), 1);
    }

    #[test]
    fn who_refers_to_another_model_has_to_say_where_it_is_asked() {
        let of = Reference::Model("iris".to_owned());
        let spec = ModelSpec {
            companion: Some(Companion::Explainer { kind: "anchor_tabular".to_owned(), of }),
            ..ModelSpec::default()
        };
        let failure = laid_out(&[(SETTINGS, "{}")], &spec).expect_err("no address");
        assert!(failure.class == FailureClass::Incompatible && failure.message.contains("infer_uri"));
        let said = r#"{"parameters":{"extra":{"infer_uri":"http://gateway:9000/v2/models/iris/infer"}}}"#;
        assert!(laid_out(&[(SETTINGS, said)], &spec).is_ok());
    }

    #[test]
    fn a_refusal_without_a_word_is_the_artifact_s() {
        let answer = |status, body: &str| Answer { status, body: body.as_bytes().to_vec() };
        let refused = |status, body| refused(&answer(status, body)).class;
        assert_eq!(refused(StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error"), FailureClass::Artifact);
        assert_eq!(
            refused(StatusCode::INTERNAL_SERVER_ERROR, r#"{"error":"invalid load key"}"#),
            FailureClass::Artifact
        );
        let died = r#"{"error":"Worker process stopped unexpectedly with exit code 256"}"#;
        assert_eq!(refused(StatusCode::INTERNAL_SERVER_ERROR, died), FailureClass::Runtime);
        assert_eq!(refused(StatusCode::UNPROCESSABLE_ENTITY, r#"{"error":"Invalid URI"}"#), FailureClass::Artifact);
    }
}
