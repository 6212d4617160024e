//! Problems of a configuration: where it stands, what is wrong, and the fix.

use std::fmt;

use thiserror::Error;

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where it stands: `file:line`, a variable of the environment, the command line.
    pub place: String,
    /// Which value: `section.key`. Empty when the place says it all.
    pub key: String,
    /// What came, what is allowed, and the fix where there is one.
    pub problem: String,
}

impl Problem {
    pub(super) fn new(key: &str, problem: String) -> Self {
        Self { place: String::new(), key: key.to_owned(), problem }
    }

    pub(super) fn at(self, place: String) -> Self {
        Self { place, ..self }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.place)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.problem)
    }
}

/// Everything that is wrong with a configuration, one problem to a line.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct Problems(pub Vec<Problem>);

/// The line, from 1, of a byte of a text.
pub(super) fn line_of(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().get(..offset).unwrap_or(text.as_bytes());
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

/// What was most likely meant by `name`, if anything was.
pub(super) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    const CLOSE: f64 = 0.8;
    let mut best = None;
    for candidate in known {
        let score = strsim::jaro_winkler(&name.to_ascii_lowercase().replace('-', "_"), candidate);
        if score > best.map_or(CLOSE, |(score, _)| score) {
            best = Some((score, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}
