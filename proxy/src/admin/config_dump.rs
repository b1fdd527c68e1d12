//! `/config_dump`: picks from the whole dump what the parameters ask for.

use regex::Regex;
use serde_json::{Map, Value, json};

/// Repeated fields of the dumps, the message that an element is, and where its name is.
const RESOURCES: [(&str, &str, &str); 14] = [
    ("static_listeners", "ListenersConfigDump.StaticListener", "listener.name"),
    ("dynamic_listeners", "ListenersConfigDump.DynamicListener", "name"),
    ("static_clusters", "ClustersConfigDump.StaticCluster", "cluster.name"),
    ("dynamic_active_clusters", "ClustersConfigDump.DynamicCluster", "cluster.name"),
    ("dynamic_warming_clusters", "ClustersConfigDump.DynamicCluster", "cluster.name"),
    ("static_route_configs", "RoutesConfigDump.StaticRouteConfig", "route_config.name"),
    ("dynamic_route_configs", "RoutesConfigDump.DynamicRouteConfig", "route_config.name"),
    ("inline_scoped_route_configs", "ScopedRoutesConfigDump.InlineScopedRouteConfigs", "name"),
    ("dynamic_scoped_route_configs", "ScopedRoutesConfigDump.DynamicScopedRouteConfigs", "name"),
    ("static_endpoint_configs", "EndpointsConfigDump.StaticEndpointConfig", "endpoint_config.cluster_name"),
    ("dynamic_endpoint_configs", "EndpointsConfigDump.DynamicEndpointConfig", "endpoint_config.cluster_name"),
    ("static_secrets", "SecretsConfigDump.StaticSecret", "name"),
    ("dynamic_active_secrets", "SecretsConfigDump.DynamicSecret", "name"),
    ("dynamic_warming_secrets", "SecretsConfigDump.DynamicSecret", "name"),
];

/// The parameters.
#[derive(Debug, Default)]
pub(super) struct Selection<'a> {
    pub(super) resource: Option<&'a str>,
    pub(super) mask: Option<&'a str>,
    pub(super) name_regex: Option<Regex>,
}

/// What can't be selected.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum SelectionError {
    /// 404.
    NotFound(String),
    /// 400.
    Invalid(String),
}

/// The part of `{"configs": […]}` that is asked for.
pub(super) fn select(dump: Value, selection: &Selection<'_>) -> Result<Value, SelectionError> {
    let configs = match dump {
        Value::Object(mut dump) => match dump.remove("configs") {
            Some(Value::Array(configs)) => configs,
            _ => Vec::new(),
        },
        _ => Vec::new(),
    };
    let configs = match selection.resource {
        Some(resource) => elements(configs, resource, selection)?,
        None => whole(configs, selection),
    };
    Ok(if configs.is_empty() { json!({}) } else { json!({ "configs": configs }) })
}

/// The elements of one repeated field.
fn elements(
    configs: Vec<Value>,
    resource: &str,
    selection: &Selection<'_>,
) -> Result<Vec<Value>, SelectionError> {
    let Some((_, message, name)) = RESOURCES.iter().find(|(field, _, _)| *field == resource) else {
        if configs.iter().any(|config| config.get(resource).is_some()) {
            return Err(SelectionError::Invalid(format!(
                "{resource} is not a repeated field. Use ?mask={resource} to get only this field"
            )));
        }
        return Err(SelectionError::NotFound(format!("{resource} not found in config dump")));
    };
    let mut found = Vec::new();
    for mut config in configs {
        let Some(Value::Array(list)) = config.get_mut(resource).map(Value::take) else { continue };
        found.extend(list.into_iter().filter(|element| named(element, name, selection)).map(|element| {
            let mut typed = Map::new();
            typed.insert("@type".into(), format!("type.googleapis.com/envoy.admin.v3.{message}").into());
            if let Value::Object(fields) = masked(element, selection.mask) {
                typed.extend(fields);
            }
            Value::from(typed)
        }));
    }
    Ok(found)
}

/// All dumps, each cut to the mask; those of which nothing is left are left out.
fn whole(configs: Vec<Value>, selection: &Selection<'_>) -> Vec<Value> {
    configs
        .into_iter()
        .filter_map(|config| {
            let mut config = masked(config, selection.mask);
            if selection.name_regex.is_some() {
                for (field, _, name) in RESOURCES {
                    if let Some(Value::Array(list)) = config.get_mut(field) {
                        list.retain(|element| named(element, name, selection));
                    }
                }
            }
            let fields =
                config.as_object().map_or(0, |fields| fields.keys().filter(|key| *key != "@type").count());
            (selection.mask.is_none() || fields > 0).then_some(config)
        })
        .collect()
}

fn named(element: &Value, path: &str, selection: &Selection<'_>) -> bool {
    let Some(regex) = &selection.name_regex else { return true };
    let name = path.split('.').try_fold(element, |value, field| value.get(field)).and_then(Value::as_str);
    name.is_some_and(|name| regex.is_match(name))
}

/// Applies a FieldMask: paths with dots, separated by commas. `@type` always stays.
fn masked(value: Value, mask: Option<&str>) -> Value {
    match mask {
        None => value,
        Some(mask) => cut(value, &mask.split(',').map(|path| path.split('.').collect()).collect::<Vec<_>>()),
    }
}

fn cut(value: Value, paths: &[Vec<&str>]) -> Value {
    let Value::Object(fields) = value else { return value };
    let keep = |(name, value): (String, Value)| {
        if name == "@type" {
            return Some((name, value));
        }
        let below: Vec<Vec<&str>> = paths
            .iter()
            .filter(|path| path.first() == Some(&name.as_str()))
            .map(|path| path[1..].to_vec())
            .collect();
        match below.iter().any(Vec::is_empty) {
            true => Some((name, value)),
            false if below.is_empty() => None,
            false => Some((name, cut(value, &below))),
        }
    };
    Value::Object(fields.into_iter().filter_map(keep).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump() -> Value {
        let cluster = |name: &str| json!({"cluster": {"@type": "C", "name": name, "type": "STATIC"}, "last_updated": "t"});
        json!({"configs": [
            {"@type": "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump", "bootstrap": {"admin": {}, "node": {"id": "n"}}},
            {"@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump", "static_clusters": [cluster("foo"), cluster("bar")]},
        ]})
    }

    fn run(resource: Option<&str>, mask: Option<&str>, regex: Option<&str>) -> Result<Value, SelectionError> {
        let name_regex = regex.map(|regex| Regex::new(regex).unwrap());
        select(dump(), &Selection { resource, mask, name_regex })
    }

    /// As Envoy 1.40 answers.
    #[test]
    fn resources_and_masks() {
        assert_eq!(run(None, None, None).unwrap(), dump());
        assert_eq!(
            run(Some("static_clusters"), Some("cluster.name"), None).unwrap()["configs"][0],
            json!({
                "@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump.StaticCluster",
                "cluster": {"@type": "C", "name": "foo"},
            })
        );
        assert_eq!(
            run(None, Some("static_clusters"), None).unwrap(),
            json!({ "configs": [dump()["configs"][1].clone()] })
        );
        assert_eq!(
            run(None, Some("bootstrap.node.id,static_clusters"), None).unwrap()["configs"][0]["bootstrap"],
            json!({"node": {"id": "n"}})
        );
        assert_eq!(run(Some("dynamic_listeners"), None, None).unwrap(), json!({}));
    }

    #[test]
    fn wrong_resources() {
        assert_eq!(
            run(Some("nosuch"), None, None),
            Err(SelectionError::NotFound("nosuch not found in config dump".into()))
        );
        assert_eq!(
            run(Some("bootstrap"), Some("bootstrap.admin"), None),
            Err(SelectionError::Invalid(
                "bootstrap is not a repeated field. Use ?mask=bootstrap to get only this field".into()
            ))
        );
    }

    #[test]
    fn names() {
        let found = run(Some("static_clusters"), None, Some("^b")).unwrap();
        assert_eq!(found["configs"].as_array().unwrap().len(), 1);
        assert_eq!(found["configs"][0]["cluster"]["name"], "bar");
        let found = run(None, None, Some("^b")).unwrap();
        assert_eq!(found["configs"][1]["static_clusters"].as_array().unwrap().len(), 1);
        assert!(found["configs"][0]["bootstrap"].is_object());
    }
}
