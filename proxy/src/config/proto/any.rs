//! `google.protobuf.Any`: packing, unpacking, and the `TypedStruct` that may stand for a message.

use std::sync::Arc;

use prost::bytes::Bytes;
use prost::{DecodeError, Message, Name};
use prost_reflect::{DynamicMessage, MapKey, Value};
use tidegate_api::wkt::Any;

use super::schema::MessageSchema;
use super::tree::{Builder, Tree, Value as TreeValue};
use super::walk::Walker;
use super::{Options, SourceMap};
use crate::config::error::{ConfigError, Mark, Problem};

/// Domain in front of the type names of packed messages.
const DOMAIN: &str = "type.googleapis.com";

/// Why an `Any` does not give the message that was asked for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum UnpackError {
    /// It holds another type.
    #[error("expected the type {expected}, found {found}")]
    WrongType {
        /// Full name of the message that was asked for.
        expected: String,
        /// Type name of what is there; empty for an empty `Any`.
        found: String,
    },
    /// Its bytes are not a message of its type.
    #[error("not a valid {name}: {error}")]
    Malformed {
        /// Full name of the message.
        name: String,
        /// What the decoder says.
        error: DecodeError,
    },
    /// It holds a `TypedStruct` that is not a valid message of that type.
    #[error(transparent)]
    Invalid(#[from] ConfigError),
}

impl UnpackError {
    /// A stable name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::WrongType { .. } => "wrong_type",
            Self::Malformed { .. } => "malformed",
            Self::Invalid(_) => "invalid",
        }
    }
}

/// The type name of a type URL: what follows the last slash.
pub fn type_name(type_url: &str) -> &str {
    type_url.rsplit_once('/').map_or(type_url, |(_, name)| name)
}

/// The type name of the message in an `Any`, also when a `TypedStruct` stands for it.
pub fn inner_type_name(any: &Any) -> String {
    match typed_struct(any) {
        Some(Ok((type_url, _))) => type_name(&type_url).to_owned(),
        _ => type_name(&any.type_url).to_owned(),
    }
}

/// The message in an `Any`: packed, or as a `TypedStruct` (udpa or xds) of that type. Unknown fields of a
/// `TypedStruct` are ignored, as those of a packed message are.
pub fn unpack<M: Message + Name + Default>(any: &Any) -> Result<M, UnpackError> {
    let expected = M::full_name();
    let malformed = |error| UnpackError::Malformed { name: expected.clone(), error };
    if type_name(&any.type_url) == expected {
        return M::decode(&any.value[..]).map_err(malformed);
    }
    let (type_url, value) = match typed_struct(any) {
        Some(inner) => inner.map_err(malformed)?,
        None => (any.type_url.clone(), None),
    };
    if type_name(&type_url) != expected {
        return Err(UnpackError::WrongType { expected, found: type_name(&type_url).to_owned() });
    }
    let Some(schema) = MessageSchema::named(&expected) else {
        return Err(UnpackError::WrongType { expected, found: "a type without a descriptor".into() });
    };
    let message = from_struct(&value.unwrap_or_default(), &schema)?;
    message.transcode_to().map_err(malformed)
}

/// The message that a struct stands for.
fn from_struct(
    value: &tidegate_api::wkt::Struct,
    schema: &Arc<MessageSchema>,
) -> Result<DynamicMessage, ConfigError> {
    let file: Arc<str> = "TypedStruct".into();
    let problem = |reason| Problem {
        file: file.clone(),
        at: None,
        path: String::new(),
        reason: crate::config::error::Reason::Limit(reason),
    };
    let tree = struct_tree(value).map_err(|reason| problem(reason.to_owned()))?;
    let options =
        Options { unknown_fields: super::UnknownFields::Warn, unknown_types: super::UnknownTypes::Keep };
    let map = SourceMap::new(file.clone(), tree);
    let mut walker = Walker::new(&map, &options);
    let message = walker.root(schema);
    // The struct came without lines.
    let problems =
        walker.finish().problems.into_iter().map(|problem| Problem { at: None, ..problem }).collect();
    ConfigError::from_problems(problems).map_or(Ok(message), Err)
}

/// `type_url` and `value` of the `TypedStruct` in an `Any`; none when it holds something else.
#[allow(clippy::type_complexity)]
pub(super) fn typed_struct(
    any: &Any,
) -> Option<Result<(String, Option<tidegate_api::wkt::Struct>), DecodeError>> {
    match type_name(&any.type_url) {
        "udpa.type.v1.TypedStruct" => Some(
            tidegate_api::udpa::r#type::v1::TypedStruct::decode(&any.value[..])
                .map(|inner| (inner.type_url, inner.value)),
        ),
        "xds.type.v3.TypedStruct" => Some(
            tidegate_api::xds::r#type::v3::TypedStruct::decode(&any.value[..])
                .map(|inner| (inner.type_url, inner.value)),
        ),
        _ => None,
    }
}

fn struct_tree(value: &tidegate_api::wkt::Struct) -> Result<Tree, &'static str> {
    use tidegate_api::wkt::value::Kind;
    enum Step<'a> {
        Struct(&'a tidegate_api::wkt::Struct),
        Value(&'a tidegate_api::wkt::Value),
        Key(&'a str),
        End,
    }
    let here = Mark::default();
    let mut builder = Builder::default();
    let mut todo = vec![Step::Struct(value)];
    while let Some(step) = todo.pop() {
        let value = match step {
            Step::Struct(value) => {
                builder.start_map(here, 0)?;
                todo.push(Step::End);
                for (key, value) in value.fields.iter().rev() {
                    todo.extend([Step::Value(value), Step::Key(key)]);
                }
                continue;
            }
            Step::End => {
                builder.end()?;
                continue;
            }
            Step::Key(key) => {
                builder.key(key.into(), here);
                continue;
            }
            Step::Value(value) => value,
        };
        let scalar = match &value.kind {
            Some(Kind::StructValue(value)) => {
                todo.push(Step::Struct(value));
                continue;
            }
            Some(Kind::ListValue(list)) => {
                builder.start_list(here, 0)?;
                todo.push(Step::End);
                todo.extend(list.values.iter().rev().map(Step::Value));
                continue;
            }
            Some(Kind::BoolValue(value)) => TreeValue::Bool(*value),
            Some(Kind::NumberValue(value)) => TreeValue::Number(value.to_string().into()),
            Some(Kind::StringValue(value)) => TreeValue::String(value.as_str().into()),
            Some(Kind::NullValue(_)) | None => TreeValue::Null,
        };
        builder.scalar(here, scalar);
    }
    Ok(builder.finish())
}

/// An `Any` around a message.
pub(super) fn pack(type_url: &str, message: &DynamicMessage) -> Option<DynamicMessage> {
    let any = MessageSchema::named("google.protobuf.Any")?;
    let mut packed = DynamicMessage::new(any.descriptor.clone());
    packed.set_field_by_number(1, Value::String(type_url.to_owned()));
    packed.set_field_by_number(2, Value::Bytes(Bytes::from(message.encode_to_vec())));
    Some(packed)
}

/// An `Any` around an `xds.type.v3.TypedStruct`, which keeps a message of a type that nothing here knows.
pub(super) fn pack_unknown(type_url: &str, value: DynamicMessage) -> Option<DynamicMessage> {
    let schema = MessageSchema::named("xds.type.v3.TypedStruct")?;
    let mut wrapped = DynamicMessage::new(schema.descriptor.clone());
    wrapped.set_field_by_number(1, Value::String(type_url.to_owned()));
    wrapped.set_field_by_number(2, Value::Message(value));
    pack(&format!("{DOMAIN}/xds.type.v3.TypedStruct"), &wrapped)
}

/// Type URL and bytes of an `Any`.
pub(super) fn parts(any: &DynamicMessage) -> (String, Bytes) {
    let type_url = any.get_field_by_number(1).and_then(|value| value.as_str().map(str::to_owned));
    let bytes = any.get_field_by_number(2).and_then(|value| value.as_bytes().cloned());
    (type_url.unwrap_or_default(), bytes.unwrap_or_default())
}

/// The message in an `Any`; none when its type is unknown.
pub(super) fn decode(type_url: &str, bytes: &[u8]) -> Option<Result<DynamicMessage, DecodeError>> {
    let schema = MessageSchema::named(type_name(type_url))?;
    Some(DynamicMessage::decode(schema.descriptor.clone(), bytes))
}

/// The key of a map entry as JSON has it.
pub(super) fn map_key_text(key: &MapKey) -> String {
    match key {
        MapKey::Bool(key) => key.to_string(),
        MapKey::I32(key) => key.to_string(),
        MapKey::I64(key) => key.to_string(),
        MapKey::U32(key) => key.to_string(),
        MapKey::U64(key) => key.to_string(),
        MapKey::String(key) => key.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tidegate_api::tcp_proxy::TcpProxy;
    use tidegate_api::wkt::{Struct, Value, value::Kind};

    use super::*;

    fn value(kind: Kind) -> Value {
        Value { kind: Some(kind) }
    }

    fn typed_struct(fields: impl IntoIterator<Item = (&'static str, Kind)>, type_url: &str) -> Any {
        let fields: BTreeMap<_, _> =
            fields.into_iter().map(|(key, kind)| (key.to_owned(), value(kind))).collect();
        Any::from_msg(&tidegate_api::udpa::r#type::v1::TypedStruct {
            type_url: type_url.into(),
            value: Some(Struct { fields }),
        })
        .unwrap()
    }

    #[test]
    fn packed_or_as_a_struct() {
        let proxy = TcpProxy { stat_prefix: "s".into(), max_connect_attempts: Some(3), ..Default::default() };
        assert_eq!(unpack::<TcpProxy>(&Any::from_msg(&proxy).unwrap()).unwrap(), proxy);
        let any = typed_struct(
            [
                ("statPrefix", Kind::StringValue("s".into())),
                ("max_connect_attempts", Kind::NumberValue(3.0)),
                ("from_the_future", Kind::BoolValue(true)),
            ],
            &TcpProxy::type_url(),
        );
        assert_eq!(unpack::<TcpProxy>(&any).unwrap(), proxy);
        assert_eq!(inner_type_name(&any), TcpProxy::full_name());
    }

    #[test]
    fn refusals() {
        let other = typed_struct([], "type.googleapis.com/stats.PluginConfig");
        assert_eq!(
            unpack::<TcpProxy>(&other).unwrap_err().to_string(),
            "expected the type envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, found stats.PluginConfig"
        );
        let bad = typed_struct([("stat_prefix", Kind::NumberValue(1.5))], &TcpProxy::type_url());
        assert_eq!(
            unpack::<TcpProxy>(&bad).unwrap_err().to_string(),
            "TypedStruct: stat_prefix: expected a string, found the number 1.5; quote the value"
        );
        let garbage = Any { type_url: TcpProxy::type_url(), value: vec![0xff; 9] };
        assert_eq!(unpack::<TcpProxy>(&garbage).unwrap_err().label(), "malformed");
        assert_eq!(unpack::<TcpProxy>(&Any::default()).unwrap_err().label(), "wrong_type");
        let nested = typed_struct([], "type.googleapis.com/udpa.type.v1.TypedStruct");
        assert_eq!(unpack::<TcpProxy>(&nested).unwrap_err().label(), "wrong_type");
    }
}
