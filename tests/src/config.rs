//! Envoy configurations, piece by piece.

use std::fmt;

use serde_json::{Map, Value, json};

/// The format of `access.log` in the proxy's directory.
const LOG_FORMAT: &str = "flags=%RESPONSE_FLAGS% details=%CONNECTION_TERMINATION_DETAILS% \
    fail=%UPSTREAM_TRANSPORT_FAILURE_REASON% rx=%BYTES_RECEIVED% tx=%BYTES_SENT% up=%UPSTREAM_HOST% \
    clu=%UPSTREAM_CLUSTER% uplocal=%UPSTREAM_LOCAL_ADDRESS% dlocal=%DOWNSTREAM_LOCAL_ADDRESS% \
    dremote=%DOWNSTREAM_REMOTE_ADDRESS% chain=%FILTER_CHAIN_NAME% route=%ROUTE_NAME% \
    attempts=%UPSTREAM_REQUEST_ATTEMPT_COUNT% \
    closed=%DOWNSTREAM_LOCAL_CLOSE_REASON% upclosed=%UPSTREAM_LOCAL_CLOSE_REASON% \
    dnclose=%DOWNSTREAM_DETECTED_CLOSE_TYPE% upclose=%UPSTREAM_DETECTED_CLOSE_TYPE% \n";

/// A static configuration.
#[derive(Clone, Debug, Default)]
pub struct Config {
    listeners: Vec<Value>,
    clusters: Vec<Value>,
}

impl Config {
    /// Without listeners and clusters.
    pub fn new() -> Self {
        Self::default()
    }

    /// A virtual listener (reached by its original destination only) whose connections go to `cluster`.
    #[must_use]
    pub fn service(self, address: &str, cluster: &str) -> Self {
        self.listener(address, json!({"bind_to_port": false}), &tcp_proxy(cluster, json!({})))
    }

    /// A listener with one filter.
    #[must_use]
    pub fn listener(mut self, address: &str, fields: Value, filter: &Value) -> Self {
        self.listeners.push(listener(address, fields, filter));
        self
    }

    /// Istio's catch-all: everything that has no listener of its own goes where it was going.
    #[must_use]
    pub fn pass_through(self) -> Self {
        let mut this = self.catch_all("PassthroughCluster");
        this.clusters.push(json!({
            "name": "PassthroughCluster", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED",
            "connect_timeout": "2s",
        }));
        this
    }

    /// Istio's REGISTRY_ONLY: everything that has no listener of its own is refused.
    #[must_use]
    pub fn registry_only(self) -> Self {
        self.catch_all("BlackHoleCluster").cluster("BlackHoleCluster", &[], json!({}))
    }

    fn catch_all(self, cluster: &str) -> Self {
        let fields =
            json!({"name": "virtualOutbound", "use_original_dst": true, "traffic_direction": "OUTBOUND"});
        self.listener("0.0.0.0:15001", fields, &tcp_proxy(cluster, json!({})))
    }

    /// A STATIC cluster, or another one by `fields`.
    #[must_use]
    pub fn cluster(mut self, name: &str, endpoints: &[&str], fields: Value) -> Self {
        self.clusters.push(cluster(name, endpoints, fields));
        self
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = json!({
            "admin": {"address": socket_address("127.0.0.1:0")},
            "static_resources": {"listeners": self.listeners, "clusters": self.clusters},
        });
        write!(f, "{config:#}")
    }
}

/// A listener with one filter; its name is the address with an underscore. `fields` override.
pub fn listener(address: &str, fields: Value, filter: &Value) -> Value {
    let mut listener = json!({
        "name": address.replace(':', "_"),
        "address": socket_address(address),
        "filter_chains": [{"filters": [filter]}],
    });
    merge(&mut listener, fields);
    listener
}

/// A STATIC cluster, or another one by `fields`.
pub fn cluster(name: &str, endpoints: &[&str], fields: Value) -> Value {
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "2s",
        "load_assignment": load_assignment(name, endpoints),
    });
    merge(&mut cluster, fields);
    cluster
}

/// `ClusterLoadAssignment` of one locality.
pub fn load_assignment(cluster: &str, endpoints: &[&str]) -> Value {
    let endpoints: Vec<Value> =
        endpoints.iter().map(|address| json!({"endpoint": {"address": self::address(address)}})).collect();
    json!({"cluster_name": cluster, "endpoints": [{"lb_endpoints": endpoints}]})
}

/// A tcp_proxy to `cluster` that logs to `access.log`.
pub fn tcp_proxy(cluster: &str, fields: Value) -> Value {
    let mut config = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": cluster,
        "cluster": cluster,
        "access_log": [access_log()],
    });
    merge(&mut config, fields);
    json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": config})
}

/// `access.log`.
pub fn access_log() -> Value {
    json!({
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
            "path": "@DIR@/access.log",
            "log_format": {"text_format_source": {"inline_string": LOG_FORMAT}},
        },
    })
}

/// Virtual hosts: name, domains, cluster.
pub fn virtual_hosts(hosts: &[(&str, &[&str], &str)]) -> Vec<Value> {
    hosts
        .iter()
        .map(|(name, domains, cluster)| {
            json!({
                "name": name,
                "domains": domains,
                "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster}}],
            })
        })
        .collect()
}

/// An http_connection_manager with these [`virtual_hosts`].
pub fn http(hosts: &[(&str, &[&str], &str)]) -> Value {
    let routes = json!({"name": "local", "virtual_hosts": virtual_hosts(hosts)});
    http_connection_manager(json!({"route_config": routes}))
}

/// An http_connection_manager that takes its routes by RDS from `source`.
pub fn http_rds(route_config_name: &str, source: &Value) -> Value {
    http_connection_manager(json!({"rds": {"route_config_name": route_config_name, "config_source": source}}))
}

fn http_connection_manager(fields: Value) -> Value {
    let mut config = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "http",
        "access_log": [access_log()],
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
    });
    merge(&mut config, fields);
    json!({"name": "envoy.filters.network.http_connection_manager", "typed_config": config})
}

/// A [`socket_address`]; or a Unix domain socket, whose path starts with `/`, `.` or `@`.
fn address(address: &str) -> Value {
    if address.starts_with(['/', '.', '@']) {
        json!({"pipe": {"path": address}})
    } else {
        socket_address(address)
    }
}

/// `10.0.0.1:80` or `[fd00::1]:80`.
pub fn socket_address(address: &str) -> Value {
    let (ip, port) = address.rsplit_once(':').unwrap_or((address, "0"));
    let ip = ip.trim_start_matches('[').trim_end_matches(']');
    json!({"socket_address": {"address": ip, "port_value": port.parse::<u16>().unwrap_or_default()}})
}

/// Lays `from` over `into`: mappings key by key, everything else replaced.
pub fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => merge_objects(into, from),
        (into, from) => *into = from,
    }
}

fn merge_objects(into: &mut Map<String, Value>, from: Map<String, Value>) {
    for (key, value) in from {
        merge(into.entry(key).or_insert(Value::Null), value);
    }
}
