//! Requests as they are compared.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde_json::{Map, Value, json};
use tidegate_api::discovery::{DeltaDiscoveryRequest, DiscoveryRequest};
use tidegate_tests::control_plane::{Kind, Request};

/// `<phase>/<kind> <number>` and the fields of that request.
pub(super) type Observation = BTreeMap<String, Value>;

/// What the two say otherwise.
pub(super) struct Difference {
    /// `<phase>/<kind> <number>.<field>`; without a field, only one of them sent the request.
    pub(super) fact: String,
    pub(super) theirs: Value,
    pub(super) ours: Value,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fact, theirs, ours } = self;
        write!(f, "         {fact}\n             Envoy    {theirs}\n             tidegate {ours}")
    }
}

/// Field by field. A request that only one of them sent is one difference.
pub(super) fn differences(theirs: &Observation, ours: &Observation) -> Vec<Difference> {
    let facts: BTreeSet<&String> = theirs.keys().chain(ours.keys()).collect();
    let mut found = Vec::new();
    for fact in facts {
        let (theirs, ours) = (theirs.get(fact), ours.get(fact));
        let (Some(Value::Object(their_fields)), Some(Value::Object(our_fields))) = (theirs, ours) else {
            if theirs != ours {
                let value = |value: Option<&Value>| value.cloned().unwrap_or_default();
                found.push(Difference { fact: fact.clone(), theirs: value(theirs), ours: value(ours) });
            }
            continue;
        };
        let fields: BTreeSet<&String> = their_fields.keys().chain(our_fields.keys()).collect();
        for field in fields {
            let (theirs, ours) = (their_fields.get(field), our_fields.get(field));
            if theirs != ours {
                found.push(Difference {
                    fact: format!("{fact}.{field}"),
                    theirs: theirs.cloned().unwrap_or_default(),
                    ours: ours.cloned().unwrap_or_default(),
                });
            }
        }
    }
    found
}

/// The name of a type as facts have it.
pub(super) fn kind_name(type_url: &str) -> String {
    Kind::of(type_url).map_or_else(|| format!("{type_url:?}"), |kind| format!("{kind:?}"))
}

/// A request without what differs from run to run. Fields that are empty are left out.
pub(super) fn fields(request: &Request) -> Value {
    match request {
        Request::Sotw(request) => sotw(request),
        Request::Delta(request) => delta(request),
    }
}

pub(super) fn sotw(request: &DiscoveryRequest) -> Value {
    let DiscoveryRequest {
        version_info,
        node,
        resource_names,
        resource_locators,
        type_url: _, // part of the fact's name
        response_nonce,
        error_detail,
    } = request;
    compact(&json!({
        "version": version_info,
        "node": node.as_ref().map(|node| &node.id),
        "names": sorted(resource_names),
        "locators": resource_locators.len(),
        "nonce": response_nonce,
        "code": error_detail.as_ref().map(|status| status.code),
        "message": error_detail.as_ref().map(|status| &status.message),
    }))
}

fn delta(request: &DeltaDiscoveryRequest) -> Value {
    let DeltaDiscoveryRequest {
        node,
        type_url: _,
        resource_names_subscribe,
        resource_names_unsubscribe,
        resource_locators_subscribe,
        resource_locators_unsubscribe,
        initial_resource_versions,
        response_nonce,
        error_detail,
    } = request;
    compact(&json!({
        "node": node.as_ref().map(|node| &node.id),
        "subscribe": sorted(resource_names_subscribe),
        "unsubscribe": sorted(resource_names_unsubscribe),
        "locators": resource_locators_subscribe.len() + resource_locators_unsubscribe.len(),
        "initial": initial_resource_versions,
        "nonce": response_nonce,
        "code": error_detail.as_ref().map(|status| status.code),
        "message": error_detail.as_ref().map(|status| &status.message),
    }))
}

fn sorted(names: &[String]) -> Vec<&String> {
    let mut names: Vec<_> = names.iter().collect();
    names.sort();
    names
}

fn compact(value: &Value) -> Value {
    let empty = |value: &Value| match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Number(number) => number.as_u64() == Some(0),
        Value::Bool(_) => false,
    };
    let fields = value.as_object().into_iter().flatten().filter(|(_, value)| !empty(value));
    Value::Object(fields.map(|(name, value)| (name.clone(), value.clone())).collect::<Map<_, _>>())
}
