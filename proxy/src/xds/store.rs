//! What the configuration is now: static resources and those of control planes, in force or warming.
//!
//! Lives on the main thread. [`Store::start`] begins; whoever owns it awaits [`Store::next`], hands what it gives to
//! [`Store::handle`], and acts on the [`Changes`]. Start-up has Envoy's order: static clusters, then CDS and endpoints,
//! then LDS and routes.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::sync::mpsc;

use super::cache::Cache;
use super::client::Client;
use super::tables::Tables;
use super::{Event, Key, Kind, Wanted};
use crate::access_log;
use crate::cluster::health_check::MarkOwn;
use crate::cluster::removal::Lost;
use crate::cluster::{ClusterId, dns};
use crate::config::bootstrap::{Bootstrap, DynamicResources};
use crate::config::cluster::Cluster;
use crate::config::config_source::{ConfigSource, Source};
use crate::config::runtime::Runtime;
use crate::config::upstream_bind::BindConfig;
use crate::listener::Listener;
use crate::secret::Watcher;
use crate::snapshot::Snapshot;
use crate::stats::Stats;

mod apply;
mod cached;
mod changes;
mod clusters;
mod endpoints;
mod listeners;
mod observe;
mod response;
mod routes;
mod secrets;
mod subscription;

pub use changes::{Bound, Changes, Draining};
use clusters::{Clusters, Origin, Outside};
use listeners::Listeners;
#[cfg(test)]
pub(crate) use response::judge;
use routes::Routes;
pub(crate) use secrets::KEY_SEPARATOR;
use secrets::Secrets;
use subscription::SubscriptionStats as _;

/// What the store is made of.
pub struct Parts {
    /// The process's stats.
    pub stats: Arc<Stats>,
    /// Where access logs are opened.
    pub logs: access_log::Registry,
    /// How many workers there are.
    pub workers: usize,
    /// Speaks with control planes.
    pub client: Client,
    /// What the client tells.
    pub events: mpsc::UnboundedReceiver<Event>,
    /// For `/config_dump`.
    pub tables: Tables,
    /// The last accepted state, if it is kept.
    pub cache: Option<Cache>,
    /// Called before each connect(2) of a health check.
    pub mark_own: MarkOwn,
    /// What becomes of fields that this version's API does not have.
    pub unknown_fields: UnknownFields,
}

/// What becomes of fields of dynamic resources that this version's API does not have. Each is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownFields {
    /// A warning; Envoy's default.
    #[default]
    Warn,
    /// The resource is refused (`--reject-unknown-dynamic-fields`).
    Reject,
    /// Nothing (`--ignore-unknown-dynamic-fields`).
    Ignore,
}

/// See the module.
pub struct Store {
    stats: Arc<Stats>,
    client: Client,
    events: mpsc::UnboundedReceiver<Event>,
    tables: Tables,
    cache: Option<Cache>,
    /// What is being applied comes from the cache.
    reading_cache: bool,
    unknown_fields: UnknownFields,
    runtime: Runtime,
    upstream_bind: Option<Arc<BindConfig>>,
    dynamic: DynamicResources,
    clusters: Clusters,
    listeners: Listeners,
    routes: Routes,
    secrets: Secrets,
    /// Tells when files that secrets name were replaced.
    files: Watcher<u64>,
    /// Listeners and clusters in force; what changes is changed here too.
    snapshot: Snapshot,
    assignments: HashMap<(Source, Arc<str>), Assignment>,
    resolver: Option<Arc<dns::Resolver>>,
    internal: (mpsc::UnboundedSender<Internal>, mpsc::UnboundedReceiver<Internal>),
    /// Endpoints whose connections end; those of STRICT_DNS clusters go without an event of ours.
    losses: mpsc::UnboundedReceiver<Lost>,
    /// How often in a row each has failed.
    failing: HashMap<Key, u64>,
    deadlines: BinaryHeap<Reverse<(Instant, u64)>>,
    deadline_ids: HashMap<u64, Deadline>,
    next_deadline: u64,
    phase: Phase,
    cds: Fetch,
    lds: Fetch,
    changes: Changes,
}

/// How far start-up is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Static clusters wait for DNS.
    Primary,
    /// CDS and EDS.
    Clusters,
    /// LDS and RDS.
    Listeners,
    /// Everything came, or won't come in time.
    Done,
}

/// Whether the first response of a kind came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fetch {
    NotWanted,
    Waiting,
    Done,
}

/// The endpoints of an EDS service.
#[derive(Default)]
struct Assignment {
    /// Names of clusters that use it.
    users: Vec<Arc<str>>,
    /// What was accepted last, encoded.
    known: Option<Arc<[u8]>>,
}

/// What the store tells itself.
#[derive(Debug)]
pub enum Internal {
    /// The names of a STRICT_DNS cluster were looked up.
    Resolved(Arc<str>, ClusterId),
    /// The endpoints of a cluster were checked once.
    Checked(Arc<str>, ClusterId),
}

/// What is waited for no longer than some time.
#[derive(Clone, Debug)]
enum Deadline {
    Cds,
    Lds,
    Endpoints(Source, Arc<str>),
    Routes(Source, Arc<str>),
    Secret(Source, Arc<str>),
}

/// What happened.
#[derive(Debug)]
pub enum Happened {
    /// A control plane.
    Event(Event),
    /// Ourselves.
    Internal(Internal),
    /// A cluster has lost endpoints whose connections are to end.
    Lost(Lost),
    /// Files of these secrets were replaced, perhaps.
    Files(BTreeSet<u64>),
    /// Time passed.
    Deadline,
}

impl Store {
    /// With the static resources of a bootstrap. Opens access logs and binds the sockets of static listeners.
    ///
    /// # Errors
    /// A static resource can't be served.
    pub fn new(bootstrap: &Bootstrap, parts: Parts) -> anyhow::Result<Self> {
        let Parts { stats, logs, workers, client, events, tables, cache, mark_own, unknown_fields } = parts;
        let (report_losses, losses) = mpsc::unbounded_channel();
        let outlier_events = bootstrap
            .outlier_event_log
            .as_deref()
            .map(|path| logs.open_events(path))
            .transpose()
            .context("cluster_manager.outlier_detection.event_log_path")?;
        let internal = mpsc::unbounded_channel();
        let outside = Outside { logs: logs.clone(), outlier_events, mark_own, internal: internal.0.clone() };
        let mut store = Self {
            clusters: Clusters::new(&stats, report_losses, outside),
            listeners: Listeners::new(&stats, &logs, workers),
            routes: Routes::new(&stats, &logs),
            secrets: Secrets::new(&stats),
            files: Watcher::default(),
            stats,
            client,
            events,
            tables,
            cache,
            reading_cache: false,
            unknown_fields,
            runtime: bootstrap.runtime.clone(),
            upstream_bind: bootstrap.upstream_bind.clone(),
            dynamic: bootstrap.dynamic.clone(),
            snapshot: Snapshot::default(),
            assignments: HashMap::new(),
            resolver: None,
            internal,
            losses,
            failing: HashMap::new(),
            deadlines: BinaryHeap::new(),
            deadline_ids: HashMap::new(),
            next_deadline: 0,
            phase: Phase::Primary,
            cds: Fetch::NotWanted,
            lds: Fetch::NotWanted,
            changes: Changes::default(),
        };
        for listener in &bootstrap.listeners {
            store
                .listeners
                .add(listener, 0, Origin::Static)
                .map_err(|error| anyhow::anyhow!("listener '{}': {error:#}", listener.name))?;
            store.stats.listener_manager().listener_added().inc();
        }
        if bootstrap
            .clusters
            .iter()
            .any(|cluster| cluster.discovery == crate::config::cluster::Discovery::StrictDns)
        {
            store.resolver = Some(Arc::new(dns::Resolver::from_system()?));
        }
        Ok(store)
    }

    /// Starts the static clusters. Must be called within a `LocalSet`.
    pub fn start(&mut self, bootstrap: &Bootstrap) -> Changes {
        for cluster in &bootstrap.clusters {
            self.add_cluster(Cluster::clone(cluster), 0, Origin::Static);
            self.stats.cluster_manager().cluster_added().inc();
        }
        self.settle()
    }

    /// What happens next.
    pub async fn next(&mut self) -> Happened {
        let deadline = self.deadlines.peek().map(|Reverse((at, _))| *at);
        tokio::select! {
            Some(event) = self.events.recv() => Happened::Event(event),
            Some(internal) = self.internal.1.recv() => Happened::Internal(internal),
            Some(lost) = self.losses.recv() => Happened::Lost(lost),
            secrets = self.files.changed() => Happened::Files(secrets),
            () = until(deadline) => Happened::Deadline,
            else => std::future::pending().await,
        }
    }

    /// What has happened already.
    pub fn try_next(&mut self) -> Option<Happened> {
        let event = self.events.try_recv().ok().map(Happened::Event);
        event.or_else(|| self.internal.1.try_recv().ok().map(Happened::Internal))
    }

    /// Takes note of it.
    pub fn handle(&mut self, happened: Happened) -> Changes {
        match happened {
            Happened::Event(Event::Update(update)) => self.update(update),
            Happened::Event(Event::Rejected { key, reason, .. }) => self.rejected(&key, &reason),
            Happened::Event(Event::Failed { keys, reason }) => self.failed(&keys, &reason),
            Happened::Event(Event::RateLimited { pending }) => self.rate_limited(pending),
            Happened::Event(Event::Connected { keys, identifier }) => {
                self.connected(&keys, identifier.as_deref());
            }
            Happened::Internal(Internal::Resolved(name, id)) => self.clusters.ready(&name, id),
            Happened::Internal(Internal::Checked(name, id)) => self.clusters.checked(&name, id),
            Happened::Lost(lost) => self.changes.lost.push(lost),
            Happened::Files(secrets) => self.reload_secrets(&secrets),
            Happened::Deadline => self.expire(),
        }
        self.settle()
    }

    /// How far start-up is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Listeners in force, older ones first.
    pub fn listeners(&self) -> Vec<Arc<Listener>> {
        self.listeners.active()
    }

    /// What is in force now. `lingering` listeners keep those of their addresses that nobody else has.
    pub fn snapshot(&self, lingering: &[Arc<Listener>]) -> Snapshot {
        self.snapshot.clone().with_lingering(lingering)
    }

    /// For `/init_dump`: what is waited for, by kind.
    pub fn unready(&self) -> Vec<(&'static str, Vec<String>)> {
        let mut unready = Vec::new();
        let names =
            |names: &mut dyn Iterator<Item = &Arc<str>>| names.map(ToString::to_string).collect::<Vec<_>>();
        for (what, names) in [
            ("clusters", names(&mut self.clusters.warming())),
            ("listeners", names(&mut self.listeners.warming())),
            ("routes", names(&mut self.routes.waiting())),
            ("secrets", names(&mut self.secrets.waiting())),
        ] {
            if !names.is_empty() {
                unready.push((what, names));
            }
        }
        for (what, fetch) in [("CDS", self.cds), ("LDS", self.lds)] {
            if fetch == Fetch::Waiting {
                unready.push((what, vec![what.to_owned()]));
            }
        }
        unready
    }

    /// Puts in force what is ready, and goes on with start-up.
    fn settle(&mut self) -> Changes {
        loop {
            for (name, former) in self.clusters.settle(&mut self.changes) {
                self.tables.lock().kind_mut(Kind::Cluster).activate(&name);
                if let Some(cluster) = self.clusters.in_force(&name) {
                    self.snapshot.set_cluster(Arc::clone(cluster));
                }
                if let Some(former) = former {
                    self.release_cluster(&name, &former);
                }
            }
            self.subscribe_secrets();
            let settled =
                self.listeners.settle(&self.clusters, |chain| self.routes.ready(chain), &mut self.changes);
            for (name, former) in settled {
                self.tables.lock().kind_mut(Kind::Listener).activate(&name);
                if let Some(listener) = self.listeners.in_force(&name) {
                    self.snapshot.set_listener(Arc::clone(listener));
                }
                if former.is_some_and(|former| former.rds_chains().next().is_some()) {
                    self.forget_routes();
                }
            }
            if !self.advance() {
                break;
            }
        }
        self.count();
        while let Ok(lost) = self.losses.try_recv() {
            self.changes.lost.push(lost);
        }
        std::mem::take(&mut self.changes)
    }

    /// The next step of start-up, if the one before is done.
    fn advance(&mut self) -> bool {
        let next = match self.phase {
            Phase::Primary if self.primary_ready() => Phase::Clusters,
            Phase::Clusters if self.cds != Fetch::Waiting && self.clusters.warming_len() == 0 => {
                Phase::Listeners
            }
            Phase::Listeners if self.lds != Fetch::Waiting && self.listeners.warming_len() == 0 => {
                Phase::Done
            }
            _ => return false,
        };
        self.phase = next;
        match next {
            Phase::Clusters => {
                // What the dialer of the client looks at must be published first: clusters in force are.
                self.subscribe_static_endpoints();
                if let Some(cds) = self.dynamic.cds.clone() {
                    self.cds = Fetch::Waiting;
                    self.want_everything(&cds, Kind::Cluster, Deadline::Cds);
                }
            }
            Phase::Listeners => {
                if let Some(lds) = self.dynamic.lds.clone() {
                    self.lds = Fetch::Waiting;
                    self.want_everything(&lds, Kind::Listener, Deadline::Lds);
                }
            }
            Phase::Primary | Phase::Done => {}
        }
        true
    }

    /// Whether every static cluster but those with EDS is there.
    fn primary_ready(&self) -> bool {
        self.clusters
            .warming()
            .all(|name| self.clusters.versions(name).all(|cluster| cluster.config().eds.is_some()))
    }

    fn want_everything(&mut self, config: &ConfigSource, kind: Kind, deadline: Deadline) {
        let key = Key { source: config.source.clone(), kind };
        self.client.want(&key, Wanted { wildcard: true, ..Wanted::default() });
        if let Some(stats) = self.stats_of_all(kind) {
            stats.subscribed(&config.source);
        }
        self.expire_after(config.initial_fetch_timeout, deadline);
    }

    fn expire_after(&mut self, timeout: Option<Duration>, deadline: Deadline) {
        if let Some(timeout) = timeout {
            self.next_deadline += 1;
            self.deadlines.push(Reverse((Instant::now() + timeout, self.next_deadline)));
            self.deadline_ids.insert(self.next_deadline, deadline);
        }
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let mut expired = Vec::new();
        while let Some(Reverse((at, id))) = self.deadlines.peek().copied() {
            if at > now {
                break;
            }
            self.deadlines.pop();
            expired.extend(self.deadline_ids.remove(&id));
        }
        self.recall_expired(&expired);
        for deadline in expired {
            match deadline {
                Deadline::Cds if self.cds == Fetch::Waiting => {
                    self.recall(Kind::Cluster);
                    self.cds = Fetch::Done;
                    self.stats.cluster_manager().count_timeout();
                    tracing::warn!("no clusters came within initial_fetch_timeout; going on without them");
                }
                Deadline::Lds if self.lds == Fetch::Waiting => {
                    self.recall(Kind::Listener);
                    self.lds = Fetch::Done;
                    self.stats.listener_manager().count_timeout();
                    tracing::warn!("no listeners came within initial_fetch_timeout; going on without them");
                }
                Deadline::Endpoints(source, service) => self.give_up_endpoints(&source, &service),
                Deadline::Routes(source, name) => {
                    if self.routes.give_up(&source, &name) {
                        tracing::warn!(route = %name, "no routes came within initial_fetch_timeout");
                    }
                }
                Deadline::Secret(source, name) => self.give_up_secret(source, name),
                Deadline::Cds | Deadline::Lds => {}
            }
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
pub(crate) mod tests;
