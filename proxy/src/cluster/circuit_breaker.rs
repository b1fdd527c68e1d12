//! Circuit breakers: limits of a cluster that all workers share. That of connections is also the programs' on the kernel path.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::shared_count::SharedCount;
use crate::config::cluster::Thresholds;

/// What a cluster has in use. Shared by the cluster and its successors of the same name, so that an update of the
/// thresholds neither forgets open connections nor lets the limit be exceeded.
#[derive(Debug, Default)]
pub struct InUse {
    connections: SharedCount,
    pending: AtomicU32,
}

/// The limits of one cluster.
#[derive(Clone, Debug)]
pub struct CircuitBreaker {
    thresholds: Thresholds,
    in_use: Arc<InUse>,
}

/// Which limit a permit counts against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resource {
    Connections,
    Pending,
}

impl InUse {
    /// Connections: the kernel path may share this count.
    pub fn connections(&self) -> &SharedCount {
        &self.connections
    }

    fn give_back(&self, resource: Resource) {
        match resource {
            Resource::Connections => self.connections.subtract(),
            Resource::Pending => _ = self.pending.fetch_sub(1, Relaxed),
        }
    }
}

impl CircuitBreaker {
    /// Limits over what is in use.
    pub fn new(thresholds: Thresholds, in_use: Arc<InUse>) -> Self {
        Self { thresholds, in_use }
    }

    /// What it counts, for a successor with other thresholds.
    pub fn in_use(&self) -> &Arc<InUse> {
        &self.in_use
    }

    /// A place under `max_connections`, which connections of the kernel path take, too.
    pub fn connection(&self) -> Option<Permit> {
        let max = self.thresholds.max_connections.into();
        self.in_use.connections.add_below(max).then(|| self.permit(Resource::Connections))
    }

    /// A place under `max_pending_requests`, held while connecting.
    pub fn pending(&self) -> Option<Permit> {
        let max = self.thresholds.max_pending_requests;
        let raise = |count: u32| (count < max).then(|| count + 1);
        self.in_use.pending.fetch_update(Relaxed, Relaxed, raise).ok()?;
        Some(self.permit(Resource::Pending))
    }

    /// Whether `max_connections` are open (`circuit_breakers.default.cx_open`), on both paths.
    pub fn cx_open(&self) -> bool {
        let count = self.in_use.connections.total();
        count > 0 && count >= self.thresholds.max_connections.into()
    }

    /// Whether `max_pending_requests` are connecting (`circuit_breakers.default.rq_pending_open`).
    pub fn rq_pending_open(&self) -> bool {
        let count = self.in_use.pending.load(Relaxed);
        count > 0 && count >= self.thresholds.max_pending_requests
    }

    /// Connections that hold a permit, and those of the kernel path.
    pub fn connections(&self) -> u32 {
        self.in_use.connections.total().try_into().unwrap_or(u32::MAX)
    }

    /// Gives back a place that was taken for a connection, and [kept](Permit::keep).
    pub fn release_connection(&self) {
        self.in_use.give_back(Resource::Connections);
    }

    fn permit(&self, resource: Resource) -> Permit {
        Permit { in_use: Some(Arc::clone(&self.in_use)), resource }
    }
}

/// A place under a limit; given back when dropped.
#[derive(Debug)]
#[must_use = "the place is given back when this is dropped"]
pub struct Permit {
    /// None: the place is somebody else's to give back.
    in_use: Option<Arc<InUse>>,
    resource: Resource,
}

impl Permit {
    /// Keeps the place; the caller gives it back by [`CircuitBreaker::release_connection`].
    pub fn keep(mut self) {
        debug_assert_eq!(self.resource, Resource::Connections);
        self.in_use = None;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(in_use) = &self.in_use {
            in_use.give_back(self.resource);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::tables::tests::Memory;

    fn breaker(max_connections: u32, max_pending_requests: u32) -> CircuitBreaker {
        CircuitBreaker::new(Thresholds { max_connections, max_pending_requests }, Arc::default())
    }

    #[test]
    fn places_run_out_and_come_back() {
        let breaker = breaker(2, 0);
        let first = breaker.connection().unwrap();
        assert!(!breaker.cx_open());
        let _second = breaker.connection().unwrap();
        assert!(breaker.cx_open() && breaker.connection().is_none());
        drop(first);
        assert!(!breaker.cx_open() && breaker.connection().is_some());
        assert!(breaker.pending().is_none());
    }

    #[test]
    fn a_lower_limit_counts_what_is_already_open() {
        let old = breaker(10, 10);
        let permits: Vec<_> = (0..5).map(|_| old.connection().unwrap()).collect();
        let new = CircuitBreaker::new(
            Thresholds { max_connections: 3, max_pending_requests: 1 },
            old.in_use().clone(),
        );
        assert!(new.cx_open() && new.connection().is_none());
        drop(permits);
        assert_eq!(new.connections(), 0);
        assert!(new.connection().is_some());
    }

    #[test]
    fn connections_of_the_kernel_path_take_places() {
        let tables = Memory::new().tables();
        tables.own();
        let breaker = breaker(3, 1);
        breaker.in_use().connections().attach(tables.clusters(), 1);
        tables.clusters().set_active(1, 2);
        let permit = breaker.connection().unwrap();
        assert_eq!((tables.cluster(1).proxied, breaker.connections()), (1, 3));
        assert!(breaker.cx_open() && breaker.connection().is_none());
        assert!(breaker.pending().is_some(), "that one is the proxy's alone");
        tables.clusters().set_active(1, 1);
        assert!(!breaker.cx_open());
        breaker.connection().unwrap().keep();
        drop(permit);
        assert_eq!(tables.cluster(1).proxied, 1);
        breaker.release_connection();
        assert_eq!((tables.cluster(1).proxied, breaker.connections()), (0, 1));
    }

    #[test]
    fn the_limit_holds_across_threads() {
        let breaker = breaker(8, 8);
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let breaker = breaker.clone();
                std::thread::spawn(move || {
                    let mut most = 0;
                    for _ in 0..2000 {
                        let held: Vec<_> = (0..4).filter_map(|_| breaker.connection()).collect();
                        most = most.max(breaker.connections());
                        drop(held);
                    }
                    most
                })
            })
            .collect();
        let most = threads.into_iter().map(|thread| thread.join().unwrap()).max().unwrap();
        assert!((4..=8).contains(&most), "{most}");
        assert_eq!(breaker.connections(), 0);
    }
}
