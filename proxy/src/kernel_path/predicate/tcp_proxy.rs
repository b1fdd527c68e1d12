//! What a `tcp_proxy` does that only a proxy can.

use super::{Obstacle, Obstacles};
use crate::access_log;
use crate::config::access_log::AccessLog;
use crate::config::tcp_proxy::TcpProxy;

/// What of a connection only a proxy between its two halves knows.
const PROXY_ONLY: &[&str] = &[
    "BYTES_RETRANSMITTED",
    "DOWNSTREAM_DIRECT_LOCAL_ADDRESS",
    "DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT",
    "DOWNSTREAM_DIRECT_LOCAL_PORT",
    "PACKETS_RETRANSMITTED",
    "UPSTREAM_TRANSPORT_FAILURE_REASON",
];

pub(super) fn look_at(proxy: &TcpProxy, found: &mut Obstacles) {
    let TcpProxy {
        stat_prefix: _,
        clusters: _,
        idle_timeout,
        max_connect_attempts,
        backoff: _, // between attempts
        max_downstream_connection_duration,
        max_downstream_connection_duration_jitter_percentage: _, // of that duration
        access_log,
        access_log_flush_interval,
        flush_access_log_on_connected,
        flush_access_log_on_start,
        // Where it hashes the source and that is not known at connect(2), the connection is captured.
        hash_policy: _,
    } = proxy;
    if let Some(timeout) = idle_timeout {
        found.add(Obstacle::IdleTimeout(*timeout));
    }
    if *max_connect_attempts > 1 {
        found.add(Obstacle::ConnectAttempts(*max_connect_attempts));
    }
    if let Some(duration) = max_downstream_connection_duration {
        found.add(Obstacle::ConnectionDuration(*duration));
    }
    let early = [
        ("access_log_flush_interval", access_log_flush_interval.is_some()),
        ("flush_access_log_on_connected", *flush_access_log_on_connected),
        ("flush_access_log_on_start", *flush_access_log_on_start),
    ];
    // Without a log these do nothing.
    for (field, _) in early.into_iter().filter(|(_, set)| *set && !access_log.is_empty()) {
        found.add(Obstacle::EarlyLog(field));
    }
    look_at_logs(access_log, found);
}

/// Access logs of a filter or of a listener.
pub(super) fn look_at_logs(logs: &[AccessLog], found: &mut Obstacles) {
    for operator in logs.iter().flat_map(|log| access_log::operators(&log.format)) {
        if let Some(operator) = PROXY_ONLY.iter().find(|name| **name == operator) {
            found.add(Obstacle::LogOperator(operator));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::access_log::{Format, Sink};

    #[test]
    fn every_operator_that_is_named_exists() {
        for name in PROXY_ONLY {
            let format = Format::Text { format: format!("%{name}%"), omit_empty_values: false };
            assert_eq!(access_log::operators(&format), [*name]);
            access_log::validate(&AccessLog { sink: Sink::Stdout, filter: None, format }).unwrap();
        }
    }
}
