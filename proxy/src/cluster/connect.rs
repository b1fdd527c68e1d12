//! Connecting to an upstream: attempts, timeouts, backoff, circuit breakers, and what each of them leaves in the
//! connection's record and in the stats.
//!
//! Each attempt starts over: the weighted cluster is drawn again and a host is picked again. Flags stay, so a
//! connection that came up at the second attempt still has UF.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use socket2::{SockAddr, Socket};

use super::circuit_breaker::Permit;
use super::endpoint::{ActiveConnection, Endpoint};
use super::{Cluster, WorkerBalancers};
use crate::addr::OriginalDst;
use crate::config;
use crate::config::tcp_proxy::{Backoff, ClusterChoice, TcpProxy};
use crate::connection::record::{Record, Upstream};
use crate::response_flag::ResponseFlag;
use crate::stats::GaugeGuard;
use crate::sys::socket;
use crate::uring::{self, Interest};

/// Attempts that fail at once don't give other connections of the worker a turn; after so many in a row there is a
/// pause. Far more than any sensible `max_connect_attempts`.
const ATTEMPTS_WITHOUT_PAUSE: u32 = 16;
const PAUSE: Duration = Duration::from_millis(1);

/// What connecting needs from its caller.
pub trait Dialer {
    /// The cluster of this name, if there is one now.
    fn cluster(&self, name: &str) -> Option<Arc<Cluster>>;

    /// This worker's balancers.
    fn balancers(&self) -> &RefCell<WorkerBalancers>;

    /// A new nonblocking socket for a connection to this address, with its options set: in the right network
    /// namespace, marked as our own, keepalive as the cluster says.
    fn socket(&self, address: SocketAddr, cluster: &config::cluster::Cluster) -> io::Result<Socket>;

    /// The next `%UPSTREAM_CONNECTION_ID%`.
    fn next_connection_id(&self) -> u64;
}

/// Why there is no upstream. The record has the flags and reasons already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Every attempt failed (URX).
    #[error("connecting to the upstream failed")]
    ConnectFailed,
    /// No usable endpoint (UH).
    #[error("the cluster has no healthy endpoint")]
    NoHealthyUpstream,
    /// The circuit breaker for connections is full (UO).
    #[error("the cluster has reached max_connections")]
    ResourceLimitExceeded,
    /// The cluster doesn't exist (NC). The caller counts `downstream_cx_no_route`.
    #[error("the cluster does not exist")]
    NoRoute,
}

impl Failure {
    /// As in `%DOWNSTREAM_LOCAL_CLOSE_REASON%`; the spelling is Envoy's.
    fn close_reason(self) -> &'static str {
        match self {
            Self::ConnectFailed => "tcp_initializion_failure:0",
            Self::NoHealthyUpstream => "tcp_initializion_failure:1",
            Self::ResourceLimitExceeded => "tcp_initializion_failure:2",
            Self::NoRoute => "tcp_initializion_failure:3",
        }
    }
}

/// Which side ended an upstream connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClosedBy {
    /// We did (the downstream left, a timeout).
    #[default]
    Local,
    /// The upstream's FIN or RST was what ended it.
    Remote,
}

/// An established upstream connection.
#[derive(Debug)]
pub struct Connected {
    socket: Socket,
    guard: UpstreamGuard,
}

impl Connected {
    /// Its socket.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Its cluster.
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.guard.cluster
    }

    /// Its endpoint.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.guard.endpoint
    }

    /// The socket, and what counts the connection: drop that when the connection is over.
    pub fn into_parts(self) -> (Socket, UpstreamGuard) {
        (self.socket, self.guard)
    }
}

/// Counts an upstream connection from its first SYN to its end: gauges, the host's load, its place under the
/// circuit breaker. All are given back when this is dropped.
#[derive(Debug)]
pub struct UpstreamGuard {
    cluster: Arc<Cluster>,
    endpoint: Arc<Endpoint>,
    started: Instant,
    active: ActiveConnection,
    /// From when it is established.
    rq_active: Option<GaugeGuard>,
    closed_by: ClosedBy,
    _cx_active: GaugeGuard,
    _permit: Permit,
}

impl UpstreamGuard {
    fn new(cluster: &Arc<Cluster>, endpoint: &Arc<Endpoint>, permit: Permit) -> Self {
        cluster.stats().upstream_cx_total().inc();
        Self {
            cluster: Arc::clone(cluster),
            endpoint: Arc::clone(endpoint),
            started: Instant::now(),
            active: endpoint.host.connecting(),
            rq_active: None,
            closed_by: ClosedBy::default(),
            _cx_active: cluster.stats().upstream_cx_active().guard(),
            _permit: permit,
        }
    }

    fn establish(&mut self) {
        let stats = self.cluster.stats();
        stats.upstream_cx_connect_ms().record(millis(self.started));
        stats.upstream_rq_total().inc();
        self.rq_active = Some(stats.upstream_rq_active().guard());
        self.active.establish();
    }

    /// Its cluster.
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// Its endpoint.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// Notes who ended the connection; without it, we did.
    pub fn closed_by(&mut self, side: ClosedBy) {
        self.closed_by = side;
    }
}

impl Drop for UpstreamGuard {
    fn drop(&mut self) {
        let stats = self.cluster.stats();
        let established = self.rq_active.is_some();
        stats.upstream_cx_destroy().inc();
        stats.upstream_cx_length_ms().record(millis(self.started));
        match self.closed_by {
            ClosedBy::Local => stats.upstream_cx_destroy_local().inc(),
            ClosedBy::Remote => stats.upstream_cx_destroy_remote().inc(),
        }
        match self.closed_by {
            _ if !established => {
                stats.upstream_cx_connect_fail().inc();
                self.endpoint.host.note_connect_fail();
                return;
            }
            ClosedBy::Local => stats.upstream_cx_destroy_local_with_active_rq().inc(),
            ClosedBy::Remote => stats.upstream_cx_destroy_remote_with_active_rq().inc(),
        }
        stats.upstream_cx_destroy_with_active_rq().inc();
    }
}

fn millis(since: Instant) -> u64 {
    since.elapsed().as_millis() as u64
}

/// An attempt that is under way. Dropped before [`Pending::end`], it was cancelled.
struct Pending<'a> {
    cluster: &'a Cluster,
    over: bool,
    _gauge: GaugeGuard,
    _permit: Permit,
}

impl<'a> Pending<'a> {
    fn new(cluster: &'a Cluster, permit: Permit) -> Self {
        cluster.stats().upstream_rq_pending_total().inc();
        let gauge = cluster.stats().upstream_rq_pending_active().guard();
        Self { cluster, over: false, _gauge: gauge, _permit: permit }
    }

    fn end(mut self, failed: bool) {
        self.over = true;
        if failed {
            self.cluster.stats().upstream_rq_pending_failure_eject().inc();
        }
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.cluster.stats().upstream_rq_cancelled().inc();
        }
    }
}

/// How an attempt failed.
#[derive(Debug)]
enum AttemptError {
    /// We got no socket.
    Socket(io::Error),
    /// connect(2) refused at once.
    Immediate(io::Error),
    /// The answer was an error.
    Delayed(io::Error),
    /// `connect_timeout` passed.
    Timeout,
}

impl AttemptError {
    /// `%UPSTREAM_TRANSPORT_FAILURE_REASON%`
    fn reason(&self, address: SocketAddr) -> Option<Box<str>> {
        let text = match self {
            Self::Socket(error) => format!("failed_to_create_socket:_{}", errno_text(error)),
            Self::Immediate(error) => {
                format!("immediate_connect_error:_{}|remote_address:{address}", errno_text(error))
            }
            Self::Delayed(error) => format!("delayed_connect_error:_{}", errno_text(error)),
            Self::Timeout => return None,
        };
        Some(text.into())
    }
}

/// `Connection_refused`
fn errno_text(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => Errno::from_raw(code).desc().replace(' ', "_"),
        None => error.to_string().replace(' ', "_"),
    }
}

/// Connects to an endpoint of a cluster of `proxy`. `destination` is the restored original destination.
///
/// Writes the cluster, the endpoint, attempts, flags and reasons into `record` as they become known. To cancel,
/// drop the future: the attempt under way is given up and counted as cancelled.
///
/// # Errors
/// When there will be no upstream; the downstream has to be closed then.
pub async fn connect(
    dialer: &impl Dialer,
    proxy: &TcpProxy,
    destination: Option<OriginalDst>,
    record: &mut Record,
) -> Result<Connected, Failure> {
    let result = attempts(dialer, proxy, destination, record).await;
    if let Err(failure) = &result {
        record.downstream_local_close_reason = Some(failure.close_reason().into());
    }
    result
}

async fn attempts(
    dialer: &impl Dialer,
    proxy: &TcpProxy,
    destination: Option<OriginalDst>,
    record: &mut Record,
) -> Result<Connected, Failure> {
    let mut delays = proxy.backoff.map(Delays::new);
    loop {
        let (cluster, endpoint, permit) = choose(dialer, proxy, destination, record)?;
        record.attempts += 1;
        if let Some(connected) = attempt(dialer, &cluster, &endpoint, permit, record).await {
            return Ok(connected);
        }
        let more = record.attempts < proxy.max_connect_attempts;
        match &mut delays {
            Some(delays) if more => tokio::time::sleep(delays.next()).await,
            None if more && record.attempts % ATTEMPTS_WITHOUT_PAUSE == 0 => tokio::time::sleep(PAUSE).await,
            _ => {}
        }
    }
}

/// Draws a cluster and picks an endpoint, in Envoy's order of checks.
fn choose(
    dialer: &impl Dialer,
    proxy: &TcpProxy,
    destination: Option<OriginalDst>,
    record: &mut Record,
) -> Result<(Arc<Cluster>, Arc<Endpoint>, Permit), Failure> {
    let name = draw(&proxy.clusters, dialer.balancers());
    let Some(cluster) = dialer.cluster(name) else {
        record.flags.set(ResponseFlag::NoClusterFound);
        return Err(Failure::NoRoute);
    };
    record.cluster = Some(Arc::clone(cluster.name()));
    let Some(permit) = cluster.breaker().connection() else {
        record.flags.set(ResponseFlag::UpstreamOverflow);
        cluster.stats().upstream_cx_overflow().inc();
        return Err(Failure::ResourceLimitExceeded);
    };
    if record.attempts >= proxy.max_connect_attempts {
        record.flags.set(ResponseFlag::UpstreamRetryLimitExceeded);
        cluster.stats().upstream_cx_connect_attempts_exceeded().inc();
        return Err(Failure::ConnectFailed);
    }
    let Some(endpoint) = dialer.balancers().borrow_mut().pick(&cluster, destination) else {
        record.flags.set(ResponseFlag::NoHealthyUpstream);
        cluster.stats().upstream_cx_none_healthy().inc();
        return Err(Failure::NoHealthyUpstream);
    };
    Ok((cluster, endpoint, permit))
}

fn draw<'a>(choice: &'a ClusterChoice, balancers: &RefCell<WorkerBalancers>) -> &'a str {
    let clusters = match choice {
        ClusterChoice::Single(name) => return name,
        ClusterChoice::Weighted(clusters) => clusters,
    };
    let total: u64 = clusters.iter().map(|cluster| u64::from(cluster.weight)).sum();
    let mut left = balancers.borrow_mut().below(total.max(1));
    for cluster in clusters {
        match left.checked_sub(u64::from(cluster.weight)) {
            Some(rest) => left = rest,
            None => return &cluster.name,
        }
    }
    ""
}

/// One attempt. `None`: it failed, as the record says.
async fn attempt(
    dialer: &impl Dialer,
    cluster: &Arc<Cluster>,
    endpoint: &Arc<Endpoint>,
    permit: Permit,
    record: &mut Record,
) -> Option<Connected> {
    let Some(pending) = cluster.breaker().pending() else {
        // As in Envoy, this fails the attempt and leaves no flag.
        cluster.stats().upstream_rq_pending_overflow().inc();
        record.upstream = None;
        record.upstream_transport_failure = None;
        return None;
    };
    let address = endpoint.address().0;
    let pending = Pending::new(cluster, pending);
    let mut guard = UpstreamGuard::new(cluster, endpoint, permit);
    record.upstream = Some(Upstream {
        address,
        hostname: Arc::clone(&endpoint.hostname),
        local_address: None,
        connection_id: None,
    });
    let result = dial(dialer, address, cluster.config()).await;
    pending.end(result.is_err());
    match result {
        Ok(socket) => {
            guard.establish();
            if let Some(upstream) = &mut record.upstream {
                upstream.local_address = socket.local_addr().ok().and_then(|address| address.as_socket());
                upstream.connection_id = Some(dialer.next_connection_id());
            }
            Some(Connected { socket, guard })
        }
        Err(error) => {
            match error {
                AttemptError::Timeout => cluster.stats().upstream_cx_connect_timeout().inc(),
                AttemptError::Socket(_) => {}
                AttemptError::Immediate(_) | AttemptError::Delayed(_) => guard.closed_by(ClosedBy::Remote),
            }
            if !matches!(error, AttemptError::Socket(_)) {
                record.flags.set(ResponseFlag::UpstreamConnectionFailure);
            }
            record.upstream_transport_failure = error.reason(address);
            None
        }
    }
}

/// A connected socket, in time.
async fn dial(
    dialer: &impl Dialer,
    address: SocketAddr,
    cluster: &config::cluster::Cluster,
) -> Result<Socket, AttemptError> {
    let socket = dialer.socket(address, cluster).map_err(AttemptError::Socket)?;
    // Not uring::connect: an error of connect(2) itself is reported in other words than one that the network sent.
    if socket::connect(&socket, &SockAddr::from(address)).map_err(AttemptError::Immediate)? {
        return Ok(socket);
    }
    let connected = async {
        uring::ready(socket.as_fd(), Interest::Writable).await?;
        socket::error(socket.as_fd())?.map_or(Ok(()), Err)
    };
    match tokio::time::timeout(cluster.connect_timeout, connected).await {
        Ok(Ok(())) => Ok(socket),
        Ok(Err(error)) => Err(AttemptError::Delayed(error)),
        Err(_) => Err(AttemptError::Timeout),
    }
}

/// Waits between attempts: random up to an interval that doubles.
#[derive(Debug)]
struct Delays {
    interval: Duration,
    max: Duration,
}

impl Delays {
    fn new(backoff: Backoff) -> Self {
        Self { interval: backoff.base_interval, max: backoff.max_interval }
    }

    fn next(&mut self) -> Duration {
        let delay = self.interval.mul_f64(fastrand::f64());
        self.interval = self.interval.saturating_mul(2).min(self.max);
        delay
    }
}
