//! `health_checks`: what they mean, and what is warned of and refused.

use serde_json::{Value, json};
use tidegate::config::health_check::{Check, HttpHealthCheck, ProxyProtocol, ServiceName, TcpHealthCheck};
use tidegate::config::tls::StringMatch;

use super::build::*;

const C: &str = "static_resources.clusters[0]";

fn checked(check: Value, more: Value) -> Value {
    let base = json!({"timeout": "1s", "interval": "2s", "unhealthy_threshold": 3, "healthy_threshold": 4});
    let cluster = with(cluster("c"), json!({"health_checks": [with(base, check)]}));
    bootstrap(vec![], vec![with(cluster, more)])
}

#[test]
fn tcp_health_checks_have_envoys_defaults() {
    let of = |check: Value, more: Value| {
        let bootstrap = checked(check, more);
        warned(&bootstrap, &[]);
        *load_json(&bootstrap).unwrap().bootstrap.clusters[0].health_check.clone().unwrap()
    };
    let seconds = std::time::Duration::from_secs;
    let check = of(json!({"tcp_health_check": {}}), json!({}));
    assert_eq!((check.timeout, check.unhealthy_threshold, check.healthy_threshold), (seconds(1), 3, 4));
    let it = &check.intervals;
    assert_eq!(
        (it.healthy, it.unhealthy, it.unhealthy_edge, it.healthy_edge),
        (seconds(2), seconds(2), seconds(2), seconds(2))
    );
    assert_eq!((it.no_traffic, it.no_traffic_healthy), (seconds(60), seconds(60)));
    assert!(check.reuse_connection && !check.ignore_new_hosts && !check.remove_healthy_hosts);
    let check = of(
        json!({
            "tcp_health_check": {
                "send": {"binary": "AAE="},
                "receive": [{"text": "00FF"}],
                "proxy_protocol_config": {"version": "V2"},
            },
            "unhealthy_interval": "5s",
            "no_traffic_interval": "7s",
            "reuse_connection": false,
            "event_logger": [{"name": "x", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.health_check.event_sinks.file.v3.HealthCheckEventFileSink",
                "event_log_path": "/b",
            }}],
        }),
        json!({
            "ignore_health_on_host_removal": true,
            "common_lb_config": {"ignore_new_hosts_until_first_hc": true},
        }),
    );
    let it = &check.intervals;
    assert_eq!(
        (it.healthy, it.unhealthy, it.unhealthy_edge, it.healthy_edge),
        (seconds(2), seconds(5), seconds(5), seconds(2))
    );
    assert_eq!((it.no_traffic, it.no_traffic_healthy), (seconds(7), seconds(7)));
    let tcp = TcpHealthCheck {
        send: vec![0, 1],
        receive: vec![vec![0, 255]],
        proxy_protocol: Some(ProxyProtocol::V2),
    };
    assert_eq!(check.check, Check::Tcp(tcp));
    assert_eq!(check.event_logs, [std::path::PathBuf::from("/b")]);
    assert!(!check.reuse_connection && check.ignore_new_hosts && check.remove_healthy_hosts);
}

#[test]
fn http_health_checks_have_envoys_defaults() {
    let of = |check: Value| {
        let bootstrap = checked(json!({"http_health_check": check}), json!({}));
        warned(&bootstrap, &[]);
        let check = load_json(&bootstrap).unwrap().bootstrap.clusters[0].health_check.clone().unwrap();
        let Check::Http(http) = check.check else { panic!("{check:?}") };
        *http
    };
    let path = |path: &str| path.parse().unwrap();
    let host = |host: &str| host.parse().unwrap();
    assert_eq!(of(json!({"path": "/healthz?a=b"})), HttpHealthCheck::get(host("c"), path("/healthz?a=b")));
    let http = of(json!({
        "path": "/",
        "host": "h.example",
        "method": "POST",
        "send": {"text": "4142"},
        "receive": [{"text": "43"}],
        "response_buffer_size": 0,
        "expected_statuses": [{"start": 200, "end": 300}],
        "retriable_statuses": [{"start": 500, "end": 600}],
        "codec_client_type": "HTTP2",
        "service_name_matcher": {"prefix": "x", "ignore_case": true},
        "request_headers_to_remove": ["user-agent"],
        "request_headers_to_add": [
            {"header": {"key": "x-a", "value": "1"}},
            {"header": {"key": "X-A", "value": "2"}},
            {"header": {"key": "x-a", "value": "3"}, "append_action": "ADD_IF_ABSENT"},
            {"header": {"key": "x-b", "value": "4"}, "append_action": "OVERWRITE_IF_EXISTS"},
            {"header": {"key": "x-c", "value": ""}},
            {"header": {"key": "x-d", "value": ""}, "keep_empty_value": true},
            {"header": {"key": "x-e", "value": "5"}},
            {"header": {"key": "x-e", "value": "6"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"},
        ],
    }));
    let headers: Vec<_> =
        http.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
    assert_eq!(headers, [("x-a", "1"), ("x-a", "2"), ("x-d", ""), ("x-e", "6")]);
    let pattern = StringMatch::Prefix("x".into());
    let expected = HttpHealthCheck {
        method: "POST".parse().unwrap(),
        headers: http.headers.clone(),
        send: b"AB".to_vec(),
        http2: true,
        expected: std::iter::once(200..300).collect(),
        retriable: std::iter::once(500..600).collect(),
        receive: vec![b"C".to_vec()],
        response_buffer_size: None,
        service_name: Some(ServiceName { pattern, ignore_case: true }),
        ..HttpHealthCheck::get(host("h.example"), path("/"))
    };
    assert_eq!(http, expected);
}

#[test]
fn grpc_health_checks_are_calls() {
    let bootstrap = checked(
        json!({"grpc_health_check": {
            "service_name": "a",
            "authority": "h.example",
            "initial_metadata": [{"header": {"key": "x-a", "value": "1"}}],
        }}),
        json!({}),
    );
    warned(&bootstrap, &[]);
    let check = load_json(&bootstrap).unwrap().bootstrap.clusters[0].health_check.clone().unwrap();
    let Check::Grpc(http) = check.check else { panic!("{check:?}") };
    let headers: Vec<_> =
        http.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
    let expected = [
        ("user-agent", "Envoy/HC"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("grpc-timeout", "1000m"),
        ("x-a", "1"),
    ];
    assert_eq!(headers, expected);
    assert_eq!(http.send, b"\0\0\0\0\x03\x0a\x01a");
    assert_eq!((http.method.as_str(), http.path.as_str()), ("POST", "/grpc.health.v1.Health/Check"));
    assert_eq!((http.http2, http.host.to_str().unwrap()), (true, "h.example"));
}

#[test]
fn health_checks_that_nobody_makes() {
    let path = "static_resources.clusters[0].health_checks[0]";
    let custom = json!({"custom_health_check": {"name": "x", "typed_config": {
        "@type": "type.googleapis.com/google.protobuf.Empty"}}});
    warned(
        &checked(custom, json!({})),
        &[&format!(
            "{path}.custom_health_check: parsed, not active in this version: endpoints are not checked; tcp_health_check, http_health_check and grpc_health_check are"
        )],
    );
    let by_clients =
        json!({"type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "load_assignment": null});
    warned(
        &checked(json!({"tcp_health_check": {}}), by_clients),
        &[&format!(
            "{path}: the endpoints of this cluster are not checked in this version: clients choose the endpoint"
        )],
    );
}

/// Names like those of Istio are no authorities: HTTP/2 has nothing to send then, HTTP/1 has.
#[test]
fn the_cluster_s_name_may_not_do_as_a_host() {
    let named = |check: Value| checked(check, json!({"name": "outbound|80||x"}));
    warned(&named(json!({"http_health_check": {"path": "/"}})), &[]);
    refused(
        &named(json!({"grpc_health_check": {}})),
        &format!("{C}.health_checks[0].grpc_health_check.authority"),
        "\"outbound|80||x\" can't be sent as the host (it is the cluster's name by default)",
    );
    warned(&named(json!({"grpc_health_check": {"authority": "x.example"}})), &[]);
}

#[test]
fn health_checks_that_can_not_be() {
    let path = format!("{C}.health_checks[0].tcp_health_check");
    for (send, digits) in [("zz", "zz"), ("abc", "abc"), ("4g", "4g"), ("é1", "é1")] {
        refused(
            &checked(json!({"tcp_health_check": {"send": {"text": send}}}), json!({})),
            &format!("{path}.send.text"),
            &format!("invalid hex string '{digits}'"),
        );
    }
    refused(
        &checked(json!({"tcp_health_check": {"receive": [{"text": "41"}, {"text": "x"}]}}), json!({})),
        &format!("{path}.receive[1].text"),
        "invalid hex string 'x'",
    );
    let path = format!("{C}.health_checks[0].http_health_check");
    let header = |key: &str, value: &str| json!({"request_headers_to_add": [{"header": {"key": key, "value": value}}]});
    for (fields, field, reason) in [
        (json!({"path": "a b"}), "path", "\"a b\" is not a path"),
        (json!({"method": "CONNECT"}), "method", "must not be 6"),
        (
            json!({"codec_client_type": "HTTP3"}),
            "codec_client_type",
            "HTTP/3 is not supported; use HTTP1 or HTTP2",
        ),
        (
            json!({"codec_client_type": "HTTP2", "host": "a b"}),
            "host",
            "\"a b\" can't be sent as the host (it is the cluster's name by default)",
        ),
        (
            json!({"expected_statuses": [{"start": 300, "end": 300}]}),
            "expected_statuses[0]",
            "no range of statuses: 300 to below 300; they are 100 to below 600",
        ),
        (
            json!({"retriable_statuses": [{"start": 500, "end": 700}]}),
            "retriable_statuses[0]",
            "no range of statuses: 500 to below 700; they are 100 to below 600",
        ),
        (
            header("host", "a"),
            "request_headers_to_add[0].header.key",
            "\"host\" is not a header that can be added",
        ),
        (
            header("x-a", "%START_TIME%"),
            "request_headers_to_add[0].header.value",
            "command operators (%…%) are not supported here in this version; write the value itself",
        ),
        (
            json!({"service_name_matcher": {"safe_regex": {"regex": "a"}}}),
            "service_name_matcher",
            "not supported in this version; use exact, prefix, suffix or contains",
        ),
    ] {
        let check = with(json!({"path": "/"}), fields);
        refused(&checked(json!({"http_health_check": check}), json!({})), &format!("{path}.{field}"), reason);
    }
    let one = checked(json!({"tcp_health_check": {}}), json!({}));
    let one = one["static_resources"]["clusters"][0]["health_checks"][0].clone();
    refused(
        &bootstrap(vec![], vec![with(cluster("c"), json!({"health_checks": [one, one]}))]),
        &format!("{C}.health_checks"),
        "a cluster has one health check at most in this version; keep one of them",
    );
    let sink =
        json!({"name": "x", "typed_config": {"@type": "type.googleapis.com/envoy.config.core.v3.Node"}});
    refused(
        &checked(json!({"tcp_health_check": {}, "event_logger": [sink]}), json!({})),
        &format!("{C}.health_checks[0].event_logger[0].typed_config"),
        "Didn't find a registered implementation for 'x' with type URL: 'envoy.config.core.v3.Node'",
    );
    let named = json!({"health_check_config": {"address": address("nope", 1)}});
    let endpoint = json!({"endpoint": with(endpoint("127.0.0.1")["endpoint"].clone(), named)});
    refused(
        &bootstrap(vec![], vec![with(cluster("c"), json!({"load_assignment": assignment(vec![endpoint])}))]),
        &format!("{C}.load_assignment.endpoints[0].lb_endpoints[0].endpoint.health_check_config.address"),
        "malformed IP address: nope",
    );
}
