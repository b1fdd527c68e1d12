//! What an upstream connection holds and counts from its first SYN to its end.

use std::sync::Arc;
use std::time::Instant;

use crate::cluster::Cluster;
use crate::cluster::circuit_breaker::Permit;
use crate::cluster::endpoint::Endpoint;
use crate::stats::GaugeGuard;

/// Which side ended an upstream connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClosedBy {
    /// We did (the downstream left, a timeout).
    #[default]
    Local,
    /// The upstream's FIN or RST was what ended it.
    Remote,
}

/// Counts an upstream connection from its first SYN to its end: gauges, the host's load, its place under the
/// circuit breaker. All are given back when this is dropped. Every open connection has one, so it holds the cluster and
/// the endpoint, and no guard of what can be reached through them.
#[derive(Debug)]
pub struct UpstreamGuard {
    cluster: Arc<Cluster>,
    endpoint: Arc<Endpoint>,
    started: Instant,
    established: bool,
    closed_by: ClosedBy,
}

impl UpstreamGuard {
    /// `permit` is one of this cluster's for a connection.
    pub(crate) fn new(cluster: &Arc<Cluster>, endpoint: &Arc<Endpoint>, permit: Permit) -> Self {
        cluster.stats().upstream_cx_total().inc();
        cluster.stats().upstream_cx_active().inc();
        endpoint.host.note_connecting();
        permit.keep();
        Self {
            cluster: Arc::clone(cluster),
            endpoint: Arc::clone(endpoint),
            started: Instant::now(),
            established: false,
            closed_by: ClosedBy::default(),
        }
    }

    pub(crate) fn establish(&mut self) {
        let stats = self.cluster.stats();
        stats.upstream_cx_connect_ms().record(millis(self.started));
        stats.upstream_rq_total().inc();
        if !std::mem::replace(&mut self.established, true) {
            stats.upstream_rq_active().inc();
            self.endpoint.host.note_established();
        }
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
        let established = self.established;
        stats.upstream_cx_active().dec();
        if established {
            stats.upstream_rq_active().dec();
        }
        self.endpoint.host.note_ended(established);
        self.cluster.breaker().release_connection();
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
pub(super) struct Pending<'a> {
    cluster: &'a Cluster,
    over: bool,
    _gauge: GaugeGuard,
    _permit: Permit,
}

impl<'a> Pending<'a> {
    pub(super) fn new(cluster: &'a Cluster, permit: Permit) -> Self {
        cluster.stats().upstream_rq_pending_total().inc();
        let gauge = cluster.stats().upstream_rq_pending_active().guard();
        Self { cluster, over: false, _gauge: gauge, _permit: permit }
    }

    pub(super) fn end(mut self, failed: bool) {
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
