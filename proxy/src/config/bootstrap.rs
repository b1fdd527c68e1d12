//! The bootstrap: node identity, admin, static resources, and tidegate's own interception settings.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::access_log::AccessLog;
use super::cluster::{Cluster, DataPath};
use super::config_source::{ApiSource, ConfigSource};
use super::listener::{Cidr, Listener};
use super::runtime::Runtime;
use super::upstream_bind::BindConfig;

/// A whole static configuration, validated.
#[derive(Clone, Debug, Default)]
pub struct Bootstrap {
    /// Who this proxy is to a control plane and in logs.
    pub node: Node,
    /// Where the admin server listens; none when the bootstrap has no `admin`.
    pub admin: Option<Admin>,
    /// `static_resources.listeners`, in file order.
    pub listeners: Vec<Arc<Listener>>,
    /// `static_resources.clusters`, in file order.
    pub clusters: Vec<Arc<Cluster>>,
    /// `dynamic_resources`.
    pub dynamic: DynamicResources,
    /// What the static layers of `layered_runtime` say.
    pub runtime: Runtime,
    /// `cluster_manager.outlier_detection.event_log_path`: where ejections are noted.
    pub outlier_event_log: Option<PathBuf>,
    /// What sockets to endpoints are bound to, as far as a cluster says nothing else. Static clusters have it already.
    pub upstream_bind: Option<Arc<BindConfig>>,
    /// The bootstrap extension `tidegate.bootstrap.v1.Interception`; none when it is absent.
    pub interception: Option<Interception>,
    /// `stats_flush_interval`; Envoy's default is 5 s.
    pub stats_flush_interval: Duration,
}

/// `dynamic_resources`: what comes from a control plane.
#[derive(Clone, Debug, Default)]
pub struct DynamicResources {
    /// `ads_config`.
    pub ads: Option<Arc<ApiSource>>,
    /// `cds_config`.
    pub cds: Option<ConfigSource>,
    /// `lds_config`.
    pub lds: Option<ConfigSource>,
}

/// `node` of the bootstrap; flags such as `--service-node` override it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Node {
    /// `node.id`.
    pub id: String,
    /// `node.cluster`.
    pub cluster: String,
    /// `node.locality.zone`.
    pub zone: String,
    /// All of it, for control planes.
    pub proto: tidegate_api::core::Node,
}

/// `admin` of the bootstrap.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Listen address of the admin server.
    pub address: SocketAddr,
    /// `admin.access_log`.
    pub access_log: Vec<AccessLog>,
}

/// What to intercept and how. Command-line options override each field.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interception {
    /// cgroup v2 directories whose processes are captured (subtrees). Empty: the kubepods subtree if there is
    /// one, else nothing unless asked for on the command line.
    pub cgroups: Vec<PathBuf>,
    /// Whether processes of the host's own network namespace inside these cgroups are captured too.
    pub host_namespace: bool,
    /// cgroup v2 directories whose processes are captured although they run in the host's own network
    /// namespace (subtrees).
    pub host_cgroups: Vec<PathBuf>,
    /// What a connect gets when interception can't be done (namespace not enrolled, map full, …).
    pub fail_mode: FailMode,
    /// Port of the capture listeners inside each pod; another one is taken where it is in use. Default 15001.
    pub capture_port: Option<u16>,
    /// Destinations that are never captured.
    pub exclude: Exclusions,
    /// Pin directory below a bpffs mount. Default `/sys/fs/bpf/tidegate`.
    pub pin_path: Option<PathBuf>,
    /// Capacity of the in-flight map, in handshakes whose SYN can't carry the original destination. Default 8,192.
    pub in_flight_capacity: Option<u32>,
    /// Capacity of the map of captured destinations. Default 65,536.
    pub destination_capacity: Option<u32>,
    /// Capacity of the map of enrolled network namespaces. Default 4,096.
    pub namespace_capacity: Option<u32>,
    /// Capacities of the tables of the kernel path.
    pub kernel_path: KernelPathCapacity,
    /// Which way connections take to clusters that say nothing themselves. Default PROXY.
    pub data_path: DataPath,
    /// What becomes of the kernel path when the process stops. Default RELEASE.
    pub on_exit: OnExit,
}

/// Capacities of the tables of the kernel path; none: the default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelPathCapacity {
    /// Filter chains of listeners, and one more for each listener that has several. Default 4,096.
    pub services: Option<u32>,
    /// Their clusters. Default 4,096.
    pub clusters: Option<u32>,
    /// Hosts of those. Default 32,768.
    pub hosts: Option<u32>,
    /// Words of 8 bytes for what describes the clusters. Default 262,144.
    pub balancing_words: Option<u32>,
}

/// What becomes of the kernel path when the process stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnExit {
    /// It stops too: new connections go where they would go without the proxy.
    #[default]
    Release,
    /// It goes on with the last state, until the next process takes over.
    Keep,
}

/// Destinations that are never captured, whatever listener owns them: their connections go on untouched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exclusions {
    /// Networks.
    pub cidrs: Vec<Cidr>,
    /// TCP ports.
    pub ports: Vec<u16>,
}

/// The stated policy for connects that can't be intercepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FailMode {
    /// Let them pass untouched, counted.
    #[default]
    Open,
    /// Refuse them with a clear errno, counted.
    Closed,
}
