//! The admin server: Envoy's paths, parameters and formats over HTTP/1.1.
//!
//! It runs on the main thread and knows the rest of the process only through [`State`]. Nothing that a client does
//! can hold the process up: requests are bounded, a reader that stalls is dropped, and long answers are produced
//! on a thread of their own, no faster than they are read.

mod access;
mod certs;
mod command_line;
mod config_dump;
mod io;
mod logging;
mod memory;
mod route;
mod view;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::access_log::AccessLogs;
use crate::stats::{AdminListenerStats, HttpStats, Stats};

pub use certs::CertificatesView;
pub use command_line::command_line_options;
pub use view::{ClusterView, DataPathView, HealthView, HostView, ListenerView, ThresholdsView};

/// Connections at a time; more wait in the accept queue.
const MAX_CONNECTIONS: usize = 64;

/// A request's head, and an idle connection, may take so long.
const HEAD_TIMEOUT: Duration = Duration::from_mins(1);

/// A client that reads nothing for so long is dropped.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes of a request's head.
const MAX_HEAD: usize = 32 << 10;

/// Why the admin server can't start.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Its address can't be bound.
    #[error(
        "can't bind the admin address {address}: {source}; change admin.address, or end what uses it (ss -ltnp)"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// `/ready` and `server.state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum ServerState {
    /// Serving.
    Live = 0,
    /// Draining, or told to fail health checks.
    Draining = 1,
    /// Before the first configuration.
    PreInitializing = 2,
    /// Clusters or listeners are still warming.
    Initializing = 3,
}

impl ServerState {
    /// As `/ready` and `/server_info` spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Live => "LIVE",
            Self::Draining => "DRAINING",
            Self::PreInitializing => "PRE_INITIALIZING",
            Self::Initializing => "INITIALIZING",
        }
    }
}

/// What `/server_info` tells beyond the state.
#[derive(Clone, Debug)]
pub struct ServerInfo {
    /// `revision/version/status/build/tls`.
    pub version: String,
    /// Since this process started.
    pub uptime: Duration,
    /// [`command_line_options`].
    pub command_line_options: Value,
    /// `node` of the bootstrap, as proto JSON.
    pub node: Value,
}

/// `/drain_listeners`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drain {
    /// Only listeners with `traffic_direction: INBOUND`.
    pub inbound_only: bool,
    /// Let connections drain before the listeners stop.
    pub graceful: bool,
    /// Drain connections, and never stop the listeners.
    pub skip_exit: bool,
}

/// Completes when stats, and counts of hosts, are of the moment of the call or later; within a second, whatever holds them up.
pub type Refresh = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What the admin server shows and does. Called on the main thread; every method returns at once.
pub trait State: Send + Sync + 'static {
    /// Called before `/stats` and `/clusters`.
    fn refresh(&self) -> Refresh;
    /// For `/ready`.
    fn server_state(&self) -> ServerState;
    /// For `/server_info`.
    fn server_info(&self) -> ServerInfo;
    /// For `/clusters`.
    fn clusters(&self) -> Vec<ClusterView>;
    /// For `/listeners`.
    fn listeners(&self) -> Vec<ListenerView>;
    /// For `/certs`: a view for each TLS context.
    fn certificates(&self) -> Vec<CertificatesView>;
    /// `{"configs": […]}` in Envoy's layout (`BootstrapConfigDump`, `ClustersConfigDump`, …), each with its
    /// `@type`. Filtering is done by the admin server.
    fn config_dump(&self, include_eds: bool) -> Value;
    /// `/init_dump`: targets that are not ready; `{}` when all are.
    fn init_dump(&self) -> Value;
    /// Name and level of every logger, for `/logging`.
    fn log_levels(&self) -> Vec<(String, String)>;
    /// Changes the level of one logger, or of all. The error is shown to the operator.
    fn set_log_level(&self, logger: Option<&str>, level: &str) -> Result<(), String>;
    /// `/drain_listeners`.
    fn drain_listeners(&self, drain: Drain);
    /// `/healthcheck/fail` (false) and `/healthcheck/ok` (true).
    fn set_healthy(&self, healthy: bool);
    /// `/reopen_logs`.
    fn reopen_logs(&self);
    /// `/quitquitquit`.
    fn quit(&self);
}

/// A bound admin server.
#[derive(Debug)]
pub struct Admin {
    listener: TcpListener,
    address: SocketAddr,
    access_log: AccessLogs,
}

impl Admin {
    /// Binds the address (port 0: any).
    pub async fn bind(address: SocketAddr) -> Result<Self, AdminError> {
        let error = |source| AdminError::Bind { address, source };
        let listener = TcpListener::bind(address).await.map_err(error)?;
        let address = listener.local_addr().map_err(error)?;
        Ok(Self { listener, address, access_log: AccessLogs::default() })
    }

    /// Logs requests there.
    #[must_use]
    pub fn access_log(self, access_log: AccessLogs) -> Self {
        Self { access_log, ..self }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until it is dropped.
    pub async fn serve(self, state: Arc<dyn State>, stats: Arc<Stats>) -> Infallible {
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let (admin_stats, listener_stats) = (stats.http("admin"), stats.admin_listener().clone());
        let server = Arc::new(route::Server { state, stats });
        loop {
            // The semaphore is never closed, so this is Some.
            let permit = Arc::clone(&connections).acquire_owned().await.ok();
            match self.listener.accept().await {
                Ok((stream, peer)) => {
                    let connection = serve_connection(
                        stream,
                        Arc::clone(&server),
                        admin_stats.clone(),
                        listener_stats.clone(),
                        self.access_log.clone(),
                        peer,
                        permit,
                    );
                    tokio::spawn(connection);
                }
                Err(error) => {
                    tracing::warn!(%error, "admin: can't accept");
                    // Out of file descriptors, most likely: don't spin.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

async fn serve_connection(
    stream: TcpStream,
    server: Arc<route::Server>,
    stats: HttpStats,
    listener: AdminListenerStats,
    access_log: AccessLogs,
    peer: SocketAddr,
    _permit: Option<OwnedSemaphorePermit>,
) {
    stats.downstream_cx_total().inc();
    let _active = stats.downstream_cx_active().guard();
    listener.downstream_cx_total().inc();
    listener.main_thread_downstream_cx_total().inc();
    let _active_here = listener.downstream_cx_active().guard();
    let _active_on_main = listener.main_thread_downstream_cx_active().guard();
    let began = Instant::now();
    let _ = stream.set_nodelay(true);
    let local = stream.local_addr().unwrap_or(peer);
    let service = service_fn(|request| {
        let server = Arc::clone(&server);
        let entry =
            (!access_log.is_empty()).then(|| access::Entry::begin(&access_log, &request, peer, local));
        async move {
            let response = server.answer(&request).await;
            Ok::<_, Infallible>(match entry {
                Some(entry) => entry.until_sent(response),
                None => response,
            })
        }
    });
    let result = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(io::Stalling::new(stream, STALL_TIMEOUT)), service)
        .await;
    if let Err(error) = result {
        tracing::debug!(%error, "admin: connection ended early");
    }
    stats.downstream_cx_destroy().inc();
    listener.downstream_cx_destroy().inc();
    listener.downstream_cx_length_ms().record(began.elapsed().as_millis() as u64);
}

#[cfg(test)]
mod tests;
