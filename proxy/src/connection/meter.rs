//! What one connection has moved, and which stats count it. Stats are brought up to date when somebody looks, and at
//! the end: a byte costs no atomic operation.

use std::cell::Cell;

use crate::pump::{Counters, Side};
use crate::stats::{ClusterStats, HttpStats, PumpStats, TcpProxyStats};

/// The counters of an established connection, and where they are added up.
#[derive(Debug)]
pub struct Meter {
    /// Written by the pump.
    pub counters: Counters,
    into: Into,
    seen: Seen,
    /// Counted in `upstream_flush_active`.
    flushing: Cell<bool>,
}

/// The stats that count the connection's bytes.
#[derive(Debug)]
pub struct Into {
    /// Of the tcp_proxy filter.
    pub tcp: TcpProxyStats,
    /// Of the HTTP connection manager, where that is what the listener has.
    pub http: Option<HttpStats>,
    /// Of the cluster.
    pub cluster: ClusterStats,
    /// Of the process.
    pub pump: PumpStats,
}

/// What has been added already.
#[derive(Debug, Default)]
struct Seen {
    downstream: SeenDirection,
    upstream: SeenDirection,
    copied: Cell<u64>,
    spliced: Cell<u64>,
}

#[derive(Debug, Default)]
struct SeenDirection {
    received: Cell<u64>,
    sent: Cell<u64>,
    buffered: Cell<u64>,
    paused: Cell<u32>,
    resumed: Cell<u32>,
    to_splice: Cell<u32>,
    to_copy: Cell<u32>,
}

impl Meter {
    /// Starts at nothing.
    pub fn new(into: Into) -> Self {
        Self { counters: Counters::default(), into, seen: Seen::default(), flushing: Cell::new(false) }
    }

    /// Counts the flush to the upstream once it has begun. Called after every step of the pump, so that the gauge is
    /// right at any time.
    pub fn note_flush(&self) {
        if self.counters.flushed.get() == Some(Side::Upstream) && !self.flushing.replace(true) {
            self.into.tcp.upstream_flush_total().inc();
            self.into.tcp.upstream_flush_active().add(1);
        }
    }

    /// Adds what has moved since the last time.
    pub fn flush(&self) {
        let Self { counters, into, seen, .. } = self;
        let (down, up) = (&counters.downstream, &counters.upstream);
        let received = news(&down.received, &seen.downstream.received);
        let returned = news(&up.sent, &seen.upstream.sent);
        into.tcp.downstream_cx_rx_bytes_total().add(received);
        into.tcp.downstream_cx_tx_bytes_total().add(returned);
        if let Some(http) = &into.http {
            http.downstream_cx_rx_bytes_total().add(received);
            http.downstream_cx_tx_bytes_total().add(returned);
        }
        into.cluster.upstream_cx_tx_bytes_total().add(news(&down.sent, &seen.downstream.sent));
        into.cluster.upstream_cx_rx_bytes_total().add(news(&up.received, &seen.upstream.received));
        self.flush_flow_control();
        into.pump.bytes_copied().add(news(&counters.copied, &seen.copied));
        into.pump.bytes_spliced().add(news(&counters.spliced, &seen.spliced));
        for (direction, seen) in [(down, &seen.downstream), (up, &seen.upstream)] {
            into.pump.switches_to_splice().add(more(&direction.to_splice, &seen.to_splice));
            into.pump.switches_to_copy().add(more(&direction.to_copy, &seen.to_copy));
        }
    }

    /// Reading from a side pauses while the other takes no more.
    fn flush_flow_control(&self) {
        let Self { counters, into, seen, .. } = self;
        let (down, up) = (&counters.downstream, &counters.upstream);
        let paused = more(&down.paused, &seen.downstream.paused);
        let resumed = more(&down.resumed, &seen.downstream.resumed);
        into.tcp.downstream_flow_control_paused_reading_total().add(paused);
        into.tcp.downstream_flow_control_resumed_reading_total().add(resumed);
        into.cluster.upstream_flow_control_backed_up_total().add(paused);
        into.cluster.upstream_flow_control_drained_total().add(resumed);
        let cluster = &into.cluster;
        cluster.upstream_flow_control_paused_reading_total().add(more(&up.paused, &seen.upstream.paused));
        cluster.upstream_flow_control_resumed_reading_total().add(more(&up.resumed, &seen.upstream.resumed));
        let to_upstream = change(down.buffered(), &seen.downstream.buffered);
        let to_downstream = change(up.buffered(), &seen.upstream.buffered);
        for (gauge, change) in [
            (into.tcp.downstream_cx_rx_bytes_buffered(), to_upstream),
            (into.cluster.upstream_cx_tx_bytes_buffered(), to_upstream),
            (into.tcp.downstream_cx_tx_bytes_buffered(), to_downstream),
            (into.cluster.upstream_cx_rx_bytes_buffered(), to_downstream),
        ] {
            if change < 0 { gauge.sub(change.unsigned_abs()) } else { gauge.add(change.unsigned_abs()) }
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if self.flushing.get() {
            self.into.tcp.upstream_flush_active().sub(1);
        }
        // What is still held goes with the connection.
        for direction in [&self.counters.downstream, &self.counters.upstream] {
            direction.discarded.set(direction.discarded.get() + direction.buffered());
        }
        self.flush();
    }
}

/// How much a counter has grown since it was last seen.
fn news(counter: &Cell<u64>, seen: &Cell<u64>) -> u64 {
    counter.get() - seen.replace(counter.get())
}

/// The same for a counter that wraps.
fn more(counter: &Cell<u32>, seen: &Cell<u32>) -> u64 {
    counter.get().wrapping_sub(seen.replace(counter.get())).into()
}

fn change(now: u64, seen: &Cell<u64>) -> i64 {
    now as i64 - seen.replace(now) as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Stats;

    #[test]
    fn a_flush_is_active_until_the_end() {
        let stats = Stats::new(1);
        let tcp = stats.tcp_proxy("t");
        let into =
            Into { tcp: tcp.clone(), http: None, cluster: stats.cluster("c"), pump: stats.pump().clone() };
        let meter = Meter::new(into);
        meter.note_flush();
        assert_eq!(tcp.upstream_flush_active().value(), 0);
        meter.counters.flushed.set(Some(Side::Upstream));
        meter.note_flush();
        meter.note_flush();
        assert_eq!((tcp.upstream_flush_active().value(), tcp.upstream_flush_total().value()), (1, 1));
        drop(meter);
        assert_eq!((tcp.upstream_flush_active().value(), tcp.upstream_flush_total().value()), (0, 1));
    }

    #[test]
    fn bytes_are_added_once_and_gauges_return_to_zero() {
        let stats = Stats::new(1);
        let (tcp, cluster) = (stats.tcp_proxy("t"), stats.cluster("c"));
        let into =
            Into { tcp: tcp.clone(), http: None, cluster: cluster.clone(), pump: stats.pump().clone() };
        let meter = Meter::new(into);
        meter.counters.downstream.received.set(100);
        meter.counters.downstream.sent.set(60);
        meter.flush();
        meter.flush();
        assert_eq!(tcp.downstream_cx_rx_bytes_total().value(), 100);
        assert_eq!(cluster.upstream_cx_tx_bytes_total().value(), 60);
        assert_eq!(tcp.downstream_cx_rx_bytes_buffered().value(), 40);
        meter.counters.downstream.sent.set(70);
        drop(meter);
        assert_eq!(cluster.upstream_cx_tx_bytes_total().value(), 70);
        assert_eq!(tcp.downstream_cx_rx_bytes_buffered().value(), 0);
        assert_eq!(cluster.upstream_cx_tx_bytes_buffered().value(), 0);
    }
}
