//! Clusters: those in force, and those that wait for their endpoints.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::mpsc::UnboundedSender;

use super::Internal;
use super::changes::Changes;
use crate::access_log::{EventFile, Registry};
use crate::cluster::health_check::{self, MarkOwn, Surroundings};
use crate::cluster::removal::Lost;
use crate::cluster::{Cluster, ClusterId, dns, outlier};
use crate::config;
use crate::config::cluster::Discovery;
use crate::secret::Credentials;
use crate::stats::Stats;

/// Where a resource comes from, which decides who may change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The bootstrap: nobody.
    Static,
    /// A control plane.
    Dynamic,
}

/// All clusters of the process.
pub(super) struct Clusters {
    stats: Arc<Stats>,
    /// Where clusters report endpoints whose connections are to end.
    losses: UnboundedSender<Lost>,
    outside: Outside,
    entries: HashMap<Arc<str>, Entry>,
    /// How many entries have something warming.
    warming: usize,
    /// How many have something in force.
    active: usize,
    /// Names of those that may come into force.
    ready: Vec<Arc<str>>,
}

/// What watching the hosts of clusters needs.
pub(super) struct Outside {
    /// Where event logs are opened.
    pub(super) logs: Registry,
    /// The outlier event log, if there is one.
    pub(super) outlier_events: Option<EventFile>,
    /// Called before each connect(2) of a health check.
    pub(super) mark_own: MarkOwn,
    /// Where it is told that the hosts of a cluster were checked.
    pub(super) internal: UnboundedSender<Internal>,
}

impl Outside {
    fn surroundings(&self, config: &config::cluster::Cluster) -> Surroundings {
        let paths = config.health_check.iter().flat_map(|check| &check.event_logs);
        let open = |path: &std::path::PathBuf| {
            self.logs.open_events(path).map_err(|error| {
                tracing::error!(cluster = %config.name, "events of its health checks are lost: {error}");
            })
        };
        Surroundings {
            mark_own: Arc::clone(&self.mark_own),
            events: paths.filter_map(|path| open(path).ok()).collect(),
        }
    }
}

#[derive(Debug)]
struct Entry {
    origin: Origin,
    active: Option<Version>,
    warming: Option<Warming>,
}

/// One version of a cluster.
#[derive(Debug)]
struct Version {
    cluster: Arc<Cluster>,
    /// Of the message it was built from.
    content: u64,
    /// STRICT_DNS: keeps its endpoints up to date.
    watch: Option<dns::Watch>,
    /// Checks its hosts, from before it is in force.
    checks: Option<health_check::Watch>,
    /// Ejects outliers while it is in force.
    outliers: Option<outlier::Watch>,
}

#[derive(Debug)]
struct Warming {
    version: Version,
    /// Its endpoints came, or won't come in time.
    endpoints: bool,
    /// Its secrets did, or won't.
    secrets: bool,
    /// Its endpoints were checked once, or nobody checks them.
    checked: bool,
}

impl Warming {
    /// Its endpoints are known: as in Envoy, it is warm when each was checked once.
    fn await_checks(&self, name: &Arc<str>, internal: &UnboundedSender<Internal>) {
        let Some(checks) = &self.version.checks else { return };
        let (round, id) = (checks.first_round(&self.version.cluster), self.version.cluster.id());
        let (name, internal) = (Arc::clone(name), internal.clone());
        tokio::spawn(async move {
            round.await;
            // Nobody listens any more when the process ends.
            let _ = internal.send(Internal::Checked(name, id));
        });
    }
}

/// What a cluster was built from.
pub(super) type Config = Arc<config::cluster::Cluster>;

/// What became of a cluster that was added.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Added {
    /// It is the one that is there already.
    Unchanged,
    /// The bootstrap has one of this name, which stays.
    Blocked,
    /// A new name.
    New,
    /// It replaces another.
    Modified,
}

impl Clusters {
    pub(super) fn new(stats: &Arc<Stats>, losses: UnboundedSender<Lost>, outside: Outside) -> Self {
        let (stats, entries) = (Arc::clone(stats), HashMap::new());
        Self { stats, losses, outside, entries, warming: 0, active: 0, ready: Vec::new() }
    }

    /// Takes a cluster; it warms until [`Clusters::ready`] is told that it needn't (and [`Clusters::secrets_ready`],
    /// when it has `credentials`), and is in force from the [`Clusters::settle`] after that.
    pub(super) fn add(
        &mut self,
        config: config::cluster::Cluster,
        content: u64,
        origin: Origin,
        resolver: impl FnOnce() -> Option<Arc<dns::Resolver>>,
        credentials: impl FnOnce(&config::cluster::Cluster) -> Option<Credentials>,
    ) -> Added {
        let name = Arc::clone(&config.name);
        let entry = self.entries.entry(Arc::clone(&name));
        let is_new = matches!(entry, std::collections::hash_map::Entry::Vacant(_));
        let entry = entry.or_insert(Entry { origin, active: None, warming: None });
        if !is_new {
            if entry.origin == Origin::Static {
                return Added::Blocked;
            }
            let latest = entry.warming.as_ref().map(|warming| &warming.version).or(entry.active.as_ref());
            if latest.is_some_and(|latest| latest.content == content) {
                return Added::Unchanged;
            }
        }
        let previous = entry.warming.as_ref().map(|warming| &warming.version).or(entry.active.as_ref());
        let discovery = config.discovery;
        let credentials = credentials(&config);
        let secrets = credentials.is_none();
        let cluster = Cluster::build_warming(
            Arc::new(config),
            &self.stats,
            previous.map(|previous| &*previous.cluster),
            credentials,
        );
        cluster.report_losses(&self.losses);
        let watch = match discovery {
            Discovery::StrictDns => resolver().map(|resolver| {
                dns::Watch::start(&cluster, &resolver, previous.and_then(|previous| previous.watch.as_ref()))
            }),
            _ => None,
        };
        let endpoints = match discovery {
            Discovery::Static | Discovery::OriginalDst => true,
            Discovery::StrictDns => watch.is_none(),
            Discovery::Eds => false,
        };
        let checks = health_check::Watch::start(&cluster, self.outside.surroundings(cluster.config()));
        cluster.stats().warming_state().set(1);
        self.warming += usize::from(entry.warming.is_none());
        let checked = checks.is_none();
        let version = Version { cluster, content, watch, checks, outliers: None };
        let warming = Warming { version, endpoints, secrets, checked };
        if endpoints {
            warming.await_checks(&name, &self.outside.internal);
        }
        entry.warming = Some(warming);
        self.ready.push(name);
        if is_new { Added::New } else { Added::Modified }
    }

    /// Drops a cluster. Returns what its versions were built from, or none if it can't be dropped.
    pub(super) fn remove(&mut self, name: &str, changes: &mut Changes) -> Option<Vec<Config>> {
        if self.entries.get(name)?.origin == Origin::Static {
            return None;
        }
        let entry = self.entries.remove(name)?;
        self.warming -= usize::from(entry.warming.is_some());
        if let Some(active) = &entry.active {
            active.cluster.note_removal();
        }
        self.active -= usize::from(entry.active.is_some());
        changes.clusters |= entry.active.is_some();
        changes.clusters_gone |= entry.active.is_some();
        let versions = entry.active.into_iter().chain(entry.warming.map(|warming| warming.version));
        Some(versions.map(|version| Arc::clone(version.cluster.config())).collect())
    }

    /// Puts every cluster in force that is ready. Returns their names, and what those that they replace were built from.
    pub(super) fn settle(&mut self, changes: &mut Changes) -> Vec<(Arc<str>, Option<Config>)> {
        let mut activated = Vec::new();
        for name in std::mem::take(&mut self.ready) {
            let Some(entry) = self.entries.get_mut(&name) else { continue };
            let Some(mut warming) = entry.warming.take_if(|it| it.endpoints && it.secrets && it.checked)
            else {
                continue;
            };
            self.warming -= 1;
            warming.version.cluster.announce();
            warming.version.cluster.stats().warming_state().set(0);
            if let Some(former) = &entry.active {
                warming.version.cluster.note_successor_of(&former.cluster);
            }
            warming.version.outliers =
                outlier::Watch::start(&warming.version.cluster, self.outside.outlier_events.clone());
            let replaced = entry.active.replace(warming.version);
            self.active += usize::from(replaced.is_none());
            changes.clusters = true;
            changes.clusters_gone |= replaced.is_some();
            let former = replaced.map(|replaced| Arc::clone(replaced.cluster.config()));
            activated.push((name, former));
        }
        activated
    }

    /// The endpoints of this version of a cluster came, or it waits no longer for them.
    pub(super) fn ready(&mut self, name: &Arc<str>, id: ClusterId) {
        if let Some(warming) = self.entries.get_mut(name).and_then(|entry| entry.warming.as_mut())
            && warming.version.cluster.id() == id
        {
            if !std::mem::replace(&mut warming.endpoints, true) {
                warming.await_checks(name, &self.outside.internal);
            }
            self.ready.push(Arc::clone(name));
        }
    }

    /// The endpoints of this version of a cluster were checked once.
    pub(super) fn checked(&mut self, name: &Arc<str>, id: ClusterId) {
        if let Some(warming) = self.entries.get_mut(name).and_then(|entry| entry.warming.as_mut())
            && warming.version.cluster.id() == id
        {
            warming.checked = true;
            self.ready.push(Arc::clone(name));
        }
    }

    /// The secrets of this version of a cluster came, or it waits no longer for them.
    pub(super) fn secrets_ready(&mut self, name: &Arc<str>, id: ClusterId) {
        if let Some(warming) = self.entries.get_mut(name).and_then(|entry| entry.warming.as_mut())
            && warming.version.cluster.id() == id
        {
            warming.secrets = true;
            self.ready.push(Arc::clone(name));
        }
    }

    /// The version of a cluster that is in force.
    pub(super) fn in_force(&self, name: &str) -> Option<&Arc<Cluster>> {
        self.entries.get(name)?.active.as_ref().map(|version| &version.cluster)
    }

    /// A version of this cluster warms.
    pub(super) fn is_warming(&self, name: &str) -> bool {
        self.entries.get(name).is_some_and(|entry| entry.warming.is_some())
    }

    /// The versions of a cluster: in force, then warming.
    pub(super) fn versions(&self, name: &str) -> impl Iterator<Item = &Arc<Cluster>> {
        let entry = self.entries.get(name);
        let active = entry.and_then(|entry| entry.active.as_ref());
        let warming = entry.and_then(|entry| entry.warming.as_ref()).map(|warming| &warming.version);
        active.into_iter().chain(warming).map(|version| &version.cluster)
    }

    /// Completes a look-up of names for the cluster that is warming under this name, if that is what it waits for.
    pub(super) fn unresolved(&self, name: &str) -> Option<(ClusterId, impl Future<Output = ()> + use<>)> {
        let warming = self.entries.get(name)?.warming.as_ref().filter(|warming| !warming.endpoints)?;
        let watch = warming.version.watch.as_ref()?;
        Some((warming.version.cluster.id(), watch.warmed()))
    }

    /// Whether there is one of this name in force.
    pub(super) fn is_active(&self, name: &str) -> bool {
        self.entries.get(name).is_some_and(|entry| entry.active.is_some())
    }

    /// Whether there is a cluster of this name, warm or not.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Whether a listener that names this cluster should wait for it: it is known, but has no endpoints yet.
    pub(super) fn is_coming(&self, name: &str) -> bool {
        self.warming > 0
            && self.entries.get(name).is_some_and(|entry| entry.active.is_none() && entry.warming.is_some())
    }

    /// Names of the clusters that came from a control plane.
    pub(super) fn dynamic(&self) -> Vec<Arc<str>> {
        let dynamic = self.entries.iter().filter(|(_, entry)| entry.origin == Origin::Dynamic);
        dynamic.map(|(name, _)| Arc::clone(name)).collect()
    }

    /// Names of those that warm.
    pub(super) fn warming(&self) -> impl Iterator<Item = &Arc<str>> {
        self.entries.iter().filter(|(_, entry)| entry.warming.is_some()).map(|(name, _)| name)
    }

    /// How many warm.
    pub(super) fn warming_len(&self) -> usize {
        self.warming
    }

    /// How many are in force.
    pub(super) fn active_len(&self) -> usize {
        self.active
    }
}
