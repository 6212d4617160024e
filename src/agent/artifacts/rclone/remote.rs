//! What rclone is asked for: a remote of its configuration, or one that a secret describes. Nothing here runs
//! anything.
//!
//! The rule of this module: what rclone makes of a description is the store that it names and nothing else. rclone
//! writes its type and the names of its parameters into a line that it reads again, so both have letters only;
//! and what comes with a model opens no file, runs no program and uses nothing of the agent's own.

use serde_json::{Map, Value, json};

use super::super::uri::{bad, redacted, split};
use crate::domain::{
    copy::{Failure, FailureClass},
    secret::Credentials,
};

/// The stores that a model may bring a configuration for: those that are spoken to over a network with what the
/// configuration itself says. What wraps another remote is none of them, nor what reads the machine's own disk.
const STORES: [&str; 16] = [
    "s3",
    "google cloud storage",
    "azureblob",
    "b2",
    "box",
    "drive",
    "dropbox",
    "ftp",
    "http",
    "koofr",
    "mega",
    "onedrive",
    "pcloud",
    "sftp",
    "swift",
    "webdav",
];
/// Parameters by which a store would be opened with what the agent or its machine has.
const OWN: [&str; 6] = ["env_auth", "use_msi", "use_az", "key_use_agent", "use_emulator", "ask_password"];
/// Ends of the names of parameters that name files, programs and sockets of the agent's machine.
const MACHINE: [&str; 5] = ["file", "path", "dir", "command", "socket"];

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
    /// submit one.
    pub(super) fn parse(uri: &str, credentials: Option<&Credentials>, inline: bool) -> Result<Self, Failure> {
        let (name, path) = split(uri).or_else(|| uri.split_once(':')).unwrap_or((uri, ""));
        let described = credentials.map(|credentials| describe(name, credentials, inline)).transpose()?;
        let path = if path.len() > 1 { path.trim_end_matches('/') } else { path };
        if name.is_empty() || path.is_empty() {
            return Err(bad(format!("{} names no path at a remote; it is written REMOTE:PATH", redacted(uri))));
        }
        // Some stores would take what follows for the name of another host.
        if path.starts_with("//") {
            return Err(bad(format!("{} has a path that begins with two slashes; give it one", redacted(uri))));
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
    let secret = &credentials.name;
    let named = credentials.kind.as_deref().map(kind_of);
    let kind = named.clone().unwrap_or_else(|| kind_of(remote));
    // A secret for one remote must not be used for another because a URI says so.
    if let Some(named) =
        credentials.remote.as_ref().filter(|named| **named != remote && remote != kind && kind_of(remote) != kind)
    {
        return Err(refused(format!(
            "{secret} is for the remote {named}, and the URI names {remote}; make them the same"
        )));
    }
    let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if kind.is_empty() || !kind.chars().all(|c| letters(c) || c == ' ') {
        return Err(refused(format!("{secret} has a type that no store has; correct it")));
    }
    // Whoever wrote a secret chose its store; whoever submits a model may choose among these.
    if (inline || named.is_none()) && !STORES.contains(&kind.as_str()) {
        let way = if inline { "put it into a secret" } else { "write the type of its store into it" };
        return Err(refused(format!("{secret} can't be for a store of type {kind}; {way}")));
    }
    let mut fs = Map::new();
    for (name, value) in &credentials.parameters {
        let known = name.chars().all(letters) && !name.starts_with('_') && !name.is_empty();
        if !known || (inline && !may_set(name, value.expose())) {
            return Err(refused(format!("{secret} may not set {name:?}; take it out")));
        }
        fs.insert(name.clone(), json!(value.expose()));
    }
    if inline && !stands_alone(&kind, credentials) {
        return Err(refused(format!(
            "{secret} has no credentials for a store of type {kind}, and the agent's own are not for it; add them, or \
             name a secret"
        )));
    }
    if inline && ["s3", "google cloud storage", "azureblob", "drive", "swift"].contains(&kind.as_str()) {
        // Whatever the environment of rclone says.
        fs.insert("env_auth".to_owned(), json!("false"));
    }
    fs.insert("type".to_owned(), json!(kind));
    Ok(fs)
}

/// Whether what comes with a model may set the parameter `name` to `value`.
fn may_set(name: &str, value: &str) -> bool {
    let off = matches!(value, "" | "false" | "0");
    let own = OWN.contains(&name) || ["msi_", "role_", "sts_"].iter().any(|begin| name.starts_with(begin));
    let machine = matches!(name, "ssh" | "remote" | "upstreams" | "profile" | "known_hosts")
        || MACHINE.iter().any(|end| name == *end || name.ends_with(&format!("_{end}")));
    (!own || off) && !machine
}

/// Whether a store of this kind is opened with what is in `credentials`. Without, rclone looks for the agent's own.
fn stands_alone(kind: &str, credentials: &Credentials) -> bool {
    match kind {
        // As rclone reads it: any other word would be no.
        "google cloud storage" => {
            credentials.get(&["anonymous"]) == Some("true")
                || credentials.get(&["service_account_credentials"]).is_some()
        }
        "sftp" => credentials.get(&["pass", "key_pem"]).is_some(),
        _ => true,
    }
}

/// The kind of store that a scheme or a type stands for, in rclone's words.
fn kind_of(remote: &str) -> String {
    match remote {
        "s3a" | "s3n" | "minio" => "s3",
        "gs" | "gcs" => "google cloud storage",
        "az" | "azure" | "abfs" | "abfss" | "wasb" | "wasbs" => "azureblob",
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

    fn brought(kind: &str, parameters: &[(&str, &str)]) -> Result<Remote, Failure> {
        Remote::parse("r:b", Some(&Credentials { remote: None, ..secret(kind, "", parameters) }), true)
    }

    #[test]
    fn what_comes_with_a_model_is_a_store_and_no_way_around_one() {
        // Their parameters are other remotes, which rclone opens as they are written.
        for kind in ["alias", "union", "combine", "chunker", "crypt", "compress", "hasher", "cache", "memory", "local"]
        {
            assert!(brought(kind, &[("remote", ":sftp,ssh='touch /evil':")]).is_err(), "{kind}");
            assert!(brought(kind, &[]).is_err(), "{kind}");
        }
        // A type or a name that is the beginning of a line of its own.
        for kind in ["sftp,ssh='touch /evil'", "sftp:", "", "S3", "s3\n", "s3,x"] {
            assert!(brought(kind, &[("pass", "x")]).is_err(), "{kind:?}");
        }
        assert!(Remote::parse("alias:b", Some(&Credentials { kind: None, ..secret("", "alias", &[]) }), true).is_err());
    }

    #[test]
    fn what_comes_with_a_model_runs_no_programs_and_reads_no_files() {
        let names = [
            "ssh",
            "bearer_token_command",
            "server_command",
            "md5sum_command",
            "override.x",
            "global.x",
            "_name",
            "a,ssh",
            "a='b',ssh",
            "",
            "key_file",
            "pubkey_file",
            "known_hosts_file",
            "service_account_file",
            "service_principal_file",
            "client_certificate_path",
            "unix_socket",
            "box_config_file",
            "remote",
            "upstreams",
            "profile",
        ];
        for name in names {
            assert!(brought("sftp", &[("pass", "x"), (name, "/bin/evil")]).is_err(), "{name}");
        }
        assert!(brought("sftp", &[("host", "h"), ("key_pem", "k, with 'quotes'")]).is_ok());
        assert!(Remote::parse("sftp:b", Some(&secret("sftp", "sftp", &[("ssh", "ssh h")])), false).is_ok());
    }

    #[test]
    fn what_comes_with_a_model_uses_nothing_of_the_agent_s_own() {
        for name in ["env_auth", "use_msi", "use_az", "key_use_agent", "msi_client_id", "role_arn"] {
            assert!(brought("s3", &[(name, "true")]).is_err(), "{name}");
        }
        let whole = brought("s3", &[("env_auth", "false"), ("endpoint", "http://evil")]).expect("as nobody").whole();
        assert_eq!(whole["env_auth"], "false");
        // rclone would look for credentials of the machine.
        assert!(brought("google cloud storage", &[("endpoint", "http://evil")]).is_err());
        assert!(brought("gcs", &[("access_token", "t")]).is_err());
        assert!(brought("gcs", &[("anonymous", "true")]).is_ok());
        assert!(brought("sftp", &[("host", "h")]).is_err());
    }

    #[test]
    fn a_secret_says_its_store_in_letters_and_a_uri_says_it_of_stores_alone() {
        for (kind, name) in [("sftp,ssh=x", "a"), ("s3", "a,b"), ("s3", "override.x"), ("s3", "_root")] {
            assert!(
                Remote::parse("r:b", Some(&Credentials { remote: None, ..secret(kind, "", &[(name, "v")]) }), false)
                    .is_err(),
                "{kind} {name}"
            );
        }
        let untyped = |uri: &str| {
            let secret = Credentials { kind: None, remote: None, ..secret("", "", &[("token", "t")]) };
            Remote::parse(uri, Some(&secret), false)
        };
        assert!(untyped("dropbox:b").is_ok());
        for uri in ["local:/etc", "alias:b", "own:b"] {
            assert!(untyped(uri).is_err(), "{uri}");
        }
        assert_eq!(untyped("sftp:,host=evil://b").expect("a path").whole()["type"], "sftp");
        assert!(untyped("dropbox:////evil/x").is_err(), "another host");
    }
}
