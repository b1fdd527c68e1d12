//! Route configurations of HTTP listeners (RDS), and the virtual hosts that are sent apart from them (VHDS).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Weak};

use tidegate_api::route as api;

use crate::access_log::Registry;
use crate::config::config_source::{ConfigSource, Source};
use crate::config::dynamic::{self, Valid};
use crate::listener::{Chain, ChainId, Listener, Service};
use crate::stats::{RdsStats, Stats};
use crate::xds::Kind;
use crate::xds::tables::Held;

use super::response::{label, log_warnings};
use super::subscription::{Applying, SubscriptionStats};

/// What identifies a route configuration.
type Id = (Source, Arc<str>);

/// All route configurations that some chain wants.
#[derive(Debug)]
pub(super) struct Routes {
    stats: Arc<Stats>,
    logs: Registry,
    routes: HashMap<Id, Route>,
}

#[derive(Debug)]
struct Route {
    stats: RdsStats,
    /// Those of its virtual hosts, when it has them from VHDS.
    host_stats: Option<RdsStats>,
    /// Of the connection manager that wanted it first, as in Envoy.
    stat_prefix: Arc<str>,
    config: Option<Valid<api::RouteConfiguration>>,
    /// The same, encoded.
    known: Option<Arc<[u8]>>,
    /// Where its virtual hosts come from, if not with it.
    host_source: Option<Source>,
    /// By name (`route configuration/virtual host`).
    hosts: BTreeMap<Arc<str>, Host>,
    /// VHDS was answered.
    hosts_came: bool,
    /// It is waited for no longer.
    given_up: bool,
    chains: Vec<Weak<Chain>>,
}

/// A virtual host of VHDS.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub(super) message: api::VirtualHost,
    pub(super) held: Held,
}

/// What a response of VHDS says.
pub(super) struct HostChanges<'a> {
    /// New, or changed.
    pub(super) added: &'a [(Arc<str>, Host)],
    /// As they were.
    pub(super) unchanged: &'a [Arc<str>],
    pub(super) removed: &'a [Arc<str>],
}

/// Whether a virtual host belongs to a route configuration.
fn is_of(host: &str, route: &str) -> bool {
    host.strip_prefix(route).is_some_and(|rest| rest.starts_with('/'))
}

impl Route {
    fn new(stats: &Stats, stat_prefix: &Arc<str>, name: &str) -> Self {
        Self {
            stats: stats.rds(stat_prefix, name),
            host_stats: None,
            stat_prefix: Arc::clone(stat_prefix),
            config: None,
            known: None,
            host_source: None,
            hosts: BTreeMap::new(),
            hosts_came: false,
            given_up: false,
            chains: Vec::new(),
        }
    }

    fn wants_hosts(&self) -> bool {
        self.config.as_ref().is_some_and(|config| config.message.vhds.is_some())
    }

    /// Whether listeners need not wait for it.
    fn ready(&self) -> bool {
        self.given_up || (self.config.is_some() && (self.hosts_came || !self.wants_hosts()))
    }

    fn chains(&self) -> impl Iterator<Item = Arc<Chain>> {
        self.chains.iter().filter_map(Weak::upgrade)
    }
}

impl Routes {
    pub(super) fn new(stats: &Arc<Stats>, logs: &Registry) -> Self {
        Self { stats: Arc::clone(stats), logs: logs.clone(), routes: HashMap::new() }
    }

    /// Nobody wants any.
    pub(super) fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    /// Notes the route configurations of a listener. Returns those that nobody wanted yet.
    pub(super) fn add(&mut self, listener: &Listener) -> Vec<(ConfigSource, Arc<str>)> {
        let mut new = Vec::new();
        for (chain, rds) in listener.rds_chains() {
            let id = (rds.config.source.clone(), Arc::clone(&rds.route_config_name));
            let route = self.routes.entry(id).or_insert_with(|| {
                new.push((rds.config.clone(), Arc::clone(&rds.route_config_name)));
                let route = Route::new(&self.stats, &rds.proxy.stat_prefix, &rds.route_config_name);
                route.stats.subscribed(&rds.config.source);
                route
            });
            route.chains.retain(|chain| chain.strong_count() > 0);
            if !route.chains().any(|known| Arc::ptr_eq(&known, chain)) {
                route.chains.push(Arc::downgrade(chain));
                if let Err(error) = apply(route, chain, &rds.route_config_name, &self.stats, &self.logs) {
                    tracing::warn!(route = %rds.route_config_name, "{error}");
                }
            }
        }
        new
    }

    /// Forgets the chains that are not in use. Returns what nobody wants any more.
    pub(super) fn forget(&mut self, in_use: &HashSet<ChainId>) -> Vec<(Source, Arc<str>)> {
        let mut gone = Vec::new();
        self.routes.retain(|(source, name), route| {
            route.chains.retain(|chain| chain.upgrade().is_some_and(|chain| in_use.contains(&chain.id)));
            if route.chains.is_empty() {
                gone.push((source.clone(), Arc::clone(name)));
            }
            !route.chains.is_empty()
        });
        gone
    }

    /// Whether somebody wants it.
    pub(super) fn wants(&self, source: &Source, name: &Arc<str>) -> bool {
        self.routes.contains_key(&(source.clone(), Arc::clone(name)))
    }

    /// Takes a route configuration, which is encoded as `body` and may have its virtual hosts from elsewhere.
    ///
    /// # Errors
    /// It can't be served; the one before stays.
    pub(super) fn update(
        &mut self,
        source: &Source,
        name: &Arc<str>,
        config: Valid<api::RouteConfiguration>,
        body: Arc<[u8]>,
        host_source: Option<Source>,
    ) -> anyhow::Result<()> {
        let Some(route) = self.routes.get_mut(&(source.clone(), Arc::clone(name))) else { return Ok(()) };
        let waits_for_hosts = host_source.is_some() && !route.hosts_came;
        let before = route.config.replace(config);
        if let Err(error) = apply_all(route, name, &self.stats, &self.logs) {
            route.config = before;
            return Err(error);
        }
        if !waits_for_hosts && route.known.as_ref() != Some(&body) {
            route.stats.count_reload();
        }
        route.known = Some(body);
        match &host_source {
            Some(source) if route.host_source.as_ref() != Some(source) => {
                let stats = self.stats.vhds(&route.stat_prefix, name);
                stats.subscribed(source);
                route.host_stats = Some(stats);
            }
            Some(_) => {}
            None => route.host_stats = None,
        }
        route.host_source = host_source;
        Ok(())
    }

    /// Whether it is what was accepted last.
    pub(super) fn knows(&self, source: &Source, name: &str, body: &[u8]) -> bool {
        let route = self.routes.get(&(source.clone(), Arc::from(name)));
        route.is_some_and(|route| route.known.as_deref() == Some(body))
    }

    /// Whether all who want this virtual host have it already.
    pub(super) fn knows_host(&self, source: &Source, name: &str, body: &[u8]) -> bool {
        let mut wanting = self.with_hosts_from(source).filter(|(route, _)| is_of(name, route)).peekable();
        wanting.peek().is_some()
            && wanting.all(|(_, route)| route.hosts.get(name).is_some_and(|host| *host.held.body == *body))
    }

    /// Route configurations that have their virtual hosts from there.
    fn with_hosts_from(&self, source: &Source) -> impl Iterator<Item = (&Arc<str>, &Route)> {
        let routes = self.routes.iter().filter(move |(_, route)| route.host_source.as_ref() == Some(source));
        routes.map(|((_, name), route)| (name, route))
    }

    fn from(&self, source: &Source) -> impl Iterator<Item = (&Arc<str>, &Route)> {
        self.routes
            .iter()
            .filter(move |((from, _), _)| from == source)
            .map(|((_, name), route)| (name, route))
    }

    pub(super) fn count_success(&self, source: &Source, name: &Arc<str>, applying: &Applying) {
        if let Some(route) = self.routes.get(&(source.clone(), Arc::clone(name))) {
            route.stats.count_success(applying);
        }
    }

    /// A response that tells everybody something does not have what these want.
    pub(super) fn count_empty(&self, source: &Source, mentioned: &HashSet<Arc<str>>, applying: &Applying) {
        for (_, route) in self.from(source).filter(|(name, _)| !mentioned.contains(*name)) {
            route.stats.update_empty().inc();
            route.stats.count_success(applying);
        }
    }

    pub(super) fn count_rejected(&self, source: &Source, concerns: impl Fn(&str) -> bool) {
        let concerned = self.from(source).filter(|(name, _)| concerns(name));
        concerned.for_each(|(_, route)| route.stats.count_rejected());
    }

    pub(super) fn count_failure(&self, source: &Source) {
        self.from(source).for_each(|(_, route)| route.stats.count_failure());
    }

    /// The response named these virtual hosts, or all.
    pub(super) fn count_rejected_hosts(&self, source: &Source, refused: Option<&[&str]>) {
        for (name, route) in self.with_hosts_from(source) {
            if refused.is_none_or(|refused| refused.iter().any(|host| is_of(host, name))) {
                route.host_stats.iter().for_each(SubscriptionStats::count_rejected);
            }
        }
    }

    pub(super) fn count_failure_of_hosts(&self, source: &Source) {
        let routes = self.with_hosts_from(source);
        routes.flat_map(|(_, route)| &route.host_stats).for_each(SubscriptionStats::count_failure);
    }

    /// Takes virtual hosts of a route configuration, and drops others.
    pub(super) fn update_hosts(
        &mut self,
        source: &Source,
        changes: &HostChanges<'_>,
        applying: &Applying,
    ) -> Vec<(Arc<str>, String)> {
        let mut refused = Vec::new();
        for ((_, name), route) in &mut self.routes {
            if route.host_source.as_ref() != Some(source) {
                continue;
            }
            let first = !std::mem::replace(&mut route.hosts_came, true);
            let before = route.hosts.clone();
            for host in changes.removed {
                route.hosts.remove(host);
            }
            let gone = route.hosts.len() != before.len();
            let mut changed = Vec::new();
            for (host, it) in changes.added.iter().filter(|(host, _)| is_of(host, name)) {
                changed.push(Arc::clone(host));
                route.hosts.insert(Arc::clone(host), it.clone());
            }
            let new = gone || !changed.is_empty();
            if (new || first)
                && let Err(error) = apply_all(route, name, &self.stats, &self.logs)
            {
                route.hosts = before;
                refused.extend(changed.into_iter().map(|host| (host, error.to_string())));
                continue;
            }
            let Some(stats) = &route.host_stats else { continue };
            if new {
                stats.config_reload().inc();
                route.stats.count_reload();
            }
            if new || changes.unchanged.iter().any(|host| is_of(host, name)) {
                stats.count_success(applying);
            }
        }
        refused
    }

    /// Waits for this one no longer. Returns whether it had been waited for.
    pub(super) fn give_up(&mut self, source: &Source, name: &Arc<str>) -> bool {
        match self.routes.get_mut(&(source.clone(), Arc::clone(name))) {
            Some(route) if !route.ready() => {
                route.given_up = true;
                let stats = route.host_stats.as_ref().filter(|_| route.config.is_some());
                stats.unwrap_or(&route.stats).count_timeout();
                true
            }
            _ => false,
        }
    }

    /// Whether a chain's routes are there, or won't come in time.
    pub(super) fn ready(&self, chain: &Chain) -> bool {
        let Service::Http(http) = &chain.service else { return true };
        let Some(rds) = &http.rds else { return true };
        let id = (rds.config.source.clone(), Arc::clone(&rds.route_config_name));
        self.routes.get(&id).is_none_or(Route::ready)
    }

    /// Names of those that are waited for.
    pub(super) fn waiting(&self) -> impl Iterator<Item = &Arc<str>> {
        self.routes.iter().filter(|(_, route)| !route.ready()).map(|((_, name), _)| name)
    }
}

fn apply_all(route: &Route, name: &str, stats: &Stats, logs: &Registry) -> anyhow::Result<()> {
    for chain in route.chains() {
        apply(route, &chain, name, stats, logs)?;
    }
    Ok(())
}

/// Gives a chain its routes.
fn apply(route: &Route, chain: &Chain, name: &str, stats: &Stats, logs: &Registry) -> anyhow::Result<()> {
    let (Some(config), Service::Http(http)) = (&route.config, &chain.service) else { return Ok(()) };
    let Some(manager) = &http.rds else { return Ok(()) };
    let label = label(Kind::RouteConfiguration, name);
    let hosts = route.hosts.values().map(|host| host.message.clone()).collect();
    let converted = dynamic::routes(config.clone(), hosts, manager, &label)?;
    log_warnings(name, &converted.warnings);
    chain.set_routes(converted.value, stats, logs)?;
    Ok(())
}
