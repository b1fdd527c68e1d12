//! The configuration in force, as one immutable value. The main thread builds and publishes it; each worker
//! looks at it at its next accept, without a lock and without touching a reference count.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::{ArcSwap, Cache};

use crate::cluster::Cluster;
use crate::config::listener::TrafficDirection;
use crate::listener::{Listener, wildcard_of};

/// Listeners and clusters that belong together.
#[derive(Debug, Default)]
pub struct Snapshot {
    listeners: HashMap<Arc<str>, Arc<Listener>>,
    by_address: HashMap<SocketAddr, Arc<Listener>>,
    clusters: HashMap<Arc<str>, Arc<Cluster>>,
    /// The listener that captured connections arrive on: the one with `use_original_dst`.
    capture: Option<Arc<Listener>>,
}

impl Snapshot {
    /// Puts a snapshot together. Of two listeners with one address the first owns it.
    pub fn build(listeners: Vec<Arc<Listener>>, clusters: Vec<Arc<Cluster>>) -> Self {
        Self::with_lingering(listeners, clusters, &[])
    }

    /// The same, with listeners that are gone or have moved: they still own addresses that nobody else has.
    pub fn with_lingering(
        listeners: Vec<Arc<Listener>>,
        clusters: Vec<Arc<Cluster>>,
        lingering: &[Arc<Listener>],
    ) -> Self {
        let mut snapshot = Self::default();
        for listener in listeners {
            for address in &listener.config.addresses {
                snapshot.by_address.entry(*address).or_insert_with(|| Arc::clone(&listener));
            }
            // Not virtualInbound: what pods send out is captured, not what they receive.
            let restores = listener.config.use_original_dst
                && listener.config.bind_to_port
                && listener.config.traffic_direction != TrafficDirection::Inbound;
            if restores && snapshot.capture.is_none() {
                snapshot.capture = Some(Arc::clone(&listener));
            }
            snapshot.listeners.insert(Arc::clone(&listener.config.name), listener);
        }
        for listener in lingering {
            for address in &listener.config.addresses {
                snapshot.by_address.entry(*address).or_insert_with(|| Arc::clone(listener));
            }
        }
        snapshot.clusters =
            clusters.into_iter().map(|cluster| (Arc::clone(cluster.name()), cluster)).collect();
        snapshot
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

/// The one place where snapshots are published. Only the main thread calls [`Publisher::publish`].
#[derive(Clone, Debug)]
pub struct Publisher(Arc<ArcSwap<Snapshot>>);

impl Publisher {
    /// Starts with a snapshot.
    pub fn new(snapshot: Snapshot) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(snapshot)))
    }

    /// Puts a snapshot in force for connections accepted from now on.
    pub fn publish(&self, snapshot: Snapshot) {
        self.0.store(Arc::new(snapshot));
    }

    /// The snapshot in force.
    pub fn current(&self) -> Arc<Snapshot> {
        self.0.load_full()
    }

    /// A worker's own view.
    pub fn view(&self) -> WorkerView {
        WorkerView(Cache::new(Arc::clone(&self.0)))
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
