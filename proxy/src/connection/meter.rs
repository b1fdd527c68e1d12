//! What one connection has moved, and which stats count it. Stats are brought up to date when somebody looks, and at
//! the end: a byte costs no atomic operation.

use std::cell::{Cell, OnceCell};

use crate::pump::{Counters, Direction, Side};
use crate::stats::{ClusterStats, HttpStats, PumpStats, TcpProxyStats};

/// The counters of an established connection, and where they are added up.
#[derive(Debug)]
pub struct Meter {
    /// Written by the pump.
    pub counters: Counters,
    into: Into,
    seen: Seen,
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
    spliced: Cell<u64>,
    /// Of both directions, once one has [events](Direction::events).
    events: OnceCell<Box<[SeenEvents; 2]>>,
}

#[derive(Debug, Default)]
struct SeenDirection {
    received: Cell<u64>,
    sent: Cell<u64>,
}

#[derive(Debug, Default)]
struct SeenEvents {
    discarded: Cell<u64>,
    paused: Cell<u32>,
    resumed: Cell<u32>,
    to_splice: Cell<u32>,
    to_copy: Cell<u32>,
}

impl Meter {
    /// Starts at nothing.
    pub fn new(into: Into) -> Self {
        Self { counters: Counters::default(), into, seen: Seen::default() }
    }

    /// Counts the flush to the upstream once it has begun. Called after every step of the pump, so that the gauge is
    /// right at any time.
    pub fn note_flush(&self) {
        let Counters { flushed, flush_counted, .. } = &self.counters;
        if flushed.get() == Some(Side::Upstream) && !flush_counted.replace(true) {
            self.into.tcp.upstream_flush_total().inc();
            self.into.tcp.upstream_flush_active().add(1);
        }
    }

    /// Adds what has moved since the last time.
    pub fn flush(&self) {
        let Self { counters, into, seen, .. } = self;
        let (down, up) = (&counters.downstream, &counters.upstream);
        let [from_downstream, to_upstream] = seen.downstream.catch_up(down);
        let [from_upstream, to_downstream] = seen.upstream.catch_up(up);
        into.tcp.downstream_cx_rx_bytes_total().add(from_downstream);
        into.tcp.downstream_cx_tx_bytes_total().add(to_downstream);
        if let Some(http) = &into.http {
            http.downstream_cx_rx_bytes_total().add(from_downstream);
            http.downstream_cx_tx_bytes_total().add(to_downstream);
        }
        into.cluster.upstream_cx_tx_bytes_total().add(to_upstream);
        into.cluster.upstream_cx_rx_bytes_total().add(from_upstream);
        // What is delivered was copied or spliced.
        let spliced = news(&counters.spliced, &seen.spliced);
        into.pump.bytes_copied().add(to_upstream + to_downstream - spliced);
        into.pump.bytes_spliced().add(spliced);
        let [down_discarded, up_discarded] = self.flush_events();
        let to_upstream = change(from_downstream, to_upstream + down_discarded);
        let to_downstream = change(from_upstream, to_downstream + up_discarded);
        for (gauge, change) in [
            (into.tcp.downstream_cx_rx_bytes_buffered(), to_upstream),
            (into.cluster.upstream_cx_tx_bytes_buffered(), to_upstream),
            (into.tcp.downstream_cx_tx_bytes_buffered(), to_downstream),
            (into.cluster.upstream_cx_rx_bytes_buffered(), to_downstream),
        ] {
            if change < 0 { gauge.sub(change.unsigned_abs()) } else { gauge.add(change.unsigned_abs()) }
        }
    }

    /// Adds what happens to few connections. Returns how many bytes were discarded, by direction.
    fn flush_events(&self) -> [u64; 2] {
        let Self { counters, into, seen, .. } = self;
        let (down, up) = (counters.downstream.events(), counters.upstream.events());
        if down.is_none() && up.is_none() {
            return [0; 2];
        }
        let [seen_down, seen_up] = &**seen.events.get_or_init(Box::default);
        // Reading from a side pauses while the other takes no more.
        if let Some(down) = down {
            let paused = more(&down.paused, &seen_down.paused);
            let resumed = more(&down.resumed, &seen_down.resumed);
            into.tcp.downstream_flow_control_paused_reading_total().add(paused);
            into.tcp.downstream_flow_control_resumed_reading_total().add(resumed);
            into.cluster.upstream_flow_control_backed_up_total().add(paused);
            into.cluster.upstream_flow_control_drained_total().add(resumed);
        }
        if let Some(up) = up {
            let cluster = &into.cluster;
            cluster.upstream_flow_control_paused_reading_total().add(more(&up.paused, &seen_up.paused));
            cluster.upstream_flow_control_resumed_reading_total().add(more(&up.resumed, &seen_up.resumed));
        }
        [(down, seen_down), (up, seen_up)].map(|(events, seen)| {
            let Some(events) = events else { return 0 };
            into.pump.switches_to_splice().add(more(&events.to_splice, &seen.to_splice));
            into.pump.switches_to_copy().add(more(&events.to_copy, &seen.to_copy));
            news(&events.discarded, &seen.discarded)
        })
    }
}

impl SeenDirection {
    /// What has been received and sent since the last time.
    fn catch_up(&self, direction: &Direction) -> [u64; 2] {
        [news(&direction.received, &self.received), news(&direction.sent, &self.sent)]
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if self.counters.flush_counted.get() {
            self.into.tcp.upstream_flush_active().sub(1);
        }
        // What is still held goes with the connection.
        for direction in [&self.counters.downstream, &self.counters.upstream] {
            direction.discard(direction.buffered());
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

/// By how much something has grown that bytes come into and go out of.
fn change(came: u64, went: u64) -> i64 {
    came as i64 - went as i64
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
