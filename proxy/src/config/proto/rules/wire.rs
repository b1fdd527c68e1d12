//! The rules on encoded messages, for the usual case: nothing is wrong.
//!
//! [`holds`] reads the bytes once, allocates nothing, and needs no descriptors (10 MB, 20 ms to decode) once it has
//! seen a type: what it has to know of one is kept. It never finds out *what* is wrong. Whatever is not plainly right
//! it leaves to [`super::inspect`].

use std::collections::HashMap;
use std::sync::{LazyLock, OnceLock, PoisonError, RwLock};

use prost::bytes::Bytes;
use prost_reflect::{FieldDescriptor, Kind, MessageDescriptor, Value};
use tidegate_api::validate::field_rules::Type;
use tidegate_api::validate::{FieldRules, MessageRules, RepeatedRules};

use super::{broken, bytes, is_required, map_size, nanoseconds, nanoseconds_broken, size, string};
use crate::config::proto::any;
use crate::config::proto::schema::{MessageSchema, WellKnown};

/// Deepest nesting, packed messages included. Real configurations have some 20; the decoders that come after it stop at
/// 100.
const MAX_DEPTH: u32 = 64;

/// Fields of one message that are told apart.
const MAX_FIELDS: usize = 256;

/// Fields of one message whose elements are counted.
const MAX_COUNTED: usize = 8;

/// Something may be wrong.
#[derive(Debug)]
struct Doubt;

type Holds = Result<(), Doubt>;

/// Whether this is certainly a message of this type that follows every rule and has no unknown field, inside `Any` too.
pub(in crate::config::proto) fn holds(full_name: &str, bytes: &[u8]) -> bool {
    Known::named(full_name).is_some_and(|known| message(known, bytes, 0).is_ok())
}

/// The string in this field of an encoded message, the last if there are several; none if there is none, or the bytes are
/// no message.
pub(in crate::config::proto) fn string_field(mut bytes: &[u8], wanted: u32) -> Option<&str> {
    let mut found = None;
    while !bytes.is_empty() {
        match next(&mut bytes).ok()? {
            (number, Raw::Bytes(text)) if number == wanted => found = Some(text),
            _ => {}
        }
    }
    std::str::from_utf8(found?).ok()
}

/// What there is to know of a message type.
#[derive(Debug)]
struct Known {
    well_known: WellKnown,
    /// By number.
    fields: Vec<Field>,
    /// Indices of fields that must be there: required messages, and scalars whose rule zero would break.
    required: Vec<usize>,
    /// Of each of these one must be there.
    one_of: Vec<Vec<usize>>,
    /// Indices of lists whose length has rules.
    counted: Vec<(usize, RepeatedRules)>,
    /// It has something that is not looked at here.
    beyond: bool,
}

#[derive(Debug)]
struct Field {
    number: u32,
    /// A list or a map.
    repeated: bool,
    kind: FieldKind,
    rules: Option<Box<FieldRules>>,
}

#[derive(Debug)]
enum FieldKind {
    Scalar(Scalar),
    Message(MessageRef),
    /// Key and value.
    Map(Box<[Field; 2]>),
}

/// [`Kind`] without its descriptor, which would hold all descriptors.
#[derive(Debug)]
enum Scalar {
    Double,
    Float,
    Int32,
    Int64,
    Uint32,
    Uint64,
    Sint32,
    Sint64,
    Fixed32,
    Fixed64,
    Sfixed32,
    Sfixed64,
    Bool,
    String,
    Bytes,
    /// Its values.
    Enum(Box<[i32]>),
}

impl Scalar {
    fn zero(&self) -> Value {
        match self {
            Self::Double => Value::F64(0.0),
            Self::Float => Value::F32(0.0),
            Self::Int32 | Self::Sint32 | Self::Sfixed32 => Value::I32(0),
            Self::Int64 | Self::Sint64 | Self::Sfixed64 => Value::I64(0),
            Self::Uint32 | Self::Fixed32 => Value::U32(0),
            Self::Uint64 | Self::Fixed64 => Value::U64(0),
            Self::Bool => Value::Bool(false),
            Self::String => Value::String(String::new()),
            Self::Bytes => Value::Bytes(Bytes::new()),
            Self::Enum(_) => Value::EnumNumber(0),
        }
    }

    /// As the wire has it.
    fn value(&self, raw: &Raw<'_>) -> Result<Value, Doubt> {
        Ok(match (self, raw) {
            (Self::Double, Raw::Fixed64(bytes)) => Value::F64(f64::from_le_bytes(*bytes)),
            (Self::Fixed64, Raw::Fixed64(bytes)) => Value::U64(u64::from_le_bytes(*bytes)),
            (Self::Sfixed64, Raw::Fixed64(bytes)) => Value::I64(i64::from_le_bytes(*bytes)),
            (Self::Float, Raw::Fixed32(bytes)) => Value::F32(f32::from_le_bytes(*bytes)),
            (Self::Fixed32, Raw::Fixed32(bytes)) => Value::U32(u32::from_le_bytes(*bytes)),
            (Self::Sfixed32, Raw::Fixed32(bytes)) => Value::I32(i32::from_le_bytes(*bytes)),
            (Self::Bool, Raw::Varint(value)) => Value::Bool(*value != 0),
            (Self::Uint64, Raw::Varint(value)) => Value::U64(*value),
            (Self::Int64, Raw::Varint(value)) => Value::I64(value.cast_signed()),
            (Self::Uint32, Raw::Varint(value)) => Value::U32(*value as u32),
            (Self::Int32, Raw::Varint(value)) => Value::I32(*value as i32),
            (Self::Enum(_), Raw::Varint(value)) => Value::EnumNumber(*value as i32),
            (Self::Sint32, Raw::Varint(value)) => {
                let value = *value as u32;
                Value::I32((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
            }
            (Self::Sint64, Raw::Varint(value)) => {
                Value::I64((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
            }
            _ => return Err(Doubt),
        })
    }
}

/// Found at the first use.
#[derive(Debug)]
struct MessageRef {
    name: Box<str>,
    found: OnceLock<Option<&'static Known>>,
}

/// As many as there are message types in use. They refer to each other, and are never dropped.
static TYPES: LazyLock<RwLock<HashMap<Box<str>, &'static Known>>> = LazyLock::new(RwLock::default);

impl Known {
    fn named(full_name: &str) -> Option<&'static Self> {
        if let Some(known) = TYPES.read().unwrap_or_else(PoisonError::into_inner).get(full_name) {
            return Some(known);
        }
        let schema = MessageSchema::named(full_name)?;
        let mut types = TYPES.write().unwrap_or_else(PoisonError::into_inner);
        // Leaked: at most one for each message of the embedded descriptors.
        Some(types.entry(full_name.into()).or_insert_with(|| Box::leak(Box::new(Self::of(&schema)))))
    }

    fn of(schema: &MessageSchema) -> Self {
        let mut declared: Vec<_> = schema.fields.iter().collect();
        declared.sort_by_key(|field| field.descriptor.number());
        let index_of = |number: u32| declared.iter().position(|field| field.descriptor.number() == number);
        let fields: Vec<_> =
            declared.iter().map(|field| Field::of(&field.descriptor, field.rules.as_deref())).collect();
        let required =
            (0..fields.len()).filter(|index| fields[*index].is_missed(&declared[*index].descriptor));
        let counted: Vec<_> = fields
            .iter()
            .enumerate()
            .filter_map(|(index, field)| Some((index, RepeatedRules::clone(field.list_rules()?))))
            .collect();
        Self {
            well_known: schema.well_known,
            required: required.collect(),
            one_of: schema
                .required_oneofs
                .iter()
                .map(|one_of| one_of.members.iter().filter_map(|number| index_of(*number)).collect())
                .collect(),
            beyond: fields.len() > MAX_FIELDS
                || counted.len() > MAX_COUNTED
                || counted.iter().any(|(_, rules)| rules.unique())
                || fields.iter().any(Field::is_beyond),
            counted,
            fields,
        }
    }

    fn index_of(&self, number: u32) -> Result<usize, Doubt> {
        // Most messages have few fields, numbered from 1 on.
        let guess = (number as usize).wrapping_sub(1);
        if self.fields.get(guess).is_some_and(|field| field.number == number) {
            return Ok(guess);
        }
        self.fields.binary_search_by_key(&number, |field| field.number).map_err(|_| Doubt)
    }
}

impl Field {
    fn of(descriptor: &FieldDescriptor, rules: Option<&FieldRules>) -> Self {
        let kind = match descriptor.kind() {
            Kind::Message(entry) if descriptor.is_map() => FieldKind::Map(Box::new(Self::map(&entry, rules))),
            Kind::Message(message) => {
                FieldKind::Message(MessageRef { name: message.full_name().into(), found: OnceLock::new() })
            }
            Kind::Enum(values) => {
                FieldKind::Scalar(Scalar::Enum(values.values().map(|value| value.number()).collect()))
            }
            Kind::Double => FieldKind::Scalar(Scalar::Double),
            Kind::Float => FieldKind::Scalar(Scalar::Float),
            Kind::Int32 => FieldKind::Scalar(Scalar::Int32),
            Kind::Int64 => FieldKind::Scalar(Scalar::Int64),
            Kind::Uint32 => FieldKind::Scalar(Scalar::Uint32),
            Kind::Uint64 => FieldKind::Scalar(Scalar::Uint64),
            Kind::Sint32 => FieldKind::Scalar(Scalar::Sint32),
            Kind::Sint64 => FieldKind::Scalar(Scalar::Sint64),
            Kind::Fixed32 => FieldKind::Scalar(Scalar::Fixed32),
            Kind::Fixed64 => FieldKind::Scalar(Scalar::Fixed64),
            Kind::Sfixed32 => FieldKind::Scalar(Scalar::Sfixed32),
            Kind::Sfixed64 => FieldKind::Scalar(Scalar::Sfixed64),
            Kind::Bool => FieldKind::Scalar(Scalar::Bool),
            Kind::String => FieldKind::Scalar(Scalar::String),
            Kind::Bytes => FieldKind::Scalar(Scalar::Bytes),
        };
        let repeated = descriptor.is_list() || descriptor.is_map();
        Self { number: descriptor.number(), repeated, kind, rules: rules.cloned().map(Box::new) }
    }

    fn map(entry: &MessageDescriptor, rules: Option<&FieldRules>) -> [Self; 2] {
        let rules = match rules.and_then(|rules| rules.r#type.as_ref()) {
            Some(Type::Map(rules)) => Some(rules),
            _ => None,
        };
        [
            Self::of(&entry.map_entry_key_field(), rules.and_then(|rules| rules.keys.as_deref())),
            Self::of(&entry.map_entry_value_field(), rules.and_then(|rules| rules.values.as_deref())),
        ]
    }

    /// Whether it breaks a rule that it is not there.
    fn is_missed(&self, descriptor: &FieldDescriptor) -> bool {
        let Some(rules) = self.rules.as_deref().filter(|_| !self.repeated) else { return false };
        if descriptor.containing_oneof().is_some() {
            return false;
        }
        match &self.kind {
            FieldKind::Message(_) => is_required(rules),
            FieldKind::Map(_) => false,
            FieldKind::Scalar(kind) => {
                !descriptor.supports_presence() && scalar_value(&kind.zero(), kind, Some(rules)).is_err()
            }
        }
    }

    fn list_rules(&self) -> Option<&RepeatedRules> {
        match self.rules.as_ref()?.r#type.as_ref()? {
            Type::Repeated(rules) if self.repeated => Some(rules),
            _ => None,
        }
    }

    fn is_beyond(&self) -> bool {
        let Some(rules) = self.rules.as_deref() else { return false };
        let counted_map = match &rules.r#type {
            Some(Type::Map(rules)) => map_size(0, rules).is_some() || map_size(usize::MAX, rules).is_some(),
            Some(Type::Any(rules)) => !rules.r#in.is_empty() || !rules.not_in.is_empty(),
            _ => false,
        };
        counted_map || rules.message.as_ref().is_some_and(MessageRules::skip)
    }

    /// The rules of one element.
    fn element_rules(&self) -> Option<&FieldRules> {
        if self.repeated {
            self.list_rules().and_then(|rules| rules.items.as_deref())
        } else {
            self.rules.as_deref()
        }
    }
}

/// A value as the wire has it.
enum Raw<'a> {
    Varint(u64),
    Fixed64([u8; 8]),
    Bytes(&'a [u8]),
    Fixed32([u8; 4]),
}

fn varint(bytes: &mut &[u8]) -> Result<u64, Doubt> {
    prost::encoding::decode_varint(bytes).map_err(|_| Doubt)
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Result<&'a [u8], Doubt> {
    let (taken, rest) = bytes.split_at_checked(count).ok_or(Doubt)?;
    *bytes = rest;
    Ok(taken)
}

/// Number and value of the next field.
fn next<'a>(bytes: &mut &'a [u8]) -> Result<(u32, Raw<'a>), Doubt> {
    let key = u32::try_from(varint(bytes)?).map_err(|_| Doubt)?;
    let raw = match key & 7 {
        0 => Raw::Varint(varint(bytes)?),
        1 => Raw::Fixed64(take(bytes, 8)?.try_into().map_err(|_| Doubt)?),
        2 => {
            let length = usize::try_from(varint(bytes)?).map_err(|_| Doubt)?;
            Raw::Bytes(take(bytes, length)?)
        }
        5 => Raw::Fixed32(take(bytes, 4)?.try_into().map_err(|_| Doubt)?),
        _ => return Err(Doubt),
    };
    Ok((key >> 3, raw))
}

fn message(known: &Known, mut bytes: &[u8], depth: u32) -> Holds {
    if known.beyond || depth > MAX_DEPTH {
        return Err(Doubt);
    }
    let mut seen = [0u64; MAX_FIELDS / 64];
    let mut counts = [0u64; MAX_COUNTED];
    while !bytes.is_empty() {
        let (number, raw) = next(&mut bytes)?;
        let index = known.index_of(number)?;
        let field = &known.fields[index];
        let elements = element(field, raw, is_seen(&seen, index), depth)?;
        seen[index / 64] |= 1 << (index % 64);
        if let Some(at) = known.counted.iter().position(|(counted, _)| *counted == index) {
            counts[at] += elements;
        }
    }
    let one_is_there = |members: &Vec<usize>| members.iter().any(|index| is_seen(&seen, *index));
    let complete = known.required.iter().all(|index| is_seen(&seen, *index))
        && known.one_of.iter().all(one_is_there)
        && known.counted.iter().zip(counts).all(|((_, rules), count)| {
            (count == 0 && rules.ignore_empty())
                || size("element", count, rules.min_items, rules.max_items).is_none()
        });
    if complete { Ok(()) } else { Err(Doubt) }
}

fn is_seen(seen: &[u64; MAX_FIELDS / 64], index: usize) -> bool {
    seen[index / 64] & 1 << (index % 64) != 0
}

/// One field of the wire. Returns how many elements it has.
fn element(field: &Field, raw: Raw<'_>, seen_before: bool, depth: u32) -> Result<u64, Doubt> {
    let rules = field.element_rules();
    match (&field.kind, raw) {
        // The second would be merged into the first.
        (FieldKind::Message(_), _) if seen_before && !field.repeated => return Err(Doubt),
        (FieldKind::Message(inner), Raw::Bytes(bytes)) => nested(inner, bytes, rules, depth)?,
        (FieldKind::Map(entry), Raw::Bytes(bytes)) => map_entry(entry, bytes, depth)?,
        (FieldKind::Scalar(kind @ (Scalar::String | Scalar::Bytes)), Raw::Bytes(value)) => {
            text(value, matches!(kind, Scalar::String), rules)?;
        }
        (FieldKind::Scalar(kind), Raw::Bytes(packed)) if field.repeated => {
            return elements(kind, packed, rules);
        }
        (FieldKind::Scalar(kind), raw) => scalar_value(&kind.value(&raw)?, kind, rules)?,
        (FieldKind::Message(_) | FieldKind::Map(_), _) => return Err(Doubt),
    }
    Ok(1)
}

/// Packed scalars.
fn elements(kind: &Scalar, mut packed: &[u8], rules: Option<&FieldRules>) -> Result<u64, Doubt> {
    let mut count = 0;
    while !packed.is_empty() {
        let raw = match kind {
            Scalar::Double | Scalar::Fixed64 | Scalar::Sfixed64 => {
                Raw::Fixed64(take(&mut packed, 8)?.try_into().map_err(|_| Doubt)?)
            }
            Scalar::Float | Scalar::Fixed32 | Scalar::Sfixed32 => {
                Raw::Fixed32(take(&mut packed, 4)?.try_into().map_err(|_| Doubt)?)
            }
            _ => Raw::Varint(varint(&mut packed)?),
        };
        scalar_value(&kind.value(&raw)?, kind, rules)?;
        count += 1;
    }
    Ok(count)
}

fn map_entry(entry: &[Field; 2], mut bytes: &[u8], depth: u32) -> Holds {
    let mut seen = [false; 2];
    while !bytes.is_empty() {
        let (number, raw) = next(&mut bytes)?;
        let index =
            number.checked_sub(1).map(|index| index as usize).filter(|index| *index < 2).ok_or(Doubt)?;
        element(&entry[index], raw, seen[index], depth)?;
        seen[index] = true;
    }
    for (field, _) in entry.iter().zip(seen).filter(|(_, seen)| !seen) {
        absent(field, depth)?;
    }
    Ok(())
}

/// Key or value of a map entry that is zero, or empty.
fn absent(field: &Field, depth: u32) -> Holds {
    let rules = field.element_rules();
    match &field.kind {
        FieldKind::Message(inner) => nested(inner, &[], rules, depth),
        FieldKind::Scalar(kind @ (Scalar::String | Scalar::Bytes)) => {
            text(&[], matches!(kind, Scalar::String), rules)
        }
        FieldKind::Scalar(kind) => scalar_value(&kind.zero(), kind, rules),
        FieldKind::Map(_) => Err(Doubt),
    }
}

fn text(value: &[u8], is_string: bool, rules: Option<&FieldRules>) -> Holds {
    let rule = rules.and_then(|rules| rules.r#type.as_ref());
    let wrong = if is_string {
        let value = std::str::from_utf8(value).map_err(|_| Doubt)?;
        match rule {
            Some(Type::String(rules)) => string(value, rules),
            _ => None,
        }
    } else {
        match rule {
            Some(Type::Bytes(rules)) => bytes(value, rules),
            _ => None,
        }
    };
    wrong.map_or(Ok(()), |_| Err(Doubt))
}

fn scalar_value(value: &Value, kind: &Scalar, rules: Option<&FieldRules>) -> Holds {
    let Some(rule) = rules.and_then(|rules| rules.r#type.as_ref()) else { return Ok(()) };
    let undefined = match (rule, kind, value) {
        (Type::Enum(rules), Scalar::Enum(values), Value::EnumNumber(number)) => {
            rules.defined_only() && !values.contains(number)
        }
        _ => false,
    };
    if undefined || broken(value, rule).is_some() { Err(Doubt) } else { Ok(()) }
}

/// A message in a message.
fn nested(inner: &MessageRef, bytes: &[u8], rules: Option<&FieldRules>, depth: u32) -> Holds {
    let known = inner.found.get_or_init(|| Known::named(&inner.name)).ok_or(Doubt)?;
    let rule = rules.and_then(|rules| rules.r#type.as_ref());
    match known.well_known {
        WellKnown::Any => return packed(bytes, depth),
        WellKnown::Wrapper => wrapped(known, bytes, rules)?,
        WellKnown::Duration => {
            if let Some(Type::Duration(rules)) = rule {
                let (mut seconds, mut nanos) = (0, 0);
                let mut rest = bytes;
                while !rest.is_empty() {
                    match next(&mut rest)? {
                        (1, Raw::Varint(value)) => seconds = value.cast_signed(),
                        (2, Raw::Varint(value)) => nanos = value as i32,
                        _ => return Err(Doubt),
                    }
                }
                if nanoseconds_broken(nanoseconds(seconds, nanos), rules).is_some() {
                    return Err(Doubt);
                }
            }
        }
        _ => {}
    }
    message(known, bytes, depth + 1)
}

/// The rules of a wrapper are about the scalar in it.
fn wrapped(known: &Known, mut bytes: &[u8], rules: Option<&FieldRules>) -> Holds {
    let Some(Field { kind: FieldKind::Scalar(kind), .. }) = known.fields.first() else { return Err(Doubt) };
    if rules.is_none() {
        return Ok(());
    }
    if bytes.is_empty() {
        return scalar_value(&kind.zero(), kind, rules);
    }
    while !bytes.is_empty() {
        match (kind, next(&mut bytes)?) {
            (Scalar::String, (1, Raw::Bytes(value))) => text(value, true, rules)?,
            (Scalar::Bytes, (1, Raw::Bytes(value))) => text(value, false, rules)?,
            (kind, (1, raw)) => scalar_value(&kind.value(&raw)?, kind, rules)?,
            _ => return Err(Doubt),
        }
    }
    Ok(())
}

/// The message in an `Any`.
fn packed(mut bytes: &[u8], depth: u32) -> Holds {
    let (mut type_url, mut value) = (None, None);
    while !bytes.is_empty() {
        match next(&mut bytes)? {
            (1, Raw::Bytes(text)) => type_url = Some(std::str::from_utf8(text).map_err(|_| Doubt)?),
            (2, Raw::Bytes(bytes)) => value = Some(bytes),
            _ => return Err(Doubt),
        }
    }
    let known = Known::named(any::type_name(type_url.ok_or(Doubt)?)).ok_or(Doubt)?;
    message(known, value.unwrap_or_default(), depth + 1)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use prost::{Message, Name};
    use prost_reflect::DynamicMessage;
    use tidegate_api::bootstrap::Bootstrap;
    use tidegate_api::cluster::Cluster;
    use tidegate_api::core::Metadata;
    use tidegate_api::endpoint::ClusterLoadAssignment;
    use tidegate_api::listener::Listener;
    use tidegate_api::wkt::Duration;

    use super::*;
    use crate::config::proto::rules::{InsideAny, inspect};
    use crate::config::proto::{FieldPath, Options, Source, UnknownTypes, parse_bootstrap};

    /// What the careful way finds.
    fn problems(full_name: &str, bytes: &[u8]) -> Vec<String> {
        let schema = MessageSchema::named(full_name).unwrap();
        let Ok(message) = DynamicMessage::decode(schema.descriptor.clone(), bytes) else {
            return vec!["undecodable".to_owned()];
        };
        let mut found = Vec::new();
        inspect(&message, &FieldPath::ROOT, InsideAny::Check, &mut |path, what| {
            found.push(format!("{path}: {what:?}"));
        });
        found
    }

    /// The messages of every example configuration.
    fn samples() -> Vec<(String, Vec<u8>)> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config");
        let mut samples = Vec::new();
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let Some("yaml" | "json") = path.extension().and_then(|extension| extension.to_str()) else {
                continue;
            };
            let source =
                Source::from_file(path.display().to_string(), std::fs::read(&path).unwrap()).unwrap();
            let options = Options { unknown_types: UnknownTypes::Keep, ..Options::default() };
            let bootstrap = parse_bootstrap(&source, &[], &options).unwrap().message;
            let resources = bootstrap.static_resources.clone().unwrap_or_default();
            samples.push((Bootstrap::full_name(), bootstrap.encode_to_vec()));
            samples.extend(resources.clusters.iter().map(|c| (Cluster::full_name(), c.encode_to_vec())));
            samples.extend(resources.listeners.iter().map(|l| (Listener::full_name(), l.encode_to_vec())));
            let assignments = resources.clusters.into_iter().filter_map(|cluster| cluster.load_assignment);
            samples.extend(assignments.map(|a| (ClusterLoadAssignment::full_name(), a.encode_to_vec())));
        }
        samples
    }

    #[test]
    fn knows_what_is_right() {
        let samples = samples();
        assert!(samples.len() > 20);
        for (name, bytes) in samples {
            assert_eq!(problems(&name, &bytes), Vec::<String>::new(), "{name}");
            // What control planes send; bootstraps are read once.
            if name != Bootstrap::full_name() {
                assert!(holds(&name, &bytes), "{name}: {:?}", String::from_utf8_lossy(&bytes));
            }
        }
    }

    #[test]
    fn doubts_what_is_not() {
        let sound = Cluster {
            name: "c".to_owned(),
            connect_timeout: Some(Duration { seconds: 1, nanos: 0 }),
            metadata: Some(Metadata {
                filter_metadata: [("istio".to_owned(), tidegate_api::wkt::Struct::default())].into(),
                ..Metadata::default()
            }),
            ..Cluster::default()
        };
        let name = Cluster::full_name();
        assert!(holds(&name, &sound.encode_to_vec()));
        let mut cases = vec![
            Cluster { name: String::new(), ..sound.clone() },
            Cluster { connect_timeout: Some(Duration::default()), ..sound.clone() },
            Cluster { lb_policy: 99, ..sound.clone() },
            Cluster { load_assignment: Some(ClusterLoadAssignment::default()), ..sound.clone() },
        ];
        let mut unnamed = sound.clone();
        unnamed
            .metadata
            .as_mut()
            .unwrap()
            .filter_metadata
            .insert(String::new(), tidegate_api::wkt::Struct::default());
        cases.push(unnamed);
        for case in cases {
            let bytes = case.encode_to_vec();
            assert_ne!(problems(&name, &bytes), Vec::<String>::new(), "{case:?}");
            assert!(!holds(&name, &bytes), "{case:?}");
        }
        let unknown_field = [&sound.encode_to_vec()[..], &[0xfa, 0xff, 0x03, 0]].concat();
        assert!(!holds(&name, &unknown_field));
        assert!(!holds(&name, &sound.encode_to_vec()[..5]));
        assert!(!holds("no.such.Message", &[]));
        let endless = std::iter::repeat_n([0x0a, 0x7f], 200).flatten().collect::<Vec<u8>>();
        assert!(!holds("google.protobuf.Struct", &endless));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// Whatever is wrong is seen here or there.
        #[test]
        fn is_never_surer_than_the_careful_way(
            which in any::<prop::sample::Index>(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..6),
        ) {
            static SAMPLES: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(samples);
            let (name, mut bytes) = which.get(&SAMPLES[..]).clone();
            for (at, byte, how) in changes {
                let at = at.index(bytes.len().max(1));
                match how {
                    0 => bytes.insert(at, byte),
                    1 if bytes.len() > 1 => drop(bytes.remove(at)),
                    2 => bytes.truncate(at),
                    _ => bytes.iter_mut().skip(at).take(1).for_each(|old| *old = byte),
                }
            }
            if holds(&name, &bytes) {
                prop_assert_eq!(problems(&name, &bytes), Vec::<String>::new());
            }
        }
    }
}
