//! Where in a message something is.

use std::fmt;

/// A place in a message: a list of steps that lives on the stack of whoever walks the message, so that
/// building one costs nothing until it is printed.
///
/// ```
/// # use tidegate::config::proto::FieldPath;
/// let root = FieldPath::ROOT;
/// let listeners = root.field("static_resources");
/// let listeners = listeners.field("listeners");
/// assert_eq!(listeners.index(0).to_string(), "static_resources.listeners[0]");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct FieldPath<'a> {
    parent: Option<&'a FieldPath<'a>>,
    step: Step<'a>,
}

#[derive(Clone, Copy, Debug)]
enum Step<'a> {
    Root,
    Field(&'a str),
    Index(usize),
    Key(&'a str),
}

impl FieldPath<'static> {
    /// The message itself.
    pub const ROOT: Self = Self { parent: None, step: Step::Root };
}

impl<'a> FieldPath<'a> {
    /// A path that starts somewhere else, given as text.
    pub fn at(prefix: &'a str) -> Self {
        let step = if prefix.is_empty() { Step::Root } else { Step::Field(prefix) };
        Self { parent: None, step }
    }

    /// A field of the message here; an `Any` has the fields of the message inside it.
    pub fn field<'b>(&'b self, name: &'b str) -> FieldPath<'b> {
        FieldPath { parent: Some(self), step: Step::Field(name) }
    }

    /// An element of the repeated field here.
    pub fn index(&self, index: usize) -> FieldPath<'_> {
        FieldPath { parent: Some(self), step: Step::Index(index) }
    }

    /// A value of the map field here.
    pub fn key<'b>(&'b self, key: &'b str) -> FieldPath<'b> {
        FieldPath { parent: Some(self), step: Step::Key(key) }
    }

    /// Whether this is inside the field, in whatever message.
    pub(super) fn is_inside(&self, field: &str) -> bool {
        matches!(self.step, Step::Field(name) if name == field)
            || self.parent.is_some_and(|parent| parent.is_inside(field))
    }

    /// Whether this is the message itself.
    fn is_root(&self) -> bool {
        matches!(self.step, Step::Root) && self.parent.is_none_or(Self::is_root)
    }
}

impl fmt::Display for FieldPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(f)?;
        }
        match self.step {
            Step::Root => Ok(()),
            Step::Field(name) if self.parent.is_none_or(FieldPath::is_root) => f.write_str(name),
            Step::Field(name) => write!(f, ".{name}"),
            Step::Index(index) => write!(f, "[{index}]"),
            Step::Key(key) => write!(f, "[{key:?}]"),
        }
    }
}

/// One step of a path that was printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ParsedStep {
    Field(String),
    Index(usize),
    Key(String),
}

/// Reads what [`FieldPath`] prints. Stops at the first thing that is not a step: a path is for people, and
/// as much of it as can be read still leads near the place.
pub(super) fn parse(path: &str) -> Vec<ParsedStep> {
    let mut steps = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        if let Some(inside) = rest.strip_prefix("[\"") {
            let Some((key, after)) = quoted_key(inside) else { break };
            steps.push(ParsedStep::Key(key));
            rest = after;
        } else if let Some(inside) = rest.strip_prefix('[') {
            let Some((index, after)) = inside.split_once(']') else { break };
            let Ok(index) = index.parse() else { break };
            steps.push(ParsedStep::Index(index));
            rest = after;
        } else {
            let start = rest.strip_prefix('.').unwrap_or(rest);
            let end = start.find(['.', '[']).unwrap_or(start.len());
            if end == 0 {
                break;
            }
            steps.push(ParsedStep::Field(start[..end].to_owned()));
            rest = &start[end..];
        }
    }
    steps
}

/// The key up to `"]`, unescaped, and what follows.
fn quoted_key(text: &str) -> Option<(String, &str)> {
    let mut key = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((key, text[at + 1..].strip_prefix(']')?)),
            '\\' => match chars.next()?.1 {
                'n' => key.push('\n'),
                't' => key.push('\t'),
                'r' => key.push('\r'),
                '0' => key.push('\0'),
                'u' => {
                    let (_, hex) = text[at..].split_once('{')?;
                    let (hex, _) = hex.split_once('}')?;
                    key.push(char::from_u32(u32::from_str_radix(hex, 16).ok()?)?);
                    chars.by_ref().find(|(_, c)| *c == '}');
                }
                other => key.push(other),
            },
            other => key.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn prints_and_reads_every_kind_of_step() {
        let root = FieldPath::ROOT;
        let a = root.field("metadata");
        let a = a.field("filter_metadata");
        let a = a.key("envoy.lb \"x\"]\u{7}");
        let a = a.field("fields");
        let a = a.index(3);
        let text = a.field("value").to_string();
        assert_eq!(text, r#"metadata.filter_metadata["envoy.lb \"x\"]\u{7}"].fields[3].value"#);
        assert_eq!(
            parse(&text),
            [
                ParsedStep::Field("metadata".into()),
                ParsedStep::Field("filter_metadata".into()),
                ParsedStep::Key("envoy.lb \"x\"]\u{7}".into()),
                ParsedStep::Field("fields".into()),
                ParsedStep::Index(3),
                ParsedStep::Field("value".into()),
            ]
        );
        assert_eq!(FieldPath::at("a.b[0]").field("c").to_string(), "a.b[0].c");
        assert_eq!(FieldPath::at("").field("c").to_string(), "c");
    }

    proptest! {
        #[test]
        fn keys_survive(key in any::<String>()) {
            let root = FieldPath::ROOT;
            prop_assert_eq!(parse(&root.key(&key).to_string()), [ParsedStep::Key(key)]);
        }

        #[test]
        fn any_text_is_read_without_panic(text in any::<String>()) {
            parse(&text);
        }
    }
}
