//! A case: a piece of configuration, upstreams, and what clients do. Both proxies get exactly the same.

use std::time::Duration;

use serde_json::{Map, Value, json};
use tidegate_tests::script::Step;
use tidegate_tests::workload::Connect;

/// Connections with this mark are redirected to the capture listener, as iptables does for a sidecar.
pub(super) const REDIRECTED: u32 = 77;

/// Where SYNs are dropped.
pub(super) const DROPPED: &str = "10.9.9.9";

/// A pass-through destination: an address that is local, and that the redirect rule covers.
pub(super) const OUTSIDE: &str = "10.9.0.9";

/// One endpoint of a case's cluster.
pub(super) enum Endpoint {
    /// A server that runs these steps on every connection.
    Serves(Vec<Step>),
    /// A port that nobody listens on.
    Refuses,
    /// An address that never answers.
    Drops,
}

/// One client connection, or two of which the second happens while the first is open.
pub(super) struct Client {
    pub(super) from: Option<String>,
    pub(super) to: Option<String>,
    pub(super) redirected: bool,
    /// Waits so long before it connects.
    pub(super) wait: Duration,
    pub(super) steps: Vec<Step>,
    /// Runs to its end after `steps` and before `then`.
    pub(super) meanwhile: Option<Box<Client>>,
    pub(super) then: Vec<Step>,
}

impl Client {
    /// A client of the case's own listener.
    pub(super) fn new(steps: impl Into<Vec<Step>>) -> Self {
        let steps = steps.into();
        let wait = Duration::ZERO;
        Self { from: None, to: None, redirected: false, wait, steps, meanwhile: None, then: Vec::new() }
    }

    /// Waits before it connects.
    pub(super) fn after_ms(mut self, milliseconds: u64) -> Self {
        self.wait = Duration::from_millis(milliseconds);
        self
    }

    /// Connects from this address.
    pub(super) fn from(mut self, address: &str) -> Self {
        self.from = Some(address.to_owned());
        self
    }

    /// Connects to another address than the case's own listener.
    pub(super) fn to(mut self, address: &str) -> Self {
        self.to = Some(address.to_owned());
        self
    }

    /// Connects to an address that is redirected to the capture listener.
    pub(super) fn captured(mut self, address: &str) -> Self {
        self.redirected = true;
        self.to(address)
    }

    /// Another client while this one is open, and what this one does afterwards.
    pub(super) fn meanwhile(mut self, other: Client, then: impl Into<Vec<Step>>) -> Self {
        self.meanwhile = Some(Box::new(other));
        self.then = then.into();
        self
    }

    pub(super) fn connect(&self, listener: &str) -> Connect {
        let mut connect = Connect::to(self.to.as_deref().unwrap_or(listener));
        if let Some(from) = &self.from {
            connect = connect.from(from);
        }
        if self.redirected { connect.mark(REDIRECTED) } else { connect }
    }
}

/// How observations are compared when chance is part of the case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    /// Client by client, line by line.
    InOrder,
    /// The distinct lines and outcomes; how often each happened does not count.
    Distinct,
    /// As `Distinct`, only the log lines of connections that needed a second attempt.
    DistinctRetries,
    /// How many connections each endpoint got.
    Shares,
}

/// A case.
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) clients: Vec<Client>,
    pub(super) comparison: Comparison,
    /// Log fields and stats whose value depends on timing.
    pub(super) ignored: Vec<&'static str>,
    listener: Value,
    chains: Option<Value>,
    tcp_proxy: Value,
    cluster: Value,
    endpoint_fields: Vec<Value>,
    more_listeners: Vec<Value>,
    more_clusters: Vec<Value>,
    pub(super) runtime: Value,
    has_listener: bool,
    log: Option<&'static str>,
}

impl Case {
    /// A listener with one tcp_proxy chain to a cluster without endpoints.
    pub(super) fn new(name: &'static str) -> Self {
        Self {
            name,
            endpoints: Vec::new(),
            clients: Vec::new(),
            comparison: Comparison::InOrder,
            ignored: Vec::new(),
            listener: json!({}),
            chains: None,
            tcp_proxy: json!({}),
            cluster: json!({}),
            endpoint_fields: Vec::new(),
            more_listeners: Vec::new(),
            more_clusters: Vec::new(),
            runtime: json!({}),
            has_listener: true,
            log: None,
        }
    }

    /// Adds an endpoint that serves.
    pub(super) fn serves(self, steps: impl Into<Vec<Step>>) -> Self {
        self.endpoint(Endpoint::Serves(steps.into()), json!({}))
    }

    /// Adds an endpoint, with more fields for its `lb_endpoints` entry.
    pub(super) fn endpoint(mut self, endpoint: Endpoint, fields: Value) -> Self {
        self.endpoints.push(endpoint);
        self.endpoint_fields.push(fields);
        self
    }

    /// Adds a client.
    pub(super) fn client(mut self, client: Client) -> Self {
        self.clients.push(client);
        self
    }

    /// Adds so many clients, all alike, one after the other.
    pub(super) fn fold_clients(self, count: usize, client: impl Fn() -> Client) -> Self {
        (0..count).fold(self, |case, _| case.client(client()))
    }

    /// Adds a client of the case's own listener.
    pub(super) fn does(self, steps: impl Into<Vec<Step>>) -> Self {
        self.client(Client::new(steps))
    }

    /// Merges fields into the listener.
    pub(super) fn listener(mut self, fields: Value) -> Self {
        merge(&mut self.listener, fields);
        self
    }

    /// Replaces the filter chains. The text `@TCP_PROXY@` stands for the case's tcp_proxy filter.
    pub(super) fn chains(mut self, chains: Value) -> Self {
        self.chains = Some(chains);
        self
    }

    /// Merges fields into the tcp_proxy.
    pub(super) fn tcp_proxy(mut self, fields: Value) -> Self {
        merge(&mut self.tcp_proxy, fields);
        self
    }

    /// Merges fields into the cluster. `null` removes one.
    pub(super) fn cluster(mut self, fields: Value) -> Self {
        merge(&mut self.cluster, fields);
        self
    }

    /// Adds another listener.
    pub(super) fn also_listener(mut self, listener: Value) -> Self {
        self.more_listeners.push(listener);
        self
    }

    /// Adds another cluster.
    pub(super) fn also_cluster(mut self, cluster: Value) -> Self {
        self.more_clusters.push(cluster);
        self
    }

    /// No listener of its own.
    pub(super) fn no_listener(mut self) -> Self {
        self.has_listener = false;
        self
    }

    /// Reads this access log instead of the filter's own.
    pub(super) fn log(mut self, file: &'static str) -> Self {
        self.log = Some(file);
        self
    }

    /// The filter's access log, in the proxy's directory.
    pub(super) fn log_file(&self, number: usize) -> String {
        self.log.map_or_else(|| format!("{}.log", Self::id(number)), str::to_owned)
    }

    /// Sets runtime keys.
    pub(super) fn runtime(mut self, keys: Value) -> Self {
        self.runtime = keys;
        self
    }

    /// Compares otherwise than line by line.
    pub(super) fn compare(mut self, comparison: Comparison) -> Self {
        self.comparison = comparison;
        self
    }

    /// Leaves out log fields or stats whose value depends on timing.
    pub(super) fn ignore(mut self, names: &[&'static str]) -> Self {
        self.ignored.extend(names);
        self
    }

    /// `case-<number>`: the case's cluster and stat prefix.
    pub(super) fn id(number: usize) -> String {
        format!("case-{number}")
    }

    /// Where the case's listener is.
    pub(super) fn listener_address(number: usize) -> String {
        format!("127.0.0.1:{}", 10_000 + number)
    }

    /// Where endpoint `index` is.
    pub(super) fn endpoint_address(&self, number: usize, index: usize) -> (String, u16) {
        let port = u16::try_from(20_000 + number * 10 + index).unwrap_or(u16::MAX);
        match self.endpoints[index] {
            Endpoint::Drops => (DROPPED.to_owned(), port),
            Endpoint::Serves(_) | Endpoint::Refuses => ("127.0.0.1".to_owned(), port),
        }
    }

    /// The listeners of this case.
    pub(super) fn listeners(&self, number: usize) -> Vec<Value> {
        let id = Self::id(number);
        let filter = self.filter(number);
        let mut listener = json!({
            "name": id,
            "address": socket_address("127.0.0.1", 10_000 + number),
            "access_log": [access_log("@CASE@.listener.log")],
            "filter_chains": [{"filters": [filter.clone()]}],
        });
        merge(&mut listener, self.listener.clone());
        if let Some(chains) = &self.chains {
            listener["filter_chains"] = chains.clone();
        }
        let own = self.has_listener.then_some(listener);
        own.into_iter()
            .chain(self.more_listeners.clone())
            .map(|mut listener| {
                substitute(&mut listener, "@TCP_PROXY@", &filter);
                with_id(&listener, &id)
            })
            .collect()
    }

    /// The clusters of this case.
    pub(super) fn clusters(&self, number: usize) -> Vec<Value> {
        let id = Self::id(number);
        let endpoints: Vec<Value> = (0..self.endpoints.len())
            .map(|index| {
                let (address, port) = self.endpoint_address(number, index);
                let mut endpoint = json!({"endpoint": {"address": socket_address(&address, port.into())}});
                merge(&mut endpoint, self.endpoint_fields[index].clone());
                endpoint
            })
            .collect();
        let mut by_priority: Vec<Value> = Vec::new();
        for mut endpoint in endpoints {
            let mut take = |field: &str| endpoint.as_object_mut().and_then(|fields| fields.remove(field));
            let priority = take("priority").unwrap_or(json!(0));
            // What is said of the locality.
            let group_fields = take("group").unwrap_or(json!({}));
            let is_same = |group: &&mut Value| {
                group["priority"] == priority && group.get("locality") == group_fields.get("locality")
            };
            match by_priority.iter_mut().find(is_same) {
                Some(group) => group["lb_endpoints"]
                    .as_array_mut()
                    .into_iter()
                    .for_each(|list| list.push(endpoint.clone())),
                None => {
                    let mut group = json!({"priority": priority, "lb_endpoints": [endpoint]});
                    merge(&mut group, group_fields);
                    by_priority.push(group);
                }
            }
        }
        let mut cluster = json!({
            "name": id,
            "type": "STATIC",
            "connect_timeout": "5s",
            "load_assignment": {"cluster_name": id, "endpoints": by_priority},
        });
        merge(&mut cluster, self.cluster.clone());
        std::iter::once(cluster).chain(self.more_clusters.clone()).collect()
    }

    fn filter(&self, number: usize) -> Value {
        let id = Self::id(number);
        let mut tcp_proxy = json!({
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": id,
            "cluster": id,
            "access_log": [access_log("@CASE@.log")],
        });
        merge(&mut tcp_proxy, self.tcp_proxy.clone());
        json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": tcp_proxy})
    }
}

/// A socket address.
pub(super) fn socket_address(address: &str, port: usize) -> Value {
    json!({"socket_address": {"address": address, "port_value": port}})
}

/// Names and operators of every access log field that is compared (of a few, only the presence is).
const LOG_FIELDS: &[(&str, &str)] = &[
    ("flags", "%RESPONSE_FLAGS%"),
    ("flags_long", "%RESPONSE_FLAGS_LONG%"),
    ("details", "%CONNECTION_TERMINATION_DETAILS%"),
    ("upstream_failure", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
    ("downstream_failure", "%DOWNSTREAM_TRANSPORT_FAILURE_REASON%"),
    ("rx", "%BYTES_RECEIVED%"),
    ("tx", "%BYTES_SENT%"),
    ("upstream_wire_rx", "%UPSTREAM_WIRE_BYTES_RECEIVED%"),
    ("upstream_wire_tx", "%UPSTREAM_WIRE_BYTES_SENT%"),
    ("downstream_wire_rx", "%DOWNSTREAM_WIRE_BYTES_RECEIVED%"),
    ("downstream_wire_tx", "%DOWNSTREAM_WIRE_BYTES_SENT%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER%"),
    ("upstream_local", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("upstream_local_ip", "%UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%"),
    ("downstream_local", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_local_port", "%DOWNSTREAM_LOCAL_PORT%"),
    ("downstream_remote", "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"),
    ("downstream_direct_remote", "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%"),
    ("attempts", "%UPSTREAM_REQUEST_ATTEMPT_COUNT%"),
    ("type", "%ACCESS_LOG_TYPE%"),
    ("route", "%ROUTE_NAME%"),
    ("filter_chain", "%FILTER_CHAIN_NAME%"),
    ("sni", "%REQUESTED_SERVER_NAME%"),
    ("code", "%RESPONSE_CODE%"),
    ("code_details", "%RESPONSE_CODE_DETAILS%"),
    ("protocol", "%PROTOCOL%"),
    ("authority", "%REQ(:AUTHORITY)%"),
    ("downstream_local_close", "%DOWNSTREAM_LOCAL_CLOSE_REASON%"),
    ("upstream_local_close", "%UPSTREAM_LOCAL_CLOSE_REASON%"),
    ("downstream_close", "%DOWNSTREAM_DETECTED_CLOSE_TYPE%"),
    ("upstream_close", "%UPSTREAM_DETECTED_CLOSE_TYPE%"),
    ("start", "%START_TIME%"),
    ("duration", "%DURATION%"),
    ("connection", "%CONNECTION_ID%"),
    ("upstream_connection", "%UPSTREAM_CONNECTION_ID%"),
];

/// A JSON access log in the proxy's directory.
pub(super) fn access_log(file: &str) -> Value {
    let fields: Map<String, Value> =
        LOG_FIELDS.iter().map(|&(name, operator)| (name.to_owned(), json!(operator))).collect();
    json!({
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
            "path": format!("@DIR@/{file}"),
            "log_format": {"json_format": fields},
        },
    })
}

/// Merges objects; everything else is replaced, and `null` removes.
fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                // A null for what is not there yet is kept: it removes the field of the default later.
                if value.is_null() && into.remove(&key).is_none() {
                    into.insert(key, value);
                } else if !value.is_null() {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
        }
        (into, from) => *into = from,
    }
}

/// Puts the case's id in the place of `@CASE@`.
fn with_id(value: &Value, id: &str) -> Value {
    serde_json::from_str(&value.to_string().replace("@CASE@", id)).unwrap_or_default()
}

fn substitute(value: &mut Value, text: &str, with: &Value) {
    match value {
        Value::String(found) if found == text => *value = with.clone(),
        Value::Array(items) => items.iter_mut().for_each(|item| substitute(item, text, with)),
        Value::Object(fields) => fields.iter_mut().for_each(|(_, item)| substitute(item, text, with)),
        _ => {}
    }
}
