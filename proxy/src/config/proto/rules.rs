//! The rules of Envoy's API (`validate.rules`, protoc-gen-validate), for any message.

mod number;
mod text;
pub(super) mod wire;

use prost_reflect::{DynamicMessage, Kind, MapKey, ReflectMessage, Value};
use tidegate_api::validate::field_rules::Type;
use tidegate_api::validate::{BytesRules, EnumRules, FieldRules, MapRules, MessageRules, RepeatedRules};

use number::{NumberRules, duration, is_zero, nanoseconds, nanoseconds_broken};
use text::string;

use super::any;
use super::path::FieldPath;
use super::schema::{FieldSchema, MessageSchema, WellKnown};
use crate::config::error::{Reason, quoted};

/// Deepest nesting of `Any` in `Any` that is checked; a message from the wire may nest them as deep as its
/// size allows.
const MAX_ANY_DEPTH: u32 = 32;

/// Whether the messages inside `Any` are checked too.
#[derive(Clone, Copy)]
pub(super) enum InsideAny {
    /// They were checked before they were packed.
    Skip,
    /// Unpack and check them.
    Check,
}

/// Checks a message and all that is in it.
pub(super) fn check(
    message: &DynamicMessage,
    path: &FieldPath<'_>,
    inside_any: InsideAny,
    report: &mut dyn FnMut(&FieldPath<'_>, Reason),
) {
    inspect(message, path, inside_any, &mut |path, found| {
        if let Found::Broken { reason, .. } = found {
            report(path, reason);
        }
    });
}

/// What [`inspect`] finds.
#[derive(Debug)]
pub(super) enum Found {
    /// A broken rule.
    Broken {
        /// In an `Any`.
        inside_any: bool,
        reason: Reason,
    },
    /// A field that the API does not have here.
    UnknownField {
        number: u32,
        /// Full name.
        message: String,
    },
}

/// Like [`check`], and finds unknown fields too.
pub(super) fn inspect(
    message: &DynamicMessage,
    path: &FieldPath<'_>,
    inside_any: InsideAny,
    report: &mut dyn FnMut(&FieldPath<'_>, Found),
) {
    Checker { inside_any, any_depth: 0, report }.message(message, path);
}

struct Checker<'r> {
    inside_any: InsideAny,
    any_depth: u32,
    report: &'r mut dyn FnMut(&FieldPath<'_>, Found),
}

impl Checker<'_> {
    fn broken(&mut self, path: &FieldPath<'_>, reason: Reason) {
        (self.report)(path, Found::Broken { inside_any: self.any_depth > 0, reason });
    }

    fn message(&mut self, message: &DynamicMessage, path: &FieldPath<'_>) {
        for unknown in message.unknown_fields() {
            let message = message.descriptor().full_name().to_owned();
            (self.report)(path, Found::UnknownField { number: unknown.number(), message });
        }
        let schema = MessageSchema::of(&message.descriptor());
        for oneof in &schema.required_oneofs {
            if !oneof.members.iter().any(|number| message.has_field_by_number(*number)) {
                self.broken(path, Reason::Missing(oneof.description.clone()));
            }
        }
        for field in &schema.fields {
            self.field(message, field, &path.field(field.descriptor.name()));
        }
    }

    fn field(&mut self, message: &DynamicMessage, field: &FieldSchema, path: &FieldPath<'_>) {
        let descriptor = &field.descriptor;
        let rules = field.rules.as_deref();
        let is_set = message.has_field(descriptor);
        if !is_set && descriptor.containing_oneof().is_some() {
            return; // `required` means: if this member is chosen, it must not be empty
        }
        if !is_set
            && matches!(descriptor.kind(), Kind::Message(_))
            && !descriptor.is_list()
            && !descriptor.is_map()
        {
            if rules.is_some_and(is_required) {
                self.broken(path, Reason::Missing(descriptor.name().to_owned()));
            }
            return;
        }
        if !is_set && (rules.is_none() || descriptor.supports_presence()) {
            return;
        }
        match &*message.get_field(descriptor) {
            Value::List(items) => self.list(items, &descriptor.kind(), rules, path),
            Value::Map(entries) => self.map(entries, &descriptor.kind(), rules, path),
            value => self.value(value, &descriptor.kind(), rules, path),
        }
    }

    fn list(&mut self, items: &[Value], kind: &Kind, rules: Option<&FieldRules>, path: &FieldPath<'_>) {
        let rules = match rules.and_then(|rules| rules.r#type.as_ref()) {
            Some(Type::Repeated(rules)) => Some(&**rules),
            _ => None,
        };
        if let Some(rules) = rules {
            if items.is_empty() && rules.ignore_empty() {
                return;
            }
            if let Some(reason) = list_size(items, rules) {
                self.broken(path, reason);
            }
        }
        let item_rules = rules.and_then(|rules| rules.items.as_deref());
        if item_rules.is_none() && !matches!(items.first(), Some(Value::Message(_))) {
            return;
        }
        for (index, item) in items.iter().enumerate() {
            self.value(item, kind, item_rules, &path.index(index));
        }
    }

    fn map(
        &mut self,
        entries: &std::collections::HashMap<MapKey, Value>,
        kind: &Kind,
        rules: Option<&FieldRules>,
        path: &FieldPath<'_>,
    ) {
        let rules = match rules.and_then(|rules| rules.r#type.as_ref()) {
            Some(Type::Map(rules)) => Some(&**rules),
            _ => None,
        };
        if let Some(rules) = rules {
            if entries.is_empty() && rules.ignore_empty() {
                return;
            }
            if let Some(reason) = map_size(entries.len(), rules) {
                self.broken(path, reason);
            }
        }
        let Kind::Message(entry) = kind else { return };
        let (key_kind, value_kind) =
            (entry.map_entry_key_field().kind(), entry.map_entry_value_field().kind());
        let mut sorted: Vec<_> = entries.iter().collect();
        sorted.sort_by_key(|(key, _)| *key);
        for (key, value) in sorted {
            let text = any::map_key_text(key);
            let path = path.key(&text);
            if let Some(key_rules) = rules.and_then(|rules| rules.keys.as_deref()) {
                self.value(&Value::from(key.clone()), &key_kind, Some(key_rules), &path);
            }
            self.value(value, &value_kind, rules.and_then(|rules| rules.values.as_deref()), &path);
        }
    }

    /// One value: a field, an element or the value of a map entry.
    fn value(&mut self, value: &Value, kind: &Kind, rules: Option<&FieldRules>, path: &FieldPath<'_>) {
        let rule = rules.and_then(|rules| rules.r#type.as_ref());
        let Value::Message(message) = value else {
            if let Some(reason) =
                rule.and_then(|rule| broken(value, rule).or_else(|| undefined(value, kind, rule)))
            {
                self.broken(path, reason);
            }
            return;
        };
        let well_known = MessageSchema::of(&message.descriptor()).well_known;
        match well_known {
            WellKnown::No => {
                if !rules.and_then(|rules| rules.message.as_ref()).is_some_and(MessageRules::skip) {
                    self.message(message, path);
                }
            }
            WellKnown::Any => self.any(message, rule, path),
            WellKnown::Wrapper => {
                let inner = message.get_field_by_number(1);
                if let Some(reason) = inner.zip(rule).and_then(|(inner, rule)| broken(&inner, rule)) {
                    self.broken(path, reason);
                }
            }
            WellKnown::Duration => {
                if let Some(Type::Duration(rules)) = rule
                    && let Some(reason) = duration(message, rules)
                {
                    self.broken(path, reason);
                }
            }
            // No rule of the vendored files is about these (a test holds that).
            WellKnown::Timestamp
            | WellKnown::FieldMask
            | WellKnown::Struct
            | WellKnown::Value
            | WellKnown::ListValue => {}
        }
    }

    fn any(&mut self, message: &DynamicMessage, rule: Option<&Type>, path: &FieldPath<'_>) {
        let (type_url, bytes) = any::parts(message);
        if let Some(Type::Any(rules)) = rule {
            if !rules.r#in.is_empty() && !rules.r#in.contains(&type_url) {
                self.broken(path, constraint(format!("@type must be one of {:?}", rules.r#in)));
            }
            if rules.not_in.contains(&type_url) {
                self.broken(path, constraint(format!("@type must not be {}", quoted(&type_url))));
            }
        }
        if matches!(self.inside_any, InsideAny::Skip) || self.any_depth >= MAX_ANY_DEPTH {
            return;
        }
        if let Some(inner) = any::decode(&type_url, &bytes) {
            match inner {
                Ok(inner) => {
                    self.any_depth += 1;
                    self.message(&inner, path);
                    self.any_depth -= 1;
                }
                Err(error) => {
                    let reason = Reason::Invalid(format!("not a {type_url}: {error}"));
                    (self.report)(path, Found::Broken { inside_any: true, reason });
                }
            }
        }
    }
}

fn is_required(rules: &FieldRules) -> bool {
    let by_type = match &rules.r#type {
        Some(Type::Any(rules)) => rules.required(),
        Some(Type::Duration(rules)) => rules.required(),
        Some(Type::Timestamp(rules)) => rules.required(),
        _ => false,
    };
    by_type || rules.message.as_ref().is_some_and(MessageRules::required)
}

fn constraint(message: impl Into<String>) -> Reason {
    Reason::Constraint(message.into())
}

fn list_size(items: &[Value], rules: &RepeatedRules) -> Option<Reason> {
    let count = items.len() as u64;
    if let Some(reason) = size("element", count, rules.min_items, rules.max_items) {
        return Some(reason);
    }
    if rules.unique() {
        // Only scalars can be required to be unique; their debug form tells them apart.
        let mut seen = std::collections::HashSet::new();
        let twice = items.iter().find(|item| !seen.insert(format!("{item:?}")))?;
        return Some(constraint(format!("elements must be different, but {} is there twice", show(twice))));
    }
    None
}

fn map_size(count: usize, rules: &MapRules) -> Option<Reason> {
    size("entry", count as u64, rules.min_pairs, rules.max_pairs)
}

fn size(unit: &str, count: u64, min: Option<u64>, max: Option<u64>) -> Option<Reason> {
    let plural = |n: u64| match (n, unit) {
        (1, unit) => unit.to_owned(),
        (_, "entry") => "entries".to_owned(),
        (_, unit) => format!("{unit}s"),
    };
    let message = match (min, max) {
        (Some(min), _) if count < min => format!("needs at least {min} {}, has {count}", plural(min)),
        (_, Some(max)) if count > max => format!("may have at most {max} {}, has {count}", plural(max)),
        _ => return None,
    };
    Some(constraint(message))
}

/// Why a scalar breaks its rule.
fn broken(value: &Value, rule: &Type) -> Option<Reason> {
    macro_rules! number {
        ($rules:expr, $value:expr) => {{
            let rules = $rules;
            if rules.ignore_empty() && is_zero($value) {
                return None;
            }
            NumberRules {
                r#const: rules.r#const,
                lt: rules.lt,
                lte: rules.lte,
                gt: rules.gt,
                gte: rules.gte,
                r#in: &rules.r#in,
                not_in: &rules.not_in,
            }
            .broken($value)
        }};
    }
    let message = match (rule, value) {
        (Type::Float(rules), Value::F32(value)) => number!(rules, value),
        (Type::Double(rules), Value::F64(value)) => number!(rules, value),
        (Type::Int32(rules), Value::I32(value)) => number!(rules, value),
        (Type::Int64(rules), Value::I64(value)) => number!(rules, value),
        (Type::Uint32(rules), Value::U32(value)) => number!(rules, value),
        (Type::Uint64(rules), Value::U64(value)) => number!(rules, value),
        (Type::Sint32(rules), Value::I32(value)) => number!(rules, value),
        (Type::Sint64(rules), Value::I64(value)) => number!(rules, value),
        (Type::Fixed32(rules), Value::U32(value)) => number!(rules, value),
        (Type::Fixed64(rules), Value::U64(value)) => number!(rules, value),
        (Type::Sfixed32(rules), Value::I32(value)) => number!(rules, value),
        (Type::Sfixed64(rules), Value::I64(value)) => number!(rules, value),
        (Type::Bool(rules), Value::Bool(value)) => {
            rules.r#const.filter(|wanted| wanted != value).map(|wanted| format!("must be {wanted}"))
        }
        (Type::String(rules), Value::String(value)) => string(value, rules),
        (Type::Bytes(rules), Value::Bytes(value)) => bytes(value, rules),
        (Type::Enum(rules), Value::EnumNumber(value)) => enum_number(*value, rules),
        _ => None,
    };
    message.map(Reason::Constraint)
}

fn bytes(value: &[u8], rules: &BytesRules) -> Option<String> {
    if rules.ignore_empty() && value.is_empty() {
        return None;
    }
    let count = value.len() as u64;
    if count < rules.min_len() {
        return Some(format!("must have at least {} bytes, has {count}", rules.min_len()));
    }
    if let Some(max) = rules.max_len.filter(|max| count > *max) {
        return Some(format!("may have at most {max} bytes, has {count}"));
    }
    rules.len.filter(|len| count != *len).map(|len| format!("must have exactly {len} bytes, has {count}"))
}

/// Why an enum number breaks `defined_only`.
fn undefined(value: &Value, kind: &Kind, rule: &Type) -> Option<Reason> {
    let (Value::EnumNumber(number), Kind::Enum(descriptor), Type::Enum(rules)) = (value, kind, rule) else {
        return None;
    };
    (rules.defined_only() && descriptor.get_value(*number).is_none())
        .then(|| super::scalar::unknown_enum_value(descriptor, &number.to_string()))
}

fn enum_number(value: i32, rules: &EnumRules) -> Option<String> {
    if let Some(wanted) = rules.r#const.filter(|wanted| *wanted != value) {
        return Some(format!("must be {wanted}, is {value}"));
    }
    if !rules.r#in.is_empty() && !rules.r#in.contains(&value) {
        return Some(format!("must be one of {:?}, is {value}", rules.r#in));
    }
    rules.not_in.contains(&value).then(|| format!("must not be {value}"))
}

fn show(value: &Value) -> String {
    match value {
        Value::String(text) => quoted(text),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use prost_reflect::FieldDescriptor;
    use tidegate_api::core;

    use tidegate_api::validate::string_rules::WellKnown as WellKnownString;
    use tidegate_api::validate::{KnownRegex, StringRules};

    use super::number::Seconds;
    use super::*;
    use crate::config::proto::{Format, Options, Source, parse};

    fn problems_of(yaml: &str) -> Vec<String> {
        let source = Source { name: "t.yaml".into(), text: yaml.into(), format: Format::Yaml };
        match parse::<tidegate_api::cluster::Cluster>(&source, &Options::default()) {
            Ok(_) => Vec::new(),
            Err(error) => error.to_string().lines().map(str::to_owned).collect(),
        }
    }

    #[test]
    fn names_the_rule_and_the_place() {
        let yaml = r#"
name: ""
connect_timeout: 0s
lb_policy: 99
dns_refresh_rate: 0.0001s
load_assignment:
  cluster_name: c
  policy: {overprovisioning_factor: 0}
  endpoints:
  - priority: 129
    lb_endpoints:
    - endpoint:
        address: {socket_address: {address: "", port_value: 70000}}
      load_balancing_weight: 0
    - endpoint:
        address: {socket_address: {address: x}}
    - endpoint:
        address: {}
"#;
        let enum_values = "ROUND_ROBIN, LEAST_REQUEST, RING_HASH, RANDOM, MAGLEV, CLUSTER_PROVIDED, LOAD_BALANCING_POLICY_CONFIG";
        let endpoints = "load_assignment.endpoints[0].lb_endpoints";
        assert_eq!(
            problems_of(yaml),
            [
                "t.yaml:2: name: must not be empty",
                "t.yaml:3: connect_timeout: must be greater than 0s, is 0s",
                &format!(
                    "t.yaml:4: lb_policy: \"99\" is not a value of envoy.config.cluster.v3.Cluster.LbPolicy; use one of \
                     {enum_values}"
                ),
                "t.yaml:5: dns_refresh_rate: must be greater than 0.001s, is 0.0001s",
                "t.yaml:8: load_assignment.policy.overprovisioning_factor: must be greater than 0, is 0",
                "t.yaml:10: load_assignment.endpoints[0].priority: must be at most 128, is 129",
                &format!(
                    "t.yaml:13: {endpoints}[0].endpoint.address.socket_address.address: must not be empty"
                ),
                &format!(
                    "t.yaml:13: {endpoints}[0].endpoint.address.socket_address.port_value: must be at most 65535, is 70000"
                ),
                &format!("t.yaml:14: {endpoints}[0].load_balancing_weight: must be at least 1, is 0"),
                &format!(
                    "t.yaml:16: {endpoints}[1].endpoint.address.socket_address: required field one of port_value, \
                     named_port is missing"
                ),
                &format!(
                    "t.yaml:18: {endpoints}[2].endpoint.address: required field one of socket_address, pipe, \
                     envoy_internal_address is missing"
                ),
            ]
        );
    }

    #[test]
    fn numbers() {
        let in_range = NumberRules {
            r#const: None,
            lt: None,
            lte: Some(5),
            gt: None,
            gte: Some(1),
            r#in: &[],
            not_in: &[3],
        };
        assert_eq!(in_range.broken(&5), None);
        assert_eq!(in_range.broken(&6).unwrap(), "must be at least 1 and at most 5, is 6");
        assert_eq!(in_range.broken(&3).unwrap(), "must not be 3");
        let crossed = NumberRules { lte: Some(1), gte: Some(5), not_in: &[], ..in_range };
        assert_eq!(crossed.broken(&3).unwrap(), "must be at least 5 or at most 1, is 3");
        assert_eq!(crossed.broken(&0), None);
        let finite = NumberRules {
            r#const: None,
            lt: None,
            lte: Some(100.0),
            gt: None,
            gte: Some(0.0),
            r#in: &[],
            not_in: &[],
        };
        assert!(finite.broken(&f64::NAN).is_some(), "NaN is in no range");
        let seconds = NumberRules {
            r#const: None,
            lt: None,
            lte: None,
            gt: Some(Seconds(0)),
            gte: None,
            r#in: &[],
            not_in: &[],
        };
        assert_eq!(seconds.broken(&Seconds(-1_500_000_000)).unwrap(), "must be greater than 0s, is -1.5s");
    }

    #[test]
    fn strings() {
        let rules = StringRules { min_len: Some(1), max_bytes: Some(4), ..Default::default() };
        assert_eq!(string("", &rules).unwrap(), "must not be empty");
        assert_eq!(string("abcde", &rules).unwrap(), "may have at most 4 characters, has 5");
        assert_eq!(string("abcd", &rules), None);
        let absolute =
            StringRules { prefix: Some("/".into()), ignore_empty: Some(true), ..Default::default() };
        assert_eq!(string("x", &absolute).unwrap(), "must start with \"/\", is \"x\"");
        assert_eq!(string("", &absolute), None);
        let header = StringRules {
            well_known: Some(WellKnownString::WellKnownRegex(KnownRegex::HttpHeaderName as i32)),
            ..Default::default()
        };
        assert_eq!(string(":path", &header), None);
        assert_eq!(string("a b", &header).unwrap(), "must be a header name, is \"a b\"");
        let ip = StringRules { well_known: Some(WellKnownString::Address(true)), ..Default::default() };
        for good in ["::1", "10.0.0.1", "foo.bar", "a-b"] {
            assert_eq!(string(good, &ip), None, "{good}");
        }
        assert!(string("-a", &ip).is_some() && string("a..b", &ip).is_some() && string("a_b", &ip).is_some());
    }

    #[test]
    fn messages_from_the_wire_are_checked_inside_any() {
        use tidegate_api::wkt::Any;
        let address = core::SocketAddress { address: String::new(), ..Default::default() };
        let listener = tidegate_api::listener::ListenerFilter {
            name: "x".into(),
            config_type: Some(tidegate_api::listener::listener_filter::ConfigType::TypedConfig(
                Any::from_msg(&address).unwrap(),
            )),
            ..Default::default()
        };
        let error = crate::config::proto::check(&listener, "listener l").unwrap_err();
        assert_eq!(
            error.to_string(),
            "listener l: typed_config: required field one of port_value, named_port is missing\n\
             listener l: typed_config.address: must not be empty"
        );
    }

    /// Rules that this file would silently not enforce.
    #[test]
    fn every_rule_of_the_vendored_files_is_enforced() {
        fn unsupported(rules: &FieldRules, field: &FieldDescriptor) -> Option<String> {
            let complain = |what: &str| Some(format!("{}: {what}", field.full_name()));
            match rules.r#type.as_ref()? {
                Type::String(rules) => {
                    let pattern = rules.pattern.as_deref().map(regex::Regex::new);
                    if pattern.is_some_and(|pattern| pattern.is_err()) {
                        return complain("pattern");
                    }
                    let format = rules.well_known.as_ref()?;
                    matches!(
                        format,
                        WellKnownString::Email(true)
                            | WellKnownString::Uri(true)
                            | WellKnownString::UriRef(true)
                            | WellKnownString::Uuid(true)
                    )
                    .then(|| format!("{}: {format:?}", field.full_name()))
                }
                Type::Bytes(rules) => {
                    let supported = BytesRules {
                        min_len: rules.min_len,
                        max_len: rules.max_len,
                        len: rules.len,
                        ignore_empty: rules.ignore_empty,
                        ..Default::default()
                    };
                    (*rules != supported).then(|| "bytes".into())
                }
                Type::Timestamp(_) => complain("timestamp"),
                Type::Map(rules) if rules.no_sparse() => complain("no_sparse"),
                Type::Repeated(rules) => rules.items.as_deref().and_then(|rules| unsupported(rules, field)),
                Type::Map(rules) => [&rules.keys, &rules.values]
                    .into_iter()
                    .find_map(|rules| unsupported(rules.as_deref()?, field)),
                _ => None,
            }
        }
        let mut seen = 0;
        for message in tidegate_api::descriptors().all_messages() {
            let schema = MessageSchema::of(&message);
            for field in &schema.fields {
                if let Some(rules) = &field.rules {
                    seen += 1;
                    assert_eq!(unsupported(rules, &field.descriptor), None);
                }
            }
        }
        assert!(seen > 500, "only {seen} rules found");
    }
}
