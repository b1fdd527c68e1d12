//! `health_checks`.

use std::path::PathBuf;
use std::time::Duration;

use tidegate_api::core;
use tidegate_api::core::health_check::{HealthChecker, Payload, TcpHealthCheck as Tcp, payload};
use tidegate_api::core::proxy_protocol_config::Version;
use tidegate_api::envoy::extensions::health_check::event_sinks::file::v3::HealthCheckEventFileSink;

use super::super::extension::Extension;
use super::super::{Report, each, enumeration, inactive, optional_duration};
use super::http_check::{grpc_check, http_check};
use crate::config::health_check::{Check, HealthCheck, Intervals, ProxyProtocol, TcpHealthCheck};
use crate::config::proto::FieldPath;

/// Envoy's default.
const NO_TRAFFIC_INTERVAL: Duration = Duration::from_mins(1);

/// `cluster` is the name of the cluster, `unchecked` says why its hosts can't be checked, if so.
pub(super) fn health_check(
    checks: Vec<core::HealthCheck>,
    cluster: &str,
    unchecked: Option<&str>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<HealthCheck> {
    let path = path.field("health_checks");
    if checks.len() > 1 {
        report.unsupported(&path, "a cluster has one health check at most in this version; keep one of them");
    }
    let check = checks.into_iter().next()?;
    let path = path.index(0);
    if let Some(reason) = unchecked {
        report.warn_once(
            format!("health_checks {reason}"),
            &path,
            format!("the endpoints of this cluster are not checked in this version: {reason}"),
        );
        return None;
    }
    convert(check, cluster, &path, report)
}

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
fn convert(
    check: core::HealthCheck,
    cluster: &str,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<HealthCheck> {
    let core::HealthCheck {
        timeout,
        interval,
        initial_jitter,
        interval_jitter,
        interval_jitter_percent,
        unhealthy_threshold,
        healthy_threshold,
        alt_port,
        reuse_connection,
        no_traffic_interval,
        no_traffic_healthy_interval,
        unhealthy_interval,
        unhealthy_edge_interval,
        healthy_edge_interval,
        event_log_path,
        event_logger,
        event_service,
        always_log_health_check_failures,
        always_log_health_check_success,
        tls_options: _, // of clusters with TLS
        transport_socket_match_criteria,
        health_checker,
    } = check;
    inactive!(report, path, "HealthCheck"; alt_port, event_service, transport_socket_match_criteria);
    let timeout = optional_duration(timeout, path, "timeout", report).unwrap_or(Duration::from_secs(1));
    let check = match health_checker {
        Some(HealthChecker::TcpHealthCheck(tcp)) => {
            Check::Tcp(tcp_check(tcp, &path.field("tcp_health_check"), report))
        }
        Some(HealthChecker::HttpHealthCheck(http)) => {
            Check::Http(Box::new(http_check(http, cluster, &path.field("http_health_check"), report)?))
        }
        Some(HealthChecker::GrpcHealthCheck(grpc)) => {
            let path = path.field("grpc_health_check");
            Check::Grpc(Box::new(grpc_check(grpc, cluster, timeout, &path, report)?))
        }
        Some(HealthChecker::CustomHealthCheck(_)) => {
            report.warn_once(
                "custom_health_check".to_owned(),
                &path.field("custom_health_check"),
                "parsed, not active in this version: endpoints are not checked; tcp_health_check, http_health_check and grpc_health_check are",
            );
            return None;
        }
        None => {
            report.missing(path, "tcp_health_check");
            return None;
        }
    };
    let mut time = |value, field: &str| optional_duration(value, path, field, report);
    let healthy = time(interval, "interval").unwrap_or(Duration::from_secs(1));
    let unhealthy = time(unhealthy_interval, "unhealthy_interval").unwrap_or(healthy);
    let no_traffic = time(no_traffic_interval, "no_traffic_interval").unwrap_or(NO_TRAFFIC_INTERVAL);
    let intervals = Intervals {
        healthy,
        unhealthy,
        unhealthy_edge: time(unhealthy_edge_interval, "unhealthy_edge_interval").unwrap_or(unhealthy),
        healthy_edge: time(healthy_edge_interval, "healthy_edge_interval").unwrap_or(healthy),
        no_traffic,
        no_traffic_healthy: time(no_traffic_healthy_interval, "no_traffic_healthy_interval")
            .unwrap_or(no_traffic),
        initial_jitter: time(initial_jitter, "initial_jitter").unwrap_or_default(),
        jitter: time(interval_jitter, "interval_jitter").unwrap_or_default(),
        jitter_percent: interval_jitter_percent,
        min: Duration::from_millis(1),
        max: Duration::MAX,
    };
    Some(HealthCheck {
        timeout,
        intervals,
        unhealthy_threshold: unhealthy_threshold.unwrap_or(1),
        healthy_threshold: healthy_threshold.unwrap_or(1),
        reuse_connection: reuse_connection.unwrap_or(true),
        event_logs: event_logs(event_log_path, event_logger, path, report),
        always_log_failures: always_log_health_check_failures,
        always_log_success: always_log_health_check_success,
        ignore_new_hosts: false,
        remove_healthy_hosts: false,
        check,
    })
}

fn tcp_check(check: Tcp, path: &FieldPath<'_>, report: &mut Report<'_>) -> TcpHealthCheck {
    let Tcp { send, receive, proxy_protocol_config } = check;
    let send = send.and_then(|payload| bytes(payload, &path.field("send"), report)).unwrap_or_default();
    let receive = each(receive, path, "receive", |payload, path| bytes(payload, path, report));
    let path = path.field("proxy_protocol_config");
    let proxy_protocol = proxy_protocol_config.and_then(|config| {
        let core::ProxyProtocolConfig {
            version,
            pass_through_tlvs: _, // there is no downstream
            added_tlvs: _,        // Envoy adds none to its checks
        } = config;
        Some(match enumeration(version, &path, "version", report)? {
            Version::V1 => ProxyProtocol::V1,
            Version::V2 => ProxyProtocol::V2,
        })
    });
    TcpHealthCheck { send, receive, proxy_protocol }
}

pub(super) fn bytes(payload: Payload, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<Vec<u8>> {
    match payload.payload {
        Some(payload::Payload::Binary(bytes)) => Some(bytes),
        Some(payload::Payload::Text(text)) => {
            let bytes = from_hex(&text);
            if bytes.is_none() {
                report.invalid(&path.field("text"), format!("invalid hex string '{text}'"));
            }
            bytes
        }
        None => {
            report.missing(path, "text");
            None
        }
    }
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let pair = |pair: &[u8]| match pair {
        [high, low] => u8::try_from(digit(*high)? * 16 + digit(*low)?).ok(),
        _ => None,
    };
    text.as_bytes().chunks(2).map(pair).collect()
}

fn event_logs(
    path_field: String,
    loggers: Vec<core::TypedExtensionConfig>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Vec<PathBuf> {
    let mut logs: Vec<PathBuf> = vec![];
    if !path_field.is_empty() {
        logs.push(path_field.into());
    }
    let sinks = each(loggers, path, "event_logger", |logger, path| {
        let core::TypedExtensionConfig { name, typed_config } = logger;
        let config = Extension::new(typed_config.unwrap_or_default());
        let path = path.field("typed_config");
        if !config.is::<HealthCheckEventFileSink>() {
            super::unregistered(&name, &config.type_name, &path, report);
            return None;
        }
        let HealthCheckEventFileSink { event_log_path } = config.decode(&path, report)?;
        Some(PathBuf::from(event_log_path))
    });
    logs.extend(sinks.into_iter().filter(|path| !path.as_os_str().is_empty()));
    logs
}
