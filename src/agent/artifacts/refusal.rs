//! What stores answer, as sentences that help.
//!
//! The rule of this module: a message says what was asked for, what the store said, with which credentials by
//! their name, and what to do; the credentials themselves, queries and signatures are never in it.

use std::error::Error;

use super::transfer::{Cure, Trouble};
use crate::domain::{
    copy::{Failure, FailureClass},
    secret::{Credentials, Secret, scrubbed},
};

/// Longest text of a store that is passed on.
const LONGEST: usize = 300;

/// Who asked for what.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    /// The URI, redacted.
    pub(super) shown: String,
    /// Which credentials were used.
    pub(super) with: With,
    /// Where the store was looked for, when its address is not in the URI.
    pub(super) at: Option<String>,
}

/// Credentials, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum With {
    /// None.
    Nothing,
    /// Those of the machine or of the process's environment, with those of them that are known here.
    Own(Vec<Secret>),
    /// A secret.
    Secret(Credentials),
}

impl With {
    /// As in "may not be read with ...".
    fn words(&self) -> String {
        match self {
            Self::Nothing => "without credentials".to_owned(),
            Self::Own(_) => "with the agent's own credentials".to_owned(),
            Self::Secret(credentials) => format!("with {}", credentials.name),
        }
    }

    const fn advice(&self) -> &'static str {
        match self {
            Self::Nothing | Self::Own(_) => "name a secret that may read it with secretName",
            Self::Secret(_) => "correct the secret, or what its owner may read",
        }
    }

    /// `text` without what must not be seen.
    pub(super) fn scrubbed(&self, text: &str) -> String {
        match self {
            Self::Nothing => text.to_owned(),
            Self::Own(values) => scrubbed(text, values.iter().map(Secret::expose)),
            Self::Secret(credentials) => credentials.scrubbed(text),
        }
    }
}

/// A store's refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// These credentials may not read it.
    Forbidden,
    /// There is no such thing.
    Missing,
    /// There is no such bucket or container.
    NoBucket,
    /// It changed while it was read.
    Changed,
    /// It has not the part that was asked for.
    Shorter,
    /// Nobody answered.
    Unreachable,
    /// It took too long.
    Slow,
    /// The store is busy or out of order.
    Busy,
    /// Anything else.
    Other,
}

impl Refusal {
    /// What a status means.
    pub(super) const fn of(status: u16) -> Self {
        match status {
            401 | 403 => Self::Forbidden,
            404 | 410 => Self::Missing,
            412 => Self::Changed,
            416 => Self::Shorter,
            408 | 504 => Self::Slow,
            429 | 500..=599 => Self::Busy,
            _ => Self::Other,
        }
    }
}

impl Asked {
    /// The failure that `refusal` is, with what the store `said`.
    pub(super) fn refused(&self, refusal: &Refusal, said: &str) -> Trouble {
        let (shown, words) = (&self.shown, self.with.words());
        let said = clip(&self.with.scrubbed(said));
        let at = self.at.as_ref().map_or_else(String::new, |at| format!(" at {at}"));
        let (class, cure, message) = match refusal {
            Refusal::Forbidden => (
                FailureClass::Authorisation,
                Cure::Nothing,
                format!("{shown} may not be read {words}: the store{at} answered {said}; {}", self.with.advice()),
            ),
            Refusal::Missing => (
                FailureClass::Artifact,
                Cure::Nothing,
                format!("{shown} does not exist: the store{at} answered {said}; correct storageUri, or upload it"),
            ),
            Refusal::NoBucket => (
                FailureClass::Artifact,
                Cure::Nothing,
                format!(
                    "the bucket of {shown} does not exist: the store{at} answered {said}; correct storageUri, or the \
                     store's endpoint and region"
                ),
            ),
            Refusal::Changed | Refusal::Shorter => (
                FailureClass::Artifact,
                if *refusal == Refusal::Changed { Cure::Look } else { Cure::Anew },
                format!("{shown} changed while it was fetched: the store{at} answered {said}; it is tried again"),
            ),
            Refusal::Unreachable => (
                FailureClass::Artifact,
                Cure::Time,
                format!(
                    "{shown} can't be fetched: the store{at} can't be reached, {said}; check its name and endpoint, and \
                     the network of the agent"
                ),
            ),
            Refusal::Slow => (
                FailureClass::Timeout,
                Cure::Time,
                format!("{shown} can't be fetched: the store{at} took too long, {said}; it is tried again"),
            ),
            Refusal::Busy => (
                FailureClass::Artifact,
                Cure::Time,
                format!("{shown} can't be fetched now: the store{at} answered {said}; it is tried again"),
            ),
            Refusal::Other => (
                FailureClass::Artifact,
                Cure::Nothing,
                format!("{shown} can't be fetched {words}: the store{at} answered {said}"),
            ),
        };
        Trouble { failure: Failure { class, message }, cure }
    }

    /// What an HTTP client met before there was an answer, or within it.
    pub(super) fn broken(&self, error: &reqwest::Error) -> Trouble {
        if error.is_timeout() {
            return self.refused(&Refusal::Slow, "it was silent");
        }
        // The client's own sentence has the URL in it, which may carry secrets.
        let cause = deepest(error).unwrap_or_else(|| "the connection failed".to_owned());
        if error.is_connect() {
            return self.refused(&Refusal::Unreachable, &cause);
        }
        self.cut(&cause)
    }

    /// What an object store's client met within an answer.
    pub(super) fn broke_off(&self, error: &dyn Error) -> Trouble {
        self.cut(&deepest(error).unwrap_or_else(|| "the connection failed".to_owned()))
    }

    fn cut(&self, cause: &str) -> Trouble {
        let message =
            format!("{} broke off: {}; it is gone on with at the next try", self.shown, self.with.scrubbed(cause));
        Trouble { failure: Failure { class: FailureClass::Artifact, message }, cure: Cure::Time }
    }
}

/// The last cause of `error`.
pub(super) fn deepest(error: &dyn Error) -> Option<String> {
    let mut cause = error.source()?;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    Some(cause.to_string())
}

/// What a store says in the body of an error: XML of S3, GCS and Azure, or JSON of GCS and the hub.
pub(super) fn said(body: &str) -> Option<String> {
    let tag = |name: &str| {
        let (_, rest) = body.split_once(&format!("<{name}>"))?;
        rest.split_once('<').map(|(text, _)| text.trim().replace("&quot;", "\"").replace("&amp;", "&"))
    };
    if let Some(code) = tag("Code").filter(|code| !code.is_empty()) {
        // The rest of Azure's message are a request's number and the time.
        let message = tag("Message").and_then(|text| text.lines().next().map(ToOwned::to_owned));
        return Some(
            message.filter(|text| !text.is_empty()).map_or(code.clone(), |message| format!("{code}: {message}")),
        );
    }
    let json: serde_json::Value = serde_json::from_str(body.get(body.find('{')?..)?).ok()?;
    let error = json.get("error").unwrap_or(&json);
    let text =
        error.as_str().or_else(|| error.get("message")?.as_str()).or_else(|| json.get("error_description")?.as_str());
    text.map(ToOwned::to_owned)
}

/// On one line, and not longer than people read.
fn clip(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = line.trim_end_matches(['.', ';', ':', ',']);
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn what_stores_say_is_found_in_their_bodies() {
        let s3 = "<?xml version=\"1.0\"?><Error><Code>NoSuchKey</Code><Message>The specified key does not exist.</Message></Error>";
        assert_eq!(said(s3).as_deref(), Some("NoSuchKey: The specified key does not exist."));
        let azure = "<Error><Code>AuthenticationFailed</Code><Message>Server failed.\nRequestId:1</Message></Error>";
        assert_eq!(said(azure).as_deref(), Some("AuthenticationFailed: Server failed."));
        assert_eq!(said("{\"error\":{\"code\":403,\"message\":\"no\"}}").as_deref(), Some("no"));
        assert_eq!(said("{\"error\":\"Repository not found\"}").as_deref(), Some("Repository not found"));
        assert_eq!(said("<html>"), None);
        assert_eq!(said("{"), None);
    }

    #[test]
    fn a_refusal_names_the_credentials_and_shows_none() {
        let parameters = BTreeMap::from([("secret_access_key".to_owned(), Secret::new("hunter22"))]);
        let credentials = Credentials { name: "secret \"minio\"".to_owned(), remote: None, kind: None, parameters };
        let asked = Asked { shown: "s3://b/k".to_owned(), with: With::Secret(credentials), at: None };
        let trouble = asked.refused(&Refusal::Forbidden, "403 Forbidden, hunter22 is wrong.");
        assert_eq!(trouble.failure.class, FailureClass::Authorisation);
        assert_eq!(
            trouble.failure.message,
            "s3://b/k may not be read with secret \"minio\": the store answered 403 Forbidden, *** is wrong; correct \
             the secret, or what its owner may read"
        );
        let asked = Asked { with: With::Own(vec![Secret::new("hunter33")]), ..asked };
        let trouble = asked.refused(&Refusal::Busy, "hunter33 is tired");
        assert!(!trouble.failure.message.contains("hunter33"), "{trouble:?}");
    }
}
