//! Text that must not be seen, and the credentials made of it.

use std::{collections::BTreeMap, fmt};

/// Text that never prints itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Keeps `text` from being printed.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for whoever has to send it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// What a secret says: how one store is to be spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// How people call it: `secret "minio"`.
    pub name: String,
    /// The remote that it is for, when it says so.
    pub remote: Option<String>,
    /// The kind of store, as rclone names it: `s3`, `google cloud storage`.
    pub kind: Option<String>,
    /// By name in lower case.
    pub parameters: BTreeMap<String, Secret>,
}

impl Credentials {
    /// The first of `names` that it has and that is not empty.
    #[must_use]
    pub fn get(&self, names: &[&str]) -> Option<&str> {
        names.iter().filter_map(|name| self.parameters.get(*name)).map(Secret::expose).find(|text| !text.is_empty())
    }

    /// Whether the first of `names` that it has says yes.
    #[must_use]
    pub fn flag(&self, names: &[&str]) -> Option<bool> {
        match self.get(names)?.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Some(true),
            "false" | "0" | "no" | "off" => Some(false),
            _ => None,
        }
    }

    /// `text` without any of the values in it. Stores repeat in their errors what they were sent.
    #[must_use]
    pub fn scrubbed(&self, text: &str) -> String {
        let hidden = self.parameters.iter().filter(|(name, _)| !PLAIN.contains(&name.as_str()));
        scrubbed(text, hidden.map(|(_, value)| value.expose()))
    }
}

/// `text` without any of `values` in it, but for those that are too short to be told from other words.
#[must_use]
pub fn scrubbed<'a>(text: &str, values: impl Iterator<Item = &'a str>) -> String {
    const SHORTEST: usize = 4;
    let mut values: Vec<&str> = values.filter(|value| value.len() >= SHORTEST).collect();
    // The longer first: one may be within another.
    values.sort_by_key(|value| std::cmp::Reverse(value.len()));
    values.into_iter().fold(text.to_owned(), |text, value| text.replace(value, "***"))
}

/// Parameters whose values help in an error and open nothing.
const PLAIN: [&str; 12] = [
    "region",
    "endpoint",
    "provider",
    "env_auth",
    "force_path_style",
    "location",
    "location_constraint",
    "acl",
    "bucket_acl",
    "storage_class",
    "anonymous",
    "account",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_never_printed() {
        let parameters = [("access_key_id", "AKIA1"), ("secret_access_key", "hunter22"), ("region", "eu-1")];
        let parameters = parameters.map(|(name, value)| (name.to_owned(), Secret::new(value)));
        let credentials =
            Credentials { name: "secret \"a\"".to_owned(), remote: None, kind: None, parameters: parameters.into() };
        let printed = format!("{credentials:?}");
        assert!(!printed.contains("hunter22") && !printed.contains("AKIA1"), "{printed}");
        assert_eq!(credentials.scrubbed("AKIA1 and hunter22 in eu-1"), "*** and *** in eu-1");
        assert_eq!(credentials.get(&["nothing", "region"]), Some("eu-1"));
    }
}
