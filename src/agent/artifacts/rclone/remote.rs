//! What rclone is asked for: a remote of its configuration, or one that a secret describes. Nothing here runs
//! anything.

use serde_json::{Map, Value, json};

use super::super::uri::{bad, redacted};
use crate::domain::{
    copy::{Failure, FailureClass},
    secret::Credentials,
};

/// A path at a remote.
pub(super) struct Remote {
    /// Its name, as the URI has it.
    pub(super) name: String,
    /// Without slashes at its end.
    pub(super) path: String,
    described: Option<Map<String, Value>>,
}

impl Remote {
    /// What `uri` names, with what `credentials` say of it. `inline` ones come with the model, from anybody who may
    /// submit one, and may not name programs to run.
    pub(super) fn parse(uri: &str, credentials: Option<&Credentials>, inline: bool) -> Result<Self, Failure> {
        let (name, path) = match uri.split_once("://") {
            Some((name, path)) => (name, path),
            None => uri.split_once(':').unwrap_or((uri, "")),
        };
        let described = credentials.map(|credentials| describe(name, credentials, inline)).transpose()?;
        let path = if path.len() > 1 { path.trim_end_matches('/') } else { path };
        if name.is_empty() || path.is_empty() {
            return Err(bad(format!("{} names no path at a remote; it is written REMOTE:PATH", redacted(uri))));
        }
        Ok(Self { name: name.to_owned(), path: path.to_owned(), described })
    }

    /// The path itself, as rclone wants a file system.
    pub(super) fn whole(&self) -> Value {
        self.at(&self.path)
    }

    /// The folder that the path is in, and its name there.
    pub(super) fn parent(&self) -> (Value, &str) {
        match self.path.rsplit_once('/') {
            Some(("", name)) => (self.at("/"), name),
            Some((parent, name)) => (self.at(parent), name),
            None => (self.at(""), &self.path),
        }
    }

    /// The name of the file that the path may be.
    pub(super) fn file(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    fn at(&self, path: &str) -> Value {
        match &self.described {
            None => json!(format!("{}:{path}", self.name)),
            Some(described) => {
                let mut fs = described.clone();
                fs.insert("_root".to_owned(), json!(path));
                Value::Object(fs)
            }
        }
    }
}

fn describe(remote: &str, credentials: &Credentials, inline: bool) -> Result<Map<String, Value>, Failure> {
    let refused = |message: String| Failure { class: FailureClass::Authorisation, message };
    let kind = credentials.kind.clone().unwrap_or_else(|| kind_of(remote));
    // A secret for one remote must not be used for another because a URI says so.
    if let Some(named) =
        credentials.remote.as_ref().filter(|named| **named != remote && remote != kind && kind_of(remote) != kind)
    {
        return Err(refused(format!(
            "{} is for the remote {named}, and the URI names {remote}; make them the same",
            credentials.name
        )));
    }
    let mut fs = Map::new();
    for (name, value) in &credentials.parameters {
        let runs = name == "ssh" || name.ends_with("command") || name.contains('.');
        if name.starts_with('_') || (inline && runs) {
            return Err(refused(format!("{} may not set {name}; take it out", credentials.name)));
        }
        fs.insert(name.clone(), json!(value.expose()));
    }
    fs.insert("type".to_owned(), json!(kind));
    Ok(fs)
}

/// The kind of store that a scheme stands for, in rclone's words.
fn kind_of(remote: &str) -> String {
    match remote {
        "s3a" | "s3n" | "minio" => "s3",
        "gs" | "gcs" => "google cloud storage",
        "az" | "azure" | "abfs" | "wasb" => "azureblob",
        "http" | "https" => "http",
        other => other,
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::domain::secret::Secret;

    fn secret(kind: &str, remote: &str, parameters: &[(&str, &str)]) -> Credentials {
        let parameters: BTreeMap<_, _> =
            parameters.iter().map(|(name, value)| ((*name).to_owned(), Secret::new(*value))).collect();
        Credentials {
            name: "secret \"s\"".to_owned(),
            remote: Some(remote.to_owned()),
            kind: Some(kind.to_owned()),
            parameters,
        }
    }

    #[test]
    fn remotes_of_the_configuration_are_named() {
        let remote = Remote::parse("dropbox:models/iris/", None, false).expect("a remote");
        assert_eq!(remote.whole(), json!("dropbox:models/iris"));
        assert_eq!(remote.parent(), (json!("dropbox:models"), "iris"));
        let rooted = Remote::parse("sftp:/m", None, false).expect("a remote");
        assert_eq!((rooted.whole(), rooted.parent()), (json!("sftp:/m"), (json!("sftp:/"), "m")));
        let seldon = Remote::parse("minio-a://bucket/x", None, false).expect("a remote");
        assert_eq!(seldon.whole(), json!("minio-a:bucket/x"));
        assert!(Remote::parse("dropbox:", None, false).is_err());
    }

    #[test]
    fn a_secret_describes_its_remote() {
        let minio = secret("s3", "minio", &[("access_key_id", "a")]);
        let remote = Remote::parse("minio://b/k", Some(&minio), false).expect("a remote");
        assert_eq!(remote.whole(), json!({"type": "s3", "access_key_id": "a", "_root": "b/k"}));
        assert!(Remote::parse("s3://b/k", Some(&minio), false).is_ok());
        let other = Remote::parse("dropbox:b/k", Some(&minio), false).err().expect("another remote");
        assert!(other.message.contains("is for the remote minio"), "{other:?}");
    }

    #[test]
    fn what_comes_with_a_model_runs_no_programs() {
        for name in ["ssh", "bearer_token_command", "override.x", "_name"] {
            let sftp = secret("sftp", "sftp", &[(name, "/bin/evil")]);
            assert!(Remote::parse("sftp:b", Some(&sftp), true).is_err(), "{name}");
        }
        assert!(Remote::parse("sftp:b", Some(&secret("sftp", "sftp", &[("ssh", "ssh h")])), false).is_ok());
    }
}
