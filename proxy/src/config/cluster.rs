//! `envoy.config.cluster.v3.Cluster`.

use std::sync::Arc;
use std::time::Duration;

use super::config_source::ConfigSource;
use super::endpoint::ClusterLoadAssignment;
use super::health_check::HealthCheck;
use super::listener::TcpKeepalive;
use super::outlier::OutlierDetection;
use super::tls::UpstreamTls;
use super::transport_socket::TransportSocketMatches;
use super::upstream_bind::UpstreamBind;

/// A cluster with every default applied.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// Unique name.
    pub name: Arc<str>,
    /// Replaces the name in stats.
    pub alt_stat_name: Option<Arc<str>>,
    /// How endpoints are found.
    pub discovery: Discovery,
    /// Where they come from (EDS); none for clusters of other types.
    pub eds: Option<Arc<Eds>>,
    /// How one is chosen.
    pub lb_policy: LbPolicy,
    /// Load goes to localities by their weight first, as far as their health reaches
    /// (`common_lb_config.locality_weighted_lb_config`).
    pub locality_weighted: bool,
    /// Per attempt. Default 5 s.
    pub connect_timeout: Duration,
    /// Soft limit of bytes buffered per direction. Default 1 MiB.
    pub per_connection_buffer_limit_bytes: u32,
    /// Inline endpoints (STATIC, STRICT_DNS).
    pub load_assignment: ClusterLoadAssignment,
    /// `transport_socket_matches`: endpoints may not select encryption.
    pub transport_sockets: TransportSocketMatches,
    /// Thresholds of priority DEFAULT.
    pub circuit_breakers: Thresholds,
    /// Active health checks; none: hosts are thought to be healthy.
    pub health_check: Option<Box<HealthCheck>>,
    /// Hosts that connects fail at are not used for a while; none: they are.
    pub outlier_detection: Option<Box<OutlierDetection>>,
    /// Below this share of healthy hosts all are used, percent 0–100; default 50. 0 turns panic mode off.
    pub healthy_panic_threshold: f64,
    /// Keepalive of upstream connections.
    pub upstream_keepalive: Option<TcpKeepalive>,
    /// What upstream sockets are bound to, and their options.
    pub upstream_bind: Option<Box<UpstreamBind>>,
    /// DNS settings (STRICT_DNS).
    pub dns: Dns,
    /// ORIGINAL_DST: unused hosts are dropped after so long. Default 5 s.
    pub cleanup_interval: Duration,
    /// What becomes of connections to endpoints that are removed; none: they stay.
    pub endpoint_removal: Option<EndpointRemoval>,
    /// Which way connections to its endpoints take; none: the default of the bootstrap.
    pub data_path: Option<DataPath>,
    /// Connections to an endpoint end when health checks or outlier detection find that it has failed.
    pub close_connections_on_host_health_failure: bool,
    /// TLS to a control plane. Such a cluster is for sources of configuration only: nothing else may use it, since it
    /// would send in plaintext.
    pub tls: Option<Arc<UpstreamTls>>,
    /// It has endpoints on Unix domain sockets, which only sources of configuration can use.
    pub has_pipes: bool,
}

impl Cluster {
    /// Whether connections of clients may go there, and not only the proxy's own to control planes.
    pub fn is_for_clients(&self) -> bool {
        self.tls.is_none() && !self.has_pipes
    }
}

/// `tidegate.cluster.v1.DataPath`: which way connections take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DataPath {
    /// The kernel path where nothing of the configuration is lost by it, else the proxy.
    Auto,
    /// The kernel path also where a timer of the proxy is lost, else the proxy.
    Kernel,
    /// The proxy.
    #[default]
    Proxy,
}

/// `tidegate.cluster.v1.EndpointRemoval` with an action other than KEEP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointRemoval {
    /// With a RST (RESET) instead of a FIN (CLOSE).
    pub reset: bool,
    /// So long after the removal. Default 0.
    pub deadline: Duration,
    /// Also for endpoints that get unhealthy.
    pub include_unhealthy: bool,
}

/// `eds_cluster_config`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Eds {
    /// The name to subscribe to: `service_name`, else the cluster's.
    pub service_name: Arc<str>,
    /// From where.
    pub config: ConfigSource,
}

/// How a cluster finds its endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discovery {
    /// The endpoints are in the configuration.
    Static,
    /// They come from a control plane.
    Eds,
    /// Every address that DNS returns is an endpoint.
    StrictDns,
    /// One endpoint per connection: its restored original destination.
    OriginalDst,
}

/// How an endpoint is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LbPolicy {
    /// Weighted round robin.
    RoundRobin,
    /// Power of N choices on active connections.
    LeastRequest {
        /// Hosts drawn, at least 2; default 2.
        choice_count: u32,
        /// Weight of active connections when endpoint weights differ; default 1.0.
        active_request_bias: f64,
    },
    /// Random, whatever the weights.
    Random,
    /// What is hashed of a connection falls on a ring of points, of which each endpoint has as many as its weight asks for.
    RingHash(RingHash),
    /// What is hashed of a connection is a place in a table, in which each endpoint has as many as its weight asks for.
    Maglev(Maglev),
    /// The cluster itself decides (ORIGINAL_DST).
    ClusterProvided,
}

impl LbPolicy {
    /// What RING_HASH and MAGLEV have in common. `None`: it does not hash.
    pub fn hashing(&self) -> Option<&ConsistentHashing> {
        match self {
            Self::RingHash(ring) => Some(&ring.hashing),
            Self::Maglev(maglev) => Some(&maglev.hashing),
            Self::RoundRobin | Self::LeastRequest { .. } | Self::Random | Self::ClusterProvided => None,
        }
    }
}

/// `ring_hash_lb_config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingHash {
    /// Points on the ring, at least; at most 8,388,608. Default 1,024.
    pub minimum_ring_size: u64,
    /// Points on the ring, at most; from `minimum_ring_size` to 8,388,608, which is the default.
    pub maximum_ring_size: u64,
    /// What places an endpoint's points.
    pub hash_function: HashFunction,
    /// What it shares with MAGLEV.
    pub hashing: ConsistentHashing,
}

/// `hash_function` of a ring. What is hashed of a connection is hashed by xxHash whatever is set here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HashFunction {
    /// xxHash, 64 bits.
    #[default]
    XxHash,
    /// MurmurHash2, 64 bits, as libstdc++ has it in `std::hash`.
    MurmurHash2,
}

/// `maglev_lb_config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Maglev {
    /// Places in the table: a prime, at most 5,000,011. Default 65,537.
    pub table_size: u64,
    /// What it shares with RING_HASH.
    pub hashing: ConsistentHashing,
}

/// `consistent_hashing_lb_config`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsistentHashing {
    /// Endpoints are known by their host name instead of their address.
    pub use_hostname_for_hashing: bool,
    /// How much more than its share an endpoint may have of the connections, in percent of the share; at least 100.
    /// `None`: any number.
    pub hash_balance_factor: Option<u32>,
    /// What is hashed of a connection.
    pub hash_policy: ClusterHashPolicy,
}

/// What the cluster itself says of what is hashed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClusterHashPolicy {
    /// Nothing: the `hash_policy` of the tcp_proxy holds.
    #[default]
    Unset,
    /// The downstream address without its port, whatever the tcp_proxy says; so often (Envoy mixes the hashes of all entries).
    SourceIp(u8),
    /// Only what HTTP requests have: connections go to random endpoints.
    Nothing,
}

/// Circuit breaker thresholds. Envoy's default is 1,024 each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thresholds {
    /// Connections to the whole cluster.
    pub max_connections: u32,
    /// Connections that are still connecting.
    pub max_pending_requests: u32,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self { max_connections: 1024, max_pending_requests: 1024 }
    }
}

/// DNS settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dns {
    /// Time between look-ups. Default 5 s.
    pub refresh_rate: Duration,
    /// Use the records' TTL instead.
    pub respect_ttl: bool,
    /// Which address families count.
    pub lookup_family: LookupFamily,
}

/// `dns_lookup_family`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LookupFamily {
    /// IPv6 if there is any, else IPv4.
    #[default]
    Auto,
    /// IPv4 only.
    V4Only,
    /// IPv6 only.
    V6Only,
    /// IPv4 if there is any, else IPv6.
    V4Preferred,
    /// Both.
    All,
}
