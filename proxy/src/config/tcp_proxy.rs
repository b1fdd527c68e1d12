//! `envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy`.

use std::sync::Arc;
use std::time::Duration;

use super::access_log::AccessLog;

/// A tcp_proxy filter with every default applied.
#[derive(Clone, Debug)]
pub struct TcpProxy {
    /// Root of the stats `tcp.<stat_prefix>.`.
    pub stat_prefix: Arc<str>,
    /// Where connections go. A cluster that does not exist fails at connection time (flag NC).
    pub clusters: ClusterChoice,
    /// Both sides close after so long without a byte either way. `None`: never (`0s`). Envoy's default is 1 h.
    pub idle_timeout: Option<Duration>,
    /// At least 1; each attempt picks an endpoint again. Default 1.
    pub max_connect_attempts: u32,
    /// Wait between attempts; `None`: at once.
    pub backoff: Option<Backoff>,
    /// Both sides close after so long (flag DT). `None`: never.
    pub max_downstream_connection_duration: Option<Duration>,
    /// Adds up to this share of the duration at random, percent 0–100.
    pub max_downstream_connection_duration_jitter_percentage: Option<f64>,
    /// Access logs of this filter.
    pub access_log: Vec<AccessLog>,
    /// Write `TcpPeriodic` entries so often.
    pub access_log_flush_interval: Option<Duration>,
    /// Write a `TcpUpstreamConnected` entry.
    pub flush_access_log_on_connected: bool,
    /// Write a `TcpConnectionStart` entry.
    pub flush_access_log_on_start: bool,
    /// What a hashing load balancer hashes.
    pub hash_policy: Option<HashPolicy>,
}

/// `cluster_specifier`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClusterChoice {
    /// One cluster.
    Single(Arc<str>),
    /// Drawn at random by weight, again for every connect attempt. Never empty, weights at least 1.
    Weighted(Vec<WeightedCluster>),
}

/// One entry of `weighted_clusters`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightedCluster {
    /// Cluster name.
    pub name: Arc<str>,
    /// Share, at least 1.
    pub weight: u32,
}

/// Jittered exponential backoff between connect attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// First interval.
    pub base_interval: Duration,
    /// Upper bound, at least `base_interval`.
    pub max_interval: Duration,
}

/// `hash_policy`; at most one is allowed for TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashPolicy {
    /// The downstream address without its port.
    SourceIp,
    /// A filter state object. Nothing sets one here, so that connections hash at random, as in Envoy without it.
    FilterState(String),
}
