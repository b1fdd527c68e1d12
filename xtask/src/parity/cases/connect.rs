//! Choosing and reaching an endpoint: failures, attempts, health, circuit breakers.

use serde_json::json;
use tidegate_tests::script::Step::{Echo, Pause, Read, ReadToEnd, Reset, ShutdownWrite};
use tidegate_tests::script::write;

use super::super::case::{Case, Client, Comparison, Endpoint};

pub(super) fn cases() -> Vec<Case> {
    let ask = || [write("hello"), ShutdownWrite, ReadToEnd];
    let plain = || json!({});
    vec![
        Case::new("connect refused").endpoint(Endpoint::Refuses, plain()).does([ReadToEnd]),
        Case::new("connect refused, the client has sent data")
            .endpoint(Endpoint::Refuses, plain())
            .does([write("hello"), ReadToEnd])
            // Whether the data was read before the refusal arrives is a race inside either proxy.
            .ignore(&["end", "rx", "downstream_wire_rx", "downstream_cx_rx_bytes_total"]),
        Case::new("connect refused, 3 attempts")
            .endpoint(Endpoint::Refuses, plain())
            .tcp_proxy(json!({"max_connect_attempts": 3}))
            .does([ReadToEnd]),
        Case::new("connect refused, 3 attempts with backoff")
            .endpoint(Endpoint::Refuses, plain())
            .tcp_proxy(json!({
                "max_connect_attempts": 3,
                "backoff_options": {"base_interval": "0.02s", "max_interval": "0.05s"},
            }))
            .does([ReadToEnd]),
        Case::new("one endpoint refuses, the next attempt finds the other")
            .endpoint(Endpoint::Refuses, plain())
            .serves([Echo])
            .tcp_proxy(json!({"max_connect_attempts": 2}))
            .does(ask())
            .does(ask())
            .does(ask())
            .does(ask())
            .compare(Comparison::DistinctRetries),
        Case::new("connect timeout")
            .endpoint(Endpoint::Drops, plain())
            .cluster(json!({"connect_timeout": "0.3s"}))
            .does([ReadToEnd]),
        Case::new("connect timeout, 2 attempts")
            .endpoint(Endpoint::Drops, plain())
            .cluster(json!({"connect_timeout": "0.2s"}))
            .tcp_proxy(json!({"max_connect_attempts": 2}))
            .does([ReadToEnd]),
        Case::new("client leaves while the upstream is being connected")
            .endpoint(Endpoint::Drops, plain())
            .cluster(json!({"connect_timeout": "0.5s"}))
            .does([Pause(100), Reset]),
        Case::new("unknown cluster").tcp_proxy(json!({"cluster": "nowhere"})).does([ReadToEnd]),
        Case::new("no endpoints").does([ReadToEnd]),
        Case::new("all unhealthy, no panic")
            .endpoint(Endpoint::Serves(vec![Echo]), json!({"health_status": "UNHEALTHY"}))
            .cluster(json!({"common_lb_config": {"healthy_panic_threshold": {"value": 0}}}))
            .does([ReadToEnd]),
        Case::new("all unhealthy, panic")
            .endpoint(Endpoint::Serves(vec![Echo]), json!({"health_status": "UNHEALTHY"}))
            .does(ask()),
        Case::new("draining endpoints get nothing")
            .endpoint(Endpoint::Serves(vec![Echo]), json!({"health_status": "DRAINING"}))
            .serves([Echo])
            .serves([Echo])
            .does(ask())
            .does(ask())
            .does(ask())
            .does(ask())
            .compare(Comparison::Shares),
        Case::new("priority 1 when priority 0 is unhealthy")
            .endpoint(Endpoint::Serves(vec![Echo]), json!({"health_status": "UNHEALTHY"}))
            .endpoint(Endpoint::Serves(vec![Echo]), json!({"priority": 1}))
            .does(ask())
            .does(ask()),
        // 3 of 4 are healthy: 75 % by the overprovisioning factor of 1.4 is more than all.
        (0..6)
            .fold(
                Case::new("degraded endpoints only when there is nothing better")
                    .endpoint(Endpoint::Serves(vec![Echo]), json!({"health_status": "DEGRADED"}))
                    .serves([Echo])
                    .serves([Echo])
                    .serves([Echo]),
                |case, _| case.does(ask()),
            )
            .compare(Comparison::Shares),
        Case::new("ORIGINAL_DST without an original destination")
            .cluster(
                json!({"type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "load_assignment": null}),
            )
            .does([ReadToEnd]),
        Case::new("circuit breaker: max_connections 1")
            .serves([Echo])
            .cluster(json!({"circuit_breakers": {"thresholds": [{"max_connections": 1}]}}))
            .client(
                Client::new([write("a"), Read(1)])
                    .meanwhile(Client::new([ReadToEnd]), [ShutdownWrite, ReadToEnd]),
            ),
        Case::new("circuit breaker frees its place")
            .serves([Echo])
            .cluster(json!({"circuit_breakers": {"thresholds": [{"max_connections": 1}]}}))
            .client(Client::new([write("a"), ShutdownWrite, ReadToEnd]))
            .client(Client::new([Pause(200), write("b"), ShutdownWrite, ReadToEnd])),
        Case::new("STRICT_DNS by a name of /etc/hosts")
            .endpoint(
                Endpoint::Serves(vec![Echo]),
                json!({"endpoint": {"address": {"socket_address": {"address": "localhost"}}}}),
            )
            .cluster(json!({"type": "STRICT_DNS", "dns_lookup_family": "V4_ONLY"}))
            .does(ask()),
    ]
}
