//! Typed extension configurations: `Any`, and TypedStruct around a known or unknown type.

use prost::{Message, Name};
use tidegate_api::wkt::Any;

use super::Report;
use crate::config::error::Reason;
use crate::config::proto::{FieldPath, UnpackError, inner_type_name, type_name, unpack};

/// What an `Any` holds, known by its type.
pub(super) struct Extension {
    any: Any,
    /// Full name of the message, also when a TypedStruct stands for it.
    pub(super) type_name: String,
    /// Whether the type has a descriptor here.
    pub(super) known: bool,
}

impl Extension {
    pub(super) fn new(any: Any) -> Self {
        let type_name = inner_type_name(&any);
        let known = tidegate_api::descriptors().get_message_by_name(&type_name).is_some();
        Self { any, type_name, known }
    }

    /// Whether it is a message of this type.
    pub(super) fn is<M: Name>(&self) -> bool {
        self.type_name == M::full_name()
    }

    /// As written; the inner type when it is a TypedStruct.
    pub(super) fn type_url(&self) -> &str {
        if type_name(&self.any.type_url) == self.type_name { &self.any.type_url } else { &self.type_name }
    }

    /// The message, when it is one of this type.
    pub(super) fn decode<M: Message + Name + Default>(
        &self,
        path: &FieldPath<'_>,
        report: &mut Report<'_>,
    ) -> Option<M> {
        match unpack(&self.any) {
            Ok(message) => return Some(message),
            Err(UnpackError::Invalid(error)) => {
                for problem in error.problems() {
                    report.refuse(&path.field("value").field(&problem.path), problem.reason.clone());
                }
            }
            Err(error) => report.invalid(path, error.to_string()),
        }
        None
    }
}

/// Reports an extension of a type that is not compiled in, in Envoy's words.
pub(super) fn unregistered(name: &str, type_url: &str, path: &FieldPath<'_>, report: &mut Report<'_>) {
    report.refuse(
        path,
        Reason::Unsupported(format!(
            "Didn't find a registered implementation for '{name}' with type URL: '{type_url}'"
        )),
    );
}
