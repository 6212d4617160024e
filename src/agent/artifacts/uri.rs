//! URIs of artifacts, as text that can be trusted.
//!
//! The rule of this module: no part of a URI becomes a path before it was looked at, and no credentials in a
//! URI reach a message.

use crate::{
    agent::options::RcloneUse,
    domain::copy::{Failure, FailureClass},
};

/// A failure of class `artifact`.
pub(super) fn bad(message: impl Into<String>) -> Failure {
    Failure { class: FailureClass::Artifact, message: message.into() }
}

/// An artifact's URI, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Uri {
    /// In lower case; empty for a plain path and for a remote.
    pub(crate) scheme: String,
    /// The remote of `REMOTE:PATH`, as rclone has it.
    pub(crate) remote: Option<String>,
    /// Without the fragment.
    pub(crate) address: String,
    /// The SHA-256 digest that the one file must have, in lower-case hex.
    pub(crate) pinned: Option<String>,
}

impl Uri {
    /// Takes `text` apart. The only fragment that means something is `#sha256=`, which pins a single file.
    ///
    /// # Errors
    /// When the pinned digest is not one, or a part of the path is `..`.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        let text = text.trim();
        if text.is_empty() {
            return Err(bad("the storage URI is empty; give the path or URL of the artifact"));
        }
        if text.chars().any(char::is_control) {
            return Err(bad(format!("the storage URI {} has control characters in it", redacted(text))));
        }
        if describes(text) {
            return Err(bad(
                "the storage URI describes a remote, which can have credentials in it, so it is not repeated here; put \
                 the description into a secret, name that in secretName, and write REMOTE:PATH",
            ));
        }
        let (address, pinned) = match text.rsplit_once("#sha256=") {
            None => (text, None),
            Some((address, digest)) if digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit()) => {
                (address, Some(digest.to_ascii_lowercase()))
            }
            Some(_) => {
                return Err(bad(format!("the digest in {} is not one; #sha256= takes 64 hex digits", redacted(text))));
            }
        };
        let scheme = split(address).map_or_else(String::new, |(scheme, _)| scheme.to_ascii_lowercase());
        let path = address.split(['?', '#']).next().unwrap_or_default();
        if path.split(['/', '\\']).any(|part| decode(part).as_deref() == Some("..")) {
            return Err(bad(format!("the storage URI {} has a '..' in it; give the path itself", redacted(text))));
        }
        let remote = remote(address).filter(|_| scheme.is_empty()).map(ToOwned::to_owned);
        Ok(Self { scheme, remote, address: address.to_owned(), pinned })
    }
}

/// The scheme of `uri`, as it is written, and what comes after it.
pub(super) fn split(uri: &str) -> Option<(&str, &str)> {
    let sound = |scheme: &str| scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    uri.split_once("://").filter(|(scheme, _)| !scheme.is_empty() && sound(scheme))
}

/// Whether `uri` says how a remote is to be opened, as rclone's command line lets one: `:sftp,pass=...:PATH`,
/// `box,token=...:PATH`. A path may begin with a slash and then go on as it likes.
fn describes(uri: &str) -> bool {
    let Some((before, _)) = uri.split_once(':') else { return false };
    let option = |text: &str| text.split_once('=').is_some_and(|(name, _)| !name.is_empty());
    before.is_empty() || (!before.starts_with('/') && before.split(',').skip(1).any(option))
}

/// The name in front of the first colon, if it can be a remote's. One letter alone is another system's disk.
fn remote(address: &str) -> Option<&str> {
    let (name, rest) = address.split_once(':')?;
    let sound = |c: char| c.is_ascii_alphanumeric() || "_.+@- ".contains(c);
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    (name.len() > 1 && begins && name.chars().all(sound) && !rest.starts_with("//")).then_some(name)
}

/// What an artifact is fetched through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Through {
    /// The agent itself, by this scheme.
    Agent,
    /// rclone.
    Rclone,
}

impl Uri {
    /// What fetches it. `known` says whether the agent itself reads its scheme, `inline` whether the model brings
    /// an rclone configuration.
    ///
    /// # Errors
    /// When only rclone could, and it may not.
    pub(super) fn through(&self, known: bool, inline: bool, rclone: RcloneUse) -> Result<Through, Failure> {
        let here = self.remote.is_none() && matches!(self.scheme.as_str(), "" | "file");
        let own = here || matches!(self.scheme.as_str(), "http" | "https" | "hf");
        let wanted = inline && !here || self.remote.is_some() || !known;
        match rclone {
            RcloneUse::Always if wanted || !own => Ok(Through::Rclone),
            RcloneUse::Fallback if wanted => Ok(Through::Rclone),
            RcloneUse::Never if inline && !here => Err(bad(format!(
                "the model brings an rclone configuration for {}, and this agent's agent.rclone is never; name a secret \
                 instead, or let it be fallback",
                redacted(&self.address)
            ))),
            RcloneUse::Always | RcloneUse::Fallback | RcloneUse::Never => Ok(Through::Agent),
        }
    }
}

/// `part` with its percent escapes undone; `None` when that gives no text.
pub(super) fn decode(part: &str) -> Option<String> {
    let mut bytes = part.bytes();
    let mut decoded = Vec::with_capacity(part.len());
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let mut digit = || char::from(bytes.next()?).to_digit(16);
            let value = digit()? * 16 + digit()?;
            decoded.push(u8::try_from(value).ok()?);
        } else {
            decoded.push(byte);
        }
    }
    String::from_utf8(decoded).ok()
}

/// `name` if it can be the name of a file in a folder.
pub(super) fn file_name(name: &str) -> Option<&str> {
    const LONGEST: usize = 255;
    let bad = name.is_empty()
        || name.len() > LONGEST
        || matches!(name, "." | "..")
        || name.contains(['/', '\\'])
        || name.chars().any(char::is_control);
    (!bad).then_some(name)
}

/// A URI for people: without user, password, query and fragment, which may carry secrets.
pub(crate) fn redacted(uri: &str) -> String {
    const SHOWN: usize = 200;
    let plain = match split(uri) {
        _ if describes(uri) => "the description of a remote".to_owned(),
        None => uri.split('?').next().unwrap_or_default().to_owned(),
        Some((scheme, rest)) => {
            let rest = rest.split(['?', '#']).next().unwrap_or_default();
            // A user and a password; for some, what a part of the store is called.
            let named = matches!(scheme, "hf" | "abfs" | "abfss" | "wasb" | "wasbs");
            let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            // A password with a slash in it ends the host too early.
            let odd = |port: &str| !port.bytes().all(|b| b.is_ascii_digit());
            let cut = host.split_once(':').filter(|(host, port)| !host.starts_with('[') && odd(port));
            match (host.rsplit_once('@'), cut) {
                _ if named => format!("{scheme}://{rest}"),
                (Some((_, host)), _) => format!("{scheme}://{host}{path}"),
                (None, Some((user, _))) => {
                    format!("{scheme}://{}", rest.rsplit_once('@').map_or(user, |(_, rest)| rest))
                }
                (None, None) => format!("{scheme}://{rest}"),
            }
        }
    };
    match plain.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &plain[..end]),
        None => plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemes_paths_and_pins_are_told_apart() {
        let uri = |text| Uri::parse(text).expect("valid");
        assert_eq!((uri("/a/b").scheme.as_str(), uri("/a/b").address.as_str()), ("", "/a/b"));
        assert_eq!(uri("file:///a").scheme, "file");
        assert_eq!(uri("GS://bucket/a").scheme, "gs");
        assert_eq!(uri("dropbox:models/a").remote.as_deref(), Some("dropbox"));
        for path in ["/a:b", "s3://a:b", "a/b:c", "c:\\models", "/a,b=c:d", "a,b:c"] {
            assert_eq!(uri(path).remote, None, "{path}");
        }
        let digest = "AB".repeat(32);
        let pinned = uri(&format!("https://h/m.onnx#sha256={digest}"));
        assert_eq!(pinned.address, "https://h/m.onnx");
        assert_eq!(pinned.pinned, Some(digest.to_ascii_lowercase()));
    }

    #[test]
    fn what_leaves_a_folder_is_refused() {
        for bad in
            ["", " ", "/a/../b", "file:///a/%2e%2E/b", "../x", "http://h/..", "/a\nb", "/m#sha256=xyz", "a\\..\\b"]
        {
            assert!(Uri::parse(bad).is_err(), "{bad:?}");
        }
        for good in ["/a/..b/c", "/a...b", "http://h/a?x=../y"] {
            assert!(Uri::parse(good).is_ok(), "{good:?}");
        }
        for name in ["", ".", "..", "a/b", "a\\b", "\0", &"x".repeat(256)] {
            assert!(file_name(name).is_none(), "{name:?}");
        }
    }

    #[test]
    fn rclone_fetches_what_it_is_told_to() {
        let through =
            |text: &str, known, inline, rclone| Uri::parse(text).expect("valid").through(known, inline, rclone);
        let (always, fallback, never) = (RcloneUse::Always, RcloneUse::Fallback, RcloneUse::Never);
        for (uri, known, inline, wanted) in [
            ("/a", true, false, [false, false, false]),
            ("https://h/a", true, false, [false, false, false]),
            ("s3://b/a", true, false, [true, false, false]),
            ("dropbox:a", false, false, [true, true, false]),
            ("minio://b/a", false, false, [true, true, false]),
        ] {
            let got =
                [always, fallback, never].map(|rclone| through(uri, known, inline, rclone) == Ok(Through::Rclone));
            assert_eq!(got, wanted, "{uri}");
        }
        assert_eq!(through("gs://b/a", true, true, fallback), Ok(Through::Rclone));
        assert!(through("gs://b/a", true, true, never).is_err());
    }

    #[test]
    fn secrets_are_not_shown() {
        assert_eq!(redacted("https://me:pw@h:1/a/b?token=t#f"), "https://h:1/a/b");
        assert_eq!(redacted("https://me:p/w@h:1/a?token=t"), "https://h:1/a");
        assert_eq!(redacted("https://me:p?w@h/a"), "https://me");
        assert_eq!(redacted("https://[::1]:1/a@b"), "https://[::1]:1/a@b");
        assert_eq!(redacted("s3://b/a@b"), "s3://b/a@b");
        assert_eq!(redacted("/plain/path"), "/plain/path");
    }

    #[test]
    fn what_describes_a_remote_is_refused_and_not_repeated() {
        for uri in
            [":sftp,pass=hunter22:/y", "box,token=hunter22:a", "s3,secret_access_key=hunter22://b/k", ":hunter22"]
        {
            let failure = Uri::parse(uri).expect_err(uri);
            assert!(!failure.message.contains("hunter22") && failure.message.contains("secretName"), "{failure:?}");
            assert!(!redacted(uri).contains("hunter22"), "{uri}");
        }
    }
}
