//! From a parsed text to a message: a walk over its tree along the descriptors. Nothing stops at the first
//! problem.

use std::sync::Arc;

use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, Value as ProtoValue};

use super::any::{self, type_name};
use super::nearest::nearest;
use super::path::FieldPath;
use super::rules::{self, InsideAny};
use super::scalar::{self, wrong_type};
use super::schema::{Deprecation, FieldSchema, MessageSchema, WellKnown, enum_value_deprecation};
use super::tree::{Entry, NodeId, Tree, Value, last_of_each};
use super::{Options, SourceMap, UnknownFields, UnknownType, UnknownTypes};
use crate::config::error::{Mark, Problem, Reason, quoted};

/// Most problems, and most warnings, that are kept: a large file can have the same mistake everywhere.
const KEPT: usize = 1000;

/// Walks one text.
pub(super) struct Walker<'s> {
    tree: &'s Tree,
    file: Arc<str>,
    options: &'s Options,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
    /// Broken rules: the messages inside `Any` are checked when they are packed.
    broken: Vec<(String, Reason)>,
}

/// What a walk has found.
pub(super) struct Found {
    /// What could not be read.
    pub(super) problems: Vec<Problem>,
    /// What was accepted, but probably not meant.
    pub(super) warnings: Vec<Problem>,
    /// Broken rules inside `Any`, with their paths.
    pub(super) broken: Vec<(String, Reason)>,
}

/// Adds the broken rules that do not only follow from another problem, in the order of the text.
pub(super) fn add_unexplained(problems: &mut Vec<Problem>, broken: Vec<Problem>) {
    let follows: Vec<bool> =
        broken.iter().map(|rule| explained(problems, &rule.path, &rule.reason)).collect();
    problems.extend(broken.into_iter().zip(follows).filter(|(_, follows)| !follows).map(|(rule, _)| rule));
    problems.sort_by_key(|problem| problem.at);
}

impl<'s> Walker<'s> {
    /// A walker over the first layer of the map.
    pub(super) fn new(map: &'s SourceMap, options: &'s Options) -> Self {
        static EMPTY: std::sync::LazyLock<Tree> = std::sync::LazyLock::new(Tree::default);
        let (file, tree) =
            map.first().map_or_else(|| ("".into(), &*EMPTY), |(file, tree)| (file.clone(), tree));
        Self { tree, file, options, problems: Vec::new(), warnings: Vec::new(), broken: Vec::new() }
    }

    /// The whole text as a message.
    pub(super) fn root(&mut self, schema: &Arc<MessageSchema>) -> DynamicMessage {
        let path = FieldPath::ROOT;
        match self.tree.root() {
            Some(id) if schema.well_known != WellKnown::No => {
                if let Some(message) = self.message_value(id, schema, None, &path) {
                    return message;
                }
            }
            Some(id) => match &self.tree.node(id).value {
                Value::Map(_) => return self.message(id, schema, &path),
                Value::Null => self.problem(Mark { line: 1, column: 1 }, &path, empty(schema)),
                other => self.problem(self.mark(id), &path, wrong_type("a mapping of fields", other, None)),
            },
            None => self.problem(Mark { line: 1, column: 1 }, &path, empty(schema)),
        }
        DynamicMessage::new(schema.descriptor.clone())
    }

    /// What was found.
    pub(super) fn finish(self) -> Found {
        Found { problems: self.problems, warnings: self.warnings, broken: self.broken }
    }

    fn mark(&self, id: NodeId) -> Mark {
        self.tree.node(id).mark
    }

    fn note(&self, mark: Mark, path: &FieldPath<'_>, reason: Reason) -> Problem {
        Problem { file: self.file.clone(), at: Some(mark), path: path.to_string(), reason }
    }

    fn problem(&mut self, mark: Mark, path: &FieldPath<'_>, reason: Reason) {
        if self.problems.len() < KEPT {
            self.problems.push(self.note(mark, path, reason));
        }
    }

    fn warn(&mut self, mark: Mark, path: &FieldPath<'_>, reason: Reason) {
        if self.warnings.len() < KEPT {
            self.warnings.push(self.note(mark, path, reason));
        }
    }

    /// The entries that count, with a warning for each that does not.
    fn entries<'e>(&mut self, entries: &'e [Entry], path: &FieldPath<'_>) -> Vec<&'e Entry> {
        let mut superseded = Vec::new();
        let last: Vec<_> = last_of_each(entries, |entry| superseded.push(entry)).collect();
        for entry in superseded {
            self.warn(entry.mark, path, Reason::Duplicate(quoted(&entry.key)));
        }
        last
    }

    /// A mapping as a message. Gives what could be read, even if something could not.
    fn message(&mut self, id: NodeId, schema: &Arc<MessageSchema>, path: &FieldPath<'_>) -> DynamicMessage {
        let mut message = DynamicMessage::new(schema.descriptor.clone());
        let tree = self.tree;
        let Value::Map(entries) = &tree.node(id).value else {
            let expected = format!("a mapping of the fields of {}", schema.descriptor.full_name());
            self.problem(self.mark(id), path, wrong_type(&expected, &tree.node(id).value, None));
            return message;
        };
        let entries = self.entries(entries, path);
        let extension_name = entries.iter().find(|entry| &*entry.key == "name").and_then(|entry| {
            let Value::String(name) = &tree.node(entry.value).value else { return None };
            Some(&**name)
        });
        for entry in entries {
            if &*entry.key == "@type" && schema.descriptor.full_name() != "google.protobuf.Any" {
                continue; // of the Any around this message
            }
            match schema.field(&entry.key) {
                Some(field) => self.field(&mut message, field, entry, extension_name, path),
                None => self.unknown_field(entry, schema, path),
            }
        }
        message
    }

    fn unknown_field(&mut self, entry: &Entry, schema: &MessageSchema, path: &FieldPath<'_>) {
        let names = schema.fields.iter().map(|field| field.descriptor.name());
        let suggestion = nearest(&entry.key, names).map(str::to_owned);
        let reason = Reason::UnknownField {
            field: quoted(&entry.key),
            message: schema.descriptor.full_name().to_owned(),
            suggestion,
        };
        match self.options.unknown_fields {
            UnknownFields::Reject => self.problem(entry.mark, path, reason),
            UnknownFields::Warn => self.warn(entry.mark, path, reason),
        }
    }

    fn field(
        &mut self,
        message: &mut DynamicMessage,
        field: &FieldSchema,
        entry: &Entry,
        extension_name: Option<&str>,
        path: &FieldPath<'_>,
    ) {
        let descriptor = &field.descriptor;
        let here = path.field(descriptor.name());
        let Some(value) = self.field_value(descriptor, entry.value, extension_name, &here) else { return };
        if let Some(deprecation) = &field.deprecated {
            self.deprecated(entry.mark, &here, descriptor.name(), deprecation);
        }
        if message.has_field(descriptor) {
            self.warn(entry.mark, path, Reason::Duplicate(quoted(descriptor.name())));
        }
        if let Some(oneof) = descriptor.containing_oneof().filter(|oneof| !oneof.is_synthetic()) {
            let others = |member: &FieldDescriptor| member != descriptor && message.has_field(member);
            if let Some(first) = oneof.fields().find(others) {
                let reason = Reason::OneofConflict {
                    oneof: oneof.name().to_owned(),
                    first: quoted(first.name()),
                    second: quoted(descriptor.name()),
                };
                self.problem(entry.mark, path, reason);
                return;
            }
        }
        if message.try_set_field(descriptor, value).is_err() {
            let reason = Reason::Invalid("the value does not fit the type of the field".to_owned());
            self.problem(entry.mark, &here, reason);
        }
    }

    fn deprecated(&mut self, mark: Mark, path: &FieldPath<'_>, name: &str, deprecation: &Deprecation) {
        let reason = Reason::Deprecated { name: quoted(name), since: deprecation.since.clone() };
        if deprecation.disallowed {
            self.problem(mark, path, reason);
        } else {
            self.warn(mark, path, reason);
        }
    }

    /// The value of a field; none when it stays unset, or could not be read.
    fn field_value(
        &mut self,
        field: &FieldDescriptor,
        id: NodeId,
        extension_name: Option<&str>,
        path: &FieldPath<'_>,
    ) -> Option<ProtoValue> {
        let tree = self.tree;
        let value = &tree.node(id).value;
        if field.is_map() {
            return self.map(field, id, path);
        }
        if field.is_list() {
            let items: &[NodeId] = match value {
                Value::Null => return None,
                Value::List(items) => items,
                _ => &[id], // as Envoy: one value stands for a list of one
            };
            let values = items.iter().enumerate().filter_map(|(index, item)| {
                self.value(&field.kind(), *item, extension_name, &path.index(index))
            });
            return Some(ProtoValue::List(values.collect()));
        }
        if matches!(value, Value::Null) && !takes_null(&field.kind()) {
            return None;
        }
        self.value(&field.kind(), id, extension_name, path)
    }

    fn map(&mut self, field: &FieldDescriptor, id: NodeId, path: &FieldPath<'_>) -> Option<ProtoValue> {
        let tree = self.tree;
        let entries = match &tree.node(id).value {
            Value::Null => return None,
            Value::Map(entries) => entries,
            other => {
                self.problem(self.mark(id), path, wrong_type("a mapping", other, None));
                return None;
            }
        };
        let Kind::Message(entry_type) = field.kind() else { return None };
        let (key_kind, value_kind) =
            (entry_type.map_entry_key_field().kind(), entry_type.map_entry_value_field().kind());
        let mut map = std::collections::HashMap::<MapKey, ProtoValue>::new();
        for entry in self.entries(entries, path) {
            let here = path.key(&entry.key);
            let key = match scalar::map_key(&key_kind, &entry.key) {
                Ok(key) => key,
                Err(reason) => {
                    self.problem(entry.mark, &here, reason);
                    continue;
                }
            };
            if let Some(value) = self.value(&value_kind, entry.value, Some(&entry.key), &here) {
                map.insert(key, value);
            }
        }
        Some(ProtoValue::Map(map))
    }

    /// One value: a singular field, an element, the value of a map entry.
    fn value(
        &mut self,
        kind: &Kind,
        id: NodeId,
        extension_name: Option<&str>,
        path: &FieldPath<'_>,
    ) -> Option<ProtoValue> {
        let tree = self.tree;
        let value = &tree.node(id).value;
        if matches!(value, Value::Null) && !takes_null(kind) {
            return Some(ProtoValue::default_value(kind)); // in a list or map, where it can't be left unset
        }
        match kind {
            Kind::Message(descriptor) => {
                let schema = MessageSchema::of(descriptor);
                self.message_value(id, &schema, extension_name, path).map(ProtoValue::Message)
            }
            _ => match scalar::scalar(kind, value) {
                Ok(value) => {
                    self.check_enum_value(kind, &value, id, path);
                    Some(value)
                }
                Err(reason) => {
                    self.problem(self.mark(id), path, reason);
                    None
                }
            },
        }
    }

    fn check_enum_value(&mut self, kind: &Kind, value: &ProtoValue, id: NodeId, path: &FieldPath<'_>) {
        let (Kind::Enum(descriptor), ProtoValue::EnumNumber(number)) = (kind, value) else { return };
        let Some(value) = descriptor.get_value(*number) else { return };
        if let Some(deprecation) = enum_value_deprecation(&value) {
            self.deprecated(self.mark(id), path, value.name(), &deprecation);
        }
    }

    fn message_value(
        &mut self,
        id: NodeId,
        schema: &Arc<MessageSchema>,
        extension_name: Option<&str>,
        path: &FieldPath<'_>,
    ) -> Option<DynamicMessage> {
        let tree = self.tree;
        let value = &tree.node(id).value;
        let text = match value {
            Value::String(text) => Some(&**text),
            _ => None,
        };
        let read = match schema.well_known {
            WellKnown::No => return Some(self.message(id, schema, path)),
            WellKnown::Any => return self.any(id, schema, extension_name, path),
            WellKnown::Struct | WellKnown::Value | WellKnown::ListValue => {
                return self.dynamic_value(id, schema, path);
            }
            // Envoy also takes the fields of these messages.
            WellKnown::Wrapper | WellKnown::Duration | WellKnown::Timestamp
                if matches!(value, Value::Map(_)) =>
            {
                return Some(self.message(id, schema, path));
            }
            WellKnown::Wrapper => self.wrapped(id, schema),
            WellKnown::Duration => {
                text.and_then(scalar::duration).map(|time| seconds_and_nanos(schema, time)).ok_or_else(|| {
                    wrong_type("a duration in seconds like \"1.5s\"", value, duration_hint(value))
                })
            }
            WellKnown::Timestamp => text
                .and_then(scalar::timestamp)
                .map(|time| seconds_and_nanos(schema, time))
                .ok_or_else(|| wrong_type("a time like \"2026-01-31T23:59:59Z\"", value, None)),
            WellKnown::FieldMask => text
                .and_then(scalar::field_mask)
                .map(|paths| {
                    let mut message = DynamicMessage::new(schema.descriptor.clone());
                    let paths = paths.into_iter().map(ProtoValue::String).collect();
                    message.set_field_by_number(1, ProtoValue::List(paths));
                    message
                })
                .ok_or_else(|| wrong_type("lowerCamelCase field paths with commas between", value, None)),
        };
        read.map_err(|reason| self.problem(self.mark(id), path, reason)).ok()
    }

    fn wrapped(&self, id: NodeId, schema: &MessageSchema) -> Result<DynamicMessage, Reason> {
        let field = &schema.fields[0].descriptor;
        let value = scalar::scalar(&field.kind(), &self.tree.node(id).value)?;
        let mut message = DynamicMessage::new(schema.descriptor.clone());
        message.set_field(field, value);
        Ok(message)
    }

    /// `Struct`, `Value`, `ListValue`: any JSON.
    fn dynamic_value(
        &mut self,
        id: NodeId,
        schema: &MessageSchema,
        path: &FieldPath<'_>,
    ) -> Option<DynamicMessage> {
        let tree = self.tree;
        let value = &tree.node(id).value;
        let mut message = DynamicMessage::new(schema.descriptor.clone());
        match (schema.well_known, value) {
            (WellKnown::Struct, Value::Map(entries)) => {
                let element = MessageSchema::named("google.protobuf.Value")?;
                let mut fields = std::collections::HashMap::new();
                for entry in self.entries(entries, path) {
                    if let Some(value) = self.dynamic_value(entry.value, &element, &path.key(&entry.key)) {
                        fields.insert(MapKey::String(entry.key.to_string()), ProtoValue::Message(value));
                    }
                }
                message.set_field_by_number(1, ProtoValue::Map(fields));
            }
            (WellKnown::ListValue, Value::List(items)) => {
                let element = MessageSchema::named("google.protobuf.Value")?;
                let values = items.iter().enumerate().filter_map(|(index, item)| {
                    self.dynamic_value(*item, &element, &path.index(index)).map(ProtoValue::Message)
                });
                let values = values.collect();
                message.set_field_by_number(1, ProtoValue::List(values));
            }
            (WellKnown::Value, Value::Null) => message.set_field_by_number(1, ProtoValue::EnumNumber(0)),
            (WellKnown::Value, number @ Value::Number(_)) => match scalar::scalar(&Kind::Double, number) {
                Ok(value) => message.set_field_by_number(2, value),
                Err(reason) => {
                    self.problem(self.mark(id), path, reason);
                    return None;
                }
            },
            (WellKnown::Value, Value::String(text)) => {
                message.set_field_by_number(3, ProtoValue::String(text.to_string()));
            }
            (WellKnown::Value, Value::Bool(value)) => {
                message.set_field_by_number(4, ProtoValue::Bool(*value))
            }
            (WellKnown::Value, Value::Map(_)) => {
                let inner = MessageSchema::named("google.protobuf.Struct")?;
                message.set_field_by_number(5, ProtoValue::Message(self.dynamic_value(id, &inner, path)?));
            }
            (WellKnown::Value, Value::List(_)) => {
                let inner = MessageSchema::named("google.protobuf.ListValue")?;
                message.set_field_by_number(6, ProtoValue::Message(self.dynamic_value(id, &inner, path)?));
            }
            (well_known, other) => {
                let expected = if well_known == WellKnown::ListValue { "a list" } else { "a mapping" };
                self.problem(self.mark(id), path, wrong_type(expected, other, None));
                return None;
            }
        }
        Some(message)
    }

    fn any(
        &mut self,
        id: NodeId,
        schema: &MessageSchema,
        extension_name: Option<&str>,
        path: &FieldPath<'_>,
    ) -> Option<DynamicMessage> {
        let tree = self.tree;
        let mark = self.mark(id);
        let Value::Map(entries) = &tree.node(id).value else {
            self.problem(mark, path, wrong_type("a mapping with @type", &tree.node(id).value, None));
            return None;
        };
        if entries.is_empty() {
            return Some(DynamicMessage::new(schema.descriptor.clone()));
        }
        let (type_url, mark) = match self.type_url(entries) {
            Ok(found) => found,
            Err(reason) => {
                self.problem(mark, path, reason);
                return None;
            }
        };
        let Some(inner) = MessageSchema::named(type_name(type_url)) else {
            return self.unknown_type(id, mark, type_url, extension_name, path);
        };
        if is_typed_struct(type_url) && !is_opaque(path) {
            if let Some((type_url, schema)) = self.known_inside_typed_struct(entries) {
                let message = match entry(entries, "value") {
                    Some(value) if !matches!(tree.node(value).value, Value::Null) => {
                        self.message(value, &schema, path)
                    }
                    _ => DynamicMessage::new(schema.descriptor.clone()),
                };
                return self.pack(type_url, &message, path);
            }
        }
        if inner.well_known == WellKnown::No {
            let message = self.message(id, &inner, path);
            return self.pack(type_url, &message, path);
        }
        for other in entries.iter().filter(|entry| !matches!(&*entry.key, "@type" | "value")) {
            self.unknown_field(other, &inner, path);
        }
        let message = match entry(entries, "value") {
            Some(value) => match self.value(&Kind::Message(inner.descriptor.clone()), value, None, path)? {
                ProtoValue::Message(message) => message,
                _ => return None,
            },
            None => DynamicMessage::new(inner.descriptor.clone()),
        };
        self.pack(type_url, &message, path)
    }

    /// Packs a message of an extension, which is checked here, where its path is known.
    fn pack(
        &mut self,
        type_url: &str,
        message: &DynamicMessage,
        path: &FieldPath<'_>,
    ) -> Option<DynamicMessage> {
        if is_opaque(path) {
            return any::pack(type_url, message);
        }
        let broken = &mut self.broken;
        rules::check(message, path, InsideAny::Skip, &mut |path, reason| {
            if broken.len() < KEPT {
                broken.push((path.to_string(), reason));
            }
        });
        any::pack(type_url, message)
    }

    fn type_url(&self, entries: &'s [Entry]) -> Result<(&'s str, Mark), Reason> {
        let missing =
            "@type is missing: an extension needs '@type': type.googleapis.com/<full name of its message>";
        let id = entry(entries, "@type").ok_or_else(|| Reason::TypeUrl(missing.to_owned()))?;
        let node = self.tree.node(id);
        match &node.value {
            Value::String(url) if url.split_once('/').is_some_and(|(host, _)| !host.is_empty()) => {
                Ok((url, node.mark))
            }
            Value::String(url) => Err(Reason::TypeUrl(format!(
                "@type {} is not a type URL: it needs a host and a slash, as in type.googleapis.com/{}",
                quoted(url),
                type_name(url)
            ))),
            other => Err(wrong_type("a type URL in @type", other, None)),
        }
    }

    fn known_inside_typed_struct(&self, entries: &'s [Entry]) -> Option<(&'s str, Arc<MessageSchema>)> {
        let id = entry(entries, "type_url").or_else(|| entry(entries, "typeUrl"))?;
        let Value::String(url) = &self.tree.node(id).value else { return None };
        if is_typed_struct(url) || !url.contains('/') {
            return None;
        }
        Some((url, MessageSchema::named(type_name(url)).filter(|schema| schema.well_known == WellKnown::No)?))
    }

    fn unknown_type(
        &mut self,
        id: NodeId,
        mark: Mark,
        type_url: &str,
        extension_name: Option<&str>,
        path: &FieldPath<'_>,
    ) -> Option<DynamicMessage> {
        let reason = Reason::UnknownType { type_url: quoted(type_url), suggestion: similar_type(type_url) };
        let keep = match self.options.unknown_types {
            UnknownTypes::Refuse => false,
            UnknownTypes::Keep => true,
            UnknownTypes::Ask(keep) => {
                keep(&UnknownType { type_url, extension_name, path: &path.to_string() })
            }
        };
        if !keep {
            self.problem(mark, path, reason);
            return None;
        }
        self.warn(mark, path, reason);
        let content = MessageSchema::named("google.protobuf.Struct")?;
        let mut content = self.dynamic_value(id, &content, path)?;
        if let Some(ProtoValue::Map(fields)) = content.get_field_by_number_mut(1) {
            fields.remove(&MapKey::String("@type".to_owned()));
        }
        any::pack_unknown(type_url, content)
    }
}

fn empty(schema: &MessageSchema) -> Reason {
    Reason::Syntax(format!("the text is empty: expected a {}", schema.descriptor.full_name()))
}

fn entry(entries: &[Entry], key: &str) -> Option<NodeId> {
    entries.iter().rev().find(|entry| &*entry.key == key).map(|entry| entry.value)
}

/// Metadata is for whoever looks it up: it stays as it is and need not be complete.
fn is_opaque(path: &FieldPath<'_>) -> bool {
    path.is_inside("typed_filter_metadata")
}

fn is_typed_struct(type_url: &str) -> bool {
    matches!(type_name(type_url), "udpa.type.v1.TypedStruct" | "xds.type.v3.TypedStruct")
}

/// Whether null is a value of this type, and not the absence of one.
fn takes_null(kind: &Kind) -> bool {
    match kind {
        Kind::Message(message) => message.full_name() == "google.protobuf.Value",
        Kind::Enum(descriptor) => descriptor.full_name() == "google.protobuf.NullValue",
        _ => false,
    }
}

fn seconds_and_nanos(schema: &MessageSchema, (seconds, nanos): (i64, i32)) -> DynamicMessage {
    let mut message = DynamicMessage::new(schema.descriptor.clone());
    message.set_field_by_number(1, ProtoValue::I64(seconds));
    message.set_field_by_number(2, ProtoValue::I32(nanos));
    message
}

fn duration_hint(value: &Value) -> Option<&'static str> {
    let text = match value {
        Value::String(text) => &**text,
        Value::Number(_) => return Some("append the unit s"),
        _ => return None,
    };
    if text.ends_with("ms") {
        return Some("seconds are the only unit: 250ms is 0.25s");
    }
    if text.ends_with(['m', 'h']) {
        return Some("seconds are the only unit: 5m is 300s");
    }
    text.parse::<f64>().is_ok().then_some("append the unit s")
}

/// A known type with nearly this name, or with the same last part.
fn similar_type(type_url: &str) -> Option<String> {
    let name = type_name(type_url);
    let messages: Vec<_> = tidegate_api::descriptors().all_messages().collect();
    if let Some(found) = nearest(name, messages.iter().map(|message| message.full_name())) {
        return Some(found.to_owned());
    }
    let last = name.rsplit('.').next()?;
    let mut same =
        messages.iter().filter(|message| message.name() == last && message.parent_message().is_none());
    let only = same.next()?;
    same.next().is_none().then(|| only.full_name().to_owned())
}

/// Whether a broken rule only follows from a problem with the same thing: a required field is not missing
/// when it is there, but misspelt or of the wrong type.
fn explained(problems: &[Problem], path: &str, reason: &Reason) -> bool {
    let below = |inner: &str, outer: &str| {
        inner
            .strip_prefix(outer)
            .is_some_and(|rest| outer.is_empty() || rest.is_empty() || rest.starts_with(['.', '[']))
    };
    let join = |message: &str, field: &str| {
        if message.is_empty() { field.to_owned() } else { format!("{message}.{field}") }
    };
    problems.iter().any(|problem| match (&problem.reason, reason) {
        // Nothing could be read at all.
        (Reason::Syntax(_) | Reason::Limit(_), _) => true,
        (Reason::WrongType { .. }, _) if problem.path.is_empty() => true,
        (Reason::UnknownField { suggestion: Some(meant), .. }, Reason::Missing(missing)) => {
            join(&problem.path, meant) == path || (problem.path == path && missing.contains(meant))
        }
        (Reason::UnknownField { suggestion: Some(meant), .. }, _) => join(&problem.path, meant) == path,
        (Reason::UnknownField { .. }, _) => false,
        (_, Reason::Missing(missing)) => match missing.strip_prefix("one of ") {
            Some(members) => members.split(", ").any(|member| below(&problem.path, &join(path, member))),
            None => below(&problem.path, path),
        },
        _ => problem.path == path,
    })
}
