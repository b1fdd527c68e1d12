//! What stands in the way of the kernel path, in words.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tidegate_common::{balance, selector};

use super::MAX_CLUSTERS;

/// Why connections to a listener go through the proxy.
#[derive(Clone, Debug, PartialEq)]
pub enum Obstacle {
    /// It is bound to its port, or INBOUND: connections are made to it, and not captured.
    NotVirtual,
    /// All of its clusters, or the default, say PROXY.
    NotWanted,
    /// It leads to the black hole: the eBPF programs refuse its connections already.
    BlackHole,
    /// The eBPF programs don't run the kernel path, for this reason.
    Unavailable(Arc<str>),
    /// There is no room in one of the kernel's tables.
    TableFull {
        /// Which.
        table: &'static str,
        /// How much there is.
        entries: u32,
    },
    /// Nothing can be captured at this address.
    NoPort(SocketAddr),
    /// A filter that reads what the client sends: of the listener, or of the one that captured connections arrive on.
    ListenerFilter {
        /// Its name.
        filter: &'static str,
        /// Whose it is.
        listener: Arc<str>,
    },
    /// `tcp_keepalive` of the listener.
    ListenerKeepalive,
    /// Runtime key `envoy.resource_limits.listener.<name>.connection_limit`.
    ConnectionLimit(u64),
    /// A field of `filter_chain_match` by which more than addresses and the port of the destination choose a chain.
    ChainMatch(&'static str),
    /// No filter chain matches connections to this address.
    NoChain(SocketAddr),
    /// The addresses of the listener choose different chains, for some source at least.
    DifferentChains,
    /// Sources fall into so many ranges with different chains.
    TooManySources(usize),
    /// The chain of this name has no filters.
    EmptyChain(Arc<str>),
    /// The chain of this name ends in `http_connection_manager`.
    HttpChain(Arc<str>),
    /// `idle_timeout` of tcp_proxy. Soft.
    IdleTimeout(Duration),
    /// `max_connect_attempts`, more than 1.
    ConnectAttempts(u32),
    /// `max_downstream_connection_duration`.
    ConnectionDuration(Duration),
    /// This option of tcp_proxy, by which logs are written before the end.
    EarlyLog(&'static str),
    /// An access log prints this operator, whose value only a proxy knows. Soft.
    LogOperator(&'static str),
    /// So many weighted clusters.
    TooManyClusters(usize),
    /// Some of the clusters say PROXY, others don't.
    MixedDataPath,
    /// One of its clusters.
    Cluster {
        /// Which.
        cluster: Arc<str>,
        /// What is in the way.
        obstacle: ClusterObstacle,
    },
}

/// Why connections to a cluster go through the proxy.
#[derive(Clone, Debug, PartialEq)]
pub enum ClusterObstacle {
    /// There is none of that name.
    Missing,
    /// TLS.
    Tls,
    /// Endpoints on Unix domain sockets.
    Pipe,
    /// `type: ORIGINAL_DST`.
    OriginalDst,
    /// `choice_count` of LEAST_REQUEST.
    ChoiceCount(u32),
    /// LEAST_REQUEST with endpoints of different weights.
    LeastRequestWeights,
    /// `hash_balance_factor` of RING_HASH or MAGLEV.
    HashBalanceFactor,
    /// A hash policy of the cluster that hashes the source more than once.
    HashPolicy,
    /// A ring of so many points.
    RingSize(usize),
    /// `upstream_connection_options.tcp_keepalive`.
    Keepalive,
    /// `upstream_bind_config`, of the cluster or of the cluster manager.
    BindConfig,
    /// `tidegate.cluster.v1.EndpointRemoval` with action CLOSE. Soft.
    RemovalCloses,
    /// `close_connections_on_host_health_failure`. Soft.
    HealthFailureCloses,
    /// So many priorities.
    Priorities(usize),
    /// So many endpoints of one priority.
    TooManyEndpoints(usize),
    /// An IPv4 service with an IPv6 endpoint, or the reverse.
    Family {
        /// Address of the listener.
        service: SocketAddr,
        /// One of the endpoints.
        endpoint: SocketAddr,
    },
}

impl Obstacle {
    /// Clusters with `mode: KERNEL` do without what is lost.
    pub fn is_soft(&self) -> bool {
        use ClusterObstacle::{HealthFailureCloses, RemovalCloses};
        match self {
            Self::IdleTimeout(_) | Self::LogOperator(_) => true,
            Self::Cluster { obstacle, .. } => matches!(obstacle, RemovalCloses | HealthFailureCloses),
            _ => false,
        }
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotVirtual => f.write_str(
                "bind_to_port, or traffic_direction INBOUND: connections are made to it, and not captured",
            ),
            Self::NotWanted => f.write_str("data_path is PROXY"),
            Self::BlackHole => f.write_str("all its connections are refused in the kernel already"),
            Self::Unavailable(reason) => write!(f, "the kernel path is not available: {reason}"),
            Self::TableFull { table, entries } => {
                write!(f, "the kernel table '{table}' is full ({entries} entries)")
            }
            Self::NoPort(address) => write!(f, "address {address} has no port"),
            Self::ListenerFilter { filter, listener } => {
                write!(f, "listener filter {filter} of listener '{listener}' reads what clients send")
            }
            Self::ListenerKeepalive => f.write_str("tcp_keepalive is for sockets of the proxy"),
            Self::ConnectionLimit(limit) => write!(
                f,
                "connection_limit is {limit}, which only the proxy keeps; limit the cluster instead (circuit_breakers)"
            ),
            Self::ChainMatch(field) => write!(
                f,
                "filter_chain_match.{field} decides, but only the destination and the source address of connections are known \
                 beforehand"
            ),
            Self::NoChain(address) => write!(f, "no filter chain matches connections to {address}"),
            Self::DifferentChains => f.write_str("its addresses choose different filter chains"),
            Self::TooManySources(ranges) => write!(
                f,
                "filter_chain_match divides source addresses into {ranges} ranges, more than {}; use shorter prefixes",
                selector::MAX_RANGES
            ),
            Self::EmptyChain(name) => write!(f, "filter chain '{name}' has no filters"),
            Self::HttpChain(name) => write!(f, "filter chain '{name}' ends in http_connection_manager"),
            Self::IdleTimeout(timeout) => write!(
                f,
                "tcp_proxy.idle_timeout is {timeout:?} (Envoy's default is 1 h), which only the proxy keeps; set it to 0s, \
                 or data_path to KERNEL to do without"
            ),
            Self::ConnectAttempts(attempts) => write!(
                f,
                "tcp_proxy.max_connect_attempts is {attempts}, and the kernel path has one attempt only"
            ),
            Self::ConnectionDuration(duration) => write!(
                f,
                "tcp_proxy.max_downstream_connection_duration is {duration:?}, which only the proxy keeps"
            ),
            Self::EarlyLog(field) => write!(
                f,
                "tcp_proxy.access_log_options.{field} is set, and the kernel path logs the end of connections only"
            ),
            Self::LogOperator(operator) => write!(
                f,
                "an access log prints %{operator}%, which only a proxy knows; leave it out, or set data_path to KERNEL to \
                 have it empty"
            ),
            Self::TooManyClusters(count) => {
                write!(f, "{count} weighted clusters, more than {MAX_CLUSTERS}")
            }
            Self::MixedDataPath => {
                f.write_str("data_path is PROXY for some of its clusters, but not for all")
            }
            Self::Cluster { cluster, obstacle } => write!(f, "cluster '{cluster}': {obstacle}"),
        }
    }
}

impl fmt::Display for ClusterObstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("it does not exist"),
            Self::Tls => f.write_str("transport_socket has TLS"),
            Self::Pipe => f.write_str("it has endpoints on unix domain sockets"),
            Self::OriginalDst => f.write_str("type ORIGINAL_DST leaves no endpoint to choose"),
            Self::ChoiceCount(count) => write!(
                f,
                "least_request_lb_config.choice_count is {count}, more than {}",
                balance::MAX_CHOICES
            ),
            Self::LeastRequestWeights => f.write_str(
                "LEAST_REQUEST with different load_balancing_weight; use ROUND_ROBIN, or equal weights",
            ),
            Self::HashBalanceFactor => {
                f.write_str("hash_balance_factor compares the loads of all endpoints, which only the proxy does")
            }
            Self::HashPolicy => f.write_str("hash_policy has source_ip more than once; once is enough"),
            Self::RingSize(points) => write!(
                f,
                "a ring of {points} points, more than {}; lower maximum_ring_size, or use MAGLEV",
                balance::MAX_POINTS
            ),
            Self::Keepalive => {
                f.write_str("upstream_connection_options.tcp_keepalive is for sockets of the proxy")
            }
            Self::BindConfig => f.write_str("upstream_bind_config is for sockets of the proxy"),
            Self::RemovalCloses => f.write_str(
                "tidegate.endpoint_removal ends connections with a FIN, which only the proxy can; use action RESET or KEEP, \
                 or set data_path to KERNEL to have them reset",
            ),
            Self::HealthFailureCloses => f.write_str(
                "close_connections_on_host_health_failure ends connections with a FIN, which only the proxy can; set \
                 data_path to KERNEL to have them reset",
            ),
            Self::Priorities(count) => {
                write!(f, "{count} priorities, more than {}", balance::MAX_ROUTES / 2)
            }
            Self::TooManyEndpoints(count) => {
                write!(f, "{count} endpoints of one priority, more than {}", balance::MAX_ENTRIES)
            }
            Self::Family { service, endpoint } => write!(
                f,
                "endpoint {endpoint} is {}, but clients connect to {service}",
                if endpoint.is_ipv4() { "IPv4" } else { "IPv6" }
            ),
        }
    }
}
