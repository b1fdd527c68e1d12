//! From a parsed text to a message: a walk over its tree along the descriptors. Nothing stops at the first
//! problem.

mod extension;
mod part;
mod well_known;

use std::sync::Arc;

use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, Value as ProtoValue};

use super::nearest::nearest;
use super::path::FieldPath;
use super::scalar::{self, wrong_type};
use super::schema::{Deprecation, FieldSchema, MessageSchema, WellKnown, enum_value_deprecation};
use super::tree::{Entry, NodeId, Tree, Value, last_of_each};
use super::{Options, SourceMap, UnknownFields};
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
    /// Inside a field that is not to be shown.
    sensitive: bool,
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
        let (problems, warnings, broken) = (Vec::new(), Vec::new(), Vec::new());
        Self { tree, file, options, problems, warnings, broken, sensitive: false }
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
        let reason = if self.sensitive { reason.without_value() } else { reason };
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
        let outer = self.sensitive;
        self.sensitive |= field.sensitive;
        let value = self.field_value(descriptor, entry.value, extension_name, &here);
        self.sensitive = outer;
        let Some(value) = value else { return };
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
}

fn empty(schema: &MessageSchema) -> Reason {
    Reason::Syntax(format!("the text is empty: expected a {}", schema.descriptor.full_name()))
}

fn entry(entries: &[Entry], key: &str) -> Option<NodeId> {
    entries.iter().rev().find(|entry| &*entry.key == key).map(|entry| entry.value)
}

/// Whether null is a value of this type, and not the absence of one.
fn takes_null(kind: &Kind) -> bool {
    match kind {
        Kind::Message(message) => message.full_name() == "google.protobuf.Value",
        Kind::Enum(descriptor) => descriptor.full_name() == "google.protobuf.NullValue",
        _ => false,
    }
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
