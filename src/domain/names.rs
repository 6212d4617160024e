//! Names, checked once: whoever holds one of these types holds a valid name.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

use super::error::InvalidName;

/// The longest name accepted, in bytes; Kubernetes allows as much for the same kind of name.
pub const MAX_NAME: usize = 253;

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks `name` against `^[a-z0-9]([-a-z0-9]*[a-z0-9])?$` and [`MAX_NAME`].
            ///
            /// # Errors
            /// When it does not match; the error says which rule it breaks.
            pub fn new(name: &str) -> Result<Self, InvalidName> {
                check($what, name)?;
                Ok(Self(Arc::from(name)))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(name: &str) -> Result<Self, InvalidName> {
                Self::new(name)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;

            fn try_from(name: String) -> Result<Self, InvalidName> {
                Self::new(&name)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

name!(
    /// The name of a model.
    ModelName,
    "model"
);
name!(
    /// The name of a server: a pool of identical replicas.
    ServerName,
    "server"
);

/// One replica of a server. Shown as `server-index`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ReplicaId {
    /// The server it belongs to.
    pub server: ServerName,
    /// Its index within the server, from 0.
    pub index: u32,
}

impl ReplicaId {
    /// The replica `index` of `server`.
    #[must_use]
    pub const fn new(server: ServerName, index: u32) -> Self {
        Self { server, index }
    }
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.server, self.index)
    }
}

impl fmt::Debug for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

fn check(what: &'static str, name: &str) -> Result<(), InvalidName> {
    let invalid = |rule| Err(InvalidName { what, name: clip(name), rule });
    if name.is_empty() {
        return invalid("it is empty");
    }
    if name.len() > MAX_NAME {
        return invalid("it is longer than 253 bytes");
    }
    if name.bytes().any(|b| !matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-')) {
        return invalid("only lower-case letters, digits and '-' are allowed");
    }
    if name.starts_with('-') || name.ends_with('-') {
        return invalid("it starts or ends with '-'");
    }
    Ok(())
}

/// As much of an invalid name as an error message can bear.
fn clip(name: &str) -> String {
    const SHOWN: usize = 64;
    match name.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &name[..end]),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_kubernetes_accepts_are_accepted_and_no_others() {
        for good in ["a", "0", "iris", "iris-2", "a-b-c", "1a", &"x".repeat(MAX_NAME)] {
            assert!(ModelName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "../etc", "a/b", "é", "a b", "a\0", &"x".repeat(MAX_NAME + 1)] {
            assert!(ModelName::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_error_names_the_rule_and_clips_the_name() {
        let error = ModelName::new(&"Ü".repeat(300)).expect_err("too long");
        assert!(error.to_string().len() < 250, "{error}");
        assert!(error.to_string().contains("longer than 253 bytes"));
    }
}
