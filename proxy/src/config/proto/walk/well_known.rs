//! Messages with a JSON form of their own.

use std::sync::Arc;

use prost_reflect::Kind;
use prost_reflect::{DynamicMessage, MapKey, Value as ProtoValue};

use super::super::path::FieldPath;
use super::super::scalar::{self, wrong_type};
use super::super::schema::{MessageSchema, WellKnown};
use super::super::tree::{NodeId, Value};
use super::Walker;
use crate::config::error::Reason;

impl Walker<'_> {
    pub(super) fn message_value(
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
    pub(super) fn dynamic_value(
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
            (WellKnown::Value, Value::Null) => {
                message.set_field_by_number(1, ProtoValue::EnumNumber(0));
            }
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
                message.set_field_by_number(4, ProtoValue::Bool(*value));
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
