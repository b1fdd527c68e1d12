//! Resources and bootstraps from few words. They are written as JSON, as the rest of the fixtures' configuration, and
//! read by a decoder that is not tidegate's.

use std::fmt::Display;

use anyhow::{Context, Result};
use prost::{Message, Name};
use prost_reflect::DynamicMessage;
use serde_json::{Value, json};
use tidegate_api::cluster::Cluster;
use tidegate_api::endpoint::ClusterLoadAssignment;
use tidegate_api::listener::Listener;
use tidegate_api::route::RouteConfiguration;

use crate::config::{self, merge, socket_address};

/// A message from its proto3 JSON.
pub fn from_json<M: Message + Name + Default>(json: &Value) -> Result<M> {
    let name = M::full_name();
    let descriptor =
        tidegate_api::descriptors().get_message_by_name(&name).with_context(|| format!("no {name}"))?;
    let message =
        DynamicMessage::deserialize(descriptor, json).with_context(|| format!("{name}: {json:#}"))?;
    Ok(message.transcode_to()?)
}

/// The proto3 JSON of a message with its fields' proto names, as Envoy and its control planes write it.
pub fn to_json<M: Message + Name>(message: &M) -> Result<Value> {
    let name = M::full_name();
    let descriptor =
        tidegate_api::descriptors().get_message_by_name(&name).with_context(|| format!("no {name}"))?;
    let mut dynamic = DynamicMessage::new(descriptor);
    dynamic.transcode_from(message)?;
    let options = prost_reflect::SerializeOptions::new().use_proto_field_name(true);
    Ok(dynamic.serialize_with_options(serde_json::value::Serializer, &options)?)
}

/// A listener with one chain of one filter; `fields` override. It logs to the proxy's standard output: the directory
/// that `@DIR@` stands for is not known here.
pub fn listener(address: &str, fields: Value, filter: &Value) -> Result<Listener> {
    let listener = config::listener(address, fields, filter).to_string();
    from_json(&serde_json::from_str(&listener.replace("@DIR@/access.log", "/dev/stdout"))?)
}

/// A cluster with these endpoints; `fields` override.
pub fn cluster(name: &str, endpoints: &[&str], fields: Value) -> Result<Cluster> {
    from_json(&config::cluster(name, endpoints, fields))
}

/// A cluster whose endpoints come from `source` (see [`ads`]) under its own name; `fields` override.
pub fn eds_cluster(name: &str, source: &Value, fields: Value) -> Result<Cluster> {
    let mut cluster = json!({
        "name": name, "type": "EDS", "connect_timeout": "2s", "eds_cluster_config": {"eds_config": source},
    });
    merge(&mut cluster, fields);
    from_json(&cluster)
}

/// The endpoints of a cluster.
pub fn endpoints(cluster: &str, addresses: &[&str]) -> Result<ClusterLoadAssignment> {
    from_json(&config::load_assignment(cluster, addresses))
}

/// A route configuration of virtual hosts: name, domains, cluster.
pub fn routes(name: &str, virtual_hosts: &[(&str, &[&str], &str)]) -> Result<RouteConfiguration> {
    from_json(&json!({"name": name, "virtual_hosts": config::virtual_hosts(virtual_hosts)}))
}

/// `config_source` of what comes over the ADS stream.
pub fn ads() -> Value {
    json!({"ads": {}, "resource_api_version": "V3"})
}

/// `config_source` of a file.
pub fn file(path: &std::path::Path) -> Value {
    json!({"path_config_source": {"path": path}, "resource_api_version": "V3"})
}

/// How a proxy speaks with a control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// `ADS`, state of the world.
    Ads,
    /// `ADS`, incremental.
    DeltaAds,
    /// A stream per kind, state of the world.
    Grpc,
    /// A stream per kind, incremental.
    DeltaGrpc,
    /// Polls.
    Rest,
}

impl Transport {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Ads, Self::DeltaAds, Self::Grpc, Self::DeltaGrpc, Self::Rest];

    /// `config_source` of what comes this way.
    pub fn source(self) -> Value {
        match self {
            Self::Ads | Self::DeltaAds => ads(),
            _ => json!({"api_config_source": self.api(), "resource_api_version": "V3"}),
        }
    }

    /// `api_config_source`.
    fn api(self) -> Value {
        let grpc = |api_type: &str| {
            json!({
                "api_type": api_type, "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": CLUSTER}}],
            })
        };
        match self {
            Self::Ads | Self::Grpc => grpc("GRPC"),
            Self::DeltaAds | Self::DeltaGrpc => grpc("DELTA_GRPC"),
            Self::Rest => json!({
                "api_type": "REST", "transport_api_version": "V3", "cluster_names": [CLUSTER],
                "refresh_delay": "0.05s", "request_timeout": "5s",
            }),
        }
    }

    /// A bootstrap that takes listeners and clusters from a control plane at `address`: a TCP port, or the path of a
    /// Unix domain socket.
    pub fn bootstrap(self, address: impl Display) -> Value {
        let mut dynamic = json!({"lds_config": self.source(), "cds_config": self.source()});
        if matches!(self, Self::Ads | Self::DeltaAds) {
            merge(&mut dynamic, json!({"ads_config": self.api()}));
        }
        let fields = if self == Self::Rest { json!({}) } else { http2() };
        json!({
            "admin": {"address": socket_address("127.0.0.1:0")},
            "node": {"id": "test-node", "cluster": "test-cluster"},
            "dynamic_resources": dynamic,
            "static_resources": {"clusters": [config::cluster(CLUSTER, &[&address.to_string()], fields)]},
        })
    }
}

/// Name of the control plane's cluster in a [`Transport::bootstrap`].
pub const CLUSTER: &str = "xds_cluster";

/// Fields of a cluster whose endpoints speak HTTP/2.
pub fn http2() -> Value {
    json!({"typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }}})
}
