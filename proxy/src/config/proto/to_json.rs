//! A message as JSON, for `/config_dump`: proto field names, `Any` expanded, secrets left out.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost_reflect::{DynamicMessage, Kind, MapKey, ReflectMessage, Value as ProtoValue};
use serde_json::{Map, Number, Value as Json};

use super::any;
use super::schema::{MessageSchema, WellKnown};

/// What stands in the place of a secret, as in Envoy.
const REDACTED: &str = "[redacted]";

/// Deepest nesting of `Any` in `Any` that is expanded; a message from the wire may nest them as deep as its
/// size allows.
const MAX_ANY_DEPTH: u32 = 32;

/// A message as proto3 JSON with the names of the .proto files. What Envoy's API marks as sensitive (private
/// keys, passwords, secrets) is replaced by `[redacted]`. An `Any` of a type without a descriptor is shown
/// with its bytes in base64.
pub fn to_json(message: &DynamicMessage) -> Json {
    Writer { any_depth: 0, redact: true }.message(message, false)
}

/// The same with its secrets, for a text that is read again.
#[cfg(test)]
pub(super) fn to_json_with_secrets(message: &DynamicMessage) -> Json {
    Writer { any_depth: 0, redact: false }.message(message, false)
}

struct Writer {
    any_depth: u32,
    redact: bool,
}

impl Writer {
    fn message(&mut self, message: &DynamicMessage, sensitive: bool) -> Json {
        let schema = MessageSchema::of(&message.descriptor());
        match schema.well_known {
            WellKnown::No => Json::Object(self.fields(message, &schema, sensitive)),
            WellKnown::Any => self.any(message, sensitive),
            WellKnown::Duration => duration(message).into(),
            WellKnown::Timestamp => timestamp(message).into(),
            WellKnown::FieldMask => field_mask(message).into(),
            WellKnown::Wrapper | WellKnown::Struct | WellKnown::ListValue => {
                let field = &schema.fields[0].descriptor;
                self.value(&message.get_field(field), &field.kind(), sensitive).unwrap_or(Json::Null)
            }
            WellKnown::Value => {
                let set = schema.fields.iter().find(|field| message.has_field(&field.descriptor));
                set.filter(|field| field.descriptor.number() != 1)
                    .and_then(|field| {
                        let descriptor = &field.descriptor;
                        self.value(&message.get_field(descriptor), &descriptor.kind(), sensitive)
                    })
                    .unwrap_or(Json::Null)
            }
        }
    }

    fn fields(
        &mut self,
        message: &DynamicMessage,
        schema: &MessageSchema,
        sensitive: bool,
    ) -> Map<String, Json> {
        let mut fields = Map::new();
        for field in &schema.fields {
            let descriptor = &field.descriptor;
            if !message.has_field(descriptor) {
                continue;
            }
            let sensitive = sensitive || (field.sensitive && self.redact);
            if let Some(value) = self.value(&message.get_field(descriptor), &descriptor.kind(), sensitive) {
                fields.insert(descriptor.name().to_owned(), value);
            }
        }
        fields
    }

    /// None for a sensitive value that has no harmless form (numbers, booleans, enums): it is left out.
    fn value(&mut self, value: &ProtoValue, kind: &Kind, sensitive: bool) -> Option<Json> {
        Some(match value {
            ProtoValue::List(items) => {
                items.iter().filter_map(|item| self.value(item, kind, sensitive)).collect()
            }
            ProtoValue::Map(entries) => self.map(entries, kind, sensitive),
            ProtoValue::Message(message) => self.message(message, sensitive),
            ProtoValue::String(_) if sensitive => REDACTED.into(),
            ProtoValue::Bytes(_) if sensitive => STANDARD.encode(REDACTED).into(),
            _ if sensitive => return None,
            ProtoValue::String(text) => text.as_str().into(),
            ProtoValue::Bytes(bytes) => STANDARD.encode(bytes).into(),
            ProtoValue::Bool(value) => (*value).into(),
            ProtoValue::I32(value) => (*value).into(),
            ProtoValue::U32(value) => (*value).into(),
            // JSON numbers are doubles to many readers: 64-bit integers are strings in proto3 JSON.
            ProtoValue::I64(value) => value.to_string().into(),
            ProtoValue::U64(value) => value.to_string().into(),
            // Through the shortest decimal: 0.1 and not 0.10000000149011612.
            ProtoValue::F32(value) => float(value.to_string().parse().unwrap_or(f64::from(*value))),
            ProtoValue::F64(value) => float(*value),
            ProtoValue::EnumNumber(number) => enum_name(*number, kind),
        })
    }

    fn map(
        &mut self,
        entries: &std::collections::HashMap<MapKey, ProtoValue>,
        kind: &Kind,
        sensitive: bool,
    ) -> Json {
        let Kind::Message(entry) = kind else { return Json::Null };
        let kind = entry.map_entry_value_field().kind();
        let mut sorted: Vec<_> = entries.iter().collect();
        sorted.sort_by_key(|(key, _)| *key);
        let object = sorted
            .into_iter()
            .filter_map(|(key, value)| Some((any::map_key_text(key), self.value(value, &kind, sensitive)?)));
        Json::Object(object.collect())
    }

    fn any(&mut self, message: &DynamicMessage, sensitive: bool) -> Json {
        let (type_url, bytes) = any::parts(message);
        let mut object = Map::new();
        if type_url.is_empty() && bytes.is_empty() {
            return Json::Object(object);
        }
        object.insert("@type".to_owned(), type_url.as_str().into());
        let inner = any::decode(&type_url, &bytes).and_then(Result::ok);
        match inner.filter(|_| self.any_depth < MAX_ANY_DEPTH) {
            Some(inner) => {
                self.any_depth += 1;
                let schema = MessageSchema::of(&inner.descriptor());
                if schema.well_known == WellKnown::No {
                    object.extend(self.fields(&inner, &schema, sensitive));
                } else {
                    object.insert("value".to_owned(), self.message(&inner, sensitive));
                }
                self.any_depth -= 1;
            }
            None if sensitive => {}
            None => {
                object.insert("value".to_owned(), STANDARD.encode(&bytes).into());
            }
        }
        Json::Object(object)
    }
}

fn float(value: f64) -> Json {
    match Number::from_f64(value) {
        Some(number) => Json::Number(number),
        None if value.is_nan() => "NaN".into(),
        None if value > 0.0 => "Infinity".into(),
        None => "-Infinity".into(),
    }
}

fn enum_name(number: i32, kind: &Kind) -> Json {
    let Kind::Enum(descriptor) = kind else { return number.into() };
    if descriptor.full_name() == "google.protobuf.NullValue" {
        return Json::Null;
    }
    descriptor.get_value(number).map_or_else(|| number.into(), |value| value.name().into())
}

fn seconds_and_nanos(message: &DynamicMessage) -> (i64, i32) {
    let seconds = message.get_field_by_number(1).and_then(|value| value.as_i64());
    let nanos = message.get_field_by_number(2).and_then(|value| value.as_i32());
    (seconds.unwrap_or_default(), nanos.unwrap_or_default())
}

/// A fraction of 0, 3, 6 or 9 digits, whatever is enough.
fn fraction(nanos: u32) -> String {
    match nanos {
        0 => String::new(),
        n if n % 1_000_000 == 0 => format!(".{:03}", n / 1_000_000),
        n if n % 1_000 == 0 => format!(".{:06}", n / 1_000),
        n => format!(".{n:09}"),
    }
}

fn duration(message: &DynamicMessage) -> String {
    let (seconds, nanos) = seconds_and_nanos(message);
    let sign = if seconds < 0 || nanos < 0 { "-" } else { "" };
    format!("{sign}{}{}s", seconds.unsigned_abs(), fraction(nanos.unsigned_abs()))
}

fn timestamp(message: &DynamicMessage) -> String {
    let (seconds, nanos) = seconds_and_nanos(message);
    let instant = jiff::Timestamp::from_second(seconds).unwrap_or_default();
    let date_time = instant.strftime("%Y-%m-%dT%H:%M:%S");
    format!("{date_time}{}Z", fraction(nanos.unsigned_abs()))
}

fn field_mask(message: &DynamicMessage) -> String {
    let paths = message.get_field_by_number(1);
    let paths = paths.as_ref().and_then(|value| value.as_list()).unwrap_or_default();
    let camel = paths.iter().filter_map(|path| path.as_str()).map(|path| {
        let mut upper = false;
        path.chars().fold(String::new(), |mut out, c| {
            if c == '_' {
                upper = true;
            } else {
                out.push(if std::mem::take(&mut upper) { c.to_ascii_uppercase() } else { c });
            }
            out
        })
    });
    camel.collect::<Vec<_>>().join(",")
}
