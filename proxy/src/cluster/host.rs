//! The live state of endpoints, which outlives the sets that they are members of.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use super::outlier::Monitor;
use super::removal::{Absence, Loss};
use super::shared_count::SharedCount;
use crate::addr::EndpointAddr;

/// The live state of one address of one cluster. It survives updates of the cluster and its endpoints for as long
/// as a host set or a connection refers to it. Written by every worker.
#[derive(Debug)]
pub struct Host {
    address: EndpointAddr,
    cx_active: SharedCount,
    /// Of the kernel path, at the last look.
    kernel_cx_active: AtomicU64,
    cx_total: AtomicU64,
    cx_connect_fail: AtomicU64,
    rq_active: AtomicU64,
    rq_total: AtomicU64,
    health_flags: AtomicU8,
    /// Of a cluster with outlier detection.
    monitor: OnceLock<Box<Monitor>>,
    /// Of a cluster that ends connections to endpoints that are gone.
    absence: Absence,
    /// ORIGINAL_DST: picked since the last sweep.
    recently_picked: AtomicBool,
    /// ORIGINAL_DST: dropped by a sweep, so a worker that still remembers it asks the cluster again.
    swept: AtomicBool,
}

/// What health checks and outlier detection found; bits of [`Host::health_flags`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum HealthFlag {
    /// Active health checks fail.
    FailedActive = 1 << 0,
    /// Ejected by outlier detection.
    FailedOutlier = 1 << 1,
    /// Active health checks report it degraded.
    DegradedActive = 1 << 2,
    /// Not yet checked; does not count as a host.
    PendingActive = 1 << 3,
    /// The last active health check ran out of time.
    ActiveTimeout = 1 << 4,
    /// Discovery has it no more; it stays while active health checks succeed.
    PendingRemoval = 1 << 5,
    /// It is, or was, an endpoint of its cluster.
    Member = 1 << 6,
    /// An active health check has had a result.
    Checked = 1 << 7,
}

impl Host {
    /// A host that nothing is known of yet.
    pub fn new(address: EndpointAddr) -> Self {
        Self {
            address,
            cx_active: SharedCount::default(),
            kernel_cx_active: AtomicU64::new(0),
            cx_total: AtomicU64::new(0),
            cx_connect_fail: AtomicU64::new(0),
            rq_active: AtomicU64::new(0),
            rq_total: AtomicU64::new(0),
            health_flags: AtomicU8::new(0),
            monitor: OnceLock::new(),
            absence: Absence::default(),
            recently_picked: AtomicBool::new(true),
            swept: AtomicBool::new(false),
        }
    }

    /// Where it is.
    pub fn address(&self) -> &EndpointAddr {
        &self.address
    }

    /// Connections to it that are open or being opened (`cx_active`); those of the kernel path as of the last look.
    pub fn cx_active(&self) -> u64 {
        self.cx_active.proxied().wrapping_add(self.kernel_cx_active.load(Relaxed))
    }

    /// The same as it is now: what balancers compare.
    pub fn load(&self) -> u64 {
        self.cx_active.total()
    }

    /// Connections to it: the kernel path may share this count.
    pub(crate) fn connections(&self) -> &SharedCount {
        &self.cx_active
    }

    /// Connection attempts ever made (`cx_total`).
    pub fn cx_total(&self) -> u64 {
        self.cx_total.load(Relaxed)
    }

    /// Attempts that failed (`cx_connect_fail`).
    pub fn cx_connect_fail(&self) -> u64 {
        self.cx_connect_fail.load(Relaxed)
    }

    /// Connections that are established and in use (`rq_active`).
    pub fn rq_active(&self) -> u64 {
        self.rq_active.load(Relaxed)
    }

    /// Connections that were ever established (`rq_total`).
    pub fn rq_total(&self) -> u64 {
        self.rq_total.load(Relaxed)
    }

    /// Bits of [`HealthFlag`].
    pub fn health_flags(&self) -> u32 {
        self.health_flags.load(Relaxed).into()
    }

    /// Whether a health flag is set.
    pub fn has(&self, flag: HealthFlag) -> bool {
        self.health_flags.load(Relaxed) & flag as u8 != 0
    }

    /// Sets or clears a health flag. The cluster has to be refreshed for balancers to see it.
    pub fn set_health_flag(&self, flag: HealthFlag, on: bool) {
        if on {
            self.health_flags.fetch_or(flag as u8, Relaxed);
        } else {
            self.health_flags.fetch_and(!(flag as u8), Relaxed);
        }
    }

    /// Nothing is known from active health checks.
    pub(super) fn forget_checks(&self) {
        let known = HealthFlag::FailedActive as u8
            | HealthFlag::DegradedActive as u8
            | HealthFlag::PendingActive as u8
            | HealthFlag::ActiveTimeout as u8
            | HealthFlag::PendingRemoval as u8
            | HealthFlag::Checked as u8;
        self.health_flags.fetch_and(!known, Relaxed);
    }

    /// What outlier detection knows of it; none if its cluster never had any.
    pub fn monitor(&self) -> Option<&Monitor> {
        self.monitor.get().map(|monitor| &**monitor)
    }

    /// Its cluster has outlier detection.
    pub(super) fn watch_for_outliers(&self) {
        self.monitor.get_or_init(Box::default);
    }

    /// Whether it is among the endpoints of its cluster, for those that want to know.
    pub(super) fn absence(&self) -> &Absence {
        &self.absence
    }

    /// Why connections to it end now, if they do.
    pub fn lost(&self) -> Option<Loss> {
        self.absence.loss()
    }

    /// Counts an attempt to connect; it is active until the guard goes.
    pub fn connecting(self: &Arc<Self>) -> ActiveConnection {
        self.note_connecting();
        ActiveConnection { host: Arc::clone(self), established: false }
    }

    /// Counts an attempt to connect; it is active until [`Host::note_ended`].
    pub(super) fn note_connecting(&self) {
        self.cx_total.fetch_add(1, Relaxed);
        self.cx_active.add();
    }

    /// The attempt succeeded.
    pub(super) fn note_established(&self) {
        self.rq_total.fetch_add(1, Relaxed);
        self.rq_active.fetch_add(1, Relaxed);
    }

    /// The attempt, or the connection that came of it, is over.
    pub(super) fn note_ended(&self, established: bool) {
        self.cx_active.subtract();
        if established {
            self.rq_active.fetch_sub(1, Relaxed);
        }
    }

    /// Adds connections that were made without a proxy: attempts, those that were established, those that failed, and by
    /// how much the numbers of open and of established ones have changed.
    pub(crate) fn add(&self, attempts: u64, established: u64, failed: u64, active: i64, open: i64) {
        self.cx_total.fetch_add(attempts, Relaxed);
        self.rq_total.fetch_add(established, Relaxed);
        self.cx_connect_fail.fetch_add(failed, Relaxed);
        // Two's complement: adding a negative number subtracts.
        self.kernel_cx_active.fetch_add(active.cast_unsigned(), Relaxed);
        self.rq_active.fetch_add(open.cast_unsigned(), Relaxed);
    }

    pub(super) fn note_connect_fail(&self) {
        self.cx_connect_fail.fetch_add(1, Relaxed);
    }

    pub(super) fn note_picked(&self) {
        if !self.recently_picked.load(Relaxed) {
            self.recently_picked.store(true, Relaxed);
        }
    }

    /// Whether a sweep may drop it: no connection now, and none picked it since the last sweep.
    pub(super) fn sweep(&self) -> bool {
        let unused = !self.recently_picked.swap(false, Relaxed) && self.cx_active() == 0;
        if unused {
            self.swept.store(true, Relaxed);
        }
        unused
    }

    pub(super) fn is_swept(&self) -> bool {
        self.swept.load(Relaxed)
    }
}

/// Holds a host's `cx_active`, and `rq_active` once established.
#[derive(Debug)]
pub struct ActiveConnection {
    host: Arc<Host>,
    established: bool,
}

impl ActiveConnection {
    /// The attempt succeeded.
    pub fn establish(&mut self) {
        if !self.established {
            self.established = true;
            self.host.note_established();
        }
    }
}

impl Drop for ActiveConnection {
    fn drop(&mut self) {
        self.host.note_ended(self.established);
    }
}

/// The hosts of one cluster by address. Held by the cluster and its successors of the same name.
#[derive(Debug, Default)]
pub struct HostRegistry(Mutex<BTreeMap<EndpointAddr, Weak<Host>>>);

impl HostRegistry {
    /// The host at this address: the one that is still referred to, else a new one.
    pub fn host(&self, address: EndpointAddr) -> Arc<Host> {
        let mut hosts = self.lock();
        if let Some(host) = hosts.get(&address).and_then(Weak::upgrade) {
            return host;
        }
        let host = Arc::new(Host::new(address.clone()));
        hosts.insert(address, Arc::downgrade(&host));
        host
    }

    /// A host for an ORIGINAL_DST destination: the one that is still referred to unless a sweep dropped it.
    pub(super) fn fresh(&self, address: EndpointAddr) -> Arc<Host> {
        let host = self.host(address.clone());
        if !host.is_swept() {
            return host;
        }
        let host = Arc::new(Host::new(address.clone()));
        self.lock().insert(address, Arc::downgrade(&host));
        host
    }

    /// Forgets hosts that nothing refers to.
    pub fn prune(&self) {
        self.lock().retain(|_, host| host.strong_count() > 0);
    }

    /// How many addresses it knows, for tests and `/memory`.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The map is consistent after every statement, so a panic while it was locked spoils nothing.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<EndpointAddr, Weak<Host>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::tables::tests::Memory;

    #[test]
    fn a_host_is_kept_while_a_connection_uses_it_and_forgotten_after() {
        let registry = HostRegistry::default();
        let address = EndpointAddr::Ip(([127, 0, 0, 1], 1).into());
        let host = registry.host(address.clone());
        let mut active = host.connecting();
        active.establish();
        drop(host);
        registry.prune();
        assert_eq!(registry.len(), 1);
        let again = registry.host(address);
        assert_eq!((again.cx_active(), again.rq_active(), again.cx_total()), (1, 1, 1));
        drop(active);
        assert_eq!((again.cx_active(), again.rq_active(), again.cx_total()), (0, 0, 1));
        drop(again);
        registry.prune();
        assert!(registry.is_empty());
    }

    #[test]
    fn the_load_is_that_of_both_paths_now_and_stats_follow() {
        let tables = Memory::new().tables();
        tables.own();
        let host = Arc::new(Host::new(EndpointAddr::Ip(([127, 0, 0, 1], 1).into())));
        host.connections().attach(tables.hosts(), 2);
        let active = host.connecting();
        tables.hosts().set_active(2, 4);
        assert_eq!((tables.host(2).proxied, host.load(), host.cx_active()), (1, 5, 1));
        host.add(4, 4, 0, 4, 4);
        assert_eq!((host.load(), host.cx_active(), host.rq_active()), (5, 5, 4));
        drop(active);
        tables.hosts().set_active(2, 1);
        assert_eq!((tables.host(2).proxied, host.load(), host.cx_active()), (0, 1, 4));
        host.add(0, 0, 0, -3, -3);
        assert_eq!((host.cx_active(), host.rq_active()), (1, 1));
    }
}
