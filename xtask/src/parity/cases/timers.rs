//! Idle and duration timers.

use serde_json::json;
use tidegate_tests::script::Step::{self, Echo, Pause, Read, ReadToEnd, ShutdownWrite, WritePattern};
use tidegate_tests::script::write;

use super::super::case::{Case, Client};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("idle timeout without data")
            .serves([ReadToEnd])
            .tcp_proxy(json!({"idle_timeout": "0.3s"}))
            .does([ReadToEnd]),
        Case::new("idle timeout: bytes from the client keep it alive")
            .serves([ReadToEnd])
            .tcp_proxy(json!({"idle_timeout": "0.5s"}))
            .does(every_200_ms(6).into_iter().chain([ReadToEnd]).collect::<Vec<_>>()),
        Case::new("idle timeout: bytes from the upstream keep it alive")
            .serves(every_200_ms(6).into_iter().chain([ReadToEnd]).collect::<Vec<_>>())
            .tcp_proxy(json!({"idle_timeout": "0.5s"}))
            .does([ReadToEnd]),
        Case::new("idle timeout after a half-close")
            .serves([ReadToEnd, Pause(1500)])
            .tcp_proxy(json!({"idle_timeout": "0.3s"}))
            .does([write("hello"), ShutdownWrite, ReadToEnd]),
        Case::new("idle timeout ends a flush that nobody reads")
            .serves([Pause(2500)])
            .tcp_proxy(json!({"idle_timeout": "0.4s"}))
            .client(Client::new([WritePattern(1 << 20), Pause(100), ShutdownWrite, ReadToEnd]))
            .ignore(&[
                "upstream_wire_tx",
                "upstream_cx_tx_bytes_total",
                "rx",
                "downstream_wire_rx",
                "downstream_cx_rx_bytes_total",
            ]),
        Case::new("idle timeout off").serves([Echo]).tcp_proxy(json!({"idle_timeout": "0s"})).does([
            Pause(600),
            write("late"),
            ShutdownWrite,
            ReadToEnd,
        ]),
        Case::new("max duration")
            .serves([ReadToEnd])
            .tcp_proxy(json!({"max_downstream_connection_duration": "0.3s"}))
            .does([ReadToEnd]),
        Case::new("max duration although bytes flow")
            .serves([Echo])
            .tcp_proxy(json!({"max_downstream_connection_duration": "0.5s"}))
            .does([write("hello"), Read(5), ReadToEnd]),
        Case::new("max duration with an idle timeout that is longer")
            .serves([ReadToEnd])
            .tcp_proxy(json!({"max_downstream_connection_duration": "0.3s", "idle_timeout": "2s"}))
            .does([ReadToEnd]),
    ]
}

fn every_200_ms(times: usize) -> Vec<Step> {
    (0..times).flat_map(|_| [write("tick"), Pause(200)]).collect()
}
