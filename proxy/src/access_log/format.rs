//! Formats: parsed once, then printed without allocating.

use std::io::Write;

use serde_json::Value as Json;

use crate::config::access_log::Format;
use crate::connection::record::{LogType, Record};

use super::operator::{Operator, Syntax, Value};
use super::{AccessLogError, HttpExchange, Now};

/// Envoy's default text format.
const DEFAULT: &str = concat!(
    "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% ",
    "%RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% ",
    "\"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" ",
    "\"%UPSTREAM_HOST%\"\n"
);

/// A format, parsed.
#[derive(Debug)]
pub struct Formatter {
    body: Body,
    /// Unset values print nothing (text) or are left out (JSON).
    omit_empty: bool,
}

#[derive(Debug)]
enum Body {
    Text(Vec<Part>),
    Json(Node),
}

/// A piece of a format string.
#[derive(Debug)]
enum Part {
    Literal(Box<str>),
    Operator(Operator),
}

/// A piece of a JSON format.
#[derive(Debug)]
enum Node {
    /// Text, quotes included.
    Raw(Box<str>),
    Null,
    /// One operator and nothing else: its own type.
    Typed(Operator),
    /// A string with operators in it.
    Text(Vec<Part>),
    List(Vec<Node>),
    /// Keys quoted, with their colon; sorted as Envoy sorts them.
    Object(Vec<(Box<str>, Node)>),
}

/// What an entry is printed from.
#[derive(Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) record: &'a Record,
    pub(super) log_type: LogType,
    /// What a request of the admin server adds; none for connections.
    pub(super) http: Option<&'a HttpExchange>,
    pub(super) now: Now,
}

impl Formatter {
    /// Parses a configured format.
    pub fn parse(format: &Format) -> Result<Self, AccessLogError> {
        Ok(match format {
            Format::Default => Self { body: Body::Text(parse(DEFAULT)?), omit_empty: false },
            Format::Text { format, omit_empty_values } => {
                Self { body: Body::Text(parse(format)?), omit_empty: *omit_empty_values }
            }
            Format::Json { format, omit_empty_values } => {
                Self { body: Body::Json(Node::parse(format)?), omit_empty: *omit_empty_values }
            }
        })
    }

    /// Whether it prints an operator of this kind anywhere.
    pub(super) fn prints(&self, is: fn(&Operator) -> bool) -> bool {
        match &self.body {
            Body::Text(parts) => any(parts, is),
            Body::Json(node) => node.prints(is),
        }
    }

    /// Appends an entry. JSON ends with a line break; text has what its format has.
    pub fn format(&self, record: &Record, log_type: LogType, now: Now, out: &mut Vec<u8>) {
        self.print(Entry { record, log_type, http: None, now }, out);
    }

    /// The same for what may be more than a connection.
    pub(super) fn print(&self, entry: Entry<'_>, out: &mut Vec<u8>) {
        match &self.body {
            Body::Text(parts) => write_parts(parts, entry, self.omit_empty, out),
            Body::Json(node) => {
                node.write(entry, self.omit_empty, out);
                out.push(b'\n');
            }
        }
    }
}

fn any(parts: &[Part], is: fn(&Operator) -> bool) -> bool {
    parts.iter().any(|part| matches!(part, Part::Operator(operator) if is(operator)))
}

fn write_parts(parts: &[Part], entry: Entry<'_>, omit_empty: bool, out: &mut Vec<u8>) {
    for part in parts {
        match part {
            Part::Literal(text) => out.extend_from_slice(text.as_bytes()),
            Part::Operator(operator) => match operator.value(entry) {
                Value::Unset if omit_empty => {}
                Value::Unset => out.push(b'-'),
                value => value.write(out),
            },
        }
    }
}

impl Node {
    fn parse(json: &Json) -> Result<Self, AccessLogError> {
        Ok(match json {
            Json::Null => Self::Null,
            Json::Bool(_) => Self::Raw(json.to_string().into()),
            Json::Number(number) => Self::Raw(number_text(number).into()),
            Json::String(format) => {
                let mut parts = parse(format)?;
                match (parts.pop(), parts.is_empty()) {
                    (None, _) => Self::Raw("\"\"".into()),
                    (Some(Part::Operator(operator)), true) => Self::Typed(operator),
                    (Some(Part::Literal(text)), true) => Self::Raw(quoted(&text)),
                    (Some(last), false) => {
                        parts.push(last);
                        Self::Text(parts)
                    }
                }
            }
            Json::Array(list) => Self::List(list.iter().map(Self::parse).collect::<Result<_, _>>()?),
            Json::Object(object) => {
                let mut members: Vec<_> = object.iter().collect();
                members.sort_by_key(|(key, _)| *key);
                let member = |(key, value): (&String, &Json)| -> Result<(Box<str>, Self), AccessLogError> {
                    Ok((format!("{}:", quoted(key)).into(), Self::parse(value)?))
                };
                Self::Object(members.into_iter().map(member).collect::<Result<_, _>>()?)
            }
        })
    }

    fn prints(&self, is: fn(&Operator) -> bool) -> bool {
        match self {
            Self::Raw(_) | Self::Null => false,
            Self::Typed(operator) => is(operator),
            Self::Text(parts) => any(parts, is),
            Self::List(list) => list.iter().any(|node| node.prints(is)),
            Self::Object(members) => members.iter().any(|(_, node)| node.prints(is)),
        }
    }

    fn write(&self, entry: Entry<'_>, omit_empty: bool, out: &mut Vec<u8>) {
        match self {
            Self::Raw(text) => out.extend_from_slice(text.as_bytes()),
            Self::Null => out.extend_from_slice(b"null"),
            Self::Typed(operator) => operator.value(entry).write_json(out),
            Self::Text(parts) => {
                let start = out.len();
                write_parts(parts, entry, omit_empty, out);
                quote_from(out, start);
            }
            Self::List(list) => {
                out.push(b'[');
                let kept = list.iter().filter(|node| !(omit_empty && node.is_unset(entry)));
                for (index, node) in kept.enumerate() {
                    if index > 0 {
                        out.push(b',');
                    }
                    node.write(entry, omit_empty, out);
                }
                out.push(b']');
            }
            Self::Object(members) => {
                out.push(b'{');
                let kept = members.iter().filter(|(_, node)| !(omit_empty && node.is_unset(entry)));
                for (index, (key, node)) in kept.enumerate() {
                    if index > 0 {
                        out.push(b',');
                    }
                    out.extend_from_slice(key.as_bytes());
                    node.write(entry, omit_empty, out);
                }
                out.push(b'}');
            }
        }
    }

    fn is_unset(&self, entry: Entry<'_>) -> bool {
        match self {
            Self::Null => true,
            Self::Typed(operator) => matches!(operator.value(entry), Value::Unset),
            _ => false,
        }
    }
}

/// A whole number prints as one, as in Envoy, whose numbers are all doubles.
fn number_text(number: &serde_json::Number) -> String {
    match number.as_f64() {
        Some(value) if value.fract() == 0.0 && value.abs() < 9e15 => format!("{}", value as i64),
        _ => number.to_string(),
    }
}

fn quoted(text: &str) -> Box<str> {
    Json::from(text).to_string().into()
}

/// Turns what was written since `start` into a JSON string.
pub(super) fn quote_from(out: &mut Vec<u8>, start: usize) {
    let clean = |byte: &u8| *byte >= 0x20 && *byte != b'"' && *byte != b'\\';
    if out[start..].iter().all(clean) && out[start..].is_ascii() {
        out.insert(start, b'"');
        out.push(b'"');
        return;
    }
    // Rare: only names that somebody chose have such characters.
    let text = String::from_utf8_lossy(&out.split_off(start)).into_owned();
    // Writing to a Vec can't fail.
    let _ = write!(out, "{}", Json::from(text));
}

/// Splits a format string into literals and operators.
fn parse(format: &str) -> Result<Vec<Part>, AccessLogError> {
    let mut parts = Vec::new();
    let mut literal = String::new();
    let mut position = 0;
    while let Some(at) = format[position..].find('%').map(|at| position + at) {
        literal.push_str(&format[position..at]);
        if format[at + 1..].starts_with('%') {
            literal.push('%');
            position = at + 2;
            continue;
        }
        let error =
            |reason: String| AccessLogError::Format { format: format.to_owned(), position: at, reason };
        let syntax = Syntax::parse(&format[at..])
            .ok_or_else(|| error("there is no valid operator (%NAME%, %NAME(PARAMETERS)% or %NAME(…):LENGTH%; a percent sign is written %%)".into()))?;
        if !literal.is_empty() {
            parts.push(Part::Literal(std::mem::take(&mut literal).into()));
        }
        parts.push(Part::Operator(Operator::build(&syntax).map_err(error)?));
        position = at + syntax.length;
    }
    literal.push_str(&format[position..]);
    if !literal.is_empty() {
        parts.push(Part::Literal(literal.into()));
    }
    Ok(parts)
}

/// The names of the operators of a format that can be parsed.
pub(super) fn operators(format: &Format) -> Vec<&str> {
    let mut names = Vec::new();
    match format {
        Format::Default => names_in(DEFAULT, &mut names),
        Format::Text { format, .. } => names_in(format, &mut names),
        Format::Json { format, .. } => names_in_json(format, &mut names),
    }
    names
}

fn names_in_json<'a>(json: &'a Json, names: &mut Vec<&'a str>) {
    match json {
        Json::Null | Json::Bool(_) | Json::Number(_) => {}
        Json::String(format) => names_in(format, names),
        Json::Array(list) => list.iter().for_each(|item| names_in_json(item, names)),
        Json::Object(object) => object.values().for_each(|value| names_in_json(value, names)),
    }
}

fn names_in<'a>(mut format: &'a str, names: &mut Vec<&'a str>) {
    while let Some(at) = format.find('%') {
        format = &format[at..];
        let length = if let Some(syntax) = Syntax::parse(format) {
            names.push(syntax.name);
            syntax.length
        } else {
            2.min(format.len()) // a percent sign
        };
        format = &format[length..];
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::tests::record;
    use super::*;

    fn print_with(format: &Format, record: &Record) -> String {
        let mut out = Vec::new();
        Formatter::parse(format).unwrap().format(record, LogType::TcpConnectionEnd, Now::read(), &mut out);
        String::from_utf8(out).unwrap()
    }

    fn print(format: &str) -> String {
        print_with(&Format::Text { format: format.into(), omit_empty_values: false }, &record())
    }

    fn print_json(format: Json, omit_empty_values: bool) -> String {
        print_with(&Format::Json { format, omit_empty_values }, &record())
    }

    fn position(format: &str) -> usize {
        match parse(format) {
            Err(AccessLogError::Format { position, .. }) => position,
            other => panic!("{format}: {other:?}"),
        }
    }

    #[test]
    fn the_default_format_prints_what_envoy_prints() {
        assert_eq!(
            print_with(&Format::Default, &record()),
            "[2026-11-22T02:05:20.470Z] \"- - -\" 0 - 3 6 1 - \"-\" \"-\" \"-\" \"-\" \"127.0.0.1:15997\"\n"
        );
    }

    /// Every line of what Envoy 1.40 logged for the same connection.
    #[test]
    fn every_operator_prints_what_envoy_prints() {
        let golden = include_str!("testdata/envoy_access_log.txt");
        let hostname = nix::unistd::gethostname().unwrap().into_string().unwrap();
        let mut seen = 0;
        for line in golden.lines().filter(|line| !line.starts_with('#')) {
            let (operator, expected) = line.split_once(" => ").unwrap();
            let expected = expected.replace("$HOSTNAME", &hostname);
            assert_eq!(print(&format!("%{operator}%")), expected, "{operator}");
            seen += 1;
        }
        assert!(seen > 140, "{seen}");
    }

    #[test]
    fn operators_are_named() {
        let text = Format::Text {
            format: "100%% %REQ(:METHOD)% %START_TIME(%s)%%BYTES_SENT%%%".into(),
            omit_empty_values: false,
        };
        assert_eq!(operators(&text), ["REQ", "START_TIME", "BYTES_SENT"]);
        let format = json!({"a": ["%DURATION% é", {"b": "x%UPSTREAM_HOST%"}, 7], "%REQ%": null});
        assert_eq!(
            operators(&Format::Json { format, omit_empty_values: true }),
            ["DURATION", "UPSTREAM_HOST"]
        );
        assert!(operators(&Format::Default).contains(&"UPSTREAM_HOST"));
    }

    #[test]
    fn json_keeps_types_sorts_keys_and_says_null() {
        let format = json!({
            "nest": {"a": {"b": "%BYTES_SENT%"}, "n": 5, "t": true, "nul": null,
                     "l": ["%BYTES_SENT%", "x%BYTES_RECEIVED%", 7, 1.5, 3.0]},
            "mix": "v=%BYTES_SENT%", "two": "%BYTES_SENT%%BYTES_RECEIVED%",
            "plain": "text \"q\" \n é", "pct": "100%%", "empty": "", "z": "%ROUTE_NAME%",
            "flags": "%RESPONSE_FLAGS%", "mixed_unset": "r=%ROUTE_NAME%", "port": "%UPSTREAM_REMOTE_PORT%",
        });
        assert_eq!(
            print_json(format.clone(), false),
            concat!(
                r#"{"empty":"","flags":"-","mix":"v=6","mixed_unset":"r=-","#,
                r#""nest":{"a":{"b":6},"l":[6,"x3",7,1.5,3],"n":5,"nul":null,"t":true},"pct":"100%","#,
                r#""plain":"text \"q\" \n é","port":15997,"two":"63","z":null}"#,
                "\n"
            )
        );
        assert_eq!(
            print_json(format, true),
            concat!(
                r#"{"empty":"","flags":"-","mix":"v=6","mixed_unset":"r=","#,
                r#""nest":{"a":{"b":6},"l":[6,"x3",7,1.5,3],"n":5,"t":true},"pct":"100%","#,
                r#""plain":"text \"q\" \n é","port":15997,"two":"63"}"#,
                "\n"
            )
        );
    }

    #[test]
    fn a_hostile_server_name_can_not_forge_an_entry() {
        let mut record = record();
        record.details_mut().requested_server_name = Some("a\n\"b\" é.example".into());
        let text = Format::Text { format: "%REQUESTED_SERVER_NAME%".into(), omit_empty_values: false };
        assert_eq!(print_with(&text, &record), "a__b____.example");
    }

    #[test]
    fn a_failure_reason_with_quotes_stays_valid_json() {
        let mut record = record();
        record.details_mut().upstream_transport_failure = Some("say_\"no\"\\".into());
        let format = Format::Json {
            format: json!({"a": "%UPSTREAM_TRANSPORT_FAILURE_REASON%", "b": "x %UPSTREAM_TRANSPORT_FAILURE_REASON%"}),
            omit_empty_values: false,
        };
        let printed: Json = serde_json::from_str(&print_with(&format, &record)).unwrap();
        assert_eq!(printed, json!({"a": "say_\"no\"\\", "b": "x say_\"no\"\\"}));
    }

    #[test]
    fn omit_empty_values_prints_nothing_in_text() {
        let format =
            Format::Text { format: "<%ROUTE_NAME%|%RESPONSE_FLAGS%>".into(), omit_empty_values: true };
        assert_eq!(print_with(&format, &record()), "<|->");
    }

    /// The positions that Envoy names.
    #[test]
    fn errors_name_the_position() {
        for (format, expected) in [
            ("%", 0),
            ("%BYTES_SENT", 0),
            ("abc%", 3),
            ("%bytes_sent%", 0),
            ("%BYTES_SENT%%", 12),
            ("%START_TIME(%Y%", 0),
            ("% BYTES_SENT%", 0),
            ("%BYTES_SENT:%", 0),
            ("%REQ(X", 0),
            ("%RESPONSE_FLAGS%%", 16),
            ("%BYTES_SENT:99999999999999999999%", 0),
            ("%()%", 0),
            ("%REQ(a)b%", 0),
            ("x %NOSUCH%", 2),
        ] {
            assert_eq!(position(format), expected, "{format}");
        }
    }

    /// What Envoy refuses for other reasons, and what only we refuse.
    #[test]
    fn wrong_parameters_are_refused() {
        for (format, part) in [
            ("%REQ%", "parameter"),
            ("%REQ()%", "parameter"),
            ("%UPSTREAM_CLUSTER:5%", "length"),
            ("%BYTES_SENT(x)%", "parameter"),
            ("%START_TIME:4%", "length"),
            ("%REQ(A?B?C)%", "alternative"),
            ("%COMMON_DURATION(a)%", "a"),
            ("%COMMON_DURATION(DS_RX_BEG:DS_RX_END:h)%", "h"),
            ("%FILTER_STATE(a:X)%", "PLAIN"),
            ("%REQUESTED_SERVER_NAME(HOST_ONLY)%", "HOST_ONLY"),
            ("%METADATA(X:a)%", "X"),
            ("%CEL(1)%", "CEL"),
        ] {
            match parse(format) {
                Err(AccessLogError::Format { reason, .. }) => {
                    assert!(reason.contains(part), "{format}: {reason}");
                }
                other => panic!("{format}: {other:?}"),
            }
        }
    }

    proptest! {
        /// Never a panic, and what is accepted can be printed.
        #[test]
        fn any_string_is_parsed_or_refused(format in "(%|%%|[A-Z_]{1,9}|START_TIME|REQ|BYTES_SENT|[(){}:?é ]|[0-9]|\\PC){0,24}") {
            if let Ok(parts) = parse(&format) {
                let entry =
                    Entry { record: &record(), log_type: LogType::NotSet, http: None, now: Now::read() };
                write_parts(&parts, entry, false, &mut Vec::new());
            }
        }

        /// Text without percent signs prints as it is, and doubled percent signs print once.
        #[test]
        fn literals_survive(text in "\\PC{0,40}") {
            prop_assert_eq!(print(&text.replace('%', "%%")), text);
        }

        /// Known operators between any literals print the literals and the values, in order.
        #[test]
        fn operators_and_literals_interleave(pieces in prop::collection::vec(("[^%]{0,8}", 0..3_usize), 0..8)) {
            const KNOWN: [(&str, &str); 3] =
                [("%BYTES_SENT%", "6"), ("%REQ(X?Y):9%", "-"), ("%UPSTREAM_HOST%", "127.0.0.1:15997")];
            let format: String = pieces.iter().flat_map(|(text, n)| [text.as_str(), KNOWN[*n].0]).collect();
            let expected: String = pieces.iter().flat_map(|(text, n)| [text.as_str(), KNOWN[*n].1]).collect();
            prop_assert_eq!(print(&format), expected);
        }

        /// JSON formats of any strings give one line of valid JSON.
        #[test]
        fn json_is_always_valid(key in "\\PC{0,12}", text in "[^%]{1,20}") {
            let line = print_json(json!({key.clone(): format!("{text}%BYTES_SENT%")}), false);
            prop_assert_eq!(line.matches('\n').count(), 1);
            let parsed: Json = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(&parsed[&key], &Json::from(format!("{text}6")));
        }
    }
}
