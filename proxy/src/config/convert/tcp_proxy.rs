//! tcp_proxy.

use std::sync::Arc;
use std::time::Duration;

use tidegate_api::envoy_type::hash_policy::PolicySpecifier;
use tidegate_api::tcp_proxy as api;
use tidegate_api::tcp_proxy::tcp_proxy as parts;
use tidegate_api::{core, envoy_type};

use super::access_log::access_logs;
use super::{Report, duration, each, enumeration, inactive, optional_duration};
use crate::config::proto::FieldPath;
use crate::config::tcp_proxy::{Backoff, ClusterChoice, HashPolicy, TcpProxy, WeightedCluster};

/// Envoy's default of `idle_timeout`.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_hours(1);

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
pub(super) fn tcp_proxy(
    proxy: api::TcpProxy,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<TcpProxy> {
    let api::TcpProxy {
        stat_prefix,
        on_demand,
        metadata_match,
        idle_timeout,
        downstream_idle_timeout,
        upstream_idle_timeout,
        access_log,
        max_connect_attempts,
        backoff_options,
        hash_policy,
        tunneling_config,
        max_downstream_connection_duration,
        max_downstream_connection_duration_jitter_percentage,
        access_log_flush_interval,
        flush_access_log_on_connected,
        access_log_options,
        proxy_protocol_tlvs,
        proxy_protocol_tlv_merge_policy,
        upstream_connect_mode,
        max_early_data_bytes,
        check_drain_close,
        cluster_specifier,
    } = proxy;
    inactive!(report, path, "TcpProxy";
        on_demand, metadata_match, downstream_idle_timeout, upstream_idle_timeout, proxy_protocol_tlvs,
        proxy_protocol_tlv_merge_policy, check_drain_close);
    if tunneling_config.is_some() {
        report.unsupported(
            &path.field("tunneling_config"),
            "HTTP tunnels are not supported, and the bare stream is not what the upstream expects; remove it",
        );
    }
    connect_mode(upstream_connect_mode, max_early_data_bytes, path, report);
    let log = log_options(
        access_log_options,
        &Deprecated { access_log_flush_interval, flush_access_log_on_connected },
        path,
        report,
    );
    let idle_timeout = match idle_timeout {
        None => Some(IDLE_TIMEOUT),
        Some(_) => {
            optional_duration(idle_timeout, path, "idle_timeout", report).filter(|timeout| !timeout.is_zero())
        }
    };
    let max_duration = optional_duration(
        max_downstream_connection_duration,
        path,
        "max_downstream_connection_duration",
        report,
    );
    let converted = TcpProxy {
        access_log: access_logs(access_log, path, report),
        backoff: backoff_options.and_then(|options| backoff(options, &path.field("backoff_options"), report)),
        hash_policy: each(hash_policy, path, "hash_policy", |policy, path| hash(policy, path, report)).pop(),
        clusters: clusters(cluster_specifier, path, report)?,
        stat_prefix: Arc::from(stat_prefix),
        idle_timeout,
        max_connect_attempts: max_connect_attempts.unwrap_or(1).max(1),
        max_downstream_connection_duration: max_duration,
        max_downstream_connection_duration_jitter_percentage:
            max_downstream_connection_duration_jitter_percentage.map(|percent| percent.value),
        access_log_flush_interval: log.flush_interval,
        flush_access_log_on_connected: log.on_connected,
        flush_access_log_on_start: log.on_start,
    };
    Some(converted)
}

fn connect_mode(mode: i32, max_early_data_bytes: Option<u32>, path: &FieldPath<'_>, report: &mut Report<'_>) {
    let Some(mode) = enumeration::<api::UpstreamConnectMode>(mode, path, "upstream_connect_mode", report)
    else {
        return;
    };
    if mode == api::UpstreamConnectMode::Immediate {
        return inactive!(report, path, "TcpProxy"; max_early_data_bytes);
    }
    if max_early_data_bytes.is_none() {
        report.invalid(
            &path.field("max_early_data_bytes"),
            format!("must be set when upstream_connect_mode is {}", mode.as_str_name()),
        );
    }
    report.warn(
        &path.field("upstream_connect_mode"),
        format!("{} is not active in this version: the upstream is connected at once", mode.as_str_name()),
    );
}

/// The two options that stood in TcpProxy itself before `access_log_options`.
struct Deprecated {
    access_log_flush_interval: Option<tidegate_api::wkt::Duration>,
    flush_access_log_on_connected: bool,
}

struct LogOptions {
    flush_interval: Option<Duration>,
    on_connected: bool,
    on_start: bool,
}

fn log_options(
    options: Option<parts::TcpAccessLogOptions>,
    old: &Deprecated,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> LogOptions {
    let Deprecated { access_log_flush_interval, flush_access_log_on_connected } = *old;
    let Some(options) = options else {
        let flush_interval =
            optional_duration(access_log_flush_interval, path, "access_log_flush_interval", report);
        return LogOptions { flush_interval, on_connected: flush_access_log_on_connected, on_start: false };
    };
    if flush_access_log_on_connected || access_log_flush_interval.is_some() {
        report.invalid(
            path,
            "only one of access_log_options and the deprecated access_log_flush_interval or \
             flush_access_log_on_connected may be set; remove the deprecated ones",
        );
    }
    let parts::TcpAccessLogOptions {
        access_log_flush_interval,
        flush_access_log_on_connected,
        flush_access_log_on_start,
    } = options;
    let path = path.field("access_log_options");
    LogOptions {
        flush_interval: optional_duration(
            access_log_flush_interval,
            &path,
            "access_log_flush_interval",
            report,
        ),
        on_connected: flush_access_log_on_connected,
        on_start: flush_access_log_on_start,
    }
}

fn clusters(
    specifier: Option<parts::ClusterSpecifier>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<ClusterChoice> {
    match specifier {
        None => {
            report.missing(path, "cluster or weighted_clusters");
            None
        }
        Some(parts::ClusterSpecifier::Cluster(name)) => {
            report.check_for_clients(&name, &path.field("cluster"));
            Some(ClusterChoice::Single(Arc::from(name)))
        }
        Some(parts::ClusterSpecifier::WeightedClusters(weighted)) => {
            let parts::WeightedCluster { clusters } = weighted;
            let path = path.field("weighted_clusters");
            let clusters = each(clusters, &path, "clusters", |cluster, path| {
                let parts::weighted_cluster::ClusterWeight { name, weight, metadata_match } = cluster;
                inactive!(report, path, "WeightedCluster.ClusterWeight"; metadata_match);
                if weight == 0 {
                    report.invalid(&path.field("weight"), "must be at least 1");
                }
                report.check_for_clients(&name, &path.field("name"));
                Some(WeightedCluster { name: Arc::from(name), weight })
            });
            self::weighted(clusters, &path, report)
        }
    }
}

/// A choice by weight; at least one cluster must have some.
pub(super) fn weighted(
    clusters: Vec<WeightedCluster>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<ClusterChoice> {
    let clusters: Vec<_> = clusters.into_iter().filter(|cluster| cluster.weight > 0).collect();
    if clusters.is_empty() {
        report.invalid(&path.field("clusters"), "at least one cluster must have a weight of 1 or more");
        return None;
    }
    Some(ClusterChoice::Weighted(clusters))
}

fn backoff(options: core::BackoffStrategy, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<Backoff> {
    let core::BackoffStrategy { base_interval, max_interval } = options;
    let Some(base) = base_interval else {
        report.missing(path, "base_interval");
        return None;
    };
    let base_interval = duration(base, &path.field("base_interval"), report)?;
    // Envoy's default is ten times the base.
    let max_interval = match max_interval {
        None => base_interval.saturating_mul(10),
        Some(max) => duration(max, &path.field("max_interval"), report)?,
    };
    if max_interval < base_interval {
        report.invalid(
            &path.field("max_interval"),
            format!("max_interval {max_interval:?} must be at least base_interval {base_interval:?}"),
        );
        return None;
    }
    Some(Backoff { base_interval, max_interval })
}

fn hash(policy: envoy_type::HashPolicy, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<HashPolicy> {
    let envoy_type::HashPolicy { policy_specifier } = policy;
    match policy_specifier {
        Some(PolicySpecifier::SourceIp(envoy_type::hash_policy::SourceIp {})) => Some(HashPolicy::SourceIp),
        Some(PolicySpecifier::FilterState(envoy_type::hash_policy::FilterState { key })) => {
            report.warn_once(
                "HashPolicy.filter_state".to_owned(),
                &path.field("filter_state"),
                "no filter of this version sets filter state: there is nothing to hash, and RING_HASH and MAGLEV choose at \
                 random, as Envoy does for an object that is not there; use source_ip if a client is to keep its endpoint",
            );
            Some(HashPolicy::FilterState(key))
        }
        None => {
            report.missing(path, "source_ip or filter_state");
            None
        }
    }
}
