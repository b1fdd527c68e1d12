//! What is known of a connection. The connection's task owns it; `finish` consumes it once, for stats,
//! flags and access logs.

use std::net::{SocketAddr, SocketAddrV4};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant, SystemTime};

use crate::addr::OriginalDst;
use crate::pump::Counters;
use crate::response_flag::ResponseFlags;

/// The record of one connection.
#[derive(Clone, Debug)]
pub struct Record {
    /// `%CONNECTION_ID%`: unique in the process, from 1.
    pub id: u64,
    /// Wall clock at accept.
    pub start_time: SystemTime,
    /// Monotonic clock at accept.
    pub start: Instant,
    /// How long it lasted; set when it ends.
    pub duration: Option<Duration>,
    /// The downstream address (after PROXY protocol).
    pub downstream_remote: SocketAddr,
    /// The directly connected peer.
    pub downstream_direct_remote: SocketAddr,
    /// The address that the downstream meant: the restored original destination, else the socket's own.
    pub downstream_local: SocketAddr,
    /// The accepting socket's own address.
    pub downstream_direct_local: SocketAddr,
    /// Name of the listener that served it.
    pub listener: Arc<str>,
    /// Name of its filter chain; empty when none matched or it has none.
    pub filter_chain: Arc<str>,
    /// The chosen cluster (also when connecting failed).
    pub cluster: Option<Arc<str>>,
    /// The upstream host; set by every attempt, the last one stays.
    pub upstream: Option<Upstream>,
    /// Attempts made, including the successful one.
    pub attempts: u32,
    /// When the last attempt began to connect, after `start`; none before the first.
    pub connect_begin: Option<Duration>,
    /// When it was connected, after `start`; none when it never was.
    pub connect_end: Option<Duration>,
    /// Response flags; they accumulate.
    pub flags: ResponseFlags,
    /// `%DOWNSTREAM_DETECTED_CLOSE_TYPE%`.
    pub downstream_close_type: CloseType,
    /// `%UPSTREAM_DETECTED_CLOSE_TYPE%`; none while no `tcp_proxy` is in charge.
    pub upstream_close_type: Option<CloseType>,
    /// See [`Record::details`].
    pub details: Option<Box<Details>>,
    /// Bytes received from the downstream.
    pub bytes_received: u64,
    /// Bytes sent to the downstream.
    pub bytes_sent: u64,
    /// Bytes sent to the upstream.
    pub upstream_bytes_sent: u64,
    /// Bytes received from the upstream.
    pub upstream_bytes_received: u64,
}

/// What few connections have, and most only at their end: idle ones have no room for it.
#[derive(Clone, Debug)]
pub struct Details {
    /// `%ROUTE_NAME%`: only for HTTP listeners served as L4.
    pub route_name: Option<Arc<str>>,
    /// SNI as sent by the client, when an inspector saw one.
    pub requested_server_name: Option<Box<str>>,
    /// `alt_stat_name` of that cluster, which `%UPSTREAM_CLUSTER%` prints instead; none when it has none.
    pub cluster_alt_stat_name: Option<Arc<str>>,
    /// Hosts of the attempts before that one, in order (`%UPSTREAM_HOSTS_ATTEMPTED%`); empty without retries.
    pub earlier_attempts: Vec<Upstream>,
    /// `%CONNECTION_TERMINATION_DETAILS%`, for example `tcp_session_idle_timeout`.
    pub termination_details: Option<&'static str>,
    /// `%UPSTREAM_TRANSPORT_FAILURE_REASON%`, for example `delayed_connect_error:_Connection_refused`.
    pub upstream_transport_failure: Option<Box<str>>,
    /// `%DOWNSTREAM_TRANSPORT_FAILURE_REASON%`.
    pub downstream_transport_failure: Option<Box<str>>,
    /// `%DOWNSTREAM_LOCAL_CLOSE_REASON%`.
    pub downstream_local_close_reason: Option<Box<str>>,
    /// `%UPSTREAM_LOCAL_CLOSE_REASON%`.
    pub upstream_local_close_reason: Option<Box<str>>,
    /// `%RESPONSE_CODE_DETAILS%`, for example `filter_chain_not_found`.
    pub response_code_details: Option<&'static str>,
    /// What the downstream socket had to send again; read from TCP_INFO at the end, if an access log prints it, and
    /// nothing before. The kernel forgets it when we reset the connection.
    pub retransmitted: Retransmitted,
}

static NO_DETAILS: Details = Details::new();

impl Details {
    const fn new() -> Self {
        Self {
            route_name: None,
            requested_server_name: None,
            cluster_alt_stat_name: None,
            earlier_attempts: Vec::new(),
            termination_details: None,
            upstream_transport_failure: None,
            downstream_transport_failure: None,
            downstream_local_close_reason: None,
            upstream_local_close_reason: None,
            response_code_details: None,
            retransmitted: Retransmitted { bytes: 0, packets: 0 },
        }
    }
}

impl Default for Details {
    fn default() -> Self {
        Self::new()
    }
}

/// What a socket had to send again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retransmitted {
    /// `%BYTES_RETRANSMITTED%`.
    pub bytes: u64,
    /// `%PACKETS_RETRANSMITTED%`.
    pub packets: u64,
}

impl Record {
    /// Of a connection that was accepted just now.
    pub fn new(
        id: u64,
        peer: SocketAddr,
        local: SocketAddr,
        original_dst: Option<OriginalDst>,
        listener: Arc<str>,
    ) -> Self {
        Self {
            id,
            start_time: SystemTime::now(),
            start: (*ORIGIN).max(Instant::now()),
            duration: None,
            downstream_remote: peer,
            downstream_direct_remote: peer,
            downstream_local: original_dst.map_or(local, |destination| destination.0),
            downstream_direct_local: local,
            listener,
            filter_chain: Arc::default(),
            cluster: None,
            upstream: None,
            attempts: 0,
            connect_begin: None,
            connect_end: None,
            flags: ResponseFlags::default(),
            downstream_close_type: CloseType::default(),
            upstream_close_type: None,
            details: None,
            bytes_received: 0,
            bytes_sent: 0,
            upstream_bytes_sent: 0,
            upstream_bytes_received: 0,
        }
    }

    /// What few connections have.
    pub fn details(&self) -> &Details {
        self.details.as_deref().unwrap_or(&NO_DETAILS)
    }

    /// The same, to be added to.
    pub fn details_mut(&mut self) -> &mut Details {
        self.details.get_or_insert_default()
    }

    /// It was ended because its endpoint was lost, for this reason.
    pub fn note_loss(&mut self, reason: &'static str) {
        let details = self.details_mut();
        details.termination_details = Some(reason);
        details.downstream_local_close_reason = Some(reason.into());
        details.upstream_local_close_reason = Some(reason.into());
    }

    /// Takes over what has been moved so far.
    pub fn count(&mut self, counters: &Counters) {
        self.bytes_received = counters.downstream.received.get();
        self.bytes_sent = counters.upstream.sent.get();
        self.upstream_bytes_sent = counters.downstream.sent.get();
        self.upstream_bytes_received = counters.upstream.received.get();
    }

    /// How long the connection lasted; until `now` when it has not ended.
    pub fn lasted(&self, now: Instant) -> Duration {
        self.duration.unwrap_or_else(|| now.saturating_duration_since(self.start))
    }
}

/// A [`Record`] without what can be had from elsewhere while its connection is established: most of what connections hold
/// are idle ones.
#[derive(Debug)]
pub struct Kept {
    id: u64,
    /// In nanoseconds after the Unix epoch, which is enough until 2554.
    start_time: u64,
    /// In nanoseconds after [`ORIGIN`].
    start: u64,
    addresses: Addresses,
    connect_begin: After,
    connect_end: After,
    attempts: u32,
    flags: ResponseFlags,
    details: Option<Box<Details>>,
    /// 0 is none.
    upstream_connection_id: u64,
    upstream_local_address: Option<Box<SocketAddr>>,
}

/// What [`Kept::start`] is counted from.
static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The downstream's addresses in the order of their fields in [`Record`].
#[derive(Debug)]
enum Addresses {
    /// The direct ones are the same.
    V4 {
        remote: SocketAddrV4,
        local: SocketAddrV4,
    },
    /// Redirected, or with a PROXY header.
    AllV4(Box<[SocketAddrV4; 4]>),
    All(Box<[SocketAddr; 4]>),
}

impl Addresses {
    fn of(all: [SocketAddr; 4]) -> Self {
        let v4 = all.map(|address| match address {
            SocketAddr::V4(address) => Some(address),
            SocketAddr::V6(_) => None,
        });
        let [Some(remote), Some(direct_remote), Some(local), Some(direct_local)] = v4 else {
            return Self::All(Box::new(all));
        };
        if (remote, local) == (direct_remote, direct_local) {
            return Self::V4 { remote, local };
        }
        Self::AllV4(Box::new([remote, direct_remote, local, direct_local]))
    }

    fn all(&self) -> [SocketAddr; 4] {
        match self {
            Self::V4 { remote, local } => [*remote, *remote, *local, *local].map(SocketAddr::V4),
            Self::AllV4(all) => all.map(SocketAddr::V4),
            Self::All(all) => **all,
        }
    }
}

/// A time after the start, or none, in nanoseconds: half of what an `Option<Duration>` takes.
#[derive(Clone, Copy, Debug)]
struct After(u64);

impl After {
    const NONE: u64 = u64::MAX;

    fn of(duration: Option<Duration>) -> Self {
        // What does not fit is in 584 years.
        Self(duration.map_or(Self::NONE, |duration| duration.as_nanos() as u64))
    }

    fn duration(self) -> Option<Duration> {
        (self.0 != Self::NONE).then(|| Duration::from_nanos(self.0))
    }
}

impl Kept {
    /// Of a connection that is established. The names, and the upstream's address and name, are the caller's to keep.
    pub fn new(record: Record) -> Self {
        let since_epoch = record.start_time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let upstream = record.upstream.as_ref();
        Self {
            id: record.id,
            start_time: since_epoch.as_nanos() as u64,
            start: record.start.saturating_duration_since(*ORIGIN).as_nanos() as u64,
            addresses: Addresses::of([
                record.downstream_remote,
                record.downstream_direct_remote,
                record.downstream_local,
                record.downstream_direct_local,
            ]),
            connect_begin: After::of(record.connect_begin),
            connect_end: After::of(record.connect_end),
            attempts: record.attempts,
            flags: record.flags,
            upstream_connection_id: upstream.and_then(|upstream| upstream.connection_id).unwrap_or(0),
            upstream_local_address: upstream.and_then(|upstream| upstream.local_address).map(Box::new),
            details: record.details,
        }
    }

    /// The record again, with its names. `upstream` is where the connection leads, and what that is called.
    pub fn record(
        &self,
        listener: Arc<str>,
        filter_chain: Arc<str>,
        cluster: &Arc<str>,
        upstream: Option<(SocketAddr, &Arc<str>)>,
    ) -> Record {
        let [downstream_remote, downstream_direct_remote, downstream_local, downstream_direct_local] =
            self.addresses.all();
        Record {
            id: self.id,
            start_time: SystemTime::UNIX_EPOCH + Duration::from_nanos(self.start_time),
            start: *ORIGIN + Duration::from_nanos(self.start),
            duration: None,
            downstream_remote,
            downstream_direct_remote,
            downstream_local,
            downstream_direct_local,
            listener,
            filter_chain,
            cluster: Some(Arc::clone(cluster)),
            upstream: upstream.map(|(address, hostname)| Upstream {
                address,
                hostname: Arc::clone(hostname),
                local_address: self.upstream_local_address.as_deref().copied(),
                connection_id: Some(self.upstream_connection_id).filter(|id| *id != 0),
            }),
            attempts: self.attempts,
            connect_begin: self.connect_begin.duration(),
            connect_end: self.connect_end.duration(),
            flags: self.flags,
            downstream_close_type: CloseType::default(),
            upstream_close_type: Some(CloseType::Normal),
            details: self.details.clone(),
            bytes_received: 0,
            bytes_sent: 0,
            upstream_bytes_sent: 0,
            upstream_bytes_received: 0,
        }
    }
}

/// The upstream side of a connection.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// The endpoint.
    pub address: SocketAddr,
    /// Its `hostname`, empty when it has none.
    pub hostname: Arc<str>,
    /// Our own address of the upstream socket; none before it connected, or if no access log prints it.
    pub local_address: Option<SocketAddr>,
    /// `%UPSTREAM_CONNECTION_ID%`: unique in the process, from 1; none before it connected.
    pub connection_id: Option<u64>,
}

/// How a connection was seen to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CloseType {
    /// Printed as `Normal`.
    #[default]
    Normal,
    /// We sent the reset.
    LocalReset,
    /// The peer sent it.
    RemoteReset,
}

/// Which moment an access log entry describes (`%ACCESS_LOG_TYPE%`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogType {
    /// Before an upstream is chosen.
    TcpConnectionStart,
    /// The upstream connection stands.
    TcpUpstreamConnected,
    /// Every `access_log_flush_interval`.
    TcpPeriodic,
    /// The end; written once.
    TcpConnectionEnd,
    /// The listener's own entry at the end of a connection (`NotSet` in Envoy).
    NotSet,
}

impl CloseType {
    /// Envoy's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::LocalReset => "LocalReset",
            Self::RemoteReset => "RemoteReset",
        }
    }
}

impl LogType {
    const ALL: [Self; 5] = [
        Self::TcpConnectionStart,
        Self::TcpUpstreamConnected,
        Self::TcpPeriodic,
        Self::TcpConnectionEnd,
        Self::NotSet,
    ];

    /// Names of all types that TCP has.
    pub const NAMES: [&'static str; 5] =
        ["TcpConnectionStart", "TcpUpstreamConnected", "TcpPeriodic", "TcpConnectionEnd", "NotSet"];

    /// Envoy's name of it.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }

    /// The type with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|log_type| log_type.name() == name)
    }

    /// Whether it is a type that only HTTP, UDP tunnels or QUIC have.
    pub fn is_http(name: &str) -> bool {
        name.starts_with("Downstream") || name.starts_with("Upstream") || name.starts_with("Udp")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_the_whole_record() {
        for addresses in [
            ["192.0.2.1:1", "192.0.2.1:1", "192.0.2.2:2", "192.0.2.2:2"],
            ["192.0.2.1:1", "192.0.2.1:1", "192.0.2.3:3", "192.0.2.2:2"],
            ["192.0.2.4:4", "192.0.2.1:1", "192.0.2.2:2", "192.0.2.2:2"],
            ["[2001:db8::1%7]:1", "[2001:db8::1%7]:1", "[2001:db8::2]:2", "[2001:db8::2]:2"],
            ["[2001:db8::1]:1", "192.0.2.1:1", "192.0.2.2:2", "192.0.2.2:2"],
        ] {
            let [remote, direct_remote, local, direct_local] =
                addresses.map(|address| address.parse().unwrap());
            let record = Record {
                downstream_remote: remote,
                downstream_direct_remote: direct_remote,
                downstream_local: local,
                downstream_direct_local: direct_local,
                upstream_close_type: Some(CloseType::Normal),
                bytes_received: 0,
                bytes_sent: 0,
                upstream_bytes_sent: 0,
                upstream_bytes_received: 0,
                duration: None,
                start: Instant::now() + Duration::from_secs(1),
                ..crate::access_log::tests::record()
            };
            let upstream = record.upstream.clone().unwrap();
            let again = Kept::new(record.clone()).record(
                Arc::clone(&record.listener),
                Arc::clone(&record.filter_chain),
                record.cluster.as_ref().unwrap(),
                Some((upstream.address, &upstream.hostname)),
            );
            assert_eq!(format!("{again:?}"), format!("{record:?}"));
        }
    }
}
