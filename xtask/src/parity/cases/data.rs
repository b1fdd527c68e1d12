//! Bytes, FIN and RST in both directions.

use serde_json::json;
use tidegate_tests::script::Step::{
    self, Echo, Pause, Read, ReadSlowly, ReadToEnd, Reset, ShutdownWrite, Write, WriteBytewise, WritePattern,
};
use tidegate_tests::script::write;

use super::super::case::Case;

const MIB: u64 = 1 << 20;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("client half-closes, upstream echoes and closes").serves([Echo]).does([
            write("hello"),
            ShutdownWrite,
            ReadToEnd,
        ]),
        Case::new("upstream half-closes first, client goes on sending")
            .serves([write("bye"), ShutdownWrite, ReadToEnd])
            .does([ReadToEnd, WritePattern(2000), Pause(100), ShutdownWrite]),
        Case::new("client resets").serves([ReadToEnd]).does([write("hello"), Pause(200), Reset]),
        Case::new("upstream resets").serves([Read(5), Pause(100), Reset]).does([write("hello"), ReadToEnd]),
        Case::new("upstream sends, then resets")
            .serves([WritePattern(1000), Pause(300), Reset])
            .does([Read(1000), ReadToEnd]),
        Case::new("client resets while upstream is silent after its FIN")
            .serves([ShutdownWrite, ReadToEnd])
            .does([ReadToEnd, write("x"), Pause(200), Reset]),
        Case::new("upstream resets after the client's FIN").serves([ReadToEnd, Pause(100), Reset]).does([
            write("hello"),
            ShutdownWrite,
            ReadToEnd,
        ]),
        Case::new("server speaks first").serves([write("220 ready\r\n"), Echo]).does([
            Read(11),
            write("quit"),
            ShutdownWrite,
            ReadToEnd,
        ]),
        Case::new("upstream writes and closes at once")
            .serves([write("hello"), ShutdownWrite, ReadToEnd])
            .does([ReadToEnd, ShutdownWrite]),
        Case::new("client writes and half-closes, upstream says nothing").serves([ReadToEnd]).does([
            write("0123456789"),
            ShutdownWrite,
            ReadToEnd,
        ]),
        Case::new("no data at all").serves([ReadToEnd]).does([ShutdownWrite, ReadToEnd]),
        Case::new("4 MiB to the client, then 4 MiB to the upstream")
            .serves([WritePattern(4 * MIB), ShutdownWrite, ReadToEnd])
            .does([ReadToEnd, WritePattern(4 * MIB), ShutdownWrite])
            // Whether the client is done before or after the last byte has left the proxy.
            .ignore(&["upstream_flush_total"]),
        Case::new("one byte at a time").serves([Echo]).does([
            WriteBytewise(b"the quick brown fox jumps over the lazy dog".to_vec()),
            ShutdownWrite,
            ReadToEnd,
        ]),
        Case::new("client reads late: 8 MiB and a FIN wait in between")
            .serves([WritePattern(8 * MIB), ShutdownWrite, ReadToEnd])
            .listener(json!({"per_connection_buffer_limit_bytes": 65_536}))
            .does([Pause(400), ReadToEnd, ShutdownWrite]),
        Case::new("upstream reads late: 8 MiB and a FIN wait in between")
            .serves([Pause(400), ReadToEnd])
            .cluster(json!({"per_connection_buffer_limit_bytes": 65_536}))
            .does([WritePattern(8 * MIB), ShutdownWrite, ReadToEnd]),
        Case::new("client closes with 2 MiB on their way to a slow upstream")
            .serves([Pause(500), ReadToEnd])
            .does([WritePattern(2 * MIB)]),
        Case::new("upstream reads slowly").serves([ReadSlowly(64 << 10)]).does([
            WritePattern(MIB),
            ShutdownWrite,
            ReadToEnd,
        ]),
        Case::new("client reads slowly")
            .serves([WritePattern(MIB), ShutdownWrite, ReadToEnd])
            .does([ReadSlowly(64 << 10), ShutdownWrite]),
        Case::new("ping-pong 20 times").serves(ping_pong(false)).does(ping_pong(true)),
    ]
}

/// Twenty round trips of 64 bytes, then the client's FIN.
fn ping_pong(client: bool) -> Vec<Step> {
    let message = || Write(vec![b'x'; 64]);
    let round = |_| if client { [message(), Read(64)] } else { [Read(64), message()] };
    let end = if client { vec![ShutdownWrite, ReadToEnd] } else { vec![ReadToEnd] };
    (0..20).flat_map(round).chain(end).collect()
}
