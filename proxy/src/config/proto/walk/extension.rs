//! `Any`: an extension, whose type the text names.

use std::sync::Arc;

use prost_reflect::{DynamicMessage, Kind, MapKey, MessageDescriptor, Value as ProtoValue};

use super::super::any::{self, type_name};
use super::super::nearest::nearest;
use super::super::path::FieldPath;
use super::super::rules::{self, InsideAny};
use super::super::scalar::wrong_type;
use super::super::schema::{MessageSchema, WellKnown};
use super::super::tree::{Entry, NodeId, Value};
use super::super::{UnknownType, UnknownTypes};
use super::{KEPT, Walker, entry};
use crate::config::error::{Mark, Reason, quoted};

impl<'s> Walker<'s> {
    pub(super) fn any(
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
        if is_typed_struct(type_url)
            && !is_opaque(path)
            && let Some((type_url, schema)) = self.known_inside_typed_struct(entries)
        {
            let message = match entry(entries, "value") {
                Some(value) if !matches!(tree.node(value).value, Value::Null) => {
                    self.message(value, &schema, path)
                }
                _ => DynamicMessage::new(schema.descriptor.clone()),
            };
            return self.pack(type_url, &message, path);
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

/// Metadata is for whoever looks it up: it stays as it is and need not be complete.
fn is_opaque(path: &FieldPath<'_>) -> bool {
    path.is_inside("typed_filter_metadata")
}

fn is_typed_struct(type_url: &str) -> bool {
    matches!(type_name(type_url), "udpa.type.v1.TypedStruct" | "xds.type.v3.TypedStruct")
}

/// A known type with nearly this name, or with the same last part.
fn similar_type(type_url: &str) -> Option<String> {
    let name = type_name(type_url);
    let messages: Vec<_> = tidegate_api::descriptors().all_messages().collect();
    if let Some(found) = nearest(name, messages.iter().map(MessageDescriptor::full_name)) {
        return Some(found.to_owned());
    }
    let last = name.rsplit('.').next()?;
    let mut same =
        messages.iter().filter(|message| message.name() == last && message.parent_message().is_none());
    let only = same.next()?;
    same.next().is_none().then(|| only.full_name().to_owned())
}
