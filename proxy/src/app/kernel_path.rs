//! The kernel path, where it is wanted: keeps its tables and stats up to date.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{Interval, MissedTickBehavior};

use super::Proxy;
use crate::cluster::host::Host;
use crate::cluster::removal::Loss;
use crate::config::Loaded;
use crate::config::bootstrap::OnExit;
use crate::config::cluster::DataPath;
use crate::intercept::flows::FlowSockets;
use crate::intercept::tables::{Alarm, Tables};
use crate::intercept::{Hold, InterceptError, Interception};
use crate::kernel_path::removal::{self, Reasons};
use crate::kernel_path::{Ids, Journal, Manager, Obstacle, State, is_candidate, plan};
use crate::snapshot::Snapshot;

/// How often records of connections that have ended are read while there are any, and how long it takes until outlier
/// detection hears of a failure.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The kernel path at work.
#[derive(Debug)]
pub(super) struct KernelPath {
    manager: Manager,
    journal: Journal,
    tables: Arc<Tables>,
    sockets: FlowSockets,
    reasons: Reasons,
    changes: UnboundedReceiver<Arc<str>>,
    losses: (UnboundedSender<Losses>, UnboundedReceiver<Losses>),
    /// Ticks while connections end.
    look: Interval,
    /// Rings when one has ended after a time without any. None: that can't be known, and `look` ticks always.
    alarm: Option<Alarm>,
    awake: bool,
}

/// Endpoints of a cluster whose connections are to end now.
#[derive(Debug)]
pub(super) struct Losses {
    pub(super) cluster: Arc<str>,
    pub(super) loss: Loss,
    pub(super) hosts: Arc<[Arc<Host>]>,
}

/// What the kernel path waits for.
#[derive(Debug)]
pub(super) enum Event {
    /// These clusters have other endpoints, or other healthy ones.
    Clusters(BTreeSet<Arc<str>>),
    /// Connections to these are to end.
    Losses(Losses),
    /// It is time to read records.
    Look,
}

/// Whether somebody asks for it.
fn is_asked_for(data_path: DataPath) -> bool {
    data_path != DataPath::Proxy
}

/// Whether the configuration asks for it: the programs contain it only then.
pub(super) fn is_wanted(loaded: &Loaded) -> bool {
    let bootstrap = &loaded.bootstrap;
    bootstrap.interception.as_ref().is_some_and(|it| is_asked_for(it.data_path))
        || bootstrap.clusters.iter().any(|cluster| cluster.data_path.is_some_and(is_asked_for))
}

impl KernelPath {
    /// Over the tables of an interception. None if it doesn't have them.
    pub(super) fn start(proxy: &Proxy, interception: &Interception) -> Option<Self> {
        let events = interception.take_flow_events()?;
        let tables = interception.tables();
        let (manager, changes) = Manager::new(
            Arc::clone(&tables),
            proxy.data_paths.clone(),
            Arc::clone(&proxy.stats),
            proxy.default_data_path(),
        );
        let reasons = Reasons::default();
        let journal = Journal::new(events, reasons.clone());
        let alarm = journal.alarm().inspect_err(
            |error| tracing::debug!(%error, "records of the kernel path are looked for all the time"),
        );
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Some(Self {
            manager,
            journal,
            tables,
            sockets: interception.flow_sockets(),
            reasons,
            changes,
            losses: unbounded_channel(),
            look,
            alarm: alarm.ok(),
            awake: true,
        })
    }

    /// This process counts no more for the programs, and doesn't see what they count: its connections end outside of all limits, as those
    /// of a predecessor do. Returns the tables.
    pub(super) fn end(self) -> Arc<Tables> {
        self.tables.disown();
        self.tables
    }

    /// The index of a listener that is on it.
    pub(super) fn service(&self, listener: &str) -> Option<u32> {
        self.manager.service(listener)
    }

    /// Takes endpoints whose connections are to end.
    pub(super) fn losses(&self) -> UnboundedSender<Losses> {
        self.losses.0.clone()
    }

    /// Completes when it is time to read records. What is lost when it is dropped is asked for again.
    async fn due(look: &mut Interval, alarm: Option<&Alarm>, awake: &mut bool) {
        if !*awake && let Some(alarm) = alarm {
            alarm.ring().await;
            // More will follow: they are read together.
            *awake = true;
            look.reset();
        }
        look.tick().await;
    }

    /// Reads records. When there were none, the next one is to wake us.
    fn look(&mut self, ids: Ids<'_>) {
        self.manager.observe_outliers();
        if self.journal.drain(&self.manager, ids) > 0 || self.alarm.is_none() {
            return;
        }
        self.tables.set_asleep(true);
        // One may have come meanwhile, and have woken nobody. (One that is still being written is read at the next
        // `Proxy::look`.)
        self.awake = self.journal.drain(&self.manager, ids) > 0;
        if self.awake {
            self.tables.set_asleep(false);
        }
    }
}

/// The next thing to do. Never, without a kernel path.
pub(super) async fn next(kernel_path: &mut Option<KernelPath>) -> Event {
    let Some(path) = kernel_path else { return std::future::pending().await };
    let KernelPath { changes, losses, look, alarm, awake, .. } = path;
    tokio::select! {
        // The senders are the manager's and our own: they never close.
        Some(name) = changes.recv() => {
            let mut names = BTreeSet::from([name]);
            while let Ok(name) = changes.try_recv() {
                names.insert(name);
            }
            Event::Clusters(names)
        }
        Some(losses) = losses.1.recv() => Event::Losses(losses),
        () = KernelPath::due(look, alarm.as_ref(), awake) => Event::Look,
    }
}

impl Proxy {
    fn default_data_path(&self) -> DataPath {
        self.loaded.bootstrap.interception.as_ref().map(|it| it.data_path).unwrap_or_default()
    }

    /// What remains of it when the process stops.
    pub(super) fn on_exit(&self) -> OnExit {
        self.loaded.bootstrap.interception.as_ref().map(|it| it.on_exit).unwrap_or_default()
    }

    /// While the result lives nobody takes the tables over. None: they are a successor's.
    fn hold_tables(&self) -> Option<Hold> {
        match self.interception.as_ref()?.hold() {
            Ok(hold) => Some(hold),
            Err(InterceptError::Superseded(_)) => None,
            Err(error) => {
                tracing::error!(%error, "the kernel path stays as it is");
                None
            }
        }
    }

    /// The tables are a successor's.
    pub(super) fn is_superseded(&self) -> bool {
        self.kernel_path.is_some() && self.interception.as_ref().is_some_and(Interception::is_superseded)
    }

    /// The tables follow the configuration. The kernel's rules are to follow them.
    pub(super) fn update_kernel_path(&mut self) {
        let snapshot = self.snapshot();
        if self.kernel_path.is_some() {
            let Some(_held) = self.hold_tables() else { return };
            if let Some(path) = &mut self.kernel_path {
                path.manager.apply(&snapshot);
            }
        } else if !self.accepting {
            // It may become available yet.
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
        is_asked_for(self.default_data_path())
            || snapshot.clusters().any(|cluster| cluster.config().data_path.is_some_and(is_asked_for))
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

    /// Does what it has waited for.
    pub(super) fn serve_kernel_path(&mut self, event: Event) {
        match event {
            Event::Look => self.look_at_kernel_path(),
            Event::Clusters(clusters) => self.clusters_changed(&clusters),
            Event::Losses(losses) => self.end_flows(&losses),
        }
    }

    fn clusters_changed(&mut self, clusters: &BTreeSet<Arc<str>>) {
        let snapshot = self.snapshot();
        let Some(held) = self.hold_tables() else { return };
        let Some(path) = &mut self.kernel_path else { return };
        let rules_changed = path.manager.clusters_changed(clusters, &snapshot);
        drop(held);
        if rules_changed {
            self.apply_rules();
        }
    }

    fn end_flows(&self, losses: &Losses) {
        if self.is_superseded() {
            return;
        }
        let Some(path) = &self.kernel_path else { return };
        let Losses { cluster, loss, hosts } = losses;
        let Some(doomed) = path.manager.doomed(cluster, *loss, hosts) else { return };
        let (sockets, tables, reasons) =
            (path.sockets.clone(), Arc::clone(&path.tables), path.reasons.clone());
        tokio::task::spawn_blocking(move || removal::end(&doomed, &sockets, &tables, &reasons));
    }

    /// Reads what has happened.
    pub(super) fn look_at_kernel_path(&mut self) {
        let ids = Ids {
            connections: &self.shared.connection_ids,
            upstream_connections: &self.shared.upstream_connection_ids,
        };
        if let Some(path) = &mut self.kernel_path {
            path.look(ids);
        }
    }

    /// Brings stats up to date. Called at each [`Proxy::look`]. `superseded`: the tables are a successor's.
    pub(super) fn count_kernel_path(&mut self, superseded: bool) {
        self.look_at_kernel_path();
        let Some(path) = &mut self.kernel_path else { return };
        path.manager.observe();
        let orphans = path.journal.orphans;
        let untidy = path.manager.is_untidy() && !superseded;
        let held = untidy.then(|| self.hold_tables()).flatten();
        if let (Some(_), Some(path)) = (held, &mut self.kernel_path) {
            path.manager.sweep();
        }
        self.stats.set_intercept_counter("flow_events_orphaned", orphans);
    }
}
