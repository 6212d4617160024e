//! Text-format protobuf, as far as a model's configuration has to be looked into and one field of it changed.
//!
//! The rule of this module: what is not changed stays byte for byte, comments and spaces included.

use std::ops::Range;

/// A field of a message, by where it stands in the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Field<'a> {
    pub(super) name: &'a str,
    /// From the name to the end of the value.
    pub(super) span: Range<usize>,
    /// The value; of a message or a list, with its brackets.
    pub(super) value: Range<usize>,
}

/// Deepest nesting that is followed.
const DEEPEST: usize = 64;

/// The fields of the message that `text` is, those of messages within it not among them.
///
/// # Errors
/// Says what stands in which line where something else was expected.
pub(super) fn fields(text: &str) -> Result<Vec<Field<'_>>, String> {
    let mut scanner = Scanner { text, at: 0 };
    let mut fields = Vec::new();
    loop {
        scanner.skip();
        if scanner.at == text.len() {
            return Ok(fields);
        }
        fields.push(scanner.field(0)?);
    }
}

/// The messages that a field's `value` is: one, or a list of them, without their brackets.
pub(super) fn messages(value: &str) -> Result<Vec<&str>, String> {
    let inner = |value: &'_ str| value.len().saturating_sub(1);
    match value.as_bytes().first() {
        Some(b'{' | b'<') => Ok(vec![&value[1..inner(value)]]),
        Some(b'[') => {
            let mut scanner = Scanner { text: &value[1..inner(value)], at: 0 };
            let mut found = Vec::new();
            loop {
                scanner.skip();
                if scanner.at == scanner.text.len() {
                    return Ok(found);
                }
                let start = scanner.at;
                scanner.value(0)?;
                found.extend(messages(&scanner.text[start..scanner.at])?);
            }
        }
        _ => Ok(Vec::new()),
    }
}

/// `text` with every field `name` set to the string `value`; as it is when there is none.
pub(super) fn set_string(text: &str, name: &str, value: &str) -> Result<String, String> {
    let mut changed = String::with_capacity(text.len() + value.len());
    let mut copied = 0;
    for field in fields(text)?.into_iter().filter(|field| field.name == name) {
        changed.push_str(&text[copied..field.value.start]);
        changed.push('"');
        changed.push_str(&value.replace('\\', "\\\\").replace('"', "\\\""));
        changed.push('"');
        copied = field.value.end;
    }
    changed.push_str(&text[copied..]);
    Ok(changed)
}

struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn problem<T>(&self, wanted: &str) -> Result<T, String> {
        let line = self.text[..self.at].lines().count().max(1);
        let found = self.text[self.at..].chars().next().map_or("its end".to_owned(), |found| format!("{found:?}"));
        Err(format!("line {line} has {found} where {wanted} was expected"))
    }

    /// Passes spaces, comments and what may stand between fields.
    fn skip(&mut self) {
        while let Some(byte) = self.peek() {
            match byte {
                b'#' => self.at += self.text[self.at..].find('\n').unwrap_or(self.text.len() - self.at),
                b',' | b';' => self.at += 1,
                byte if byte.is_ascii_whitespace() || byte == 0x0b => self.at += 1,
                _ => return,
            }
        }
    }

    fn field(&mut self, depth: usize) -> Result<Field<'a>, String> {
        let start = self.at;
        if self.peek() == Some(b'[') {
            // The name of an extension.
            let end = self.text[start..].find(']');
            let Some(end) = end else { return self.problem("a ']'") };
            self.at += end + 1;
        } else {
            self.word("the name of a field")?;
        }
        let name = &self.text[start..self.at];
        self.skip();
        let colon = self.peek() == Some(b':');
        if colon {
            self.at += 1;
            self.skip();
        } else if !matches!(self.peek(), Some(b'{' | b'<' | b'[')) {
            return self.problem("a ':' or a message");
        }
        let value = self.at;
        self.value(depth)?;
        Ok(Field { name, span: start..self.at, value: value..self.at })
    }

    fn value(&mut self, depth: usize) -> Result<(), String> {
        if depth > DEEPEST {
            return self.problem("less nesting");
        }
        match self.peek() {
            Some(b'{') => self.enclosed(b'}', depth, |scanner, depth| scanner.field(depth).map(drop)),
            Some(b'<') => self.enclosed(b'>', depth, |scanner, depth| scanner.field(depth).map(drop)),
            Some(b'[') => self.enclosed(b']', depth, Self::value),
            Some(b'"' | b'\'') => self.strings(),
            Some(b'-') => {
                self.at += 1;
                self.skip();
                self.word("a number")
            }
            _ => self.word("a value"),
        }
    }

    fn enclosed(
        &mut self,
        end: u8,
        depth: usize,
        item: impl Fn(&mut Self, usize) -> Result<(), String>,
    ) -> Result<(), String> {
        self.at += 1;
        loop {
            self.skip();
            match self.peek() {
                Some(byte) if byte == end => {
                    self.at += 1;
                    return Ok(());
                }
                None => return self.problem(&format!("{:?}", char::from(end))),
                Some(_) => item(self, depth + 1)?,
            }
        }
    }

    /// One string, or several that count as one.
    fn strings(&mut self) -> Result<(), String> {
        loop {
            let Some(quote @ (b'"' | b'\'')) = self.peek() else { return self.problem("a string") };
            self.at += 1;
            loop {
                match self.peek() {
                    None | Some(b'\n') => return self.problem("the end of a string"),
                    Some(b'\\') => {
                        self.at += 1;
                        // What is escaped may be longer than a byte.
                        self.at += self.text[self.at..].chars().next().map_or(0, char::len_utf8);
                    }
                    Some(byte) => {
                        self.at += 1;
                        if byte == quote {
                            break;
                        }
                    }
                }
            }
            let end = self.at;
            self.skip();
            if !matches!(self.peek(), Some(b'"' | b'\'')) || self.text[end..self.at].contains([',', ';']) {
                self.at = end;
                return Ok(());
            }
        }
    }

    fn word(&mut self, wanted: &str) -> Result<(), String> {
        let rest = &self.text.as_bytes()[self.at..];
        let length = rest
            .iter()
            .take_while(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'+' | b'-' | b'/'))
            .count();
        if length == 0 {
            return self.problem(wanted);
        }
        self.at += length;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CONFIG: &str = r#"# name: "no"
name: "old" # kept
backend:"python"
max_batch_size : 8
input [ { name: "a" data_type: TYPE_FP32 dims: [ -1, 4 ] }, { name: 'b\'{' dims: -1 } ]
instance_group [ { count: 2 kind: KIND_CPU }, < count: 1 > ]
parameters: { key: "EXECUTION_ENV_PATH", value: { string_value: "$$TRITON_MODEL_DIRECTORY/e.tar.gz" } };
dynamic_batching { }
description: "two " # a comment between
  'parts'
"#;

    #[test]
    fn fields_are_found_and_only_those_at_the_top() {
        let names: Vec<_> = fields(CONFIG).expect("sound").iter().map(|field| field.name).collect();
        assert_eq!(
            names,
            [
                "name",
                "backend",
                "max_batch_size",
                "input",
                "instance_group",
                "parameters",
                "dynamic_batching",
                "description"
            ]
        );
        let groups = fields(CONFIG).expect("sound").into_iter().find(|field| field.name == "instance_group");
        let groups = messages(&CONFIG[groups.expect("there").value]).expect("sound");
        assert_eq!(groups, [" count: 2 kind: KIND_CPU ", " count: 1 "]);
    }

    #[test]
    fn a_name_is_changed_and_nothing_else() {
        let changed = set_string(CONFIG, "name", "new_3").expect("sound");
        assert_eq!(changed, CONFIG.replacen("\"old\"", "\"new_3\"", 1));
        assert_eq!(set_string("backend: 'x'", "name", "new").expect("sound"), "backend: 'x'");
        assert_eq!(set_string("name:'a' \"b\"\n", "name", "c").expect("sound"), "name:\"c\"\n");
        assert_eq!(set_string("", "name", "c").expect("sound"), "");
    }

    #[test]
    fn what_is_broken_is_told_with_its_line() {
        assert_eq!(fields("a: 1\nb { c: 2").expect_err("open"), "line 2 has its end where '}' was expected");
        for broken in ["a", "a:", "a: \"", "a: [", "{}", "a: }", "[x", "a: \"b\nc\"", "a: -"] {
            assert!(fields(broken).is_err(), "{broken:?}");
        }
        assert!(fields(&"a {".repeat(100_000)).is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[ a-c:{}\\[\\]<>\"'\\\\#,;\n0-9é-]{0,60}") {
            if let Ok(found) = fields(&text) {
                for field in found {
                    drop(messages(&text[field.value]));
                }
            }
            drop(set_string(&text, "a", "x"));
        }
    }
}
