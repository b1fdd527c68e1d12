//! The configuration in force, as one immutable value. The main thread builds and publishes it; each worker
//! looks at it at its next accept, without a lock and without touching a reference count.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::{ArcSwap, Cache};

use crate::cluster::Cluster;
use crate::config::listener::TrafficDirection;
use crate::listener::{Listener, wildcard_of};

mod sharded;

use sharded::Sharded;

/// Listeners and clusters that belong together. A copy costs little, and so does a change to one: what did not change
/// is shared.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    listeners: Sharded<Arc<str>, Arc<Listener>>,
    by_address: Sharded<SocketAddr, Arc<Listener>>,
    clusters: Sharded<Arc<str>, Arc<Cluster>>,
    /// The listener that captured connections arrive on: the one with `use_original_dst`.
    capture: Option<Arc<Listener>>,
    /// A listener has `exact_balance`, or one of a former snapshot had.
    balances: bool,
}

impl Snapshot {
    /// Of these.
    pub fn build(listeners: Vec<Arc<Listener>>, clusters: Vec<Arc<Cluster>>) -> Self {
        let mut snapshot = Self::default();
        for listener in listeners {
            snapshot.set_listener(listener);
        }
        for cluster in clusters {
            snapshot.set_cluster(cluster);
        }
        snapshot
    }

    /// Adds a cluster, or replaces the one of its name.
    pub fn set_cluster(&mut self, cluster: Arc<Cluster>) {
        self.clusters.insert(Arc::clone(cluster.name()), cluster);
    }

    /// Drops a cluster.
    pub fn remove_cluster(&mut self, name: &str) {
        self.clusters.remove(name);
    }

    /// Adds a listener, or replaces the one of its name. Of two with one address the first owns it.
    pub fn set_listener(&mut self, listener: Arc<Listener>) {
        let name = &listener.config.name;
        let was_capture = self.capture.as_ref().is_some_and(|capture| capture.config.name == *name);
        self.remove_listener(name);
        self.own(&listener);
        self.balances |= listener.balance().is_some();
        if restores(&listener) && (was_capture || self.capture.is_none()) {
            self.capture = Some(Arc::clone(&listener));
        }
        self.listeners.insert(Arc::clone(&listener.config.name), listener);
    }

    /// Whether connections may have to be balanced over the workers: for most, nobody needs to ask whose they are.
    pub fn has_exact_balance(&self) -> bool {
        self.balances
    }

    /// Drops a listener and its addresses.
    pub fn remove_listener(&mut self, name: &str) {
        let Some(former) = self.listeners.get(name).cloned() else { return };
        self.listeners.remove(name);
        for address in &former.config.addresses {
            if self.by_address.get(address).is_some_and(|owner| Arc::ptr_eq(owner, &former)) {
                self.by_address.remove(address);
            }
        }
        if self.capture.as_ref().is_some_and(|capture| Arc::ptr_eq(capture, &former)) {
            self.capture = self.listeners.values().find(|listener| restores(listener)).cloned();
        }
    }

    /// With listeners that are gone or have moved: they still own addresses that nobody else has.
    #[must_use]
    pub fn with_lingering(mut self, lingering: &[Arc<Listener>]) -> Self {
        for listener in lingering {
            self.own(listener);
        }
        self
    }

    fn own(&mut self, listener: &Arc<Listener>) {
        for address in &listener.config.addresses {
            if self.by_address.get(address).is_none() {
                self.by_address.insert(*address, Arc::clone(listener));
            }
        }
    }

    /// A listener by name.
    pub fn listener(&self, name: &str) -> Option<&Arc<Listener>> {
        self.listeners.get(name)
    }

    /// Who owns a restored destination: the listener with exactly this address, else the one with the wildcard
    /// address of its port (`[::]` also answers for IPv4 when there is no IPv4 wildcard).
    pub fn owner(&self, destination: SocketAddr) -> Option<&Arc<Listener>> {
        self.by_address.get(&destination).or_else(|| self.by_address.get(&wildcard_of(destination)))
    }

    /// The listener that captured connections arrive on, if the configuration has one.
    pub fn capture(&self) -> Option<&Arc<Listener>> {
        self.capture.as_ref()
    }

    /// A cluster by name.
    pub fn cluster(&self, name: &str) -> Option<&Arc<Cluster>> {
        self.clusters.get(name)
    }

    /// All listeners.
    pub fn listeners(&self) -> impl Iterator<Item = &Arc<Listener>> {
        self.listeners.values()
    }

    /// All clusters.
    pub fn clusters(&self) -> impl Iterator<Item = &Arc<Cluster>> {
        self.clusters.values()
    }
}

/// Captured connections arrive on such a listener. Not virtualInbound: what pods send out is captured, not what they
/// receive.
fn restores(listener: &Listener) -> bool {
    let config = &listener.config;
    config.use_original_dst && config.bind_to_port && config.traffic_direction != TrafficDirection::Inbound
}

/// The one place where snapshots are published. Only the main thread calls [`Publisher::publish`].
#[derive(Clone, Debug)]
pub struct Publisher {
    current: Arc<ArcSwap<Snapshot>>,
    /// Former ones that somebody may still look at. Kept, so that it is the main thread that frees them: it takes
    /// milliseconds, which a worker has not.
    former: Arc<Mutex<Vec<Arc<Snapshot>>>>,
}

impl Publisher {
    /// Starts with a snapshot.
    pub fn new(snapshot: Snapshot) -> Self {
        Self { current: Arc::new(ArcSwap::from_pointee(snapshot)), former: Arc::default() }
    }

    /// Puts a snapshot in force for connections accepted from now on.
    pub fn publish(&self, snapshot: Snapshot) {
        let former = self.current.swap(Arc::new(snapshot));
        self.former.lock().unwrap_or_else(PoisonError::into_inner).push(former);
        self.sweep();
    }

    /// Frees former snapshots that nobody looks at any more. Called by the main thread now and then.
    pub fn sweep(&self) {
        let mut former = self.former.lock().unwrap_or_else(PoisonError::into_inner);
        former.retain(|snapshot| Arc::strong_count(snapshot) > 1);
    }

    /// The snapshot in force.
    pub fn current(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// A worker's own view.
    pub fn view(&self) -> WorkerView {
        WorkerView(Cache::new(Arc::clone(&self.current)))
    }
}

/// A worker's view of what is published: one pointer comparison when nothing changed.
#[derive(Debug)]
pub struct WorkerView(Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>);

impl WorkerView {
    /// The snapshot in force now.
    pub fn snapshot(&mut self) -> &Arc<Snapshot> {
        self.0.load()
    }
}
