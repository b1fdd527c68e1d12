//! From text (YAML, JSON) or bytes to Envoy's messages, and back to JSON.
//!
//! Text is parsed into a tree that knows line and column of every value, the tree is walked along the
//! descriptors of [`tidegate_api`], and the result is checked against the rules of Envoy's API
//! (`validate.rules`). It accepts what Envoy 1.40 accepts, and reports everything that is wrong at once, with
//! file, line, and a field path that goes through `Any`. Both spellings of proto3 JSON are read, mixed as one
//! likes.

mod any;
mod discovery;
mod json;
mod nearest;
mod path;
mod rules;
mod scalar;
mod schema;
mod source_map;
mod to_json;
mod tree;
mod walk;
mod yaml;

use std::sync::Arc;
use std::time::Duration;

use prost::{Message, Name};
use prost_reflect::{DynamicMessage, ReflectMessage};
use tidegate_api::bootstrap::Bootstrap;

pub use any::{UnpackError, inner_type_name, type_name, unpack};
pub use discovery::{ResourceText, ResponseText, parse_discovery_response};
pub use path::FieldPath;
pub use source_map::{Diagnostics, SourceMap};
pub use to_json::to_json;

use crate::config::error::{ConfigError, Mark, Problem, Reason};
use schema::MessageSchema;
use walk::Walker;

/// A text and what to call it.
#[derive(Clone, Debug)]
pub struct Source {
    /// For messages: a file name, `--config-yaml`, …
    pub name: Arc<str>,
    /// The text.
    pub text: String,
    /// How to read it.
    pub format: Format,
}

/// The syntax of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// YAML with the scalar types of Envoy.
    Yaml,
    /// JSON, as lenient as Envoy's parser: trailing commas, single quotes, bare keys.
    Json,
}

impl Source {
    /// A YAML text.
    pub fn yaml(name: impl Into<Arc<str>>, text: impl Into<String>) -> Self {
        Self { name: name.into(), text: text.into(), format: Format::Yaml }
    }

    /// The content of a file. Its name says how to read it: `.json` is JSON, everything else YAML, of which
    /// strict JSON is a part.
    pub fn from_file(name: impl Into<Arc<str>>, content: Vec<u8>) -> Result<Self, ConfigError> {
        let name = name.into();
        let format = if name.to_ascii_lowercase().ends_with(".json") { Format::Json } else { Format::Yaml };
        match String::from_utf8(content) {
            Ok(text) => Ok(Self { name, text, format }),
            Err(error) => {
                let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
                let line = valid.split(|byte| *byte == b'\n').count() as u32;
                let reason = Reason::Syntax("not UTF-8; save the file in that encoding".to_owned());
                let at = Some(Mark { line, column: 1 });
                Err(Problem { file: name, at, path: String::new(), reason }.into())
            }
        }
    }
}

/// What to do with what Envoy's API does not know.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Unknown fields.
    pub unknown_fields: UnknownFields,
    /// Types in `@type` that have no descriptor.
    pub unknown_types: UnknownTypes,
}

impl Default for Options {
    /// As Envoy has it for static configuration: refuse both.
    fn default() -> Self {
        Self { unknown_fields: UnknownFields::Reject, unknown_types: UnknownTypes::Refuse }
    }
}

/// What to do with an unknown field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnknownFields {
    /// It is an error: Envoy's rule for static configuration.
    Reject,
    /// It is ignored with a warning: Envoy's rule for dynamic configuration.
    Warn,
}

/// What to do with an `Any` of an unknown type.
#[derive(Clone, Copy, Debug)]
pub enum UnknownTypes {
    /// It is an error.
    Refuse,
    /// It is kept, with a warning, as an `xds.type.v3.TypedStruct`.
    Keep,
    /// True keeps it, with a warning.
    Ask(fn(&UnknownType<'_>) -> bool),
}

/// An `Any` of an unknown type.
#[derive(Clone, Copy, Debug)]
pub struct UnknownType<'a> {
    /// Its `@type`.
    pub type_url: &'a str,
    /// The `name` beside it, or its key in a map: `istio.stats`.
    pub extension_name: Option<&'a str>,
    /// Where it is.
    pub path: &'a str,
}

/// A message that was read from text.
#[derive(Debug)]
pub struct Parsed<M> {
    /// The message.
    pub message: M,
    /// The same message with its descriptors, for [`to_json()`].
    pub dynamic: DynamicMessage,
    /// Where its fields are in the text.
    pub source_map: SourceMap,
    /// What was accepted, but probably not meant: deprecated fields, keys that are there twice, unknown
    /// fields and types where these are tolerated.
    pub warnings: Vec<Problem>,
}

/// Reads a bootstrap from its text, and from texts that are merged over it in this order (`--config-yaml`):
/// fields override, messages merge, lists append, as protobuf merges messages.
pub fn parse_bootstrap(
    base: &Source,
    overlays: &[Source],
    options: &Options,
) -> Result<Parsed<Bootstrap>, ConfigError> {
    parse_layers(std::iter::once(base).chain(overlays), options)
}

/// Reads a message from text.
pub fn parse<M: Message + Name + Default>(
    source: &Source,
    options: &Options,
) -> Result<Parsed<M>, ConfigError> {
    parse_layers(std::iter::once(source), options)
}

fn parse_layers<'a, M: Message + Name + Default>(
    sources: impl Iterator<Item = &'a Source>,
    options: &Options,
) -> Result<Parsed<M>, ConfigError> {
    let schema = schema_of::<M>()?;
    let mut merged: Option<DynamicMessage> = None;
    let mut source_map = SourceMap::default();
    let (mut problems, mut warnings, mut broken) = (Vec::new(), Vec::new(), Vec::new());
    for source in sources {
        let (tree, ignored) = match read(source) {
            Ok(read) => read,
            Err(problem) => {
                problems.push(*problem);
                continue;
            }
        };
        warnings.extend(ignored);
        let map = SourceMap::new(source.name.clone(), tree);
        let mut walker = Walker::new(&map, options);
        let message = walker.root(&schema);
        let found = walker.finish();
        problems.extend(found.problems);
        warnings.extend(found.warnings);
        // A path inside a layer is only right for its own text.
        broken.extend(
            found.broken.into_iter().map(|(path, reason)| map.problem(&FieldPath::at(&path), reason)),
        );
        match &mut merged {
            None => merged = Some(message),
            Some(merged) => merge(merged, &message, source, &mut problems),
        }
        source_map.merge(map);
    }
    let dynamic = merged.unwrap_or_else(|| DynamicMessage::new(schema.descriptor.clone()));
    rules::check(&dynamic, &FieldPath::ROOT, rules::InsideAny::Skip, &mut |path, reason| {
        broken.push(source_map.problem(path, reason));
    });
    walk::add_unexplained(&mut problems, broken);
    if let Some(error) = ConfigError::from_problems(problems) {
        return Err(error);
    }
    match dynamic.transcode_to() {
        Ok(message) => Ok(Parsed { message, dynamic, source_map, warnings }),
        Err(error) => Err(source_map.problem(&FieldPath::ROOT, Reason::Limit(error.to_string())).into()),
    }
}

/// Checks a message that did not come from text (binary xDS) against the rules of Envoy's API, inside `Any`
/// too. `name` stands where the file name would.
pub fn check<M: Message + Name>(message: &M, name: impl Into<Arc<str>>) -> Result<(), ConfigError> {
    let name = name.into();
    let problem = |path: String, reason| Problem { file: name.clone(), at: None, path, reason };
    let mut problems = Vec::new();
    match to_dynamic(message) {
        Ok(dynamic) => {
            rules::check(&dynamic, &FieldPath::ROOT, rules::InsideAny::Check, &mut |path, reason| {
                problems.push(problem(path.to_string(), reason));
            });
        }
        Err(error) => problems.push(problem(String::new(), Reason::Invalid(error.to_string()))),
    }
    ConfigError::from_problems(problems).map_or(Ok(()), Err)
}

/// A message of which only the encoding is kept until somebody wants to see it: a fraction of the memory.
#[derive(Clone, Debug)]
pub struct Encoded {
    type_name: String,
    bytes: Vec<u8>,
}

impl Encoded {
    /// Encodes a message.
    pub fn new(message: &DynamicMessage) -> Self {
        Self { type_name: message.descriptor().full_name().to_owned(), bytes: message.encode_to_vec() }
    }

    /// A message that is encoded already. `type_url` may be just its full name.
    pub fn from_bytes(type_url: &str, bytes: &[u8]) -> Self {
        Self { type_name: type_name(type_url).to_owned(), bytes: bytes.to_vec() }
    }

    /// The message as JSON, as [`to_json()`] shows it; null if it can't be decoded.
    pub fn to_json(&self) -> serde_json::Value {
        let message = MessageSchema::named(&self.type_name)
            .and_then(|schema| DynamicMessage::decode(schema.descriptor.clone(), &self.bytes[..]).ok());
        message.map_or(serde_json::Value::Null, |message| to_json(&message))
    }
}

/// Forgets what parsing and checking needs to know of Envoy's API, some 10 MB; the next one to need it has it computed
/// anew, which takes some 20 ms. True if there was anything.
pub fn release_descriptors() -> bool {
    schema::release()
}

/// The same, once nobody has needed them for a time. `since`: the time since the last call.
pub fn release_unused_descriptors(since: Duration, kept: Duration) -> bool {
    schema::release_unused(since, kept)
}

/// A message from the wire, and what is wrong with it.
#[derive(Debug)]
pub struct Checked<M> {
    /// The message.
    pub message: M,
    /// Rules of Envoy's API that it breaks.
    pub broken: Vec<Problem>,
    /// Rules that messages inside its `Any`s break.
    pub nested: Vec<Problem>,
    /// Fields that Envoy's API does not have, inside `Any` too.
    pub unknown_fields: Vec<Problem>,
}

/// Decodes an encoded message and checks it against the rules of Envoy's API. `name` stands where the file name would.
///
/// # Errors
/// The bytes are not such a message.
pub fn check_encoded<M: Message + Name + Default>(
    bytes: &[u8],
    name: &Arc<str>,
) -> Result<Checked<M>, ConfigError> {
    let problem = |path: String, reason| Problem { file: Arc::clone(name), at: None, path, reason };
    let malformed = |error: prost::DecodeError| {
        let type_name = M::full_name();
        problem(String::new(), Reason::Invalid(format!("not a valid {type_name}: {error}")))
    };
    let message = M::decode(bytes).map_err(malformed)?;
    if holds::<M>(bytes) {
        return Ok(Checked { message, broken: Vec::new(), nested: Vec::new(), unknown_fields: Vec::new() });
    }
    let dynamic = DynamicMessage::decode(schema_of::<M>()?.descriptor.clone(), bytes).map_err(malformed)?;
    let (mut broken, mut nested, mut unknown_fields) = (Vec::new(), Vec::new(), Vec::new());
    rules::inspect(&dynamic, &FieldPath::ROOT, rules::InsideAny::Check, &mut |path, found| match found {
        rules::Found::Broken { inside_any, reason } => {
            let list = if inside_any { &mut nested } else { &mut broken };
            list.push(problem(path.to_string(), reason));
        }
        rules::Found::UnknownField { number, message } => {
            let reason =
                Reason::UnknownField { field: format!("number {number}"), message, suggestion: None };
            unknown_fields.push(problem(path.to_string(), reason));
        }
    });
    Ok(Checked { message, broken, nested, unknown_fields })
}

/// Whether an encoded message certainly follows every rule of Envoy's API and has no unknown field: [`check_encoded`] would
/// find nothing. Takes a fraction of its time, and no memory.
pub fn holds<M: Name>(bytes: &[u8]) -> bool {
    rules::wire::holds(&M::full_name(), bytes)
}

/// The string in a field of an encoded message, which is not decoded for it.
pub fn string_field(bytes: &[u8], number: u32) -> Option<&str> {
    rules::wire::string_field(bytes, number)
}

/// A message with its descriptors, for [`to_json()`].
pub fn to_dynamic<M: Message + Name>(message: &M) -> Result<DynamicMessage, UnpackError> {
    let name = M::full_name();
    let Some(schema) = MessageSchema::named(&name) else {
        return Err(UnpackError::WrongType {
            expected: name,
            found: "a type without a descriptor".to_owned(),
        });
    };
    let mut dynamic = DynamicMessage::new(schema.descriptor.clone());
    dynamic.transcode_from(message).map_err(|error| UnpackError::Malformed { name, error })?;
    Ok(dynamic)
}

fn schema_of<M: Name>() -> Result<Arc<MessageSchema>, ConfigError> {
    let name = M::full_name();
    MessageSchema::named(&name).ok_or_else(|| {
        let reason = Reason::Invalid(format!("{name} has no descriptor"));
        Problem { file: "tidegate-api".into(), at: None, path: String::new(), reason }.into()
    })
}

/// The tree of a text, and a warning about what is ignored behind it.
fn read(source: &Source) -> Result<(tree::Tree, Option<Problem>), Box<Problem>> {
    let note = |at, reason| Problem { file: source.name.clone(), at, path: String::new(), reason };
    let too_long = || Reason::Limit("the text is longer than 1 GiB".to_owned());
    if source.text.len() > 1 << 30 {
        return Err(note(None, too_long()).into());
    }
    match source.format {
        Format::Yaml => {
            let document = yaml::parse(&source.text).map_err(|(at, reason)| note(at, reason))?;
            let ignored = document.ignored_document.map(|mark| {
                note(Some(mark), Reason::Unsupported("only the first YAML document is read".to_owned()))
            });
            Ok((document.tree, ignored))
        }
        Format::Json => {
            let tree = json::parse(&source.text).map_err(|(at, reason)| note(at, reason))?;
            Ok((tree, None))
        }
    }
}

/// Merges as `MergeFrom` of protobuf does: on the wire, two encodings one after the other are the merged
/// message.
fn merge(merged: &mut DynamicMessage, later: &DynamicMessage, source: &Source, problems: &mut Vec<Problem>) {
    if let Err(error) = merged.merge(&later.encode_to_vec()[..]) {
        let reason = Reason::Limit(error.to_string());
        problems.push(Problem { file: source.name.clone(), at: None, path: String::new(), reason });
    }
}

#[cfg(test)]
mod tests;
