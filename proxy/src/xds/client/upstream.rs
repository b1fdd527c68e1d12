//! Connections to control planes through configured clusters, from the host's network namespace.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{SockAddr, Socket};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, timeout_at};

use super::{Alpn, Connection, DialError, Dialer, Dialing, tls};
use crate::addr::{EndpointAddr, Pipe};
use crate::bound;
use crate::cluster::connect::{ClosedBy, UpstreamGuard};
use crate::cluster::endpoint::Endpoint;
use crate::cluster::{Cluster, WorkerBalancers};
use crate::config::tls::UpstreamTls;
use crate::secret::{CurrentCredentials, NotReady};
use crate::snapshot::Publisher;
use crate::sys::socket::{self, Keepalive, StreamOptions};

/// Where the cluster does not set it: a control plane whose machine is gone is noticed within a minute.
const KEEPALIVE: Keepalive = Keepalive {
    time: Some(Duration::from_secs(30)),
    interval: Some(Duration::from_secs(10)),
    probes: Some(3),
};

/// Opens connections to endpoints of the clusters in force.
pub struct Upstream {
    publisher: Publisher,
    balancers: RefCell<WorkerBalancers>,
    own: Box<MarkOwn>,
}

/// Marks a socket as the proxy's own before it connects, so that it is not captured.
pub type MarkOwn = dyn Fn(&Socket) -> io::Result<()>;

impl Upstream {
    /// Picks from what the publisher has when a connection is asked for. `own` is called before each connect(2).
    pub fn new(publisher: Publisher, own: Box<MarkOwn>) -> Self {
        Self { publisher, balancers: RefCell::default(), own }
    }

    async fn connect(&self, name: &str, alpn: Alpn) -> Result<Box<dyn Connection>, DialError> {
        let snapshot = self.publisher.current();
        let Some(cluster) = snapshot.cluster(name) else {
            return Err(DialError::UnknownCluster(name.to_owned()));
        };
        let Some(permit) = cluster.breaker().connection() else {
            cluster.stats().upstream_cx_overflow().inc();
            return Err(DialError::Overflow(name.to_owned()));
        };
        let Some(endpoint) = self.balancers.borrow_mut().pick(cluster, None, None) else {
            cluster.stats().upstream_cx_none_healthy().inc();
            return Err(DialError::NoEndpoint(name.to_owned()));
        };
        let mut guard = UpstreamGuard::new(cluster, &endpoint, permit);
        let deadline = Instant::now() + cluster.config().connect_timeout;
        let current = match &cluster.config().tls {
            Some(tls) => Some((tls, secrets(cluster, tls, deadline).await?)),
            None => None,
        };
        let stream = self.stream(cluster, &endpoint, deadline, &mut guard).await?;
        guard.establish();
        let Some((tls, current)) = current else {
            return Ok(Box::new(Counted { stream, guard }));
        };
        let address = endpoint.address();
        let failed = |reason| DialError::Tls { endpoint: address.clone(), reason };
        match timeout_at(deadline, tls::connect(stream, address, tls, current, alpn)).await {
            Ok(Ok(stream)) => Ok(Box::new(Counted { stream, guard })),
            Ok(Err(reason)) => Err(failed(reason)),
            Err(_) => Err(failed(timed_out(cluster))),
        }
    }

    async fn stream(
        &self,
        cluster: &Arc<Cluster>,
        endpoint: &Endpoint,
        deadline: Instant,
        guard: &mut UpstreamGuard,
    ) -> Result<Box<dyn Connection>, DialError> {
        let address = endpoint.address();
        match timeout_at(deadline, self.open(cluster, address)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(reason)) => {
                guard.closed_by(ClosedBy::Remote);
                Err(DialError::Connect { endpoint: address.clone(), reason })
            }
            Err(_) => {
                cluster.stats().upstream_cx_connect_timeout().inc();
                Err(DialError::Connect { endpoint: address.clone(), reason: timed_out(cluster) })
            }
        }
    }

    async fn open(&self, cluster: &Cluster, address: &EndpointAddr) -> Result<Box<dyn Connection>, String> {
        match address {
            EndpointAddr::Ip(address) => Ok(Box::new(self.tcp(cluster, *address).await?)),
            // Nothing captures it, so there is nothing to mark.
            EndpointAddr::Pipe(pipe) => Ok(Box::new(unix(pipe).await?)),
        }
    }

    async fn tcp(&self, cluster: &Cluster, address: SocketAddr) -> Result<TcpStream, String> {
        let config = cluster.config();
        let keepalive = config.upstream_keepalive.map_or(KEEPALIVE, bound::keepalive);
        let bind = bound::upstream(config.upstream_bind.as_deref(), address);
        let options = StreamOptions { keepalive: Some(keepalive), ..bind };
        let socket = socket::stream(address, &options).map_err(|error| error.to_string())?;
        (self.own)(&socket).map_err(|error| format!("can't mark the socket as our own: {error}"))?;
        let text = |error: io::Error| error.to_string();
        let connected = socket::connect(&socket, &SockAddr::from(address)).map_err(text)?;
        let stream = TcpStream::from_std(socket.into()).map_err(text)?;
        if !connected {
            stream.writable().await.map_err(text)?;
        }
        match stream.take_error() {
            Ok(None) => Ok(stream),
            Ok(Some(error)) | Err(error) => Err(error.to_string()),
        }
    }
}

/// Connects to a Unix domain socket of this machine.
async fn unix(pipe: &Pipe) -> Result<UnixStream, String> {
    UnixStream::connect(pipe.sun_path()).await.map_err(|error| {
        let remedy = match error.raw_os_error() {
            Some(libc::ENOENT) if !pipe.is_abstract() => working_directory(pipe),
            Some(libc::EACCES) => {
                " (tidegate needs write permission on it, and search permission above it)".into()
            }
            Some(libc::ECONNREFUSED) => " (nobody listens there)".into(),
            _ => String::new(),
        };
        format!("{error}{remedy}")
    })
}

/// Where a relative path was looked for.
fn working_directory(pipe: &Pipe) -> String {
    if pipe.is_absolute() {
        return String::new();
    }
    std::env::current_dir().map_or_else(
        |_| String::new(),
        |directory| format!(" (the path is relative to {})", directory.display()),
    )
}

impl Dialer for Upstream {
    fn dial<'a>(&'a self, cluster: &'a str, alpn: Alpn) -> Dialing<'a> {
        Box::pin(self.connect(cluster, alpn))
    }
}

/// What the handshake needs. A secret that is still to come may come until `deadline`.
async fn secrets(
    cluster: &Cluster,
    tls: &UpstreamTls,
    deadline: Instant,
) -> Result<CurrentCredentials, DialError> {
    let failed = |error| DialError::Secret { cluster: cluster.name().to_string(), error };
    let Some(credentials) = cluster.credentials() else {
        let names = tls.secrets().map(|(source, _)| Arc::clone(&source.name)).collect();
        return Err(failed(NotReady::Missing(names)));
    };
    let _ = timeout_at(deadline, credentials.complete()).await;
    credentials.current().map_err(|error| {
        if matches!(error, NotReady::Missing(_)) {
            credentials.stats().upstream_context_secrets_not_ready().inc();
        }
        failed(error)
    })
}

fn timed_out(cluster: &Cluster) -> String {
    format!("not connected within connect_timeout ({:?})", cluster.config().connect_timeout)
}

/// A connection that the stats of its cluster count.
struct Counted<S> {
    stream: S,
    guard: UpstreamGuard,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(context, buffer);
        let count = buffer.filled().len() - before;
        match &result {
            Poll::Ready(Ok(())) if count > 0 => {
                self.guard.cluster().stats().upstream_cx_rx_bytes_total().add(count as u64);
            }
            Poll::Ready(_) => self.guard.closed_by(ClosedBy::Remote),
            Poll::Pending => {}
        }
        result
    }
}

impl<S: AsyncWrite + Unpin> Counted<S> {
    fn count(&mut self, result: &Poll<io::Result<usize>>) {
        match result {
            Poll::Ready(Ok(count)) => {
                self.guard.cluster().stats().upstream_cx_tx_bytes_total().add(*count as u64);
            }
            Poll::Ready(Err(_)) => self.guard.closed_by(ClosedBy::Remote),
            Poll::Pending => {}
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(context, buffer);
        self.count(&result);
        result
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(context, buffers);
        self.count(&result);
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
