//! Outlier detection: who is ejected, and what clients, stats and `/clusters` show of it.

use serde_json::{Value, json};
use tidegate_tests::script::Step::{Echo, ReadToEnd, ShutdownWrite};
use tidegate_tests::script::write;

use super::super::case::{Case, Client, Comparison, Endpoint};

/// What was detected is put in force by another thread than the one that detected it.
const PUT_IN_FORCE: u64 = 200;

pub(super) fn cases() -> Vec<Case> {
    vec![
        refusing("outlier: five refused connects in a row eject", &json!({}))
            .fold_clients(5, failing)
            .does([ReadToEnd]),
        refusing("outlier: four do not", &json!({})).fold_clients(4, failing),
        refusing(
            "outlier: gateway failures, if that is enforced",
            &json!({"consecutive_gateway_failure": 2, "enforcing_consecutive_gateway_failure": 100}),
        )
        .fold_clients(3, failing),
        refusing(
            "outlier: detected, but not enforced",
            &json!({"consecutive_5xx": 1, "enforcing_consecutive_5xx": 0}),
        )
        .fold_clients(2, failing),
        refusing(
            "outlier: the share of ejected hosts is at most 10 %",
            &json!({"consecutive_5xx": 1, "max_ejection_percent": null}),
        )
        .fold_clients(2, failing),
        refusing(
            "outlier: but one may always be ejected",
            &json!({"consecutive_5xx": 1, "max_ejection_percent": null, "always_eject_one_host": true}),
        )
        .fold_clients(2, failing),
        refusing(
            "outlier: failures of local origin, split",
            &json!({"split_external_local_origin_errors": true, "consecutive_local_origin_failure": 2,
                   "consecutive_5xx": 1}),
        )
        .fold_clients(3, failing),
        Case::new("outlier: connect timeouts")
            .endpoint(Endpoint::Drops, json!({}))
            .cluster(detection(&json!({"consecutive_5xx": 2})))
            .cluster(json!({"connect_timeout": "0.2s"}))
            .fold_clients(3, failing),
        Case::new("outlier: attempts of one connection count each")
            .endpoint(Endpoint::Refuses, json!({}))
            .cluster(detection(&json!({"consecutive_5xx": 3})))
            .tcp_proxy(json!({"max_connect_attempts": 3}))
            .fold_clients(2, failing),
        Case::new("outlier: the others get everything")
            .endpoint(Endpoint::Refuses, json!({}))
            .serves([Echo])
            .cluster(detection(&json!({"consecutive_5xx": 1})))
            .fold_clients(4, || {
                Client::new([write("hello"), ShutdownWrite, ReadToEnd]).after_ms(PUT_IN_FORCE)
            })
            .compare(Comparison::Distinct)
            // Who is first is drawn, and what the client has sent then too.
            .ignore(&["end", "rx", "downstream_wire_rx", "downstream_cx_rx_bytes_total"]),
        refusing("outlier: in panic everybody is used", &json!({"consecutive_5xx": 1}))
            .cluster(json!({"common_lb_config": {"healthy_panic_threshold": {"value": 50}}}))
            .fold_clients(3, failing),
        refusing(
            "outlier: an ejection ends",
            &json!({"consecutive_5xx": 1, "interval": "0.1s", "base_ejection_time": "0.6s"}),
        )
        .fold_clients(2, failing)
        .client(Client::new([ReadToEnd]).after_ms(1200)),
    ]
}

/// A cluster with one endpoint, that refuses, and without panic.
fn refusing(name: &'static str, fields: &Value) -> Case {
    Case::new(name).endpoint(Endpoint::Refuses, json!({})).cluster(detection(fields))
}

fn detection(fields: &Value) -> Value {
    let mut detection =
        json!({"max_ejection_percent": 100, "base_ejection_time": "300s", "max_ejection_time": "300s"});
    for (name, value) in fields.as_object().into_iter().flatten() {
        detection[name] = value.clone();
    }
    // Envoy would put changes of health in force up to a second later; tidegate does not merge them.
    let common = json!({"healthy_panic_threshold": {"value": 0}, "update_merge_window": "0s"});
    json!({"outlier_detection": detection, "common_lb_config": common})
}

/// A client whose connection is closed. What the one before it led to is in force when it connects.
fn failing() -> Client {
    Client::new([ReadToEnd]).after_ms(PUT_IN_FORCE)
}
