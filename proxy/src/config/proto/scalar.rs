//! Scalars of proto3 JSON, as lenient as Envoy (protobuf's parser with its legacy rules): numbers in
//! strings, booleans in strings, enum names in any case.

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use prost_reflect::{EnumDescriptor, Kind, MapKey, Value as ProtoValue};

use super::nearest::nearest;
use super::tree::Value;
use super::yaml::string_hint;
use crate::config::error::{Reason, quoted};

/// Seconds that a Duration may hold either way: about 10,000 years.
const MAX_DURATION_SECONDS: u64 = 315_576_000_000;

/// With or without padding, and with whatever in the bits that padding leaves over.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A scalar of this kind, or why it is none. The kind is not a message.
pub(super) fn scalar(kind: &Kind, value: &Value) -> Result<ProtoValue, Reason> {
    let wrong = |expected: &str| wrong_type(expected, value, None);
    match kind {
        Kind::Bool => boolean(value).map(ProtoValue::Bool).ok_or_else(|| wrong("true or false")),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => integer(value).map(ProtoValue::I32),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => integer(value).map(ProtoValue::I64),
        Kind::Uint32 | Kind::Fixed32 => integer(value).map(ProtoValue::U32),
        Kind::Uint64 | Kind::Fixed64 => integer(value).map(ProtoValue::U64),
        Kind::Double => float(value).map(ProtoValue::F64),
        Kind::Float => {
            let wide = float(value)?;
            let narrow = wide as f32;
            if wide.is_finite() && narrow.is_infinite() {
                return Err(wrong("a number that fits 32-bit floating point"));
            }
            Ok(ProtoValue::F32(narrow))
        }
        Kind::String => match value {
            Value::String(text) => Ok(ProtoValue::String(text.to_string())),
            _ => Err(wrong_type("a string", value, string_hint(value))),
        },
        Kind::Bytes => bytes(value).map(|bytes| ProtoValue::Bytes(bytes.into())),
        Kind::Enum(descriptor) => enum_number(descriptor, value).map(ProtoValue::EnumNumber),
        Kind::Message(_) => Err(wrong("a scalar")),
    }
}

/// The key of a map field.
pub(super) fn map_key(kind: &Kind, key: &str) -> Result<MapKey, Reason> {
    if matches!(kind, Kind::String) {
        return Ok(MapKey::String(key.to_owned()));
    }
    let value = scalar(kind, &Value::String(key.into()))?;
    value.into_map_key().ok_or_else(|| Reason::Invalid(format!("{} can't be a key", quoted(key))))
}

/// For a value of the wrong shape.
pub(super) fn wrong_type(expected: &str, found: &Value, hint: Option<&'static str>) -> Reason {
    Reason::WrongType { expected: expected.to_owned(), found: found.describe(), hint }
}

fn boolean(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(value) => Some(*value),
        Value::String(text) => match text.to_ascii_lowercase().as_str() {
            "true" | "t" | "yes" | "y" | "1" => Some(true),
            "false" | "f" | "no" | "n" | "0" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// An integer type of proto.
trait Integer: TryFrom<i128> {
    const EXPECTED: &'static str;
}
impl Integer for i32 {
    const EXPECTED: &'static str = "an integer from -2147483648 to 2147483647";
}
impl Integer for i64 {
    const EXPECTED: &'static str = "an integer that fits 64 bits";
}
impl Integer for u32 {
    const EXPECTED: &'static str = "an integer from 0 to 4294967295";
}
impl Integer for u64 {
    const EXPECTED: &'static str = "an integer from 0 to 18446744073709551615";
}

fn integer<T: Integer>(value: &Value) -> Result<T, Reason> {
    let (Value::Number(text) | Value::String(text)) = value else {
        return Err(wrong_type(T::EXPECTED, value, None));
    };
    integer_text(text)
        .and_then(|wide| T::try_from(wide).ok())
        .ok_or_else(|| wrong_type(T::EXPECTED, value, None))
}

/// Decimal digits, or a floating-point number without a fraction (`3.0`, `1e3`, `0x1F`).
fn integer_text(text: &str) -> Option<i128> {
    if let Ok(value) = text.parse() {
        return Some(value);
    }
    if text.contains(|c: char| c.is_ascii_whitespace()) {
        return None;
    }
    let value = float_text(text)?;
    // Beyond 2^64 nothing fits; below it, a float without a fraction converts exactly.
    (value.fract() == 0.0 && value.abs() <= 18_446_744_073_709_551_616.0).then_some(value as i128)
}

fn float(value: &Value) -> Result<f64, Reason> {
    let (Value::Number(text) | Value::String(text)) = value else {
        return Err(wrong_type("a number", value, None));
    };
    float_text(text.trim_ascii())
        .filter(|number| number.is_finite() || matches!(value, Value::String(_)))
        .ok_or_else(|| wrong_type("a number that fits 64-bit floating point", value, None))
}

/// Decimal or C99 hexadecimal floating point.
fn float_text(text: &str) -> Option<f64> {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let Some(hex) = unsigned.strip_prefix("0x").or_else(|| unsigned.strip_prefix("0X")) else {
        return text.parse().ok();
    };
    let (mantissa, exponent) = match hex.split_once(['p', 'P']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (hex, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    if whole.len() + fraction.len() == 0 {
        return None;
    }
    let mut value = 0.0_f64;
    for digit in whole.chars().chain(fraction.chars()) {
        value = value * 16.0 + f64::from(digit.to_digit(16)?);
    }
    value *= 2.0_f64.powi(exponent.saturating_sub(4 * fraction.len() as i32));
    Some(if text.starts_with('-') { -value } else { value })
}

fn bytes(value: &Value) -> Result<Vec<u8>, Reason> {
    let expected = "base64";
    let Value::String(text) = value else { return Err(wrong_type(expected, value, None)) };
    // Both alphabets are accepted.
    let standard = text.replace('-', "+").replace('_', "/");
    BASE64.decode(standard).map_err(|_| wrong_type(expected, value, None))
}

fn enum_number(descriptor: &EnumDescriptor, value: &Value) -> Result<i32, Reason> {
    let unknown = |text: &str| unknown_enum_value(descriptor, text);
    match value {
        Value::Null if descriptor.full_name() == "google.protobuf.NullValue" => Ok(0),
        Value::String(text) => match by_name(descriptor, text) {
            Some(number) => Ok(number),
            None => text.parse().map_err(|_| unknown(text)),
        },
        Value::Number(text) => text.parse().map_err(|_| unknown(text)),
        _ => Err(wrong_type(&format!("a name or number of {}", descriptor.full_name()), value, None)),
    }
}

/// For a value that an enum has not.
pub(super) fn unknown_enum_value(descriptor: &EnumDescriptor, text: &str) -> Reason {
    let names: Vec<_> = descriptor.values().map(|value| value.name().to_owned()).collect();
    Reason::UnknownEnumValue {
        value: quoted(text),
        name: descriptor.full_name().to_owned(),
        suggestion: nearest(text, names.iter().map(String::as_str)).map(str::to_owned),
        allowed: names.join(", "),
    }
}

/// Exact, else in any case.
fn by_name(descriptor: &EnumDescriptor, text: &str) -> Option<i32> {
    if let Some(value) = descriptor.get_value_by_name(text) {
        return Some(value.number());
    }
    let loose = text.to_ascii_uppercase();
    descriptor.values().find(|value| value.name() == loose).map(|value| value.number())
}

/// `1s`, `0.25s`, `-1.5s`: seconds and nanoseconds.
pub(super) fn duration(text: &str) -> Option<(i64, i32)> {
    let (negative, rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (seconds, nanos) = decimal_seconds(rest.strip_suffix('s')?)?;
    if seconds > MAX_DURATION_SECONDS || (seconds == MAX_DURATION_SECONDS && nanos > 0) {
        return None;
    }
    let sign = if negative { -1 } else { 1 };
    Some((sign * seconds as i64, sign as i32 * nanos as i32))
}

/// Whole seconds, perhaps with a fraction of up to nine digits.
fn decimal_seconds(text: &str) -> Option<(u64, u32)> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let (whole, fraction) = match text.split_once('.') {
        Some((whole, fraction)) if digits(fraction) && fraction.len() <= 9 => (whole, fraction),
        Some(_) => return None,
        None => (text, "0"),
    };
    if !digits(whole) {
        return None;
    }
    Some((whole.parse().ok()?, format!("{fraction:0<9}").parse().ok()?))
}

/// RFC 3339, from year 1 to 9999: seconds since the epoch, and nanoseconds.
pub(super) fn timestamp(text: &str) -> Option<(i64, i32)> {
    let shape = |pattern: &str, text: &str| {
        text.len() == pattern.len()
            && text
                .bytes()
                .zip(pattern.bytes())
                .all(|(b, p)| if p == b'0' { b.is_ascii_digit() } else { b == p })
    };
    let (date_time, rest) = text.split_at_checked(19)?;
    let zone = match rest.strip_prefix('.') {
        Some(fraction) => {
            let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
            (1..=9).contains(&digits).then(|| &fraction[digits..])?
        }
        None => rest,
    };
    let zoned = zone == "Z"
        || zone.get(1..).is_some_and(|hours| shape("00:00", hours)) && zone.starts_with(['+', '-']);
    if !shape("0000-00-00T00:00:00", date_time) || !zoned || date_time.starts_with("0000") {
        return None;
    }
    let instant: jiff::Timestamp = text.parse().ok()?;
    // Nanoseconds count forward from the second, also before 1970.
    let nanos = i64::from(instant.subsec_nanosecond());
    let borrowed = i64::from(nanos < 0);
    Some((instant.as_second() - borrowed, (nanos + borrowed * 1_000_000_000) as i32))
}

/// `someField.other,third` to `some_field.other` and `third`. A name with `_` has no JSON form.
pub(super) fn field_mask(text: &str) -> Option<Vec<String>> {
    if text.is_empty() {
        return Some(Vec::new());
    }
    text.split(',')
        .map(|path| {
            let mut snake = String::new();
            for c in path.chars() {
                match c {
                    '_' => return None,
                    c if c.is_ascii_uppercase() => {
                        snake.push('_');
                        snake.push(c.to_ascii_lowercase());
                    }
                    c => snake.push(c),
                }
            }
            Some(snake)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers() {
        for (text, value) in [
            ("50001", 50001),
            ("3.0", 3),
            ("1e3", 1000),
            ("0x1F", 31),
            ("0x1.8p1", 3),
            ("0x1p2", 4),
            ("017", 17),
            ("+5", 5),
            ("-0", 0),
            (".5e1", 5),
            ("5.", 5),
            ("50e-1", 5),
        ] {
            assert_eq!(integer_text(text), Some(value), "{text}");
        }
        for text in [
            "", " 5", "5 ", "5.5", "5e-1", "0x", "0b1", "1_000", "fifty", "1e20", "NaN", "inf", "0x1F ", "-",
            "é",
        ] {
            assert_eq!(integer_text(text), None, "{text}");
        }
        let out_of_range = integer::<u32>(&Value::String("4294967296".into())).unwrap_err();
        assert_eq!(
            out_of_range.to_string(),
            "expected an integer from 0 to 4294967295, found the string \"4294967296\""
        );
        assert_eq!(integer::<u64>(&Value::String("18446744073709551615".into())).unwrap(), u64::MAX);
        assert_eq!(integer::<i64>(&Value::Number("-9223372036854775808".into())).unwrap(), i64::MIN);
        assert!(integer::<u32>(&Value::Number("-1".into())).is_err());
    }

    #[test]
    fn durations() {
        for (text, value) in [
            ("1s", (1, 0)),
            ("0.25s", (0, 250_000_000)),
            ("-0.5s", (0, -500_000_000)),
            ("1.123456789s", (1, 123_456_789)),
            ("315576000000s", (315_576_000_000, 0)),
        ] {
            assert_eq!(duration(text), Some(value), "{text}");
        }
        for text in [
            "",
            "s",
            "1",
            "1m",
            "250ms",
            ".5s",
            "1.s",
            "+1s",
            "1.1234567891s",
            " 1s",
            "1s ",
            "1 s",
            "1S",
            "1e1s",
            "--1s",
            "315576000001s",
            "99999999999999999999999s",
            "-",
        ] {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    #[test]
    fn timestamps() {
        assert_eq!(timestamp("1970-01-01T00:00:01.5Z"), Some((1, 500_000_000)));
        assert_eq!(timestamp("1969-12-31T23:59:59.75Z"), Some((-1, 750_000_000)));
        assert_eq!(timestamp("1970-01-01T02:00:00+02:00"), Some((0, 0)));
        for text in [
            "",
            "1970-01-01",
            "1970-01-01T00:00:00",
            "1970-13-01T00:00:00Z",
            "1970-02-30T00:00:00Z",
            "1970-01-01 00:00:00Z",
            "1970-01-01T00:00:00Z[UTC]",
            "1970-01-01T00:00:00.Z",
            "0000-01-01T00:00:00Z",
            "1970-01-01T00:00:00é",
            "+é",
        ] {
            assert_eq!(timestamp(text), None, "{text}");
        }
    }

    #[test]
    fn base64_of_both_alphabets() {
        let decode = |text: &str| bytes(&Value::String(text.into())).ok();
        for text in ["aGk=", "aGk", "aGl="] {
            assert_eq!(decode(text).as_deref(), Some(&b"hi"[..]), "{text}");
        }
        assert_eq!(decode("_-8="), decode("/+8"));
        for text in ["a", "a=", "a===", "aGk==", "a Gk=", "aG\nk="] {
            assert_eq!(decode(text), None, "{text}");
        }
    }

    #[test]
    fn field_masks() {
        assert_eq!(field_mask("fooBar.baz,q"), Some(vec!["foo_bar.baz".to_owned(), "q".to_owned()]));
        assert_eq!(field_mask("foo_bar"), None);
        assert_eq!(field_mask(""), Some(vec![]));
    }
}
