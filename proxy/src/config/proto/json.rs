//! JSON text to [`Tree`]. Not through serde_json, which keeps no line for a value.

use super::tree::{Builder, Tree, Value};
use crate::config::error::{Mark, Reason, quoted};

/// How much of a text that is no value a message shows, in bytes.
const QUOTED: usize = 12;

/// Reads a JSON text.
pub(super) fn parse(text: &str) -> Result<Tree, (Option<Mark>, Reason)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut reader = Reader { text, at: 0, line: 1, counted: 0, column: 1, builder: Builder::default() };
    match reader.document() {
        Ok(()) => Ok(reader.builder.finish()),
        Err(reason) => Err((Some(reader.mark()), reason)),
    }
}

struct Reader<'a> {
    text: &'a str,
    /// Byte offset of the next character.
    at: usize,
    line: u32,
    /// A byte offset in this line whose column is known. It moves on with every mark: a text may be one line
    /// of megabytes.
    counted: usize,
    /// The column of that offset.
    column: u32,
    builder: Builder,
}

/// What may come next.
#[derive(Clone, Copy, PartialEq)]
enum Expect {
    /// A value.
    Value,
    /// A value, or the end of the list: also after a comma, which Envoy allows.
    ValueOrEnd,
    /// A key, or the end of the object: also after a comma.
    KeyOrEnd,
    /// A comma or the end of the innermost collection; at the top, the end of the text.
    Separator,
}

impl Reader<'_> {
    fn document(&mut self) -> Result<(), Reason> {
        let limit = |message: &str| Reason::Limit(message.to_owned());
        let mut expect = Expect::Value;
        let mut closers = Vec::new();
        loop {
            self.skip_space();
            let Some(next) = self.peek() else {
                // An empty text has no value: the caller says what is missing.
                let complete = expect == Expect::Separator || self.builder.tree().root().is_none();
                return if closers.is_empty() && complete {
                    Ok(())
                } else {
                    Err(syntax("the text ends inside a value"))
                };
            };
            let mark = self.mark();
            expect = match (expect, next) {
                (Expect::Separator, b',') if !closers.is_empty() => {
                    self.at += 1;
                    if closers.last() == Some(&b'}') { Expect::KeyOrEnd } else { Expect::ValueOrEnd }
                }
                (Expect::Separator | Expect::ValueOrEnd | Expect::KeyOrEnd, b']' | b'}')
                    if closers.last() == Some(&next) =>
                {
                    self.at += 1;
                    closers.pop();
                    self.builder.end().map_err(limit)?;
                    Expect::Separator
                }
                (Expect::KeyOrEnd, _) => {
                    let key = self.object_key(next)?;
                    self.builder.key(key.into(), mark);
                    self.skip_space();
                    if self.peek() != Some(b':') {
                        return Err(self.unexpected("a colon after the key"));
                    }
                    self.at += 1;
                    Expect::Value
                }
                (Expect::Value | Expect::ValueOrEnd, b'[' | b'{') => {
                    self.at += 1;
                    if next == b'[' {
                        closers.push(b']');
                        self.builder.start_list(mark, 0).map_err(limit)?;
                        Expect::ValueOrEnd
                    } else {
                        closers.push(b'}');
                        self.builder.start_map(mark, 0).map_err(limit)?;
                        Expect::KeyOrEnd
                    }
                }
                (Expect::Value | Expect::ValueOrEnd, _) => {
                    let value = self.scalar()?;
                    self.builder.scalar(mark, value);
                    Expect::Separator
                }
                (Expect::Separator, _) if closers.is_empty() => {
                    return Err(self.unexpected("the end of the text"));
                }
                (Expect::Separator, _) => return Err(self.unexpected("a comma or the end of the collection")),
            };
        }
    }

    fn scalar(&mut self) -> Result<Value, Reason> {
        if let Some(quote @ (b'"' | b'\'')) = self.peek() {
            return Ok(Value::String(self.string(quote)?.into()));
        }
        let rest = &self.text[self.at..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && !"+-.".contains(c)).unwrap_or(rest.len());
        let word = &rest[..end];
        let value = match word {
            "null" => Value::Null,
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            _ if is_number(word) => Value::Number(word.into()),
            "" => return Err(self.unexpected("a value")),
            _ => {
                // Not all of it: it may be a key that lacks its quotes.
                let start = &word[..word.len().min(QUOTED)];
                return Err(syntax(&format!(
                    "{} is not a value: a string needs double quotes",
                    quoted(start)
                )));
            }
        };
        self.at += end;
        Ok(value)
    }

    /// A key: a string, or a bare name.
    fn object_key(&mut self, next: u8) -> Result<String, Reason> {
        if matches!(next, b'"' | b'\'') {
            return self.string(next);
        }
        let rest = &self.text[self.at..];
        let end =
            rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '$').unwrap_or(rest.len());
        if end == 0 || next.is_ascii_digit() {
            return Err(self.unexpected("a key in double quotes"));
        }
        self.at += end;
        Ok(rest[..end].to_owned())
    }

    /// A string, of which the opening quote is the next thing. Line breaks and tabs may stand in it.
    fn string(&mut self, quote: u8) -> Result<String, Reason> {
        self.at += 1;
        let mut out = String::new();
        loop {
            let rest = &self.text[self.at..];
            let Some(end) = rest.find([char::from(quote), '\\', '\n']) else {
                return Err(syntax("a string without its closing quote"));
            };
            out.push_str(&rest[..end]);
            self.at += end;
            match rest.as_bytes()[end] {
                b'\\' => out.push(self.escape()?),
                b'\n' => {
                    self.at += 1;
                    self.start_line();
                    out.push('\n');
                }
                _ => {
                    self.at += 1;
                    return Ok(out);
                }
            }
        }
    }

    fn escape(&mut self) -> Result<char, Reason> {
        let bad = || syntax("not an escape that JSON knows");
        let kind = *self.text.as_bytes().get(self.at + 1).filter(|kind| kind.is_ascii()).ok_or_else(bad)?;
        self.at += 2;
        Ok(match kind {
            b'"' | b'\'' | b'\\' | b'/' => char::from(kind),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let high = self.hex4().ok_or_else(bad)?;
                if !(0xD800..0xE000).contains(&high) {
                    return char::from_u32(high).ok_or_else(bad);
                }
                // Beyond the basic plane: two escapes make one character.
                let half = || syntax("half of a surrogate pair");
                if high >= 0xDC00 || !self.text[self.at..].starts_with("\\u") {
                    return Err(half());
                }
                self.at += 2;
                let low = self.hex4().filter(|low| (0xDC00..0xE000).contains(low)).ok_or_else(half)?;
                char::from_u32(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00)).ok_or_else(half)?
            }
            _ => return Err(bad()),
        })
    }

    fn hex4(&mut self) -> Option<u32> {
        let digits = self.text.get(self.at..self.at + 4)?;
        if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        self.at += 4;
        u32::from_str_radix(digits, 16).ok()
    }

    fn skip_space(&mut self) {
        while let Some(b @ (b' ' | b'\t' | b'\r' | b'\n')) = self.peek() {
            self.at += 1;
            if b == b'\n' {
                self.start_line();
            }
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn mark(&mut self) -> Mark {
        self.column += self.text[self.counted..self.at].chars().count() as u32;
        self.counted = self.at;
        Mark { line: self.line, column: self.column }
    }

    /// The next character is the first of a line.
    fn start_line(&mut self) {
        self.line += 1;
        self.counted = self.at;
        self.column = 1;
    }

    fn unexpected(&self, expected: &str) -> Reason {
        match self.text[self.at..].chars().next() {
            Some(found) => syntax(&format!("expected {expected}, found {found:?}")),
            None => syntax(&format!("expected {expected}, but the text ends")),
        }
    }
}

fn syntax(message: &str) -> Reason {
    Reason::Syntax(format!("not valid JSON: {message}"))
}

/// The grammar of RFC 8259: no leading zero, no bare point, no plus sign.
fn is_number(word: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let unsigned = word.strip_prefix('-').unwrap_or(word);
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (unsigned, None),
    };
    let (whole, fraction) = match mantissa.split_once('.') {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (mantissa, None),
    };
    digits(whole)
        && (whole.len() == 1 || !whole.starts_with('0'))
        && fraction.is_none_or(digits)
        && exponent.is_none_or(|exponent| digits(exponent.strip_prefix(['+', '-']).unwrap_or(exponent)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tree::NodeId;
    use super::*;

    fn to_serde(tree: &Tree, id: NodeId) -> serde_json::Value {
        match &tree.node(id).value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(value) => (*value).into(),
            Value::Number(digits) => digits.parse::<serde_json::Number>().unwrap().into(),
            Value::String(text) => (&**text).into(),
            Value::List(items) => items.iter().map(|item| to_serde(tree, *item)).collect(),
            Value::Map(entries) => {
                entries.iter().map(|entry| (entry.key.to_string(), to_serde(tree, entry.value))).collect()
            }
        }
    }

    fn parsed(text: &str) -> Option<serde_json::Value> {
        parse(text).ok().and_then(|tree| Some(to_serde(&tree, tree.root()?)))
    }

    #[test]
    fn a_text_without_quotes_is_not_shown_as_a_whole() {
        // It may be a key.
        let key = "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg";
        let Err((_, Reason::Syntax(text))) = parse(&format!("{{\"inline_bytes\": {key}}}")) else { panic!() };
        assert!(text.contains(&key[..QUOTED]) && !text.contains(&key[..=QUOTED]), "{text}");
    }

    #[test]
    fn says_where_it_broke() {
        let (mark, reason) = parse("{\n  \"a\": [1,\n    nope]\n}").unwrap_err();
        assert_eq!(mark, Some(Mark { line: 3, column: 5 }));
        assert_eq!(
            reason.to_string(),
            "not valid JSON: \"nope\" is not a value: a string needs double quotes"
        );
        for bad in [
            "{",
            "[,]",
            "{,}",
            "{1:1}",
            "[1 2]",
            "[1,,]",
            "1 2",
            "{} x",
            "\"\\ud83d\"",
            "\"",
            "01",
            "+1",
            "[}",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(matches!(parse(&"[".repeat(100_000)), Err((_, Reason::Limit(_)))));
    }

    #[test]
    fn as_lenient_as_envoy() {
        let value = parsed("{'a': [1, 2,], bare_key: \"tab\tand\nbreak\",}").unwrap();
        assert_eq!(value, serde_json::json!({"a": [1, 2], "bare_key": "tab\tand\nbreak"}));
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<String>().prop_map(Into::into),
        ];
        leaf.prop_recursive(5, 50, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Into::into),
                prop::collection::btree_map(any::<String>(), inner, 0..5)
                    .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn agrees_with_serde_json(value in json()) {
            prop_assert_eq!(parsed(&value.to_string()), Some(value.clone()));
            prop_assert_eq!(parsed(&serde_json::to_string_pretty(&value).unwrap()), Some(value));
        }

        #[test]
        fn accepts_what_serde_json_accepts(text in "[\\[\\]{}\",:0-9.eE+\\-\\\\ntrufalsu \n]{0,24}") {
            let theirs = serde_json::from_str::<serde_json::Value>(&text);
            prop_assert!(theirs.is_err() || parse(&text).is_ok(), "{:?}", text);
        }
    }
}
