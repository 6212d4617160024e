//! Where the agent finds a model's credentials, and how they are read.
//!
//! A secret is a file, or a folder of files as Kubernetes mounts it, below one folder; or a variable of the
//! environment. It is read at each fetch, so that new keys need no restart. The rule of this module: a value
//! that was read is a [`Secret`], and no message has one in it.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::Value;

use crate::domain::{
    copy::{Failure, FailureClass},
    secret::{Credentials, Secret},
};

/// What the name of a variable that is a secret begins with.
pub const SECRET_PREFIX: &str = "WHARF_SECRET_";
/// The largest secret.
const LARGEST: u64 = 1 << 20;
/// The most files of one secret.
const MOST_FILES: usize = 64;

/// Where secrets are looked for.
#[derive(Clone, Debug, Default)]
pub struct Secrets {
    folder: Option<PathBuf>,
    environment: Arc<BTreeMap<String, Secret>>,
}

impl Secrets {
    /// Secrets in `folder`, then in the variables of `environment` that begin with [`SECRET_PREFIX`].
    #[must_use]
    pub fn new(folder: Option<PathBuf>, environment: impl IntoIterator<Item = (String, String)>) -> Self {
        let ours = environment.into_iter().filter(|(name, _)| name.starts_with(SECRET_PREFIX));
        let environment = ours.map(|(name, value)| (name, Secret::new(value))).collect();
        Self { folder, environment: Arc::new(environment) }
    }

    /// The secret `name`. Reads files.
    ///
    /// # Errors
    /// When there is none, or it is none that can be read.
    pub(super) fn find(&self, name: &str) -> Result<Credentials, Failure> {
        let sound = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(sound) {
            return Err(refused(format!(
                "{name:?} can't be the name of a secret; it has letters, digits, '-', '_' and '.' in it"
            )));
        }
        let shown = format!("secret \"{name}\"");
        let variable = format!("{SECRET_PREFIX}{}", name.to_ascii_uppercase().replace(['-', '.'], "_"));
        if let Some(folder) = &self.folder {
            let path = folder.join(name);
            match read(&path) {
                Ok(files) => return parse(&shown, files),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(refused(format!("{shown} can't be read from {}: {error}", path.display())));
                }
            }
        }
        if let Some(text) = self.environment.get(&variable) {
            return parse(&shown, vec![(name.to_owned(), text.clone())]);
        }
        let looked = match &self.folder {
            Some(folder) => format!("neither {} nor the variable {variable} is there", folder.join(name).display()),
            None => format!("agent.secrets_dir is not set, and there is no variable {variable}"),
        };
        Err(refused(format!("{shown} was not found: {looked}; make one of them on the agent's machine")))
    }
}

fn refused(message: String) -> Failure {
    Failure { class: FailureClass::Authorisation, message }
}

/// The file at `path`, or the files of the folder.
fn read(path: &Path) -> io::Result<Vec<(String, Secret)>> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(vec![(String::new(), text(path)?)]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        // Kubernetes keeps what the names point to in folders that begin so.
        if name.starts_with('.') || !fs::metadata(entry.path())?.is_file() {
            continue;
        }
        if files.len() == MOST_FILES {
            return Err(io::Error::other("it has too many files"));
        }
        files.push((name, text(&entry.path())?));
    }
    if files.is_empty() {
        return Err(io::Error::other("the folder has no files"));
    }
    files.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(files)
}

fn text(path: &Path) -> io::Result<Secret> {
    if fs::metadata(path)?.len() > LARGEST {
        return Err(io::Error::other("it is too large"));
    }
    fs::read_to_string(path).map(|text| Secret::new(text.trim()))
}

/// Credentials in any of the forms that users have: one text with `type`, `name` and `parameters`, one with
/// parameters alone, a key file of Google's, an rclone configuration of one remote, or a file for each parameter.
pub(super) fn parse(shown: &str, files: Vec<(String, Secret)>) -> Result<Credentials, Failure> {
    if let [(_, text)] = files.as_slice()
        && let Some(credentials) = document(shown, text.expose())
    {
        return Ok(credentials);
    }
    let mut parameters = BTreeMap::new();
    for (name, value) in files {
        if name.is_empty() {
            return Err(refused(format!(
                "{shown} is neither JSON, nor YAML, nor an rclone configuration; write type, name and parameters"
            )));
        }
        parameters.insert(name.to_ascii_lowercase(), value);
    }
    let kind = parameters.remove("type").map(|kind| kind.expose().to_owned());
    Ok(Credentials { name: shown.to_owned(), remote: None, kind, parameters })
}

fn document(shown: &str, text: &str) -> Option<Credentials> {
    if let Some(credentials) = ini(shown, text) {
        return Some(credentials);
    }
    let value: Value = serde_saphyr::from_str(text).ok()?;
    let map = value.as_object()?;
    let plain = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        // Google's key may be written out instead of quoted.
        Value::Object(_) => Some(value.to_string()),
        Value::Null | Value::Array(_) => None,
    };
    let field = |name: &str| map.get(name).and_then(plain).filter(|text| !text.is_empty());
    if field("type").as_deref() == Some("service_account") {
        let key = BTreeMap::from([("service_account_credentials".to_owned(), Secret::new(text))]);
        let kind = Some("google cloud storage".to_owned());
        return Some(Credentials { name: shown.to_owned(), remote: None, kind, parameters: key });
    }
    let inner = match map.get("parameters") {
        Some(Value::Object(inner)) => inner,
        Some(Value::Null) | None => map,
        Some(_) => return None,
    };
    let parameters = inner
        .iter()
        .filter(|(name, _)| {
            !matches!(name.as_str(), "type" | "parameters") && (map.contains_key("parameters") || *name != "name")
        })
        .filter_map(|(name, value)| Some((name.to_ascii_lowercase(), Secret::new(plain(value)?))))
        .collect();
    Some(Credentials { name: shown.to_owned(), remote: field("name"), kind: field("type"), parameters })
}

/// The one remote of an rclone configuration.
fn ini(shown: &str, text: &str) -> Option<Credentials> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';']));
    let remote = lines.next()?.strip_prefix('[')?.strip_suffix(']')?;
    let mut parameters = BTreeMap::new();
    for line in lines {
        let (name, value) = line.split_once('=')?;
        parameters.insert(name.trim().to_ascii_lowercase(), Secret::new(value.trim()));
    }
    let kind = parameters.remove("type")?.expose().to_owned();
    Some(Credentials { name: shown.to_owned(), remote: Some(remote.to_owned()), kind: Some(kind), parameters })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Credentials {
        parse("secret \"s\"", vec![(String::new(), Secret::new(text))]).expect("a secret")
    }

    #[test]
    fn every_form_that_users_have_is_read() {
        for text in [
            r#"{"type":"s3","name":"minio","parameters":{"access_key_id":"a","secret_access_key":"b","env_auth":false}}"#,
            "type: s3\nname: minio\nparameters:\n  access_key_id: a\n  secret_access_key: b\n  env_auth: false\n",
            "[minio]\ntype = s3\naccess_key_id = a\nsecret_access_key = b\nenv_auth = false\n",
        ] {
            let secret = one(text);
            assert_eq!((secret.kind.as_deref(), secret.remote.as_deref()), (Some("s3"), Some("minio")), "{text}");
            assert_eq!(secret.get(&["secret_access_key"]), Some("b"), "{text}");
            assert_eq!(secret.flag(&["env_auth"]), Some(false), "{text}");
            assert_eq!(secret.parameters.len(), 3, "{text}");
        }
        assert_eq!(one("token: hf_x").get(&["token"]), Some("hf_x"));
        let google = one(r#"{"type":"service_account","private_key":"k"}"#);
        assert_eq!(google.kind.as_deref(), Some("google cloud storage"));
        assert!(google.get(&["service_account_credentials"]).expect("the key").contains("private_key"));
        let nested =
            one(r#"{"type":"gcs","name":"g","parameters":{"service_account_credentials":{"private_key":"k"}}}"#);
        assert_eq!(nested.get(&["service_account_credentials"]), Some(r#"{"private_key":"k"}"#));
        let failure = parse("secret \"s\"", vec![(String::new(), Secret::new("hunter2"))]).expect_err("no form");
        assert!(!failure.message.contains("hunter2"), "{failure:?}");
    }

    #[test]
    fn a_secret_is_a_file_a_folder_or_a_variable() {
        let folder = tempfile::tempdir().expect("dir");
        fs::write(folder.path().join("one"), "access_key_id: file").expect("written");
        let mounted = folder.path().join("two");
        fs::create_dir_all(mounted.join("..2026")).expect("dir");
        fs::write(mounted.join("..2026/AWS_ACCESS_KEY_ID"), "folder\n").expect("written");
        std::os::unix::fs::symlink("..2026/AWS_ACCESS_KEY_ID", mounted.join("AWS_ACCESS_KEY_ID")).expect("link");
        let environment = [("WHARF_SECRET_THREE_B".to_owned(), "access_key_id: variable".to_owned())];
        let secrets = Secrets::new(Some(folder.path().to_owned()), environment);
        let found = |name: &str| {
            secrets.find(name).expect(name).get(&["access_key_id", "aws_access_key_id"]).map(ToOwned::to_owned)
        };
        assert_eq!(found("one").as_deref(), Some("file"));
        assert_eq!(found("two").as_deref(), Some("folder"));
        assert_eq!(found("three-b").as_deref(), Some("variable"));
    }

    #[test]
    fn what_is_not_there_is_named_with_where_it_was_looked_for() {
        let failure = Secrets::default().find("minio").expect_err("none");
        assert_eq!(failure.class, FailureClass::Authorisation);
        assert!(
            failure.message.contains("secret \"minio\"") && failure.message.contains("WHARF_SECRET_MINIO"),
            "{failure:?}"
        );
        for name in ["", "..", "../x", "a/b", ".hidden", "a b"] {
            assert!(Secrets::default().find(name).is_err(), "{name:?}");
        }
    }
}
