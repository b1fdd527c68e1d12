//! Small pieces of configuration, as JSON, to be put together and broken by the tests.
#![allow(clippy::needless_pass_by_value)] // the callers build what they pass in place

use serde_json::{Value, json};
use tidegate::config::error::{ConfigError, Problem};
use tidegate::config::proto::{Format, Source};
use tidegate::config::{Loaded, Sources, load, static_options};

/// Loads a bootstrap.
pub(crate) fn load_json(bootstrap: &Value) -> Result<Loaded, ConfigError> {
    let text = serde_json::to_string_pretty(bootstrap).unwrap();
    let source = Source { name: "test.json".into(), text, format: Format::Json };
    load(&Sources { config_path: Some(source), config_yaml: None }, &static_options())
}

/// What is wrong with it, as `path: message`. Each problem has a line.
pub(crate) fn problems(bootstrap: &Value) -> Vec<String> {
    match load_json(bootstrap) {
        Ok(_) => panic!("accepted: {bootstrap:#}"),
        Err(error) => error.problems().iter().map(line_of).collect(),
    }
}

/// What is accepted with a warning, as `path: message`.
pub(crate) fn warnings(bootstrap: &Value) -> Vec<String> {
    load_json(bootstrap).unwrap_or_else(|error| panic!("{error}")).warnings.iter().map(line_of).collect()
}

fn line_of(problem: &Problem) -> String {
    assert!(problem.at.is_some(), "no line: {problem}");
    format!("{}: {}", problem.path, problem.reason)
}

/// `base` with these fields set, or removed where they are null.
pub(crate) fn with(mut base: Value, fields: Value) -> Value {
    for (key, value) in fields.as_object().unwrap() {
        if value.is_null() {
            base.as_object_mut().unwrap().shift_remove(key);
        } else {
            base[key] = value.clone();
        }
    }
    base
}

/// An extension with the type URL that belongs to a full message name.
pub(crate) fn extension(name: &str, message: &str, fields: Value) -> Value {
    let config = with(json!({"@type": format!("type.googleapis.com/{message}")}), fields);
    json!({"name": name, "typed_config": config})
}

/// An extension in a TypedStruct.
pub(crate) fn in_struct(name: &str, type_url: &str, value: Value) -> Value {
    extension(name, "xds.type.v3.TypedStruct", json!({"type_url": type_url, "value": value}))
}

pub(crate) fn bootstrap(listeners: Vec<Value>, clusters: Vec<Value>) -> Value {
    json!({"static_resources": {"listeners": listeners, "clusters": clusters}})
}

/// A bootstrap with one listener of one chain of these filters.
pub(crate) fn filters(filters: Vec<Value>) -> Value {
    bootstrap(
        vec![with(listener("l", 10000), json!({"filter_chains": [{"filters": filters}]}))],
        vec![cluster("c")],
    )
}

/// A bootstrap with one listener that has these fields set.
pub(crate) fn one_listener(fields: Value) -> Value {
    bootstrap(vec![with(listener("l", 10000), fields)], vec![cluster("c")])
}

/// A bootstrap with one cluster that has these fields set.
pub(crate) fn one_cluster(fields: Value) -> Value {
    bootstrap(vec![], vec![with(cluster("c"), fields)])
}

pub(crate) fn listener(name: &str, port: u16) -> Value {
    json!({
        "name": name,
        "address": address("127.0.0.1", port),
        "filter_chains": [{"filters": [tcp_proxy(json!({}))]}],
    })
}

pub(crate) fn address(host: &str, port: u16) -> Value {
    json!({"socket_address": {"address": host, "port_value": port}})
}

pub(crate) fn tcp_proxy(fields: Value) -> Value {
    let base = extension(
        "envoy.filters.network.tcp_proxy",
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        json!({"stat_prefix": "p", "cluster": "c"}),
    );
    let config = with(base["typed_config"].clone(), fields);
    with(base, json!({"typed_config": config}))
}

/// An HTTP connection manager with these virtual hosts.
pub(crate) fn http(virtual_hosts: Vec<Value>) -> Value {
    extension(
        "envoy.filters.network.http_connection_manager",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        json!({
            "stat_prefix": "h",
            "http_filters": [router()],
            "route_config": {"name": "r", "virtual_hosts": virtual_hosts},
        }),
    )
}

pub(crate) fn router() -> Value {
    extension("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router", json!({}))
}

pub(crate) fn virtual_host(name: &str, domains: &[&str], routes: Vec<Value>) -> Value {
    json!({"name": name, "domains": domains, "routes": routes})
}

/// The route of every request, to this cluster.
pub(crate) fn route(cluster: &str) -> Value {
    json!({"match": {"prefix": "/"}, "route": {"cluster": cluster}})
}

pub(crate) fn cluster(name: &str) -> Value {
    json!({"name": name, "load_assignment": assignment(vec![endpoint("127.0.0.1")])})
}

pub(crate) fn assignment(endpoints: Vec<Value>) -> Value {
    json!({"cluster_name": "c", "endpoints": [{"lb_endpoints": endpoints}]})
}

pub(crate) fn endpoint(host: &str) -> Value {
    json!({"endpoint": {"address": address(host, 80)}})
}

/// A file access log with these fields of the logger and of its configuration.
pub(crate) fn access_log(fields: Value, config: Value) -> Value {
    let config = with(json!({"path": "/dev/null"}), config);
    with(
        extension(
            "envoy.access_loggers.file",
            "envoy.extensions.access_loggers.file.v3.FileAccessLog",
            config,
        ),
        fields,
    )
}

/// Exactly this problem, and no other.
#[track_caller]
pub(crate) fn refused(bootstrap: &Value, path: &str, message: &str) {
    assert_eq!(problems(bootstrap), [format!("{path}: {message}")], "{bootstrap:#}");
}

/// Accepted, with these warnings.
#[track_caller]
pub(crate) fn warned(bootstrap: &Value, expected: &[&str]) {
    assert_eq!(warnings(bootstrap), expected, "{bootstrap:#}");
}
