//! A `DiscoveryResponse` from text, resource by resource: what is wrong with one of them says nothing about the others.

use std::sync::Arc;

use prost::Name;
use tidegate_api::discovery::DiscoveryResponse;
use tidegate_api::wkt::Any;

use super::path::FieldPath;
use super::schema::MessageSchema;
use super::tree::{NodeId, Tree, Value};
use super::walk::{self, Walker};
use super::{Options, Source, SourceMap, read, schema_of};
use crate::config::error::{ConfigError, Problem, Reason};

/// A response that was read from text.
#[derive(Debug)]
pub struct ResponseText {
    /// Everything but its resources.
    pub response: DiscoveryResponse,
    /// Its resources, in their order.
    pub resources: Vec<ResourceText>,
    /// About the response itself.
    pub warnings: Vec<Problem>,
}

/// A member of `resources`.
#[derive(Debug)]
pub struct ResourceText {
    /// Its name, as far as one is to be found: also of a resource that can't be read.
    pub name: Option<Arc<str>>,
    /// Its `@type`.
    pub type_url: String,
    /// The message, or everything that is wrong with it.
    pub body: Result<Any, ConfigError>,
    /// What was accepted, but probably not meant.
    pub warnings: Vec<Problem>,
}

/// Reads a `DiscoveryResponse`. An error means that there is no response at all.
pub fn parse_discovery_response(source: &Source, options: &Options) -> Result<ResponseText, ConfigError> {
    let schema = schema_of::<DiscoveryResponse>()?;
    let any = schema_of::<Any>()?;
    let (tree, ignored) = read(source).map_err(|problem| *problem)?;
    let map = SourceMap::new(source.name.clone(), tree);
    let mut walker = Walker::new(&map, options);
    let (message, ids) = walker.root_without(&schema, "resources");
    let found = walker.finish();
    if let Some(error) = ConfigError::from_problems(found.problems) {
        return Err(error);
    }
    let response = message.transcode_to().map_err(|error| {
        ConfigError::from(map.problem(&FieldPath::ROOT, Reason::Limit(error.to_string())))
    })?;
    let resources = ids
        .into_iter()
        .enumerate()
        .map(|(index, id)| resource(&map, id, &any, options, &format!("resources[{index}]")))
        .collect();
    let warnings = found.warnings.into_iter().chain(ignored).collect();
    Ok(ResponseText { response, resources, warnings })
}

fn resource(
    map: &SourceMap,
    id: NodeId,
    any: &Arc<MessageSchema>,
    options: &Options,
    path: &str,
) -> ResourceText {
    let path = FieldPath::at(path);
    let mut walker = Walker::new(map, options);
    let message = walker.message_at(id, any, &path);
    let found = walker.finish();
    let mut problems = found.problems;
    let broken = found.broken.into_iter();
    let broken = broken.map(|(path, reason)| map.problem(&FieldPath::at(&path), reason)).collect();
    walk::add_unexplained(&mut problems, broken);
    if message.is_none() && problems.is_empty() {
        problems.push(map.problem(&path, Reason::Missing(Any::full_name())));
    }
    let body = match (ConfigError::from_problems(problems), message) {
        (None, Some(message)) => message
            .transcode_to()
            .map_err(|error| ConfigError::from(map.problem(&path, Reason::Limit(error.to_string())))),
        (None, None) => Ok(Any::default()),
        (Some(error), _) => Err(error),
    };
    let tree = map.first().map(|(_, tree)| tree);
    ResourceText {
        name: tree.and_then(|tree| name(tree, id)).map(Into::into),
        type_url: tree.and_then(|tree| text(tree, id, "@type")).unwrap_or_default().to_owned(),
        body,
        warnings: found.warnings,
    }
}

/// The name that a resource says it has: of a wrapper (`envoy.service.discovery.v3.Resource`) or of the message.
fn name(tree: &Tree, id: NodeId) -> Option<&str> {
    ["name", "cluster_name", "clusterName"]
        .into_iter()
        .find_map(|key| text(tree, id, key))
        .or_else(|| name(tree, member(tree, id, "resource")?))
}

fn text<'t>(tree: &'t Tree, id: NodeId, key: &str) -> Option<&'t str> {
    match &tree.node(member(tree, id, key)?).value {
        Value::String(text) => Some(text),
        _ => None,
    }
}

fn member(tree: &Tree, id: NodeId, key: &str) -> Option<NodeId> {
    let Value::Map(entries) = &tree.node(id).value else { return None };
    entries.iter().rev().find(|entry| &*entry.key == key).map(|entry| entry.value)
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use tidegate_api::cluster::Cluster;

    use super::super::{UnknownFields, UnknownTypes};
    use super::*;

    const LENIENT: Options =
        Options { unknown_fields: UnknownFields::Warn, unknown_types: UnknownTypes::Refuse };

    fn read(text: &str) -> Result<ResponseText, ConfigError> {
        parse_discovery_response(&Source::yaml("cds.yaml", text), &LENIENT)
    }

    #[test]
    fn each_resource_stands_alone() {
        let text = "
version_info: '7'
type_url: type.googleapis.com/envoy.config.cluster.v3.Cluster
from_the_future: 1
resources:
- {'@type': type.googleapis.com/envoy.config.cluster.v3.Cluster, name: a, type: STATIC, new: true}
- '@type': type.googleapis.com/envoy.config.cluster.v3.Cluster
  name: b
  type: STATICC
- {'@type': type.googleapis.com/x.Nope, name: c}
- 5
- {'@type': type.googleapis.com/envoy.config.cluster.v3.Cluster, name: d, connect_timeout: 0s}
- '@type': type.googleapis.com/envoy.service.discovery.v3.Resource
  ttl: 3s
  resource: {'@type': type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment, clusterName: e}
";
        let read = read(text).unwrap();
        assert_eq!((read.response.version_info.as_str(), read.warnings.len()), ("7", 1));
        let names: Vec<_> = read.resources.iter().map(|resource| resource.name.as_deref()).collect();
        assert_eq!(names, [Some("a"), Some("b"), Some("c"), None, Some("d"), Some("e")]);
        let a = &read.resources[0];
        assert_eq!(Cluster::decode(&a.body.as_ref().unwrap().value[..]).unwrap().name, "a");
        assert_eq!(a.warnings.len(), 1);
        let error = |index: usize| read.resources[index].body.as_ref().unwrap_err().to_string();
        assert!(error(1).starts_with("cds.yaml:9: resources[1].type: \"STATICC\" is not"), "{}", error(1));
        assert!(
            error(2).contains("resources[2]: unknown type \"type.googleapis.com/x.Nope\""),
            "{}",
            error(2)
        );
        assert!(error(3).starts_with("cds.yaml:11: resources[3]: "), "{}", error(3));
        assert!(error(4).starts_with("cds.yaml:12: resources[4].connect_timeout: "), "{}", error(4));
        assert!(read.resources[5].body.is_ok());
    }

    #[test]
    fn what_is_no_response_is_an_error() {
        for (text, expected) in [
            ("[", "cds.yaml:1: "),
            ("", "the text is empty"),
            ("- 1", "expected a mapping"),
            ("resources: 5\nversion_info: {}", "version_info"),
            ("version_info: 7", "version_info: expected a string, found the number 7"),
        ] {
            let error = read(text).map(|read| read.response).unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
        assert!(read("{}").unwrap().resources.is_empty());
        assert!(read("resources: null").unwrap().resources.is_empty());
    }
}
