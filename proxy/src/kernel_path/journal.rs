//! Access logs and durations of connections that no proxy stood in, from the records that the programs leave.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use nix::time::{ClockId, clock_gettime};
use tidegate_common::{Addr, End, FlowEvent, FlowFlag};

use super::manager::{Manager, Service, Target};
use super::removal::Reasons;
use crate::access_log::flush_worker;
use crate::addr::OriginalDst;
use crate::cluster::connect::Failure;
use crate::connection::record::{CloseType, LogType, Record, Upstream};
use crate::intercept::tables::{Alarm, FlowEvents};
use crate::response_flag::ResponseFlag;

/// At most so many records are read at one time, so that signals are heard.
const AT_ONCE: usize = 10_000;

/// Reads the records, and writes them down.
#[derive(Debug)]
pub struct Journal {
    events: FlowEvents,
    reasons: Reasons,
    /// Records of listeners or clusters that are not known any more.
    pub orphans: u64,
}

/// Where `%CONNECTION_ID%`s come from.
#[derive(Clone, Copy, Debug)]
pub struct Ids<'a> {
    /// Of downstream connections.
    pub connections: &'a AtomicU64,
    /// Of upstream connections.
    pub upstream_connections: &'a AtomicU64,
}

/// `%UPSTREAM_TRANSPORT_FAILURE_REASON%` of an endpoint that refuses.
const REFUSED: &str = "delayed_connect_error:_Connection_refused";
/// The same of one that can't be reached: which ICMP message it was is not known, and of most this is the error.
const UNREACHABLE: &str = "delayed_connect_error:_No_route_to_host";

/// One moment on all clocks.
struct Clock {
    monotonic_ns: u64,
    instant: Instant,
    wall: SystemTime,
}

impl Clock {
    fn read() -> Option<Self> {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).ok()?;
        let monotonic_ns = u64::try_from(Duration::from(now).as_nanos()).ok()?;
        Some(Self { monotonic_ns, instant: Instant::now(), wall: SystemTime::now() })
    }

    /// How long ago that was.
    fn ago(&self, ns: u64) -> Duration {
        Duration::from_nanos(self.monotonic_ns.saturating_sub(ns))
    }
}

impl Journal {
    /// Of these records. `reasons` has why tidegate itself ended some of the connections.
    pub fn new(events: FlowEvents, reasons: Reasons) -> Self {
        Self { events, reasons, orphans: 0 }
    }

    /// What wakes the agent when it has said that it sleeps.
    pub fn alarm(&self) -> io::Result<Alarm> {
        self.events.alarm()
    }

    /// Writes down what has ended since the last call, or as much of it as is read at one time. Returns how much that was.
    pub fn drain(&mut self, manager: &Manager, ids: Ids<'_>) -> usize {
        let Some(first) = self.events.pop() else { return 0 };
        let Some(clock) = Clock::read() else { return 0 };
        let mut next = Some(first);
        let mut count = 0;
        while let Some(event) = next {
            count += 1;
            if self.write(&event, manager, &clock, ids).is_none() {
                self.orphans += 1;
            }
            next = if count < AT_ONCE { self.events.pop() } else { None };
        }
        flush_worker();
        count
    }

    /// None: nobody's.
    fn write(&self, event: &FlowEvent, manager: &Manager, clock: &Clock, ids: Ids<'_>) -> Option<()> {
        let service = manager.service_at(event.service)?;
        let target = manager.target_at(event.cluster)?;
        let end = End::from_raw(event.end)?;
        let reason = self.reasons.take(event);
        let plan = &service.plan;
        let lasted = millis(event.ended_ns, event.started_ns);
        plan.listener.stats.downstream_cx_length_ms().record(lasted);
        if event.host != 0 {
            target.cluster.stats().upstream_cx_length_ms().record(lasted);
        }
        if event.connected_ns != 0 {
            let connect = millis(event.connected_ns, event.started_ns);
            target.cluster.stats().upstream_cx_connect_ms().record(connect);
        }
        target.tcp_stats.cx_tx_retransmitted_segments().add(event.retransmits.into());
        // 0: nothing was ever acknowledged.
        if event.srtt_us != 0 {
            target.tcp_stats.cx_rtt_us().record(event.srtt_us.into());
        }
        if plan.proxy.access_log.is_empty() && plan.listener.access_log.is_empty() {
            return Some(());
        }
        let mut record = record(event, end, service, target, clock, ids);
        if let Some(reason) = reason {
            record.note_loss(reason.name());
        }
        plan.proxy.access_log.write(&record, LogType::TcpConnectionEnd);
        plan.listener.access_log.write(&record, LogType::NotSet);
        Some(())
    }
}

fn millis(later: u64, earlier: u64) -> u64 {
    later.saturating_sub(earlier) / 1_000_000
}

fn record(
    event: &FlowEvent,
    end: End,
    service: &Service,
    target: &Target,
    clock: &Clock,
    ids: Ids<'_>,
) -> Record {
    let plan = &service.plan;
    let destination = SocketAddr::new(event.addr.to_ip(), event.port);
    let client = address(event.client, event.client_port, destination);
    let id = ids.connections.fetch_add(1, Ordering::Relaxed);
    let listener = Arc::clone(&plan.listener.config.name);
    let mut record = Record::new(id, client, destination, Some(OriginalDst(destination)), listener);
    let since = clock.ago(event.started_ns);
    record.start = clock.instant.checked_sub(since).unwrap_or(clock.instant);
    record.start_time = clock.wall.checked_sub(since).unwrap_or(clock.wall);
    record.duration = Some(Duration::from_nanos(event.ended_ns.saturating_sub(event.started_ns)));
    record.filter_chain = Arc::clone(&plan.chain.config.name);
    record.cluster = Some(Arc::clone(target.cluster.name()));
    if let Some(alt) = &target.cluster.config().alt_stat_name {
        record.details_mut().cluster_alt_stat_name = Some(Arc::clone(alt));
    }
    record.upstream_close_type = Some(CloseType::Normal);
    if event.host != 0 {
        let upstream = SocketAddr::new(event.endpoint.to_ip(), event.endpoint_port);
        let connected = event.connected_ns != 0;
        record.attempts = 1;
        record.connect_begin = Some(Duration::ZERO);
        record.connect_end =
            connected.then(|| Duration::from_nanos(event.connected_ns.saturating_sub(event.started_ns)));
        record.upstream = Some(Upstream {
            address: upstream,
            hostname: target
                .hosts
                .get(&upstream)
                .map(|entry| Arc::clone(&entry.hostname))
                .unwrap_or_default(),
            local_address: connected.then_some(client),
            connection_id: connected.then(|| ids.upstream_connections.fetch_add(1, Ordering::Relaxed)),
        });
    }
    note_end(&mut record, end, event.flags);
    record.bytes_received = event.sent;
    record.upstream_bytes_sent = event.sent;
    record.bytes_sent = event.received;
    record.upstream_bytes_received = event.received;
    record
}

/// As a tcp_proxy with one connect attempt, between the two sockets that it would have.
fn note_end(record: &mut Record, end: End, flags: u32) {
    let sent_fin = |fin: FlowFlag| flags & fin as u32 != 0;
    match end {
        End::NoHost => note_failure(record, Failure::NoHealthyUpstream, None),
        End::Overflow => note_failure(record, Failure::ResourceLimitExceeded, None),
        End::Refused => note_failure(record, Failure::ConnectFailed, Some(REFUSED)),
        End::Unreachable => note_failure(record, Failure::ConnectFailed, Some(UNREACHABLE)),
        End::TimedOut => note_failure(record, Failure::ConnectFailed, None),
        // It left while the proxy was connecting.
        End::Abandoned => record.downstream_close_type = CloseType::RemoteReset,
        End::ResetByClient if !sent_fin(FlowFlag::ClientFin) => {
            record.downstream_close_type = CloseType::RemoteReset;
        }
        End::ResetByEndpoint | End::Silent if !sent_fin(FlowFlag::EndpointFin) => {
            record.downstream_close_type = CloseType::LocalReset;
            if end == End::ResetByEndpoint {
                record.upstream_close_type = Some(CloseType::RemoteReset);
                record.flags.set(ResponseFlag::UpstreamRemoteReset);
            }
        }
        End::Removed => record.downstream_close_type = CloseType::LocalReset,
        // A reset after a FIN is not called one.
        End::Closed | End::ResetByClient | End::ResetByEndpoint | End::Silent => {}
    }
}

/// There was no upstream.
fn note_failure(record: &mut Record, failure: Failure, reason: Option<&str>) {
    match failure {
        Failure::NoHealthyUpstream => record.flags.set(ResponseFlag::NoHealthyUpstream),
        Failure::ResourceLimitExceeded => record.flags.set(ResponseFlag::UpstreamOverflow),
        Failure::ConnectFailed => {
            record.flags.set(ResponseFlag::UpstreamConnectionFailure);
            record.flags.set(ResponseFlag::UpstreamRetryLimitExceeded);
        }
        Failure::NoRoute => record.flags.set(ResponseFlag::NoClusterFound),
    }
    let details = record.details_mut();
    details.upstream_transport_failure = reason.map(Into::into);
    details.downstream_local_close_reason = Some(failure.close_reason().into());
}

/// Of a connect that was refused, the programs don't know the address yet: unspecified, of the service's family.
fn address(addr: Addr, port: u16, service: SocketAddr) -> SocketAddr {
    let ip = match (addr.is_zero(), service) {
        (false, _) => addr.to_ip(),
        (true, SocketAddr::V4(_)) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        (true, SocketAddr::V6(_)) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    SocketAddr::new(ip, port)
}

#[cfg(test)]
mod tests {
    use super::CloseType::{LocalReset, Normal, RemoteReset};
    use super::*;

    #[test]
    fn resets_are_those_that_a_proxy_would_see() {
        let (none, both) = (0, FlowFlag::ClientFin as u32 | FlowFlag::EndpointFin as u32);
        let (client, endpoint) = (FlowFlag::ClientFin as u32, FlowFlag::EndpointFin as u32);
        for (end, fins, flags, downstream, upstream) in [
            (End::Closed, both, "", Normal, Normal),
            (End::Closed, client, "", Normal, Normal),
            (End::ResetByEndpoint, none, "UR", LocalReset, RemoteReset),
            (End::ResetByEndpoint, client, "UR", LocalReset, RemoteReset),
            (End::ResetByEndpoint, endpoint, "", Normal, Normal),
            (End::Silent, client, "", LocalReset, Normal),
            (End::Silent, endpoint, "", Normal, Normal),
            (End::ResetByClient, none, "", RemoteReset, Normal),
            (End::ResetByClient, endpoint, "", RemoteReset, Normal),
            (End::ResetByClient, client, "", Normal, Normal),
            (End::Removed, none, "", LocalReset, Normal),
            (End::Abandoned, none, "", RemoteReset, Normal),
            (End::TimedOut, none, "UF,URX", Normal, Normal),
        ] {
            let address: SocketAddr = ([127, 0, 0, 1], 1).into();
            let mut record = Record::new(1, address, address, None, "".into());
            record.upstream_close_type = Some(Normal);
            note_end(&mut record, end, fins);
            let printed: Vec<_> = record.flags.iter().map(|(_, short, _)| short).collect();
            assert_eq!(printed.join(","), flags, "{end:?} {fins}");
            let closes = (record.downstream_close_type, record.upstream_close_type);
            assert_eq!(closes, (downstream, Some(upstream)), "{end:?} {fins}");
        }
    }
}
