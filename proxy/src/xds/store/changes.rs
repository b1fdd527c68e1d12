//! What an update did, for whoever owns sockets, workers and the kernel's rules.

use std::sync::Arc;

use socket2::Socket;

use crate::cluster::removal::Lost;
use crate::config::listener::TrafficDirection;
use crate::listener::{Chain, Listener};

/// What changed since the last look.
#[derive(Debug, Default)]
pub struct Changes {
    /// Clusters came into force or went.
    pub clusters: bool,
    /// Clusters went or were replaced: workers may forget their balancers.
    pub clusters_gone: bool,
    /// Listeners came into force or went.
    pub listeners: bool,
    /// Listening sockets to close: those of the listeners of these names.
    pub close: Vec<Arc<str>>,
    /// Listening sockets to accept on, after the closed ones.
    pub listen: Vec<Bound>,
    /// Listeners that are gone or moved: they own their addresses until the kernel captures them no longer.
    pub released: Vec<Arc<Listener>>,
    /// Chains whose connections end when the drain time has passed.
    pub draining: Vec<Draining>,
    /// Endpoints whose connections end, by the policies of their clusters.
    pub lost: Vec<Lost>,
}

/// Listening sockets of a listener; one list for each worker.
#[derive(Debug)]
pub struct Bound {
    /// Its name.
    pub listener: Arc<str>,
    /// For `/drain_listeners?inboundonly`.
    pub direction: TrafficDirection,
    /// By worker.
    pub sockets: Vec<Vec<Socket>>,
}

/// Chains that nobody chooses any more.
#[derive(Debug)]
pub struct Draining {
    /// Of this listener.
    pub listener: Arc<str>,
    /// All its chains: the listener is gone or was replaced as a whole.
    pub whole: bool,
    /// Which.
    pub chains: Vec<Arc<Chain>>,
}

impl Changes {
    /// Adds what changed after it.
    pub fn absorb(&mut self, later: Self) {
        let Self { clusters, clusters_gone, listeners, close, listen, released, draining, lost } = later;
        self.clusters |= clusters;
        self.clusters_gone |= clusters_gone;
        self.listeners |= listeners;
        // A socket that was opened only to be closed again.
        self.listen.retain(|bound| !close.contains(&bound.listener));
        self.close.extend(close);
        self.listen.extend(listen);
        self.released.extend(released);
        self.draining.extend(draining);
        self.lost.extend(lost);
    }

    /// Nothing changed.
    pub fn is_empty(&self) -> bool {
        !self.clusters
            && !self.listeners
            && self.close.is_empty()
            && self.listen.is_empty()
            && self.draining.is_empty()
            && self.lost.is_empty()
    }
}
