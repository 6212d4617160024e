//! URIs of artifacts, as text that can be trusted.
//!
//! The rule of this module: no part of a URI becomes a path before it was looked at, and no credentials in a
//! URI reach a message.

use crate::domain::copy::{Failure, FailureClass};

/// A failure of class `artifact`.
pub(super) fn bad(message: impl Into<String>) -> Failure {
    Failure { class: FailureClass::Artifact, message: message.into() }
}

/// An artifact's URI, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Uri {
    /// In lower case; empty for a plain path.
    pub(crate) scheme: String,
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
        let (address, pinned) = match text.rsplit_once("#sha256=") {
            None => (text, None),
            Some((address, digest)) if digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit()) => {
                (address, Some(digest.to_ascii_lowercase()))
            }
            Some(_) => {
                return Err(bad(format!("the digest in {} is not one; #sha256= takes 64 hex digits", redacted(text))));
            }
        };
        let scheme = match address.split_once("://") {
            Some((scheme, _)) if scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b)) => {
                scheme.to_ascii_lowercase()
            }
            _ => String::new(),
        };
        let path = address.split(['?', '#']).next().unwrap_or_default();
        if path.split(['/', '\\']).any(|part| decode(part).as_deref() == Some("..")) {
            return Err(bad(format!("the storage URI {} has a '..' in it; give the path itself", redacted(text))));
        }
        Ok(Self { scheme, address: address.to_owned(), pinned })
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
    let plain = match uri.split_once("://") {
        None => uri.to_owned(),
        Some((scheme, rest)) => {
            let rest = rest.split(['?', '#']).next().unwrap_or_default();
            let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
            format!("{scheme}://{host}{path}")
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
    fn secrets_are_not_shown() {
        assert_eq!(redacted("https://me:pw@h:1/a/b?token=t#f"), "https://h:1/a/b");
        assert_eq!(redacted("/plain/path"), "/plain/path");
    }
}
