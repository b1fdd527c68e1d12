//! Which access log entries are written, and when.

use serde_json::{Value, json};
use tidegate_tests::script::Step::{Echo, Pause, Read, ReadToEnd, ShutdownWrite};
use tidegate_tests::script::write;

use super::super::case::{Case, Endpoint, access_log};

pub(super) fn cases() -> Vec<Case> {
    let ask = || [write("hello"), ShutdownWrite, ReadToEnd];
    vec![
        Case::new("entries at start, when connected, and at the end")
            .serves([Echo])
            .tcp_proxy(json!({"access_log_options": {
                "flush_access_log_on_start": true, "flush_access_log_on_connected": true,
            }}))
            .does(ask()),
        Case::new("periodic entries")
            .serves([Echo])
            .tcp_proxy(json!({"access_log_options": {"access_log_flush_interval": "0.4s"}}))
            .does([write("hello"), Read(5), Pause(1000), ShutdownWrite, ReadToEnd]),
        filtered("filter: these response flags", json!({"response_flag_filter": {"flags": ["UF", "UH"]}})),
        filtered("filter: other response flags", json!({"response_flag_filter": {"flags": ["NR"]}})),
        filtered("filter: any response flag", json!({"response_flag_filter": {}})),
        filtered(
            "filter: and, or",
            json!({"or_filter": {"filters": [
                {"and_filter": {"filters": [
                    {"response_flag_filter": {"flags": ["UF"]}}, {"response_flag_filter": {"flags": ["NR"]}},
                ]}},
                {"response_flag_filter": {"flags": ["URX"]}},
            ]}}),
        ),
        filtered("filter: log type", json!({"log_type_filter": {"types": ["TcpConnectionEnd"]}})),
        filtered(
            "filter: log type, excluded",
            json!({"log_type_filter": {"types": ["TcpConnectionEnd"], "exclude": true}}),
        ),
        filtered(
            "filter: duration",
            json!({"duration_filter": {"comparison": {"op": "GE", "value": {"default_value": 60_000, "runtime_key": "unset"}}}}),
        ),
        text(
            "a text format",
            "%RESPONSE_FLAGS%|%BYTES_RECEIVED%|%BYTES_SENT%|%UPSTREAM_CLUSTER%|%DOWNSTREAM_LOCAL_ADDRESS%|%REQ(X)%|%DYNAMIC_METADATA(a:b)%|%FILTER_STATE(a)%|%%|%UPSTREAM_METADATA(a:b)%\n",
            false,
        ),
        text(
            "a text format that omits empty values",
            "<%RESPONSE_FLAGS%|%BYTES_RECEIVED%|%ROUTE_NAME%|%REQUESTED_SERVER_NAME%>\n",
            true,
        ),
    ]
}

/// A connection that is refused (UF,URX); the log has a filter.
fn filtered(name: &'static str, filter: Value) -> Case {
    let mut log = access_log("@CASE@.log");
    log["filter"] = filter;
    Case::new(name)
        .endpoint(Endpoint::Refuses, json!({}))
        .tcp_proxy(json!({"access_log": [log]}))
        .does([ReadToEnd])
}

fn text(name: &'static str, format: &str, omit_empty_values: bool) -> Case {
    let mut log = access_log("@CASE@.log");
    log["typed_config"]["log_format"] = json!({
        "text_format_source": {"inline_string": format}, "omit_empty_values": omit_empty_values,
    });
    Case::new(name).serves([Echo]).tcp_proxy(json!({"access_log": [log]})).does([
        write("hello"),
        ShutdownWrite,
        ReadToEnd,
    ])
}
