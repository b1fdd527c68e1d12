//! Route configurations of HTTP listeners (RDS), and the virtual hosts that are sent apart from them (VHDS).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Weak};

use tidegate_api::route as api;

use crate::access_log::Registry;
use crate::config::config_source::{ConfigSource, Source};
use crate::config::dynamic::{self, Valid};
use crate::listener::{Chain, ChainId, Listener, Service};
use crate::stats::Stats;
use crate::xds::Kind;

use super::response::{label, log_warnings};

/// What identifies a route configuration.
type Id = (Source, Arc<str>);

/// All route configurations that some chain wants.
#[derive(Debug)]
pub(super) struct Routes {
    stats: Arc<Stats>,
    logs: Registry,
    routes: HashMap<Id, Route>,
}

#[derive(Debug, Default)]
struct Route {
    config: Option<Valid<api::RouteConfiguration>>,
    /// By name (`route configuration/virtual host`).
    hosts: BTreeMap<Arc<str>, api::VirtualHost>,
    /// VHDS was answered.
    hosts_came: bool,
    /// It is waited for no longer.
    given_up: bool,
    chains: Vec<Weak<Chain>>,
}

impl Route {
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
                Route::default()
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

    /// Takes a route configuration. Returns the message's `vhds`, if it has one.
    ///
    /// # Errors
    /// It can't be served; the one before stays.
    pub(super) fn update(
        &mut self,
        source: &Source,
        name: &Arc<str>,
        config: Valid<api::RouteConfiguration>,
    ) -> anyhow::Result<Option<tidegate_api::core::ConfigSource>> {
        let Some(route) = self.routes.get_mut(&(source.clone(), Arc::clone(name))) else { return Ok(None) };
        let vhds = config.message.vhds.as_ref().and_then(|vhds| vhds.config_source.clone());
        let before = route.config.replace(config);
        if let Err(error) = apply_all(route, name, &self.stats, &self.logs) {
            route.config = before;
            return Err(error);
        }
        Ok(vhds)
    }

    /// Takes virtual hosts of a route configuration, and drops others.
    pub(super) fn update_hosts(
        &mut self,
        added: &[(Arc<str>, api::VirtualHost)],
        removed: &[Arc<str>],
    ) -> Vec<(Arc<str>, String)> {
        let mut refused = Vec::new();
        for ((_, name), route) in &mut self.routes {
            if !route.wants_hosts() {
                continue;
            }
            route.hosts_came = true;
            let before = route.hosts.clone();
            let mine = |host: &str| host.strip_prefix(&**name).is_some_and(|rest| rest.starts_with('/'));
            for host in removed {
                route.hosts.remove(host);
            }
            let mut changed = Vec::new();
            for (host, message) in added.iter().filter(|(host, _)| mine(host)) {
                changed.push(Arc::clone(host));
                route.hosts.insert(Arc::clone(host), message.clone());
            }
            if let Err(error) = apply_all(route, name, &self.stats, &self.logs) {
                route.hosts = before;
                refused.extend(changed.into_iter().map(|host| (host, error.to_string())));
            }
        }
        refused
    }

    /// Waits for this one no longer. Returns whether it had been waited for.
    pub(super) fn give_up(&mut self, source: &Source, name: &Arc<str>) -> bool {
        match self.routes.get_mut(&(source.clone(), Arc::clone(name))) {
            Some(route) if !route.ready() => {
                route.given_up = true;
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
    let hosts = route.hosts.values().cloned().collect();
    let converted = dynamic::routes(config.clone(), hosts, manager, &label)?;
    log_warnings(name, &converted.warnings);
    chain.set_routes(converted.value, stats, logs)?;
    Ok(())
}
