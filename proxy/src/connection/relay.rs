//! The relay of one connection: from the moment when both ends stand to its log line.

use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use socket2::Socket;

use super::meter::{self, Meter};
use super::record::{Kept, LogType, Record};
use super::{Admission, Connection};
use crate::cluster::connect::{ClosedBy, UpstreamGuard};
use crate::drain::{Ending, Open};
use crate::intercept::Capture;
use crate::listener::TcpProxy;
use crate::pump::{self, Cause, Outcome, Side};
use crate::uring::{PendingHangUp, time};
use crate::worker::Worker;

/// A connection whose both ends stand, and as little else as there can be: this is what idle ones take.
pub(super) struct Parked {
    pub(super) downstream: Socket,
    pub(super) upstream: Socket,
    pub(super) guard: UpstreamGuard,
    pub(super) capture: Option<Arc<Capture>>,
    pub(super) admission: Admission,
    pub(super) proxy: Arc<TcpProxy>,
    pub(super) kept: Kept,
    pub(super) rare: Option<Box<Rare>>,
}

/// Bytes are moving.
struct Relaying<'a> {
    connection: &'a Parked,
    open: &'a Open,
    running: pump::Running<'a>,
    /// When the next entry of a connection that goes on is written to the log, if one is.
    tick: Option<Box<time::Interval>>,
}

impl Future for Relaying<'_> {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let Self { connection, open, running, tick } = &mut *self;
        let polled = Pin::new(running).poll(cx);
        let meter = open.meter(|| connection.meter());
        meter.note_flush();
        if polled.is_pending()
            && let Some(tick) = tick
        {
            while pin!(tick.tick()).poll(cx).is_ready() {
                let mut record = connection.record();
                record.count(&meter.counters);
                connection.proxy.access_log.write(&record, LogType::TcpPeriodic);
            }
        }
        polled
    }
}

/// What few connections begin with.
pub(super) struct Rare {
    /// See [`Established`].
    pub(super) hang_up: Option<PendingHangUp>,
    pub(super) deadline: Option<Instant>,
}

/// Serves a connection whose upstream stands, to its end.
///
/// What it returns is most of what an idle connection takes: nothing is moved within it, and what can be had from
/// elsewhere is not in it.
#[expect(clippy::manual_async_fn, reason = "an async fn keeps its parameters twice")]
pub(super) fn relay(mut connection: Parked, open: Open) -> impl Future<Output = ()> + 'static {
    async move {
        let rare = connection.rare.take();
        let outcome = connection.pump(rare, &open).await;
        connection.end(outcome, &open);
    }
}

impl Parked {
    /// Moves bytes until both directions have ended.
    fn pump<'a>(&'a self, rare: Option<Box<Rare>>, open: &'a Open) -> Relaying<'a> {
        open.set_host(&self.guard.endpoint().host);
        if self.proxy.config.flush_access_log_on_connected {
            self.proxy.access_log.write(&self.record(), LogType::TcpUpstreamConnected);
        }
        let Rare { hang_up, deadline } = rare.map_or(Rare { hang_up: None, deadline: None }, |rare| *rare);
        let options = pump::Options {
            mode: self.worker().shared.pump_mode,
            idle_timeout: self.proxy.config.idle_timeout,
            deadline,
            downstream_buffer_limit: self.admission.listener.config.per_connection_buffer_limit_bytes,
            upstream_buffer_limit: self.guard.cluster().config().per_connection_buffer_limit_bytes,
            killed: Some(open),
        };
        let counters = &open.meter(|| self.meter()).counters;
        let sockets = [&self.downstream, &self.upstream];
        let running = pump::run(&self.worker().pump, sockets, hang_up, &options, counters);
        let interval = self.proxy.config.access_log_flush_interval;
        let tick = interval.map(|interval| Box::new(time::interval(interval)));
        Relaying { connection: self, open, running, tick }
    }

    fn meter(&self) -> Meter {
        Meter::new(meter::Into {
            tcp: self.proxy.stats.clone(),
            http: self.admission.http().map(|http| http.stats.clone()),
            cluster: self.guard.cluster().stats().clone(),
            pump: self.worker().shared.stats.pump().clone(),
        })
    }

    fn worker(&self) -> &Rc<Worker> {
        &self.admission.worker
    }

    fn record(&self) -> Record {
        let endpoint = self.guard.endpoint();
        // Always an address: `Config::is_for_clients` keeps connections from pipes.
        let upstream = endpoint.address().ip().map(|address| (address, &endpoint.hostname));
        let chain = self.admission.chain.as_ref();
        let chain = chain.map_or_else(Arc::default, |chain| Arc::clone(&chain.config.name));
        let listener = Arc::clone(&self.admission.listener.config.name);
        self.kept.record(listener, chain, self.guard.cluster().name(), upstream)
    }

    /// Writes down how it ended, counts and logs it.
    fn end(self, outcome: Outcome, open: &Open) {
        let mut record = self.record();
        let meter = open.meter(|| self.meter());
        record.count(&meter.counters);
        let Self { downstream, upstream, mut guard, capture, admission, proxy, .. } = self;
        if matches!(
            outcome.cause,
            Cause::Finished { first: Side::Upstream }
                | Cause::Reset { by: Side::Upstream }
                | Cause::Error { side: Side::Upstream, .. }
        ) {
            guard.closed_by(ClosedBy::Remote);
        }
        let mut connection = Connection {
            worker: Rc::clone(&admission.worker),
            downstream,
            capture,
            original_dst: None,
            listener: Arc::clone(&admission.listener),
            place: None,
            chain: admission.chain.clone(),
            admission: Some(admission),
            proxy: Some(Arc::clone(&proxy)),
            record,
        };
        connection.note(outcome, &proxy);
        if outcome.cause == Cause::Killed
            && let Some(Ending::Lost(loss)) = open.ending()
        {
            connection.record.note_loss(loss.reason.name());
        }
        drop((upstream, guard));
        connection.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a future takes, without making one.
    fn size<F: Future>(_: impl FnOnce(Parked, Open) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn an_idle_connection_stays_small() {
        // Per connection, besides this: the slot in `drain::Connections`, two operations, a timer. Raise it with a reason
        // only.
        let bytes = size(relay);
        assert!(bytes <= 520, "the future of a connection takes {bytes} bytes");
    }
}
