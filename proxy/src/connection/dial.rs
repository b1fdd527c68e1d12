//! Sockets for upstream connections: in the pod's network namespace, marked as our own.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use socket2::Socket;

use crate::bound;
use crate::cluster::connect::Dialer;
use crate::cluster::{Cluster, WorkerBalancers};
use crate::config;
use crate::intercept::Capture;
use crate::snapshot::Snapshot;
use crate::sys::netns;
use crate::sys::socket::{self, OpenError, StreamOptions};
use crate::worker::Worker;

/// Connects for one downstream connection.
#[derive(Debug)]
pub(super) struct Dial<'a> {
    /// The worker that serves it.
    pub(super) worker: &'a Worker,
    /// The clusters that it may use.
    pub(super) snapshot: &'a Snapshot,
    /// Where it was captured; none for a bound listener.
    pub(super) capture: Option<&'a Capture>,
    /// The address that it was accepted on.
    pub(super) accepted_on: SocketAddr,
}

impl Dialer for Dial<'_> {
    fn cluster(&self, name: &str) -> Option<Arc<Cluster>> {
        self.snapshot.cluster(name).cloned()
    }

    fn balancers(&self) -> &RefCell<WorkerBalancers> {
        &self.worker.balancers
    }

    fn socket(&self, address: SocketAddr, cluster: &config::cluster::Cluster) -> Result<Socket, OpenError> {
        let failed = |step| OpenError::at(address, step);
        // The second guard against loops: whatever a configuration says, nothing is sent back to where it came in.
        if self.capture.is_some() && address == self.accepted_on {
            let itself = io::Error::other("the endpoint is the capture listener itself");
            return Err(failed("connect")(itself));
        }
        let keepalive = cluster.upstream_keepalive.map(bound::keepalive);
        let options =
            StreamOptions { keepalive, ..bound::upstream(cluster.upstream_bind.as_deref(), address) };
        let namespace = self.capture.and_then(|capture| capture.pod.socket_namespace());
        let socket = netns::with_socket_namespace(namespace, || Ok(socket::stream(address, &options)))
            .map_err(failed("enter the pod's network namespace"))??;
        if let Some(own) = self.worker.shared.own_sockets.get() {
            own.mark(&socket).map_err(failed("mark the socket as our own"))?;
        }
        Ok(socket)
    }

    fn next_connection_id(&self) -> u64 {
        self.worker.next_upstream_connection_id()
    }
}
