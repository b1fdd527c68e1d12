//! Responses that come as text (REST, files) or as one message (binary files): taken apart, each resource checked for
//! its type and its name, and no further.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tidegate_api::discovery::DiscoveryResponse;
use tidegate_api::wkt::Any;

use super::protocol::{Problems, WRAPPER, name_of, ttl, unwrap};
use crate::config::error::{Problem, Reason};
use crate::config::proto::{
    Options, ResourceText, Source, UnknownFields, parse_discovery_response, type_name,
};
use crate::xds::{Kind, Resource, Unreadable};

/// What a response holds.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// `version_info`
    pub(super) version: String,
    /// `control_plane.identifier`
    pub(super) identifier: Option<String>,
    pub(super) resources: Vec<Resource>,
    pub(super) unreadable: Vec<Unreadable>,
    /// Of which there was only a heartbeat.
    pub(super) unchanged: Vec<Arc<str>>,
    /// Times to live, of resources that have one or had their name in a wrapper.
    pub(super) ttls: Vec<(Arc<str>, Option<Duration>)>,
}

/// Why nothing of a response is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It is no response.
    Unreadable(String),
    /// It is a response, but not one to what was asked for.
    Rejected { version: String, reason: String },
}

/// Reads a text. Unknown fields are dropped and told, as in all dynamic configuration.
pub(super) fn from_text(source: &Source, kind: Kind) -> Result<Content, Refusal> {
    let options = Options { unknown_fields: UnknownFields::Warn, ..crate::config::static_options() };
    let read =
        parse_discovery_response(source, &options).map_err(|error| Refusal::Unreadable(error.to_string()))?;
    let mut reader = Reader::new(&read.response, kind)?;
    for (index, resource) in read.resources.into_iter().enumerate() {
        reader.text(index, resource);
    }
    reader.finish(unknown_fields(&read.warnings))
}

/// Reads an encoded message. `name` stands for it in errors.
pub(super) fn from_binary(name: &str, bytes: &[u8], kind: Kind) -> Result<Content, Refusal> {
    let response = DiscoveryResponse::decode(bytes)
        .map_err(|error| Refusal::Unreadable(format!("{name}: not a DiscoveryResponse: {error}")))?;
    let mut reader = Reader::new(&response, kind)?;
    for (index, body) in response.resources.into_iter().enumerate() {
        reader.body(index, body, Vec::new());
    }
    reader.finish(Vec::new())
}

struct Reader {
    kind: Kind,
    content: Content,
    seen: HashSet<Arc<str>>,
    /// What makes the whole response worthless.
    refused: Problems,
}

impl Reader {
    fn new(response: &DiscoveryResponse, kind: Kind) -> Result<Self, Refusal> {
        let version = response.version_info.clone();
        if !response.type_url.is_empty() && response.type_url != kind.type_url() {
            let reason =
                format!("the type of the response is {:?}, not {:?}", response.type_url, kind.type_url());
            return Err(Refusal::Rejected { version, reason });
        }
        let identifier = response
            .control_plane
            .as_ref()
            .map(|server| server.identifier.clone())
            .filter(|id| !id.is_empty());
        let content = Content { version, identifier, ..Content::default() };
        Ok(Self { kind, content, seen: HashSet::new(), refused: Problems::default() })
    }

    fn text(&mut self, index: usize, resource: ResourceText) {
        let ResourceText { name, type_url, body, warnings } = resource;
        match body {
            Ok(body) => self.body(index, body, unknown_fields(&warnings)),
            // What is meant for somebody else is not less so because it is broken, too.
            Err(_) if is_another_type(&type_url, self.kind) => self.other_type(index, &type_url),
            Err(error) => {
                if let Some(name) = &name {
                    self.note(name);
                }
                self.content.unreadable.push(Unreadable { name, error: error.to_string() });
            }
        }
    }

    fn body(&mut self, index: usize, body: Any, unknown_fields: Vec<String>) {
        if body.type_url == WRAPPER {
            self.wrapper(index, &body, unknown_fields);
            return;
        }
        match name_of(&body, self.kind) {
            Ok(name) => {
                self.note(&name);
                self.content.resources.push(Resource {
                    name: None,
                    version: String::new(),
                    body,
                    unknown_fields,
                });
            }
            Err(_) if is_another_type(&body.type_url, self.kind) => self.other_type(index, &body.type_url),
            Err(fault) => self.refused.add(format_args!("resources[{index}]: {fault}")),
        }
    }

    fn wrapper(&mut self, index: usize, any: &Any, unknown_fields: Vec<String>) {
        let wrapper = match unwrap(any) {
            Ok(wrapper) => wrapper,
            Err(fault) => {
                self.refused.add(format_args!("resources[{index}]: {fault}"));
                return;
            }
        };
        let lifetime = ttl(wrapper.ttl);
        let Some(body) = wrapper.resource else {
            let name: Arc<str> = wrapper.name.into();
            self.note(&name);
            self.content.ttls.push((Arc::clone(&name), lifetime));
            self.content.unchanged.push(name);
            return;
        };
        match name_of(&body, self.kind) {
            Ok(own) => {
                let name: Arc<str> = if wrapper.name.is_empty() { own } else { wrapper.name.into() };
                self.note(&name);
                self.content.ttls.push((Arc::clone(&name), lifetime));
                self.content.resources.push(Resource {
                    name: Some(name),
                    version: wrapper.version,
                    body,
                    unknown_fields,
                });
            }
            Err(fault) => self.refused.add(format_args!("resources[{index}]: {fault}")),
        }
    }

    fn other_type(&mut self, index: usize, type_url: &str) {
        let expected = self.kind.type_url();
        self.refused.add(format_args!("resources[{index}]: @type is {type_url:?}, not {expected:?}"));
    }

    fn note(&mut self, name: &Arc<str>) {
        if !self.seen.insert(Arc::clone(name)) {
            self.refused.add(format_args!("{name:?} comes twice"));
        }
    }

    fn finish(mut self, unknown_fields: Vec<String>) -> Result<Content, Refusal> {
        if let Some(reason) = self.refused.into_text() {
            return Err(Refusal::Rejected { version: self.content.version, reason });
        }
        // Those of the response itself have no resource to go with; any will do.
        if let Some(first) = self.content.resources.first_mut() {
            first.unknown_fields.extend(unknown_fields);
        }
        Ok(self.content)
    }
}

/// Whether a type is one that is known and not wanted here. A type that nobody knows may be a resource that a newer
/// proxy understands: it is refused alone.
fn is_another_type(type_url: &str, kind: Kind) -> bool {
    type_url != kind.type_url()
        && type_url != WRAPPER
        && tidegate_api::descriptors().get_message_by_name(type_name(type_url)).is_some()
}

fn unknown_fields(warnings: &[Problem]) -> Vec<String> {
    let unknown = warnings
        .iter()
        .filter(|warning| matches!(warning.reason, Reason::UnknownField { .. } | Reason::UnknownType { .. }));
    unknown.map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use tidegate_api::cluster::Cluster;

    use super::*;

    fn read(kind: Kind, json: &Value) -> Result<Content, Refusal> {
        let source =
            Source { format: crate::config::proto::Format::Json, ..Source::yaml("url", json.to_string()) };
        from_text(&source, kind)
    }

    fn cluster(name: &str) -> Value {
        json!({"@type": Kind::Cluster.type_url(), "name": name, "type": "STATIC", "connect_timeout": "1s"})
    }

    fn names(content: &Content) -> Vec<String> {
        let name = |resource: &Resource| Cluster::decode(&resource.body.value[..]).unwrap().name;
        content.resources.iter().map(name).collect()
    }

    #[test]
    fn p29_one_bad_resource_is_refused_alone() {
        let mut bad = cluster("bad");
        bad["type"] = json!("STATICC");
        let unknown = json!({"@type": "type.googleapis.com/x.Future", "name": "future"});
        let response = json!({
            "version_info": "1", "control_plane": {"identifier": "cp"},
            "resources": [cluster("a"), bad, unknown, cluster("b")],
        });
        let content = read(Kind::Cluster, &response).unwrap();
        assert_eq!((content.version.as_str(), content.identifier.as_deref()), ("1", Some("cp")));
        assert_eq!(names(&content), ["a", "b"]);
        let [bad, future] = &content.unreadable[..] else { panic!("{:?}", content.unreadable) };
        assert_eq!(bad.name.as_deref(), Some("bad"));
        assert!(bad.error.starts_with("url:1: resources[1].type: "), "{}", bad.error);
        assert_eq!(future.name.as_deref(), Some("future"));
        assert!(future.error.contains("unknown type"), "{}", future.error);
    }

    #[test]
    fn p33_unknown_fields_are_told() {
        let mut new = cluster("a");
        new["from_the_future"] = json!({"x": 1});
        let content = read(Kind::Cluster, &json!({"resources": [new], "also_new": 1})).unwrap();
        let [resource] = &content.resources[..] else { panic!("{content:?}") };
        let [first, second] = &resource.unknown_fields[..] else { panic!("{resource:?}") };
        assert!(first.contains("resources[0]: unknown field \"from_the_future\""), "{first}");
        assert!(second.contains("also_new"), "{second}");
    }

    #[test]
    fn p8_p10_other_types_and_double_names_refuse_the_response() {
        let listener = json!({"@type": Kind::Listener.type_url(), "name": "l"});
        for (response, expected) in [
            (json!({"resources": [cluster("a"), listener]}), "resources[1]: @type is"),
            (json!({"type_url": Kind::Listener.type_url(), "resources": []}), "the type of the response is"),
            (json!({"resources": [cluster("a"), cluster("a")]}), "\"a\" comes twice"),
        ] {
            let refusal = read(Kind::Cluster, &response).unwrap_err();
            let Refusal::Rejected { reason, .. } = &refusal else { panic!("{refusal:?}") };
            assert!(reason.contains(expected), "{reason}");
        }
        let refusal = read(Kind::Cluster, &json!([1])).unwrap_err();
        assert!(matches!(refusal, Refusal::Unreadable(_)), "{refusal:?}");
    }

    #[test]
    fn p50_wrappers_carry_times_to_live_and_heartbeats() {
        let wrapper = |fields: Value| {
            let mut wrapper = json!({"@type": WRAPPER, "version": "3", "ttl": "5s"});
            wrapper.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            wrapper
        };
        let response = json!({"resources": [
            wrapper(json!({"resource": cluster("a")})),
            wrapper(json!({"name": "beat"})),
        ]});
        let content = read(Kind::Cluster, &response).unwrap();
        let [resource] = &content.resources[..] else { panic!("{content:?}") };
        assert_eq!((resource.name.as_deref(), resource.version.as_str()), (Some("a"), "3"));
        assert_eq!(content.unchanged, ["beat".into()]);
        let five = Some(Duration::from_secs(5));
        assert_eq!(content.ttls, [("a".into(), five), ("beat".into(), five)]);
        let other =
            json!({"resources": [wrapper(json!({"resource": {"@type": Kind::Listener.type_url()}}))]});
        assert!(matches!(read(Kind::Cluster, &other), Err(Refusal::Rejected { .. })));
    }

    #[test]
    fn binary_responses_get_the_same_checks() {
        let body = Any {
            type_url: Kind::Cluster.type_url().into(),
            value: Cluster { name: "a".into(), ..Default::default() }.encode_to_vec(),
        };
        let response = DiscoveryResponse {
            version_info: "1".into(),
            resources: vec![body.clone()],
            ..Default::default()
        };
        let content = from_binary("cds.pb", &response.encode_to_vec(), Kind::Cluster).unwrap();
        assert_eq!(names(&content), ["a"]);
        let twice = DiscoveryResponse { resources: vec![body.clone(), body], ..Default::default() };
        let refusal = from_binary("cds.pb", &twice.encode_to_vec(), Kind::Cluster).unwrap_err();
        assert!(matches!(refusal, Refusal::Rejected { .. }));
        let refusal = from_binary("cds.pb", &[0xff; 9], Kind::Cluster).unwrap_err();
        assert!(matches!(&refusal, Refusal::Unreadable(text) if text.starts_with("cds.pb: ")), "{refusal:?}");
    }

    /// A value of any shape, with the keys and words of the API among its own.
    fn any_json() -> impl Strategy<Value = Value> {
        let word = prop_oneof![
            Just("STATIC".to_owned()),
            Just("1s".to_owned()),
            Just(Kind::Cluster.type_url().to_owned()),
            Just(WRAPPER.to_owned()),
            ".{0,12}",
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            word.prop_map(Value::from),
        ];
        let key = prop_oneof![
            Just("@type".to_owned()),
            Just("name".to_owned()),
            Just("resource".to_owned()),
            Just("ttl".to_owned()),
            Just("load_assignment".to_owned()),
            Just("typedExtensionProtocolOptions".to_owned()),
            "[a-z_]{1,8}",
        ];
        leaf.prop_recursive(5, 40, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::vec((key.clone(), inner), 0..5)
                    .prop_map(|entries| Value::Object(entries.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// Whatever stands between them, good resources come out.
        #[test]
        fn a_bad_resource_never_loses_its_siblings(bad in any_json()) {
            let response = json!({"version_info": "1", "resources": [cluster("first"), bad, cluster("last")]});
            match read(Kind::Cluster, &response) {
                Ok(content) => {
                    let names = names(&content);
                    prop_assert_eq!(names.first().map(String::as_str), Some("first"));
                    prop_assert_eq!(names.last().map(String::as_str), Some("last"));
                    let there = content.resources.len() + content.unreadable.len() + content.unchanged.len();
                    prop_assert_eq!(there, 3);
                }
                // Only what names another type, or a name twice, may take the others with it.
                Err(Refusal::Rejected { reason, .. }) => {
                    prop_assert!(reason.contains("resources[1]") || reason.contains("comes twice"), "{}", reason);
                }
                Err(refusal) => prop_assert!(false, "{:?}", refusal),
            }
        }

        #[test]
        fn no_text_panics(
            cuts in prop::collection::vec((any::<prop::sample::Index>(), ".{0,3}"), 0..6),
            kind in prop::sample::select(&Kind::ALL[..]),
        ) {
            let mut text = json!({
                "version_info": "1", "type_url": kind.type_url(),
                "resources": [cluster("a"), {"@type": WRAPPER, "ttl": "1s", "resource": cluster("b")}],
            })
            .to_string();
            for (at, insert) in cuts {
                let at = text.floor_char_boundary(at.index(text.len() + 1));
                let end = text.floor_char_boundary((at + insert.len() / 2).min(text.len()));
                text.replace_range(at..end.max(at), &insert);
            }
            for format in [crate::config::proto::Format::Json, crate::config::proto::Format::Yaml] {
                let _ = from_text(&Source { name: "x".into(), text: text.clone(), format }, kind);
            }
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = from_binary("x", &bytes, Kind::Cluster);
        }
    }
}
