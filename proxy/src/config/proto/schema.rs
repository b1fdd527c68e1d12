//! What the loader needs to know about each message type, computed once per type.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, PoisonError, RwLock};
use std::time::Duration;

use prost_reflect::{
    DynamicMessage, EnumValueDescriptor, ExtensionDescriptor, FieldDescriptor, MessageDescriptor,
    ReflectMessage,
};
use tidegate_api::validate::FieldRules;

/// A message type.
#[derive(Debug)]
pub(super) struct MessageSchema {
    pub(super) descriptor: MessageDescriptor,
    /// How its JSON differs from that of an ordinary message.
    pub(super) well_known: WellKnown,
    /// In order of declaration.
    pub(super) fields: Vec<FieldSchema>,
    /// Indices into `fields` by both spellings.
    by_name: HashMap<Box<str>, usize>,
    /// Oneofs of which one member must be set.
    pub(super) required_oneofs: Vec<RequiredOneof>,
}

/// A field.
#[derive(Debug)]
pub(super) struct FieldSchema {
    pub(super) descriptor: FieldDescriptor,
    /// `validate.rules`.
    pub(super) rules: Option<Box<FieldRules>>,
    /// Deprecated, and since which version of Envoy.
    pub(super) deprecated: Option<Deprecation>,
    /// `udpa.annotations.sensitive`: not to be shown.
    pub(super) sensitive: bool,
}

/// How far a field or enum value is out of use.
#[derive(Clone, Debug, Default)]
pub(super) struct Deprecation {
    pub(super) since: Option<String>,
    /// Envoy refuses it unless a runtime flag says otherwise.
    pub(super) disallowed: bool,
}

/// A oneof with `validate.required`.
#[derive(Debug)]
pub(super) struct RequiredOneof {
    /// Field numbers of its members.
    pub(super) members: Vec<u32>,
    /// `one of a, b or c`.
    pub(super) description: String,
}

/// Messages with a JSON form of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WellKnown {
    /// An ordinary message: a mapping of its fields.
    No,
    Any,
    Duration,
    Timestamp,
    FieldMask,
    Struct,
    Value,
    ListValue,
    /// `google.protobuf.UInt32Value` and the like: the bare scalar.
    Wrapper,
}

/// Schemas by full name of their message type. A poisoned lock still guards whole entries: they are inserted in one
/// step.
static CACHE: LazyLock<RwLock<HashMap<String, Arc<MessageSchema>>>> = LazyLock::new(Default::default);

/// Milliseconds between calls of [`release_unused`] since a schema was asked for.
static QUIET: AtomicU64 = AtomicU64::new(0);

/// Forgets schemas and descriptors, some 10 MB. What needs them next makes them again. True if there were any.
pub(super) fn release() -> bool {
    let schemas = std::mem::take(&mut *CACHE.write().unwrap_or_else(PoisonError::into_inner));
    tidegate_api::release_descriptors() || !schemas.is_empty()
}

/// The same, once nobody has needed a schema for a time. `since`: the time since the last call.
pub(super) fn release_unused(since: Duration, kept: Duration) -> bool {
    let millis = since.as_millis() as u64;
    let quiet = QUIET.fetch_add(millis, Ordering::Relaxed).saturating_add(millis);
    u128::from(quiet) >= kept.as_millis() && release()
}

impl MessageSchema {
    /// The schema of a message type.
    pub(super) fn of(descriptor: &MessageDescriptor) -> Arc<Self> {
        QUIET.store(0, Ordering::Relaxed);
        let name = descriptor.full_name();
        // The message may be of descriptors that were released since: then what is known is of other ones.
        if let Some(known) = CACHE.read().unwrap_or_else(PoisonError::into_inner).get(name)
            && known.descriptor == *descriptor
        {
            return known.clone();
        }
        let schema = Arc::new(Self::build(descriptor));
        CACHE.write().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), schema.clone());
        schema
    }

    /// The schema of the message type with this full name.
    pub(super) fn named(full_name: &str) -> Option<Arc<Self>> {
        tidegate_api::descriptors().get_message_by_name(full_name).map(|descriptor| Self::of(&descriptor))
    }

    fn build(descriptor: &MessageDescriptor) -> Self {
        let unchecked = ["validate.disabled", "validate.ignored"]
            .iter()
            .any(|option| extension_bool(&descriptor.options(), option));
        // Field numbers order the fields of a descriptor; people expect the order of the .proto file.
        let mut fields =
            descriptor.fields().map(|field| FieldSchema::build(field, unchecked)).collect::<Vec<_>>();
        fields.sort_by_key(|field| field.descriptor.path().last().copied());
        let mut by_name = HashMap::new();
        for (index, field) in fields.iter().enumerate() {
            by_name.insert(field.descriptor.json_name().into(), index);
            by_name.insert(field.descriptor.name().into(), index);
        }
        let required_oneofs = descriptor
            .oneofs()
            .filter(|oneof| !unchecked && extension_bool(&oneof.options(), "validate.required"))
            .map(|oneof| {
                let names: Vec<_> = oneof.fields().map(|field| field.name().to_owned()).collect();
                RequiredOneof {
                    members: oneof.fields().map(|field| field.number()).collect(),
                    description: format!("one of {}", names.join(", ")),
                }
            })
            .collect();
        Self {
            descriptor: descriptor.clone(),
            well_known: WellKnown::of(descriptor),
            fields,
            by_name,
            required_oneofs,
        }
    }

    /// The field with this name, in either spelling.
    pub(super) fn field(&self, name: &str) -> Option<&FieldSchema> {
        self.by_name.get(name).map(|index| &self.fields[*index])
    }
}

impl FieldSchema {
    fn build(descriptor: FieldDescriptor, unchecked: bool) -> Self {
        let options = descriptor.options();
        let rules = (!unchecked)
            .then(|| extension(&options, "validate.rules"))
            .flatten()
            .and_then(|rules| rules.as_message()?.transcode_to::<FieldRules>().ok().map(Box::new));
        let declared = descriptor.field_descriptor_proto().options.as_ref();
        let deprecated =
            declared.is_some_and(|options| options.deprecated.unwrap_or_default()).then(|| Deprecation {
                since: extension_string(&options, "envoy.annotations.deprecated_at_minor_version"),
                disallowed: extension_bool(&options, "envoy.annotations.disallowed_by_default"),
            });
        let sensitive = extension_bool(&options, "udpa.annotations.sensitive");
        Self { descriptor, rules, deprecated, sensitive }
    }
}

/// Whether an enum value is out of use.
pub(super) fn enum_value_deprecation(value: &EnumValueDescriptor) -> Option<Deprecation> {
    let declared = value.enum_value_descriptor_proto().options.as_ref()?;
    declared.deprecated.unwrap_or_default().then(|| {
        let options = value.options();
        Deprecation {
            since: extension_string(&options, "envoy.annotations.deprecated_at_minor_version_enum"),
            disallowed: extension_bool(&options, "envoy.annotations.disallowed_by_default_enum"),
        }
    })
}

impl WellKnown {
    fn of(descriptor: &MessageDescriptor) -> Self {
        let Some(name) = descriptor.full_name().strip_prefix("google.protobuf.") else { return Self::No };
        match name {
            "Any" => Self::Any,
            "Duration" => Self::Duration,
            "Timestamp" => Self::Timestamp,
            "FieldMask" => Self::FieldMask,
            "Struct" => Self::Struct,
            "Value" => Self::Value,
            "ListValue" => Self::ListValue,
            "BoolValue" | "BytesValue" | "DoubleValue" | "FloatValue" | "Int32Value" | "Int64Value"
            | "StringValue" | "UInt32Value" | "UInt64Value" => Self::Wrapper,
            _ => Self::No,
        }
    }
}

fn extension(options: &DynamicMessage, name: &str) -> Option<prost_reflect::Value> {
    let descriptor = options.descriptor();
    let extension: ExtensionDescriptor = descriptor.parent_pool().get_extension_by_name(name)?;
    options.has_extension(&extension).then(|| options.get_extension(&extension).into_owned())
}

fn extension_bool(options: &DynamicMessage, name: &str) -> bool {
    extension(options, name).and_then(|value| value.as_bool()).unwrap_or_default()
}

fn extension_string(options: &DynamicMessage, name: &str) -> Option<String> {
    Some(extension(options, name)?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_options_of_envoy() {
        let cluster = MessageSchema::named("envoy.config.cluster.v3.Cluster").unwrap();
        assert_eq!(
            cluster.fields[0].descriptor.name(),
            "transport_socket_matches",
            "order of the .proto file"
        );
        assert!(std::ptr::eq(cluster.field("lbPolicy").unwrap(), cluster.field("lb_policy").unwrap()));
        assert!(cluster.field("LbPolicy").is_none());
        assert!(cluster.field("connect_timeout").unwrap().rules.is_some());
        let address = MessageSchema::named("envoy.config.core.v3.SocketAddress").unwrap();
        assert_eq!(address.required_oneofs[0].description, "one of port_value, named_port");
        let certificate =
            MessageSchema::named("envoy.extensions.transport_sockets.tls.v3.TlsCertificate").unwrap();
        assert!(certificate.field("private_key").unwrap().sensitive);
        assert!(!certificate.field("certificate_chain").unwrap().sensitive);
        let regex = MessageSchema::named("envoy.type.matcher.v3.RegexMatcher").unwrap();
        let deprecated = regex.field("google_re2").unwrap().deprecated.as_ref().unwrap();
        assert_eq!((deprecated.since.as_deref(), deprecated.disallowed), (Some("3.0"), false));
    }
}
