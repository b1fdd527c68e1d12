//! Rules of strings.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tidegate_api::validate::string_rules::WellKnown as WellKnownString;
use tidegate_api::validate::{KnownRegex, StringRules};

use crate::config::error::quoted;

/// How a string breaks its rules.
pub(super) fn string(value: &str, rules: &StringRules) -> Option<String> {
    if rules.ignore_empty() && value.is_empty() {
        return None;
    }
    let chars = value.chars().count() as u64;
    let bytes = value.len() as u64;
    if chars < rules.min_len() || bytes < rules.min_bytes() {
        return Some(match rules.min_len().max(rules.min_bytes()) {
            1 => "must not be empty".to_owned(),
            min => format!("must have at least {min} characters, has {chars}"),
        });
    }
    if let Some(max) = rules.max_len.filter(|max| chars > *max).or(rules.max_bytes.filter(|max| bytes > *max))
    {
        return Some(format!("may have at most {max} characters, has {bytes}"));
    }
    let is = || quoted(value);
    if rules.len.is_some_and(|len| chars != len) || rules.len_bytes.is_some_and(|len| bytes != len) {
        let len = rules.len.or(rules.len_bytes).unwrap_or_default();
        return Some(format!("must have exactly {len} characters, has {bytes}"));
    }
    if let Some(wanted) = rules.r#const.as_ref().filter(|wanted| *wanted != value) {
        return Some(format!("must be {wanted:?}, is {}", is()));
    }
    let part = [
        ("start with", &rules.prefix, rules.prefix.as_ref().is_none_or(|part| value.starts_with(part))),
        ("end with", &rules.suffix, rules.suffix.as_ref().is_none_or(|part| value.ends_with(part))),
        ("contain", &rules.contains, rules.contains.as_ref().is_none_or(|part| value.contains(part))),
    ];
    if let Some((verb, Some(wanted), _)) = part.into_iter().find(|(_, _, holds)| !holds) {
        return Some(format!("must {verb} {wanted:?}, is {}", is()));
    }
    if rules.not_contains.as_ref().is_some_and(|part| value.contains(part)) {
        return Some(format!("must not contain {:?}, is {}", rules.not_contains(), is()));
    }
    if !rules.r#in.is_empty() && !rules.r#in.iter().any(|allowed| allowed == value) {
        return Some(format!("must be one of {}, is {}", rules.r#in.join(", "), is()));
    }
    if rules.not_in.iter().any(|forbidden| forbidden == value) {
        return Some(format!("must not be {}", is()));
    }
    if let Some(pattern) = rules.pattern.as_ref().filter(|pattern| !matches_pattern(value, pattern)) {
        return Some(format!("must match {pattern}, is {}", is()));
    }
    let wanted = rules.well_known.and_then(|format| not_in_format(value, format, rules.strict()))?;
    Some(format!("must be {wanted}, is {}", is()))
}

fn matches_pattern(value: &str, pattern: &str) -> bool {
    // Every pattern of the vendored files compiles: a test holds that.
    regex::Regex::new(pattern).is_ok_and(|regex| regex.is_match(value))
}

/// What a value should have been, when it is not of a well-known format.
fn not_in_format(value: &str, format: WellKnownString, strict: bool) -> Option<&'static str> {
    let is_ip = value.parse::<IpAddr>().is_ok();
    let (holds, wanted) = match format {
        WellKnownString::Ip(true) => (is_ip, "an IP address"),
        WellKnownString::Ipv4(true) => (value.parse::<Ipv4Addr>().is_ok(), "an IPv4 address"),
        WellKnownString::Ipv6(true) => (value.parse::<Ipv6Addr>().is_ok(), "an IPv6 address"),
        WellKnownString::Hostname(true) => (is_hostname(value), "a host name"),
        WellKnownString::Address(true) => (is_ip || is_hostname(value), "a host name or an IP address"),
        WellKnownString::WellKnownRegex(kind) => match KnownRegex::try_from(kind) {
            Ok(KnownRegex::HttpHeaderName) => (is_header_name(value, strict), "a header name"),
            Ok(KnownRegex::HttpHeaderValue) => (is_header_value(value, strict), "a header value"),
            _ => return None,
        },
        _ => return None,
    };
    (!holds).then_some(wanted)
}

fn is_hostname(value: &str) -> bool {
    let labels = value.strip_suffix('.').unwrap_or(value);
    labels.len() <= 253
        && labels.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

fn is_header_name(value: &str, strict: bool) -> bool {
    if !strict {
        // Not strict, names and values have the same rule, and an empty one is accepted (checked with Envoy).
        return is_header_value(value, false);
    }
    let name = value.strip_prefix(':').unwrap_or(value);
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_|~`".contains(&b))
}

fn is_header_value(value: &str, strict: bool) -> bool {
    if strict {
        !value.contains(|c: char| (c.is_ascii_control() && c != '\t') || c == '\u{7f}')
    } else {
        !value.contains(['\0', '\n', '\r'])
    }
}
