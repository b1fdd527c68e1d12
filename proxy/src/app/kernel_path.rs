//! The kernel path, where it is wanted: keeps its tables and stats up to date.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;

use super::Proxy;
use crate::config::Loaded;
use crate::config::bootstrap::OnExit;
use crate::config::cluster::DataPath;
use crate::intercept::Interception;
use crate::kernel_path::{Ids, Journal, Manager, Obstacle, State, is_candidate, plan};
use crate::snapshot::Snapshot;

/// How often records of connections that have ended are read, and how long it takes until outlier detection hears of a
/// failure.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The kernel path at work.
#[derive(Debug)]
pub(super) struct KernelPath {
    manager: Manager,
    journal: Journal,
    changes: UnboundedReceiver<Arc<str>>,
}

/// Whether the configuration asks for it: the programs contain it only then.
pub(super) fn is_wanted(loaded: &Loaded) -> bool {
    let wants = |data_path: DataPath| data_path != DataPath::Proxy;
    let bootstrap = &loaded.bootstrap;
    bootstrap.interception.as_ref().is_some_and(|it| wants(it.data_path))
        || bootstrap.clusters.iter().any(|cluster| cluster.data_path.is_some_and(wants))
}

impl KernelPath {
    /// Over the tables of an interception. None if it doesn't have them.
    pub(super) fn start(proxy: &Proxy, interception: &Interception) -> Option<Self> {
        let events = interception.take_flow_events()?;
        let (manager, changes) =
            Manager::new(interception.tables(), proxy.data_paths.clone(), proxy.default_data_path());
        Some(Self { manager, journal: Journal::new(events), changes })
    }

    /// The index of a listener that is on it.
    pub(super) fn service(&self, listener: &str) -> Option<u32> {
        self.manager.service(listener)
    }
}

/// Names of clusters that have other endpoints, or other healthy ones. Never, without a kernel path.
pub(super) async fn changed(kernel_path: &mut Option<KernelPath>) -> BTreeSet<Arc<str>> {
    let Some(path) = kernel_path else { return std::future::pending().await };
    let mut names = BTreeSet::new();
    // The sender is the manager's: it never closes.
    names.extend(path.changes.recv().await);
    while let Ok(name) = path.changes.try_recv() {
        names.insert(name);
    }
    names
}

impl Proxy {
    fn default_data_path(&self) -> DataPath {
        self.loaded.bootstrap.interception.as_ref().map(|it| it.data_path).unwrap_or_default()
    }

    /// What remains of it when the process stops.
    pub(super) fn on_exit(&self) -> OnExit {
        self.loaded.bootstrap.interception.as_ref().map(|it| it.on_exit).unwrap_or_default()
    }

    /// The tables are a successor's.
    fn is_superseded(&self) -> bool {
        self.kernel_path.is_some() && self.interception.as_ref().is_some_and(Interception::is_superseded)
    }

    /// The tables follow the configuration. The kernel's rules are to follow them.
    pub(super) fn update_kernel_path(&mut self) {
        let snapshot = self.snapshot();
        if self.is_superseded() {
            return;
        }
        if let Some(path) = &mut self.kernel_path {
            path.manager.apply(&snapshot);
        } else if self.is_asked_for(&snapshot) {
            self.show_unavailable();
        } else {
            self.data_paths.retain(|_| false);
        }
    }

    /// The kernel's rules have followed.
    pub(super) fn settle_kernel_path(&mut self) {
        if let Some(path) = &mut self.kernel_path {
            path.manager.settle();
        }
    }

    fn is_asked_for(&self, snapshot: &Snapshot) -> bool {
        let wants = |data_path: DataPath| data_path != DataPath::Proxy;
        wants(self.default_data_path())
            || snapshot.clusters().any(|cluster| cluster.config().data_path.is_some_and(wants))
    }

    /// Says of every listener that was to take the kernel path why it doesn't.
    fn show_unavailable(&self) {
        let reason: Arc<str> = if self.interception.is_none() {
            "nothing is intercepted".into()
        } else {
            "tidegate was started without it; set data_path of tidegate.interception in the bootstrap".into()
        };
        let snapshot = self.snapshot();
        let candidates = || snapshot.listeners().filter(|listener| is_candidate(&listener.config));
        for listener in candidates() {
            let obstacles = match plan(listener, &snapshot, self.default_data_path()) {
                Ok(_) => vec![Obstacle::Unavailable(Arc::clone(&reason))],
                Err(obstacles) => obstacles,
            };
            self.data_paths.set(&listener.config.name, State::Proxy(obstacles));
        }
        self.data_paths.retain(|name| snapshot.listener(name).is_some());
    }

    /// These clusters have other endpoints, or other healthy ones.
    pub(super) fn clusters_changed(&mut self, clusters: &BTreeSet<Arc<str>>) {
        let snapshot = self.snapshot();
        if self.is_superseded() {
            return;
        }
        let Some(path) = &mut self.kernel_path else { return };
        if path.manager.clusters_changed(clusters, &snapshot) {
            self.apply_rules();
        }
    }

    /// Reads what has happened. Called every [`LOOK_INTERVAL`].
    pub(super) fn look_at_kernel_path(&mut self) {
        let Some(path) = &mut self.kernel_path else { return };
        path.manager.observe_outliers();
        let ids = Ids {
            connections: &self.shared.connection_ids,
            upstream_connections: &self.shared.upstream_connection_ids,
        };
        path.journal.drain(&path.manager, ids);
    }

    /// Brings stats up to date. Called once a second.
    pub(super) fn count_kernel_path(&mut self) {
        let superseded = self.is_superseded();
        let Some(path) = &mut self.kernel_path else { return };
        path.manager.observe();
        if !superseded {
            path.manager.sweep();
        }
        self.stats.set_intercept_counter("flow_events_orphaned", path.journal.orphans);
    }
}
