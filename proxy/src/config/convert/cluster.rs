//! `Cluster`.

use std::sync::Arc;
use std::time::Duration;

use tidegate_api::cluster as api;
use tidegate_api::cluster::cluster as parts;
use tidegate_api::cluster::cluster::{ClusterDiscoveryType, DiscoveryType, LbConfig, common_lb_config};
use tidegate_api::core;
use tidegate_api::envoy::extensions::clusters::common::dns::v3::DnsLookupFamily as TypedLookupFamily;
use tidegate_api::envoy::extensions::clusters::dns::v3::DnsCluster;

use super::bind::bind_config;
use super::config_source::config_source;
use super::endpoint::{Of, load_assignment};
use super::extension::{Extension, unregistered};
use super::listener::BUFFER_LIMIT;
use super::net::keepalive;
use super::transport_socket::{self, cluster_tls};
use super::{Report, each, enumeration, inactive, optional_duration};
use crate::config::cluster::{
    Cluster, ClusterHashPolicy, ConsistentHashing, Discovery, Dns, Eds, LbPolicy, LookupFamily, Thresholds,
};
use crate::config::endpoint::{ClusterLoadAssignment, EndpointAddress};
use crate::config::health_check::HealthCheck;
use crate::config::listener::TcpKeepalive;
use crate::config::proto::FieldPath;
use crate::config::upstream_bind::UpstreamBind;

mod health_check;
mod http_check;
mod lb_policy;
mod metadata;
mod outlier;

use metadata::Extensions;
pub(super) use metadata::data_path_mode;

/// Envoy's defaults.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const DNS_REFRESH_RATE: Duration = Duration::from_secs(5);
const CLEANUP_INTERVAL: Duration = Duration::from_secs(5);
const HEALTHY_PANIC_THRESHOLD: f64 = 50.0;
const OVERPROVISIONING_FACTOR: u32 = 140;

/// As `http2_protocol_options`: HTTP only.
const HTTP_PROTOCOL_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
pub(in crate::config) fn cluster(
    cluster: api::Cluster,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Cluster> {
    let api::Cluster {
        transport_socket_matches,
        transport_socket_matcher,
        name,
        alt_stat_name,
        stats_matcher,
        eds_cluster_config,
        connect_timeout,
        per_connection_buffer_limit_bytes,
        per_connection_buffer_high_watermark_timeout,
        lb_policy,
        load_assignment: assignment,
        health_checks,
        max_requests_per_connection,
        circuit_breakers,
        upstream_http_protocol_options,
        common_http_protocol_options,
        http_protocol_options,
        http2_protocol_options: _, // HTTP is spoken with control planes only, and with them the source says which
        mut typed_extension_protocol_options,
        dns_refresh_rate,
        dns_jitter,
        dns_failure_refresh_rate,
        respect_dns_ttl,
        dns_lookup_family,
        dns_resolvers,
        use_tcp_for_dns_lookups,
        dns_resolution_config,
        typed_dns_resolver_config,
        wait_for_warm_on_init,
        outlier_detection,
        cleanup_interval,
        upstream_bind_config,
        lb_subset_config,
        common_lb_config,
        transport_socket,
        metadata,
        protocol_selection: _, // HTTP only
        upstream_connection_options,
        close_connections_on_host_health_failure,
        ignore_health_on_host_removal,
        filters,
        load_balancing_policy,
        lrs_server,
        lrs_report_endpoint_metrics,
        track_timeout_budgets: _, // HTTP only
        upstream_config,
        track_cluster_stats,
        preconnect_policy,
        connection_pool_per_downstream_connection: _, // always so for TCP
        queuing_policies,
        cluster_discovery_type,
        lb_config,
    } = cluster;
    typed_extension_protocol_options.remove(HTTP_PROTOCOL_OPTIONS);
    inactive!(report, path, "Cluster";
        stats_matcher, per_connection_buffer_high_watermark_timeout, max_requests_per_connection,
        upstream_http_protocol_options, common_http_protocol_options, http_protocol_options,
        typed_extension_protocol_options, dns_jitter, dns_failure_refresh_rate,
        dns_resolvers, use_tcp_for_dns_lookups, dns_resolution_config, typed_dns_resolver_config,
        wait_for_warm_on_init, lb_subset_config, lrs_server,
        lrs_report_endpoint_metrics, track_cluster_stats, preconnect_policy, queuing_policies);
    for (field, present) in [
        ("transport_socket_matcher", transport_socket_matcher.is_some()),
        ("upstream_config", upstream_config.is_some()),
    ] {
        if present {
            report.unsupported(&path.field(field), "not supported in this version; remove it");
        }
    }
    let tls = cluster_tls(&name, transport_socket, path, report);
    upstream_filters(filters, path, report);
    let mut dns = Dns {
        refresh_rate: optional_duration(dns_refresh_rate, path, "dns_refresh_rate", report)
            .unwrap_or(DNS_REFRESH_RATE),
        respect_ttl: respect_dns_ttl,
        lookup_family: lookup_family(enumeration(dns_lookup_family, path, "dns_lookup_family", report)?),
    };
    let discovery = discovery(cluster_discovery_type, &mut dns, path, report);
    let Common { healthy_panic_threshold, ignore_new_hosts, locality_weighted, hashing } =
        common_lb(common_lb_config, path, report);
    let mut locality_weighted = locality_weighted;
    let lb_policy = lb_policy::lb_policy(
        lb_policy,
        load_balancing_policy,
        lb_config,
        hashing,
        &mut locality_weighted,
        path,
        report,
    );
    let Extensions { endpoint_removal, data_path } = metadata::extensions(metadata, path, report);
    let circuit_breakers = thresholds(circuit_breakers, path, report);
    let own_bind = bind_config(upstream_bind_config, path, report);
    let upstream_bind = UpstreamBind::of(own_bind, report.upstream_bind.as_deref());
    let upstream_keepalive = connection_options(upstream_connection_options, path, report);
    let connect_timeout = optional_duration(connect_timeout, path, "connect_timeout", report);
    let cleanup_interval = optional_duration(cleanup_interval, path, "cleanup_interval", report);

    let (discovery, lb_policy) = (discovery?, lb_policy?);
    if hashing.use_hostname_for_hashing && discovery != Discovery::StrictDns {
        report.invalid(
            &path.field("common_lb_config").field("consistent_hashing_lb_config").field("use_hostname_for_hashing"),
            "Envoy takes this with type STRICT_DNS only; give endpoints a hash_key in the metadata envoy.lb, or set \
             use_hostname_for_hashing in load_balancing_policy",
        );
    }
    let outlier_detection = outlier::outlier_detection(outlier_detection, discovery, path, report);
    check_combination(&name, discovery, lb_policy, assignment.is_some(), path, report);
    let transport_sockets = transport_socket::matches(transport_socket_matches);
    let eds = match discovery {
        Discovery::Eds => Some(Arc::new(eds(eds_cluster_config, &name, path, report)?)),
        _ => None, // only EDS reads it
    };
    let load_assignment = match assignment {
        None => {
            ClusterLoadAssignment { localities: vec![], overprovisioning_factor: OVERPROVISIONING_FACTOR }
        }
        Some(assignment) => {
            let of = Of { discovery, transport_sockets: &transport_sockets };
            load_assignment(assignment, &of, &path.field("load_assignment"), report)
        }
    };
    let has_pipes = has_pipes(&load_assignment);
    let unchecked = if tls.is_some() {
        Some("it has TLS")
    } else if has_pipes {
        Some("it has endpoints on unix domain sockets")
    } else {
        (discovery == Discovery::OriginalDst).then_some("clients choose the endpoint")
    };
    let health_check =
        health_check::health_check(health_checks, &name, unchecked, path, report).map(|check| {
            let remove_healthy_hosts = ignore_health_on_host_removal;
            Box::new(HealthCheck { ignore_new_hosts, remove_healthy_hosts, ..check })
        });
    Some(Cluster {
        name: Arc::from(name),
        alt_stat_name: Some(alt_stat_name).filter(|name| !name.is_empty()).map(Arc::from),
        discovery,
        eds,
        lb_policy,
        locality_weighted,
        connect_timeout: connect_timeout.unwrap_or(CONNECT_TIMEOUT),
        per_connection_buffer_limit_bytes: per_connection_buffer_limit_bytes.unwrap_or(BUFFER_LIMIT),
        load_assignment,
        transport_sockets,
        circuit_breakers,
        health_check,
        outlier_detection: outlier_detection.map(Box::new),
        healthy_panic_threshold,
        upstream_keepalive,
        upstream_bind: upstream_bind.map(Box::new),
        dns,
        cleanup_interval: cleanup_interval.unwrap_or(CLEANUP_INTERVAL),
        endpoint_removal,
        data_path,
        close_connections_on_host_health_failure,
        tls: tls.map(Arc::new),
        has_pipes,
    })
}

fn has_pipes(assignment: &ClusterLoadAssignment) -> bool {
    let mut endpoints = assignment.localities.iter().flat_map(|group| &group.endpoints);
    endpoints.any(|endpoint| matches!(endpoint.address, EndpointAddress::Pipe(_)))
}

fn discovery(
    kind: Option<ClusterDiscoveryType>,
    dns: &mut Dns,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Discovery> {
    let kind = match kind {
        Some(ClusterDiscoveryType::ClusterType(custom)) => {
            return custom_type(custom, dns, &path.field("cluster_type"), report);
        }
        Some(ClusterDiscoveryType::Type(kind)) => enumeration(kind, path, "type", report)?,
        None => DiscoveryType::Static,
    };
    let refusal = match kind {
        DiscoveryType::Static => return Some(Discovery::Static),
        DiscoveryType::StrictDns => return Some(Discovery::StrictDns),
        DiscoveryType::OriginalDst => return Some(Discovery::OriginalDst),
        DiscoveryType::LogicalDns => {
            "LOGICAL_DNS is not supported in this version; STRICT_DNS is the nearest"
        }
        DiscoveryType::Eds => return Some(Discovery::Eds),
    };
    report.unsupported(&path.field("type"), refusal);
    None
}

/// Where the endpoints of an EDS cluster come from.
fn eds(
    config: Option<parts::EdsClusterConfig>,
    cluster: &str,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Eds> {
    let Some(parts::EdsClusterConfig { eds_config, service_name }) = config else {
        report.missing(path, "eds_cluster_config");
        return None;
    };
    let path = path.field("eds_cluster_config");
    let Some(eds_config) = eds_config else {
        report.missing(&path, "eds_config");
        return None;
    };
    let name = if service_name.is_empty() { cluster } else { &service_name };
    let config = config_source(eds_config, &path.field("eds_config"), report)?;
    Some(Eds { service_name: Arc::from(name), config })
}

fn custom_type(
    custom: parts::CustomClusterType,
    dns: &mut Dns,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Discovery> {
    let parts::CustomClusterType { name, typed_config } = custom;
    let path = path.field("typed_config");
    let config = Extension::new(typed_config.unwrap_or_default());
    if !config.is::<DnsCluster>() {
        if config.known {
            report.unsupported(
                &path,
                format!("cluster type {} is not supported in this version", config.type_name),
            );
        } else {
            unregistered(&name, config.type_url(), &path, report);
        }
        return None;
    }
    let DnsCluster {
        dns_refresh_rate,
        dns_failure_refresh_rate,
        respect_dns_ttl,
        dns_jitter,
        typed_dns_resolver_config,
        dns_lookup_family,
        all_addresses_in_single_endpoint,
        dns_min_refresh_rate,
    } = config.decode(&path, report)?;
    inactive!(report, &path, "DnsCluster";
        dns_failure_refresh_rate, dns_jitter, typed_dns_resolver_config, dns_min_refresh_rate);
    if all_addresses_in_single_endpoint {
        report.unsupported(
            &path.field("all_addresses_in_single_endpoint"),
            "LOGICAL_DNS is not supported in this version; remove it to get STRICT_DNS",
        );
        return None;
    }
    let refresh_rate = optional_duration(dns_refresh_rate, &path, "dns_refresh_rate", report);
    dns.refresh_rate = refresh_rate.unwrap_or(DNS_REFRESH_RATE);
    dns.respect_ttl = respect_dns_ttl;
    dns.lookup_family = match enumeration(dns_lookup_family, &path, "dns_lookup_family", report)? {
        TypedLookupFamily::Unspecified | TypedLookupFamily::Auto => LookupFamily::Auto,
        TypedLookupFamily::V4Only => LookupFamily::V4Only,
        TypedLookupFamily::V6Only => LookupFamily::V6Only,
        TypedLookupFamily::V4Preferred => LookupFamily::V4Preferred,
        TypedLookupFamily::All => LookupFamily::All,
    };
    Some(Discovery::StrictDns)
}

fn lookup_family(family: parts::DnsLookupFamily) -> LookupFamily {
    match family {
        parts::DnsLookupFamily::Auto => LookupFamily::Auto,
        parts::DnsLookupFamily::V4Only => LookupFamily::V4Only,
        parts::DnsLookupFamily::V6Only => LookupFamily::V6Only,
        parts::DnsLookupFamily::V4Preferred => LookupFamily::V4Preferred,
        parts::DnsLookupFamily::All => LookupFamily::All,
    }
}

fn check_combination(
    name: &str,
    discovery: Discovery,
    lb_policy: LbPolicy,
    has_assignment: bool,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) {
    let provided = lb_policy == LbPolicy::ClusterProvided;
    if discovery == Discovery::OriginalDst && has_assignment {
        report.invalid(
            &path.field("load_assignment"),
            "ORIGINAL_DST clusters must have no load assignment configured; remove it",
        );
    }
    if discovery == Discovery::OriginalDst && !provided {
        report.invalid(
            &path.field("lb_policy"),
            "only CLUSTER_PROVIDED is allowed with cluster type ORIGINAL_DST",
        );
    }
    if discovery != Discovery::OriginalDst && provided {
        report.invalid(
            &path.field("lb_policy"),
            format!("cluster provided LB specified but cluster {name:?} did not provide one; use CLUSTER_PROVIDED \
                     with type ORIGINAL_DST only"),
        );
    }
}

/// What `common_lb_config` says.
struct Common {
    /// Percent.
    healthy_panic_threshold: f64,
    ignore_new_hosts: bool,
    locality_weighted: bool,
    hashing: ConsistentHashing,
}

fn common_lb(config: Option<parts::CommonLbConfig>, path: &FieldPath<'_>, report: &mut Report<'_>) -> Common {
    let Some(config) = config else {
        return Common {
            healthy_panic_threshold: HEALTHY_PANIC_THRESHOLD,
            ignore_new_hosts: false,
            locality_weighted: false,
            hashing: ConsistentHashing::default(),
        };
    };
    let path = path.field("common_lb_config");
    let parts::CommonLbConfig {
        healthy_panic_threshold,
        update_merge_window: _, // merges updates from xDS; nothing updates a static cluster
        ignore_new_hosts_until_first_hc,
        close_connections_on_host_set_change: _, // pools only: in Envoy connections of tcp_proxy outlive it, too
        consistent_hashing_lb_config,
        override_host_status,
        locality_config_specifier,
    } = config;
    inactive!(report, &path, "CommonLbConfig"; override_host_status);
    let hashing = consistent_hashing_lb_config.map_or_else(ConsistentHashing::default, |config| {
        let common_lb_config::ConsistentHashingLbConfig { use_hostname_for_hashing, hash_balance_factor } =
            config;
        let hash_policy = ClusterHashPolicy::Unset;
        ConsistentHashing { use_hostname_for_hashing, hash_balance_factor, hash_policy }
    });
    let locality_weighted = match locality_config_specifier {
        None => false,
        Some(common_lb_config::LocalityConfigSpecifier::ZoneAwareLbConfig(_)) => {
            report.inactive("CommonLbConfig", &path, "zone_aware_lb_config");
            false
        }
        Some(common_lb_config::LocalityConfigSpecifier::LocalityWeightedLbConfig(_)) => true,
    };
    Common {
        healthy_panic_threshold: healthy_panic_threshold
            .map_or(HEALTHY_PANIC_THRESHOLD, |percent| percent.value),
        ignore_new_hosts: ignore_new_hosts_until_first_hc,
        locality_weighted,
        hashing,
    }
}

/// The thresholds of priority DEFAULT; TCP has no other.
fn thresholds(
    breakers: Option<api::CircuitBreakers>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Thresholds {
    let Some(api::CircuitBreakers { thresholds, per_host_thresholds }) = breakers else {
        return Thresholds::default();
    };
    let path = path.field("circuit_breakers");
    inactive!(report, &path, "CircuitBreakers"; per_host_thresholds);
    let thresholds = each(thresholds, &path, "thresholds", |entry, path| {
        let api::circuit_breakers::Thresholds {
            priority,
            max_connections,
            max_pending_requests,
            max_requests,
            // HTTP only: retries, and pools by protocol.
            max_retries: _,
            retry_budget: _,
            track_remaining,
            max_connection_pools: _,
        } = entry;
        if enumeration::<core::RoutingPriority>(priority, path, "priority", report)?
            != core::RoutingPriority::Default
        {
            return None;
        }
        inactive!(report, path, "CircuitBreakers.Thresholds"; track_remaining);
        let default = Thresholds::default();
        let max_connections = max_connections.unwrap_or(default.max_connections);
        // A TCP connection counts as one request, so that the lower of the two limits holds.
        let max_connections = max_requests.map_or(max_connections, |requests| requests.min(max_connections));
        Some(Thresholds {
            max_connections,
            max_pending_requests: max_pending_requests.unwrap_or(default.max_pending_requests),
        })
    });
    // Of several entries for one priority, Envoy takes the first.
    thresholds.into_iter().next().unwrap_or_default()
}

fn connection_options(
    options: Option<api::UpstreamConnectionOptions>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<TcpKeepalive> {
    let api::UpstreamConnectionOptions {
        tcp_keepalive,
        set_local_interface_name_on_upstream_connections,
        happy_eyeballs_config,
    } = options?;
    let path = path.field("upstream_connection_options");
    inactive!(report, &path, "UpstreamConnectionOptions";
        set_local_interface_name_on_upstream_connections, happy_eyeballs_config);
    tcp_keepalive.and_then(keepalive)
}

/// Upstream network filters: Istio's have no effect, others are refused.
fn upstream_filters(filters: Vec<api::Filter>, path: &FieldPath<'_>, report: &mut Report<'_>) {
    let filters_path = path.field("filters");
    for (index, filter) in filters.into_iter().enumerate() {
        let path = filters_path.index(index);
        let api::Filter { name, typed_config, config_discovery: _ } = filter;
        let type_url = typed_config.map(|any| any.type_url).unwrap_or_default();
        if name.starts_with("istio.") {
            report.ignore_filter(&path, &name);
        } else {
            unregistered(&name, &type_url, &path, report);
        }
    }
}

/// What a `LbConfig` is called, for warnings.
fn lb_config_field(config: &LbConfig) -> &'static str {
    match config {
        LbConfig::RingHashLbConfig(_) => "ring_hash_lb_config",
        LbConfig::MaglevLbConfig(_) => "maglev_lb_config",
        LbConfig::OriginalDstLbConfig(_) => "original_dst_lb_config",
        LbConfig::LeastRequestLbConfig(_) => "least_request_lb_config",
        LbConfig::RoundRobinLbConfig(_) => "round_robin_lb_config",
    }
}
