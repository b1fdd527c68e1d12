//! ORIGINAL_DST clusters: one host per restored original destination, made when it is first needed and dropped
//! when nobody has used it for a sweep interval.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Cluster;
use super::endpoint::Endpoint;
use super::host::HostRegistry;
use crate::addr::{EndpointAddr, OriginalDst};
use crate::config::endpoint::HealthStatus;

/// The hosts of one ORIGINAL_DST cluster. Workers ask it only for destinations that they don't know yet.
#[derive(Debug, Default)]
pub struct OriginalDstHosts {
    hosts: Mutex<HashMap<SocketAddr, Arc<Endpoint>>>,
    /// Goes up with each sweep that dropped hosts, so that workers look through what they remember.
    sweeps: AtomicU64,
}

impl OriginalDstHosts {
    /// The host for a destination, and whether it was made just now.
    fn find_or_add(
        &self,
        cluster: &str,
        registry: &HostRegistry,
        destination: OriginalDst,
    ) -> (Arc<Endpoint>, bool) {
        let mut hosts = self.lock();
        if let Some(endpoint) = hosts.get(&destination.0) {
            return (Arc::clone(endpoint), false);
        }
        let endpoint = Arc::new(Endpoint {
            host: registry.fresh(EndpointAddr::Ip(destination.0)),
            hostname: format!("{cluster}{destination}").into(),
            weight: 1,
            locality: Arc::default(),
            locality_weight: 0,
            priority: 0,
            health_status: HealthStatus::Unknown,
            health_check: None,
            hash_key: None,
        });
        hosts.insert(destination.0, Arc::clone(&endpoint));
        (endpoint, true)
    }

    /// Drops the hosts that have no connection and were not picked since the last sweep. Returns how many.
    pub(super) fn sweep(&self) -> usize {
        let mut hosts = self.lock();
        let before = hosts.len();
        hosts.retain(|_, endpoint| !endpoint.host.sweep());
        let dropped = before - hosts.len();
        if dropped > 0 {
            self.sweeps.fetch_add(1, Relaxed);
        }
        dropped
    }

    /// Every host.
    pub fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        self.lock().values().cloned().collect()
    }

    /// How many hosts there are.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The map is consistent after every statement, so a panic while it was locked spoils nothing.
    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddr, Arc<Endpoint>>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The destinations that one worker has seen.
#[derive(Debug, Default)]
pub struct WorkerHosts {
    known: HashMap<SocketAddr, Arc<Endpoint>>,
    sweeps: u64,
}

impl WorkerHosts {
    /// The host for a destination.
    pub(super) fn pick(
        &mut self,
        cluster: &Cluster,
        hosts: &OriginalDstHosts,
        destination: OriginalDst,
    ) -> Arc<Endpoint> {
        let sweeps = hosts.sweeps.load(Relaxed);
        if self.sweeps != sweeps {
            self.sweeps = sweeps;
            self.known.retain(|_, endpoint| !endpoint.host.is_swept());
        }
        if let Some(endpoint) = self.known.get(&destination.0) {
            endpoint.host.note_picked();
            return Arc::clone(endpoint);
        }
        let (endpoint, added) = hosts.find_or_add(cluster.name(), cluster.registry(), destination);
        if added {
            cluster.note_membership(hosts.len() as u64);
        }
        endpoint.host.note_picked();
        self.known.insert(destination.0, Arc::clone(&endpoint));
        endpoint
    }
}
