//! Takes a mapping's fields by name, and refuses those that nobody asked for.

use strsim::damerau_levenshtein;

use super::node::{Key, Node, Problem, Value};

/// A mapping whose fields are taken one by one. What was asked for is what is known, so
/// [`finish`](Self::finish) can name the nearest known name of one that is not.
#[derive(Debug)]
pub(crate) struct Fields {
    path: String,
    line: u64,
    left: Vec<(Key, Node)>,
    known: Vec<&'static str>,
}

impl Fields {
    /// The fields of `node`, which errors call `path`.
    pub(crate) fn of(node: Node, path: &str) -> Result<Self, Problem> {
        match node.value {
            Value::Map(left) => Ok(Self { path: path.to_owned(), line: node.line, left, known: Vec::new() }),
            other => Err(Problem::at(node.line, format!("{path}: it is {}, wanted a mapping", other.what()))),
        }
    }

    /// The line that the mapping starts on.
    pub(crate) const fn line(&self) -> u64 {
        self.line
    }

    /// A field's full name.
    pub(crate) fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// The value of `name`; one that is null is as good as absent.
    pub(crate) fn take(&mut self, name: &'static str) -> Option<Node> {
        self.known.push(name);
        let at = self.left.iter().position(|(key, _)| key.name == name)?;
        Some(self.left.remove(at).1).filter(|node| node.value != Value::Null)
    }

    /// The text of `name`.
    pub(crate) fn text(&mut self, name: &'static str) -> Result<Option<(String, u64)>, Problem> {
        let Some(node) = self.take(name) else { return Ok(None) };
        text(node, &self.path(name)).map(Some)
    }

    /// The text of `name`, which must be there.
    pub(crate) fn required_text(&mut self, name: &'static str) -> Result<(String, u64), Problem> {
        if let Some(found) = self.text(name)? {
            return Ok(found);
        }
        // A name that is nearly this one is the mistake, not that this one is missing.
        let meant = self.left.iter().find(|(key, _)| nearest(&key.name, std::iter::once(name)).is_some());
        Err(match meant {
            Some((key, _)) => {
                let text = format!("{}: no such field; did you mean {name}?", self.path(&key.name));
                Problem::at(key.line, text)
            }
            None => Problem::at(self.line, format!("{}: it is missing", self.path(name))),
        })
    }

    /// The texts in the list `name`.
    pub(crate) fn texts(&mut self, name: &'static str) -> Result<Vec<String>, Problem> {
        let path = self.path(name);
        let texts = self.list(name)?.into_iter().enumerate();
        texts.map(|(n, node)| text(node, &format!("{path}[{n}]")).map(|(text, _)| text)).collect()
    }

    /// The items of the list `name`; none when it is absent.
    pub(crate) fn list(&mut self, name: &'static str) -> Result<Vec<Node>, Problem> {
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Node { value: Value::List(items), .. }) => Ok(items),
            Some(other) => Err(self.wanted(name, &other, "a list")),
        }
    }

    /// The truth of `name`.
    pub(crate) fn flag(&mut self, name: &'static str) -> Result<Option<bool>, Problem> {
        match self.take(name) {
            None => Ok(None),
            Some(Node { value: Value::Bool(flag), .. }) => Ok(Some(flag)),
            Some(other) => Err(self.wanted(name, &other, "true or false")),
        }
    }

    /// The whole number `name`, if it is one that `T` holds.
    pub(crate) fn int<T: TryFrom<i128>>(&mut self, name: &'static str) -> Result<Option<T>, Problem> {
        match self.take(name) {
            None => Ok(None),
            Some(Node { line, value: Value::Int(number) }) => match T::try_from(number) {
                Ok(number) => Ok(Some(number)),
                Err(_) if number < 0 => Err(Problem::at(line, format!("{}: {number} is negative", self.path(name)))),
                Err(_) => Err(Problem::at(line, format!("{}: {number} is too large", self.path(name)))),
            },
            Some(other) => Err(self.wanted(name, &other, "a whole number")),
        }
    }

    /// The mapping `name`.
    pub(crate) fn child(&mut self, name: &'static str) -> Result<Option<Self>, Problem> {
        let Some(node) = self.take(name) else { return Ok(None) };
        Self::of(node, &self.path(name)).map(Some)
    }

    /// Takes `name`, whatever it is. True when it was there.
    pub(crate) fn ignore(&mut self, name: &'static str) -> bool {
        self.take(name).is_some()
    }

    /// Refuses what is left: nothing here knows it.
    pub(crate) fn finish(self) -> Result<(), Problem> {
        let Some((key, _)) = self.left.first() else { return Ok(()) };
        let nearest = nearest(&key.name, self.known.iter().copied());
        let known = || {
            let mut known = self.known.clone();
            known.sort_unstable();
            known.join(", ")
        };
        let hint =
            nearest.map_or_else(|| format!("known here are {}", known()), |name| format!("did you mean {name}?"));
        Err(Problem::at(key.line, format!("{}: no such field; {hint}", self.path(&key.name))))
    }

    fn wanted(&self, name: &str, node: &Node, wanted: &str) -> Problem {
        Problem::at(node.line, format!("{}: it is {}, wanted {wanted}", self.path(name), node.value.what()))
    }
}

/// A text node's text. A value that YAML reads as something else asks for quotes.
fn text(node: Node, path: &str) -> Result<(String, u64), Problem> {
    let what = node.value.what();
    match node.value {
        Value::Text(text) => Ok((text, node.line)),
        Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
            Err(Problem::at(node.line, format!("{path}: it is {what}, wanted text; put it in quotes")))
        }
        Value::Null | Value::List(_) | Value::Map(_) => {
            Err(Problem::at(node.line, format!("{path}: it is {what}, wanted text")))
        }
    }
}

/// The name most like `name`, if one is like enough to be meant.
pub(crate) fn nearest(name: &str, known: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    let lower = name.to_lowercase();
    known
        .map(|candidate| (damerau_levenshtein(&lower, &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= candidate.len().max(3) / 3)
        .min()
        .map(|(_, candidate)| candidate)
}
