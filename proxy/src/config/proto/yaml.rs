//! YAML text to [`Tree`], with the types that Envoy (yaml-cpp and its own rules on top) gives to scalars.
//!
//! - Quoted and block scalars are strings. So is a scalar with the tag `!`; other tags change nothing.
//! - `~`, `null`, `Null`, `NULL` and nothing are null.
//! - `true/false`, `yes/no`, `on/off`, `y/n` in lower, upper or title case are booleans.
//! - Decimal, `0x` hexadecimal and `0` octal integers are numbers when they fit 32 bits, else strings.
//! - Everything else, decimal fractions included, is a string (a numeric field reads it as a number).
//! - Of equal keys the last one counts. `<<` is a key like any other. Only the first document is read.

use std::collections::HashMap;

use granit_parser::{Event, Options, Parser, ScalarStyle, Span, Tag};

use super::tree::{Builder, MAX_DEPTH, NodeId, Tree, Value};
use crate::config::error::{Mark, Reason};

/// A tree, and where more documents follow that are not read.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) tree: Tree,
    pub(super) ignored_document: Option<Mark>,
}

/// Reads the first document of a YAML text.
pub(super) fn parse(text: &str) -> Result<Document, (Option<Mark>, Reason)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut options = Options::default();
    // A collection that is nested as deep as a tree may be is reported by the tree.
    options.flow_nesting_limit = MAX_DEPTH as usize + 1;
    options.block_nesting_limit = MAX_DEPTH as usize + 1;
    let mut reader = Reader { builder: Builder::default(), anchors: HashMap::new(), documents: 0 };
    for event in Parser::new_from_str_with_options(text, options) {
        match event {
            Ok((event, span)) => {
                let mark = mark(span);
                match reader.event(event, mark) {
                    Ok(Next::Continue) => {}
                    Ok(Next::Stop) => {
                        return Ok(Document { tree: reader.builder.finish(), ignored_document: Some(mark) });
                    }
                    Err(reason) => return Err((Some(mark), reason)),
                }
            }
            // What follows the first document is not Envoy's business, whether it is YAML or not.
            Err(error) if reader.documents == 1 && reader.document_ended() => {
                let mark =
                    Mark { line: error.marker().line() as u32, column: error.marker().col() as u32 + 1 };
                return Ok(Document { tree: reader.builder.finish(), ignored_document: Some(mark) });
            }
            Err(error) => {
                let mark =
                    Mark { line: error.marker().line() as u32, column: error.marker().col() as u32 + 1 };
                return Err((Some(mark), Reason::Syntax(format!("not valid YAML: {}", plain(&error)))));
            }
        }
    }
    Ok(Document { tree: reader.builder.finish(), ignored_document: None })
}

/// The scanner's message without its own position, which the problem has already.
fn plain(error: &granit_parser::ScanError) -> String {
    let text = error.to_string();
    match text.rfind(" at byte ").or_else(|| text.rfind(" at char ")) {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

fn mark(span: Span) -> Mark {
    Mark { line: span.start.line() as u32, column: span.start.col() as u32 + 1 }
}

enum Next {
    Continue,
    Stop,
}

struct Reader {
    builder: Builder,
    /// Finished nodes by anchor id. The key of an entry has no node and can't be referred to.
    anchors: HashMap<usize, NodeId>,
    documents: u32,
}

impl Reader {
    fn document_ended(&self) -> bool {
        self.builder.open_collections() == 0 && self.builder.tree().root().is_some()
    }

    fn event(&mut self, event: Event<'_>, mark: Mark) -> Result<Next, Reason> {
        let limit = |message: &str| Reason::Limit(message.to_owned());
        let wants_key = self.builder.wants_key();
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Ok(Next::Stop);
                }
            }
            Event::Scalar(text, ..) if wants_key => self.builder.key(text.into(), mark),
            Event::Scalar(text, style, anchor, tag) => {
                let id = self.builder.scalar(mark, classify(&text, style, tag.as_deref()));
                self.remember(anchor, id);
            }
            Event::Alias(anchor) => {
                let id = *self.anchors.get(&anchor).ok_or_else(|| {
                    Reason::Syntax("not valid YAML: an alias that refers to what contains it".into())
                })?;
                if wants_key {
                    let Value::String(text) = &self.builder.tree().node(id).value else {
                        return Err(Reason::Syntax(
                            "an alias in place of a key must stand for a string".into(),
                        ));
                    };
                    let text = text.clone();
                    self.builder.key(text, mark);
                } else {
                    self.builder.place(id);
                }
            }
            Event::SequenceStart(..) | Event::MappingStart(..) if wants_key => {
                return Err(Reason::Syntax("a key must be a scalar, not a list or a mapping".into()));
            }
            Event::SequenceStart(_, anchor, _) => self.builder.start_list(mark, anchor).map_err(limit)?,
            Event::MappingStart(_, anchor, _) => self.builder.start_map(mark, anchor).map_err(limit)?,
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some((id, anchor)) = self.builder.end().map_err(limit)? {
                    self.remember(anchor, id);
                }
            }
            _ => {}
        }
        Ok(Next::Continue)
    }

    fn remember(&mut self, anchor: usize, id: NodeId) {
        if anchor != 0 {
            self.anchors.insert(anchor, id);
        }
    }
}

fn classify(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Value {
    let is_text = match tag {
        None => style != ScalarStyle::Plain,
        Some(tag) => tag.original() == "!",
    };
    if is_text {
        return Value::String(text.into());
    }
    if tag.is_none() && matches!(text, "" | "~" | "null" | "Null" | "NULL") {
        return Value::Null;
    }
    if let Some(value) = boolean(text) {
        return Value::Bool(value);
    }
    match integer(text) {
        Some(value) if i32::try_from(value).is_ok() => Value::Number(value.to_string().into()),
        Some(value) => Value::String(value.to_string().into()),
        None => Value::String(text.into()),
    }
}

/// yaml-cpp: a YAML 1.1 boolean in lower, upper or title case.
fn boolean(text: &str) -> Option<bool> {
    let (first, rest) = text.split_at_checked(1)?;
    let lower = text.bytes().all(|b| b.is_ascii_lowercase());
    let upper = text.bytes().all(|b| b.is_ascii_uppercase());
    let title = first.bytes().all(|b| b.is_ascii_uppercase()) && rest.bytes().all(|b| b.is_ascii_lowercase());
    if !(lower || upper || title) {
        return None;
    }
    match text.to_ascii_lowercase().as_str() {
        "y" | "yes" | "true" | "on" => Some(true),
        "n" | "no" | "false" | "off" => Some(false),
        _ => None,
    }
}

/// C++ streams with no fixed base: an optional sign, then `0x` digits, `0` octal digits, or decimal digits.
fn integer(text: &str) -> Option<i64> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let (digits, radix) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (&digits[1..], 8),
        None => (digits, 10),
    };
    if !digits.starts_with(|c: char| c.is_digit(radix)) {
        return None;
    }
    let magnitude = i128::from_str_radix(digits, radix).ok()?;
    i64::try_from(if text.starts_with('-') { -magnitude } else { magnitude }).ok()
}

/// What a person probably wanted who wrote this plain scalar where a string belongs.
pub(super) fn string_hint(value: &Value) -> Option<&'static str> {
    match value {
        Value::Bool(_) => {
            Some("YAML reads y, n, yes, no, on, off, true and false as booleans: quote the value")
        }
        Value::Number(_) => Some("quote the value"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain_scalar(text: &str) -> Value {
        classify(text, ScalarStyle::Plain, None)
    }

    #[test]
    fn booleans_in_three_cases_only() {
        for text in ["y", "Y", "yes", "Yes", "YES", "on", "On", "ON", "true", "True", "TRUE"] {
            assert!(matches!(plain_scalar(text), Value::Bool(true)), "{text}");
        }
        for text in ["n", "N", "no", "No", "NO", "off", "Off", "OFF", "false", "False", "FALSE"] {
            assert!(matches!(plain_scalar(text), Value::Bool(false)), "{text}");
        }
        for text in ["oN", "tRUE", "yEs", "t", "1 ", "yesno", "ÿ"] {
            assert!(matches!(plain_scalar(text), Value::String(_)), "{text}");
        }
    }

    #[test]
    fn integers_as_c_plus_plus_reads_them() {
        for (text, value) in [
            ("17", 17),
            ("+5", 5),
            ("-0", 0),
            ("0x1F", 31),
            ("0X1f", 31),
            ("-0x1", -1),
            ("0644", 420),
            ("0", 0),
        ] {
            assert_eq!(integer(text), Some(value), "{text}");
        }
        for text in ["", "08", "0o17", "0b1", "1_000", "0x", "+", "--1", "1.0", "1e3", "+-5", "0x-1", "é"] {
            assert_eq!(integer(text), None, "{text}");
        }
        assert_eq!(integer("9223372036854775807"), Some(i64::MAX));
        assert_eq!(integer("9223372036854775808"), None);
        assert_eq!(integer("99999999999999999999999999999999999999999999"), None);
    }

    #[test]
    fn large_integers_and_fractions_are_strings() {
        assert!(matches!(plain_scalar("2147483647"), Value::Number(_)));
        assert!(matches!(plain_scalar("2147483648"), Value::String(_)));
        assert!(matches!(plain_scalar("0.5"), Value::String(_)));
        let Value::String(text) = plain_scalar("0xFFFFFFFFFF") else { panic!("not a string") };
        assert_eq!(&*text, "1099511627775");
    }

    fn tree(text: &str) -> String {
        fn show(tree: &Tree, id: NodeId, out: &mut String) {
            match &tree.node(id).value {
                Value::List(items) => {
                    out.push('[');
                    for item in items {
                        show(tree, *item, out);
                        out.push(' ');
                    }
                    out.push(']');
                }
                Value::Map(entries) => {
                    out.push('{');
                    for entry in entries {
                        out.push_str(&entry.key);
                        out.push('=');
                        show(tree, entry.value, out);
                        out.push(' ');
                    }
                    out.push('}');
                }
                scalar => out.push_str(&scalar.describe()),
            }
        }
        let document = parse(text).unwrap();
        let mut out = String::new();
        show(&document.tree, document.tree.root().unwrap(), &mut out);
        out
    }

    #[test]
    fn tags_and_quotes() {
        assert_eq!(
            tree("[! 5, !!str 5, '5', \"5\", !foo bar, !!int '5', ~, '', ]"),
            "[the string \"5\" the number 5 the string \"5\" the string \"5\" the string \"bar\" the number 5 null \
             the string \"\" ]"
        );
        assert_eq!(tree("a: |\n  5\nb: >-\n  no\n"), "{a=the string \"5\\n\" b=the string \"no\" }");
    }

    #[test]
    fn anchors_and_keys() {
        assert_eq!(
            tree("a: &x [1]\nb: *x\nyes: &k q\n*k : 2\n1: c\n<<: *x"),
            "{a=[the number 1 ] b=[the number 1 ] yes=the string \"q\" q=the number 2 1=the string \"c\" <<=[the \
             number 1 ] }"
        );
        for bad in ["&a [*a]", "a: *nope", "? [a]\n: b", "{{a: b}: c}"] {
            assert!(matches!(parse(bad), Err((Some(_), Reason::Syntax(_)))), "{bad}");
        }
    }

    #[test]
    fn only_the_first_document() {
        let document = parse("a: b\n---\nnope: [\n").unwrap();
        assert_eq!(document.ignored_document.map(|mark| mark.line), Some(2));
        assert!(parse("---\na: b\n...\n").unwrap().ignored_document.is_none());
        assert!(parse("").unwrap().tree.root().is_none());
    }

    #[test]
    fn places() {
        let document = parse("a:\n- b\n- {c: d}\n").unwrap();
        let tree = document.tree;
        let Value::Map(root) = &tree.node(tree.root().unwrap()).value else { panic!("not a mapping") };
        assert_eq!(root[0].mark, Mark { line: 1, column: 1 });
        let Value::List(items) = &tree.node(root[0].value).value else { panic!("not a list") };
        assert_eq!(tree.node(items[0]).mark, Mark { line: 2, column: 3 });
        let Value::Map(inner) = &tree.node(items[1]).value else { panic!("not a mapping") };
        assert_eq!(tree.node(inner[0].value).mark, Mark { line: 3, column: 7 });
    }

    #[test]
    fn bombs_are_refused() {
        let mut laughs = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            use std::fmt::Write;
            let inner = format!("*a{}, ", level - 1).repeat(10);
            writeln!(laughs, "a{level}: &a{level} [{inner}]").unwrap();
        }
        assert!(matches!(parse(&laughs), Err((_, Reason::Limit(_)))));
        for deep in ["[".repeat(100_000), "{a: ".repeat(100_000), "- ".repeat(100_000), "? ".repeat(100_000)]
        {
            assert!(parse(&deep).is_err());
        }
        assert!(parse(&format!("{}{}", "[".repeat(190), "]".repeat(190))).is_ok());
        let mut aliased = String::from("- &a0 [x]\n");
        for level in 1..300 {
            use std::fmt::Write;
            writeln!(aliased, "- &a{level} [*a{}]", level - 1).unwrap();
        }
        assert!(matches!(parse(&aliased), Err((_, Reason::Limit(_)))));
    }
}
