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
use std::time::Duration;

use nix::errno::Errno;
use socket2::{SockAddr, Socket};

use super::circuit_breaker::Permit;
use super::endpoint::Endpoint;
use super::outlier::Outcome;
use super::{Cluster, WorkerBalancers, hashing};
use crate::addr::OriginalDst;
use crate::config;
use crate::config::tcp_proxy::{Backoff, ClusterChoice, TcpProxy};
use crate::connection::record::{Record, Upstream};
use crate::response_flag::ResponseFlag;
use crate::sys::socket::{self, OpenError};
use crate::uring::{self, time};

mod guard;

use guard::Pending;
pub use guard::{ClosedBy, UpstreamGuard};

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
    fn socket(&self, address: SocketAddr, cluster: &config::cluster::Cluster) -> Result<Socket, OpenError>;

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
    pub fn close_reason(self) -> &'static str {
        match self {
            Self::ConnectFailed => "tcp_initializion_failure:0",
            Self::NoHealthyUpstream => "tcp_initializion_failure:1",
            Self::ResourceLimitExceeded => "tcp_initializion_failure:2",
            Self::NoRoute => "tcp_initializion_failure:3",
        }
    }
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
        self.guard.cluster()
    }

    /// Its endpoint.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        self.guard.endpoint()
    }

    /// The socket, and what counts the connection: drop that when the connection is over.
    pub fn into_parts(self) -> (Socket, UpstreamGuard) {
        (self.socket, self.guard)
    }
}

/// How an attempt failed.
#[derive(Debug)]
enum AttemptError {
    /// We got no socket.
    Socket(OpenError),
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
            Self::Socket(error) if error.step == "bind" => {
                format!("failed_to_bind_to_{}:_{}", error.address, errno_text(&error.source))
            }
            Self::Socket(error) => {
                format!("failed_to_{}:_{}", error.step.replace(' ', "_"), errno_text(&error.source))
            }
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
        record.details_mut().downstream_local_close_reason = Some(failure.close_reason().into());
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
            Some(delays) if more => time::sleep(delays.next()).await,
            None if more && record.attempts.is_multiple_of(ATTEMPTS_WITHOUT_PAUSE) => {
                time::sleep(PAUSE).await;
            }
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
    let Some(cluster) = dialer.cluster(name).filter(|cluster| cluster.config().is_for_clients()) else {
        record.flags.set(ResponseFlag::NoClusterFound);
        return Err(Failure::NoRoute);
    };
    record.cluster = Some(Arc::clone(cluster.name()));
    let alt_stat_name = &cluster.config().alt_stat_name;
    if alt_stat_name.is_some() || record.details.is_some() {
        record.details_mut().cluster_alt_stat_name.clone_from(alt_stat_name);
    }
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
    let hash = hashing::of_connection(
        &cluster.config().lb_policy,
        proxy.hash_policy.as_ref(),
        record.downstream_remote,
    );
    let Some(endpoint) = dialer.balancers().borrow_mut().pick(&cluster, destination, hash) else {
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
        if let Some(earlier) = record.upstream.take() {
            record.details_mut().earlier_attempts.push(earlier);
        }
        if let Some(details) = &mut record.details {
            details.upstream_transport_failure = None;
        }
        return None;
    };
    // A pipe: `Config::is_for_clients` has kept us from here.
    let address = endpoint.address().ip()?;
    let pending = Pending::new(cluster, pending);
    let mut guard = UpstreamGuard::new(cluster, endpoint, permit);
    let upstream = Upstream {
        address,
        hostname: Arc::clone(&endpoint.hostname),
        local_address: None,
        connection_id: None,
    };
    if let Some(earlier) = record.upstream.replace(upstream) {
        record.details_mut().earlier_attempts.push(earlier);
    }
    record.connect_begin = Some(record.start.elapsed());
    let result = dial(dialer, address, cluster.config()).await;
    pending.end(result.is_err());
    if let Some(outlier) = cluster.outlier()
        && let Some(outcome) = outcome(&result)
    {
        outlier.note(&endpoint.host, outcome);
    }
    match result {
        Ok(socket) => {
            guard.establish();
            record.connect_end = Some(record.start.elapsed());
            if let Some(upstream) = &mut record.upstream {
                upstream.connection_id = Some(dialer.next_connection_id());
            }
            Some(Connected { socket, guard })
        }
        Err(error) => {
            match error {
                AttemptError::Timeout => cluster.stats().upstream_cx_connect_timeout().inc(),
                AttemptError::Socket(ref error) if error.step == "bind" => {
                    cluster.stats().bind_errors().inc();
                }
                AttemptError::Socket(_) => {}
                AttemptError::Immediate(_) | AttemptError::Delayed(_) => guard.closed_by(ClosedBy::Remote),
            }
            if !matches!(error, AttemptError::Socket(_)) {
                record.flags.set(ResponseFlag::UpstreamConnectionFailure);
            }
            record.details_mut().upstream_transport_failure = error.reason(address);
            None
        }
    }
}

/// What an attempt says of the host, if it says anything.
fn outcome<T>(result: &Result<T, AttemptError>) -> Option<Outcome> {
    match result {
        Ok(_) => Some(Outcome::Connected),
        Err(AttemptError::Immediate(_) | AttemptError::Delayed(_)) => Some(Outcome::Failed),
        Err(AttemptError::Timeout) => Some(Outcome::TimedOut),
        Err(AttemptError::Socket(_)) => None, // our own fault
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
    match time::timeout(cluster.connect_timeout, uring::connected(socket.as_fd())).await {
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

#[cfg(test)]
mod tests;
