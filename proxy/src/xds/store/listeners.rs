//! Listeners: those in force, and those that wait for their routes and clusters.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use socket2::Socket;

use super::changes::{Bound, Changes, Draining};
use super::clusters::{Clusters, Origin};
use crate::access_log::Registry;
use crate::bound;
use crate::config;
use crate::config::filter_chain::Terminal;
use crate::config::tcp_proxy::ClusterChoice;
use crate::listener::{Chain, Listener};
use crate::stats::Stats;

/// All listeners of the process.
#[derive(Debug)]
pub(super) struct Listeners {
    stats: Arc<Stats>,
    logs: Registry,
    workers: usize,
    entries: HashMap<Arc<str>, Entry>,
    /// Who has which address, warming or in force.
    owners: HashMap<SocketAddr, Arc<str>>,
    /// How many have something warming, and something in force.
    warming: usize,
    active: usize,
    /// Counts listeners, so that of two with one address the older one has it.
    next: u64,
}

#[derive(Debug)]
struct Entry {
    origin: Origin,
    order: u64,
    content: u64,
    active: Option<Arc<Listener>>,
    warming: Option<Warming>,
}

#[derive(Debug)]
struct Warming {
    listener: Arc<Listener>,
    sockets: Sockets,
}

/// What becomes of the listening sockets when a version comes into force.
#[derive(Debug)]
enum Sockets {
    /// There are none, or those of the former version go on.
    Same,
    /// These, instead of those that there may be.
    New(Vec<Vec<Socket>>),
    /// None any more.
    None,
}

/// What became of a listener that was added.
#[derive(Debug)]
pub(super) enum Added {
    /// It is the one that is there already.
    Unchanged,
    /// The bootstrap has one of this name, which stays.
    Blocked,
    /// A new name.
    New(Arc<Listener>),
    /// It replaces another.
    Modified(Arc<Listener>),
}

impl Listeners {
    pub(super) fn new(stats: &Arc<Stats>, logs: &Registry, workers: usize) -> Self {
        let (stats, logs) = (Arc::clone(stats), logs.clone());
        Self {
            stats,
            logs,
            workers,
            entries: HashMap::new(),
            owners: HashMap::new(),
            warming: 0,
            active: 0,
            next: 0,
        }
    }

    /// Takes a listener: opens its logs and binds its sockets. It is in force from a [`Listeners::settle`] on.
    /// `content` is the hash of the whole message.
    ///
    /// # Errors
    /// It can't be served; what was there before stays.
    pub(super) fn add(
        &mut self,
        config: &Arc<config::listener::Listener>,
        content: u64,
        origin: Origin,
    ) -> anyhow::Result<Added> {
        let name = &config.name;
        let existing = self.entries.get(name);
        if let Some(existing) = existing {
            if existing.origin == Origin::Static {
                return Ok(Added::Blocked);
            }
            if existing.content == content {
                return Ok(Added::Unchanged);
            }
        }
        self.check_addresses(config)?;
        let existing = self.entries.get(name);
        let active = existing.and_then(|entry| entry.active.as_ref());
        let listener =
            Arc::new(Listener::build(config, &self.stats, &self.logs, active.map(|active| &**active))?);
        let sockets = self.sockets(config, active.map(|active| &*active.config))?;
        self.stats.listener_manager().listener_create_success().add(self.workers as u64);
        // Nobody will have the addresses of a version that never came into force.
        let replaced =
            existing.and_then(|entry| entry.warming.as_ref()).map(|warming| &warming.listener.config);
        for address in replaced.into_iter().flat_map(|replaced| owned(replaced)) {
            if active.is_none_or(|active| !active.config.addresses.contains(&address)) {
                self.owners.remove(&address);
            }
        }
        for address in owned(config) {
            self.owners.insert(address, Arc::clone(name));
        }
        let is_new = existing.is_none();
        let order = existing.map_or(self.next, |entry| entry.order);
        self.next += 1;
        let entry = self.entries.entry(Arc::clone(name)).or_insert(Entry {
            origin,
            order,
            content,
            active: None,
            warming: None,
        });
        entry.content = content;
        self.warming += usize::from(entry.warming.is_none());
        entry.warming = Some(Warming { listener: Arc::clone(&listener), sockets });
        Ok(if is_new { Added::New(listener) } else { Added::Modified(listener) })
    }

    /// No two listeners have an address in common.
    fn check_addresses(&self, config: &config::listener::Listener) -> anyhow::Result<()> {
        for address in owned(config) {
            if let Some(other) = self.owners.get(&address).filter(|other| **other != config.name) {
                anyhow::bail!("has duplicate address '{address}' as existing listener '{other}'");
            }
        }
        Ok(())
    }

    fn sockets(
        &self,
        config: &config::listener::Listener,
        active: Option<&config::listener::Listener>,
    ) -> anyhow::Result<Sockets> {
        let had_some = active.is_some_and(|active| active.bind_to_port);
        Ok(match config.bind_to_port {
            false if had_some => Sockets::None,
            false => Sockets::Same,
            true if active.is_some_and(|active| bound::same_sockets(active, config)) => Sockets::Same,
            // Its text has everything that its sources say.
            true => {
                Sockets::New(bound::bind(config, self.workers).map_err(|error| anyhow::anyhow!("{error}"))?)
            }
        })
    }

    /// Drops a listener. Returns its versions, or none if it can't be dropped.
    pub(super) fn remove(&mut self, name: &str, changes: &mut Changes) -> Option<Vec<Arc<Listener>>> {
        if self.entries.get(name)?.origin == Origin::Static {
            return None;
        }
        let entry = self.entries.remove(name)?;
        self.warming -= usize::from(entry.warming.is_some());
        self.active -= usize::from(entry.active.is_some());
        let versions = entry.active.iter().chain(entry.warming.as_ref().map(|warming| &warming.listener));
        for address in versions.flat_map(|version| owned(&version.config)) {
            if self.owners.get(&address).is_some_and(|owner| **owner == *name) {
                self.owners.remove(&address);
            }
        }
        if let Some(active) = &entry.active {
            changes.listeners = true;
            if active.config.bind_to_port {
                changes.close.push(Arc::clone(&active.config.name));
            }
            changes.released.push(Arc::clone(active));
            let chains = active.chains().to_vec();
            changes.draining.push(Draining {
                listener: Arc::clone(&active.config.name),
                whole: true,
                chains,
            });
        }
        Some(entry.active.into_iter().chain(entry.warming.map(|warming| warming.listener)).collect())
    }

    /// Puts every listener in force whose routes and clusters are there. Returns their names, and former versions.
    pub(super) fn settle(
        &mut self,
        clusters: &Clusters,
        has_routes: impl Fn(&Chain) -> bool,
        changes: &mut Changes,
    ) -> Vec<(Arc<str>, Option<Arc<Listener>>)> {
        let mut activated = Vec::new();
        if self.warming == 0 {
            return activated;
        }
        for (name, entry) in &mut self.entries {
            let ready = |warming: &mut Warming| {
                warming.listener.rds_chains().all(|(chain, _)| has_routes(chain))
                    && !waits_for(&warming.listener, clusters)
            };
            let Some(warming) = entry.warming.take_if(ready) else { continue };
            self.warming -= 1;
            changes.listeners = true;
            let config = Arc::clone(&warming.listener.config);
            match warming.sockets {
                Sockets::Same => {}
                Sockets::None => changes.close.push(Arc::clone(name)),
                Sockets::New(sockets) => {
                    changes.close.push(Arc::clone(name));
                    let (listener, direction) = (Arc::clone(name), config.traffic_direction);
                    changes.listen.push(Bound { listener, direction, sockets });
                }
            }
            let former = entry.active.replace(Arc::clone(&warming.listener));
            self.active += usize::from(former.is_none());
            if let Some(former) = &former {
                for address in owned(&former.config).filter(|address| !config.addresses.contains(address)) {
                    self.owners.remove(&address);
                }
                retire(former, &warming.listener, &self.stats, changes);
            }
            activated.push((Arc::clone(name), former));
        }
        activated
    }

    /// The version of a listener that is in force.
    pub(super) fn in_force(&self, name: &str) -> Option<&Arc<Listener>> {
        self.entries.get(name)?.active.as_ref()
    }

    /// Listeners in force, older ones first.
    pub(super) fn active(&self) -> Vec<Arc<Listener>> {
        let mut active: Vec<_> = self
            .entries
            .values()
            .filter_map(|entry| Some((entry.order, Arc::clone(entry.active.as_ref()?))))
            .collect();
        active.sort_unstable_by_key(|(order, _)| *order);
        active.into_iter().map(|(_, listener)| listener).collect()
    }

    /// Every version that is in force or warming.
    pub(super) fn versions(&self) -> impl Iterator<Item = &Arc<Listener>> {
        self.entries.values().flat_map(|entry| {
            entry.active.iter().chain(entry.warming.as_ref().map(|warming| &warming.listener))
        })
    }

    /// Names of the listeners that came from a control plane.
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

/// The addresses that nobody else may have; port 0 is a new one each time.
fn owned(config: &config::listener::Listener) -> impl Iterator<Item = SocketAddr> {
    config.addresses.iter().copied().filter(|address| address.port() != 0)
}

/// What of a former version has to end.
fn retire(former: &Arc<Listener>, new: &Arc<Listener>, stats: &Stats, changes: &mut Changes) {
    let kept = |chain: &Arc<Chain>| new.chains().iter().any(|other| Arc::ptr_eq(other, chain));
    let chains: Vec<_> = former.chains().iter().filter(|chain| !kept(chain)).cloned().collect();
    let whole = !new.is_in_place_update_of(former);
    if !whole {
        stats.listener_manager().listener_in_place_updated().inc();
    }
    if former.config.addresses != new.config.addresses {
        changes.released.push(Arc::clone(former));
    }
    if !chains.is_empty() {
        changes.draining.push(Draining { listener: Arc::clone(&former.config.name), whole, chains });
    }
}

/// Whether a cluster that it names is known but has no endpoints yet.
fn waits_for(listener: &Listener, clusters: &Clusters) -> bool {
    if clusters.warming_len() == 0 {
        return false;
    }
    listener.chains().iter().any(|chain| match &chain.config.terminal {
        Some(Terminal::TcpProxy(proxy)) => names_coming(&proxy.clusters, clusters),
        Some(Terminal::HttpAsTcp(routing)) => routing
            .virtual_hosts
            .iter()
            .any(|host| host.proxy.as_ref().is_some_and(|proxy| names_coming(&proxy.clusters, clusters))),
        Some(Terminal::HttpFromRds(_)) | None => false,
    })
}

fn names_coming(choice: &ClusterChoice, clusters: &Clusters) -> bool {
    match choice {
        ClusterChoice::Single(name) => clusters.is_coming(name),
        ClusterChoice::Weighted(all) => all.iter().any(|cluster| clusters.is_coming(&cluster.name)),
    }
}
