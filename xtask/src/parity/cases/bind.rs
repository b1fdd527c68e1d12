//! `upstream_bind_config`: where upstream connections come from, and socket options by number.

use serde_json::{Value, json};
use tidegate_tests::script::Step::{Echo, ReadToEnd, ShutdownWrite};
use tidegate_tests::script::write;

use super::super::case::{Case, Endpoint};

/// No address of the namespace; there is a route to it, on which nobody answers.
const ABSENT: &str = "172.16.9.9";

/// An option that no kernel has.
fn unknown(fields: &Value) -> Value {
    let mut option = json!({"level": 1, "name": 9999, "int_value": 1});
    for (name, value) in fields.as_object().into_iter().flatten() {
        option[name] = value.clone();
    }
    option
}

pub(super) fn cases() -> Vec<Case> {
    let address = |address: &str| json!({"address": address, "port_value": 0});
    let asks = |name, bind: Value| {
        Case::new(name).serves([Echo]).cluster(json!({"upstream_bind_config": bind})).does([
            write("hello"),
            ShutdownWrite,
            ReadToEnd,
        ])
    };
    // Whether what the client has sent is read before the connection is closed is a race inside either proxy.
    let fails = |name, bind: Value| {
        Case::new(name).serves([Echo]).cluster(json!({"upstream_bind_config": bind})).does([ReadToEnd])
    };
    vec![
        asks("bind: a source address", json!({"source_address": address("127.0.0.7")})),
        fails("bind fails: an address that is not there", json!({"source_address": address(ABSENT)})),
        fails(
            "bind fails: an address that is not there, 2 attempts",
            json!({"source_address": address(ABSENT)}),
        )
        .tcp_proxy(json!({"max_connect_attempts": 2})),
        fails(
            "bind: freebind to an address that is not there",
            json!({"source_address": address(ABSENT), "freebind": true}),
        )
        .cluster(json!({"connect_timeout": "0.3s"})),
        asks(
            "bind: the source of the endpoint's family",
            json!({
                "source_address": address("fd00:9::9"),
                "extra_source_addresses": [{"address": address("127.0.0.8")}],
            }),
        ),
        fails("bind fails: a source of the other family", json!({"source_address": address("fd00:9::9")})),
        Case::new("bind: nobody listens")
            .endpoint(Endpoint::Refuses, json!({}))
            .cluster(json!({"upstream_bind_config": {"source_address": address("127.0.0.7")}}))
            .does([ReadToEnd]),
        asks("bind: an option", json!({"socket_options": [{"level": 1, "name": 9, "int_value": 1}]})),
        fails(
            "bind fails: an option that the kernel refuses",
            json!({"socket_options": [unknown(&json!({}))]}),
        ),
        asks(
            "bind: options for other sockets",
            json!({"socket_options": [
                unknown(&json!({"type": {"datagram": {}}})),
                unknown(&json!({"ip_version": "SOCKET_IP_VERSION_IPV6"})),
                unknown(&json!({"state": "STATE_LISTENING"})),
            ]}),
        ),
        asks(
            "bind: an option for bound sockets",
            json!({"source_address": address("127.0.0.7"), "socket_options": [unknown(&json!({"state": "STATE_BOUND"}))]}),
        ),
        asks(
            "bind: a source with options of its own",
            json!({
                "source_address": address("fd00:9::9"),
                "extra_source_addresses": [{"address": address("127.0.0.8"), "socket_options": {}}],
                "socket_options": [unknown(&json!({}))],
            }),
        ),
        asks("a listener with an option", json!({})).listener(json!({"socket_options": [
            {"level": 1, "name": 9, "int_value": 1},
            unknown(&json!({"type": {"datagram": {}}})),
            {"level": 6, "name": 18, "buf_value": "6AMAAA==", "state": "STATE_LISTENING"},
        ]})),
    ]
}
