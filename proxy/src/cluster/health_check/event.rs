//! The event log of health checks: JSON lines, as Envoy prints `envoy.data.core.v3.HealthCheckEvent`.

use std::net::SocketAddr;
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use crate::access_log::timestamp;
use crate::config::endpoint::Locality;

/// Why a check failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// No connection, or it broke.
    Network,
    /// No answer in time.
    Timeout,
    /// The answer says so. `at_once`: it need not say so again.
    Active { status: u16, at_once: bool },
}

impl Failure {
    fn name(self) -> &'static str {
        match self {
            Self::Network => "NETWORK",
            Self::Timeout => "NETWORK_TIMEOUT",
            Self::Active { .. } => "ACTIVE",
        }
    }

    /// 0: there was none.
    fn status(self) -> u16 {
        if let Self::Active { status, .. } = self { status } else { 0 }
    }
}

/// What happened to a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// It is unhealthy now.
    Eject(Failure),
    /// It is healthy now.
    AddHealthy { first: bool },
    /// A check failed.
    Failure { failure: Failure, first: bool },
    /// A check succeeded.
    Success,
    /// It is degraded now.
    Degraded,
    /// It is so no more.
    NoLongerDegraded,
}

/// What an event is about.
pub(super) struct Subject<'a> {
    /// `TCP`, `HTTP` or `GRPC`
    pub(super) checker: &'static str,
    /// Name of the cluster.
    pub(super) cluster: &'a str,
    /// The host's own address.
    pub(super) host: SocketAddr,
    /// Its locality.
    pub(super) locality: &'a Locality,
}

/// One line, without its end.
pub(super) fn json(at: SystemTime, subject: &Subject<'_>, action: Action) -> String {
    let Subject { checker, cluster, host, locality } = subject;
    let mut event = Map::new();
    event.insert("health_checker_type".into(), (*checker).into());
    event.insert(
        "host".into(),
        json!({"socket_address": {
            "protocol": "TCP",
            "address": host.ip().to_string(),
            "port_value": host.port(),
            "resolver_name": "",
            "ipv4_compat": false,
            "network_namespace_filepath": "",
        }}),
    );
    event.insert("cluster_name".into(), (*cluster).into());
    // In the order of the message's fields.
    match action {
        Action::Eject(failure) => {
            event.insert(
                "eject_unhealthy_event".into(),
                json!({"failure_type": failure.name(), "http_status_code": failure.status()}),
            );
        }
        Action::AddHealthy { first } => {
            event.insert("add_healthy_event".into(), json!({"first_check": first}));
        }
        _ => {}
    }
    event.insert("timestamp".into(), timestamp(at).into());
    match action {
        Action::Failure { failure, first } => {
            let failure = json!({
                "failure_type": failure.name(),
                "first_check": first,
                "http_status_code": failure.status(),
            });
            event.insert("health_check_failure_event".into(), failure);
        }
        Action::Degraded => drop(event.insert("degraded_healthy_host".into(), json!({}))),
        Action::NoLongerDegraded => drop(event.insert("no_longer_degraded_host".into(), json!({}))),
        _ => {}
    }
    let Locality { region, zone, sub_zone } = locality;
    event.insert("locality".into(), json!({"region": **region, "zone": **zone, "sub_zone": **sub_zone}));
    if action == Action::Success {
        event.insert("successful_health_check_event".into(), json!({}));
    }
    Value::Object(event).to_string()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    /// Lines of a real Envoy 1.40.
    #[test]
    fn lines_are_envoys() {
        let at = UNIX_EPOCH + Duration::from_millis(1_795_360_202_637);
        let line = |checker, action| {
            let host = ([127, 0, 0, 1], 29992).into();
            json(at, &Subject { checker, cluster: "d", host, locality: &Locality::default() }, action)
        };
        assert_eq!(
            line("TCP", Action::Failure { failure: Failure::Network, first: true }),
            r#"{"health_checker_type":"TCP","host":{"socket_address":{"protocol":"TCP","address":"127.0.0.1","port_value":29992,"resolver_name":"","ipv4_compat":false,"network_namespace_filepath":""}},"cluster_name":"d","timestamp":"2026-11-22T15:10:02.637Z","health_check_failure_event":{"failure_type":"NETWORK","first_check":true,"http_status_code":0},"locality":{"region":"","zone":"","sub_zone":""}}"#
        );
        assert_eq!(
            line("TCP", Action::Eject(Failure::Network)),
            r#"{"health_checker_type":"TCP","host":{"socket_address":{"protocol":"TCP","address":"127.0.0.1","port_value":29992,"resolver_name":"","ipv4_compat":false,"network_namespace_filepath":""}},"cluster_name":"d","eject_unhealthy_event":{"failure_type":"NETWORK","http_status_code":0},"timestamp":"2026-11-22T15:10:02.637Z","locality":{"region":"","zone":"","sub_zone":""}}"#
        );
        assert_eq!(
            line("TCP", Action::AddHealthy { first: false }),
            r#"{"health_checker_type":"TCP","host":{"socket_address":{"protocol":"TCP","address":"127.0.0.1","port_value":29992,"resolver_name":"","ipv4_compat":false,"network_namespace_filepath":""}},"cluster_name":"d","add_healthy_event":{"first_check":false},"timestamp":"2026-11-22T15:10:02.637Z","locality":{"region":"","zone":"","sub_zone":""}}"#
        );
        let failure = Failure::Active { status: 503, at_once: true };
        assert_eq!(
            line("HTTP", Action::Failure { failure, first: true }),
            r#"{"health_checker_type":"HTTP","host":{"socket_address":{"protocol":"TCP","address":"127.0.0.1","port_value":29992,"resolver_name":"","ipv4_compat":false,"network_namespace_filepath":""}},"cluster_name":"d","timestamp":"2026-11-22T15:10:02.637Z","health_check_failure_event":{"failure_type":"ACTIVE","first_check":true,"http_status_code":503},"locality":{"region":"","zone":"","sub_zone":""}}"#
        );
        assert_eq!(
            line("HTTP", Action::Degraded),
            r#"{"health_checker_type":"HTTP","host":{"socket_address":{"protocol":"TCP","address":"127.0.0.1","port_value":29992,"resolver_name":"","ipv4_compat":false,"network_namespace_filepath":""}},"cluster_name":"d","timestamp":"2026-11-22T15:10:02.637Z","degraded_healthy_host":{},"locality":{"region":"","zone":"","sub_zone":""}}"#
        );
    }
}
