//! Parts of a text: for messages whose members are read one by one.

use std::sync::Arc;

use prost_reflect::DynamicMessage;

use super::super::path::FieldPath;
use super::super::scalar::wrong_type;
use super::super::schema::MessageSchema;
use super::super::tree::{NodeId, Value};
use super::{Walker, empty};
use crate::config::error::Mark;

impl Walker<'_> {
    /// The whole text as a message, but for one list, of which the elements are given.
    pub(in crate::config::proto) fn root_without(
        &mut self,
        schema: &Arc<MessageSchema>,
        list: &str,
    ) -> (DynamicMessage, Vec<NodeId>) {
        let tree = self.tree;
        let path = FieldPath::ROOT;
        let mut message = DynamicMessage::new(schema.descriptor.clone());
        let mut elements = Vec::new();
        let entries = match tree.root().map(|id| (id, &tree.node(id).value)) {
            Some((_, Value::Map(entries))) => self.entries(entries, &path),
            None | Some((_, Value::Null)) => {
                self.problem(Mark { line: 1, column: 1 }, &path, empty(schema));
                return (message, elements);
            }
            Some((id, other)) => {
                self.problem(self.mark(id), &path, wrong_type("a mapping of fields", other, None));
                return (message, elements);
            }
        };
        for entry in entries {
            match schema.field(&entry.key) {
                Some(field) if field.descriptor.name() == list => match &tree.node(entry.value).value {
                    Value::Null => {}
                    Value::List(items) => elements.extend(items),
                    _ => elements.push(entry.value), // as everywhere: one value stands for a list of one
                },
                Some(field) => self.field(&mut message, field, entry, None, &path),
                None if &*entry.key == "@type" => {}
                None => self.unknown_field(entry, schema, &path),
            }
        }
        (message, elements)
    }

    /// The value of one node as a message.
    pub(in crate::config::proto) fn message_at(
        &mut self,
        id: NodeId,
        schema: &Arc<MessageSchema>,
        path: &FieldPath<'_>,
    ) -> Option<DynamicMessage> {
        self.message_value(id, schema, None, path)
    }
}
