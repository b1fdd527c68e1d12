//! From Envoy's messages to plain types.
//!
//! Every message that is acted on is destructured without `..`, so that a field that a new version of the API
//! adds is a compile error here until somebody decides what becomes of it. All problems are collected; none
//! ends the walk.
//!
//! # What becomes of a field that this version does not act on
//!
//! | Field | Decision | Why |
//! |---|---|---|
//! | `FilterChain.transport_socket` other than raw_buffer | refused | clients would be served in plaintext |
//! | TLS of a cluster through which a source of the bootstrap reaches its server | done, for that only (flag NC for others) | |
//! | `Cluster.transport_socket` (but for TLS to control planes, in clusters that nothing else uses), or the one of `transport_socket_matches` that an endpoint selects, other than raw_buffer | refused | what should be encrypted would leave in plaintext |
//! | Unix domain sockets (`pipe`) in STATIC clusters of the bootstrap | done, for control planes only: a listener that names such a cluster is refused (routes of a control plane: flag NC) | |
//! | `pipe` elsewhere | refused | nothing serves or connects there |
//! | network filters other than tcp_proxy, http_connection_manager and `istio.*` (rbac, ext_authz, connection_limit, local_ratelimit, …) | refused | a missing filter lets through what it should stop |
//! | `istio.*` network filters of types that stock Envoy does not have | ignored, one warning for each kind, counted | telemetry and metadata exchange only |
//! | bootstrap extensions `istio.*` and the one of internal listeners, which are in every sidecar's bootstrap | ignored, warning | metadata; and what needs an internal listener is refused where it names one |
//! | HTTP filters that authorise (rbac, ext_authz, jwt_authn, …) | refused | L4 can't apply them |
//! | other HTTP filters, header rewriting, timeouts, retries | warning | connections work without them |
//! | `VirtualHost.require_tls`; a conditional `direct_response` of 400 or more before the `prefix: /` route | that virtual host is closed (flag NR), warning | serving it would skip the denial |
//! | `TcpProxy.tunneling_config` | refused | the upstream expects CONNECT, not the bare stream |
//! | listener filters other than original_dst, tls_inspector, http_inspector, proxy_protocol | refused | they limit or change who the upstream sees |
//! | `network_namespace_filepath` | refused | the port would be open in another place |
//! | `Listener.filter_chain_matcher`, `fcds_config`, `api_listener`, `udp_listener_config`, `internal_listener` | refused | there is nothing sensible to serve instead |
//! | LOGICAL_DNS clusters, LEDS, ECDS, `lds_resources_locator`, `cds_resources_locator` | refused | the proxy would report ready without its configuration |
//! | `scoped_routes` of an HTTP listener | warning, connections end with flag NR | the rest of the configuration can be served |
//! | `hash_policy` of TcpProxy with `filter_state` | warning, connections are spread at random | nothing sets filter state; Envoy's spread likewise without the object |
//! | `tcp_health_check`, `http_health_check`, `grpc_health_check` | done; not in clusters with TLS or pipes and of type ORIGINAL_DST (warning); several checks for one cluster are refused | half of the checks would let through what the others stop |
//! | custom health checks, zone awareness, subsets, per-host circuit breakers, overload manager, … | warning "parsed, not active in this version" | connections work; operators must know |
//! | `outlier_detection` of an ORIGINAL_DST cluster | warning, nothing | Envoy's balancer does not look at the health of such endpoints either |
//! | `outlier_detection.monitors` | warning | they are extensions |
//! | `close_connections_on_host_set_change` | nothing | for tcp_proxy nothing happens in Envoy either |
//! | access loggers other than file, stdout, stderr | warning, not written | |
//! | fields that have no meaning for TCP in Envoy either (`max_retries`, circuit breakers of priority HIGH, …) | nothing | the outcome is Envoy's |

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use super::error::{ConfigError, Problem, Reason};
use super::proto::{FieldPath, SourceMap};
use super::tls::Secret;
use super::upstream_bind::BindConfig;

mod access_log;
mod bind;
mod bootstrap;
pub(super) mod cluster;
pub(super) mod config_source;
pub(super) mod endpoint;
mod extension;
mod filter_chain;
pub(super) mod listener;
mod listener_filter;
mod net;
pub(super) mod route;
pub(super) mod runtime;
pub(super) mod secret;
mod servers;
mod tcp_proxy;
mod tls;
mod transport_socket;

pub(super) use bootstrap::bootstrap;

/// What a conversion found: problems refuse the configuration, warnings don't.
pub(super) struct Report<'a> {
    source: &'a SourceMap,
    /// Names of the clusters through which the bootstrap's sources reach their servers.
    server_clusters: HashSet<String>,
    /// It is the bootstrap, and not a resource of a control plane.
    is_bootstrap: bool,
    /// Whether a cluster has Unix domain sockets, where connections of clients can't go.
    has_pipes: Box<dyn Fn(&str) -> bool + 'a>,
    /// Whether a cluster exists, for route configurations that must not name others.
    is_cluster: Box<dyn Fn(&str) -> bool + 'a>,
    /// Whether a control plane may be reached through a cluster; Envoy's rule is that it is static, and not EDS.
    is_server: Box<dyn Fn(&str) -> bool + 'a>,
    /// Whether there is an ADS stream.
    has_ads: bool,
    /// `static_resources.secrets`
    secrets: Vec<Secret>,
    /// `cluster_manager.upstream_bind_config`
    upstream_bind: Option<Arc<BindConfig>>,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
    /// Warnings of which one is kept: where it stands in `warnings`, and how many there were.
    once: HashMap<String, (usize, usize)>,
    /// Names of network filters that are accepted and have no effect, with the number of chains that have them.
    ignored_filters: BTreeMap<String, usize>,
}

impl<'a> Report<'a> {
    pub(super) fn new(source: &'a SourceMap) -> Self {
        Self {
            source,
            server_clusters: HashSet::new(),
            is_bootstrap: false,
            has_pipes: Box::new(|_| false),
            is_cluster: Box::new(|_| false),
            is_server: Box::new(|_| true),
            has_ads: true,
            secrets: Vec::new(),
            upstream_bind: None,
            problems: vec![],
            warnings: vec![],
            once: HashMap::new(),
            ignored_filters: BTreeMap::new(),
        }
    }

    /// Says which clusters exist.
    pub(super) fn set_clusters(&mut self, is_cluster: impl Fn(&str) -> bool + 'a) {
        self.is_cluster = Box::new(is_cluster);
    }

    /// Says which clusters have Unix domain sockets.
    pub(super) fn set_pipes(&mut self, has_pipes: impl Fn(&str) -> bool + 'a) {
        self.has_pipes = Box::new(has_pipes);
    }

    /// Says what the cluster manager binds sockets to.
    pub(super) fn set_upstream_bind(&mut self, bind: Option<Arc<BindConfig>>) {
        self.upstream_bind = bind;
    }

    /// Refuses a cluster that connections of clients would go to and can't.
    fn check_for_clients(&mut self, cluster: &str, path: &FieldPath<'_>) {
        if (self.has_pipes)(cluster) {
            let message = format!(
                "cluster {cluster:?} has endpoints on unix domain sockets (pipe), which only control planes are \
                 reached through in this version; name one whose endpoints have a socket_address"
            );
            self.unsupported(path, message);
        }
    }

    /// Refuses the configuration.
    pub(super) fn refuse(&mut self, path: &FieldPath<'_>, reason: Reason) {
        let problem = self.source.problem(path, reason);
        self.problems.push(problem);
    }

    /// Refuses what contradicts itself, or something else in the configuration.
    fn invalid(&mut self, path: &FieldPath<'_>, message: impl Into<String>) {
        self.refuse(path, Reason::Invalid(message.into()));
    }

    /// Refuses what is right, but can't be done here.
    fn unsupported(&mut self, path: &FieldPath<'_>, message: impl Into<String>) {
        self.refuse(path, Reason::Unsupported(message.into()));
    }

    fn missing(&mut self, path: &FieldPath<'_>, field: &str) {
        self.refuse(path, Reason::Missing(field.to_owned()));
    }

    /// Tells the operator about something that works otherwise than Envoy would.
    fn warn(&mut self, path: &FieldPath<'_>, message: impl Into<String>) {
        let problem = self.source.problem(path, Reason::Unsupported(message.into()));
        self.warnings.push(problem);
    }

    /// Like [`Report::warn`], but repeats of the same `kind` are only counted: a mesh has thousands of
    /// clusters with the same inactive field.
    fn warn_once(&mut self, kind: String, path: &FieldPath<'_>, message: impl Into<String>) {
        if let Some((_, count)) = self.once.get_mut(&kind) {
            *count += 1;
            return;
        }
        self.once.insert(kind, (self.warnings.len(), 1));
        self.warn(path, message);
    }

    /// Warns about a field of `message` that is set and not acted on.
    fn inactive(&mut self, message: &str, path: &FieldPath<'_>, field: &str) {
        self.warn_once(
            format!("{message}.{field}"),
            &path.field(field),
            "parsed, not active in this version",
        );
    }

    /// Accepts a network filter without effect.
    fn ignore_filter(&mut self, path: &FieldPath<'_>, name: &str) {
        *self.ignored_filters.entry(name.to_owned()).or_default() += 1;
        self.warn_once(
            format!("filter {name}"),
            path,
            format!("network filter {name:?} is accepted without effect"),
        );
    }

    pub(super) fn ignored_filters(&self) -> &BTreeMap<String, usize> {
        &self.ignored_filters
    }

    /// The warnings, or why the configuration is refused.
    pub(super) fn finish(self) -> Result<Vec<Problem>, ConfigError> {
        if let Some(error) = ConfigError::from_problems(self.problems) {
            return Err(error);
        }
        let mut warnings = self.warnings;
        for (at, count) in self.once.into_values().filter(|(_, count)| *count > 1) {
            if let Reason::Unsupported(message) = &mut warnings[at].reason {
                *message = format!("{message} (and {} more like this)", count - 1);
            }
        }
        Ok(warnings)
    }
}

/// Tells apart versions of a message. Envoy compares 64-bit hashes too.
fn content_hash(message: &impl prost::Message) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(&message.encode_to_vec());
    hasher.finish()
}

/// Whether a field is set: proto3 can't tell a scalar's default from absence.
trait Present {
    fn is_present(&self) -> bool;
}

macro_rules! present {
    ($([$($of:ident),*] $kind:ty: $this:ident => $check:expr;)+) => {
        $(impl<$($of),*> Present for $kind {
            fn is_present(&self) -> bool {
                let $this = self;
                $check
            }
        })+
    };
}

present! {
    [T] Option<T>: this => this.is_some();
    [T] Vec<T>: this => !this.is_empty();
    [K, V] BTreeMap<K, V>: this => !this.is_empty();
    [] String: this => !this.is_empty();
    [] bool: this => *this;
    [] i32: this => *this != 0;
    [] u32: this => *this != 0;
}

/// Warns about each of these fields that is set: `inactive!(report, path, "Listener"; drain_type, metadata)`.
macro_rules! inactive {
    ($report:expr, $path:expr, $message:literal; $($field:ident),+ $(,)?) => {
        $(if $crate::config::convert::Present::is_present(&$field) {
            $report.inactive($message, $path, stringify!($field).trim_start_matches("r#"));
        })+
    };
}
use inactive;

/// Converts every element of a repeated field; those that can't be converted have reported why.
fn each<T, R>(
    items: Vec<T>,
    path: &FieldPath<'_>,
    field: &str,
    mut convert: impl FnMut(T, &FieldPath<'_>) -> Option<R>,
) -> Vec<R> {
    let path = path.field(field);
    let items = items.into_iter().enumerate();
    let mut converted: Vec<_> = items.filter_map(|(index, item)| convert(item, &path.index(index))).collect();
    // Collected in place, it has the memory of the messages, which are several times as large.
    converted.shrink_to_fit();
    converted
}

/// A duration that is not negative.
fn duration(
    value: tidegate_api::wkt::Duration,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Duration> {
    let converted = Duration::try_from(value);
    if converted.is_err() {
        report.invalid(
            path,
            format!("a duration can't be negative: {}.{:09}s", value.seconds, value.nanos.abs()),
        );
    }
    converted.ok()
}

/// The optional duration in `field`; an invalid one counts as absent after it was reported.
fn optional_duration(
    value: Option<tidegate_api::wkt::Duration>,
    path: &FieldPath<'_>,
    field: &str,
    report: &mut Report<'_>,
) -> Option<Duration> {
    value.and_then(|value| duration(value, &path.field(field), report))
}

/// A value of an enum, which binary protos may carry out of range.
fn enumeration<E: TryFrom<i32>>(
    value: i32,
    path: &FieldPath<'_>,
    field: &str,
    report: &mut Report<'_>,
) -> Option<E> {
    let converted = E::try_from(value).ok();
    if converted.is_none() {
        report.invalid(&path.field(field), format!("{value} is not a value of this enum"));
    }
    converted
}

/// A port number.
fn port(value: u32, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<u16> {
    let converted = u16::try_from(value).ok();
    if converted.is_none() {
        report.invalid(path, format!("{value} is not a port; use at most 65535"));
    }
    converted
}
