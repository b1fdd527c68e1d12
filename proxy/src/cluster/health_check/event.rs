//! The event log of health checks: JSON lines, as Envoy prints `envoy.data.core.v3.HealthCheckEvent`.

use std::net::SocketAddr;
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use crate::access_log::timestamp;
use crate::config::endpoint::Locality;

/// What happened to a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// It is unhealthy now.
    Eject { timed_out: bool },
    /// It is healthy now.
    AddHealthy { first: bool },
    /// A check failed.
    Failure { timed_out: bool, first: bool },
    /// A check succeeded.
    Success,
}

fn failure_type(timed_out: bool) -> &'static str {
    if timed_out { "NETWORK_TIMEOUT" } else { "NETWORK" }
}

/// One line, without its end.
pub(super) fn json(
    at: SystemTime,
    cluster: &str,
    host: SocketAddr,
    locality: &Locality,
    action: Action,
) -> String {
    let mut event = Map::new();
    event.insert("health_checker_type".into(), "TCP".into());
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
    event.insert("cluster_name".into(), cluster.into());
    // In the order of the message's fields.
    match action {
        Action::Eject { timed_out } => {
            event.insert(
                "eject_unhealthy_event".into(),
                json!({"failure_type": failure_type(timed_out), "http_status_code": 0}),
            );
        }
        Action::AddHealthy { first } => {
            event.insert("add_healthy_event".into(), json!({"first_check": first}));
        }
        Action::Failure { .. } | Action::Success => {}
    }
    event.insert("timestamp".into(), timestamp(at).into());
    if let Action::Failure { timed_out, first } = action {
        let failure = json!({
            "failure_type": failure_type(timed_out),
            "first_check": first,
            "http_status_code": 0,
        });
        event.insert("health_check_failure_event".into(), failure);
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
        let line = |action| json(at, "d", ([127, 0, 0, 1], 29992).into(), &Locality::default(), action);
        assert_eq!(
            line(Action::Failure { timed_out: false, first: true }),
            r#"{"health_checker_type":"TCP","host":{"socket_address":{"protocol":"TCP","address":"127.0.0.1","port_value":29992,"resolver_name":"","ipv4_compat":false,"network_namespace_filepath":""}},"cluster_name":"d","timestamp":"2026-11-22T15:10:02.637Z","health_check_failure_event":{"failure_type":"NETWORK","first_check":true,"http_status_code":0},"locality":{"region":"","zone":"","sub_zone":""}}"#
        );
        assert_eq!(
            line(Action::Eject { timed_out: false }),
            r#"{"health_checker_type":"TCP","host":{"socket_address":{"protocol":"TCP","address":"127.0.0.1","port_value":29992,"resolver_name":"","ipv4_compat":false,"network_namespace_filepath":""}},"cluster_name":"d","eject_unhealthy_event":{"failure_type":"NETWORK","http_status_code":0},"timestamp":"2026-11-22T15:10:02.637Z","locality":{"region":"","zone":"","sub_zone":""}}"#
        );
        assert_eq!(
            line(Action::AddHealthy { first: false }),
            r#"{"health_checker_type":"TCP","host":{"socket_address":{"protocol":"TCP","address":"127.0.0.1","port_value":29992,"resolver_name":"","ipv4_compat":false,"network_namespace_filepath":""}},"cluster_name":"d","add_healthy_event":{"first_check":false},"timestamp":"2026-11-22T15:10:02.637Z","locality":{"region":"","zone":"","sub_zone":""}}"#
        );
    }
}
