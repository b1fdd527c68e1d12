//! `envoy.config.endpoint.v3.ClusterLoadAssignment`.

use std::net::SocketAddr;
use std::sync::Arc;

use super::health_check::EndpointHealthCheck;
use crate::addr::Pipe;

/// The endpoints of a cluster, grouped by locality and priority.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterLoadAssignment {
    /// Groups in file order.
    pub localities: Vec<LocalityLbEndpoints>,
    /// Overprovisioning factor in percent; default 140.
    pub overprovisioning_factor: u32,
}

/// Endpoints that share a locality and a priority.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalityLbEndpoints {
    /// Where they are.
    pub locality: Locality,
    /// 0 is the highest.
    pub priority: u32,
    /// Weight of the locality, when locality weighting is on.
    pub load_balancing_weight: Option<u32>,
    /// The endpoints.
    pub endpoints: Vec<LbEndpoint>,
}

/// `Locality`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Locality {
    /// Region.
    pub region: Arc<str>,
    /// Zone.
    pub zone: Arc<str>,
    /// Sub-zone.
    pub sub_zone: Arc<str>,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LbEndpoint {
    /// An IP address, or a name to be resolved (STRICT_DNS).
    pub address: EndpointAddress,
    /// `hostname`; empty when not given.
    pub hostname: Arc<str>,
    /// Weight, at least 1; default 1.
    pub load_balancing_weight: u32,
    /// As the control plane sees it.
    pub health_status: HealthStatus,
    /// Where it is checked, if not at its own address.
    pub health_check: Option<Arc<EndpointHealthCheck>>,
    /// What RING_HASH and MAGLEV know it by (`hash_key` of the metadata `envoy.lb`), if not by its address.
    pub hash_key: Option<Arc<str>>,
}

/// Where an endpoint is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum EndpointAddress {
    /// A socket address.
    Ip(SocketAddr),
    /// A DNS name and a port.
    Name(Arc<str>, u16),
    /// A Unix domain socket; only in clusters of the bootstrap.
    Pipe(Pipe),
}

/// `HealthStatus`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HealthStatus {
    /// Not known: treated as healthy.
    #[default]
    Unknown,
    /// Healthy.
    Healthy,
    /// Not used unless in panic.
    Unhealthy,
    /// Not used.
    Draining,
    /// Not used.
    Timeout,
    /// Used when there are not enough healthy ones.
    Degraded,
}
