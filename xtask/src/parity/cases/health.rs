//! Active health checks and outlier detection: who is used, who is ejected, and what clients, stats and `/clusters` show of it.

use serde_json::{Value, json};
use tidegate_tests::script::Step::{Echo, Read, ReadToEnd, ShutdownWrite};
use tidegate_tests::script::write;

use super::super::case::{Case, Client, Comparison, Endpoint};

/// What was detected is put in force by another thread than the one that detected it.
const PUT_IN_FORCE: u64 = 200;

pub(super) fn cases() -> Vec<Case> {
    outliers().into_iter().chain(checks()).chain(http_checks()).chain(localities()).collect()
}

fn outliers() -> Vec<Case> {
    vec![
        refusing("outlier: five refused connects in a row eject", &json!({})).fold_clients(6, failing),
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
        .client(Client::new([ReadToEnd]).after_ms(1200))
        // The last client ejects it again. Whether that is over when the stats are read depends on how long the other cases
        // took; that there were two ejections does not.
        .ignore(&["membership_healthy", "outlier_detection.ejections_active", "health_flags"]),
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

/// How often and when checks are made is nobody's business.
const TIMES: [&str; 4] =
    ["health_check.attempt", "health_check.failure", "health_check.network_failure", "health_check.success"];

fn checks() -> Vec<Case> {
    let ask = || [write("hello"), ShutdownWrite, ReadToEnd];
    let other_port = |port: u32| json!({"endpoint": {"health_check_config": {"port_value": port}}});
    vec![
        checked("check: nobody listens", &json!({"tcp_health_check": {}}))
            .endpoint(Endpoint::Refuses, json!({}))
            .does([ReadToEnd]),
        checked("check: somebody listens", &json!({"tcp_health_check": {}})).serves([Echo]).does(ask()),
        checked("check: no answer", &json!({"timeout": "0.1s", "tcp_health_check": {}}))
            .endpoint(Endpoint::Drops, json!({}))
            .does([ReadToEnd]),
        checked("check: the answer is right",
            &json!({"tcp_health_check": {"send": {"text": "414243"}, "receive": [{"text": "41"}, {"text": "43"}]}}))
            .serves([Echo])
            .does(ask()),
        checked("check: the answer is another",
            &json!({"timeout": "0.1s",
                    "tcp_health_check": {"send": {"text": "414243"}, "receive": [{"text": "43"}, {"text": "41"}]}}))
            .serves([Echo])
            .does(ask()),
        checked("check: the healthy one gets everything", &json!({"tcp_health_check": {}}))
            .endpoint(Endpoint::Refuses, json!({}))
            .serves([Echo])
            .fold_clients(4, || Client::new([write("hello"), ShutdownWrite, ReadToEnd])),
        checked("check: in panic all are used", &json!({"tcp_health_check": {}}))
            .cluster(json!({"common_lb_config": {"healthy_panic_threshold": {"value": 50}}}))
            .endpoint(Endpoint::Refuses, json!({}))
            .does([ReadToEnd]),
        checked("check: at another port", &json!({"tcp_health_check": {}}))
            .endpoint(Endpoint::Serves(vec![Echo]), other_port(9))
            .does([ReadToEnd]),
        checked("check: an endpoint that is not checked", &json!({"tcp_health_check": {}}))
            .endpoint(
                Endpoint::Refuses,
                json!({"endpoint": {"health_check_config": {"disable_active_health_check": true}}}),
            )
            .does([ReadToEnd]),
        checked("check: an endpoint that the control plane calls unhealthy", &json!({"tcp_health_check": {}}))
            .endpoint(Endpoint::Serves(vec![Echo]), json!({"health_status": "UNHEALTHY"}))
            .does([ReadToEnd]),
    ]
}

/// Checks over HTTP. The endpoint answers whatever it is sent with this response, and then waits for the end: so each check has a connection
/// of its own, and clients get the response too.
fn http_checks() -> Vec<Case> {
    let asking = |name, status: &str, headers: &str, fields: &Value| {
        let mut http = json!({"path": "/healthz"});
        for (name, value) in fields.as_object().into_iter().flatten() {
            http[name] = value.clone();
        }
        let response = format!("HTTP/1.1 {status}\r\n{headers}content-length: 5\r\n\r\nhello");
        checked(name, &json!({"reuse_connection": false, "http_health_check": http}))
            .serves([Read(1), write(&response), ReadToEnd])
            .does([write("x"), ShutdownWrite, ReadToEnd])
    };
    let ok = "200 OK";
    vec![
        asking("check: HTTP says 200", ok, "", &json!({})),
        asking("check: HTTP says 503", "503 Service Unavailable", "", &json!({})),
        asking("check: HTTP says 201", "201 Created", "", &json!({})),
        asking(
            "check: HTTP says 201, as it should",
            "201 Created",
            "",
            &json!({"expected_statuses": [{"start": 200, "end": 205}]}),
        ),
        asking(
            "check: HTTP says 503, which may pass",
            "503 Service Unavailable",
            "",
            &json!({"retriable_statuses": [{"start": 500, "end": 600}]}),
        ),
        asking("check: HTTP says degraded", ok, "x-envoy-degraded: 1\r\n", &json!({})),
        asking(
            "check: HTTP with the right body",
            ok,
            "",
            &json!({"receive": [{"text": "656c"}, {"text": "6f"}]}),
        ),
        asking(
            "check: HTTP with another body",
            ok,
            "",
            &json!({"receive": [{"text": "6f"}, {"text": "65"}]}),
        ),
        asking(
            "check: HTTP looks at the first bytes only",
            ok,
            "",
            &json!({"receive": [{"text": "6f"}], "response_buffer_size": 4}),
        ),
        asking(
            "check: HTTP of the right service",
            ok,
            "x-envoy-upstream-healthchecked-cluster: foo-1\r\n",
            &json!({"service_name_matcher": {"prefix": "foo"}}),
        ),
        asking(
            "check: HTTP of another service",
            ok,
            "x-envoy-upstream-healthchecked-cluster: bar\r\n",
            &json!({"service_name_matcher": {"prefix": "foo"}}),
        ),
        asking(
            "check: HTTP/2 of a server that speaks HTTP/1",
            ok,
            "",
            &json!({"codec_client_type": "HTTP2"}),
        ),
        checked("check: what answers is not HTTP", &json!({"http_health_check": {"path": "/"}}))
            .serves([Echo])
            .does([ReadToEnd]),
        checked(
            "check: HTTP without an answer",
            &json!({"timeout": "0.1s", "http_health_check": {"path": "/"}}),
        )
        .serves([ReadToEnd])
        .does([ReadToEnd]),
    ]
    .into_iter()
    .map(|case| case.ignore(&["health_check.verify_cluster"]))
    .collect()
}

/// A cluster whose endpoints are checked often, without panic.
fn checked(name: &'static str, fields: &Value) -> Case {
    let mut check = json!({
        "timeout": "2s",
        "interval": "0.2s",
        "no_traffic_interval": "0.2s",
        "unhealthy_threshold": 2,
        "healthy_threshold": 2,
    });
    for (name, value) in fields.as_object().into_iter().flatten() {
        check[name] = value.clone();
    }
    let common = json!({"healthy_panic_threshold": {"value": 0}, "update_merge_window": "0s"});
    Case::new(name)
        .cluster(json!({"health_checks": [check], "common_lb_config": common}))
        .ignore(&TIMES)
        // What checks say there, between clients.
        .ignore(&["endpoint 0", "endpoint 1"])
}

fn localities() -> Vec<Case> {
    let in_zone = |zone: &str, weight: u32, more: Value| {
        let mut fields = json!({"group": {"locality": {"zone": zone}, "load_balancing_weight": weight}});
        if let (Some(fields), Value::Object(more)) = (fields.as_object_mut(), more) {
            fields.extend(more);
        }
        fields
    };
    let weighted = |name| {
        Case::new(name)
            .cluster(json!({"common_lb_config": {"locality_weighted_lb_config": {}}}))
            .compare(Comparison::Shares)
    };
    let ask = || Client::new([write("hello"), ShutdownWrite, ReadToEnd]);
    let serves = || Endpoint::Serves(vec![Echo]);
    vec![
        weighted("localities: shares by weight")
            .endpoint(serves(), in_zone("a", 3, json!({})))
            .endpoint(serves(), in_zone("b", 1, json!({})))
            .fold_clients(8, ask),
        weighted("localities: one without a weight gets nothing")
            .endpoint(serves(), json!({"group": {"locality": {"zone": "a"}}}))
            .endpoint(serves(), in_zone("b", 1, json!({})))
            .fold_clients(4, ask),
        weighted("localities: no weights at all")
            .endpoint(serves(), json!({"group": {"locality": {"zone": "a"}}}))
            .endpoint(serves(), json!({"group": {"locality": {"zone": "b"}}}))
            .fold_clients(4, ask),
        weighted("localities: a sick one makes room")
            .endpoint(serves(), in_zone("a", 3, json!({"health_status": "UNHEALTHY"})))
            .endpoint(serves(), in_zone("b", 1, json!({})))
            .fold_clients(4, ask),
    ]
}
